//! Sessions with a scripted server: what is sent, what is not, and what comes of its words.

use super::CsyncTarget;
use crate::config::{Compress, ReplicaConfig, Secret};
use crate::model::{
    Annotation, Body, BodyRef, BodySource, Disposition, MailboxHead, MailboxUpdate, MessageGuid, ModSeq, Record,
    Replica, ReplicaError, ReplicaTarget, Step, StoreError, SyncCrcs, Uid,
};
use sha1::{Digest, Sha1};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const BANNER: &str = "* SASL PLAIN\r\n* OK r.test Cyrus sync server 3.6.1\r\n";
const LOGIN: [(&str, &str); 2] =
    [("AUTHENTICATE PLAIN", "OK Success (no protection)\r\n"), ("GET MAILBOXES ()", "OK success\r\n")];
const USER: (&str, &str) = (
    "GET USER a",
    "* MAILBOX %(UNIQUEID u MBOXNAME user.a SYNC_CRC 0 LAST_UID 5 HIGHESTMODSEQ 9 RECENTUID 0 RECENTTIME 0 \
     LAST_APPENDDATE 0 POP3_LAST_LOGIN 0 UIDVALIDITY 7 PARTITION default ACL \"\" OPTIONS \"\")\r\nOK success\r\n",
);

/// Serves one connection: each request must begin with the next pair's first half and gets its second half. At the end it
/// closes. What came in is told line by line.
fn server(banner: &str, script: &[(&str, &str)]) -> (Arc<dyn ReplicaTarget>, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let (tell, told) = channel();
    let banner = banner.to_owned();
    let script: Vec<(String, String)> = script.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client");
        let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
        let mut writer = stream;
        writer.write_all(banner.as_bytes()).expect("banner");
        for (request, answer) in script {
            let mut line = Vec::new();
            reader.read_until(b'\n', &mut line).expect("a request");
            if let Some(size) = file_size(&line) {
                let mut rest = vec![0; size];
                reader.read_exact(&mut rest).expect("the file");
                line.extend(rest);
                reader.read_until(b'\n', &mut line).expect("the end");
            }
            let line = String::from_utf8_lossy(&line).into_owned();
            assert!(line.starts_with(&request), "{line:?} instead of {request:?}");
            tell.send(line).expect("somebody listens");
            writer.write_all(answer.as_bytes()).expect("an answer");
        }
    });
    let config = ReplicaConfig {
        url: format!("csync://repl@127.0.0.1:{port}"),
        name: None,
        password: Some(Secret::new("secret")),
        realm: None,
        access: Default::default(),
        compress: Compress::On,
        timeout: Duration::from_secs(5),
        partitions: [("here".to_owned(), "default".to_owned())].into(),
    };
    (CsyncTarget::open(&config, true).expect("a target"), told)
}

fn file_size(line: &[u8]) -> Option<usize> {
    let text = String::from_utf8_lossy(line);
    text.trim_end().strip_suffix('}').filter(|text| text.contains("%{"))?.rsplit(' ').next()?.parse().ok()
}

fn fails(banner: &str, script: &[(&str, &str)], part: &str, disposition: Disposition) {
    let error = server(banner, script).0.open().err().expect("no session");
    assert!(error.to_string().contains(part), "{error}");
    assert_eq!(error.disposition(), disposition, "{error}");
}

struct Bodies(Vec<u8>);

impl BodySource for Bodies {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        Ok(Body { size: body.size, reader: Box::new(std::io::Cursor::new(self.0.clone())) })
    }
}

const TEXT: &[u8] = b"From: a\r\n\r\nhello\r\n";

fn update(uid: u32, with_body: bool) -> MailboxUpdate {
    let guid = MessageGuid(Sha1::digest(TEXT).into());
    let size = TEXT.len() as u64;
    let bodies = if with_body { vec![BodyRef { uid: Uid(uid), guid, size, copied: false }] } else { Vec::new() };
    MailboxUpdate {
        head: MailboxHead {
            uniqueid: "u".into(),
            name: "user.a".into(),
            partition: "here".into(),
            last_uid: Uid(uid.max(5)),
            highestmodseq: ModSeq(10),
            ..MailboxHead::default()
        },
        crcs: SyncCrcs { basic: 1, annot: 0 },
        since: None,
        user_flags: Vec::new(),
        annotations: Vec::new(),
        records: vec![Record { uid: Uid(uid), modseq: ModSeq(10), size, guid, ..Record::default() }],
        bodies,
        reserve_from: Vec::new(),
        create: false,
    }
}

fn session(script: &[(&str, &str)]) -> (Box<dyn Replica>, Receiver<String>) {
    let script: Vec<_> = LOGIN.iter().copied().chain(script.iter().copied()).collect();
    let (target, told) = server(BANNER, &script);
    (target.open().expect("a session"), told)
}

#[test]
fn who_is_no_sync_server_or_lets_us_not_in_is_named() {
    fails(
        "* OK [CAPABILITY IMAP4rev1] Cyrus IMAP 3.6.1 server ready\r\n",
        &[],
        "not a csync service",
        Disposition::Stop,
    );
    fails("SSH-2.0-OpenSSH_9\r\n", &[], "not a csync service", Disposition::Stop);
    fails("* SASL PLAIN\r\n* OK r Cyrus sync server v2.3.19\r\n", &[], "2.3 speaks another", Disposition::Stop);
    fails("* SASL GSSAPI\r\n* OK r Cyrus sync server 3.6.1\r\n", &[], "GSSAPI", Disposition::Stop);
    fails("* BYE shutting down\r\n", &[], "shutting down", Disposition::Reconnect);
    fails(BANNER, &[("AUTHENTICATE", "NO authentication failure\r\n")], "check user", Disposition::Stop);
    // saslauthd does not run there just now.
    fails(BANNER, &[("AUTHENTICATE", "NO generic failure\r\n")], "generic failure", Disposition::Reconnect);
    fails(
        BANNER,
        &[("AUTHENTICATE", "OK Success\r\n"), ("GET MAILBOXES", "NO Permission denied\r\n")],
        "admins",
        Disposition::Stop,
    );
}

#[test]
fn a_version_nobody_names_is_found_out() {
    let open = |since: bool, script: &[(&str, &str)]| {
        let script: Vec<_> = [LOGIN[0]].into_iter().chain(script.iter().copied()).chain([LOGIN[1]]).collect();
        let (target, _told) = server("* SASL PLAIN\r\n* OK r Cyrus sync server unknown\r\n", &script);
        target.open().expect("a session");
        assert_eq!(target.capabilities().checks_since, since);
    };
    let no = "NO IMAP_PROTOCOL_ERROR Protocol error\r\n";
    open(true, &[("GET UNIQUEIDS", "OK success\r\n")]);
    open(false, &[("GET UNIQUEIDS", no), ("GET meta", "OK success\r\n")]);
    open(false, &[("GET UNIQUEIDS", no), ("GET meta", no)]);
}

#[test]
fn a_message_goes_before_its_mailbox_to_the_mapped_partition() {
    let (mut session, told) =
        session(&[USER, ("APPLY MESSAGE", "OK success\r\n"), ("APPLY MAILBOX", "OK success\r\n")]);
    let view = session.view_user(&"a".into()).expect("a view");
    assert_eq!(view.mailboxes[0].head.partition, "here".into());
    session.apply(&Step::Mailbox(Box::new(update(6, true))), &Bodies(TEXT.to_vec())).expect("applied");
    let lines: Vec<String> = told.iter().skip(3).collect();
    assert!(lines[0].starts_with("APPLY MESSAGE (%{default "), "{lines:?}");
    assert!(lines[1].contains(" PARTITION default "), "{lines:?}");
}

#[test]
fn a_message_that_is_not_its_record_s_is_not_sent() {
    let (mut session, told) = session(&[USER, ("NOOP", "OK Noop completed\r\n")]);
    session.view_user(&"a".into()).expect("a view");
    for wrong in [b"From: a\r\n\r\nhellO\r\n".as_slice(), b"From: a\r\n", b"From: a\r\n\r\nhello\r\nmore", b""] {
        let error = session.apply(&Step::Mailbox(Box::new(update(6, true))), &Bodies(wrong.to_vec()));
        assert!(matches!(error, Err(ReplicaError::Body { .. })), "{error:?}");
    }
    session.ping().expect("the session lives");
    assert_eq!(told.iter().count(), 4);
}

#[test]
fn a_new_live_record_without_a_message_is_not_sent() {
    // What is known is looked at again before the refusal.
    let again = ("GET MAILBOXES (user.a)", USER.1);
    let (mut session, told) = session(&[USER, ("APPLY MAILBOX", "OK success\r\n"), again, ("NOOP", "OK\r\n")]);
    session.view_user(&"a".into()).expect("a view");
    let mut apply = |uid| session.apply(&Step::Mailbox(Box::new(update(uid, false))), &Bodies(Vec::new()));
    apply(5).expect("a change of flags needs none");
    let error = apply(6).expect_err("refused").to_string();
    assert!(error.contains("UID 6 is new to the replica"), "{error}");
    session.ping().expect("the session lives");
    assert_eq!(told.iter().filter(|line| line.starts_with("APPLY")).count(), 1);
}

#[test]
fn a_mailbox_elsewhere_is_looked_at_anew() {
    let moved = USER.1.replace("PARTITION default", "PARTITION other");
    let (mut session, _told) = session(&[("GET USER a", &moved), ("GET MAILBOXES (user.a)", &moved)]);
    session.view_user(&"a".into()).expect("a view");
    let error = session.apply(&Step::Mailbox(Box::new(update(6, true))), &Bodies(TEXT.to_vec()));
    assert!(matches!(error, Err(ReplicaError::Changed(_))), "{error:?}");
}

#[test]
fn words_become_what_to_do_next() {
    let check = |answer: &str, disposition: Disposition, part: &str| {
        let (mut session, _told) = session(&[USER, ("APPLY MAILBOX", answer)]);
        session.view_user(&"a".into()).expect("a view");
        let step = Step::Mailbox(Box::new(update(5, false)));
        let error = session.apply(&step, &Bodies(Vec::new())).expect_err("refused");
        assert_eq!(error.disposition(), disposition, "{error}");
        assert!(format!("{error:?}").contains(part), "{error:?}");
    };
    check("NO IMAP_SYNC_CHECKSUM Checksum Failure\r\n", Disposition::RetrySoon, "Changed");
    check("NO IMAP_MAILBOX_CRC Checksum Failure\r\n", Disposition::RetrySoon, "Changed");
    check("NO IMAP_SYNC_CHANGED Changed since last sync\r\n", Disposition::RetrySoon, "Changed");
    check("NO IMAP_MAILBOX_MOVED Mailbox exists with another\r\n", Disposition::RetrySoon, "Moved");
    check("NO Mailbox has been moved to another server\r\n", Disposition::RetrySoon, "Moved");
    check("NO IMAP_MAILBOX_NONEXISTENT No Such Mailbox\r\n", Disposition::RetrySoon, "NoSuchMailbox");
    check("NO IMAP_MAILBOX_LOCKED Mailbox locked\r\n", Disposition::RetrySoon, "Locked");
    check("NO Unknown error\r\n", Disposition::Quarantine, "user.a: NO Unknown error");
    check("BAD IMAP_PROTOCOL_ERROR Failed to parse APPLY line\r\n", Disposition::Quarantine, "Refused");
    check("* Fatal error: Internal error\r\n", Disposition::Reconnect, "Internal error");
    check("* BYE going down\r\n", Disposition::Reconnect, "going down");
    check("", Disposition::Reconnect, "closed the connection");
    check("* MAILBOX %(", Disposition::Reconnect, "closed the connection");
}

#[test]
fn a_rename_said_twice_is_one() {
    let there = USER.1.replace("user.a ", "user.a.new ");
    let script =
        [("GET MAILBOXES (user.a.old user.a.new)", there.as_str()), ("GET MAILBOXES (user.a.x user.a.y)", "OK\r\n")];
    let (mut session, _told) = session(&script);
    let rename = |from: &str, to: &str| Step::Rename {
        uniqueid: "u".into(),
        from: from.into(),
        to: to.into(),
        partition: "here".into(),
        uidvalidity: 7,
    };
    session.apply(&rename("user.a.old", "user.a.new"), &Bodies(Vec::new())).expect("done before");
    let error = session.apply(&rename("user.a.x", "user.a.y"), &Bodies(Vec::new()));
    assert!(matches!(error, Err(ReplicaError::NoSuchMailbox(_))), "{error:?}");
}

/// As 2.5.17 takes it (`sync_client` of that release says the same): a file each for text and bytecode, under its own name
/// for the user.
#[test]
fn before_3_0_bytecode_comes_along_and_a_dot_in_a_user_is_a_caret() {
    let script = [
        LOGIN[0],
        LOGIN[1],
        ("APPLY SIEVE %(USERID jane^doe@a.test FILENAME main.script ", "OK success\r\n"),
        ("APPLY SIEVE %(USERID jane^doe@a.test FILENAME main.bc ", "OK success\r\n"),
        ("APPLY SUB %(USERID jane^doe MBOXNAME user.jane^doe.x)", "OK success\r\n"),
        (
            "GET USER jane^doe",
            "* MAILBOX %(UNIQUEID u MBOXNAME user.jane^doe LAST_UID 0 HIGHESTMODSEQ 9 PARTITION default ANNOTATIONS \
             (%(ENTRY /comment USERID jane^doe VALUE mine)))\r\nOK success\r\n",
        ),
    ];
    // Text and bytecode without a line end, so that each request is one line and the one that ends it.
    let script: Vec<(&str, &str)> = script
        .into_iter()
        .flat_map(|(request, answer)| match request.contains("SIEVE") {
            true => vec![(request, ""), ("keep;)", answer)],
            false => vec![(request, answer)],
        })
        .collect();
    let (target, _told) = server("* SASL PLAIN\r\n* OK r.test Cyrus sync server 2.5.17\r\n", &script);
    let mut session = target.open().expect("a session");
    let put = Step::SievePut {
        user: "jane.doe@a.test".into(),
        name: "main".into(),
        last_update: 1,
        content: b"keep;".to_vec(),
        compiled: b"keep;".to_vec(),
    };
    session.apply(&put, &Bodies(Vec::new())).expect("both files");
    let subscribe = Step::Subscribe { user: "jane.doe".into(), name: "user.jane^doe.x".into() };
    session.apply(&subscribe, &Bodies(Vec::new())).expect("subscribed");
    let account = session.view_user(&"jane.doe".into()).expect("a view");
    assert_eq!(account.mailboxes[0].annotations[0].userid, "jane.doe".into());
}

/// As a real 2.4.22 takes it: UNANNOTATION would kill it, a value `NIL` removes, and what is not there is `NO`.
#[test]
fn an_annotation_is_taken_from_2_4_by_the_value_nil() {
    let none = ("GET ANNOTATION \"\"", "OK success\r\n");
    let one =
        ("GET ANNOTATION \"\"", "* ANNOTATION %(MBOXNAME \"\" ENTRY /comment USERID \"\" VALUE x)\r\nOK success\r\n");
    let nil = ("APPLY ANNOTATION %(MBOXNAME \"\" ENTRY /comment USERID \"\" VALUE \"NIL\")", "OK success\r\n");
    let banner = "* SASL PLAIN\r\n* OK r.test Cyrus sync server v2.4.22\r\n";
    let (target, told) = server(banner, &[LOGIN[0], LOGIN[1], one, nil, none]);
    let mut session = target.open().expect("a session");
    let remove = Step::RemoveServerAnnotation { entry: b"/comment".to_vec(), userid: "".into() };
    for _ in 0..2 {
        session.apply(&remove, &Bodies(Vec::new())).expect("removed");
    }
    drop(session);
    assert_eq!(told.iter().filter(|line| line.contains("ANNOTATION")).count(), 3);
}

/// As a real 2.4.22 answers where `annotation_definitions` does not name the entry. It does not mean that we are no admin.
#[test]
fn an_annotation_that_nobody_has_defined_stops_nothing_else() {
    let no = ("APPLY ANNOTATION %(MBOXNAME \"\" ENTRY /vendor/x/y ", "NO Permission denied\r\n");
    let (target, _told) = server(BANNER, &[LOGIN[0], LOGIN[1], no, ("NOOP", "OK success\r\n")]);
    let mut session = target.open().expect("a session");
    let (entry, value) = (b"/vendor/x/y".to_vec(), b"z".to_vec());
    let set = Step::ServerAnnotation(Annotation { entry, userid: "".into(), value, modseq: ModSeq(0) });
    let error = session.apply(&set, &Bodies(Vec::new())).expect_err("is not taken");
    assert_eq!(error.disposition(), Disposition::Quarantine, "{error}");
    assert!(error.to_string().contains("annotation_definitions"), "{error}");
    session.ping().expect("goes on");
}
