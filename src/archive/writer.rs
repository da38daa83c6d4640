//! Applies steps to an archive. Each is idempotent, and each publishes at most one mailbox object and one change of
//! the index, in this order, after the bodies.

use super::bodies::{self, Carried, PutError};
use super::chain::{self, Chain, Left, Pace};
use super::mailbox::{Change, Mailbox, Refusal};
use super::shapes::{Row, StoredIndex, StoredScript};
use super::{Archive, ArchiveError, accounts};
use crate::model::{
    AccountView, Annotation, Body, BodySource, MailboxHead, MailboxUpdate, MailboxView, MboxName, MessageGuid,
    QuotaLimits, QuotaRoot, SieveName, Step, Uid, UniqueId, UserId,
};
use std::collections::BTreeSet;

/// Why a step was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("{0}")]
    Archive(#[from] ArchiveError),
    /// The mailbox is not what the update was made for.
    #[error("{0}")]
    Changed(String),
    #[error("no mailbox {0}")]
    NoSuchMailbox(MboxName),
    /// Name taken by another uniqueid, or the uniqueid by another name.
    #[error("{0}")]
    Moved(String),
    #[error("{0}")]
    Refused(String),
    /// A body is not what its record says.
    #[error("{error}")]
    Body { uid: crate::model::Uid, error: crate::model::StoreError },
}

impl From<PutError> for ApplyError {
    fn from(error: PutError) -> Self {
        match error {
            PutError::Body { uid, error } => Self::Body { uid, error },
            PutError::Archive(error) => Self::Archive(error),
        }
    }
}

impl From<Refusal> for ApplyError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Changed(reason) => Self::Changed(reason),
            Refusal::Never(reason) => Self::Refused(reason),
        }
    }
}

/// An update that others see, and what is left to do about it.
struct Published {
    chain: Chain,
    change: Change,
    carried: Carried,
    left: Left,
}

/// One session that writes to an archive.
pub struct Writer {
    archive: Archive,
    /// What a confirmation need not wait for is done behind it.
    is_awaited: bool,
}

impl Writer {
    pub(super) fn new(archive: Archive) -> Self {
        Self { archive, is_awaited: false }
    }

    /// From now on somebody waits for each confirmation: what it need not wait for is done behind it, until `finish`.
    pub fn be_quick(&mut self) {
        self.is_awaited = true;
        let objects = self.archive.objects.clone();
        // Without, it is only slower.
        let _ = self.archive.objects.behind(move || objects.provide());
    }

    /// Everything is where it belongs.
    pub fn finish(&self) {
        self.archive.afterwards.wait_all();
    }

    /// Bytes written and read by this session.
    pub fn traffic(&self) -> (u64, u64) {
        self.archive.objects.traffic()
    }

    /// Asks the object store whether it is there.
    pub fn ping(&self) -> Result<(), ArchiveError> {
        self.archive.id().map(drop)
    }

    /// Applies one step; `Ok` means that it is published.
    pub fn apply(&self, step: &Step, bodies: &dyn BodySource) -> Result<(), ApplyError> {
        let objects = &self.archive.objects;
        match step {
            Step::Mailbox(update) => return self.mailbox(update, bodies),
            Step::Rename { uniqueid, from, to, partition, uidvalidity } => {
                return self.rename(uniqueid, from, to, |row| {
                    row.partition = partition.clone();
                    row.uidvalidity = *uidvalidity;
                });
            }
            Step::Remove { uniqueid, name } => return self.remove(uniqueid, name),
            Step::Expunge { uniqueid, name, uids } => return self.expunge(uniqueid, name, uids),
            Step::Subscribe { user, name } => accounts::change_user(objects, user, |stored| {
                stored.subscribed.insert(name.clone());
            }),
            Step::Unsubscribe { user, name } => accounts::change_user(objects, user, |stored| {
                stored.subscribed.remove(name);
            }),
            Step::Seen { user, uniqueid, seen } => accounts::change_user(objects, user, |stored| {
                stored.seen.insert(uniqueid.clone(), seen.into());
            }),
            Step::Quota { root, limits } => accounts::set_quota(objects, root, Some(limits)),
            Step::Unquota { root } => accounts::set_quota(objects, root, None),
            Step::ServerAnnotation(annotation) => {
                accounts::change_annotations(objects, |all| replace_annotation(all, annotation))
            }
            Step::RemoveServerAnnotation { entry, userid } => accounts::change_annotations(objects, |all| {
                all.retain(|old| old.entry != *entry || old.userid != *userid);
            }),
            Step::SievePut { user, name, last_update, content, .. } => {
                let guid = bodies::put_script(objects, content)?;
                accounts::change_user(objects, user, |stored| {
                    stored.sieve.insert(name.clone(), StoredScript { guid, last_update: *last_update });
                })
            }
            Step::SieveRemove { user, name } => accounts::change_user(objects, user, |stored| {
                stored.sieve.remove(name);
                stored.active.take_if(|active| active == name);
            }),
            Step::SieveActivate { user, name } => accounts::change_user(objects, user, |stored| {
                stored.active = Some(name.clone());
            }),
            Step::SieveDeactivate { user } => accounts::change_user(objects, user, |stored| stored.active = None),
        }?;
        Ok(())
    }

    fn mailbox(&self, update: &MailboxUpdate, source: &dyn BodySource) -> Result<(), ApplyError> {
        let id = &update.head.uniqueid;
        let known = self.archive.index.look(&self.archive.objects, |rows| {
            let row = rows.row(&update.head.name).cloned();
            (row, rows.name(id).cloned())
        })?;
        let row = match known {
            (Some(row), _) if row.uniqueid != *id => {
                return Err(ApplyError::Moved(format!("{} has the uniqueid {}", update.head.name, row.uniqueid)));
            }
            (_, Some(name)) if name != update.head.name => {
                return Err(ApplyError::Moved(format!("the mailbox {id} is called {name}")));
            }
            (row, _) => row,
        };
        let loaded = match &row {
            Some(row) => self.archive.load(&update.head.name, row)?,
            None => None,
        };
        let anew = loaded.is_none();
        if anew && !update.create {
            return Err(ApplyError::NoSuchMailbox(update.head.name.clone()));
        }
        let (mut chain, mailbox) = match loaded {
            Some(loaded) => loaded,
            // Objects without a row are what a removal that was cut off has left: they count for nothing.
            None => (self.left_over(id)?, Mailbox::default()),
        };
        let result = self.publish_update(update, source, &mut chain, &mailbox, anew);
        match result {
            Ok(None) => self.archive.keep(id, chain, mailbox),
            Ok(Some(Published { chain, change, carried, left })) => {
                let mut mailbox = mailbox;
                mailbox.apply(change);
                self.archive.keep(id, chain.clone(), mailbox);
                match self.is_awaited {
                    true => self.archive.afterwards(id, &chain, carried, left)?,
                    false => left.sweep(&self.archive.objects),
                }
            }
            Err(error) => {
                if !anew && matches!(error, ApplyError::Changed(_) | ApplyError::Body { .. }) {
                    self.archive.keep(id, chain, mailbox);
                }
                return Err(error);
            }
        }
        match row {
            Some(row) if row == Row::of(&update.head) => Ok(()),
            _ => self.set_row(&update.head),
        }
    }

    fn left_over(&self, id: &UniqueId) -> Result<Chain, ArchiveError> {
        let folder = Archive::folder(id);
        chain::numbering(&self.archive.objects, &folder)
    }

    /// Puts bodies and publishes the mailbox; `None` when it is as the update wants it already.
    fn publish_update(
        &self,
        update: &MailboxUpdate,
        source: &dyn BodySource,
        chain: &mut Chain,
        mailbox: &Mailbox,
        anew: bool,
    ) -> Result<Option<Published>, ApplyError> {
        let change = match mailbox.plan(update) {
            // Said again because the confirmation was lost: the state it was made for has passed, but its records are
            // here. What else it says are whole values, of which the index may lack some yet.
            Err(Refusal::Changed(reason)) if update.since.is_some() => {
                let again = mailbox.plan(&MailboxUpdate { since: None, ..update.clone() });
                let is_done = |change: &Change| {
                    change.records.is_empty() && change.head.highestmodseq == mailbox.head.highestmodseq
                };
                again.ok().filter(is_done).ok_or(ApplyError::Changed(reason))?
            }
            change => change?,
        };
        if !anew && mailbox.has(&change) {
            return Ok(None);
        }
        let objects = &self.archive.objects;
        let id = &update.head.uniqueid;
        self.archive.unload(id, chain)?;
        let mut stored = change.store();
        if self.is_awaited && bodies::are_light(&update.bodies) {
            stored.bodies = bodies::carried(objects, &update.bodies, source)?;
        } else {
            bodies::put(objects, &update.bodies, source)?;
        }
        let brought = |guid| update.bodies.iter().any(|body| body.guid == guid);
        let relied: Vec<_> = mailbox.new_bodies(&change).filter(|(guid, _)| !brought(*guid)).collect();
        let guids: Vec<MessageGuid> = relied.iter().map(|(guid, _)| *guid).collect();
        self.archive.afterwards.wait_for_bodies(&guids);
        if let Some(guid) = bodies::missing(objects, relied.into_iter())?.into_iter().next() {
            return Err(ApplyError::Changed(format!("the body {guid} is not in the archive")));
        }
        let carried = stored.bodies.clone();
        // Nobody waits for what earlier updates have left to be written once more.
        let pace = if self.is_awaited { Pace::Awaited } else { Pace::Steady };
        let (chain, left) =
            self.published(chain::publish_only(objects, &Archive::folder(id), chain, stored, anew, pace))?;
        Ok(Some(Published { chain, change, carried, left }))
    }

    /// A mailbox that somebody else has changed meanwhile has to be viewed again.
    fn published<T>(&self, result: Result<T, ArchiveError>) -> Result<T, ApplyError> {
        result.map_err(|error| match error {
            ArchiveError::Conflict { .. } => ApplyError::Changed(error.to_string()),
            error => error.into(),
        })
    }

    fn set_row(&self, head: &MailboxHead) -> Result<(), ApplyError> {
        let row = Row::of(head);
        self.archive.index.change(&self.archive.objects, |rows| {
            // Said here again, because it may have changed since we looked.
            if let Some(name) = rows.name(&row.uniqueid).filter(|name| **name != head.name) {
                return Err(ApplyError::Moved(format!("the mailbox {} is called {name}", row.uniqueid)));
            }
            match rows.row(&head.name) {
                Some(old) if *old == row => Ok(None),
                Some(old) if old.uniqueid != row.uniqueid => {
                    Err(ApplyError::Moved(format!("{} has the uniqueid {}", head.name, old.uniqueid)))
                }
                _ => Ok(Some(StoredIndex { mailboxes: [(head.name.clone(), Some(row.clone()))].into() })),
            }
        })
    }

    fn rename(
        &self,
        id: &UniqueId,
        from: &MboxName,
        to: &MboxName,
        change: impl Fn(&mut Row),
    ) -> Result<(), ApplyError> {
        let objects = &self.archive.objects;
        self.archive.index.change(objects, |rows| {
            let (old, target) = (rows.row(from), rows.row(to));
            let is_ours = |row: &&Row| row.uniqueid == *id;
            if let Some(other) = target.filter(|row| !is_ours(row)) {
                return Err(ApplyError::Moved(format!("{to} has the uniqueid {}", other.uniqueid)));
            }
            let ours = match (old, target) {
                (Some(row), _) if is_ours(&row) => row,
                (_, Some(row)) => row,
                (Some(row), None) => {
                    return Err(ApplyError::Moved(format!("{from} has the uniqueid {}", row.uniqueid)));
                }
                (None, None) => return Err(ApplyError::NoSuchMailbox(from.clone())),
            };
            let mut row = ours.clone();
            change(&mut row);
            if target == Some(&row) {
                return Ok(None);
            }
            let mut mailboxes = std::collections::BTreeMap::new();
            if old.is_some_and(|row| row.uniqueid == *id) {
                mailboxes.insert(from.clone(), None);
            }
            mailboxes.insert(to.clone(), Some(row));
            Ok(Some(StoredIndex { mailboxes }))
        })?;
        // A user's data hangs on the INBOX: without one there is no such user any more.
        if let Some(user) = from.owner().filter(|_| from.is_inbox() && from != to)
            && self.archive.index.look(objects, |rows| rows.row(from).is_none())?
        {
            accounts::remove_user(objects, &user)?;
        }
        Ok(())
    }

    /// What only this mailbox has goes first, then its row, which is the moment it is gone, then its objects: whatever
    /// is cut off, the step can be said again.
    fn remove(&self, id: &UniqueId, name: &MboxName) -> Result<(), ApplyError> {
        let objects = &self.archive.objects;
        let row = self.archive.index.look(objects, |rows| rows.row(name).cloned())?;
        check_row(row.as_ref(), id, name)?;
        // As a sync_server does: with the INBOX the user goes, with its root a quota.
        accounts::set_quota(objects, &QuotaRoot::new(name.as_bytes()), None)?;
        if let Some(user) = name.owner().filter(|_| name.is_inbox()) {
            accounts::remove_user(objects, &user)?;
        }
        self.archive.index.change(objects, |rows| {
            check_row(rows.row(name), id, name)?;
            Ok::<_, ApplyError>(Some(StoredIndex { mailboxes: [(name.clone(), None)].into() }))
        })?;
        self.archive.afterwards.wait(id);
        self.archive.cache().take(id);
        Ok(chain::remove(objects, &Archive::folder(id))?)
    }

    fn expunge(&self, id: &UniqueId, name: &MboxName, uids: &[Uid]) -> Result<(), ApplyError> {
        let row = self.archive.index.look(&self.archive.objects, |rows| rows.row(name).cloned())?;
        let loaded = self.archive.load(name, check_row(row.as_ref(), id, name)?)?;
        let (mut chain, mut mailbox) = loaded.ok_or_else(|| ApplyError::NoSuchMailbox(name.clone()))?;
        let change = mailbox.plan_expunge(uids);
        if mailbox.has(&change) {
            self.archive.keep(id, chain, mailbox);
            return Ok(());
        }
        let objects = &self.archive.objects;
        self.archive.unload(id, &mut chain)?;
        let published = chain::publish(objects, &Archive::folder(id), &chain, change.store(), false);
        let chain = self.published(published)?;
        mailbox.apply(change);
        self.archive.keep(id, chain, mailbox);
        Ok(())
    }

    /// The named mailboxes, those that exist, without records.
    pub fn view_mailboxes(&self, names: &[MboxName]) -> Result<Vec<MailboxView>, ArchiveError> {
        let rows = self.archive.index.look(&self.archive.objects, |rows| {
            names.iter().filter_map(|name| Some((name.clone(), rows.row(name)?.clone()))).collect()
        })?;
        self.archive.heads(rows)
    }

    /// The mailbox of this uniqueid, without records.
    pub fn view_uniqueid(&self, id: &UniqueId) -> Result<Option<MailboxView>, ArchiveError> {
        let name = self.archive.index.look(&self.archive.objects, |rows| rows.name(id).cloned())?;
        Ok(self.view_mailboxes(name.as_slice())?.pop())
    }

    /// One mailbox with all records; `None` if there is none of that name.
    pub fn view_full(&self, name: &MboxName) -> Result<Option<MailboxView>, ArchiveError> {
        let row = self.archive.index.look(&self.archive.objects, |rows| rows.row(name).cloned())?;
        let Some(row) = row else { return Ok(None) };
        let Some((chain, mailbox)) = self.archive.load(name, &row)? else { return Ok(None) };
        let view = mailbox.view();
        self.archive.keep(&row.uniqueid, chain, mailbox);
        Ok(Some(view))
    }

    /// A user's mailboxes (deleted ones too), quota roots and data outside mailboxes.
    pub fn view_user(&self, user: &UserId) -> Result<AccountView, ArchiveError> {
        let objects = &self.archive.objects;
        let is_theirs = |name: &MboxName| owner(name).as_ref() == Some(user);
        let rows = self.archive.index.look(objects, |rows| {
            let theirs = rows.iter().filter(|(name, _)| is_theirs(name));
            theirs.map(|(name, row)| (name.clone(), row.clone())).collect()
        })?;
        let (mut quotas, _) = accounts::server(objects)?;
        quotas.retain(|root, _| is_theirs(&MboxName::new(root.as_bytes())));
        Ok(AccountView { mailboxes: self.archive.heads(rows)?, quotas, meta: accounts::meta(objects, user, false)? })
    }

    /// Which of these bodies are there, whichever mailbox they came for.
    pub fn has_bodies(&self, guids: &[MessageGuid]) -> Result<BTreeSet<MessageGuid>, ArchiveError> {
        self.archive.afterwards.wait_for_bodies(guids);
        let paths: Vec<String> = guids.iter().map(bodies::body_path).collect();
        let sizes = self.archive.objects.sizes(&paths)?;
        Ok(guids.iter().zip(sizes).filter(|(_, size)| size.is_some()).map(|(guid, _)| *guid).collect())
    }

    /// A body, whichever mailbox it came for; this one is looked at too.
    pub fn body(&self, name: &MboxName, guid: &MessageGuid) -> Result<Option<Body>, ArchiveError> {
        let row = self.archive.index.look(&self.archive.objects, |rows| rows.row(name).cloned())?;
        self.archive.body(guid, row.as_ref().map(|row| &row.uniqueid))
    }

    /// The text of a Sieve script.
    pub fn script(&self, user: &UserId, name: &SieveName) -> Result<Option<Vec<u8>>, ArchiveError> {
        let objects = &self.archive.objects;
        let meta = accounts::meta(objects, user, false)?;
        meta.sieve.get(name).map(|script| bodies::script(objects, &script.guid)).transpose()
    }

    /// One quota root; `None` if it does not exist.
    pub fn view_quota(&self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, ArchiveError> {
        Ok(accounts::server(&self.archive.objects)?.0.remove(root))
    }

    /// Server-level annotations, sorted.
    pub fn view_server_annotations(&self) -> Result<Vec<Annotation>, ArchiveError> {
        Ok(accounts::server(&self.archive.objects)?.1)
    }
}

/// The row, if it is this mailbox's.
fn check_row<'a>(row: Option<&'a Row>, id: &UniqueId, name: &MboxName) -> Result<&'a Row, ApplyError> {
    match row {
        None => Err(ApplyError::NoSuchMailbox(name.clone())),
        Some(row) if row.uniqueid == *id => Ok(row),
        Some(row) => Err(ApplyError::Moved(format!("{name} has the uniqueid {}", row.uniqueid))),
    }
}

/// The owner of a mailbox, or of what a deleted one was. The archive is not told `deletedprefix`; nobody changes it.
fn owner(name: &MboxName) -> Option<UserId> {
    name.account(super::store::DELETED_PREFIX)
}

/// One value per entry and user.
fn replace_annotation(all: &mut Vec<Annotation>, annotation: &Annotation) {
    all.retain(|old| old.entry != annotation.entry || old.userid != annotation.userid);
    all.push(annotation.clone());
}
