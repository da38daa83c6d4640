//! Cases of the comparison: what is sent, what is lifted, what is made anew.

use super::*;
use crate::model::{MailboxHead, MessageGuid, Options};

const CAPS: Capabilities = Capabilities {
    annot_crc: AnnotCrc::New,
    checks_since: true,
    sieve_mailboxes: true,
    intermediates: true,
    keeps_savedate: true,
    message_annotations: true,
    quota_resources: true,
    server_annotations: true,
    keeps_options: true,
    lists_all: true,
};

/// `"uid:modseq:flags:guid"`, flags out of `S` seen, `F` flagged, `X` expunged, `-` none.
fn record(text: &str) -> Record {
    let parts: Vec<&str> = text.split(':').collect();
    let [uid, modseq, flags, guid] = parts[..] else { panic!("four parts: {text}") };
    let bits = flags.chars().fold(0, |bits, flag| {
        bits | match flag {
            'S' => SystemFlags::SEEN,
            'F' => SystemFlags::FLAGGED,
            'X' => SystemFlags::EXPUNGED,
            _ => 0,
        }
    });
    Record {
        uid: Uid(uid.parse().expect("uid")),
        modseq: ModSeq(modseq.parse().expect("modseq")),
        last_updated: 1_600_000_000,
        internaldate: 1_500_000_000,
        size: 100,
        guid: MessageGuid([guid.as_bytes()[0]; 20]),
        system_flags: SystemFlags(bits),
        ..Record::default()
    }
}

fn snapshot(last_uid: u32, modseq: u64, records: &[&str]) -> MailboxSnapshot {
    MailboxSnapshot {
        head: MailboxHead {
            uniqueid: "id".into(),
            name: "user.a".into(),
            options: Options(1),
            uidvalidity: 7,
            last_uid: Uid(last_uid),
            highestmodseq: ModSeq(modseq),
            ..MailboxHead::default()
        },
        minor_version: 17,
        records: records.iter().map(|text| record(text)).collect(),
        ..MailboxSnapshot::default()
    }
}

fn view(snapshot: &MailboxSnapshot) -> MailboxView {
    let crcs = crcs(snapshot, &CAPS);
    MailboxView {
        head: snapshot.head.clone(),
        crc_basic: Some(crcs.basic),
        crc_annot: Some(crcs.annot),
        annotations: snapshot.annotations.clone(),
        user_flags: snapshot.user_flags.clone(),
        records: Some(snapshot.records.clone()),
    }
}

fn sent(diff: MailboxDiff) -> Vec<u32> {
    match diff {
        MailboxDiff::Update(update) => update.records.iter().map(|record| record.uid.0).collect(),
        other => panic!("an update was expected, not {other:?}"),
    }
}

#[test]
fn nothing_new_is_nothing_to_send() {
    let source = snapshot(2, 5, &["1:3:S:a", "2:5:-:b"]);
    assert!(matches!(
        diff_mailbox(&source, Some(&view(&source)), source.head.highestmodseq, &CAPS, true),
        MailboxDiff::Same
    ));
}

#[test]
fn a_flag_change_sends_that_record_and_what_it_is_based_on() {
    let before = snapshot(2, 5, &["1:3:S:a", "2:5:-:b"]);
    let after = snapshot(2, 6, &["1:3:S:a", "2:6:F:b"]);
    let MailboxDiff::Update(update) =
        diff_mailbox(&after, Some(&view(&before)), before.head.highestmodseq, &CAPS, true)
    else {
        panic!("update")
    };
    assert_eq!(update.records.len(), 1);
    assert_eq!(update.since, Some(Since { modseq: ModSeq(5), crcs: crcs(&before, &CAPS) }));
    assert_eq!(update.crcs, crcs(&after, &CAPS));
    assert_eq!(wanted_bodies(&update.records, Uid(2)).count(), 0);
}

#[test]
fn a_mailbox_the_replica_lacks_is_sent_whole() {
    let source = snapshot(3, 6, &["1:3:S:a", "2:6:X:b", "3:5:-:c"]);
    assert_eq!(sent(diff_mailbox(&source, None, ModSeq(0), &CAPS, true)), [1, 2, 3]);
}

#[test]
fn a_new_uid_below_the_known_modseq_is_sent_too() {
    let before = snapshot(1, 9, &["1:3:S:a"]);
    let after = snapshot(2, 9, &["1:3:S:a", "2:8:-:b"]);
    assert_eq!(sent(diff_mailbox(&after, Some(&view(&before)), before.head.highestmodseq, &CAPS, true)), [2]);
}

#[test]
fn what_modseqs_cannot_tell_is_repaired() {
    let before = snapshot(2, 5, &["1:3:S:a", "2:5:-:b"]);
    let check = |after: &MailboxSnapshot| {
        assert!(
            matches!(
                diff_mailbox(after, Some(&view(&before)), before.head.highestmodseq, &CAPS, true),
                MailboxDiff::Repair(_)
            ),
            "{after:?}"
        );
    };
    check(&snapshot(2, 4, &["1:3:S:a", "2:4:-:b"]));
    check(&snapshot(1, 6, &["1:3:S:a"]));
    let mut vanished = snapshot(2, 7, &["1:3:S:a"]);
    vanished.deletedmodseq = ModSeq(7);
    check(&vanished);
}

#[test]
fn a_replica_that_somebody_changed_is_corrected_at_modseqs_above_its_own() {
    let source = snapshot(2, 5, &["1:3:S:a", "2:5:-:b"]);
    let theirs = view(&snapshot(2, 9, &["1:9:F:a", "2:5:-:b"]));
    let Repair::Lift { expunge, update, lift } = repair(&source, &theirs, &CAPS) else { panic!("lift") };
    assert!(expunge.is_empty());
    assert_eq!(update.head.highestmodseq, ModSeq(10));
    assert_eq!(update.records, [Record { modseq: ModSeq(10), ..record("1:3:S:a") }]);
    let lift = lift.expect("is remembered");
    assert_eq!((lift.since, lift.offset), (ModSeq(5), 5));

    // The next ordinary comparison sees equality, and a later change travels above the lifted modseq.
    let mut same = source.clone();
    apply_lift(&mut same, &lift);
    assert!(matches!(
        diff_mailbox(&same, Some(&update.confirmed_view()), update.head.highestmodseq, &CAPS, true),
        MailboxDiff::Same
    ));
    let mut later = snapshot(2, 6, &["1:3:S:a", "2:6:F:b"]);
    apply_lift(&mut later, &lift);
    assert_eq!(later.records[1].modseq, ModSeq(11));
    assert_eq!(sent(diff_mailbox(&later, Some(&update.confirmed_view()), update.head.highestmodseq, &CAPS, true)), [2]);
}

#[test]
fn records_the_source_once_had_are_expunged_not_forgotten() {
    let source = snapshot(3, 8, &["1:3:S:a"]);
    let theirs = view(&snapshot(3, 5, &["1:3:S:a", "2:4:-:b", "3:5:-:c"]));
    let Repair::Lift { expunge, update, .. } = repair(&source, &theirs, &CAPS) else { panic!("lift") };
    assert_eq!(expunge, [Uid(2), Uid(3)]);
    assert!(update.records.is_empty());
    assert_eq!(update.head.highestmodseq, ModSeq(8), "the source is ahead anyway");
    assert_eq!(update.crcs, crcs(&source, &CAPS));
}

#[test]
fn mail_that_only_the_replica_has_is_named_before_anything_is_made_anew() {
    let source = snapshot(2, 5, &["1:3:S:a", "2:5:-:b"]);
    for (theirs, kept) in [
        (snapshot(2, 6, &["1:3:S:a", "2:6:-:z"]), vec![b'z']),
        (snapshot(3, 6, &["1:3:S:a", "2:5:-:b", "3:6:-:y"]), vec![b'y']),
        (snapshot(2, 6, &["1:6:SX:a", "2:5:-:b"]), vec![]),
        (snapshot(2, 6, &["1:3:S:a"]), vec![]),
    ] {
        let Repair::Rebuild { only_there, .. } = repair(&source, &view(&theirs), &CAPS) else {
            panic!("must be made anew: {theirs:?}")
        };
        assert_eq!(only_there.iter().map(|record| record.guid.0[0]).collect::<Vec<_>>(), kept);
    }
}

#[test]
fn a_large_first_transfer_comes_in_parts_that_leave_nothing_behind() {
    let texts: Vec<String> =
        (1..=10).map(|uid| format!("{uid}:{}:-:{}", 30 - uid, (b'a' + uid as u8) as char)).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let source = snapshot(10, 40, &texts);
    let (mut have, mut rounds): (Option<MailboxView>, _) = (None, 0);
    let mut got = BTreeMap::new();
    while let Some(part) = first_part(&source, have.as_ref(), &CAPS, 3, u64::MAX) {
        rounds += 1;
        assert!(part.records.iter().all(|record| record.modseq <= part.head.highestmodseq));
        assert!(part.records.iter().all(|record| record.uid <= part.head.last_uid));
        got.extend(part.records.iter().map(|record| (record.uid, record.modseq)));
        let mut view = part.confirmed_view();
        if have.is_some() {
            (view.crc_basic, view.crc_annot) = (None, None);
        }
        have = Some(view);
    }
    let MailboxDiff::Update(last) = diff_mailbox(&source, have.as_ref(), modseq_of(&have), &CAPS, false) else {
        panic!("the rest")
    };
    got.extend(last.records.iter().map(|record| (record.uid, record.modseq)));
    assert_eq!(rounds, 3);
    assert_eq!(got, source.records.iter().map(|record| (record.uid, record.modseq)).collect());
}

fn modseq_of(view: &Option<MailboxView>) -> ModSeq {
    view.as_ref().map_or(ModSeq(0), |view| view.head.highestmodseq)
}

#[test]
fn a_replica_that_raised_its_own_modseq_still_gets_what_it_has_not_seen() {
    let before = snapshot(2, 5, &["1:3:S:a", "2:5:-:b"]);
    let after = snapshot(2, 7, &["1:3:S:a", "2:6:F:b"]);
    let mut renamed = view(&before);
    renamed.head.highestmodseq = ModSeq(6);
    assert_eq!(sent(diff_mailbox(&after, Some(&renamed), ModSeq(5), &CAPS, true)), [2]);
}

#[test]
fn what_an_earlier_account_of_that_name_had_read_is_emptied_once() {
    let read = |uids: &[u8]| SeenState { seenuids: uids.to_vec(), ..SeenState::default() };
    let meta = |seen: &[(&str, &[u8])]| UserMeta {
        seen: seen.iter().map(|(id, uids)| (UniqueId::new(id.as_bytes()), read(uids))).collect(),
        ..UserMeta::default()
    };
    let mut mine = meta(&[("a", b"1:3")]);
    let theirs = meta(&[("a", b"1:3"), ("b", b"1:12"), ("c", b""), ("gone", b"5")]);
    let (user, parts) = (UserId::new("u1"), BTreeSet::from([UserPart::Seen]));
    let emptied = |mine: &UserMeta, theirs: &UserMeta| {
        let steps = diff_meta(&user, mine, theirs, &parts, &|id| id.as_bytes() != b"gone");
        let empty = steps.into_iter().map(|step| match step {
            Step::Seen { uniqueid, seen, .. } if seen == read(b"") => uniqueid.to_string(),
            other => panic!("{other:?}"),
        });
        empty.collect::<Vec<_>>()
    };
    assert_eq!(emptied(&mine, &theirs), ["b"]);
    assert!(emptied(&mine, &confirmed_meta(&mine, &theirs, &parts, &|_| true)).is_empty());
    // A value that cannot be read is not one that is not there.
    mine.seen_incomplete = true;
    assert!(emptied(&mine, &theirs).is_empty());
}
