//! Several replicas: users spread over them by rule, each with a pace of its own.

use super::{LONG, idle};
use crate::util::{CyrusServer, Options, Spooltap, cyrus, eventually};
use serde_json::Value;
use std::fs;
use std::path::Path;

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
