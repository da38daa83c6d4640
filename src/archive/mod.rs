//! Mail stores kept through `object_store`: `file:///DIR` or `s3://BUCKET/FOLDER`; another place is an arm in `Objects::open`.
//!
//! Message bodies are objects named by their GUID, written once. Everything else is state: one chain of generations
//! per mailbox and per user, one for the index of mailboxes, one for quotas and server annotations (see `chain`).
//! Publishing goes bodies first, then the mailbox, then the index; each of these is one atomic step, so whatever is
//! cut off leaves the state before it. Where somebody waits for the confirmation, a few small bodies are in the mailbox's object
//! first and become objects of their own behind it (`afterwards`); that object is promised (`redo`) before it is on the disk by itself. The layout with examples is in `docs/archive.md`.
//!
//! `Archive` is the room's front door for writers (`replica::archive`), `ArchiveStore` reads an archive as a
//! `MailStore`. All calls block; none may be made on a thread that runs async tasks.

mod accounts;
mod afterwards;
mod bodies;
mod chain;
mod index;
mod local;
mod mailbox;
mod objects;
mod promised;
mod redo;
mod shapes;
mod store;
mod text;
mod writer;

use bodies::Carried;
pub use bodies::PutError;
pub use mailbox::{ANNOT_RULE, Change, Mailbox, Refusal, merge};
pub(crate) use redo::{Left as LeftPromises, Promise, Redo};
pub use store::ArchiveStore;
pub use writer::{ApplyError, Writer};

use crate::model::{Body, Disposition, MailboxView, MboxName, MessageGuid, UniqueId};
use afterwards::Afterwards;
use chain::{Chain, Left};
use object_store::ObjectStore;
use objects::Objects;
use shapes::{About, Row, StoredBody, StoredMailbox};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// An archive could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("{object}: {cause}")]
    Store { object: String, cause: object_store::Error },
    #[error("{object}: {fault}")]
    Format { object: String, fault: String },
    /// Somebody else has published first; nothing of ours was.
    #[error("{object}: somebody else has written to it meanwhile")]
    Conflict { object: String },
    #[error("archive {url:?}: {fault}")]
    Url { url: String, fault: String },
    #[error("archive: {0}")]
    Runtime(String),
}

impl ArchiveError {
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Store {
                cause: object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. },
                ..
            }
            | Self::Url { .. } => Disposition::Stop,
            Self::Store { .. } | Self::Runtime(_) => Disposition::Reconnect,
            Self::Conflict { .. } => Disposition::RetrySoon,
            Self::Format { .. } => Disposition::Quarantine,
        }
    }
}

/// A place where a mail store is kept. Cheap to clone; clones share what they remember.
#[derive(Clone)]
pub struct Archive {
    objects: Objects,
    index: Arc<index::Index>,
    cache: Arc<Mutex<Cache>>,
    afterwards: Arc<Afterwards>,
}

const ABOUT: &str = "archive.json";

impl Archive {
    /// `file:///DIR`, whether there is an archive yet or not.
    pub fn open(url: &str) -> Result<Self, ArchiveError> {
        Ok(Self::at(Objects::open(url)?))
    }

    /// An archive at the root of any object store; `name` stands in messages.
    pub fn with_store(store: Arc<dyn ObjectStore>, name: &str) -> Self {
        Self::at(Objects::new(store, Default::default(), name, None))
    }

    fn at(objects: Objects) -> Self {
        Self { objects, index: Arc::default(), cache: Arc::default(), afterwards: Arc::default() }
    }

    /// The URL.
    pub fn name(&self) -> &str {
        &self.objects.name
    }

    /// Identity of the archive; `None` where there is none yet.
    pub fn id(&self) -> Result<Option<String>, ArchiveError> {
        let Some(bytes) = self.objects.get(ABOUT)? else { return Ok(None) };
        let about: About = chain::decode(&bytes, About::KIND)
            .map_err(|fault| ArchiveError::Format { object: format!("{}/{ABOUT}", self.name()), fault })?;
        Ok(Some(about.id))
    }

    /// Makes an archive where there is none, and returns its identity.
    pub fn ensure(&self) -> Result<String, ArchiveError> {
        if let Some(id) = self.id()? {
            return Ok(id);
        }
        // Two hashers with keys of the operating system's making: unique, which is all that is asked of it.
        let random = || RandomState::new().hash_one(std::process::id());
        let id = format!("{:016x}{:016x}", random(), random());
        let about = About { format: chain::FORMAT, kind: About::KIND.to_owned(), id: id.clone() };
        if self.objects.create(ABOUT, chain::encode(&about)?)? { Ok(id) } else { Ok(self.id()?.unwrap_or_default()) }
    }

    /// A session that writes, with traffic counters of its own.
    pub fn writer(&self) -> Writer {
        Writer::new(Self { objects: self.objects.counted_apart(), ..self.clone() })
    }

    fn folder(id: &UniqueId) -> String {
        format!("mailboxes/{}", text::path_part(id.as_bytes()))
    }

    /// Views of mailboxes without their records, in the order of `rows`. One that vanishes meanwhile is left out, and one
    /// that is damaged too, so that its neighbours go on: whoever touches it hears why it cannot be read.
    fn heads(&self, rows: Vec<(MboxName, Row)>) -> Result<Vec<MailboxView>, ArchiveError> {
        let cache = self.cache.clone();
        let views = self.objects.many(rows, move |objects, (name, row)| {
            if let Some(mut view) = Self::known(objects, &cache, &row.uniqueid)? {
                row.override_head(&name, &mut view.head);
                return Ok(Some(view));
            }
            let stored = match chain::load_newest::<StoredMailbox>(objects, &Self::folder(&row.uniqueid)) {
                Err(error @ ArchiveError::Format { .. }) => {
                    tracing::warn!(mailbox = %name, %error, "mailbox in the archive cannot be read");
                    None
                }
                stored => stored?,
            };
            Ok(stored.map(|stored| {
                let mut view = Mailbox::view_of(stored);
                row.override_head(&name, &mut view.head);
                view
            }))
        })?;
        Ok(views.into_iter().flatten().collect())
    }

    /// What is remembered of a mailbox, if it is what is published.
    fn known(objects: &Objects, cache: &Mutex<Cache>, id: &UniqueId) -> Result<Option<MailboxView>, ArchiveError> {
        let lock = || cache.lock().unwrap_or_else(PoisonError::into_inner);
        if !lock().mailboxes.contains_key(id) {
            return Ok(None);
        }
        let newest = chain::newest(objects, &Self::folder(id))?;
        let cache = lock();
        let known = cache.mailboxes.get(id).filter(|(_, chain, _)| newest.is_some_and(|newest| chain.ends_in(&newest)));
        Ok(known.map(|(_, _, mailbox)| mailbox.head_view()))
    }

    /// A mailbox as it is published now; `None` when it has no objects.
    fn load(&self, name: &MboxName, row: &Row) -> Result<Option<(Chain, Mailbox)>, ArchiveError> {
        let folder = Self::folder(&row.uniqueid);
        self.afterwards.wait(&row.uniqueid);
        let mut loaded = self.cache().take(&row.uniqueid);
        if let Some((chain, _)) = &loaded
            && !chain.is_current(&self.objects, &folder)?
        {
            loaded = None;
        }
        if loaded.is_none() {
            let read = chain::load::<StoredMailbox>(&self.objects, &folder)?;
            let object = || format!("{}/{folder}", self.name());
            loaded = read.map(|(chain, stored)| Ok((chain, Mailbox::load(stored, &object())?))).transpose()?;
        }
        Ok(loaded.map(|(chain, mut mailbox)| {
            row.override_head(name, &mut mailbox.head);
            (chain, mailbox)
        }))
    }

    fn keep(&self, id: &UniqueId, chain: Chain, mailbox: Mailbox) {
        self.cache().put(id, chain, mailbox);
    }

    /// Sees to it that what a mailbox's objects carry is where it belongs, so that something can be published on top of them.
    fn unload(&self, id: &UniqueId, chain: &mut Chain) -> Result<(), ArchiveError> {
        if chain.carries {
            let stored = chain::load::<StoredMailbox>(&self.objects, &Self::folder(id))?;
            bodies::lay_down(&self.objects, stored.map(|(_, stored)| stored.bodies).unwrap_or_default())?;
            chain.carries = false;
        }
        Ok(())
    }

    /// Does behind a confirmation what it need not wait for. Where that fails, `unload` finds it.
    fn afterwards(&self, id: &UniqueId, chain: &Chain, carried: Carried, left: Left) -> Result<(), ArchiveError> {
        let busy = self.afterwards.begin(id, carried.keys().copied().collect());
        let (archive, id, chain) = (self.clone(), id.clone(), chain.clone());
        self.objects.behind(move || {
            let settled = archive.objects.settle(&Self::folder(&id));
            let laid_down = settled.and_then(|()| bodies::lay_down(&archive.objects, carried));
            left.sweep(&archive.objects);
            match laid_down {
                Ok(()) => archive.shorten(&id, chain),
                Err(error) => tracing::warn!(mailbox = %id, %error, "bodies stay in the mailbox's object for now"),
            }
            drop(busy);
            archive.objects.provide();
        })
    }

    /// Takes in generations that an update has left for later, all its bodies being objects of their own.
    fn shorten(&self, id: &UniqueId, mut chain: Chain) {
        chain.carries = false;
        let newest = chain.newest();
        let chain = match chain::shorten::<StoredMailbox>(&self.objects, &Self::folder(id), &chain) {
            Ok(Some((shorter, left))) => {
                left.sweep(&self.objects);
                shorter
            }
            Ok(None) => chain,
            // The next one does it.
            Err(error) => {
                tracing::debug!(mailbox = %id, %error, "its generations stay as they are");
                chain
            }
        };
        self.cache().rechained(id, newest, chain);
    }

    /// A body that an object of this mailbox carries.
    fn carried_body(&self, id: &UniqueId, guid: &MessageGuid) -> Result<Option<Body>, ArchiveError> {
        let stored = chain::load::<StoredMailbox>(&self.objects, &Self::folder(id))?;
        let body = stored.and_then(|(_, mut stored)| stored.bodies.remove(guid));
        Ok(body.map(|StoredBody(bytes)| Body { size: bytes.len() as u64, reader: Box::new(io::Cursor::new(bytes)) }))
    }

    /// A body, if one of this name is there or this mailbox has it.
    fn body(&self, guid: &MessageGuid, id: Option<&UniqueId>) -> Result<Option<Body>, ArchiveError> {
        let find = || self.objects.stream(&bodies::body_path(guid));
        let mut found = find()?;
        if found.is_none()
            && let Some(id) = id
        {
            match self.carried_body(id, guid)? {
                // It may have become an object of its own just now.
                None => found = find()?,
                body => return Ok(body),
            }
        }
        Ok(found.map(|(size, reader)| Body { size, reader: Box::new(reader) }))
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Mailboxes that were written lately, so that a flag change need not read a whole mailbox. Bounded by records.
#[derive(Default)]
struct Cache {
    mailboxes: HashMap<UniqueId, (u64, Chain, Mailbox)>,
    records: usize,
    clock: u64,
}

impl Cache {
    /// About 100 MB.
    const RECORDS: usize = 400_000;
    /// An empty mailbox takes memory too.
    const LEAST: usize = 8;

    fn weight(mailbox: &Mailbox) -> usize {
        mailbox.records.len() + Self::LEAST
    }

    /// Takes it out: whoever changes a mailbox owns it, and what fails half-way is not remembered.
    fn take(&mut self, id: &UniqueId) -> Option<(Chain, Mailbox)> {
        let (_, chain, mailbox) = self.mailboxes.remove(id)?;
        self.records -= Self::weight(&mailbox);
        Some((chain, mailbox))
    }

    /// What is remembered as ending in `newest` is in these generations now.
    fn rechained(&mut self, id: &UniqueId, newest: u64, new: Chain) {
        if let Some((_, chain, _)) = self.mailboxes.get_mut(id)
            && chain.newest() == newest
        {
            *chain = new;
        }
    }

    fn put(&mut self, id: &UniqueId, chain: Chain, mailbox: Mailbox) {
        self.take(id);
        self.records += Self::weight(&mailbox);
        self.clock += 1;
        self.mailboxes.insert(id.clone(), (self.clock, chain, mailbox));
        while self.records > Self::RECORDS {
            let oldest = self.mailboxes.iter().min_by_key(|(_, (used, ..))| *used).map(|(id, _)| id.clone());
            let Some(oldest) = oldest else { break };
            self.take(&oldest);
        }
    }
}
