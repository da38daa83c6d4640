//! One job through one session: names first (renames, removals), then contents, then quotas and users' data. Each item
//! ends in a receipt or in a reason.

use super::diff::{self, MailboxDiff, Repair};
use super::names::Source;
use super::queue::{Item, Job, Lane, Outcome};
use super::{Event, Shared};
use crate::model::{
    Body, BodyRef, BodySource, Capabilities, Disposition, MailStore, MailboxEntry, MailboxHead, MailboxSnapshot,
    MailboxUpdate, MailboxView, MboxName, ModSeq, QuotaRoot, Replica, ReplicaError, Step, StoreError, Uid, UniqueId,
    UserId, UserPart,
};
use crate::state::{Lift, MailboxReceipt, UserReceipt};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

/// Mailboxes handled in one job before the lane is offered to others again.
const JOB_MAILBOXES: usize = 64;
/// New records and bytes in one update; more goes in several, so that a cut costs at most this much.
const PART_RECORDS: usize = 1000;
const PART_BYTES: u64 = 32 << 20;
/// Below this, uploading costs less than asking which bodies the replica has.
const RESERVE_BYTES: u64 = 256 << 10;
const RESERVE_BODIES: usize = 32;

/// Why an item did not get through.
#[derive(Debug, thiserror::Error)]
pub(super) enum JobError {
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{0}")]
    Replica(#[from] ReplicaError),
    #[error("{0}")]
    Conflict(String),
    #[error("{0}")]
    Again(String),
    /// Another lane is needed and was busy.
    #[error("waits for {0}")]
    Needs(Lane),
}

impl JobError {
    fn quarantine(&self) -> bool {
        let disposition = match self {
            Self::Store(error) => error.disposition,
            Self::Replica(error) => error.disposition(),
            Self::Conflict(_) => Disposition::Quarantine,
            Self::Again(_) | Self::Needs(_) => Disposition::RetrySoon,
        };
        matches!(disposition, Disposition::Quarantine | Disposition::Stop)
    }
}

/// Nothing to give: for steps that carry no bodies.
pub(super) struct NoBodies;

impl BodySource for NoBodies {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        Err(StoreError::new(Disposition::RetrySoon, format!("no body for UID {} is at hand", body.uid.0)))
    }
}

/// Outcomes of a job; `Err` when the session is of no use any more (unfinished items are requeued).
pub(super) type JobResult = (Vec<(Item, Instant, Outcome, Option<MboxName>)>, Option<ReplicaError>);

pub(super) struct Pusher<'a> {
    pub shared: &'a Shared,
    pub session: &'a mut dyn Replica,
    pub caps: Capabilities,
    source: Arc<Source>,
    /// Bodies this job brought, and where they are now.
    brought: HashMap<crate::model::MessageGuid, MboxName>,
}

impl<'a> Pusher<'a> {
    pub fn new(shared: &'a Shared, session: &'a mut dyn Replica) -> Self {
        let caps = shared.target.capabilities();
        Self { shared, session, caps, source: Arc::default(), brought: HashMap::new() }
    }

    fn store(&self) -> &'a dyn MailStore {
        &*self.shared.store
    }

    /// Works through a job.
    pub fn run(&mut self, job: &mut Job) -> JobResult {
        let mut items = std::mem::take(&mut job.items);
        let mut out = Vec::with_capacity(items.len());
        match self.prepare(job, &mut items) {
            Ok(()) => {}
            Err(JobError::Replica(error @ (ReplicaError::Lost { .. } | ReplicaError::Fatal(_)))) => {
                out.extend(items.into_iter().map(|(item, at)| (item, at, Outcome::Requeue, None)));
                return (out, Some(error));
            }
            Err(error) => {
                let (reason, quarantine) = (error.to_string(), error.quarantine());
                out.extend(
                    items
                        .into_iter()
                        .map(|(item, at)| (item, at, Outcome::Failed { reason: reason.clone(), quarantine }, None)),
                );
                return (out, None);
            }
        }
        let mut rest = items.into_iter();
        let mut mailboxes = 0;
        for (item, at) in rest.by_ref() {
            if matches!(item, Item::Mailbox(_)) {
                mailboxes += 1;
            }
            if mailboxes > JOB_MAILBOXES {
                out.push((item, at, Outcome::Requeue, None));
                continue;
            }
            let name = self.name_of(&item);
            match self.item(job, &item, at) {
                Ok(()) => out.push((item, at, Outcome::Done, name)),
                Err(JobError::Needs(lane)) => out.push((item, at, Outcome::Needs(lane), name)),
                Err(JobError::Replica(error @ (ReplicaError::Lost { .. } | ReplicaError::Fatal(_)))) => {
                    // A request that makes the server drop us every time must not hold up its lane for ever.
                    let outcome = if self.shared.count_loss(&job.lane, &item) {
                        Outcome::Failed { reason: error.to_string(), quarantine: true }
                    } else {
                        Outcome::Requeue
                    };
                    out.push((item, at, outcome, name));
                    out.extend(rest.map(|(item, at)| (item, at, Outcome::Requeue, None)));
                    return (out, Some(error));
                }
                Err(error) => {
                    let reason = error.to_string();
                    let quarantine = error.quarantine();
                    if !self.shared.queue.is_known(&job.lane, &item, &reason) {
                        (self.shared.events)(&Event::Failed {
                            lane: job.lane.clone(),
                            item: item.clone(),
                            mailbox: name.clone(),
                            reason: reason.clone(),
                            quarantine,
                        });
                    }
                    out.push((item, at, Outcome::Failed { reason, quarantine }, name));
                }
            }
        }
        (out, None)
    }

    fn name_of(&self, item: &Item) -> Option<MboxName> {
        let Item::Mailbox(id) = item else { return None };
        let here = self.source.by_id(id).map(|entry| entry.name.clone());
        here.or_else(|| self.shared.names().name(id).cloned())
    }

    /// Fresh listing, first look at the lane, order of the items.
    fn prepare(&mut self, job: &Job, items: &mut Vec<(Item, Instant)>) -> Result<(), JobError> {
        self.source = self.shared.source()?;
        let compare = items.iter().find(|(item, _)| *item == Item::Compare).map(|(_, at)| *at);
        if compare.is_some() || !self.shared.state.primed(&job.lane.to_string()) {
            self.prime(&job.lane)?;
        }
        if let Some(at) = compare {
            let mut all: BTreeSet<Item> = items.iter().map(|(item, _)| item.clone()).collect();
            all.extend(self.everything_in(&job.lane)?);
            let known: HashMap<Item, Instant> = items.drain(..).collect();
            items.extend(all.into_iter().map(|item| {
                let at = known.get(&item).copied().unwrap_or(at);
                (item, at)
            }));
        }
        let prefix = self.store().deleted_prefix();
        let names = self.shared.names();
        // Into DELETED first (that frees names), parents before children; removals last and children first.
        let rank = |item: &Item| match item {
            Item::Compare => (0, None),
            Item::Mailbox(id) => match (self.source.by_id(id), names.name(id)) {
                (None, Some(name)) => (2, Some(std::cmp::Reverse(name.clone()))),
                _ => (1, None),
            },
            Item::Quota(_) => (3, None),
            Item::Meta(_) => (4, None),
            Item::ServerAnnotations => (5, None),
        };
        let target = |item: &Item| match item {
            Item::Mailbox(id) => {
                self.source.by_id(id).map(|entry| (entry.name.without_deleted(prefix).is_none(), entry.name.clone()))
            }
            _ => None,
        };
        items.sort_by_cached_key(|(item, _)| (rank(item), target(item)));
        Ok(())
    }

    /// Every item a lane can have, from both sides.
    fn everything_in(&self, lane: &Lane) -> Result<Vec<Item>, JobError> {
        let prefix = self.store().deleted_prefix();
        let mut out: Vec<Item> =
            self.source.in_lane(lane, prefix).map(|entry| Item::Mailbox(entry.uniqueid.clone())).collect();
        let names = self.shared.names();
        out.extend(names.in_lane(lane).iter().filter_map(|name| names.id(name).cloned()).map(Item::Mailbox));
        drop(names);
        let in_lane = |root: &QuotaRoot| super::route::quota_lane(root, prefix) == *lane;
        out.extend(self.store().quotas()?.into_keys().filter(in_lane).map(Item::Quota));
        out.extend(self.shared.state.quotas().into_keys().filter(in_lane).map(Item::Quota));
        match lane {
            Lane::User(_) => out.extend([UserPart::Subs, UserPart::Seen, UserPart::Sieve].map(Item::Meta)),
            Lane::Server => out.push(Item::ServerAnnotations),
            Lane::Shared(_) => {}
        }
        Ok(out)
    }

    /// Learns what the replica has in a lane. Mailboxes the source knows nothing of are strays: reported, never removed.
    fn prime(&mut self, lane: &Lane) -> Result<(), JobError> {
        let prefix = self.store().deleted_prefix();
        let view = match lane {
            Lane::User(user) => self.session.view_user(user)?,
            Lane::Shared(_) => {
                let names: Vec<MboxName> = self.source.in_lane(lane, prefix).map(|entry| entry.name.clone()).collect();
                let known = self.shared.names().in_lane(lane);
                let all: BTreeSet<MboxName> = names.into_iter().chain(known).collect();
                let mailboxes = self.session.view_mailboxes(&all.into_iter().collect::<Vec<_>>())?;
                crate::model::AccountView { mailboxes, ..Default::default() }
            }
            Lane::Server => Default::default(),
        };
        let gone: Vec<UniqueId> = {
            let there: HashSet<&UniqueId> = view.mailboxes.iter().map(|view| &view.head.uniqueid).collect();
            let names = self.shared.names();
            names
                .in_lane(lane)
                .iter()
                .filter_map(|name| names.id(name))
                .filter(|id| !there.contains(*id))
                .cloned()
                .collect()
        };
        for id in gone {
            self.forget(&id);
        }
        for mailbox in view.mailboxes {
            let (id, name) = (mailbox.head.uniqueid.clone(), mailbox.head.name.clone());
            let ours = self.source.by_id(&id).is_some()
                || self.source.is_tombstone(&id)
                || self.shared.state.mailbox(&id).is_some();
            if ours {
                self.put_view(&id, mailbox, None);
            } else {
                (self.shared.events)(&Event::Stray { name: name.clone(), uniqueid: id.clone() });
                self.shared.names().set_stray(&id, &name, mailbox.head.last_uid);
            }
        }
        match lane {
            Lane::User(user) => {
                for root in self.shared.state.quotas().into_keys() {
                    if super::route::quota_lane(&root, prefix) == *lane && !view.quotas.contains_key(&root) {
                        self.shared.state.remove_quota(&root);
                    }
                }
                for (root, limits) in &view.quotas {
                    self.shared.state.put_quota(root, limits);
                }
                self.shared.state.put_user(user, &UserReceipt { meta: view.meta, fingerprint: None });
            }
            Lane::Server => {
                let there = self.session.view_server_annotations()?;
                self.shared.state.put_server_annotations(&there);
            }
            Lane::Shared(_) => {}
        }
        self.shared.state.set_primed(&lane.to_string());
        Ok(())
    }

    /// Remembers what the replica has; a receipt it replaces keeps its lift.
    fn put_view(&self, id: &UniqueId, view: MailboxView, old: Option<MailboxReceipt>) {
        self.shared.names().set(id, &view.head.name);
        let old = old.or_else(|| self.shared.state.mailbox(id));
        let (lift, source_highestmodseq) =
            old.map_or((None, ModSeq(0)), |receipt| (receipt.lift, receipt.source_highestmodseq));
        let receipt = MailboxReceipt { view, fingerprint: None, source_highestmodseq, lift };
        self.shared.state.put_mailbox(id, &receipt);
    }

    fn forget(&self, id: &UniqueId) {
        self.shared.names().remove(id);
        self.shared.state.remove_mailbox(id);
    }

    fn item(&mut self, job: &mut Job, item: &Item, seen_at: Instant) -> Result<(), JobError> {
        match item {
            Item::Compare => Ok(()),
            Item::Mailbox(id) => {
                self.settle(job, id, &mut HashSet::new())?;
                match self.source.by_id(id).cloned() {
                    Some(entry) => self.content(job, &entry, seen_at),
                    None => Ok(()),
                }
            }
            Item::Quota(root) => self.quota(root, seen_at),
            Item::Meta(part) => match &job.lane {
                Lane::User(user) => self.meta(&user.clone(), *part, seen_at),
                _ => Ok(()),
            },
            Item::ServerAnnotations => self.server_annotations(seen_at),
        }
    }

    fn apply(&mut self, step: &Step) -> Result<(), JobError> {
        self.apply_with(step, &NoBodies)
    }

    fn apply_with(&mut self, step: &Step, bodies: &dyn BodySource) -> Result<(), JobError> {
        if self.shared.dry_run {
            (self.shared.events)(&Event::Planned(step));
            return Ok(());
        }
        self.session.apply(step, bodies)?;
        (self.shared.events)(&Event::Applied(step));
        Ok(())
    }

    // ---- names ----

    /// Brings the name of a mailbox in line: renames it, removes it, or frees the name it is going to have.
    fn settle(&mut self, job: &mut Job, id: &UniqueId, path: &mut HashSet<UniqueId>) -> Result<(), JobError> {
        let target = self.source.by_id(id).cloned();
        let have = self.shared.names().name(id).cloned();
        let ours = self.shared.state.mailbox(id).is_some();
        match (target, have) {
            (Some(entry), Some(name)) => {
                let partition = self.shared.state.mailbox(id).map(|receipt| receipt.view.head.partition);
                let moved = partition
                    .is_some_and(|partition| partition != entry.partition && !entry.partition.is_empty())
                    && !entry.mbtype.is_intermediate();
                if name == entry.name && !moved {
                    return Ok(());
                }
                self.own(job, &name)?;
                self.own(job, &entry.name)?;
                path.insert(id.clone());
                if name != entry.name {
                    self.free(job, &entry.name, id, path)?;
                }
                // In a cycle of names this one may have been put aside meanwhile.
                let name = self.shared.names().name(id).cloned().unwrap_or(name);
                self.rename(&entry, &name)
            }
            (Some(entry), None) => {
                self.own(job, &entry.name)?;
                path.insert(id.clone());
                self.free(job, &entry.name, id, path)
            }
            (None, Some(name)) if ours => {
                self.own(job, &name)?;
                self.remove(id, &name)
            }
            (None, _) => Ok(()),
        }
    }

    /// A name may only be touched by whoever owns its lane.
    fn own(&self, job: &mut Job, name: &MboxName) -> Result<(), JobError> {
        let lane = Lane::of(name, self.store().deleted_prefix());
        if self.shared.queue.try_extra(job, &lane) { Ok(()) } else { Err(JobError::Needs(lane)) }
    }

    /// Makes sure that no other mailbox has this name on the replica.
    fn free(
        &mut self,
        job: &mut Job,
        name: &MboxName,
        for_id: &UniqueId,
        path: &mut HashSet<UniqueId>,
    ) -> Result<(), JobError> {
        let Some(occupant) = self.shared.names().id(name).filter(|id| *id != for_id).cloned() else { return Ok(()) };
        if path.contains(&occupant) {
            // Names were swapped: one of them waits under a third name.
            let stamp = blake3::hash(occupant.as_bytes()).to_hex();
            let aside = [
                self.store().deleted_prefix(),
                b".",
                name.domain_and_local().1,
                format!(".{}", stamp.get(..8).unwrap_or("swapswap").to_uppercase()).as_bytes(),
            ]
            .concat();
            let aside: MboxName = match name.domain_and_local().0 {
                Some(domain) => [domain, b"!", &*aside].concat().into(),
                None => aside.into(),
            };
            let receipt = self.shared.state.mailbox(&occupant);
            let head = receipt.map(|receipt| receipt.view.head).unwrap_or_default();
            self.rename_on_replica(&occupant, name, &aside, &head.partition, head.uidvalidity)?;
            return Ok(());
        }
        self.settle(job, &occupant, path)?;
        if self.shared.names().id(name) != Some(&occupant) {
            return Ok(());
        }
        let stray = self.shared.names().stray(&occupant);
        if stray == Some(Uid(0)) {
            // It never held mail: nothing can be lost, and the source's mailbox of that name needs the place.
            self.apply(&Step::Remove { uniqueid: occupant.clone(), name: name.clone() })?;
            self.forget(&occupant);
            return Ok(());
        }
        Err(JobError::Conflict(format!(
            "name {name} is taken on the replica by a mailbox with uniqueid {occupant}, which the source does not have; \
             it holds mail and is kept: rename or delete it there, then spooltap goes on by itself"
        )))
    }

    fn rename(&mut self, entry: &MailboxEntry, from: &MboxName) -> Result<(), JobError> {
        let uidvalidity = match self.store().mailbox(entry) {
            Ok(Some(snapshot)) => snapshot.head.uidvalidity,
            _ => entry.uidvalidity,
        };
        self.rename_on_replica(&entry.uniqueid, from, &entry.name, &entry.partition, uidvalidity)
    }

    fn rename_on_replica(
        &mut self,
        id: &UniqueId,
        from: &MboxName,
        to: &MboxName,
        partition: &crate::model::Partition,
        uidvalidity: u32,
    ) -> Result<(), JobError> {
        let step = Step::Rename {
            uniqueid: id.clone(),
            from: from.clone(),
            to: to.clone(),
            partition: partition.clone(),
            uidvalidity,
        };
        let result = self.apply(&step);
        if let Err(JobError::Replica(ReplicaError::NoSuchMailbox(_) | ReplicaError::Moved(_))) = &result {
            self.look_again(&[from.clone(), to.clone()], id)?;
        }
        result?;
        self.names_changed(from, to);
        if self.shared.dry_run {
            self.shared.names().set(id, to);
            return Ok(());
        }
        // The rename raised modseqs over there; what it has now is asked, not guessed. What of ours it has seen is what it
        // had seen before.
        let mut old = self.shared.state.mailbox(id).unwrap_or_default();
        if old.source_highestmodseq == ModSeq(0) {
            old.source_highestmodseq = old.view.head.highestmodseq;
        }
        let view = self.session.view_mailboxes(std::slice::from_ref(to))?.pop();
        match view {
            Some(view) if view.head.uniqueid == *id => self.put_view(id, view, Some(old)),
            _ => self.forget(id),
        }
        Ok(())
    }

    /// The replica's idea of these names was not ours: take its word.
    fn look_again(&mut self, names: &[MboxName], id: &UniqueId) -> Result<(), JobError> {
        let views = self.session.view_mailboxes(names)?;
        if !views.iter().any(|view| view.head.uniqueid == *id) {
            self.forget(id);
        }
        for name in names {
            let stale = self.shared.names().id(name).cloned();
            if let Some(stale) = stale
                && !views.iter().any(|view| view.head.name == *name && view.head.uniqueid == stale)
            {
                self.shared.names().remove(&stale);
            }
        }
        for view in views {
            let other = view.head.uniqueid.clone();
            if other == *id || self.source.by_id(&other).is_some() || self.shared.state.mailbox(&other).is_some() {
                self.put_view(&other, view, None);
            } else {
                self.shared.names().set_stray(&other, &view.head.name, view.head.last_uid);
            }
        }
        Ok(())
    }

    /// User data and quota roots hang on INBOX and names: what the replica has of them is not known any more.
    fn names_changed(&self, from: &MboxName, to: &MboxName) {
        for name in [from, to] {
            self.shared.state.remove_quota(&QuotaRoot::new(name.as_bytes()));
            let Some(user) = name.owner().filter(|_| name.is_inbox()) else { continue };
            self.shared.state.remove_user(&user);
            if self.source.by_name(name).is_some() {
                for part in [UserPart::Subs, UserPart::Seen, UserPart::Sieve] {
                    self.shared.queue.push(Lane::User(user.clone()), Item::Meta(part), Instant::now(), true);
                }
            }
        }
        let prefix = self.store().deleted_prefix();
        for name in [from, to] {
            let root = QuotaRoot::new(name.as_bytes());
            let lane = super::route::quota_lane(&root, prefix);
            self.shared.queue.push(lane, Item::Quota(root), Instant::now(), true);
        }
    }

    /// Removes a mailbox that the source once had and has no more. Seen twice, and only within the fuse.
    fn remove(&mut self, id: &UniqueId, name: &MboxName) -> Result<(), JobError> {
        let again = self.shared.source_again()?;
        if again.by_id(id).is_some() {
            return Err(JobError::Again(format!("{name} is back in the source's mailbox list")));
        }
        self.shared.fuse(name)?;
        match self.apply(&Step::Remove { uniqueid: id.clone(), name: name.clone() }) {
            Ok(()) | Err(JobError::Replica(ReplicaError::NoSuchMailbox(_))) => {}
            Err(JobError::Replica(ReplicaError::Moved(_))) => {
                // Somebody else has that name now: the one we meant is gone or elsewhere.
                self.look_again(std::slice::from_ref(name), id)?;
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        if !self.shared.dry_run {
            self.forget(id);
            self.names_changed(name, name);
        }
        Ok(())
    }

    // ---- contents ----

    fn content(&mut self, job: &mut Job, entry: &MailboxEntry, seen_at: Instant) -> Result<(), JobError> {
        if entry.mbtype.is_intermediate() {
            return self.intermediate(entry, seen_at);
        }
        if entry.mbtype.is_sieve() && !self.caps.sieve_mailboxes {
            return Ok(());
        }
        let fingerprint = self.store().fingerprint(entry)?;
        let Some(mut raw) = self.store().mailbox(entry)? else {
            return Err(JobError::Again(format!("{} is gone or not there yet", entry.name)));
        };
        raw.head.name = entry.name.clone();
        diff::reduce(&mut raw, &self.caps);
        let receipt = self.shared.state.mailbox(&entry.uniqueid);
        let rolled_back = receipt.as_ref().is_some_and(|receipt| receipt.source_highestmodseq > raw.head.highestmodseq);
        let lift = receipt.as_ref().and_then(|receipt| receipt.lift.clone());
        let mut base = base_modseq(receipt.as_ref());
        let mut view = receipt.map(|receipt| receipt.view);
        let done = Receipt { entry, fingerprint, source_highestmodseq: raw.head.highestmodseq, seen_at };
        if rolled_back {
            return self.repair(job, &raw, &done, "the source's modseq went backwards");
        }
        let mut trust = true;
        let mut lifted = raw.clone();
        if let Some(lift) = &lift {
            diff::apply_lift(&mut lifted, lift);
        }
        loop {
            match diff::diff_mailbox(&lifted, view.as_ref(), base, &self.caps, trust) {
                MailboxDiff::Same => {
                    if let Some(view) = view {
                        self.put_receipt(&done, view, lift);
                    }
                    return Ok(());
                }
                MailboxDiff::Repair(reason) if trust && view.is_some() => {
                    // The receipt may be old: look before a record-by-record comparison is paid for.
                    let fresh = self.fresh_view(job, entry)?;
                    if fresh.as_ref().map(|fresh| &fresh.view) == view.as_ref() {
                        return self.repair(job, &raw, &done, reason);
                    }
                    base = base_modseq(fresh.as_ref());
                    (view, trust) = (fresh.map(|fresh| fresh.view), false);
                }
                MailboxDiff::Repair(reason) => return self.repair(job, &raw, &done, reason),
                MailboxDiff::Update(update) => match self.send(&lifted, view.clone(), *update, &done, lift.clone()) {
                    Err(JobError::Replica(ReplicaError::Changed(why))) if !trust => {
                        return self.repair(job, &raw, &done, &why);
                    }
                    Err(JobError::Replica(
                        ReplicaError::Changed(_) | ReplicaError::NoSuchMailbox(_) | ReplicaError::Moved(_),
                    )) if trust => {
                        let fresh = self.fresh_view(job, entry)?;
                        base = base_modseq(fresh.as_ref());
                        (view, trust) = (fresh.map(|fresh| fresh.view), false);
                    }
                    other => return other,
                },
            }
        }
    }

    /// What the replica has under this name right now, with all that follows when that is not what we thought.
    fn fresh_view(&mut self, job: &mut Job, entry: &MailboxEntry) -> Result<Option<MailboxReceipt>, JobError> {
        self.look_again(std::slice::from_ref(&entry.name), &entry.uniqueid)?;
        if self.shared.names().name(&entry.uniqueid).is_none() {
            // Perhaps it has it under another name: only a look at the whole lane can tell.
            self.prime(&job.lane.clone())?;
        }
        self.settle(job, &entry.uniqueid, &mut HashSet::new())?;
        Ok(self.shared.state.mailbox(&entry.uniqueid))
    }

    /// Sends an update, in parts where it is large.
    fn send(
        &mut self,
        lifted: &MailboxSnapshot,
        mut view: Option<MailboxView>,
        mut update: MailboxUpdate,
        done: &Receipt,
        lift: Option<Lift>,
    ) -> Result<(), JobError> {
        let bodies = self.store().bodies(done.entry)?;
        if view.is_none() && !self.shared.dry_run {
            // Remembered before it is sent: should the answer be lost and the source delete the mailbox meanwhile, it is
            // still known as ours and removed.
            let intent = MailboxView {
                head: MailboxHead {
                    uniqueid: done.entry.uniqueid.clone(),
                    name: done.entry.name.clone(),
                    partition: done.entry.partition.clone(),
                    ..MailboxHead::default()
                },
                ..MailboxView::default()
            };
            self.put_view(&done.entry.uniqueid, intent, None);
        }
        if !self.shared.dry_run {
            while let Some(mut part) = diff::first_part(lifted, view.as_ref(), &self.caps, PART_RECORDS, PART_BYTES) {
                self.attach(&mut part, view.as_ref(), &*bodies);
                let mut confirmed = part.confirmed_view();
                let exact = part.crcs.basic != 0;
                if !exact {
                    (confirmed.crc_basic, confirmed.crc_annot) = (None, None);
                }
                self.apply_with(&Step::Mailbox(Box::new(part)), &*bodies)?;
                self.put_view(&done.entry.uniqueid, confirmed.clone(), None);
                view = Some(confirmed);
                let base = view.as_ref().map_or(ModSeq(0), |view| view.head.highestmodseq);
                match diff::diff_mailbox(lifted, view.as_ref(), base, &self.caps, false) {
                    MailboxDiff::Update(rest) => update = *rest,
                    _ => return Err(JobError::Again("the rest of a large update could not be made".into())),
                }
            }
        }
        self.attach(&mut update, view.as_ref(), &*bodies);
        // A checksum of 0 is a wildcard over there: a mailbox that became empty is looked at once more.
        let emptied = update.crcs.basic == 0 && view.as_ref().is_some_and(|view| view.crc_basic != Some(0));
        let confirmed = update.confirmed_view();
        let brought: Vec<_> = update.bodies.iter().map(|body| body.guid).collect();
        self.apply_with(&Step::Mailbox(Box::new(update)), &*bodies)?;
        if emptied && !self.shared.dry_run {
            let name = done.entry.name.clone();
            let there = self.session.view_mailboxes(std::slice::from_ref(&name))?.pop();
            if there.is_some_and(|view| view.crc_basic.is_some_and(|crc| crc != 0)) {
                return Err(JobError::Replica(ReplicaError::Changed(format!("{name} still holds messages there"))));
            }
        }
        self.brought.extend(brought.into_iter().map(|guid| (guid, done.entry.name.clone())));
        if !self.shared.dry_run {
            self.put_receipt(done, confirmed, lift);
            self.confirmed(&Item::Mailbox(done.entry.uniqueid.clone()), Some(&done.entry.name), done.seen_at);
        }
        Ok(())
    }

    fn confirmed(&self, item: &Item, mailbox: Option<&MboxName>, seen_at: Instant) {
        let lag = seen_at.elapsed();
        self.shared.lag(lag);
        (self.shared.events)(&Event::Confirmed { item: item.clone(), mailbox: mailbox.cloned(), lag });
    }

    /// Adds the bodies an update needs, and where the replica might find them without an upload.
    fn attach(&self, update: &mut MailboxUpdate, view: Option<&MailboxView>, source: &dyn BodySource) {
        let after = view.map_or(Uid(0), |view| view.head.last_uid);
        let mut bodies: Vec<BodyRef> = diff::wanted_bodies(&update.records, after).collect();
        let expunged: HashSet<Uid> =
            update.records.iter().filter(|record| record.is_expunged()).map(|record| record.uid).collect();
        bodies.retain(|body| !expunged.contains(&body.uid) || source.exists(body.uid));
        for body in &mut bodies {
            body.copied = source.has_copies(body.uid);
        }
        let mut places: BTreeSet<MboxName> = BTreeSet::new();
        let known: Vec<_> = bodies.iter().filter_map(|body| Some((self.brought.get(&body.guid)?, body.size))).collect();
        if known.iter().map(|(_, size)| size).sum::<u64>() > RESERVE_BYTES || known.len() > RESERVE_BODIES {
            places.extend(known.into_iter().map(|(name, _)| name.clone()));
        }
        let copied: Vec<_> = bodies.iter().filter(|body| body.copied).collect();
        let worth = copied.iter().map(|body| body.size).sum::<u64>() > RESERVE_BYTES || copied.len() > RESERVE_BODIES;
        if worth && !update.create {
            let lane = Lane::of(&update.head.name, self.store().deleted_prefix());
            places.extend(self.shared.names().in_lane(&lane).into_iter().take(200));
        }
        update.bodies = bodies;
        update.reserve_from = places.into_iter().collect();
    }

    fn put_receipt(&self, done: &Receipt, view: MailboxView, lift: Option<Lift>) {
        if self.shared.dry_run {
            return;
        }
        self.shared.names().set(&done.entry.uniqueid, &view.head.name);
        let receipt = MailboxReceipt {
            view,
            fingerprint: done.fingerprint.clone(),
            source_highestmodseq: done.source_highestmodseq,
            lift,
        };
        self.shared.state.put_mailbox(&done.entry.uniqueid, &receipt);
    }

    fn intermediate(&mut self, entry: &MailboxEntry, seen_at: Instant) -> Result<(), JobError> {
        if !self.caps.intermediates {
            return Ok(());
        }
        let old = self.shared.state.mailbox(&entry.uniqueid).map(|receipt| receipt.view);
        if old.is_some_and(|old| old.head.name == entry.name && old.head.mbtype == entry.mbtype) {
            return Ok(());
        }
        let snapshot = MailboxSnapshot {
            head: MailboxHead {
                uniqueid: entry.uniqueid.clone(),
                name: entry.name.clone(),
                mbtype: entry.mbtype.clone(),
                partition: entry.partition.clone(),
                acl: entry.acl.clone(),
                uidvalidity: entry.uidvalidity,
                highestmodseq: entry.foldermodseq,
                createdmodseq: entry.createdmodseq,
                foldermodseq: entry.foldermodseq,
                ..MailboxHead::default()
            },
            ..MailboxSnapshot::default()
        };
        let MailboxDiff::Update(update) = diff::diff_mailbox(&snapshot, None, ModSeq(0), &self.caps, false) else {
            return Ok(());
        };
        let view = update.confirmed_view();
        self.apply(&Step::Mailbox(update))?;
        let done = Receipt { entry, fingerprint: None, source_highestmodseq: ModSeq(0), seen_at };
        self.put_receipt(&done, view, None);
        self.confirmed(&Item::Mailbox(entry.uniqueid.clone()), Some(&entry.name), seen_at);
        Ok(())
    }

    // ---- repair ----

    fn repair(&mut self, job: &mut Job, raw: &MailboxSnapshot, done: &Receipt, reason: &str) -> Result<(), JobError> {
        let name = &done.entry.name;
        (self.shared.events)(&Event::Repair { mailbox: name.clone(), reason: reason.to_owned() });
        let full = self.session.view_full(name)?;
        let Some(full) = full else {
            self.forget(&done.entry.uniqueid);
            return Err(JobError::Again(format!("{name} is not on the replica any more")));
        };
        if full.head.uniqueid != done.entry.uniqueid {
            self.fresh_view(job, done.entry)?;
            return Err(JobError::Again(format!("{name} had another uniqueid on the replica")));
        }
        match diff::repair(raw, &full, &self.caps) {
            Repair::Lift { expunge, mut update, lift } => {
                if !expunge.is_empty() {
                    self.apply(&Step::Expunge {
                        uniqueid: done.entry.uniqueid.clone(),
                        name: name.clone(),
                        uids: expunge,
                    })?;
                }
                let bodies = self.store().bodies(done.entry)?;
                self.attach(&mut update, Some(&full), &*bodies);
                let confirmed = update.confirmed_view();
                self.apply_with(&Step::Mailbox(update), &*bodies)?;
                self.put_receipt(done, confirmed, lift);
                self.confirmed(&Item::Mailbox(done.entry.uniqueid.clone()), Some(name), done.seen_at);
                Ok(())
            }
            Repair::Rebuild { reason, only_there } => {
                super::rebuild::rebuild(self, done.entry, &full, &reason, &only_there)?;
                self.forget(&done.entry.uniqueid);
                let MailboxDiff::Update(update) = diff::diff_mailbox(raw, None, ModSeq(0), &self.caps, false) else {
                    return Err(JobError::Again("a rebuilt mailbox could not be made".into()));
                };
                self.send(raw, None, *update, done, None)
            }
        }
    }

    pub(super) fn apply_step(&mut self, step: &Step) -> Result<(), JobError> {
        self.apply(step)
    }

    // ---- quotas, users, server ----

    fn quota(&mut self, root: &QuotaRoot, seen_at: Instant) -> Result<(), JobError> {
        let mine = self.store().quota(root)?;
        let theirs = match self.shared.state.quota(root) {
            Some(limits) => Some(limits),
            None => self.session.view_quota(root)?,
        };
        if !diff::same_limits(mine.as_ref(), theirs.as_ref()) {
            match &mine {
                Some(limits) => self.apply(&Step::Quota { root: root.clone(), limits: limits.clone() })?,
                None => match self.apply(&Step::Unquota { root: root.clone() }) {
                    Ok(()) | Err(JobError::Replica(ReplicaError::NoSuchMailbox(_))) => {}
                    Err(error) => return Err(error),
                },
            }
            self.confirmed(&Item::Quota(root.clone()), None, seen_at);
        }
        if !self.shared.dry_run {
            match &mine {
                Some(limits) => self.shared.state.put_quota(root, limits),
                None => self.shared.state.remove_quota(root),
            }
        }
        Ok(())
    }

    fn meta(&mut self, user: &UserId, part: UserPart, seen_at: Instant) -> Result<(), JobError> {
        if self.source.by_name(&user.inbox()).is_none() {
            // The user's data hangs on the INBOX and went with it.
            self.shared.state.remove_user(user);
            return Ok(());
        }
        if part == UserPart::Sieve && self.store().sieve_in_mailboxes() && self.caps.sieve_mailboxes {
            return Ok(());
        }
        let fingerprint = self.store().user_fingerprint(user)?;
        let mine = self.store().user_meta(user)?;
        let theirs = match self.shared.state.user(user) {
            Some(receipt) => receipt.meta,
            None => self.session.view_user(user)?.meta,
        };
        let parts = BTreeSet::from([part]);
        let source = self.source.clone();
        let steps = diff::diff_meta(user, &mine, &theirs, &parts, &|id| source.by_id(id).is_some());
        let changed = !steps.is_empty();
        for step in &steps {
            self.apply(step)?;
        }
        if !self.shared.dry_run {
            let meta = diff::confirmed_meta(&mine, &theirs, &parts);
            let all = [UserPart::Subs, UserPart::Seen, UserPart::Sieve].into_iter().collect::<BTreeSet<_>>();
            let settled = diff::diff_meta(user, &mine, &meta, &all, &|id| source.by_id(id).is_some()).is_empty();
            let fingerprint = settled.then_some(fingerprint);
            self.shared.state.put_user(user, &UserReceipt { meta, fingerprint });
            if changed {
                self.confirmed(&Item::Meta(part), Some(&user.inbox()), seen_at);
            }
        }
        Ok(())
    }

    fn server_annotations(&mut self, seen_at: Instant) -> Result<(), JobError> {
        let mine = self.store().server_annotations()?;
        let theirs = match self.shared.state.server_annotations() {
            Some(annotations) => annotations,
            None => self.session.view_server_annotations()?,
        };
        let steps = diff::diff_server_annotations(&mine, &theirs);
        for step in &steps {
            self.apply(step)?;
        }
        if !self.shared.dry_run {
            self.shared.state.put_server_annotations(&mine);
            if !steps.is_empty() {
                self.confirmed(&Item::ServerAnnotations, None, seen_at);
            }
        }
        Ok(())
    }
}

/// The modseq up to which the replica certainly has the source's changes, as the replica counts them.
fn base_modseq(receipt: Option<&MailboxReceipt>) -> ModSeq {
    let Some(receipt) = receipt else { return ModSeq(0) };
    let there = receipt.view.head.highestmodseq;
    if receipt.source_highestmodseq == ModSeq(0) {
        return there;
    }
    let offset = receipt.lift.as_ref().map_or(0, |lift| lift.offset);
    there.min(ModSeq(receipt.source_highestmodseq.0.saturating_add(offset)))
}

/// What a confirmed update is remembered by.
struct Receipt<'a> {
    entry: &'a MailboxEntry,
    fingerprint: Option<crate::model::Fingerprint>,
    source_highestmodseq: ModSeq,
    seen_at: Instant,
}
