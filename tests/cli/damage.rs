//! Damage at the source: the mailbox is named with file, offset and cure, its neighbours go on, and when the damage is
//! mended the rest follows.

use super::check;
use super::trouble::{differences, server_for};
use crate::util::{Spooltap, Store, cyrus, eventually, store};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// What is done to a file of the store; `None` removes it.
type Harm = fn(Vec<u8>) -> Option<Vec<u8>>;

/// Mailbox, its file, what is done to that, and what has to be said about it.
const HARMS: &[(&str, &str, Harm, &[&str])] = &[
    (
        "user.u1",
        "cyrus.index",
        flip_in_record,
        &["user/u1/cyrus.index", "record at byte 0xe4", "crc is", "reconstruct"],
    ),
    (
        "user.u3",
        "cyrus.index",
        cut,
        &["user/u3/cyrus.index", "at byte 0x", "file ends before its last record", "reconstruct"],
    ),
    (
        "user.u5",
        "cyrus.index",
        version_99,
        &["user/u5/cyrus.index", "at byte 0x8", "minor version 99 is not known", "not damaged"],
    ),
    ("user.u9", "cyrus.header", keep_ten_bytes, &["user/u9/cyrus.header", "at byte 0xa", "reconstruct"]),
    ("user.u6", "2.", flip_in_body, &["UID 2", "not the message of its record", "not sent", "restore the file"]),
    ("user.u7", "1.", remove, &["user/u7/1.", "missing", "reconstruct"]),
];

fn flip(mut bytes: Vec<u8>, at: usize) -> Option<Vec<u8>> {
    bytes[at] ^= 1;
    Some(bytes)
}

/// Inside the first record, behind a header of 128 bytes.
fn flip_in_record(bytes: Vec<u8>) -> Option<Vec<u8>> {
    flip(bytes, 128 + 50)
}

fn flip_in_body(bytes: Vec<u8>) -> Option<Vec<u8>> {
    flip(bytes, 3)
}

fn cut(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    bytes.truncate(bytes.len() - 40);
    Some(bytes)
}

/// The minor version is the third number of an index.
fn version_99(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    bytes[8..12].copy_from_slice(&99u32.to_be_bytes());
    Some(bytes)
}

fn keep_ten_bytes(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    bytes.truncate(10);
    Some(bytes)
}

fn remove(_: Vec<u8>) -> Option<Vec<u8>> {
    None
}

fn file(source: &Store, mailbox: &str, file: &str) -> PathBuf {
    source.dir.path().join("spool").join(mailbox.replace('.', "/")).join(file)
}

/// Does all harm, and gives back what was there before.
fn harm(source: &Store) -> Vec<(PathBuf, Vec<u8>)> {
    let harmed = HARMS.iter().map(|(mailbox, name, harm, _)| {
        let path = file(source, mailbox, name);
        let good = fs::read(&path).expect("is read");
        match harm(good.clone()) {
            Some(bad) => fs::write(&path, bad).expect("is written"),
            None => fs::remove_file(&path).expect("is removed"),
        }
        (path, good)
    });
    harmed.collect()
}

/// What is missing is only what was harmed, and what lies below it.
fn only_harmed_are_missing(differences: &[String]) {
    let harmed = |line: &&String| {
        !HARMS.iter().any(|(mailbox, ..)| line.contains(mailbox.strip_prefix("user.").expect("of a user")))
    };
    let others: Vec<&String> = differences.iter().filter(harmed).collect();
    assert!(others.is_empty(), "{others:#?}");
    assert!(
        HARMS.iter().all(|(mailbox, ..)| differences.iter().any(|line| line.contains(mailbox))),
        "{differences:#?}"
    );
}

#[test]
fn damaged_mailboxes_are_named_and_their_neighbours_arrive() {
    if !cyrus::installed() {
        return;
    }
    let source = store::store("2.5.11-a");
    let replica = server_for(&source);
    let state = source.dir.path().join("state");
    let push = || Spooltap::once(&source.conf, &replica.url(), &state, &["push", "-A"]).expect("runs");
    let good = harm(&source);
    let output = push();
    for (mailbox, _, _, says) in HARMS {
        check(mailbox, &output, 1, says);
        let text = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> =
            text.lines().filter(|line| line.starts_with(&format!("spooltap: {mailbox}: "))).collect();
        assert_eq!(lines.len(), 1, "one line for {mailbox}: {text}");
        assert!(says.iter().all(|part| lines[0].contains(part)), "{says:?} in {}", lines[0]);
    }
    only_harmed_are_missing(&differences(&source, &replica));
    for (path, bytes) in good {
        fs::write(path, bytes).expect("is written");
    }
    check("push after the cure", &push(), 0, &[]);
    assert_eq!(differences(&source, &replica), Vec::<String>::new());
}

#[test]
fn a_daemon_puts_damaged_mailboxes_in_quarantine_and_goes_on_when_they_are_mended() {
    if !cyrus::installed() {
        return;
    }
    let source = store::store("2.5.11-a");
    let replica = server_for(&source);
    let good = harm(&source);
    let mut running = Spooltap::run(&source.conf, &replica.url(), &source.dir.path().join("state")).expect("starts");
    running.wait_live(Duration::from_secs(20)).expect("is live");
    let failed = |running: &Spooltap, mailbox: &str| {
        let status = running.status();
        let failed = status["replicas"][0]["failed"].as_array().cloned().unwrap_or_default();
        failed.into_iter().find(|failure| failure["mailbox"] == mailbox)
    };
    for (mailbox, _, _, says) in HARMS {
        let failure = eventually(Duration::from_secs(40), || failed(&running, mailbox)).unwrap_or_else(|| {
            panic!("{mailbox} is not in {}: {}", running.status(), running.log_end(30));
        });
        let reason = failure["reason"].as_str().expect("has a reason");
        assert!(says.iter().all(|part| reason.contains(part)), "{says:?} in {reason}");
    }
    only_harmed_are_missing(&differences(&source, &replica));
    assert!(running.ended().is_none());
    for (path, bytes) in good {
        fs::write(path, bytes).expect("is written");
    }
    let last = || differences(&source, &replica);
    let equal = eventually(Duration::from_secs(60), || last().is_empty().then_some(()));
    assert!(equal.is_some(), "{:#?}\n{}", last(), running.log_end(30));
    assert!(running.terminate().expect("ends").success());
}

/// What differs are these messages, and what counts them.
fn only_these_are_missing(differences: &[String], lost: &[(&str, u32)]) {
    let counts = ["exists", "unseen", "recent", "seen", "vendor / size / shared"];
    for line in differences {
        let of_lost = lost.iter().any(|(mailbox, uid)| {
            let message = line.contains(&format!(" / {mailbox} / messages / {uid}"));
            message || counts.iter().any(|count| line.contains(&format!(" / {mailbox} / {count}")))
        });
        assert!(of_lost || line.contains(" / quota / "), "{line} in {differences:#?}");
    }
    for (mailbox, uid) in lost {
        let missing = |line: &&String| line.contains(&format!(" / {mailbox} / messages / {uid}"));
        assert!(differences.iter().any(|line| missing(&line)), "{mailbox} {uid}: {differences:#?}");
    }
}

/// Messages that are lost, with what becomes of their files.
const LOST: &[(&str, u32, Harm)] =
    &[("user.u1", 2, remove), ("user.u2", 12, cut), ("user.u3", 3, remove), ("user.u12", 4, remove)];

#[test]
fn a_lost_message_holds_up_nothing_else_of_its_mailbox() {
    if !cyrus::installed() {
        return;
    }
    // One with GUIDs in its indexes, one whose GUIDs are made from the files.
    for release in ["2.3.19-a", "2.5.11-a"] {
        let source = store::store(release);
        let replica = server_for(&source);
        let state = source.dir.path().join("state");
        let spooltap = |args: &[&str]| Spooltap::once(&source.conf, &replica.url(), &state, args).expect("runs");
        let path = |mailbox: &str, uid: u32| file(&source, mailbox, &format!("{uid}."));
        let good: Vec<Vec<u8>> =
            LOST.iter().map(|(name, uid, _)| fs::read(path(name, *uid)).expect("is read")).collect();
        for ((mailbox, uid, harm), good) in LOST.iter().zip(&good) {
            match harm(good.clone()) {
                Some(bad) => fs::write(path(mailbox, *uid), bad).expect("is written"),
                None => fs::remove_file(path(mailbox, *uid)).expect("is removed"),
            }
        }
        let lost: Vec<(&str, u32)> = LOST.iter().map(|(mailbox, uid, _)| (*mailbox, *uid)).collect();
        let said_of_each = |command: &[&str]| {
            let output = spooltap(command);
            check(release, &output, 1, &[]);
            let text = super::said(&output);
            for (mailbox, uid) in &lost {
                let file = format!("{}/{uid}.", mailbox.replace('.', "/"));
                let line = |line: &&str| line.contains(&format!("UID {uid}")) && line.contains(&file);
                assert!(text.lines().any(|text| line(&text)), "{release} {command:?}: {mailbox} UID {uid} in {text}");
            }
            assert!(!text.contains("made anew"), "{text}");
        };
        for push in [&["push", "-A"][..], &["push", "-A"], &["push", "-A", "--compare"]] {
            said_of_each(push);
            only_these_are_missing(&differences(&source, &replica), &lost);
        }
        said_of_each(&["verify"]);
        // Nobody remembers that they were held back.
        fs::remove_dir_all(&state).expect("is removed");
        said_of_each(&["push", "-A"]);
        if release != "2.3.19-a" {
            only_these_are_missing(&differences(&source, &replica), &lost);
        }
        for ((mailbox, uid), good) in lost.iter().zip(good) {
            fs::write(path(mailbox, *uid), good).expect("is written");
        }
        check("push after the cure", &spooltap(&["push", "-A"]), 0, &[]);
        check("verify after the cure", &spooltap(&["verify"]), 0, &[]);
        assert_eq!(differences(&source, &replica), Vec::<String>::new(), "{release}");
    }
}

#[test]
fn a_berkeley_database_is_named_with_its_cure() {
    let source = store::store("2.5.11-a");
    let dir = tempfile::tempdir().expect("directory");
    let archive = format!("file://{}", dir.path().join("archive").display());
    let push = || Spooltap::once(&source.conf, &archive, &dir.path().join("state"), &["push", "-A"]).expect("runs");
    let list = source.dir.path().join("conf/mailboxes.db");
    let mut page = vec![0; 4096];
    // DB_BTREEMAGIC and its version, on the first page.
    page[12..16].copy_from_slice(&0x0005_3162_u32.to_le_bytes());
    page[16..20].copy_from_slice(&9_u32.to_le_bytes());
    fs::write(&list, page).expect("is written");
    let says = ["conf/mailboxes.db", "Berkeley", "cvt_cyrusdb"];
    check("a Berkeley file", &push(), 66, &says);
    check("inspect", &super::bare(&["inspect", list.to_str().expect("UTF-8")]), 65, &says);
    let text = fs::read_to_string(&source.conf).expect("is read");
    fs::write(&source.conf, text + "\nmboxlist_db: berkeley\n").expect("is written");
    check("a Berkeley option", &push(), 66, &["imapd.conf", "mboxlist_db is berkeley", "cvt_cyrusdb"]);
}

#[test]
fn inspect_tells_what_is_wrong_with_a_file() {
    let source = store::store("2.5.11-a");
    let inspect = |path: &PathBuf| super::bare(&["inspect", path.to_str().expect("UTF-8")]);
    let index = file(&source, "user.u1", "cyrus.index");
    check("a good file", &inspect(&index), 0, &[]);
    check("no file", &inspect(&file(&source, "user.u1", "nothing")), 66, &["user/u1/nothing", "No such file"]);
    check("a directory", &inspect(&file(&source, "user.u1", "")), 65, &["is not a file"]);
    check("a message", &inspect(&file(&source, "user.u1", "1.")), 65, &["user/u1/1.", "not a file of Cyrus"]);
    harm(&source);
    for (mailbox, name, _, says) in HARMS.iter().filter(|(_, name, ..)| name.starts_with("cyrus.")) {
        check(mailbox, &inspect(&file(&source, mailbox, name)), 65, says);
    }
}
