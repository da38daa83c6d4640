//! The directory as one thing: what sessions share, and what each step does to it.
//!
//! Locks are taken in this order: the turn of quota limits, the mailbox (one of some stripes), annotations, quotas, the list.

use super::DirError;
use super::disk::Disk;
use super::held::{self, Appending, Commit, Held};
use super::lease::Lease;
use super::list::{Db, List};
use super::messages::{self, Elsewhere, Staged, message_path};
use super::places::Places;
use super::promises::{self, Promises};
use super::quota::Quotas;
use super::recent::{Changing, Recent};
use super::users::User;
use crate::archive::{Change, Refusal};
use crate::cyrus::annotations::{self, Userids};
use crate::cyrus::mboxlist;
use crate::model::{
    Annotation, BodySource, MailboxEntry, MailboxHead, MailboxUpdate, MailboxView, MboxName, MboxType, MessageGuid,
    ModSeq, Partition, QuotaRoot, Uid, UniqueId, UserId,
};
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

const STRIPES: usize = 64;

pub(super) struct Store {
    pub places: Places,
    pub(super) disk: Disk,
    pub(super) list: Mutex<List>,
    annotations: Mutex<Db>,
    pub(super) quotas: Mutex<Quotas>,
    pub(super) stripes: [Mutex<()>; STRIPES],
    recent: Recent,
    pub(super) promises: Promises,
    staged: AtomicU64,
    /// Limits change one after the other, and before the turn of any mailbox is taken.
    pub(super) quota_turn: Mutex<()>,
    /// A change of a file failed: what stands in the quota files may not be what is in use.
    pub(super) miscounted: AtomicBool,
    /// Last: given back when everything else is closed.
    _lease: Lease,
}

/// Is there while a directory is open: whoever finds it knows that the last one to write did not come to its end.
const OPEN: &str = "spooltap.open";

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs() as i64)
}

impl Drop for Store {
    fn drop(&mut self) {
        self.promises.finish();
        let _ = self.disk.remove(&self.places.conf.join(OPEN));
    }
}

impl Store {
    pub fn open(root: &Path, disk: Disk) -> Result<Self, DirError> {
        let places = Places::open(root, &disk)?;
        let lease = Lease::take(&places)?;
        let written_again = promises::recover(&places, &disk)?;
        let list = List::open(&places, &disk)?;
        let annotations = Db::open(&places.annotations_db, false)?;
        let quotas = Quotas::open(&places)?;
        let store = Self {
            list: Mutex::new(list),
            annotations: Mutex::new(annotations),
            quotas: Mutex::new(quotas),
            stripes: std::array::from_fn(|_| Mutex::new(())),
            recent: Recent::default(),
            promises: Promises::default(),
            staged: AtomicU64::new(0),
            quota_turn: Mutex::new(()),
            miscounted: AtomicBool::new(false),
            places,
            disk,
            _lease: lease,
        };
        let mark = store.places.conf.join(OPEN);
        let io = |error| DirError::io(&mark, error);
        if mark.exists() {
            store.after_a_crash(&written_again)?;
        } else {
            store.disk.replace(&mark, b"").map_err(io)?;
        }
        Ok(store)
    }

    pub(super) fn stripe(&self, key: &[u8]) -> MutexGuard<'_, ()> {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(key) as usize;
        // There are as many as the divisor.
        lock(self.stripes.get(hash % STRIPES).unwrap_or(&self.stripes[0]))
    }

    pub(super) fn dir(&self, entry: &MailboxEntry) -> Result<PathBuf, DirError> {
        self.places.mailbox(&entry.partition, &entry.uniqueid)
    }

    pub fn owner(&self, name: &MboxName) -> Option<UserId> {
        name.without_deleted(&self.places.deleted_prefix).as_ref().unwrap_or(name).owner()
    }

    pub fn entry(&self, name: &MboxName) -> Option<MailboxEntry> {
        lock(&self.list).rows.entry(name).cloned()
    }

    pub fn entry_of(&self, id: &UniqueId) -> Option<MailboxEntry> {
        let list = lock(&self.list);
        list.rows.entry(list.rows.name(id)?).cloned()
    }

    /// A user's mailboxes, those that are deleted and not gone yet included.
    pub fn entries_of(&self, user: &UserId) -> Vec<MailboxEntry> {
        let inbox = user.inbox();
        let deleted = inbox.with_deleted(&self.places.deleted_prefix);
        let list = lock(&self.list);
        let all = list.rows.below(&inbox).chain(list.rows.below(&deleted));
        all.filter(|entry| self.owner(&entry.name).as_ref() == Some(user)).cloned().collect()
    }

    fn notes_of(&self, entry: &MailboxEntry) -> Result<Vec<Annotation>, DirError> {
        let owner = self.owner(&entry.name);
        self.notes(entry.uniqueid.as_bytes(), owner.as_ref())
    }

    fn notes(&self, scope: &[u8], owner: Option<&UserId>) -> Result<Vec<Annotation>, DirError> {
        annotations::of_scope(&lock(&self.annotations).map, scope, Userids { owner, carets: false })
            .map_err(|error| DirError::format(&self.places.annotations_db, error))
    }

    pub fn server_notes(&self) -> Result<Vec<Annotation>, DirError> {
        self.notes(b"", None)
    }

    /// A view without records; `None` where the mailbox is gone meanwhile.
    pub fn view(&self, entry: &MailboxEntry) -> Result<Option<MailboxView>, DirError> {
        if entry.mbtype.is_intermediate() {
            let head = MailboxHead {
                uniqueid: entry.uniqueid.clone(),
                name: entry.name.clone(),
                mbtype: entry.mbtype.clone(),
                partition: entry.partition.clone(),
                acl: entry.acl.clone(),
                uidvalidity: entry.uidvalidity,
                highestmodseq: ModSeq(1),
                createdmodseq: entry.createdmodseq,
                foldermodseq: entry.foldermodseq,
                ..MailboxHead::default()
            };
            return Ok(Some(MailboxView { head, crc_basic: Some(0), crc_annot: Some(0), ..MailboxView::default() }));
        }
        if let Ok(held) = self.recent.get(entry) {
            return Ok(Some(held.mailbox.head_view()));
        }
        held::view(&self.dir(entry)?, entry, self.notes_of(entry)?)
    }

    pub fn view_full(&self, name: &MboxName) -> Result<Option<MailboxView>, DirError> {
        let Some(entry) = self.entry(name) else { return Ok(None) };
        if entry.mbtype.is_intermediate() {
            let view = self.view(&entry)?;
            return Ok(view.map(|view| MailboxView { records: Some(Vec::new()), ..view }));
        }
        Ok(self.loaded(&entry)?.map(|held| held.mailbox.view()))
    }

    pub(super) fn load(&self, entry: &MailboxEntry) -> Result<Option<Held>, DirError> {
        let owner = self.owner(&entry.name);
        Held::load(&self.dir(entry)?, entry, owner.as_ref(), self.notes_of(entry)?)
    }

    /// The same for somebody who only looks.
    fn loaded(&self, entry: &MailboxEntry) -> Result<Option<Arc<Held>>, DirError> {
        let turn = match self.recent.get(entry) {
            Ok(held) => return Ok(Some(held)),
            Err(turn) => turn,
        };
        let held = self.load(entry)?.map(Arc::new);
        held.iter().for_each(|held| self.recent.read(turn, entry, held));
        Ok(held)
    }

    /// The same for somebody who has its turn and changes it.
    fn load_to_change(&self, entry: &MailboxEntry) -> Result<(Changing<'_>, Option<Held>), DirError> {
        let (changing, known) = self.recent.change(&entry.uniqueid);
        match known.filter(|(known, _)| known == entry) {
            Some((_, held)) => {
                if cfg!(debug_assertions) {
                    assert_eq!(self.load(entry)?.as_ref().map(Held::parts), Some(held.parts()));
                }
                Ok((changing, Some(held)))
            }
            None => Ok((changing, self.load(entry)?)),
        }
    }

    /// Takes a mailbox out before it is changed otherwise than by a promise.
    pub(super) fn change(&self, id: &UniqueId) -> Result<Changing<'_>, DirError> {
        if let Some(entry) = self.entry_of(id).filter(|entry| !entry.mbtype.is_intermediate()) {
            self.promises.wait(&self.dir(&entry)?);
        }
        Ok(self.recent.change(id).0)
    }

    /// Where those messages of these mailboxes lie that are `wanted`.
    pub fn messages_of(
        &self,
        names: &[MboxName],
        wanted: &dyn Fn(&MessageGuid) -> bool,
    ) -> Result<Elsewhere, DirError> {
        let mut out = Elsewhere::new();
        for name in names {
            let Some(entry) = self.entry(name).filter(|entry| !entry.mbtype.is_intermediate()) else { continue };
            let Some(held) = self.loaded(&entry)? else { continue };
            let live = held.mailbox.records.iter().filter(|record| !record.is_expunged());
            for record in live.filter(|record| wanted(&record.guid)) {
                out.entry(record.guid).or_insert_with(|| message_path(held.dir(), record.uid));
            }
        }
        Ok(out)
    }

    /// A new directory of the partition with this root, for a session's own files.
    pub fn pin_dir(&self, root: &Path) -> Result<PathBuf, DirError> {
        let number = self.staged.fetch_add(1, Ordering::Relaxed);
        let dir = stage_dir(root).join(number.to_string());
        self.disk.make_dir(&dir).map_err(|error| DirError::io(&dir, error))?;
        Ok(dir)
    }

    /// Brings a mailbox to what `update` says; the bytes that came from the source.
    pub fn update(&self, update: &MailboxUpdate, source: &dyn BodySource, pinned: &Elsewhere) -> Result<u64, DirError> {
        let head = &update.head;
        check_id(&head.uniqueid)?;
        let _mine = self.stripe(head.uniqueid.as_bytes());
        let row = {
            let list = lock(&self.list);
            let row = list.rows.entry(&head.name).cloned();
            if let Some(row) = row.as_ref().filter(|row| row.uniqueid != head.uniqueid) {
                return Err(DirError::Moved(format!("{} has the uniqueid {}", head.name, row.uniqueid)));
            }
            if let Some(name) = list.rows.name(&head.uniqueid).filter(|name| **name != head.name) {
                return Err(DirError::Moved(format!("the mailbox {} is called {name}", head.uniqueid)));
            }
            row
        };
        if head.mbtype.is_intermediate() {
            if row.is_none() && !update.create {
                return Err(DirError::NoSuchMailbox(head.name.clone()));
            }
            return self.place_holder(head, row).map(|()| 0);
        }
        let partition =
            row.as_ref().filter(|row| !row.partition.is_empty()).map_or(&head.partition, |row| &row.partition);
        let root = self.places.partition_made(partition, &self.disk)?;
        let dir = self.places.mailbox(partition, &head.uniqueid)?;
        let real = row.as_ref().filter(|row| !row.mbtype.is_intermediate());
        let (changing, held) = match real {
            Some(row) => self.load_to_change(row)?,
            None => (self.recent.change(&head.uniqueid).0, None),
        };
        let anew = held.is_none();
        if anew && !update.create {
            return Err(DirError::NoSuchMailbox(head.name.clone()));
        }
        if anew {
            // What a removal or a creation that was cut off has left counts for nothing, but for its messages.
            let made = if real.is_none() { self.disk.make_dir_for_now(&dir) } else { self.disk.make_dir(&dir) };
            made.map_err(|error| DirError::io(&dir, error))?;
            let notes = dir.join("cyrus.annotations");
            self.disk.remove(&notes).map_err(|error| DirError::io(&notes, error))?;
            self.put_notes(&head.uniqueid, None, &[])?;
        }
        let mut held = held.unwrap_or_else(|| Held::new(&dir, now(), real.is_none()));
        let change = plan(&held, update)?;
        held.check_range(&change)?;
        let before = held.quotaroot().cloned().zip(Some(held.taken())).filter(|_| !anew);
        let mut brought = 0;
        if anew || !held.mailbox.has(&change) {
            let (dir, number) = (stage_dir(&root), self.staged.fetch_add(1, Ordering::Relaxed));
            let waiting = messages::Waiting { dir: &dir, number, may_promise: self.promises.are_possible() };
            let elsewhere = || {
                let mut found = self.messages_of(&update.reserve_from, &|_| true)?;
                found.extend(pinned.iter().map(|(guid, path)| (*guid, path.clone())));
                Ok(found)
            };
            let staged = messages::stage(&self.disk, &waiting, &held, &change, &update.bodies, source, &elsewhere);
            let written = staged.and_then(|mut staged| {
                brought = staged.brought;
                self.write(&mut held, change, &mut staged, partition)
            });
            written?;
        }
        let entry = entry_of(head, partition);
        self.put_row(&entry, row.as_ref())?;
        let after = held.quotaroot().map(|root| (root, held.taken()));
        let before = before.as_ref().map(|(root, taken)| (root, *taken));
        lock(&self.quotas).moved(&self.places, &self.disk, before, after)?;
        if let Some(held) = held.into_read(&entry) {
            changing.done(&entry, held);
        }
        Ok(brought)
    }

    fn write(
        &self,
        held: &mut Held,
        change: Change,
        staged: &mut Staged<'_>,
        partition: &Partition,
    ) -> Result<(), DirError> {
        let (head, id) = (&change.head, change.head.uniqueid.clone());
        let owner = self.owner(&head.name);
        let quotaroot = lock(&self.quotas).root_of(&head.name);
        staged.publish()?;
        let messages = staged.promisable.take().filter(|messages| !messages.is_empty());
        if messages.is_none() && !held.is_fresh() {
            staged.begin_sync()?;
        }
        self.put_notes(&head.uniqueid, owner.as_ref(), &change.annotations)?;
        let facts = std::mem::take(&mut staged.facts);
        let dir = held.dir().to_owned();
        let (mut messages, mut written) = (messages, None);
        let mut before_commit = |index: Option<&Appending<'_>>| {
            written = messages
                .take()
                .zip(index)
                .and_then(|(messages, index)| self.promises.promise(partition, &id, &dir, messages, index));
            if written.is_some() {
                return Ok(Commit::Later);
            }
            self.promises.wait(&dir);
            staged.sync(index).map(|()| Commit::Now)
        };
        let result = held.write(&self.disk, change, owner.as_ref(), quotaroot, &facts, &mut before_commit);
        // Whatever has become of the header: what may count is brought to the disk, and not written again later.
        if let Some(written) = written {
            self.promises.written(written, &self.disk);
        }
        result
    }

    /// Makes these all annotations of a mailbox.
    fn put_notes(&self, id: &UniqueId, owner: Option<&UserId>, notes: &[Annotation]) -> Result<(), DirError> {
        let mut db = lock(&self.annotations);
        let wanted: BTreeMap<Vec<u8>, Vec<u8>> = notes
            .iter()
            .map(|note| {
                let key = annotations::encode_key(id.as_bytes(), &note.entry, &note.userid, owner);
                (key, annotations::encode_value(&note.value, note.modseq))
            })
            .collect();
        let prefix = [id.as_bytes(), b"\0"].concat();
        let there = db.map.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix));
        let gone: Vec<_> =
            there.filter(|(key, _)| !wanted.contains_key(*key)).map(|(key, _)| (key.clone(), None)).collect();
        let new = wanted.into_iter().filter(|(key, value)| db.map.get(key) != Some(value));
        let changes: Vec<_> = gone.into_iter().chain(new.map(|(key, value)| (key, Some(value)))).collect();
        if changes.is_empty() { Ok(()) } else { db.commit(&self.disk, &changes, false) }
    }

    /// A name without a mailbox of its own; one that was there is gone.
    fn place_holder(&self, head: &MailboxHead, row: Option<MailboxEntry>) -> Result<(), DirError> {
        let entry =
            MailboxEntry { partition: Partition::default(), acl: Vec::new(), ..entry_of(head, &head.partition) };
        self.put_row(&entry, row.as_ref())?;
        match row.filter(|row| !row.mbtype.is_intermediate()) {
            Some(row) => self.clear(&row),
            None => Ok(()),
        }
    }

    /// Writes both rows of a mailbox where they differ from what they have to be.
    fn put_row(&self, entry: &MailboxEntry, old: Option<&MailboxEntry>) -> Result<(), DirError> {
        if old == Some(entry) {
            return Ok(());
        }
        let mut list = lock(&self.list);
        let id_key = mboxlist::id_key(&entry.uniqueid);
        let mut history = list.row(&id_key).map(|row| mboxlist::history_of(row)).unwrap_or_default();
        let mut changes = Vec::new();
        if let Some(old) = old.filter(|old| old.name != entry.name) {
            history.insert(0, mboxlist::former_value(old, now()));
            changes.push(self.buried(old, entry.foldermodseq));
        }
        let (key, value) = mboxlist::encode_name_row(entry, now());
        changes.push((key, Some(value)));
        let (key, value) = mboxlist::encode_id_row(entry, now(), history);
        changes.push((key, Some(value)));
        list.commit(&self.disk, &changes)
    }

    /// The row of a name that has no mailbox any more: nothing below the deleted prefix, a tombstone elsewhere.
    fn buried(&self, old: &MailboxEntry, foldermodseq: ModSeq) -> (Vec<u8>, Option<Vec<u8>>) {
        let tombstone = MailboxEntry {
            mbtype: MboxType("d".into()),
            partition: Partition::default(),
            acl: Vec::new(),
            foldermodseq: foldermodseq.max(old.foldermodseq),
            ..old.clone()
        };
        let (key, value) = mboxlist::encode_name_row(&tombstone, now());
        (key, old.name.without_deleted(&self.places.deleted_prefix).is_none().then_some(value))
    }

    /// What belongs to a mailbox and to nothing else, once no row names it any more.
    fn clear(&self, entry: &MailboxEntry) -> Result<(), DirError> {
        let _changing = self.recent.change(&entry.uniqueid);
        let dir = self.dir(entry)?;
        self.promises.wait(&dir);
        let taken = held::read_index_header(&dir).ok().flatten().map(|index| held::taken(&index));
        let root = held::quotaroot_at(&dir).ok().flatten();
        self.put_notes(&entry.uniqueid, None, &[])?;
        self.disk.remove_tree(&dir).map_err(|error| DirError::io(&dir, error))?;
        let mut quotas = lock(&self.quotas);
        match root.zip(taken) {
            Some((root, taken)) => quotas.moved(&self.places, &self.disk, Some((&root, taken)), None),
            None => Ok(()),
        }
    }

    /// The mailbox of this name, if it has this uniqueid.
    fn checked(&self, id: &UniqueId, name: &MboxName) -> Result<MailboxEntry, DirError> {
        match self.entry(name) {
            None => Err(DirError::NoSuchMailbox(name.clone())),
            Some(row) if row.uniqueid == *id => Ok(row),
            Some(row) => Err(DirError::Moved(format!("{name} has the uniqueid {}", row.uniqueid))),
        }
    }

    pub fn rename(
        &self,
        id: &UniqueId,
        from: &MboxName,
        to: &MboxName,
        partition: &Partition,
        uidvalidity: u32,
    ) -> Result<(), DirError> {
        let _mine = self.stripe(id.as_bytes());
        let _changing = self.change(id)?;
        let (old, target) = (self.entry(from), self.entry(to));
        if let Some(other) = target.as_ref().filter(|row| row.uniqueid != *id) {
            return Err(DirError::Moved(format!("{to} has the uniqueid {}", other.uniqueid)));
        }
        let row = match (old, target) {
            (_, Some(row)) => row,
            (Some(row), None) if row.uniqueid == *id => row,
            (Some(row), None) => return Err(DirError::Moved(format!("{from} has the uniqueid {}", row.uniqueid))),
            (None, None) => return Err(DirError::NoSuchMailbox(from.clone())),
        };
        if row.mbtype.is_intermediate() {
            let entry = MailboxEntry { name: to.clone(), uidvalidity, ..row.clone() };
            return self.put_row(&entry, Some(&row));
        }
        let entry = MailboxEntry { name: to.clone(), partition: partition.clone(), uidvalidity, ..row.clone() };
        if entry.partition != row.partition {
            self.copy_files(&row, partition)?;
        }
        self.put_row(&entry, Some(&row))?;
        if entry.partition != row.partition {
            let dir = self.dir(&row)?;
            self.disk.remove_tree(&dir).map_err(|error| DirError::io(&dir, error))?;
        }
        // Private annotations are stored as the owner's own: with another owner they are other ones.
        let (was, owner) = (self.owner(&row.name), self.owner(to));
        if was != owner {
            let notes = self.notes(id.as_bytes(), was.as_ref())?;
            self.put_notes(id, owner.as_ref(), &notes)?;
        }
        self.retarget(&entry, Some(uidvalidity))
    }

    /// Copies a mailbox to another partition; hard links where that is possible.
    fn copy_files(&self, entry: &MailboxEntry, partition: &Partition) -> Result<(), DirError> {
        self.places.partition_made(partition, &self.disk)?;
        let (from, to) = (self.dir(entry)?, self.places.mailbox(partition, &entry.uniqueid)?);
        self.disk.remove_tree(&to).map_err(|error| DirError::io(&to, error))?;
        self.disk.make_dir(&to).map_err(|error| DirError::io(&to, error))?;
        for file in std::fs::read_dir(&from).map_err(|error| DirError::io(&from, error))?.flatten() {
            let path = to.join(file.file_name());
            self.disk.link(&file.path(), &path).map_err(|error| DirError::io(&path, error))?;
        }
        self.disk.sync_dir(&to).map_err(|error| DirError::io(&to, error))
    }

    pub fn remove(&self, id: &UniqueId, name: &MboxName) -> Result<(), DirError> {
        self.checked(id, name)?;
        // As a sync_server does: with the INBOX the user goes, with its root a quota. That takes the turn of each mailbox
        // below it, so it comes before ours.
        self.unquota(&QuotaRoot::new(name.as_bytes()))?;
        let _mine = self.stripe(id.as_bytes());
        let row = self.checked(id, name)?;
        if let Some(user) = name.owner().filter(|_| name.is_inbox()) {
            self.user_at(&user, &row.uniqueid).remove()?;
        }
        let foldermodseq = ModSeq(row.foldermodseq.0.saturating_add(1));
        let changes = [self.buried(&row, foldermodseq), (mboxlist::id_key(id), None)];
        lock(&self.list).commit(&self.disk, &changes)?;
        if row.mbtype.is_intermediate() { Ok(()) } else { self.clear(&row) }
    }

    pub fn expunge(&self, id: &UniqueId, name: &MboxName, uids: &[Uid]) -> Result<(), DirError> {
        let _mine = self.stripe(id.as_bytes());
        let row = self.checked(id, name)?;
        let (_changing, held) = self.load_to_change(&row)?;
        self.promises.wait(&self.dir(&row)?);
        let mut held = held.ok_or_else(|| DirError::NoSuchMailbox(name.clone()))?;
        let change = held.mailbox.plan_expunge(uids);
        if held.mailbox.has(&change) {
            return Ok(());
        }
        let (root, before) = (held.quotaroot().cloned(), held.taken());
        let owner = self.owner(name);
        let mut alone = held::records_only(&self.disk);
        held.write(&self.disk, change, owner.as_ref(), root.clone(), &HashMap::new(), &mut alone)?;
        let Some(root) = root else { return Ok(()) };
        lock(&self.quotas).moved(&self.places, &self.disk, Some((&root, before)), Some((&root, held.taken())))
    }

    pub fn server_note(&self, entry: &[u8], userid: &UserId, value: Option<&Annotation>) -> Result<(), DirError> {
        let key = annotations::encode_key(b"", entry, userid, None);
        let value = value.map(|note| annotations::encode_value(&note.value, note.modseq));
        lock(&self.annotations).commit(&self.disk, &[(key, value)], false)
    }

    fn user_at<'a>(&'a self, id: &'a UserId, inbox: &'a UniqueId) -> User<'a> {
        User { places: &self.places, disk: &self.disk, id, inbox }
    }

    /// Does something with a user's files; `None` where there is no INBOX under whose uniqueid they would lie.
    pub fn with_user<T>(
        &self,
        id: &UserId,
        action: impl FnOnce(&User<'_>) -> Result<T, DirError>,
    ) -> Result<Option<T>, DirError> {
        let _mine = self.stripe(id.as_bytes());
        let inbox = self.entry(&id.inbox()).filter(|inbox| !inbox.mbtype.is_intermediate());
        inbox.map(|inbox| action(&self.user_at(id, &inbox.uniqueid))).transpose()
    }

    /// The file of a live message, if the mailbox has one with this GUID.
    pub fn message(&self, name: &MboxName, guid: &MessageGuid) -> Result<Option<PathBuf>, DirError> {
        Ok(self.messages_of(std::slice::from_ref(name), &|other| other == guid)?.remove(guid))
    }

    /// The configdirectory is still there and ours.
    pub fn ping(&self) -> Result<(), DirError> {
        let path = &self.places.mailboxes_db;
        std::fs::metadata(path).map(drop).map_err(|error| DirError::io(path, error))
    }
}

pub(super) fn stage_dir(partition: &Path) -> PathBuf {
    partition.join("sync./spooltap")
}

fn entry_of(head: &MailboxHead, partition: &Partition) -> MailboxEntry {
    MailboxEntry {
        name: head.name.clone(),
        uniqueid: head.uniqueid.clone(),
        mbtype: head.mbtype.clone(),
        partition: partition.clone(),
        acl: head.acl.clone(),
        uidvalidity: head.uidvalidity,
        createdmodseq: head.createdmodseq,
        foldermodseq: head.foldermodseq,
        by_name: false,
    }
}

/// What `update` makes of the mailbox.
fn plan(held: &Held, update: &MailboxUpdate) -> Result<Change, DirError> {
    let mailbox = &held.mailbox;
    match mailbox.plan(update) {
        Ok(change) => Ok(change),
        // Said again because the confirmation was lost: what it was made for has passed, but its records are here.
        Err(Refusal::Changed(reason)) if update.since.is_some() => {
            let again = mailbox.plan(&MailboxUpdate { since: None, ..update.clone() });
            let is_done =
                |change: &Change| change.records.is_empty() && change.head.highestmodseq == mailbox.head.highestmodseq;
            again.ok().filter(is_done).ok_or(DirError::Changed(reason))
        }
        Err(Refusal::Changed(reason)) => Err(DirError::Changed(reason)),
        Err(Refusal::Never(reason)) => Err(DirError::Refused(reason)),
    }
}

/// A uniqueid is the name of a directory.
pub(super) fn check_id(id: &UniqueId) -> Result<(), DirError> {
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    match id.as_bytes() {
        bytes if (2..=64).contains(&bytes.len()) && bytes.iter().all(fits) => Ok(()),
        _ => Err(DirError::Refused(format!("{id} can be no uniqueid"))),
    }
}
