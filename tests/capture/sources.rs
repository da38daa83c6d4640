//! What every source has to tell: one script over the whole table. And how sources stand in for each other.

use super::{Given, in_own_namespaces, roots, start};
use spooltap::capture::{CaptureHandle, SOURCES, Settings};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// A step of the script, and the keys it must give.
type Step = (&'static str, fn(&Path), &'static [&'static str]);

fn put(dir: &Path, path: &str, content: &str) {
    let path = dir.join(path);
    fs::create_dir_all(path.parent().expect("has one")).expect("created");
    fs::write(path, content).expect("written");
}

const SCRIPT: &[Step] = &[
    ("a delivery", |dir| put(dir, "spool/user/a/1.", "mail"), &["mailbox user.a"]),
    ("a flag, same size", |dir| put(dir, "spool/user/a/cyrus.index", "INDEX"), &["mailbox user.a"]),
    ("the same again, at once", |dir| put(dir, "spool/user/a/cyrus.index", "iNDEX"), &["mailbox user.a"]),
    (
        "a file rewritten beside and renamed over",
        |dir| {
            put(dir, "conf/user/a/a.sub.NEW", "subs");
            fs::rename(dir.join("conf/user/a/a.sub.NEW"), dir.join("conf/user/a/a.sub")).expect("renamed");
        },
        &["subs a"],
    ),
    ("one file of many users' in one directory", |dir| put(dir, "conf/user/a/anna.seen", "seen"), &["seen anna"]),
    ("the list", |dir| put(dir, "conf/mailboxes.db", "list"), &["mailbox-list"]),
    ("a tree at once", |dir| put(dir, "spool/user/b/x/y/1.", "mail"), &["mailbox user.b.x.y"]),
    ("a file in it", |dir| put(dir, "spool/user/b/x/y/2.", "mail"), &["mailbox user.b.x.y"]),
    (
        "a tree renamed",
        |dir| fs::rename(dir.join("spool/user/b/x"), dir.join("spool/user/b/z")).expect("renamed"),
        &["mailbox user.b.x", "mailbox user.b.x.y", "mailbox user.b.z", "mailbox user.b.z.y"],
    ),
    ("a file in the renamed tree", |dir| put(dir, "spool/user/b/z/y/3.", "mail"), &["mailbox user.b.z.y"]),
    (
        "a hard link from the staging area",
        |dir| {
            put(dir, "spool/stage./1", "mail");
            fs::hard_link(dir.join("spool/stage./1"), dir.join("spool/user/a/2.")).expect("linked");
        },
        &["mailbox user.a"],
    ),
    ("a message removed", |dir| fs::remove_file(dir.join("spool/user/a/1.")).expect("removed"), &["mailbox user.a"]),
    (
        "a tree removed",
        |dir| fs::remove_dir_all(dir.join("spool/user/b")).expect("removed"),
        &["mailbox user.b", "mailbox user.b.z", "mailbox user.b.z.y"],
    ),
    (
        "a mailbox removed and made again under its name",
        |dir| {
            fs::remove_dir_all(dir.join("spool/user/a")).expect("removed");
            put(dir, "spool/user/a/cyrus.index", "another");
        },
        &["mailbox user.a"],
    ),
    ("a root that was not there", |dir| put(dir, "meta/user/a/cyrus.index", "index"), &["mailbox user.a"]),
    ("a script", |dir| put(dir, "sieve/a/anna/x.script", "keep;"), &["sieve anna"]),
];

pub fn settings(source: &str) -> Settings {
    Settings { source: source.to_owned(), poll_every: Duration::from_millis(20), ..Settings::default() }
}

pub fn keys(given: &Given, handle: &CaptureHandle) -> BTreeSet<String> {
    assert!(handle.drain(Instant::now() + Duration::from_secs(20)), "drained in time");
    let given = std::mem::take(&mut *given.lock().unwrap_or_else(PoisonError::into_inner));
    given.into_iter().map(|notice| notice.key.to_string()).collect()
}

/// True when `keys` has this one or the comparison of something it is part of.
pub fn covers(keys: &BTreeSet<String>, key: &str) -> bool {
    let name = key.strip_prefix("mailbox ");
    let below = |scope: &str| name.is_some_and(|name| name == scope || name.starts_with(&format!("{scope}.")));
    keys.contains(key)
        || name.is_some_and(|name| keys.contains(&format!("accessed {name}")))
        || keys.contains("rescan")
        || keys.iter().any(|key| key.strip_prefix("rescan ").is_some_and(below))
}

/// Capture with this source, or `None` where it cannot work here: without the right to use it.
pub fn try_start(dir: &Path, source: &str) -> Option<(Given, CaptureHandle)> {
    let given = Given::default();
    let theirs = given.clone();
    let out = move |notices| theirs.lock().unwrap_or_else(PoisonError::into_inner).extend(notices);
    match spooltap::capture::start(
        roots(dir),
        Settings { locks: Ok(dir.join("conf/lock")), ..settings(source) },
        Box::new(out),
    ) {
        Ok(handle) => {
            handle.wait_armed();
            Some((given, handle))
        }
        Err(error) if source == "fanotify" => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{source}: {error}"),
    }
}

fn play(source: &str) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    put(dir.path(), "spool/user/a/cyrus.index", "index");
    put(dir.path(), "conf/user/a/a.sub", "");
    put(dir.path(), "conf/user/a/anna.seen", "");
    put(dir.path(), "conf/quota/a/user.a", "");
    put(dir.path(), "sieve/a/anna/x.script", "");
    let Some((given, handle)) = try_start(dir.path(), source) else { return };
    keys(&given, &handle);
    for (what, step, expected) in SCRIPT {
        step(dir.path());
        // As Cyrus does after whatever it does to a mailbox.
        for name in expected.iter().filter_map(|key| key.strip_prefix("mailbox ")) {
            put(dir.path(), &format!("conf/lock/{}.lock", name.replace('.', "/")), "");
        }
        let keys = keys(&given, &handle);
        for key in *expected {
            assert!(covers(&keys, key), "{source}: {what}: {key} is missing in {keys:?}");
        }
        // Who sees single changes does not cry for a comparison of everything. fanotify sees what other tests do as
        // well, and its own tests look closer.
        let quiet = !matches!(source, "scan" | "fanotify")
            && (source != "poll" || !what.contains("removed"))
            && !what.contains("root");
        assert!(!quiet || !keys.contains("rescan"), "{source}: {what}: {keys:?}");
    }
    handle.stop();
}

#[test]
fn every_source_tells_what_changed() {
    // Fails for `poll` without the stamps in its digest; for any source when a directory is listed before it is watched.
    // Here is no Cyrus that writes a log; `synclog` has tests of its own.
    for kind in SOURCES.iter().filter(|kind| kind.name != "synclog") {
        play(kind.name);
    }
    play("auto");
}

#[test]
fn poll_tells_by_itself() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    put(dir.path(), "spool/user/a/cyrus.index", "index");
    let (given, handle) = start(roots(dir.path()), settings("poll"));
    handle.wait_armed();
    put(dir.path(), "spool/user/a/cyrus.index", "INDEX");
    let begun = Instant::now();
    while given.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(20), "no notice without being asked");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_changed_is_told_again_while_its_stamp_may_hide_a_second_change() {
    // Fails without `changed_at`. Two changes within one stamp cannot be had at will, so what protects from them is shown.
    let dir = tempfile::tempdir().expect("a temporary directory");
    put(dir.path(), "spool/user/a/cyrus.index", "index");
    let (given, handle) = start(roots(dir.path()), settings("poll"));
    handle.wait_armed();
    put(dir.path(), "spool/user/a/cyrus.index", "INDEX");
    for _ in 0..3 {
        assert_eq!(keys(&given, &handle), BTreeSet::from(["mailbox user.a".to_owned()]));
    }
}

#[test]
fn an_idle_store_is_polled_without_a_notice() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    put(dir.path(), "spool/user/a/cyrus.index", "index");
    put(dir.path(), "conf/mailboxes.db", "list");
    let (given, handle) = start(roots(dir.path()), settings("poll"));
    handle.wait_armed();
    for _ in 0..3 {
        assert_eq!(keys(&given, &handle), BTreeSet::new());
    }
}

#[test]
fn how_far_changes_were_noticed_is_proven_and_not_assumed() {
    // Fails when a cookie counts as soon as it is made, or before what was read ahead of it has been handed on.
    for source in ["inotify", "fanotify", "poll"] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        put(dir.path(), "spool/user/a/cyrus.index", "index");
        let settings = Settings { cookies: Some(dir.path().join("cookies")), ..settings(source) };
        let given = Given::default();
        let gate = std::sync::Arc::new(std::sync::Mutex::new(()));
        let (theirs, their_gate) = (given.clone(), gate.clone());
        let out = move |notices| {
            let _open = their_gate.lock().unwrap_or_else(PoisonError::into_inner);
            theirs.lock().unwrap_or_else(PoisonError::into_inner).extend(notices);
        };
        let handle = match spooltap::capture::start(roots(dir.path()), settings, Box::new(out)) {
            Err(error) if source == "fanotify" => {
                println!("skipped: {error}");
                continue;
            }
            started => started.expect("starts"),
        };
        handle.wait_armed();
        let has = |key: &str| {
            given.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|notice| notice.key.to_string() == key)
        };
        let proven = |moment: Instant, limit: Duration| {
            super::super::util::eventually(limit, || {
                handle.prove();
                handle.seen_until().filter(|until| *until >= moment)
            })
        };
        for n in 0..5 {
            let closed = gate.lock().unwrap_or_else(PoisonError::into_inner);
            put(dir.path(), &format!("spool/user/b{n}/1."), "mail");
            let moment = Instant::now();
            assert_eq!(proven(moment, Duration::from_millis(100)), None, "{source}: nobody has it yet");
            drop(closed);
            assert!(proven(moment, Duration::from_secs(20)).is_some(), "{source}: no proof came");
            assert!(has(&format!("mailbox user.b{n}")), "{source}: it was said to be handed on");
        }
    }
}

#[test]
fn directories_without_a_watch_are_polled() {
    // Without relief nothing but a comparison every 30 s would tell of these.
    let script = r#"
        echo 6 > /proc/sys/user/max_inotify_watches
        "$SPOOLTAP" events -C "$CONF" --for 8 --notices &
        sleep 4
        for name in a b c; do echo x > "$DIR/spool/user/$name/1."; done
        wait
    "#;
    let Some(text) = in_own_namespaces(script) else { return };
    for key in ["mailbox user.a ", "mailbox user.b ", "mailbox user.c "] {
        assert!(text.contains(key), "{key}: {text}");
    }
    assert!(text.contains("raise fs.inotify.max_user_watches"), "{text}");
}

#[test]
fn what_was_polled_is_watched_again_when_instances_are_left() {
    // Fails without `come_back`, and when the better source is not asked for after a start without it.
    const INNER: &str = "SPOOLTAP_COME_BACK";
    if std::env::var_os(INNER).is_none() {
        let name = "capture::sources::what_was_polled_is_watched_again_when_instances_are_left";
        let script = format!("echo 0 > /proc/sys/user/max_inotify_instances && exec \"$0\" --exact {name} --nocapture");
        return super::storm::in_own_user_namespace(&script, INNER);
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    put(dir.path(), "spool/user/a/cyrus.index", "index");
    let settings = Settings { come_back: Duration::from_millis(300), ..settings("auto") };
    let (given, handle) = start(roots(dir.path()), settings);
    handle.wait_armed();
    let sources = || handle.stats().sources.into_iter().map(|one| one.source).collect::<Vec<_>>();
    assert_eq!(sources(), ["poll"]);
    put(dir.path(), "spool/user/a/1.", "mail");
    assert!(keys(&given, &handle).contains("mailbox user.a"));
    fs::write("/proc/sys/user/max_inotify_instances", "100").expect("raised");
    let back = super::super::util::eventually(Duration::from_secs(20), || (sources() == ["inotify"]).then_some(()));
    assert!(back.is_some(), "{:?}", handle.stats());
    handle.wait_armed();
    // What may have fallen between two looks of `poll` is compared.
    assert!(keys(&given, &handle).contains("rescan"));
    put(dir.path(), "spool/user/a/2.", "mail");
    assert_eq!(keys(&given, &handle), BTreeSet::from(["mailbox user.a".to_owned()]));
}
