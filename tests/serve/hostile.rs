//! Strangers, users without rights, and administrators who mean no good: nothing outside the store, nothing that grows,
//! nothing that ends, and good clients are served meanwhile.

use super::super::archive::Source;
use super::super::util::cyrus::{PASSWORD, REPLICATOR};
use super::super::util::{Rng, eventually};
use super::talk::{Talk, plain};
use super::{Served, open};
use spooltap::model::{MailboxView, MboxName, Replica};
use std::collections::BTreeSet;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

/// Everything below a directory.
fn tree(dir: &Path) -> BTreeSet<String> {
    let all = walkdir::WalkDir::new(dir).into_iter().flatten();
    all.map(|entry| entry.path().strip_prefix(dir).expect("below").display().to_string()).collect()
}

/// A mailbox that has to stay as it is.
struct Good {
    source: Source,
}

impl Good {
    fn make(session: &mut dyn Replica) -> Self {
        let mut source = Source::new("good0001", "user.good");
        source.append("From: a\r\n\r\nfirst\r\n");
        session.apply(&source.step(None), &source.bodies).expect("applies");
        Self { source }
    }

    /// It grows by a message, and is shown with all of them.
    fn works(&mut self, session: &mut dyn Replica) {
        let since = self.source.since();
        self.source.append(&format!("From: a\r\n\r\n{}\r\n", self.source.snapshot.records.len()));
        session.apply(&self.source.step(Some(since)), &self.source.bodies).expect("applies");
        let view: MailboxView = session.view_full(&MboxName::from("user.good")).expect("views").expect("is there");
        assert_eq!(view.records.as_deref(), Some(&*self.source.snapshot.records));
        assert_eq!(view.crc_basic, Some(self.source.crcs().basic));
    }
}

#[test]
fn who_has_no_rights_gets_nothing() {
    let dir = tempfile::tempdir().expect("directory");
    let served = Served::start(dir.path(), &[]);
    let mut stranger = Talk::connect(served.address).expect("connects");
    for request in ["GET USER u1\r\n", "APPLY UNUSER u1\r\n", "APPLY MESSAGE ()\r\n"] {
        assert_eq!(stranger.said(request.as_bytes()), "NO Please authenticate first");
    }
    assert_eq!(stranger.said(b"NOOP\r\n"), "OK Noop completed");
    assert_eq!(stranger.said(b"C01 CAPABILITY\r\n"), "C01 BAD Unrecognized command");
    for _ in 0..2 {
        assert_eq!(stranger.said(plain(REPLICATOR, "wrong").as_bytes()), "NO authentication failure");
    }
    assert_eq!(stranger.said(plain("nobody", PASSWORD).as_bytes()), "NO authentication failure");
    assert!(
        ["unexpected end of file", "connection reset", "broken pipe"].contains(&stranger.said(b"NOOP\r\n").as_str())
    );
    // One who may log in, but not replicate.
    let mut user = Talk::login(served.address, "user", PASSWORD).expect("logs in");
    for request in ["GET USER u1\r\n", "APPLY UNUSER u1\r\n", "NOOP\r\n", "RESTART\r\n"] {
        assert_eq!(user.said(request.as_bytes()), "NO Permission denied");
    }
    // LOGIN asks for both.
    let mut admin = Talk::connect(served.address).expect("connects");
    assert_eq!(admin.said(b"AUTHENTICATE LOGIN\r\n"), "+ VXNlcm5hbWU6");
    assert_eq!(admin.said(b"cmVwbA==\r\n"), "+ UGFzc3dvcmQ6");
    assert_eq!(admin.said(b"c2VjcmV0\r\n"), "OK Success (no protection)");
    assert_eq!(admin.said(b"GET USER u1\r\n"), "OK success");
}

#[test]
fn names_do_not_leave_the_store() {
    let dir = tempfile::tempdir().expect("directory");
    let place = dir.path().join("a/b/c");
    std::fs::create_dir_all(&place).expect("directory");
    let served = Served::start(&place, &[]);
    let mut session = open(&served);
    let mut good = Good::make(&mut *session);
    let before = tree(dir.path());
    let mut talk = Talk::login(served.address, REPLICATOR, PASSWORD).expect("logs in");
    let guid = "de1a24f844ec1fb8728748225d649c3655d68214";
    for bad in ["../../x", "..", "/etc/passwd", "user..x", "a/b", "x\\\\../y", &"x".repeat(600), ".", "user.x/../../y"]
    {
        let mailbox = |id: &str, name: &str, partition: &str| {
            format!(
                "APPLY MAILBOX %(UNIQUEID \"{id}\" MBOXNAME \"{name}\" LAST_UID 0 HIGHESTMODSEQ 1 RECENTUID 0 RECENTTIME 0 \
                 LAST_APPENDDATE 0 POP3_LAST_LOGIN 0 UIDVALIDITY 1 PARTITION \"{partition}\" ACL \"\" OPTIONS \"\" SYNC_CRC 0 RECORD ())\r\n"
            )
        };
        for request in [
            mailbox("good0002", bad, "default"),
            mailbox(bad, "user.new", "default"),
            mailbox("good0002", "user.new", bad),
            format!("APPLY RENAME %(OLDMBOXNAME user.good NEWMBOXNAME \"{bad}\" PARTITION default)\r\n"),
            format!("APPLY RENAME %(OLDMBOXNAME user.good NEWMBOXNAME user.other PARTITION \"{bad}\")\r\n"),
            format!("APPLY SEEN %(USERID good UNIQUEID \"{bad}\" LASTREAD 1 LASTUID 1 LASTCHANGE 1 SEENUIDS 1)\r\n"),
            format!("APPLY SUB %(USERID good MBOXNAME \"{bad}\")\r\n"),
            format!("APPLY UNMAILBOX \"{bad}\"\r\n"),
            format!("APPLY QUOTA %(ROOT \"{bad}\" LIMIT 5)\r\n"),
            format!("APPLY ANNOTATION %(MBOXNAME \"{bad}\" ENTRY /comment USERID \"\" VALUE x)\r\n"),
            format!("GET FETCH %(MBOXNAME \"{bad}\" PARTITION default UNIQUEID x GUID {guid} UID 1)\r\n"),
            format!("GET FULLMAILBOX \"{bad}\"\r\n"),
        ] {
            let said = talk.said(request.as_bytes());
            assert!(said.starts_with("NO IMAP_"), "{request}: {said}");
        }
        if !bad.contains("..x") && !bad.contains('\\') {
            for request in [
                format!("APPLY SIEVE %(USERID \"{bad}\" FILENAME m.script LAST_UPDATE 1 CONTENT \"keep;\")\r\n"),
                format!("APPLY SIEVE %(USERID good FILENAME \"{bad}.script\" LAST_UPDATE 1 CONTENT \"keep;\")\r\n"),
                format!("APPLY SUB %(USERID \"{bad}\" MBOXNAME user.good)\r\n"),
            ] {
                let said = talk.said(request.as_bytes());
                assert!(said.starts_with("NO IMAP_"), "{request}: {said}");
            }
        }
    }
    // A body that is not what it says it is, and one that nobody sent.
    let record = |guid: &str| {
        format!(
            "APPLY MAILBOX %(UNIQUEID good0003 MBOXNAME user.new LAST_UID 1 HIGHESTMODSEQ 2 RECENTUID 0 RECENTTIME 0 \
             LAST_APPENDDATE 0 POP3_LAST_LOGIN 0 POP3_SHOW_AFTER 0 UIDVALIDITY 1 PARTITION default ACL \"\" OPTIONS \"\" SYNC_CRC 0 \
             RECORD (%(UID 1 MODSEQ 2 LAST_UPDATED 1 FLAGS () INTERNALDATE 1 SIZE 5 GUID {guid})))\r\n"
        )
    };
    assert_eq!(talk.said(format!("APPLY MESSAGE (%{{default {guid} 5}}\r\nwrong)\r\n").as_bytes()), "OK success");
    assert!(talk.said(record(guid).as_bytes()).starts_with("NO IMAP_IOERROR"));
    assert!(talk.said(record(&guid.replace('d', "e")).as_bytes()).starts_with("NO IMAP_SYNC_CHECKSUM"));
    assert_eq!(tree(dir.path()), before);
    good.works(&mut *session);
}

#[test]
fn limits_hold_and_good_clients_are_served() {
    let dir = tempfile::tempdir().expect("directory");
    let served = Served::start(
        dir.path(),
        &["--max-request", "1", "--max-memory", "16", "--max-staged", "1", "--max-connections", "4"],
    );
    let mut session = open(&served);
    let mut good = Good::make(&mut *session);
    // Many who say nothing, or begin and do not end.
    let mut idle: Vec<TcpStream> = Vec::new();
    for number in 0..150 {
        let mut stream = TcpStream::connect(served.address).expect("connects");
        if number % 2 == 0 {
            let _ = std::io::Write::write_all(&mut stream, b"AUTHENTICATE PL");
        }
        idle.push(stream);
    }
    let mut more = Talk::login(served.address, REPLICATOR, PASSWORD).expect("a good client comes through");
    assert_eq!(more.said(b"NOOP\r\n"), "OK Noop completed");
    good.works(&mut *session);
    // A line without an end, before logging in and after.
    let mut stranger = Talk::connect(served.address).expect("connects");
    let _ = stranger.send(&[b'x'; 20_000]);
    assert!(stranger.answer().is_ok_and(|line| line.starts_with(b"* Fatal error")));
    for request in [
        [&b"GET USER "[..], &[b'x'; 2 << 20]].concat(),
        b"APPLY SIEVE %(USERID u FILENAME x.script LAST_UPDATE 1 CONTENT {4000000000+}\r\n".to_vec(),
        [&b"APPLY MAILBOX "[..], &[b'('; 200]].concat(),
        b"APPLY MESSAGE (%{default x 99999999999999}\r\n".to_vec(),
    ] {
        let mut talk = Talk::login(served.address, REPLICATOR, PASSWORD).expect("logs in");
        let _ = talk.send(&request);
        let end = eventually(Duration::from_secs(30), || match talk.answer() {
            Ok(line) => line.starts_with(b"* Fatal error").then_some(true),
            Err(error) => Some(error.kind() == std::io::ErrorKind::ConnectionReset),
        });
        assert_eq!(end, Some(true));
    }
    // More bodies than one connection may have, and again after they were dropped.
    let body = |number: u32, size: usize| {
        let guid = format!("{number:040x}");
        [format!("APPLY MESSAGE (%{{default {guid} {size}}}\r\n").as_bytes(), &vec![b'x'; size], b")\r\n"].concat()
    };
    assert_eq!(more.said(&body(1, 700_000)), "OK success");
    assert!(more.said(&body(2, 700_000)).starts_with("NO IMAP_IOERROR"));
    assert_eq!(more.said(b"RESTART\r\n"), "OK Restarting");
    assert_eq!(more.said(&body(2, 700_000)), "OK success");
    // No more than so many are let in, and one that leaves makes room.
    let mut in_house = vec![more];
    let refused = eventually(Duration::from_secs(30), || match Talk::login(served.address, REPLICATOR, PASSWORD) {
        Ok(talk) => {
            in_house.push(talk);
            None
        }
        Err(error) => Some(error.to_string()),
    });
    assert!(in_house.len() <= 4 && refused.is_some(), "{} {refused:?}", in_house.len());
    drop(in_house);
    let again = eventually(Duration::from_secs(30), || Talk::login(served.address, REPLICATOR, PASSWORD).ok());
    assert!(again.is_some());
    good.works(&mut *session);
    drop(idle);
    assert!(!served.log().contains("panicked"), "{}", served.log());
}

/// Lines of the protocol, whole and broken, from a seed.
struct Grammar<'a>(&'a mut Rng);

impl Grammar<'_> {
    fn pick<'b>(&mut self, from: &[&'b str]) -> &'b str {
        from[self.0.below(from.len())]
    }

    fn value(&mut self, depth: u32) -> String {
        match self.0.below(if depth > 3 { 8 } else { 12 }) {
            0 => "NIL".into(),
            1 => self
                .pick(&["0", "1", "5", "4294967295", "18446744073709551615", "-1", "99999999999999999999999"])
                .into(),
            2 => self
                .pick(&[
                    "user.f1",
                    "user.f2",
                    "user.f1.Sub",
                    "user.goo",
                    "\"\"",
                    "DELETED.user.f1.6B",
                    "d!user.f3",
                    "../x",
                    "a\\b",
                ])
                .into(),
            3 => self.pick(&["f1", "f2", "\"a b\"", "\"x\\\"y\"", "\"unclosed"]).into(),
            4 => {
                format!("{{{}+}}\r\n{}", self.0.below(12), self.pick(&["", "abc", "keep;\r\n", "(((", "\"", "\u{e4}"]))
            }
            5 => self.pick(&["f0000001", "f0000002", "\\Seen", "\\Expunged", "$Flag", "a%b", "%x", "{x}"]).into(),
            6 => self
                .pick(&["de1a24f844ec1fb8728748225d649c3655d68214", "0000000000000000000000000000000000000000", "xyz"])
                .into(),
            7 => self
                .pick(&["default", "\"f1\\tlrswipkxtecdan\\t\"", "P", "PSDA", "m.script", "m.bc", "/comment"])
                .into(),
            8 => format!("({})", self.list(depth)),
            9 => format!("%({})", self.fields(depth)),
            10 => format!("(({}", self.value(depth + 1)),
            _ => format!("%{{default de1a24f844ec1fb8728748225d649c3655d68214 {}}}\r\nabc", self.0.below(6)),
        }
    }

    fn list(&mut self, depth: u32) -> String {
        (0..self.0.below(4)).map(|_| self.value(depth + 1)).collect::<Vec<_>>().join(" ")
    }

    fn fields(&mut self, depth: u32) -> String {
        const KEYS: &[&str] = &[
            "UNIQUEID",
            "MBOXNAME",
            "MBOXTYPE",
            "LAST_UID",
            "HIGHESTMODSEQ",
            "RECENTUID",
            "RECENTTIME",
            "LAST_APPENDDATE",
            "POP3_LAST_LOGIN",
            "UIDVALIDITY",
            "PARTITION",
            "ACL",
            "OPTIONS",
            "SYNC_CRC",
            "SYNC_CRC_ANNOT",
            "RECORD",
            "UID",
            "MODSEQ",
            "LAST_UPDATED",
            "FLAGS",
            "INTERNALDATE",
            "SIZE",
            "GUID",
            "ANNOTATIONS",
            "ENTRY",
            "USERID",
            "VALUE",
            "FILENAME",
            "LAST_UPDATE",
            "CONTENT",
            "ROOT",
            "LIMIT",
            "STORAGE",
            "OLDMBOXNAME",
            "NEWMBOXNAME",
            "SINCE_MODSEQ",
            "SEENUIDS",
            "LASTREAD",
            "LASTUID",
            "LASTCHANGE",
        ];
        (0..self.0.below(8))
            .map(|_| format!("{} {}", self.pick(KEYS), self.value(depth + 1)))
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// An update that has all its fields, some of them odd.
    fn mailbox(&mut self) -> String {
        let (id, name) =
            (self.pick(&["f0000001", "f0000002", "f0000003"]), self.pick(&["user.f1", "user.f2", "user.f1.Sub"]));
        let (uid, modseq) = (self.0.below(5), self.0.below(9));
        let record = match self.0.below(3) {
            0 => String::new(),
            1 => format!("%({})", self.fields(1)),
            _ => format!(
                "%(UID {} MODSEQ {} LAST_UPDATED 5 FLAGS ({}) INTERNALDATE 5 SIZE 3 GUID a9993e364706816aba3e25717850c26c9cd0d89d)",
                self.0.below(5),
                self.0.below(9),
                self.pick(&["", "\\Seen", "\\Expunged", "a b c", "NIL"])
            ),
        };
        let kind = self.pick(&["", "MBOXTYPE ei", "MBOXTYPE d", "MBOXTYPE r", "MBOXTYPE zzz"]);
        format!(
            "APPLY MAILBOX %(UNIQUEID {id} MBOXNAME {name} {kind} LAST_UID {uid} HIGHESTMODSEQ {modseq} RECENTUID 0 RECENTTIME 0 \
             LAST_APPENDDATE 0 POP3_LAST_LOGIN 0 UIDVALIDITY 1 PARTITION default ACL x OPTIONS P SYNC_CRC 0 RECORD ({record}))\r\n"
        )
    }

    fn line(&mut self) -> Vec<u8> {
        const WHAT: &[&str] = &[
            "USER",
            "META",
            "MAILBOXES",
            "UNIQUEIDS",
            "FULLMAILBOX",
            "QUOTA",
            "ANNOTATION",
            "FETCH",
            "FETCH_SIEVE",
            "MESSAGE",
            "RESERVE",
            "MAILBOX",
            "EXPUNGE",
            "RENAME",
            "UNMAILBOX",
            "UNUSER",
            "SUB",
            "UNSUB",
            "SEEN",
            "UNQUOTA",
            "UNANNOTATION",
            "SIEVE",
            "UNSIEVE",
            "ACTIVATE_SIEVE",
            "UNACTIVATE_SIEVE",
            "FORCE",
            "CAPABILITIES",
            "LOCAL_RENAME",
            "NONSENSE",
        ];
        let mut line = match self.0.below(10) {
            0 => self.mailbox(),
            1 => "APPLY MESSAGE (%{default a9993e364706816aba3e25717850c26c9cd0d89d 3}\r\nabc)\r\n".into(),
            2..=4 => format!("{} {} %({})\r\n", self.pick(&["GET", "APPLY", "apply"]), self.pick(WHAT), self.fields(0)),
            5..=6 => format!("{} {} {}\r\n", self.pick(&["GET", "APPLY", "RESTORE"]), self.pick(WHAT), self.value(0)),
            7 => self
                .pick(&[
                    "RESTART\r\n",
                    "NOOP\r\n",
                    "\r\n",
                    "GET\r\n",
                    "APPLY  \r\n",
                    "XYZZY\r\n",
                    "COMPRESS LZMA\r\n",
                    "AUTHENTICATE PLAIN\r\n",
                ])
                .into(),
            _ => self.mailbox(),
        }
        .into_bytes();
        // Now and then a byte is another one, is missing, or the line ends early.
        match self.0.below(12) {
            0 => {
                let at = self.0.below(line.len());
                line[at] = self.0.below(256) as u8;
            }
            1 => drop(line.remove(self.0.below(line.len()))),
            2 => line.truncate(self.0.below(line.len())),
            _ => {}
        }
        line
    }
}

/// Requests of the fuzz test: as many as take some seconds in an unoptimized build.
const LINES: u32 = 6_000;

#[test]
fn malformed_requests_do_no_harm() {
    let dir = tempfile::tempdir().expect("directory");
    let served = Served::start(dir.path(), &["--max-request", "4", "--max-memory", "64"]);
    let mut session = open(&served);
    let mut good = Good::make(&mut *session);
    let lines = std::env::var("SPOOLTAP_FUZZ_LINES").ok().and_then(|text| text.parse().ok()).unwrap_or(LINES);
    let mut rng = Rng::new(0x5eed);
    let (mut sent, mut connections) = (0, 0);
    while sent < lines {
        let Ok(mut talk) = Talk::login(served.address, REPLICATOR, PASSWORD) else { panic!("{}", served.log()) };
        connections += 1;
        // All at once and then the end, or one by one as long as there are answers.
        let burst: Vec<u8> = (0..40).flat_map(|_| Grammar(&mut rng).line()).filter(|byte| *byte != 0).collect();
        sent += 40;
        let _ = talk.send(&burst);
        let _ = talk.send(b"\r\n))))))\"\r\nEXIT\r\n");
        talk.stop_sending();
        while talk.answer().is_ok() {}
        if connections % 20 == 0 {
            good.works(&mut *session);
        }
    }
    good.works(&mut *session);
    println!("{sent} lines on {connections} connections");
    assert!(!served.log().contains("panicked"), "{}", served.log());
    let status = std::fs::read_to_string(format!("/proc/{}/status", served.pid())).expect("it lives");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("peak");
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(peak < 300 << 10, "{peak} KiB at most were in use");
    let beside: BTreeSet<String> = std::fs::read_dir(dir.path())
        .expect("lists")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(beside, ["archive", "passwords", "serve.log"].map(str::to_owned).into());
    assert_eq!(served.terminate().code(), Some(0));
}
