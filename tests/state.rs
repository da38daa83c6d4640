//! The state directory in the hands of somebody else: deleted, cut, damaged, of another store. At worst everything is
//! compared anew; nothing is lost, nothing sent twice, and nothing panics.

mod commands;
mod full;

use super::util::{Spooltap, Store, store};
use spooltap::model::{MailboxHead, MailboxView, QuotaLimits, QuotaResource, QuotaRoot, UserId};
use spooltap::state::{MailboxReceipt, State, UserReceipt};

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use std::path::{Path, PathBuf};
use std::process::Output;

const FILE: &str = "state.redb";

/// A state with something of everything in it, closed in good order; its bytes.
fn filled(dir: &Path) -> Vec<u8> {
    let state = State::open(dir, "store").expect("opens");
    let replica = state.replica("csync://repl@replica");
    for number in 0..300 {
        let head = MailboxHead { name: format!("user.u{number}").as_str().into(), ..MailboxHead::default() };
        let view = MailboxView { head, ..MailboxView::default() };
        replica.put_mailbox(
            &format!("id-{number}").as_str().into(),
            &MailboxReceipt { view, ..MailboxReceipt::default() },
        );
        replica.put_user(&UserId::from(format!("u{number}").as_str()), &UserReceipt::default());
    }
    replica.put_quota(
        &QuotaRoot::new(b"user.u1"),
        &QuotaLimits { limits: [(QuotaResource::Storage, 5)].into(), ..QuotaLimits::default() },
    );
    replica.set_primed("user u1");
    drop(state);
    fs::read(dir.join(FILE)).expect("is read")
}

/// Opens and reads everything; what is found is some of what was put, or nothing.
fn read_all(dir: &Path) -> usize {
    let Ok(state) = State::open(dir, "store") else { return 0 };
    let replica = state.replica("csync://repl@replica");
    let mailboxes = replica.mailboxes();
    for (id, name) in &mailboxes {
        if let Some(receipt) = replica.mailbox(id) {
            assert!(name.is_empty() || receipt.view.head.name == *name);
        }
    }
    let _ =
        (replica.quotas(), replica.user(&UserId::from("u7")), replica.primed("user u1"), replica.server_annotations());
    replica.remove_mailbox(&"id-5".into());
    state.flush();
    mailboxes.len()
}

#[test]
fn no_damage_makes_it_panic_and_none_is_taken_for_receipts() {
    let dir = tempfile::tempdir().expect("directory");
    let good = filled(dir.path());
    let try_with = |bytes: &[u8]| {
        let dir = tempfile::tempdir().expect("directory");
        fs::write(dir.path().join(FILE), bytes).expect("is written");
        read_all(dir.path())
    };
    assert_eq!(try_with(&good), 300);
    for share in 0..24 {
        assert!(try_with(&good[..good.len() * share / 24]) <= 300);
    }
    let mut rng = super::util::Rng::new(7);
    for _ in 0..60 {
        let mut bad = good.clone();
        for _ in 0..=rng.below(8) {
            // The first pages decide what the others mean.
            let reach = if rng.below(2) == 0 { 8192 } else { bad.len() };
            let at = rng.below(reach);
            bad[at] ^= 1 << rng.below(8);
        }
        assert!(try_with(&bad) <= 300);
    }
}

/// Bodies of an archive with what changes when one is written again.
fn bodies(archive: &Path) -> BTreeMap<PathBuf, (u64, i64, i64)> {
    let files = walkdir::WalkDir::new(archive.join("bodies")).into_iter().map(|entry| entry.expect("is readable"));
    let files = files.filter(|entry| entry.file_type().is_file()).map(|entry| {
        let meta = entry.metadata().expect("is there");
        (entry.into_path(), (meta.ino(), meta.mtime(), meta.mtime_nsec()))
    });
    files.collect()
}

#[test]
fn without_its_state_everything_is_compared_and_no_body_sent_again() {
    let source = store::store("2.5.11-a");
    let dir = tempfile::tempdir().expect("directory");
    let (state, archive) = (dir.path().join("state"), dir.path().join("archive"));
    let run = |arguments: &[&str]| {
        Spooltap::once(&source.conf, &format!("file://{}", archive.display()), &state, arguments).expect("runs")
    };
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let pushed = |what: &str| {
        let output = run(&["push", "-A"]);
        assert_eq!(output.status.code(), Some(0), "{what}: {}", said(&output));
        let verified = run(&["verify"]);
        assert_eq!(verified.status.code(), Some(0), "{what}: {}", said(&verified));
        assert_eq!(run(&["scan"]).status.code(), Some(0), "{what}: receipts are there again");
        said(&output)
    };
    pushed("the first time");
    let first = bodies(&archive);
    assert!(first.len() > 50, "{}", first.len());
    let file = state.join(FILE);
    let good = fs::read(&file).expect("is read");

    fs::remove_dir_all(&state).expect("is removed");
    assert_eq!(run(&["scan"]).status.code(), Some(1), "nothing is known any more");
    pushed("without a state");
    for (what, bytes) in [
        ("cut", good[..good.len() / 2].to_vec()),
        ("no database", b"something else".to_vec()),
        ("zeros", vec![0; good.len()]),
    ] {
        fs::write(&file, bytes).expect("is written");
        let said = pushed(what);
        assert!(said.contains("state is not used") && said.contains(FILE), "{what} is told: {said}");
        assert!(file.with_extension("redb.aside").exists(), "{what}: it is put aside");
    }
    assert_eq!(bodies(&archive), first, "no body was written again");
}

#[test]
fn the_state_of_another_store_is_not_believed() {
    let (one, two) = (store::store("2.5.11-a"), store::store("2.5.11-c"));
    let dir = tempfile::tempdir().expect("directory");
    let (state, archive) = (dir.path().join("state"), format!("file://{}", dir.path().join("archive").display()));
    let push = |source: &Store| Spooltap::once(&source.conf, &archive, &state, &["push", "-A"]).expect("runs");
    assert_eq!(push(&one).status.code(), Some(0));
    let other = push(&two);
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(said.contains("state is not used") && said.contains("its store is"), "{said}");
    // Both have a user.u1: what the first store put there is not removed for the second.
    assert_eq!(other.status.code(), Some(1), "{said}");
    assert!(said.contains("is taken on the replica by a mailbox with uniqueid"), "{said}");
}
