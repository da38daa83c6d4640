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
mod figures;
mod fill_in;
mod fuse;
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
mod worker;

pub use control::{ControlError, StandingOrder, Subject, Word};
pub use figures::{Compressed, Meddled, ReplicaStats};
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

use crate::model::{Listing, MailStore, MboxName, Notice, Pulse, ReplicaTarget, Step, StoreError, UniqueId};
use crate::state::{ReplicaState, Slot};
use fuse::GoodList;
use names::ReplicaNames;
use push::JobError;
use queue::Queue;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use worker::Worker;

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

/// A session that idles this long is asked whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(240);
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
