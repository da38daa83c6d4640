//! The log: text or JSON on stderr, or journald, with the same names of fields; what repeats itself is told now and then.

use super::{Cli, Command, Exit, Failure};
use clap::ValueEnum;
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, info};
use tracing_subscriber::layer::{Context, Filter, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    #[default]
    Text,
    Json,
    /// Straight to systemd's journal, with fields (in capitals, as there).
    Journald,
}

/// The same warning is told again after so long.
const AGAIN: Duration = Duration::from_secs(60);
/// Different warnings of one kind within that time; a store full of damage is told by `status`.
const OF_A_KIND: u32 = 200;
/// Warnings that are remembered.
const REMEMBERED: usize = 4096;
/// Fields that are different each time and make no other message.
const PASSING: [&str; 4] = ["elapsed_ms", "retry_ms", "tries", "free_bytes"];

pub(super) fn start(cli: &Cli) -> Result<(), Failure> {
    let common = &cli.common;
    let default = match common.verbose {
        // Its output is the log.
        0 if matches!(cli.command, Command::Demo(_)) => "warn",
        0 => "warn,spooltap=info",
        1 => "info,spooltap=debug",
        _ => "debug,spooltap=trace",
    };
    let wanted = EnvFilter::try_from_env("SPOOLTAP_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let limit = Arc::new(Limit::default());
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match common.log_format {
        LogFormat::Text => lines.with_target(false).with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().boxed(),
        LogFormat::Journald => {
            let journal = tracing_journald::layer().map_err(|error| {
                let error = anyhow::anyhow!("the journal cannot be reached ({error}); use --log-format text");
                Failure::new(Exit::Config, error)
            })?;
            journal.with_field_prefix(None).with_syslog_identifier("spooltap".to_owned()).boxed()
        }
    };
    let limited = layer.with_filter(Limited(limit.clone())).with_filter(wanted);
    let _ = tracing_subscriber::registry().with(limited).with(super::syslog::layer()).try_init();
    if matches!(cli.command, Command::Run(_) | Command::Serve(_)) {
        let tell = move || loop {
            std::thread::sleep(AGAIN);
            let count = limit.held_back.swap(0, Ordering::Relaxed);
            if count > 0 {
                info!(count, "warnings that were told before came again and are not shown");
            }
        };
        let _ = std::thread::Builder::new().name("log".into()).spawn(tell);
    }
    Ok(())
}

/// What was told, and how often of each kind.
#[derive(Default)]
struct Limit {
    told: Mutex<Told>,
    held_back: AtomicU64,
}

#[derive(Default)]
struct Told {
    messages: HashMap<u64, Instant>,
    kinds: HashMap<u64, (Instant, u32)>,
}

impl Limit {
    /// Whether a message of this kind is to be told now.
    fn lets(&self, kind: u64, message: u64, now: Instant) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_old = |at: &Instant| now.saturating_duration_since(*at) >= AGAIN;
        if told.messages.get(&message).is_some_and(|at| !is_old(at)) {
            self.held_back.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        if told.kinds.len() >= REMEMBERED {
            told.kinds.clear();
        }
        let (since, count) = told.kinds.entry(kind).or_insert((now, 0));
        if is_old(since) {
            (*since, *count) = (now, 0);
        }
        *count += 1;
        if *count > OF_A_KIND {
            self.held_back.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        if told.messages.len() >= REMEMBERED {
            told.messages.retain(|_, at| !is_old(at));
            if told.messages.len() >= REMEMBERED {
                told.messages.clear();
            }
        }
        told.messages.insert(message, now);
        true
    }
}

struct Limited(Arc<Limit>);

impl<S: Subscriber> Filter<S> for Limited {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        // Whoever asks for more than warnings wants to see all of it.
        if *event.metadata().level() > Level::WARN {
            return true;
        }
        let mut kind = DefaultHasher::new();
        event.metadata().callsite().hash(&mut kind);
        let mut all = Hashed(kind.clone());
        event.record(&mut all);
        self.0.lets(kind.finish(), all.0.finish(), Instant::now())
    }
}

/// Everything that a message says, as one number.
struct Hashed(DefaultHasher);

impl Visit for Hashed {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if !PASSING.contains(&field.name()) {
            field.name().hash(&mut self.0);
            format!("{value:?}").hash(&mut self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_told_now_and_then_and_no_kind_floods() {
        let limit = Limit::default();
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        assert!(limit.lets(1, 10, after(0)));
        assert!(!limit.lets(1, 10, after(1)) && !limit.lets(1, 10, after(59)));
        assert!(limit.lets(1, 11, after(1)), "another message");
        assert!(limit.lets(1, 10, after(60)), "it is time again");
        assert_eq!(limit.held_back.load(Ordering::Relaxed), 2);
        let told = (0..1000).filter(|number| limit.lets(2, 1000 + number, after(60))).count();
        assert_eq!(told, OF_A_KIND as usize);
        assert!(limit.lets(3, 1, after(60)), "others are not held up");
        assert!(limit.lets(2, 5000, after(121)));
        (0..100_000).for_each(|number| assert!(limit.lets(number, number, after(200))));
        assert!(limit.told.lock().expect("lock").messages.len() <= REMEMBERED);
    }
}
