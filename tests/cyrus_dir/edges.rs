//! Numbers at the edges of what a peer can say: they are refused or kept as they are, in a directory and in an archive.

use super::*;
use spooltap::replica::ArchiveTarget;

/// What is odd about a mailbox with one message.
type Odd = fn(&mut Source);

const EDGES: &[(&str, Odd)] = &[
    ("the highest UID", |source| {
        source.snapshot.records[0].uid = Uid(u32::MAX);
        source.snapshot.head.last_uid = Uid(u32::MAX);
    }),
    ("the highest modseq", |source| {
        source.snapshot.records[0].modseq = ModSeq(u64::MAX);
        source.snapshot.head.highestmodseq = ModSeq(u64::MAX);
    }),
    ("the highest modseqs of the folder", |source| {
        source.snapshot.head.foldermodseq = ModSeq(u64::MAX);
        source.snapshot.head.createdmodseq = ModSeq(u64::MAX);
    }),
    ("the highest uidvalidity", |source| source.snapshot.head.uidvalidity = u32::MAX),
    ("arrived in 1970", |source| source.snapshot.records[0].internaldate = 0),
    ("arrived before 1970", |source| source.snapshot.records[0].internaldate = -1),
    ("arrived in 2038", |source| source.snapshot.records[0].internaldate = 1 << 31),
    ("arrived in 2106", |source| source.snapshot.records[0].internaldate = u32::MAX.into()),
    ("arrived after 2106", |source| source.snapshot.records[0].internaldate = 5 << 32),
    ("arrived never", |source| source.snapshot.records[0].internaldate = i64::MAX),
    ("arrived always", |source| source.snapshot.records[0].internaldate = i64::MIN),
    ("changed after 2106", |source| source.snapshot.records[0].last_updated = i64::MAX),
    ("saved after 2106", |source| source.snapshot.records[0].savedate = i64::MAX),
    ("appended after 2106", |source| source.snapshot.head.last_appenddate = i64::MAX),
    ("seen by POP after 2106", |source| source.snapshot.head.pop3_last_login = i64::MAX),
    ("recent after 2106", |source| source.snapshot.head.recenttime = i64::MIN),
    ("all conversations", |source| source.snapshot.records[0].cid = u64::MAX),
];

fn check(name: &str, odd: Odd, target: &dyn ReplicaTarget) {
    let mut source = Source::new("edge0001", "user.edge");
    source.append("Subject: edge\r\n\r\nedge\r\n");
    odd(&mut source);
    let place = format!("{name}, {}", target.name());
    match target.open().expect("opens").apply(&source.step(None), &source.bodies) {
        Ok(()) => {}
        Err(ReplicaError::Refused(_)) => return,
        Err(error) => panic!("{place}: {error}"),
    }
    let mut session = target.open().expect("opens");
    let view = session.view_full(&"user.edge".into()).expect("views").expect("is there");
    let head = &source.snapshot.head;
    assert_eq!(view.records.as_ref(), Some(&source.snapshot.records), "{place}");
    assert_eq!(view.crc_basic, Some(source.crcs().basic), "{place}");
    let told = |head: &MailboxHead| {
        let times = [head.recenttime, head.last_appenddate, head.pop3_last_login, head.pop3_show_after];
        (head.last_uid, head.highestmodseq, head.uidvalidity, head.createdmodseq, head.foldermodseq, times)
    };
    assert_eq!(told(&view.head), told(head), "{place}");
    // Said once more it is there already, and it can be removed.
    session.apply(&source.step(None), &source.bodies).unwrap_or_else(|error| panic!("{place}: {error}"));
    let remove = Step::Remove { uniqueid: "edge0001".into(), name: "user.edge".into() };
    session.apply(&remove, &source.bodies).unwrap_or_else(|error| panic!("{place}: {error}"));
}

#[test]
fn numbers_at_the_edge_are_refused_or_kept() {
    for (name, odd) in EDGES {
        let dir = tempfile::tempdir().expect("directory");
        check(name, *odd, &CyrusDirTarget::new(&format!("cyrus://{}/store", dir.path().display())).expect("a URL"));
        check(name, *odd, &ArchiveTarget::new(&format!("file://{}/archive", dir.path().display())).expect("a URL"));
    }
}

/// In the keys of `mailboxes.db` these bytes stand for the separator and the end of the domain.
#[test]
fn a_name_that_would_be_another_mailboxs_row_is_refused() {
    let dir = tempfile::tempdir().expect("directory");
    let target = CyrusDirTarget::new(&format!("cyrus://{}/store", dir.path().display())).expect("a URL");
    let mut session = target.open().expect("opens");
    let mut good = Source::new("edge0001", "user.edge");
    good.append("Subject: edge\r\n\r\nedge\r\n");
    session.apply(&good.step(None), &good.bodies).expect("is taken");
    for name in ["user\u{1f}edge", "user.edge\u{1f}below", "dom\u{1d}user.edge", "user.edge.\u{7f}"] {
        let mut odd = Source::new("edge0002", name);
        odd.append("Subject: odd\r\n\r\nodd\r\n");
        let head = &good.snapshot.head;
        let rename = Step::Rename {
            uniqueid: head.uniqueid.clone(),
            from: head.name.clone(),
            to: name.into(),
            partition: head.partition.clone(),
            uidvalidity: head.uidvalidity,
        };
        let subscribe = Step::Subscribe { user: "edge".into(), name: name.into() };
        for step in [odd.step(None), rename, subscribe] {
            let result = session.apply(&step, &odd.bodies);
            assert!(matches!(result, Err(ReplicaError::Refused(_))), "{name:?}: {step:?}: {result:?}");
        }
    }
    let view = session.view_full(&"user.edge".into()).expect("views").expect("is there");
    assert_eq!((&view.head.uniqueid, view.records.as_ref()), (&"edge0001".into(), Some(&good.snapshot.records)));
    assert_eq!(session.view_user(&"edge".into()).expect("views").mailboxes.len(), 1);
}
