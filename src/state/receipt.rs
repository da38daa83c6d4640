//! What is remembered of a confirmed step.

use crate::model::{Fingerprint, MailboxView, ModSeq, Uid, UserMeta};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A mailbox as the replica confirmed it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailboxReceipt {
    /// Without records.
    pub view: MailboxView,
    /// Mark of the source's files, taken before they were read; `None` when the comparison was not finished.
    pub fingerprint: Option<Fingerprint>,
    /// The source's own HIGHESTMODSEQ at that time, not lifted.
    pub source_highestmodseq: ModSeq,
    pub lift: Option<Lift>,
}

/// How a source's modseqs are shifted for a replica that was ahead of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lift {
    /// Modseqs of the source above this are shifted by `offset`.
    pub since: ModSeq,
    pub offset: u64,
    /// Modseq at the replica of records at or below `since` where it is not the source's.
    pub fixed: BTreeMap<Uid, ModSeq>,
}

/// A user's data outside mailboxes as the replica confirmed it; scripts without their text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserReceipt {
    pub meta: UserMeta,
    pub fingerprint: Option<Fingerprint>,
}
