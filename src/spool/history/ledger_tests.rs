use super::super::Forgetful;
use super::*;
use crate::model::MailboxHead;
use proptest::prelude::*;

const NOW: i64 = 1_700_000_000;

fn id() -> UniqueId {
    "id".into()
}

fn record(uid: u32, flags: u32, last_updated: i64) -> Record {
    Record {
        uid: Uid(uid),
        modseq: ModSeq(1),
        last_updated,
        internaldate: i64::from(uid),
        size: 100 + u64::from(uid),
        system_flags: SystemFlags(flags),
        ..Record::default()
    }
}

fn reading(records: Vec<Record>) -> MailboxSnapshot {
    let head = MailboxHead { highestmodseq: ModSeq(1), ..MailboxHead::default() };
    MailboxSnapshot { head, minor_version: 10, records, ..MailboxSnapshot::default() }
}

/// One reading, as the store does it; the ledger is loaded anew each time, as after a restart.
fn read(memory: &Forgetful, records: &[Record], now: i64) -> MailboxSnapshot {
    let mut snapshot = reading(records.to_vec());
    let mut ledger = Ledger::load(memory, &id());
    for record in &snapshot.records {
        if !ledger.knows(record) {
            ledger.learn(record, MessageGuid([record.uid.0 as u8; 20]));
        }
    }
    ledger.apply(&mut snapshot, now);
    ledger.save(memory, &id());
    snapshot
}

fn modseqs(snapshot: &MailboxSnapshot) -> Vec<(u32, u64, bool)> {
    snapshot.records.iter().map(|record| (record.uid.0, record.modseq.0 - NOW as u64, record.is_expunged())).collect()
}

#[test]
fn the_same_files_give_the_same_history() {
    let memory = Forgetful::default();
    let files = [record(1, 0, 10), record(2, 0, 10)];
    let first = read(&memory, &files, NOW);
    assert_eq!(modseqs(&first), [(1, 0, false), (2, 0, false)]);
    assert_eq!(first.records[1].guid, MessageGuid([2; 20]));
    assert_eq!(read(&memory, &files, NOW + 500), first);
}

#[test]
fn every_change_is_above_all_earlier_ones() {
    let memory = Forgetful::default();
    read(&memory, &[record(1, 0, 10), record(2, 0, 10)], NOW);
    let flagged = read(&memory, &[record(1, 2, 11), record(2, 0, 10), record(5, 0, 11)], NOW + 1);
    assert_eq!(modseqs(&flagged), [(1, 1, false), (2, 0, false), (5, 1, false)]);
    let expunged = read(&memory, &[record(1, 2, 11), record(5, 0, 11)], NOW + 2);
    assert_eq!(modseqs(&expunged), [(1, 1, false), (2, 2, true), (5, 1, false)]);
    assert!(expunged.records[1].is_unlinked() && expunged.records[1].last_updated == NOW + 2);
    // Brought back, as `unexpunge` does.
    let back = read(&memory, &[record(1, 2, 11), record(2, 0, 10), record(5, 0, 11)], NOW + 3);
    assert_eq!(modseqs(&back), [(1, 1, false), (2, 3, false), (5, 1, false)]);
    assert_eq!(back.head.highestmodseq, ModSeq(NOW as u64 + 3));
    assert_eq!(back.deletedmodseq, ModSeq(0));
}

#[test]
fn an_expunged_message_whose_file_goes_is_no_change() {
    let memory = Forgetful::default();
    read(&memory, &[record(1, 0, 10), record(2, 0, 10)], NOW);
    let delayed = read(&memory, &[record(1, 0, 10), record(2, SystemFlags::EXPUNGED, NOW)], NOW + 1);
    assert_eq!(modseqs(&delayed), [(1, 0, false), (2, 1, true)]);
    assert!(!delayed.records[1].is_unlinked());
    let gone = read(&memory, &[record(1, 0, 10)], NOW + 2);
    assert_eq!(modseqs(&gone), [(1, 0, false), (2, 1, true)]);
    assert!(gone.records[1].is_unlinked());
    assert_eq!(gone.records[1].last_updated, NOW);
}

#[test]
fn another_message_under_an_old_uid_is_learned() {
    let memory = Forgetful::default();
    read(&memory, &[record(1, 0, 10)], NOW);
    let other = Record { size: 7, ..record(1, 0, 10) };
    assert!(!Ledger::load(&memory, &id()).knows(&other));
    let snapshot = read(&memory, &[other], NOW + 1);
    assert_eq!(modseqs(&snapshot), [(1, 1, false)]);
}

#[test]
fn flags_are_compared_by_name() {
    let memory = Forgetful::default();
    let apply = |bits: u128, names: &[&str]| {
        let mut snapshot = reading(vec![Record { user_flags: bits, ..record(1, 0, 10) }]);
        snapshot.user_flags = names.iter().map(|name| Some(FlagName::new(name.as_bytes()))).collect();
        let mut ledger = Ledger::load(&memory, &id());
        ledger.learn_missing(&snapshot);
        ledger.apply(&mut snapshot, NOW);
        ledger.save(&memory, &id());
        snapshot.head.highestmodseq.0 - NOW as u64
    };
    assert_eq!(apply(0b01, &["a", "b"]), 0);
    assert_eq!(apply(0b10, &["b", "A"]), 0);
    assert_eq!(apply(0b01, &["b", "a"]), 1);
}

impl Ledger {
    fn learn_missing(&mut self, snapshot: &MailboxSnapshot) {
        for record in &snapshot.records {
            if !self.knows(record) {
                self.learn(record, MessageGuid([1; 20]));
            }
        }
    }
}

#[test]
fn modseqs_of_a_server_that_keeps_them_are_kept() {
    let memory = Forgetful::default();
    let apply = |records: Vec<(u32, u64)>, highest: u64| {
        let records = records.into_iter().map(|(uid, modseq)| Record {
            modseq: ModSeq(modseq),
            last_updated: modseq as i64,
            ..record(uid, 0, 0)
        });
        let mut snapshot = reading(records.collect());
        snapshot.head.highestmodseq = ModSeq(highest);
        let mut ledger = Ledger::load(&memory, &id());
        ledger.learn_missing(&snapshot);
        ledger.apply(&mut snapshot, NOW);
        ledger.save(&memory, &id());
        let modseqs: Vec<_> = snapshot.records.iter().map(|record| record.modseq.0).collect();
        (modseqs, snapshot.head.highestmodseq.0)
    };
    assert_eq!(apply(vec![(1, 3), (2, 7)], 9), (vec![3, 7], 9));
    assert_eq!(apply(vec![(1, 12), (2, 7)], 12), (vec![12, 7], 12));
    // The server forgets what was expunged, and what it counts next is what we have used for that.
    assert_eq!(apply(vec![(1, 12)], 12), (vec![12, 13], 13));
    assert_eq!(apply(vec![(1, 13)], 13), (vec![14, 13], 14));
}

#[test]
fn old_tombstones_go_and_say_so() {
    let memory = Forgetful::default();
    read(&memory, &[record(1, 0, 10), record(2, 0, 10)], NOW);
    read(&memory, &[record(1, 0, 10)], NOW + 1);
    let later = read(&memory, &[record(1, 0, 10)], NOW + 1 + KEEP_SECONDS);
    assert_eq!(later.records.len(), 2);
    let gone = read(&memory, &[record(1, 0, 10)], NOW + 2 + KEEP_SECONDS);
    assert_eq!(modseqs(&gone), [(1, 0, false)]);
    assert_eq!(gone.deletedmodseq, ModSeq(NOW as u64 + 1));
}

#[test]
fn a_lost_or_damaged_memory_begins_above_what_was_given_out() {
    let memory = Forgetful::default();
    let files: Vec<Record> = (1..=3000).map(|uid| record(uid, 0, 10)).collect();
    let before = read(&memory, &files, NOW);
    assert_eq!(before.records.len(), 3000);
    assert_eq!(before.head.highestmodseq, ModSeq(NOW as u64 + 11), "in the order of their UIDs");
    for (spoil, value) in [(0, None), (1, Some(b"\x01damage".to_vec())), (2, None), (3, Some(Vec::new()))] {
        memory.put(vec![(key(&id(), spoil), value)]);
        let after = read(&memory, &files, NOW + 100 * (1 + i64::from(spoil)));
        assert!(after.records.iter().all(|record| record.modseq > before.head.highestmodseq));
        assert_eq!(read(&memory, &files, NOW + 1000), after, "and stays");
    }
}

#[test]
fn one_new_message_writes_its_block_and_the_head() {
    let memory = Forgetful::default();
    let mut files: Vec<Record> = (1..=5000).map(|uid| record(uid, 0, 10)).collect();
    read(&memory, &files, NOW);
    assert_eq!(memory.keys().len(), 6);
    files.push(record(5001, 0, 11));
    let mut snapshot = reading(files);
    let mut ledger = Ledger::load(&memory, &id());
    ledger.learn_missing(&snapshot);
    ledger.apply(&mut snapshot, NOW);
    assert_eq!(ledger.dirty, BTreeSet::from([block_of(Uid(5001))]));
    assert!(ledger.head_dirty);
}

#[test]
fn uniqueids_are_found_in_keys() {
    assert_eq!(mailbox_of(&key(&id(), 77)), b"id");
    assert_eq!(mailbox_of(b"abc"), b"");
}

proptest! {
    /// Whatever the files do, and whenever we are restarted: a message whose modseq was given out keeps it until it
    /// changes, and every change is above everything given out before.
    #[test]
    fn history_only_grows(steps in prop::collection::vec(prop::collection::vec((1u32..40, 0u32..4), 0..20), 1..12)) {
        let memory = Forgetful::default();
        let (mut highest, mut last): (u64, Vec<Record>) = (0, Vec::new());
        for (at, step) in steps.into_iter().enumerate() {
            let files: std::collections::BTreeMap<u32, u32> = step.into_iter().collect();
            let files: Vec<Record> = files.into_iter().map(|(uid, flags)| record(uid, flags, 5)).collect();
            let snapshot = read(&memory, &files, NOW + at as i64);
            for record in &snapshot.records {
                let before = last.iter().find(|old| old.uid == record.uid);
                let same = before.is_some_and(|old| old.system_flags == record.system_flags);
                if same {
                    prop_assert_eq!(before.map(|old| old.modseq), Some(record.modseq));
                } else {
                    prop_assert!(record.modseq.0 > highest);
                }
                prop_assert!(record.modseq <= snapshot.head.highestmodseq);
            }
            prop_assert!(last.iter().all(|old| snapshot.records.iter().any(|record| record.uid == old.uid)));
            highest = snapshot.head.highestmodseq.0;
            last = snapshot.records;
        }
    }

    #[test]
    fn any_bytes_are_a_ledger_or_none(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let memory = Forgetful::default();
        memory.put(vec![(key(&id(), 0), Some(bytes.clone())), (key(&id(), 1), Some([&[VERSION], bytes.as_slice()].concat()))]);
        let _ = Ledger::load(&memory, &id());
    }
}
