//! One function per parser: any bytes are an error or a value, and what must hold of a value is asserted. The fuzz
//! targets call these, and so do the tests (`tests/formats/parsers.rs`), with seeds from the fixtures.

use spooltap::csync::codec::Splitter;
use spooltap::csync::sasl::{Identity, Login, Terms};
use spooltap::csync::{command, intake, reply, request};
use spooltap::cyrus::imapd_conf::ImapdConf;
use spooltap::cyrus::{annotations, date, db, header, index, mboxlist, quota, seen, subs, sync_log, user_deny};
use spooltap::dlist::{self, Literals};
use spooltap::model::{MessageGuid, UserId};

/// Takes any bytes; panics where a promise is broken.
pub type Check = fn(&[u8]);

/// By name; each has a file of that name in `fuzz_targets/`.
pub const PARSERS: &[(&str, Check)] = &[
    ("twoskip", twoskip),
    ("skiplist", skiplist),
    ("flat", flat),
    ("index", cyrus_index),
    ("header", cyrus_header),
    ("dlist", list),
    ("codec", codec),
    ("mboxlist", mailbox_row),
    ("imapd_conf", conf),
    ("values", values),
    ("sync_log", log),
    ("intake", requests),
    ("sasl", login),
    ("encoders", encoders),
    ("mailbox_view", mailbox_view),
];

pub fn twoskip(bytes: &[u8]) {
    database(bytes, b"\xa1\x02\x8b\x0dtwoskip file\0\0\0\0");
}

pub fn skiplist(bytes: &[u8]) {
    database(bytes, b"\xa1\x02\x8b\x0dskiplist file\0\0\0");
}

/// Text databases: flat, quotalegacy, and what is kept in them.
pub fn flat(bytes: &[u8]) {
    database(bytes, b"");
}

fn database(bytes: &[u8], magic: &[u8]) {
    let whole;
    let file = match bytes.starts_with(magic) {
        true => bytes,
        false => {
            whole = [magic, bytes].concat();
            &whole
        }
    };
    let parsed = db::parse(file);
    let mut follower = db::Follower::new();
    let followed = follower.update(1, &mut |at, len| {
        let start = usize::try_from(at).unwrap_or(usize::MAX).min(file.len());
        Ok(file[start..start.saturating_add(len).min(file.len())].to_vec())
    });
    if let (Ok(map), Ok(_)) = (&parsed, &followed) {
        assert_eq!(map, follower.map(), "read at once or followed: the same");
    }
    let Ok(map) = parsed else { return };
    mboxlist::parse(&map, Some(b"server"));
    seen::parse(&map);
    subs::parse(&map, &UserId::from("user"));
    for (key, value) in &map {
        let _ = quota::parse(value);
        let _ = annotations::parse_value(value);
        let _ = annotations::parse_key(key);
    }
}

/// `cyrus.index` of every version.
pub fn cyrus_index(bytes: &[u8]) {
    let Ok(header) = index::parse_header(bytes) else { return };
    if let Ok(records) = index::parse_records(&header, bytes) {
        assert!(records.len() * 40 <= bytes.len(), "no more records than there are bytes for");
        index::uncommitted(&header, &records);
    }
    let _ = index::parse_unsorted(&header, bytes);
}

pub fn cyrus_header(bytes: &[u8]) {
    let _ = header::parse(bytes);
}

/// List text; what was read is written and read again as the same, quoted as well as with literals.
pub fn list(bytes: &[u8]) {
    let Ok(value) = dlist::parse(bytes) else { return };
    for literals in [Literals::NonSynchronizing, Literals::Plain] {
        let mut out = Vec::new();
        value.encode(&mut out, literals);
        assert_eq!(dlist::parse(&out).as_ref(), Ok(&value), "{:?}", String::from_utf8_lossy(&out));
    }
}

/// What a `sync_server` sends; the same answers however the bytes arrive.
pub fn codec(bytes: &[u8]) {
    let answers = |size: usize| {
        let (mut splitter, mut out) = (Splitter::default(), Vec::new());
        for piece in bytes.chunks(size) {
            splitter.push(piece);
            loop {
                match splitter.next_answer() {
                    Ok(Some(answer)) => out.push(answer),
                    Ok(None) => break,
                    Err(error) => return (out, Some(error)),
                }
            }
        }
        (out, None)
    };
    let whole = answers(usize::MAX);
    assert_eq!(whole, answers(13), "in pieces or at once: the same");
    for answer in &whole.0 {
        let _ = command::untagged(answer);
    }
    for files in [0, 1] {
        let _ = request::parse(&intake::Line { bytes: bytes.to_vec(), files });
    }
}

/// A row of mailboxes.db: key, a line end or blank, value.
pub fn mailbox_row(bytes: &[u8]) {
    let at = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\t')).unwrap_or(bytes.len());
    let (key, value) = bytes.split_at(at);
    let value = value.get(1..).unwrap_or_default();
    let _ = mboxlist::entry_for(key, value, Some(b"server"));
    let name = mboxlist::name_of_dbname(key);
    if !name.as_bytes().contains(&0x1e) {
        let _ = mboxlist::keys_for(&name);
    }
}

pub fn conf(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut includes = 0;
    let parsed = ImapdConf::parse(&text, &mut |_| {
        includes += 1;
        if includes > 64 { Err("no more".into()) } else { Ok(text.clone().into_owned()) }
    });
    if let Ok(conf) = parsed {
        conf.path("configdirectory");
        conf.switch("virtdomains", false);
        assert!(conf.named("partition-").count() <= text.lines().count() * 64);
    }
}

/// What stands in databases, each kind of value by itself, and dates in message headers.
pub fn values(bytes: &[u8]) {
    let at = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (key, value) = bytes.split_at(at);
    let value = value.get(1..).unwrap_or_default();
    let _ = annotations::parse_key(key);
    if let Ok(Some((text, _))) = annotations::parse_value(value) {
        assert!(text.len() <= value.len());
    }
    let _ = seen::parse_value(value);
    let _ = quota::parse(value);
    let _ = quota::parse_usage(value);
    let _ = user_deny::parse_value(value);
    date::parse(value);
}

/// Lines of `sync/log`.
pub fn log(bytes: &[u8]) {
    for line in bytes.split(|byte| *byte == b'\n') {
        let _ = sync_log::parse(line);
    }
}

/// What a `sync_client` sends; the same requests and files however the bytes arrive, and no more memory than allowed.
pub fn requests(bytes: &[u8]) {
    #[derive(Debug, Default, PartialEq)]
    struct Seen(Vec<(MessageGuid, u64, Vec<u8>, bool)>);
    impl intake::Files for Seen {
        fn begin(&mut self, guid: MessageGuid, size: u64) {
            self.0.push((guid, size, Vec::new(), false));
        }
        fn data(&mut self, bytes: &[u8]) {
            self.0.last_mut().expect("has begun").2.extend_from_slice(bytes);
        }
        fn end(&mut self) {
            let last = self.0.last_mut().expect("has begun");
            assert_eq!(last.1, last.2.len() as u64, "as many bytes as were announced");
            last.3 = true;
        }
    }
    const LIMIT: usize = 4096;
    let read = |size: usize| {
        let (mut intake, mut files, mut lines) = (intake::Intake::new(LIMIT), Seen::default(), Vec::new());
        for piece in bytes.chunks(size) {
            let mut rest = piece;
            while !rest.is_empty() {
                match intake.take(rest, &mut files) {
                    Ok((count, line)) => {
                        assert!(count > 0, "goes on");
                        lines.extend(line);
                        rest = &rest[count..];
                    }
                    Err(error) => return (lines, files, Some(error.to_string())),
                }
                assert!(intake.held() <= 4 * LIMIT, "{} bytes held", intake.held());
            }
        }
        (lines, files, None)
    };
    let whole = read(usize::MAX);
    assert_eq!(whole, read(7), "in pieces or at once: the same");
    for line in &whole.0 {
        let _ = request::parse(line);
    }
}

/// A server's challenges, one in a line, to every mechanism.
pub fn login(bytes: &[u8]) {
    for mechanism in ["PLAIN", "LOGIN", "SCRAM-SHA-1", "SCRAM-SHA-256", "DIGEST-MD5", "CRAM-MD5"] {
        let who = Identity { user: "user", password: "secret", realm: None, service: "csync", host: "host" };
        let only = [];
        let terms = Terms { clear: true, certificate: false, password: true, only: &only, nonce: [7; 16] };
        let mut login = Login::start(&[mechanism.to_owned()], &who, &terms).expect("is known");
        if login.command().is_err() {
            continue;
        }
        for line in bytes.split(|byte| *byte == b'\n').take(8) {
            if login.answer(line).is_err() {
                break;
            }
        }
    }
}

/// What is written of what was read is read again as the same, in every format that we write.
pub fn encoders(bytes: &[u8]) {
    if let Ok(read) = header::parse(bytes) {
        let written = header::encode(&read);
        let again = header::parse(&written).expect("a header of ours");
        assert_eq!(header::encode(&again), written);
        assert_eq!((&again.uniqueid, &again.quotaroot), (&read.uniqueid, &read.quotaroot));
        assert!(again.user_flags.iter().flatten().eq(read.user_flags.iter().flatten()));
    }
    if let Ok(read) = index::parse_header(bytes)
        && let Ok(layout) = read.layout()
        && layout.has_crc()
        && let Ok(records) = index::parse_index_records(&read, bytes)
    {
        let mut head = read.clone();
        index::recount(&mut head, &records);
        (head.start_offset, head.record_size) = (layout.header_bytes() as u32, layout.record_bytes() as u32);
        let mut written = index::encode_header(&head).expect("is known");
        records.iter().for_each(|record| index::encode_record(layout, record, &mut written));
        let again = index::parse_header(&written).expect("an index of ours");
        let same = index::parse_index_records(&again, &written).expect("records of ours");
        assert_eq!((again.last_uid, again.highestmodseq), (read.last_uid, read.highestmodseq));
        assert_eq!(same, records);
    }
    if let Ok(map) = db::parse(bytes) {
        assert_eq!(db::parse(&db::encode_twoskip(&map)).as_ref(), Ok(&map));
        for (key, value) in &map {
            row(key, value);
        }
    }
    let at = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (key, value) = bytes.split_at(at);
    row(key, value.get(1..).unwrap_or_default());
}

fn row(key: &[u8], value: &[u8]) {
    if let Ok(read) = seen::parse_value(value) {
        assert_eq!(seen::parse_value(&seen::encode_value(&read)), Ok(read));
    }
    if let (Ok(limits), Ok(usage)) = (quota::parse(value), quota::parse_usage(value)) {
        let written = quota::encode(&usage, &limits);
        assert_eq!((quota::parse(&written), quota::parse_usage(&written)), (Ok(limits), Ok(usage)));
    }
    if let Ok(Some((text, modseq))) = annotations::parse_value(value) {
        let written = annotations::encode_value(&text, modseq);
        assert_eq!(annotations::parse_value(&written), Ok(Some((text, modseq))));
    }
    if let Ok(Some(entry)) = mboxlist::entry_for(key, value, None)
        // In a key these stand for the domain's end and the separator: such a name is never written (`cyrus_dir`).
        && !entry.name.as_bytes().iter().any(|byte| matches!(byte, 0x1d | 0x1f))
    {
        let (key, value) = mboxlist::encode_name_row(&entry, 5);
        let again = mboxlist::entry_for(&key, &value, None).expect("a row of ours").expect("an entry");
        assert_eq!((&again.name, &again.uniqueid, &again.partition), (&entry.name, &entry.uniqueid, &entry.partition));
        // Rights without somebody who has them, or the other way round, are not written.
        let (key, value) = mboxlist::encode_name_row(&again, 5);
        assert_eq!(mboxlist::entry_for(&key, &value, None), Ok(Some(again)));
    }
}

/// A mailbox as a peer says it; what we say of that means the same.
pub fn mailbox_view(bytes: &[u8]) {
    let line = [b"MAILBOX ", bytes].concat();
    let Ok(command::Untagged::Mailbox(view)) = command::untagged(&line) else { return };
    let said = reply::mailbox(&view, true);
    let said = said.strip_prefix(b"* ").and_then(|said| said.strip_suffix(b"\r\n")).expect("one answer");
    let Ok(command::Untagged::Mailbox(again)) = command::untagged(said) else {
        panic!("not read again: {}", String::from_utf8_lossy(said));
    };
    assert_eq!((&again.head.name, &again.head.uniqueid), (&view.head.name, &view.head.uniqueid));
    assert_eq!((again.head.last_uid, again.head.highestmodseq), (view.head.last_uid, view.head.highestmodseq));
    assert_eq!(again.records.as_ref().map(Vec::len), view.records.as_ref().map(Vec::len));
    let bare =
        |record: &spooltap::model::Record| (record.uid, record.modseq, record.guid, record.size, record.internaldate);
    assert!(again.records.iter().flatten().map(bare).eq(view.records.iter().flatten().map(bare)));
}
