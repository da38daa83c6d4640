//! Names before contents: renames, removals, and names that have to be freed first. Identity is the uniqueid.

use super::loss;
use super::push::{JobError, Pusher};
use super::queue::{Item, Job, Lane};
use crate::model::{
    MailboxEntry, MailboxView, MboxName, ModSeq, Partition, QuotaRoot, ReplicaError, Step, Uid, UniqueId, UserId,
    UserPart,
};
use std::collections::{BTreeSet, HashSet};
use std::time::Instant;

impl Pusher<'_> {
    /// Brings the name of a mailbox in line: renames it, removes it, or frees the name it is going to have.
    pub(super) fn settle(
        &mut self,
        job: &mut Job,
        id: &UniqueId,
        path: &mut HashSet<UniqueId>,
    ) -> Result<(), JobError> {
        let target = self.source.by_id(id).cloned();
        let have = self.shared.names().name(id).cloned();
        let ours = self.shared.state.mailbox(id).is_some();
        match (target, have) {
            (Some(entry), Some(name)) => {
                self.shared.waits_no_more(id);
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
            (None, Some(name)) if ours && !self.shared.keep => {
                self.own(job, &name)?;
                self.remove(id, &name)
            }
            (None, _) => Ok(()),
        }
    }

    /// A name may only be touched by whoever owns its lane.
    pub(super) fn own(&self, job: &mut Job, name: &MboxName) -> Result<(), JobError> {
        let lane = Lane::of(name, self.store().deleted_prefix());
        if !self.shared.queue.try_extra(job, &lane) {
            return Err(JobError::Needs(lane));
        }
        if !job.slots.iter().any(|(written, _)| *written == lane) {
            job.slots.extend(self.shared.at_work(&lane).map(|slot| (lane, slot)));
        }
        Ok(())
    }

    /// Makes sure that no other mailbox has this name on the replica.
    pub(super) fn free(
        &mut self,
        job: &mut Job,
        name: &MboxName,
        for_id: &UniqueId,
        path: &mut HashSet<UniqueId>,
    ) -> Result<(), JobError> {
        let Some(occupant) = self.shared.names().id(name).filter(|id| *id != for_id).cloned() else { return Ok(()) };
        let in_exchange = path.contains(&occupant);
        let goes_later = self.source.by_id(&occupant).is_none()
            && self.shared.state.mailbox(&occupant).is_some()
            && self.shared.has_to_wait(&occupant, name);
        if in_exchange || goes_later {
            // Names were swapped, or the one that had it is to stay for a while: it waits under a third name.
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
        if self.shared.keep {
            return self.put_aside(&occupant, name);
        }
        Err(JobError::Conflict(format!(
            "name {name} is taken on the replica by a mailbox with uniqueid {occupant}, which the source does not have; \
             it holds mail and is kept: rename or delete it there, then spooltap goes on by itself"
        )))
    }

    /// A mailbox that only the replica has makes room for one of its name.
    fn put_aside(&mut self, occupant: &UniqueId, name: &MboxName) -> Result<(), JobError> {
        let there = self.session.view_mailboxes(std::slice::from_ref(name))?.pop();
        let Some(head) = there.map(|view| view.head).filter(|head| head.uniqueid == *occupant) else {
            return self.look_again(std::slice::from_ref(name), occupant);
        };
        let aside = super::merge::aside_name(name, blake3::hash(occupant.as_bytes()).to_hex().as_str());
        self.rename_on_replica(occupant, name, &aside, &head.partition, head.uidvalidity)
    }

    pub(super) fn rename(&mut self, entry: &MailboxEntry, from: &MboxName) -> Result<(), JobError> {
        let uidvalidity = match self.store().mailbox(entry) {
            Ok(Some(snapshot)) => snapshot.head.uidvalidity,
            _ => entry.uidvalidity,
        };
        self.rename_on_replica(&entry.uniqueid, from, &entry.name, &entry.partition, uidvalidity)
    }

    pub(super) fn rename_on_replica(
        &mut self,
        id: &UniqueId,
        from: &MboxName,
        to: &MboxName,
        partition: &Partition,
        uidvalidity: u32,
    ) -> Result<(), JobError> {
        if !self.shared.dry_run {
            self.before_rename(id, from, to)?;
        }
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
        if from != to {
            self.shared.names().set(id, to);
            self.clear_above(from)?;
        }
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
            Some(view) if view.head.uniqueid == *id => {
                let there = view.head.quotaroot.clone();
                self.put_view(id, view, Some(old));
                if let Some(entry) = self.source.by_id(id).cloned() {
                    self.quota_root_again(&entry, there.as_ref())?;
                }
            }
            _ => self.forget(id),
        }
        Ok(())
    }

    /// A real server moves neither quota roots nor scripts with a mailbox it renames.
    ///
    /// A mailbox that leaves the names below its quota root would keep pointing at it: the root is taken off while it can
    /// still be found by name, and set again by its own item. Scripts of an INBOX lie in a mailbox below it that stays
    /// behind: they are removed under the old name and put again under the new one.
    fn before_rename(&mut self, id: &UniqueId, from: &MboxName, to: &MboxName) -> Result<(), JobError> {
        let views = self.session.view_mailboxes(std::slice::from_ref(from))?;
        let root = views.into_iter().find(|view| view.head.uniqueid == *id).and_then(|view| view.head.quotaroot);
        // 3.6 itself leaves a renamed mailbox at its old root; then so does the replica.
        let stays = self.source.by_id(id).is_some_and(|entry| match self.store().mailbox(entry) {
            Ok(Some(snapshot)) => snapshot.head.quotaroot == root,
            _ => false,
        });
        if let Some(root) = root.filter(|root| !stays && is_below(from, root) && !is_below(to, root)) {
            self.unquota(&root)?;
            self.queue_quota(root);
        }
        let user = from.owner().filter(|_| from.is_inbox());
        let scripts_apart = !(self.store().sieve_in_mailboxes() && self.caps.sieve_mailboxes);
        if let Some(user) = user.filter(|_| scripts_apart && !self.shared.keep) {
            let meta = self.session.view_user(&user)?.meta;
            if meta.active.is_some() {
                self.apply(&Step::SieveDeactivate { user: user.clone() })?;
            }
            for name in meta.sieve.into_keys() {
                self.apply(&Step::SieveRemove { user: user.clone(), name })?;
            }
        }
        Ok(())
    }

    /// The mailbox has another quota root there than at the source: only a root that is made anew looks for its mailboxes.
    ///
    /// And it passes over those whose root has a name below its own, even when that root is gone (3.6.1 leaves such a root
    /// at a renamed mailbox until `quota -f`). They are first taken off it by a root of their own, made and removed again.
    pub(super) fn quota_root_again(&mut self, entry: &MailboxEntry, there: Option<&QuotaRoot>) -> Result<(), JobError> {
        let here = match self.store().mailbox(entry) {
            Ok(Some(snapshot)) => snapshot.head.quotaroot,
            _ => return Ok(()),
        };
        let Some(root) = here.filter(|root| there != Some(root)) else { return Ok(()) };
        let Some(limits) = self.store().quota(&root)? else { return Ok(()) };
        let limits = loss::reduced(&limits, &self.caps);
        let own = QuotaRoot::new(entry.name.as_bytes());
        let passed_over = there.is_some_and(|there| is_below(&MboxName::new(there.as_bytes()), &root));
        if passed_over && own != root && self.store().quota(&own)?.is_none() {
            self.apply(&Step::Quota { root: own.clone(), limits: limits.clone() })?;
            self.unquota(&own)?;
        }
        self.unquota(&root)?;
        self.apply(&Step::Quota { root: root.clone(), limits: limits.clone() })?;
        if !self.shared.dry_run {
            self.shared.state.put_quota(&root, &limits);
        }
        Ok(())
    }

    /// Takes a root off the replica, which may not have it.
    pub(super) fn unquota(&mut self, root: &QuotaRoot) -> Result<(), JobError> {
        match self.apply(&Step::Unquota { root: root.clone() }) {
            Ok(()) | Err(JobError::Replica(ReplicaError::NoSuchMailbox(_))) => {}
            Err(error) => return Err(error),
        }
        if !self.shared.dry_run {
            self.shared.state.remove_quota(root);
        }
        Ok(())
    }

    fn queue_quota(&self, root: QuotaRoot) {
        let lane = super::route::quota_lane(&root, self.store().deleted_prefix());
        self.shared.push(lane, Item::Quota(root), Instant::now(), true);
    }

    /// The replica's idea of these names was not ours: take its word.
    pub(super) fn look_again(&mut self, names: &[MboxName], id: &UniqueId) -> Result<(), JobError> {
        let mut views = self.session.view_mailboxes(names)?;
        if !views.iter().any(|view| view.head.uniqueid == *id) {
            // Renamed there by us, before we died and lost the receipt: another name of the same account has it.
            let owners = names.iter().filter_map(|name| self.account_of(name)).collect();
            views.extend(self.find(id, owners)?);
        }
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
            if other == *id || self.source.by_id(&other).is_some() || self.shared.state.is_ours(&other) {
                self.put_view(&other, view, None);
            } else {
                self.shared.names().set_stray(&other, &view.head.name, view.head.last_uid);
            }
        }
        Ok(())
    }

    /// The replica's mailbox of this uniqueid; where it cannot be asked so, among those of these users.
    pub(super) fn find(&mut self, id: &UniqueId, users: BTreeSet<UserId>) -> Result<Option<MailboxView>, JobError> {
        if let Some(found) = self.session.view_uniqueid(id)? {
            return Ok(Some(found));
        }
        for user in users {
            let mailboxes = self.session.view_user(&user)?.mailboxes;
            if let Some(found) = mailboxes.into_iter().find(|view| view.head.uniqueid == *id) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn account_of(&self, name: &MboxName) -> Option<UserId> {
        name.account(self.store().deleted_prefix())
    }

    /// User data and quota roots hang on INBOX and names: what the replica has of them is not known any more.
    pub(super) fn names_changed(&self, from: &MboxName, to: &MboxName) {
        for name in [from, to] {
            self.shared.state.remove_quota(&QuotaRoot::new(name.as_bytes()));
            let Some(user) = name.owner().filter(|_| name.is_inbox()) else { continue };
            self.shared.state.remove_user(&user);
            if self.source.by_name(name).is_some() {
                for part in [UserPart::Subs, UserPart::Seen, UserPart::Sieve] {
                    self.shared.push(Lane::User(user.clone()), Item::Meta(part), Instant::now(), true);
                }
            }
        }
        for name in [from, to] {
            self.queue_quota(QuotaRoot::new(name.as_bytes()));
        }
    }

    /// Removes a mailbox that the source once had and has no more. Seen twice, and only within the fuse.
    pub(super) fn remove(&mut self, id: &UniqueId, name: &MboxName) -> Result<(), JobError> {
        let again = self.shared.source_again()?;
        if again.by_id(id).is_some() {
            return Err(JobError::Again(format!("{name} is back in the source's mailbox list")));
        }
        // A row that cannot be read may be this mailbox's, under whatever name.
        if let Some(row) = again.unreadable.first() {
            return Err(JobError::Conflict(format!(
                "{name} is not removed from the replica while the source's list has a row that cannot be read: {row}"
            )));
        }
        self.shared.vanish_fuse(name, &again)?;
        if self.shared.has_to_wait(id, name) {
            return Ok(());
        }
        self.shared.fuse(name)?;
        self.begin(id, name);
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
            self.clear_above(name)?;
        }
        Ok(())
    }
}

/// True for the name of a quota root and everything below it.
fn is_below(name: &MboxName, root: &QuotaRoot) -> bool {
    let rest = name.as_bytes().strip_prefix(root.as_bytes());
    rest.is_some_and(|rest| rest.is_empty() || rest.first() == Some(&b'.') || root.as_bytes().ends_with(b"!"))
}
