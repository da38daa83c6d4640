//! A replica that somebody else changed, where Cyrus's own client gives up or loses something: a folder deleted there, a
//! split brain, a name taken by a mailbox with another uniqueid, scripts changed there. And a source that names one
//! uniqueid twice.

use super::{Pair, listed_lines, said, succeeds};
use crate::util::{Imap, cyrus, store};
use serde_json::Value;
use spooltap::cyrus::db;
use std::fs;

/// A pair that is equal, of a store with Sieve scripts, and with annotations of messages and mailboxes.
fn pushed() -> Pair {
    let pair = Pair::new(store::store("2.5.11-b")).expect("starts");
    let before = pair.spooltap(&["verify"]).expect("runs");
    assert_eq!(before.status.code(), Some(1), "an empty replica is not equal: {}", said(&before));
    succeeds(&pair.spooltap(&["push", "-A"]).expect("runs"), "push").expect("succeeds");
    pair.equals_truth("after the first push").expect("is equal");
    pair
}

/// `verify` finds it and names it; the push brings it back.
fn heals(pair: &Pair, named: &str, push: &[&str]) {
    let verified = pair.spooltap(&["verify"]).expect("runs");
    assert_eq!(verified.status.code(), Some(1), "{}", said(&verified));
    assert!(said(&verified).contains(named), "{named} is not in: {}", said(&verified));
    succeeds(&pair.spooltap(push).expect("runs"), &format!("{push:?}")).expect("succeeds");
}

#[test]
fn the_recorded_stores_hold_what_cyruss_own_client_loses() {
    let count = |pick: &dyn Fn(&Value) -> usize| -> usize {
        let truths =
            store::stores().into_iter().filter(|name| name.starts_with("2.5")).map(|name| store::store(&name).truth);
        let users = truths.flat_map(|truth| truth.0["users"].as_object().cloned().unwrap_or_default());
        let mailboxes = users.flat_map(|(_, user)| user["mailboxes"].as_object().cloned().unwrap_or_default());
        mailboxes.map(|(_, mailbox)| pick(&mailbox)).sum()
    };
    let annotated = |mailbox: &Value| mailbox["annotations"].as_object().map_or(0, |all| all.len());
    let notes = |mailbox: &Value| {
        let messages = mailbox["messages"].as_object().into_iter().flat_map(|all| all.values());
        messages.filter(|message| message["annotations"].is_object()).count()
    };
    assert!(count(&annotated) > 10 && count(&notes) > 5, "{} {}", count(&annotated), count(&notes));
}

#[test]
fn folders_scripts_and_annotations_lost_on_the_replica_come_back() {
    if !cyrus::installed() {
        return;
    }
    let pair = pushed();
    let mut admin = pair.replica.admin().expect("logs in");
    admin.ok("DELETE user/a_b-c/with.dot").expect("is deleted");
    heals(&pair, "user.a_b-c.with^dot", &["push", "-u", "a_b-c"]);
    // Deleting moved it away under another name there, and moving it back counts as a change: modseqs never go down.
    only_ahead(&pair, &["user.a_b-c.with^dot"]);

    let mut u4 = pair.replica.imap("u4").expect("logs in");
    u4.ok("SETMETADATA INBOX (/private/comment NIL)").expect("is removed");
    heals(&pair, "user.u4", &["push", "-A", "--compare"]);

    let mut sieve = pair.replica.sieve("jane.doe@dom.test").expect("logs in");
    sieve.activate("").expect("is deactivated");
    sieve.delete("main").expect("is deleted");
    sieve.put("other", "keep;").expect("is stored");
    drop(sieve);
    heals(&pair, "jane.doe", &["push", "-A", "--compare"]);
    only_ahead(&pair, &["user.a_b-c.with^dot", "user.u4"]);
}

/// Equal but for the highest modseq of these mailboxes.
fn only_ahead(pair: &Pair, mailboxes: &[&str]) {
    let mut differences = pair.differences().expect("reads");
    differences.retain(|line| !mailboxes.iter().any(|name| line.contains(&format!(" / {name} / highestmodseq: "))));
    assert!(differences.is_empty(), "{}", listed_lines(&differences));
}

/// Messages that a mailbox shows, as text.
fn bodies(session: &mut Imap, mailbox: &str) -> String {
    session.ok(format!("EXAMINE {mailbox}")).expect("opens");
    let reply = session.ok("UID FETCH 1:* (UID FLAGS BODY.PEEK[])").expect("is read");
    reply.lines.iter().map(|line| line.text()).collect()
}

#[test]
fn a_split_brain_ends_as_the_source_has_it_and_loses_no_mail() {
    if !cyrus::installed() {
        return;
    }
    let pair = pushed();
    let mut u2 = pair.replica.imap("u2").expect("logs in");
    u2.ok("APPEND INBOX (\\Flagged) {24+}\r\nSubject: only there\r\n\r\nx").expect("is appended");
    u2.ok("SELECT INBOX").expect("opens");
    u2.ok("STORE 1 +FLAGS (\\Answered OnlyThere)").expect("is flagged");
    drop(u2);
    heals(&pair, "user.u2", &["push", "-u", "u2"]);
    let mut differences = pair.differences().expect("reads");
    let mut u2 = pair.replica.imap("u2").expect("logs in");
    let listed = u2.ok("LIST \"\" INBOX/replica-only-*").expect("is listed");
    let names: Vec<String> = listed.all("LIST").iter().filter_map(|line| Some(line.last()?.text())).collect();
    let [kept] = names.as_slice() else { panic!("one mailbox with what only the replica had: {names:?}") };
    let mail = bodies(&mut u2, kept);
    assert!(mail.contains("only there") && mail.contains("\\Flagged"), "{mail}");
    let internal = kept.replace("INBOX/", "user.u2.");
    differences.retain(|line| !line.contains(&format!("/ {internal}: not expected")));
    assert!(differences.is_empty(), "{}", listed_lines(&differences));
    let verified = pair.spooltap(&["verify"]).expect("runs");
    assert!(said(&verified).contains(&internal), "{}", said(&verified));
}

#[test]
fn a_name_taken_by_another_mailbox_stops_only_that_one() {
    if !cyrus::installed() {
        return;
    }
    let pair = Pair::new(store::store("2.5.11-a")).expect("starts");
    let mut admin = pair.replica.admin().expect("logs in");
    for name in ["user.u5", "user.u8"] {
        admin.ok(format!("CREATE {name}")).expect("is created");
        admin.ok(format!("SETACL {name} cyrus lrswipkxtecda")).expect("is allowed");
    }
    admin.ok("APPEND user.u8 {24+}\r\nSubject: only there\r\n\r\nx").expect("is appended");
    let taken = bodies(&mut admin, "user.u8");

    let output = pair.spooltap(&["push", "-A"]).expect("runs");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        said(&output).contains("name user.u8 is taken on the replica by a mailbox with uniqueid"),
        "{}",
        said(&output)
    );
    assert_eq!(bodies(&mut admin, "user.u8"), taken);
    let differences = pair.differences().expect("reads");
    let of_others: Vec<&String> = differences.iter().filter(|line| !line.contains("u8")).collect();
    assert!(!differences.is_empty() && of_others.is_empty(), "{}", listed_lines(&differences));

    admin.ok("RENAME user.u8 user.was8").expect("is renamed");
    // The folders below went with it.
    succeeds(&pair.spooltap(&["push", "-A", "--compare"]).expect("runs"), "the push after the cure").expect("succeeds");
    only_ahead(&pair, &["user.u8", "user.u8.Archive"]);
    assert_eq!(bodies(&mut admin, "user.was8"), taken);
}

/// Two mailboxes with one uniqueid: what copying a folder's files makes of a 2.5 store.
#[test]
fn a_uniqueid_named_twice_at_the_source_is_told_and_loses_nothing() {
    if !cyrus::installed() {
        return;
    }
    let pair = Pair::new(store::store("2.5.11-a")).expect("starts");
    let spool = pair.source.dir.path().join("spool/user/u7");
    fs::copy(spool.join("Trash/cyrus.header"), spool.join("Drafts/cyrus.header")).expect("is copied");
    let mut shared_id = String::new();
    edit_mailbox_list(&pair, |list| {
        let id = |name: &str| {
            let row = list.lines().find_map(|line| line.strip_prefix(&format!("{name}\t"))).expect("is listed");
            let (_, id) = row.split_once(" I ").expect("has an id");
            id.split(' ').next().expect("is a word").to_owned()
        };
        shared_id = id("user.u7.Trash");
        list.replace(&id("user.u7.Drafts"), &shared_id)
    });
    let told = ["user.u7.Trash", "has the same uniqueid", "as user.u7.Drafts", "run reconstruct"];
    for command in [&["push", "-A"][..], &["push", "-A"], &["scan"], &["verify"]] {
        let output = pair.spooltap(command).expect("runs");
        assert_eq!(output.status.code(), Some(1), "{command:?}: {}", said(&output));
        assert!(told.iter().all(|told| said(&output).contains(told)), "{}", said(&output));
    }
    let left_out = ["/ user.u7.Trash: missing", "quota / user.u7 / STORAGE", "vendor / uniqueid"];
    let mut differences = pair.differences().expect("reads");
    differences.retain(|line| !left_out.iter().any(|left_out| line.contains(left_out)));
    assert!(differences.is_empty(), "{}", listed_lines(&differences));

    // Reconstruct gives the second one an id of its own.
    let own = "07989895-f7e9-4172-bd89-8a6d5a1df048";
    let list = pair.source.dir.path().join("conf/mailboxes.db");
    let text = fs::read_to_string(&list).expect("is text");
    let row = text.lines().find(|line| line.starts_with("user.u7.Trash\t")).expect("is listed");
    fs::write(&list, text.replace(row, &row.replace(&shared_id, own))).expect("is written");
    let header = spool.join("Trash/cyrus.header");
    let bytes = fs::read(&header).expect("is read");
    let at = bytes.windows(shared_id.len()).position(|bytes| bytes == shared_id.as_bytes()).expect("names its id");
    fs::write(&header, [&bytes[..at], own.as_bytes(), &bytes[at + own.len()..]].concat()).expect("is written");
    succeeds(&pair.spooltap(&["push", "-A"]).expect("runs"), "the push after the cure").expect("succeeds");
    succeeds(&pair.spooltap(&["verify"]).expect("runs"), "verify").expect("succeeds");
    let mut differences = pair.differences().expect("reads");
    differences.retain(|line| !line.contains("vendor / uniqueid"));
    assert!(differences.is_empty(), "{}", listed_lines(&differences));
}

/// Rewrites the source's mailboxes.db as a flat file, made with Cyrus's own tool where it is none yet.
pub(super) fn edit_mailbox_list(pair: &Pair, edit: impl FnOnce(&str) -> String) {
    let source = pair.source.dir.path().join("conf/mailboxes.db");
    // Later releases write 0xff before a TAB of a value: a character for each byte.
    let edited = |bytes: Vec<u8>| {
        let list = edit(&bytes.into_iter().map(char::from).collect::<String>());
        let bytes: Vec<u8> = list.chars().map(|letter| u8::try_from(letter).expect("a byte")).collect();
        fs::write(&source, bytes).expect("is written");
    };
    let bytes = fs::read(&source).expect("a list");
    let kind = match db::sniff(&bytes) {
        db::Kind::Twoskip => "twoskip",
        db::Kind::Skiplist => "skiplist",
        _ => return edited(bytes),
    };
    let [old, new] = ["list.old", "list.new"].map(|name| pair.replica.base().join("conf").join(name));
    fs::copy(&source, &old).expect("is copied");
    cyrus::give_to_cyrus(&old).expect("is given away");
    let (from, to) = (old.to_str().expect("UTF-8"), new.to_str().expect("UTF-8"));
    let output = pair.replica.tool("cvt_cyrusdb", &[from, kind, to, "flat"]).expect("runs");
    succeeds(&output, "cvt_cyrusdb").expect("succeeds");
    edited(fs::read(&new).expect("is written"));
}
