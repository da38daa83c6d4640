//! What must not empty a replica: a partition that is gone, a mount point without its mount, a list that was cut, another
//! store in the place of the source. Nothing is removed, the reason is shown, and it heals when the store is back.

use super::{LONG, idle};
use crate::util::{
    CyrusServer, Options, Rules, Snapshot, Spooltap, Store, apart, beside, cyrus, diff, eventually, snapshot, store,
};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

struct Lab {
    source: Store,
    replica: CyrusServer,
    state: tempfile::TempDir,
    before: Snapshot,
    spooltap: Option<Spooltap>,
}

impl Lab {
    fn new() -> Self {
        let source = store("3.6.1-a");
        let mut options = Options::new().names_of(&source.conf, &source.release);
        for partition in source.partitions() {
            options = options.set(&format!("partition-{partition}"), format!("@BASE@/{partition}"));
        }
        let replica = CyrusServer::start(options).expect("starts");
        let state = tempfile::tempdir().expect("directory");
        let mut lab = Self { source, replica, state, before: Snapshot(Value::Null), spooltap: None };
        lab.start();
        lab.wait("equal", |_, replica| idle(replica) && replica["mailboxes"].as_u64() > Some(20));
        lab.before = lab.shown();
        lab
    }

    fn start(&mut self) {
        let state = self.state.path().join("state");
        let mut command = Spooltap::command(&self.source.conf, &state);
        command.args(["--replica", &self.replica.url(), "run"]);
        // What is mounted for it is for it alone.
        let mut spooltap = Spooltap::spawn(apart("true", &command), &state).expect("starts");
        spooltap.wait_live(LONG).expect("is live");
        self.spooltap = Some(spooltap);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.source.dir.path().join(name)
    }

    fn shown(&self) -> Snapshot {
        snapshot(&self.replica, &self.source.users()).expect("shows")
    }

    fn says(&self, words: &[&str]) -> (i32, Value) {
        let state = self.state.path().join("state");
        let output = Spooltap::command(&self.source.conf, &state).args(words).output().expect("runs");
        (output.status.code().expect("a code"), serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    #[track_caller]
    fn wait(&self, what: &str, good: impl Fn(&Value, &Value) -> bool) -> (i32, Value) {
        let mut last = (0, Value::Null);
        let found = eventually(LONG, || {
            last = self.says(&["status", "--json"]);
            good(&last.1, &last.1["replicas"][0]).then(|| last.clone())
        });
        found.unwrap_or_else(|| panic!("not {what}: {} {}", last.0, last.1))
    }

    /// Something has happened to the source, and this is said about it.
    #[track_caller]
    fn nothing_is_removed(&self, reason: &str) {
        // Everything is looked at, not only what the kernel told.
        let pid = nix::unistd::Pid::from_raw(self.spooltap.as_ref().expect("runs").pid());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1).expect("signals");
        self.wait(reason, |status, replica| {
            let failed = replica["failed"].as_array().into_iter().flatten().map(|failure| failure["reason"].as_str());
            failed.chain([status["source"]["trouble"].as_str()]).flatten().any(|text| text.contains(reason))
        });
        std::thread::sleep(Duration::from_millis(300));
        let differences = diff(&self.before, &self.shown(), &Rules::live());
        assert!(differences.is_empty(), "{reason}: {differences:#?}");
    }

    /// The source is as it was.
    #[track_caller]
    fn it_heals(&self) {
        // Failed items wait longer and longer; nobody has to wait for them here.
        let healed = eventually(LONG, || {
            self.says(&["retry"]);
            let (_, status) = self.says(&["status", "--json"]);
            let replica = &status["replicas"][0];
            (idle(replica) && replica["failed_total"] == 0).then_some(())
        });
        assert!(healed.is_some(), "{}", self.says(&["status", "--json"]).1);
        let differences = diff(&self.before, &self.shown(), &Rules::live());
        assert!(differences.is_empty(), "healed: {differences:#?}");
        let replica = self.replica.url();
        assert_eq!(self.says(&["--replica", &replica, "verify"]).0, 0);
    }
}

/// Exchanges what stands under two names.
fn swap(one: &Path, other: &Path) {
    let aside = one.with_extension("aside");
    fs::rename(one, &aside).expect("renames");
    fs::rename(other, one).expect("renames");
    fs::rename(&aside, other).expect("renames");
}

#[test]
fn what_befalls_the_source_empties_no_replica() {
    if !cyrus::installed() {
        return;
    }
    let mut lab = Lab::new();
    let (conf, spool) = (lab.path("conf"), lab.path("spool"));

    // rm -rf of a partition, for those who look at it right now.
    let away = lab.path("away");
    fs::rename(&spool, &away).expect("renames");
    lab.nothing_is_removed("its files are not on partition");
    // A mount point without its mount.
    fs::create_dir(&spool).expect("makes");
    lab.nothing_is_removed("its files are not on partition");
    fs::remove_dir(&spool).expect("removes");
    fs::rename(&away, &spool).expect("renames");
    lab.it_heals();
    // And an empty file system mounted where the spool was.
    let pid = lab.spooltap.as_ref().expect("runs").pid();
    beside(pid, &["mount", "-t", "tmpfs", "tmpfs"], &spool);
    lab.nothing_is_removed("its files are not on partition");
    beside(pid, &["umount"], &spool);
    lab.it_heals();
    // rm -rf, file by file.
    let copied = std::process::Command::new("cp").arg("-a").args([&spool, &away]).status().expect("runs");
    assert!(copied.success());
    fs::remove_dir_all(&spool).expect("removes");
    lab.nothing_is_removed("its files are not on partition");
    fs::rename(&away, &spool).expect("renames");
    lab.it_heals();

    // A list that was cut, emptied, lost.
    let list = conf.join("mailboxes.db");
    let good = fs::read(&list).expect("reads");
    for (bytes, reason) in [(&good[..good.len() / 2], "mailboxes.db"), (b"", "mailboxes.db")] {
        fs::write(&list, bytes).expect("writes");
        lab.nothing_is_removed(reason);
    }
    fs::remove_file(&list).expect("removes");
    lab.nothing_is_removed("mailboxes.db");
    fs::write(&list, &good).expect("writes");
    lab.it_heals();

    // Another store's list: whole, and about other mailboxes.
    let other = store("3.6.1-c");
    let fresh = conf.join("mailboxes.db.restored");
    fs::copy(other.dir.path().join("conf/mailboxes.db"), &fresh).expect("copies");
    fs::rename(&fresh, &list).expect("renames");
    lab.nothing_is_removed("have vanished from the source's list");
    let (code, status) = lab.says(&["status", "--json"]);
    assert!(code == 2 && status["replicas"][0]["fuse"].is_string(), "{code} {status}");
    fs::write(&fresh, &good).expect("writes");
    fs::rename(&fresh, &list).expect("renames");
    lab.it_heals();

    // Another store altogether.
    for name in ["conf", "spool"] {
        swap(&lab.path(name), &other.dir.path().join(name));
    }
    lab.nothing_is_removed("another directory than the one that was opened");
    // A restart takes it for what it is: another source, of which nothing is known.
    lab.spooltap.take().expect("runs").terminate().expect("ends");
    for name in ["conf", "spool"] {
        swap(&lab.path(name), &other.dir.path().join(name));
    }
    lab.start();
    lab.it_heals();
}
