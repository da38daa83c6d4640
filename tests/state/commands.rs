//! `spooltap state`, on the receipts of a recorded store in an archive.

use super::super::util::{Spooltap, store};
use serde_json::Value;
use std::path::Path;
use std::process::Output;

fn run(conf: &Path, state: &Path, arguments: &[&str]) -> Output {
    Spooltap::command(conf, state).args(arguments).output().expect("runs")
}

#[test]
fn receipts_are_checked_exported_and_dropped() {
    let store = store("2.5.11-a");
    let dir = tempfile::tempdir().expect("directory");
    let state = dir.path().join("state");
    let replica = format!("file://{}", dir.path().join("archive").display());
    let empty = run(&store.conf, &state, &["state", "check"]);
    assert!(empty.status.success() && !state.exists(), "looking makes nothing: {empty:?}");
    let pushed = Spooltap::once(&store.conf, &replica, &state, &["push", "-A"]).expect("runs");
    assert!(pushed.status.success(), "{pushed:?}");
    let check = || {
        let output = run(&store.conf, &state, &["state", "check", "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (output.status.code(), report)
    };
    let (code, report) = check();
    assert_eq!(code, Some(0), "{report}");
    let mailboxes = report["replicas"][&replica]["mailboxes"].as_u64().expect("a number");
    // Every mailbox of the recording's own account of the store has its receipt.
    let users = store.truth.0["users"].as_object().expect("users");
    let known: u64 = users.values().map(|user| user["mailboxes"].as_object().map_or(0, |all| all.len() as u64)).sum();
    assert!(known > 0);
    assert!(mailboxes >= known, "{mailboxes} of {known}: {report}");
    assert_eq!((report["unreadable"].as_u64(), report["closed"].as_bool()), (Some(0), Some(true)));
    let exported = run(&store.conf, &state, &["state", "export"]);
    let lines = exported.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let entries: Vec<Value> = lines.map(|line| serde_json::from_slice(line).expect("JSON")).collect();
    assert_eq!(entries.iter().filter(|entry| entry["kind"] == "mailbox").count() as u64, mailboxes);
    let other = run(&store.conf, &state, &["--replica", "file:///another", "state", "drop", "--json"]);
    assert_eq!(String::from_utf8_lossy(&other.stdout).trim(), r#"{"dropped":0}"#);
    let all = run(&store.conf, &state, &["state", "drop", "--json"]);
    let dropped: Value = serde_json::from_slice(&all.stdout).expect("JSON");
    assert_eq!(dropped["dropped"].as_u64(), Some(entries.len() as u64));
    assert_eq!(check().1["replicas"], serde_json::json!({}));
    // Receipts of another store say nothing about this one.
    let pushed = Spooltap::once(&store.conf, &replica, &state, &["push", "-A"]).expect("runs");
    assert!(pushed.status.success(), "{pushed:?}");
    let another = super::super::util::store("2.5.11-a");
    let foreign = run(&another.conf, &state, &["state", "check"]);
    assert_eq!(foreign.status.code(), Some(1), "{foreign:?}");
    assert!(String::from_utf8_lossy(&foreign.stdout).contains("another one"), "{foreign:?}");
}
