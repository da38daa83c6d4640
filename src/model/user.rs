//! What belongs to a user rather than to one mailbox: subscriptions, seen state in other people's mailboxes,
//! Sieve scripts; and quota limits.

use super::{MailboxView, MboxName, MessageGuid, QuotaRoot, SieveName, Uid, UniqueId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// One value of a user's seen database.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenState {
    /// Seconds since 1970.
    pub lastread: i64,
    pub lastuid: Uid,
    pub lastchange: i64,
    /// IMAP sequence set over UIDs, as stored: `1:5,8` or empty.
    pub seenuids: Vec<u8>,
}

/// One Sieve script.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SieveScript {
    /// SHA-1 of the script text.
    pub guid: MessageGuid,
    /// Seconds since 1970.
    pub last_update: i64,
    /// The text; empty in a replica's view, which knows only the GUID.
    pub content: Vec<u8>,
    /// The bytecode beside it, for a replica that does not compile; empty where there is none.
    #[serde(skip)]
    pub compiled: Vec<u8>,
}

/// A user's data outside mailboxes, on either side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserMeta {
    pub subs: BTreeSet<MboxName>,
    pub seen: BTreeMap<UniqueId, SeenState>,
    /// Some of the values could not be read: that one is missing says nothing.
    #[serde(skip)]
    pub seen_incomplete: bool,
    pub sieve: BTreeMap<SieveName, SieveScript>,
    pub active: Option<SieveName>,
}

/// A limited resource of a quota root, under its csync name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum QuotaResource {
    /// KiB.
    Storage,
    /// Messages.
    Message,
    /// KiB of annotations.
    AnnotationStorage,
    /// Mailboxes.
    NumFolders,
}

/// Limits of one quota root; a resource that is absent is unlimited. Usage is the replica's own affair.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaLimits {
    pub limits: BTreeMap<QuotaResource, u64>,
    /// 0 where the release keeps none. Not compared.
    pub modseq: u64,
}

/// Everything a replica has of one account (or of the shared mailboxes that were asked for).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountView {
    pub mailboxes: Vec<MailboxView>,
    pub quotas: BTreeMap<QuotaRoot, QuotaLimits>,
    pub meta: UserMeta,
}
