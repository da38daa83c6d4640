//! Which mailbox the replica has under which name, as far as receipts and views tell; and the source's listing with
//! the look-ups that a job needs. Identity is the uniqueid, never the name.

use super::queue::Lane;
use crate::model::{Listing, MailboxEntry, MboxName, QuotaRoot, Uid, UniqueId, UserId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Names on one replica.
#[derive(Debug, Default)]
pub struct ReplicaNames {
    by_id: HashMap<UniqueId, MboxName>,
    by_name: HashMap<MboxName, UniqueId>,
    by_lane: HashMap<Lane, BTreeSet<MboxName>>,
    /// Mailboxes there that never came from this source, with their last UID.
    strays: HashMap<UniqueId, Uid>,
    added: usize,
    deleted_prefix: Vec<u8>,
}

impl ReplicaNames {
    pub fn new(deleted_prefix: &[u8]) -> Self {
        Self { deleted_prefix: deleted_prefix.to_vec(), ..Self::default() }
    }

    /// The replica has this mailbox under this name (now).
    pub fn set(&mut self, id: &UniqueId, name: &MboxName) {
        match self.by_id.insert(id.clone(), name.clone()) {
            Some(old) if old != *name => self.forget_name(&old, id),
            Some(_) => {}
            None => self.added += 1,
        }
        self.by_name.insert(name.clone(), id.clone());
        let lane = Lane::of(name, &self.deleted_prefix);
        self.by_lane.entry(lane).or_default().insert(name.clone());
        self.added += usize::from(self.strays.remove(id).is_some());
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

    /// How many they are.
    pub fn ours_len(&self) -> usize {
        self.by_id.len() - self.strays.len()
    }

    /// How often one came to them, ever.
    pub fn added(&self) -> usize {
        self.added
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

/// The entries of a lane, by name, and so parents first.
pub fn entries_in<'a>(listing: &'a Listing, lane: &Lane, prefix: &[u8]) -> Vec<&'a Arc<MailboxEntry>> {
    let found = starts(lane, prefix).into_iter().flat_map(|start| listing.beginning_with(start));
    let mine: BTreeMap<&MboxName, &Arc<MailboxEntry>> =
        found.filter(|entry| Lane::of(&entry.name, prefix) == *lane).map(|entry| (&entry.name, entry)).collect();
    mine.into_values().collect()
}

/// The quota roots of a lane, of such a sorted list.
pub fn roots_in(roots: &[QuotaRoot], lane: &Lane, prefix: &[u8]) -> BTreeSet<QuotaRoot> {
    let is_mine = |root: &&QuotaRoot| super::quota_lane(root, prefix) == *lane;
    if *lane == Lane::Server {
        return roots.iter().filter(is_mine).cloned().collect();
    }
    let begin = |start: MboxName| {
        let at = roots.partition_point(|root| root.as_bytes() < start.as_bytes());
        let rest = roots.get(at..).unwrap_or_default().iter();
        rest.take_while(move |root| root.as_bytes().starts_with(start.as_bytes()))
    };
    starts(lane, prefix).into_iter().flat_map(begin).filter(is_mine).cloned().collect()
}

/// How names of a lane can begin; others begin so as well. Nothing of the server's lane has a name of this kind.
pub fn starts(lane: &Lane, prefix: &[u8]) -> BTreeSet<MboxName> {
    let tops: Vec<MboxName> = match lane {
        Lane::User(user) => inboxes(user),
        Lane::Shared(top) => vec![top.clone()],
        Lane::Server => Vec::new(),
    };
    tops.iter().flat_map(|top| [top.clone(), top.with_deleted(prefix)]).collect()
}

/// Every name an INBOX of this user can have: `jane@example.com` may be a user of a domain, and one without.
fn inboxes(user: &UserId) -> Vec<MboxName> {
    let whole = user.as_bytes();
    let inbox = |local: &[u8], domain: Option<&[u8]>| -> MboxName {
        let local = local.iter().map(|&byte| if byte == b'.' { b'^' } else { byte });
        let domain = domain.map(|domain| [domain, b"!"].concat()).unwrap_or_default();
        domain.into_iter().chain(*b"user.").chain(local).collect::<Vec<u8>>().into()
    };
    let ats = whole.iter().enumerate().filter(|(_, byte)| **byte == b'@').map(|(at, _)| at);
    let with_domain = ats.filter_map(|at| Some(inbox(whole.get(..at)?, Some(whole.get(at + 1..)?))));
    with_domain.chain([inbox(whole, None)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_found_as_if_every_name_was_looked_at() {
        let names = [
            "user",
            "user.a",
            "user.a.b",
            "user.ab",
            "user.a^b",
            "user.a^b.c",
            "user.a@d",
            "user.a@d.x",
            "d!user.a",
            "d!user.a.x",
            "d!user.a@d",
            "d!DELETED.user.a.x.6B050AE9",
            "DELETED.user.a.6B050AE9",
            "DELETED.user.a.b.6B050AE9",
            "DELETED.shared.news.6B050AE9",
            "DELETED.odd",
            "DELETED",
            "shared",
            "shared.news",
            "sharedtoo",
            "d!shared.news",
            "d!DELETED.shared.news.6B050AE9",
        ];
        let listing: Listing = names
            .into_iter()
            .map(|name| {
                let entry =
                    crate::model::MailboxHead { name: name.into(), uniqueid: name.into(), ..Default::default() };
                Arc::new(super::super::fake::entry(&entry))
            })
            .collect();
        let mut lanes: BTreeSet<Lane> = listing.entries().map(|entry| Lane::of(&entry.name, b"DELETED")).collect();
        assert!(lanes.len() > 8, "{lanes:?}");
        lanes.insert(Lane::Server);
        for lane in &lanes {
            let all = listing.entries().filter(|entry| Lane::of(&entry.name, b"DELETED") == *lane);
            assert!(entries_in(&listing, lane, b"DELETED").into_iter().eq(all), "{lane}");
            let roots: Vec<QuotaRoot> =
                names.into_iter().chain(["d!"]).collect::<BTreeSet<_>>().into_iter().map(QuotaRoot::from).collect();
            let all: BTreeSet<QuotaRoot> =
                roots.iter().filter(|root| super::super::quota_lane(root, b"DELETED") == *lane).cloned().collect();
            assert_eq!(roots_in(&roots, lane, b"DELETED"), all, "{lane}");
        }
    }
}
