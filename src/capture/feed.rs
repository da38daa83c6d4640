//! The two ends every source of change holds: `Feed` takes what it saw and hands notices on, `Control` brings it
//! the orders of whoever started it.

use super::cookies::Cookies;
use super::{Coalescer, Roots, Settings};
use crate::model::{DirtyKey, Notice, Scope, pulse};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::ffi::OsStr;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What happened to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TouchKind {
    Create,
    Modify,
    Delete,
    MovedFrom,
    MovedTo,
    /// Not told by the kernel: found when a directory was listed that had no watch before.
    Found,
    /// Not told by the kernel: below a directory that was moved away.
    Gone,
    /// Not told by the kernel: a record of sync_log.
    Logged,
    /// Whoever had a mailbox open has let it go.
    Released,
}

impl fmt::Display for TouchKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "create",
            Self::Modify => "modify",
            Self::Delete => "delete",
            Self::MovedFrom => "moved-from",
            Self::MovedTo => "moved-to",
            Self::Found => "found",
            Self::Gone => "gone",
            Self::Logged => "logged",
            Self::Released => "released",
        })
    }
}

/// One raw event, before coalescing; for people who watch the watcher.
#[derive(Clone, Copy, Debug)]
pub struct TapEvent<'a> {
    pub path: &'a Path,
    pub is_dir: bool,
    pub kind: TouchKind,
    /// `None`: noise.
    pub key: Option<&'a DirtyKey>,
    pub seen_at: Instant,
}

/// Called for every raw event on the capturing thread: it has to be quick.
pub type Tap = Arc<dyn Fn(&TapEvent<'_>) + Send + Sync>;

/// Counters of one running source.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub watches: AtomicU64,
    pub unwatched: AtomicU64,
    pub events: AtomicU64,
    pub notices: AtomicU64,
    pub overflows: AtomicU64,
    proven: Mutex<Option<Instant>>,
}

impl Counters {
    /// Everything that changed before this moment has been handed on.
    pub fn proven(&self) -> Option<Instant> {
        *lock(&self.proven)
    }
}

/// Takes notices; shared by all sources that run.
pub(super) type Out = Arc<Mutex<Box<dyn FnMut(Vec<Notice>) + Send>>>;

/// Where a source puts what it saw.
pub struct Feed {
    roots: Roots,
    coalescer: Coalescer,
    tap: Option<Tap>,
    out: Out,
    most: Duration,
    handed_on_at: Instant,
    /// Nobody saw what happened between this moment and `armed`.
    gap_since: Option<Instant>,
    /// All that changed before this moment has been told to this feed; from the second on all of it is handed on.
    looked_until: Option<(Instant, Instant)>,
    pub(super) cookies: Option<Arc<Cookies>>,
    pub(super) counters: Arc<Counters>,
}

impl Feed {
    pub(super) fn new(roots: Roots, settings: &Settings, out: Out, gap_since: Option<Instant>) -> Self {
        let coalescer = Coalescer::new(settings.quiet, settings.most);
        Self {
            roots,
            coalescer,
            tap: settings.tap.clone(),
            out,
            most: settings.most,
            handed_on_at: Instant::now(),
            gap_since,
            looked_until: None,
            cookies: None,
            counters: Arc::default(),
        }
    }

    /// Everything is watched: from here on no change goes unnoticed. What happened before, while nobody watched, is
    /// to be compared.
    pub fn armed(&mut self, control: &Control) {
        if let Some(since) = self.gap_since.take() {
            self.lost(Scope::Everything, since);
            self.flush();
        }
        control.armed();
    }

    /// All that changed before this moment has been told to this feed.
    pub fn looked_until(&mut self, moment: Instant) {
        if self.looked_until.is_none() {
            self.looked_until = Some((moment, Instant::now() + self.most));
        }
        self.prove(false);
    }

    /// The kernel told of a file in the directory of cookies: whatever it told before has been looked at.
    pub(super) fn cookie(&mut self, name: &OsStr) {
        if let Some(moment) = self.cookies.as_ref().and_then(|cookies| cookies.moment(name)) {
            self.looked_until(moment);
        }
    }

    /// What was looked at is proven once nothing of it is held back: nothing at all is, or what is came later.
    fn prove(&mut self, given: bool) {
        if let Some((moment, due)) = self.looked_until
            && (self.coalescer.is_empty() || (given && self.handed_on_at >= due))
        {
            self.looked_until = None;
            let mut proven = lock(&self.counters.proven);
            *proven = (*proven).max(Some(moment));
        }
    }

    /// A path was touched; gives true when it belongs to some key.
    pub fn touched(&mut self, kind: TouchKind, path: &Path, is_dir: bool, seen_at: Instant) -> bool {
        pulse::beat();
        let key = self.roots.derive(path, is_dir);
        if let Some(tap) = &self.tap {
            tap(&TapEvent { path, is_dir, kind, key: key.as_ref(), seen_at });
        }
        let Some(key) = key else { return false };
        self.coalescer.notice(Notice { key, seen_at });
        true
    }

    /// A file that is no part of the store names what may differ.
    pub(super) fn names(&mut self, kind: TouchKind, path: &Path, key: DirtyKey, seen_at: Instant) {
        if let Some(tap) = &self.tap {
            tap(&TapEvent { path, is_dir: false, kind, key: Some(&key), seen_at });
        }
        self.coalescer.notice(Notice { key, seen_at });
    }

    /// Events of this scope are, or may be, lost.
    pub fn lost(&mut self, scope: Scope, seen_at: Instant) {
        self.coalescer.notice(Notice { key: DirtyKey::Rescan(scope), seen_at });
    }

    /// Hands on what has been quiet long enough.
    pub fn hand_on(&mut self, now: Instant) {
        self.handed_on_at = now;
        let due = self.coalescer.due(now);
        self.give(due);
    }

    /// The same, not more often than a key may be held at most: for long loops.
    pub fn hand_on_in_burst(&mut self) {
        pulse::beat();
        let now = Instant::now();
        if now.duration_since(self.handed_on_at) >= self.most {
            self.hand_on(now);
        }
    }

    /// Hands on everything that is held back.
    pub fn flush(&mut self) {
        let all = self.coalescer.flush();
        self.give(all);
    }

    /// Ends a round of a source: answers who waits for everything, or hands on what is due; true when the source is to
    /// return.
    pub fn round_done(&mut self, orders: Orders, now: Instant) -> bool {
        if !orders.wants_all() {
            self.hand_on(now);
            return false;
        }
        self.flush();
        let stop = orders.stop;
        orders.done();
        stop
    }

    fn give(&mut self, notices: Vec<Notice>) {
        if !notices.is_empty() {
            self.counters.notices.fetch_add(notices.len() as u64, Relaxed);
            (lock(&self.out))(notices);
        }
        self.prove(true);
    }

    /// When `hand_on` has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.coalescer.next_deadline()
    }
}

/// Orders to a source. A source waits for `Control` to become readable beside its own descriptor.
pub struct Control {
    wake: EventFd,
    orders: Mutex<Orders>,
    stopping: AtomicBool,
    armed: Mutex<Phase>,
    arming: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Arming,
    Serving,
    Ended,
}

/// What a source has to do now.
#[derive(Default)]
pub struct Orders {
    /// Hand on everything seen so far, then return.
    pub stop: bool,
    markers: Vec<SyncSender<()>>,
}

impl Orders {
    /// True when somebody waits for everything the kernel has reported so far.
    pub fn wants_all(&self) -> bool {
        self.stop || !self.markers.is_empty()
    }

    /// Everything reported before these orders were taken has been handed on.
    pub fn done(self) {
        for marker in self.markers {
            // Whoever waited may have given up at its deadline.
            let _ = marker.try_send(());
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            orders: Mutex::default(),
            stopping: AtomicBool::new(false),
            armed: Mutex::default(),
            arming: Condvar::new(),
        })
    }

    /// The orders given since the last call. Take them *before* reading events: what was reported before an order
    /// was given is then read before the order is answered.
    pub fn take(&self) -> Orders {
        // Nothing to read is the usual case here: the caller woke for another reason.
        let _ = self.wake.read();
        let mut orders = std::mem::take(&mut *lock(&self.orders));
        orders.stop |= self.stopping.load(Relaxed);
        orders
    }

    pub(super) fn armed(&self) {
        *lock(&self.armed) = Phase::Serving;
        self.arming.notify_all();
    }

    /// The source has ended; nothing is to be waited for any more.
    pub(super) fn ended(&self) {
        *lock(&self.armed) = Phase::Ended;
        self.arming.notify_all();
        // Nobody will answer these.
        lock(&self.orders).markers.clear();
    }

    /// Everything is watched.
    pub(super) fn is_serving(&self) -> bool {
        *lock(&self.armed) == Phase::Serving
    }

    /// Waits until everything is watched, or the source has ended.
    pub(super) fn wait_armed(&self) {
        let mut phase = lock(&self.armed);
        while *phase == Phase::Arming {
            phase = self.arming.wait(phase).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Relaxed);
        self.wake();
    }

    /// True once `stop` was ordered; long work looks at it between two pieces.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Relaxed)
    }

    pub(super) fn marker(&self) -> Receiver<()> {
        let (marker, done) = sync_channel(1);
        {
            let mut orders = lock(&self.orders);
            if *lock(&self.armed) != Phase::Ended {
                orders.markers.push(marker);
            }
        }
        self.wake();
        done
    }

    fn wake(&self) {
        // A full counter is readable as well, which is all that is wanted.
        let _ = self.wake.write(1);
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
