//! That nothing of a source was touched: content, times, rights and links of everything below a directory.

use sha1::{Digest, Sha1};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What may not change of one file or directory. Times in nanoseconds; the time of the last read is left out.
#[derive(Debug, PartialEq, Eq)]
pub struct Trace {
    sha1: Option<[u8; 20]>,
    inode: u64,
    size: u64,
    mode: u32,
    owner: (u32, u32),
    links: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

pub fn fingerprint(dir: &Path) -> BTreeMap<PathBuf, Trace> {
    let entries = walkdir::WalkDir::new(dir).into_iter().map(|entry| entry.expect("is readable"));
    let traces = entries.map(|entry| {
        let meta = fs::symlink_metadata(entry.path()).expect("is there");
        let sha1 = meta.is_file().then(|| Sha1::digest(fs::read(entry.path()).expect("is readable")).into());
        let trace = Trace {
            sha1,
            inode: meta.ino(),
            size: meta.size(),
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            links: meta.nlink(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        };
        (entry.into_path(), trace)
    });
    traces.collect()
}

/// Paths that came, went or changed.
pub fn changes(before: &BTreeMap<PathBuf, Trace>, after: &BTreeMap<PathBuf, Trace>) -> Vec<String> {
    let all: BTreeSet<&PathBuf> = before.keys().chain(after.keys()).collect();
    let changed = all.into_iter().filter(|path| before.get(*path) != after.get(*path));
    changed.map(|path| path.display().to_string()).collect()
}

#[test]
fn every_touch_is_seen() {
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("file");
    fs::write(&file, "abc").expect("written");
    let mut before = fingerprint(dir.path());
    assert_eq!(before.len(), 2);
    assert_eq!(changes(&before, &fingerprint(dir.path())), Vec::<String>::new());
    let touches: [&dyn Fn(); 4] = [
        &|| fs::write(&file, "abd").expect("written"),
        &|| drop(fs::hard_link(&file, dir.path().join("link"))),
        &|| fs::File::open(&file).and_then(|f| f.set_modified(std::time::UNIX_EPOCH)).expect("times"),
        &|| fs::remove_file(&file).expect("removed"),
    ];
    for touch in touches {
        // Times of files step with the kernel's clock tick.
        std::thread::sleep(std::time::Duration::from_millis(20));
        touch();
        let after = fingerprint(dir.path());
        assert!(!changes(&before, &after).is_empty());
        before = after;
    }
}
