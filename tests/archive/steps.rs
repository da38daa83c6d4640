//! What an archive promises as a replica.

use super::*;

#[track_caller]
fn refused(result: Result<(), ReplicaError>, says: &str) {
    let error = result.expect_err("refused");
    assert!(format!("{error:?}").starts_with(says), "{error:?}");
}

#[test]
fn nothing_is_published_that_does_not_fit() {
    let store = memory();
    let mut session = session(&store);
    let empty = Source::new("id-1", "user.u1");
    session.apply(&empty.step(None), &empty.bodies).expect("applies");
    let before = dump(&store);
    let mut inbox = empty.clone();
    inbox.append("From: a\r\n\r\none");
    let good = inbox.update(Some(empty.since()));
    let mut apply = |change: &dyn Fn(&mut MailboxUpdate), bodies: &Bodies, says: &str| {
        let mut update = good.clone();
        change(&mut update);
        refused(session.apply(&Step::Mailbox(Box::new(update)), bodies), says);
        assert_eq!(dump(&store), before, "{says}");
    };
    let bodies = &inbox.bodies;
    apply(&|update| update.crcs.basic ^= 1, bodies, "Changed(");
    apply(&|update| update.crcs.annot ^= 1, bodies, "Changed(");
    apply(&|update| update.crcs.basic = 0, bodies, "Changed(");
    apply(&|update| update.since.as_mut().unwrap().modseq.0 += 1, bodies, "Changed(");
    apply(&|update| update.since.as_mut().unwrap().crcs.annot ^= 1, bodies, "Changed(");
    apply(&|update| update.bodies.clear(), bodies, "Changed(\"the body");
    apply(&|update| update.head.name = "user.u1.Other".into(), bodies, "Moved(");
    apply(&|update| update.head.uniqueid = "id-9".into(), bodies, "Moved(");
    apply(&|update| (update.head.uniqueid, update.head.name) = ("id-9".into(), "x".into()), bodies, "NoSuchMailbox(");
    apply(&|_| {}, &Bodies::default(), "Body { uid: Uid(1), error: StoreError { message: \"no such file\"");
    let with = |text: &str| {
        let mut bodies = bodies.clone();
        bodies.0.values_mut().for_each(|body| *body = text.as_bytes().to_vec());
        bodies
    };
    apply(
        &|_| {},
        &with("From: a\r\n\r\nONE"),
        "Body { uid: Uid(1), error: StoreError { message: \"message file of UID 1 is not what its record says: SHA-1 is",
    );
    apply(
        &|_| {},
        &with("From: a\r\n\r\non"),
        "Body { uid: Uid(1), error: StoreError { message: \"message file of UID 1 is not what its record says: 13 bytes, expected 14",
    );
    apply(
        &|_| {},
        &with("From: a\r\n\r\none more"),
        "Body { uid: Uid(1), error: StoreError { message: \"message file of UID 1 is not what its record says: 19 bytes, expected 14",
    );
    session.apply(&Step::Mailbox(Box::new(good)), bodies).expect("the good one applies");
    assert_ne!(dump(&store), before);
}

#[test]
fn only_the_right_mailbox_is_removed_or_renamed() {
    let store = memory();
    let mut session = session(&store);
    for (id, name) in [("id-1", "user.u1"), ("id-2", "user.u2")] {
        let source = Source::new(id, name);
        session.apply(&source.step(None), &source.bodies).expect("applies");
    }
    let before = dump(&store);
    let rename = |id: &str, from: &str, to: &str| Step::Rename {
        uniqueid: id.into(),
        from: from.into(),
        to: to.into(),
        partition: "default".into(),
        uidvalidity: 1_700_000_000,
    };
    let remove = |id: &str, name: &str| Step::Remove { uniqueid: id.into(), name: name.into() };
    let none = Bodies::default();
    refused(session.apply(&remove("id-1", "user.u2"), &none), "Moved(");
    refused(session.apply(&remove("id-1", "user.u3"), &none), "NoSuchMailbox(");
    refused(session.apply(&rename("id-1", "user.u1", "user.u2"), &none), "Moved(");
    refused(session.apply(&rename("id-2", "user.u1", "user.u3"), &none), "Moved(");
    refused(session.apply(&rename("id-3", "user.u3", "user.u4"), &none), "NoSuchMailbox(");
    let expunge = Step::Expunge { uniqueid: "id-2".into(), name: "user.u1".into(), uids: vec![Uid(1)] };
    refused(session.apply(&expunge, &none), "Moved(");
    assert_eq!(dump(&store), before);
    session.apply(&rename("id-1", "user.u1", "user.u3"), &none).expect("applies");
    let names = [MboxName::from("user.u1"), "user.u2".into(), "user.u3".into()];
    let views = session.view_mailboxes(&names).expect("views");
    let names: Vec<_> = views.iter().map(|view| (view.head.name.to_string(), view.head.uniqueid.to_string())).collect();
    assert_eq!(names, [("user.u2".into(), "id-2".into()), ("user.u3".into(), "id-1".into())]);
}

#[test]
fn views_are_what_was_applied() {
    let store = memory();
    let mut session = session(&store);
    let mut inbox = Source::new("id-1", "user.jane^doe");
    for n in 0..5 {
        inbox.append(&format!("From: a\r\n\r\n{n}"));
    }
    inbox.snapshot.user_flags = vec![Some("a".into()), None, Some("b".into())];
    inbox.touch(2, |record| record.user_flags = 0b101);
    inbox.touch(3, |record| {
        record.annotations = vec![Annotation {
            entry: b"/comment".to_vec(),
            userid: "u1".into(),
            value: "grün\n".into(),
            modseq: record.modseq,
        }];
        (record.cid, record.savedate, record.createdmodseq) = (0xabc, 1_700_000_000, ModSeq(2));
    });
    session.apply(&inbox.step(None), &inbox.bodies).expect("applies");
    // The flag table of the source changes its order: old records mean what they meant.
    let since = inbox.since();
    inbox.snapshot.user_flags = vec![Some("b".into()), Some("c".into()), Some("a".into())];
    inbox.touch(4, |record| record.user_flags = 0b010);
    session.apply(&inbox.step(Some(since)), &inbox.bodies).expect("applies");
    inbox.snapshot.records[1].user_flags = 0b101;
    for session in [&mut session, &mut self::session(&store)] {
        let view = session.view_full(&"user.jane^doe".into()).expect("views").expect("there");
        assert_eq!(view.head, inbox.snapshot.head);
        assert_eq!(view.records.as_deref(), Some(&*inbox.snapshot.records));
        assert_eq!(view.user_flags, inbox.snapshot.user_flags);
        let crcs = inbox.crcs();
        assert_eq!((view.crc_basic, view.crc_annot), (Some(crcs.basic), Some(crcs.annot)));
        let account = session.view_user(&"jane.doe".into()).expect("views");
        assert_eq!(account.mailboxes, [MailboxView { records: None, user_flags: Vec::new(), ..view }]);
    }
}

#[test]
fn two_programs_may_write_to_one_archive() {
    let store = memory();
    let (mut one, mut two) = (session(&store), session(&store));
    let mut inbox = Source::new("id-1", "user.u1");
    one.apply(&inbox.step(None), &inbox.bodies).expect("applies");
    // Each believes what it published last until it looks: what the other did meanwhile is seen all the same.
    for n in 0..40 {
        let (session, since) = (if n % 3 == 0 { &mut one } else { &mut two }, inbox.since());
        inbox.append(&format!("From: a\r\n\r\n{n}"));
        session.apply(&inbox.step(Some(since)), &inbox.bodies).expect("applies");
        let other = Source::new(&format!("id-{n}-x"), &format!("user.u1.F{n}"));
        session.apply(&other.step(None), &other.bodies).expect("applies");
    }
    let view = one.view_full(&"user.u1".into()).expect("views").expect("there");
    assert_eq!(view.records.map(|records| records.len()), Some(40));
    assert_eq!(two.view_user(&"u1".into()).expect("views").mailboxes.len(), 41);
}

#[test]
fn a_flag_change_in_a_large_mailbox_writes_little() {
    let store = memory();
    let mut session = session(&store);
    let mut inbox = Source::new("id-1", "user.u1");
    for n in 0..3000 {
        inbox.append(&format!("From: a\r\n\r\n{n}"));
    }
    session.apply(&inbox.step(None), &inbox.bodies).expect("applies");
    let whole = session.traffic().0;
    let changes = 200;
    for n in 0..changes {
        let since = inbox.since();
        inbox.touch(1 + n * 13 % 3000, |record| record.system_flags.0 ^= SystemFlags::FLAGGED);
        let mut update = inbox.update(Some(since));
        update.bodies.clear();
        session.apply(&Step::Mailbox(Box::new(update)), &inbox.bodies).expect("applies");
    }
    let each = (session.traffic().0 - whole) / u64::from(changes);
    assert!(each < whole / 100, "{each} bytes for a flag, {whole} for the mailbox");
    let view = self::session(&store).view_full(&"user.u1".into()).expect("views").expect("there");
    assert_eq!(view.records.as_deref(), Some(&*inbox.snapshot.records));
}

#[test]
fn large_bodies_travel_in_parts() {
    let store = memory();
    let mut session = session(&store);
    for extra in [0, 1] {
        let mut inbox = Source::new(&format!("id-{extra}"), &format!("user.u{extra}"));
        let text = "x".repeat((16 << 20) + extra);
        inbox.append(&text);
        let mut wrong = inbox.bodies.clone();
        wrong.0.values_mut().for_each(|body| body[5] ^= 1);
        refused(session.apply(&inbox.step(None), &wrong), "Body { uid");
        session.apply(&inbox.step(None), &inbox.bodies).expect("applies");
    }
    assert_eq!(dump(&store).keys().filter(|key| key.ends_with(" records")).count(), 2);
}

#[test]
fn places_that_are_none_say_so() {
    let check = |url: &str, says: &str| {
        let error = ArchiveTarget::new(url).err().expect("refused").to_string();
        assert!(error.contains(says), "{error}");
    };
    check("file://dir/x", "write file:///DIR with the whole path");
    check("file:///", "write file:///DIR with the whole path");
    check("/dir/x", "relative URL without a base");
    check("s3:///x", "write s3://BUCKET");
    check("gs://bucket/x", "use file:// or s3://");
    let dir = tempfile::tempdir().expect("directory");
    let url = |name: &str| format!("file://{}/{name}", dir.path().display());
    let archive = Archive::open(&url("none")).expect("opens");
    let error = ArchiveStore::open(archive).err().expect("refused");
    assert_eq!(error.to_string(), format!("there is no archive at {}", url("none")));
    assert_eq!(error.disposition, Disposition::Stop);
    std::fs::create_dir(dir.path().join("other")).expect("made");
    std::fs::write(dir.path().join("other/archive.json"), r#"{"format":9,"kind":"spooltap archive"}"#)
        .expect("written");
    let error = ArchiveTarget::new(&url("other")).expect("opens").open().err().expect("refused").to_string();
    assert!(error.ends_with("archive.json: is of archive format 9, this spooltap knows 1"), "{error}");
}

/// The files of an archive on a disk, as a person finds them.
#[test]
fn files_are_readable_with_ordinary_tools() {
    let dir = tempfile::tempdir().expect("directory");
    let target = ArchiveTarget::new(&format!("file://{}/a b", dir.path().display())).expect("opens");
    let mut session = target.open().expect("opens");
    let mut inbox = Source::new("id-1", "user.u1");
    inbox.append("From: a\r\n\r\none");
    inbox.snapshot.user_flags = vec![Some("work".into())];
    inbox.touch(1, |record| (record.system_flags.0, record.user_flags) = (SystemFlags::SEEN, 1));
    session.apply(&inbox.step(None), &inbox.bodies).expect("applies");
    let mut files: Vec<String> = walkdir::WalkDir::new(dir.path().join("a b"))
        .into_iter()
        .map(|entry| entry.expect("entry"))
        .filter(|entry| entry.file_type().is_file())
        .map(|entry| entry.path().strip_prefix(dir.path().join("a b")).expect("below").display().to_string())
        .collect();
    files.sort();
    let guid = inbox.snapshot.records[0].guid.to_string();
    let body = format!("bodies/{}/{guid}.eml", &guid[..2]);
    assert_eq!(files, ["archive.json", &body, "index/000000000001.json", "mailboxes/id-1/000000000001.json"]);
    let read = |name: &str| std::fs::read_to_string(dir.path().join("a b").join(name)).expect("reads");
    assert_eq!(read(&body), "From: a\r\n\r\none");
    let mailbox = read("mailboxes/id-1/000000000001.json");
    let record = mailbox.lines().find(|line| line.contains("\"uid\":1,")).expect("a line for a record");
    assert!(record.contains(r#""flags":["\\Seen","work"]"#), "{record}");
    assert!(mailbox.contains("\"acl\":\"u1\\tlrswipkxtecdan\\t\""), "{mailbox}");
}

/// Sessions of one target share what they know; threads of one program do not lose each other's mailboxes.
#[test]
fn sessions_work_side_by_side() {
    let target = ArchiveTarget::of(Archive::with_store(memory(), "memory:"));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let target = &target;
            scope.spawn(move || {
                let mut session = target.open().expect("opens");
                for n in 0..25 {
                    let mut source = Source::new(&format!("id-{thread}-{n}"), &format!("user.u{thread}.F{n}"));
                    source.append("From: a\r\n\r\nthe same for all");
                    session.apply(&source.step(None), &source.bodies).expect("applies");
                    let name = SieveName::from(format!("s{n}").as_str());
                    let text = format!("keep; # {n}").into_bytes();
                    let put =
                        Step::SievePut { user: "u0".into(), name, last_update: 1, content: text, compiled: Vec::new() };
                    session.apply(&put, &source.bodies).expect("applies");
                }
            });
        }
    });
    let mut session = target.open().expect("opens");
    for thread in 0..4 {
        let user = UserId::from(format!("u{thread}").as_str());
        assert_eq!(session.view_user(&user).expect("views").mailboxes.len(), 25);
    }
    assert_eq!(session.view_user(&"u0".into()).expect("views").meta.sieve.len(), 25);
}

/// Cut and strange files are named, never believed, and do not hold up their neighbours.
#[test]
fn damaged_objects_are_named() {
    let dir = tempfile::tempdir().expect("directory");
    let url = format!("file://{}", dir.path().display());
    let open = || ArchiveTarget::new(&url).expect("opens").open().expect("opens");
    let mut sources = Vec::new();
    for (id, name) in [("id-1", "user.u1"), ("id-2", "user.u1.Sent")] {
        let mut source = Source::new(id, name);
        source.append(&format!("From: {name}\r\n\r\n"));
        open().apply(&source.step(None), &source.bodies).expect("applies");
        sources.push(source);
    }
    let folder = dir.path().join("mailboxes/id-1");
    let path = folder.join("000000000001.json");
    let whole = std::fs::read(&path).expect("reads");
    for length in 0..whole.len() - 2 {
        std::fs::write(&path, &whole[..length]).expect("writes");
        let error = open().view_full(&"user.u1".into()).expect_err("is cut");
        assert!(matches!(&error, ReplicaError::Refused(text) if text.contains("mailboxes/id-1/000000000001.json")));
    }
    let views = open().view_user(&"u1".into()).expect("the neighbour goes on").mailboxes;
    assert_eq!(views.len(), 1);
    assert!(matches!(open().apply(&sources[0].step(None), &sources[0].bodies), Err(ReplicaError::Refused(_))));
    std::fs::write(&path, &whole).expect("writes");
    // What a program that died has left, and what people leave.
    std::fs::write(folder.join("000000000009.json#1"), "{").expect("writes");
    std::fs::write(folder.join("notes.txt"), "mine").expect("writes");
    std::fs::create_dir(folder.join("000000000010.json")).expect("makes");
    let view = open().view_full(&"user.u1".into()).expect("views").expect("there");
    assert_eq!(view.records.as_deref(), Some(&*sources[0].snapshot.records));
    // A body that was cut is made whole when the mailbox is sent again.
    let guid = sources[0].snapshot.records[0].guid.to_string();
    let body = dir.path().join(format!("bodies/{}/{guid}.eml", &guid[..2]));
    std::fs::write(&body, "From").expect("writes");
    let mut again = sources[0].clone();
    again.touch(1, |record| record.system_flags.0 = SystemFlags::SEEN);
    open().apply(&again.step(None), &again.bodies).expect("applies");
    assert_eq!(std::fs::read_to_string(&body).expect("reads"), "From: user.u1\r\n\r\n");
}
