//! What the units take away is really gone, and replication works without it.

use super::unit::{Stage, Unit};
use super::{LONG, idle};
use crate::util::{CyrusServer, Options, Spooltap, cyrus, eventually};
use std::fs;

const MESSAGE: &[u8] = b"From: a@b\r\nSubject: s\r\n\r\nt\r\n";

fn deliver(source: &CyrusServer) {
    let answers = source.lmtp().expect("connects").deliver(&["u1"], MESSAGE).expect("delivers");
    assert!(answers[0].starts_with('2'), "{answers:?}");
}

fn arrive(replica: &CyrusServer, count: usize) {
    let there = || Some(replica.imap("u1").ok()?.ok("EXAMINE INBOX").ok()?.exists());
    eventually(LONG, || (there() == Some(count)).then_some(())).expect("arrives");
}

/// A line of /proc/PID/status.
fn proc_status(spooltap: &Spooltap, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/status", spooltap.pid())).expect("runs");
    let line = text.lines().find_map(|line| line.strip_prefix(key)).expect("is there");
    line.trim_start_matches(':').trim().to_owned()
}

/// Under a unit: replication works, the spool cannot be written, and no capability is left but these.
fn check(units: &[&str], capabilities: u64, refusal: &str) {
    let source = CyrusServer::start(Options::new().source().users(&["u1"])).expect("starts");
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let config = format!("imapd_conf = {:?}\nreplica = [{:?}]\n", source.conf(), replica.url());
    let stage = Stage::new(Unit::read(units), &config);
    let mut spooltap = stage.start(&[]);
    spooltap.wait_live(LONG).expect("is live");
    deliver(&source);
    arrive(&replica, 1);
    eventually(LONG, || idle(&stage.status().1["replicas"][0]).then_some(())).expect("is confirmed");
    for set in ["CapEff", "CapPrm", "CapBnd", "CapAmb"] {
        let found = u64::from_str_radix(&proc_status(&spooltap, set), 16).expect("hex");
        assert_eq!(found, capabilities, "{units:?} {set}");
    }
    assert_eq!(proc_status(&spooltap, "NoNewPrivs"), "1");

    // The same user, rights and mounts, and the will to do harm.
    let path = String::from_utf8(source.tool("mbpath", &["user.u1"]).expect("mbpath").stdout).expect("text");
    let index = format!("{}/cyrus.index", path.trim());
    let before = fs::read(&index).expect("reads");
    let message = format!("{}/1.", path.trim());
    let conf = source.conf().display().to_string();
    for harm in [
        format!("echo x >> {index}"),
        format!("rm -f {message}"),
        format!("echo x > {}/2.", path.trim()),
        format!("echo x >> {conf}"),
        format!("chmod 777 {message}"),
    ] {
        let output = stage.confined(&["/bin/sh", "-c", &harm]).output().expect("runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(refusal), "{units:?} {harm}: {said}");
    }
    // And reading it is what they may.
    let read = stage.confined(&["/bin/cat", &message]).output().expect("runs");
    assert!(read.status.success() && !read.stdout.is_empty(), "{}", String::from_utf8_lossy(&read.stderr));
    assert_eq!(fs::read(&index).expect("reads"), before);
    deliver(&source);
    arrive(&replica, 2);
    assert_eq!(spooltap.terminate().expect("ends").code(), Some(0));
}

#[test]
fn as_cyrus_nothing_can_be_written_and_no_capability_is_left() {
    if cyrus::installed() {
        check(&["spooltap.service"], 0, "Read-only file system");
    }
}

#[test]
fn as_its_own_user_it_may_read_everything_and_write_nothing() {
    if cyrus::installed() {
        const CAP_DAC_READ_SEARCH: u64 = 1 << 2;
        check(&["spooltap.service", "drop-ins/own-user.conf"], CAP_DAC_READ_SEARCH, "");
    }
}
