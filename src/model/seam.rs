//! The seams. A `MailStore` is read (live spool, archive), a `Replica` is written (csync, archive, Cyrus directory).
//! Nothing between them names either.

use super::{
    AccountView, Annotation, BodyRef, DirtyKey, Listing, MailboxEntry, MailboxHead, MailboxRef, MailboxSnapshot,
    MailboxView, MboxName, MessageGuid, QuotaLimits, QuotaRoot, Record, SieveName, Step, Uid, UniqueId, UserId,
    UserMeta,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

/// What the engine does with a failed job. Every room's error answers `disposition()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// Changed under our hands, locked, not there yet: again in a moment.
    RetrySoon,
    /// The connection is of no use any more; nothing is wrong with the mailbox.
    Reconnect,
    /// This mailbox (user) is damaged or refused; its neighbours go on.
    Quarantine,
    /// Our own configuration, credentials or state: nobody can go on.
    Stop,
}

/// A source could not be read.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    pub message: String,
    pub disposition: Disposition,
}

/// Why there is no session with a replica, where an admin has one thing to mend. Each has an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denial {
    /// Wrong user or password.
    Login,
    /// The login is good; the user is not an admin there.
    NotAdmin,
    /// Nothing that both sides can do and that we may do.
    Mechanism,
    /// TLS is wanted and not offered.
    NoTls,
    /// The server's certificate is not valid any more, or not yet.
    Expired,
    /// Nobody we believe has signed it, or it is not the pinned one.
    Stranger,
    /// It is for another name.
    OtherName,
    /// Any other end of a handshake.
    Tls,
    /// The server does not believe ours.
    OurCertificate,
    /// It took over from its source: nothing is pushed over it.
    Promoted,
}

/// A replica refused, or could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The connection broke or timed out; everything unconfirmed has to be said again on a new one.
    #[error("connection to {replica} lost: {cause}")]
    Lost { replica: String, cause: String },
    /// Credentials, rights, wrong kind of server: trying again does not help.
    #[error("{0}")]
    Fatal(String),
    /// The same, where it has a name of its own.
    #[error("{1}")]
    Denied(Denial, String),
    /// The replica does not hold what the update was based on (`SYNC_CHANGED`, `SYNC_CHECKSUM`): view it and diff anew.
    #[error("replica has changed: {0}")]
    Changed(String),
    /// The mailbox is not there under this name and uniqueid.
    #[error("replica has no such mailbox: {0}")]
    NoSuchMailbox(String),
    /// Name taken by another uniqueid, or the uniqueid by another name.
    #[error("name or uniqueid is taken on the replica: {0}")]
    Moved(String),
    /// Locked there just now.
    #[error("mailbox is locked on the replica: {0}")]
    Locked(String),
    /// The body to send does not match its record (missing, other size, other SHA-1); nothing was applied.
    #[error("{error}")]
    Body { uid: Uid, error: StoreError },
    /// Refused for good with this reason.
    #[error("replica refused: {0}")]
    Refused(String),
}

impl StoreError {
    pub fn new(disposition: Disposition, message: impl Into<String>) -> Self {
        Self { message: message.into(), disposition }
    }
}

impl ReplicaError {
    /// Trying again does not help until somebody has mended something.
    pub fn is_fatal(&self) -> bool {
        self.disposition() == Disposition::Stop
    }

    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Lost { .. } => Disposition::Reconnect,
            Self::Fatal(_) | Self::Denied(..) => Disposition::Stop,
            Self::Changed(_) | Self::NoSuchMailbox(_) | Self::Moved(_) | Self::Locked(_) => Disposition::RetrySoon,
            Self::Body { error, .. } => error.disposition,
            Self::Refused(_) => Disposition::Quarantine,
        }
    }
}

/// Cheap mark of a mailbox's on-disk state: equal marks mean nothing to replicate has changed.
/// Made from directory entry, stat and index header only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint(pub Vec<u8>);

/// Where a source keeps what its own files do not tell: the history of a store that keeps none. Losing it is allowed.
pub trait Memory: Send + Sync {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>>;

    /// All of these are seen, and become durable, together; `None` removes.
    fn put(&self, entries: Vec<(Vec<u8>, Option<Vec<u8>>)>);

    /// Every key there is.
    fn keys(&self) -> Vec<Vec<u8>>;
}

/// Bytes of one message, and how many there are.
pub struct Body {
    pub size: u64,
    pub reader: Box<dyn Read + Send>,
}

/// Gives bodies of one mailbox to a replica that applies an update of it.
pub trait BodySource: Sync {
    /// Opens a body. The bytes are not yet checked against the GUID: whoever sends or stores them does that, and
    /// never publishes bytes that do not match.
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError>;

    /// The message file is there. An expunged record may lose its file at any moment.
    fn exists(&self, _uid: Uid) -> bool {
        true
    }

    /// Where an admin finds it; `None` where that is no file.
    fn place(&self, _uid: Uid) -> Option<String> {
        None
    }

    /// The place where bodies are kept is there; otherwise nothing follows from one that is missing.
    fn is_there(&self) -> bool {
        true
    }

    /// The message file has further hard links: a copy of another message, so a replica may well have its GUID.
    fn has_copies(&self, _uid: Uid) -> bool {
        false
    }
}

/// What has changed in the shared database of annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChangedAnnotations {
    /// Mailboxes, some of which may not be listed.
    pub mailboxes: BTreeSet<MailboxRef>,
    /// Those of the server as well.
    pub server: bool,
}

/// Something mail is read from.
pub trait MailStore: Send + Sync {
    /// Stable identity: another store under the same path must give another value.
    fn identity(&self) -> Result<String, StoreError>;

    /// All mailboxes. An unreadable or missing list is an error, never an empty listing.
    fn listing(&self) -> Result<Arc<Listing>, StoreError>;

    /// One mailbox; `None` when it is gone meanwhile.
    fn mailbox(&self, entry: &MailboxEntry) -> Result<Option<MailboxSnapshot>, StoreError>;

    /// Cheap mark of one mailbox, for catch-up scans; `None` when it is gone meanwhile.
    fn fingerprint(&self, entry: &MailboxEntry) -> Result<Option<Fingerprint>, StoreError>;

    /// Mark of a user's data outside mailboxes.
    fn user_fingerprint(&self, user: &UserId) -> Result<Fingerprint, StoreError>;

    /// Those of several users, in their order; `None` where one cannot be had.
    fn user_fingerprints(&self, users: &[UserId]) -> Vec<Option<Fingerprint>> {
        users.iter().map(|user| self.user_fingerprint(user).ok()).collect()
    }

    /// Bodies of one mailbox.
    fn bodies(&self, entry: &MailboxEntry) -> Result<Box<dyn BodySource>, StoreError>;

    /// Users that have an INBOX or any data of their own.
    fn users(&self) -> Result<Vec<UserId>, StoreError>;

    /// Subscriptions, seen state, Sieve scripts; all empty for a user the store does not know.
    fn user_meta(&self, user: &UserId) -> Result<UserMeta, StoreError>;

    /// All quota roots with their limits.
    fn quotas(&self) -> Result<BTreeMap<QuotaRoot, QuotaLimits>, StoreError>;

    /// The names of all quota roots, sorted, and perhaps some that are none. Asked once for each user when all are compared.
    fn quota_roots(&self) -> Result<Arc<[QuotaRoot]>, StoreError> {
        Ok(self.quotas()?.into_keys().collect())
    }

    /// One quota root; `None` when it does not exist.
    fn quota(&self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, StoreError>;

    /// Mailboxes whose records follow from this user's seen database (before 2.4) and whose value there is another one
    /// than when this was last asked.
    fn follows_seen(&self, _user: &UserId) -> Result<Vec<UniqueId>, StoreError> {
        Ok(Vec::new())
    }

    /// Said once, before the first reading, to a store that needs a memory; without one it remembers until it is closed.
    fn remember_in(&self, _memory: Arc<dyn Memory>) {}

    /// False while a writer is at work on the database that this key is about: of what he has not committed he may have
    /// told already (Cyrus's `ANNOTATION` and `SEEN` records are written in the middle of the transaction), and nobody
    /// tells of it again. Asked before the reading; waits for nobody.
    fn is_settled(&self, _key: &DirtyKey) -> bool {
        true
    }

    /// Server-level annotations, sorted.
    fn server_annotations(&self) -> Result<Vec<Annotation>, StoreError>;

    /// Annotations of every mailbox that has any: by uniqueid, with the mark by which a change is noticed.
    fn annotated_mailboxes(&self) -> Result<BTreeMap<UniqueId, Vec<Annotation>>, StoreError>;

    /// Whose annotations, by whatever the store keeps them under, are not what they were when this was last asked; the
    /// first time, all that there are. One asks on behalf of all.
    fn changed_annotations(&self) -> Result<ChangedAnnotations, StoreError>;

    /// What the store holds and no replication carries: the object, and what becomes of it.
    fn not_carried(&self) -> Result<Vec<(String, String)>, StoreError> {
        Ok(Vec::new())
    }

    /// Sieve scripts live in mailboxes of type `f` (3.6 and later) and travel as those.
    fn sieve_in_mailboxes(&self) -> bool;

    /// imapd.conf `deletedprefix`.
    fn deleted_prefix(&self) -> &[u8];
}

/// One session with something mail is replicated to. One owner at a time; order of calls is order of effect.
pub trait Replica: Send {
    /// Mailboxes, quota roots and meta of a user; empty for one it does not know.
    fn view_user(&mut self, user: &UserId) -> Result<AccountView, ReplicaError>;

    /// The named mailboxes, those that exist, without records.
    fn view_mailboxes(&mut self, names: &[MboxName]) -> Result<Vec<MailboxView>, ReplicaError>;

    /// One mailbox with all records; `None` if there is none of that name.
    fn view_full(&mut self, name: &MboxName) -> Result<Option<MailboxView>, ReplicaError>;

    /// The mailbox of this uniqueid, whatever its name, without records; `None` also where a replica cannot be asked so.
    fn view_uniqueid(&mut self, _id: &UniqueId) -> Result<Option<MailboxView>, ReplicaError> {
        Ok(None)
    }

    /// One quota root; `None` if it does not exist there.
    fn view_quota(&mut self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, ReplicaError>;

    /// Server-level annotations, sorted.
    fn view_server_annotations(&mut self) -> Result<Vec<Annotation>, ReplicaError>;

    /// Which of these bodies the replica has; `names` are mailboxes in which they may be.
    fn has_bodies(&mut self, guids: &[MessageGuid], names: &[MboxName]) -> Result<BTreeSet<MessageGuid>, ReplicaError> {
        let mut found = BTreeSet::new();
        for name in names {
            let records = self.view_full(name)?.and_then(|view| view.records).unwrap_or_default();
            found.extend(records.iter().filter(|record| !record.is_expunged()).map(|record| record.guid));
        }
        found.retain(|guid| guids.contains(guid));
        Ok(found)
    }

    /// The same; what is found stays at hand for the updates of this session, whatever becomes of those mailboxes,
    /// until `restart`.
    fn reserve(&mut self, guids: &[MessageGuid], names: &[MboxName]) -> Result<BTreeSet<MessageGuid>, ReplicaError> {
        self.has_bodies(guids, names)
    }

    /// A body that a mailbox there has; `None` also where a replica gives none back.
    fn body(&mut self, _name: &MboxName, _guid: &MessageGuid) -> Result<Option<Body>, ReplicaError> {
        Ok(None)
    }

    /// What a mailbox there keeps as the message of this record; `None` also where a replica gives none back.
    fn message(&mut self, head: &MailboxHead, record: &Record) -> Result<Option<Body>, ReplicaError> {
        self.body(&head.name, &record.guid)
    }

    /// The text of a Sieve script; `None` also where a replica gives none back.
    fn script(&mut self, _user: &UserId, _name: &SieveName) -> Result<Option<Vec<u8>>, ReplicaError> {
        Ok(None)
    }

    /// Applies one step; `Ok` means the replica confirmed it. Bodies are taken from `bodies` while sending.
    fn apply(&mut self, step: &Step, bodies: &dyn BodySource) -> Result<(), ReplicaError>;

    /// Keeps an idle session alive, or notices that it is dead.
    fn ping(&mut self) -> Result<(), ReplicaError>;

    /// Drops what is staged for this session; done now and then so that nothing piles up.
    fn restart(&mut self) -> Result<(), ReplicaError>;

    /// From now on somebody waits for each confirmation: a replica that has to do more than make sure that nothing is lost may
    /// do it behind the confirmation.
    fn be_quick(&mut self) {}

    /// Says goodbye.
    fn close(self: Box<Self>);

    /// When the last bytes of what was asked last were handed to the network, where there is one.
    fn sent_at(&self) -> Option<Instant> {
        None
    }

    /// Bytes before and after compression that were written since it is on; `None` where it is not.
    fn compression(&self) -> Option<(u64, u64)> {
        None
    }

    /// Bytes written to and read from the replica so far.
    fn traffic(&self) -> (u64, u64);
}

/// What a replica of this kind and release can hold; the engine asks this, never for a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// How the annotation checksum is to be computed for it.
    pub annot_crc: AnnotCrc,
    /// Refuses an update whose `since` is not what it holds.
    pub checks_since: bool,
    /// Takes mailboxes of type `f`.
    pub sieve_mailboxes: bool,
    /// Takes place holders for parents.
    pub intermediates: bool,
    /// Keeps savedate and createdmodseq.
    pub keeps_savedate: bool,
    /// Can hold message annotations.
    pub message_annotations: bool,
    /// Can limit other things than storage.
    pub quota_resources: bool,
    /// Can be told annotations of the server itself.
    pub server_annotations: bool,
    /// Takes changed options of a mailbox, not only those it was made with, and the date of POP3_SHOW_AFTER.
    pub keeps_options: bool,
    /// The view of a user has all his mailboxes in it. Else the deleted ones may be missing, and all of them without an INBOX.
    pub lists_all: bool,
}

/// Which rule the annotation checksum follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnnotCrc {
    /// The replica has none: send 0.
    None,
    /// 2.5 and 3.0: start 0, thrid only.
    Old,
    /// 3.2 and later: start 12345678; thrid, savedate, createdmodseq by index version.
    New,
}

/// Opens sessions with one replica.
pub trait ReplicaTarget: Send + Sync {
    /// Name in logs, metrics and state: a URL without secrets.
    fn name(&self) -> String;

    /// A new session; blocks until it is usable.
    fn open(&self) -> Result<Box<dyn Replica>, ReplicaError>;

    /// Known after the first session was opened.
    fn capabilities(&self) -> Capabilities;
}
