//! One mailbox in memory, and what an update makes of it. No I/O. A directory in Cyrus's own format uses it too.

use super::ArchiveError;
use super::shapes::{FlagTable, Head, StoredMailbox, load_annotations, load_records, store_annotations, store_record};
use crate::cyrus::synccrc::{self, AnnotRule};
use crate::model::{
    Annotation, FlagName, MailboxHead, MailboxSnapshot, MailboxUpdate, MailboxView, MessageGuid, Record, SyncCrcs,
    SystemFlags, Uid, UserFlags,
};
use std::cmp::Ordering;
use std::collections::HashSet;

/// What `Capabilities::annot_crc` of an archive promises: all virtual annotations count.
pub const ANNOT_RULE: AnnotRule = AnnotRule { start: 12_345_678, thrid: true, savedate: true, createdmodseq: true };

/// The index version in which all of them exist; snapshots read from an archive say so.
const MINOR_VERSION: u32 = 17;

/// A mailbox as it is published.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mailbox {
    pub head: MailboxHead,
    pub crcs: SyncCrcs,
    pub user_flags: Vec<Option<FlagName>>,
    pub annotations: Vec<Annotation>,
    /// Ascending by UID.
    pub records: Vec<Record>,
}

/// What an update changes: the records that differ, and everything else as it will be.
#[derive(Debug)]
pub struct Change {
    pub head: MailboxHead,
    pub crcs: SyncCrcs,
    pub user_flags: Vec<Option<FlagName>>,
    pub annotations: Vec<Annotation>,
    pub records: Vec<Record>,
}

/// Why an update cannot be applied.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The mailbox is not what the update was made for.
    Changed(String),
    /// No mailbox can take this.
    Never(String),
}

impl Mailbox {
    pub(super) fn load(stored: StoredMailbox, object: &str) -> Result<Self, ArchiveError> {
        let StoredMailbox { head, crcs, user_flags, annotations, records, bodies: _ } = stored;
        let (user_flags, records) = load_records(&user_flags, records, object)?;
        Ok(Self { head: head.into(), crcs, user_flags, annotations: load_annotations(annotations), records })
    }

    /// A view without records, from any generation: only the records of one may be incomplete.
    pub(super) fn view_of(stored: StoredMailbox) -> MailboxView {
        MailboxView {
            head: stored.head.into(),
            crc_basic: Some(stored.crcs.basic),
            crc_annot: Some(stored.crcs.annot),
            annotations: load_annotations(stored.annotations),
            user_flags: Vec::new(),
            records: None,
        }
    }

    /// Without records, and without flags, which mean something only with them.
    pub fn head_view(&self) -> MailboxView {
        MailboxView {
            head: self.head.clone(),
            crc_basic: Some(self.crcs.basic),
            crc_annot: Some(self.crcs.annot),
            annotations: self.annotations.clone(),
            user_flags: Vec::new(),
            records: None,
        }
    }

    pub fn view(&self) -> MailboxView {
        let (user_flags, records) = (self.user_flags.clone(), Some(self.records.clone()));
        MailboxView { user_flags, records, ..self.head_view() }
    }

    pub(super) fn snapshot(self) -> MailboxSnapshot {
        MailboxSnapshot {
            head: self.head,
            deletedmodseq: Default::default(),
            minor_version: MINOR_VERSION,
            user_flags: self.user_flags,
            annotations: self.annotations,
            records: self.records,
        }
    }

    pub fn record(&self, uid: Uid) -> Option<&Record> {
        self.records.binary_search_by_key(&uid, |record| record.uid).ok().and_then(|at| self.records.get(at))
    }

    /// What `update` changes here; checked against the checksums that it promises.
    pub fn plan(&self, update: &MailboxUpdate) -> Result<Change, Refusal> {
        if let Some(since) = update.since {
            let same = |theirs: u32, ours: u32| theirs == 0 || ours == 0 || theirs == ours;
            if since.modseq != self.head.highestmodseq
                || !same(since.crcs.basic, self.crcs.basic)
                || !same(since.crcs.annot, self.crcs.annot)
            {
                return Err(Refusal::Changed(format!(
                    "{} is at modseq {}, the update expects {}",
                    self.head.name, self.head.highestmodseq.0, since.modseq.0
                )));
            }
        }
        let (mut table, bits) = self.flag_table(&update.user_flags);
        let mut changed = self.moved_flags(&mut table)?;
        let moved: HashSet<Uid> = changed.iter().map(|record| record.uid).collect();
        let mut given = Vec::with_capacity(update.records.len());
        for record in &update.records {
            let mut record = record.clone();
            record.system_flags.0 &= SystemFlags::REPLICATED;
            let set = bits.iter().enumerate().filter(|(bit, _)| record.user_flags >> bit & 1 == 1);
            record.user_flags = set.fold(0, |all, (_, to)| all | to);
            if moved.contains(&record.uid) || self.record(record.uid) != Some(&record) {
                given.push(record);
            }
        }
        self.fits(&update.head, &given)?;
        if !given.is_sorted_by(|a, b| a.uid < b.uid) {
            return Err(Refusal::Never("records of an update must ascend by UID".to_owned()));
        }
        let given_uids: HashSet<Uid> = given.iter().map(|record| record.uid).collect();
        changed.retain(|record| !given_uids.contains(&record.uid));
        changed.extend(given);
        changed.sort_by_key(|record| record.uid);
        let crcs = self.crcs_with(&changed, &table.names);
        // A half-way state of a long transfer promises nothing, neither one nor the other. No live mail at all is a
        // basic checksum of 0, but not that of annotations.
        let promised = update.crcs;
        let promises = promised != SyncCrcs::default();
        if promises && (promised.basic != crcs.basic || promised.annot != 0 && promised.annot != crcs.annot) {
            return Err(Refusal::Changed(format!(
                "{} would have the checksums {} {}, the update promises {} {}",
                update.head.name, crcs.basic, crcs.annot, update.crcs.basic, update.crcs.annot
            )));
        }
        Ok(Change {
            head: update.head.clone(),
            crcs,
            user_flags: table.names,
            annotations: update.annotations.clone(),
            records: changed,
        })
    }

    /// Nothing that is here is lowered, revived or becomes another message, as no `sync_server` lets it: whoever sends
    /// that does not know what is here.
    fn fits(&self, head: &MailboxHead, given: &[Record]) -> Result<(), Refusal> {
        let ours = &self.head;
        // A place holder says nothing of what was there; it comes when the mailbox was deleted and its children were not.
        if head.mbtype.is_intermediate() {
            return Ok(());
        }
        let changed = |what: String| Err(Refusal::Changed(format!("{}: {what}", head.name)));
        if head.highestmodseq < ours.highestmodseq
            || head.last_uid < ours.last_uid
            || head.uidvalidity < ours.uidvalidity
        {
            return changed("is ahead of the update".to_owned());
        }
        for record in given {
            let uid = record.uid.0;
            match self.record(record.uid) {
                Some(old) if old.is_expunged() && record.is_expunged() => {}
                Some(old) if old.guid != record.guid => return changed(format!("UID {uid} is another message")),
                Some(old) if old.is_expunged() => return changed(format!("UID {uid} is expunged")),
                Some(old) if old.modseq > record.modseq => return changed(format!("UID {uid} has a higher modseq")),
                None if record.uid <= ours.last_uid && !record.is_expunged() => {
                    return changed(format!("UID {uid} was given out and is gone"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Marks these messages expunged, as `EXPUNGE` over csync does: modseqs stay.
    pub fn plan_expunge(&self, uids: &[Uid]) -> Change {
        let live = uids.iter().filter_map(|uid| self.record(*uid)).filter(|record| !record.is_expunged()).cloned();
        let mut records: Vec<Record> = live.collect();
        records.iter_mut().for_each(|record| record.system_flags.0 |= SystemFlags::EXPUNGED);
        records.sort_by_key(|record| record.uid);
        records.dedup_by_key(|record| record.uid);
        Change {
            head: self.head.clone(),
            crcs: self.crcs_with(&records, &self.user_flags),
            user_flags: self.user_flags.clone(),
            annotations: self.annotations.clone(),
            records,
        }
    }

    /// True when `change` would leave everything as it is.
    pub fn has(&self, change: &Change) -> bool {
        change.records.is_empty()
            && change.head == self.head
            && change.crcs == self.crcs
            && change.annotations == self.annotations
            && change.user_flags == self.user_flags
    }

    pub fn apply(&mut self, change: Change) {
        let old = std::mem::take(&mut self.records);
        self.records = merge(old, change.records, |record| record.uid, |_, new| new);
        self.head = change.head;
        self.crcs = change.crcs;
        self.user_flags = change.user_flags;
        self.annotations = change.annotations;
    }

    /// GUIDs and sizes of live messages that `change` brings and that were not here before under their UID.
    pub(super) fn new_bodies<'a>(&'a self, change: &'a Change) -> impl Iterator<Item = (MessageGuid, u64)> + 'a {
        let known = |record: &&Record| self.record(record.uid).is_some_and(|old| old.guid == record.guid);
        let new = change.records.iter().filter(|record| !record.is_expunged()).filter(move |record| !known(record));
        new.map(|record| (record.guid, record.size))
    }

    /// The flag table after an update with a table of its own, and which bit each of its entries has there. A source
    /// tells its whole table; a client of csync only the flags of the records that it sends: then ours stays.
    fn flag_table(&self, theirs: &[Option<FlagName>]) -> (FlagTable, Vec<UserFlags>) {
        let told = |own: &Option<FlagName>| own.is_none() || theirs.contains(own);
        if !self.user_flags.iter().all(told) {
            let mut table = FlagTable::new(&self.user_flags);
            let bits = theirs.iter().take(128).map(|name| name.as_ref().map_or(Some(0), |name| table.bit(name)));
            if let Some(bits) = bits.collect::<Option<Vec<_>>>() {
                return (table, bits);
            }
        }
        let table = FlagTable::new(theirs);
        let bits = table.names.iter().enumerate().map(|(bit, name)| if name.is_some() { 1 << bit } else { 0 });
        let bits = bits.collect();
        (table, bits)
    }

    /// Records whose flag bits mean something else in `table`, as they are there. Usually none: flag tables grow.
    fn moved_flags(&self, table: &mut FlagTable) -> Result<Vec<Record>, Refusal> {
        let used = self.records.iter().fold(0, |used, record| used | record.user_flags);
        let mut bits = Vec::new();
        for (bit, name) in self.user_flags.iter().enumerate().filter(|(bit, _)| used >> bit & 1 == 1) {
            let to = match name {
                Some(name) => table
                    .bit(name)
                    .ok_or_else(|| Refusal::Never(format!("{} has too many user flags", self.head.name)))?,
                None => 0,
            };
            bits.push((1 << bit, to));
        }
        if bits.iter().all(|(from, to)| from == to) {
            return Ok(Vec::new());
        }
        let moved = |record: &Record| {
            let set = bits.iter().filter(|(from, _)| record.user_flags & from != 0);
            Record { user_flags: set.fold(0, |all, (_, to)| all | to), ..record.clone() }
        };
        Ok(self.records.iter().filter(|record| record.user_flags != 0).map(moved).collect())
    }

    /// Checksums are sums over records: what leaves and what comes is enough to know the new ones.
    fn crcs_with(&self, changed: &[Record], table: &[Option<FlagName>]) -> SyncCrcs {
        let old: Vec<Record> = changed.iter().filter_map(|record| self.record(record.uid)).cloned().collect();
        let basic = |records: &[Record], table: &[Option<FlagName>]| synccrc::basic(records, table);
        let annot = |records: &[Record]| synccrc::annot(records, ANNOT_RULE) ^ ANNOT_RULE.start;
        let had = if self.records.is_empty() { SyncCrcs { basic: 0, annot: ANNOT_RULE.start } } else { self.crcs };
        SyncCrcs {
            basic: had.basic ^ basic(&old, &self.user_flags) ^ basic(changed, table),
            annot: had.annot ^ annot(&old) ^ annot(changed),
        }
    }
}

/// Two lists that ascend, as one; `both` makes one of two with the same key. A search and an insertion for each would take the
/// square of a million records that come between a million others.
pub fn merge<T, K: Ord>(
    old: Vec<T>,
    new: impl IntoIterator<Item = T>,
    key: impl Fn(&T) -> K,
    mut both: impl FnMut(T, T) -> T,
) -> Vec<T> {
    let (mut old, mut new) = (old.into_iter().peekable(), new.into_iter().peekable());
    let mut out = Vec::with_capacity(old.size_hint().0.saturating_add(new.size_hint().0));
    loop {
        let order = match (old.peek(), new.peek()) {
            (Some(a), Some(b)) => key(a).cmp(&key(b)),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return out,
        };
        out.extend(match order {
            Ordering::Less => old.next(),
            Ordering::Greater => new.next(),
            Ordering::Equal => old.next().zip(new.next()).map(|(a, b)| both(a, b)),
        });
    }
}

impl Change {
    pub(super) fn store(&self) -> StoredMailbox {
        StoredMailbox {
            head: Head::from(&self.head),
            crcs: self.crcs,
            user_flags: self.user_flags.clone(),
            annotations: store_annotations(&self.annotations),
            records: self.records.iter().map(|record| store_record(record, &self.user_flags)).collect(),
            bodies: Default::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(uids: impl Iterator<Item = u32>) -> Vec<Record> {
        uids.map(|uid| Record { uid: Uid(uid), ..Record::default() }).collect()
    }

    fn change(records: Vec<Record>) -> Change {
        let (head, crcs, user_flags, annotations) = Default::default();
        Change { head, crcs, user_flags, annotations, records }
    }

    /// Each inserted by itself, these moved as many bytes as there are pairs of them.
    #[test]
    fn what_comes_between_all_others_is_put_there_at_once() {
        let mut mailbox = Mailbox { records: records((1..=200_000).map(|n| 2 * n)), ..Mailbox::default() };
        mailbox.apply(change(records((0..200_000).map(|n| 2 * n + 1))));
        assert!(mailbox.records.iter().map(|record| record.uid.0).eq(1..=400_000));
        let expunged = Record { system_flags: SystemFlags(SystemFlags::EXPUNGED), ..mailbox.records[6].clone() };
        mailbox.apply(change(vec![expunged]));
        assert_eq!((mailbox.records.len(), mailbox.records[6].is_expunged()), (400_000, true));
    }

    #[test]
    fn one_message_is_not_said_twice() {
        let mut records = records([1, 2, 2].into_iter());
        records[2].size = 5;
        let head = MailboxHead { last_uid: Uid(9), ..MailboxHead::default() };
        let (crcs, since, user_flags, annotations, bodies, reserve_from) = Default::default();
        let update =
            MailboxUpdate { head, crcs, since, user_flags, annotations, records, bodies, reserve_from, create: true };
        assert!(matches!(Mailbox::default().plan(&update), Err(Refusal::Never(_))));
    }
}
