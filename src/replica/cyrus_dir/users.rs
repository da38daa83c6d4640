//! A user's files, which lie under the uniqueid of his INBOX: subscriptions, seen state, scripts.

use super::DirError;
use super::disk::{self, Disk};
use super::places::Places;
use crate::cyrus::db::{self, Map};
use crate::cyrus::{seen, sieve, subs};
use crate::model::{MboxName, MessageGuid, SeenState, SieveName, SieveScript, UniqueId, UserId, UserMeta};
use sha1::{Digest, Sha1};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

pub(super) struct User<'a> {
    pub places: &'a Places,
    pub disk: &'a Disk,
    pub id: &'a UserId,
    /// Uniqueid of the INBOX.
    pub inbox: &'a UniqueId,
}

const ACTIVE: &str = "defaultbc";

impl User<'_> {
    fn file(&self, name: &str) -> PathBuf {
        self.places.user(self.inbox).0.join(name)
    }

    fn scripts(&self) -> PathBuf {
        self.places.user(self.inbox).1
    }

    fn script(&self, name: &SieveName, ending: &str) -> Result<PathBuf, DirError> {
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.len() > 200 || bytes.iter().any(|byte| matches!(byte, b'/' | 0)) {
            return Err(DirError::Refused(format!("{name} can be no script's name")));
        }
        Ok(self.scripts().join(OsStr::from_bytes(&[bytes, ending.as_bytes()].concat())))
    }

    fn db(&self, name: &str) -> Result<Map, DirError> {
        let path = self.file(name);
        let bytes = disk::read(&path).map_err(|error| DirError::io(&path, error))?;
        bytes.map_or_else(|| Ok(Map::new()), |bytes| db::parse(&bytes).map_err(|error| DirError::format(&path, error)))
    }

    fn put(&self, path: &Path, bytes: &[u8]) -> Result<(), DirError> {
        let io = |error| DirError::io(path, error);
        self.disk.make_dir(path.parent().unwrap_or(path)).map_err(io)?;
        self.disk.replace(path, bytes).map_err(io)
    }

    /// All there is, scripts without their text.
    pub fn meta(&self) -> Result<UserMeta, DirError> {
        let (seen, _) = seen::parse(&self.db("seen.db")?);
        let mut meta = UserMeta { subs: subs::parse(&self.db("sub.db")?, self.id), seen, ..UserMeta::default() };
        let dir = self.scripts();
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(meta),
            Err(error) => return Err(DirError::io(&dir, error)),
        };
        for entry in entries.flatten() {
            let Some(name) = sieve::script_name(entry.file_name().as_bytes()) else { continue };
            let path = entry.path();
            let text = std::fs::read(&path).map_err(|error| DirError::io(&path, error))?;
            let last_update = entry.metadata().map_err(|error| DirError::io(&path, error))?.mtime();
            let guid = MessageGuid(Sha1::digest(&text).into());
            meta.sieve.insert(name, SieveScript { guid, last_update, ..SieveScript::default() });
        }
        let active = std::fs::read_link(dir.join(ACTIVE)).ok();
        let active = active.and_then(|target| sieve::active_name(target.as_os_str().as_bytes()));
        meta.active = active.filter(|name| meta.sieve.contains_key(name));
        Ok(meta)
    }

    pub fn script_text(&self, name: &SieveName) -> Result<Option<Vec<u8>>, DirError> {
        let path = self.script(name, ".script")?;
        disk::read(&path).map_err(|error| DirError::io(&path, error))
    }

    pub fn subscribe(&self, name: &MboxName, subscribed: bool) -> Result<(), DirError> {
        let mut names = subs::parse(&self.db("sub.db")?, self.id);
        let changed = if subscribed { names.insert(name.clone()) } else { names.remove(name) };
        match changed {
            true => self.put(&self.file("sub.db"), &db::encode_flat(&subs::encode(&names, self.id))),
            false => Ok(()),
        }
    }

    pub fn seen(&self, mailbox: &UniqueId, seen: &SeenState) -> Result<(), DirError> {
        let mut map = self.db("seen.db")?;
        let value = seen::encode_value(seen);
        if map.get(mailbox.as_bytes()) == Some(&value) {
            return Ok(());
        }
        map.insert(mailbox.as_bytes().to_vec(), value);
        self.put(&self.file("seen.db"), &db::encode_twoskip(&map))
    }

    /// The text; a server compiles it when it needs it.
    pub fn put_script(&self, name: &SieveName, last_update: i64, text: &[u8]) -> Result<(), DirError> {
        let path = self.script(name, ".script")?;
        let when = SystemTime::UNIX_EPOCH + Duration::from_secs(last_update.max(0).unsigned_abs());
        let io = |error| DirError::io(&path, error);
        self.disk.make_dir(path.parent().unwrap_or(&path)).map_err(io)?;
        self.disk.replace_with(&path, text, |file| file.set_modified(when)).map_err(io)?;
        // What was compiled of the text before it.
        let compiled = self.script(name, ".bc")?;
        self.disk.remove(&compiled).map_err(io)
    }

    pub fn remove_script(&self, name: &SieveName) -> Result<(), DirError> {
        if self.active_link() == Some(self.compiled_name(name)) {
            self.deactivate()?;
        }
        for ending in [".script", ".bc"] {
            let path = self.script(name, ending)?;
            self.disk.remove(&path).map_err(|error| DirError::io(&path, error))?;
        }
        Ok(())
    }

    fn compiled_name(&self, name: &SieveName) -> PathBuf {
        PathBuf::from(OsStr::from_bytes(&[name.as_bytes(), b".bc"].concat()))
    }

    fn active_link(&self) -> Option<PathBuf> {
        std::fs::read_link(self.scripts().join(ACTIVE)).ok()
    }

    pub fn activate(&self, name: &SieveName) -> Result<(), DirError> {
        let target = self.compiled_name(name);
        self.script(name, ".script")?;
        if self.active_link().as_ref() == Some(&target) {
            return Ok(());
        }
        let dir = self.scripts();
        let (path, new) = (dir.join(ACTIVE), dir.join("defaultbc.NEW"));
        let io = |error| DirError::io(&path, error);
        self.disk.make_dir(&dir).map_err(io)?;
        self.disk.remove(&new).map_err(io)?;
        self.disk.symlink(&target, &new).map_err(io)?;
        self.disk.rename(&new, &path).map_err(io)?;
        self.disk.sync_dir(&dir).map_err(io)
    }

    pub fn deactivate(&self) -> Result<(), DirError> {
        let path = self.scripts().join(ACTIVE);
        self.disk.remove(&path).map_err(|error| DirError::io(&path, error))
    }

    /// The user is gone.
    pub fn remove(&self) -> Result<(), DirError> {
        let (own, scripts) = self.places.user(self.inbox);
        for dir in [own, scripts] {
            self.disk.remove_tree(&dir).map_err(|error| DirError::io(&dir, error))?;
        }
        Ok(())
    }
}
