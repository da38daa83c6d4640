//! A source on another machine: its files are seen read-only through a file system whose events stay on the other side.
//! FUSE stands for the network: as over NFS, this kernel does not notice what is changed there.

use super::super::util::{CyrusServer, Options, Spooltap, cyrus, diff, eventually};
use super::super::util::{Rules, snapshot};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A mount that ends with the test.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_store_of_another_machine_is_followed_by_polling_and_not_touched() {
    if !cyrus::installed() || !bindfs() {
        return;
    }
    let users = ["u1", "u2"];
    let source = CyrusServer::start(Options::new().source().users(&users)).expect("starts");
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let dir = tempfile::tempdir().expect("directory");
    let (there, state) = (dir.path().join("there"), dir.path().join("state"));
    fs::create_dir(&there).expect("directory");
    let mount = Command::new("bindfs").args(["-o", "ro"]).arg(source.base()).arg(&there).output().expect("bindfs");
    assert!(mount.status.success(), "{}", String::from_utf8_lossy(&mount.stderr));
    let _mounted = Mounted(&there);
    assert!(fs::write(there.join("conf/x"), "").is_err(), "the mount is read-only");
    // The copy of imapd.conf names the places as they are mounted.
    let text = fs::read_to_string(source.conf()).expect("imapd.conf");
    let conf = dir.path().join("imapd.conf");
    fs::write(&conf, text.replace(&*source.base().to_string_lossy(), &there.to_string_lossy())).expect("writes");

    let mut lmtp = source.lmtp().expect("connects");
    let mut deliver = |user: &str, count: usize| {
        for number in 0..count {
            let text = format!("From: a@lab.test\r\nSubject: {number}\r\n\r\ny\r\n");
            let answers = lmtp.deliver(&[user], text.as_bytes()).expect("delivers");
            assert!(answers[0].starts_with('2'), "{answers:?}");
        }
    };
    deliver("u1", 3);
    let mut spooltap = Spooltap::run(&conf, &replica.url(), &state).expect("starts");
    spooltap.wait_live(Duration::from_secs(60)).expect("is live");
    let chosen = spooltap.log();
    assert!(chosen.contains("source=\"poll\""), "{chosen}");

    // Made on the other side while we look.
    let mut imap = source.imap("u1").expect("logs in");
    imap.ok("CREATE INBOX.New").expect("creates");
    imap.ok("SUBSCRIBE INBOX.New").expect("subscribes");
    imap.ok("SELECT INBOX").expect("selects");
    imap.ok("STORE 1 +FLAGS (\\Seen \\Flagged)").expect("stores");
    imap.ok("COPY 2 INBOX.New").expect("copies");
    deliver("u2", 20);
    let mut last = Vec::new();
    let equal = eventually(Duration::from_secs(60), || {
        let seen = |server: &CyrusServer| snapshot(server, &users).ok();
        last = diff(&seen(&source)?, &seen(&replica)?, &Rules::live());
        // When each server wrote its files.
        last.retain(|line| !line.contains("vendor / lastupdate"));
        last.is_empty().then_some(())
    });
    assert!(equal.is_some(), "{last:?}\n{}", spooltap.log_end(20));
    assert_eq!(spooltap.terminate().expect("ends").code(), Some(0));
}

fn bindfs() -> bool {
    if Command::new("bindfs").arg("--version").output().is_ok() {
        return true;
    }
    assert!(std::env::var_os("SPOOLTAP_REQUIRE_CYRUS").is_none(), "bindfs is not installed");
    let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED: needs bindfs, see tests/run\n");
    false
}
