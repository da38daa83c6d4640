//! A mailbox's content: the ordinary comparison, large transfers in parts, and the record-by-record repair.

use super::diff::{self, MailboxDiff, Repair};
use super::push::{JobError, Pusher};
use super::queue::{Item, Job, Lane};
use super::{Event, lock, loss};
use crate::model::{
    BodyRef, BodySource, MailboxEntry, MailboxHead, MailboxSnapshot, MailboxUpdate, MailboxView, MboxName, ModSeq,
    ReplicaError, Step, Uid, UserPart,
};
use crate::state::{Lift, MailboxReceipt};
use std::collections::{BTreeSet, HashSet};
use std::time::Instant;

/// New records and bytes in one update; more goes in several, so that a cut costs at most this much.
const PART_RECORDS: usize = 1000;
const PART_BYTES: u64 = 32 << 20;
/// Below this, uploading costs less than asking which bodies the replica has.
const RESERVE_BYTES: u64 = 256 << 10;
const RESERVE_BODIES: usize = 32;

impl Pusher<'_> {
    /// Brings a mailbox in line; messages that cannot be sent are left out, and named at the end.
    pub(super) fn content(&mut self, job: &mut Job, entry: &MailboxEntry, seen_at: Instant) -> Result<(), JobError> {
        loop {
            match self.sendable_content(job, entry, seen_at) {
                Err(JobError::Replica(ReplicaError::Body { uid, error })) => {
                    if !self.hold(entry, uid, &error)? {
                        return Err(error.into());
                    }
                }
                Ok(()) => return self.tell_held(entry),
                other => return other,
            }
        }
    }

    fn sendable_content(&mut self, job: &mut Job, entry: &MailboxEntry, seen_at: Instant) -> Result<(), JobError> {
        if entry.mbtype.is_intermediate() {
            return self.intermediate(entry, seen_at);
        }
        if entry.mbtype.is_sieve() && !self.caps.sieve_mailboxes {
            // Its messages go as scripts.
            if let Some(user) = entry.name.owner() {
                self.shared.queue.push(Lane::User(user), Item::Meta(UserPart::Sieve), seen_at, true);
            }
            return Ok(());
        }
        let fingerprint = self.store().fingerprint(entry)?;
        let Some(mut raw) = self.store().mailbox(entry)? else {
            return Err(JobError::Again(format!(
                "{} is in the list, but its files are not on partition {}: gone, not there yet, or not mounted",
                entry.name, entry.partition
            )));
        };
        self.passed.read_at = Some(Instant::now());
        raw.head.name = entry.name.clone();
        self.shared.loses(&entry.name, loss::of_mailbox(&raw, &self.caps))?;
        diff::reduce(&mut raw, &self.caps);
        self.leave_held_out(entry, &mut raw)?;
        let receipt = self.shared.state.mailbox(&entry.uniqueid);
        let rolled_back = receipt.as_ref().is_some_and(|receipt| receipt.source_highestmodseq > raw.head.highestmodseq);
        let lift = receipt.as_ref().and_then(|receipt| receipt.lift.clone());
        let mut base = base_modseq(receipt.as_ref());
        let mut view = receipt.map(|receipt| receipt.view);
        let done = Receipt { entry, fingerprint, source_highestmodseq: raw.head.highestmodseq, seen_at };
        let mut other_root = false;
        if let Some(view) = view.as_mut().filter(|view| view.head.quotaroot != raw.head.quotaroot) {
            // `quota -f`, or a root that came or went: csync has no word for it, and mostly the replica has followed by itself.
            let there = self.session.view_mailboxes(std::slice::from_ref(&entry.name))?.pop();
            if let Some(there) = there.filter(|there| there.head.uniqueid == entry.uniqueid) {
                self.quota_root_again(entry, there.head.quotaroot.as_ref())?;
                other_root = there.head.quotaroot != raw.head.quotaroot;
            }
            view.head.quotaroot = raw.head.quotaroot.clone();
        }
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
                    if other_root {
                        // An archive keeps the root as it was told it.
                        let update = diff::head_update(&lifted, &self.caps);
                        return self.send(&lifted, view, update, &done, lift);
                    }
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
                        if fresh.as_ref().map(|fresh| &fresh.view) != view.as_ref() {
                            self.shared.was_meddled_with(&job.lane, &entry.name);
                        }
                        base = base_modseq(fresh.as_ref());
                        (view, trust) = (fresh.map(|fresh| fresh.view), false);
                    }
                    Err(JobError::Replica(ReplicaError::Moved(why))) => {
                        // Somebody else's account has it still, and what we knew of that is lost. Seldom and slow.
                        if let Some(found) = self.find(&entry.uniqueid, self.store().users()?.into_iter().collect())? {
                            self.put_view(&entry.uniqueid, found, None);
                        }
                        return Err(ReplicaError::Moved(why).into());
                    }
                    other => return other,
                },
            }
        }
    }

    /// What the replica has under this name right now, with all that follows when that is not what we thought.
    pub(super) fn fresh_view(
        &mut self,
        job: &mut Job,
        entry: &MailboxEntry,
    ) -> Result<Option<MailboxReceipt>, JobError> {
        self.look_again(std::slice::from_ref(&entry.name), &entry.uniqueid)?;
        if self.shared.names().name(&entry.uniqueid).is_none() {
            // Perhaps it has it under another name: only a look at the whole lane can tell.
            self.prime(&job.lane.clone())?;
        }
        self.settle(job, &entry.uniqueid, &mut HashSet::new())?;
        Ok(self.shared.state.mailbox(&entry.uniqueid))
    }

    /// Sends an update, in parts where it is large.
    pub(super) fn send(
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

    pub(super) fn confirmed(&self, item: &Item, mailbox: Option<&MboxName>, seen_at: Instant) {
        let now = Instant::now();
        lock(&self.shared.lags).confirmed(seen_at, self.passed, now);
        let lag = now.saturating_duration_since(seen_at);
        (self.shared.events)(&Event::Confirmed { item: item.clone(), mailbox: mailbox.cloned(), lag });
    }

    /// Adds the bodies an update needs, and where the replica might find them without an upload.
    pub(super) fn attach(&self, update: &mut MailboxUpdate, view: Option<&MailboxView>, source: &dyn BodySource) {
        let after = view.map_or(Uid(0), |view| view.head.last_uid);
        let mut bodies: Vec<BodyRef> = diff::wanted_bodies(&update.records, after).collect();
        let expunged: HashSet<Uid> =
            update.records.iter().filter(|record| record.is_expunged()).map(|record| record.uid).collect();
        let id = &update.head.uniqueid;
        bodies.retain(|body| !expunged.contains(&body.uid) || source.exists(body.uid) && !self.is_held(id, body.uid));
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

    pub(super) fn put_receipt(&self, done: &Receipt, view: MailboxView, lift: Option<Lift>) {
        if self.shared.dry_run {
            return;
        }
        self.shared.names().set(&done.entry.uniqueid, &view.head.name);
        let receipt = MailboxReceipt {
            view,
            // What is held back is looked for again by the next scan.
            fingerprint: done.fingerprint.clone().filter(|_| !self.shared.is_holding(&done.entry.uniqueid)),
            source_highestmodseq: done.source_highestmodseq,
            lift,
        };
        self.shared.state.put_mailbox(&done.entry.uniqueid, &receipt);
    }

    pub(super) fn intermediate(&mut self, entry: &MailboxEntry, seen_at: Instant) -> Result<(), JobError> {
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

    pub(super) fn repair(
        &mut self,
        job: &mut Job,
        raw: &MailboxSnapshot,
        done: &Receipt,
        reason: &str,
    ) -> Result<(), JobError> {
        let (entry, name) = (done.entry, &done.entry.name);
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
        let mut raw = raw.clone();
        let there: HashSet<Uid> = full.records.iter().flatten().map(|record| record.uid).collect();
        let below = |uid: &Uid| *uid <= full.head.last_uid && !there.contains(uid);
        let uids = raw.records.iter().map(|record| record.uid).filter(below).collect();
        self.hold_unsendable(entry, &mut raw, &uids, true)?;
        let mut repair = diff::repair(&raw, &full, &self.caps);
        if matches!(repair, Repair::Rebuild { .. }) {
            // What the source has lost, and the replica still has, is kept there with what only it has.
            let uids = raw.records.iter().map(|record| record.uid).collect();
            if self.hold_unsendable(entry, &mut raw, &uids, false)? {
                repair = diff::repair(&raw, &full, &self.caps);
            }
        }
        let raw = &raw;
        if self.shared.keep
            && let Repair::Lift { expunge, .. } = &repair
            && !expunge.is_empty()
        {
            // Whether these were deleted here, or are of the other side alone, nobody can tell any more.
            let reason = format!("it has {} messages of which nothing is known here", expunge.len());
            let only_there = diff::only_there(raw, full.records.as_deref().unwrap_or_default());
            repair = Repair::Rebuild { reason, only_there };
        }
        match repair {
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
pub(super) struct Receipt<'a> {
    pub(super) entry: &'a MailboxEntry,
    fingerprint: Option<crate::model::Fingerprint>,
    source_highestmodseq: ModSeq,
    seen_at: Instant,
}
