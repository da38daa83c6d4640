//! Capture with the real kernel: whatever is done to a store, the keys of what changed are delivered.

mod fanotify;
mod live;
mod locks;
mod remote;
mod sources;
mod storm;
mod synclog;

use spooltap::capture::{self, CaptureHandle, Roots, SOURCES, Settings};
use spooltap::model::{DirtyKey, Notice};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A store's directories in a temporary place, with capture running.
struct Lab {
    dir: tempfile::TempDir,
    given: Arc<Mutex<Vec<Notice>>>,
    handle: CaptureHandle,
}

fn roots(dir: &Path) -> Roots {
    Roots {
        spool: vec![dir.join("spool")],
        meta: vec![dir.join("meta")],
        conf: dir.join("conf"),
        sieve: Some(dir.join("sieve")),
        ..Roots::default()
    }
}

impl Lab {
    fn new(prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for path in ["spool", "conf/user", "conf/quota", "sieve"] {
            fs::create_dir_all(dir.path().join(path)).expect("created");
        }
        prepare(dir.path());
        let (given, handle) = start(roots(dir.path()), Settings::default());
        handle.wait_armed();
        Self { dir, given, handle }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn write(&self, path: &str) {
        fs::write(self.path(path), path).expect("written");
    }

    fn mkdir(&self, path: &str) {
        fs::create_dir_all(self.path(path)).expect("created");
    }

    fn rename(&self, from: &str, to: &str) {
        fs::rename(self.path(from), self.path(to)).expect("renamed");
    }

    /// The keys given since the last call.
    fn keys(&self) -> BTreeSet<String> {
        assert!(self.handle.drain(Instant::now() + Duration::from_secs(20)), "drained in time");
        let given = std::mem::take(&mut *self.given.lock().unwrap_or_else(PoisonError::into_inner));
        given.into_iter().map(|notice| notice.key.to_string()).collect()
    }

    /// These keys are among those given since the last call.
    fn check(&self, expected: &[&str]) {
        let keys = self.keys();
        for key in expected {
            assert!(keys.contains(*key), "{key} is missing in {keys:?}");
        }
    }
}

pub type Given = Arc<Mutex<Vec<Notice>>>;

pub fn start(roots: Roots, settings: Settings) -> (Given, CaptureHandle) {
    let given = Given::default();
    let theirs = given.clone();
    let out = move |notices| theirs.lock().unwrap_or_else(PoisonError::into_inner).extend(notices);
    let handle = capture::start(roots, settings, Box::new(out)).expect("capture starts");
    (given, handle)
}

#[test]
fn a_directory_created_and_filled_at_once_is_reported_with_all_in_it() {
    // Fails when a directory that was just watched is not listed (`list` of `capture::inotify`).
    let lab = Lab::new(|_| ());
    for n in 0..50 {
        lab.mkdir(&format!("spool/user/u{n}/Sent/2024"));
        lab.write(&format!("spool/user/u{n}/Sent/2024/1."));
    }
    let keys = lab.keys();
    for n in 0..50 {
        assert!(keys.contains(&format!("mailbox user.u{n}.Sent.2024")), "u{n} is missing in {keys:?}");
    }
    for n in 0..50 {
        lab.write(&format!("spool/user/u{n}/Sent/2024/cyrus.index"));
        lab.check(&[&format!("mailbox user.u{n}.Sent.2024")]);
    }
}

#[test]
fn nested_directories_of_every_root_are_watched() {
    let lab = Lab::new(|_| ());
    lab.mkdir("conf/user/uuid/f/v/fvqul");
    lab.write("conf/user/uuid/f/v/fvqul/seen.db");
    lab.mkdir("spool/uuid/c/y/cyep0q");
    lab.write("spool/uuid/c/y/cyep0q/cyrus.index");
    lab.mkdir("sieve/u/u1");
    lab.write("sieve/u/u1/main.script");
    lab.mkdir("conf/domain/d/dom.test/user/u");
    lab.write("conf/domain/d/dom.test/user/u/u3.sub");
    lab.mkdir("conf/quota/u");
    lab.write("conf/quota/u/user.u1");
    lab.write("conf/mailboxes.db");
    lab.write("conf/annotations.db");
    lab.check(&[
        "seen-id fvqul",
        "mailbox-id cyep0q",
        "sieve u1",
        "subs u3@dom.test",
        "quota user.u1",
        "mailbox-list",
        "annotations",
    ]);
    lab.write("conf/user/uuid/f/v/fvqul/seen.db");
    lab.write("sieve/u/u1/main.script");
    lab.write("conf/domain/d/dom.test/user/u/u3.sub");
    lab.check(&["seen-id fvqul", "sieve u1", "subs u3@dom.test"]);
}

#[test]
fn a_renamed_tree_is_reported_under_both_names_and_followed() {
    let lab = Lab::new(|dir| fs::create_dir_all(dir.join("spool/user/u1/Foo/Kid/Deep")).expect("created"));
    lab.rename("spool/user/u1/Foo", "spool/user/u1/Bar");
    lab.check(&[
        "mailbox user.u1.Foo",
        "mailbox user.u1.Foo.Kid",
        "mailbox user.u1.Foo.Kid.Deep",
        "mailbox user.u1.Bar",
        "mailbox user.u1.Bar.Kid",
        "mailbox user.u1.Bar.Kid.Deep",
    ]);
    lab.write("spool/user/u1/Bar/Kid/Deep/1.");
    assert_eq!(lab.keys(), BTreeSet::from(["mailbox user.u1.Bar.Kid.Deep".to_owned()]));
}

#[test]
fn chains_and_swaps_of_renames_end_where_they_end() {
    // Fails when a watch that is met again keeps its old place in the table (`register`).
    let lab = Lab::new(|dir| {
        for path in ["a/kid", "b/kid"] {
            fs::create_dir_all(dir.join("spool/user").join(path)).expect("created");
        }
    });
    for _ in 0..200 {
        lab.rename("spool/user/a", "spool/user/x");
        lab.rename("spool/user/b", "spool/user/a");
        lab.rename("spool/user/x", "spool/user/b");
    }
    lab.check(&["mailbox user.a.kid", "mailbox user.b.kid"]);
    for name in ["a", "b"] {
        lab.write(&format!("spool/user/{name}/kid/1."));
        assert_eq!(lab.keys(), BTreeSet::from([format!("mailbox user.{name}.kid")]));
    }
    assert_eq!(lab.handle.stats().watches, 11, "no watch is left behind");
}

#[test]
fn a_directory_moved_out_and_in_again_is_forgotten_and_found() {
    // Fails without MOVE_SELF (`moved` of `capture::inotify`).
    let lab = Lab::new(|dir| fs::create_dir_all(dir.join("spool/user/a/kid")).expect("created"));
    let watches = lab.handle.stats().watches;
    lab.rename("spool/user/a", "elsewhere");
    lab.check(&["mailbox user.a", "mailbox user.a.kid"]);
    assert_eq!(lab.handle.stats().watches, watches - 2);
    lab.write("elsewhere/kid/1.");
    assert!(lab.keys().is_empty());
    lab.rename("elsewhere", "spool/user/z");
    lab.check(&["mailbox user.z", "mailbox user.z.kid"]);
    lab.write("spool/user/z/kid/2.");
    lab.check(&["mailbox user.z.kid"]);
}

#[test]
fn replaced_linked_and_deleted_files_are_touched() {
    // Fails when MOVED_TO of a file is not taken for a touch.
    let lab = Lab::new(|dir| {
        fs::create_dir_all(dir.join("spool/user/a")).expect("created");
        fs::create_dir_all(dir.join("spool/stage.")).expect("created");
        fs::create_dir_all(dir.join("conf/user/a")).expect("created");
    });
    lab.write("spool/stage./1-2-3");
    lab.write("spool/user/a/cyrus.cache");
    lab.write("spool/user/a/cyrus.header.NEW");
    lab.write("conf/user/a/a.sub.NEW");
    lab.write("conf/deliver.db");
    assert!(lab.keys().is_empty(), "all of this is noise");
    fs::hard_link(lab.path("spool/stage./1-2-3"), lab.path("spool/user/a/1.")).expect("linked");
    lab.check(&["mailbox user.a"]);
    lab.rename("spool/user/a/cyrus.header.NEW", "spool/user/a/cyrus.header");
    lab.check(&["mailbox user.a"]);
    lab.rename("conf/user/a/a.sub.NEW", "conf/user/a/a.sub");
    lab.check(&["subs a"]);
    fs::remove_file(lab.path("spool/user/a/1.")).expect("removed");
    lab.check(&["mailbox user.a"]);
    fs::remove_dir_all(lab.path("spool/user/a")).expect("removed");
    lab.check(&["mailbox user.a"]);
}

#[test]
fn a_directory_deleted_and_created_again_is_watched_again() {
    let lab = Lab::new(|dir| fs::create_dir_all(dir.join("spool/user/a")).expect("created"));
    for _ in 0..20 {
        fs::remove_dir_all(lab.path("spool/user")).expect("removed");
        lab.mkdir("spool/user/a");
    }
    lab.keys();
    lab.write("spool/user/a/cyrus.index");
    lab.check(&["mailbox user.a"]);
}

#[test]
fn a_root_may_come_go_and_come_again() {
    // Fails without IGNORED (`gone` of `capture::inotify`).
    let lab = Lab::new(|_| ());
    // `meta` and `conf/domain` did not exist at the start.
    lab.mkdir("meta/user/a");
    lab.write("meta/user/a/cyrus.index");
    lab.mkdir("conf/domain/d/dom/user/a");
    lab.write("conf/domain/d/dom/user/a/a.seen");
    lab.check(&["mailbox user.a", "seen a@dom"]);
    fs::remove_dir_all(lab.path("meta")).expect("removed");
    lab.check(&["rescan"]);
    lab.mkdir("meta/user/a");
    lab.write("meta/user/a/cyrus.header");
    lab.check(&["mailbox user.a"]);
    lab.write("meta/user/a/cyrus.index");
    lab.check(&["mailbox user.a"]);
    lab.rename("meta", "away");
    lab.check(&["rescan"]);
    lab.rename("away", "meta");
    lab.keys();
    lab.write("meta/user/a/cyrus.index");
    assert_eq!(lab.keys(), BTreeSet::from(["mailbox user.a".to_owned()]));
}

#[test]
fn a_whole_store_may_come_later() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let base = dir.path().join("var/lib/imap");
    let (given, handle) = start(roots(&base), Settings::default());
    handle.wait_armed();
    fs::create_dir_all(base.join("spool/user/a")).expect("created");
    fs::create_dir_all(base.join("conf")).expect("created");
    assert!(handle.drain(Instant::now() + Duration::from_secs(20)));
    fs::write(base.join("spool/user/a/1."), "x").expect("written");
    fs::write(base.join("conf/mailboxes.db"), "x").expect("written");
    assert!(handle.drain(Instant::now() + Duration::from_secs(20)));
    handle.stop();
    let keys: BTreeSet<String> =
        given.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|notice| notice.key.to_string()).collect();
    assert!(keys.contains("mailbox user.a") && keys.contains("mailbox-list"), "{keys:?}");
}

#[test]
fn a_linked_directory_is_walked_and_a_circle_is_not() {
    let lab = Lab::new(|dir| {
        fs::create_dir_all(dir.join("disk2/a/kid")).expect("created");
        fs::create_dir_all(dir.join("spool/user/b")).expect("created");
        std::os::unix::fs::symlink(dir.join("disk2/a"), dir.join("spool/user/a")).expect("linked");
        std::os::unix::fs::symlink(dir.join("spool"), dir.join("spool/user/b/circle")).expect("linked");
    });
    lab.write("spool/user/a/kid/1.");
    lab.check(&["mailbox user.a.kid"]);
    lab.write("spool/user/b/1.");
    lab.check(&["mailbox user.b"]);
}

#[test]
fn stop_hands_on_what_is_held_back() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir_all(dir.path().join("spool/user/a")).expect("created");
    let slow = Settings { quiet: Duration::from_secs(60), most: Duration::from_secs(60), ..Settings::default() };
    let (given, handle) = start(roots(dir.path()), slow);
    handle.wait_armed();
    fs::write(dir.path().join("spool/user/a/1."), "x").expect("written");
    handle.stop();
    let given = given.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(given.iter().any(|notice| notice.key.to_string() == "mailbox user.a"), "{given:?}");
}

#[test]
fn notices_come_by_themselves_soon() {
    let lab = Lab::new(|dir| fs::create_dir_all(dir.join("spool/user/a")).expect("created"));
    let begun = Instant::now();
    lab.write("spool/user/a/1.");
    while lab.given.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(10), "no notice without being asked");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn an_unknown_source_names_the_known_ones() {
    let settings = Settings { source: "telepathy".to_owned(), ..Settings::default() };
    let error = capture::start(Roots::default(), settings, Box::new(|_| ())).err().expect("refused");
    assert!(SOURCES.iter().all(|kind| error.to_string().contains(kind.name)), "{error}");
}

#[test]
fn the_tap_sees_noise_as_well() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir_all(dir.path().join("spool/user/a")).expect("created");
    type Seen = Vec<(String, Option<String>)>;
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let theirs = seen.clone();
    let tap: capture::Tap = Arc::new(move |event| {
        let file = event.path.file_name().unwrap_or_default().to_string_lossy();
        let line = (format!("{} {file}", event.kind), event.key.map(DirtyKey::to_string));
        theirs.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    });
    let (_, handle) = start(roots(dir.path()), Settings { tap: Some(tap), ..Settings::default() });
    handle.wait_armed();
    fs::write(dir.path().join("spool/user/a/cyrus.cache"), "x").expect("written");
    fs::write(dir.path().join("spool/user/a/1."), "x").expect("written");
    handle.stop();
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(seen.contains(&("create cyrus.cache".to_owned(), None)), "{seen:?}");
    assert!(seen.contains(&("create 1.".to_owned(), Some("mailbox user.a".to_owned()))), "{seen:?}");
}

#[test]
fn a_full_queue_is_told_and_mended() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir_all(dir.path().join("spool/user/a")).expect("created");
    // Nobody takes the notices for a while, as when the machine is out of breath; the kernel's queue fills.
    let (release, released) = std::sync::mpsc::channel::<()>();
    let given = Given::default();
    let theirs = given.clone();
    let out = move |notices: Vec<Notice>| {
        let _ = released.recv();
        theirs.lock().unwrap_or_else(PoisonError::into_inner).extend(notices);
    };
    let handle = capture::start(roots(dir.path()), Settings::default(), Box::new(out)).expect("capture starts");
    handle.wait_armed();
    let longest = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("a sysctl");
    let longest: usize = longest.trim().parse().expect("a number");
    if longest > 200_000 {
        println!("skipped: fs.inotify.max_queued_events is {longest}");
        drop(release);
        return;
    }
    fs::write(dir.path().join("spool/user/a/1."), "x").expect("written");
    std::thread::sleep(Duration::from_millis(100));
    for n in 0..=longest / 2 {
        let path = dir.path().join(format!("spool/user/a/{n}."));
        fs::write(&path, "").expect("written");
        fs::remove_file(&path).expect("removed");
    }
    // The kernel has no room to tell of these.
    fs::create_dir_all(dir.path().join("spool/user/b/kid")).expect("created");
    drop(release);
    let soon = || Instant::now() + Duration::from_secs(20);
    let taken = || std::mem::take(&mut *given.lock().unwrap_or_else(PoisonError::into_inner));
    assert!(handle.drain(soon()));
    assert!(taken().iter().any(|notice| notice.key.to_string() == "rescan"));
    assert!(handle.stats().overflows > 0);
    fs::write(dir.path().join("spool/user/b/kid/1."), "x").expect("written");
    assert!(handle.drain(soon()));
    let keys: Vec<String> = taken().iter().map(|notice| notice.key.to_string()).collect();
    assert_eq!(keys, ["mailbox user.b.kid"]);
}

/// Runs `script` with `SPOOLTAP`, `CONF` and `DIR` set, as root of namespaces of its own; gives stdout and stderr, or
/// `None` where that is not allowed here.
fn in_own_namespaces(script: &str) -> Option<String> {
    let allowed = Command::new("unshare").args(["-Urm", "true"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        println!("skipped: `unshare -Urm` is not possible here");
        return None;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().display();
    for name in ["a", "b", "c"] {
        fs::create_dir_all(dir.path().join("spool/user").join(name)).expect("created");
    }
    fs::create_dir_all(dir.path().join("conf")).expect("created");
    let conf = format!("configdirectory: {path}/conf\npartition-default: {path}/spool\nsievedir: {path}/sieve\n");
    fs::write(dir.path().join("imapd.conf"), conf).expect("written");
    let output = Command::new("unshare")
        .args(["-Urm", "sh", "-ec", script])
        .env("SPOOLTAP", env!("CARGO_BIN_EXE_spooltap"))
        .env("CONF", dir.path().join("imapd.conf"))
        .env("DIR", dir.path())
        .env_remove("SPOOLTAP_LOG")
        .output()
        .expect("runs");
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{text}");
    Some(text)
}

#[test]
fn without_enough_watches_the_rest_is_compared_and_the_cure_is_told() {
    let script = r#"
        echo 6 > /proc/sys/user/max_inotify_watches
        "$SPOOLTAP" events -C "$CONF" --for 1
    "#;
    let Some(text) = in_own_namespaces(script) else { return };
    assert_eq!(text.matches("raise fs.inotify.max_user_watches").count(), 1, "told once: {text}");
    assert!(text.contains("rescan user."), "{text}");
}

#[test]
fn doctor_names_each_bad_limit_with_its_cure() {
    let script = r#"
        echo 4 > /proc/sys/user/max_inotify_watches
        "$SPOOLTAP" doctor -C "$CONF" --state "$DIR/state" || test $? = 1
        echo 0 > /proc/sys/user/max_inotify_instances
        "$SPOOLTAP" doctor -C "$CONF" --state "$DIR/state" --json || test $? = 1
        test ! -e "$DIR/state"
    "#;
    let Some(text) = in_own_namespaces(script) else { return };
    assert!(text.contains("BAD     watches: user.max_inotify_watches is 4"), "{text}");
    assert!(text.contains("cure: sysctl -w user.max_inotify_watches=65536"), "{text}");
    let found: Vec<serde_json::Value> = text
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let instances = found.iter().find(|finding| finding["check"] == "instances").expect("looked at");
    assert_eq!(instances["state"], "bad");
    assert_eq!(instances["cure"], "sysctl -w user.max_inotify_instances=1024");
    assert!(
        found.iter().any(|finding| finding["check"] == "capture" && finding["found"].to_string().contains(": poll (")),
        "{text}"
    );
}

#[test]
fn without_an_instance_capture_says_so() {
    let script = r#"
        echo 0 > /proc/sys/user/max_inotify_instances
        "$SPOOLTAP" events -C "$CONF" --capture inotify --for 1 || test $? = 66
        "$SPOOLTAP" events -C "$CONF" --for 1 && echo served
    "#;
    let Some(text) = in_own_namespaces(script) else { return };
    assert!(text.matches("fs.inotify.max_user_instances").count() >= 2, "{text}");
    assert!(text.contains("served"), "auto finds another source: {text}");
}

#[test]
fn a_file_system_mounted_over_the_spool_is_watched() {
    let script = r#"
        "$SPOOLTAP" events -C "$CONF" --for 3 --notices &
        sleep 1
        mount -t tmpfs none "$DIR/spool"
        mkdir -p "$DIR/spool/user/new"
        sleep 0.5
        echo x > "$DIR/spool/user/new/1."
        sleep 0.5
        umount "$DIR/spool"
        sleep 0.5
        echo x > "$DIR/spool/user/a/1."
        wait
    "#;
    let Some(text) = in_own_namespaces(script) else { return };
    assert!(text.matches(" rescan ").count() >= 2, "{text}");
    for key in ["mailbox user.new ", "mailbox user.a "] {
        assert!(text.contains(key), "{key}: {text}");
    }
}

/// A small generator of numbers, the same for every run with the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }
}

fn directories(root: &Path) -> Vec<PathBuf> {
    let entries = walkdir::WalkDir::new(root).into_iter().flatten();
    entries.filter(|entry| entry.file_type().is_dir()).map(|entry| entry.path().to_owned()).collect()
}

/// Three threads make, fill, move and remove directories all over each other's.
fn storm(root: &Path, rounds: usize, seed: u64) {
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            scope.spawn(move || {
                let mut dice = Dice(seed * 3 + thread + 1);
                for _ in 0..rounds {
                    let mut place = || {
                        let mut path = root.to_owned();
                        (0..=dice.roll(4)).for_each(|_| path.push(["a", "b", "c", "d"][dice.roll(4)]));
                        path
                    };
                    let (one, two) = (place(), place());
                    // Most of these fail, because another thread was here before: that is the point.
                    let _ = match dice.roll(6) {
                        0 | 1 => fs::create_dir_all(&one),
                        2 => fs::create_dir_all(&one).and_then(|()| fs::write(one.join("1."), "x")),
                        3 | 4 => fs::rename(&one, &two),
                        _ => fs::remove_dir_all(&one),
                    };
                }
            });
        }
    });
}

#[test]
fn after_any_storm_every_directory_is_watched_under_its_name() {
    // Fails when a watch that is met again keeps its old place in the table (`register`), and without IGNORED (`gone`).
    for seed in 0..8 {
        let lab = Lab::new(|dir| fs::create_dir_all(dir.join("spool/user")).expect("created"));
        let root = lab.path("spool/user");
        let around = lab.handle.stats().watches;
        storm(&root, 1500, seed);
        fs::create_dir_all(root.join("a/b/c/d")).expect("created");
        lab.keys();
        let dirs = directories(&root);
        assert_eq!(lab.handle.stats().watches, around + dirs.len() as u64 - 1, "seed {seed}");
        for dir in dirs {
            fs::write(dir.join("2."), "x").expect("written");
            let below = dir.strip_prefix(lab.path("spool")).expect("below").to_string_lossy().replace('/', ".");
            assert_eq!(lab.keys(), BTreeSet::from([format!("mailbox {below}")]), "seed {seed}");
        }
    }
}
