//! Change noticed by the lock files of 3.6 and later. What they tell of real servers is in `derive`, by recordings.

use super::super::util::{eventually, store};
use super::sources::{keys, settings};
use super::{roots, start};
use spooltap::capture::Settings;
use spooltap::replay::Recording;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const ID: &str = "cyep0qmotfa5j0f7pundy3wj";

fn with_locks(dir: &Path, source: &str) -> Settings {
    Settings { locks: Ok(dir.join("conf/lock")), ..settings(source) }
}

/// Cyrus opens a lock so, and closes it when all is written.
fn take(dir: &Path, name: &str) -> File {
    let path = dir.join("conf/lock").join(name);
    fs::create_dir_all(path.parent().expect("has one")).expect("created");
    File::create(path).expect("opened")
}

fn accessed(name: &str) -> BTreeSet<String> {
    BTreeSet::from([format!("accessed-id {name}"), format!("accessed {name}")])
}

#[test]
fn a_mailbox_is_named_when_its_lock_is_let_go_and_not_before() {
    // Fails when MODIFY or CREATE of a lock file counts: the mailbox would be read in the middle of a command.
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir_all(dir.path().join("conf/user")).expect("created");
    let (given, handle) = start(roots(dir.path()), with_locks(dir.path(), "locks"));
    handle.wait_armed();
    for round in 0..3 {
        // The first makes the directory as well.
        let held = take(dir.path(), &format!("{ID}.lock"));
        let user = take(dir.path(), "*U*u1.lock");
        if round > 0 {
            assert_eq!(keys(&given, &handle), BTreeSet::new(), "round {round}");
        }
        drop((held, user));
        assert_eq!(keys(&given, &handle), accessed(ID), "round {round}");
    }
    // What has no such lock is watched itself.
    fs::create_dir_all(dir.path().join("conf/user/uuid/c/y").join(ID)).expect("created");
    fs::write(dir.path().join("conf/user/uuid/c/y").join(ID).join("sub.db"), "subs").expect("written");
    assert!(keys(&given, &handle).contains(&format!("subs-id {ID}")));
}

#[test]
fn locks_take_over_when_watches_run_out_and_give_back() {
    // Fails when `locks` is settled.
    const INNER: &str = "SPOOLTAP_LOCKS_TAKE_OVER";
    if std::env::var_os(INNER).is_none() {
        let name = "capture::locks::locks_take_over_when_watches_run_out_and_give_back";
        let script = format!("echo 30 > /proc/sys/user/max_inotify_watches && exec \"$0\" --exact {name} --nocapture");
        return super::storm::in_own_user_namespace(&script, INNER);
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    for path in ["conf/lock", "conf/user", "conf/quota", "spool/user"] {
        fs::create_dir_all(dir.path().join(path)).expect("created");
    }
    let settings = Settings { come_back: Duration::from_millis(300), ..with_locks(dir.path(), "auto") };
    let (given, handle) = start(roots(dir.path()), settings);
    handle.wait_armed();
    let sources = || handle.stats().sources.into_iter().map(|one| one.source).collect::<Vec<_>>();
    assert_eq!(sources(), ["inotify"]);
    for n in 0..40 {
        fs::create_dir_all(dir.path().join(format!("spool/user/u{n}"))).expect("created");
    }
    let taken = eventually(Duration::from_secs(20), || (sources() == ["locks"]).then_some(()));
    assert!(taken.is_some(), "{:?}", handle.stats());
    handle.wait_armed();
    assert!(keys(&given, &handle).contains("rescan"), "what nobody saw is compared");
    drop(take(dir.path(), "user/u39.lock"));
    let told =
        eventually(Duration::from_secs(20), || keys(&given, &handle).contains("accessed user.u39").then_some(()));
    assert!(told.is_some(), "{:?}", handle.stats());
    fs::write("/proc/sys/user/max_inotify_watches", "1000").expect("raised");
    let back = eventually(Duration::from_secs(20), || (sources() == ["inotify"]).then_some(()));
    assert!(back.is_some(), "{:?}", handle.stats());
    handle.wait_armed();
    assert!(keys(&given, &handle).contains("rescan"), "what was done without a lock is compared");
    fs::write(dir.path().join("spool/user/u39/1."), "mail").expect("written");
    assert_eq!(keys(&given, &handle), BTreeSet::from(["mailbox user.u39".to_owned()]));
}

#[test]
fn a_store_whose_sessions_keep_their_locks_is_refused() {
    for (recording, expected) in [("2.5.11-a", Some("needs Cyrus 3.6 or later")), ("3.6.1-a", None)] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let recording = Recording::open(&store::fixtures().join("replays").join(recording)).expect("a recording");
        let conf = recording.unpack(dir.path()).expect("unpacks");
        let output = Command::new(env!("CARGO_BIN_EXE_spooltap"))
            .args(["events", "--for", "0", "--capture", "locks", "-C"])
            .arg(conf)
            .output()
            .expect("runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), expected.is_none(), "{said}");
        assert!(expected.is_none_or(|text| said.contains(text)), "{said}");
    }
}
