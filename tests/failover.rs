//! Before a replica takes over: `drain` and `failover-check` against a real replica; and when it does.

#[path = "failover/failback.rs"]
mod failback;
#[path = "failover/promote.rs"]
mod promote;
#[path = "failover/runbook.rs"]
mod runbook;
#[path = "failover/storm.rs"]
mod storm;

use super::util::{CyrusServer, Options, Rules, Snapshot, Spooltap, cyrus, diff, snapshot, store};
use spooltap::replay::{Player, Recording, Speed};
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

#[test]
fn an_old_server_is_moved_while_it_is_at_work() {
    if !cyrus::installed() {
        return;
    }
    let recording = Recording::open(&store::fixtures().join("replays/2.3.19-a")).expect("recording");
    let dir = tempfile::tempdir().expect("directory");
    let conf = recording.unpack(&dir.path().join("store")).expect("unpacks");
    let replica = CyrusServer::start(Options::new().names_of(&conf, recording.version())).expect("starts");
    let state = dir.path().join("state");
    let ask = |arguments: &[&str]| Spooltap::once(&conf, &replica.url(), &state, arguments).expect("runs");

    let preflight = ask(&["migrate", "preflight", "--json"]);
    check(&preflight, 0, "\"2.3 or older\"");
    let report: serde_json::Value = serde_json::from_slice(&preflight.stdout).expect("is JSON");
    assert!(report["hashed_bytes"].as_u64() > Some(0) && report["hashed_bytes"] == report["message_bytes"], "{report}");
    assert_eq!(report["replicas"][0]["lacks"], serde_json::json!([]), "{report}");
    let nobody = "csync://repl@127.0.0.1:9";
    let unreached = Spooltap::once(&conf, nobody, &state, &["migrate", "preflight"]).expect("runs");
    check(&unreached, 1, "FAULT");

    // Work goes on during the first seed, and between it and the daemon.
    let mut player = Player::new(&recording, &dir.path().join("store"));
    let mut last = None;
    let mut play = |marks: usize| {
        for _ in 0..marks {
            match player.next_mark(Speed::Asap).expect("plays") {
                Some(mark) => last = Some(mark.truth),
                None => return false,
            }
        }
        true
    };
    std::thread::scope(|scope| {
        let seed = scope.spawn(|| ask(&["migrate", "seed"]));
        assert!(play(20));
        // Whatever changed under its hands is the daemon's to bring.
        assert!(seed.join().expect("ends").status.code().is_some());
    });
    check(&ask(&["migrate", "cut-over"]), 3, "");
    assert!(play(10));
    let mut run = Spooltap::run(&conf, &replica.url(), &state).expect("starts");
    run.wait_live(Duration::from_secs(60)).expect("is live");
    while play(10) {}
    let over = ask(&["migrate", "cut-over", "--timeout", "120", "--fetch"]);
    check(&over, 0, "GO");
    check(&over, 0, "way back");
    assert!(run.terminate().expect("ends").success());
    let truth = last.expect("has marks");
    let users: Vec<String> = truth["users"].as_object().expect("users").keys().cloned().collect();
    let shown = snapshot(&replica, &users).expect("is read");
    let differences = diff(&Snapshot::recorded(&truth), &shown, &Rules::recorded(recording.version()));
    assert!(differences.is_empty(), "{differences:#?}");
}
