//! What still has to be compared or sent, in lanes. A lane (one user, or one top-level shared tree) has one owner at a
//! time, so order inside a lane is order of sending. Twenty notices for one mailbox are one item: the queue is bounded
//! by the number of mailboxes, not by traffic.

use crate::model::{MboxName, QuotaRoot, UniqueId, UserId, UserPart, pulse};
use crate::state::Slot;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is kept in order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Lane {
    User(UserId),
    /// Shared mailboxes below one top-level name (with its domain).
    Shared(MboxName),
    /// Server annotations and whatever belongs to nobody.
    Server,
}

impl Lane {
    /// The lane a mailbox name belongs to; a delayed-deleted name belongs to its former owner.
    pub fn of(name: &MboxName, deleted_prefix: &[u8]) -> Self {
        if let Some(user) = name.account(deleted_prefix) {
            return Self::User(user);
        }
        let live = name.without_deleted(deleted_prefix);
        let name = live.as_ref().unwrap_or(name);
        let (domain, _) = name.domain_and_local();
        let mut top = domain.map(|domain| [domain, b"!"].concat()).unwrap_or_default();
        top.extend_from_slice(name.components().next().unwrap_or_default());
        Self::Shared(top.into())
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(user) => write!(f, "user {user}"),
            Self::Shared(top) => write!(f, "shared {top}"),
            Self::Server => f.write_str("server"),
        }
    }
}

/// One thing in a lane that may differ.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Item {
    /// Look at the replica afresh and compare everything of the lane.
    Compare,
    Mailbox(UniqueId),
    Quota(QuotaRoot),
    Meta(UserPart),
    ServerAnnotations,
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compare => f.write_str("compare"),
            Self::Mailbox(id) => write!(f, "mailbox {id}"),
            Self::Quota(root) => write!(f, "quota {root}"),
            Self::Meta(part) => write!(f, "{}", format!("{part:?}").to_lowercase()),
            Self::ServerAnnotations => f.write_str("server annotations"),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    seen_at: Instant,
    live: bool,
}

/// Work handed to one worker: it owns the lane until `finish`.
pub struct Job {
    pub lane: Lane,
    pub items: Vec<(Item, Instant)>,
    pub live: bool,
    extras: Vec<Lane>,
    /// The lanes as they are written down.
    pub slots: Vec<(Lane, Slot)>,
}

/// What became of an item.
#[derive(Debug)]
pub enum Outcome {
    Done,
    /// Not reached, or the connection went: at once, with its old age.
    Requeue,
    /// Needs this other lane as well; it was busy. Again when it is not.
    Needs(Lane),
    /// Failed; again after a growing pause. `quarantine`: nothing temporary, an admin should know.
    Failed {
        reason: String,
        quarantine: bool,
    },
}

/// An item that failed and waits for its next try.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    pub lane: String,
    pub item: String,
    pub mailbox: Option<String>,
    pub reason: String,
    pub tries: u32,
    /// Not a passing trouble: it was refused or is damaged.
    pub quarantined: bool,
    /// From now.
    pub next_try_seconds: Option<f64>,
}

/// What an admin keeps from being sent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Hold {
    Everything,
    Lane(Lane),
    Item(Lane, Item),
}

struct Waiting {
    failure: Failure,
    seen_at: Instant,
    not_before: Instant,
}

#[derive(Default)]
struct Inner {
    pending: HashMap<Lane, BTreeMap<Item, Pending>>,
    live: VecDeque<Lane>,
    bulk: VecDeque<Lane>,
    /// Lanes in one of the two ready lists.
    ready: HashSet<Lane>,
    busy: HashSet<Lane>,
    /// Lanes that the next job of a lane must have as well.
    needs: HashMap<Lane, HashSet<Lane>>,
    running: HashMap<Lane, Vec<(Item, Instant)>>,
    running_bulk: usize,
    /// Failed items with their backoff, and whether they are waiting (not pending again).
    failed: HashMap<(Lane, Item), Waiting>,
    /// What an admin keeps from being sent; `true`: given up, not only paused.
    holds: HashMap<Hold, bool>,
    closed: bool,
    hold: bool,
}

/// Pauses between tries of a failed item.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    pub first: Duration,
    pub most: Duration,
}

impl Backoff {
    /// Doubling from the first pause to the longest.
    pub fn pause(self, tries: u32) -> Duration {
        self.first.saturating_mul(1 << tries.saturating_sub(1).min(16)).min(self.most)
    }
}

/// Who waits for work sleeps no longer in one go, and so shows that he is there.
const BREATH: Duration = Duration::from_secs(1);

/// So many failures are named one by one; all are counted.
const FAILURES_SHOWN: usize = 1000;

impl Hold {
    fn covers(&self, lane: &Lane, item: &Item) -> bool {
        match self {
            Self::Everything => true,
            Self::Lane(held) => held == lane,
            Self::Item(held, what) => held == lane && what == item,
        }
    }

    fn includes(&self, other: &Self) -> bool {
        match other {
            Self::Everything => *self == Self::Everything,
            Self::Lane(lane) => *self == Self::Everything || matches!(self, Self::Lane(mine) if mine == lane),
            Self::Item(lane, item) => self.covers(lane, item),
        }
    }
}

/// The queue of one replica.
pub struct Queue {
    inner: Mutex<Inner>,
    wake: Condvar,
    workers: usize,
    backoff: Backoff,
}

/// A short look at the queue.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QueueStats {
    /// Items waiting or running; failed ones that wait for their next try are not among them.
    pub pending: usize,
    pub running: usize,
    /// Age of the oldest of those, failed ones included: never lower than the truth.
    pub oldest_seconds: f64,
    /// Items that wait for their next try, failed or not yet allowed to run.
    pub waiting: usize,
    pub failed_total: usize,
    /// Of the failed ones, those that no passing trouble explains.
    pub quarantined: usize,
    /// Items an admin has paused; they count for the age.
    pub held_back: usize,
    /// Items an admin has given up; they do not.
    pub skipped: usize,
    /// The first of them, quarantined ones in front.
    pub failed: Vec<Failure>,
}

impl Queue {
    pub fn new(workers: usize, backoff: Backoff) -> Self {
        Self { inner: Mutex::default(), wake: Condvar::new(), workers, backoff }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an item. `live`: a change somebody waits for; otherwise bulk work that must not delay it.
    pub fn push(&self, lane: Lane, item: Item, seen_at: Instant, live: bool) {
        let mut inner = self.lock();
        // A new hint for a failed item is a reason to try again at once, but not to forget the count.
        if live
            && let Some(waiting) = inner.failed.get_mut(&(lane.clone(), item.clone()))
            && !waiting.failure.quarantined
        {
            waiting.not_before = seen_at;
        }
        inner.add(lane, item, Pending { seen_at, live });
        drop(inner);
        self.wake.notify_one();
    }

    /// While held, nothing is handed out: used while a batch of related items is being pushed.
    pub fn hold(&self, hold: bool) {
        self.lock().hold = hold;
        self.wake.notify_all();
    }

    /// The next job; blocks. `None` once closed. Returns `Err(())` after `idle` without work.
    pub fn take(&self, idle: Duration) -> Result<Option<Job>, IdleTimeout> {
        let started = Instant::now();
        let mut inner = self.lock();
        loop {
            if inner.closed {
                return Ok(None);
            }
            let now = Instant::now();
            inner.revive(now);
            if !inner.hold
                && let Some(job) = inner.next_job(self.workers)
            {
                return Ok(Some(job));
            }
            let idle_left = idle.saturating_sub(now.duration_since(started));
            if idle_left.is_zero() {
                return Err(IdleTimeout);
            }
            let wait = inner
                .failed
                .values()
                .map(|waiting| waiting.not_before)
                .filter(|at| *at > now)
                .min()
                .map_or(idle_left, |at| at.duration_since(now).min(idle_left))
                .min(BREATH);
            pulse::beat();
            let (guard, _) = self.wake.wait_timeout(inner, wait).unwrap_or_else(PoisonError::into_inner);
            inner = guard;
        }
    }

    /// Takes one more lane for a running job, if nobody has it.
    pub fn try_extra(&self, job: &mut Job, lane: &Lane) -> bool {
        if job.lane == *lane || job.extras.contains(lane) {
            return true;
        }
        let mut inner = self.lock();
        if !inner.busy.insert(lane.clone()) {
            return false;
        }
        job.extras.push(lane.clone());
        true
    }

    /// Gives the lanes back and says what became of each item.
    pub fn finish(&self, job: Job, outcomes: Vec<(Item, Instant, Outcome, Option<MboxName>)>) {
        let mut inner = self.lock();
        inner.running.remove(&job.lane);
        if !job.live {
            inner.running_bulk = inner.running_bulk.saturating_sub(1);
        }
        inner.busy.remove(&job.lane);
        for lane in &job.extras {
            inner.busy.remove(lane);
            inner.requeue_lane(lane.clone());
        }
        let now = Instant::now();
        for (item, seen_at, outcome, mailbox) in outcomes {
            let key = (job.lane.clone(), item.clone());
            match outcome {
                Outcome::Done => {
                    inner.failed.remove(&key);
                }
                Outcome::Requeue => {
                    if let Some(waiting) = inner.failed.get_mut(&key) {
                        waiting.not_before = now;
                    }
                    inner.add(job.lane.clone(), item, Pending { seen_at, live: job.live });
                }
                Outcome::Needs(lane) => {
                    // Both at once, when both are free: two lanes that each tried for the other would do so for ever.
                    inner.needs.entry(job.lane.clone()).or_default().insert(lane);
                    inner.add(job.lane.clone(), item, Pending { seen_at, live: true });
                }
                Outcome::Failed { reason, quarantine } => {
                    let tries = inner.failed.get(&key).map_or(0, |waiting| waiting.failure.tries) + 1;
                    let not_before = now + self.backoff.pause(tries);
                    let failure = Failure {
                        lane: job.lane.to_string(),
                        item: item.to_string(),
                        mailbox: mailbox.map(|name| name.to_string()),
                        reason,
                        tries,
                        quarantined: quarantine,
                        next_try_seconds: None,
                    };
                    inner.failed.insert(key, Waiting { failure, seen_at, not_before });
                }
            }
        }
        inner.requeue_lane(job.lane);
        drop(inner);
        self.wake.notify_all();
    }

    /// Waits until idle and nothing waits that has not failed at least `tries` times; false on timeout.
    pub fn wait_settled(&self, tries: u32, timeout: Option<Duration>) -> bool {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut inner = self.lock();
        loop {
            let settled =
                inner.pending.iter().all(|(lane, items)| items.keys().all(|item| inner.held(lane, item).is_some()))
                    && inner.running.is_empty()
                    && inner
                        .failed
                        .values()
                        .all(|w| w.failure.tries >= tries || w.failure.quarantined && w.failure.tries > 0);
            if settled || inner.closed {
                return settled;
            }
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                return false;
            }
            let wait =
                deadline.map_or(Duration::from_millis(50), |deadline| deadline - now).min(Duration::from_millis(50));
            let (guard, _) = self.wake.wait_timeout(inner, wait).unwrap_or_else(PoisonError::into_inner);
            inner = guard;
        }
    }

    /// What of the lane has failed, waits or runs, if anything does.
    pub fn open_work(&self, lane: &Lane) -> Option<String> {
        let inner = self.lock();
        let failed = inner.failed.iter().find(|((failed, _), _)| failed == lane);
        let busy = inner.pending.contains_key(lane) || inner.busy.contains(lane);
        failed.map(|(_, waiting)| waiting.failure.reason.clone()).or_else(|| busy.then(|| "it is being filled".into()))
    }

    /// This item failed for this very reason before, and nothing else happened to it since.
    pub fn is_known(&self, lane: &Lane, item: &Item, reason: &str) -> bool {
        let inner = self.lock();
        inner.failed.get(&(lane.clone(), item.clone())).is_some_and(|waiting| waiting.failure.reason == reason)
    }

    /// Keeps something from being sent, until it is let go; `skip`: it does not even count as open.
    pub fn hold_back(&self, hold: Hold, skip: bool) {
        self.lock().holds.insert(hold, skip);
    }

    /// Ends a hold. What was held goes on.
    pub fn let_go(&self, hold: &Hold) {
        let mut inner = self.lock();
        inner.holds.remove(hold);
        inner.offer_all();
        drop(inner);
        self.wake.notify_all();
    }

    pub fn let_go_all(&self) {
        let mut inner = self.lock();
        inner.holds.clear();
        inner.offer_all();
        drop(inner);
        self.wake.notify_all();
    }

    /// Ends skips inside of `hold`; pauses stay.
    pub fn let_go_skipped(&self, hold: &Hold) {
        let mut inner = self.lock();
        inner.holds.retain(|old, skip| !*skip || !hold.includes(old));
        inner.offer_all();
        drop(inner);
        self.wake.notify_all();
    }

    /// Failed items of this scope are tried again now; says how many.
    pub fn retry(&self, scope: &Hold) -> usize {
        self.again(&|lane, item, _| scope.covers(lane, item))
    }

    /// The same for items whose failure is like this.
    pub fn retry_where(&self, like: &dyn Fn(&Failure) -> bool) -> usize {
        self.again(&|_, _, failure| like(failure))
    }

    fn again(&self, which: &dyn Fn(&Lane, &Item, &Failure) -> bool) -> usize {
        let mut inner = self.lock();
        let now = Instant::now();
        let mut count = 0;
        for ((lane, item), waiting) in &mut inner.failed {
            if which(lane, item, &waiting.failure) {
                waiting.not_before = now;
                count += 1;
            }
        }
        drop(inner);
        self.wake.notify_all();
        count
    }

    pub fn stats(&self) -> QueueStats {
        let inner = self.lock();
        let now = Instant::now();
        let mut stats = QueueStats::default();
        let mut oldest: Option<Instant> = None;
        let mut count = |lane: &Lane, item: &Item, seen_at: Instant| {
            let held = inner.held(lane, item);
            if held != Some(true) {
                oldest = Some(oldest.map_or(seen_at, |old| old.min(seen_at)));
            }
            held
        };
        for (lane, items) in &inner.pending {
            for (item, pending) in items {
                match count(lane, item, pending.seen_at) {
                    None => stats.pending += 1,
                    Some(false) => stats.held_back += 1,
                    Some(true) => stats.skipped += 1,
                }
            }
        }
        for (lane, items) in &inner.running {
            for (item, seen_at) in items {
                count(lane, item, *seen_at);
                stats.running += 1;
            }
        }
        let mut failed = Vec::new();
        for ((lane, item), waiting) in &inner.failed {
            let held = count(lane, item, waiting.seen_at);
            // One that is pending again was counted above.
            let pending = inner.pending.get(lane).is_some_and(|items| items.contains_key(item));
            match held {
                Some(true) if !pending => stats.skipped += 1,
                Some(false) if !pending => stats.held_back += 1,
                _ => {}
            }
            if held != Some(true) {
                stats.waiting += 1;
                if waiting.failure.tries > 0 {
                    failed.push(waiting);
                }
            }
        }
        stats.failed_total = failed.len();
        stats.quarantined = failed.iter().filter(|waiting| waiting.failure.quarantined).count();
        failed.sort_by_key(|waiting| (!waiting.failure.quarantined, waiting.seen_at));
        stats.failed.extend(failed.into_iter().take(FAILURES_SHOWN).map(|waiting| Failure {
            next_try_seconds: Some(waiting.not_before.saturating_duration_since(now).as_secs_f64()),
            ..waiting.failure.clone()
        }));
        stats.oldest_seconds = oldest.map_or(0.0, |at| now.duration_since(at).as_secs_f64());
        stats
    }

    /// No more jobs are handed out; running ones may finish.
    pub fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_all();
    }
}

/// `take` waited its whole time for nothing; a good moment to keep a session alive.
#[derive(Debug)]
pub struct IdleTimeout;

impl Inner {
    /// Held back (`Some(false)`), given up (`Some(true)`), or free to go.
    fn held(&self, lane: &Lane, item: &Item) -> Option<bool> {
        if self.holds.is_empty() {
            return None;
        }
        // The narrowest one decides.
        let item = Hold::Item(lane.clone(), item.clone());
        let of = |hold: &Hold| self.holds.get(hold).copied();
        of(&item).or_else(|| of(&Hold::Lane(lane.clone()))).or_else(|| of(&Hold::Everything))
    }

    fn lane_held(&self, lane: &Lane) -> bool {
        !self.holds.is_empty()
            && (self.holds.contains_key(&Hold::Everything) || self.holds.contains_key(&Hold::Lane(lane.clone())))
    }

    fn offer_all(&mut self) {
        let lanes: Vec<Lane> = self.pending.keys().cloned().collect();
        lanes.into_iter().for_each(|lane| self.requeue_lane(lane));
    }

    fn add(&mut self, lane: Lane, item: Item, new: Pending) {
        let items = self.pending.entry(lane.clone()).or_default();
        items
            .entry(item)
            .and_modify(|old| {
                old.seen_at = old.seen_at.min(new.seen_at);
                old.live |= new.live;
            })
            .or_insert(new);
        if new.live && self.ready.contains(&lane) && self.bulk.contains(&lane) {
            self.bulk.retain(|other| *other != lane);
            self.ready.remove(&lane);
        }
        self.requeue_lane(lane);
    }

    fn requeue_lane(&mut self, lane: Lane) {
        let Some(items) = self.pending.get(&lane) else { return };
        if items.is_empty() {
            self.pending.remove(&lane);
            return;
        }
        let live = items.values().any(|pending| pending.live);
        if self.ready.insert(lane.clone()) {
            if live { self.live.push_back(lane) } else { self.bulk.push_back(lane) }
        }
    }

    /// Failed items whose pause is over become pending again.
    fn revive(&mut self, now: Instant) {
        let due: Vec<_> = self
            .failed
            .iter()
            .filter(|((lane, item), w)| w.not_before <= now && self.held(lane, item).is_none())
            .map(|(key, w)| (key.clone(), w.seen_at))
            .collect();
        for ((lane, item), seen_at) in due {
            if self.running.get(&lane).is_some_and(|items| items.iter().any(|(running, _)| *running == item)) {
                continue;
            }
            if let Some(waiting) = self.failed.get_mut(&(lane.clone(), item.clone())) {
                // Parked far away until `finish` says how this try went.
                waiting.not_before = now + Duration::from_secs(3600);
            }
            self.add(lane, item, Pending { seen_at, live: true });
        }
    }

    fn next_job(&mut self, workers: usize) -> Option<Job> {
        // One worker is always kept free of bulk work, so that small changes overtake it.
        let bulk_allowed = workers == 1 || self.running_bulk + 1 < workers;
        loop {
            let idle = |lane: &Lane| !self.busy.contains(lane);
            let needs = |lane: &Lane| self.needs.get(lane).into_iter().flatten();
            let free = |lane: &Lane| idle(lane) && needs(lane).all(idle) && !self.lane_held(lane);
            let live = self.live.iter().position(free);
            let bulk = self.bulk.iter().position(free).filter(|_| bulk_allowed);
            let (lane, live) = match (live, bulk) {
                (Some(at), _) => (self.live.remove(at)?, true),
                (None, Some(at)) => (self.bulk.remove(at)?, false),
                (None, None) => return None,
            };
            if let Some(job) = self.job(lane, live) {
                return Some(job);
            }
        }
    }

    /// What can be done now in a lane that is free; `None` when everything of it has to wait.
    fn job(&mut self, lane: Lane, live: bool) -> Option<Job> {
        self.ready.remove(&lane);
        let now = Instant::now();
        let (mut taken, mut kept) = (Vec::new(), BTreeMap::new());
        for (item, pending) in self.pending.remove(&lane)? {
            if self.held(&lane, &item).is_some() {
                kept.insert(item, pending);
                continue;
            }
            // An item in its pause keeps waiting, whatever else its lane does.
            match self.failed.get_mut(&(lane.clone(), item.clone())) {
                Some(waiting) if waiting.failure.tries > 0 && waiting.not_before > now && !pending.live => {
                    waiting.seen_at = waiting.seen_at.min(pending.seen_at);
                }
                _ => taken.push((item, pending.seen_at)),
            }
        }
        if !kept.is_empty() {
            self.pending.insert(lane.clone(), kept);
        }
        if taken.is_empty() {
            return None;
        }
        let extras: Vec<Lane> = self.needs.remove(&lane).into_iter().flatten().collect();
        self.busy.extend(extras.iter().cloned());
        self.busy.insert(lane.clone());
        self.running.insert(lane.clone(), taken.clone());
        if !live {
            self.running_bulk += 1;
        }
        Some(Job { lane, items: taken, live, extras, slots: Vec::new() })
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
