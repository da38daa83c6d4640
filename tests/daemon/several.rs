//! Several replicas: users spread over them by rule, each with a pace of its own.

use super::{LONG, idle};
use crate::util::{CyrusServer, Gate, Options, Spooltap, Workload, cyrus, eventually};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn messages(server: &CyrusServer, user: &str) -> Option<usize> {
    let mut imap = server.imap(user).ok()?;
    Some(imap.ok("EXAMINE INBOX").ok()?.exists())
}

fn deliver(source: &CyrusServer, user: &str, count: usize) {
    let mut lmtp = source.lmtp().expect("connects");
    for number in 0..count {
        let text = format!("From: a@lab.test\r\nSubject: {user} {number}\r\n\r\ny\r\n");
        let answers = lmtp.deliver(&[user], text.as_bytes()).expect("delivers");
        assert!(answers[0].starts_with('2'), "{answers:?}");
    }
}

#[test]
fn users_are_spread_by_rule_and_a_dead_replica_holds_up_nobody() {
    if !cyrus::installed() {
        return;
    }
    let source = CyrusServer::start(Options::new().source().users(&["u1", "u2", "u3"])).expect("starts");
    let near = CyrusServer::start(Options::new()).expect("starts");
    let mut far = CyrusServer::start(Options::new()).expect("starts");
    let dir = tempfile::tempdir().expect("directory");
    let (conf, state) = (dir.path().join("spooltap.toml"), dir.path().join("state"));
    let (a, b) = (near.url(), far.url());
    let text = format!(
        "replica = [{a:?}, {b:?}]\n[[route]]\nusers = [\"u1\"]\nto = [{a:?}]\n[[route]]\nusers = [\"u2*\"]\nspread = [{b:?}]\n"
    );
    fs::write(&conf, text).expect("writes");
    let command = |words: &[&str]| {
        let mut command = Spooltap::command(&source.conf(), &state);
        command.arg("--config").arg(&conf).args(words);
        command
    };
    let mut spooltap = Spooltap::spawn(command(&["run"]), &state).expect("starts");
    spooltap.wait_live(LONG).expect("is live");
    let status = |at: usize| {
        let output = command(&["status", "--json"]).output().expect("runs");
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        status["replicas"][at].clone()
    };
    ["u1", "u2", "u3"].iter().for_each(|user| deliver(&source, user, 2));
    let count = |server: &CyrusServer| ["u1", "u2", "u3"].map(|user| messages(server, user));
    eventually(LONG, || (count(&near) == [Some(2), None, Some(2)]).then_some(())).expect("arrives at one");
    eventually(LONG, || (count(&far) == [None, Some(2), Some(2)]).then_some(())).expect("arrives at the other");

    far.kill9();
    ["u1", "u2", "u3"].iter().for_each(|user| deliver(&source, user, 20));
    eventually(LONG, || (count(&near) == [Some(22), None, Some(22)]).then_some(())).expect("goes on");
    eventually(LONG, || idle(&status(0)).then_some(())).expect("is confirmed");
    let (one, other) = (status(0), status(1));
    assert!(one["fatal"].is_null() && one["lag_seconds"] == 0.0, "{one}");
    assert!(one["lag_p99_seconds"].as_f64() < Some(5.0), "{one}");
    assert!(other["fatal"].is_string() && other["lag_seconds"].as_f64() > Some(0.0), "{other}");
    // What waits is bounded by mailboxes, not by messages.
    let waits = ["pending", "running", "waiting"].iter().filter_map(|key| other[*key].as_u64()).sum::<u64>();
    assert!((1..=12).contains(&waits), "{other}");
    assert_eq!(command(&["status"]).output().expect("runs").status.code(), Some(2));

    far.boot().expect("starts again");
    // A dead replica is tried more and more rarely; an admin need not wait.
    command(&["retry"]).output().expect("runs");
    eventually(LONG, || (count(&far) == [None, Some(22), Some(22)]).then_some(())).expect("catches up");
    eventually(LONG, || (0..2).all(|at| idle(&status(at))).then_some(())).expect("is idle");
    let verified = command(&["verify"]).output().expect("runs");
    let said = String::from_utf8_lossy(&verified.stdout);
    assert!(verified.status.success() && said.matches("equal").count() == 2, "{said}");
    assert!(Path::new(&state).join("status.json").exists());
}

/// Half the users go to one replica each, the others to all three; one is killed and comes back, one is slow.
#[test]
fn three_replicas_with_a_dead_and_a_slow_one_end_equal_and_the_healthy_one_is_not_held_up() {
    if !cyrus::installed() {
        return;
    }
    let mut workload = Workload::new(11, 250);
    let source = CyrusServer::start(Options::new()).expect("starts");
    workload.prepare(&source).expect("prepares");
    let mut servers = [(); 3].map(|()| CyrusServer::start(Options::new()).expect("starts"));
    let gates = servers.each_ref().map(|server| Gate::before(server.csync()).expect("listens"));
    // Each of these to one replica; nobody else is named, so all others go to all.
    let routed = [("u1", 0), ("u3", 1), ("u5", 2), ("u7", 0)];
    let names = ["healthy", "dead", "slow"];
    let dir = tempfile::tempdir().expect("directory");
    let (conf, state) = (dir.path().join("spooltap.toml"), dir.path().join("state"));
    let mut text = String::new();
    for (name, gate) in names.iter().zip(&gates) {
        text += &format!("[[replica]]\nname = {name:?}\nurl = {:?}\n", gate.url());
    }
    for (user, at) in routed {
        text += &format!("[[route]]\nusers = [{user:?}]\nto = [{:?}]\n", names[at]);
    }
    fs::write(&conf, text).expect("writes");
    let command = |words: &[&str]| {
        let mut command = Spooltap::command(&source.conf(), &state);
        command.arg("--config").arg(&conf).args(words);
        command
    };
    let mut spooltap = Spooltap::spawn(command(&["run"]), &state).expect("starts");
    spooltap.wait_live(LONG).expect("is live");
    let status = || {
        let output = command(&["status", "--json"]).output().expect("runs");
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default()
    };
    gates[2].delay(Duration::from_millis(150));
    servers[1].kill9();
    let over = AtomicBool::new(false);
    let (mut worst_p50, mut slow_p50, mut most_waiting, mut dead_was_seen) = (0f64, 0f64, 0u64, false);
    std::thread::scope(|scope| {
        let (over, source, workload) = (&over, &source, &mut workload);
        scope.spawn(move || {
            workload.run(source);
            over.store(true, Ordering::Relaxed);
        });
        while !over.load(Ordering::Relaxed) {
            let now = status();
            let replica = |at: usize| &now["replicas"][at];
            let p50 = |at: usize| replica(at)["lag_p50_seconds"].as_f64().unwrap_or_default();
            (worst_p50, slow_p50) = (worst_p50.max(p50(0)), slow_p50.max(p50(2)));
            dead_was_seen |= replica(1)["fatal"].is_string();
            for at in 0..3 {
                let open = ["pending", "running", "waiting"].iter().filter_map(|key| replica(at)[*key].as_u64());
                most_waiting = most_waiting.max(open.sum());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    // The healthy one is done while the two others still have everything before them.
    eventually(LONG, || idle(&status()["replicas"][0]).then_some(())).expect("is confirmed");
    let now = status();
    assert!(dead_was_seen && !idle(&now["replicas"][1]), "{now}");
    // However slow this machine is, it has nothing of what holds up the slow one.
    let held_up = worst_p50 >= 2.0 && worst_p50 > slow_p50 / 2.0;
    assert!(!held_up, "half of all changes took {worst_p50} s to the healthy replica, {slow_p50} s to the slow one");
    // Mailboxes and users' data, however many messages: the workload makes some dozens of them.
    assert!(most_waiting < 500, "{most_waiting} items waited");
    let peak = now["memory"]["peak_bytes"].as_u64().expect("is told");
    assert!(peak < 300 << 20, "{peak} bytes of memory");

    servers[1].boot().expect("starts again");
    gates[1].cut();
    gates[2].delay(Duration::ZERO);
    command(&["retry"]).output().expect("runs");
    let limit = LONG * 3;
    let all = || (0..3).all(|at| idle(&status()["replicas"][at]));
    eventually(limit, || all().then_some(())).unwrap_or_else(|| panic!("is not idle: {}", status()));
    let verified = command(&["verify"]).output().expect("runs");
    let said = String::from_utf8_lossy(&verified.stdout);
    assert!(verified.status.success() && said.matches(": equal").count() == 3, "{said}");
    // And each of the routed ones is where he belongs, and nowhere else.
    for (at, server) in servers.iter().enumerate() {
        for (user, to) in routed {
            assert_eq!(messages(server, user).is_some(), to == at, "{user} at replica {at}");
        }
    }
}
