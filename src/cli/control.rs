//! `spooltap status`, `pause`, `resume`, `retry`, `skip`, `allow`: talking to the daemon that runs.

use super::setup::{named_replicas, state_dir};
use super::{Common, Exit, Failure, Outcome};
use crate::daemon::control::{self, Request, Response};
use crate::daemon::report::{Level, Limits, Status};
use crate::engine::{Subject, Word};
use clap::Args;
use std::io::{self, Write};
use std::time::Duration;

/// Failures shown to people; `--json` has more.
const SHOWN: usize = 20;

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Warn (exit code 1) when a replica is this many seconds behind
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    warn_lag: u64,
    /// Critical (exit code 2) when a replica is this many seconds behind
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    critical_lag: u64,
}

#[derive(Debug, Args)]
#[group(multiple = false)]
pub(super) struct SubjectArgs {
    /// One user with all mailboxes and data
    #[arg(short = 'u', long = "user", value_name = "USER")]
    user: Option<String>,
    /// One mailbox, by internal name (user.jane.Sent)
    #[arg(short = 'm', long = "mailbox", value_name = "MAILBOX")]
    mailbox: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct AllowArgs {
    /// For how long
    #[arg(long, default_value_t = 10)]
    minutes: u64,
}

fn ask(common: &Common, request: &Request) -> Result<Response, Failure> {
    let state = state_dir(common)?;
    let response = control::ask(&state, request).map_err(|error| Failure::new(Exit::NoDaemon, error))?;
    match response.error {
        Some(error) => Err(Failure::new(Exit::Usage, anyhow::anyhow!(error))),
        None => Ok(response),
    }
}

/// What the daemon says of itself.
pub(super) fn ask_status(common: &Common) -> Result<crate::daemon::report::Status, Failure> {
    Ok(ask(common, &Request::Status)?.status.unwrap_or_default())
}

/// The replica that an order is for; all when none is named.
fn replica(common: &Common) -> Result<Option<String>, Failure> {
    match named_replicas(common)?.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        _ => Err(Failure::new(Exit::Usage, anyhow::anyhow!("name one --replica, or none for all of them"))),
    }
}

pub(super) fn order(common: &Common, args: &SubjectArgs, word: Word) -> Outcome {
    let subject = match (&args.user, &args.mailbox) {
        (Some(user), _) => Subject::User(user.clone()),
        (_, Some(mailbox)) => Subject::Mailbox(mailbox.clone()),
        _ => Subject::Everything,
    };
    let response = ask(common, &Request::Order { word, subject, replica: replica(common)? })?;
    if let (Word::Retry, Some(count)) = (word, response.retried) {
        writeln!(io::stdout(), "{count} tried again")?;
    }
    Ok(Exit::Ok)
}

pub(super) fn allow(common: &Common, args: &AllowArgs) -> Outcome {
    let seconds = args.minutes.saturating_mul(60);
    let response = ask(common, &Request::Allow { seconds, replica: replica(common)? })?;
    let count = response.retried.unwrap_or_default();
    writeln!(io::stdout(), "removals are not limited for {} minutes; {count} tried again", args.minutes)?;
    Ok(Exit::Ok)
}

pub(super) fn status(common: &Common, args: &StatusArgs) -> Outcome {
    let limits =
        Limits { warning: Duration::from_secs(args.warn_lag), critical: Duration::from_secs(args.critical_lag) };
    let response = ask(common, &Request::Status)?;
    let status = response.status.unwrap_or_default();
    let faults = status.faults(limits);
    let level = faults.first().map_or(Level::Ok, |(level, _)| *level);
    let mut out = io::stdout().lock();
    if common.json {
        let mut value = serde_json::to_value(&status).map_err(io::Error::other)?;
        let texts: Vec<_> =
            faults.iter().map(|(level, text)| serde_json::json!({ "level": word(*level), "text": text })).collect();
        value["level"] = word(level).into();
        value["faults"] = texts.into();
        writeln!(out, "{value}")?;
    } else {
        table(&mut out, &status)?;
        writeln!(out, "{}", word(level))?;
        for (level, text) in &faults {
            writeln!(out, "  {}: {text}", word(*level))?;
        }
    }
    Ok(match level {
        Level::Ok => Exit::Ok,
        Level::Warning => Exit::Differs,
        Level::Critical => Exit::Critical,
    })
}

pub(super) fn word(level: Level) -> &'static str {
    match level {
        Level::Ok => "ok",
        Level::Warning => "warning",
        Level::Critical => "critical",
    }
}

fn table(out: &mut impl Write, status: &Status) -> io::Result<()> {
    let source = &status.source;
    writeln!(
        out,
        "source   {}{}: {} directories watched, {} unwatched, {} events, {} overflows",
        source.capture,
        if source.armed { "" } else { " (not armed)" },
        source.watches,
        source.unwatched,
        source.events_total,
        source.overflows_total
    )?;
    if let Some(check) = source.cross_check {
        let (logged, missed, unlogged) = (check.logged_total, check.missed_total, check.unlogged_total);
        writeln!(
            out,
            "  cross-check  {logged} logged, {missed} of them not noticed; {unlogged} noticed and not logged"
        )?;
    }
    for area in &source.areas {
        let paths: Vec<String> = area.paths.iter().map(|path| path.display().to_string()).collect();
        writeln!(
            out,
            "  {}  {}{}",
            area.capture,
            paths.join(" "),
            if area.reason.is_empty() { String::new() } else { format!(" ({})", area.reason) }
        )?;
    }
    if let Some(free) = status.ground.free_bytes {
        writeln!(out, "state    {} MB free", free >> 20)?;
    }
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    writeln!(
        out,
        "process  {} {}, up {}, {:.0} MB of memory (at most {:.0})",
        status.version,
        status.pid,
        span(status.uptime_seconds as f64),
        megabytes(status.memory.resident_bytes),
        megabytes(status.memory.peak_bytes)
    )?;
    for replica in &status.replicas {
        let (stats, queue) = (&replica.stats, &replica.stats.queue);
        writeln!(out, "replica  {}", stats.replica)?;
        let catching_up = if replica.catching_up { ", catching up" } else { "" };
        writeln!(
            out,
            "  lag    {}{catching_up}; of confirmed changes half in {:.0} ms, 99 % in {:.0} ms",
            span(replica.lag_seconds),
            stats.lag_p50_seconds * 1000.0,
            stats.lag_p99_seconds * 1000.0
        )?;
        writeln!(
            out,
            "  queue  {} waiting, {} running, {} failed, {} in quarantine, {} held back, {} skipped",
            queue.pending,
            queue.running,
            queue.failed_total.saturating_sub(queue.quarantined),
            queue.quarantined,
            queue.held_back,
            queue.skipped
        )?;
        writeln!(
            out,
            "  rate   {:.1} confirmed/s, {:.0} bytes/s; {} confirmed, {:.1} MB sent, {} sessions, {} mailboxes",
            replica.confirmed_per_second,
            replica.sent_bytes_per_second,
            stats.confirmed_total,
            megabytes(stats.sent_bytes),
            stats.sessions,
            stats.mailboxes
        )?;
        if let Some(both) = stats.compressed.filter(|both| both.sent_bytes > 0) {
            let gain = both.plain_bytes as f64 / both.sent_bytes as f64;
            let (from, to) = (megabytes(both.plain_bytes), megabytes(both.sent_bytes));
            writeln!(out, "  deflate {from:.1} MB became {to:.1} MB, {gain:.1} to 1")?;
        }
        if stats.removals_waiting > 0 {
            let next =
                stats.next_removal_seconds.map_or_else(String::new, |left| format!(", the next for {}", span(left)));
            writeln!(out, "  stays  {} mailboxes that are gone at the source{next}", stats.removals_waiting)?;
        }
        for failure in queue.failed.iter().take(SHOWN) {
            let what = failure.mailbox.clone().unwrap_or_else(|| format!("{} {}", failure.lane, failure.item));
            let kind = if failure.quarantined { "quarantine" } else { "failed" };
            let next = failure.next_try_seconds.map_or_else(String::new, |left| format!(", again in {}", span(left)));
            writeln!(out, "  {kind}: {what}: {} ({} tries{next})", failure.reason, failure.tries)?;
        }
        if queue.failed_total > SHOWN {
            writeln!(out, "  … and {} more (--json)", queue.failed_total - SHOWN)?;
        }
    }
    if let Some((done, all)) = status.scan {
        writeln!(out, "scan     {done} of {all} mailboxes and users compared")?;
    }
    if let Some(scrub) = &status.scrub {
        let now = match (&scrub.pass, &scrub.last) {
            (Some(pass), _) => {
                format!("{} of {} mailboxes, {:.1} MB read", pass.mailboxes, scrub.mailboxes, megabytes(pass.bytes))
            }
            (None, Some(last)) => {
                let ago = status.at.saturating_sub(last.ended_at.unwrap_or(status.at));
                format!("all {} messages read, done {} ago", last.messages, span(ago as f64))
            }
            (None, None) => "not begun".to_owned(),
        };
        writeln!(out, "scrub    {now}, {} damaged", scrub.damaged().len())?;
        for damage in scrub.damaged().into_iter().take(SHOWN) {
            writeln!(out, "  damaged: {damage}")?;
        }
    }
    for one in &status.moves {
        let phase = format!("{:?}", one.phase).to_lowercase();
        let why = one.trouble.as_ref().map_or_else(String::new, |trouble| format!(": {trouble}"));
        writeln!(out, "move     {} to {}, {phase}{why}", one.user, one.to)?;
    }
    for order in &status.orders {
        let word = format!("{:?}", order.word).to_lowercase();
        writeln!(out, "order    {word} {:?} at {}", order.subject, order.replica)?;
    }
    Ok(())
}

/// A time for people.
pub(super) fn span(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
