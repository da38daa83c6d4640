//! Keeps a database's map up to date while the server appends to the file. Pure: the file is reached through a closure.

use super::{BACKENDS, Fault, FormatError, Kind, Map, Mark};
use std::collections::BTreeMap;
use std::io;

/// Reads up to that many bytes at that offset of one open file; fewer only where the file ends, none beyond it. Must
/// not set memory aside for a length the file does not have.
pub type ReadAt<'a> = dyn FnMut(u64, usize) -> io::Result<Vec<u8>> + 'a;

/// Applies what was committed after the mark; `false` means that only a full read can tell.
pub(super) type Tail = fn(&mut Edit<'_>, &mut Mark, &mut ReadAt<'_>) -> Result<bool, FollowError>;

/// The file could not be read, or not be understood.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Format(#[from] FormatError),
}

impl FollowError {
    /// Try again in a moment; see [`FormatError::is_torn`].
    pub fn is_torn(&self) -> bool {
        matches!(self, Self::Format(error) if error.is_torn())
    }
}

/// One key whose value is not what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub key: Vec<u8>,
    pub old: Option<Vec<u8>>,
    pub new: Option<Vec<u8>>,
}

/// What an update found. A key that came back to its old value is not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The whole file was read again (first time, repack, replaced file); `changed` is right all the same.
    pub reloaded: bool,
    /// Ascending by key.
    pub changed: Vec<Change>,
}

/// Remembers one database file: its map, and how far into which inode it was read.
#[derive(Debug, Default)]
pub struct Follower {
    state: Option<State>,
    map: Map,
}

#[derive(Debug)]
struct State {
    ino: u64,
    kind: Kind,
    mark: Mark,
}

/// Bytes asked for at once when a file is read to its end.
const CHUNK: usize = 1 << 20;

impl Follower {
    pub fn new() -> Self {
        Self::default()
    }

    /// Everything the database held at the last successful update.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// What the file was at the last successful update.
    pub fn kind(&self) -> Option<Kind> {
        self.state.as_ref().map(|state| state.kind)
    }

    /// Brings the map up to date with the file that `read` reads and whose inode number is `ino`. After an error the map
    /// is as before. The caller keeps the file open from one update to the next, because the number of a closed one may
    /// be given to its successor (seen with a skiplist that is rewritten on every open); and checks afterwards that the path still leads to this inode, and calls again with the
    /// new file if not: until then the answer is true only of a file that may have been replaced.
    pub fn update(&mut self, ino: u64, read: &mut ReadAt<'_>) -> Result<Changes, FollowError> {
        if let Some(changed) = self.update_from_tail(ino, read)? {
            return Ok(Changes { reloaded: false, changed });
        }
        let bytes = read_to_end(0, read)?;
        let had_header = matches!(self.kind(), Some(Kind::Twoskip | Kind::Skiplist));
        if bytes.is_empty() && had_header {
            return Err(super::fault(Fault::Torn("file is empty: it was probably replaced")).into());
        }
        let (kind, loaded) = super::load(&bytes)?;
        let changed = differences(&self.map, &loaded.map);
        self.map = loaded.map;
        self.state = Some(State { ino, kind, mark: loaded.mark });
        Ok(Changes { reloaded: true, changed })
    }

    fn update_from_tail(&mut self, ino: u64, read: &mut ReadAt<'_>) -> Result<Option<Vec<Change>>, FollowError> {
        let Some(state) = self.state.as_mut().filter(|state| state.ino == ino) else { return Ok(None) };
        let backend = BACKENDS.iter().find(|backend| backend.kind == state.kind);
        let Some(tail) = backend.and_then(|backend| backend.tail) else { return Ok(None) };
        let mut mark = state.mark;
        let mut edit = Edit { map: &mut self.map, before: BTreeMap::new() };
        match tail(&mut edit, &mut mark, read) {
            Ok(true) => {
                state.mark = mark;
                Ok(Some(edit.changes()))
            }
            Ok(false) => {
                edit.undo();
                Ok(None)
            }
            Err(error) => {
                edit.undo();
                Err(error)
            }
        }
    }
}

/// A map being changed, with what is needed to take everything back.
pub(super) struct Edit<'a> {
    map: &'a mut Map,
    before: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Edit<'_> {
    pub(super) fn map(&self) -> &Map {
        self.map
    }

    pub(super) fn set(&mut self, key: &[u8], value: &[u8]) {
        let old = self.map.insert(key.to_vec(), value.to_vec());
        self.before.entry(key.to_vec()).or_insert(old);
    }

    /// False when there is no such key.
    pub(super) fn remove(&mut self, key: &[u8]) -> bool {
        let Some(old) = self.map.remove(key) else { return false };
        self.before.entry(key.to_vec()).or_insert(Some(old));
        true
    }

    fn undo(self) {
        for (key, old) in self.before {
            match old {
                Some(old) => self.map.insert(key, old),
                None => self.map.remove(&key),
            };
        }
    }

    fn changes(self) -> Vec<Change> {
        let Self { map, before } = self;
        let changes = before.into_iter().map(|(key, old)| Change { new: map.get(&key).cloned(), key, old });
        changes.filter(|change| change.old != change.new).collect()
    }
}

fn differences(old: &Map, new: &Map) -> Vec<Change> {
    let mut changes: Vec<Change> = new
        .iter()
        .filter(|(key, value)| old.get(*key) != Some(value))
        .map(|(key, value)| Change { key: key.clone(), old: old.get(key).cloned(), new: Some(value.clone()) })
        .chain(old.iter().filter(|(key, _)| !new.contains_key(*key)).map(|(key, value)| Change {
            key: key.clone(),
            old: Some(value.clone()),
            new: None,
        }))
        .collect();
    changes.sort_by(|left, right| left.key.cmp(&right.key));
    changes
}

/// Everything from `offset` to the end of the file.
pub(super) fn read_to_end(offset: u64, read: &mut ReadAt<'_>) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    loop {
        let piece = read(offset.saturating_add(all.len() as u64), CHUNK)?;
        all.extend_from_slice(&piece);
        if piece.len() < CHUNK {
            return Ok(all);
        }
    }
}
