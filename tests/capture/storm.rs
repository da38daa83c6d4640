//! Eight writers over more mailboxes than there are watches, with a queue that overflows: what was read last of every
//! mailbox is what it holds in the end.
//!
//! The reader is as simple as can be: at a notice it reads the mailbox, at a `Rescan` all of them. Fails without relief for
//! unwatched directories. (That an overflow is told is shown by `a_full_queue_is_told_and_mended`; here directories that get
//! no watch ask for comparisons as well.)

use super::sources::settings;
use super::{Dice, roots};
use spooltap::capture;
use spooltap::model::{DirtyKey, MailboxRef, Notice, Scope};
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const WRITERS: u64 = 8;
const OPERATIONS: usize = 1000;
const MAILBOXES: usize = 400;
/// Fewer than mailboxes.
const WATCHES: usize = 300;
const INNER: &str = "SPOOLTAP_STORM";

/// What can be seen of a mailbox.
type Content = Vec<(String, Vec<u8>)>;

/// `None` when it is not there. Names and contents; messages never change.
fn content(dir: &Path) -> Option<Content> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).ok()?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let bytes = if name.ends_with('.') { Vec::new() } else { fs::read(entry.path()).unwrap_or_default() };
            out.push((name, bytes));
        }
    }
    out.sort();
    Some(out)
}

fn place(spool: &Path, name: &str) -> PathBuf {
    spool.join(name.replace('.', "/"))
}

/// Every mailbox there is, by name.
fn all(spool: &Path) -> HashMap<String, Content> {
    let entries = walkdir::WalkDir::new(spool).min_depth(2).into_iter().flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_dir()).map(|entry| entry.path().to_owned());
    let name = |dir: &Path| dir.strip_prefix(spool).expect("below").to_string_lossy().replace('/', ".");
    dirs.filter_map(|dir| Some((name(&dir), content(&dir)?))).collect()
}

#[derive(Default)]
struct Reader {
    last: Mutex<HashMap<String, Content>>,
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Reader {
    fn read(&self, spool: &Path, notices: Vec<Notice>) {
        let mut closed = self.closed.lock().expect("lock");
        while *closed {
            closed = self.opened.wait(closed).expect("lock");
        }
        drop(closed);
        let mut last = self.last.lock().expect("lock");
        for notice in notices {
            match notice.key {
                DirtyKey::Mailbox(MailboxRef::Name(name)) => {
                    let name = name.to_string();
                    match content(&place(spool, &name)) {
                        Some(found) => last.insert(name, found),
                        None => last.remove(&name),
                    };
                }
                DirtyKey::Rescan(Scope::Everything | Scope::Below(_)) => *last = all(spool),
                _ => {}
            }
        }
    }

    fn close(&self, closed: bool) {
        *self.closed.lock().expect("lock") = closed;
        self.opened.notify_all();
    }
}

fn write(spool: &Path, writer: u64) {
    let mut dice = Dice(writer * 7919 + 1);
    let counted = |n: usize| spool.join(format!("user/u{n}"));
    for n in 0..OPERATIONS {
        let dir = counted(dice.roll(MAILBOXES));
        // Others remove and move what this one writes to: what fails does not matter.
        let _ = match dice.roll(20) {
            0..8 => fs::write(dir.join(format!("{writer}{n}.")), "mail"),
            8..14 => fs::write(dir.join("cyrus.index"), format!("{writer} {n}")),
            14..16 => fs::remove_file(dir.join(format!("{writer}{}.", dice.roll(n + 1)))),
            16 => fs::write(dir.join("cyrus.header.NEW"), format!("{n}"))
                .and_then(|()| fs::rename(dir.join("cyrus.header.NEW"), dir.join("cyrus.header"))),
            17 => fs::rename(&dir, counted(dice.roll(MAILBOXES))),
            18 => fs::create_dir_all(dir.join("Sub")).and_then(|()| fs::write(dir.join("Sub/1."), "mail")),
            _ => match dice.roll(4) {
                0 => fs::remove_dir_all(&dir),
                _ => fs::create_dir_all(&dir),
            },
        };
    }
}

/// More events than the queue holds, in directories of which some are watched.
fn overflow(spool: &Path) {
    let longest = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("a sysctl");
    let longest: usize = longest.trim().parse().expect("a number");
    for n in 0..longest {
        let path = spool.join(format!("user/u{}/x.", n % MAILBOXES));
        let _ = fs::write(&path, "").and_then(|()| fs::remove_file(&path));
    }
}

fn storm() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let spool = dir.path().join("spool");
    for n in 0..MAILBOXES {
        fs::create_dir_all(spool.join(format!("user/u{n}"))).expect("created");
    }
    let reader = Arc::new(Reader::default());
    let (theirs, top) = (reader.clone(), spool.clone());
    let out = move |notices| theirs.read(&top, notices);
    let handle = capture::start(roots(dir.path()), settings("auto"), Box::new(out)).expect("starts");
    handle.wait_armed();
    *reader.last.lock().expect("lock") = all(&spool);
    let write_all = |seed: u64| {
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let spool = &spool;
                scope.spawn(move || write(spool, seed + writer));
            }
        });
    };
    let compare = |when: &str| {
        assert!(handle.drain(Instant::now() + Duration::from_secs(180)), "{when}: drained in time");
        let (last, truth) = (reader.last.lock().expect("lock"), all(&spool));
        let names: BTreeSet<&String> = last.keys().chain(truth.keys()).collect();
        let missed: Vec<&&String> = names.iter().filter(|name| last.get(**name) != truth.get(**name)).collect();
        assert!(missed.is_empty(), "{when}: missed {missed:?}; {:?}", handle.stats());
    };
    write_all(0);
    compare("a storm");
    // Nobody takes notices for a while: the kernel's queue runs over, and of what is written then nothing is told.
    reader.close(true);
    overflow(&spool);
    write_all(WRITERS);
    reader.close(false);
    compare("an overflow");
    for name in all(&spool).keys() {
        fs::write(place(&spool, name).join("cyrus.index"), "after").expect("written");
    }
    compare("silence, then a change in each");
    let stats = handle.stats();
    handle.stop();
    assert!(stats.overflows > 0, "the queue was to run over: {stats:?}");
    assert!(stats.unwatched > 0, "watches were to run out: {stats:?}");
    let memory = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = memory.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default().to_owned();
    println!(
        "{} events, {} overflows, {} directories without a watch, {peak}",
        stats.events, stats.overflows, stats.unwatched
    );
}

#[test]
fn no_storm_hides_a_change() {
    if std::env::var_os(INNER).is_some() {
        return storm();
    }
    let script = format!(
        "echo {WATCHES} > /proc/sys/user/max_inotify_watches && exec \"$0\" --exact capture::storm::no_storm_hides_a_change --nocapture"
    );
    in_own_user_namespace(&script, INNER);
}

/// Runs this script with the test program as `$0`, as root of a user namespace of its own, with `inner` set.
pub fn in_own_user_namespace(script: &str, inner: &str) {
    let allowed = Command::new("unshare").args(["-Urm", "true"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        println!("skipped: `unshare -Urm` is not possible here");
        return;
    }
    let me = std::env::current_exe().expect("a path");
    let output = Command::new("unshare").args(["-Urm", "sh", "-ec", script]).arg(me).env(inner, "1").output();
    let output = output.expect("runs");
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    print!("{text}");
}
