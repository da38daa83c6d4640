//! What releases before 2.4 do not write down: modseqs, what was expunged, the GUID of a message, and `\Seen` beside the
//! other flags.
//!
//! A ledger per mailbox (`ledger`, pure) is compared with every reading and kept in the source's `Memory`, in blocks of
//! UIDs so that one new message writes one block. Losing it costs reading the bodies once more; modseqs stay above
//! the lost ones because they begin at the time of day. The owner's seen database (`seen`) becomes the flag.

mod ledger;
mod seen;

use super::layout::Layout;
use super::mailbox::SpoolBodies;
use crate::model::{
    BodyRef, BodySource, Disposition, Listing, MailboxEntry, MailboxSnapshot, Memory, MessageGuid, Options, Record,
    SeenState, StoreError, UniqueId, UserId,
};
use ledger::Ledger;
use seen::SeenFiles;
use sha1::{Digest, Sha1};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Index versions up to this one need a ledger.
pub(super) const LAST_WITHOUT: u32 = 10;

/// The user in whose seen database everybody's state is, for mailboxes with that option.
const ANYONE: &str = "anyone";

/// Bodies are hashed this far before the GUIDs are put away: what a death in a large mailbox costs.
const SAVE_BYTES: u64 = 64 << 20;
const SAVE_MESSAGES: usize = 2000;

/// More messages without a file in one mailbox are no single losses.
const MOST_LOST: usize = 64;
/// Between the two looks at a message whose file is missing.
const SECOND_LOOK: Duration = Duration::from_millis(50);

/// Records kept parsed over all mailboxes.
const CACHED_RECORDS: usize = 250_000;

/// One lock per mailbox, held while it is read: a ledger must never be shown an older reading after a newer one.
#[derive(Clone, Default)]
struct Slot {
    ledger: Arc<Mutex<Option<Ledger>>>,
    /// The owner's seen state became the flag, and not everybody's.
    of_owner: bool,
}

/// The ledgers of one store.
#[derive(Default)]
pub(super) struct History {
    memory: OnceLock<Arc<dyn Memory>>,
    slots: Mutex<HashMap<UniqueId, Slot>>,
    seen: SeenFiles,
    told: Mutex<HashMap<UserId, Arc<BTreeMap<UniqueId, SeenState>>>>,
    hashed: AtomicU64,
    tidied: AtomicBool,
}

impl History {
    pub(super) fn remember_in(&self, memory: Arc<dyn Memory>) {
        // Said twice: the first one has what was remembered since.
        let _ = self.memory.set(memory);
    }

    fn memory(&self) -> &Arc<dyn Memory> {
        self.memory.get_or_init(|| Arc::new(Forgetful::default()))
    }

    /// Bytes of messages that were read for their GUIDs.
    pub(super) fn hashed_bytes(&self) -> u64 {
        self.hashed.load(Ordering::Relaxed)
    }

    /// Notes a mailbox that needs a ledger.
    pub(super) fn note(&self, id: &UniqueId, shared: bool) {
        lock(&self.slots).entry(id.clone()).or_default().of_owner = !shared;
    }

    /// No mailbox was found to need a ledger.
    pub(super) fn is_empty(&self) -> bool {
        lock(&self.slots).is_empty()
    }

    /// The mailbox was found to need a ledger.
    pub(super) fn has(&self, id: &UniqueId) -> bool {
        lock(&self.slots).contains_key(id)
    }

    /// The owner's seen state in this mailbox is told as flags of its messages.
    pub(super) fn is_flag(&self, id: &UniqueId) -> bool {
        lock(&self.slots).get(id).is_some_and(|slot| slot.of_owner)
    }

    /// Reads, and fills in what the files do not say.
    pub(super) fn complete(
        &self,
        layout: &Layout,
        entry: &MailboxEntry,
        read: &mut dyn FnMut() -> Result<Option<MailboxSnapshot>, StoreError>,
    ) -> Result<Option<MailboxSnapshot>, StoreError> {
        let shared = lock(&self.slots).entry(entry.uniqueid.clone()).or_default().ledger.clone();
        let mut slot = lock(&shared);
        let Some(mut snapshot) = read()? else { return Ok(None) };
        if snapshot.minor_version > LAST_WITHOUT {
            // A newer release has opened it meanwhile.
            lock(&self.slots).remove(&entry.uniqueid);
            return Ok(Some(snapshot));
        }
        let mut ledger = match slot.take() {
            Some(ledger) => ledger,
            None => Ledger::load(&**self.memory(), &entry.uniqueid),
        };
        let mut lost = self.learn(layout, entry, &snapshot, &mut ledger)?;
        if !lost.is_empty() {
            // Expunged just now, or lost.
            std::thread::sleep(SECOND_LOOK);
            let Some(again) = read()? else { return Ok(None) };
            snapshot = again;
            lost = self.learn(layout, entry, &snapshot, &mut ledger)?;
        }
        self.flag_seen(layout, entry, &mut snapshot)?;
        ledger.apply(&mut snapshot, now());
        ledger.save(&**self.memory(), &entry.uniqueid);
        snapshot.records.retain(|record| lost.iter().all(|lost| lost.uid != record.uid));
        snapshot.records.extend(lost);
        snapshot.records.sort_by_key(|record| record.uid);
        *slot = Some(ledger);
        drop(slot);
        self.trim(&entry.uniqueid);
        Ok(Some(snapshot))
    }

    /// GUIDs of messages that are new to the ledger. Live messages of which none can be known, because the file is missing,
    /// are given back, without one.
    fn learn(
        &self,
        layout: &Layout,
        entry: &MailboxEntry,
        snapshot: &MailboxSnapshot,
        ledger: &mut Ledger,
    ) -> Result<Vec<Record>, StoreError> {
        let bodies = SpoolBodies::new(layout, entry);
        let (mut bytes, mut messages) = (0, 0);
        let mut lost = Vec::new();
        let result = (|| {
            for record in &snapshot.records {
                if ledger.knows(record) {
                    continue;
                }
                match guid_of(&bodies, record) {
                    Ok(guid) => ledger.learn(record, guid),
                    // cyr_expire came first; nobody can have it any more.
                    Err(_) if record.is_expunged() => continue,
                    Err(error) if lost.len() >= MOST_LOST || !bodies.is_there() => return Err(error),
                    Err(_) => {
                        lost.push(Record { guid: MessageGuid::default(), ..record.clone() });
                        continue;
                    }
                }
                self.hashed.fetch_add(record.size, Ordering::Relaxed);
                (bytes, messages) = (bytes + record.size, messages + 1);
                if bytes > SAVE_BYTES || messages > SAVE_MESSAGES {
                    ledger.save(&**self.memory(), &entry.uniqueid);
                    (bytes, messages) = (0, 0);
                }
            }
            Ok(())
        })();
        if result.is_err() {
            ledger.save(&**self.memory(), &entry.uniqueid);
        }
        result.map(|()| lost)
    }

    /// `\Seen` and what goes with it: the owner's, or everybody's.
    fn flag_seen(
        &self,
        layout: &Layout,
        entry: &MailboxEntry,
        snapshot: &mut MailboxSnapshot,
    ) -> Result<(), StoreError> {
        let shared = snapshot.head.options.0 & Options::SHARED_SEEN != 0;
        self.note(&entry.uniqueid, shared);
        let Some(state) = self.state_of(layout, entry, shared)? else { return Ok(()) };
        let ranges = seen::ranges(&state.seenuids);
        for record in &mut snapshot.records {
            if seen::contains(&ranges, record.uid) {
                record.system_flags.0 |= crate::model::SystemFlags::SEEN;
            }
        }
        snapshot.head.recentuid = state.lastuid.min(snapshot.head.last_uid);
        snapshot.head.recenttime = state.lastchange;
        Ok(())
    }

    fn state_of(&self, layout: &Layout, entry: &MailboxEntry, shared: bool) -> Result<Option<SeenState>, StoreError> {
        let user = if shared { Some(UserId::from(ANYONE)) } else { layout.owner(&entry.name) };
        let Some(user) = user else { return Ok(None) };
        Ok(self.seen.of(layout, &user)?.get(&entry.uniqueid).cloned())
    }

    /// For the fingerprint of a mailbox: the value that `\Seen` comes from.
    pub(super) fn seen_mark(&self, layout: &Layout, entry: &MailboxEntry, shared: bool) -> Result<Vec<u8>, StoreError> {
        let state = self.state_of(layout, entry, shared)?;
        let mark = |state: SeenState| [state.seenuids, format!(" {} {}", state.lastuid.0, state.lastchange).into()];
        Ok(state.map(|state| mark(state).concat()).unwrap_or_default())
    }

    /// For the fingerprint of a user: which of his own mailboxes his seen database is told as flags for.
    pub(super) fn flag_mark(&self, layout: &Layout, user: &UserId, own: &[UniqueId]) -> Result<Vec<u8>, StoreError> {
        let own: Vec<&UniqueId> = own.iter().filter(|id| self.is_flag(id)).collect();
        if own.is_empty() {
            return Ok(Vec::new());
        }
        let seen = self.seen.of(layout, user)?;
        let told: BTreeSet<&[u8]> =
            own.into_iter().filter(|id| seen.contains_key(*id)).map(UniqueId::as_bytes).collect();
        Ok(told.into_iter().flat_map(|id| [id, b" "].concat()).collect())
    }

    /// Mailboxes whose value in this user's database is another one than when this was last asked.
    pub(super) fn follows_seen(
        &self,
        layout: &Layout,
        user: &UserId,
        listing: &Listing,
    ) -> Result<Vec<UniqueId>, StoreError> {
        let anyone = *user == UserId::from(ANYONE);
        let now = self.seen.of(layout, user)?;
        let before = lock(&self.told).insert(user.clone(), now.clone()).unwrap_or_default();
        let changed: BTreeSet<&UniqueId> =
            now.keys().chain(before.keys()).filter(|id| now.get(*id) != before.get(*id)).collect();
        let follows = |id: &&&UniqueId| {
            let entry = listing.by_id(id);
            entry.is_some_and(|entry| anyone || layout.owner(&entry.name).as_ref() == Some(user))
        };
        Ok(changed.iter().filter(follows).map(|id| (*id).clone()).collect())
    }

    /// Forgets mailboxes that the list does not have any more; once, because a mailbox that just went may come back under
    /// another name.
    pub(super) fn forget_others(&self, listing: &Listing) {
        if self.memory.get().is_none() || self.tidied.swap(true, Ordering::Relaxed) {
            return;
        }
        let is_there = |key: &[u8]| listing.by_id(&UniqueId::new(ledger::mailbox_of(key))).is_some();
        let keys = self.memory().keys().into_iter();
        let gone: Vec<_> = keys.filter(|key| !is_there(key)).map(|key| (key, None)).collect();
        if !gone.is_empty() {
            self.memory().put(gone);
        }
    }

    /// Parsed ledgers cost memory; all but `last` go when they are too many.
    fn trim(&self, last: &UniqueId) {
        let slots = lock(&self.slots);
        let size =
            |slot: &Slot| slot.ledger.try_lock().ok().and_then(|slot| slot.as_ref().map(Ledger::len)).unwrap_or(0);
        if slots.values().map(size).sum::<usize>() <= CACHED_RECORDS {
            return;
        }
        for (id, slot) in slots.iter().filter(|(id, _)| *id != last) {
            // Somebody reads it just now: it is needed.
            if let Ok(mut slot) = slot.ledger.try_lock() {
                tracing::debug!(uniqueid = %id, "ledger leaves the memory");
                *slot = None;
            }
        }
    }
}

fn guid_of(bodies: &SpoolBodies, record: &Record) -> Result<MessageGuid, StoreError> {
    let body = BodyRef { uid: record.uid, guid: record.guid, size: record.size, copied: false };
    let mut open = bodies.open(&body)?;
    let mut hash = Sha1::new();
    let mut buffer = vec![0; 64 << 10];
    let mut left = body.size;
    while left > 0 {
        let count = match std::io::Read::read(&mut open.reader, &mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(StoreError::new(Disposition::RetrySoon, format!("message UID {}: {error}", body.uid.0)));
            }
        };
        hash.update(buffer.get(..count).unwrap_or_default());
        left = left.saturating_sub(count as u64);
    }
    if left > 0 {
        return Err(StoreError::new(Disposition::RetrySoon, format!("message UID {} ends early", body.uid.0)));
    }
    Ok(MessageGuid(hash.finalize().into()))
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64)
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The memory of a store that was given none: it lasts as long as the process.
#[derive(Default)]
struct Forgetful(Mutex<BTreeMap<Vec<u8>, Vec<u8>>>);

impl Memory for Forgetful {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        lock(&self.0).get(key).cloned()
    }

    fn put(&self, entries: Vec<(Vec<u8>, Option<Vec<u8>>)>) {
        let mut map = lock(&self.0);
        for (key, value) in entries {
            match value {
                Some(value) => drop(map.insert(key, value)),
                None => drop(map.remove(&key)),
            }
        }
    }

    fn keys(&self) -> Vec<Vec<u8>> {
        lock(&self.0).keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_memory_it_remembers_until_it_is_closed() {
        let memory = Forgetful::default();
        memory.put(vec![(b"a".to_vec(), Some(b"1".to_vec())), (b"b".to_vec(), Some(b"2".to_vec()))]);
        memory.put(vec![(b"a".to_vec(), None)]);
        assert_eq!((memory.get(b"a"), memory.get(b"b")), (None, Some(b"2".to_vec())));
        assert_eq!(memory.keys(), [b"b".to_vec()]);
    }
}
