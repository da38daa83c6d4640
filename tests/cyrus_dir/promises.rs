//! New messages that somebody waited for, and a power cut before they were on the disk by themselves: whatever has become of
//! the mailbox's files, all that was acknowledged is there when the directory is opened again.

use super::crash::{dump, place, target};
use super::*;
use spooltap::replica::{Hook, Verdict};
use std::sync::Arc;

const NAME: &str = "user.u1";

/// A disk to which nothing gets by itself.
fn unsettled() -> Hook {
    Arc::new(|name, _| match std::thread::current().name() {
        Some("settle") => Verdict::Fail(std::io::Error::other(format!("{name} was not done"))),
        _ => Verdict::Go,
    })
}

/// A mailbox with one message, to which two more came; and its index after each.
struct Life {
    dir: tempfile::TempDir,
    source: Source,
    indexes: Vec<Vec<u8>>,
}

impl Life {
    fn new() -> Self {
        let mut life = Self { dir: place(), source: Source::new("id-1", NAME), indexes: Vec::new() };
        let target = target(life.dir.path(), Some(unsettled()));
        let mut session = target.open().expect("opens");
        session.be_quick();
        let mut since = None;
        for text in ["one", "two", "three"] {
            life.source.append(&format!("From: a\r\n\r\n{text}\r\n"));
            session.apply(&life.source.step(since), &life.source.bodies).expect("applies");
            since = Some(life.source.since());
            life.indexes.push(fs::read(life.index()).expect("reads"));
        }
        session.close();
        drop(target);
        assert!(life.redo().exists(), "two updates are only promised");
        life
    }

    fn redo(&self) -> PathBuf {
        self.dir.path().join("store/conf/spooltap.redo")
    }

    fn mailbox(&self) -> PathBuf {
        self.dir.path().join("store/spool/default/uuid/i/d/id-1")
    }

    fn index(&self) -> PathBuf {
        self.mailbox().join("cyrus.index")
    }

    fn message(&self, uid: u32) -> PathBuf {
        self.mailbox().join(format!("{uid}."))
    }

    /// Opens the directory; all records, and every body in its place, or nothing.
    fn holds(&self, what: &str) {
        // Hashes what it reads, and looks for files that nobody knows.
        let seen = dump(self.dir.path());
        assert!(seen.contains_key(NAME), "{what}");
        let view = target(self.dir.path(), None).open().expect("opens").view_full(&NAME.into());
        let view = view.expect("views").expect("is there");
        assert_eq!(view.records.as_deref(), Some(&*self.source.snapshot.records), "{what}");
        assert_eq!(view.crc_basic, Some(self.source.crcs().basic), "{what}");
        assert_eq!(fs::read(self.index()).expect("reads"), self.indexes[2], "{what}");
        for (uid, record) in (1..).zip(&self.source.snapshot.records) {
            let bytes = fs::read(self.message(uid)).expect("reads");
            assert_eq!(bytes, self.source.bodies.0[&record.guid], "{what}: {uid}");
        }
        assert!(!self.redo().exists(), "{what}");
    }
}

#[test]
fn what_was_promised_is_written_again() {
    type Harm = fn(&Life) -> std::io::Result<()>;
    let harms: [(&str, Harm); 10] = [
        ("none", |_| Ok(())),
        ("the last message has no name", |life| fs::remove_file(life.message(3))),
        ("neither has one", |life| fs::remove_file(life.message(2)).and_then(|()| fs::remove_file(life.message(3)))),
        ("a message is empty", |life| fs::write(life.message(2), "")),
        ("a message is zeros", |life| fs::write(life.message(3), [0; 16])),
        ("the index is that before", |life| fs::write(life.index(), &life.indexes[0])),
        ("the index is that between", |life| fs::write(life.index(), &life.indexes[1])),
        ("nothing got to the disk", |life| {
            fs::write(life.index(), &life.indexes[0])?;
            fs::remove_file(life.message(2))?;
            fs::remove_file(life.message(3))
        }),
        ("the header did, and no record", |life| {
            let [first, .., last] = &life.indexes[..] else { unreachable!() };
            let end = last.len() - first.len();
            fs::write(life.index(), [&last[..first.len()], &vec![0; end]].concat())
        }),
        ("a record did, and the header that is before it", |life| {
            let [first, .., last] = &life.indexes[..] else { unreachable!() };
            fs::write(life.index(), [&first[..], &last[first.len()..]].concat())
        }),
    ];
    for (what, harm) in harms {
        let life = Life::new();
        harm(&life).expect(what);
        life.holds(what);
    }
}

/// A Cyrus that was started in between, or we ourselves.
#[test]
fn what_has_changed_since_is_left_alone() {
    let mut life = Life::new();
    let aside = life.dir.path().join("aside");
    fs::rename(life.redo(), &aside).expect("renames");
    {
        let target = target(life.dir.path(), None);
        let mut session = target.open().expect("opens");
        let since = life.source.since();
        life.source.append("From: a\r\n\r\nfour\r\n");
        session.apply(&life.source.step(Some(since)), &life.source.bodies).expect("applies");
        session.close();
    }
    life.indexes[2] = fs::read(life.index()).expect("reads");
    // Even what is wrong with an older message is not ours to mend any more: it may be gone on purpose.
    fs::rename(&aside, life.redo()).expect("renames");
    life.holds("a later change");
}

#[test]
fn what_is_gone_does_not_come_back() {
    let life = Life::new();
    let aside = life.dir.path().join("aside");
    fs::rename(life.redo(), &aside).expect("renames");
    {
        let target = target(life.dir.path(), None);
        let mut session = target.open().expect("opens");
        let step = Step::Remove { uniqueid: "id-1".into(), name: NAME.into() };
        session.apply(&step, &Bodies::default()).expect("applies");
        session.close();
    }
    fs::rename(&aside, life.redo()).expect("renames");
    let target = target(life.dir.path(), None);
    let mut session = target.open().expect("opens");
    assert!(session.view_full(&NAME.into()).expect("views").is_none() && !life.mailbox().exists());
}

/// Each kind of change waits for what was promised in its mailbox, and the disk has all of it at the end.
#[test]
fn other_changes_come_after_it() {
    let dir = place();
    let target = target(dir.path(), None);
    let mut session = target.open().expect("opens");
    session.be_quick();
    let mut source = Source::new("id-1", NAME);
    source.append("From: a\r\n\r\none\r\n");
    session.apply(&source.step(None), &source.bodies).expect("applies");
    let redo = || fs::read(dir.path().join("store/conf/spooltap.redo")).expect("reads");
    let is_wanted = || redo().windows(8).any(|eight| eight == b"wanted\r\n");
    for round in 0..6_u32 {
        let since = source.since();
        source.append(&format!("From: a\r\n\r\nround {round}\r\n"));
        session.apply(&source.step(Some(since)), &source.bodies).expect("applies");
        let uid = source.snapshot.records.last().expect("a record").uid;
        match round {
            0 => session
                .apply(&Step::Expunge { uniqueid: "id-1".into(), name: NAME.into(), uids: vec![uid] }, &source.bodies),
            1 => session.apply(&Step::Quota { root: NAME.into(), limits: QuotaLimits::default() }, &source.bodies),
            2 => session.apply(
                &Step::Rename {
                    uniqueid: "id-1".into(),
                    from: NAME.into(),
                    to: NAME.into(),
                    partition: "default".into(),
                    uidvalidity: source.snapshot.head.uidvalidity,
                },
                &source.bodies,
            ),
            _ => Ok(()),
        }
        .expect("applies");
        assert!(round > 2 || !is_wanted(), "round {round}");
        if round == 0 {
            source.snapshot.records.last_mut().expect("a record").system_flags.0 |= SystemFlags::EXPUNGED;
        }
    }
    session.close();
    drop(target);
    assert!(!dir.path().join("store/conf/spooltap.redo").exists());
    dump(dir.path());
}
