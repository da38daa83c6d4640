//! The command line: one file per subcommand; exit codes in one table (`exit`).

mod check;
mod control;
mod demo;
mod doctor;
mod events;
mod exit;
mod failback;
mod failover;
pub mod inspect;
mod log;
mod logger;
mod man;
mod migrate;
mod names;
mod promote;
mod push;
mod relocate;
mod run;
mod scan;
mod serve;
mod setup;
mod state;
mod synclog;
mod syslog;
mod top;
mod verify;

pub use exit::Exit;

use crate::engine::Word;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Replicates Cyrus IMAP mail stores by watching the files of an unmodified server.
#[derive(Debug, Parser)]
#[command(name = "spooltap", version, about, max_term_width = 100, after_help = exit::help())]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Common options")]
struct Common {
    /// Cyrus's configuration [default: /etc/imapd.conf]
    #[arg(short = 'C', long = "imapd-conf", global = true, value_name = "FILE")]
    imapd_conf: Option<PathBuf>,
    /// Our own configuration (TOML), for what imapd.conf cannot say [default: /etc/spooltap/spooltap.toml if it exists]
    #[arg(long, global = true, value_name = "FILE", env = "SPOOLTAP_CONFIG", hide_env_values = true)]
    config: Option<PathBuf>,
    /// Directory of our state; deleting it costs only a full comparison [default: /var/lib/spooltap]
    #[arg(long, global = true, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Where to replicate to: csync://USER@HOST:PORT (also csyncs, imap, imaps), csync+unix:///PATH,
    /// file:///DIR, cyrus:///DIR, or its name in the configuration; may be repeated
    #[arg(long, global = true, value_name = "URL")]
    replica: Vec<String>,
    /// File with the password [else: credential spooltap-password, SPOOLTAP_PASSWORD, /etc/spooltap/password, sync_password]
    #[arg(long, global = true, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// sync channel whose CHANNEL_sync_* options of imapd.conf name the replica
    #[arg(short = 'n', long, global = true)]
    channel: Option<String>,
    /// Compression towards the replica: auto (for far ones: connecting takes 2 ms or more), on, off
    #[arg(long, global = true, value_name = "WHEN")]
    compress: Option<String>,
    /// Sessions per replica [default: 4]
    #[arg(long, global = true)]
    lanes: Option<usize>,
    /// How change is noticed: auto, inotify, fanotify, locks, poll, synclog or scan [default: auto]
    #[arg(long, global = true, value_name = "SOURCE")]
    capture: Option<String>,
    /// Lift the fuse that stops mass removals on the replica
    #[arg(long, global = true)]
    allow_removals: bool,
    /// Leave out what an older replica cannot hold, instead of refusing the mailbox
    #[arg(long, global = true)]
    allow_loss: bool,
    /// Machine-readable output on stdout
    #[arg(long, global = true)]
    json: bool,
    /// More on stderr; twice for every step
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Form of the log: text or json on stderr, or journald
    #[arg(long, global = true, value_enum, default_value = "text")]
    log_format: logger::LogFormat,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Watches the source and keeps the replica equal, in the foreground, until SIGTERM
    Run(run::RunArgs),
    /// Replicates once: everything, or the named users, mailboxes or users' data
    Push(push::PushArgs),
    /// A csync server in front of an archive or a Cyrus-format store, for sync_client and for spooltap, until SIGTERM
    Serve(serve::ServeArgs),
    /// Shows what differs from the receipts, without pushing
    Scan(scan::ScanArgs),
    /// Shows the content of any Cyrus file
    Inspect {
        /// cyrus.index, cyrus.header, a database, a quota file, imapd.conf …
        file: PathBuf,
    },
    /// Shows live what the watcher sees: each touched path and what it may have changed
    Events(events::EventsArgs),
    /// Compares source and replica mailbox by mailbox; exit code 1 when they differ
    Verify(verify::VerifyArgs),
    /// Puts a record into Cyrus's rolling log, with the options of cyr_synclog
    Synclog(synclog::SynclogArgs),
    /// What is remembered of the replicas: check, export, drop
    #[command(subcommand)]
    State(state::StateCommand),
    /// Looks for what would keep changes from being noticed or replicated, and says what cures it
    Doctor,
    /// Shows what would be run, or every fault of the configuration
    Check,
    /// Shows the running daemon's lag, queue and faults; exit code 0 fine, 1 warning, 2 critical, 3 not running
    Status(control::StatusArgs),
    /// The running daemon live on a terminal: lag, queue, rates, capture, quarantine, memory; q quits
    Top(top::TopArgs),
    /// Sends nothing of a user, a mailbox or a whole replica (--replica) until `resume`; changes are collected
    Pause(control::SubjectArgs),
    /// Ends pauses and skips
    Resume(control::SubjectArgs),
    /// Tries now what failed, and what was skipped
    Retry(control::SubjectArgs),
    /// Gives a user or a mailbox up: not tried again and not counted until `retry` or `resume`
    Skip(control::SubjectArgs),
    /// Moves a user to one replica: filled and followed, compared, then removed from the others
    Move(relocate::MoveArgs),
    /// Lifts the fuse on mass removals for some minutes
    Allow(control::AllowArgs),
    /// Is everything confirmed? Exit code 0 yes, 1 no; with --wait it waits until it is
    Drain(failover::DrainArgs),
    /// May the replica take over? GO or NO-GO with every reason; exit code 0 or 1
    FailoverCheck(failover::FailoverArgs),
    /// A replica takes over: what it lacks is listed, it is checked, and nothing is pushed over it any more
    Promote(promote::PromoteArgs),
    /// The way back: both sides' differences first, then the old source is brought in line with the promoted store
    Failback(failback::FailbackArgs),
    /// The road from an old server to a new one: preflight, seed, cut-over
    #[command(subcommand)]
    Migrate(migrate::MigrateCommand),
    /// Replays a recorded store with the watcher on, into an archive, and compares it with what IMAP showed
    Demo(demo::DemoArgs),
    /// Writes the manual pages into a directory
    Man(man::ManArgs),
    /// Prints completions for a shell: spooltap completions bash > /etc/bash_completion.d/spooltap
    Completions(man::CompletionsArgs),
}

/// An error with the exit code that tells its kind.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub error: anyhow::Error,
}

impl Failure {
    fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into() }
    }
}

/// For errors of which nothing more is known than that they are ours.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { exit: Exit::State, error }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self { exit: Exit::State, error: error.into() }
    }
}

type Outcome = Result<Exit, Failure>;

/// Parses the arguments, runs the subcommand, prints what went wrong.
pub fn run() -> ExitCode {
    let given: Vec<_> = std::env::args_os().collect();
    if let Some((name, words)) = names::called(&given) {
        return names::run(name, words);
    }
    let cli = match Cli::try_parse_from(synclog::arguments(given)) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { Exit::Usage as u8 } else { 0 });
        }
    };
    match logger::start(&cli).and_then(|()| dispatch(cli)) {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(failure) => {
            eprintln!("spooltap: {:#}", failure.error);
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn dispatch(cli: Cli) -> Outcome {
    let common = &cli.common;
    match cli.command {
        Command::Run(args) => run::run(common, &args),
        Command::Push(args) => push::push(common, &args),
        Command::Serve(args) => serve::serve(common, &args),
        Command::Scan(args) => scan::scan(common, &args),
        Command::Inspect { file } => match inspect::inspect(&file, common.json, &mut std::io::stdout().lock()) {
            Ok(()) => Ok(Exit::Ok),
            Err(error) if error.is::<std::io::Error>() => Err(Failure::new(Exit::Source, error)),
            Err(error) => Err(Failure::new(Exit::Data, error)),
        },
        Command::Events(args) => events::events(common, &args),
        Command::Verify(args) => verify::verify(common, &args),
        Command::Synclog(args) => synclog::synclog(common, &args),
        Command::State(command) => state::state(common, &command),
        Command::Doctor => doctor::doctor(common),
        Command::Check => check::check(common),
        Command::Status(args) => control::status(common, &args),
        Command::Top(args) => top::top(common, &args),
        Command::Pause(args) => control::order(common, &args, Word::Pause),
        Command::Resume(args) => control::order(common, &args, Word::Resume),
        Command::Retry(args) => control::order(common, &args, Word::Retry),
        Command::Skip(args) => control::order(common, &args, Word::Skip),
        Command::Move(args) => relocate::relocate(common, &args),
        Command::Allow(args) => control::allow(common, &args),
        Command::Drain(args) => failover::drain(common, &args),
        Command::FailoverCheck(args) => failover::check(common, &args),
        Command::Promote(args) => promote::promote(common, &args),
        Command::Failback(args) => failback::failback(common, &args),
        Command::Migrate(command) => migrate::migrate(common, &command),
        Command::Demo(args) => demo::demo(common, &args),
        Command::Man(args) => man::man(&args),
        Command::Completions(args) => man::completions(&args),
    }
}
