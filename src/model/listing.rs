//! The mailboxes a store has, at one moment.

use super::shared_map::SharedMap;
use super::{MailboxEntry, MboxName, UniqueId};
use std::fmt;
use std::sync::Arc;

/// The mailboxes with data on this server, and intermediates; no foreign ones. A copy costs next to nothing and shares
/// what it has in common with the others, so that a long list is not gone through for one change of it.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    by_name: SharedMap<MboxName, Arc<MailboxEntry>>,
    by_id: SharedMap<UniqueId, Arc<MailboxEntry>>,
    /// Uniqueids of which the store says that they were deleted (2.5 and later keep such tombstones), and how often it does.
    tombstones: SharedMap<UniqueId, usize>,
    /// Mailboxes of the list that cannot be replicated. Nothing is known of them, least of all that they are gone.
    pub unreadable: Arc<[LeftOut]>,
}

/// A mailbox that stands in the list and cannot be replicated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    pub name: MboxName,
    /// What is wrong, and what helps.
    pub reason: String,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

impl FromIterator<Arc<MailboxEntry>> for Listing {
    /// No two of them have the same name or uniqueid.
    fn from_iter<I: IntoIterator<Item = Arc<MailboxEntry>>>(entries: I) -> Self {
        let mut listing = Self::default();
        entries.into_iter().for_each(|entry| listing.insert(entry));
        listing
    }
}

impl Listing {
    /// Mailboxes that are listed.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// All of them, by name.
    pub fn entries(&self) -> impl Iterator<Item = &Arc<MailboxEntry>> {
        self.by_name.iter().map(|(_, entry)| entry)
    }

    /// A mailbox, if there is one of that name, and all below it, by name.
    pub fn below<'a>(&'a self, top: &'a MboxName) -> impl Iterator<Item = &'a Arc<MailboxEntry>> {
        let all = self.by_name.from(top).map(|(_, entry)| entry);
        let rest = |entry: &MailboxEntry| entry.name.as_bytes().get(top.as_bytes().len()).copied();
        all.take_while(|entry| entry.name.as_bytes().starts_with(top.as_bytes()))
            .filter(move |entry| rest(entry).is_none_or(|byte| byte == b'.'))
    }

    /// This one, if there is one of that name, and all that come after it by name.
    pub fn from(&self, name: &MboxName) -> impl Iterator<Item = &Arc<MailboxEntry>> {
        self.by_name.from(name).map(|(_, entry)| entry)
    }

    /// All whose names begin so, by name.
    pub fn beginning_with(&self, start: MboxName) -> impl Iterator<Item = &Arc<MailboxEntry>> {
        let all = self.by_name.from(&start).map(|(_, entry)| entry);
        all.take_while(move |entry| entry.name.as_bytes().starts_with(start.as_bytes()))
    }

    pub fn by_name(&self, name: &MboxName) -> Option<&Arc<MailboxEntry>> {
        self.by_name.get(name)
    }

    pub fn by_id(&self, id: &UniqueId) -> Option<&Arc<MailboxEntry>> {
        self.by_id.get(id)
    }

    /// The source says that this mailbox was deleted.
    pub fn is_tombstone(&self, id: &UniqueId) -> bool {
        self.tombstones.get(id).is_some() && self.by_id.get(id).is_none()
    }

    pub fn has_tombstones(&self) -> bool {
        !self.tombstones.is_empty()
    }

    /// What is different from an older listing, by uniqueid: what it was, what it is.
    pub fn since<'a>(
        &'a self,
        old: &'a Self,
    ) -> impl Iterator<Item = (Option<&'a Arc<MailboxEntry>>, Option<&'a Arc<MailboxEntry>>)> {
        self.by_id.since(&old.by_id).into_iter().map(|(_, old, new)| (old, new))
    }

    /// Another mailbox of this name or uniqueid was removed before.
    pub fn insert(&mut self, entry: Arc<MailboxEntry>) {
        self.by_id.insert(entry.uniqueid.clone(), entry.clone());
        self.by_name.insert(entry.name.clone(), entry);
    }

    pub fn remove(&mut self, name: &MboxName) -> Option<Arc<MailboxEntry>> {
        let entry = self.by_name.remove(name)?;
        self.by_id.remove(&entry.uniqueid);
        Some(entry)
    }

    /// One tombstone more of this uniqueid.
    pub fn bury(&mut self, id: UniqueId) {
        let count = self.tombstones.get(&id).copied().unwrap_or(0);
        self.tombstones.insert(id, count + 1);
    }

    /// One less.
    pub fn unbury(&mut self, id: &UniqueId) {
        match self.tombstones.get(id).copied() {
            Some(count) if count > 1 => drop(self.tombstones.insert(id.clone(), count - 1)),
            _ => drop(self.tombstones.remove(id)),
        }
    }
}
