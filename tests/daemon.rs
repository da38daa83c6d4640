//! The daemon as an admin sees it: figures, orders, signals.

#[path = "daemon/clock.rs"]
mod clock;
#[path = "daemon/fuses.rs"]
mod fuses;
#[path = "daemon/ground.rs"]
mod ground;
#[path = "daemon/login.rs"]
mod login;
#[path = "daemon/logs.rs"]
mod logs;
#[path = "daemon/manual.rs"]
mod manual;
#[path = "daemon/metrics.rs"]
mod metrics;
#[path = "daemon/moves.rs"]
mod moves;
#[path = "daemon/murder.rs"]
mod murder;
#[path = "daemon/rights.rs"]
mod rights;
#[path = "daemon/scrub.rs"]
mod scrub;
#[path = "daemon/several.rs"]
mod several;
#[path = "daemon/tls.rs"]
mod tls;
#[path = "daemon/top.rs"]
mod top;
#[path = "daemon/unit.rs"]
mod unit;
#[path = "daemon/units.rs"]
mod units;
#[path = "daemon/watchdog.rs"]
mod watchdog;
#[path = "daemon/ways.rs"]
mod ways;

use super::util::{CyrusServer, Options, Spooltap, cyrus, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(30);

/// A real source, an archive as its replica, and a configuration file.
struct Lab {
    source: CyrusServer,
    dir: TempDir,
}

impl Lab {
    fn new(users: &[&str]) -> Self {
        let source = CyrusServer::start(Options::new().source().users(users)).expect("Cyrus starts");
        Self { source, dir: tempfile::tempdir().expect("directory") }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn replica(&self) -> String {
        format!("file://{}/archive", self.dir.path().display())
    }

    fn configure(&self, text: &str) {
        fs::write(self.dir.path().join("spooltap.toml"), text).expect("writes");
    }

    fn command(&self) -> Command {
        let mut command = Spooltap::command(&self.source.conf(), &self.state());
        command.arg("--config").arg(self.dir.path().join("spooltap.toml"));
        command
    }

    fn start(&self, environment: &[(&str, String)]) -> Spooltap {
        let mut command = self.command();
        command.args(["--replica", &self.replica(), "run"]).envs(environment.iter().cloned());
        let mut spooltap = Spooltap::spawn(command, &self.state()).expect("starts");
        spooltap.wait_live(LONG).expect("is live");
        spooltap
    }

    fn says(&self, words: &[&str]) -> Output {
        self.command().args(words).output().expect("runs")
    }

    /// Exit code and figures.
    fn status(&self) -> (i32, Value) {
        let output = self.says(&["status", "--json"]);
        (output.status.code().expect("a code"), serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    #[track_caller]
    fn becomes(&self, what: &str, good: impl Fn(i32, &Value) -> bool) -> Value {
        let mut last = (0, Value::Null);
        let found = eventually(LONG, || {
            last = self.status();
            good(last.0, &last.1["replicas"][0]).then(|| last.1.clone())
        });
        found.unwrap_or_else(|| panic!("not {what}: {} {}", last.0, last.1))
    }

    fn deliver(&self, user: &str) {
        let text = b"From: a@lab.test\r\nSubject: x\r\n\r\ny\r\n";
        let answers = self.source.lmtp().expect("connects").deliver(&[user], text).expect("delivers");
        assert!(answers[0].starts_with('2'), "{answers:?}");
    }

    #[track_caller]
    fn arrives(&self, user: &str) {
        assert!(eventually(LONG, || self.is_equal(user).then_some(())).is_some(), "{user} does not arrive");
    }

    fn is_equal(&self, user: &str) -> bool {
        let output = self.says(&["--replica", &self.replica(), "verify", "-u", user]);
        output.status.code() == Some(0)
    }
}

fn idle(replica: &Value) -> bool {
    ["pending", "running", "waiting", "held_back", "skipped"].iter().all(|key| replica[*key] == 0)
}

#[test]
fn status_tells_what_is_open_and_orders_are_obeyed_over_a_kill() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new(&["u1", "u2"]);
    lab.configure("");
    assert_eq!(lab.says(&["status"]).status.code(), Some(3), "nobody is there");
    let spooltap = lab.start(&[]);
    lab.deliver("u1");
    lab.becomes("equal", |code, replica| code == 0 && idle(replica) && replica["confirmed_total"].as_u64() > Some(0));
    let table = String::from_utf8(lab.says(&["status"]).stdout).expect("text");
    assert!(table.contains(&lab.replica()) && table.contains("inotify") && table.ends_with("ok\n"), "{table}");

    // What is paused is collected and ages; others are not held up, and a kill does not end the pause.
    assert_eq!(lab.says(&["pause", "-u", "u1"]).status.code(), Some(0));
    lab.deliver("u1");
    lab.deliver("u2");
    lab.becomes("held back", |code, replica| code == 1 && replica["held_back"].as_u64() > Some(0));
    lab.arrives("u2");
    assert!(!lab.is_equal("u1"));
    spooltap.kill9();
    let _spooltap = lab.start(&[]);
    let shown = lab.becomes("held back again", |code, replica| code == 1 && replica["held_back"].as_u64() > Some(0));
    assert!(shown["replicas"][0]["lag_seconds"].as_f64() > Some(0.0), "{shown}");
    assert_eq!(shown["orders"][0]["subject"]["user"], "u1", "{shown}");
    std::thread::sleep(Duration::from_millis(300));
    assert!(!lab.is_equal("u1"));
    assert_eq!(lab.says(&["resume", "-u", "u1"]).status.code(), Some(0));
    lab.becomes("equal again", |code, replica| code == 0 && idle(replica));
    lab.arrives("u1");

    // A damaged mailbox is in quarantine with its reason, can be given up, and heals.
    let path = lab.source.tool("mbpath", &["user.u2"]).expect("mbpath").stdout;
    let index = PathBuf::from(String::from_utf8(path).expect("text").trim()).join("cyrus.index");
    let good = fs::read(&index).expect("reads");
    fs::write(&index, [&good[..60], &[0xff; 400]].concat()).expect("writes");
    let shown = lab.becomes("in quarantine", |code, replica| code == 1 && replica["quarantined"].as_u64() > Some(0));
    let failure = &shown["replicas"][0]["failed"][0];
    assert_eq!(failure["mailbox"], "user.u2", "{shown}");
    assert!(failure["reason"].as_str().is_some_and(|reason| reason.contains("cyrus.index")), "{shown}");
    assert!(failure["next_try_seconds"].is_number(), "{shown}");
    assert_eq!(lab.says(&["skip", "-m", "user.u2"]).status.code(), Some(0));
    lab.becomes("skipped", |code, replica| {
        code == 1 && replica["skipped"].as_u64() > Some(0) && replica["lag_seconds"] == 0.0
    });
    fs::write(&index, good).expect("writes");
    assert_eq!(lab.says(&["retry", "-m", "user.u2"]).status.code(), Some(0));
    lab.becomes("healed", |code, replica| code == 0 && idle(replica));

    assert_eq!(lab.says(&["skip"]).status.code(), Some(64), "everything cannot be skipped");
    assert_eq!(lab.says(&["pause", "--replica", "csync://no@where"]).status.code(), Some(64));
    assert_eq!(lab.says(&["pause", "-m", "user.nobody"]).status.code(), Some(64));
}

#[test]
fn systemd_is_told_and_a_reload_loses_nothing() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new(&["u1"]);
    lab.configure("");
    let path = lab.dir.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).expect("binds");
    socket.set_read_timeout(Some(LONG)).expect("sets");
    let wait_for = |what: &str| {
        let mut buffer = [0; 4096];
        loop {
            let count = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{what}: {error}"));
            let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
            if text.lines().any(|line| line.starts_with(what)) {
                return text;
            }
        }
    };
    let environment = [("NOTIFY_SOCKET", path.display().to_string()), ("WATCHDOG_USEC", "10000000".to_owned())];
    let spooltap = lab.start(&environment);
    wait_for("READY=1");
    wait_for("WATCHDOG=1");
    assert!(wait_for("STATUS=live").contains("1 replicas"));
    let pid = spooltap.pid();
    let hangup = || kill(Pid::from_raw(pid), Signal::SIGHUP).expect("signals");

    lab.configure("lanes = 0\n");
    hangup();
    assert!(wait_for("RELOADING=1").contains("MONOTONIC_USEC="));
    wait_for("READY=1");
    assert!(spooltap.log().contains("the old one stays"), "{}", spooltap.log_end(5));

    lab.configure("lanes = 2\n");
    lab.deliver("u1");
    hangup();
    lab.deliver("u1");
    wait_for("RELOADING=1");
    // Who asks now waits for the answer.
    assert_eq!(lab.says(&["allow", "--minutes", "1"]).status.code(), Some(0));
    lab.deliver("u1");
    wait_for("READY=1");
    lab.deliver("u1");
    wait_for("STATUS=live");
    lab.becomes("equal", |code, replica| code == 0 && idle(replica));
    lab.arrives("u1");
    assert_eq!(lab.status().1["pid"], pid);
    assert_eq!(spooltap.terminate().expect("ends").code(), Some(0));
    wait_for("STOPPING=1");
    assert_eq!(lab.says(&["status"]).status.code(), Some(3));
}

/// What systemd does to a service that is restarted while it reloads: the stop is not lost in between.
#[test]
fn a_stop_in_the_middle_of_a_reload_is_obeyed() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new(&["u1"]);
    lab.configure("");
    for milliseconds in [0, 0, 0, 1, 2, 5, 10, 20, 50, 100] {
        let mut spooltap = lab.start(&[]);
        let tell = |signal| kill(Pid::from_raw(spooltap.pid()), signal).expect("signals");
        tell(Signal::SIGHUP);
        std::thread::sleep(Duration::from_millis(milliseconds));
        tell(Signal::SIGTERM);
        let ended = eventually(LONG, || spooltap.ended());
        let code = ended.and_then(|status| status.code());
        assert_eq!(code, Some(0), "after {milliseconds} ms: {}", spooltap.log_end(20));
    }
}

#[test]
fn with_nothing_to_do_it_writes_nothing_and_is_there_at_once() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new(&["u1"]);
    lab.configure("");
    let spooltap = lab.start(&[]);
    lab.arrives("u1");
    let written = || fs::metadata(lab.state().join("status.json")).and_then(|file| file.modified()).expect("is there");
    // Rates look back for a minute, and change so long.
    let rests = eventually(LONG * 4, || {
        let before = written();
        std::thread::sleep(Duration::from_secs(4));
        (written() == before).then_some(())
    });
    assert!(rests.is_some(), "{}", spooltap.status());
    // What the figures tell is not late because of it.
    lab.deliver("u1");
    let told = eventually(Duration::from_secs(3), || {
        spooltap.status()["replicas"][0]["confirmed_total"].as_u64().filter(|count| *count > 0)
    });
    assert!(told.is_some(), "{}", spooltap.status());
    assert!(spooltap.terminate().expect("ends").success());
}
