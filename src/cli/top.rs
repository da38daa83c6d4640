//! `spooltap top`: the figures of a running daemon, live on a terminal; one table where there is none.

use super::control::{ask_status, span};
use super::{Common, Exit, Failure, Outcome};
use crate::daemon::report::{Level, Limits, ReplicaStatus, Status};
use clap::Args;
use console::{measure_text_width, pad_str, truncate_str};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::termios::{self, LocalFlags, SetArg, SpecialCharacterIndices, Termios};
use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Debug, Args)]
pub(super) struct TopArgs {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    interval: f64,
}

/// Into the alternate screen, without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// Things that do not get through, shown at most.
const SHOWN: usize = 200;

pub(super) fn top(common: &Common, args: &TopArgs) -> Outcome {
    let status = ask_status(common)?;
    if common.json {
        writeln!(io::stdout(), "{}", serde_json::to_value(&status).map_err(io::Error::other)?)?;
        return Ok(Exit::Ok);
    }
    let is_dumb = std::env::var("TERM").map_or(true, |term| term.is_empty() || term == "dumb");
    if is_dumb || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        let mut out = io::stdout().lock();
        for line in page(&status, None, Paint(false)) {
            writeln!(out, "{}", line.trim_end())?;
        }
        return Ok(Exit::Ok);
    }
    let every = Duration::try_from_secs_f64(args.interval).unwrap_or(Duration::from_secs(1));
    let screen = Screen::enter()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(live(common, status, every.max(Duration::from_millis(100))));
    drop(screen);
    ended?;
    Ok(Exit::Ok)
}

/// The terminal while it is ours: keys come at once, and are not shown.
struct Screen {
    before: Termios,
}

impl Screen {
    fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin().as_fd())?;
        let mut ours = before.clone();
        // Ctrl-C comes as a key, so that nobody is left with a terminal like this.
        ours.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG);
        for (index, value) in [(SpecialCharacterIndices::VMIN, 0), (SpecialCharacterIndices::VTIME, 0)] {
            if let Some(place) = ours.control_chars.get_mut(index as usize) {
                *place = value;
            }
        }
        termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &ours)?;
        let screen = Self { before };
        let mut out = io::stdout().lock();
        out.write_all(ENTER.as_bytes())?;
        out.flush()?;
        drop(out);
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut out = io::stdout().lock();
        let _ = out.write_all(LEAVE.as_bytes());
        let _ = out.flush();
        let _ = termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &self.before);
    }
}

async fn live(common: &Common, first: Status, every: Duration) -> io::Result<()> {
    let paint = Paint(std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()));
    let (typed, mut keys) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || listen(&typed));
    let mut ends = [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()].map(signal);
    let [Ok(terminate), Ok(hangup), Ok(interrupt)] = &mut ends else {
        return Err(io::Error::other("signals cannot be caught"));
    };
    let mut resized = signal(SignalKind::window_change())?;
    let mut tick = tokio::time::interval(every);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut status, mut before): (Result<Status, String>, Option<Status>) = (Ok(first), None);
    loop {
        draw(&status, before.as_ref(), paint)?;
        tokio::select! {
            _ = tick.tick() => {
                let now = ask_status(common).map_err(|Failure { error, .. }| format!("{error:#}"));
                let last = std::mem::replace(&mut status, now);
                before = last.ok().or(before);
            }
            _ = resized.recv() => {}
            _ = terminate.recv() => return Ok(()),
            _ = hangup.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            Some(pressed) = keys.recv() => {
                // Ctrl-C, Ctrl-D, and Escape alone as well.
                if pressed == [27] || pressed.iter().any(|key| matches!(key, b'q' | b'Q' | 3 | 4)) {
                    return Ok(());
                }
            }
        }
    }
}

/// Hands on what is typed, until nobody wants it any more.
fn listen(typed: &tokio::sync::mpsc::UnboundedSender<Vec<u8>>) {
    let stdin = io::stdin();
    while !typed.is_closed() {
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, 100u8) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(_) => return,
        }
        let mut pressed = vec![0; 64];
        match stdin.lock().read(&mut pressed) {
            Ok(count @ 1..) => pressed.truncate(count),
            // The terminal is gone; that comes as a signal as well.
            _ => return,
        }
        if typed.send(pressed).is_err() {
            return;
        }
    }
}

/// Whatever fits onto the screen, over what was there.
fn draw(status: &Result<Status, String>, before: Option<&Status>, paint: Paint) -> io::Result<()> {
    let (rows, columns) = console::Term::stdout().size();
    let (rows, columns) = (usize::from(rows).max(2), usize::from(columns).max(20));
    let mut lines = match (status, before) {
        (Ok(status), before) => page(status, before, paint),
        (Err(error), Some(last)) => {
            let mut lines = vec![paint.as_level(Level::Critical, error), String::new()];
            lines.extend(page(last, None, paint));
            lines
        }
        (Err(error), None) => vec![paint.as_level(Level::Critical, error)],
    };
    lines.truncate(rows - 1);
    lines.resize(rows - 1, String::new());
    lines.push(paint.dim("q quits"));
    let mut out = String::from("\x1b[H");
    for (at, line) in lines.iter().enumerate() {
        out += &truncate_str(line, columns, "…");
        out += "\x1b[K";
        if at + 1 < lines.len() {
            out += "\r\n";
        }
    }
    let mut stdout = io::stdout().lock();
    stdout.write_all(out.as_bytes())?;
    stdout.flush()
}

#[derive(Clone, Copy)]
struct Paint(bool);

impl Paint {
    fn wrap(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    fn as_level(self, level: Level, text: &str) -> String {
        match level {
            Level::Ok => self.wrap("32", text),
            Level::Warning => self.wrap("33", text),
            Level::Critical => self.wrap("1;31", text),
        }
    }
}

const COLUMNS: [&str; 15] = [
    "replica",
    "lag",
    "proven",
    "waits",
    "runs",
    "failed",
    "quar",
    "held",
    "skip",
    "conf/s",
    "KB/s",
    "p50 ms",
    "p99 ms",
    "sessions",
    "mailboxes",
];

/// Everything there is to see. `before` is what was known at the last look.
fn page(status: &Status, before: Option<&Status>, paint: Paint) -> Vec<String> {
    let limits = Limits { warning: Duration::from_secs(60), critical: Duration::from_secs(600) };
    let faults = status.faults(limits);
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let mut out = vec![format!(
        "{}  pid {}, up {}, {:.0} MB of memory (at most {:.0})",
        paint.bold(&format!("spooltap {}", status.version)),
        status.pid,
        span(status.uptime_seconds as f64),
        megabytes(status.memory.resident_bytes),
        megabytes(status.memory.peak_bytes)
    )];
    out.push(String::new());
    out.extend(capture(status, before, paint));
    out.push(String::new());
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    rows.extend(status.replicas.iter().map(|replica| row(status.at, replica)));
    let levels = [Level::Ok].into_iter().chain(status.replicas.iter().map(|replica| level_of(&faults, replica)));
    out.extend(table(&rows).into_iter().zip(levels).enumerate().map(|(at, (line, level))| match (at, level) {
        (0, _) => paint.bold(&line),
        (_, Level::Ok) => line,
        (_, level) => paint.as_level(level, &line),
    }));
    if !faults.is_empty() {
        out.push(String::new());
    }
    out.extend(
        faults.iter().map(|(level, text)| paint.as_level(*level, &format!("{}: {text}", super::control::word(*level)))),
    );
    let failures: Vec<_> = status
        .replicas
        .iter()
        .flat_map(|replica| replica.stats.queue.failed.iter().map(move |one| (replica, one)))
        .collect();
    if !failures.is_empty() {
        out.push(String::new());
        out.push(paint.bold("what does not get through"));
    }
    for (replica, failure) in failures.iter().take(SHOWN) {
        let what = failure.mailbox.clone().unwrap_or_else(|| format!("{} {}", failure.lane, failure.item));
        let next = failure.next_try_seconds.map_or_else(String::new, |left| format!(", again in {}", span(left)));
        let line = format!("{what} ({}): {} ({} tries{next})", replica.stats.replica, failure.reason, failure.tries);
        let level = if failure.quarantined { Level::Warning } else { Level::Ok };
        out.push(if level == Level::Ok { line } else { paint.as_level(level, &line) });
    }
    for order in &status.orders {
        let word = format!("{:?}", order.word).to_lowercase();
        out.push(paint.as_level(Level::Warning, &format!("{word} {:?} at {}", order.subject, order.replica)));
    }
    out
}

/// Who looks after which part of the store, and how much there was to see.
fn capture(status: &Status, before: Option<&Status>, paint: Paint) -> Vec<String> {
    let source = &status.source;
    let rate = before.filter(|before| before.pid == status.pid && before.at < status.at).map(|before| {
        let events = source.events_total.saturating_sub(before.source.events_total);
        events as f64 / (status.at - before.at) as f64
    });
    let mut out = vec![format!(
        "{}  {}{}, {} directories watched, {} not, {} events{}, {} overflows, {} restarts",
        paint.bold("capture"),
        source.capture,
        if source.armed { "" } else { " (not armed)" },
        source.watches,
        source.unwatched,
        source.events_total,
        rate.map_or_else(String::new, |rate| format!(" ({rate:.0}/s)")),
        source.overflows_total,
        source.restarts_total
    )];
    let mut areas: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for area in &source.areas {
        areas.entry(&area.capture).or_default().extend(area.paths.iter().map(|path| path.display().to_string()));
    }
    out.extend(areas.into_iter().map(|(capture, paths)| format!("  {capture}  {}", paths.join(" "))));
    out
}

fn row(at: u64, replica: &ReplicaStatus) -> [String; COLUMNS.len()] {
    let (stats, queue) = (&replica.stats, &replica.stats.queue);
    let catching_up = if replica.catching_up { "+" } else { "" };
    let proven = replica.caught_up_at.map_or_else(|| "-".to_owned(), |then| span(at.saturating_sub(then) as f64));
    [
        stats.replica.clone(),
        format!("{}{catching_up}", span(replica.lag_seconds)),
        proven,
        queue.pending.to_string(),
        queue.running.to_string(),
        queue.failed_total.saturating_sub(queue.quarantined).to_string(),
        queue.quarantined.to_string(),
        queue.held_back.to_string(),
        queue.skipped.to_string(),
        format!("{:.1}", replica.confirmed_per_second),
        format!("{:.1}", replica.sent_bytes_per_second / 1e3),
        format!("{:.1}", stats.lag_p50_seconds * 1e3),
        format!("{:.1}", stats.lag_p99_seconds * 1e3),
        stats.sessions.to_string(),
        stats.mailboxes.to_string(),
    ]
}

/// The worst that is said of a replica.
fn level_of(faults: &[(Level, String)], replica: &ReplicaStatus) -> Level {
    let of = faults.iter().filter(|(_, text)| text.starts_with(&replica.stats.replica));
    of.map(|(level, _)| *level).max().unwrap_or(Level::Ok)
}

/// Names to the left, figures to the right.
fn table(rows: &[[String; COLUMNS.len()]]) -> Vec<String> {
    let mut widths = [0; COLUMNS.len()];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(measure_text_width(cell));
        }
    }
    let line = |row: &[String; COLUMNS.len()]| {
        let cells = row.iter().zip(widths).enumerate().map(|(at, (cell, width))| {
            let side = if at == 0 { console::Alignment::Left } else { console::Alignment::Right };
            pad_str(cell, width, side, None).into_owned()
        });
        cells.collect::<Vec<_>>().join("  ")
    };
    rows.iter().map(line).collect()
}
