//! Hints: what a source of change saw (`Notice`) and what may differ now (`DirtyKey`).

use super::{MboxName, QuotaRoot, UniqueId, UserId};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Instant;

/// A mailbox as a path names it: by-name layouts give the name, the uniqueid layout gives the id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum MailboxRef {
    Name(MboxName),
    Id(UniqueId),
}

/// A user as a path names it: by user id, or by the uniqueid of the INBOX (3.6 and later).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum UserRef {
    Name(UserId),
    Inbox(UniqueId),
}

/// Part of a user's data outside mailboxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum UserPart {
    Subs,
    Seen,
    Sieve,
}

/// What has to be looked at again in full because notices were lost.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Scope {
    Everything,
    /// This mailbox and all below it.
    Below(MboxName),
}

/// What may differ now from what the replica has. A hint, never a fact: over-reporting costs one read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum DirtyKey {
    /// mailboxes.db: which mailboxes exist, their names, ACLs, partitions.
    MailboxList,
    /// The global annotations database: mailbox and server annotations.
    Annotations,
    /// Index, header, message annotations or files of one mailbox.
    Mailbox(MailboxRef),
    /// A mailbox was open, perhaps only to be read: whether its files changed is to be seen there.
    Accessed(MailboxRef),
    User(UserRef, UserPart),
    Quota(QuotaRoot),
    /// A single quota database holds all roots (`quota_db` other than quotalegacy).
    AllQuotas,
    /// Notices were lost: compare this scope with the receipts.
    Rescan(Scope),
}

impl fmt::Display for DirtyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MailboxList => f.write_str("mailbox-list"),
            Self::Annotations => f.write_str("annotations"),
            Self::Mailbox(MailboxRef::Name(name)) => write!(f, "mailbox {name}"),
            Self::Mailbox(MailboxRef::Id(id)) => write!(f, "mailbox-id {id}"),
            Self::Accessed(MailboxRef::Name(name)) => write!(f, "accessed {name}"),
            Self::Accessed(MailboxRef::Id(id)) => write!(f, "accessed-id {id}"),
            Self::User(user, part) => {
                let part = match part {
                    UserPart::Subs => "subs",
                    UserPart::Seen => "seen",
                    UserPart::Sieve => "sieve",
                };
                match user {
                    UserRef::Name(user) => write!(f, "{part} {user}"),
                    UserRef::Inbox(id) => write!(f, "{part}-id {id}"),
                }
            }
            Self::Quota(root) => write!(f, "quota {root}"),
            Self::AllQuotas => f.write_str("quotas"),
            Self::Rescan(Scope::Everything) => f.write_str("rescan"),
            Self::Rescan(Scope::Below(name)) => write!(f, "rescan {name}"),
        }
    }
}

/// One hint with the time the kernel told us; that time is kept to the end and is our lag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub key: DirtyKey,
    pub seen_at: Instant,
}
