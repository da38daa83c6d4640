//! Strangers, users without rights, and administrators who mean no good: nothing outside the store, nothing that grows,
//! nothing that ends, and good clients are served meanwhile.

use super::super::archive::Source;
use super::super::util::cyrus::{PASSWORD, REPLICATOR};
use super::super::util::{CyrusServer, Rng, cyrus, eventually};
use super::clients::served_source;
use super::grammar::{Mutants, Recorded};
use super::talk::{Talk, plain};
use super::{Kind, Served, open};
use spooltap::model::{MailboxView, MboxName, Replica};
use std::collections::BTreeSet;
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
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
    // Files with a `#` count for nothing. What no confirmation waits for comes a little later.
    let shown = || tree(dir.path()).into_iter().filter(|path| !path.contains('#')).collect::<BTreeSet<_>>();
    let is_settled = |shown: &BTreeSet<String>| {
        let generations = shown.iter().filter(|path| path.contains("/mailboxes/good0001/")).count();
        generations == 2 && shown.iter().any(|path| path.ends_with(".eml"))
    };
    let before = eventually(Duration::from_secs(30), || Some(shown()).filter(is_settled));
    let before = before.unwrap_or_else(|| panic!("{:?}", shown()));
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
    assert_eq!(shown(), before);
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

/// What one client may keep in memory without saying much: bodies without bytes, names to reserve from, lists of lists.
#[test]
fn small_things_are_counted_too() {
    let dir = tempfile::tempdir().expect("directory");
    let served = Served::start(dir.path(), &["--max-request", "8", "--max-memory", "24"]);
    let mut session = open(&served);
    let mut good = Good::make(&mut *session);
    let guid = good.source.snapshot.records[0].guid;
    let login = || Talk::login(served.address, REPLICATOR, PASSWORD).expect("logs in");
    // The same name again and again is one answer.
    let mut talk = login();
    let names = "user.good ".repeat(50_000);
    let answers = talk.ask(format!("GET MAILBOXES ({names})\r\n").as_bytes()).expect("answers");
    assert_eq!(answers.len(), 2);
    // Until there is no more room, and not for ever.
    let ends = |what: &str, request: &dyn Fn(u32) -> Vec<u8>| {
        // The one before is gone once what it held is given back.
        let begun = eventually(Duration::from_secs(20), || {
            let mut talk = login();
            talk.said(&request(0)).starts_with("OK ").then_some(talk)
        });
        let mut talk = begun.unwrap_or_else(|| panic!("{what}: not even once"));
        let ended = (1..400).find(|round| !talk.said(&request(*round)).starts_with("OK "));
        assert!(ended.is_some(), "{what} have no end");
    };
    ends("bodies", &|round| {
        let bodies = (0..2000).map(|n| format!("%{{default {:040x} 0}}\r\n", u64::from(round) << 32 | n));
        format!("APPLY MESSAGE ({})\r\n", bodies.collect::<String>()).into_bytes()
    });
    ends("names", &|round| {
        let names: String = (0..2000).map(|n| format!("user.r{round}x{n} ")).collect();
        format!("APPLY RESERVE %(PARTITION default MBOXNAME ({names}) GUID ({guid}))\r\n").into_bytes()
    });
    ends("lists", &|round| format!("GET MAILBOXES ({})\r\n", "x ".repeat(1 << (2 * round.min(10)))).into_bytes());
    assert!(memory(&served, "VmHWM") < 120 << 10, "{} KiB", memory(&served, "VmHWM"));
    good.works(&mut *session);
}

/// Requests of the fuzz test that are answered: as many as take some seconds in an unoptimized build.
const LINES: u32 = 6_000;
/// Hostile connections at the same time.
const GANG: u64 = 3;

/// Answers to requests: done, refused, not understood; and connections that were packed or ended.
#[derive(Default)]
struct Answers([AtomicU32; 4]);

impl Answers {
    fn add(&self, answer: &[u8]) {
        let kinds: [&[u8]; 4] = [b"OK", b"NO", b"BAD", b"* Fatal"];
        if let Some(at) = kinds.iter().position(|start| answer.starts_with(start)) {
            self.0[at].fetch_add(1, Ordering::SeqCst);
        }
    }

    fn count(&self) -> u32 {
        self.0.iter().map(|count| count.load(Ordering::SeqCst)).sum()
    }
}

/// One hostile connection, logged in or not.
fn attack(served: &Served, mutants: &mut Mutants<'_>, answers: &Answers) {
    let logged_in = mutants.rng.below(12) > 0;
    let talk = match logged_in {
        true => Talk::login(served.address, REPLICATOR, PASSWORD),
        false => Talk::connect(served.address),
    };
    // Of too many who have not logged in the oldest is sent away.
    let Ok(mut talk) = talk else { return };
    let lines = if logged_in { 40 } else { 10 };
    let mut burst = mutants.burst(lines);
    burst.extend_from_slice(b"\r\n))))))\"\r\nEXIT\r\n");
    if mutants.rng.below(6) == 0 && talk.said(b"COMPRESS DEFLATE\r\n") == "OK DEFLATE active" {
        // Packed as it should be, or not at all.
        let mut packed = Vec::new();
        if mutants.rng.below(3) > 0 {
            let mut deflate = flate2::Compress::new(flate2::Compression::fast(), false);
            packed.reserve(burst.len() * 2 + 100);
            deflate.compress_vec(&burst, &mut packed, flate2::FlushCompress::Sync).expect("packs");
            if mutants.rng.below(3) == 0 {
                let at = mutants.rng.below(packed.len());
                packed[at] ^= 0x10;
            }
        }
        let _ = talk.send(if packed.is_empty() { &burst } else { &packed });
        talk.drain();
        return answers.add(b"* Fatal");
    }
    // All at once: whoever sends that much has to be read while it sends.
    let mut writer = talk.writer();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let _ = std::io::Write::write_all(&mut writer, &burst);
            let _ = writer.shutdown(std::net::Shutdown::Write);
        });
        while let Ok(answer) = talk.answer() {
            answers.add(&answer);
        }
    });
}

/// A request that comes byte by byte.
fn drip(served: &Served, is_over: &AtomicBool) {
    let mut talk = Talk::login(served.address, REPLICATOR, PASSWORD).expect("logs in");
    for byte in b"GET MAILBOXES (user.good)\r\n" {
        talk.send(&[*byte]).expect("is read");
        if !is_over.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(40));
        }
    }
    let mut last = Vec::new();
    while !last.starts_with(b"OK") {
        last = talk.answer().expect("answers");
        assert!(last.starts_with(b"* MAILBOX") || last.starts_with(b"OK"), "{}", String::from_utf8_lossy(&last));
    }
}

/// `VmHWM` or `VmRSS` of the server, in KiB.
fn memory(served: &Served, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", served.pid())).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(':')).expect("a figure");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn malformed_requests_do_no_harm() {
    attacked(Kind::Archive, LINES);
}

#[test]
fn malformed_requests_do_no_harm_to_a_cyrus_directory() {
    attacked(Kind::Cyrus, LINES / 2);
}

fn attacked(kind: Kind, lines: u32) {
    let dir = tempfile::tempdir().expect("directory");
    let place = dir.path().join("a/b/c");
    std::fs::create_dir_all(&place).expect("directory");
    let served = Served::of(kind, &place, &["--max-request", "4", "--max-memory", "64"]);
    let mut session = open(&served);
    let mut good = Good::make(&mut *session);
    let lines = std::env::var("SPOOLTAP_FUZZ_LINES").ok().and_then(|text| text.parse().ok()).unwrap_or(lines);
    let seed: u64 = std::env::var("SPOOLTAP_FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x5eed);
    let recorded = Recorded::read();
    let (answers, connections, is_over) = (Answers::default(), AtomicU32::new(0), AtomicBool::new(false));
    let real = cyrus::installed().then(|| {
        let options = served_source(&served).users(&["honest"]);
        CyrusServer::start(options).expect("starts")
    });
    let begun = std::time::Instant::now();
    let mut early = 0;
    std::thread::scope(|scope| {
        for number in 0..GANG {
            let (served, from, answers, connections) = (&served, &recorded, &answers, &connections);
            scope.spawn(move || {
                let mut mutants = Mutants { rng: Rng::new(seed * GANG + number), from };
                while answers.count() < lines {
                    attack(served, &mut mutants, answers);
                    connections.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let slow = scope.spawn(|| drip(&served, &is_over));
        let honest = real.as_ref().map(|real| {
            let (served, is_over) = (&served, &is_over);
            scope.spawn(move || {
                let mut runs = 0;
                while runs == 0 || !is_over.load(Ordering::SeqCst) {
                    let text = format!("Subject: {runs}\r\n\r\nhonest mail\r\n");
                    real.lmtp().expect("connects").deliver(&["honest"], text.as_bytes()).expect("delivers");
                    let output = real.tool("sync_client", &["-v", "-u", "honest"]).expect("runs");
                    super::clients::good("a real client", &output, served);
                    runs += 1;
                }
                runs
            })
        });
        while answers.count() < lines {
            good.works(&mut *session);
            if early == 0 && answers.count() > lines / 5 {
                early = memory(&served, "VmRSS");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        is_over.store(true, Ordering::SeqCst);
        slow.join().expect("is served");
        if let Some(honest) = honest {
            let runs = honest.join().expect("is served");
            println!("{runs} runs of a real client meanwhile");
            let view = session.view_full(&MboxName::from("user.honest")).expect("views").expect("is there");
            assert_eq!(view.records.map(|records| records.len()), Some(runs));
        }
    });
    good.works(&mut *session);
    let (peak, rss) = (memory(&served, "VmHWM"), memory(&served, "VmRSS"));
    println!(
        "answers {:?} (OK, NO, BAD, ended) on {} connections in {:?}; memory {early} KiB early, {rss} KiB at the end, \
         {peak} KiB at most",
        answers.0,
        connections.load(Ordering::SeqCst),
        begun.elapsed()
    );
    assert!(!served.log().contains("panicked"), "{}", panics(&served.log()));
    assert!(peak < 300 << 10, "{peak} KiB at most were in use");
    let beside = |dir: &Path| -> BTreeSet<String> {
        let all = std::fs::read_dir(dir).expect("lists").flatten();
        all.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let store = kind.place(Path::new("")).display().to_string();
    assert_eq!(beside(&place), [store, "passwords".into(), "serve.log".into()].into());
    for (folder, only) in [("", "a"), ("a", "b"), ("a/b", "c")] {
        assert_eq!(beside(&dir.path().join(folder)), [only.to_owned()].into());
    }
    assert_eq!(served.terminate().code(), Some(0));
}

/// The lines about panics, with what follows each.
fn panics(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let at = lines.iter().enumerate().filter(|(_, line)| line.contains("panicked")).map(|(at, _)| at);
    at.take(20).flat_map(|at| lines.iter().skip(at).take(3)).copied().collect::<Vec<_>>().join("\n")
}
