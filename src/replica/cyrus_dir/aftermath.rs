//! What a writer that was cut off has left, or a disk that refused something: usage that was not counted, files that nobody knows.

use super::DirError;
use super::held;
use super::store::{Store, lock, stage_dir};
use crate::cyrus::index::IndexHeader;
use crate::cyrus::quota::Usage;
use crate::model::{MailboxEntry, QuotaRoot, Uid};
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

impl Store {
    /// When the last one to write did not come to its end. In these directories an index was written just now: what names
    /// came after it was written last is not to be seen there.
    pub(super) fn after_a_crash(&self, written_again: &[PathBuf]) -> Result<(), DirError> {
        for root in self.places.partitions().values() {
            let dir = stage_dir(root);
            self.disk.remove_tree(&dir).map_err(|error| DirError::io(&dir, error))?;
        }
        for dir in written_again {
            if let Ok(Some(index)) = held::read_index_header(dir) {
                self.sweep_all(dir, &index)?;
            }
        }
        self.recount()
    }

    /// Something could not be written.
    pub fn failed(&self) {
        self.miscounted.store(true, Ordering::Relaxed);
    }

    /// Before anything is changed after that.
    pub fn settle(&self) -> Result<(), DirError> {
        if self.miscounted.load(Ordering::Relaxed) {
            // Nobody is between a mailbox and its quota root.
            let _all: Vec<MutexGuard<'_, ()>> = self.stripes.iter().map(lock).collect();
            self.recount()?;
            self.miscounted.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Sums up what is in use below every root, and takes away what no index names.
    fn recount(&self) -> Result<(), DirError> {
        let mut usages: BTreeMap<QuotaRoot, Usage> = BTreeMap::new();
        let entries: Vec<MailboxEntry> = lock(&self.list).rows.iter().cloned().collect();
        let mut quotas = lock(&self.quotas);
        for entry in entries.iter().filter(|entry| !entry.mbtype.is_intermediate()) {
            let dir = self.dir(entry)?;
            let Ok(Some(index)) = held::read_index_header(&dir) else { continue };
            self.sweep(&dir, &index)?;
            // What the files say counts: a root that was set and not yet given to its mailboxes has none of them.
            let Ok(Some(root)) = held::quotaroot_at(&dir) else { continue };
            let (taken, usage) = (held::taken(&index), usages.entry(root).or_default());
            usage.storage += taken.storage;
            usage.messages += taken.messages;
            usage.annotations += taken.annotations;
            usage.folders += 1;
        }
        let roots: Vec<QuotaRoot> = quotas.iter().map(|(root, _)| root.clone()).collect();
        for root in roots {
            let usage = usages.remove(&root).unwrap_or_default();
            quotas.put_usage(&self.places, &self.disk, &root, usage)?;
        }
        Ok(())
    }

    /// Takes away messages that came and were never acknowledged: their UIDs are above the last one that the index has given
    /// out. `reconstruct` would take them for lost ones. Names are listed only where one came or went after the index was
    /// written last, or where records stand behind those that count.
    fn sweep(&self, dir: &Path, index: &IndexHeader) -> Result<(), DirError> {
        let look = |path: &Path| std::fs::metadata(path).and_then(|meta| Ok((meta.modified()?, meta.len())));
        let (Ok((names, _)), Ok((written, bytes))) = (look(dir), look(&held::index_path(dir))) else { return Ok(()) };
        if names < written && bytes <= index.file_bytes() {
            return Ok(());
        }
        self.sweep_all(dir, index)
    }

    fn sweep_all(&self, dir: &Path, index: &IndexHeader) -> Result<(), DirError> {
        for entry in std::fs::read_dir(dir).map_err(|error| DirError::io(dir, error))?.flatten() {
            if uid_of(entry.file_name().as_bytes()).is_some_and(|uid| uid > index.last_uid) {
                let path = entry.path();
                self.disk.remove(&path).map_err(|error| DirError::io(&path, error))?;
            }
        }
        Ok(())
    }
}

/// The UID in the name of a message file.
fn uid_of(name: &[u8]) -> Option<Uid> {
    let digits = name.strip_suffix(b".").filter(|digits| digits.iter().all(u8::is_ascii_digit))?;
    std::str::from_utf8(digits).ok()?.parse().ok().map(Uid)
}
