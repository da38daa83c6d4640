//! A mailbox: its row in the mailbox list, its header values, its records; as the source holds it (`MailboxSnapshot`)
//! and as a replica says it holds it (`MailboxView`).

use super::{FlagName, MboxName, MessageGuid, ModSeq, Partition, QuotaRoot, Uid, UniqueId, UserId};
use serde::{Deserialize, Serialize};

/// Mailbox type and state letters of mailboxes.db (`T`), without the local `l` (legacy directories).
/// Plain mail is the empty string: `e` is dropped when parsed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MboxType(pub String);

impl MboxType {
    /// Keeps the letters that mean something to the other side: everything but `e` and `l`.
    pub fn parse(letters: &[u8]) -> Self {
        Self(letters.iter().filter(|byte| !matches!(byte, b'e' | b'l')).map(|&byte| byte as char).collect())
    }

    fn has(&self, letter: char) -> bool {
        self.0.contains(letter)
    }

    /// A tombstone: the name existed once.
    pub fn is_deleted(&self) -> bool {
        self.has('d')
    }

    /// A place holder for a parent that has no data.
    pub fn is_intermediate(&self) -> bool {
        self.has('i')
    }

    /// Not a mailbox of this server: remote, being moved, reserved.
    pub fn is_foreign(&self) -> bool {
        self.has('r') || self.has('m') || self.has('z')
    }

    /// The mailbox of Sieve scripts (3.6 and later).
    pub fn is_sieve(&self) -> bool {
        self.has('f')
    }
}

/// A row of the source's mailbox list. Exists means: data on this server (see `MboxType`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailboxEntry {
    pub name: MboxName,
    pub uniqueid: UniqueId,
    pub mbtype: MboxType,
    pub partition: Partition,
    /// `ident TAB rights TAB ident TAB rights TAB`.
    pub acl: Vec<u8>,
    /// As the list says; the index header wins where they differ.
    pub uidvalidity: u32,
    pub createdmodseq: ModSeq,
    pub foldermodseq: ModSeq,
    /// The directory is found by name (always up to 3.4; flag `l` from 3.6 on), not by uniqueid.
    pub by_name: bool,
}

/// Mailbox options that replication carries (`OPTIONS` letters on the wire).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Options(pub u32);

impl Options {
    pub const POP3_NEW_UIDL: u32 = 0x1;
    pub const SHARED_SEEN: u32 = 0x4;
    pub const DUP_DELIVER: u32 = 0x8;
    pub const HAS_ALARMS: u32 = 0x10;
    const LETTERS: [(u32, char); 4] =
        [(Self::POP3_NEW_UIDL, 'P'), (Self::SHARED_SEEN, 'S'), (Self::DUP_DELIVER, 'D'), (Self::HAS_ALARMS, 'A')];

    /// Keeps the bits that have a letter.
    pub fn from_index(bits: u32) -> Self {
        Self(bits & Self::LETTERS.iter().fold(0, |all, (bit, _)| all | bit))
    }

    /// `P`, `PS` …; unknown letters are ignored, as Cyrus does.
    pub fn from_letters(letters: &[u8]) -> Self {
        Self(Self::LETTERS.iter().filter(|(_, l)| letters.contains(&(*l as u8))).fold(0, |all, (bit, _)| all | bit))
    }

    /// The letters in Cyrus's order.
    pub fn letters(self) -> String {
        Self::LETTERS.iter().filter(|(bit, _)| self.0 & bit != 0).map(|(_, letter)| letter).collect()
    }
}

/// Everything about a mailbox that is neither a record nor an annotation. Times are seconds since 1970 UTC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailboxHead {
    pub uniqueid: UniqueId,
    pub name: MboxName,
    pub mbtype: MboxType,
    pub partition: Partition,
    pub acl: Vec<u8>,
    pub options: Options,
    pub uidvalidity: u32,
    /// Highest UID ever assigned.
    pub last_uid: Uid,
    pub highestmodseq: ModSeq,
    pub recentuid: Uid,
    pub recenttime: i64,
    pub last_appenddate: i64,
    pub pop3_last_login: i64,
    pub pop3_show_after: i64,
    pub createdmodseq: ModSeq,
    /// 0 where the release has none (up to 2.5).
    pub foldermodseq: ModSeq,
    /// Per-user modseq of conversations / reverse ACLs where the replica said one; 0 = none.
    pub xconvmodseq: ModSeq,
    pub raclmodseq: ModSeq,
    pub quotaroot: Option<QuotaRoot>,
}

/// System flag bits, as `cyrus.index` keeps them since 2.4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SystemFlags(pub u32);

impl SystemFlags {
    pub const ANSWERED: u32 = 0x1;
    pub const FLAGGED: u32 = 0x2;
    pub const DELETED: u32 = 0x4;
    pub const DRAFT: u32 = 0x8;
    pub const SEEN: u32 = 0x10;
    pub const ARCHIVED: u32 = 0x2000_0000;
    pub const UNLINKED: u32 = 0x4000_0000;
    pub const EXPUNGED: u32 = 0x8000_0000;
    /// The bits another server may see: the five IMAP flags and `\Expunged`.
    pub const REPLICATED: u32 =
        Self::ANSWERED | Self::FLAGGED | Self::DELETED | Self::DRAFT | Self::SEEN | Self::EXPUNGED;

    pub fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    /// Not visible to IMAP any more.
    pub fn is_expunged(self) -> bool {
        self.has(Self::EXPUNGED)
    }
}

/// Set of user flags: bit *n* is entry *n* of the mailbox's flag table.
pub type UserFlags = u128;

/// One annotation of a mailbox, a message or the server.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Annotation {
    /// `/comment`, `/vendor/cmu/cyrus-imapd/…`.
    pub entry: Vec<u8>,
    /// Empty = shared value; otherwise whose private value it is.
    pub userid: UserId,
    pub value: Vec<u8>,
    /// 0 where the release keeps none (up to 3.0).
    pub modseq: ModSeq,
}

impl Annotation {
    /// What two sides are compared by: everything but the modseq.
    pub fn content(&self) -> (&[u8], &UserId, &[u8]) {
        (&self.entry, &self.userid, &self.value)
    }
}

/// One message record. Virtual annotations (thrid, savedate, createdmodseq) are fields here, never in `annotations`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub uid: Uid,
    pub modseq: ModSeq,
    pub last_updated: i64,
    pub internaldate: i64,
    /// Bytes of the message file.
    pub size: u64,
    pub guid: MessageGuid,
    pub system_flags: SystemFlags,
    pub user_flags: UserFlags,
    /// Conversation id, 0 = none.
    pub cid: u64,
    /// 0 = not known.
    pub savedate: i64,
    /// 0 = not known.
    pub createdmodseq: ModSeq,
    /// Sorted by entry, then userid.
    pub annotations: Vec<Annotation>,
}

impl Record {
    pub fn is_expunged(&self) -> bool {
        self.system_flags.is_expunged()
    }

    /// The message file is, or is about to be, gone.
    pub fn is_unlinked(&self) -> bool {
        self.system_flags.has(SystemFlags::UNLINKED)
    }
}

/// The pair of checksums both ends of csync compare (see `cyrus::synccrc`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SyncCrcs {
    pub basic: u32,
    pub annot: u32,
}

/// One consistent reading of a mailbox on the source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailboxSnapshot {
    pub head: MailboxHead,
    /// Highest modseq of a record that was physically removed.
    pub deletedmodseq: ModSeq,
    /// cyrus.index minor version it was read from: decides which virtual annotations count.
    pub minor_version: u32,
    /// Name of user flag *n*; `None` is a free slot.
    pub user_flags: Vec<Option<FlagName>>,
    /// Mailbox-level annotations, sorted by entry, then userid.
    pub annotations: Vec<Annotation>,
    /// Ascending by UID, expunged ones included.
    pub records: Vec<Record>,
}

/// What a replica says about a mailbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailboxView {
    pub head: MailboxHead,
    /// `None` where the replica's release does not print it.
    pub crc_basic: Option<u32>,
    pub crc_annot: Option<u32>,
    /// Mailbox-level annotations, sorted.
    pub annotations: Vec<Annotation>,
    /// Only in a full view: the flag table of `records`, and every record including expunged ones.
    pub user_flags: Vec<Option<FlagName>>,
    pub records: Option<Vec<Record>>,
}
