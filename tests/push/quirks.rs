//! What Cyrus's own client stumbles over between releases: annotations that raise the replica's modseq, parents that the
//! replica makes by itself, names that are used again.

use super::spoiled::edit_mailbox_list;
use super::{Pair, said, succeeds};
use crate::util::{cyrus, snapshot, store};
use serde_json::Value;
use spooltap::cyrus::{header, index, synccrc};
use spooltap::model::SystemFlags;
use spooltap::replay::Recording;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Turns \Flagged of the first live message over, as a 2.4 does: one modseq more, for it and for the mailbox.
fn turn_flag_over(folder: &Path, when: i64) -> u32 {
    let bytes = fs::read(folder.join("cyrus.index")).expect("an index");
    let names = header::parse(&fs::read(folder.join("cyrus.header")).expect("a header")).expect("is good").user_flags;
    let mut head = index::parse_header(&bytes).expect("is good");
    let mut records = index::parse_index_records(&head, &bytes).expect("are good");
    head.highestmodseq.0 += 1;
    let turned = &mut records.iter_mut().find(|found| !found.record.is_expunged()).expect("a live message").record;
    turned.system_flags.0 ^= SystemFlags::FLAGGED;
    (turned.modseq, turned.last_updated) = (head.highestmodseq, when);
    let uid = turned.uid.0;
    index::recount(&mut head, &records);
    let all: Vec<_> = records.iter().map(|found| found.record.clone()).collect();
    head.sync_crcs.basic = synccrc::basic(&all, &names);
    let mut written = index::encode_header(&head).expect("is known");
    let layout = head.layout().expect("is known");
    records.iter().for_each(|record| index::encode_record(layout, record, &mut written));
    fs::write(folder.join("cyrus.index"), written).expect("is written");
    uid
}

/// Renames a mailbox of the source as an old Cyrus does: the folder and the row.
fn rename(pair: &Pair, from: &str, to: &str) {
    let folder = |name: &str| pair.source.dir.path().join("spool").join(name.replace('.', "/"));
    fs::rename(folder(from), folder(to)).expect("is moved");
    edit_mailbox_list(pair, |list| {
        let start = format!("{from}\t");
        assert!(list.lines().any(|line| line.starts_with(&start)), "{from} is listed");
        let rows = list.lines().map(|line| match line.strip_prefix(&start) {
            Some(rest) => format!("{to}\t{rest}"),
            None => line.to_owned(),
        });
        let mut rows: Vec<String> = rows.collect();
        rows.sort();
        rows.join("\n") + "\n"
    });
}

/// The annotation of a mailbox raises its modseq on a 3.6, but not on the 2.4 it came from: every later update of that
/// mailbox by Cyrus's own client ends in `NO IMAP_SYNC_CHECKSUM` (traces of 2.4.22 to 3.6.1).
#[test]
fn a_mailbox_of_2_4_with_an_annotation_is_kept_up_to_date() {
    if !cyrus::installed() {
        return;
    }
    let pair = Pair::new(store::store("2.4.22-a")).expect("starts");
    let annotated =
        |name: &str| &pair.source.truth.0["users"][name]["mailboxes"][format!("user.{name}")]["annotations"];
    succeeds(&pair.spooltap(&["push", "-A"]).expect("runs"), "push").expect("succeeds");
    for user in ["u2", "u3"] {
        assert!(annotated(user)["/comment"].is_object(), "{user} has an annotation");
        let folder = pair.source.dir.path().join("spool/user").join(user);
        let shown = || -> Value {
            let shown = snapshot(&pair.replica, &[user.to_owned()]).expect("is read").0;
            shown["users"][user]["mailboxes"][format!("user.{user}")].clone()
        };
        let before = shown();
        assert_eq!(&before["annotations"], annotated(user));
        let mut flagged = None;
        for turn in 0..3 {
            let uid = turn_flag_over(&folder, 1_795_700_000 + turn).to_string();
            succeeds(&pair.spooltap(&["push", "-u", user]).expect("runs"), "push").expect("succeeds");
            let now = shown();
            let flags = now["messages"][&uid]["flags"].as_array().expect("is there").clone();
            let is = flags.contains(&"\\Flagged".into());
            assert_ne!(flagged.replace(is), Some(is), "turn {turn}: {flags:?}");
            assert_eq!(now["annotations"], before["annotations"]);
        }
        let verified = pair.spooltap(&["verify", "--records"]).expect("runs");
        succeeds(&verified, "verify").expect("succeeds");
    }
}

/// A rename raises the modseq of a mailbox on a replica before 3.6; on a source 2.4 it does not.
#[test]
fn a_mailbox_of_2_4_that_was_renamed_is_kept_up_to_date() {
    if !cyrus::installed() {
        return;
    }
    let pair = Pair::new(store::store("2.4.22-a")).expect("starts");
    succeeds(&pair.spooltap(&["push", "-A"]).expect("runs"), "push").expect("succeeds");
    rename(&pair, "user.u6.Lists", "user.u6.Moved");
    let folder = pair.source.dir.path().join("spool/user/u6/Moved");
    let verified = || {
        succeeds(&pair.spooltap(&["push", "-A"]).expect("runs"), "push").expect("succeeds");
        succeeds(&pair.spooltap(&["verify", "--records"]).expect("runs"), "verify").expect("succeeds");
        let shown = snapshot(&pair.replica, &["u6".to_owned()]).expect("is read").0;
        shown["users"]["u6"]["mailboxes"]["user.u6.Moved"]["messages"].clone()
    };
    let mut last = verified();
    for turn in 0..3 {
        let uid = turn_flag_over(&folder, 1_795_700_000 + turn).to_string();
        let now = verified();
        assert_ne!(now[&uid]["flags"], last[&uid]["flags"], "turn {turn}");
        last = now;
    }
}

/// A 2.x and a 3.0 have mailboxes without a parent; a 3.6 makes one when it is told of a new mailbox.
#[test]
fn a_parent_that_the_replica_makes_is_named_and_goes_again() {
    if !cyrus::installed() {
        return;
    }
    let pair = Pair::new(store::store("2.5.11-a")).expect("starts");
    let there = || {
        let names = snapshot(&pair.replica, &pair.source.users()).expect("is read").0["names"].clone();
        let has = |name: &str| names.as_array().expect("a list").contains(&name.into());
        ["user.u7.Deep", "user.u7.Deep.Trash", "user.u7.Trash"].map(has)
    };
    let told = "user.u7.Deep: made by the replica itself, above user.u7.Deep.Trash";
    fs::create_dir(pair.source.dir.path().join("spool/user/u7/Deep")).expect("is made");
    rename(&pair, "user.u7.Trash", "user.u7.Deep.Trash");
    succeeds(&pair.spooltap(&["push", "-A"]).expect("runs"), "push").expect("succeeds");
    let verified = pair.spooltap(&["verify"]).expect("runs");
    succeeds(&verified, "verify").expect("succeeds");
    assert!(said(&verified).contains(told), "{}", said(&verified));
    assert_eq!(there(), [true, true, false]);
    rename(&pair, "user.u7.Deep.Trash", "user.u7.Trash");
    succeeds(&pair.spooltap(&["push", "-A"]).expect("runs"), "push").expect("succeeds");
    let verified = pair.spooltap(&["verify"]).expect("runs");
    succeeds(&verified, "verify").expect("succeeds");
    assert!(!said(&verified).contains("made by the replica"), "{}", said(&verified));
    assert_eq!(there(), [false, false, true]);
}

/// What is played back at every mark (`tests/replay.rs`) has these in it.
#[test]
fn the_recordings_hold_names_used_again_and_missing_parents_and_annotated_messages() {
    for dir in store::recordings().iter().filter(|dir| !dir.ends_with("3.6.1-a") && !dir.ends_with("3.6.1-c")) {
        let recording = Recording::open(dir).expect("opens");
        let (mut reused, mut orphans, mut annotated) = (0, 0, 0);
        let mut last: BTreeMap<String, Value> = BTreeMap::new();
        for truth in recording.truths() {
            let (_, state) = truth.expect("is read");
            let users = state["users"].as_object().into_iter().flat_map(|users| users.values());
            let mailboxes: Vec<_> =
                users.flat_map(|user| user["mailboxes"].as_object().cloned().unwrap_or_default()).collect();
            let named = |name: &str| mailboxes.iter().any(|(other, _)| other == name);
            for (name, mailbox) in &mailboxes {
                let parent = name.rsplit_once('.').map_or("", |(parent, _)| parent);
                orphans += usize::from(name.matches('.').count() > 2 && !named(parent));
                let Some(before) = last.insert(name.clone(), mailbox.clone()) else { continue };
                reused += usize::from(before["uidvalidity"] != mailbox["uidvalidity"]);
                let mut notes = before["messages"].as_object().into_iter().flat_map(|all| all.values());
                let has_notes =
                    notes.any(|message| message["annotations"].as_object().is_some_and(|all| !all.is_empty()));
                annotated += usize::from(has_notes && before["messages"] != mailbox["messages"]);
            }
        }
        assert!(reused > 0 && orphans > 0, "{dir:?}: {reused} names used again, {orphans} without a parent");
        // Annotations of messages begin with 2.5.
        assert_eq!(annotated > 0, recording.version().starts_with("2.5"), "{dir:?}: {annotated}");
    }
}
