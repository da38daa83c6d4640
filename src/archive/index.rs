//! Which mailboxes an archive has. One chain for all of them, kept in memory and looked at before each use: another
//! program may write to the same archive.

use super::ArchiveError;
use super::chain::{self, Chain};
use super::objects::Objects;
use super::shapes::{Row, StoredIndex};
use crate::model::{MboxName, UniqueId};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

const FOLDER: &str = "index";

/// How often a change is tried again when others publish in between.
const ATTEMPTS: usize = 10;

/// The rows by name, and the way back.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    by_name: BTreeMap<MboxName, Row>,
    names: HashMap<UniqueId, MboxName>,
}

#[derive(Default)]
pub(super) struct Index {
    known: Mutex<(Chain, Rows)>,
}

impl Rows {
    fn new(stored: StoredIndex) -> Self {
        let mut rows = Self::default();
        rows.apply(stored);
        rows
    }

    fn apply(&mut self, change: StoredIndex) {
        for (name, row) in change.mailboxes {
            let old = match row {
                Some(row) => {
                    self.names.insert(row.uniqueid.clone(), name.clone());
                    self.by_name.insert(name.clone(), row)
                }
                None => self.by_name.remove(&name),
            };
            // In a rename the new name comes or came with the same uniqueid: then it stays.
            if let Some(old) = old
                && self.names.get(&old.uniqueid) == Some(&name)
                && self.by_name.get(&name).is_none_or(|row| row.uniqueid != old.uniqueid)
            {
                self.names.remove(&old.uniqueid);
            }
        }
    }

    pub fn row(&self, name: &MboxName) -> Option<&Row> {
        self.by_name.get(name)
    }

    pub fn name(&self, id: &UniqueId) -> Option<&MboxName> {
        self.names.get(id)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&MboxName, &Row)> {
        self.by_name.iter()
    }
}

impl Index {
    /// Shows the rows as they are now. `look` runs under a lock: it only looks.
    pub fn look<T>(&self, objects: &Objects, look: impl FnOnce(&Rows) -> T) -> Result<T, ArchiveError> {
        let mut known = self.lock();
        Self::refresh(&mut known, objects)?;
        Ok(look(&known.1))
    }

    /// Publishes what `decide` wants changed, which it is asked again when somebody else was first; `None` is no change.
    pub fn change<E: From<ArchiveError>>(
        &self,
        objects: &Objects,
        decide: impl Fn(&Rows) -> Result<Option<StoredIndex>, E>,
    ) -> Result<(), E> {
        let mut known = self.lock();
        let mut tries = 0;
        loop {
            Self::refresh(&mut known, objects)?;
            let Some(change) = decide(&known.1)? else { return Ok(()) };
            match chain::publish(objects, FOLDER, &known.0, change.clone(), false) {
                Ok(chain) => {
                    known.0 = chain;
                    known.1.apply(change);
                    return Ok(());
                }
                Err(ArchiveError::Conflict { .. }) if tries < ATTEMPTS => tries += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A mark that changes with every change of the index.
    pub fn mark(objects: &Objects) -> Result<Option<(u64, String)>, ArchiveError> {
        chain::newest(objects, FOLDER)
    }

    fn refresh(known: &mut MutexGuard<(Chain, Rows)>, objects: &Objects) -> Result<(), ArchiveError> {
        if !known.0.is_current(objects, FOLDER)? {
            **known = match chain::load::<StoredIndex>(objects, FOLDER)? {
                Some((chain, stored)) => (chain, Rows::new(stored)),
                None => Default::default(),
            };
        }
        Ok(())
    }

    /// A thread that panicked in here left either the old state or the new one.
    fn lock(&self) -> MutexGuard<'_, (Chain, Rows)> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_stay_in_step() {
        let row = |id: &str| Row {
            uniqueid: id.into(),
            mbtype: Default::default(),
            partition: "default".into(),
            acl: Vec::new(),
            uidvalidity: 1,
            createdmodseq: Default::default(),
            foldermodseq: Default::default(),
        };
        let mut rows = Rows::default();
        let mut check = |changes: &[(&str, Option<&str>)], expected: &[(&str, &str)]| {
            let changes = changes.iter().map(|(name, id)| (MboxName::from(*name), id.map(row)));
            rows.apply(StoredIndex { mailboxes: changes.collect() });
            let forth: Vec<_> = rows.iter().map(|(name, row)| (name.to_string(), row.uniqueid.to_string())).collect();
            let mut back: Vec<_> = rows.names.iter().map(|(id, name)| (name.to_string(), id.to_string())).collect();
            back.sort();
            let expected: Vec<_> = expected.iter().map(|(name, id)| (name.to_string(), id.to_string())).collect();
            assert_eq!((&forth, &back), (&expected, &expected));
        };
        check(&[("a", Some("1")), ("b", Some("2"))], &[("a", "1"), ("b", "2")]);
        check(&[("a", None), ("c", Some("1"))], &[("b", "2"), ("c", "1")]);
        check(&[("c", None), ("a", Some("1"))], &[("a", "1"), ("b", "2")]);
        check(&[("a", Some("3"))], &[("a", "3"), ("b", "2")]);
        check(&[("b", None)], &[("a", "3")]);
        check(&[("a", Some("3"))], &[("a", "3")]);
    }
}
