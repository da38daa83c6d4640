//! One mailbox as its files hold it: read, and written back in the order that keeps it whole. Message files come before,
//! the index last; its header is the commit.

use super::DirError;
use super::disk::{self, Disk};
use crate::archive::{ANNOT_RULE, Change, Mailbox, merge};
use crate::cyrus::annotations::{self, Userids};
use crate::cyrus::bytes::crc32;
use crate::cyrus::db::{self, Map};
use crate::cyrus::header::{self, MailboxHeader};
use crate::cyrus::index::{self, IndexHeader, IndexRecord};
use crate::cyrus::{self, synccrc};
use crate::model::{
    Annotation, FlagName, MailboxEntry, MailboxHead, MailboxView, ModSeq, Options, QuotaRoot, Record, SyncCrcs,
    SystemFlags, Uid, UserFlags, UserId,
};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

/// The version that is written: 3.4 and later read it, and it has a place for all that replication carries.
const MINOR_VERSION: u32 = 17;

const SNOOZED: u32 = 0x0400_0000;
const SNOOZED_ENTRY: &[u8] = b"/vendor/cmu/cyrus-imapd/snoozed";

/// What the message file says about a record.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Facts {
    pub header_size: u32,
    pub sentdate: i64,
    pub gmtime: i64,
}

/// The parsed files of a mailbox.
#[derive(Clone, Debug)]
pub(super) struct Held {
    dir: PathBuf,
    header: MailboxHeader,
    /// `cyrus.header` as it is; empty where there is none, or where it is not known.
    header_bytes: Vec<u8>,
    index: IndexHeader,
    /// All that stands in the index, with the bits that are only this server's.
    records: Vec<IndexRecord>,
    /// What replication sees of it.
    pub mailbox: Mailbox,
    /// `cyrus.index` as it is, as far as it counts.
    file_bytes: u64,
    /// No row of the list names this mailbox yet.
    fresh: bool,
}

/// An index to which records were appended, if any, before its header makes them count.
pub(super) struct Appending<'a> {
    pub file: &'a File,
    pub path: &'a Path,
    pub offset: u64,
    pub records: &'a [u8],
    pub header: &'a [u8],
}

impl Appending<'_> {
    /// The disk has the records.
    pub fn sync(&self, disk: &Disk) -> Result<(), DirError> {
        match self.records.is_empty() {
            true => Ok(()),
            false => disk.sync(self.file, self.path).map_err(|error| DirError::io(self.path, error)),
        }
    }
}

/// How the header of an index gets to the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Commit {
    Now,
    /// It was promised.
    Later,
}

/// Brings to the disk what a commit stands on, with it the records that were appended, or promises all of it.
pub(super) type BeforeCommit<'a> = &'a mut dyn FnMut(Option<&Appending<'_>>) -> Result<Commit, DirError>;

/// Nothing but the records.
pub(super) fn records_only(disk: &Disk) -> impl FnMut(Option<&Appending<'_>>) -> Result<Commit, DirError> {
    |index| index.map_or(Ok(()), |index| index.sync(disk)).map(|()| Commit::Now)
}

/// What a mailbox takes of its quota root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    pub storage: u64,
    pub messages: u64,
    pub annotations: u64,
}

pub(super) fn index_path(dir: &Path) -> PathBuf {
    dir.join("cyrus.index")
}

fn header_path(dir: &Path) -> PathBuf {
    dir.join("cyrus.header")
}

fn annotations_path(dir: &Path) -> PathBuf {
    dir.join("cyrus.annotations")
}

/// The index header of a mailbox, which is enough for most questions; `None` where there is none.
pub(super) fn read_index_header(dir: &Path) -> Result<Option<IndexHeader>, DirError> {
    let path = index_path(dir);
    let file = match std::fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(DirError::io(&path, error)),
    };
    let mut bytes = Vec::new();
    let limit = index::MAX_HEADER_BYTES as u64;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, limit), &mut bytes)
        .map_err(|error| DirError::io(&path, error))?;
    index::parse_header(&bytes).map(Some).map_err(|error| DirError::format(&path, error))
}

fn read_header(dir: &Path) -> Result<MailboxHeader, DirError> {
    read_header_bytes(dir).map(|(header, _)| header)
}

/// The same with its bytes.
fn read_header_bytes(dir: &Path) -> Result<(MailboxHeader, Vec<u8>), DirError> {
    let path = header_path(dir);
    let bytes = disk::read(&path).map_err(|error| DirError::io(&path, error))?.unwrap_or_default();
    Ok((header::parse(&bytes).map_err(|error| DirError::format(&path, error))?, bytes))
}

/// The quota root a mailbox says it belongs to.
pub(super) fn quotaroot_at(dir: &Path) -> Result<Option<QuotaRoot>, DirError> {
    Ok(read_header(dir)?.quotaroot)
}

/// A view without records; `None` where the mailbox has no files.
pub(super) fn view(
    dir: &Path,
    entry: &MailboxEntry,
    annotations: Vec<Annotation>,
) -> Result<Option<MailboxView>, DirError> {
    let Some(index) = read_index_header(dir)? else { return Ok(None) };
    let head = cyrus::head_of(entry, &index, &read_header(dir)?, index.highestmodseq);
    Ok(Some(MailboxView {
        head,
        crc_basic: Some(index.sync_crcs.basic),
        crc_annot: Some(index.sync_crcs.annot),
        annotations,
        user_flags: Vec::new(),
        records: None,
    }))
}

pub(super) fn taken(index: &IndexHeader) -> Taken {
    Taken { storage: index.quota_mailbox_used, messages: index.exists.into(), annotations: index.quota_annot_used }
}

impl Held {
    /// Reads a mailbox; `None` where it has no index.
    pub fn load(
        dir: &Path,
        entry: &MailboxEntry,
        owner: Option<&UserId>,
        annotations: Vec<Annotation>,
    ) -> Result<Option<Self>, DirError> {
        let path = index_path(dir);
        let Some(bytes) = disk::read(&path).map_err(|error| DirError::io(&path, error))? else { return Ok(None) };
        let format = |error| DirError::format(&path, error);
        let index = index::parse_header(&bytes).map_err(format)?;
        let mut records = index::parse_index_records(&index, &bytes).map_err(format)?;
        let (header, header_bytes) = read_header_bytes(dir)?;
        let notes = annotations_path(dir);
        if let Some(bytes) = disk::read(&notes).map_err(|error| DirError::io(&notes, error))? {
            let format = |error| DirError::format(&notes, error);
            let map = db::parse(&bytes).map_err(format)?;
            let mut by_uid = annotations::of_messages(&map, Userids { owner, carets: false }).map_err(format)?;
            for found in &mut records {
                found.record.annotations = by_uid.remove(&found.record.uid).unwrap_or_default();
            }
        }
        let shown: Vec<Record> = records.iter().map(|found| replicated(&found.record)).collect();
        let highest = shown.iter().map(|record| record.modseq).max().unwrap_or_default();
        // Summed up anew: after a crash between two files the sums of the index may be of the state before.
        let crcs =
            SyncCrcs { basic: synccrc::basic(&shown, &header.user_flags), annot: synccrc::annot(&shown, ANNOT_RULE) };
        let mailbox = Mailbox {
            head: cyrus::head_of(entry, &index, &header, highest),
            crcs,
            user_flags: header.user_flags.clone(),
            annotations,
            records: shown,
        };
        let file_bytes = bytes.len() as u64;
        Ok(Some(Self { dir: dir.to_owned(), header, header_bytes, index, records, mailbox, file_bytes, fresh: false }))
    }

    /// A mailbox that is not there yet; `fresh` if the list has none of its uniqueid.
    pub fn new(dir: &Path, now: i64, fresh: bool) -> Self {
        let layout = index::layout(MINOR_VERSION);
        let index = IndexHeader {
            minor_version: MINOR_VERSION,
            start_offset: layout.header_bytes() as u32,
            record_size: layout.record_bytes() as u32,
            changes_epoch: now,
            ..IndexHeader::default()
        };
        let crcs = SyncCrcs { basic: 0, annot: ANNOT_RULE.start };
        let mailbox = Mailbox { crcs, ..Mailbox::default() };
        Self {
            dir: dir.to_owned(),
            header: MailboxHeader::default(),
            header_bytes: Vec::new(),
            index,
            records: Vec::new(),
            mailbox,
            file_bytes: 0,
            fresh,
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// No row of the list names it yet.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    pub fn taken(&self) -> Taken {
        taken(&self.index)
    }

    pub fn quotaroot(&self) -> Option<&QuotaRoot> {
        self.header.quotaroot.as_ref()
    }

    /// What is in the index under this UID.
    pub fn record(&self, uid: Uid) -> Option<&IndexRecord> {
        self.records.binary_search_by_key(&uid, |found| found.record.uid).ok().and_then(|at| self.records.get(at))
    }

    /// Writes the mailbox as `change` makes it. `before_commit` is done when all is written and nothing counts yet. `facts` are those of messages that are new here, `lost` the UIDs of
    /// expunged ones that never had a file here.
    pub fn write(
        &mut self,
        disk: &Disk,
        change: Change,
        owner: Option<&UserId>,
        quotaroot: Option<QuotaRoot>,
        facts: &HashMap<Uid, Facts>,
        before_commit: BeforeCommit<'_>,
    ) -> Result<(), DirError> {
        let (table, bits) = self.flag_slots(&change)?;
        let before = self.records.len();
        let mut changed_old = false;
        let had_notes = self.records.iter().any(|found| !found.record.annotations.is_empty());
        let gaps = |last: Uid, count: usize| u64::from(last.0).saturating_sub(count as u64);
        let had_gaps = gaps(self.index.last_uid, self.records.len());
        let notes_before = self.notes(owner);
        let last = self.records.last().map(|found| found.record.uid);
        let new = change.records.iter().map(|record| {
            let mut record = record.clone();
            record.user_flags = translate(record.user_flags, &bits);
            if record.annotations.iter().any(|note| note.entry == SNOOZED_ENTRY) {
                record.system_flags.0 |= SNOOZED;
            }
            changed_old |= Some(record.uid) <= last;
            let facts = facts.get(&record.uid);
            if facts.is_none() && self.record(record.uid).is_none() {
                record.system_flags.0 |= SystemFlags::UNLINKED;
            }
            let facts = facts.copied().unwrap_or_default();
            IndexRecord {
                record,
                header_size: facts.header_size,
                sentdate: facts.sentdate,
                gmtime: facts.gmtime,
                ..IndexRecord::default()
            }
        });
        let new: Vec<IndexRecord> = new.collect();
        let old = std::mem::take(&mut self.records);
        self.records = merge(
            old,
            new,
            |found| found.record.uid,
            |mut old, mut new| {
                new.record.system_flags.0 |= old.record.system_flags.0 & !(SystemFlags::REPLICATED | SNOOZED);
                old.record = new.record;
                old
            },
        );
        let head = &change.head;
        let has_notes = self.records.iter().any(|found| !found.record.annotations.is_empty());
        if had_notes || has_notes {
            let notes = self.notes(owner);
            if notes != notes_before {
                let path = annotations_path(&self.dir);
                disk.replace(&path, &db::encode_twoskip(&notes)).map_err(|error| DirError::io(&path, error))?;
            }
        }
        self.index.last_uid = head.last_uid;
        index::recount(&mut self.index, &self.records);
        // UIDs that were given out and of which nothing is known: clients that know older states have to ask for all.
        if gaps(self.index.last_uid, self.records.len()) > had_gaps {
            self.index.deletedmodseq = head.highestmodseq;
        }
        // Those of expunged messages are there and do not count.
        let live = self.records.iter().map(|found| &found.record).filter(|record| !record.is_expunged());
        let message_notes = live.flat_map(|record| &record.annotations);
        let all_notes = message_notes.chain(&change.annotations);
        self.index.quota_annot_used = all_notes.map(|note| note.value.len() as u64).sum();
        self.set_head(head);
        self.index.sync_crcs = change.crcs;
        self.header = MailboxHeader { user_flags: table, ..self.header_for(head, quotaroot) };
        if self.fresh {
            // No row names it: nothing of it counts before all of it is on the disk.
            self.write_fresh(disk)?;
            disk.sync_all_below(&self.dir).map_err(|error| DirError::io(&self.dir, error))?;
            self.fresh = false;
        } else {
            let new_header = self.write_header(disk)?;
            let is_append = !changed_old && !new_header && self.file_bytes != 0;
            self.write_index(disk, if is_append { Some(before) } else { None }, before_commit)?;
        }
        // As it will be read: with the flag table of the file.
        let records = change.records.iter().filter_map(|record| self.record(record.uid));
        let records = records.map(|found| replicated(&found.record)).collect();
        self.mailbox.apply(Change { records, user_flags: self.header.user_flags.clone(), ..change });
        self.mailbox.head.quotaroot = self.header.quotaroot.clone();
        Ok(())
    }

    /// What was written, as it would be read now under this row; `None` where that is not worth knowing.
    pub fn into_read(mut self, entry: &MailboxEntry) -> Option<Self> {
        let is_plain = |found: &IndexRecord| found.record.annotations.is_empty();
        if self.fresh || !self.mailbox.annotations.is_empty() || !self.records.iter().all(is_plain) {
            return None;
        }
        // Counts that this version of the index has no place for are not read.
        self.index = index::parse_header(&index::encode_header(&self.index).ok()?).ok()?;
        let highest = self.mailbox.records.iter().map(|record| record.modseq).max().unwrap_or_default();
        self.mailbox.head = cyrus::head_of(entry, &self.index, &self.header, highest);
        Some(self)
    }

    /// All that was read; what is beyond the end of what counts is nobody's.
    pub fn parts(&self) -> impl PartialEq + std::fmt::Debug {
        (&self.dir, &self.header, &self.header_bytes, &self.index, &self.records, &self.mailbox, self.fresh)
    }

    /// Writes what of a mailbox is not in its records, if it differs: after a rename, or another quota root.
    pub fn write_head(
        &mut self,
        disk: &Disk,
        head: &MailboxHead,
        quotaroot: Option<QuotaRoot>,
    ) -> Result<(), DirError> {
        let before = self.index.clone();
        self.set_head(head);
        self.header = MailboxHeader { user_flags: self.header.user_flags.clone(), ..self.header_for(head, quotaroot) };
        self.write_header(disk)?;
        if self.index != before {
            // One write of less than a block: it is there or it is not.
            let path = index_path(&self.dir);
            let io = |error| DirError::io(&path, error);
            let file = OpenOptions::new().write(true).open(&path).map_err(io)?;
            disk.write_at(&file, &path, 0, &self.encoded_header()?).map_err(io)?;
            disk.sync(&file, &path).map_err(io)?;
        }
        self.mailbox.head = MailboxHead { quotaroot: self.header.quotaroot.clone(), ..head.clone() };
        Ok(())
    }

    /// Before anything is changed: the index has 32 bits for times, and one that is cut would be another one.
    pub fn check_range(&self, change: &Change) -> Result<(), DirError> {
        let head = &change.head;
        let refused = |what: &str| {
            let text =
                format!("{}: {what} cannot be kept by an index of version {}", head.name, self.index.minor_version);
            Err(DirError::Refused(text))
        };
        let times = [head.recenttime, head.last_appenddate, head.pop3_last_login, head.pop3_show_after];
        if times.iter().any(|time| u32::try_from(*time).is_err()) {
            return refused("a time before 1970 or after 2106");
        }
        let layout = index::layout(self.index.minor_version);
        let mut bytes = Vec::with_capacity(layout.record_bytes());
        for record in &change.records {
            bytes.clear();
            let found = IndexRecord { record: record.clone(), ..IndexRecord::default() };
            index::encode_record(layout, &found, &mut bytes);
            let read = index::parse_record(&self.index, 1, &bytes).map(|read| read.record);
            let same = |read: &Record| {
                let times = |record: &Record| (record.internaldate, record.last_updated, record.savedate);
                (times(read), read.size, read.modseq) == (times(record), record.size, record.modseq)
            };
            if !read.as_ref().is_ok_and(same) {
                return refused(&format!("a time or the size of UID {}", record.uid.0));
            }
        }
        Ok(())
    }

    fn set_head(&mut self, head: &MailboxHead) {
        let kept = self.index.option_bits & !Options::from_index(u32::MAX).0;
        self.index.option_bits = kept | head.options.0;
        self.index.uidvalidity = head.uidvalidity;
        self.index.highestmodseq = head.highestmodseq.max(ModSeq(1));
        self.index.last_appenddate = head.last_appenddate;
        self.index.recentuid = head.recentuid;
        self.index.recenttime = head.recenttime;
        self.index.pop3_last_login = head.pop3_last_login;
        self.index.pop3_show_after = head.pop3_show_after;
        self.index.createdmodseq = head.createdmodseq;
    }

    fn header_for(&self, head: &MailboxHead, quotaroot: Option<QuotaRoot>) -> MailboxHeader {
        MailboxHeader {
            quotaroot,
            uniqueid: head.uniqueid.clone(),
            user_flags: Vec::new(),
            acl: head.acl.clone(),
            name: Some(head.name.clone()),
            mbtype: Some(head.mbtype.clone()),
            file_crc: 0,
        }
    }

    /// True when the file had to be written.
    fn write_header(&mut self, disk: &Disk) -> Result<bool, DirError> {
        let path = header_path(&self.dir);
        let bytes = header::encode(&self.header);
        self.header.file_crc = crc32(&bytes);
        self.index.header_file_crc = self.header.file_crc;
        if self.header_bytes == bytes {
            return Ok(false);
        }
        self.header_bytes.clear();
        disk.replace(&path, &bytes).map_err(|error| DirError::io(&path, error))?;
        self.header_bytes = bytes;
        Ok(true)
    }

    /// Both files at once, without a word to the disk.
    fn write_fresh(&mut self, disk: &Disk) -> Result<(), DirError> {
        let bytes = header::encode(&self.header);
        self.header.file_crc = crc32(&bytes);
        self.index.header_file_crc = self.header.file_crc;
        let layout = index::layout(self.index.minor_version);
        let mut text = self.encoded_header()?;
        self.records.iter().for_each(|found| index::encode_record(layout, found, &mut text));
        for (path, bytes) in [(header_path(&self.dir), &bytes), (index_path(&self.dir), &text)] {
            let written = disk.create(&path).and_then(|file| disk.write(&file, &path, bytes));
            written.map_err(|error| DirError::io(&path, error))?;
        }
        self.header_bytes = bytes;
        self.file_bytes = self.index.file_bytes();
        Ok(())
    }

    fn encoded_header(&self) -> Result<Vec<u8>, DirError> {
        index::encode_header(&self.index).map_err(|error| DirError::format(&index_path(&self.dir), error))
    }

    /// The whole index, or only records from `appended` on: these come after what counts, and then the header.
    fn write_index(
        &mut self,
        disk: &Disk,
        appended: Option<usize>,
        before_commit: BeforeCommit<'_>,
    ) -> Result<(), DirError> {
        let path = index_path(&self.dir);
        let io = |error| DirError::io(&path, error);
        let header = self.encoded_header()?;
        let layout = index::layout(self.index.minor_version);
        let mut records = Vec::new();
        for found in self.records.get(appended.unwrap_or(0)..).unwrap_or_default() {
            index::encode_record(layout, found, &mut records);
        }
        match appended {
            Some(before) => {
                let file = OpenOptions::new().read(true).write(true).open(&path).map_err(io)?;
                let offset = self.index.record_offset(before as u32 + 1);
                if !records.is_empty() {
                    disk.write_at(&file, &path, offset, &records).map_err(io)?;
                }
                let appending = Appending { file: &file, path: &path, offset, records: &records, header: &header };
                let commit = before_commit(Some(&appending))?;
                disk.write_at(&file, &path, 0, &header).map_err(io)?;
                if commit == Commit::Now {
                    disk.sync_data(&file, &path).map_err(io)?;
                }
            }
            None => {
                before_commit(None)?;
                disk.replace(&path, &[header, records].concat()).map_err(io)?;
            }
        }
        self.file_bytes = self.index.file_bytes();
        Ok(())
    }

    /// All message annotations as the file has them.
    fn notes(&self, owner: Option<&UserId>) -> Map {
        let notes =
            self.records.iter().flat_map(|found| found.record.annotations.iter().map(move |note| (found, note)));
        notes
            .map(|(found, note)| {
                let uid = found.record.uid.0.to_string();
                let modseq = if note.modseq.0 == 0 { found.record.modseq } else { note.modseq };
                let key = annotations::encode_key(uid.as_bytes(), &note.entry, &note.userid, owner);
                (key, annotations::encode_value(&note.value, modseq))
            })
            .collect()
    }

    /// The flag table as it will stand in the file, and where each bit of the change's table goes. A slot that records
    /// use keeps its name, because the two files are not written in one moment.
    fn flag_slots(&self, change: &Change) -> Result<(Vec<Option<FlagName>>, Vec<UserFlags>), DirError> {
        let used = self.records.iter().fold(0, |used, found| used | found.record.user_flags);
        let mut table = self.header.user_flags.clone();
        for (bit, slot) in table.iter_mut().enumerate() {
            if used >> bit & 1 == 0 && !change.user_flags.contains(slot) {
                *slot = None;
            }
        }
        let mut slots: BTreeMap<FlagName, usize> = BTreeMap::new();
        for (bit, name) in table.iter().enumerate() {
            if let Some(name) = name {
                slots.entry(name.clone()).or_insert(bit);
            }
        }
        let mut bits = Vec::with_capacity(change.user_flags.len());
        for (wish, name) in change.user_flags.iter().enumerate() {
            let Some(name) = name else {
                bits.push(0);
                continue;
            };
            let slot = match slots.get(name) {
                Some(slot) => *slot,
                None => {
                    // The sender's own number where it is free: what is said again is then seen to be there.
                    let is_free = |slot: usize| table.get(slot).is_none_or(Option::is_none);
                    let first = || table.iter().position(Option::is_none).unwrap_or(table.len());
                    let free = if is_free(wish) { wish } else { first() };
                    if free >= UserFlags::BITS as usize {
                        return Err(DirError::Refused(format!("{} has too many user flags", change.head.name)));
                    }
                    if table.len() <= free {
                        table.resize(free + 1, None);
                    }
                    if let Some(slot) = table.get_mut(free) {
                        *slot = Some(name.clone());
                    }
                    slots.insert(name.clone(), free);
                    free
                }
            };
            bits.push(1 << slot);
        }
        while table.last().is_some_and(Option::is_none) {
            table.pop();
        }
        Ok((table, bits))
    }
}

fn translate(flags: UserFlags, bits: &[UserFlags]) -> UserFlags {
    bits.iter().enumerate().filter(|(bit, _)| flags >> bit & 1 == 1).fold(0, |all, (_, to)| all | to)
}

fn replicated(record: &Record) -> Record {
    let mut record = record.clone();
    record.system_flags.0 &= SystemFlags::REPLICATED;
    record
}
