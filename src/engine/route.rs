//! Keys → items in lanes. One thread; it keeps what it last saw of the shared databases, so that "mailboxes.db changed"
//! becomes "these mailboxes changed".

use super::pace::{Bustle, Pace};
use super::queue::{Item, Lane};
use super::scan::{Progress, Scan};
use super::{Event, ScanPace, Shared};
use crate::model::{
    Annotation, ChangedAnnotations, DirtyKey, Listing, MailStore, MailboxEntry, MailboxRef, MboxName, Notice, Pulse,
    QuotaRoot, Scope, StoreError, UniqueId, UserId, UserPart, UserRef, pulse,
};
use crate::state::ReplicaState;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
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

/// The router sleeps no longer in one go.
const BREATH: Duration = Duration::from_secs(1);
/// While others wait for the disk, a scan waits so many times as long as it worked.
const OTHERS_TURN: u32 = 4;

/// Pause before a key whose reading failed is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// First pause before a key is looked at again whose database a writer was at work on; each one is twice as long.
const UNSETTLED: Duration = Duration::from_millis(5);
/// Longest of these pauses: somebody who is stopped in the middle of a transaction keeps his lock.
const UNSETTLED_MOST: Duration = Duration::from_secs(30);

/// When the oldest of something was seen.
pub(super) type Oldest = Arc<Mutex<Option<Instant>>>;

pub(super) struct Router {
    store: Arc<dyn MailStore>,
    replicas: Vec<Arc<Shared>>,
    source: Arc<Listing>,
    /// Told by the store and not yet queued.
    annotations: ChangedAnnotations,
    server_annotations: Option<Vec<Annotation>>,
    retry: Vec<(Instant, Notice)>,
    /// Read while a writer was at work: what he commits later may have been told already.
    unsettled: BTreeMap<DirtyKey, Unsettled>,
    /// Told to those who watch over us: a scan may take long.
    scanning: Arc<Progress>,
    /// Told to them as well: see `tell_open`.
    open: Oldest,
    scanner: Arc<Pulse>,
    running: Option<Running>,
    pace: Pace,
    /// So that a slow scan does not go by leaps.
    piece_most: Option<usize>,
    bustle: Bustle,
    /// To be scanned when the running one is over.
    wanted: Option<Scope>,
    /// Who waits for all that was asked for so far.
    waiting: Vec<mpsc::Sender<()>>,
}

/// A key to be looked at again, until it was once while nobody was writing.
struct Unsettled {
    seen_at: Instant,
    look_at: Instant,
    pause: Duration,
}

/// A scan under way.
struct Running {
    scan: Scan,
    started: Instant,
    /// The next piece comes not before this.
    next_at: Instant,
    differ: usize,
    /// Who waits for it.
    _done: Vec<mpsc::Sender<()>>,
}

impl Router {
    pub(super) fn new(
        store: Arc<dyn MailStore>,
        replicas: Vec<Arc<Shared>>,
        scanning: Arc<Progress>,
        open: Oldest,
        scanner: Arc<Pulse>,
        pace: ScanPace,
    ) -> Self {
        Self {
            store,
            replicas,
            source: Arc::default(),
            annotations: ChangedAnnotations::default(),
            server_annotations: None,
            retry: Vec::new(),
            unsettled: BTreeMap::new(),
            scanning,
            open,
            scanner,
            running: None,
            pace: Pace::new(Some(pace.per_second)),
            piece_most: (pace.per_second > 0).then_some(pace.per_second as usize / 4),
            bustle: Bustle::new(pace.busy_percent),
            wanted: None,
            waiting: Vec::new(),
        }
    }

    pub(super) fn run(mut self, inbox: &mpsc::Receiver<Order>) {
        loop {
            self.tell_open();
            // That has a pulse of its own.
            let scanner = self.scanner.clone();
            pulse::abroad(|| scanner.during(|| self.begin_scan()));
            // Between two pieces of a scan whoever has something to say is heard.
            let wait = match &self.running {
                Some(running) => self.look_at().chain([running.next_at]).min(),
                None => self.look_at().min(),
            };
            let wait = wait.map_or(BREATH, |at| at.saturating_duration_since(Instant::now()).min(BREATH));
            let order = inbox.recv_timeout(wait);
            pulse::beat();
            match order {
                Ok(Order::Notices(notices)) => self.notices(notices),
                Ok(Order::Scan(done)) => {
                    self.want(Scope::Everything);
                    self.waiting.push(done);
                }
                Ok(Order::Flush(done)) => {
                    let mut again: Vec<Notice> = self.retry.drain(..).map(|(_, notice)| notice).collect();
                    again.extend(
                        self.unsettled.iter().map(|(key, one)| Notice { key: key.clone(), seen_at: one.seen_at }),
                    );
                    self.notices(again);
                    self.waiting.push(done);
                }
                Ok(Order::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            let now = Instant::now();
            if self.retry.iter().any(|(at, _)| *at <= now) {
                let (due, later): (Vec<_>, Vec<_>) = self.retry.drain(..).partition(|(at, _)| *at <= now);
                self.retry = later;
                self.notices(due.into_iter().map(|(_, notice)| notice).collect());
            }
            self.look_again(now);
            pulse::abroad(|| scanner.during(|| self.scan_on()));
        }
    }

    fn notices(&mut self, notices: Vec<Notice>) {
        // One batch is one moment: what belongs together (a rename and its mailbox) goes out together.
        self.replicas.iter().for_each(|shared| shared.queue.hold(true));
        for notice in notices {
            pulse::beat();
            if let DirtyKey::Rescan(scope) = notice.key {
                self.want(scope);
                continue;
            }
            self.unless_settled(&notice);
            if let Err(error) = self.notice(&notice) {
                self.trouble(&error);
                self.retry.push((Instant::now() + RETRY, notice));
            }
        }
        self.replicas.iter().for_each(|shared| shared.queue.hold(false));
    }

    /// Remembers to look again at what somebody is writing at this moment.
    fn unless_settled(&mut self, notice: &Notice) {
        if self.store.is_settled(&notice.key) {
            self.unsettled.remove(&notice.key);
            return;
        }
        let look_at = Instant::now() + UNSETTLED;
        let one = self.unsettled.entry(notice.key.clone()).or_insert(Unsettled {
            seen_at: notice.seen_at,
            look_at,
            pause: UNSETTLED,
        });
        (one.seen_at, one.look_at, one.pause) = (one.seen_at.min(notice.seen_at), look_at, UNSETTLED);
    }

    /// Looks again at what was being written, and is due.
    fn look_again(&mut self, now: Instant) {
        let due = self.unsettled.iter().filter(|(_, one)| one.look_at <= now);
        let due: Vec<(DirtyKey, Instant, Duration)> =
            due.map(|(key, one)| (key.clone(), one.seen_at, one.pause)).collect();
        if due.is_empty() {
            return;
        }
        self.notices(due.iter().map(|(key, seen_at, _)| Notice { key: key.clone(), seen_at: *seen_at }).collect());
        for (key, _, pause) in due {
            if let Some(still) = self.unsettled.get_mut(&key) {
                still.pause = (pause * 2).min(UNSETTLED_MOST);
                still.look_at = Instant::now() + still.pause;
            }
        }
    }

    /// When something is to be tried, or looked at, again.
    fn look_at(&self) -> impl Iterator<Item = Instant> {
        self.retry.iter().map(|(at, _)| *at).chain(self.unsettled.values().map(|one| one.look_at))
    }

    /// The oldest notice that is not an item of the queues yet, or may have to become one again.
    fn tell_open(&self) {
        let open = self.retry.iter().map(|(_, notice)| notice.seen_at);
        let oldest = open.chain(self.unsettled.values().map(|one| one.seen_at)).min();
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = oldest;
    }

    /// One comparison more, once the one under way is over: what that has passed may have changed since.
    fn want(&mut self, scope: Scope) {
        self.wanted = Some(match self.wanted.take() {
            None => scope,
            Some(old) if old == scope => old,
            Some(_) => Scope::Everything,
        });
    }

    fn trouble(&self, error: &StoreError) {
        if let Some(shared) = self.replicas.first() {
            (shared.events)(&Event::SourceTrouble { reason: error.to_string() });
        }
    }

    fn push(&self, lane: &Lane, item: &Item, seen_at: Instant) {
        for shared in &self.replicas {
            shared.push_noticed(lane, item, seen_at);
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
        let find = |source: &Listing| match mailbox {
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
                shared.push_noticed(&lane, &item, at);
            }
        }
        Ok(())
    }

    /// What is different between the last listing and this one.
    fn list_changed(&mut self, at: Instant) -> Result<(), StoreError> {
        let new = self.store.listing()?;
        if Arc::ptr_eq(&new, &self.source) {
            return Ok(());
        }
        let old = std::mem::replace(&mut self.source, new.clone());
        for (before, now) in new.since(&old) {
            // The former owner is one of the others now, with what he has seen in his own database.
            if let (Some(before), Some(now)) = (before, now)
                && let Some(owner) = before.name.owner()
                && now.name.owner().as_ref() != Some(&owner)
            {
                self.push(&Lane::User(owner), &Item::Meta(UserPart::Seen), at);
            }
            if let Some(entry) = now.or(before) {
                self.push(&self.lane(&entry.name), &Item::Mailbox(entry.uniqueid.clone()), at);
            }
        }
        Ok(())
    }

    /// Before 3.0 annotations are kept by name, and a rename moves them after the row: whoever reads in between sees none.
    /// That a name has them now is a change, even where the mailbox had them before.
    fn annotations_changed(&mut self, at: Instant) -> Result<(), StoreError> {
        let changed = self.store.changed_annotations()?;
        self.annotations.mailboxes.extend(changed.mailboxes);
        self.annotations.server |= changed.server;
        while let Some(mailbox) = self.annotations.mailboxes.first().cloned() {
            self.mailbox(&mailbox, at)?;
            self.annotations.mailboxes.remove(&mailbox);
        }
        if self.annotations.server {
            let server = self.store.server_annotations()?;
            if self.server_annotations.as_ref() != Some(&server) {
                self.server_annotations = Some(server);
                self.push(&Lane::Server, &Item::ServerAnnotations, at);
            }
            self.annotations.server = false;
        }
        Ok(())
    }

    /// Begins the comparison that is wanted, if none is under way.
    fn begin_scan(&mut self) {
        if self.running.is_some() {
            return;
        }
        let done = std::mem::take(&mut self.waiting);
        let Some(scope) = self.wanted.take() else { return };
        self.scanning.set((0, 1));
        let started = Instant::now();
        match self.prepare(&scope, started) {
            Ok(scan) => self.running = Some(Running { scan, started, next_at: started, differ: 0, _done: done }),
            Err(error) => self.scan_failed(&error, scope, started),
        }
    }

    fn prepare(&mut self, scope: &Scope, started: Instant) -> Result<Scan, StoreError> {
        let below = match scope {
            Scope::Everything => {
                // All of it is looked at, and what has changed until now is among it.
                self.source = self.store.listing()?;
                self.store.changed_annotations()?;
                self.annotations = ChangedAnnotations::default();
                self.server_annotations = Some(self.store.server_annotations()?);
                None
            }
            Scope::Below(name) => {
                // What has changed elsewhere is not, and its notice may be on its way.
                self.list_changed(started)?;
                Some(name)
            }
        };
        let scan = Scan::begin(&*self.store, self.source.clone(), below)?;
        let scan = match self.piece_most {
            Some(most) => scan.in_pieces_of(most),
            None => scan,
        };
        for shared in &self.replicas {
            drop(shared.source()?);
            if below.is_none() {
                // First start, or we died the last time and the receipts may be older than the replica.
                let lanes = self.lanes(shared)?;
                let names: Vec<String> = lanes.iter().map(Lane::to_string).collect();
                let primed = shared.state.primed_of(names.iter().map(String::as_str));
                shared.queue.hold(true);
                for (lane, _) in lanes.into_iter().zip(primed).filter(|(_, primed)| !primed) {
                    shared.push(lane, Item::Compare, started, false);
                }
                shared.queue.hold(false);
            }
        }
        Ok(scan)
    }

    /// Looks at the next piece and queues what differs.
    fn scan_on(&mut self) {
        let Some(running) = &mut self.running else { return };
        let since = Instant::now();
        if since < running.next_at {
            return;
        }
        let (before, _) = running.scan.progress();
        let states: Vec<&ReplicaState> = self.replicas.iter().map(|shared| &shared.state).collect();
        match running.scan.step(&*self.store, &states) {
            Ok(Some(found)) => {
                let progress = running.scan.progress();
                self.scanning.set(progress);
                running.next_at = self.pace.spend(progress.0.saturating_sub(before) as u64);
                if self.bustle.is_busy() {
                    running.next_at = running.next_at.max(Instant::now() + since.elapsed() * OTHERS_TURN);
                }
                self.replicas.iter().for_each(|shared| shared.queue.hold(true));
                for found in found {
                    let Some(shared) = self.replicas.get(found.replica) else { continue };
                    running.differ += usize::from(shared.wants(&found.lane));
                    shared.push(found.lane, found.item, running.started, false);
                }
                self.replicas.iter().for_each(|shared| shared.queue.hold(false));
            }
            Ok(None) => {
                if let Some(shared) = self.replicas.first() {
                    let checked = running.scan.mailboxes() * self.replicas.len();
                    let (differ, elapsed) = (running.differ, running.started.elapsed());
                    (shared.events)(&Event::Scanned { checked, differ, elapsed });
                }
                self.running = None;
                self.scanning.set((0, 0));
            }
            // What has been looked at stays looked at: the same piece is next.
            Err(error) => {
                running.next_at = Instant::now() + RETRY * 10;
                self.trouble(&error);
            }
        }
    }

    fn scan_failed(&mut self, error: &StoreError, scope: Scope, started: Instant) {
        self.scanning.set((0, 0));
        self.trouble(error);
        let notice = Notice { key: DirtyKey::Rescan(scope), seen_at: started };
        self.retry.push((Instant::now() + RETRY * 10, notice));
    }

    /// Every lane that the source or the receipts know of.
    fn lanes(&self, shared: &Shared) -> Result<BTreeSet<Lane>, StoreError> {
        let mut lanes: BTreeSet<Lane> = self.source.entries().map(|entry| self.lane(&entry.name)).collect();
        lanes.extend(shared.names().lanes());
        lanes.extend(self.store.users()?.into_iter().map(Lane::User));
        lanes.insert(Lane::Server);
        Ok(lanes)
    }
}
