//! One mailbox: index, header and message annotations put together into a consistent snapshot, without a lock.
//!
//! The index header is written last in every commit, so a reading is consistent when the header is the same before and
//! after, its checksum and those of all records are right, and no live record is newer than the header says.

use super::history::{History, LAST_WITHOUT};
use super::layout::{Layout, MetaFile};
use super::read::{self, SHARE_FROM, SHARE_PATIENCE, TRIES, pause, read_at};
use super::{format_error, io_error, lock};
use crate::cyrus::annotations::{self, Userids};
use crate::cyrus::{self, FormatError, db, header, index};
use crate::model::{
    Body, BodyRef, BodySource, Disposition, Fingerprint, MailboxEntry, MailboxSnapshot, Options, Record, StoreError,
    SystemFlags, Uid, UniqueId,
};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// So often cyrus.header must be found to be of another mailbox before that is believed.
const OTHERS: u32 = 4;

/// Virtual annotations that are fields of the record from some index version on.
const VIRTUAL: [(&[u8], u32); 3] = [
    (b"/vendor/cmu/cyrus-imapd/thrid", 13),
    (b"/vendor/cmu/cyrus-imapd/savedate", 15),
    (b"/vendor/cmu/cyrus-imapd/createdmodseq", 16),
];

/// Why one reading was no good.
enum Spoilt {
    /// Changed under our hands.
    Torn,
    /// cyrus.header is of another mailbox than the list's row.
    Other { header: PathBuf, uniqueid: UniqueId },
}

/// What is known of writers at the time of a reading.
#[derive(Clone, Copy)]
struct Writer {
    /// Nobody was at work, before or after; of a Cyrus that locks with flock(2) that is not seen.
    calm: bool,
    /// Everybody was kept away.
    settled: bool,
    /// It may be that the next reading finds it otherwise.
    early: bool,
}

/// The bytes of one mailbox's files, read while no commit happened.
struct Files {
    index: Vec<u8>,
    header: Vec<u8>,
    header_path: PathBuf,
    annotations: Option<(Vec<u8>, PathBuf)>,
    /// The annotations were written after the index.
    annotations_are_newer: bool,
    /// `cyrus.expunge` of 2.3.
    expunge: Option<(Vec<u8>, PathBuf)>,
}

/// Reads a mailbox without its mailbox-level annotations; `None` when it has no index. `list_is_right` is asked, with
/// what was found, when cyrus.header names another uniqueid than the list and goes on to do so.
pub(super) fn read_mailbox(
    layout: &Layout,
    entry: &MailboxEntry,
    mut trust_list: bool,
    list_is_right: &dyn Fn(&str) -> Result<bool, StoreError>,
) -> Result<Option<MailboxSnapshot>, StoreError> {
    let paths = layout.meta_files(entry, MetaFile::Index);
    if paths.is_empty() {
        return Err(StoreError::new(
            Disposition::Quarantine,
            format!("{}: partition {} is not in imapd.conf", entry.name, entry.partition),
        ));
    }
    let (mut last, mut others) = (None, 0);
    for n in 0..TRIES {
        if n > 0 {
            pause(n);
        }
        let Some((file, path)) = read::open_first(&paths)? else { return Ok(None) };
        let calm = lock::wait_for_writer(&file);
        let shared = (n >= SHARE_FROM).then(|| lock::share(&file, SHARE_PATIENCE)).flatten();
        let settled = shared.is_some();
        let files = match gather(layout, entry, &file, path) {
            // A writer came while we read, so what stands beside the index may be ahead of it. One that was there before
            // is not waited for any longer: what it has not committed shows.
            Ok(Some(_)) if calm && !settled && n < SHARE_FROM && lock::is_locked(&file) => continue,
            Ok(Some(files)) => files,
            Ok(None) => continue,
            Err(error) => {
                last = Some(error);
                continue;
            }
        };
        drop(shared);
        match digest(layout, entry, files, path, Writer { calm, settled, early: n < SHARE_FROM }, trust_list) {
            Ok(Ok(snapshot)) => return Ok(Some(snapshot)),
            Ok(Err(Spoilt::Torn)) => {}
            Ok(Err(Spoilt::Other { header, uniqueid })) => {
                others += 1;
                if others < OTHERS {
                    continue;
                }
                let message =
                    format!("{}: uniqueid is {uniqueid}, mailboxes.db says {}", header.display(), entry.uniqueid);
                if !list_is_right(&message)? {
                    return Err(StoreError::new(Disposition::RetrySoon, message));
                }
                trust_list = true;
            }
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
    // What was no passing trouble to begin with has been told with its cure.
    if error.disposition != Disposition::RetrySoon {
        return error;
    }
    let cure = "run Cyrus's reconstruct on the mailbox, or restore the file";
    StoreError::new(Disposition::Quarantine, format!("{}; {cure}", error.message))
}

/// `None` when a commit happened meanwhile.
fn gather(layout: &Layout, entry: &MailboxEntry, file: &File, path: &Path) -> Result<Option<Files>, StoreError> {
    let io = |error: std::io::Error| io_error(path, &error);
    let size = file.metadata().map_err(io)?.len();
    if size > read::MAX_BYTES {
        return Err(StoreError::new(Disposition::Quarantine, format!("{}: {size} bytes are too many", path.display())));
    }
    let head = read_at(file, 0, index::MAX_HEADER_BYTES).map_err(io)?;
    let parsed = index::parse_header(&head).map_err(|error| format_error(path, &error))?;
    let wanted = usize::try_from(parsed.file_bytes().min(size)).unwrap_or(usize::MAX);
    let index = read_at(file, 0, wanted).map_err(io)?;
    let header_bytes = parsed.start_offset as usize;
    let committed = head.get(..header_bytes).unwrap_or_default();
    if index.get(..header_bytes) != Some(committed) {
        return Ok(None);
    }
    let (header, header_path) = header_bytes_of(layout, entry)?;
    let mut annotations_are_newer = false;
    let annotations = match read::open_first(&layout.meta_files(entry, MetaFile::Annotations))? {
        None => None,
        Some((annotations, path)) => match read::read_unreplaced(&annotations, path)? {
            None => return Ok(None),
            Some(bytes) => {
                let written = |file: &File| file.metadata().and_then(|meta| meta.modified()).ok();
                annotations_are_newer = written(&annotations) > written(file);
                Some((bytes, path.to_owned()))
            }
        },
    };
    let expunge = match read::open_first(&layout.meta_files(entry, MetaFile::Expunge))? {
        Some((file, path)) if parsed.minor_version <= LAST_WITHOUT => {
            Some((read::read_whole(&file, path)?, path.to_owned()))
        }
        _ => None,
    };
    let again = read_at(file, 0, header_bytes).map_err(io)?;
    if again != committed || !read::is_same(file, path).unwrap_or(false) {
        return Ok(None);
    }
    Ok(Some(Files { index, header, header_path, annotations, annotations_are_newer, expunge }))
}

fn digest(
    layout: &Layout,
    entry: &MailboxEntry,
    files: Files,
    path: &Path,
    writer: Writer,
    trust_list: bool,
) -> Result<Result<MailboxSnapshot, Spoilt>, StoreError> {
    let index_error = |error| format_error(path, &error);
    let index_header = index::parse_header(&files.index).map_err(index_error)?;
    let mut records = index::parse_records(&index_header, &files.index).map_err(index_error)?;
    if index::uncommitted(&index_header, &records).is_some() && !writer.settled {
        return Ok(Err(Spoilt::Torn));
    }
    if index_header.is_deleted() {
        return Err(StoreError::new(Disposition::RetrySoon, format!("{}: is being deleted", entry.name)));
    }
    if let Some((bytes, path)) = &files.expunge {
        add_expunged(bytes, &mut records).map_err(|error| format_error(path, &error))?;
    }
    let mailbox_header = header::parse(&files.header).map_err(|error| format_error(&files.header_path, &error))?;
    let known = !entry.uniqueid.is_empty() && !mailbox_header.uniqueid.is_empty();
    if known && mailbox_header.uniqueid != entry.uniqueid && !trust_list {
        return Ok(Err(Spoilt::Other { header: files.header_path, uniqueid: mailbox_header.uniqueid }));
    }
    if let Some((bytes, path)) = &files.annotations {
        // They are committed before the index, fsyncs between. What belongs to a commit that is not complete would be
        // sent at the modseq of the one before, and taken for a damage of the replica.
        let ahead = || {
            let highest = db::parse(bytes).map(|map| annotations::highest_modseq(&map)).unwrap_or_default();
            let is_later = highest > index_header.highestmodseq && (writer.early || !writer.calm);
            is_later || files.annotations_are_newer && !writer.calm
        };
        if !writer.settled && ahead() {
            return Ok(Err(Spoilt::Torn));
        }
        add_annotations(layout, entry, bytes, &mut records, index_header.minor_version)
            .map_err(|error| format_error(path, &error))?;
    }
    // Above the header's only after a crash between two writes (no writer is at work): IMAP shows these records, and the
    // header says so with the next commit.
    let highest = records.iter().map(|record| record.modseq).max().unwrap_or_default();
    let head = cyrus::head_of(entry, &index_header, &mailbox_header, highest);
    Ok(Ok(MailboxSnapshot {
        head,
        deletedmodseq: index_header.deletedmodseq,
        minor_version: index_header.minor_version,
        user_flags: mailbox_header.user_flags,
        annotations: Vec::new(),
        records,
    }))
}

fn header_bytes_of(layout: &Layout, entry: &MailboxEntry) -> Result<(Vec<u8>, PathBuf), StoreError> {
    let paths = layout.meta_files(entry, MetaFile::Header);
    let Some((file, path)) = read::open_first(&paths)? else {
        let path = paths.into_iter().next().unwrap_or_default();
        return Err(StoreError::new(
            Disposition::RetrySoon,
            format!("{}: is missing; if that stays so, run reconstruct", path.display()),
        ));
    };
    Ok((read::read_whole(&file, path)?, path.to_owned()))
}

/// Uniqueid as cyrus.header says it, for stores whose list has none (2.3, 2.4).
pub(super) fn uniqueid_of(layout: &Layout, entry: &MailboxEntry) -> Result<UniqueId, StoreError> {
    let (bytes, path) = header_bytes_of(layout, entry)?;
    header::parse(&bytes).map(|header| header.uniqueid).map_err(|error| format_error(&path, &error))
}

/// Records that 2.3 moved into a file of their own, in the order they were expunged. One that is in both files is live.
fn add_expunged(bytes: &[u8], records: &mut Vec<Record>) -> Result<(), FormatError> {
    if bytes.is_empty() {
        return Ok(());
    }
    let header = index::parse_header(bytes)?;
    let live = records.len();
    for mut found in index::parse_unsorted(&header, bytes)? {
        let known = records.get(..live).unwrap_or_default();
        if known.binary_search_by_key(&found.record.uid, |record| record.uid).is_err() {
            found.record.system_flags.0 |= SystemFlags::EXPUNGED;
            records.push(found.record);
        }
    }
    // A message can be expunged, brought back and expunged again.
    records.sort_by_key(|record| (record.uid, std::cmp::Reverse(record.last_updated)));
    records.dedup_by_key(|record| record.uid);
    Ok(())
}

/// Whether the index of this mailbox is of a release whose files do not tell its history; with its options.
pub(super) fn lacks_history(head: &[u8]) -> Option<Options> {
    let header = index::parse_header(head).ok()?;
    (header.minor_version <= LAST_WITHOUT).then(|| header.options())
}

fn add_annotations(
    layout: &Layout,
    entry: &MailboxEntry,
    bytes: &[u8],
    records: &mut [Record],
    minor_version: u32,
) -> Result<(), FormatError> {
    let map = db::parse(bytes)?;
    if map.is_empty() {
        return Ok(());
    }
    let owner = layout.owner(&entry.name);
    let userids = Userids { owner: owner.as_ref(), carets: layout.carets };
    let mut by_uid = annotations::of_messages(&map, userids)?;
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
pub(super) fn fingerprint(
    layout: &Layout,
    entry: &MailboxEntry,
    history: &History,
) -> Result<Option<Fingerprint>, StoreError> {
    let paths = layout.meta_files(entry, MetaFile::Index);
    let Some((file, path)) = read::open_first(&paths)? else { return Ok(None) };
    let io = |error: std::io::Error| io_error(path, &error);
    let mut hash = blake3::Hasher::new();
    hash.update(&read::stamp(&file.metadata().map_err(io)?));
    let head = read_at(&file, 0, index::MAX_HEADER_BYTES).map_err(io)?;
    hash.update(&head);
    if let Some(options) = lacks_history(&head) {
        let shared = options.0 & Options::SHARED_SEEN != 0;
        history.note(&entry.uniqueid, shared);
        hash.update(&history.seen_mark(layout, entry, shared)?);
    }
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

    fn place(&self, uid: Uid) -> Option<String> {
        let paths = self.paths(uid);
        let path = paths.iter().find(|path| path.exists()).or(paths.first());
        path.map(|path| path.display().to_string())
    }

    fn is_there(&self) -> bool {
        self.dirs.iter().any(|dir| dir.is_dir())
    }

    fn exists(&self, uid: Uid) -> bool {
        self.paths(uid).iter().any(|path| path.exists())
    }

    fn has_copies(&self, uid: Uid) -> bool {
        self.paths(uid).iter().find_map(|path| std::fs::metadata(path).ok()).is_some_and(|meta| meta.nlink() > 1)
    }
}
