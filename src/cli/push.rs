//! `spooltap push`: once, with progress.

use super::setup::Setup;
use super::{Common, Exit, Failure, Outcome};
use crate::engine::{Engine, Event, EventSink, Item, Lane, Options, fence};
use crate::model::{MailStore, MboxName, UserId, UserPart};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// Everything: all users, all shared mailboxes, quotas, server annotations
    #[arg(short = 'A', long)]
    all: bool,
    /// These users
    #[arg(short = 'u', long = "user", value_name = "USER", num_args = 1..)]
    users: Vec<String>,
    /// These mailboxes, by internal name (user.jane.Sent)
    #[arg(short = 'm', long = "mailbox", value_name = "MAILBOX", num_args = 1..)]
    mailboxes: Vec<String>,
    /// Subscriptions, seen state and Sieve scripts of these users
    #[arg(short = 's', long = "meta", value_name = "USER", num_args = 1..)]
    meta: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct PushArgs {
    #[command(flatten)]
    which: Which,
    /// Print the steps, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Look at the replica itself instead of trusting the receipts
    #[arg(long)]
    compare: bool,
    /// Take the mail from this archive instead of the live spool: file:///DIR
    #[arg(long, value_name = "URL")]
    from: Option<String>,
}

impl PushArgs {
    pub(super) fn everything() -> Self {
        let which = Which { all: true, users: Vec::new(), mailboxes: Vec::new(), meta: Vec::new() };
        Self { which, dry_run: false, compare: false, from: None }
    }
}

pub(super) fn push(common: &Common, args: &PushArgs) -> Outcome {
    let setup = Setup::open_from(common, args.from.as_deref())?;
    let state = setup.state()?;
    // What is wrong with a replica is told once and before anything is read.
    setup.none_is_promoted()?;
    for target in setup.replica_targets()? {
        fence::open(&*target).map_err(super::setup::replica_failure)?.close();
    }
    setup.store.listing().map_err(|error| Failure::new(Exit::Source, error))?;
    let bar = progress(common.json);
    let trouble: Arc<Mutex<Option<String>>> = Arc::default();
    let sink = sink(common, args.dry_run, &bar, trouble.clone());
    let options = Options {
        lanes: setup.config.lanes,
        dry_run: args.dry_run,
        stop_on_fatal: true,
        allow_removals: setup.config.allow_removals,
        allow_loss: setup.config.allow_loss,
        removal_delay: setup.config.removal_delay,
        share: setup.share()?,
        ..Options::default()
    };
    let started = Instant::now();
    let engine = Engine::start(setup.store.clone(), setup.targets(&state)?, &options, sink);
    choose(&setup, &engine, args)?;
    bar.set_length(engine.stats().iter().map(|stats| (stats.queue.pending + stats.queue.running) as u64).sum());
    let worked = loop {
        if engine.settle(4, Some(Duration::from_millis(200))) {
            break true;
        }
        let stats = engine.stats();
        if stats.iter().any(|stats| stats.fatal.is_some() && stats.sessions == 0) && started.elapsed().as_secs() > 4 {
            break false;
        }
        let left: u64 = stats.iter().map(|stats| (stats.queue.pending + stats.queue.running) as u64).sum();
        bar.set_length(bar.length().unwrap_or(0).max(left));
        bar.set_position(bar.length().unwrap_or(0).saturating_sub(left));
        if stats.iter().any(|stats| stats.fatal.is_some()) && left == 0 {
            break false;
        }
    };
    bar.finish_and_clear();
    let stats = engine.stats();
    engine.stop(setup.config.shutdown_timeout);
    state.flush();
    let mut failed = Vec::new();
    for stats in &stats {
        failed.extend(stats.queue.failed.iter().map(|failure| {
            (
                failure.mailbox.clone().unwrap_or_else(|| format!("{} {}", failure.lane, failure.item)),
                failure.reason.clone(),
            )
        }));
    }
    if common.json {
        let seconds = started.elapsed().as_secs_f64();
        let line = serde_json::json!({ "elapsed_seconds": seconds, "replicas": stats, "failed": failed });
        writeln!(std::io::stdout(), "{line}")?;
    } else {
        for (what, reason) in &failed {
            eprintln!("spooltap: {what}: {reason}");
        }
    }
    if let Some(reason) = stats.iter().find_map(|stats| stats.fatal.clone().filter(|_| !worked)) {
        let exit = if reason.starts_with("connection to ") { Exit::Replica } else { Exit::Refused };
        return Err(Failure::new(exit, anyhow::anyhow!(reason)));
    }
    // What was not read was not pushed, and nobody waits here until it can be read again.
    if let Some(reason) = trouble.lock().ok().and_then(|mut trouble| trouble.take()) {
        return Err(Failure::new(Exit::Source, anyhow::anyhow!(reason)));
    }
    Ok(if failed.is_empty() { Exit::Ok } else { Exit::Differs })
}

fn choose(setup: &Setup<dyn MailStore>, engine: &Engine, args: &PushArgs) -> Result<(), Failure> {
    let prefix = setup.store.deleted_prefix();
    if args.which.all {
        if args.compare {
            let listing = setup.store.listing().map_err(|error| Failure::new(Exit::Source, error))?;
            let mut lanes: Vec<Lane> = listing.entries().map(|entry| Lane::of(&entry.name, prefix)).collect();
            lanes.push(Lane::Server);
            lanes.sort();
            lanes.dedup();
            engine.compare(&lanes);
        } else {
            engine.scan();
        }
    }
    let lanes: Vec<Lane> = args.which.users.iter().map(|user| Lane::User(UserId::from(user.as_str()))).collect();
    engine.compare(&lanes);
    if !args.which.mailboxes.is_empty() {
        let listing = setup.store.listing().map_err(|error| Failure::new(Exit::Source, error))?;
        for name in &args.which.mailboxes {
            let name = MboxName::from(name.as_str());
            let Some(entry) = listing.by_name(&name) else {
                return Err(Failure::new(
                    Exit::Source,
                    anyhow::anyhow!(
                        "mailbox {name} does not exist at the source; use the internal name, as ctl_mboxlist -d prints it"
                    ),
                ));
            };
            engine.queue(&Lane::of(&name, prefix), &Item::Mailbox(entry.uniqueid.clone()));
        }
    }
    for user in &args.which.meta {
        for part in [UserPart::Subs, UserPart::Seen, UserPart::Sieve] {
            engine.queue(&Lane::User(UserId::from(user.as_str())), &Item::Meta(part));
        }
    }
    Ok(())
}

fn progress(json: bool) -> ProgressBar {
    if json || !std::io::stderr().is_terminal() {
        return ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("{elapsed_precise} [{bar:40}] {pos}/{len} items, {eta} left {msg}");
    ProgressBar::no_length().with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn sink(common: &Common, dry_run: bool, bar: &ProgressBar, trouble: Arc<Mutex<Option<String>>>) -> EventSink {
    let (json, bar) = (common.json, bar.clone());
    Arc::new(move |event: &Event<'_>| match event {
        Event::Planned(step) if dry_run => {
            let line = if json { serde_json::to_string(step).unwrap_or_default() } else { super::log::describe(step) };
            bar.suspend(|| {
                let _ = writeln!(std::io::stdout(), "{line}");
            });
        }
        Event::Confirmed { mailbox: Some(mailbox), .. } => bar.set_message(mailbox.to_string()),
        Event::SourceTrouble { reason } => {
            if let Ok(mut trouble) = trouble.lock() {
                *trouble = Some(reason.clone());
            }
        }
        // Named at the end, once.
        Event::Failed { .. } => {}
        other => bar.suspend(|| super::log::log_event(other)),
    })
}
