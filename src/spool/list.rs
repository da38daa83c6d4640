//! The rows of mailboxes.db as mailboxes, kept up to date row by row.

use crate::model::{LeftOut, Listing, MailboxEntry, MboxName, UniqueId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Every name of the list. A uniqueid is the identity of one mailbox; copied folders of old stores share one: the first
/// by name has it, and the others wait.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) listing: Listing,
    waiting: BTreeMap<(UniqueId, MboxName), Arc<MailboxEntry>>,
    tombstones: BTreeMap<MboxName, UniqueId>,
}

impl Names {
    /// Not one row is about a mailbox.
    pub(super) fn is_empty(&self) -> bool {
        self.listing.is_empty() && self.tombstones.is_empty()
    }

    pub(super) fn get(&self, name: &MboxName) -> Option<&Arc<MailboxEntry>> {
        let waiting = || self.waiting.iter().find(|((_, other), _)| other == name).map(|(_, entry)| entry);
        self.listing.by_name(name).or_else(waiting)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<MailboxEntry>> {
        self.listing.entries().chain(self.waiting.values())
    }

    /// A mailbox and all below it.
    pub(super) fn below<'a>(&'a self, top: &'a MboxName) -> impl Iterator<Item = &'a Arc<MailboxEntry>> {
        let is_below = move |name: &MboxName| {
            let rest = name.as_bytes().strip_prefix(top.as_bytes());
            rest.is_some_and(|rest| rest.is_empty() || rest.first() == Some(&b'.'))
        };
        let waiting = self.waiting.values().filter(move |entry| is_below(&entry.name));
        self.listing.below(top).chain(waiting)
    }

    /// There is such a mailbox (now).
    pub(super) fn set(&mut self, entry: Arc<MailboxEntry>) {
        self.forget(&entry.name);
        let wait = |entry: &Arc<MailboxEntry>| ((entry.uniqueid.clone(), entry.name.clone()), entry.clone());
        match self.listing.by_id(&entry.uniqueid).cloned() {
            Some(first) if first.name < entry.name => self.waiting.extend([wait(&entry)]),
            Some(first) => {
                self.listing.remove(&first.name);
                self.waiting.extend([wait(&first)]);
                self.listing.insert(entry);
            }
            None => self.listing.insert(entry),
        }
    }

    /// There was a mailbox of this name.
    pub(super) fn bury(&mut self, name: MboxName, id: UniqueId) {
        self.forget(&name);
        self.listing.bury(id.clone());
        self.tombstones.insert(name, id);
    }

    /// Nothing is known of this name.
    pub(super) fn forget(&mut self, name: &MboxName) {
        if let Some(id) = self.tombstones.remove(name) {
            self.listing.unbury(&id);
        }
        if let Some(gone) = self.listing.remove(name) {
            let from = (gone.uniqueid.clone(), MboxName::default());
            let next = self.waiting.range(from..).next().map(|(key, _)| key.clone());
            if let Some(key) = next.filter(|(id, _)| *id == gone.uniqueid)
                && let Some(heir) = self.waiting.remove(&key)
            {
                self.listing.insert(heir);
            }
        } else if !self.waiting.is_empty() {
            self.waiting.retain(|(_, other), _| other != name);
        }
    }

    /// Those that have the uniqueid of another one.
    pub(super) fn clashes(&self) -> Vec<LeftOut> {
        let mut clashes: Vec<LeftOut> = self
            .waiting
            .values()
            .map(|entry| LeftOut {
                name: entry.name.clone(),
                reason: format!(
                    "has the same uniqueid {} as {}; run reconstruct (from 3.0 on: reconstruct -I) on both",
                    entry.uniqueid,
                    self.listing.by_id(&entry.uniqueid).map(|first| first.name.to_string()).unwrap_or_default()
                ),
            })
            .collect();
        clashes.sort_by(|a, b| a.name.cmp(&b.name));
        clashes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeSet, HashMap};

    fn entry(name: &str, id: &str) -> Arc<MailboxEntry> {
        Arc::new(MailboxEntry {
            name: name.into(),
            uniqueid: id.into(),
            mbtype: Default::default(),
            partition: "default".into(),
            acl: Vec::new(),
            uidvalidity: 1,
            createdmodseq: Default::default(),
            foldermodseq: Default::default(),
            by_name: true,
        })
    }

    /// What every name is, from which all the rest has to follow.
    #[derive(Clone, Debug)]
    enum Word {
        Mailbox(String),
        Tombstone(String),
        Nothing,
    }

    fn word() -> impl Strategy<Value = Word> {
        prop_oneof![
            3 => "[0-4]".prop_map(Word::Mailbox),
            1 => "[0-4]".prop_map(Word::Tombstone),
            1 => Just(Word::Nothing),
        ]
    }

    proptest! {
        #[test]
        fn row_by_row_is_the_same_as_all_at_once(rows in prop::collection::vec(("[a-d](\\.[ab])?", word()), 0..60)) {
            let mut names = Names::default();
            let mut model: BTreeMap<MboxName, Word> = BTreeMap::new();
            for (name, word) in rows {
                match &word {
                    Word::Mailbox(id) => names.set(entry(&name, id)),
                    Word::Tombstone(id) => names.bury(name.as_str().into(), id.as_str().into()),
                    Word::Nothing => names.forget(&name.as_str().into()),
                }
                model.insert(name.as_str().into(), word);
                let mut first: HashMap<&str, &MboxName> = HashMap::new();
                let (mut listed, mut clashing, mut dead) = (Vec::new(), Vec::new(), BTreeSet::new());
                for (name, word) in &model {
                    match word {
                        Word::Mailbox(id) if first.contains_key(id.as_str()) => clashing.push(name.clone()),
                        Word::Mailbox(id) => {
                            first.insert(id, name);
                            listed.push(name.clone());
                        }
                        Word::Tombstone(id) => drop(dead.insert(id.as_str())),
                        Word::Nothing => {}
                    }
                }
                let ours: Vec<MboxName> = names.listing.entries().map(|entry| entry.name.clone()).collect();
                prop_assert_eq!(&ours, &listed);
                prop_assert_eq!(names.clashes().into_iter().map(|left| left.name).collect::<Vec<_>>(), clashing);
                for id in ["0", "1", "2", "3", "4"] {
                    prop_assert_eq!(names.listing.by_id(&id.into()).map(|entry| &entry.name), first.get(id).copied());
                    let is_dead = dead.contains(id) && !first.contains_key(id);
                    prop_assert_eq!(names.listing.is_tombstone(&id.into()), is_dead);
                }
            }
        }
    }
}
