//! What a running daemon says of itself, and what a monitoring system is to make of it.

pub use super::ground::GroundStatus;
use super::ground::{LITTLE_ROOM, NO_ROOM};
use super::moves::Move;
pub use super::rooms::Wedged;
use super::scrub::ScrubStatus;
use crate::capture::{CaptureStats, CrossStats, SourceStats};
use crate::engine::{Meddled, ReplicaStats, StandingOrder};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Everything that `spooltap status` shows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    /// Seconds since 1970.
    pub at: u64,
    pub uptime_seconds: u64,
    pub source: SourceStatus,
    pub memory: Memory,
    /// Rooms of the daemon that do not get on; the watchdog restarts it.
    #[serde(default)]
    pub wedged: Vec<Wedged>,
    #[serde(default)]
    pub ground: GroundStatus,
    pub replicas: Vec<ReplicaStatus>,
    /// Pauses and skips in force.
    pub orders: Vec<StandingOrder>,
    /// Users who go, or have gone, from some replicas to another.
    #[serde(default)]
    pub moves: Vec<Move>,
    /// The comparison under way: so many of so many mailboxes and users are done.
    #[serde(default)]
    pub scan: Option<(usize, usize)>,
    /// The continuous scrub, where there is one.
    #[serde(default)]
    pub scrub: Option<ScrubStatus>,
}

/// How change is noticed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Names of the sources at work.
    pub capture: String,
    /// Each of them with what it serves, and why it is this one.
    pub areas: Vec<Area>,
    pub armed: bool,
    pub watches: u64,
    /// Directories that should be watched and cannot be.
    pub unwatched: u64,
    pub events_total: u64,
    pub notices_total: u64,
    /// Times the kernel dropped events; each was followed by a scan.
    pub overflows_total: u64,
    pub restarts_total: u64,
    /// Cyrus's log beside capture, where `cross_check` asks for that.
    #[serde(default)]
    pub cross_check: Option<CrossStats>,
    /// Why the source cannot be read just now.
    pub trouble: Option<String>,
}

/// What one source of capture looks after.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Area {
    pub capture: String,
    pub reason: String,
    pub paths: Vec<PathBuf>,
}

impl From<SourceStats> for Area {
    fn from(stats: SourceStats) -> Self {
        Self { capture: stats.source.to_owned(), reason: stats.reason, paths: stats.areas }
    }
}

/// From `/proc/self/status`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Memory {
    pub resident_bytes: u64,
    pub peak_bytes: u64,
}

/// One replica.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ReplicaStatus {
    #[serde(flatten)]
    pub stats: ReplicaStats,
    /// Age of the oldest change that the replica has not confirmed; while catching up after a start, at least the time
    /// since the last moment before it of which we know that nothing was open. Never lower than the truth.
    pub lag_seconds: f64,
    /// Everything that changed at the source before this moment (seconds since 1970) is confirmed; proven through the
    /// kernel's own queue. `None` until the first proof.
    #[serde(default)]
    pub caught_up_at: Option<u64>,
    /// The work of the first scan is not done yet.
    pub catching_up: bool,
    /// Over the last minute.
    pub confirmed_per_second: f64,
    pub sent_bytes_per_second: f64,
}

/// What a monitoring system shows; the numbers are its exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Ok = 0,
    Warning = 1,
    Critical = 2,
}

/// From which lag on it matters.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub warning: Duration,
    pub critical: Duration,
}

/// A change on the replica that did not come from here is told for so long.
const MEDDLED_FOR: Duration = Duration::from_secs(3600);

impl Status {
    /// What is wrong, worst first.
    pub fn faults(&self, limits: Limits) -> Vec<(Level, String)> {
        let mut out = Vec::new();
        for Wedged { room, seconds } in &self.wedged {
            let how = match seconds {
                Some(seconds) => format!("has not moved for {seconds} s"),
                None => "has ended".to_owned(),
            };
            out.push((Level::Critical, format!("daemon: {room} {how}; the watchdog restarts it, or do it yourself")));
        }
        if let Some(trouble) = &self.ground.state_trouble {
            let text = format!("state: cannot be written, receipts are kept in memory: {trouble}");
            out.push((Level::Critical, text));
        }
        if let Some(free) = self.ground.free_bytes.filter(|free| *free < LITTLE_ROOM) {
            let level = if free < NO_ROOM { Level::Critical } else { Level::Warning };
            out.push((level, format!("state: only {} MB are free where it is kept", free >> 20)));
        }
        if let (Some(jump), Some(ago)) = (self.ground.clock_jump_seconds, self.ground.clock_jumped_ago_seconds) {
            let text =
                format!("clock: it was set by {jump} s, {} min ago; lags before a restart may be wrong", ago / 60);
            out.push((Level::Warning, text));
        }
        if let Some(trouble) = &self.source.trouble {
            out.push((Level::Critical, format!("source: {trouble}")));
        }
        if !self.source.armed {
            out.push((Level::Critical, "source: capture is not armed".to_owned()));
        }
        if self.source.unwatched > 0 {
            let count = self.source.unwatched;
            out.push((
                Level::Warning,
                format!("source: {count} directories got no watch, a slower source looks after them"),
            ));
        }
        if let Some(scrub) = &self.scrub {
            if let Some(trouble) = &scrub.trouble {
                out.push((Level::Warning, format!("scrub: {trouble}")));
            }
            let damaged = scrub.damaged();
            if let Some(first) = damaged.first() {
                out.push((Level::Warning, format!("scrub: {} damaged, the first is {first}", damaged.len())));
            }
        }
        for replica in &self.replicas {
            let stats = &replica.stats;
            let mut add = |level, text: String| out.push((level, format!("{}: {text}", stats.replica)));
            if let Some(fatal) = &stats.fatal {
                add(Level::Critical, format!("not usable: {fatal}"));
            }
            if let Some(fuse) = &stats.fuse {
                add(Level::Critical, fuse.clone());
            }
            let lag = replica.lag_seconds;
            if lag >= limits.critical.as_secs_f64() {
                add(Level::Critical, format!("{lag:.0} s behind"));
            } else if lag >= limits.warning.as_secs_f64() {
                add(Level::Warning, format!("{lag:.0} s behind"));
            }
            if stats.queue.quarantined > 0 {
                add(Level::Warning, format!("{} in quarantine", stats.queue.quarantined));
            }
            let meddled = &stats.meddled;
            if meddled.count > 0 && self.at.saturating_sub(meddled.at) < MEDDLED_FOR.as_secs() {
                let Meddled { count, mailbox, .. } = meddled;
                add(
                    Level::Warning,
                    format!("somebody else has changed it, {count} times, last {mailbox}; the source wins"),
                );
            }
            if stats.queue.skipped > 0 {
                add(Level::Warning, format!("{} skipped", stats.queue.skipped));
            }
        }
        for order in self.orders.iter().filter(|order| order.word == crate::engine::Word::Pause) {
            out.push((Level::Warning, format!("{}: paused: {:?}", order.replica, order.subject)));
        }
        out.sort_by_key(|(level, _)| std::cmp::Reverse(*level));
        out
    }
}

/// Seconds since 1970.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Memory {
    pub(super) fn now() -> Self {
        let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_ascii_whitespace().next()?.parse::<u64>().ok()
        };
        let bytes = |name| field(name).unwrap_or(0).saturating_mul(1024);
        Self { resident_bytes: bytes("VmRSS:"), peak_bytes: bytes("VmHWM:") }
    }
}

impl From<CaptureStats> for SourceStatus {
    fn from(stats: CaptureStats) -> Self {
        Self {
            capture: stats
                .sources
                .iter()
                .map(|source| source.source)
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect::<Vec<_>>()
                .join("+"),
            areas: stats.sources.into_iter().map(Area::from).collect(),
            armed: stats.armed,
            watches: stats.watches,
            unwatched: stats.unwatched,
            events_total: stats.events,
            notices_total: stats.notices,
            overflows_total: stats.overflows,
            restarts_total: stats.restarts,
            cross_check: None,
            trouble: None,
        }
    }
}

/// How far back rates look.
const RATE_WINDOW: Duration = Duration::from_secs(60);

/// Keeps what is needed to say rates and a lag that spans a restart.
pub(super) struct Book {
    /// Per replica: when, confirmed, bytes.
    samples: Vec<VecDeque<(Instant, u64, u64)>>,
    /// Per replica: how long before our start nothing was open for sure, while what came later is not yet compared.
    behind_by: Vec<Option<Duration>>,
    /// By a clock that nobody sets.
    started: Instant,
}

impl Book {
    /// `before` is what the daemon before us said last.
    pub(super) fn new(names: &[String], before: Option<&Status>) -> Self {
        let behind = |name: &String| {
            let last =
                before.and_then(|status| Some((status, status.replicas.iter().find(|r| r.stats.replica == *name)?)));
            // A replica that was never seen before is behind since now, as far as anybody can tell.
            let since = last.map(|(status, replica)| status.at.saturating_sub(replica.lag_seconds.ceil() as u64));
            Duration::from_secs(since.map_or(0, |since| unix_now().saturating_sub(since)))
        };
        Self {
            samples: names.iter().map(|_| VecDeque::new()).collect(),
            behind_by: names.iter().map(|name| Some(behind(name))).collect(),
            started: Instant::now(),
        }
    }

    /// `compared`: the first scan has put what differs into the queues.
    pub(super) fn replicas(&mut self, stats: Vec<ReplicaStats>, compared: bool) -> Vec<ReplicaStatus> {
        let now = Instant::now();
        let one = |(at, stats): (usize, ReplicaStats)| {
            let (mut confirmed_per_second, mut sent_bytes_per_second) = (0.0, 0.0);
            if let Some(samples) = self.samples.get_mut(at) {
                samples.push_back((now, stats.confirmed_total, stats.sent_bytes));
                while samples.len() > 2 && samples.front().is_some_and(|(at, ..)| now - *at > RATE_WINDOW) {
                    samples.pop_front();
                }
                if let Some((at, confirmed, sent)) = samples.front()
                    && now > *at
                {
                    let seconds = now.duration_since(*at).as_secs_f64();
                    confirmed_per_second = stats.confirmed_total.saturating_sub(*confirmed) as f64 / seconds;
                    sent_bytes_per_second = stats.sent_bytes.saturating_sub(*sent) as f64 / seconds;
                }
            }
            let mut lag_seconds = stats.queue.oldest_seconds;
            let mut catching_up = false;
            if let Some(behind) = self.behind_by.get_mut(at) {
                if compared && stats.queue.pending + stats.queue.running + stats.queue.waiting == 0 {
                    *behind = None;
                }
                if let Some(by) = behind {
                    catching_up = true;
                    lag_seconds = lag_seconds.max((*by + self.started.elapsed()).as_secs_f64());
                }
            }
            ReplicaStatus {
                stats,
                lag_seconds,
                catching_up,
                confirmed_per_second,
                sent_bytes_per_second,
                caught_up_at: None,
            }
        };
        stats.into_iter().enumerate().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{QueueStats, StandingOrder, Subject, Word};

    const LIMITS: Limits = Limits { warning: Duration::from_secs(60), critical: Duration::from_secs(600) };

    fn check(change: impl FnOnce(&mut Status), expected: &[(Level, &str)]) {
        let mut status = Status { replicas: vec![ReplicaStatus::default()], ..Status::default() };
        status.source.armed = true;
        status.replicas[0].stats.replica = "r".into();
        change(&mut status);
        let found = status.faults(LIMITS);
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for ((level, text), (expected, part)) in found.iter().zip(expected) {
            assert!(level == expected && text.contains(part), "{found:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_and_the_worst_first() {
        check(|_| {}, &[]);
        check(|status| status.replicas[0].lag_seconds = 59.9, &[]);
        check(|status| status.replicas[0].lag_seconds = 60.0, &[(Level::Warning, "60 s behind")]);
        check(
            |status| {
                status.replicas[0].stats.queue.quarantined = 2;
                status.replicas[0].stats.fatal = Some("login refused".into());
            },
            &[(Level::Critical, "login refused"), (Level::Warning, "2 in quarantine")],
        );
        check(|status| status.source.trouble = Some("no list".into()), &[(Level::Critical, "no list")]);
        check(|status| status.ground.state_trouble = Some("disk full".into()), &[(Level::Critical, "disk full")]);
        check(|status| status.ground.free_bytes = Some(LITTLE_ROOM), &[]);
        check(|status| status.ground.free_bytes = Some(LITTLE_ROOM - 1), &[(Level::Warning, "255 MB are free")]);
        check(|status| status.ground.free_bytes = Some(NO_ROOM - 1), &[(Level::Critical, "31 MB are free")]);
        check(
            |status| (status.ground.clock_jump_seconds, status.ground.clock_jumped_ago_seconds) = (Some(-90), Some(61)),
            &[(Level::Warning, "set by -90 s, 1 min ago")],
        );
        let meddled = |at| Meddled { count: 2, mailbox: "user.a".into(), at };
        check(|status| (status.at, status.replicas[0].stats.meddled) = (5000, meddled(1400)), &[]);
        check(
            |status| (status.at, status.replicas[0].stats.meddled) = (5000, meddled(1401)),
            &[(Level::Warning, "2 times, last user.a")],
        );
        check(|status| status.source.unwatched = 3, &[(Level::Warning, "3 directories")]);
        check(
            |status| {
                let found = crate::engine::Damage {
                    mailbox: "user.u1".into(),
                    uid: 7,
                    file: Some("/spool/7.".into()),
                    reason: "is another message".into(),
                    found_at: 1,
                };
                let mut last = crate::engine::Pass::begin();
                last.damaged.push(found);
                status.scrub = Some(ScrubStatus { last: Some(last), ..ScrubStatus::default() });
            },
            &[(Level::Warning, "scrub: 1 damaged, the first is user.u1 UID 7: /spool/7.: is another message")],
        );
        let order = StandingOrder { replica: "r".into(), subject: Subject::User("u1".into()), word: Word::Pause };
        check(|status| status.orders.push(order), &[(Level::Warning, "u1")]);
    }

    #[test]
    fn a_restart_does_not_make_the_lag_young() {
        let stats = |pending| ReplicaStats {
            replica: "r".into(),
            queue: QueueStats { pending, oldest_seconds: 0.5, ..QueueStats::default() },
            ..ReplicaStats::default()
        };
        let mut before = Status { at: unix_now() - 1000, ..Status::default() };
        before.replicas.push(ReplicaStatus { stats: stats(0), lag_seconds: 30.0, ..ReplicaStatus::default() });
        let mut book = Book::new(&["r".to_owned()], Some(&before));
        let mut lag = |pending, compared| book.replicas(vec![stats(pending)], compared)[0].lag_seconds;
        // Nothing is open as long as nobody has looked.
        for (pending, compared) in [(0, false), (1, false), (1, true)] {
            let lag = lag(pending, compared);
            assert!((1030.0..1040.0).contains(&lag), "{lag}");
        }
        assert!(lag(0, true) < 1.0);
        assert!(lag(1, true) < 1.0);
    }
}
