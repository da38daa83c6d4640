//! `spooltap demo`: a recorded store of a real Cyrus 2.5.11 is unpacked, its recorded operations are played on it, and
//! what the watcher sees is replicated into an archive; at every step the archive is compared with what IMAP showed.

use super::{Common, Exit, Failure, Outcome};
use crate::archive::{Archive, ArchiveStore};
use crate::capture::Settings;
use crate::daemon::Running;
use crate::engine::{self, Event, EventSink, Options};
use crate::model::{MailStore, StoreError};
use crate::replay::{Depth, Mark, Player, Recording, Speed, compare_replica};
use crate::replica::ArchiveTarget;
use crate::spool::{LiveSpool, open_store};
use crate::state::State;
use clap::Args;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// How many times as fast as it was recorded; 0 leaves out every pause
    #[arg(long, default_value_t = 25.0, value_name = "FACTOR")]
    speed: f64,
    /// Work in this directory, which must not exist, and keep it
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Play another recording: a folder with base.tar.gz, ops.jsonl.gz, truth.jsonl.gz and info.json
    #[arg(long, value_name = "DIR")]
    recording: Option<PathBuf>,
}

/// How long a change may take to arrive before the demo calls it lost.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) fn demo(common: &Common, args: &DemoArgs) -> Outcome {
    let recording = match &args.recording {
        Some(dir) => Recording::open(dir),
        None => built_in(),
    };
    let recording = recording.map_err(|error| Failure::new(Exit::Data, error))?;
    let place = Place::new(args.keep.as_deref())?;
    let spool = place.path.join("source");
    let conf = recording.unpack(&spool).map_err(|error| Failure::new(Exit::Data, error))?;
    let source = |error: StoreError| Failure::new(Exit::Source, error);
    let store = Arc::new(open_store(&conf).map_err(source)?);
    let url = format!("file://{}", place.path.join("archive").display());
    let archive = Archive::open(&url).map_err(|error| Failure::new(Exit::Config, error))?;
    let state = State::open(&place.path.join("state"), &store.identity().map_err(source)?)
        .map_err(|error| Failure::new(Exit::State, error))?;
    store.remember_in(state.memory());
    let lines = Arc::new(Lines::new(common.json));
    lines.note(&format!("Cyrus {}: {} recorded file operations, into {url}", recording.version(), recording.ops()));
    let run = Run { store, archive, state, lines: lines.clone(), interrupted: interrupt()? };
    let differences = run.play(&recording, &spool, args.speed)?;
    if run.interrupted.load(Ordering::Relaxed) {
        return Ok(Exit::Interrupted);
    }
    for difference in &differences {
        lines.difference(difference);
    }
    lines.end(differences.is_empty());
    Ok(if differences.is_empty() { Exit::Ok } else { Exit::Differs })
}

/// Compiled in, so that an installed program has its demo with it.
fn built_in() -> Result<Recording, crate::replay::ReplayError> {
    macro_rules! part {
        ($name:literal) => {
            include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/replays/2.5.11-a/", $name))
        };
    }
    let bytes = |part: &'static [u8]| std::borrow::Cow::Borrowed(part);
    Recording::from_parts(
        bytes(part!("base.tar.gz")),
        bytes(part!("ops.jsonl.gz")),
        bytes(part!("truth.jsonl.gz")),
        part!("info.json"),
    )
}

struct Run {
    store: Arc<LiveSpool>,
    archive: Archive,
    state: State,
    lines: Arc<Lines>,
    interrupted: Arc<AtomicBool>,
}

/// Becomes true with the first SIGINT or SIGTERM, so that the demo clears up after itself; the second leaves at once.
fn interrupt() -> Result<Arc<AtomicBool>, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
                return;
            };
            loop {
                tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
                if flag.swap(true, Ordering::Relaxed) {
                    std::process::exit(Exit::Interrupted as i32);
                }
            }
        });
    });
    Ok(interrupted)
}

impl Run {
    /// Plays the recording and returns what differed at some step.
    fn play(&self, recording: &Recording, spool: &Path, speed: f64) -> Result<Vec<String>, Failure> {
        let target = Arc::new(ArchiveTarget::of(self.archive.clone()));
        let targets: Vec<engine::Target> = vec![(target, self.state.replica(self.archive.name()))];
        // Whole users are renamed and deleted in a recording; the fuse is for accidents.
        let options = Options { allow_removals: true, ..Options::default() };
        let sink = self.lines.clone().sink();
        let running = Running::start(self.store.clone(), targets, &options, Settings::default(), sink)
            .map_err(|error| Failure::new(Exit::Source, error))?;
        running.settle(4, PATIENCE);
        self.lines.forget_lags();
        let kept = ArchiveStore::open(self.archive.clone()).map_err(|error| Failure::new(Exit::Replica, error))?;
        let mut player = Player::new(recording, spool);
        let lines = self.lines.clone();
        player.on_step(move |event| {
            if event.phase == crate::replay::Phase::Begin {
                lines.step(event.step, &event.what);
            }
        });
        let speed = if speed > 0.0 { Speed::Recorded(speed) } else { Speed::Asap };
        let (mut out, mut last) = (Vec::new(), None);
        while let Some(mark) = player.next_mark(speed).map_err(|error| Failure::new(Exit::Data, error))? {
            let found = arrive(&running, &kept, &mark, Depth::Records)?;
            out.extend(found.into_iter().map(|text| format!("step {} ({}): {text}", mark.step, mark.what)));
            last = Some(mark);
            if self.interrupted.load(Ordering::Relaxed) {
                break;
            }
        }
        if let Some(mark) = last {
            let found = arrive(&running, &kept, &mark, Depth::Bodies)?;
            out.extend(found.into_iter().map(|text| format!("at the end: {text}")));
        }
        self.lines.figures(&running.stats());
        running.stop(PATIENCE);
        Ok(out)
    }
}

/// Waits until the archive holds what IMAP showed; what still differs after a while does differ.
fn arrive(running: &Running, kept: &ArchiveStore, mark: &Mark, depth: Depth) -> Result<Vec<String>, Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        running.settle(4, deadline.saturating_duration_since(Instant::now()));
        let found = compare_replica(kept, &mark.truth, depth);
        let found = found.map_err(|error| Failure::new(Exit::Replica, error))?;
        if found.is_empty() || Instant::now() > deadline {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where the demo works; removed at the end unless it is to be kept.
struct Place {
    path: PathBuf,
    keep: bool,
}

impl Place {
    fn new(keep: Option<&Path>) -> Result<Self, Failure> {
        let name = || format!("spooltap-demo-{:016x}", RandomState::new().hash_one(std::process::id()));
        let path = keep.map_or_else(|| std::env::temp_dir().join(name()), Path::to_path_buf);
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        let made = builder.create(&path).and_then(|()| std::fs::canonicalize(&path));
        let failed = |error| Failure::new(Exit::State, anyhow::anyhow!("{}: {error}", path.display()));
        Ok(Self { path: made.map_err(failed)?, keep: keep.is_some() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// A thread that panicked has left a list that is still a list.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the demo prints: a line for each step, and one for each change with the time from the kernel's notice to
/// the archive's confirmation.
struct Lines {
    json: bool,
    /// What each of the engine's threads has applied since it last confirmed something.
    applied: Mutex<HashMap<ThreadId, Vec<String>>>,
    /// Lag of each live change; the first replication of everything is none.
    lags: Mutex<Vec<Duration>>,
}

impl Lines {
    fn new(json: bool) -> Self {
        Self { json, applied: Mutex::default(), lags: Mutex::default() }
    }

    /// A reader that has gone away is no reason to stop.
    fn print(&self, json: serde_json::Value, text: &str) {
        let mut out = std::io::stdout().lock();
        let _ = if self.json { writeln!(out, "{json}") } else { writeln!(out, "{text}") };
    }

    fn note(&self, text: &str) {
        self.print(serde_json::json!({ "note": text }), text);
    }

    fn step(&self, step: u64, what: &str) {
        self.print(serde_json::json!({ "step": step, "what": what }), &format!("{step:>4} {what}"));
    }

    fn difference(&self, text: &str) {
        self.print(serde_json::json!({ "difference": text }), text);
    }

    fn end(&self, equal: bool) {
        self.print(serde_json::json!({ "equal": equal }), if equal { "equal" } else { "not equal" });
    }

    fn forget_lags(&self) {
        lock(&self.lags).clear();
    }

    fn figures(&self, stats: &[engine::ReplicaStats]) {
        let mut lags = lock(&self.lags).clone();
        lags.sort_unstable();
        let at = |share: f64| {
            let lag = lags.get(((lags.len() as f64 * share) as usize).min(lags.len().saturating_sub(1)));
            lag.map_or(0.0, |lag| lag.as_secs_f64() * 1000.0)
        };
        let (p50, p99) = (at(0.5), at(0.99));
        for stats in stats {
            let (mailboxes, bytes) = (stats.mailboxes, stats.sent_bytes);
            let text = format!(
                "{} changes while it ran, lag p50 {p50:.1} ms, p99 {p99:.1} ms; {mailboxes} mailboxes, {bytes} bytes written",
                lags.len()
            );
            let json = serde_json::json!({
                "changes": lags.len(), "lag_p50_seconds": p50 / 1000.0, "lag_p99_seconds": p99 / 1000.0,
                "mailboxes": mailboxes, "written_bytes": bytes
            });
            self.print(json, &text);
        }
    }

    fn sink(self: Arc<Self>) -> EventSink {
        Arc::new(move |event: &Event<'_>| {
            let thread = std::thread::current().id();
            let mut applied = lock(&self.applied);
            match event {
                Event::Applied(step) => applied.entry(thread).or_default().push(super::log::describe(step)),
                Event::Confirmed { lag, .. } => {
                    let applied = applied.remove(&thread).unwrap_or_default();
                    if !applied.is_empty() {
                        lock(&self.lags).push(*lag);
                    }
                    for text in applied {
                        let json = serde_json::json!({ "change": text, "lag_seconds": lag.as_secs_f64() });
                        self.print(json, &format!("{:>9.1} ms  {text}", lag.as_secs_f64() * 1000.0));
                    }
                }
                other => super::log::log_event(other),
            }
        })
    }
}
