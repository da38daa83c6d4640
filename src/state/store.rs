//! The database behind the receipts.

use super::ReplicaState;
use super::at_work::AtWork;
use super::intents::Intents;
use crate::model::{Memory, Pulse, pulse};
use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
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

pub(super) struct Inner {
    /// `None` only while it cannot be opened anew.
    db: RwLock<Option<Database>>,
    path: PathBuf,
    pub(super) begun: Intents,
    pub(super) at_work: AtWork,
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

    pub(super) fn put(&self, key: Vec<u8>, value: Option<Vec<u8>>) {
        self.put_all(std::iter::once((key, value)));
    }

    /// In one transaction: what is in the overlay at one moment is committed together.
    pub(super) fn put_all(&self, entries: impl Iterator<Item = (Vec<u8>, Option<Vec<u8>>)>) {
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

    pub(super) fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        if let Some((_, value)) = self.lock().overlay.get(key) {
            return value.clone();
        }
        let read = self.begin_read()?;
        let table = read.open_table(ENTRIES).ok()?;
        table.get(key).ok()?.map(|value| value.value().to_vec())
    }

    /// The entries of these keys, in their order.
    pub(super) fn get_all(&self, keys: impl Iterator<Item = Vec<u8>>, call: &mut dyn FnMut(Option<&[u8]>)) {
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
    pub(super) fn each(&self, prefix: &[u8], call: &mut dyn FnMut(&[u8], &[u8])) {
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

    pub(super) fn flush(&self) {
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

pub(super) fn pack<T: Serialize>(value: &T) -> Option<Vec<u8>> {
    let mut out = vec![VALUE_VERSION];
    out.extend(postcard::to_stdvec(value).ok()?);
    Some(out)
}

/// An entry that cannot be read counts as absent: its key is compared again.
pub(super) fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    postcard::from_bytes(bytes.strip_prefix(&[VALUE_VERSION])?).ok()
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
