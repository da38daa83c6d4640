//! The rolling log of a real Cyrus: consumed without losing or stealing a record, and written as Cyrus writes it.

use super::super::util::imap::{Imap, Line};
use super::super::util::{CyrusServer, Options, Rules, Spooltap, cyrus, diff, eventually, lock, snapshot};
use super::{Given, roots, start};
use spooltap::capture::synclog::append;
use spooltap::capture::{CaptureHandle, Settings};
use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

fn follow(dir: &Path) -> (Given, CaptureHandle) {
    let settings =
        Settings { source: "synclog".to_owned(), sync_log: Ok(dir.join("conf/sync/tap/log")), ..Settings::default() };
    start(roots(dir), settings)
}

fn keys(given: &Given, handle: &CaptureHandle) -> BTreeSet<String> {
    assert!(handle.drain(Instant::now() + Duration::from_secs(20)), "drained in time");
    let given = std::mem::take(&mut *given.lock().unwrap_or_else(PoisonError::into_inner));
    given.into_iter().map(|notice| notice.key.to_string()).collect()
}

fn lab() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir_all(dir.path().join("conf/sync/tap")).expect("created");
    dir
}

fn set(keys: &[&str]) -> BTreeSet<String> {
    keys.iter().map(|key| (*key).to_owned()).collect()
}

#[test]
fn a_log_that_a_dead_reader_left_is_read_first_and_then_the_new_one() {
    // What is on disk after a kill between the rename and the removal, with and without new records since.
    // Fails when a `log-run` that is there is renamed over, or the log behind it is forgotten.
    let dir = lab();
    fs::write(dir.path().join("conf/sync/tap/log-run"), "MAILBOX user.a\nSUB b user.a\n").expect("written");
    fs::write(dir.path().join("conf/sync/tap/log"), "META c\n").expect("written");
    let (given, handle) = follow(dir.path());
    handle.wait_armed();
    let expected = set(&["mailbox-list", "mailbox user.a", "subs b", "subs c", "seen c", "sieve c"]);
    assert_eq!(keys(&given, &handle), expected);
    assert_eq!(fs::read_dir(dir.path().join("conf/sync/tap")).expect("there").count(), 0);
    append(&dir.path().join("conf/sync/tap/log"), b"QUOTA user.a\nnonsense\n").expect("written");
    assert_eq!(keys(&given, &handle), set(&["quota user.a", "rescan"]));
}

#[test]
fn a_writer_that_opened_the_log_before_it_was_taken_is_waited_for() {
    // Fails without the lock in `Taken::take`: the file is read and removed before the record is in it.
    let dir = lab();
    let log = dir.path().join("conf/sync/tap/log");
    let mut writer = OpenOptions::new().append(true).create(true).open(&log).expect("opened");
    lock(&writer);
    let (given, handle) = follow(dir.path());
    // Renamed by now, and waiting for us.
    eventually(Duration::from_secs(10), || (!log.exists()).then_some(())).expect("the log is taken");
    writer.write_all(b"MAILBOX user.late\n").expect("written");
    drop(writer);
    handle.wait_armed();
    assert!(keys(&given, &handle).contains("mailbox user.late"));
}

#[test]
fn what_is_logged_before_it_is_committed_is_not_missed() {
    // Cyrus writes `ANNOTATION ""` and `SEEN` before it commits what they tell of. Fails without `LiveSpool::is_settled`:
    // the database is read too early, and nobody tells of it again.
    if !cyrus::installed() {
        return;
    }
    let limit = Duration::from_secs(60);
    let source = CyrusServer::start(Options::new().source().users(&["u1"]).set("sync_log", "yes")).expect("source");
    let said = |imap: &mut Imap, command: &str| {
        let reply = imap.ok(command).expect(command);
        reply.lines.iter().map(Line::text).collect::<String>()
    };
    let comment = |server: &CyrusServer| {
        let mut admin = server.imap(cyrus::ADMIN).expect("logs in");
        said(&mut admin, "GETMETADATA \"\" /shared/comment")
    };
    let set = |value: &str| {
        let mut admin = source.imap(cyrus::ADMIN).expect("logs in");
        admin.ok(format!("SETMETADATA \"\" (/shared/comment \"{value}\")")).expect("sets");
    };
    // The database before and after a transaction, which is then taken back.
    let database = source.base().join("conf/annotations.db");
    set("first");
    let before = fs::read(&database).expect("read");
    set("second");
    let after = fs::read(&database).expect("read");
    fs::write(&database, &before).expect("written");
    // Logged in before anybody has to wait for a lock.
    let mut admin = source.imap(cyrus::ADMIN).expect("logs in");

    let replica = CyrusServer::start(Options::new()).expect("replica");
    let state = tempfile::tempdir().expect("a directory");
    let state = state.path().join("state");
    let mut spooltap =
        Spooltap::run_with(&source.conf(), &replica.url(), &state, &["--capture", "synclog"]).expect("runs");
    spooltap.wait_live(limit).expect("live");
    eventually(limit, || comment(&replica).contains("first").then_some(())).expect("the first is there");

    let writer = OpenOptions::new().write(true).open(&database).expect("opened");
    lock(&writer);
    append(&source.base().join("conf/sync/log"), b"ANNOTATION \"\"\n").expect("logged");
    // Told after it, so the record has been looked at once this is there.
    admin.ok("SETQUOTA user.u1 (STORAGE 4711)").expect("sets");
    let mut seen = replica.imap(cyrus::ADMIN).expect("logs in");
    let told = eventually(limit, || {
        seen.run("GETQUOTA user.u1")
            .is_ok_and(|reply| reply.lines.iter().any(|line| line.text().contains("4711")))
            .then_some(())
    });
    assert!(told.is_some(), "{}", spooltap.log_end(20));
    assert!(comment(&replica).contains("first"));
    fs::write(&database, &after).expect("committed");
    drop(writer);
    let arrived = eventually(limit, || comment(&replica).contains("second").then_some(()));
    assert!(arrived.is_some(), "{}", spooltap.log_end(20));
    assert!(spooltap.terminate().expect("ends").success());
}

#[test]
fn records_written_while_they_are_read_all_arrive() {
    // Fails when `append` does not look whether its file is still the log.
    let dir = lab();
    let log = dir.path().join("conf/sync/tap/log");
    let (given, handle) = follow(dir.path());
    handle.wait_armed();
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let log = &log;
            scope.spawn(move || {
                for n in 0..100 {
                    let line = format!("MAILBOX user.w{writer}.n{n}\n");
                    append(log, line.as_bytes()).expect("appended");
                }
            });
        }
    });
    let keys = keys(&given, &handle);
    for writer in 0..4 {
        for n in 0..100 {
            assert!(keys.contains(&format!("mailbox user.w{writer}.n{n}")), "w{writer} n{n}");
        }
    }
}

#[test]
fn who_has_no_log_is_told_why() {
    let dir = lab();
    let settings =
        Settings { source: "synclog".to_owned(), sync_log: Err("sync_log is off".to_owned()), ..Settings::default() };
    let error = spooltap::capture::start(roots(dir.path()), settings, Box::new(|_| ())).err().expect("refused");
    assert!(error.to_string().contains("sync_log is off"), "{error}");
}

#[test]
fn records_are_those_of_cyr_synclog() {
    if !cyrus::installed() {
        return;
    }
    let server =
        CyrusServer::prepare(Options::new().source().set("sync_log", "yes").set("sync_log_channels", "\"\" tap"))
            .expect("prepared");
    cyrus::give_to_cyrus(server.base()).expect("given");
    let logs = ["conf/sync/log", "conf/sync/tap/log"].map(|log| server.base().join(log));
    let take = || {
        logs.each_ref()
            .map(|log| fs::read_to_string(log).inspect(|_| fs::remove_file(log).expect("removed")).unwrap_or_default())
    };
    for words in [
        ["-u", "jane"].as_slice(),
        &["-U", "jane"],
        &["-v", "jane.doe@dom.test"],
        &["-m", "user.jane.A \"quoted\" {name}"],
        &["-m", "dom.test!user.jane.caf\u{e9}"],
        &["-M", "user.jane.(x)"],
        &["-q", "user.jane"],
        &["-n", "user.jane"],
        &["-s", "jane", "4rmscy31"],
        &["-b", "jane", "user.jane.back\\slash"],
        &["APPEND user.jane\n"],
    ] {
        let real = server.tool("cyr_synclog", words).expect("runs");
        assert!(real.status.success(), "{words:?}: {real:?}");
        let expected = take();
        assert!(expected.iter().all(|log| !log.is_empty()), "{words:?}: {expected:?}");
        let words: Vec<&str> = words.iter().map(|word| word.trim_end()).collect();
        let ours = Command::new(env!("CARGO_BIN_EXE_spooltap"))
            .arg("-C")
            .arg(server.conf())
            .arg("synclog")
            .args(&words)
            .output()
            .expect("runs");
        assert!(ours.status.success(), "{words:?}: {ours:?}");
        assert_eq!(take(), expected, "{words:?}");
    }
    let ours = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spooltap"));
        command.arg("-C").arg(server.conf()).arg("synclog").args(words).output().expect("runs")
    };
    assert!(ours(&["--channel", "tap", "-u", "jane"]).status.success());
    assert_eq!(take(), ["", "USER jane\n"]);
    assert_eq!(ours(&["-x", "jane"]).status.code(), Some(64));
}

#[test]
fn two_channels_two_readers_and_nobody_misses_a_record() {
    if !cyrus::installed() {
        return;
    }
    let users = ["u1", "u2", "jane.doe"];
    let ours = CyrusServer::start(Options::new()).expect("replica");
    let theirs = CyrusServer::start(Options::new()).expect("replica");
    let options = Options::new().source().users(&users).set("sync_log", "yes").set("sync_log_channels", "tap other");
    let mut options = options.replicate_to(&theirs);
    for (key, value) in [("other_sync_repeat_interval", "1"), ("sync_repeat_interval", "1")] {
        options = options.set(key, value);
    }
    let source = CyrusServer::start(options).expect("source");
    let state = tempfile::tempdir().expect("a directory");
    let state = state.path().join("state");
    let arguments = ["--capture", "synclog", "-n", "tap"];
    let run = || {
        let mut spooltap = Spooltap::run_with(&source.conf(), &ours.url(), &state, &arguments).expect("runs");
        spooltap.wait_live(Duration::from_secs(20)).expect("live");
        spooltap
    };
    let mut spooltap = run();
    let all = source.tool("sync_client", &["-A", "-n", "other"]).expect("runs");
    assert!(all.status.success(), "{all:?}");
    // `-R` is `-r` that stays in the foreground.
    let _rolling = source.background("sync_client", &["-R", "-n", "other"]).expect("starts");
    let mut imap = source.imap("u1").expect("logs in");
    for n in 0..10 {
        let text = format!("Subject: {n}\r\n\r\nbody\r\n");
        let mut lmtp = source.lmtp().expect("connects");
        lmtp.deliver(&users, text.as_bytes()).expect("delivers");
        imap.ok(format!("CREATE INBOX.f{n}")).expect("creates");
        imap.ok(format!("SUBSCRIBE INBOX.f{n}")).expect("subscribes");
        imap.ok("SELECT INBOX").expect("selects");
        imap.ok("STORE 1 +FLAGS (\\Flagged)").expect("stores");
        imap.ok(format!("COPY 1 INBOX.f{n}")).expect("copies");
        if n % 3 == 2 {
            imap.ok(format!("RENAME INBOX.f{n} INBOX.g{n}")).expect("renames");
            imap.ok(format!("DELETE INBOX.f{}", n - 1)).expect("deletes");
            // Between any two steps: it is dead before it confirmed what it took.
            spooltap.kill9();
            spooltap = run();
        }
    }
    drop(imap);
    let expected = snapshot(&source, &users).expect("seen");
    for (name, replica) in [("spooltap", &ours), ("sync_client", &theirs)] {
        let mut last = Vec::new();
        let equal = eventually(Duration::from_secs(30), || {
            last = snapshot(replica, &users)
                .map_or_else(|error| vec![error.to_string()], |found| diff(&expected, &found, &Rules::live()));
            // A replica makes these itself when it is asked for scripts.
            // The last change of the index, which is of the replica's own making.
            last.retain(|line| !line.contains(".#sieve\" not expected") && !line.contains("vendor / lastupdate"));
            last.is_empty().then_some(())
        });
        assert!(equal.is_some(), "{name} missed something: {last:#?}");
    }
    assert!(spooltap.terminate().expect("ends").success());
}

/// Each system call by which a log is consumed, in its order: death comes before it. The last is the look for the next log.
const STEPS: &[(&str, u32)] = &[
    ("?rename,?renameat,?renameat2", 1),
    ("openat", 1),
    ("fcntl", 1),
    ("fcntl", 2),
    ("read", 1),
    ("read", 2),
    ("?unlink,unlinkat", 1),
];
const CONSUMED: (&str, u32) = ("?rename,?renameat,?renameat2", 2);

#[test]
fn killed_between_any_two_steps_of_the_consumption_no_record_is_lost() {
    if !cyrus::installed() {
        return;
    }
    let source = CyrusServer::start(Options::new().source().users(&["u1"]).set("sync_log", "yes")).expect("source");
    let dir = tempfile::tempdir().expect("a directory");
    let (state, url) = (dir.path().join("state"), format!("file://{}/archive", dir.path().display()));
    let log = source.base().join("conf/sync/log");
    let run = source.base().join("conf/sync/log-run");
    let arguments = ["--replica", &url, "--capture", "synclog"];
    let live = || {
        let mut spooltap = Spooltap::run_with(&source.conf(), &url, &state, &arguments[2..]).expect("runs");
        spooltap.wait_live(Duration::from_secs(60)).expect("live");
        let consumed = eventually(Duration::from_secs(60), || (!log.exists() && !run.exists()).then_some(()));
        assert!(consumed.is_some(), "{}", spooltap.log_end(20));
        spooltap
    };
    assert!(live().terminate().expect("ends").success());
    for (calls, when) in STEPS.iter().copied().chain([CONSUMED]) {
        source.lmtp().expect("connects").deliver(&["u1"], b"Subject: x\r\n\r\nx\r\n").expect("delivers");
        let mut traced = Command::new("strace");
        traced.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={calls}")]);
        traced.args(["-e", &format!("inject={calls}:signal=SIGKILL:when={when}"), "-P"]).arg(&log).arg("-P").arg(&run);
        let program = Spooltap::command(&source.conf(), &state);
        traced.arg(program.get_program()).args(program.get_args()).args(arguments).arg("run");
        traced.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let mut killed = Spooltap::spawn(traced, &state).expect("runs");
        let ended = eventually(Duration::from_secs(60), || killed.ended());
        assert!(ended.is_some(), "is killed before {calls} {when}: {}", killed.log_end(20));
        drop(killed);
        let left: String = [&log, &run].into_iter().filter_map(|path| fs::read_to_string(path).ok()).collect();
        assert_eq!(left.contains("user.u1\n"), (calls, when) != CONSUMED, "before {calls} {when}: {left:?}");
        let spooltap = live();
        let equal = eventually(Duration::from_secs(60), || {
            let mut verify = Spooltap::command(&source.conf(), &state);
            verify.args(["--replica", &url, "verify", "-u", "u1"]);
            verify.output().expect("runs").status.success().then_some(())
        });
        assert!(equal.is_some(), "after {calls} {when}: {}", spooltap.log_end(20));
        assert!(spooltap.terminate().expect("ends").success());
    }
}

#[test]
fn a_running_daemon_is_told_directly() {
    if !cyrus::installed() {
        return;
    }
    let source = CyrusServer::start(Options::new().source().users(&["u1"])).expect("source");
    let replica = CyrusServer::start(Options::new()).expect("replica");
    let state = tempfile::tempdir().expect("a directory");
    let (config, state) = (state.path().join("spooltap.toml"), state.path().join("state"));
    // By itself it would look in an hour.
    std::fs::write(&config, "scan_seconds = 3600\n").expect("written");
    let arguments = ["--config", &config.to_string_lossy(), "--capture", "scan"];
    let mut spooltap = Spooltap::run_with(&source.conf(), &replica.url(), &state, &arguments).expect("runs");
    spooltap.wait_live(Duration::from_secs(60)).expect("live");
    source.lmtp().expect("connects").deliver(&["u1"], b"Subject: x\r\n\r\nx\r\n").expect("delivers");
    // sync_log is off: nobody else could tell it.
    let output = Spooltap::command(&source.conf(), &state).args(["synclog", "-m", "user.u1"]).output().expect("runs");
    assert!(output.status.success(), "{output:?}");
    let arrived = eventually(Duration::from_secs(60), || {
        let shown = snapshot(&replica, &["u1"]).ok()?;
        diff(&snapshot(&source, &["u1"]).ok()?, &shown, &Rules::live())
            .iter()
            .all(|line| line.contains("vendor / lastupdate"))
            .then_some(())
    });
    assert!(arrived.is_some(), "{}", spooltap.log_end(20));
    assert!(spooltap.terminate().expect("ends").success());
    let alone = Spooltap::command(&source.conf(), &state).args(["synclog", "-m", "user.u1"]).output().expect("runs");
    assert!(!alone.status.success(), "neither a log nor a daemon: {alone:?}");
}

/// A source with a log and its replica, followed with the log watched beside `capture`.
fn cross_checked(capture: &str) -> (CyrusServer, CyrusServer, tempfile::TempDir, Spooltap) {
    let options = Options::new().source().users(&["u1", "u2", "u3"]).set("sync_log", "yes");
    let source = CyrusServer::start(options.set("sync_log_channels", "\"\" other")).expect("source");
    let replica = CyrusServer::start(Options::new()).expect("replica");
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("spooltap.toml");
    fs::write(&config, "cross_check = true\nscan_seconds = 3600\n").expect("written");
    let arguments = ["--config", &config.to_string_lossy(), "--capture", capture];
    let state = dir.path().join("state");
    let mut spooltap = Spooltap::run_with(&source.conf(), &replica.url(), &state, &arguments).expect("runs");
    spooltap.wait_live(Duration::from_secs(60)).expect("live");
    (source, replica, dir, spooltap)
}

fn counted(spooltap: &Spooltap, what: &str) -> u64 {
    spooltap.status()["source"]["cross_check"][what].as_u64().unwrap_or_default()
}

fn work_a_little(source: &CyrusServer) {
    let mut imap = source.imap("u1").expect("logs in");
    for n in 0..5 {
        source.lmtp().expect("connects").deliver(&["u1", "u2"], b"Subject: x\r\n\r\nx\r\n").expect("delivers");
        imap.ok(format!("CREATE INBOX.f{n}")).expect("creates");
        imap.ok(format!("SUBSCRIBE INBOX.f{n}")).expect("subscribes");
        // Changes nothing, and is logged as well.
        imap.ok("UNSUBSCRIBE INBOX.none").expect("is no error");
        imap.ok("SELECT INBOX").expect("selects");
        imap.ok("STORE 1 +FLAGS (\\Flagged)").expect("stores");
        imap.ok(format!("COPY 1 INBOX.f{n}")).expect("copies");
    }
    imap.ok("RENAME INBOX.f0 INBOX.g").expect("renames");
    imap.ok("DELETE INBOX.f1").expect("deletes");
    let mut admin = source.imap(cyrus::ADMIN).expect("logs in");
    admin.ok("SETQUOTA user.u1 (STORAGE 1000)").expect("sets");
    admin.ok("SETMETADATA \"\" (/shared/comment \"x\")").expect("sets");
}

#[test]
fn what_the_log_names_and_capture_does_not_show_is_counted_and_looked_at() {
    if !cyrus::installed() {
        return;
    }
    // A source that shows nothing for an hour. Fails without `missed` in `daemon::cross_check`: nothing arrives.
    let (source, replica, _dir, spooltap) = cross_checked("scan");
    work_a_little(&source);
    let mut last = Vec::new();
    let equal = eventually(Duration::from_secs(60), || {
        let expected = snapshot(&source, &["u1", "u2"]).ok()?;
        last = diff(&expected, &snapshot(&replica, &["u1", "u2"]).ok()?, &Rules::live());
        last.retain(|line| !line.contains(".#sieve\" not expected") && !line.contains("vendor / lastupdate"));
        last.is_empty().then_some(())
    });
    assert!(equal.is_some(), "{last:#?}\n{}", spooltap.log_end(20));
    // The figures are written once a second.
    let missed = eventually(Duration::from_secs(60), || (counted(&spooltap, "missed_total") > 0).then_some(()));
    assert!(missed.is_some(), "{}", spooltap.status());
    // Nothing of the log is consumed.
    for log in ["conf/sync/log", "conf/sync/other/log"] {
        let text = fs::read_to_string(source.base().join(log)).expect("is there");
        assert!(text.contains("MAILBOX user.u1.f4\n"), "{text}");
    }
    assert!(spooltap.terminate().expect("ends").success());
}

#[test]
fn capture_and_the_log_of_a_real_server_agree() {
    if !cyrus::installed() {
        return;
    }
    let (source, _replica, _dir, spooltap) = cross_checked("inotify");
    // Somebody else consumes it meanwhile, as `sync_client` does.
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (log, run) = (source.base().join("conf/sync/log"), source.base().join("conf/sync/log-run"));
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                if fs::rename(&log, &run).is_ok() {
                    lock_and_release(&run);
                    std::thread::sleep(Duration::from_millis(20));
                    fs::remove_file(&run).expect("removed");
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        work_a_little(&source);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let logged = eventually(Duration::from_secs(60), || (counted(&spooltap, "logged_total") >= 30).then_some(()));
    assert!(logged.is_some(), "{}", spooltap.status());
    // A change that is not in the log is counted behind all that came before: when it is, the rest is decided.
    let path = source.tool("mbpath", &["user.u3"]).expect("runs").stdout;
    let index = Path::new(String::from_utf8_lossy(&path).trim()).join("cyrus.index");
    let bytes = fs::read(&index).expect("read");
    fs::write(&index, bytes).expect("written");
    let counted_at = eventually(Duration::from_secs(60), || (counted(&spooltap, "unlogged_total") > 0).then_some(()));
    assert!(counted_at.is_some(), "{}", spooltap.status());
    assert_eq!(counted(&spooltap, "missed_total"), 0, "{}", spooltap.log_end(20));
    assert_eq!(counted(&spooltap, "unlogged_total"), 1, "{}", spooltap.status());
    assert!(spooltap.terminate().expect("ends").success());
}

/// Waits for a writer that opened it before it was renamed.
fn lock_and_release(path: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("opened");
    let free = eventually(Duration::from_secs(10), || {
        spooltap::spool::lock::attempt(&file, spooltap::spool::lock::Kind::Exclusive).ok().flatten().map(drop)
    });
    free.expect("is locked");
}
