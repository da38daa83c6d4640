//! Eight writers over more mailboxes than there are watches, with a queue that overflows: what was read last of every
//! mailbox is what it holds in the end.
//!
//! The reader is as simple as can be: at a notice it reads the mailbox, at a `Rescan` all of them. Fails without relief for
//! unwatched directories. (That an overflow is told is shown by `a_full_queue_is_told_and_mended`; here directories that get
//! no watch ask for comparisons as well.) The kernel's queue cannot be made smaller for one process, so the reader stands still
//! until it is full.

use super::super::util::eventually;
use super::sources::settings;
use super::{Dice, roots};
use spooltap::capture;
use spooltap::model::{DirtyKey, MailboxRef, Notice, Scope};
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const WRITERS: u64 = 8;
/// Of all writers together.
const OPERATIONS: usize = 200_000;
const MAILBOXES: usize = 5_000;
/// Fewer than mailboxes.
const WATCHES: usize = 3_000;
/// The kernel's queue is to run over so often while they write.
const OVERFLOWS: u64 = 5;
/// Of so many operations, while nobody takes notices, more events come than the kernel's queue holds (16,384).
const UNHEARD: usize = 30_000;
/// For a machine that has much else to do.
const LONG: Duration = Duration::from_secs(180);
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
    below_of(spool, &spool.join("user"))
}

/// A mailbox and those below it.
fn below_of(spool: &Path, top: &Path) -> HashMap<String, Content> {
    let entries = walkdir::WalkDir::new(top).into_iter().flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_dir()).map(|entry| entry.path().to_owned());
    let dirs = dirs.filter(|dir| *dir != spool.join("user"));
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
        if notices.iter().any(|notice| notice.key == DirtyKey::Rescan(Scope::Everything)) {
            *last = all(spool);
            return;
        }
        for notice in notices {
            match notice.key {
                DirtyKey::Mailbox(MailboxRef::Name(name)) => {
                    let name = name.to_string();
                    match content(&place(spool, &name)) {
                        Some(found) => last.insert(name, found),
                        None => last.remove(&name),
                    };
                }
                DirtyKey::Rescan(Scope::Below(name)) => {
                    let (name, below) = (name.to_string(), format!("{name}."));
                    last.retain(|known, _| *known != name && !known.starts_with(&below));
                    last.extend(below_of(spool, &place(spool, &name)));
                }
                _ => {}
            }
        }
    }

    /// Bytes it holds itself, with what the allocator adds to a small piece.
    fn bytes(&self) -> usize {
        let last = self.last.lock().expect("lock");
        let files = last.values().flatten().map(|(name, content)| name.len() + content.len() + 128);
        files.sum::<usize>() + last.len() * 256
    }

    fn close(&self, closed: bool) {
        *self.closed.lock().expect("lock") = closed;
        self.opened.notify_all();
    }
}

/// How many operations may begin, how many have begun and are over.
#[derive(Default)]
struct Work {
    allowed: AtomicUsize,
    begun: AtomicUsize,
    over: AtomicUsize,
}

impl Work {
    /// Lets them go on up to this one, and waits for it.
    fn go_on(&self, upto: usize) {
        self.allowed.store(upto, Ordering::Relaxed);
        while self.over.load(Ordering::Relaxed) < upto {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn write(spool: &Path, writer: u64, work: &Work) {
    let mut dice = Dice(writer * 7919 + 1);
    let counted = |n: usize| spool.join(format!("user/u{n}"));
    loop {
        let n = work.begun.fetch_add(1, Ordering::Relaxed);
        if n >= OPERATIONS {
            return;
        }
        while n >= work.allowed.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
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
        work.over.fetch_add(1, Ordering::Relaxed);
    }
}

/// More events than the queue holds, in directories of which most are watched.
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
    let compare = |when: &str| {
        assert!(handle.drain(Instant::now() + LONG), "{when}: drained in time");
        let (last, truth) = (reader.last.lock().expect("lock"), all(&spool));
        let names: BTreeSet<&String> = last.keys().chain(truth.keys()).collect();
        let missed: Vec<&&String> = names.iter().filter(|name| last.get(**name) != truth.get(**name)).collect();
        assert!(missed.is_empty(), "{when}: missed {missed:?}; {:?}", handle.stats());
    };
    let before = memory("VmRSS");
    let work = Work::default();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (spool, work) = (&spool, &work);
            scope.spawn(move || write(spool, writer, work));
        }
        // Again and again nobody takes notices until the kernel's queue runs over: of what is written then nothing is told.
        let each = OPERATIONS / OVERFLOWS as usize;
        for round in 0..OVERFLOWS {
            reader.close(true);
            work.go_on(each * round as usize + UNHEARD);
            overflow(&spool);
            reader.close(false);
            work.go_on(each * (round as usize + 1));
            let counted = eventually(LONG, || (handle.stats().overflows > round).then_some(()));
            assert!(counted.is_some(), "round {round}: the queue was to run over: {:?}", handle.stats());
        }
    });
    // The rest is what this reader remembers, twice while it looks at all of it, and pieces that cannot be given back.
    let (grown, bound) = (memory("VmHWM").saturating_sub(before), (32 << 20) + 4 * reader.bytes());
    compare("a storm");
    assert!(grown < bound, "memory grew by {grown} bytes, the bound is {bound}");
    for name in all(&spool).keys() {
        fs::write(place(&spool, name).join("cyrus.index"), "after").expect("written");
    }
    compare("silence, then a change in each");
    let stats = handle.stats();
    handle.stop();
    assert!(stats.unwatched > 0, "watches were to run out: {stats:?}");
    println!(
        "{} events, {} overflows, {} directories without a watch; memory grew by {} of at most {} KiB",
        stats.events,
        stats.overflows,
        stats.unwatched,
        grown >> 10,
        bound >> 10
    );
}

/// A line of /proc/self/status, in bytes.
fn memory(line: &str) -> usize {
    let text = fs::read_to_string("/proc/self/status").expect("a file");
    let line = text.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':')).expect("a line");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

#[test]
fn no_storm_hides_a_change() {
    if std::env::var_os(INNER).is_some() {
        return storm();
    }
    // The program itself may lie below /tmp, which it is not to see.
    let script = format!(
        "exec 9<\"$0\" && mount -t tmpfs none /tmp && export TMPDIR=/tmp && echo {WATCHES} > /proc/sys/user/max_inotify_watches && exec /proc/self/fd/9 --exact capture::storm::no_storm_hides_a_change --nocapture"
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
