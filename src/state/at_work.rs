//! Which lanes are being worked on, so that whoever comes after us knows what a dead session may still change.
//!
//! A replica carries out what it has read, also when its client is gone: what the next life finds there may change once more
//! behind its back. A slot is one write of a few bytes into the page cache, without `fsync`: it has to survive us, not the
//! machine (after whose restart no request is on its way any more).

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tracing::warn;

/// A power of two, so that no slot lies on two pages: a write is there as a whole or not at all.
const SLOT_BYTES: usize = 2048;

#[derive(Clone)]
pub(super) struct AtWork(Arc<Mutex<Inner>>);

struct Inner {
    file: Option<File>,
    /// By slot, what stands there.
    slots: Vec<Option<Vec<u8>>>,
}

/// A lane that is written down; dropping it takes it out again.
pub struct Slot {
    owner: AtWork,
    number: usize,
}

impl AtWork {
    /// With the slots of those before us, which stay taken.
    pub fn open(path: &Path, fresh: bool) -> Self {
        let bytes = if fresh { Vec::new() } else { std::fs::read(path).unwrap_or_default() };
        let slots = bytes.chunks_exact(SLOT_BYTES).map(entry).collect();
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(fresh).open(path);
        if let Err(error) = &file {
            warn!(path = %path.display(), %error, "what is at work cannot be remembered");
        }
        Self(Arc::new(Mutex::new(Inner { file: file.ok(), slots })))
    }

    /// What others left behind when they died, each time it is asked.
    pub fn left(&self) -> Vec<(Slot, Vec<u8>)> {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let left = inner.slots.iter().enumerate().filter_map(|(number, what)| Some((number, what.clone()?)));
        left.map(|(number, what)| (Slot { owner: self.clone(), number }, what)).collect()
    }

    /// `None` where it is too long to be written down; no name that Cyrus allows is.
    pub fn take(&self, what: Vec<u8>) -> Option<Slot> {
        let length = u16::try_from(what.len()).ok().filter(|length| usize::from(*length) <= SLOT_BYTES - 2)?;
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = inner.slots.iter().position(Option::is_none).unwrap_or(inner.slots.len());
        let mut text = vec![0; SLOT_BYTES];
        text.splice(..2, length.to_be_bytes());
        text.splice(2..2 + what.len(), what.iter().copied());
        inner.write(number, &text);
        match inner.slots.get_mut(number) {
            Some(slot) => *slot = Some(what),
            None => inner.slots.push(Some(what)),
        }
        Some(Slot { owner: self.clone(), number })
    }
}

fn entry(slot: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = slot.split_first_chunk::<2>()?;
    let length = usize::from(u16::from_be_bytes(*length));
    rest.get(..length).filter(|what| !what.is_empty()).map(<[u8]>::to_vec)
}

impl Inner {
    fn write(&self, number: usize, bytes: &[u8]) {
        if let Some(file) = &self.file
            && let Err(error) = file.write_all_at(bytes, (number * SLOT_BYTES) as u64)
        {
            warn!(%error, "what is at work cannot be remembered");
        }
    }
}

impl Slot {
    /// It stays written down for those after us.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut inner = self.owner.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = inner.slots.get_mut(self.number) {
            *slot = None;
        }
        inner.write(self.number, &[0, 0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_dead_worked_on_is_known_until_it_is_given_back() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("at-work");
        let left = |at_work: &AtWork| -> Vec<Vec<u8>> {
            at_work.left().into_iter().map(|(slot, what)| (slot.keep(), what).1).collect()
        };
        let first = AtWork::open(&path, false);
        let (one, two) = (first.take(b"one".to_vec()).expect("fits"), first.take(b"two".to_vec()).expect("fits"));
        drop(one);
        first.take(b"three".to_vec()).expect("fits").keep();
        assert!(first.take(vec![b'x'; SLOT_BYTES - 1]).is_none());
        two.keep();
        let second = AtWork::open(&path, false);
        assert_eq!(left(&second), [b"three".to_vec(), b"two".to_vec()]);
        second.take(b"four".to_vec()).expect("fits").keep();
        drop(second.left());
        assert_eq!(left(&AtWork::open(&path, false)), Vec::<Vec<u8>>::new());
        std::fs::write(&path, [0xff; SLOT_BYTES + 7]).expect("damaged");
        assert_eq!(left(&AtWork::open(&path, false)), Vec::<Vec<u8>>::new());
        first.take(b"five".to_vec()).expect("fits").keep();
        assert_eq!(left(&AtWork::open(&path, true)), Vec::<Vec<u8>>::new());
    }
}
