//! Messages that a session was promised (`RESERVE`): further names for their files, so that they are at hand when the update
//! comes that needs them, even if their mailbox was renamed, moved or removed in between.

use super::DirError;
use super::messages::Elsewhere;
use super::store::Store;
use crate::model::MessageGuid;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

pub(super) struct Pins {
    store: Arc<Store>,
    files: Elsewhere,
    /// One directory in each partition that has any.
    dirs: BTreeMap<PathBuf, PathBuf>,
}

impl Pins {
    pub fn new(store: Arc<Store>) -> Self {
        Self { store, files: Elsewhere::new(), dirs: BTreeMap::new() }
    }

    pub fn files(&self) -> &Elsewhere {
        &self.files
    }

    /// Keeps those of `guids` that are `there`, and says which they are. They are hashed when they are used.
    pub fn add(&mut self, guids: &[MessageGuid], there: &Elsewhere) -> Result<BTreeSet<MessageGuid>, DirError> {
        let mut kept = BTreeSet::new();
        for guid in guids {
            if self.files.contains_key(guid) {
                kept.insert(*guid);
                continue;
            }
            let Some(from) = there.get(guid) else { continue };
            // ROOT/uuid/a/b/UNIQUEID/UID.
            let Some(root) = from.ancestors().nth(5) else { continue };
            let dir = match self.dirs.get(root) {
                Some(dir) => dir.clone(),
                None => {
                    let dir = self.store.pin_dir(root)?;
                    self.dirs.insert(root.to_owned(), dir.clone());
                    dir
                }
            };
            let to = dir.join(guid.to_string());
            // Gone meanwhile: then it is not here, and will be sent.
            if std::fs::hard_link(from, &to).is_ok() {
                self.files.insert(*guid, to);
                kept.insert(*guid);
            }
        }
        Ok(kept)
    }

    pub fn clear(&mut self) {
        self.files.clear();
        for dir in std::mem::take(&mut self.dirs).into_values() {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.clear();
    }
}
