//! Where things are in the directory, and the imapd.conf that says so. One that is there already is taken as it is; a
//! layout that is not written here is refused by name.

use super::DirError;
use super::disk::{self, Disk};
use crate::cyrus::imapd_conf::ImapdConf;
use crate::cyrus::names::{self, Hashing};
use crate::model::{Partition, QuotaRoot, UniqueId};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(super) const CONF: &str = "imapd.conf";

/// Directories that a server looks for below configdirectory.
const SERVERS_OWN: &[&str] = &["db", "lock", "log", "msg", "proc", "ptclient", "quota", "socket", "sync", "user"];

/// Options that move files to where they are not looked for here, with the only value that may be given.
const FIXED: &[(&str, &str)] = &[
    ("annotation_db", "twoskip"),
    ("archive_enabled", "no"),
    ("improved_mboxlist_sort", "no"),
    ("mailbox_legacy_dirs", "no"),
    ("mboxlist_db", "twoskip"),
    ("quota_db", "quotalegacy"),
    ("seenstate_db", "twoskip"),
    ("sieveusehomedir", "no"),
    ("subscription_db", "flat"),
];

/// Prefixes of options that do the same.
const SCATTERED: &[&str] = &["metapartition", "archivepartition", "metadir-header", "metadir-index", "metadir-cache"];

pub(super) struct Places {
    /// What the URL names.
    pub root: PathBuf,
    /// The imapd.conf.
    pub conf_file: PathBuf,
    pub conf: PathBuf,
    pub sieve: PathBuf,
    pub mailboxes_db: PathBuf,
    pub annotations_db: PathBuf,
    pub deleted_prefix: Vec<u8>,
    hashing: Hashing,
    /// The imapd.conf is somebody else's: nothing is added to it.
    theirs: bool,
    /// By name in lower case.
    partitions: Mutex<BTreeMap<String, PathBuf>>,
}

impl Places {
    /// Reads the directory's imapd.conf; makes both where there is neither. `root` may also be the imapd.conf of a store
    /// that somebody else has set up.
    pub fn open(root: &Path, disk: &Disk) -> Result<Self, DirError> {
        let theirs = root.is_file();
        let path = if theirs { root.to_owned() } else { root.join(CONF) };
        let text = match disk::read(&path).map_err(|error| DirError::io(&path, error))? {
            Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            None => Self::found(root, disk)?,
        };
        let fault = |fault: String| DirError::Conf { path: path.clone(), fault };
        let include = &mut |file: &str| std::fs::read_to_string(file).map_err(|error| error.to_string());
        let conf = ImapdConf::parse(&text, include).map_err(|error| fault(error.to_string()))?;
        for (key, only) in FIXED {
            if let Some(value) = conf
                .get(key)
                .filter(|value| *value != *only && (conf.switch(key, true) || conf.switch(key, false) || *only != "no"))
            {
                return Err(fault(format!("{key} is {value}; only {only} can be written")));
            }
        }
        if let Some(key) = SCATTERED.iter().find(|prefix| conf.named(prefix).next().is_some()) {
            return Err(fault(format!("has {key}-… options; all files of a mailbox have to be in its partition")));
        }
        let missing = |key: &str| fault(format!("{key} is not set"));
        let home = PathBuf::from(conf.get("configdirectory").ok_or_else(|| missing("configdirectory"))?);
        let partitions: BTreeMap<String, PathBuf> =
            conf.named("partition").map(|(name, path)| (name.to_owned(), path.into())).collect();
        if partitions.is_empty() {
            return Err(missing("partition-default"));
        }
        let below = |key: &str, name: &str| conf.path(key).map_or_else(|| home.join(name), PathBuf::from);
        let places = Self {
            root: root.to_owned(),
            conf_file: path.clone(),
            theirs,
            sieve: conf.path("sievedir").unwrap_or_else(|| "/usr/sieve".into()).into(),
            mailboxes_db: below("mboxlist_db_path", "mailboxes.db"),
            annotations_db: below("annotation_db_path", "annotations.db"),
            deleted_prefix: conf.get("deletedprefix").unwrap_or("DELETED").as_bytes().to_vec(),
            hashing: Hashing { spool: conf.switch("hashimapspool", false), full: conf.switch("fulldirhash", false) },
            partitions: Mutex::new(partitions),
            conf: home,
        };
        let dirs = SERVERS_OWN.iter().map(|dir| places.conf.join(dir));
        for dir in dirs.chain([places.sieve.clone()]).chain(places.partitions().values().cloned()) {
            disk.make_dir(&dir).map_err(|error| DirError::io(&dir, error))?;
        }
        Ok(places)
    }

    /// A directory of our own making; its imapd.conf comes last.
    fn found(root: &Path, disk: &Disk) -> Result<String, DirError> {
        let io = |error| DirError::io(root, error);
        disk.make_dir(root).map_err(io)?;
        let strange = std::fs::read_dir(root).map_err(io)?.flatten().map(|entry| entry.file_name());
        let known = |name: &std::ffi::OsString| name == "conf" || name == "spool" || name == "sieve";
        let strange: Vec<_> =
            strange.filter(|name| !known(name) && !name.to_string_lossy().starts_with(CONF)).collect();
        if let Some(name) = strange.first() {
            let fault =
                format!("is missing, and {} is there: name an empty directory, or one of a Cyrus", name.display());
            return Err(DirError::Conf { path: root.join(CONF), fault });
        }
        let dir = root.display();
        let text = format!(
            "# A mail store in Cyrus's own format (3.6 and later), kept by spooltap. Options about files stay as they are;\n\
             # what a server needs besides (admins, sasl_…, servername, unixhierarchysep, virtdomains …) is added here.\n\
             configdirectory: {dir}/conf\n\
             partition-default: {dir}/spool/default\n\
             defaultpartition: default\n\
             sievedir: {dir}/sieve\n"
        );
        let path = root.join(CONF);
        disk.replace(&path, text.as_bytes()).map_err(|error| DirError::io(&path, error))?;
        Ok(text)
    }

    pub fn partitions(&self) -> MutexGuard<'_, BTreeMap<String, PathBuf>> {
        self.partitions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The root of a partition.
    pub fn partition(&self, name: &Partition) -> Result<PathBuf, DirError> {
        let key = String::from_utf8_lossy(name.as_bytes()).to_ascii_lowercase();
        self.partitions().get(&key).cloned().ok_or_else(|| DirError::Refused(format!("there is no partition {name}")))
    }

    /// The same; one that imapd.conf does not know yet is made and named there first.
    pub fn partition_made(&self, name: &Partition, disk: &Disk) -> Result<PathBuf, DirError> {
        let key = String::from_utf8_lossy(name.as_bytes()).to_ascii_lowercase();
        let mut partitions = self.partitions();
        if let Some(root) = partitions.get(&key) {
            return Ok(root.clone());
        }
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')) {
            return Err(DirError::Refused(format!("{name} can be no partition's name")));
        }
        if self.theirs {
            let fault = format!("there is no partition {name} in {}; add partition-{key}", self.conf_file.display());
            return Err(DirError::Refused(fault));
        }
        let root = self.root.join("spool").join(&key);
        disk.make_dir(&root).map_err(|error| DirError::io(&root, error))?;
        let path = self.conf_file.clone();
        let mut text = disk::read(&path).map_err(|error| DirError::io(&path, error))?.unwrap_or_default();
        if !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        let line = format!("partition-{key}: {}\n", root.display());
        // It may stand there already: written by a change that was said to have failed. Twice would be a fault.
        if !text.split_inclusive(|byte| *byte == b'\n').any(|old| old == line.as_bytes()) {
            text.extend_from_slice(line.as_bytes());
        }
        disk.replace(&path, &text).map_err(|error| DirError::io(&path, error))?;
        partitions.insert(key, root.clone());
        Ok(root)
    }

    /// A mailbox's directory.
    pub fn mailbox(&self, partition: &Partition, id: &UniqueId) -> Result<PathBuf, DirError> {
        Ok(names::uuid_dir(&self.partition(partition)?, id))
    }

    /// A user's directories: subscriptions and seen state, scripts.
    pub fn user(&self, inbox: &UniqueId) -> (PathBuf, PathBuf) {
        (names::uuid_dir(&self.conf.join("user"), inbox), names::uuid_dir(&self.sieve, inbox))
    }

    pub fn quota(&self, root: &QuotaRoot) -> PathBuf {
        names::quota_file(&self.conf, root, self.hashing)
    }
}
