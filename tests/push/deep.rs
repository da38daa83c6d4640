//! How far `verify` looks: checksums, records, the source's message files, the replica's. And what it says nobody carries.

use super::{Pair, said, succeeds};
use crate::util::{cyrus, store};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// The report of `verify --json`, and whether both sides are equal.
fn verified(pair: &Pair, more: &[&str]) -> (Value, bool) {
    let output = pair.spooltap(&[&["verify", "--json"], more].concat()).expect("runs");
    let line = output.stdout.split(|byte| *byte == b'\n').find(|line| line.starts_with(b"{")).unwrap_or_default();
    let report: Value = serde_json::from_slice(line).unwrap_or_else(|error| panic!("{error}: {}", said(&output)));
    (report["report"].clone(), output.status.success())
}

/// The file below that folder with this name and content.
fn find(folder: &Path, name: &str, content: &[u8]) -> PathBuf {
    let files = walkdir::WalkDir::new(folder).into_iter().flatten();
    let mut named = files.filter(|entry| entry.file_name() == name).map(walkdir::DirEntry::into_path);
    named.find(|path| fs::read(path).is_ok_and(|bytes| bytes == content)).expect("the replica has the file")
}

#[test]
fn each_depth_finds_what_the_one_before_cannot() {
    if !cyrus::installed() {
        return;
    }
    for release in ["2.3.19-a", "2.5.11-a"] {
        let pair = Pair::new(store::store(release)).expect("starts");
        succeeds(&pair.spooltap(&["push", "-A"]).expect("runs"), "push").expect("succeeds");
        let (report, equal) = verified(&pair, &["--fetch"]);
        assert!(equal, "{report}");
        let bytes = |field: &str| report[field].as_u64().expect("a number");
        assert!(bytes("hashed_bytes") > 10_000 && bytes("hashed_bytes") == bytes("fetched_bytes"), "{report}");

        let file = |mailbox: &str, name: &str| pair.source.dir.path().join("spool/user").join(mailbox).join(name);
        let here = file("u1", "3.");
        let good = fs::read(&here).expect("is read");
        let mut bad = good.clone();
        bad[10] ^= 1;
        fs::write(&here, &bad).expect("is written");
        // Changed in place, and removed, behind the back of the replica's server.
        let changed = find(pair.replica.base(), "12.", &fs::read(file("u2", "12.")).expect("is read"));
        fs::write(&changed, b"another message\r\n").expect("is written");
        let removed = find(pair.replica.base(), "1.", &fs::read(file("u3", "1.")).expect("is read"));
        fs::remove_file(&removed).expect("is removed");

        assert!(verified(&pair, &[]).1 && verified(&pair, &["--records"]).1, "{release}: no record has changed");
        let (report, equal) = verified(&pair, &["--bodies"]);
        let unreadable = report["unreadable"].as_array().expect("a list");
        assert!(!equal && unreadable.len() == 1 && report["differences"] == Value::Array(Vec::new()), "{report}");
        assert_eq!(unreadable[0][0], "user.u1 UID 3");
        assert!(unreadable[0][1].as_str().expect("text").contains("not the message of its record"), "{report}");
        fs::write(&here, &good).expect("is written");

        let (report, equal) = verified(&pair, &["--fetch", "-u", "u1", "u2", "u3"]);
        let found = report["differences"].as_array().expect("a list").iter();
        let mut found: Vec<(&str, &str)> =
            found.map(|one| (one["object"].as_str().expect("text"), one["what"].as_str().expect("text"))).collect();
        found.sort_unstable();
        let expected = [("user.u2 UID 12", "message file"), ("user.u3 UID 1", "message file missing on the replica")];
        assert!(!equal && found == expected, "{report}");
    }
}

#[test]
fn who_is_denied_services_is_said_not_to_be_replicated() {
    if !cyrus::installed() {
        return;
    }
    let pair = Pair::new(store::store("2.5.11-a")).expect("starts");
    succeeds(&pair.spooltap(&["push", "-A"]).expect("runs"), "push").expect("succeeds");
    fs::write(pair.source.dir.path().join("conf/user_deny.db"), "u1\t2\timap,pop3\tmoved\n").expect("is written");
    let output = pair.spooltap(&["verify"]).expect("runs");
    succeeds(&output, "verify").expect("succeeds");
    let text = said(&output);
    let line = text.lines().find(|line| line.starts_with("user u1: not replicated: ")).expect("is said");
    assert!(line.contains("conf/user_deny.db denies imap,pop3") && line.contains("copy the file"), "{line}");
}
