//! A commit of Cyrus is several: what is read in between is not taken for a state of the mailbox.

use crate::util::{CyrusServer, Options, cyrus, lock};
use spooltap::model::{MailStore, MboxName};
use spooltap::spool::open_store;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

fn find(dir: &Path, name: &str) -> Vec<PathBuf> {
    let files = walkdir::WalkDir::new(dir).into_iter().flatten();
    files.filter(|file| file.file_name() == name).map(walkdir::DirEntry::into_path).collect()
}

#[test]
fn annotations_that_are_ahead_of_their_index_are_not_taken_for_its_state() {
    // Cyrus commits the annotations of messages, then the index, with fsyncs in between. Fails without `ahead` in
    // `spool::mailbox::digest`: sent at the modseq of the last commit, they look like a damage of the replica, which then
    // keeps higher modseqs than the source for ever.
    if !cyrus::installed() {
        return;
    }
    let source = CyrusServer::start(Options::new().source().users(&["u1"])).expect("source");
    source.lmtp().expect("connects").deliver(&["u1"], b"Subject: x\r\n\r\nx\r\n").expect("delivers");
    let mut user = source.imap("u1").expect("logs in");
    user.ok("SELECT INBOX").expect("selects");
    let mut annotate = |value: &str| {
        user.ok(format!("UID STORE 1 ANNOTATION (/comment (value.priv \"{value}\"))")).expect("annotates");
    };
    annotate("first");
    let annotations = find(source.base(), "cyrus.annotations").pop().expect("there");
    let index = annotations.with_file_name("cyrus.index");
    let before = fs::read(&index).expect("read");
    annotate("second");
    let after = fs::read(&index).expect("read");

    let store = open_store(&source.conf()).expect("opens");
    let inbox = MboxName::from("user.u1");
    let listing = store.listing().expect("list");
    let entry = listing.by_name(&inbox).expect("listed");
    let value = || {
        let mut snapshot = store.mailbox(entry)?.expect("there");
        let record = snapshot.records.pop().expect("one message");
        Ok::<_, spooltap::model::StoreError>((record.modseq, record.annotations.into_iter().next().expect("one").value))
    };
    let (modseq, found) = value().expect("read");
    assert_eq!(found, b"second");

    // In the middle of the second commit, by a writer who takes long.
    fs::write(&index, &before).expect("written");
    let writer = OpenOptions::new().write(true).open(&index).expect("opened");
    lock(&writer);
    let torn = value().expect_err("half a commit");
    assert_eq!(torn.disposition, spooltap::model::Disposition::RetrySoon, "{torn}");
    // The writer died there: that is how it is from now on.
    drop(writer);
    let (half, found) = value().expect("read");
    assert!(half < modseq && found == b"second");
    fs::write(&index, &after).expect("written");
    assert_eq!(value().expect("read"), (modseq, b"second".to_vec()));
}
