//! The database behind the receipts.

use super::at_work::{AtWork, Slot};
use super::intents::Intents;
use super::{MailboxReceipt, UserReceipt};
use crate::model::{Annotation, MboxName, Memory, Pulse, QuotaLimits, QuotaRoot, UniqueId, UserId, pulse};
use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;
use tracing::warn;

/// Written into the header; another number means: start afresh.
pub(super) const FORMAT: &str = "1";
pub(super) const ENTRIES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("entries");
pub(super) const HEADER: TableDefinition<&str, &str> = TableDefinition::new("header");
/// Longest time a write may be in memory only.
const DURABLE_WITHIN: Duration = Duration::from_millis(250);
/// The writer sleeps no longer in one go.
const BREATH: Duration = Duration::from_secs(1);

/// The state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{path}: another spooltap uses this state directory; stop it or give --state another directory")]
    Busy { path: PathBuf },
    #[error("{path}: {cause}; make the directory writable or give --state another one")]
    Io { path: PathBuf, cause: String },
}

/// Kinds of entries; first byte of every key.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Mailbox = b'm' as isize,
    User = b'u' as isize,
    Quota = b'q' as isize,
    Server = b's' as isize,
    Primed = b'p' as isize,
    Removal = b'r' as isize,
    /// Of the source, not of a replica.
    Memory = b'h' as isize,
}

type Overlay = BTreeMap<Vec<u8>, (u64, Option<Vec<u8>>)>;

#[derive(Default)]
struct Buffer {
    /// Not yet durable: key → generation and value (`None` = removed).
    overlay: Overlay,
    generation: u64,
    durable: u64,
    stop: bool,
    hurry: bool,
}

struct Inner {
    /// `None` only while it cannot be opened anew.
    db: RwLock<Option<Database>>,
    path: PathBuf,
    begun: Intents,
    at_work: AtWork,
    buffer: Mutex<Buffer>,
    wake: Condvar,
    /// Why the last commit failed.
    trouble: Mutex<Option<String>>,
}

/// How the state is, for those who watch over it.
#[derive(Clone)]
pub struct Health {
    inner: Arc<Inner>,
}

impl Health {
    /// Why what is written stays in memory just now.
    pub fn trouble(&self) -> Option<String> {
        self.inner.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Health").field(&self.trouble()).finish()
    }
}

/// The open state; dropping it makes everything durable.
pub struct State {
    inner: Arc<Inner>,
    writer: Option<JoinHandle<()>>,
    pulse: Arc<Pulse>,
}

/// Receipts of one replica. What is put after the `State` was dropped stays in memory.
#[derive(Clone)]
pub struct ReplicaState {
    inner: Arc<Inner>,
    name: Vec<u8>,
}

impl State {
    /// Opens (or makes) `dir/state.redb` for the store with this identity. A file that is damaged, of another format or of
    /// another store is put aside and a fresh one is made.
    pub fn open(dir: &Path, store_identity: &str) -> Result<Self, StateError> {
        let path = dir.join("state.redb");
        let io = |cause: String| StateError::Io { path: path.clone(), cause };
        std::fs::create_dir_all(dir).map_err(|error| io(error.to_string()))?;
        let mut fresh = !path.exists();
        let db = match open_database(&path, store_identity) {
            Ok(db) => db,
            Err(Unusable::Busy) => return Err(StateError::Busy { path }),
            Err(Unusable::Io(cause)) => return Err(io(cause)),
            Err(Unusable::PutAside(reason)) => {
                let aside = path.with_extension("redb.aside");
                warn!(path = %path.display(), reason, aside = %aside.display(), "state is not used, everything is compared anew");
                std::fs::rename(&path, &aside).map_err(|error| io(error.to_string()))?;
                fresh = true;
                open_database(&path, store_identity).map_err(|_| io("a fresh database cannot be made".into()))?
            }
        };
        let begun = Intents::open(&dir.join("begun"));
        if fresh {
            begun.clear();
        }
        let at_work = AtWork::open(&dir.join("at-work"), fresh);
        for name in ["state.redb", "begun", "at-work"] {
            super::hand_over(&dir.join(name));
        }
        let db = RwLock::new(Some(db));
        let inner = Arc::new(Inner {
            db,
            path,
            begun,
            at_work,
            buffer: Mutex::default(),
            wake: Condvar::new(),
            trouble: Mutex::default(),
        });
        let own = inner.clone();
        let pulse = Pulse::new("state");
        let theirs = pulse.clone();
        let write = move || theirs.during(|| own.write_behind());
        let writer = std::thread::Builder::new().name("state".into()).spawn(write).ok();
        Ok(Self { inner, writer, pulse })
    }

    /// A copy of what another process holds open, for reading; what is put into it is lost. Its last quarter of a second may
    /// be missing. `None` when there is none, or none that can be used.
    pub fn open_copy(dir: &Path, store_identity: &str) -> Option<Self> {
        let place = dir.join(format!("copy-{}", std::process::id()));
        let copied = std::fs::create_dir(&place).and_then(|()| {
            std::fs::copy(dir.join("state.redb"), place.join("state.redb"))?;
            Ok(())
        });
        let state = copied.ok().and_then(|()| {
            // A commit may have come in between, and then it is not one state: no conclusion is drawn from it.
            open_database(&place.join("state.redb"), store_identity).ok()?;
            Self::open(&place, store_identity).ok()
        });
        // The file stays open; it has no name any more.
        let _ = std::fs::remove_dir_all(&place);
        state
    }

    /// Receipts of the replica of this name.
    pub fn replica(&self, name: &str) -> ReplicaState {
        ReplicaState { inner: self.inner.clone(), name: name.as_bytes().to_vec() }
    }

    /// What the source wants remembered.
    pub fn memory(&self) -> Arc<dyn Memory> {
        Arc::new(SourceMemory { inner: self.inner.clone() })
    }

    pub fn health(&self) -> Health {
        Health { inner: self.inner.clone() }
    }

    /// Signs of life of the thread that writes.
    pub fn pulse(&self) -> Arc<Pulse> {
        self.pulse.clone()
    }

    /// Returns when everything written so far is durable.
    pub fn flush(&self) {
        self.inner.flush();
    }
}

/// The part of the state that belongs to the source. What is put after the `State` was dropped stays in memory.
struct SourceMemory {
    inner: Arc<Inner>,
}

impl SourceMemory {
    fn key(id: &[u8]) -> Vec<u8> {
        [&[Kind::Memory as isize as u8], id].concat()
    }
}

impl Memory for SourceMemory {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.inner.get(&Self::key(key))
    }

    fn put(&self, entries: Vec<(Vec<u8>, Option<Vec<u8>>)>) {
        self.inner.put_all(entries.into_iter().map(|(key, value)| (Self::key(&key), value)));
    }

    fn keys(&self) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        self.inner.each(&Self::key(b""), &mut |key, _| out.extend(key.get(1..).map(<[u8]>::to_vec)));
        out
    }
}

impl Drop for State {
    fn drop(&mut self) {
        {
            let mut buffer = self.inner.lock();
            buffer.stop = true;
        }
        self.inner.wake.notify_all();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        if self.inner.lock().overlay.is_empty() {
            self.inner.begun.clear();
            let closed = self.inner.with_db(|db| set_closed(db, true));
            if let Err(error) = closed {
                warn!(path = %self.inner.path.display(), %error, "state cannot be closed, the replica is looked at anew next time");
            }
        }
    }
}

/// Says in the header whether all receipts are in the file. Opening takes it back; who dies in between may have
/// confirmed more than was written.
fn set_closed(db: &Database, closed: bool) -> Result<(), redb::Error> {
    let write = db.begin_write()?;
    write.open_table(HEADER)?.insert("closed", if closed { "yes" } else { "no" })?;
    write.commit()?;
    Ok(())
}

/// After a death receipts may be older than the replica: what was known of each lane is no longer, so that all of them
/// are looked at before anything is compared with a receipt.
fn take_back(db: &Database) -> Result<(), redb::Error> {
    let write = db.begin_write()?;
    let mut header = write.open_table(HEADER)?;
    let was_closed = header.insert("closed", "no")?.is_none_or(|old| old.value() == "yes");
    drop(header);
    if !was_closed {
        write.open_table(ENTRIES)?.retain(|key, _| key.first() != Some(&(Kind::Primed as isize as u8)))?;
    }
    write.commit()?;
    Ok(())
}

enum Unusable {
    Busy,
    Io(String),
    PutAside(String),
}

fn open_database(path: &Path, identity: &str) -> Result<Database, Unusable> {
    let db = Database::create(path).map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => Unusable::Busy,
        DatabaseError::Storage(redb::StorageError::Io(error)) if error.kind() != std::io::ErrorKind::InvalidData => {
            Unusable::Io(error.to_string())
        }
        other => Unusable::PutAside(other.to_string()),
    })?;
    // A disk that is full, or refuses, says nothing about what stands on it.
    let aside = |error: redb::Error| match error {
        redb::Error::Io(error) if error.kind() != std::io::ErrorKind::InvalidData => Unusable::Io(error.to_string()),
        redb::Error::PreviousIo => Unusable::Io(error.to_string()),
        other => Unusable::PutAside(other.to_string()),
    };
    let write = db.begin_write().map_err(|error| aside(error.into()))?;
    {
        let mut header = write.open_table(HEADER).map_err(|error| aside(error.into()))?;
        write.open_table(ENTRIES).map_err(|error| aside(error.into()))?;
        for (key, wanted) in [("format", FORMAT), ("store", identity)] {
            let found = header.get(key).map_err(|error| aside(error.into()))?.map(|value| value.value().to_owned());
            match found {
                Some(found) if found != wanted => {
                    return Err(Unusable::PutAside(format!("its {key} is {found}, not {wanted}")));
                }
                Some(_) => {}
                None => {
                    header.insert(key, wanted).map_err(|error| aside(error.into()))?;
                }
            }
        }
    }
    write.commit().map_err(|error| Unusable::Io(error.to_string()))?;
    take_back(&db).map_err(|error| Unusable::Io(error.to_string()))?;
    Ok(db)
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, key: Vec<u8>, value: Option<Vec<u8>>) {
        self.put_all(std::iter::once((key, value)));
    }

    /// In one transaction: what is in the overlay at one moment is committed together.
    fn put_all(&self, entries: impl Iterator<Item = (Vec<u8>, Option<Vec<u8>>)>) {
        let mut buffer = self.lock();
        buffer.generation += 1;
        let generation = buffer.generation;
        let first = buffer.overlay.is_empty();
        for (key, value) in entries {
            buffer.overlay.insert(key, (generation, value));
        }
        drop(buffer);
        if first {
            self.wake.notify_all();
        }
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        if let Some((_, value)) = self.lock().overlay.get(key) {
            return value.clone();
        }
        let read = self.begin_read()?;
        let table = read.open_table(ENTRIES).ok()?;
        table.get(key).ok()?.map(|value| value.value().to_vec())
    }

    /// The entries of these keys, in their order.
    fn get_all(&self, keys: impl Iterator<Item = Vec<u8>>, call: &mut dyn FnMut(Option<&[u8]>)) {
        let keys: Vec<Vec<u8>> = keys.collect();
        let fresh: Overlay = {
            let buffer = self.lock();
            keys.iter()
                .filter_map(|key| buffer.overlay.get_key_value(key))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect()
        };
        // The overlay was asked first: what is not in it any more is in the file by now.
        let table = self.begin_read().and_then(|read| read.open_table(ENTRIES).ok());
        for key in keys {
            match fresh.get(&key) {
                Some((_, value)) => call(value.as_deref()),
                None => {
                    let stored = table.as_ref().and_then(|table| table.get(key.as_slice()).ok().flatten());
                    call(stored.as_ref().map(|value| value.value()));
                }
            }
        }
    }

    /// Every entry whose key begins with `prefix`.
    fn each(&self, prefix: &[u8], call: &mut dyn FnMut(&[u8], &[u8])) {
        let overlay: BTreeMap<Vec<u8>, Option<Vec<u8>>> = self
            .lock()
            .overlay
            .range(prefix.to_vec()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, (_, value))| (key.clone(), value.clone()))
            .collect();
        // The overlay was read first: an entry that becomes durable in between is seen twice, never missed.
        let mut stored = || -> Option<()> {
            let read = self.begin_read()?;
            let table = read.open_table(ENTRIES).ok()?;
            for entry in table.range(prefix..).ok()? {
                let (key, value) = entry.ok()?;
                if !key.value().starts_with(prefix) {
                    break;
                }
                if !overlay.contains_key(key.value()) {
                    call(key.value(), value.value());
                }
            }
            Some(())
        };
        let _ = stored();
        for (key, value) in &overlay {
            if let Some(value) = value {
                call(key, value);
            }
        }
    }

    fn write_behind(&self) {
        loop {
            let mut buffer = self.lock();
            while buffer.overlay.is_empty() && !buffer.stop {
                pulse::beat();
                buffer = self.wake.wait_timeout(buffer, BREATH).unwrap_or_else(PoisonError::into_inner).0;
            }
            if buffer.overlay.is_empty() {
                return;
            }
            if !buffer.stop && !buffer.hurry {
                let (guard, _) = self.wake.wait_timeout(buffer, DURABLE_WITHIN).unwrap_or_else(PoisonError::into_inner);
                buffer = guard;
            }
            let (batch, upto, stop) = (buffer.overlay.clone(), buffer.generation, buffer.stop);
            drop(buffer);
            pulse::beat();
            let result = self.commit(&batch);
            if result.is_err() {
                self.reopen();
            }
            let trouble = result.as_ref().err().map(|error| format!("{}: {error}", self.path.display()));
            let before = std::mem::replace(&mut *self.trouble.lock().unwrap_or_else(PoisonError::into_inner), trouble);
            let mut buffer = self.lock();
            match result {
                Ok(()) => {
                    buffer.overlay.retain(|_, (generation, _)| *generation > upto);
                    buffer.durable = upto;
                    buffer.hurry = false;
                }
                Err(error) => {
                    if before.is_none() {
                        warn!(path = %self.path.display(), %error, "state cannot be written; receipts are kept in memory");
                    }
                    buffer.hurry = false;
                    // Somebody may wait in `flush`: it must not wait for ever on a full disk.
                    buffer.durable = upto;
                    if stop {
                        return;
                    }
                    drop(buffer);
                    self.wake.notify_all();
                    std::thread::sleep(Duration::from_secs(1));
                    continue;
                }
            }
            drop(buffer);
            self.wake.notify_all();
        }
    }

    fn commit(&self, batch: &Overlay) -> Result<(), redb::Error> {
        self.with_db(|db| {
            let write = db.begin_write()?;
            {
                let mut table = write.open_table(ENTRIES)?;
                for (key, (_, value)) in batch {
                    match value {
                        Some(value) => drop(table.insert(key.as_slice(), value.as_slice())?),
                        None => drop(table.remove(key.as_slice())?),
                    }
                }
            }
            write.commit()?;
            Ok(())
        })
    }

    fn with_db<T>(&self, action: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, redb::Error> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        db.as_ref().map_or(Err(redb::Error::PreviousIo), action)
    }

    fn begin_read(&self) -> Option<ReadTransaction> {
        self.with_db(|db| Ok(db.begin_read()?)).ok()
    }

    /// A database of which one write has failed refuses everything from then on, reading as well, until it is opened anew.
    fn reopen(&self) {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        drop(db.take());
        match Database::create(&self.path) {
            Ok(fresh) => *db = Some(fresh),
            Err(error) => warn!(path = %self.path.display(), %error, "state cannot be read"),
        }
    }

    fn flush(&self) {
        let mut buffer = self.lock();
        let upto = buffer.generation;
        while buffer.durable < upto && !buffer.overlay.is_empty() && !buffer.stop {
            buffer.hurry = true;
            self.wake.notify_all();
            let (guard, _) =
                self.wake.wait_timeout(buffer, Duration::from_millis(50)).unwrap_or_else(PoisonError::into_inner);
            buffer = guard;
        }
    }
}

/// First byte of every value.
const VALUE_VERSION: u8 = 1;

fn pack<T: Serialize>(value: &T) -> Option<Vec<u8>> {
    let mut out = vec![VALUE_VERSION];
    out.extend(postcard::to_stdvec(value).ok()?);
    Some(out)
}

/// An entry that cannot be read counts as absent: its key is compared again.
pub(super) fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    postcard::from_bytes(bytes.strip_prefix(&[VALUE_VERSION])?).ok()
}

impl ReplicaState {
    fn prefix(&self, kind: Kind) -> Vec<u8> {
        let mut key = Vec::with_capacity(self.name.len() + 32);
        key.push(kind as isize as u8);
        key.extend_from_slice(&self.name);
        key.push(0);
        key
    }

    fn key(&self, kind: Kind, id: &[u8]) -> Vec<u8> {
        let mut key = self.prefix(kind);
        key.extend_from_slice(id);
        key
    }

    fn read<T: DeserializeOwned>(&self, kind: Kind, id: &[u8]) -> Option<T> {
        unpack(&self.inner.get(&self.key(kind, id))?)
    }

    fn write<T: Serialize>(&self, kind: Kind, id: &[u8], value: &T) {
        self.inner.put(self.key(kind, id), pack(value));
    }

    fn remove(&self, kind: Kind, id: &[u8]) {
        self.inner.put(self.key(kind, id), None);
    }

    fn each<T: DeserializeOwned>(&self, kind: Kind, call: &mut dyn FnMut(&[u8], T)) {
        let prefix = self.prefix(kind);
        self.inner.each(&prefix, &mut |key, value| {
            if let (Some(id), Some(value)) = (key.strip_prefix(prefix.as_slice()), unpack(value)) {
                call(id, value);
            }
        });
    }

    fn read_all<'a, T: DeserializeOwned>(&self, kind: Kind, ids: impl Iterator<Item = &'a [u8]>) -> Vec<Option<T>> {
        let mut out = Vec::with_capacity(ids.size_hint().0);
        self.inner.get_all(ids.map(|id| self.key(kind, id)), &mut |value| out.push(value.and_then(unpack)));
        out
    }

    pub fn mailbox(&self, id: &UniqueId) -> Option<MailboxReceipt> {
        self.read(Kind::Mailbox, id.as_bytes())
    }

    /// Those of several mailboxes, in their order.
    pub fn mailboxes_of<'a>(&self, ids: impl Iterator<Item = &'a UniqueId>) -> Vec<Option<MailboxReceipt>> {
        self.read_all(Kind::Mailbox, ids.map(UniqueId::as_bytes))
    }

    pub fn put_mailbox(&self, id: &UniqueId, receipt: &MailboxReceipt) {
        self.write(Kind::Mailbox, id.as_bytes(), receipt);
    }

    /// Said before a mailbox is made on the replica, or taken away; known at once to whoever comes after us. The name of one
    /// that cannot be found by its owner is remembered as well.
    pub fn begin_mailbox(&self, id: &UniqueId, shared_name: Option<&MboxName>) {
        self.inner.begun.add(&self.key(Kind::Mailbox, id.as_bytes()), shared_name);
    }

    /// Under which names mailboxes that cannot be found by their owner were begun.
    pub fn begun_names(&self) -> Vec<MboxName> {
        self.inner.begun.names()
    }

    /// Said before anything is sent for this lane; dropped when all of it was answered.
    pub fn at_work(&self, lane: &[u8]) -> Option<Slot> {
        let mut what = self.slot_prefix();
        what.extend(lane);
        self.inner.at_work.take(what)
    }

    /// Lanes that were at work when the one before us died, or that it was not sure of at its end.
    pub fn left_at_work(&self) -> Vec<(Slot, Vec<u8>)> {
        let prefix = self.slot_prefix();
        let mut out = Vec::new();
        for (slot, what) in self.inner.at_work.left() {
            match what.strip_prefix(prefix.as_slice()) {
                Some(lane) => out.push((slot, lane.to_vec())),
                None => slot.keep(),
            }
        }
        out
    }

    fn slot_prefix(&self) -> Vec<u8> {
        blake3::hash(&self.name).as_bytes().to_vec()
    }

    /// We have a receipt of it, or had begun to bring it there.
    pub fn is_ours(&self, id: &UniqueId) -> bool {
        self.inner.begun.has(&self.key(Kind::Mailbox, id.as_bytes())) || self.mailbox(id).is_some()
    }

    pub fn remove_mailbox(&self, id: &UniqueId) {
        self.remove(Kind::Mailbox, id.as_bytes());
    }

    /// All mailboxes with their names on the replica.
    pub fn mailboxes(&self) -> Vec<(UniqueId, MboxName)> {
        let mut out = Vec::new();
        self.for_each_mailbox(&mut |id, receipt| out.push((id, receipt.view.head.name)));
        out
    }

    /// Every mailbox there is a receipt of.
    pub fn each_mailbox_id(&self, call: &mut dyn FnMut(UniqueId)) {
        let prefix = self.prefix(Kind::Mailbox);
        self.inner.each(&prefix, &mut |key, _| {
            key.strip_prefix(prefix.as_slice()).into_iter().for_each(|id| call(UniqueId::new(id)))
        });
    }

    pub fn for_each_mailbox(&self, call: &mut dyn FnMut(UniqueId, MailboxReceipt)) {
        self.each(Kind::Mailbox, &mut |id, receipt| call(UniqueId::new(id), receipt));
    }

    /// Mailboxes that are to be removed, and since when (seconds since 1970) the source has them no more.
    pub fn removals(&self) -> Vec<(UniqueId, u64)> {
        let prefix = self.prefix(Kind::Removal);
        let mut out = Vec::new();
        self.inner.each(&prefix, &mut |key, value| {
            if let (Some(id), Some(since)) = (key.strip_prefix(&*prefix), unpack(value)) {
                out.push((UniqueId::new(id), since));
            }
        });
        out
    }

    pub fn put_removal(&self, id: &UniqueId, since: u64) {
        self.write(Kind::Removal, id.as_bytes(), &since);
    }

    pub fn remove_removal(&self, id: &UniqueId) {
        self.remove(Kind::Removal, id.as_bytes());
    }

    pub fn user(&self, user: &UserId) -> Option<UserReceipt> {
        self.read(Kind::User, user.as_bytes())
    }

    /// Those of several users, in their order.
    pub fn users_of<'a>(&self, users: impl Iterator<Item = &'a UserId>) -> Vec<Option<UserReceipt>> {
        self.read_all(Kind::User, users.map(UserId::as_bytes))
    }

    pub fn put_user(&self, user: &UserId, receipt: &UserReceipt) {
        self.write(Kind::User, user.as_bytes(), receipt);
    }

    pub fn remove_user(&self, user: &UserId) {
        self.remove(Kind::User, user.as_bytes());
    }

    pub fn quota(&self, root: &QuotaRoot) -> Option<QuotaLimits> {
        self.read(Kind::Quota, root.as_bytes())
    }

    pub fn quotas(&self) -> BTreeMap<QuotaRoot, QuotaLimits> {
        let mut out = BTreeMap::new();
        self.each(Kind::Quota, &mut |root, limits| {
            out.insert(QuotaRoot::new(root), limits);
        });
        out
    }

    /// The quota roots whose names begin in one of these ways; all where none is given. Sorted.
    pub fn quota_roots(&self, starts: &BTreeSet<MboxName>) -> Vec<QuotaRoot> {
        let prefix = self.prefix(Kind::Quota);
        let mut out = BTreeSet::new();
        let whole = BTreeSet::from([MboxName::default()]);
        for start in if starts.is_empty() { &whole } else { starts } {
            self.inner.each(&[prefix.as_slice(), start.as_bytes()].concat(), &mut |key, _| {
                out.extend(key.strip_prefix(prefix.as_slice()).map(QuotaRoot::new));
            });
        }
        out.into_iter().collect()
    }

    pub fn put_quota(&self, root: &QuotaRoot, limits: &QuotaLimits) {
        self.write(Kind::Quota, root.as_bytes(), limits);
    }

    pub fn remove_quota(&self, root: &QuotaRoot) {
        self.remove(Kind::Quota, root.as_bytes());
    }

    /// `None` before the first confirmation.
    pub fn server_annotations(&self) -> Option<Vec<Annotation>> {
        self.read(Kind::Server, b"")
    }

    pub fn put_server_annotations(&self, annotations: &[Annotation]) {
        self.write(Kind::Server, b"", &annotations.to_vec());
    }

    /// The replica's content of this lane was looked at once.
    pub fn primed(&self, lane: &str) -> bool {
        self.read::<bool>(Kind::Primed, lane.as_bytes()).unwrap_or(false)
    }

    /// The same of several lanes, in their order.
    pub fn primed_of<'a>(&self, lanes: impl Iterator<Item = &'a str>) -> Vec<bool> {
        let primed = self.read_all::<bool>(Kind::Primed, lanes.map(str::as_bytes));
        primed.into_iter().map(|primed| primed.unwrap_or(false)).collect()
    }

    pub fn set_primed(&self, lane: &str) {
        self.write(Kind::Primed, lane.as_bytes(), &true);
    }

    /// What the replica has in this lane is to be asked anew.
    pub fn unset_primed(&self, lane: &str) {
        self.remove(Kind::Primed, lane.as_bytes());
    }

    /// Returns when everything written so far is durable.
    pub fn flush(&self) {
        self.inner.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{MailboxHead, MailboxView, ModSeq};

    fn receipt(name: &str, modseq: u64) -> MailboxReceipt {
        let head = MailboxHead { name: name.into(), highestmodseq: ModSeq(modseq), ..MailboxHead::default() };
        MailboxReceipt { view: MailboxView { head, ..MailboxView::default() }, ..MailboxReceipt::default() }
    }

    #[test]
    fn what_was_put_is_there_at_once_and_after_a_restart() {
        let dir = tempfile::tempdir().expect("directory");
        {
            let state = State::open(dir.path(), "store").expect("opens");
            let replica = state.replica("r");
            replica.put_mailbox(&"a".into(), &receipt("user.a", 3));
            replica.put_mailbox(&"b".into(), &receipt("user.b", 4));
            assert_eq!(replica.mailbox(&"a".into()), Some(receipt("user.a", 3)));
            state.flush();
            replica.put_mailbox(&"a".into(), &receipt("user.a", 5));
            replica.remove_mailbox(&"b".into());
            assert_eq!(replica.mailboxes(), [("a".into(), "user.a".into())]);
            assert_eq!(state.replica("other").mailboxes(), []);
        }
        let state = State::open(dir.path(), "store").expect("opens again");
        assert_eq!(state.replica("r").mailbox(&"a".into()), Some(receipt("user.a", 5)));
        assert_eq!(state.replica("r").mailbox(&"b".into()), None);
    }

    #[test]
    fn several_are_asked_for_at_once() {
        let dir = tempfile::tempdir().expect("directory");
        let state = State::open(dir.path(), "store").expect("opens");
        let replica = state.replica("r");
        for (id, modseq) in [("a", 1), ("b", 2), ("c", 3)] {
            replica.put_mailbox(&id.into(), &receipt("user.x", modseq));
        }
        state.flush();
        // In the file, in memory only, taken away in memory only, never there.
        replica.put_mailbox(&"b".into(), &receipt("user.x", 5));
        replica.remove_mailbox(&"c".into());
        let ids: [UniqueId; 4] = ["d", "c", "b", "a"].map(Into::into);
        let found = replica.mailboxes_of(ids.iter());
        assert_eq!(found, [None, None, Some(receipt("user.x", 5)), Some(receipt("user.x", 1))]);
        let mut all = Vec::new();
        replica.each_mailbox_id(&mut |id| all.push(id));
        assert_eq!(all, ids[2..].iter().rev().cloned().collect::<Vec<_>>());
        replica.set_primed("user x");
        assert_eq!(replica.primed_of(["user y", "user x"].into_iter()), [false, true]);
    }

    #[test]
    fn another_store_or_a_damaged_file_starts_afresh() {
        let dir = tempfile::tempdir().expect("directory");
        State::open(dir.path(), "one").expect("opens").replica("r").put_mailbox(&"a".into(), &receipt("user.a", 1));
        let state = State::open(dir.path(), "two").expect("opens");
        assert_eq!(state.replica("r").mailboxes(), []);
        drop(state);
        std::fs::write(dir.path().join("state.redb"), b"not a database").expect("writes");
        let state = State::open(dir.path(), "two").expect("opens");
        assert_eq!(state.replica("r").mailboxes(), []);
    }

    #[test]
    fn after_a_death_no_lane_counts_as_looked_at() {
        let dir = tempfile::tempdir().expect("directory");
        let primed = |dir: &Path| {
            let state = State::open(dir, "one").expect("opens");
            (state.replica("r").primed("user u1"), state.replica("r").mailbox(&"a".into()).is_some())
        };
        let state = State::open(dir.path(), "one").expect("opens");
        state.replica("r").set_primed("user u1");
        state.replica("r").put_mailbox(&"a".into(), &receipt("user.a", 1));
        state.flush();
        // What is on the disk while it is open is what a killed process leaves.
        let killed = tempfile::tempdir().expect("directory");
        std::fs::copy(dir.path().join("state.redb"), killed.path().join("state.redb")).expect("copies");
        drop(state);
        assert_eq!(primed(dir.path()), (true, true));
        assert_eq!(primed(dir.path()), (true, true));
        assert_eq!(primed(killed.path()), (false, true));
    }

    #[test]
    fn what_was_begun_is_known_after_a_death_and_forgotten_after_a_good_end() {
        let (dir, killed) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
        let ours = |dir: &Path, store: &str| {
            let state = State::open(dir, store).expect("opens");
            (state.replica("r").is_ours(&"a".into()), state.replica("other").is_ours(&"a".into()))
        };
        let state = State::open(dir.path(), "one").expect("opens");
        state.replica("r").begin_mailbox(&"a".into(), None);
        for file in ["state.redb", "begun"] {
            std::fs::copy(dir.path().join(file), killed.path().join(file)).expect("copies");
        }
        drop(state);
        assert_eq!(ours(dir.path(), "one"), (false, false));
        let begun = std::fs::read(killed.path().join("begun")).expect("reads");
        assert_eq!(ours(killed.path(), "one"), (true, false));
        // Another store's mailboxes are none of ours.
        std::fs::write(killed.path().join("begun"), begun).expect("writes");
        assert_eq!(ours(killed.path(), "two"), (false, false));
    }

    #[test]
    fn two_processes_cannot_share_it() {
        let dir = tempfile::tempdir().expect("directory");
        let _held = State::open(dir.path(), "one").expect("opens");
        assert!(matches!(State::open(dir.path(), "one"), Err(StateError::Busy { .. })));
    }

    #[test]
    fn a_copy_of_what_is_held_can_be_read() {
        let dir = tempfile::tempdir().expect("directory");
        assert!(State::open_copy(dir.path(), "one").is_none());
        let state = State::open(dir.path(), "one").expect("opens");
        state.replica("r").put_mailbox(&"a".into(), &receipt("user.a", 1));
        state.memory().put(vec![(b"k".to_vec(), Some(b"v".to_vec()))]);
        state.flush();
        let copy = State::open_copy(dir.path(), "one").expect("is copied");
        assert_eq!(copy.replica("r").mailbox(&"a".into()), Some(receipt("user.a", 1)));
        assert_eq!(copy.memory().get(b"k"), Some(b"v".to_vec()));
        copy.memory().put(vec![(b"k".to_vec(), None)]);
        copy.flush();
        drop(copy);
        assert_eq!(state.memory().get(b"k"), Some(b"v".to_vec()));
        assert!(State::open_copy(dir.path(), "two").is_none());
        let left = std::fs::read_dir(dir.path()).expect("lists").flatten().filter(|entry| entry.path().is_dir());
        assert_eq!(left.count(), 0, "nothing is left over");
    }

    #[test]
    fn an_entry_that_cannot_be_read_counts_as_absent() {
        assert_eq!(unpack::<MailboxReceipt>(b"\x02abc"), None);
        assert_eq!(unpack::<MailboxReceipt>(b"\x01\xff\xff"), None);
        assert_eq!(unpack::<MailboxReceipt>(b""), None);
    }
}
