//! Stores of real servers put into an archive, and from there into an empty real 3.6.1: IMAP shows what it showed there.

use super::super::push::rules;
use super::super::util::store::{store, stores};
use super::super::util::{CyrusServer, Evidence, Options, Spooltap, cyrus, diff, snapshot};
use std::path::Path;
use std::process::{Command, Output};

fn ended(what: &str, output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{what}: {said}");
}

/// `spooltap push -A --from` without an imapd.conf: a machine that restores need not have one.
pub(crate) fn restore(archive: &str, server: &CyrusServer, state: &Path) -> Output {
    command(archive, server, state).output().expect("runs")
}

pub(super) fn command(archive: &str, server: &CyrusServer, state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spooltap"));
    command.env("SPOOLTAP_PASSWORD", cyrus::PASSWORD).args(["push", "-A", "--from", archive, "--state"]).arg(state);
    command.args(["--replica", &server.url()]);
    command
}

#[test]
fn every_store_comes_back_from_its_archive() {
    if !cyrus::installed() {
        return;
    }
    for name in stores() {
        let place = tempfile::tempdir().expect("directory");
        let source = store(&name);
        let archive = format!("file://{}", place.path().join("archive").display());
        let state = place.path().join("state");
        ended(&name, &Spooltap::once(&source.conf, &archive, &state, &["push", "-A"]).expect("runs"));
        let mut options = Options::new().names_of(&source.conf, &source.release);
        for partition in source.partitions() {
            options = options.set(&format!("partition-{partition}"), format!("@BASE@/{partition}"));
        }
        let server = CyrusServer::start(options).expect("starts");
        ended(&name, &restore(&archive, &server, &state));
        let shown = snapshot(&server, &source.users()).expect("is read");
        let differences = diff(&source.truth, &shown, &rules(&source.release));
        assert!(differences.is_empty(), "{name}:\n{}", differences.join("\n"));
        let mut evidence = Evidence::default();
        evidence.equal(&source.truth.0, "");
        evidence.put_down("restore", &name);
        // Said again it says nothing: what stands there is what was brought.
        let mut verify = Command::new(env!("CARGO_BIN_EXE_spooltap"));
        verify.env("SPOOLTAP_PASSWORD", cyrus::PASSWORD).args(["verify", "--from", &archive, "--state"]).arg(&state);
        ended(&name, &verify.args(["--replica", &server.url()]).output().expect("runs"));
        // The receipts of the live spool are not touched by a restore.
        ended(&name, &Spooltap::once(&source.conf, &archive, &state, &["scan"]).expect("runs"));
    }
}

#[test]
fn an_empty_place_is_no_source() {
    let place = tempfile::tempdir().expect("directory");
    let nowhere = format!("file://{}", place.path().join("nowhere").display());
    let target = format!("file://{}", place.path().join("target").display());
    for (from, exit, word) in [(nowhere.as_str(), 66, "no archive"), ("s4://x", 78, "unknown kind of source")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spooltap"));
        command.args(["push", "-A", "--from", from, "--replica", &target, "--state"]).arg(place.path());
        let output = command.output().expect("runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{from}: {said}");
        assert!(said.contains(word), "{said}");
    }
    assert!(!place.path().join("nowhere").exists() && !place.path().join("target").exists());
}
