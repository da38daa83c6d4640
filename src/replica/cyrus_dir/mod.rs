//! A directory in Cyrus's own format, `cyrus:///DIR`: what a Cyrus of 3.6 or later starts on as it is.
//!
//! `places` knows the layout (that of 3.6: everything under its uniqueid) and the imapd.conf, `lease` keeps everybody else
//! away, `list` has `mailboxes.db`, `held` one mailbox's files, `recent` those used last, `messages` brings bodies, `pins` keeps
//! reserved ones, `quota`, `limits` and `users` the rest, `promises` lets somebody who waits wait once, `aftermath` mends what a death has left, and
//! `store` puts them together into what a step does. All changes of files go through `disk`, which has `syncers` for what
//! is brought to the disk beside each other.

mod aftermath;
mod disk;
mod held;
mod lease;
mod limits;
mod list;
mod messages;
mod pins;
mod places;
mod promises;
mod quota;
mod recent;
mod rows;
mod store;
mod syncers;
mod users;

use crate::cyrus::FormatError;
use crate::model::{
    AccountView, AnnotCrc, Annotation, Body, BodySource, Capabilities, MailboxView, MboxName, MessageGuid, QuotaLimits,
    QuotaRoot, Replica, ReplicaError, ReplicaTarget, SieveName, Step, StoreError, Uid, UniqueId, UserId,
};
use disk::Disk;
use pins::Pins;
use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use store::Store;

pub use disk::{Hook, Verdict};

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
enum DirError {
    #[error("{path}: {error}")]
    Io { path: String, error: std::io::Error },
    #[error("{path}: {error}; run Cyrus's reconstruct on the mailbox, or take the file away and push it again")]
    Format { path: String, error: FormatError },
    #[error("{path}: {fault}")]
    Conf { path: PathBuf, fault: String },
    #[error("{dir} is in use by {who}; stop that first: two that write to one store destroy it")]
    Busy { dir: PathBuf, who: String },
    #[error("{0}")]
    Changed(String),
    #[error("no mailbox {0}")]
    NoSuchMailbox(MboxName),
    #[error("{0}")]
    Moved(String),
    #[error("{0}")]
    Refused(String),
    #[error("{error}")]
    Body { uid: Uid, error: StoreError },
}

impl DirError {
    fn io(path: &Path, error: std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), error }
    }

    fn format(path: &Path, error: FormatError) -> Self {
        Self::Format { path: path.display().to_string(), error }
    }
}

/// A directory by its URL. It is held from the first session on, until this is dropped.
pub struct CyrusDirTarget {
    name: String,
    root: PathBuf,
    disk: Disk,
    store: Mutex<Option<Arc<Store>>>,
}

impl CyrusDirTarget {
    /// `cyrus:///DIR`; the directory is made when the first session opens.
    pub fn new(url: &str) -> Result<Self, ReplicaError> {
        Self::with_hook(url, None)
    }

    /// The same, with somebody who is asked before every change of a file.
    pub fn with_hook(url: &str, hook: Option<Hook>) -> Result<Self, ReplicaError> {
        let path = url.strip_prefix("cyrus://").filter(|path| path.len() > 1 && path.starts_with('/'));
        let path = path.ok_or_else(|| ReplicaError::Fatal(format!("{url}: write cyrus:///DIR")))?;
        // Without a slash at the end: paths are compared.
        let root: PathBuf = Path::new(path).components().collect();
        Ok(Self { name: format!("cyrus://{}", root.display()), root, disk: Disk::new(hook), store: Mutex::default() })
    }
}

impl ReplicaTarget for CyrusDirTarget {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn open(&self) -> Result<Box<dyn Replica>, ReplicaError> {
        let mut held = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        let store = match &*held {
            Some(store) => store.clone(),
            None => {
                let opened = Store::open(&self.root, self.disk.clone());
                let store = Arc::new(opened.map_err(|error| ReplicaError::Fatal(error.to_string()))?);
                held.insert(store).clone()
            }
        };
        let pins = Pins::new(store.clone());
        Ok(Box::new(Session { store, pins, name: self.name(), written: 0, read: 0 }))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            annot_crc: AnnotCrc::New,
            checks_since: true,
            // A server knows the scripts in such a mailbox by a database of its own (SQLite); scripts in files it takes into
            // both by itself, when their owner or a delivery first asks for one.
            sieve_mailboxes: false,
            intermediates: true,
            keeps_savedate: true,
            message_annotations: true,
            quota_resources: true,
            server_annotations: true,
            keeps_options: true,
            lists_all: true,
        }
    }
}

struct Session {
    store: Arc<Store>,
    pins: Pins,
    name: String,
    /// Bytes of messages that came, and of what was looked at.
    written: u64,
    read: u64,
}

impl Session {
    fn check<T>(&self, result: Result<T, DirError>) -> Result<T, ReplicaError> {
        result.map_err(|error| match error {
            DirError::Io { .. } => ReplicaError::Lost { replica: self.name.clone(), cause: error.to_string() },
            DirError::Conf { .. } | DirError::Busy { .. } => ReplicaError::Fatal(error.to_string()),
            DirError::Format { .. } | DirError::Refused(_) => ReplicaError::Refused(error.to_string()),
            DirError::Changed(reason) => ReplicaError::Changed(reason),
            DirError::NoSuchMailbox(name) => ReplicaError::NoSuchMailbox(name.to_string()),
            DirError::Moved(reason) => ReplicaError::Moved(reason),
            DirError::Body { uid, error } => ReplicaError::Body { uid, error },
        })
    }

    /// One that is damaged is left out, so that its neighbours go on: whoever touches it hears why.
    fn views(&self, entries: Vec<crate::model::MailboxEntry>) -> Result<Vec<MailboxView>, ReplicaError> {
        let mut out = Vec::new();
        for entry in entries {
            match self.store.view(&entry) {
                Err(error @ DirError::Format { .. }) => {
                    tracing::warn!(mailbox = %entry.name, %error, "mailbox in the directory cannot be read");
                }
                view => out.extend(self.check(view)?),
            }
        }
        Ok(out)
    }

    fn user(
        &self,
        user: &UserId,
        action: impl FnOnce(&users::User<'_>) -> Result<(), DirError>,
    ) -> Result<(), DirError> {
        self.store.with_user(user, action)?.ok_or_else(|| DirError::NoSuchMailbox(user.inbox()))
    }

    /// What is taken away from somebody who is not there is gone.
    fn user_less(
        &self,
        user: &UserId,
        action: impl FnOnce(&users::User<'_>) -> Result<(), DirError>,
    ) -> Result<(), DirError> {
        self.store.with_user(user, action).map(Option::unwrap_or_default)
    }

    /// Which of these messages the mailboxes have, and where.
    fn those_of(&self, guids: &[MessageGuid], names: &[MboxName]) -> Result<messages::Elsewhere, DirError> {
        let asked: HashSet<&MessageGuid> = guids.iter().collect();
        self.store.messages_of(names, &|guid| asked.contains(guid))
    }

    fn apply(&mut self, step: &Step, bodies: &dyn BodySource) -> Result<(), DirError> {
        let store = &self.store;
        check_names(step)?;
        match step {
            Step::Mailbox(update) => {
                self.written += store.update(update, bodies, self.pins.files())?;
                Ok(())
            }
            Step::Rename { uniqueid, from, to, partition, uidvalidity } => {
                store.rename(uniqueid, from, to, partition, *uidvalidity)
            }
            Step::Remove { uniqueid, name } => store.remove(uniqueid, name),
            Step::Expunge { uniqueid, name, uids } => store.expunge(uniqueid, name, uids),
            Step::Subscribe { user, name } => self.user(user, |user| user.subscribe(name, true)),
            Step::Unsubscribe { user, name } => self.user_less(user, |user| user.subscribe(name, false)),
            Step::Seen { user, uniqueid, seen } => self.user(user, |user| user.seen(uniqueid, seen)),
            Step::Quota { root, limits } => store.quota(root, limits),
            Step::Unquota { root } => store.unquota(root),
            Step::ServerAnnotation(note) => store.server_note(&note.entry, &note.userid, Some(note)),
            Step::RemoveServerAnnotation { entry, userid } => store.server_note(entry, userid, None),
            Step::SievePut { user, name, last_update, content, .. } => {
                self.user(user, |user| user.put_script(name, *last_update, content))
            }
            Step::SieveRemove { user, name } => self.user_less(user, |user| user.remove_script(name)),
            Step::SieveActivate { user, name } => self.user(user, |user| user.activate(name)),
            Step::SieveDeactivate { user } => self.user_less(user, |user| user.deactivate()),
        }
    }
}

/// In the keys of `mailboxes.db` and of subscriptions some control characters stand for `.` and `!`: a name with one would
/// be the row of another mailbox. IMAP has none of them.
fn check_names(step: &Step) -> Result<(), DirError> {
    let name = match step {
        Step::Mailbox(update) => &update.head.name,
        Step::Rename { to, .. } => to,
        Step::Subscribe { name, .. } => name,
        _ => return Ok(()),
    };
    match name.as_bytes().iter().any(u8::is_ascii_control) {
        true => Err(DirError::Refused(format!("mailbox name {name:?} holds a control character"))),
        false => Ok(()),
    }
}

impl Replica for Session {
    fn view_user(&mut self, user: &UserId) -> Result<AccountView, ReplicaError> {
        let mailboxes = self.views(self.store.entries_of(user))?;
        let meta = self.check(self.store.with_user(user, |user| user.meta()))?.unwrap_or_default();
        Ok(AccountView { mailboxes, quotas: self.store.limits_of(user), meta })
    }

    fn view_mailboxes(&mut self, names: &[MboxName]) -> Result<Vec<MailboxView>, ReplicaError> {
        self.views(names.iter().filter_map(|name| self.store.entry(name)).collect())
    }

    fn view_full(&mut self, name: &MboxName) -> Result<Option<MailboxView>, ReplicaError> {
        let view = self.check(self.store.view_full(name))?;
        let records = view.as_ref().and_then(|view| view.records.as_ref()).map_or(0, Vec::len);
        self.read += (records * std::mem::size_of::<crate::model::Record>()) as u64;
        Ok(view)
    }

    fn view_uniqueid(&mut self, id: &UniqueId) -> Result<Option<MailboxView>, ReplicaError> {
        Ok(self.views(self.store.entry_of(id).into_iter().collect())?.pop())
    }

    fn view_quota(&mut self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, ReplicaError> {
        Ok(self.store.limits(root))
    }

    fn view_server_annotations(&mut self) -> Result<Vec<Annotation>, ReplicaError> {
        self.check(self.store.server_notes())
    }

    fn has_bodies(&mut self, guids: &[MessageGuid], names: &[MboxName]) -> Result<BTreeSet<MessageGuid>, ReplicaError> {
        let there = self.check(self.those_of(guids, names))?;
        Ok(guids.iter().filter(|guid| there.contains_key(*guid)).copied().collect())
    }

    fn reserve(&mut self, guids: &[MessageGuid], names: &[MboxName]) -> Result<BTreeSet<MessageGuid>, ReplicaError> {
        let there = self.check(self.those_of(guids, names))?;
        let pinned = self.pins.add(guids, &there);
        self.check(pinned)
    }

    fn body(&mut self, name: &MboxName, guid: &MessageGuid) -> Result<Option<Body>, ReplicaError> {
        let Some(path) = self.check(self.store.message(name, guid))? else { return Ok(None) };
        let open = || {
            let file = std::fs::File::open(&path)?;
            Ok(Body { size: file.metadata()?.len(), reader: Box::new(file) })
        };
        self.check(open().map(Some).map_err(|error| DirError::io(&path, error)))
    }

    fn script(&mut self, user: &UserId, name: &SieveName) -> Result<Option<Vec<u8>>, ReplicaError> {
        Ok(self.check(self.store.with_user(user, |user| user.script_text(name)))?.flatten())
    }

    fn apply(&mut self, step: &Step, bodies: &dyn BodySource) -> Result<(), ReplicaError> {
        let applied = self.store.settle().and_then(|()| Self::apply(self, step, bodies));
        if let Err(DirError::Io { .. }) = &applied {
            self.store.failed();
        }
        self.check(applied)
    }

    fn ping(&mut self) -> Result<(), ReplicaError> {
        self.check(self.store.ping())
    }

    /// Nothing but what was reserved is kept between steps.
    fn restart(&mut self) -> Result<(), ReplicaError> {
        self.pins.clear();
        Ok(())
    }

    fn be_quick(&mut self) {
        self.store.promises.begin(&self.store.places);
    }

    fn close(self: Box<Self>) {}

    fn traffic(&self) -> (u64, u64) {
        (self.written, self.read)
    }
}
