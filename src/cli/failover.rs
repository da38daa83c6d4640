//! `spooltap drain` and `failover-check`: is everything over there, and may the replica take over?

use super::control;
use super::verify::{self, VerifyArgs};
use super::{Common, Exit, Outcome};
use crate::daemon::report::Status;
use crate::engine::Word;
use clap::Args;
use std::io::Write;
use std::time::{Duration, Instant};

#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    /// Wait until nothing is left, instead of one look
    #[arg(long)]
    wait: bool,
    /// Wait no longer than this
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
}

impl DrainArgs {
    pub(super) fn waiting(timeout: u64) -> Self {
        Self { wait: true, timeout }
    }
}

/// Between two looks. Two in a row have to be empty: a change may be on its way from the kernel to the queue.
const LOOK: Duration = Duration::from_millis(200);

/// What is still open, one text for each replica that has something.
pub(super) fn open(status: &Status) -> Vec<String> {
    let mut out = Vec::new();
    for replica in &status.replicas {
        let queue = &replica.stats.queue;
        let left = queue.pending + queue.running + queue.waiting + queue.held_back;
        if replica.catching_up {
            out.push(format!("{}: the first comparison is not done", replica.stats.replica));
        } else if left + queue.failed_total > 0 {
            out.push(format!(
                "{}: {} waiting, {} failed, {} paused, the oldest for {:.1} s",
                replica.stats.replica,
                queue.pending + queue.running + queue.waiting,
                queue.failed_total,
                queue.held_back,
                queue.oldest_seconds
            ));
        }
    }
    out
}

pub(super) fn drain(common: &Common, args: &DrainArgs) -> Outcome {
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    let mut empty = 0;
    let left = loop {
        let left = open(&control::ask_status(common)?);
        empty = if left.is_empty() { empty + 1 } else { 0 };
        if empty >= 2 || !args.wait && !left.is_empty() || Instant::now() >= deadline {
            break left;
        }
        std::thread::sleep(LOOK);
    };
    let mut out = std::io::stdout().lock();
    if common.json {
        writeln!(out, "{}", serde_json::json!({ "drained": left.is_empty(), "open": left }))?;
    } else if left.is_empty() {
        writeln!(out, "drained: everything is confirmed")?;
    } else {
        left.iter().try_for_each(|text| writeln!(out, "{text}"))?;
    }
    Ok(match left.is_empty() {
        true => Exit::Ok,
        false if args.wait => Exit::Interrupted,
        false => Exit::Differs,
    })
}

#[derive(Debug, Args)]
pub(super) struct FailoverArgs {
    /// Do not compare source and replica mailbox by mailbox
    #[arg(long)]
    no_verify: bool,
}

/// Why the replica should not take over, as far as the daemon knows.
pub(super) fn reasons(status: &Status) -> Vec<String> {
    let mut out = open(status);
    out.extend(status.source.trouble.iter().map(|trouble| format!("source: {trouble}")));
    if !status.source.armed {
        out.push("source: capture is not armed, changes may have been missed".into());
    }
    for replica in &status.replicas {
        let stats = &replica.stats;
        let mut add = |text: String| out.push(format!("{}: {text}", stats.replica));
        if let Some(fatal) = &stats.fatal {
            add(format!("not usable: {fatal}"));
        }
        if let Some(fuse) = &stats.fuse {
            add(fuse.clone());
        }
        if stats.queue.skipped > 0 {
            add(format!("{} given up by an administrator", stats.queue.skipped));
        }
        for failure in &stats.queue.failed {
            add(format!("{}: {}", failure.mailbox.as_deref().unwrap_or(&failure.item), failure.reason));
        }
    }
    for order in status.orders.iter().filter(|order| order.word == Word::Pause) {
        out.push(format!("{}: paused: {:?}", order.replica, order.subject));
    }
    out
}

pub(super) fn check(common: &Common, args: &FailoverArgs) -> Outcome {
    let everything = VerifyArgs::everything();
    check_to(common, (!args.no_verify).then_some(&everything))
}

/// With a comparison as deep as that.
pub(super) fn check_to(common: &Common, compare: Option<&VerifyArgs>) -> Outcome {
    let mut why = match control::ask_status(common) {
        Ok(status) => reasons(&status),
        Err(failure) => vec![format!("no daemon says how far it is: {:#}", failure.error)],
    };
    if let Some(args) = compare {
        match verify::verify(common, args) {
            Ok(Exit::Ok) => {}
            Ok(_) => why.push("source and replica differ, see above".into()),
            Err(failure) => why.push(format!("source and replica cannot be compared: {:#}", failure.error)),
        }
    }
    let go = why.is_empty();
    let mut out = std::io::stdout().lock();
    if common.json {
        writeln!(out, "{}", serde_json::json!({ "go": go, "reasons": why }))?;
    } else {
        writeln!(out, "{}", if go { "GO" } else { "NO-GO" })?;
        why.iter().try_for_each(|reason| writeln!(out, "  {reason}"))?;
    }
    Ok(if go { Exit::Ok } else { Exit::Differs })
}
