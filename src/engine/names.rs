//! Which mailbox the replica has under which name, as far as receipts and views tell; and the source's listing with
//! the look-ups that a job needs. Identity is the uniqueid, never the name.

use super::queue::Lane;
use crate::model::{Listing, MailboxEntry, MboxName, Uid, UniqueId};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// Names on one replica.
#[derive(Debug, Default)]
pub struct ReplicaNames {
    by_id: HashMap<UniqueId, MboxName>,
    by_name: HashMap<MboxName, UniqueId>,
    by_lane: HashMap<Lane, BTreeSet<MboxName>>,
    /// Mailboxes there that never came from this source, with their last UID.
    strays: HashMap<UniqueId, Uid>,
    deleted_prefix: Vec<u8>,
}

impl ReplicaNames {
    pub fn new(deleted_prefix: &[u8]) -> Self {
        Self { deleted_prefix: deleted_prefix.to_vec(), ..Self::default() }
    }

    /// The replica has this mailbox under this name (now).
    pub fn set(&mut self, id: &UniqueId, name: &MboxName) {
        if let Some(old) = self.by_id.insert(id.clone(), name.clone())
            && old != *name
        {
            self.forget_name(&old, id);
        }
        self.by_name.insert(name.clone(), id.clone());
        let lane = Lane::of(name, &self.deleted_prefix);
        self.by_lane.entry(lane).or_default().insert(name.clone());
        self.strays.remove(id);
    }

    /// The replica has this mailbox, but it is none of ours.
    pub fn set_stray(&mut self, id: &UniqueId, name: &MboxName, last_uid: Uid) {
        self.set(id, name);
        self.strays.insert(id.clone(), last_uid);
    }

    /// The replica has this mailbox no more.
    pub fn remove(&mut self, id: &UniqueId) {
        self.strays.remove(id);
        if let Some(name) = self.by_id.remove(id) {
            self.forget_name(&name, id);
        }
    }

    fn forget_name(&mut self, name: &MboxName, id: &UniqueId) {
        if self.by_name.get(name) == Some(id) {
            self.by_name.remove(name);
        }
        let lane = Lane::of(name, &self.deleted_prefix);
        if let Some(names) = self.by_lane.get_mut(&lane) {
            names.remove(name);
            if names.is_empty() {
                self.by_lane.remove(&lane);
            }
        }
    }

    pub fn name(&self, id: &UniqueId) -> Option<&MboxName> {
        self.by_id.get(id)
    }

    pub fn id(&self, name: &MboxName) -> Option<&UniqueId> {
        self.by_name.get(name)
    }

    /// Last UID of a mailbox that is none of ours.
    pub fn stray(&self, id: &UniqueId) -> Option<Uid> {
        self.strays.get(id).copied()
    }

    /// The mailboxes that came from this source.
    pub fn ours(&self) -> impl Iterator<Item = &UniqueId> {
        self.by_id.keys().filter(|id| !self.strays.contains_key(*id))
    }

    /// Every lane that has a name.
    pub fn lanes(&self) -> impl Iterator<Item = Lane> {
        self.by_lane.keys().cloned()
    }

    /// Names in a lane, sorted.
    pub fn in_lane(&self, lane: &Lane) -> Vec<MboxName> {
        self.by_lane.get(lane).into_iter().flatten().cloned().collect()
    }

    pub fn len(&self) -> usize {
        self.by_id.len()
    }
}

/// The source's listing with its look-ups.
#[derive(Debug, Default)]
pub struct Source {
    pub listing: Arc<Listing>,
    by_id: HashMap<UniqueId, usize>,
    tombstones: HashSet<UniqueId>,
}

impl Source {
    pub fn new(listing: Arc<Listing>) -> Self {
        let by_id = listing.entries.iter().enumerate().map(|(at, entry)| (entry.uniqueid.clone(), at)).collect();
        let tombstones = listing.tombstones.iter().cloned().collect();
        Self { listing, by_id, tombstones }
    }

    pub fn by_id(&self, id: &UniqueId) -> Option<&Arc<MailboxEntry>> {
        self.listing.entries.get(*self.by_id.get(id)?)
    }

    pub fn by_name(&self, name: &MboxName) -> Option<&Arc<MailboxEntry>> {
        let at = self.listing.entries.binary_search_by(|entry| entry.name.cmp(name)).ok()?;
        self.listing.entries.get(at)
    }

    /// The source says that this mailbox was deleted.
    pub fn is_tombstone(&self, id: &UniqueId) -> bool {
        self.tombstones.contains(id) && !self.by_id.contains_key(id)
    }

    /// Entries of a lane, parents first.
    pub fn in_lane<'a>(&'a self, lane: &'a Lane, prefix: &'a [u8]) -> impl Iterator<Item = &'a Arc<MailboxEntry>> {
        self.listing.entries.iter().filter(move |entry| Lane::of(&entry.name, prefix) == *lane)
    }
}
