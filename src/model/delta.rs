//! The ordered steps that bring a replica from what it has to what the source holds.

use super::{
    Annotation, FlagName, MailboxHead, MailboxView, MboxName, MessageGuid, ModSeq, Partition, QuotaLimits, QuotaRoot,
    Record, SeenState, SieveName, SyncCrcs, Uid, UniqueId, UserId,
};
use serde::Serialize;

/// A message body by name; the bytes reach a replica through a `BodySource`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BodyRef {
    pub uid: Uid,
    pub guid: MessageGuid,
    pub size: u64,
    /// The spool file has hard links: the replica may well have this GUID already.
    pub copied: bool,
}

/// What the sender believes the replica has; a replica that has something else refuses the update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Since {
    pub modseq: ModSeq,
    pub crcs: SyncCrcs,
}

/// Creates or updates one mailbox. Values are absolute; records that are not listed stay as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MailboxUpdate {
    pub head: MailboxHead,
    /// The state both sides hold when this update is applied.
    pub crcs: SyncCrcs,
    pub since: Option<Since>,
    /// Flag table of `records`.
    pub user_flags: Vec<Option<FlagName>>,
    /// The complete set of mailbox-level annotations.
    pub annotations: Vec<Annotation>,
    /// Changed records, ascending by UID.
    pub records: Vec<Record>,
    /// Bodies of `records` that the replica needs and may lack.
    pub bodies: Vec<BodyRef>,
    /// Mailboxes of the replica in which those bodies may already be found.
    pub reserve_from: Vec<MboxName>,
    /// True when the replica has no such mailbox yet, as far as we know.
    pub create: bool,
}

/// One step. Each is idempotent: applied twice it does what once does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Step {
    Mailbox(Box<MailboxUpdate>),
    /// One mailbox only, never its children. Same name and another partition is a move.
    Rename {
        uniqueid: UniqueId,
        from: MboxName,
        to: MboxName,
        partition: Partition,
        uidvalidity: u32,
    },
    /// Destructive. The replica must hold this uniqueid under this name, or nothing happens and it is an error.
    Remove {
        uniqueid: UniqueId,
        name: MboxName,
    },
    /// Marks surplus live records of the replica expunged.
    Expunge {
        uniqueid: UniqueId,
        name: MboxName,
        uids: Vec<Uid>,
    },
    Subscribe {
        user: UserId,
        name: MboxName,
    },
    Unsubscribe {
        user: UserId,
        name: MboxName,
    },
    Seen {
        user: UserId,
        uniqueid: UniqueId,
        seen: SeenState,
    },
    Quota {
        root: QuotaRoot,
        limits: QuotaLimits,
    },
    Unquota {
        root: QuotaRoot,
    },
    ServerAnnotation(Annotation),
    RemoveServerAnnotation {
        entry: Vec<u8>,
        userid: UserId,
    },
    SievePut {
        user: UserId,
        name: SieveName,
        last_update: i64,
        content: Vec<u8>,
        /// The bytecode that the source has of it, if any.
        compiled: Vec<u8>,
    },
    SieveRemove {
        user: UserId,
        name: SieveName,
    },
    SieveActivate {
        user: UserId,
        name: SieveName,
    },
    SieveDeactivate {
        user: UserId,
    },
}

/// Steps in the order they must be applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Delta {
    pub steps: Vec<Step>,
}

impl MailboxUpdate {
    /// What the replica holds once it has confirmed this update.
    pub fn confirmed_view(&self) -> MailboxView {
        MailboxView {
            head: self.head.clone(),
            crc_basic: Some(self.crcs.basic),
            crc_annot: Some(self.crcs.annot),
            annotations: self.annotations.clone(),
            user_flags: Vec::new(),
            records: None,
        }
    }
}
