//! `spooltap events`: what the watcher sees, live, one line each. Reads nothing but directory names, writes nothing.

use super::setup::Setup;
use super::{Common, Exit, Failure, Outcome};
use crate::capture::{self, Roots, Tap};
use crate::model::Notice;
use clap::Args;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Noise as well: files that say nothing about what is replicated
    #[arg(long)]
    all: bool,
    /// Show what is handed to the engine (many events, one notice) instead of single events
    #[arg(long, conflicts_with = "all")]
    notices: bool,
    /// Stop after this long [default: at SIGINT]
    #[arg(long = "for", value_name = "SECONDS")]
    duration: Option<f64>,
}

/// One line, with the time it stands for.
struct Line {
    seen_at: Instant,
    what: What,
}

enum What {
    Event { kind: String, path: String, is_dir: bool, key: Option<String> },
    Notice { key: String, held: Duration },
}

pub(super) fn events(common: &Common, args: &EventsArgs) -> Outcome {
    let setup = Setup::open(common, false)?;
    let mut settings = setup.capture_settings();
    // Nobody asks for proofs here, and a daemon may use that directory.
    settings.cookies = None;
    if settings.source == "synclog" {
        let fault = anyhow::anyhow!("who reads the rolling log takes its records away from a daemon that needs them");
        return Err(Failure::new(Exit::Config, fault));
    }
    let (lines, received) = mpsc::channel();
    if !args.notices {
        let (lines, all) = (lines.clone(), args.all);
        let tap: Tap = Arc::new(move |event| {
            if all || event.key.is_some() {
                let what = What::Event {
                    kind: event.kind.to_string(),
                    path: show(event.path),
                    is_dir: event.is_dir,
                    key: event.key.map(ToString::to_string),
                };
                // The receiver is gone when stdout is closed; then the process is about to end.
                let _ = lines.send(Line { seen_at: event.seen_at, what });
            }
        });
        settings.tap = Some(tap);
    }
    let notices = args.notices;
    let out = move |given: Vec<Notice>| {
        for notice in given {
            let what = What::Notice { key: notice.key.to_string(), held: notice.seen_at.elapsed() };
            // Losses are no event of a path, so they are shown either way.
            if notices || matches!(notice.key, crate::model::DirtyKey::Rescan(_)) {
                let _ = lines.send(Line { seen_at: notice.seen_at, what });
            }
        }
    };
    let handle = capture::start(Roots::from(setup.store.layout()), settings, Box::new(out))
        .map_err(|error| Failure::new(super::setup::capture_exit(&error), error))?;
    handle.wait_armed();
    let until = args.duration.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let printed = print(&received, until.map(|until| Instant::now() + until), common.json);
    handle.stop();
    match printed {
        // `spooltap events | head` is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Ok),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(Exit::Ok),
    }
}

/// A path as text in which every byte can be told from every other.
fn show(path: &Path) -> String {
    crate::model::MboxName::new(path.as_os_str().as_encoded_bytes()).to_string()
}

fn print(lines: &Receiver<Line>, until: Option<Instant>, json: bool) -> io::Result<()> {
    // Instants are shown by the wall clock of the start; a clock set meanwhile does not disturb their order.
    let (began, began_wall) = (Instant::now(), SystemTime::now());
    let mut out = io::BufWriter::new(io::stdout().lock());
    loop {
        let line = match lines.try_recv() {
            Ok(line) => line,
            Err(_) => {
                out.flush()?;
                let left = until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
                match lines.recv_timeout(left) {
                    Ok(line) => line,
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
                }
            }
        };
        let wall = match line.seen_at.checked_duration_since(began) {
            Some(after) => began_wall.checked_add(after),
            None => began_wall.checked_sub(began.duration_since(line.seen_at)),
        };
        let seconds = wall.and_then(|wall| wall.duration_since(UNIX_EPOCH).ok()).unwrap_or_default().as_secs_f64();
        if json {
            let value = match line.what {
                What::Event { kind, path, is_dir, key } => {
                    serde_json::json!({"time": seconds, "event": kind, "path": path, "dir": is_dir, "key": key})
                }
                What::Notice { key, held } => {
                    serde_json::json!({"time": seconds, "event": "notice", "key": key, "held_ms": held.as_secs_f64() * 1e3})
                }
            };
            writeln!(out, "{value}")?;
        } else {
            match line.what {
                What::Event { kind, path, is_dir, key } => {
                    let slash = if is_dir { "/" } else { "" };
                    writeln!(out, "{seconds:.6} {kind:10} {path}{slash}  {}", key.as_deref().unwrap_or("-"))?;
                }
                What::Notice { key, held } => {
                    writeln!(out, "{seconds:.6} {key}  held {:.1} ms", held.as_secs_f64() * 1e3)?;
                }
            }
        }
    }
}
