//! The same figures in Prometheus's text format, over HTTP or as a file.

use super::report::Status;
use std::fmt::Write;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A request's head may not be longer.
const MOST_BYTES: usize = 8192;
const PATIENCE: Duration = Duration::from_secs(5);

/// Renders everything. No names of users or mailboxes: a label has few values.
pub(super) fn render(status: &Status) -> String {
    let mut page = Page::default();
    let source = &status.source;
    let none: &[(&str, &str)] = &[];
    let version = [("version", status.version.as_str())];
    page.family("spooltap_build_info", "gauge", "What runs.").value(&version, 1.0);
    page.family("spooltap_up_seconds", "gauge", "Since the start.").value(none, status.uptime_seconds as f64);
    let memory = status.memory;
    page.family("spooltap_resident_memory_bytes", "gauge", "Memory in use.").value(none, memory.resident_bytes as f64);
    let text = "Rooms of the daemon that do not get on any more.";
    page.family("spooltap_rooms_wedged", "gauge", text).value(none, status.wedged.len() as f64);
    if let Some(free) = status.ground.free_bytes {
        page.family("spooltap_state_free_bytes", "gauge", "Room left where the state is kept.")
            .value(none, free as f64);
    }
    let writable = f64::from(u8::from(status.ground.state_trouble.is_none()));
    page.family("spooltap_state_writable", "gauge", "0 while receipts are in memory only.").value(none, writable);
    let jump = status.ground.clock_jump_seconds.unwrap_or(0);
    page.family("spooltap_clock_jump_seconds", "gauge", "By how much the clock was set lately.")
        .value(none, jump as f64);
    let capture = [("capture", source.capture.as_str())];
    let readable = f64::from(u8::from(source.trouble.is_none()));
    page.family("spooltap_source_readable", "gauge", "0 while the source cannot be read.").value(none, readable);
    let armed = f64::from(u8::from(source.armed));
    page.family("spooltap_capture_armed", "gauge", "Changes are being noticed.").value(&capture, armed);
    let text = "Directories watched.";
    page.family("spooltap_capture_watches", "gauge", text).value(&capture, source.watches as f64);
    let text = "Directories that should be watched and cannot be.";
    page.family("spooltap_capture_unwatched", "gauge", text).value(&capture, source.unwatched as f64);
    let text = "Events the kernel reported.";
    page.family("spooltap_capture_events_total", "counter", text).value(&capture, source.events_total as f64);
    let text = "Times the kernel dropped events; each was followed by a scan.";
    page.family("spooltap_capture_overflows_total", "counter", text).value(&capture, source.overflows_total as f64);
    let text = "Times capture was started anew.";
    page.family("spooltap_capture_restarts_total", "counter", text).value(&capture, source.restarts_total as f64);
    if let Some(check) = source.cross_check {
        let figures = [
            ("spooltap_cross_check_logged_total", "Keys that Cyrus's log named.", check.logged_total),
            ("spooltap_cross_check_missed_total", "Of these, changes that capture did not show.", check.missed_total),
            (
                "spooltap_cross_check_unlogged_total",
                "Changes that capture showed and the log did not name.",
                check.unlogged_total,
            ),
        ];
        for (name, text, value) in figures {
            page.family(name, "counter", text).value(none, value as f64);
        }
    }

    if let Some((done, all)) = status.scan {
        page.family("spooltap_scan_done", "gauge", "Mailboxes and users the scan has compared.")
            .value(none, done as f64);
        page.family("spooltap_scan_all", "gauge", "Mailboxes and users it is to compare.").value(none, all as f64);
    }
    if let Some(scrub) = &status.scrub {
        let pass = scrub.pass.as_ref();
        let running = f64::from(u8::from(pass.is_some()));
        page.family("spooltap_scrub_running", "gauge", "1 while a pass of the scrub is under way.")
            .value(none, running);
        let done = pass.map_or(0, |pass| pass.mailboxes) as f64;
        page.family("spooltap_scrub_mailboxes", "gauge", "Mailboxes this pass has scrubbed.").value(none, done);
        let all = scrub.mailboxes as f64;
        page.family("spooltap_scrub_mailboxes_all", "gauge", "Mailboxes a pass has to scrub.").value(none, all);
        let bytes = pass.map_or(0, |pass| pass.bytes) as f64;
        page.family("spooltap_scrub_bytes", "gauge", "Bytes of messages this pass has read.").value(none, bytes);
        let damaged = scrub.damaged().len() as f64;
        page.family("spooltap_scrub_damaged", "gauge", "Damaged messages and mailboxes known.").value(none, damaged);
        let ended = scrub.last.as_ref().and_then(|last| last.ended_at).unwrap_or(0) as f64;
        let text = "When the last whole pass ended; 0: none did.";
        page.family("spooltap_scrub_last_end_timestamp_seconds", "gauge", text).value(none, ended);
    }

    type Figure = (&'static str, &'static str, &'static str, fn(&super::report::ReplicaStatus) -> f64);
    let figures: &[Figure] = &[
        ("spooltap_replica_lag_seconds", "gauge", "Age of the oldest unconfirmed change.", |r| r.lag_seconds),
        ("spooltap_replica_usable", "gauge", "0 while the replica cannot be reached or refuses us.", |r| {
            f64::from(u8::from(r.stats.fatal.is_none()))
        }),
        ("spooltap_replica_catching_up", "gauge", "1 until the first comparison after a start is done.", |r| {
            f64::from(u8::from(r.catching_up))
        }),
        ("spooltap_replica_sessions", "gauge", "Open connections.", |r| r.stats.sessions as f64),
        ("spooltap_replica_pending", "gauge", "Items waiting.", |r| r.stats.queue.pending as f64),
        ("spooltap_replica_running", "gauge", "Items being sent.", |r| r.stats.queue.running as f64),
        ("spooltap_replica_failed", "gauge", "Items that wait for another try.", |r| r.stats.queue.failed_total as f64),
        ("spooltap_replica_quarantined", "gauge", "Items that no passing trouble explains.", |r| {
            r.stats.queue.quarantined as f64
        }),
        ("spooltap_replica_held_back", "gauge", "Items paused by an admin.", |r| r.stats.queue.held_back as f64),
        ("spooltap_replica_skipped", "gauge", "Items given up by an admin.", |r| r.stats.queue.skipped as f64),
        ("spooltap_replica_fuse_blown", "gauge", "1 while removals are stopped.", |r| {
            f64::from(u8::from(r.stats.fuse.is_some()))
        }),
        ("spooltap_replica_removals_waiting", "gauge", "Mailboxes that stay for a while after they went.", |r| {
            r.stats.removals_waiting as f64
        }),
        ("spooltap_replica_meddled_total", "counter", "Mailboxes that somebody else had changed there.", |r| {
            r.stats.meddled.count as f64
        }),
        ("spooltap_replica_mailboxes", "gauge", "Mailboxes replicated.", |r| r.stats.mailboxes as f64),
        ("spooltap_replica_confirmed_total", "counter", "Confirmed items.", |r| r.stats.confirmed_total as f64),
        ("spooltap_replica_sent_bytes_total", "counter", "Bytes sent.", |r| r.stats.sent_bytes as f64),
        ("spooltap_replica_received_bytes_total", "counter", "Bytes received.", |r| r.stats.received_bytes as f64),
    ];
    for (name, kind, help, figure) in figures {
        page.family(name, kind, help);
        for replica in &status.replicas {
            page.value(&[("replica", &replica.stats.replica)], figure(replica));
        }
    }
    let name = "spooltap_replica_stage_lag_seconds";
    page.family(name, "histogram", "From the kernel's notice until a change was in the queue, read, sent, confirmed.");
    for replica in &status.replicas {
        for one in &replica.stats.stages {
            let labels = [("replica", replica.stats.replica.as_str()), ("stage", one.stage.as_str())];
            let [replica, stage] = labels;
            for (bound, count) in &one.buckets {
                page.sample("_bucket", &[replica, stage, ("le", &bound.to_string())], *count as f64);
            }
            page.sample("_bucket", &[replica, stage, ("le", "+Inf")], one.count as f64);
            page.sample("_sum", &labels, one.sum_seconds);
            page.sample("_count", &labels, one.count as f64);
        }
    }
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
    name: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) -> &mut Self {
        name.clone_into(&mut self.name);
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        self
    }

    fn value(&mut self, labels: &[(&str, &str)], value: f64) {
        self.sample("", labels, value);
    }

    fn sample(&mut self, suffix: &str, labels: &[(&str, &str)], value: f64) {
        let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<String> = labels.iter().map(|(key, text)| format!("{key}=\"{}\"", escaped(text))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.text, "{}{suffix}{labels} {value}", self.name);
    }
}

/// One HTTP request and its answer; then the connection is closed.
pub(super) async fn talk(mut stream: tokio::net::TcpStream, page: impl FnOnce() -> String) {
    let conversation = async {
        let mut head = Vec::new();
        let mut piece = [0; 1024];
        while !head.windows(4).any(|four| four == b"\r\n\r\n") && head.len() < MOST_BYTES {
            match stream.read(&mut piece).await {
                Ok(count @ 1..) => head.extend_from_slice(piece.get(..count).unwrap_or_default()),
                _ => return,
            }
        }
        let mut words = head.split(|byte| matches!(byte, b' ' | b'\r' | b'?'));
        let (status, body) = match (words.next(), words.next()) {
            (Some(b"GET"), Some(b"/metrics")) => ("200 OK", page()),
            (Some(b"GET"), _) => ("404 Not Found", "the figures are at /metrics\n".to_owned()),
            _ => ("405 Method Not Allowed", "GET only\n".to_owned()),
        };
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        );
        let _ = stream.write_all(answer.as_bytes()).await;
        let _ = stream.shutdown().await;
    };
    let _ = tokio::time::timeout(PATIENCE, conversation).await;
}
