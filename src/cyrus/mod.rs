//! Bytes in, values out, for every file Cyrus writes. No paths opened, no clock, no async.

pub mod annotations;
pub mod bytes;
pub mod date;
pub mod db;
pub mod header;
pub mod imapd_conf;
pub mod index;
pub mod mboxlist;
pub mod names;
pub mod quota;
pub mod seen;
pub mod sieve;
pub mod subs;
pub mod sync_log;
pub mod synccrc;
pub mod user_deny;

use crate::model::{MailboxEntry, MailboxHead, ModSeq};

/// A file did not have the shape its format promises.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part} at byte {offset:#x}: {fault}")]
pub struct FormatError {
    pub part: &'static str,
    pub offset: u64,
    pub fault: Fault,
}

/// What is wrong at that place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("{need} bytes expected, {have} are there")]
    Truncated { need: u64, have: u64 },
    #[error("magic bytes are not those of this format")]
    Magic,
    #[error("crc is {stored:08x}, expected {computed:08x}")]
    Crc { stored: u32, computed: u32 },
    /// Unknown is not damaged: a version or backend this release of spooltap cannot read.
    #[error("{0}")]
    Unsupported(String),
    /// What a good file can look like while its owner writes it: read again. Damage only when it stays so.
    #[error("changed while it was read (damaged if this stays): {0}")]
    Torn(&'static str),
    #[error("{0}")]
    Value(String),
}

/// What row, index and header of a mailbox say of it together; `highest` is the highest modseq of its records.
pub fn head_of(
    entry: &MailboxEntry,
    index: &index::IndexHeader,
    header: &header::MailboxHeader,
    highest: ModSeq,
) -> MailboxHead {
    MailboxHead {
        uniqueid: entry.uniqueid.clone(),
        name: entry.name.clone(),
        mbtype: entry.mbtype.clone(),
        partition: entry.partition.clone(),
        acl: entry.acl.clone(),
        options: index.options(),
        uidvalidity: index.uidvalidity,
        last_uid: index.last_uid,
        highestmodseq: index.highestmodseq.max(highest).max(ModSeq(1)),
        recentuid: index.recentuid,
        recenttime: index.recenttime,
        last_appenddate: index.last_appenddate,
        pop3_last_login: index.pop3_last_login,
        pop3_show_after: index.pop3_show_after,
        createdmodseq: if index.createdmodseq > ModSeq(0) { index.createdmodseq } else { entry.createdmodseq },
        foldermodseq: entry.foldermodseq,
        xconvmodseq: ModSeq(0),
        raclmodseq: ModSeq(0),
        quotaroot: header.quotaroot.clone(),
    }
}

impl FormatError {
    /// A value that cannot be right.
    pub fn value(part: &'static str, offset: u64, fault: impl Into<String>) -> Self {
        Self { part, offset, fault: Fault::Value(fault.into()) }
    }

    /// The file may be good and only have been read at a bad moment (most checksums cover bytes rewritten in place):
    /// read again, a few times.
    pub fn is_torn(&self) -> bool {
        matches!(self.fault, Fault::Torn(_) | Fault::Crc { .. })
    }

    /// Not damaged: a format or version that is not known here.
    pub fn is_unsupported(&self) -> bool {
        matches!(self.fault, Fault::Unsupported(_))
    }

    /// Places list text that was found at `offset` of the file.
    pub fn in_list(part: &'static str, offset: u64, error: crate::dlist::DlistError) -> Self {
        Self::value(part, offset.saturating_add(error.offset as u64), error.fault)
    }
}
