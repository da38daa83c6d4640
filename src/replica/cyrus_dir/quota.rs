//! Quota roots: limits as they are told, usage as mailboxes change. The root of a mailbox is the longest one above it.

use super::DirError;
use super::disk::{self, Disk};
use super::held::Taken;
use super::places::Places;
use crate::cyrus::quota::{self, Usage};
use crate::model::{MboxName, QuotaLimits, QuotaRoot};
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// All roots, in memory.
#[derive(Default)]
pub(super) struct Quotas {
    roots: BTreeMap<QuotaRoot, (Usage, QuotaLimits)>,
}

impl Quotas {
    pub fn open(places: &Places) -> Result<Self, DirError> {
        let mut quotas = Self::default();
        quotas.read_dir(&places.conf.join("quota"), b"")?;
        for hash in subdirs(&places.conf.join("domain"))? {
            for domain in subdirs(&hash)? {
                let name = domain.file_name().unwrap_or_default().as_bytes().to_vec();
                let prefix = [name.as_slice(), b"!"].concat();
                quotas.read_file(&domain.join("quota/root"), QuotaRoot::new(&prefix))?;
                quotas.read_dir(&domain.join("quota"), &prefix)?;
            }
        }
        Ok(quotas)
    }

    fn read_dir(&mut self, dir: &Path, prefix: &[u8]) -> Result<(), DirError> {
        for hash in subdirs(dir)? {
            let entries = std::fs::read_dir(&hash).map_err(|error| DirError::io(&hash, error))?;
            for entry in entries.flatten().filter(|entry| !entry.file_name().as_bytes().ends_with(b".NEW")) {
                let root = QuotaRoot::new([prefix, entry.file_name().as_bytes()].concat());
                self.read_file(&entry.path(), root)?;
            }
        }
        Ok(())
    }

    fn read_file(&mut self, path: &Path, root: QuotaRoot) -> Result<(), DirError> {
        let bytes = disk::read(path).map_err(|error| DirError::io(path, error))?.unwrap_or_default();
        if bytes.trim_ascii().is_empty() {
            return Ok(());
        }
        let format = |error| DirError::format(path, error);
        let usage = quota::parse_usage(&bytes).map_err(format)?;
        self.roots.insert(root, (usage, quota::parse(&bytes).map_err(format)?));
        Ok(())
    }

    pub fn limits(&self, root: &QuotaRoot) -> Option<&QuotaLimits> {
        self.roots.get(root).map(|(_, limits)| limits)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&QuotaRoot, &QuotaLimits)> {
        self.roots.iter().map(|(root, (_, limits))| (root, limits))
    }

    /// The root a mailbox of this name belongs to.
    pub fn root_of(&self, name: &MboxName) -> Option<QuotaRoot> {
        let mut at = Some(name.clone());
        while let Some(name) = at {
            let root = QuotaRoot::new(name.as_bytes());
            if self.roots.contains_key(&root) {
                return Some(root);
            }
            at = name.parent();
        }
        let (domain, _) = name.domain_and_local();
        let root = QuotaRoot::new([domain?, b"!"].concat());
        self.roots.contains_key(&root).then_some(root)
    }

    /// Sets limits.
    pub fn set(
        &mut self,
        places: &Places,
        disk: &Disk,
        root: &QuotaRoot,
        limits: &QuotaLimits,
    ) -> Result<(), DirError> {
        let old = self.roots.get(root);
        if old.is_some_and(|(_, old)| old == limits) {
            return Ok(());
        }
        let usage = old.map(|(usage, _)| *usage).unwrap_or_default();
        self.write(places, disk, root, usage, limits.clone())
    }

    /// A mailbox takes more or less of its root, or came from another one.
    pub fn moved(
        &mut self,
        places: &Places,
        disk: &Disk,
        from: Option<(&QuotaRoot, Taken)>,
        to: Option<(&QuotaRoot, Taken)>,
    ) -> Result<(), DirError> {
        let mut usages: BTreeMap<&QuotaRoot, Usage> = BTreeMap::new();
        let mut usage_of = |root| {
            *usages.entry(root).or_insert_with(|| self.roots.get(root).map_or_else(Usage::default, |found| found.0))
        };
        let mut out = Vec::new();
        if let Some((root, taken)) = from {
            let mut usage = usage_of(root);
            usage.storage = usage.storage.saturating_sub(taken.storage);
            usage.messages = usage.messages.saturating_sub(taken.messages);
            usage.annotations = usage.annotations.saturating_sub(taken.annotations);
            usage.folders = usage.folders.saturating_sub(1);
            out.push((root, usage));
        }
        if let Some((root, taken)) = to {
            let mut usage = match out.pop_if(|(other, _)| *other == root) {
                Some((_, usage)) => usage,
                None => usage_of(root),
            };
            usage.storage = usage.storage.saturating_add(taken.storage);
            usage.messages = usage.messages.saturating_add(taken.messages);
            usage.annotations = usage.annotations.saturating_add(taken.annotations);
            usage.folders = usage.folders.saturating_add(1);
            out.push((root, usage));
        }
        for (root, usage) in out {
            self.put_usage(places, disk, root, usage)?;
        }
        Ok(())
    }

    /// Writes what is in use below a root, if that is not what stands there.
    pub fn put_usage(&mut self, places: &Places, disk: &Disk, root: &QuotaRoot, usage: Usage) -> Result<(), DirError> {
        match self.roots.get(root) {
            Some((old, limits)) if *old != usage => {
                let limits = limits.clone();
                self.write(places, disk, root, usage, limits)
            }
            _ => Ok(()),
        }
    }

    fn write(
        &mut self,
        places: &Places,
        disk: &Disk,
        root: &QuotaRoot,
        usage: Usage,
        limits: QuotaLimits,
    ) -> Result<(), DirError> {
        let path = places.quota(root);
        let io = |error| DirError::io(&path, error);
        disk.make_dir(path.parent().unwrap_or(&path)).map_err(io)?;
        disk.replace(&path, &quota::encode(&usage, &limits)).map_err(io)?;
        self.roots.insert(root.clone(), (usage, limits));
        Ok(())
    }

    pub fn remove(&mut self, places: &Places, disk: &Disk, root: &QuotaRoot) -> Result<(), DirError> {
        if !self.roots.contains_key(root) {
            return Ok(());
        }
        let path = places.quota(root);
        disk.remove(&path).map_err(|error| DirError::io(&path, error))?;
        self.roots.remove(root);
        Ok(())
    }
}

fn subdirs(dir: &Path) -> Result<Vec<std::path::PathBuf>, DirError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(DirError::io(dir, error)),
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
}
