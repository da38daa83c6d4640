//! A user's data outside mailboxes, and quota roots.

use super::layout::Layout;
use super::read::{self, is_absent};
use super::{format_error, io_error};
use crate::cyrus::{names, quota, seen, sieve, subs};
use crate::model::{
    Disposition, Fingerprint, MailboxEntry, MboxName, MessageGuid, QuotaLimits, QuotaRoot, SieveScript, StoreError,
    UniqueId, UserId, UserMeta,
};
use sha1::{Digest, Sha1};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tracing::warn;

/// A Sieve script larger than this is refused by every server.
const MAX_SCRIPT: u64 = 4 << 20;

/// Where a user's files may be; `inbox` decides between the layouts.
pub(super) struct Places {
    pub subs: Vec<PathBuf>,
    pub seen: Vec<PathBuf>,
    pub sieve: Vec<PathBuf>,
}

pub(super) fn places(layout: &Layout, user: &UserId, inbox: Option<&MailboxEntry>) -> Places {
    let by_name = |suffix: &str| names::user_files(&layout.configdirectory, user, suffix, layout.hashing);
    match inbox {
        Some(inbox) if !inbox.by_name => places_of(layout, &inbox.uniqueid),
        _ => Places {
            subs: by_name("sub"),
            seen: by_name("seen"),
            sieve: if layout.sieve_in_homes {
                Vec::new()
            } else {
                names::sieve_dirs(&layout.sievedir, user, layout.hashing)
            },
        },
    }
}

/// The same where a user's files are kept under the uniqueid of his INBOX.
pub(super) fn places_of(layout: &Layout, inbox: &UniqueId) -> Places {
    let dir = layout.user_dir(inbox);
    Places {
        subs: vec![dir.join("sub.db"), dir.join("sub")],
        seen: vec![dir.join("seen.db"), dir.join("seen")],
        sieve: vec![names::uuid_dir(&layout.sievedir, inbox)],
    }
}

pub(super) fn user_meta(places: &Places, user: &UserId) -> Result<UserMeta, StoreError> {
    let subs = subs::parse(&read::read_db(&places.subs)?, user);
    let (seen, faults) = seen::parse(&read::read_db(&places.seen)?);
    if let Some((key, error)) = faults.first() {
        warn!(%user, uniqueid = %String::from_utf8_lossy(key), %error, count = faults.len(), "seen values are left out");
    }
    let mut meta = UserMeta { subs, seen, seen_incomplete: !faults.is_empty(), ..UserMeta::default() };
    for dir in &places.sieve {
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if is_absent(&error) => continue,
            Err(error) => return Err(io_error(dir, &error)),
        };
        for entry in entries {
            let entry = entry.map_err(|error| io_error(dir, &error))?;
            let file = entry.file_name();
            if let Some(name) = sieve::script_name(file.as_bytes())
                && let Some(mut script) = read_script(&entry.path())?
            {
                // Bytes for a replica of the same age; nobody here looks into them.
                let compiled = read_script(&entry.path().with_extension("bc"))?;
                script.compiled = compiled.map(|compiled| compiled.content).unwrap_or_default();
                meta.sieve.insert(name, script);
            }
        }
        let link = ["defaultbc", "default"].iter().find_map(|name| std::fs::read_link(dir.join(name)).ok());
        meta.active = link
            .and_then(|target| sieve::active_name(target.as_os_str().as_bytes()))
            .filter(|name| meta.sieve.contains_key(name));
        break;
    }
    Ok(meta)
}

fn read_script(path: &Path) -> Result<Option<SieveScript>, StoreError> {
    let file = match read::open(path) {
        Ok(file) => file,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(io_error(path, &error)),
    };
    let meta = file.metadata().map_err(|error| io_error(path, &error))?;
    if meta.len() > MAX_SCRIPT {
        return Err(StoreError::new(
            Disposition::Quarantine,
            format!("{}: {} bytes are too many for a script", path.display(), meta.len()),
        ));
    }
    let content = read::read_whole(&file, path)?;
    let guid = MessageGuid(Sha1::digest(&content).into());
    Ok(Some(SieveScript { guid, last_update: meta.mtime(), content, compiled: Vec::new() }))
}

/// `flags` says what of the seen database is told as flags of messages.
pub(super) fn fingerprint(places: &Places, flags: &[u8]) -> Fingerprint {
    let mut hash = blake3::Hasher::new();
    hash.update(flags);
    for paths in [&places.subs, &places.seen] {
        let found = paths.iter().find_map(|path| std::fs::metadata(path).ok());
        hash.update(&found.map_or([0; 32], |meta| read::stamp(&meta)));
    }
    let mut files: Vec<(Vec<u8>, [u8; 32])> = Vec::new();
    for dir in &places.sieve {
        let Ok(entries) = std::fs::read_dir(dir) else { continue };
        for entry in entries.flatten() {
            let stamp = entry.metadata().map(|meta| read::stamp(&meta)).unwrap_or_default();
            files.push((entry.file_name().as_bytes().to_vec(), stamp));
        }
        break;
    }
    files.sort();
    for (name, stamp) in files {
        hash.update(&name);
        hash.update(&stamp);
    }
    Fingerprint(hash.finalize().as_bytes().to_vec())
}

/// One quota root.
pub(super) fn quota_of(layout: &Layout, root: &QuotaRoot) -> Result<Option<QuotaLimits>, StoreError> {
    if let Some(db) = &layout.quotas_db {
        let map = read::read_db(std::slice::from_ref(db))?;
        let value = map.get(root.as_bytes());
        return value.map(|value| quota::parse(value).map_err(|error| format_error(db, &error))).transpose();
    }
    let path = names::quota_file(&layout.configdirectory, root, layout.hashing);
    read_quota(&path)
}

fn read_quota(path: &Path) -> Result<Option<QuotaLimits>, StoreError> {
    let file = match read::open(path) {
        Ok(file) => file,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(io_error(path, &error)),
    };
    let bytes = read::read_whole(&file, path)?;
    // An empty file is one that is being made.
    if bytes.trim_ascii().is_empty() {
        return Ok(None);
    }
    quota::parse(&bytes).map(Some).map_err(|error| format_error(path, &error))
}

/// All quota roots.
pub(super) fn quotas(layout: &Layout) -> Result<BTreeMap<QuotaRoot, QuotaLimits>, StoreError> {
    let mut out = BTreeMap::new();
    if let Some(db) = &layout.quotas_db {
        for (root, value) in read::read_db(std::slice::from_ref(db))? {
            let limits = quota::parse(&value).map_err(|error| format_error(db, &error))?;
            out.insert(QuotaRoot::new(root), limits);
        }
        return Ok(out);
    }
    let conf = &layout.configdirectory;
    quota_dir(&conf.join("quota"), None, &mut out)?;
    for hash in subdirs(&conf.join("domain"))? {
        for domain in subdirs(&hash)? {
            let name = domain.file_name().unwrap_or(OsStr::new("")).as_bytes().to_vec();
            quota_dir(&domain.join("quota"), Some(&name), &mut out)?;
        }
    }
    Ok(out)
}

fn quota_dir(dir: &Path, domain: Option<&[u8]>, out: &mut BTreeMap<QuotaRoot, QuotaLimits>) -> Result<(), StoreError> {
    let prefix = domain.map(|domain| [domain, b"!"].concat()).unwrap_or_default();
    if domain.is_some()
        && let Some(limits) = read_quota(&dir.join("root"))?
    {
        out.insert(QuotaRoot::new(&prefix), limits);
    }
    for hash in subdirs(dir)? {
        let entries = match std::fs::read_dir(&hash) {
            Ok(entries) => entries,
            Err(error) if is_absent(&error) => continue,
            Err(error) => return Err(io_error(&hash, &error)),
        };
        for entry in entries {
            let entry = entry.map_err(|error| io_error(&hash, &error))?;
            let name = entry.file_name();
            if name.as_bytes().ends_with(b".NEW") {
                continue;
            }
            if let Some(limits) = read_quota(&entry.path())? {
                out.insert(QuotaRoot::new([prefix.as_slice(), name.as_bytes()].concat()), limits);
            }
        }
    }
    Ok(())
}

pub(super) fn subdirs(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(io_error(dir, &error)),
    };
    let mut out = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| io_error(dir, &error))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            out.push(entry.path());
        }
    }
    Ok(out)
}

/// Owners of INBOXes.
pub(super) fn owners<'a>(names: impl Iterator<Item = &'a MboxName>) -> Vec<UserId> {
    names.filter(|name| name.is_inbox()).filter_map(MboxName::owner).collect()
}
