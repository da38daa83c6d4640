//! The engine: hints in, confirmed receipts out. It knows a `MailStore`, a `ReplicaTarget` and the state of receipts,
//! and names no concrete one of them.
//!
//! `route` turns keys into items of a lane, `queue` keeps them in order, one worker thread per session takes a lane at a
//! time, `push` works through it, `diff` (pure) says what to do. `scan` finds what changed while nobody watched.
//!
//! Workers are plain threads with a blocking session each: reading a mailbox and speaking to the replica alternate in
//! one step, so a change crosses no channel between the kernel's event and the wire.

mod account;
mod content;
mod control;
pub mod diff;
mod doubt;
#[cfg(test)]
mod fake;
pub mod fence;
mod fill_in;
mod held;
mod lags;
mod loss;
pub mod merge;
mod mover;
mod names;
mod pace;
mod patience;
mod push;
mod queue;
mod rebuild;
mod route;
mod scan;
mod scripts;
mod scrub;
mod settle;
mod sides;
#[cfg(test)]
mod tests;
mod verify;
mod watched;
mod whole;

pub use control::{ControlError, StandingOrder, Subject, Word};
pub use lags::StageLag;
pub use merge::Addition;
pub use mover::{MoveError, Mover};
pub use pace::{Bustle, Pace};
pub use push::NoBodies;
pub use queue::{Backoff, Failure, Item, Lane, QueueStats};
pub use rebuild::aside_for;
pub use route::quota_lane;
pub use scan::{ScanReport, scan};
pub use scrub::{Damage, Pass};
pub use sides::{Mismatch, Side, Sides, Surplus, lanes, sides};
pub use verify::{Depth, Difference, Extent, VerifyError, VerifyReport, verify};
pub use whole::{Whole, whole};

use crate::model::{
    Listing, MailStore, MboxName, Notice, Pulse, ReplicaError, ReplicaTarget, Step, StoreError, UniqueId, pulse,
};
use crate::state::{ReplicaState, Slot};
use names::ReplicaNames;
use push::JobError;
use queue::{Job, Outcome, Queue};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the engine tells whoever watches it.
#[derive(Debug)]
pub enum Event<'a> {
    Connected {
        replica: &'a str,
    },
    Disconnected {
        replica: &'a str,
        cause: String,
        retry_in: Duration,
    },
    /// The replica confirmed it; `lag` runs from the kernel's notice.
    Confirmed {
        item: Item,
        mailbox: Option<MboxName>,
        lag: Duration,
    },
    Applied(&'a Step),
    /// Dry run: this is what would be applied.
    Planned(&'a Step),
    Failed {
        lane: Lane,
        item: Item,
        mailbox: Option<MboxName>,
        reason: String,
        quarantine: bool,
    },
    /// A mailbox of the replica that never came from this source; it is left alone.
    Stray {
        name: MboxName,
        uniqueid: UniqueId,
    },
    /// Record-by-record comparison of one mailbox.
    Repair {
        mailbox: MboxName,
        reason: String,
    },
    /// A mailbox of the replica is made anew; `kept` messages that only it had are in `kept_in`.
    Rebuild {
        mailbox: MboxName,
        reason: String,
        kept: usize,
        kept_in: Option<MboxName>,
    },
    /// The replica cannot hold this of the object, and that was allowed.
    Reduced {
        object: String,
        lost: String,
    },
    /// The source's list could not be read; it is tried again.
    SourceTrouble {
        reason: String,
    },
    Scanned {
        checked: usize,
        differ: usize,
        elapsed: Duration,
    },
}

/// Where events go; called from the engine's threads, so it must be quick.
pub type EventSink = Arc<dyn Fn(&Event<'_>) + Send + Sync>;

/// Which lanes a replica (by name) is to have.
pub type Share = Arc<dyn Fn(&str, &Lane) -> bool + Send + Sync>;

/// A replica with its receipts.
pub type Target = (Arc<dyn ReplicaTarget>, ReplicaState);

/// How an engine is to run.
#[derive(Clone)]
pub struct Options {
    /// Sessions per replica.
    pub lanes: usize,
    pub backoff: Backoff,
    /// Longest pause between attempts to reach a replica.
    pub reconnect_most: Duration,
    /// Say what would be done, change nothing.
    pub dry_run: bool,
    /// Give up (instead of trying for ever) when a replica cannot be used at all.
    pub stop_on_fatal: bool,
    /// Lift the fuse on mass removals.
    pub allow_removals: bool,
    /// Send what an older replica can hold of a mailbox or quota root, and leave out the rest.
    pub allow_loss: bool,
    /// Take nothing from a replica: what only it has is put aside there and stays.
    pub keep: bool,
    /// A mailbox that is gone at the source stays on a replica for so long.
    pub removal_delay: Duration,
    /// Default: every replica has everything. What a replica has of a lane that is not its own stays there as it is.
    pub share: Option<Share>,
    /// How catch-up scans go.
    pub scan_pace: ScanPace,
}

/// How a scan leaves room for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanPace {
    /// So many mailboxes (and users) in a second at most; 0: as fast as it goes.
    pub per_second: u64,
    /// It takes turns with others while a disk is waited for in so many percent of the time; 0: it never does.
    pub busy_percent: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            lanes: 4,
            backoff: Backoff { first: Duration::from_millis(50), most: Duration::from_secs(300) },
            reconnect_most: Duration::from_secs(30),
            dry_run: false,
            stop_on_fatal: false,
            allow_removals: false,
            allow_loss: false,
            keep: false,
            removal_delay: Duration::ZERO,
            share: None,
            scan_pace: ScanPace::default(),
        }
    }
}

/// Removals within this time count together.
const FUSE_WINDOW: Duration = Duration::from_secs(600);
/// So many are never suspicious.
const FUSE_FREE: usize = 50;
/// So many mailboxes may vanish from the source's list at once and without a word.
const VANISH_FREE: usize = 10;
/// How a reason begins when the fuse stopped a removal.
const FUSE: &str = "mass removal stopped";
/// A session that idles this long is asked whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(240);
/// The same trouble with a replica is told this often.
const TELL_AGAIN: Duration = Duration::from_secs(30);
/// So many lost sessions in a row at the same item, and it is quarantined.
const LOSSES: u32 = 3;

/// What all workers of one replica share.
struct Shared {
    pub store: Arc<dyn MailStore>,
    pub target: Arc<dyn ReplicaTarget>,
    pub state: ReplicaState,
    pub queue: Queue,
    pub events: EventSink,
    pub dry_run: bool,
    allow_removals: bool,
    allow_loss: bool,
    keep: bool,
    /// What was left out, so that the same is told once.
    left_out: Mutex<HashMap<String, String>>,
    /// Messages that are not sent because their files are no good.
    held: Mutex<held::AllHeld>,
    share: Option<Share>,
    names: Mutex<ReplicaNames>,
    /// As it was last.
    source: Mutex<Arc<Listing>>,
    removals: Mutex<VecDeque<Instant>>,
    good_list: Mutex<Option<GoodList>>,
    /// An admin has lifted the fuse until then.
    allowed_until: Mutex<Option<Instant>>,
    /// What an admin has said, for those who ask.
    orders: Mutex<Vec<(Subject, Word)>>,
    /// An admin wants the replica to be tried now.
    reconnect_now: Mutex<Option<Instant>>,
    losses: Mutex<HashMap<(Lane, Item), u32>>,
    doubts: doubt::Doubts,
    removal_delay: Duration,
    waits: patience::Waits,
    meddled: Mutex<Meddled>,
    lags: Mutex<lags::Lags>,
    traffic: [AtomicU64; 2],
    compressed: Mutex<Compressed>,
    connected: AtomicU64,
    fatal: Mutex<Option<String>>,
    /// The last trouble that was told, so that several sessions do not tell the same.
    told: Mutex<Option<(String, Instant)>>,
}

/// The last list of which it was seen that it is the one we know.
struct GoodList {
    listing: Arc<Listing>,
    /// So many of the replica's mailboxes are not in it, at most.
    vanished: usize,
    /// [`ReplicaNames::added`] at that time.
    added: usize,
}

/// Bytes sent in compressed sessions.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Compressed {
    pub plain_bytes: u64,
    pub sent_bytes: u64,
}

/// What was found on a replica that nobody here has done.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Meddled {
    /// Times that a mailbox there was not what the replica had confirmed.
    pub count: u64,
    /// The last one, and when (seconds since 1970).
    pub mailbox: String,
    pub at: u64,
}

/// A poisoned lock only means that another thread panicked between two statements; the data is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// This replica is to have that lane.
    fn wants(&self, lane: &Lane) -> bool {
        self.share.as_ref().is_none_or(|share| share(&self.target.name(), lane))
    }

    /// What those before us left unfinished.
    fn inherit_doubts(&self) {
        for (slot, lane) in self.state.left_at_work() {
            if let Ok(lane) = postcard::from_bytes(&lane) {
                self.doubts.add(lane, Some(slot), Instant::now());
            }
        }
    }

    /// Queues what has to be looked at again, and says how long nothing has to be.
    fn doubts_due(&self) -> Duration {
        let now = Instant::now();
        for lane in self.doubts.due(now) {
            self.push(lane, Item::Compare, now, false);
        }
        let next = self.doubts.next().into_iter().chain(self.waits_due()).min();
        next.map_or(KEEPALIVE, |at| at.saturating_duration_since(now).min(KEEPALIVE))
    }

    /// Writes down that a lane is at work, before anything is sent for it.
    fn at_work(&self, lane: &Lane) -> Option<Slot> {
        if self.dry_run {
            return None;
        }
        postcard::to_stdvec(lane).ok().and_then(|lane| self.state.at_work(&lane))
    }

    /// Queues an item, if it is for this replica.
    fn push(&self, lane: Lane, item: Item, seen_at: Instant, live: bool) {
        if self.wants(&lane) {
            self.queue.push(lane, item, seen_at, live);
        }
    }

    /// The same for what capture has noticed.
    fn push_noticed(&self, lane: &Lane, item: &Item, seen_at: Instant) {
        if self.wants(lane) {
            lock(&self.lags).add(lags::Stage::Seen, seen_at.elapsed());
            self.queue.push(lane.clone(), item.clone(), seen_at, true);
        }
    }

    fn names(&self) -> MutexGuard<'_, ReplicaNames> {
        lock(&self.names)
    }

    /// The source's listing as it is now.
    fn source(&self) -> Result<Arc<Listing>, StoreError> {
        let listing = self.store.listing()?;
        *lock(&self.source) = listing.clone();
        Ok(listing)
    }

    /// Something the replica cannot hold: refused, or told and left out.
    fn loses(&self, object: &dyn std::fmt::Display, lost: Option<String>) -> Result<(), JobError> {
        let (object, lost) = match lost {
            Some(lost) => (object.to_string(), lost),
            None => return Ok(()),
        };
        if !self.allow_loss {
            return Err(JobError::Conflict(loss::refusal(&object, &lost)));
        }
        if lock(&self.left_out).insert(object.clone(), lost.clone()).as_ref() != Some(&lost) {
            (self.events)(&Event::Reduced { object, lost });
        }
        Ok(())
    }

    /// A second look, some moments later.
    fn source_again(&self) -> Result<Arc<Listing>, StoreError> {
        std::thread::sleep(Duration::from_millis(10));
        self.source()
    }

    /// A mailbox of the replica is not what the replica had confirmed; and it was not one of our own sessions that was lost.
    fn was_meddled_with(&self, lane: &Lane, mailbox: &MboxName) {
        if self.doubts.is_in(lane) {
            return;
        }
        let at = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut meddled = lock(&self.meddled);
        *meddled = Meddled { count: meddled.count + 1, mailbox: mailbox.to_string(), at };
    }

    fn is_allowed(&self) -> bool {
        self.allow_removals || self.dry_run || lock(&self.allowed_until).is_some_and(|until| Instant::now() < until)
    }

    /// Counts a removal; too many in too short a time are an accident until somebody says otherwise.
    fn fuse(&self, what: &dyn std::fmt::Display) -> Result<(), JobError> {
        if self.is_allowed() {
            return Ok(());
        }
        let now = Instant::now();
        let mut removals = lock(&self.removals);
        while removals.front().is_some_and(|at| now.duration_since(*at) > FUSE_WINDOW) {
            removals.pop_front();
        }
        let total = self.names().len() + removals.len();
        let limit = FUSE_FREE.max(total / 4);
        if removals.len() >= limit {
            return Err(JobError::Conflict(format!(
                "{FUSE}: {what} is kept on the replica, there were {} removals in the last {} minutes and the fuse \
                 allows {limit}; check the source, then say `spooltap allow`",
                removals.len(),
                FUSE_WINDOW.as_secs() / 60
            )));
        }
        removals.push_back(now);
        Ok(())
    }

    /// A list that lacks most of what it had, without one word of deletion (2.5 and later keep tombstones), is another
    /// list: cut, restored, or of another store. Nothing is concluded from such a one.
    fn vanish_fuse(&self, what: &dyn std::fmt::Display, source: &Arc<Listing>) -> Result<(), JobError> {
        if self.is_allowed() {
            return Ok(());
        }
        // A list that was found good stays good for this replica: what it has only shrinks by removals.
        let mut good = lock(&self.good_list);
        if good.as_ref().is_some_and(|good| Arc::ptr_eq(&good.listing, source)) {
            return Ok(());
        }
        let names = self.names();
        let total = names.ours_len();
        let is_gone = |id: &UniqueId| source.by_id(id).is_none() && !source.is_tombstone(id);
        // From one good list to the next no more can have vanished than what is different, and what was made in between.
        let at_most = good.as_ref().map(|good| {
            let gone = source.since(&good.listing).filter(|(_, now)| now.is_none());
            let gone = gone.filter_map(|(before, _)| before).filter(|entry| is_gone(&entry.uniqueid)).count();
            good.vanished + gone + (names.added() - good.added)
        });
        let limit = VANISH_FREE.max(total / 2);
        let count = match at_most {
            Some(count) if count <= limit => count,
            _ => names.ours().filter(|id| is_gone(id)).count(),
        };
        let added = names.added();
        drop(names);
        if count > limit {
            return Err(JobError::Conflict(format!(
                "{FUSE}: {what} stays on the replica as it is, {count} of {total} mailboxes have vanished from the source's list; \
                 check the source, then say `spooltap allow`"
            )));
        }
        *good = Some(GoodList { listing: source.clone(), vanished: count, added });
        Ok(())
    }

    /// True when the session was lost at this item so often that the item must be the reason.
    fn count_loss(&self, lane: &Lane, item: &Item) -> bool {
        let mut losses = lock(&self.losses);
        let count = losses.entry((lane.clone(), item.clone())).or_default();
        *count += 1;
        if *count >= LOSSES {
            losses.remove(&(lane.clone(), item.clone()));
            return true;
        }
        false
    }
}

/// Figures of one replica.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ReplicaStats {
    pub replica: String,
    pub sessions: u64,
    #[serde(flatten)]
    pub queue: QueueStats,
    pub confirmed_total: u64,
    pub lag_p50_seconds: f64,
    pub lag_p99_seconds: f64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub mailboxes: usize,
    pub fatal: Option<String>,
    /// Why removals are stopped.
    pub fuse: Option<String>,
    /// Mailboxes that are gone at the source and stay here for a while (`removal_delay_seconds`).
    #[serde(default)]
    pub removals_waiting: usize,
    #[serde(default)]
    pub next_removal_seconds: Option<f64>,
    /// Changes on the replica that did not come from here.
    #[serde(default)]
    pub meddled: Meddled,
    /// What was sent before compression, where sessions are compressed.
    #[serde(default)]
    pub compressed: Option<Compressed>,
    /// How long changes took to each stage.
    #[serde(default)]
    pub stages: Vec<StageLag>,
}

/// A running engine.
pub struct Engine {
    replicas: Vec<Arc<Shared>>,
    router: Option<(mpsc::Sender<route::Order>, JoinHandle<()>)>,
    workers: Vec<JoinHandle<()>>,
    stopping: Arc<AtomicBool>,
    scanning: Arc<scan::Progress>,
    /// What the router has to look at again is open as well.
    open: route::Oldest,
    pulses: Vec<Arc<Pulse>>,
}

impl Engine {
    /// Starts the workers; nothing is pushed before `scan`, `compare` or `notify` say so.
    pub fn start(store: Arc<dyn MailStore>, targets: Vec<Target>, options: &Options, events: EventSink) -> Self {
        let stopping = Arc::new(AtomicBool::new(false));
        let (router_pulse, scanner_pulse) = (Pulse::new("router"), Pulse::new("scanner"));
        let mut pulses = vec![router_pulse.clone(), scanner_pulse.clone()];
        let mut workers = Vec::new();
        let mut replicas = Vec::new();
        for (target, state) in targets {
            let mut names = ReplicaNames::new(store.deleted_prefix());
            for (id, name) in state.mailboxes() {
                names.set(&id, &name);
            }
            let shared = Arc::new(Shared {
                store: store.clone(),
                target,
                state,
                queue: Queue::new(options.lanes.max(1), options.backoff),
                events: events.clone(),
                dry_run: options.dry_run,
                allow_removals: options.allow_removals,
                allow_loss: options.allow_loss,
                keep: options.keep,
                left_out: Mutex::default(),
                held: Mutex::default(),
                share: options.share.clone(),
                names: Mutex::new(names),
                source: Mutex::default(),
                removals: Mutex::default(),
                good_list: Mutex::default(),
                allowed_until: Mutex::default(),
                orders: Mutex::default(),
                reconnect_now: Mutex::default(),
                losses: Mutex::default(),
                doubts: doubt::Doubts::default(),
                removal_delay: options.removal_delay,
                waits: patience::Waits::default(),
                meddled: Mutex::default(),
                lags: Mutex::default(),
                traffic: Default::default(),
                compressed: Mutex::default(),
                connected: AtomicU64::new(0),
                fatal: Mutex::default(),
                told: Mutex::default(),
            });
            if !shared.dry_run {
                shared.inherit_doubts();
                shared.inherit_waits();
            }
            for number in 0..options.lanes.max(1) {
                let worker = Worker {
                    shared: shared.clone(),
                    stopping: stopping.clone(),
                    reconnect_most: options.reconnect_most,
                    stop_on_fatal: options.stop_on_fatal,
                };
                let thread = std::thread::Builder::new().name(format!("lane-{number}"));
                let pulse = Pulse::new(format!("lane {number} of {}", shared.target.name()));
                pulses.push(pulse.clone());
                workers.extend(thread.spawn(move || pulse.during(|| worker.run())));
            }
            replicas.push(shared);
        }
        let (orders, inbox) = mpsc::channel();
        let all = replicas.clone();
        let scanning = Arc::<scan::Progress>::default();
        let (open, pace) = (route::Oldest::default(), options.scan_pace);
        let theirs = (scanning.clone(), open.clone());
        let router = std::thread::Builder::new()
            .name("router".into())
            .spawn(move || {
                let (scanning, open) = theirs;
                let router = route::Router::new(store, all, scanning, open, scanner_pulse, pace);
                router_pulse.during(|| router.run(&inbox));
            })
            .ok()
            .map(|thread| (orders, thread));
        Self { replicas, router, workers, stopping, scanning, open, pulses }
    }

    fn order(&self, order: route::Order) {
        if let Some((orders, _)) = &self.router {
            let _ = orders.send(order);
        }
    }

    /// Hands over hints from capture.
    pub fn notify(&self, notices: Vec<Notice>) {
        self.order(route::Order::Notices(notices));
    }

    /// A sender of hints that outlives borrows of the engine.
    pub fn notifier(&self) -> impl Fn(Vec<Notice>) + Send + 'static + use<> {
        let orders = self.router.as_ref().map(|(orders, _)| orders.clone());
        move |notices| {
            if let Some(orders) = &orders {
                let _ = orders.send(route::Order::Notices(notices));
            }
        }
    }

    /// Catch-up: compares the source with the receipts and queues what differs; returns when that is done.
    pub fn scan(&self) {
        let _ = self.begin_scan().recv();
    }

    /// Asks for the same; the receiver ends when it is done.
    pub fn begin_scan(&self) -> mpsc::Receiver<()> {
        let (done, wait) = mpsc::channel();
        self.order(route::Order::Scan(done));
        wait
    }

    /// The router is busy with a scan, which may take long: so many of so many mailboxes and users are done.
    pub fn scan_progress(&self) -> Option<(usize, usize)> {
        self.scanning.now()
    }

    /// Asks the router for a sign of life: the receiver ends when all that was said before has been routed.
    pub fn begin_flush(&self) -> mpsc::Receiver<()> {
        let (done, wait) = mpsc::channel();
        self.order(route::Order::Flush(done));
        wait
    }

    /// Looks at the replica afresh and compares these lanes in full.
    pub fn compare(&self, lanes: &[Lane]) {
        let now = Instant::now();
        for shared in &self.replicas {
            for lane in lanes {
                shared.push(lane.clone(), Item::Compare, now, false);
            }
        }
    }

    /// Queues single items.
    pub fn queue(&self, lane: &Lane, item: &Item) {
        for shared in &self.replicas {
            shared.push(lane.clone(), item.clone(), Instant::now(), true);
        }
    }

    /// Waits until nothing is left but items that failed `tries` times; false on timeout or when a replica is unusable.
    pub fn settle(&self, tries: u32, timeout: Option<Duration>) -> bool {
        let (done, wait) = mpsc::channel();
        self.order(route::Order::Flush(done));
        let _ = wait.recv();
        self.replicas.iter().all(|shared| shared.queue.wait_settled(tries, timeout) && lock(&shared.fatal).is_none())
    }

    /// Signs of life of all who work here.
    pub fn pulses(&self) -> &[Arc<Pulse>] {
        &self.pulses
    }

    pub fn stats(&self) -> Vec<ReplicaStats> {
        let open = lock(&self.open).map_or(0.0, |seen_at| seen_at.elapsed().as_secs_f64());
        let mut stats: Vec<ReplicaStats> = self.replicas.iter().map(|shared| shared.stats()).collect();
        for one in &mut stats {
            one.queue.oldest_seconds = one.queue.oldest_seconds.max(open);
        }
        stats
    }

    /// Finishes the jobs in flight, up to `timeout`, then leaves. Receipts are durable afterwards.
    pub fn stop(mut self, timeout: Duration) {
        self.stopping.store(true, Ordering::Relaxed);
        if let Some((orders, thread)) = self.router.take() {
            drop(orders.send(route::Order::Stop));
            drop(orders);
            let _ = thread.join();
        }
        self.replicas.iter().for_each(|shared| shared.queue.close());
        let deadline = Instant::now() + timeout;
        while self.workers.iter().any(|worker| !worker.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        for worker in self.workers.drain(..).filter(JoinHandle::is_finished) {
            let _ = worker.join();
        }
        self.replicas.iter().for_each(|shared| shared.state.flush());
    }
}

impl Shared {
    /// With what the list names and nobody can replicate.
    fn queue_stats(&self) -> QueueStats {
        let mut stats = self.queue.stats();
        let source = lock(&self.source).clone();
        stats.failed.extend(source.unreadable.iter().map(|left_out| Failure {
            lane: Lane::of(&left_out.name, self.store.deleted_prefix()).to_string(),
            item: "list".into(),
            mailbox: Some(left_out.name.to_string()),
            reason: left_out.reason.clone(),
            tries: 0,
            quarantined: true,
            next_try_seconds: None,
        }));
        let left_out = source.unreadable.len();
        stats.failed_total += left_out;
        stats.quarantined += left_out;
        stats
    }

    fn stats(&self) -> ReplicaStats {
        let (stages, [lag_p50_seconds, lag_p99_seconds]) = {
            let lags = lock(&self.lags);
            (lags.shown(), lags.percentiles([0.5, 0.99]))
        };
        let (removals_waiting, next_removal_seconds) = self.waits.shown();
        let queue = self.queue_stats();
        let fuse = queue.failed.iter().find(|failure| failure.reason.starts_with(FUSE));
        ReplicaStats {
            replica: self.target.name(),
            sessions: self.connected.load(Ordering::Relaxed),
            fuse: fuse.map(|failure| failure.reason.clone()),
            removals_waiting,
            next_removal_seconds,
            meddled: lock(&self.meddled).clone(),
            compressed: Some(*lock(&self.compressed)).filter(|both| both.plain_bytes > 0),
            queue,
            confirmed_total: stages.last().map_or(0, |confirmed| confirmed.count),
            lag_p50_seconds,
            lag_p99_seconds,
            sent_bytes: self.traffic[0].load(Ordering::Relaxed),
            received_bytes: self.traffic[1].load(Ordering::Relaxed),
            mailboxes: self.names().len(),
            fatal: lock(&self.fatal).clone(),
            stages,
        }
    }
}

struct Worker {
    shared: Arc<Shared>,
    stopping: Arc<AtomicBool>,
    reconnect_most: Duration,
    stop_on_fatal: bool,
}

type Session = Box<dyn crate::model::Replica>;

/// Figures of a session that are in the sums already.
#[derive(Default)]
struct Counted {
    traffic: (u64, u64),
    compressed: (u64, u64),
}

impl Worker {
    fn run(&self) {
        let mut session: Option<Session> = None;
        let mut counted = Counted::default();
        loop {
            match self.shared.queue.take(self.shared.doubts_due()) {
                Ok(None) => break,
                Err(queue::IdleTimeout) => {
                    if session.as_mut().is_some_and(|session| session.ping().is_err()) {
                        self.drop_session(&mut session);
                    }
                }
                Ok(Some(job)) => {
                    if session.is_none() {
                        session = self.connect();
                        counted = Counted::default();
                    }
                    self.work(job, &mut session);
                    self.count(&session, &mut counted);
                }
            }
        }
        if let Some(session) = session {
            self.shared.connected.fetch_sub(1, Ordering::Relaxed);
            session.close();
        }
    }

    fn count(&self, session: &Option<Session>, counted: &mut Counted) {
        if let Some(session) = session {
            let now = session.traffic();
            self.shared.traffic[0].fetch_add(now.0.saturating_sub(counted.traffic.0), Ordering::Relaxed);
            self.shared.traffic[1].fetch_add(now.1.saturating_sub(counted.traffic.1), Ordering::Relaxed);
            counted.traffic = now;
            if let Some((plain, sent)) = session.compression() {
                let mut sum = lock(&self.shared.compressed);
                sum.plain_bytes += plain.saturating_sub(counted.compressed.0);
                sum.sent_bytes += sent.saturating_sub(counted.compressed.1);
                counted.compressed = (plain, sent);
            }
        }
    }

    fn work(&self, mut job: Job, session: &mut Option<Session>) {
        job.slots.extend(self.shared.at_work(&job.lane).map(|slot| (job.lane.clone(), slot)));
        let (outcomes, lost) = match session {
            None => (job.items.drain(..).map(|(item, at)| (item, at, Outcome::Requeue, None)).collect(), None),
            Some(session) => push::Pusher::new(&self.shared, &mut **session).run(&mut job),
        };
        let slots = std::mem::take(&mut job.slots);
        if let Some(error) = lost {
            // What was sent may still be carried out, by a server process that does not know we are gone.
            let now = Instant::now();
            slots.into_iter().for_each(|(lane, slot)| self.shared.doubts.add(lane, Some(slot), now));
            self.trouble(&error, Duration::ZERO);
            self.drop_session(session);
        }
        self.shared.queue.finish(job, outcomes);
    }

    fn drop_session(&self, session: &mut Option<Session>) {
        if session.take().is_some() {
            self.shared.connected.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn trouble(&self, error: &ReplicaError, retry_in: Duration) {
        let (replica, cause) = (self.shared.target.name(), error.to_string());
        let mut told = lock(&self.shared.told);
        if told.as_ref().is_some_and(|(last, at)| *last == cause && at.elapsed() < TELL_AGAIN) {
            return;
        }
        *told = Some((cause.clone(), Instant::now()));
        drop(told);
        (self.shared.events)(&Event::Disconnected { replica: &replica, cause, retry_in });
    }

    /// Opens a session; keeps trying, with growing pauses, until it works or we are told to stop.
    fn connect(&self) -> Option<Session> {
        let mut pause = Duration::from_millis(100);
        loop {
            match pulse::abroad(|| fence::open(&*self.shared.target)) {
                Ok(session) => {
                    *lock(&self.shared.fatal) = None;
                    self.shared.connected.fetch_add(1, Ordering::Relaxed);
                    (self.shared.events)(&Event::Connected { replica: &self.shared.target.name() });
                    return Some(Box::new(watched::Watched(session)));
                }
                Err(error) => {
                    self.trouble(&error, pause);
                    let fatal = error.is_fatal();
                    *lock(&self.shared.fatal) = Some(error.to_string());
                    if self.stop_on_fatal && (fatal || pause > Duration::from_secs(2)) {
                        self.shared.queue.close();
                        return None;
                    }
                    let (failed_at, until) = (Instant::now(), Instant::now() + pause);
                    while Instant::now() < until
                        && lock(&self.shared.reconnect_now).is_none_or(|asked_at| asked_at < failed_at)
                    {
                        if self.stopping.load(Ordering::Relaxed) {
                            return None;
                        }
                        pulse::beat();
                        std::thread::sleep(Duration::from_millis(20).min(pause));
                    }
                    pause = (pause * 2).min(self.reconnect_most);
                }
            }
        }
    }
}
