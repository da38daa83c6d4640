//! One mailbox: index, header and message annotations put together into a consistent snapshot, without a lock.
//!
//! The index header is written last in every commit, so a reading is consistent when the header is the same before and
//! after, its checksum and those of all records are right, and no live record is newer than the header says.

use super::layout::{Layout, MetaFile};
use super::read::{self, TRIES, pause, read_at};
use super::{format_error, io_error, lock};
use crate::cyrus::annotations::{self, Userids};
use crate::cyrus::{header, index};
use crate::model::{
    Body, BodyRef, BodySource, Disposition, Fingerprint, MailboxEntry, MailboxHead, MailboxSnapshot, ModSeq,
    StoreError, Uid,
};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Virtual annotations that are fields of the record from some index version on.
const VIRTUAL: [(&[u8], u32); 3] = [
    (b"/vendor/cmu/cyrus-imapd/thrid", 13),
    (b"/vendor/cmu/cyrus-imapd/savedate", 15),
    (b"/vendor/cmu/cyrus-imapd/createdmodseq", 16),
];

struct Torn;

/// Reads a mailbox without its mailbox-level annotations; `None` when it has no index.
pub(super) fn read_mailbox(layout: &Layout, entry: &MailboxEntry) -> Result<Option<MailboxSnapshot>, StoreError> {
    let paths = layout.meta_files(entry, MetaFile::Index);
    if paths.is_empty() {
        return Err(StoreError::new(
            Disposition::Quarantine,
            format!("{}: partition {} is not in imapd.conf", entry.name, entry.partition),
        ));
    }
    let mut last = None;
    for n in 0..TRIES {
        if n > 0 {
            pause(n);
        }
        let Some((file, path)) = read::open_first(&paths)? else { return Ok(None) };
        lock::wait_for_writer(&file);
        match read_once(layout, entry, &file, path) {
            Ok(Ok(snapshot)) => return Ok(Some(snapshot)),
            Ok(Err(Torn)) => {}
            // A checksum can be wrong because a writer is in the middle of it: damage is what stays.
            Err(error) => last = Some(error),
        }
    }
    Err(last.map(stays).unwrap_or_else(|| {
        StoreError::new(Disposition::RetrySoon, format!("{}: changes faster than it can be read", entry.name))
    }))
}

/// A fault that was there at every try.
fn stays(error: StoreError) -> StoreError {
    if error.message.contains("reconstruct") {
        return StoreError { disposition: Disposition::Quarantine, ..error };
    }
    let cure = "run Cyrus's reconstruct on the mailbox, or restore the file";
    StoreError::new(Disposition::Quarantine, format!("{}; {cure}", error.message))
}

fn read_once(
    layout: &Layout,
    entry: &MailboxEntry,
    file: &File,
    path: &Path,
) -> Result<Result<MailboxSnapshot, Torn>, StoreError> {
    let io = |error: std::io::Error| io_error(path, &error);
    let size = file.metadata().map_err(io)?.len();
    if size > read::MAX_BYTES {
        return Err(StoreError::new(Disposition::Quarantine, format!("{}: {size} bytes are too many", path.display())));
    }
    let head = read_at(file, 0, index::MAX_HEADER_BYTES).map_err(io)?;
    let index_header = index::parse_header(&head).map_err(|error| format_error(path, &error))?;
    let wanted = usize::try_from(index_header.file_bytes().min(size)).unwrap_or(usize::MAX);
    let bytes = read_at(file, 0, wanted).map_err(io)?;
    let header_bytes = index_header.start_offset as usize;
    if bytes.get(..header_bytes) != head.get(..header_bytes) {
        return Ok(Err(Torn));
    }
    let mut records = index::parse_records(&index_header, &bytes).map_err(|error| format_error(path, &error))?;
    if index::uncommitted(&index_header, &records).is_some() {
        return Ok(Err(Torn));
    }
    let (mailbox_header, header_path) = read_header(layout, entry)?;
    read_annotations(layout, entry, &mut records, index_header.minor_version)?;
    let again = read_at(file, 0, header_bytes).map_err(io)?;
    if again.as_slice() != head.get(..header_bytes).unwrap_or_default() || !read::is_same(file, path).unwrap_or(false) {
        return Ok(Err(Torn));
    }
    if index_header.is_deleted() {
        return Err(StoreError::new(Disposition::RetrySoon, format!("{}: is being deleted", entry.name)));
    }
    if !entry.uniqueid.is_empty() && !mailbox_header.uniqueid.is_empty() && mailbox_header.uniqueid != entry.uniqueid {
        return Err(StoreError::new(
            Disposition::RetrySoon,
            format!(
                "{}: uniqueid is {}, mailboxes.db says {}; if that stays so, run reconstruct",
                header_path.display(),
                mailbox_header.uniqueid,
                entry.uniqueid
            ),
        ));
    }
    let head = MailboxHead {
        uniqueid: entry.uniqueid.clone(),
        name: entry.name.clone(),
        mbtype: entry.mbtype.clone(),
        partition: entry.partition.clone(),
        acl: entry.acl.clone(),
        options: index_header.options(),
        uidvalidity: index_header.uidvalidity,
        last_uid: index_header.last_uid,
        highestmodseq: index_header.highestmodseq.max(ModSeq(1)),
        recentuid: index_header.recentuid,
        recenttime: index_header.recenttime,
        last_appenddate: index_header.last_appenddate,
        pop3_last_login: index_header.pop3_last_login,
        pop3_show_after: index_header.pop3_show_after,
        createdmodseq: if index_header.createdmodseq > ModSeq(0) {
            index_header.createdmodseq
        } else {
            entry.createdmodseq
        },
        foldermodseq: entry.foldermodseq,
        xconvmodseq: ModSeq(0),
        raclmodseq: ModSeq(0),
        quotaroot: mailbox_header.quotaroot,
    };
    Ok(Ok(MailboxSnapshot {
        head,
        deletedmodseq: index_header.deletedmodseq,
        minor_version: index_header.minor_version,
        user_flags: mailbox_header.user_flags,
        annotations: Vec::new(),
        records,
    }))
}

fn read_header(layout: &Layout, entry: &MailboxEntry) -> Result<(header::MailboxHeader, PathBuf), StoreError> {
    let paths = layout.meta_files(entry, MetaFile::Header);
    let Some((file, path)) = read::open_first(&paths)? else {
        let path = paths.into_iter().next().unwrap_or_default();
        return Err(StoreError::new(
            Disposition::RetrySoon,
            format!("{}: is missing; if that stays so, run reconstruct", path.display()),
        ));
    };
    let bytes = read::read_whole(&file, path)?;
    let parsed = header::parse(&bytes).map_err(|error| format_error(path, &error))?;
    Ok((parsed, path.to_owned()))
}

/// Uniqueid as cyrus.header says it, for stores whose list has none (2.3, 2.4).
pub(super) fn uniqueid_of(layout: &Layout, entry: &MailboxEntry) -> Result<crate::model::UniqueId, StoreError> {
    read_header(layout, entry).map(|(header, _)| header.uniqueid)
}

fn read_annotations(
    layout: &Layout,
    entry: &MailboxEntry,
    records: &mut [crate::model::Record],
    minor_version: u32,
) -> Result<(), StoreError> {
    let paths = layout.meta_files(entry, MetaFile::Annotations);
    let map = read::read_db(&paths)?;
    if map.is_empty() {
        return Ok(());
    }
    let path = paths.first().cloned().unwrap_or_default();
    let owner = entry.name.owner();
    let mut by_uid = annotations::of_messages(&map, Userids { owner: owner.as_ref(), carets: layout.carets })
        .map_err(|error| format_error(&path, &error))?;
    for record in records {
        if let Some(mut list) = by_uid.remove(&record.uid) {
            list.retain(|annotation| {
                let field = VIRTUAL.iter().find(|(name, _)| *name == annotation.entry);
                field.is_none_or(|(_, since)| minor_version < *since)
            });
            record.annotations = list;
        }
    }
    Ok(())
}

/// Mark of a mailbox's files and its row in the list.
pub(super) fn fingerprint(layout: &Layout, entry: &MailboxEntry) -> Result<Option<Fingerprint>, StoreError> {
    let paths = layout.meta_files(entry, MetaFile::Index);
    let Some((file, path)) = read::open_first(&paths)? else { return Ok(None) };
    let io = |error: std::io::Error| io_error(path, &error);
    let mut hash = blake3::Hasher::new();
    hash.update(&read::stamp(&file.metadata().map_err(io)?));
    hash.update(&read_at(&file, 0, index::MAX_HEADER_BYTES).map_err(io)?);
    for file in [MetaFile::Header, MetaFile::Annotations] {
        let found = layout.meta_files(entry, file).into_iter().find_map(|path| std::fs::metadata(path).ok());
        hash.update(&found.map_or([0; 32], |meta| read::stamp(&meta)));
    }
    for part in [entry.name.as_bytes(), entry.partition.as_bytes(), &entry.acl, entry.mbtype.0.as_bytes()] {
        hash.update(&(part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.update(&entry.foldermodseq.0.to_be_bytes());
    Ok(Some(Fingerprint(hash.finalize().as_bytes().to_vec())))
}

/// Message files of one mailbox.
pub(super) struct SpoolBodies {
    /// The spool first, then the archive partition: an archived file is found in the second place.
    dirs: Vec<PathBuf>,
}

impl SpoolBodies {
    pub(super) fn new(layout: &Layout, entry: &MailboxEntry) -> Self {
        Self { dirs: layout.message_dirs(entry) }
    }

    fn paths(&self, uid: Uid) -> Vec<PathBuf> {
        self.dirs.iter().map(|dir| dir.join(format!("{}.", uid.0))).collect()
    }
}

impl BodySource for SpoolBodies {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        let paths = self.paths(body.uid);
        let Some((file, path)) = read::open_first(&paths)? else {
            let path = paths.into_iter().next().unwrap_or_default();
            return Err(StoreError::new(
                Disposition::RetrySoon,
                format!(
                    "{}: message file is missing though the index has it; if that stays so, run reconstruct",
                    path.display()
                ),
            ));
        };
        let size = file.metadata().map_err(|error| io_error(path, &error))?.len();
        if size != body.size {
            return Err(StoreError::new(
                Disposition::Quarantine,
                format!(
                    "{}: has {size} bytes, the index says {}; it is not sent; restore it or run reconstruct",
                    path.display(),
                    body.size
                ),
            ));
        }
        Ok(Body { size, reader: Box::new(file) })
    }

    fn exists(&self, uid: Uid) -> bool {
        self.paths(uid).iter().any(|path| path.exists())
    }

    fn has_copies(&self, uid: Uid) -> bool {
        self.paths(uid).iter().find_map(|path| std::fs::metadata(path).ok()).is_some_and(|meta| meta.nlink() > 1)
    }
}
