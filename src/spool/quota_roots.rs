//! The names of all quota roots. Whoever compares all users asks for them once for each user, so the directories are read again
//! only where one of them has changed.

use super::io_error;
use super::layout::Layout;
use super::read::{self, is_absent, stamp};
use super::users::subdirs;
use crate::model::{QuotaRoot, StoreError};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// A directory that was changed so shortly before it was read may have changed once more with the same time stamp.
const SETTLED: Duration = Duration::from_secs(2);

/// What was read last.
#[derive(Default)]
pub(super) struct QuotaRoots(Mutex<Option<Seen>>);

struct Seen {
    dirs: Vec<(PathBuf, Option<[u8; 32]>)>,
    /// None of them had changed lately.
    settled: bool,
    names: Arc<[QuotaRoot]>,
}

impl QuotaRoots {
    /// Sorted.
    pub(super) fn all(&self, layout: &Layout) -> Result<Arc<[QuotaRoot]>, StoreError> {
        if let Some(db) = &layout.quotas_db {
            // Written through a mapping: no time stamp tells of a change.
            return Ok(read::read_db(std::slice::from_ref(db))?.into_keys().map(QuotaRoot::from).collect());
        }
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seen) = &*seen
            && seen.settled
            && seen.dirs.iter().all(|(dir, before)| mark(dir).0 == *before)
        {
            return Ok(seen.names.clone());
        }
        let mut walk = Walk { dirs: Vec::new(), settled: true, names: Vec::new() };
        let conf = &layout.configdirectory;
        walk.quota_dir(&conf.join("quota"), None)?;
        for hash in walk.subdirs(&conf.join("domain"))? {
            for domain in walk.subdirs(&hash)? {
                let name = domain.file_name().unwrap_or_default().as_bytes().to_vec();
                walk.quota_dir(&domain.join("quota"), Some(&name))?;
            }
        }
        walk.names.sort();
        let names: Arc<[QuotaRoot]> = walk.names.into();
        *seen = Some(Seen { dirs: walk.dirs, settled: walk.settled, names: names.clone() });
        Ok(names)
    }
}

/// What a directory is like, and whether it has been for a while.
fn mark(dir: &Path) -> (Option<[u8; 32]>, bool) {
    let Ok(meta) = std::fs::metadata(dir) else { return (None, true) };
    let age = meta.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    (Some(stamp(&meta)), age.is_some_and(|age| age > SETTLED))
}

struct Walk {
    dirs: Vec<(PathBuf, Option<[u8; 32]>)>,
    settled: bool,
    names: Vec<QuotaRoot>,
}

impl Walk {
    /// Looked at before it is read: a change in between is seen the next time.
    fn note(&mut self, dir: &Path) {
        let (stamp, settled) = mark(dir);
        self.settled &= settled;
        self.dirs.push((dir.to_owned(), stamp));
    }

    fn subdirs(&mut self, dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
        self.note(dir);
        subdirs(dir)
    }

    fn quota_dir(&mut self, dir: &Path, domain: Option<&[u8]>) -> Result<(), StoreError> {
        let prefix = domain.map(|domain| [domain, b"!"].concat()).unwrap_or_default();
        let hashes = self.subdirs(dir)?;
        if domain.is_some() && dir.join("root").exists() {
            self.names.push(QuotaRoot::new(&prefix));
        }
        for hash in hashes {
            self.note(&hash);
            let entries = match std::fs::read_dir(&hash) {
                Ok(entries) => entries,
                Err(error) if is_absent(&error) => continue,
                Err(error) => return Err(io_error(&hash, &error)),
            };
            for entry in entries {
                let name = entry.map_err(|error| io_error(&hash, &error))?.file_name();
                if !name.as_bytes().ends_with(b".NEW") {
                    self.names.push(QuotaRoot::new([prefix.as_slice(), name.as_bytes()].concat()));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn every_root_is_named_whatever_comes_and_goes() {
        let dir = tempfile::tempdir().expect("directory");
        let layout = Layout { configdirectory: dir.path().to_owned(), ..Layout::default() };
        let roots = QuotaRoots::default();
        let check = |expected: &[&str]| {
            let names: Vec<String> = roots.all(&layout).expect("reads").iter().map(ToString::to_string).collect();
            assert_eq!(names, expected);
        };
        check(&[]);
        let put = |path: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("has one")).expect("makes");
            fs::write(path, "0\n0\n").expect("writes");
        };
        put("quota/u/user.u1");
        check(&["user.u1"]);
        put("quota/u/user.u2.NEW");
        put("domain/d/d.test/quota/root");
        put("domain/d/d.test/quota/u/user.u3");
        check(&["d.test!", "d.test!user.u3", "user.u1"]);
        // Long ago: what was read is good until a directory changes.
        let old = SystemTime::now() - Duration::from_secs(3600);
        for entry in walkdir::WalkDir::new(dir.path()).into_iter().flatten().filter(|e| e.file_type().is_dir()) {
            fs::File::open(entry.path()).and_then(|file| file.set_modified(old)).expect("is made old");
        }
        check(&["d.test!", "d.test!user.u3", "user.u1"]);
        let (first, second) = (roots.all(&layout).expect("reads"), roots.all(&layout).expect("reads"));
        assert!(Arc::ptr_eq(&first, &second), "not read again");
        fs::remove_file(dir.path().join("quota/u/user.u1")).expect("removes");
        put("quota/v/user.v");
        check(&["d.test!", "d.test!user.u3", "user.v"]);
    }
}
