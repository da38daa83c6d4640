//! One job through one session: names first (renames, removals), then contents, then quotas and users' data. Each item
//! ends in a receipt or in a reason.

use super::lags::Passed;
use super::names::{entries_in, roots_in, starts};
use super::queue::{Item, Job, Lane, Outcome};
use super::{Event, Shared, account};
use crate::model::{
    Body, BodyRef, BodySource, Capabilities, Disposition, Listing, MailStore, MailboxView, MboxName, ModSeq, Replica,
    ReplicaError, Step, StoreError, UniqueId, UserId, UserMeta, UserPart,
};
use crate::state::{MailboxReceipt, UserReceipt};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

/// Mailboxes handled in one job before the lane is offered to others again.
const JOB_MAILBOXES: usize = 64;

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
    /// Single messages are held back.
    #[error("{0}")]
    Held(String),
    /// Another lane is needed and was busy.
    #[error("waits for {0}")]
    Needs(Lane),
}

impl JobError {
    fn quarantine(&self) -> bool {
        let disposition = match self {
            Self::Store(error) => error.disposition,
            Self::Replica(error) => error.disposition(),
            Self::Conflict(_) | Self::Held(_) => Disposition::Quarantine,
            Self::Again(_) | Self::Needs(_) => Disposition::RetrySoon,
        };
        matches!(disposition, Disposition::Quarantine | Disposition::Stop)
    }
}

/// Nothing to give: for steps that carry no bodies.
pub struct NoBodies;

impl BodySource for NoBodies {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        Err(StoreError::new(Disposition::RetrySoon, format!("no body for UID {} is at hand", body.uid.0)))
    }
}

/// Outcomes of a job; `Err` when the session is of no use any more (unfinished items are requeued).
pub(super) type JobResult = (Vec<(Item, Instant, Outcome, Option<MboxName>)>, Option<ReplicaError>);

pub(super) struct Pusher<'a> {
    pub(super) shared: &'a Shared,
    pub(super) session: &'a mut dyn Replica,
    pub(super) caps: Capabilities,
    pub(super) source: Arc<Listing>,
    /// Bodies this job brought, and where they are now.
    pub(super) brought: HashMap<crate::model::MessageGuid, MboxName>,
    /// How far the item at hand has come.
    pub(super) passed: Passed,
}

impl<'a> Pusher<'a> {
    pub fn new(shared: &'a Shared, session: &'a mut dyn Replica) -> Self {
        let caps = shared.target.capabilities();
        Self { shared, session, caps, source: Arc::default(), brought: HashMap::new(), passed: Passed::default() }
    }

    pub(super) fn store(&self) -> &'a dyn MailStore {
        &*self.shared.store
    }

    /// Works through a job.
    pub fn run(&mut self, job: &mut Job) -> JobResult {
        let mut items = std::mem::take(&mut job.items);
        let mut out = Vec::with_capacity(items.len());
        match self.prepare(job, &mut items) {
            Ok(()) => {}
            Err(JobError::Replica(
                error @ (ReplicaError::Lost { .. } | ReplicaError::Fatal(_) | ReplicaError::Denied(..)),
            )) => {
                // A lane that cannot even be looked at without losing the session holds up nobody for ever.
                let lost = self.shared.count_loss(&job.lane, &Item::Compare);
                let outcome = || match lost {
                    true => Outcome::Failed { reason: error.to_string(), quarantine: true },
                    false => Outcome::Requeue,
                };
                out.extend(items.into_iter().map(|(item, at)| (item, at, outcome(), None)));
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
            self.passed = Passed::default();
            let result = self.item(job, &item, at);
            if matches!(result, Err(JobError::Replica(_))) && !self.shared.dry_run {
                // Part of it may have been done, unheard: what the replica has in this lane is asked before more is.
                self.shared.state.unset_primed(&job.lane.to_string());
            }
            match result {
                Ok(()) => out.push((item, at, Outcome::Done, name)),
                Err(JobError::Needs(lane)) => out.push((item, at, Outcome::Needs(lane), name)),
                Err(JobError::Replica(
                    error @ (ReplicaError::Lost { .. } | ReplicaError::Fatal(_) | ReplicaError::Denied(..)),
                )) => {
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
        // Not even additions: among what another list brings, what it lacks would soon be the smaller part.
        self.shared.vanish_fuse(&job.lane, &self.source)?;
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
        let mut out: Vec<Item> = entries_in(&self.source, lane, prefix)
            .into_iter()
            .map(|entry| Item::Mailbox(entry.uniqueid.clone()))
            .collect();
        let names = self.shared.names();
        out.extend(names.in_lane(lane).iter().filter_map(|name| names.id(name).cloned()).map(Item::Mailbox));
        drop(names);
        let mut roots = roots_in(&self.store().quota_roots()?, lane, prefix);
        roots.extend(roots_in(&self.shared.state.quota_roots(&starts(lane, prefix)), lane, prefix));
        out.extend(roots.into_iter().map(Item::Quota));
        match lane {
            Lane::User(_) => out.extend([UserPart::Subs, UserPart::Seen, UserPart::Sieve].map(Item::Meta)),
            Lane::Server => out.push(Item::ServerAnnotations),
            Lane::Shared(_) => {}
        }
        Ok(out)
    }

    /// Learns what the replica has in a lane. Mailboxes the source knows nothing of are strays: reported, never removed.
    pub(super) fn prime(&mut self, lane: &Lane) -> Result<(), JobError> {
        let prefix = self.store().deleted_prefix();
        let all = || -> BTreeSet<MboxName> {
            let names = entries_in(&self.source, lane, prefix).into_iter().map(|entry| entry.name.clone());
            let known = self.shared.names().in_lane(lane);
            let begun = self.shared.state.begun_names().into_iter().filter(|name| Lane::of(name, prefix) == *lane);
            names.chain(known).chain(begun).collect()
        };
        let view = match lane {
            Lane::User(user) => account::view_user(self.session, &self.caps, user, all)?,
            Lane::Shared(_) => {
                let mailboxes = self.session.view_mailboxes(&all().into_iter().collect::<Vec<_>>())?;
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
        let there: HashMap<MboxName, UniqueId> =
            view.mailboxes.iter().map(|view| (view.head.name.clone(), view.head.uniqueid.clone())).collect();
        for mailbox in view.mailboxes {
            let (id, name) = (mailbox.head.uniqueid.clone(), mailbox.head.name.clone());
            let ours =
                self.source.by_id(&id).is_some() || self.source.is_tombstone(&id) || self.shared.state.is_ours(&id);
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
                // 3.6 keeps a user's data under the uniqueid of his INBOX: what is there with another is lost with it.
                let inbox = self.source.by_name(&user.inbox()).map(|entry| &entry.uniqueid);
                match view.meta == UserMeta::default() || there.get(&user.inbox()) == inbox {
                    true => self.shared.state.put_user(user, &UserReceipt { meta: view.meta, fingerprint: None }),
                    false => self.shared.state.remove_user(user),
                }
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
    pub(super) fn put_view(&self, id: &UniqueId, view: MailboxView, old: Option<MailboxReceipt>) {
        self.shared.names().set(id, &view.head.name);
        let old = old.or_else(|| self.shared.state.mailbox(id));
        let (lift, source_highestmodseq) =
            old.map_or((None, ModSeq(0)), |receipt| (receipt.lift, receipt.source_highestmodseq));
        let receipt = MailboxReceipt { view, fingerprint: None, source_highestmodseq, lift };
        self.shared.state.put_mailbox(id, &receipt);
    }

    /// This mailbox is ours, whatever becomes of us: said before it is made, and before it is taken away.
    pub(super) fn begin(&self, id: &UniqueId, name: &MboxName) {
        if !self.shared.dry_run {
            let shared = name.account(self.store().deleted_prefix()).is_none();
            self.shared.state.begin_mailbox(id, shared.then_some(name));
        }
    }

    pub(super) fn forget(&self, id: &UniqueId) {
        self.shared.names().remove(id);
        self.shared.waits_no_more(id);
        self.shared.state.remove_mailbox(id);
    }

    fn item(&mut self, job: &mut Job, item: &Item, seen_at: Instant) -> Result<(), JobError> {
        match item {
            Item::Compare => Ok(()),
            Item::Mailbox(id) if self.gives_way(id) => Ok(()),
            Item::Mailbox(id) => {
                self.settle(job, id, &mut HashSet::new())?;
                let Some(entry) = self.source.by_id(id).cloned() else { return Ok(()) };
                let new = self.shared.names().name(id).is_none();
                if new {
                    self.begin(id, &entry.name);
                }
                let held = match self.content(job, &entry, seen_at) {
                    Err(error @ JobError::Held(_)) => Err(error),
                    other => {
                        other?;
                        Ok(())
                    }
                };
                if new {
                    self.look_above(&entry.name)?;
                }
                if let Some(user) = entry.name.owner().filter(|_| entry.name.is_inbox())
                    && !self.shared.dry_run
                    && self.shared.state.user(&user).is_none_or(|receipt| receipt.fingerprint.is_none())
                {
                    self.queue_meta(&user);
                }
                held
            }
            Item::Quota(root) => self.quota(root, seen_at),
            Item::Meta(part) => match &job.lane {
                Lane::User(user) => {
                    let user = user.clone();
                    self.inbox_first(job, &user, seen_at)?;
                    self.meta(&user, *part, seen_at)
                }
                _ => Ok(()),
            },
            Item::ServerAnnotations => self.server_annotations(seen_at),
        }
    }

    /// A name without a mailbox takes the place of no mailbox that only the replica has.
    fn gives_way(&self, id: &UniqueId) -> bool {
        let Some(entry) = self.source.by_id(id).filter(|entry| entry.mbtype.is_intermediate()) else { return false };
        self.shared.keep && self.shared.names().id(&entry.name).is_some()
    }

    /// From 3.6 on a user's data lies under the uniqueid of his INBOX: what is said before the INBOX is there is lost with
    /// its coming.
    fn inbox_first(&mut self, job: &mut Job, user: &UserId, seen_at: Instant) -> Result<(), JobError> {
        let Some(inbox) = self.source.by_name(&user.inbox()).cloned() else { return Ok(()) };
        let is_there = |this: &Self| this.shared.names().name(&inbox.uniqueid) == Some(&inbox.name);
        if self.shared.dry_run || inbox.mbtype.is_intermediate() || is_there(self) {
            return Ok(());
        }
        self.item(job, &Item::Mailbox(inbox.uniqueid.clone()), seen_at)?;
        match is_there(self) {
            true => Ok(()),
            false => Err(JobError::Again(format!("{} is not on the replica yet", inbox.name))),
        }
    }

    pub(super) fn apply(&mut self, step: &Step) -> Result<(), JobError> {
        self.apply_with(step, &NoBodies)
    }

    pub(super) fn apply_with(&mut self, step: &Step, bodies: &dyn BodySource) -> Result<(), JobError> {
        if self.shared.dry_run {
            (self.shared.events)(&Event::Planned(step));
            return Ok(());
        }
        self.passed.read_at.get_or_insert_with(Instant::now);
        self.session.apply(step, bodies)?;
        self.passed.sent_at = self.session.sent_at();
        (self.shared.events)(&Event::Applied(step));
        Ok(())
    }
}
