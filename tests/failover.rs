//! Before a replica takes over: `drain` and `failover-check` against a real replica.

use super::util::{CyrusServer, Options, Rules, Spooltap, cyrus, diff, snapshot};
use std::path::Path;
use std::process::Output;
use std::time::Duration;

fn ask(source: &CyrusServer, replica: &CyrusServer, state: &Path, arguments: &[&str]) -> Output {
    Spooltap::once(&source.conf(), &replica.url(), state, arguments).expect("runs")
}

#[track_caller]
fn check(output: &Output, code: i32, word: &str) {
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(word), "{said}");
}

#[test]
fn go_and_no_go() {
    if !cyrus::installed() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let state = dir.path().join("state");
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let source = CyrusServer::start(Options::new().source().users(&["u1", "u2"])).expect("starts");
    let ask = |arguments: &[&str]| ask(&source, &replica, &state, arguments);
    check(&ask(&["drain"]), 3, "");
    check(&ask(&["failover-check"]), 1, "no daemon says how far it is");
    let mut run = Spooltap::run(&source.conf(), &replica.url(), &state).expect("starts");
    run.wait_live(Duration::from_secs(60)).expect("live");
    let deliver = |server: &CyrusServer, text: &str| {
        let text = format!("Subject: {text}\r\n\r\n{text}\r\n");
        server.lmtp().expect("connects").deliver(&["u1", "u2"], text.as_bytes()).expect("delivers");
    };
    for number in 0..20 {
        deliver(&source, &number.to_string());
    }
    check(&ask(&["drain", "--wait", "--timeout", "120"]), 0, "drained");
    let seen = |server: &CyrusServer| snapshot(server, &["u1", "u2"]).expect("is read");
    let differences = diff(&seen(&source), &seen(&replica), &Rules::live());
    // When a server wrote its files; and 3.6.1 makes that one when a user is asked for.
    let apart = |line: &&String| !line.contains("lastupdate") && !line.contains(".#sieve\" not expected");
    let differences: Vec<&String> = differences.iter().filter(apart).collect();
    assert!(differences.is_empty(), "{differences:?}");
    check(&ask(&["failover-check"]), 0, "GO");
    // What is paused is not over there.
    check(&ask(&["pause", "-u", "u1"]), 0, "");
    deliver(&source, "held back");
    check(&ask(&["drain", "--wait", "--timeout", "2"]), 75, "paused");
    check(&ask(&["failover-check", "--no-verify"]), 1, "NO-GO");
    check(&ask(&["resume"]), 0, "");
    check(&ask(&["drain", "--wait", "--timeout", "120"]), 0, "drained");
    check(&ask(&["failover-check", "--json"]), 0, "\"go\":true");
    // Somebody worked on the replica.
    deliver(&replica, "on the wrong side");
    check(&ask(&["failover-check"]), 1, "source and replica differ");
    check(&ask(&["drain", "--wait", "--timeout", "120"]), 0, "drained");
    assert!(run.terminate().expect("ends").success());
}
