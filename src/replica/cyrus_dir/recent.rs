//! Mailboxes as they were last read or written. While the directory is held nobody else writes to it, so the next request
//! for one of them has nothing to read and nothing to sum up.
//!
//! Whoever changes a mailbox has its turn (`Store::stripe`) and takes it out first. Whoever only reads has no turn: what he
//! read is kept only if nothing at all was written meanwhile.

use super::held::Held;
use crate::model::{MailboxEntry, UniqueId};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Records of all mailboxes that are kept, some 350 bytes each; a mailbox counts as some more.
const MOST: usize = 50_000;
const EACH: usize = 200;

#[derive(Default)]
pub(super) struct Recent(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    /// Goes up with everything that is written.
    turn: u64,
    weight: usize,
    /// The one used last comes last.
    mailboxes: VecDeque<(MailboxEntry, Arc<Held>)>,
}

/// A mailbox that is being changed. What was known of it is forgotten when this ends, unless it is told anew.
pub(super) struct Changing<'a> {
    recent: &'a Recent,
    /// Until it is told.
    id: Option<UniqueId>,
}

impl Recent {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A mailbox of which the list says this; where it is not known, what `read` wants to hear.
    pub fn get(&self, entry: &MailboxEntry) -> Result<Arc<Held>, u64> {
        let mut kept = self.kept();
        match kept.mailboxes.iter().position(|(known, _)| known == entry) {
            Some(at) => {
                let found = kept.mailboxes.remove(at).ok_or(kept.turn)?;
                let held = found.1.clone();
                kept.mailboxes.push_back(found);
                Ok(held)
            }
            None => Err(kept.turn),
        }
    }

    /// Keeps what was read since `get` gave this turn.
    pub fn read(&self, turn: u64, entry: &MailboxEntry, held: &Arc<Held>) {
        let mut kept = self.kept();
        if kept.turn == turn {
            kept.put(entry, held.clone());
        }
    }

    /// Takes a mailbox out before it is changed.
    pub fn change(&self, id: &UniqueId) -> (Changing<'_>, Option<(MailboxEntry, Held)>) {
        let found = self.kept().forget(id);
        let held = found.map(|(entry, held)| (entry, Arc::try_unwrap(held).unwrap_or_else(|held| Held::clone(&held))));
        (Changing { recent: self, id: Some(id.clone()) }, held)
    }
}

impl Changing<'_> {
    /// It is like this now.
    pub fn done(mut self, entry: &MailboxEntry, held: Held) {
        let mut kept = self.recent.kept();
        if let Some(id) = self.id.take() {
            kept.forget(&id);
            kept.put(entry, Arc::new(held));
        }
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.recent.kept().forget(&id);
        }
    }
}

impl Kept {
    fn forget(&mut self, id: &UniqueId) -> Option<(MailboxEntry, Arc<Held>)> {
        self.turn = self.turn.wrapping_add(1);
        let at = self.mailboxes.iter().position(|(entry, _)| entry.uniqueid == *id)?;
        let found = self.mailboxes.remove(at)?;
        self.weight = self.weight.saturating_sub(weight(&found.1));
        Some(found)
    }

    fn put(&mut self, entry: &MailboxEntry, held: Arc<Held>) {
        let new = weight(&held);
        if new > MOST {
            return;
        }
        if let Some(at) = self.mailboxes.iter().position(|(known, _)| known.uniqueid == entry.uniqueid)
            && let Some((_, old)) = self.mailboxes.remove(at)
        {
            self.weight = self.weight.saturating_sub(weight(&old));
        }
        while self.weight.saturating_add(new) > MOST
            && let Some((_, old)) = self.mailboxes.pop_front()
        {
            self.weight = self.weight.saturating_sub(weight(&old));
        }
        self.weight = self.weight.saturating_add(new);
        self.mailboxes.push_back((entry.clone(), held));
    }
}

fn weight(held: &Held) -> usize {
    held.mailbox.records.len().saturating_add(EACH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Record, Uid};
    use std::path::Path;

    fn entry(id: &str) -> MailboxEntry {
        MailboxEntry {
            name: id.into(),
            uniqueid: id.into(),
            mbtype: Default::default(),
            partition: "default".into(),
            acl: Vec::new(),
            uidvalidity: 1,
            createdmodseq: Default::default(),
            foldermodseq: Default::default(),
            by_name: false,
        }
    }

    fn held(records: usize) -> Held {
        let mut held = Held::new(Path::new("/nowhere"), 0, false);
        held.mailbox.records = (0..records).map(|n| Record { uid: Uid(n as u32 + 1), ..Record::default() }).collect();
        held
    }

    fn known(recent: &Recent, id: &str) -> Option<usize> {
        recent.get(&entry(id)).ok().map(|held| held.mailbox.records.len())
    }

    #[test]
    fn what_was_read_while_somebody_wrote_is_not_kept() {
        let recent = Recent::default();
        let turn = recent.get(&entry("a")).expect_err("is not known");
        recent.read(turn, &entry("a"), &Arc::new(held(1)));
        assert_eq!(known(&recent, "a"), Some(1));
        // Known under another name it is another answer.
        assert!(recent.get(&MailboxEntry { name: "b".into(), ..entry("a") }).is_err());
        let turn = recent.get(&entry("b")).expect_err("is not known");
        let (changing, was) = recent.change(&"a".into());
        assert_eq!(was.map(|(_, held)| held.mailbox.records.len()), Some(1));
        recent.read(turn, &entry("b"), &Arc::new(held(1)));
        assert_eq!((known(&recent, "a"), known(&recent, "b")), (None, None));
        // Read in the middle of it: replaced when it is done, forgotten when it is not.
        let turn = recent.get(&entry("a")).expect_err("is not known");
        recent.read(turn, &entry("a"), &Arc::new(held(1)));
        changing.done(&entry("a"), held(2));
        assert_eq!(known(&recent, "a"), Some(2));
        drop(recent.change(&"a".into()));
        assert_eq!(known(&recent, "a"), None);
        let (changing, _) = recent.change(&"a".into());
        let turn = recent.get(&entry("a")).expect_err("is not known");
        recent.read(turn, &entry("a"), &Arc::new(held(1)));
        drop(changing);
        assert_eq!(known(&recent, "a"), None);
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let recent = Recent::default();
        for (id, records) in [("a", MOST / 2), ("b", MOST / 3), ("c", MOST)] {
            recent.change(&id.into()).0.done(&entry(id), held(records));
        }
        assert_eq!(
            (known(&recent, "c"), known(&recent, "b"), known(&recent, "a")),
            (None, Some(MOST / 3), Some(MOST / 2))
        );
        recent.change(&"d".into()).0.done(&entry("d"), held(MOST / 3));
        assert_eq!((known(&recent, "b"), known(&recent, "a")), (None, Some(MOST / 2)), "the one not used longest goes");
        let kept = recent.kept();
        assert_eq!(kept.weight, kept.mailboxes.iter().map(|(_, held)| weight(held)).sum::<usize>());
    }
}
