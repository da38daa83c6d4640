//! Catch-up: which keys differ from the receipts? Reads directory entries, stat and index headers only.
//!
//! A scan goes through the list in pieces: what a piece found is worked on while the next one is looked at, notices get
//! between two of them, and whatever interrupts it loses nothing but the time. Inside a piece several threads read, each
//! file of the source once however many replicas there are.

use super::queue::{Item, Lane};
use crate::model::{
    Annotation, Fingerprint, Listing, MailStore, MailboxEntry, MboxName, StoreError, UniqueId, UserId, UserPart, pulse,
};
use crate::state::{MailboxReceipt, ReplicaState};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Result of a scan.
#[derive(Debug, Default)]
pub struct ScanReport {
    /// Mailboxes looked at.
    pub checked: usize,
    /// What has to be compared, with the reason.
    pub differ: Vec<(Lane, Item, &'static str)>,
}

/// Compares the source with the receipts of one replica; `below` limits it to a mailbox and its children.
pub fn scan(store: &dyn MailStore, state: &ReplicaState, below: Option<&MboxName>) -> Result<ScanReport, StoreError> {
    let mut scan = Scan::begin(store, store.listing()?, below)?;
    let mut report = ScanReport { checked: scan.entries.len(), ..ScanReport::default() };
    while let Some(found) = scan.step(store, &[state])? {
        report.differ.extend(found.into_iter().map(|found| (found.lane, found.item, found.reason)));
    }
    Ok(report)
}

/// Something that has to be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Which of the states it differs from.
    pub replica: usize,
    pub lane: Lane,
    pub item: Item,
    pub reason: &'static str,
}

/// A piece is made as large as what can be looked at in this time: so long a notice waits at most.
const PIECE: Duration = Duration::from_millis(25);
const PIECE_MOST: usize = 8192;
/// So many in one go by one thread.
const BLOCK: usize = 32;
/// More than processors, where those are few: the disk can be asked for several things at once.
const THREADS: Range<usize> = 2..9;

/// How far a scan has come; zero of zero where none is under way.
#[derive(Debug, Default)]
pub(super) struct Progress {
    done: AtomicUsize,
    all: AtomicUsize,
}

impl Progress {
    pub(super) fn set(&self, (done, all): (usize, usize)) {
        self.done.store(done, Ordering::Relaxed);
        self.all.store(all, Ordering::Relaxed);
    }

    /// How many of how many mailboxes and users are done.
    pub(super) fn now(&self) -> Option<(usize, usize)> {
        let all = self.all.load(Ordering::Relaxed);
        (all > 0).then(|| (self.done.load(Ordering::Relaxed), all))
    }
}

enum Stage {
    Mailboxes,
    Users,
    Rest,
    Over,
}

/// A scan under way.
pub(super) struct Scan {
    below: Option<MboxName>,
    entries: Vec<Arc<MailboxEntry>>,
    /// Everything that is listed, whether it is looked at or not.
    source: Arc<Listing>,
    annotated: BTreeMap<UniqueId, Vec<Annotation>>,
    users: Vec<UserId>,
    stage: Stage,
    next: usize,
    piece: usize,
    piece_most: usize,
    threads: usize,
}

impl Scan {
    pub(super) fn begin(
        store: &dyn MailStore,
        source: Arc<Listing>,
        below: Option<&MboxName>,
    ) -> Result<Self, StoreError> {
        let entries = match below {
            Some(top) => source.below(top).cloned().collect(),
            None => source.entries().cloned().collect(),
        };
        let mut users = Vec::new();
        if below.is_none_or(|top| top.owner().is_some()) {
            let only = below.and_then(MboxName::owner);
            users = store.users()?;
            users.retain(|user| only.as_ref().is_none_or(|only| only == user));
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            below: below.cloned(),
            entries,
            source,
            annotated: store.annotated_mailboxes()?,
            users,
            stage: Stage::Mailboxes,
            next: 0,
            piece: BLOCK * THREADS.start,
            piece_most: PIECE_MOST,
            threads: processors.clamp(THREADS.start, THREADS.end - 1),
        })
    }

    /// No piece is larger than this.
    pub(super) fn in_pieces_of(mut self, most: usize) -> Self {
        self.piece_most = most.clamp(1, PIECE_MOST);
        self.piece = self.piece.min(self.piece_most);
        self
    }

    /// How many of how many are done.
    pub(super) fn progress(&self) -> (usize, usize) {
        let done = match self.stage {
            Stage::Mailboxes => self.next,
            Stage::Users => self.entries.len() + self.next,
            Stage::Rest | Stage::Over => self.entries.len() + self.users.len(),
        };
        // The end is not reached before the rest has been looked at.
        (done, self.entries.len() + self.users.len() + 1)
    }

    /// Mailboxes that are looked at.
    pub(super) fn mailboxes(&self) -> usize {
        self.entries.len()
    }

    /// Looks at the next piece; `None` when there is none. After an error the same piece is next.
    pub(super) fn step(
        &mut self,
        store: &dyn MailStore,
        states: &[&ReplicaState],
    ) -> Result<Option<Vec<Found>>, StoreError> {
        let since = Instant::now();
        let range = |len: usize| self.next..len.min(self.next + self.piece);
        let (range, found) = match self.stage {
            Stage::Mailboxes => {
                let range = range(self.entries.len());
                let block =
                    |range: Range<usize>, out: &mut Vec<_>| self.look_at(&self.entries[range], store, states, out);
                (range.clone(), self.in_threads(range, &block))
            }
            Stage::Users => {
                let range = range(self.users.len());
                let block = |range: Range<usize>, out: &mut Vec<_>| users(&self.users[range], store, states, out);
                (range.clone(), self.in_threads(range, &block))
            }
            Stage::Rest => (0..0, self.rest(store, states)?),
            Stage::Over => return Ok(None),
        };
        let took = since.elapsed();
        if took < PIECE / 2 && range.len() == self.piece {
            self.piece = (self.piece * 2).min(self.piece_most);
        } else if took > PIECE * 2 {
            self.piece = (self.piece / 2).max(BLOCK.min(self.piece_most));
        }
        self.next = range.end;
        self.stage = match self.stage {
            Stage::Mailboxes if range.end < self.entries.len() => Stage::Mailboxes,
            Stage::Users if range.end < self.users.len() => Stage::Users,
            Stage::Mailboxes => {
                self.next = 0;
                Stage::Users
            }
            Stage::Users => Stage::Rest,
            Stage::Rest | Stage::Over => Stage::Over,
        };
        Ok(Some(found))
    }

    /// Has the blocks of a range looked at side by side; what they find comes in the order of the list.
    fn in_threads(&self, range: Range<usize>, block: &(dyn Fn(Range<usize>, &mut Vec<Found>) + Sync)) -> Vec<Found> {
        let next = AtomicUsize::new(range.start);
        let found: Mutex<BTreeMap<usize, Vec<Found>>> = Mutex::default();
        let pulse = pulse::mine();
        let work = || {
            pulse::help(pulse.clone());
            loop {
                pulse::beat();
                let start = next.fetch_add(BLOCK, Ordering::Relaxed);
                if start >= range.end {
                    return;
                }
                let mut out = Vec::new();
                block(start..range.end.min(start + BLOCK), &mut out);
                if !out.is_empty() {
                    found.lock().unwrap_or_else(PoisonError::into_inner).insert(start, out);
                }
            }
        };
        let helpers = (range.len().div_ceil(BLOCK)).min(self.threads).saturating_sub(1);
        std::thread::scope(|scope| {
            for _ in 0..helpers {
                // Where no thread is to be had, there are fewer.
                let _ = std::thread::Builder::new().name("scan".into()).spawn_scoped(scope, work);
            }
            work();
        });
        found.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().flatten().collect()
    }

    fn look_at(
        &self,
        entries: &[Arc<MailboxEntry>],
        store: &dyn MailStore,
        states: &[&ReplicaState],
        out: &mut Vec<Found>,
    ) {
        let prefix = store.deleted_prefix();
        // An unreadable mailbox is looked at by its job, which says what is wrong with it.
        let now: Vec<Option<Fingerprint>> =
            entries.iter().map(|entry| store.fingerprint(entry).ok().flatten()).collect();
        for (replica, state) in states.iter().enumerate() {
            let receipts = state.mailboxes_of(entries.iter().map(|entry| &entry.uniqueid));
            for ((entry, receipt), now) in entries.iter().zip(receipts).zip(&now) {
                if let Some(reason) = self.reason(entry, receipt.as_ref(), now.as_ref()) {
                    let item = Item::Mailbox(entry.uniqueid.clone());
                    out.push(Found { replica, lane: Lane::of(&entry.name, prefix), item, reason });
                }
            }
        }
    }

    fn reason(
        &self,
        entry: &MailboxEntry,
        receipt: Option<&MailboxReceipt>,
        now: Option<&Fingerprint>,
    ) -> Option<&'static str> {
        let Some(receipt) = receipt else { return Some("not yet replicated") };
        let head = &receipt.view.head;
        if head.name != entry.name {
            return Some("renamed");
        }
        if entry.mbtype.is_intermediate() {
            return (head.mbtype != entry.mbtype).then_some("became a place holder");
        }
        if receipt.fingerprint.is_none() {
            return Some("last comparison was not finished");
        }
        let mine = self.annotated.get(&entry.uniqueid).map_or(&[][..], Vec::as_slice);
        let theirs = &receipt.view.annotations;
        if mine.len() != theirs.len()
            || mine.iter().zip(theirs).any(|(mine, theirs)| mine.content() != theirs.content())
        {
            return Some("mailbox annotations");
        }
        (now != receipt.fingerprint.as_ref()).then_some("files changed")
    }

    /// What is not found by going through the list.
    fn rest(&self, store: &dyn MailStore, states: &[&ReplicaState]) -> Result<Vec<Found>, StoreError> {
        let prefix = store.deleted_prefix();
        let below = self.below.as_ref();
        let mut out = Vec::new();
        for (replica, state) in states.iter().enumerate() {
            let mut gone = Vec::new();
            state.each_mailbox_id(&mut |id| gone.extend(self.source.by_id(&id).is_none().then_some(id)));
            for (id, receipt) in gone.iter().zip(state.mailboxes_of(gone.iter())) {
                let Some(name) = receipt.map(|receipt| receipt.view.head.name) else { continue };
                if is_below(below, &name) {
                    let item = Item::Mailbox(id.clone());
                    out.push(Found { replica, lane: Lane::of(&name, prefix), item, reason: "gone at the source" });
                }
            }
        }
        if below.is_some_and(|top| top.owner().is_none()) {
            return Ok(out);
        }
        let (mine, server) = (store.quotas()?, store.server_annotations()?);
        for (replica, state) in states.iter().enumerate() {
            let theirs = state.quotas();
            for root in mine.keys().chain(theirs.keys().filter(|root| !mine.contains_key(*root))) {
                if !super::diff::same_limits(mine.get(root), theirs.get(root)) {
                    let (lane, item) = (super::quota_lane(root, prefix), Item::Quota(root.clone()));
                    out.push(Found { replica, lane, item, reason: "quota limits" });
                }
            }
            if state.server_annotations().as_ref() != Some(&server) {
                let (lane, item) = (Lane::Server, Item::ServerAnnotations);
                out.push(Found { replica, lane, item, reason: "server annotations" });
            }
        }
        Ok(out)
    }
}

fn is_below(below: Option<&MboxName>, name: &MboxName) -> bool {
    below.is_none_or(|top| {
        let rest = name.as_bytes().strip_prefix(top.as_bytes());
        rest.is_some_and(|rest| rest.is_empty() || rest.first() == Some(&b'.'))
    })
}

fn users(users: &[UserId], store: &dyn MailStore, states: &[&ReplicaState], out: &mut Vec<Found>) {
    let now = store.user_fingerprints(users);
    for (replica, state) in states.iter().enumerate() {
        let receipts = state.users_of(users.iter());
        for ((user, receipt), now) in users.iter().zip(receipts).zip(&now) {
            let reason = match receipt {
                None => "not yet replicated",
                Some(receipt) if receipt.fingerprint.is_none() || receipt.fingerprint != *now => "files changed",
                Some(_) => continue,
            };
            for part in [UserPart::Subs, UserPart::Seen, UserPart::Sieve] {
                let item = Item::Meta(part);
                out.push(Found { replica, lane: Lane::User(user.clone()), item, reason });
            }
        }
    }
}
