//! Removals that wait, a disk that is full, a replica that somebody else writes to, and what compression gains.

use super::{LONG, idle};
use crate::util::{CyrusServer, Options, Spooltap, apart, cyrus, eventually};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Lab {
    source: CyrusServer,
    replica: CyrusServer,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new(config: &str) -> Self {
        let source = Options::new().source().set("delete_mode", "immediate").users(&["u1"]);
        let source = CyrusServer::start(source).expect("starts");
        let replica = CyrusServer::start(Options::new().set("delete_mode", "immediate")).expect("starts");
        let dir = tempfile::tempdir().expect("directory");
        fs::create_dir(dir.path().join("state")).expect("makes");
        fs::write(dir.path().join("spooltap.toml"), config).expect("writes");
        Self { source, replica, dir }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn command(&self, state: &Path, words: &[&str]) -> Command {
        let mut command = Spooltap::command(&self.source.conf(), state);
        command.arg("--config").arg(self.dir.path().join("spooltap.toml"));
        command.args(["--replica", &self.replica.url()]).args(words);
        command
    }

    fn start(&self) -> Spooltap {
        let mut spooltap = Spooltap::spawn(self.command(&self.state(), &["run"]), &self.state()).expect("starts");
        spooltap.wait_live(LONG).expect("is live");
        spooltap
    }

    fn status(&self, state: &Path) -> (i32, Value) {
        let output = self.command(state, &["status", "--json"]).output().expect("runs");
        (output.status.code().expect("a code"), serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    #[track_caller]
    fn becomes(&self, state: &Path, what: &str, good: impl Fn(i32, &Value) -> bool) -> Value {
        let mut last = (0, Value::Null);
        let found = eventually(LONG, || {
            last = self.status(state);
            good(last.0, &last.1).then(|| last.1.clone())
        });
        found.unwrap_or_else(|| panic!("not {what}: {} {}", last.0, last.1))
    }

    fn deliver(&self, text: &str) {
        let message = format!("From: a@lab.test\r\nSubject: x\r\n\r\n{text}\r\n");
        let answers = self.source.lmtp().expect("connects").deliver(&["u1"], message.as_bytes()).expect("delivers");
        assert!(answers[0].starts_with('2'), "{answers:?}");
    }
}

fn is_idle(status: &Value) -> bool {
    idle(&status["replicas"][0])
}

#[test]
fn what_goes_at_the_source_stays_for_the_time_that_was_asked_for() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new("removal_delay_seconds = 3600\n");
    let mut admin = lab.source.admin().expect("logs in");
    let waiting = |status: &Value| status["replicas"][0]["removals_waiting"].as_u64().unwrap_or_default();
    for name in ["user.u1.gone", "user.u1.again"] {
        admin.ok(format!("CREATE {name}")).expect("creates");
        admin.ok(format!("SETACL {name} cyrus lrswipkxtecda")).expect("allows");
    }
    let spooltap = lab.start();
    lab.becomes(&lab.state(), "idle", |_, status| is_idle(status) && status["replicas"][0]["mailboxes"] == 3);
    for name in ["user.u1.gone", "user.u1.again"] {
        admin.ok(format!("DELETE {name}")).expect("deletes");
    }
    // They wait, and that is no fault and no lag.
    lab.becomes(&lab.state(), "waiting", |code, status| {
        code == 0 && is_idle(status) && waiting(status) == 2 && status["replicas"][0]["lag_seconds"] == 0.0
    });
    let there = |name: &str| lab.replica.admin().expect("logs in").ok(format!("STATUS {name} (MESSAGES)")).is_ok();
    assert!(there("user.u1.gone") && there("user.u1.again"));
    spooltap.kill9();
    let spooltap = lab.start();
    lab.becomes(&lab.state(), "waiting still", |_, status| is_idle(status) && waiting(status) == 2);
    // Another mailbox of the same name takes its place at once, and the old one waits elsewhere.
    admin.ok("CREATE user.u1.again").expect("creates");
    let four = |status: &Value| is_idle(status) && status["replicas"][0]["mailboxes"] == 4;
    lab.becomes(&lab.state(), "idle with the new one", |_, status| four(status) && waiting(status) == 2);
    assert!(there("user.u1.gone") && there("user.u1.again"));
    assert_eq!(spooltap.terminate().expect("ends").code(), Some(0));

    // They have waited for longer than this by now.
    fs::write(lab.dir.path().join("spooltap.toml"), "removal_delay_seconds = 1\n").expect("writes");
    std::thread::sleep(std::time::Duration::from_secs(1));
    let _spooltap = lab.start();
    lab.becomes(&lab.state(), "over", |code, status| code == 0 && is_idle(status) && waiting(status) == 0);
    assert!(!there("user.u1.gone") && there("user.u1.again"));
    let verified = || lab.command(&lab.state(), &["verify"]).output().expect("runs");
    let equal = eventually(LONG, || verified().status.success().then_some(()));
    assert!(equal.is_some(), "{}", String::from_utf8_lossy(&verified().stdout));
}

#[test]
fn a_replica_that_somebody_else_changes_is_told_and_what_compression_gains_is_shown() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new("compress = \"on\"\n");
    let _spooltap = lab.start();
    lab.deliver(&"the same line again and again\r\n".repeat(3000));
    let status = lab.becomes(&lab.state(), "idle", |_, status| {
        is_idle(status) && status["replicas"][0]["compressed"]["plain_bytes"].as_u64() > Some(80_000)
    });
    let both = &status["replicas"][0]["compressed"];
    assert!(both["sent_bytes"].as_u64() < both["plain_bytes"].as_u64().map(|plain| plain / 4), "{both}");
    let table = lab.command(&lab.state(), &["status"]).output().expect("runs");
    assert!(String::from_utf8_lossy(&table.stdout).contains(" to 1\n"), "{}", String::from_utf8_lossy(&table.stdout));
    assert_eq!(status["replicas"][0]["meddled"]["count"], 0, "{status}");

    // A client was let onto the replica.
    let mut client = lab.replica.imap("u1").expect("logs in");
    client.ok("SELECT INBOX").expect("selects");
    client.ok("STORE 1 +FLAGS (\\Flagged meddled)").expect("stores");
    lab.deliver("more");
    let status = lab.becomes(&lab.state(), "told", |code, status| {
        code == 1 && is_idle(status) && status["replicas"][0]["meddled"]["count"].as_u64() > Some(0)
    });
    assert_eq!(status["replicas"][0]["meddled"]["mailbox"], "user.u1");
    assert!(status["faults"].to_string().contains("somebody else has changed it"), "{status}");
    // What the daemon has written last is not in its state's file yet.
    let verified = || lab.command(&lab.state(), &["verify"]).output().expect("runs");
    let equal = eventually(LONG, || verified().status.success().then_some(()));
    assert!(equal.is_some(), "the source wins: {}", String::from_utf8_lossy(&verified().stdout));
}

#[test]
fn a_full_disk_is_told_and_what_was_not_written_is_when_there_is_room() {
    if !cyrus::installed() {
        return;
    }
    let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let lab = Lab::new(&format!("metrics_listen = \"{address}\"\n"));
    // A small file system of its own for the state, which only this process and its children see.
    let inner = lab.command(&lab.state(), &["run"]);
    let script = format!("mount -t tmpfs -o size=24m,mode=700 tmpfs '{}'", lab.state().display());
    let command = apart(&script, &inner);
    let mut spooltap = Spooltap::spawn(command, &lab.state()).expect("starts");
    spooltap.wait_live(LONG).expect("is live");
    let inside = PathBuf::from(format!("/proc/{}/root{}", spooltap.pid(), lab.state().display()));
    let faults = |status: &Value| status["faults"].to_string();
    lab.becomes(&inside, "short of room", |code, status| code == 2 && faults(status).contains("MB are free"));

    let mut filler = fs::File::create(inside.join("filler")).expect("creates");
    while filler.write_all(&[1; 4096]).is_ok() {}
    lab.becomes(&inside, "unwritable", |code, status| {
        lab.deliver("until nothing can be written");
        code == 2 && faults(status).contains("receipts are kept in memory")
    });
    drop(filler);
    // Replication goes on meanwhile.
    let count = |server: &CyrusServer| Some(server.imap("u1").ok()?.ok("EXAMINE INBOX").ok()?.exists());
    eventually(LONG, || (count(&lab.replica) == count(&lab.source)).then_some(())).expect("all arrive");
    fs::remove_file(inside.join("filler")).expect("removes");
    let healed = |status: &Value| is_idle(status) && status["ground"]["state_trouble"].is_null();
    lab.becomes(&inside, "healed", |_, status| healed(status));
    lab.deliver("and on it goes");
    lab.becomes(&inside, "idle", |_, status| healed(status));
    eventually(LONG, || (count(&lab.replica) == count(&lab.source)).then_some(())).expect("all arrive");
}
