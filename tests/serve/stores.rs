//! What holds in front of either kind of store: bodies that were promised are there, many clients at once, and what a store
//! cannot keep is not offered.

use super::super::archive::Source;
use super::super::util::cyrus::{PASSWORD, REPLICATOR};
use super::super::util::eventually;
use super::talk::Talk;
use super::{KINDS, Kind, Served, open};
use std::process::Command;
use std::time::Duration;

/// A `MAILBOX` with one message under UID 1.
fn with_message(id: &str, name: &str, guid: &str, size: usize) -> String {
    format!(
        "APPLY MAILBOX %(UNIQUEID {id} MBOXNAME {name} LAST_UID 1 HIGHESTMODSEQ 2 RECENTUID 0 RECENTTIME 0 LAST_APPENDDATE 0 \
         POP3_LAST_LOGIN 0 POP3_SHOW_AFTER 0 UIDVALIDITY 1 PARTITION default ACL \"\" OPTIONS \"\" SYNC_CRC 0 RECORD (%(UID 1 \
         MODSEQ 2 LAST_UPDATED 1 FLAGS () INTERNALDATE 1 SIZE {size} GUID {guid})))\r\n"
    )
}

const BODY: &str = "Subject: same\r\n\r\nsame\r\n";
const GUID: &str = "4f3b0fc0cb4cc7d0aa8f1f13e5c9f0f0a9d5c8a4";

#[test]
fn a_reserved_body_outlives_its_mailbox() {
    use sha1::{Digest, Sha1};
    let guid = spooltap::model::MessageGuid(Sha1::digest(BODY.as_bytes()).into()).to_string();
    for kind in KINDS {
        let dir = tempfile::tempdir().expect("directory");
        let served = Served::of(kind, dir.path(), &[]);
        let mut talk = Talk::login(served.address, REPLICATOR, PASSWORD).expect("logs in");
        let mut ok = |request: &str| {
            let said = talk.said(request.as_bytes());
            assert!(said.starts_with("OK"), "{kind:?} {request}: {said}");
        };
        ok(&format!("APPLY MESSAGE (%{{default {guid} {}}}\r\n{BODY})\r\n", BODY.len()));
        ok(&with_message("first001", "user.u1", &guid, BODY.len()));
        ok("RESTART\r\n");
        // As a client does it: what it may not send, then renames and removals, then the mailboxes that need it.
        let missing = talk.ask(
            format!("APPLY RESERVE %(PARTITION default MBOXNAME (user.u1 user.none) GUID ({guid} {GUID}))\r\n")
                .as_bytes(),
        );
        let missing: Vec<String> =
            missing.expect("answers").iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect();
        assert_eq!(missing, [format!("* MISSING ({GUID})"), "OK success".to_owned()], "{kind:?}");
        let mut ok = |request: &str| {
            let said = talk.said(request.as_bytes());
            assert!(said.starts_with("OK"), "{kind:?} {request}: {said}");
        };
        ok("APPLY RENAME %(OLDMBOXNAME user.u1 NEWMBOXNAME user.u1.Old PARTITION default UIDVALIDITY 1)\r\n");
        ok(&with_message("second01", "user.u1", &guid, BODY.len()));
        ok("APPLY UNMAILBOX user.u1.Old\r\n");
        ok("APPLY UNMAILBOX user.u1\r\n");
        ok(&with_message("third001", "user.u1", &guid, BODY.len()));
        ok("RESTART\r\n");
        // What has been let go is let go. An archive keeps bodies, whoever names them.
        if kind == Kind::Cyrus {
            ok("APPLY UNMAILBOX user.u1\r\n");
            let said = talk.said(with_message("fourth01", "user.u1", &guid, BODY.len()).as_bytes());
            assert!(said.starts_with("NO "), "{said}");
            assert!(!tree(&kind.place(dir.path())).contains(&guid), "something is left in the staging directory");
        }
    }
}

fn tree(dir: &std::path::Path) -> String {
    walkdir::WalkDir::new(dir).into_iter().flatten().map(|entry| format!("{}\n", entry.path().display())).collect()
}

#[test]
fn many_clients_work_on_one_store() {
    for kind in KINDS {
        let dir = tempfile::tempdir().expect("directory");
        let served = Served::of(kind, dir.path(), &[]);
        drop(open(&served));
        let served = &served;
        std::thread::scope(|scope| {
            for number in 0..6 {
                scope.spawn(move || {
                    let mut session = open(served);
                    let mut source = Source::new(&format!("many000{number}"), &format!("user.m{number}"));
                    let mut since = None;
                    for count in 0..5 {
                        source.append(&format!("From: {number}\r\n\r\n{count}\r\n"));
                        session.apply(&source.step(since), &source.bodies).expect("applies");
                        since = Some(source.since());
                    }
                    let view = session.view_full(&source.snapshot.head.name).expect("views").expect("is there");
                    assert_eq!(view.records.as_deref(), Some(&*source.snapshot.records));
                });
            }
        });
        // All of them are there for one who comes later.
        let mut session = open(served);
        for number in 0..6 {
            let name = format!("user.m{number}");
            let view = session.view_full(&name.as_str().into()).expect("views").expect("is there");
            assert_eq!(view.records.map(|records| records.len()), Some(5), "{kind:?} {name}");
        }
    }
}

#[test]
fn mailboxes_of_scripts_are_offered_where_they_can_be_kept() {
    for (kind, enabled) in [(Kind::Archive, "* ENABLED (SIEVE-MAILBOX)"), (Kind::Cyrus, "* ENABLED ()")] {
        let dir = tempfile::tempdir().expect("directory");
        let served = Served::of(kind, dir.path(), &[]);
        let mut talk = Talk::login(served.address, REPLICATOR, PASSWORD).expect("logs in");
        let said = talk.ask(b"APPLY CAPABILITIES (SIEVE-MAILBOX)\r\n").expect("answers");
        assert_eq!(String::from_utf8_lossy(&said[0]), enabled);
        let greeting = greeting(&served);
        assert_eq!(greeting.contains("SIEVE-MAILBOX"), kind == Kind::Archive, "{greeting}");
    }
}

fn greeting(served: &Served) -> String {
    let mut greeting = String::new();
    let mut stream = std::io::BufReader::new(std::net::TcpStream::connect(served.address).expect("connects"));
    while !greeting.contains("* OK") {
        std::io::BufRead::read_line(&mut stream, &mut greeting).expect("greets");
    }
    greeting
}

/// A client of the same machine has no slow network to save.
#[test]
fn compression_is_offered_to_whom_it_is_for() {
    for (whom, is_offered) in [(None, false), (Some("auto"), false), (Some("on"), true), (Some("off"), false)] {
        let dir = tempfile::tempdir().expect("directory");
        let arguments = whom.map_or(Vec::new(), |whom| vec!["--compress", whom]);
        let served = Served::start(dir.path(), &arguments);
        let greeting = greeting(&served);
        assert_eq!(greeting.contains("* COMPRESS DEFLATE\r\n"), is_offered, "{whom:?}: {greeting}");
        // Who knows that it is there may ask for it all the same.
        let mut talk = Talk::login(served.address, REPLICATOR, PASSWORD).expect("logs in");
        assert_eq!(talk.said(b"COMPRESS DEFLATE\r\n"), "OK DEFLATE active");
    }
}

#[test]
fn what_is_no_store_of_ours_is_refused() {
    for url in ["csync://repl@127.0.0.1:1", "imaps://x", "/srv/archive"] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_spooltap")).args(["serve", "--store", url]).output().expect("runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{url}: {said}");
        assert!(said.contains("is no store that can be served"), "{said}");
    }
}

/// A store that has taken over takes nothing any more, but the end of that.
#[test]
fn a_promoted_store_takes_nothing() {
    use spooltap::model::{FENCE, Promotion, ReplicaError, Step, UserId};
    for kind in KINDS {
        let dir = tempfile::tempdir().expect("directory");
        let served = Served::of(kind, dir.path(), &[]);
        let mut source = Source::new("fence001", "user.f1");
        let (mut session, mut other) = (open(&served), open(&served));
        source.append("From: a\r\n\r\none\r\n");
        session.apply(&source.step(None), &source.bodies).expect("applies");
        let fence = Promotion { host: "h".into(), ..Promotion::default() }.annotation();
        session.apply(&Step::ServerAnnotation(fence), &source.bodies).expect("is raised");
        let since = source.since();
        source.append("From: a\r\n\r\ntwo\r\n");
        // The one that raised it at once, the other a moment later.
        let error = session.apply(&source.step(Some(since)), &source.bodies).expect_err("refused");
        assert!(matches!(error, ReplicaError::Refused(_)) && error.to_string().contains("promoted"), "{error}");
        let seen = eventually(Duration::from_secs(20), || {
            let note = Step::Subscribe { user: "f1".into(), name: "user.f1".into() };
            other.apply(&note, &source.bodies).is_err().then_some(())
        });
        assert!(seen.is_some(), "{kind:?}");
        let lower = Step::RemoveServerAnnotation { entry: FENCE.to_vec(), userid: UserId::from("") };
        session.apply(&lower, &source.bodies).expect("is taken down");
        session.apply(&source.step(Some(since)), &source.bodies).expect("applies again");
    }
}
