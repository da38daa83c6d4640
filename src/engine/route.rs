//! Keys → items in lanes. One thread; it keeps what it last saw of the shared databases, so that "mailboxes.db changed"
//! becomes "these mailboxes changed".

use super::names::Source;
use super::queue::{Item, Lane};
use super::{Event, Shared};
use crate::model::{
    Annotation, DirtyKey, MailStore, MailboxEntry, MailboxRef, MboxName, Notice, QuotaRoot, Scope, StoreError,
    UniqueId, UserId, UserPart, UserRef,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// What the router is told.
pub(super) enum Order {
    Notices(Vec<Notice>),
    /// Compare with the receipts, then answer.
    Scan(mpsc::Sender<()>),
    /// Answer when everything said before has been routed.
    Flush(mpsc::Sender<()>),
    Stop,
}

/// The lane a quota root belongs to; a whole domain's root to the server.
pub fn quota_lane(root: &QuotaRoot, deleted_prefix: &[u8]) -> Lane {
    let name = MboxName::new(root.as_bytes());
    if name.domain_and_local().1.is_empty() { Lane::Server } else { Lane::of(&name, deleted_prefix) }
}

/// Pause before a key whose reading failed is tried again.
const RETRY: Duration = Duration::from_millis(100);

pub(super) struct Router {
    store: Arc<dyn MailStore>,
    replicas: Vec<Arc<Shared>>,
    source: Arc<Source>,
    annotations: BTreeMap<UniqueId, Vec<Annotation>>,
    server_annotations: Option<Vec<Annotation>>,
    retry: Vec<(Instant, Notice)>,
    /// Told to those who watch over us: a scan may take long.
    scanning: Arc<AtomicBool>,
}

impl Router {
    pub(super) fn new(store: Arc<dyn MailStore>, replicas: Vec<Arc<Shared>>, scanning: Arc<AtomicBool>) -> Self {
        Self {
            store,
            replicas,
            source: Arc::default(),
            annotations: BTreeMap::new(),
            server_annotations: None,
            retry: Vec::new(),
            scanning,
        }
    }

    pub(super) fn run(mut self, inbox: &mpsc::Receiver<Order>) {
        loop {
            let wait = self.retry.iter().map(|(at, _)| *at).min();
            let order = match wait {
                None => inbox.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
                Some(at) => inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match order {
                Ok(Order::Notices(notices)) => self.notices(notices),
                Ok(Order::Scan(done)) => {
                    self.scan(None);
                    drop(done);
                }
                Ok(Order::Flush(done)) => {
                    let again = self.retry.drain(..).map(|(_, notice)| notice).collect();
                    self.notices(again);
                    drop(done);
                }
                Ok(Order::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let now = Instant::now();
                    let (due, later) = self.retry.drain(..).partition(|(at, _)| *at <= now);
                    self.retry = later;
                    let due: Vec<(Instant, Notice)> = due;
                    self.notices(due.into_iter().map(|(_, notice)| notice).collect());
                }
            }
        }
    }

    fn notices(&mut self, notices: Vec<Notice>) {
        // One batch is one moment: what belongs together (a rename and its mailbox) goes out together.
        self.replicas.iter().for_each(|shared| shared.queue.hold(true));
        let mut rescan = None;
        for notice in notices {
            if let DirtyKey::Rescan(scope) = &notice.key {
                rescan = Some(match (rescan, scope) {
                    (None, scope) => scope.clone(),
                    (Some(old), scope) if old == *scope => old,
                    _ => Scope::Everything,
                });
                continue;
            }
            if let Err(error) = self.notice(&notice) {
                self.trouble(&error);
                self.retry.push((Instant::now() + RETRY, notice));
            }
        }
        self.replicas.iter().for_each(|shared| shared.queue.hold(false));
        match rescan {
            Some(Scope::Everything) => self.scan(None),
            Some(Scope::Below(name)) => self.scan(Some(&name)),
            None => {}
        }
    }

    fn trouble(&self, error: &StoreError) {
        if let Some(shared) = self.replicas.first() {
            (shared.events)(&Event::SourceTrouble { reason: error.to_string() });
        }
    }

    fn push(&self, lane: &Lane, item: &Item, seen_at: Instant) {
        for shared in &self.replicas {
            shared.push(lane.clone(), item.clone(), seen_at, true);
        }
    }

    fn lane(&self, name: &MboxName) -> Lane {
        Lane::of(name, self.store.deleted_prefix())
    }

    fn notice(&mut self, notice: &Notice) -> Result<(), StoreError> {
        let at = notice.seen_at;
        match &notice.key {
            DirtyKey::MailboxList => self.list_changed(at),
            DirtyKey::Annotations => self.annotations_changed(at),
            DirtyKey::Mailbox(mailbox) => self.mailbox(mailbox, at),
            DirtyKey::Accessed(mailbox) => self.accessed(mailbox, at),
            DirtyKey::User(UserRef::Name(user), part) => {
                if *part == UserPart::Seen {
                    for id in self.store.follows_seen(user)? {
                        self.mailbox(&MailboxRef::Id(id), at)?;
                    }
                }
                self.push(&Lane::User(user.clone()), &Item::Meta(*part), at);
                Ok(())
            }
            DirtyKey::User(UserRef::Inbox(id), part) => {
                if let Some(user) = self.owner_of(id, at)? {
                    self.push(&Lane::User(user), &Item::Meta(*part), at);
                }
                Ok(())
            }
            DirtyKey::Quota(root) => {
                self.push(&quota_lane(root, self.store.deleted_prefix()), &Item::Quota(root.clone()), at);
                Ok(())
            }
            DirtyKey::AllQuotas => {
                let mut roots: Vec<QuotaRoot> = self.store.quotas()?.into_keys().collect();
                roots.extend(self.replicas.iter().flat_map(|shared| shared.state.quotas().into_keys()));
                for root in roots {
                    self.push(&quota_lane(&root, self.store.deleted_prefix()), &Item::Quota(root), at);
                }
                Ok(())
            }
            DirtyKey::Rescan(_) => Ok(()),
        }
    }

    fn owner_of(&mut self, inbox: &UniqueId, at: Instant) -> Result<Option<UserId>, StoreError> {
        if self.source.by_id(inbox).is_none() {
            self.list_changed(at)?;
        }
        Ok(self.source.by_id(inbox).and_then(|entry| entry.name.owner()))
    }

    /// The mailbox as the list has it.
    fn find(&mut self, mailbox: &MailboxRef, at: Instant) -> Result<Option<Arc<MailboxEntry>>, StoreError> {
        let find = |source: &Source| match mailbox {
            MailboxRef::Name(name) => source.by_name(name).cloned(),
            MailboxRef::Id(id) => source.by_id(id).cloned(),
        };
        let mut entry = find(&self.source);
        if entry.is_none() {
            self.list_changed(at)?;
            entry = find(&self.source);
        }
        Ok(entry)
    }

    fn mailbox(&mut self, mailbox: &MailboxRef, at: Instant) -> Result<(), StoreError> {
        let entry = self.find(mailbox, at)?;
        // Unknown still: it is being made (the list's own notice follows its commit) or has just been removed.
        if let Some(entry) = entry {
            self.push(&self.lane(&entry.name), &Item::Mailbox(entry.uniqueid.clone()), at);
        }
        Ok(())
    }

    /// Most of those who open a mailbox change nothing: where its files are as they were when they were read last, there
    /// is nothing to be read.
    fn accessed(&mut self, mailbox: &MailboxRef, at: Instant) -> Result<(), StoreError> {
        let Some(entry) = self.find(mailbox, at)? else { return Ok(()) };
        // What cannot be read is a matter for its job.
        let now = self.store.fingerprint(&entry).ok().flatten();
        let (lane, item) = (self.lane(&entry.name), Item::Mailbox(entry.uniqueid.clone()));
        for shared in &self.replicas {
            let seen = shared.state.mailbox(&entry.uniqueid).and_then(|receipt| receipt.fingerprint);
            if now.is_none() || seen != now {
                shared.push(lane.clone(), item.clone(), at, true);
            }
        }
        Ok(())
    }

    /// What is different between the last listing and this one.
    fn list_changed(&mut self, at: Instant) -> Result<(), StoreError> {
        let listing = self.store.listing()?;
        if Arc::ptr_eq(&listing, &self.source.listing) {
            return Ok(());
        }
        let new = Arc::new(Source::new(listing));
        let old = std::mem::replace(&mut self.source, new);
        let new = self.source.clone();
        for entry in &new.listing.entries {
            let before = old.by_id(&entry.uniqueid);
            if before.is_some_and(|before| Arc::ptr_eq(before, entry) || before == entry) {
                continue;
            }
            // The former owner is one of the others now, with what he has seen in his own database.
            let former =
                before.and_then(|before| before.name.owner()).filter(|owner| entry.name.owner() != Some(owner.clone()));
            if let Some(owner) = former {
                self.push(&Lane::User(owner), &Item::Meta(UserPart::Seen), at);
            }
            self.push(&self.lane(&entry.name), &Item::Mailbox(entry.uniqueid.clone()), at);
        }
        for entry in &old.listing.entries {
            if new.by_id(&entry.uniqueid).is_none() {
                self.push(&self.lane(&entry.name), &Item::Mailbox(entry.uniqueid.clone()), at);
            }
        }
        Ok(())
    }

    fn annotations_changed(&mut self, at: Instant) -> Result<(), StoreError> {
        let new = self.store.annotated_mailboxes()?;
        let old = std::mem::take(&mut self.annotations);
        let changed = new.iter().filter(|(id, list)| old.get(*id) != Some(*list)).map(|(id, _)| id);
        let gone = old.keys().filter(|id| !new.contains_key(*id));
        let ids: Vec<UniqueId> = changed.chain(gone).cloned().collect();
        self.annotations = new;
        for id in ids {
            self.mailbox(&MailboxRef::Id(id), at)?;
        }
        let server = self.store.server_annotations()?;
        if self.server_annotations.as_ref() != Some(&server) {
            self.server_annotations = Some(server);
            self.push(&Lane::Server, &Item::ServerAnnotations, at);
        }
        Ok(())
    }

    fn scan(&mut self, below: Option<&MboxName>) {
        self.scanning.store(true, Ordering::Relaxed);
        self.compare_all(below);
        self.scanning.store(false, Ordering::Relaxed);
    }

    fn compare_all(&mut self, below: Option<&MboxName>) {
        let started = Instant::now();
        let remember = (|| {
            self.source = Arc::new(Source::new(self.store.listing()?));
            self.annotations = self.store.annotated_mailboxes()?;
            self.server_annotations = Some(self.store.server_annotations()?);
            Ok(())
        })();
        let (mut checked, mut differ) = (0, 0);
        let result = remember.and_then(|()| {
            for shared in &self.replicas {
                let report = super::scan(&*self.store, &shared.state, below)?;
                drop(shared.source()?);
                shared.queue.hold(true);
                if below.is_none() {
                    // First start, or we died the last time and the receipts may be older than the replica.
                    for lane in self.lanes(shared)?.iter().filter(|lane| !shared.state.primed(&lane.to_string())) {
                        shared.push(lane.clone(), Item::Compare, started, false);
                    }
                }
                for (lane, item, _) in &report.differ {
                    shared.push(lane.clone(), item.clone(), started, false);
                }
                shared.queue.hold(false);
                checked += report.checked;
                differ += report.differ.iter().filter(|(lane, ..)| shared.wants(lane)).count();
            }
            Ok(())
        });
        match result {
            Ok(()) => {
                if let Some(shared) = self.replicas.first() {
                    (shared.events)(&Event::Scanned { checked, differ, elapsed: started.elapsed() });
                }
            }
            Err(error) => {
                self.trouble(&error);
                let scope = below.map_or(Scope::Everything, |name| Scope::Below(name.clone()));
                let notice = Notice { key: DirtyKey::Rescan(scope), seen_at: started };
                self.retry.push((Instant::now() + RETRY * 10, notice));
            }
        }
    }

    /// Every lane that the source or the receipts know of.
    fn lanes(&self, shared: &Shared) -> Result<BTreeSet<Lane>, StoreError> {
        let mut lanes: BTreeSet<Lane> =
            self.source.listing.entries.iter().map(|entry| self.lane(&entry.name)).collect();
        lanes.extend(shared.state.mailboxes().iter().map(|(_, name)| self.lane(name)));
        lanes.extend(self.store.users()?.into_iter().map(Lane::User));
        lanes.insert(Lane::Server);
        Ok(lanes)
    }
}
