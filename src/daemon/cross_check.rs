//! Cyrus's rolling log watched beside capture (`cross_check = true`): what it names and capture did not show is counted, and
//! looked at.

use crate::capture::{CrossCheck, CrossStats, LogTail, synclog};
use crate::model::{DirtyKey, Listing, MailStore, MailboxRef, Notice, UserRef};
use crate::spool::LiveSpool;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};
use tracing::{info, warn};

/// Between two looks when nothing happens to the log.
const LOOK: Duration = Duration::from_millis(250);
/// Batches of notices that wait to be looked at.
const BATCHES: usize = 4096;

/// A cross-check at work; ends when dropped.
pub(super) struct CrossChecker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Batches did not fit: everything counts as shown.
    overrun: AtomicBool,
    proven: Mutex<Option<Instant>>,
    stats: Mutex<CrossStats>,
}

/// What capture gives out passes here on its way to the engine.
pub(super) type Out = Box<dyn FnMut(Vec<Notice>) + Send>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CrossChecker {
    /// Follows `log`. All that capture shows is to be given to what is returned, which hands it to `out`; what capture
    /// missed goes to `missed`.
    pub fn start(
        store: Arc<LiveSpool>,
        log: &Path,
        out: impl Fn(Vec<Notice>) + Send + 'static,
        missed: impl Fn(Vec<Notice>) + Send + 'static,
    ) -> (Self, Out) {
        let (told, batches) = sync_channel(BATCHES);
        let shared = Arc::<Shared>::default();
        let worker = Worker { store, tail: LogTail::new(log), names: Names::default(), check: CrossCheck::default() };
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("cross-check".to_owned())
            .spawn(move || worker.run(&theirs, &batches, &missed));
        info!(log = %log.display(), "the log is watched beside capture");
        let thread = thread.inspect_err(|error| warn!(%error, "no cross-check")).ok();
        (Self { shared: shared.clone(), thread }, passing(shared, told, out))
    }

    /// All that changed before this moment was shown by capture.
    pub fn prove(&self, moment: Option<Instant>) {
        *lock(&self.shared.proven) = moment;
    }

    pub fn stats(&self) -> CrossStats {
        *lock(&self.shared.stats)
    }
}

impl Drop for CrossChecker {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the cross-check ended in a panic");
        }
    }
}

/// Called on the capturing threads: no more than a copy is made there.
fn passing(shared: Arc<Shared>, told: SyncSender<Vec<DirtyKey>>, out: impl Fn(Vec<Notice>) + Send + 'static) -> Out {
    Box::new(move |notices| {
        let keys = notices.iter().map(|notice| notice.key.clone()).collect();
        if told.try_send(keys).is_err() {
            shared.overrun.store(true, Relaxed);
        }
        out(notices);
    })
}

struct Worker {
    store: Arc<LiveSpool>,
    tail: LogTail,
    names: Names,
    check: CrossCheck,
}

impl Worker {
    fn run(mut self, shared: &Shared, batches: &Receiver<Vec<DirtyKey>>, missed: &dyn Fn(Vec<Notice>)) {
        while !shared.stop.load(Relaxed) {
            self.tail.wait(LOOK);
            let now = SystemTime::now();
            let mut logged = Vec::new();
            if let Err(error) = self.tail.read(&mut |line| logged.extend(synclog::keys_of(line))) {
                warn!(%error, "the log cannot be read");
            }
            // Later than the records: what was shown before they were read is known by now.
            while let Ok(keys) = batches.try_recv() {
                for key in keys {
                    if let Some(key) = self.names.named(&self.store, key) {
                        self.check.shown(key, now);
                    }
                }
            }
            if shared.overrun.swap(false, Relaxed) {
                self.check.shown(DirtyKey::Rescan(crate::model::Scope::Everything), now);
            }
            logged.into_iter().for_each(|key| self.check.logged(key, now));
            let proven = lock(&shared.proven).and_then(|moment| now.checked_sub(moment.elapsed()));
            let keys = self.check.decide(now, proven, &|key| self.store.changed_at(key));
            *lock(&shared.stats) = self.check.stats();
            if !keys.is_empty() {
                for key in &keys {
                    warn!(%key, "was logged by Cyrus and not noticed, looking at it now");
                }
                let seen_at = Instant::now();
                missed(keys.into_iter().map(|key| Notice { key, seen_at }).collect());
            }
        }
    }
}

/// Capture may name a mailbox by its uniqueid, where the log has its name.
#[derive(Default)]
struct Names {
    now: Arc<Listing>,
    /// What is removed is shown after it is gone from the list.
    before: Arc<Listing>,
}

impl Names {
    fn named(&mut self, store: &LiveSpool, key: DirtyKey) -> Option<DirtyKey> {
        let id = match &key {
            DirtyKey::Mailbox(MailboxRef::Id(id)) | DirtyKey::Accessed(MailboxRef::Id(id)) => id.clone(),
            DirtyKey::User(UserRef::Inbox(id), _) => id.clone(),
            _ => return Some(key),
        };
        if let Ok(listing) = store.listing()
            && !Arc::ptr_eq(&listing, &self.now)
        {
            self.before = std::mem::replace(&mut self.now, listing);
        }
        let name = self.now.by_id(&id).or_else(|| self.before.by_id(&id))?.name.clone();
        Some(match key {
            DirtyKey::Mailbox(_) => DirtyKey::Mailbox(MailboxRef::Name(name)),
            DirtyKey::Accessed(_) => DirtyKey::Accessed(MailboxRef::Name(name)),
            DirtyKey::User(_, part) => DirtyKey::User(UserRef::Name(name.owner()?), part),
            other => other,
        })
    }
}
