//! What stands in the objects: the model's values in a form that people and `jq` can read. Flags are names, so a
//! record means the same whatever flag table it is read with.

use super::ArchiveError;
use super::chain::State;
use super::text;
use crate::model::{
    Annotation, FlagName, MailboxEntry, MailboxHead, MboxName, MboxType, MessageGuid, ModSeq, Options, Partition,
    QuotaLimits, QuotaRoot, Record, SeenState, SieveName, SyncCrcs, SystemFlags, Uid, UniqueId, UserFlags, UserId,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Flags beyond this do not exist in Cyrus.
const MAX_USER_FLAGS: usize = 128;

const SYSTEM_FLAGS: [(u32, &str); 6] = [
    (SystemFlags::ANSWERED, "\\Answered"),
    (SystemFlags::FLAGGED, "\\Flagged"),
    (SystemFlags::DELETED, "\\Deleted"),
    (SystemFlags::DRAFT, "\\Draft"),
    (SystemFlags::SEEN, "\\Seen"),
    (SystemFlags::EXPUNGED, "\\Expunged"),
];

/// `archive.json`: says which archive this is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct About {
    pub format: u32,
    pub kind: String,
    pub id: String,
}

impl About {
    pub const KIND: &'static str = "spooltap archive";
}

/// A mailbox, or what changed in it: everything but the records is always complete.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StoredMailbox {
    pub head: Head,
    pub crcs: SyncCrcs,
    pub user_flags: Vec<Option<FlagName>>,
    pub annotations: Vec<StoredAnnotation>,
    /// Ascending by UID.
    pub records: Vec<StoredRecord>,
    /// Bodies of these records that may not be objects of their own yet.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bodies: BTreeMap<MessageGuid, StoredBody>,
}

/// A message, byte for byte.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct StoredBody(#[serde(with = "text")] pub Vec<u8>);

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Head {
    pub uniqueid: UniqueId,
    pub name: MboxName,
    #[serde(rename = "type")]
    pub mbtype: MboxType,
    pub partition: Partition,
    #[serde(with = "text")]
    pub acl: Vec<u8>,
    pub options: String,
    pub uidvalidity: u32,
    pub last_uid: Uid,
    pub highestmodseq: ModSeq,
    pub recentuid: Uid,
    pub recenttime: i64,
    pub last_appenddate: i64,
    pub pop3_last_login: i64,
    pub pop3_show_after: i64,
    pub createdmodseq: ModSeq,
    pub foldermodseq: ModSeq,
    pub xconvmodseq: ModSeq,
    pub raclmodseq: ModSeq,
    pub quotaroot: Option<QuotaRoot>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StoredAnnotation {
    #[serde(with = "text")]
    pub entry: Vec<u8>,
    pub userid: UserId,
    #[serde(with = "text")]
    pub value: Vec<u8>,
    pub modseq: ModSeq,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StoredRecord {
    pub uid: Uid,
    pub modseq: ModSeq,
    pub last_updated: i64,
    pub internaldate: i64,
    pub size: u64,
    pub guid: MessageGuid,
    pub flags: Vec<String>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cid: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub savedate: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub createdmodseq: ModSeq,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub annotations: Vec<StoredAnnotation>,
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl State for StoredMailbox {
    const KIND: &'static str = "mailbox";

    fn fold(self, newer: Self) -> Self {
        let mut records: BTreeMap<Uid, StoredRecord> = self.records.into_iter().map(|r| (r.uid, r)).collect();
        records.extend(newer.records.into_iter().map(|r| (r.uid, r)));
        let mut bodies = self.bodies;
        bodies.extend(newer.bodies);
        Self { records: records.into_values().collect(), bodies, ..newer }
    }

    fn carried(&self) -> u64 {
        self.bodies.values().map(|body| body.0.len() as u64).sum()
    }

    fn lay_down(&mut self) {
        self.bodies.clear();
    }
}

/// Which mailboxes there are: name → the rest of the row. `None` takes a name out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct StoredIndex {
    pub mailboxes: BTreeMap<MboxName, Option<Row>>,
}

/// A row of the index. Where its fields are also in the mailbox's head, these here hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Row {
    pub uniqueid: UniqueId,
    #[serde(rename = "type")]
    pub mbtype: MboxType,
    pub partition: Partition,
    #[serde(with = "text")]
    pub acl: Vec<u8>,
    pub uidvalidity: u32,
    pub createdmodseq: ModSeq,
    pub foldermodseq: ModSeq,
}

impl State for StoredIndex {
    const KIND: &'static str = "index";

    fn fold(mut self, newer: Self) -> Self {
        self.mailboxes.extend(newer.mailboxes);
        self
    }

    fn settle(&mut self) {
        self.mailboxes.retain(|_, row| row.is_some());
    }
}

impl Row {
    pub fn of(head: &MailboxHead) -> Self {
        Self {
            uniqueid: head.uniqueid.clone(),
            mbtype: head.mbtype.clone(),
            partition: head.partition.clone(),
            acl: head.acl.clone(),
            uidvalidity: head.uidvalidity,
            createdmodseq: head.createdmodseq,
            foldermodseq: head.foldermodseq,
        }
    }

    pub fn entry(&self, name: &MboxName) -> MailboxEntry {
        MailboxEntry {
            name: name.clone(),
            uniqueid: self.uniqueid.clone(),
            mbtype: self.mbtype.clone(),
            partition: self.partition.clone(),
            acl: self.acl.clone(),
            uidvalidity: self.uidvalidity,
            createdmodseq: self.createdmodseq,
            foldermodseq: self.foldermodseq,
            by_name: false,
        }
    }

    /// The index is published last: until then the head may be ahead of what was confirmed.
    pub fn override_head(&self, name: &MboxName, head: &mut MailboxHead) {
        let Self { uniqueid, mbtype, partition, acl, uidvalidity, createdmodseq, foldermodseq } = self.clone();
        head.name = name.clone();
        (head.uniqueid, head.mbtype, head.partition, head.acl) = (uniqueid, mbtype, partition, acl);
        (head.uidvalidity, head.createdmodseq, head.foldermodseq) = (uidvalidity, createdmodseq, foldermodseq);
    }
}

/// A user's data outside mailboxes. Script texts are objects of their own, named by GUID.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct StoredUser {
    pub user: UserId,
    pub subscribed: BTreeSet<MboxName>,
    pub seen: BTreeMap<UniqueId, StoredSeen>,
    pub sieve: BTreeMap<SieveName, StoredScript>,
    pub active: Option<SieveName>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct StoredSeen {
    pub lastread: i64,
    pub lastuid: Uid,
    pub lastchange: i64,
    #[serde(with = "text")]
    pub seenuids: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct StoredScript {
    pub guid: MessageGuid,
    pub last_update: i64,
}

impl State for StoredUser {
    const KIND: &'static str = "user";
    const WHOLE: bool = true;

    fn fold(self, newer: Self) -> Self {
        newer
    }
}

/// What belongs to no mailbox and no user. `None` takes a quota root out; annotations are always complete.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct StoredServer {
    pub quotas: BTreeMap<QuotaRoot, Option<QuotaLimits>>,
    pub annotations: Vec<StoredAnnotation>,
}

impl State for StoredServer {
    const KIND: &'static str = "server";

    fn fold(mut self, newer: Self) -> Self {
        self.quotas.extend(newer.quotas);
        Self { annotations: newer.annotations, ..self }
    }

    fn settle(&mut self) {
        self.quotas.retain(|_, limits| limits.is_some());
    }
}

impl From<&SeenState> for StoredSeen {
    fn from(seen: &SeenState) -> Self {
        let SeenState { lastread, lastuid, lastchange, seenuids } = seen.clone();
        Self { lastread, lastuid, lastchange, seenuids }
    }
}

impl From<StoredSeen> for SeenState {
    fn from(seen: StoredSeen) -> Self {
        let StoredSeen { lastread, lastuid, lastchange, seenuids } = seen;
        Self { lastread, lastuid, lastchange, seenuids }
    }
}

pub(super) fn store_annotations(annotations: &[Annotation]) -> Vec<StoredAnnotation> {
    let store = |annotation: Annotation| {
        let Annotation { entry, userid, value, modseq } = annotation;
        StoredAnnotation { entry, userid, value, modseq }
    };
    annotations.iter().cloned().map(store).collect()
}

pub(super) fn load_annotations(annotations: Vec<StoredAnnotation>) -> Vec<Annotation> {
    let load = |annotation: StoredAnnotation| {
        let StoredAnnotation { entry, userid, value, modseq } = annotation;
        Annotation { entry, userid, value, modseq }
    };
    annotations.into_iter().map(load).collect()
}

impl From<&MailboxHead> for Head {
    fn from(head: &MailboxHead) -> Self {
        let head = head.clone();
        Self {
            uniqueid: head.uniqueid,
            name: head.name,
            mbtype: head.mbtype,
            partition: head.partition,
            acl: head.acl,
            options: head.options.letters(),
            uidvalidity: head.uidvalidity,
            last_uid: head.last_uid,
            highestmodseq: head.highestmodseq,
            recentuid: head.recentuid,
            recenttime: head.recenttime,
            last_appenddate: head.last_appenddate,
            pop3_last_login: head.pop3_last_login,
            pop3_show_after: head.pop3_show_after,
            createdmodseq: head.createdmodseq,
            foldermodseq: head.foldermodseq,
            xconvmodseq: head.xconvmodseq,
            raclmodseq: head.raclmodseq,
            quotaroot: head.quotaroot,
        }
    }
}

impl From<Head> for MailboxHead {
    fn from(head: Head) -> Self {
        Self {
            uniqueid: head.uniqueid,
            name: head.name,
            mbtype: head.mbtype,
            partition: head.partition,
            acl: head.acl,
            options: Options::from_letters(head.options.as_bytes()),
            uidvalidity: head.uidvalidity,
            last_uid: head.last_uid,
            highestmodseq: head.highestmodseq,
            recentuid: head.recentuid,
            recenttime: head.recenttime,
            last_appenddate: head.last_appenddate,
            pop3_last_login: head.pop3_last_login,
            pop3_show_after: head.pop3_show_after,
            createdmodseq: head.createdmodseq,
            foldermodseq: head.foldermodseq,
            xconvmodseq: head.xconvmodseq,
            raclmodseq: head.raclmodseq,
            quotaroot: head.quotaroot,
        }
    }
}

pub(super) fn store_record(record: &Record, table: &[Option<FlagName>]) -> StoredRecord {
    let system = SYSTEM_FLAGS.iter().filter(|(bit, _)| record.system_flags.has(*bit)).map(|(_, name)| name.to_string());
    let user = table.iter().enumerate().filter(|(bit, _)| *bit < MAX_USER_FLAGS && record.user_flags >> bit & 1 == 1);
    let user = user.filter_map(|(_, name)| name.as_ref()).map(|name| text::escape(name.as_bytes()));
    StoredRecord {
        uid: record.uid,
        modseq: record.modseq,
        last_updated: record.last_updated,
        internaldate: record.internaldate,
        size: record.size,
        guid: record.guid,
        flags: system.chain(user).collect(),
        cid: record.cid,
        savedate: record.savedate,
        createdmodseq: record.createdmodseq,
        annotations: store_annotations(&record.annotations),
    }
}

/// Names of user flags and the bits that stand for them.
pub(super) struct FlagTable {
    pub names: Vec<Option<FlagName>>,
    bits: HashMap<FlagName, usize>,
}

impl FlagTable {
    pub fn new(names: &[Option<FlagName>]) -> Self {
        let names: Vec<_> = names.iter().take(MAX_USER_FLAGS).cloned().collect();
        // Of a name that stands twice the first counts, as Cyrus looks it up.
        let named = names.iter().enumerate().rev().filter_map(|(bit, name)| Some((name.clone()?, bit)));
        Self { bits: named.collect(), names }
    }

    /// The bit of a name; one that is not there yet is added. `None` when the table is full.
    pub fn bit(&mut self, name: &FlagName) -> Option<UserFlags> {
        if let Some(bit) = self.bits.get(name) {
            return Some(1 << bit);
        }
        let bit = self.names.len();
        if bit >= MAX_USER_FLAGS {
            return None;
        }
        self.names.push(Some(name.clone()));
        self.bits.insert(name.clone(), bit);
        Some(1 << bit)
    }
}

pub(super) fn load_record(record: StoredRecord, table: &mut FlagTable) -> Option<Record> {
    let (mut system, mut user) = (0, 0);
    for flag in &record.flags {
        match SYSTEM_FLAGS.iter().find(|(_, name)| name == flag) {
            Some((bit, _)) => system |= bit,
            None => user |= table.bit(&FlagName::from(text::unescape(flag)))?,
        }
    }
    Some(Record {
        uid: record.uid,
        modseq: record.modseq,
        last_updated: record.last_updated,
        internaldate: record.internaldate,
        size: record.size,
        guid: record.guid,
        system_flags: SystemFlags(system),
        user_flags: user,
        cid: record.cid,
        savedate: record.savedate,
        createdmodseq: record.createdmodseq,
        annotations: load_annotations(record.annotations),
    })
}

/// Records, and the flag table that their bits refer to.
pub(super) fn load_records(
    user_flags: &[Option<FlagName>],
    records: Vec<StoredRecord>,
    object: &str,
) -> Result<(Vec<Option<FlagName>>, Vec<Record>), ArchiveError> {
    let mut table = FlagTable::new(user_flags);
    let records = records.into_iter().map(|record| load_record(record, &mut table)).collect::<Option<_>>();
    let records = records.ok_or_else(|| ArchiveError::Format {
        object: object.to_owned(),
        fault: format!("has more than {MAX_USER_FLAGS} user flags"),
    })?;
    Ok((table.names, records))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_keep_their_flags_under_another_table() {
        let table = |names: &[&str]| -> Vec<Option<FlagName>> {
            names.iter().map(|name| (!name.is_empty()).then(|| FlagName::from(*name))).collect()
        };
        let old = table(&["work", "", "$Label1"]);
        let record = Record {
            uid: Uid(7),
            system_flags: SystemFlags(SystemFlags::SEEN | SystemFlags::EXPUNGED | SystemFlags::UNLINKED),
            user_flags: 0b101,
            savedate: 5,
            ..Record::default()
        };
        let stored = store_record(&record, &old);
        assert_eq!(stored.flags, ["\\Seen", "\\Expunged", "work", "$Label1"]);
        let text = serde_json::to_string(&stored).unwrap();
        let stored: StoredRecord = serde_json::from_str(&text).unwrap();
        let mut table = FlagTable::new(&table(&["$Label1", "other"]));
        let loaded = load_record(stored, &mut table).unwrap();
        assert_eq!((loaded.user_flags, loaded.system_flags.0), (0b101, SystemFlags::SEEN | SystemFlags::EXPUNGED));
        assert_eq!(table.names.len(), 3);
    }

    #[test]
    fn a_full_flag_table_takes_no_more() {
        let names: Vec<_> = (0..128).map(|n| Some(FlagName::from(format!("f{n}").as_str()))).collect();
        let mut table = FlagTable::new(&names);
        assert_eq!(table.bit(&FlagName::from("f127")), Some(1 << 127));
        assert_eq!(table.bit(&FlagName::from("new")), None);
    }
}
