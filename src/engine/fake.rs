//! A source and a replica in memory, for tests of the engine. The replica refuses what a real `sync_server` refuses and
//! fails the test where a real one would die; it can lose the connection before or after any step.

use super::diff;
use crate::model::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

pub(super) const CAPS: Capabilities = Capabilities {
    annot_crc: AnnotCrc::New,
    checks_since: true,
    sieve_mailboxes: true,
    intermediates: true,
    keeps_savedate: true,
    message_annotations: true,
    quota_resources: true,
    server_annotations: true,
    keeps_options: true,
    lists_all: true,
};

#[derive(Default)]
pub(super) struct Content {
    pub mailboxes: BTreeMap<UniqueId, MailboxSnapshot>,
    pub metas: BTreeMap<UserId, UserMeta>,
    pub quotas: BTreeMap<QuotaRoot, QuotaLimits>,
    pub server_annotations: Vec<Annotation>,
    /// Messages without a file.
    pub lost: BTreeMap<UniqueId, BTreeSet<Uid>>,
    listing: Option<Arc<Listing>>,
    /// Annotations, as they were when somebody last asked what has changed.
    told: BTreeMap<MboxName, Vec<Annotation>>,
    /// So often quotas cannot be read.
    pub quotas_fail: usize,
    /// Marks of mailboxes that were asked for.
    pub marks: usize,
    /// Readings of whole mailboxes.
    pub readings: usize,
    /// Keys of databases that somebody is writing.
    pub busy: BTreeSet<DirtyKey>,
    /// What happens to a mailbox right after the next reading.
    pub after_reading: Option<fn(&mut MailboxSnapshot)>,
    /// What clients do right before a user's data is read.
    pub before_meta: Option<fn(&mut Content)>,
}

#[derive(Default)]
pub(super) struct FakeStore(pub Mutex<Content>);

impl FakeStore {
    /// Changes the content; the listing is made anew.
    pub fn change<R>(&self, change: impl FnOnce(&mut Content) -> R) -> R {
        let mut content = self.0.lock().expect("lock");
        content.listing = None;
        change(&mut content)
    }
}

pub(super) fn entry(head: &MailboxHead) -> MailboxEntry {
    MailboxEntry {
        name: head.name.clone(),
        uniqueid: head.uniqueid.clone(),
        mbtype: head.mbtype.clone(),
        partition: head.partition.clone(),
        acl: head.acl.clone(),
        uidvalidity: head.uidvalidity,
        createdmodseq: head.createdmodseq,
        foldermodseq: head.foldermodseq,
        by_name: true,
    }
}

struct FakeBodies {
    id: UniqueId,
    lost: BTreeSet<Uid>,
}

/// The text of a message.
pub(super) fn text_of(id: &UniqueId, uid: Uid) -> String {
    format!("{id} {}", uid.0)
}

impl BodySource for FakeBodies {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        if self.lost.contains(&body.uid) {
            return Err(StoreError::new(Disposition::RetrySoon, format!("{}. is missing", body.uid.0)));
        }
        Ok(Body { size: body.size, reader: Box::new(std::io::Cursor::new(text_of(&self.id, body.uid))) })
    }
}

impl MailStore for FakeStore {
    fn identity(&self) -> Result<String, StoreError> {
        Ok("fake".into())
    }

    fn listing(&self) -> Result<Arc<Listing>, StoreError> {
        let mut content = self.0.lock().expect("lock");
        if content.listing.is_none() {
            let entries = content.mailboxes.values().map(|mailbox| Arc::new(entry(&mailbox.head)));
            content.listing = Some(Arc::new(entries.collect()));
        }
        Ok(content.listing.clone().expect("made"))
    }

    fn mailbox(&self, entry: &MailboxEntry) -> Result<Option<MailboxSnapshot>, StoreError> {
        let mut content = self.0.lock().expect("lock");
        content.readings += 1;
        let read = content.mailboxes.get(&entry.uniqueid).cloned();
        if let (Some(change), Some(mailbox)) =
            (content.after_reading.take(), content.mailboxes.get_mut(&entry.uniqueid))
        {
            change(mailbox);
        }
        Ok(read)
    }

    fn fingerprint(&self, entry: &MailboxEntry) -> Result<Option<Fingerprint>, StoreError> {
        let mut content = self.0.lock().expect("lock");
        content.marks += 1;
        Ok(content.mailboxes.get(&entry.uniqueid).map(|mailbox| {
            Fingerprint(blake3::hash(&postcard::to_stdvec(mailbox).expect("packs")).as_bytes().to_vec())
        }))
    }

    fn user_fingerprint(&self, user: &UserId) -> Result<Fingerprint, StoreError> {
        let content = self.0.lock().expect("lock");
        Ok(Fingerprint(postcard::to_stdvec(&content.metas.get(user)).expect("packs")))
    }

    fn bodies(&self, entry: &MailboxEntry) -> Result<Box<dyn BodySource>, StoreError> {
        let content = self.0.lock().expect("lock");
        let lost = content.lost.get(&entry.uniqueid).cloned().unwrap_or_default();
        Ok(Box::new(FakeBodies { id: entry.uniqueid.clone(), lost }))
    }

    fn users(&self) -> Result<Vec<UserId>, StoreError> {
        let content = self.0.lock().expect("lock");
        let names = content.mailboxes.values().map(|mailbox| &mailbox.head.name);
        Ok(names.filter(|name| name.is_inbox()).filter_map(MboxName::owner).collect())
    }

    fn user_meta(&self, user: &UserId) -> Result<UserMeta, StoreError> {
        let change = self.0.lock().expect("lock").before_meta.take();
        self.change(|content| {
            change.into_iter().for_each(|change| change(content));
            Ok(content.metas.get(user).cloned().unwrap_or_default())
        })
    }

    fn quotas(&self) -> Result<BTreeMap<QuotaRoot, QuotaLimits>, StoreError> {
        let mut content = self.0.lock().expect("lock");
        if content.quotas_fail > 0 {
            content.quotas_fail -= 1;
            return Err(StoreError::new(Disposition::RetrySoon, "quotas cannot be read"));
        }
        Ok(content.quotas.clone())
    }

    fn quota(&self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, StoreError> {
        Ok(self.0.lock().expect("lock").quotas.get(root).cloned())
    }

    fn is_settled(&self, key: &DirtyKey) -> bool {
        !self.0.lock().expect("lock").busy.contains(key)
    }

    fn server_annotations(&self) -> Result<Vec<Annotation>, StoreError> {
        Ok(self.0.lock().expect("lock").server_annotations.clone())
    }

    fn annotated_mailboxes(&self) -> Result<BTreeMap<UniqueId, Vec<Annotation>>, StoreError> {
        let content = self.0.lock().expect("lock");
        let annotated = content.mailboxes.iter().filter(|(_, mailbox)| !mailbox.annotations.is_empty());
        Ok(annotated.map(|(id, mailbox)| (id.clone(), mailbox.annotations.clone())).collect())
    }

    /// Kept by name, as before 3.0.
    fn changed_annotations(&self) -> Result<ChangedAnnotations, StoreError> {
        let mut content = self.0.lock().expect("lock");
        let annotated = content.mailboxes.values().filter(|mailbox| !mailbox.annotations.is_empty());
        let now: BTreeMap<MboxName, Vec<Annotation>> =
            annotated.map(|mailbox| (mailbox.head.name.clone(), mailbox.annotations.clone())).collect();
        let told = std::mem::replace(&mut content.told, now.clone());
        let names: BTreeSet<&MboxName> = now.keys().chain(told.keys()).collect();
        let changed = names.into_iter().filter(|name| now.get(*name) != told.get(*name)).cloned();
        Ok(ChangedAnnotations { mailboxes: changed.map(MailboxRef::Name).collect(), server: true })
    }

    fn sieve_in_mailboxes(&self) -> bool {
        false
    }

    fn deleted_prefix(&self) -> &[u8] {
        b"DELETED"
    }
}

/// What the replica holds.
#[derive(Default)]
pub(super) struct Held {
    pub mailboxes: BTreeMap<MboxName, MailboxView>,
    pub metas: BTreeMap<UserId, UserMeta>,
    pub quotas: BTreeMap<QuotaRoot, QuotaLimits>,
    pub bodies_received: usize,
    /// Counts down at every step; at zero the connection is lost (before the step if even, after it if odd).
    pub lose_in: Option<usize>,
    /// Names of mailboxes every update of which is refused.
    pub refuse: BTreeSet<MboxName>,
    /// Makes what is missing above a new mailbox, and loses a user's data when the INBOX is a new one, as 3.6 does.
    pub modern: bool,
    /// Takes and lists what a 2.4 does.
    pub old: bool,
}

#[derive(Default)]
pub(super) struct FakeTarget {
    pub held: Arc<Mutex<Held>>,
    pub opened: AtomicUsize,
}

pub(super) struct FakeSession(Arc<Mutex<Held>>);

impl ReplicaTarget for FakeTarget {
    fn name(&self) -> String {
        "fake://".into()
    }

    fn open(&self) -> Result<Box<dyn Replica>, ReplicaError> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(FakeSession(self.held.clone())))
    }

    fn capabilities(&self) -> Capabilities {
        let new = !self.held.lock().expect("lock").old;
        Capabilities {
            message_annotations: new,
            keeps_savedate: new,
            quota_resources: new,
            server_annotations: new,
            keeps_options: new,
            lists_all: new,
            ..CAPS
        }
    }
}

fn lost() -> ReplicaError {
    ReplicaError::Lost { replica: "fake".into(), cause: "cut".into() }
}

fn without_records(view: &MailboxView) -> MailboxView {
    MailboxView { records: None, user_flags: Vec::new(), ..view.clone() }
}

fn owner(name: &MboxName) -> Option<UserId> {
    name.account(b"DELETED")
}

impl Held {
    fn crcs(view: &MailboxView) -> SyncCrcs {
        let snapshot = MailboxSnapshot {
            records: view.records.clone().unwrap_or_default(),
            user_flags: view.user_flags.clone(),
            ..MailboxSnapshot::default()
        };
        diff::crcs(&snapshot, &CAPS)
    }

    fn update(&mut self, update: &MailboxUpdate) -> Result<(), ReplicaError> {
        let head = &update.head;
        if self.refuse.contains(&head.name) {
            return Err(ReplicaError::Refused("told to".into()));
        }
        assert!(update.records.iter().all(|r| r.uid <= head.last_uid), "a UID above LAST_UID kills a real server");
        assert!(update.records.iter().all(|r| r.modseq <= head.highestmodseq), "a modseq above HIGHESTMODSEQ corrupts");
        assert!(update.records.windows(2).all(|pair| pair[0].uid < pair[1].uid), "records must ascend");
        if let Some((name, _)) = self.mailboxes.iter().find(|(_, view)| view.head.uniqueid == head.uniqueid)
            && *name != head.name
        {
            return Err(ReplicaError::Moved(name.to_string()));
        }
        match self.mailboxes.get(&head.name) {
            Some(view) if view.head.uniqueid != head.uniqueid && view.head.last_uid > Uid(0) => {
                return Err(ReplicaError::Moved(head.name.to_string()));
            }
            Some(view) if view.head.uniqueid != head.uniqueid => {
                self.mailboxes.remove(&head.name);
            }
            _ => {}
        }
        if let Some(user) = head.name.owner()
            && !head.name.is_inbox()
            && !self.mailboxes.contains_key(&user.inbox())
        {
            return Err(ReplicaError::Refused("Unknown error".into()));
        }
        if self.modern && !self.mailboxes.contains_key(&head.name) {
            self.fill_in(&head.name);
        }
        let old = self.mailboxes.get(&head.name).cloned().unwrap_or_default();
        if let Some(since) = update.since
            && (old.head.highestmodseq != since.modseq || Self::crcs(&old) != since.crcs)
        {
            return Err(ReplicaError::Changed("SYNC_CHANGED".into()));
        }
        let (new_head, old_head) = (head, &old.head);
        if new_head.highestmodseq < old_head.highestmodseq
            || new_head.last_uid < old_head.last_uid
            || new_head.uidvalidity < old_head.uidvalidity
        {
            return Err(ReplicaError::Changed("SYNC_CHECKSUM: lower than mine".into()));
        }
        let mut records: BTreeMap<Uid, Record> =
            old.records.clone().unwrap_or_default().into_iter().map(|record| (record.uid, record)).collect();
        for record in &update.records {
            match records.get(&record.uid) {
                Some(mine) if mine.is_expunged() && record.is_expunged() => continue,
                Some(mine)
                    if mine.guid != record.guid
                        || mine.modseq > record.modseq
                        || mine.is_expunged() && !record.is_expunged() =>
                {
                    return Err(ReplicaError::Changed("SYNC_CHECKSUM: record".into()));
                }
                Some(_) => {}
                None if record.uid <= old.head.last_uid && record.is_expunged() => continue,
                None if record.uid <= old.head.last_uid => {
                    return Err(ReplicaError::Changed("SYNC_CHECKSUM: missing".into()));
                }
                None if record.is_expunged() => {}
                None => {
                    let there = update.bodies.iter().any(|body| body.guid == record.guid);
                    assert!(there, "a live record without a staged file kills a real server");
                    self.bodies_received += 1;
                }
            }
            records.insert(record.uid, record.clone());
        }
        let mut view = update.confirmed_view();
        if self.old {
            view.head.pop3_show_after = 0;
            if self.mailboxes.contains_key(&head.name) {
                view.head.options = old.head.options;
            }
        }
        view.records = Some(records.into_values().collect());
        view.user_flags = update.user_flags.clone();
        let crcs = Self::crcs(&view);
        (view.crc_basic, view.crc_annot) = (Some(crcs.basic), Some(crcs.annot));
        self.mailboxes.insert(head.name.clone(), view);
        if update.crcs.basic != 0 && crcs.basic != 0 && crcs.basic != update.crcs.basic {
            return Err(ReplicaError::Changed("SYNC_CHECKSUM".into()));
        }
        Ok(())
    }

    fn fill_in(&mut self, name: &MboxName) {
        if let Some(user) = name.owner().filter(|_| name.is_inbox()) {
            self.metas.remove(&user);
        }
        let mut above = name.parent();
        while let Some(name) = above.filter(|name| name.owner().is_some() && !name.is_inbox()) {
            let mut view = MailboxView::default();
            view.head.name = name.clone();
            view.head.uniqueid = UniqueId::new([b"made for ", name.as_bytes()].concat());
            self.mailboxes.entry(name.clone()).or_insert(view);
            above = name.parent();
        }
    }

    fn rename(&mut self, step: &Step) -> Result<(), ReplicaError> {
        let Step::Rename { uniqueid, from, to, partition, uidvalidity } = step else { return Ok(()) };
        match self.mailboxes.get(from) {
            None => return Err(ReplicaError::NoSuchMailbox(from.to_string())),
            Some(view) if view.head.uniqueid != *uniqueid => return Err(ReplicaError::Moved(from.to_string())),
            Some(_) if from != to && self.mailboxes.contains_key(to) => {
                return Err(ReplicaError::Refused(format!("{to} exists")));
            }
            Some(_) => {}
        }
        let mut view = self.mailboxes.remove(from).expect("is there");
        view.head.name = to.clone();
        view.head.partition = partition.clone();
        view.head.uidvalidity = view.head.uidvalidity.max(*uidvalidity);
        view.head.highestmodseq.0 += 1;
        self.mailboxes.insert(to.clone(), view);
        Ok(())
    }

    fn apply(&mut self, step: &Step) -> Result<(), ReplicaError> {
        match step {
            Step::Mailbox(update) => self.update(update),
            Step::Rename { .. } => self.rename(step),
            Step::Remove { uniqueid, name } => match self.mailboxes.get(name) {
                None => Err(ReplicaError::NoSuchMailbox(name.to_string())),
                Some(view) if view.head.uniqueid != *uniqueid => Err(ReplicaError::Moved(name.to_string())),
                Some(_) => {
                    self.mailboxes.remove(name);
                    self.quotas.remove(&QuotaRoot::new(name.as_bytes()));
                    if let Some(user) = name.owner().filter(|_| name.is_inbox()) {
                        self.metas.remove(&user);
                    }
                    Ok(())
                }
            },
            Step::Expunge { name, uids, .. } => {
                let view = self.mailboxes.get_mut(name).ok_or_else(|| ReplicaError::NoSuchMailbox(name.to_string()))?;
                for record in view.records.iter_mut().flatten().filter(|record| uids.contains(&record.uid)) {
                    record.system_flags.0 |= SystemFlags::EXPUNGED;
                }
                Ok(())
            }
            Step::Subscribe { user, name } => {
                self.metas.entry(user.clone()).or_default().subs.insert(name.clone());
                Ok(())
            }
            Step::Unsubscribe { user, name } => {
                self.metas.entry(user.clone()).or_default().subs.remove(name);
                Ok(())
            }
            Step::Seen { user, uniqueid, seen } => {
                self.metas.entry(user.clone()).or_default().seen.insert(uniqueid.clone(), seen.clone());
                Ok(())
            }
            Step::Quota { root, limits } => {
                self.quotas.insert(root.clone(), limits.clone());
                Ok(())
            }
            Step::Unquota { root } => match self.quotas.remove(root) {
                Some(_) => Ok(()),
                None => Err(ReplicaError::NoSuchMailbox(root.to_string())),
            },
            _ => Ok(()),
        }
    }
}

impl Replica for FakeSession {
    fn view_user(&mut self, user: &UserId) -> Result<AccountView, ReplicaError> {
        let held = self.0.lock().expect("lock");
        let listed =
            |name: &MboxName| !held.old || name.owner().is_some() && held.mailboxes.contains_key(&user.inbox());
        let mailboxes = held
            .mailboxes
            .values()
            .filter(|view| owner(&view.head.name).as_ref() == Some(user) && listed(&view.head.name));
        let quotas =
            held.quotas.iter().filter(|(root, _)| owner(&MboxName::new(root.as_bytes())).as_ref() == Some(user));
        Ok(AccountView {
            mailboxes: mailboxes.map(without_records).collect(),
            quotas: quotas.map(|(root, limits)| (root.clone(), limits.clone())).collect(),
            meta: held.metas.get(user).cloned().unwrap_or_default(),
        })
    }

    fn view_mailboxes(&mut self, names: &[MboxName]) -> Result<Vec<MailboxView>, ReplicaError> {
        let held = self.0.lock().expect("lock");
        Ok(names.iter().filter_map(|name| held.mailboxes.get(name)).map(without_records).collect())
    }

    fn view_full(&mut self, name: &MboxName) -> Result<Option<MailboxView>, ReplicaError> {
        Ok(self.0.lock().expect("lock").mailboxes.get(name).cloned())
    }

    fn view_quota(&mut self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, ReplicaError> {
        Ok(self.0.lock().expect("lock").quotas.get(root).cloned())
    }

    fn view_server_annotations(&mut self) -> Result<Vec<Annotation>, ReplicaError> {
        Ok(Vec::new())
    }

    fn apply(&mut self, step: &Step, _bodies: &dyn BodySource) -> Result<(), ReplicaError> {
        let mut held = self.0.lock().expect("lock");
        let cut = match &mut held.lose_in {
            Some(0) => {
                held.lose_in = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };
        // A cut may come before the replica did it or after: nobody on this side can tell.
        if cut && step_is_even(step) {
            return Err(lost());
        }
        let result = held.apply(step);
        if cut { Err(lost()) } else { result }
    }

    fn ping(&mut self) -> Result<(), ReplicaError> {
        Ok(())
    }

    fn restart(&mut self) -> Result<(), ReplicaError> {
        Ok(())
    }

    fn close(self: Box<Self>) {}

    fn traffic(&self) -> (u64, u64) {
        (0, 0)
    }
}

fn step_is_even(step: &Step) -> bool {
    blake3::hash(format!("{step:?}").as_bytes()).as_bytes()[0] & 1 == 0
}
