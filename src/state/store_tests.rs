//! The state over restarts, deaths and damage.

use super::*;
use crate::model::{MailboxHead, MailboxView, ModSeq, UniqueId};
use crate::state::MailboxReceipt;

fn receipt(name: &str, modseq: u64) -> MailboxReceipt {
    let head = MailboxHead { name: name.into(), highestmodseq: ModSeq(modseq), ..MailboxHead::default() };
    MailboxReceipt { view: MailboxView { head, ..MailboxView::default() }, ..MailboxReceipt::default() }
}

#[test]
fn what_was_put_is_there_at_once_and_after_a_restart() {
    let dir = tempfile::tempdir().expect("directory");
    {
        let state = State::open(dir.path(), "store").expect("opens");
        let replica = state.replica("r");
        replica.put_mailbox(&"a".into(), &receipt("user.a", 3));
        replica.put_mailbox(&"b".into(), &receipt("user.b", 4));
        assert_eq!(replica.mailbox(&"a".into()), Some(receipt("user.a", 3)));
        state.flush();
        replica.put_mailbox(&"a".into(), &receipt("user.a", 5));
        replica.remove_mailbox(&"b".into());
        assert_eq!(replica.mailboxes(), [("a".into(), "user.a".into())]);
        assert_eq!(state.replica("other").mailboxes(), []);
    }
    let state = State::open(dir.path(), "store").expect("opens again");
    assert_eq!(state.replica("r").mailbox(&"a".into()), Some(receipt("user.a", 5)));
    assert_eq!(state.replica("r").mailbox(&"b".into()), None);
}

#[test]
fn several_are_asked_for_at_once() {
    let dir = tempfile::tempdir().expect("directory");
    let state = State::open(dir.path(), "store").expect("opens");
    let replica = state.replica("r");
    for (id, modseq) in [("a", 1), ("b", 2), ("c", 3)] {
        replica.put_mailbox(&id.into(), &receipt("user.x", modseq));
    }
    state.flush();
    // In the file, in memory only, taken away in memory only, never there.
    replica.put_mailbox(&"b".into(), &receipt("user.x", 5));
    replica.remove_mailbox(&"c".into());
    let ids: [UniqueId; 4] = ["d", "c", "b", "a"].map(Into::into);
    let found = replica.mailboxes_of(ids.iter());
    assert_eq!(found, [None, None, Some(receipt("user.x", 5)), Some(receipt("user.x", 1))]);
    let mut all = Vec::new();
    replica.each_mailbox_id(&mut |id| all.push(id));
    assert_eq!(all, ids[2..].iter().rev().cloned().collect::<Vec<_>>());
    replica.set_primed("user x");
    assert_eq!(replica.primed_of(["user y", "user x"].into_iter()), [false, true]);
}

#[test]
fn another_store_or_a_damaged_file_starts_afresh() {
    let dir = tempfile::tempdir().expect("directory");
    State::open(dir.path(), "one").expect("opens").replica("r").put_mailbox(&"a".into(), &receipt("user.a", 1));
    let state = State::open(dir.path(), "two").expect("opens");
    assert_eq!(state.replica("r").mailboxes(), []);
    drop(state);
    std::fs::write(dir.path().join("state.redb"), b"not a database").expect("writes");
    let state = State::open(dir.path(), "two").expect("opens");
    assert_eq!(state.replica("r").mailboxes(), []);
}

#[test]
fn after_a_death_no_lane_counts_as_looked_at() {
    let dir = tempfile::tempdir().expect("directory");
    let primed = |dir: &Path| {
        let state = State::open(dir, "one").expect("opens");
        (state.replica("r").primed("user u1"), state.replica("r").mailbox(&"a".into()).is_some())
    };
    let state = State::open(dir.path(), "one").expect("opens");
    state.replica("r").set_primed("user u1");
    state.replica("r").put_mailbox(&"a".into(), &receipt("user.a", 1));
    state.flush();
    // What is on the disk while it is open is what a killed process leaves.
    let killed = tempfile::tempdir().expect("directory");
    std::fs::copy(dir.path().join("state.redb"), killed.path().join("state.redb")).expect("copies");
    drop(state);
    assert_eq!(primed(dir.path()), (true, true));
    assert_eq!(primed(dir.path()), (true, true));
    assert_eq!(primed(killed.path()), (false, true));
}

#[test]
fn what_was_begun_is_known_after_a_death_and_forgotten_after_a_good_end() {
    let (dir, killed) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
    let ours = |dir: &Path, store: &str| {
        let state = State::open(dir, store).expect("opens");
        (state.replica("r").is_ours(&"a".into()), state.replica("other").is_ours(&"a".into()))
    };
    let state = State::open(dir.path(), "one").expect("opens");
    state.replica("r").begin_mailbox(&"a".into(), None);
    for file in ["state.redb", "begun"] {
        std::fs::copy(dir.path().join(file), killed.path().join(file)).expect("copies");
    }
    drop(state);
    assert_eq!(ours(dir.path(), "one"), (false, false));
    let begun = std::fs::read(killed.path().join("begun")).expect("reads");
    assert_eq!(ours(killed.path(), "one"), (true, false));
    // Another store's mailboxes are none of ours.
    std::fs::write(killed.path().join("begun"), begun).expect("writes");
    assert_eq!(ours(killed.path(), "two"), (false, false));
}

#[test]
fn two_processes_cannot_share_it() {
    let dir = tempfile::tempdir().expect("directory");
    let _held = State::open(dir.path(), "one").expect("opens");
    assert!(matches!(State::open(dir.path(), "one"), Err(StateError::Busy { .. })));
}

#[test]
fn a_copy_of_what_is_held_can_be_read() {
    let dir = tempfile::tempdir().expect("directory");
    assert!(State::open_copy(dir.path(), "one").is_none());
    let state = State::open(dir.path(), "one").expect("opens");
    state.replica("r").put_mailbox(&"a".into(), &receipt("user.a", 1));
    state.memory().put(vec![(b"k".to_vec(), Some(b"v".to_vec()))]);
    state.flush();
    let copy = State::open_copy(dir.path(), "one").expect("is copied");
    assert_eq!(copy.replica("r").mailbox(&"a".into()), Some(receipt("user.a", 1)));
    assert_eq!(copy.memory().get(b"k"), Some(b"v".to_vec()));
    copy.memory().put(vec![(b"k".to_vec(), None)]);
    copy.flush();
    drop(copy);
    assert_eq!(state.memory().get(b"k"), Some(b"v".to_vec()));
    assert!(State::open_copy(dir.path(), "two").is_none());
    let left = std::fs::read_dir(dir.path()).expect("lists").flatten().filter(|entry| entry.path().is_dir());
    assert_eq!(left.count(), 0, "nothing is left over");
}

#[test]
fn an_entry_that_cannot_be_read_counts_as_absent() {
    assert_eq!(unpack::<MailboxReceipt>(b"\x02abc"), None);
    assert_eq!(unpack::<MailboxReceipt>(b"\x01\xff\xff"), None);
    assert_eq!(unpack::<MailboxReceipt>(b""), None);
}
