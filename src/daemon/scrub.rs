//! The continuous scrub: pass after pass over all message files, on a thread of its own, gone on with after a restart.

use super::report::unix_now;
use crate::engine::{Bustle, Damage, Pace, Pass};
use crate::model::{MailStore, StoreError};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How it is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubSettings {
    /// Bytes of message files in a second; 0: not at all.
    pub rate: u64,
    /// From the beginning of one pass to that of the next.
    pub every: Duration,
    /// It waits while a disk is waited for in so many percent of the time; 0: it never does.
    pub busy_percent: u32,
}

/// What is kept over restarts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Leaf {
    /// Of which store; another one is begun from its start.
    store: String,
    pub pass: Option<Pass>,
    last: Option<Pass>,
}

impl Leaf {
    /// What an earlier run has written down about this store; one that cannot be read costs a pass.
    pub fn open(path: &Path, store: &str) -> Self {
        let text = std::fs::read(path).unwrap_or_default();
        let read = (!text.is_empty()).then(|| serde_json::from_slice::<Self>(&text)).transpose();
        let read = read.unwrap_or_else(|error| {
            warn!(%error, path = %path.display(), "what was scrubbed cannot be read, it begins anew");
            None
        });
        read.filter(|leaf| leaf.store == store).unwrap_or_else(|| Self { store: store.to_owned(), ..Self::default() })
    }

    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        super::serve::write_whole(path, &serde_json::to_vec(self)?)
    }
}

/// What `status` shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    pub rate_bytes_per_second: u64,
    /// The pass under way.
    pub pass: Option<Pass>,
    /// The last one that came to its end.
    pub last: Option<Pass>,
    /// Mailboxes there are.
    pub mailboxes: usize,
    /// Why it does not go on.
    pub trouble: Option<String>,
}

impl ScrubStatus {
    /// What is damaged as far as is known: what this pass found, and what the last one found where this one has not been yet.
    pub fn damaged(&self) -> Vec<&Damage> {
        let place = self.pass.as_ref().and_then(Pass::place);
        let here = self.pass.iter().flat_map(|pass| &pass.damaged);
        let ahead = self.last.iter().flat_map(|last| &last.damaged);
        here.chain(ahead.filter(|damage| place.is_none_or(|place| damage.mailbox > *place))).collect()
    }
}

/// One scrub, shared by its thread and whoever asks how far it is.
pub struct Scrub {
    settings: ScrubSettings,
    store: Arc<dyn MailStore>,
    path: PathBuf,
    book: Mutex<Leaf>,
    /// There were so many when the pass began.
    mailboxes: AtomicUsize,
    trouble: Mutex<Option<String>>,
}

/// Those who ask are told of what was done until so long ago.
const NOTE_EVERY: Duration = Duration::from_millis(500);
/// The book is written so often while a pass is under way.
const SAVE_EVERY: Duration = Duration::from_secs(10);
/// Between two looks whether there is something to do.
const LOOK: Duration = Duration::from_secs(1);
/// After the store could not be read.
const TRY_AGAIN: Duration = Duration::from_secs(30);

impl Scrub {
    /// `None` where nobody wants one.
    pub fn open(
        settings: ScrubSettings,
        store: Arc<dyn MailStore>,
        state: &Path,
    ) -> Result<Option<Arc<Self>>, StoreError> {
        if settings.rate == 0 {
            return Ok(None);
        }
        let path = state.join("scrub.json");
        let book = Leaf::open(&path, &store.identity()?);
        Ok(Some(Arc::new(Self {
            settings,
            store,
            path,
            book: Mutex::new(book),
            mailboxes: AtomicUsize::new(0),
            trouble: Mutex::default(),
        })))
    }

    fn book(&self) -> MutexGuard<'_, Leaf> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn status(&self) -> ScrubStatus {
        let book = self.book();
        ScrubStatus {
            rate_bytes_per_second: self.settings.rate,
            pass: book.pass.clone(),
            last: book.last.clone(),
            mailboxes: self.mailboxes.load(Ordering::Relaxed),
            trouble: self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    fn save(&self) {
        let book = self.book().clone();
        if let Err(error) = book.save(&self.path) {
            warn!(%error, path = %self.path.display(), "how far the scrub is cannot be written");
        }
    }

    /// Works until told to stop.
    pub fn work(&self, stop: &AtomicBool) {
        let mut wait_until = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(LOOK);
            if Instant::now() < wait_until || !self.is_due() {
                continue;
            }
            let result = self.pass(stop);
            let trouble = result.err().map(|error| error.to_string());
            if let Some(trouble) = &trouble {
                warn!(trouble, "the scrub waits");
                wait_until = Instant::now() + TRY_AGAIN;
            }
            *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
            self.save();
        }
    }

    fn is_due(&self) -> bool {
        let book = self.book();
        let since = book.last.as_ref().map_or(0, |last| last.begun_at);
        book.pass.is_some() || unix_now() >= since.saturating_add(self.settings.every.as_secs())
    }

    /// Begins a pass, or goes on with the one that was left.
    fn pass(&self, stop: &AtomicBool) -> Result<(), StoreError> {
        self.mailboxes.store(self.store.listing()?.len(), Ordering::Relaxed);
        let mut pass = self.book().pass.clone().unwrap_or_else(Pass::begin);
        let (mut pace, mut bustle) = (Pace::new(Some(self.settings.rate)), Bustle::new(self.settings.busy_percent));
        let (mut noted, mut saved, mut told) = (None, Instant::now(), pass.damaged.len());
        let done = pass.run(&*self.store, &mut pace, &mut bustle, &mut |pass| {
            for damage in pass.damaged.iter().skip(told) {
                warn!(mailbox = %damage.mailbox, uid = damage.uid, %damage, "damage found by the scrub");
            }
            told = pass.damaged.len();
            if noted.is_none_or(|at: Instant| at.elapsed() >= NOTE_EVERY) {
                noted = Some(Instant::now());
                self.book().pass = Some(pass.clone());
            }
            if saved.elapsed() >= SAVE_EVERY {
                saved = Instant::now();
                self.save();
            }
            !stop.load(Ordering::Relaxed)
        });
        let mut book = self.book();
        if matches!(done, Ok(true)) {
            info!(mailboxes = pass.mailboxes, messages = pass.messages, damaged = pass.damaged_total, "scrubbed");
            (book.last, book.pass) = (Some(pass), None);
        } else {
            book.pass = Some(pass);
        }
        done.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(at: Option<&str>, damaged: &[&str]) -> Pass {
        let mut pass = Pass::begin();
        pass.damaged = damaged
            .iter()
            .map(|name| Damage { mailbox: (*name).into(), uid: 1, file: None, reason: "gone".into(), found_at: 1 })
            .collect();
        at.into_iter().for_each(|at| pass.leave_at(at.into()));
        pass
    }

    #[test]
    fn damage_is_told_until_a_pass_has_been_there_and_found_none() {
        let check = |pass: Option<Pass>, last: Option<Pass>, expected: &[&str]| {
            let status = ScrubStatus { pass, last, ..ScrubStatus::default() };
            let names: Vec<String> = status.damaged().iter().map(|damage| damage.mailbox.to_string()).collect();
            assert_eq!(names, expected);
        };
        check(None, Some(pass(None, &["a", "c"])), &["a", "c"]);
        check(Some(pass(None, &[])), Some(pass(None, &["a", "c"])), &["a", "c"]);
        check(Some(pass(Some("b"), &["b"])), Some(pass(None, &["a", "c"])), &["b", "c"]);
        check(Some(pass(Some("d"), &[])), Some(pass(None, &["a", "c"])), &[]);
    }
}
