//! fanotify with the real kernel. Where it may not be used these tests say so and end.

use super::sources::{covers, keys, try_start};
use super::{directories, storm};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A directory on a file system where nothing else happens, for one test at a time. `None` where there is none.
fn quiet_place() -> Option<(tempfile::TempDir, MutexGuard<'static, ()>)> {
    static ONE: Mutex<()> = Mutex::new(());
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    match tempfile::tempdir_in("/dev/shm") {
        Ok(dir) => Some((dir, one)),
        Err(error) => {
            println!("skipped: /dev/shm: {error}");
            None
        }
    }
}

fn put(dir: &Path, path: &str) {
    let path = dir.join(path);
    fs::create_dir_all(path.parent().expect("has one")).expect("created");
    fs::write(path, "x").expect("written");
}

#[test]
fn after_any_storm_every_directory_is_known_by_its_name() {
    for seed in 0..4 {
        let Some((dir, _one)) = quiet_place() else { return };
        fs::create_dir_all(dir.path().join("spool/user")).expect("created");
        let Some((given, handle)) = try_start(dir.path(), "fanotify") else { return };
        let root = dir.path().join("spool/user");
        storm(&root, 1500, seed);
        fs::create_dir_all(root.join("a/b/c/d")).expect("created");
        keys(&given, &handle);
        for place in directories(&root) {
            fs::write(place.join("2."), "x").expect("written");
            let below = place.strip_prefix(dir.path().join("spool")).expect("below");
            let key = format!("mailbox {}", below.to_string_lossy().replace('/', "."));
            let keys = keys(&given, &handle);
            assert!(keys.contains(&key) || covers(&keys, &key), "seed {seed}: {key} is missing in {keys:?}");
            assert!(keys.len() == 1 || keys.contains("rescan"), "seed {seed}: {keys:?}");
        }
    }
}

#[test]
fn a_directory_that_was_seen_before_is_known_by_its_new_name() {
    // Fails when the remembered paths are not forgotten at the rename of a directory above.
    let Some((dir, _one)) = quiet_place() else { return };
    put(dir.path(), "spool/user/a/kid/1.");
    let Some((given, handle)) = try_start(dir.path(), "fanotify") else { return };
    put(dir.path(), "spool/user/a/kid/2.");
    assert_eq!(keys(&given, &handle), BTreeSet::from(["mailbox user.a.kid".to_owned()]));
    fs::rename(dir.path().join("spool/user/a"), dir.path().join("spool/user/b")).expect("renamed");
    keys(&given, &handle);
    put(dir.path(), "spool/user/b/kid/3.");
    assert_eq!(keys(&given, &handle), BTreeSet::from(["mailbox user.b.kid".to_owned()]));
}

#[test]
fn a_tree_removed_at_once_is_told_mailbox_by_mailbox() {
    // By the time the events are read no handle leads anywhere. Fails without the memory of removals.
    let Some((dir, _one)) = quiet_place() else { return };
    for n in 0..50 {
        put(dir.path(), &format!("spool/user/u{n}/a/b/1."));
    }
    let Some((given, handle)) = try_start(dir.path(), "fanotify") else { return };
    fs::remove_dir_all(dir.path().join("spool/user")).expect("removed");
    let keys = keys(&given, &handle);
    for n in 0..50 {
        for below in ["", ".a", ".a.b"] {
            assert!(keys.contains(&format!("mailbox user.u{n}{below}")), "u{n}{below} is missing in {keys:?}");
        }
    }
    assert!(!keys.contains("rescan"), "nothing was lost: {keys:?}");
}

#[test]
fn a_chain_of_renames_is_told_under_every_name() {
    // The middle name is gone when the first rename is read. Fails when a walk that finds nothing counts as done.
    let Some((dir, _one)) = quiet_place() else { return };
    put(dir.path(), "spool/user/a/kid/1.");
    let Some((given, handle)) = try_start(dir.path(), "fanotify") else { return };
    let name = |name: &str| dir.path().join("spool/user").join(name);
    for (from, to) in [("a", "b"), ("b", "c"), ("c", "d")] {
        fs::rename(name(from), name(to)).expect("renamed");
    }
    let keys = keys(&given, &handle);
    for name in ["a", "a.kid", "b", "c", "d", "d.kid"] {
        assert!(covers(&keys, &format!("mailbox user.{name}")), "{name}: {keys:?}");
    }
}

#[test]
fn what_is_not_ours_is_not_told() {
    let Some((dir, _one)) = quiet_place() else { return };
    put(dir.path(), "spool/user/a/1.");
    let Some((given, handle)) = try_start(dir.path(), "fanotify") else { return };
    put(dir.path(), "elsewhere/user/a/1.");
    fs::rename(dir.path().join("elsewhere"), dir.path().join("beside")).expect("renamed");
    put(dir.path(), "spool/stage./1-2-3");
    put(dir.path(), "conf/deliver.db");
    let found = keys(&given, &handle);
    assert!(!found.iter().any(|key| key.starts_with("mailbox")), "{found:?}");
    fs::rename(dir.path().join("beside/user/a"), dir.path().join("spool/user/b")).expect("renamed");
    assert_eq!(keys(&given, &handle), BTreeSet::from(["mailbox user.b".to_owned()]));
}

#[test]
fn a_linked_tree_is_watched_also_when_the_link_is_made_later() {
    let Some((dir, _one)) = quiet_place() else { return };
    put(dir.path(), "disk2/a/kid/1.");
    put(dir.path(), "disk3/b/kid/1.");
    put(dir.path(), "spool/user/x/1.");
    std::os::unix::fs::symlink(dir.path().join("disk2/a"), dir.path().join("spool/user/a")).expect("linked");
    let Some((given, handle)) = try_start(dir.path(), "fanotify") else { return };
    put(dir.path(), "disk2/a/kid/2.");
    assert_eq!(keys(&given, &handle), BTreeSet::from(["mailbox user.a.kid".to_owned()]));
    std::os::unix::fs::symlink(dir.path().join("disk3/b"), dir.path().join("spool/user/b")).expect("linked");
    assert!(covers(&keys(&given, &handle), "mailbox user.b.kid"));
    put(dir.path(), "disk3/b/kid/2.");
    assert_eq!(keys(&given, &handle), BTreeSet::from(["mailbox user.b.kid".to_owned()]));
}

#[test]
fn the_store_can_be_unmounted_while_it_is_watched() {
    // Fails when a descriptor of the partition stays open: umount says it is busy.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let spool = dir.path().join("spool");
    fs::create_dir_all(&spool).expect("created");
    let run = |program: &str, words: &[&str]| {
        let spool = spool.to_string_lossy().into_owned();
        std::process::Command::new(program).args(words).arg(spool).output().is_ok_and(|done| done.status.success())
    };
    if !run("mount", &["-t", "tmpfs", "none"]) {
        println!("skipped: nothing can be mounted here");
        return;
    }
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).output();
        }
    }
    let _unmount = Unmount(spool.clone());
    put(dir.path(), "spool/user/a/1.");
    let Some((given, handle)) = try_start(dir.path(), "fanotify") else { return };
    put(dir.path(), "spool/user/a/2.");
    assert_eq!(keys(&given, &handle), BTreeSet::from(["mailbox user.a".to_owned()]));
    assert!(run("umount", &[]), "it is not kept busy");
    put(dir.path(), "spool/user/b/1.");
    assert!(covers(&keys(&given, &handle), "mailbox user.b"));
    assert!(run("mount", &["-t", "tmpfs", "none"]));
    put(dir.path(), "spool/user/c/1.");
    // The mount is told by another way than the files in it.
    let found = super::super::util::eventually(std::time::Duration::from_secs(10), || {
        covers(&keys(&given, &handle), "mailbox user.c").then_some(())
    });
    assert!(found.is_some(), "the mount is noticed");
    put(dir.path(), "spool/user/c/2.");
    assert!(keys(&given, &handle).contains("mailbox user.c"));
}
