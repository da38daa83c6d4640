//! `mailboxes.db` in memory and on the disk. A change is one commit: either all rows of it are there or none.

use super::DirError;
use super::disk::{self, Disk};
use super::lease::{lock_as_writer, patiently};
use super::places::Places;
use super::rows::Rows;
use crate::cyrus::db::{self, Map};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// A twoskip database of ours, locked against everybody else while we have it.
pub(super) struct Db {
    path: PathBuf,
    pub map: Map,
    locked: Option<File>,
}

impl Db {
    /// Reads it; one that is not there is empty.
    pub fn open(path: &Path, lock: bool) -> Result<Self, DirError> {
        let io = |error| DirError::io(path, error);
        let bytes = disk::read(path).map_err(io)?;
        let locked = match (&bytes, lock) {
            (Some(_), true) => {
                let file = OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
                patiently(|| {
                    lock_as_writer(&file).map_err(|_| DirError::Busy {
                        dir: path.parent().unwrap_or(path).to_owned(),
                        who: format!("somebody who holds a lock on {}", path.display()),
                    })
                })?;
                Some(file)
            }
            _ => None,
        };
        let map = match bytes {
            Some(bytes) => db::parse(&bytes).map_err(|error| DirError::format(path, error))?,
            None => Map::new(),
        };
        Ok(Self { path: path.to_owned(), map, locked })
    }

    /// Applies these changes on the disk and then in memory; `None` removes. `lock` keeps the file locked.
    pub fn commit(&mut self, disk: &Disk, changes: &[(Vec<u8>, Option<Vec<u8>>)], lock: bool) -> Result<(), DirError> {
        let mut map = self.map.clone();
        for (key, value) in changes {
            match value {
                Some(value) => drop(map.insert(key.clone(), value.clone())),
                None => drop(map.remove(key)),
            }
        }
        if map == self.map && self.path.exists() {
            return Ok(());
        }
        let take = |file: &File| if lock { lock_as_writer(file) } else { Ok::<_, io::Error>(()) };
        let file = disk
            .replace_with(&self.path, &db::encode_twoskip(&map), take)
            .map_err(|error| DirError::io(&self.path, error))?;
        // Whoever waits for the lock of the old file gets it now, sees that it is the old one, and waits for the new.
        self.locked = lock.then_some(file);
        self.map = map;
        Ok(())
    }
}

/// The mailbox list.
pub(super) struct List {
    db: Db,
    pub rows: Rows,
}

impl List {
    pub fn open(places: &Places, disk: &Disk) -> Result<Self, DirError> {
        let mut db = Db::open(&places.mailboxes_db, true)?;
        let rows = Rows::new(&db.map).map_err(|fault| DirError::Conf { path: places.mailboxes_db.clone(), fault })?;
        if db.locked.is_none() {
            db.commit(disk, &[], true)?;
        }
        Ok(Self { db, rows })
    }

    /// Rows of the file, as they stand there.
    pub fn row(&self, key: &[u8]) -> Option<&Vec<u8>> {
        self.db.map.get(key)
    }

    pub fn commit(&mut self, disk: &Disk, changes: &[(Vec<u8>, Option<Vec<u8>>)]) -> Result<(), DirError> {
        self.db.commit(disk, changes, true)?;
        for (key, value) in changes {
            self.rows.apply(key, value.as_deref());
        }
        Ok(())
    }
}
