//! One function per parser: any bytes are an error or a value, and what must hold of a value is asserted. The fuzz
//! targets call these, and so do the tests (`tests/formats/parsers.rs`), with seeds from the fixtures.

use spooltap::csync::codec::Splitter;
use spooltap::csync::{command, intake, request};
use spooltap::cyrus::imapd_conf::ImapdConf;
use spooltap::cyrus::{annotations, db, header, index, mboxlist, quota, seen, subs};
use spooltap::dlist::{self, Literals};
use spooltap::model::UserId;

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
