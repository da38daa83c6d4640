//! flat: a line of text per record, sorted, always replaced as a whole; readers need no lock.
//!
//! From 2.5 on 0xFF escapes the bytes that would end a key or a line; 2.3 and 2.4 write bytes as they are. A line
//! without TAB (made by hand, very old) is a key with an empty value.

use super::{Backend, FormatError, Kind, Loaded, Map, Mark};

pub(super) const BACKEND: Backend = Backend { kind: Kind::Flat, name: "flat", recognise, load, tail: None };

const ESCAPE: u8 = 0xff;

fn recognise(bytes: &[u8]) -> bool {
    bytes.iter().take(super::SNIFF_BYTES).all(|&byte| byte != 0)
}

fn load(bytes: &[u8]) -> Result<Loaded, FormatError> {
    let mut map = Map::new();
    let mut offset = 0u64;
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        let Some(text) = line.strip_suffix(b"\n") else {
            return Err(FormatError::value("flat database", offset, "last line has no end"));
        };
        if text.contains(&0) {
            return Err(FormatError::value("flat database", offset, "line contains a NUL byte"));
        }
        let mut halves = text.splitn(2, |&byte| byte == b'\t');
        let (key, value) = (halves.next().unwrap_or_default(), halves.next().unwrap_or_default());
        map.insert(unescape(key), unescape(value));
        offset = offset.saturating_add(line.len() as u64);
    }
    Ok(Loaded { map, mark: Mark::default() })
}

/// Sorted as servers look keys up.
pub(super) fn encode(map: &Map) -> Vec<u8> {
    let mut rows: Vec<(&Vec<u8>, &Vec<u8>)> = map.iter().collect();
    rows.sort_by(|(left, _), (right, _)| super::twoskip::mailbox_order(left, right));
    let mut out = Vec::new();
    for (key, value) in rows {
        escape(key, &mut out);
        out.push(b'\t');
        escape(value, &mut out);
        out.push(b'\n');
    }
    out
}

fn escape(text: &[u8], out: &mut Vec<u8>) {
    for &byte in text {
        match byte {
            0 | b'\t' | b'\r' | b'\n' => out.extend([ESCAPE, byte | 0x80]),
            ESCAPE => out.extend([ESCAPE, ESCAPE]),
            byte => out.push(byte),
        }
    }
}

fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte != ESCAPE {
            out.push(byte);
            continue;
        }
        match bytes.next_if(|&next| matches!(next, 0x80 | 0x89 | 0x8a | 0x8d | ESCAPE)) {
            Some(ESCAPE) | None => out.push(ESCAPE),
            Some(next) => out.push(next & 0x7f),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::parse;

    #[test]
    fn lines_escapes_and_old_lines() {
        let map = parse(b"a\xff\x89b\tv\xff\x8aw\xff\xff\nplain\t\nno tab\n").expect("parses");
        let expected: [(&[u8], &[u8]); 3] = [(b"a\tb", b"v\nw\xff"), (b"no tab", b""), (b"plain", b"")];
        assert!(map.iter().map(|(key, value)| (&key[..], &value[..])).eq(expected));
    }

    proptest::proptest! {
        #[test]
        fn what_is_encoded_is_read_back(map: super::Map) {
            let mut map = map;
            map.remove(&b""[..]);
            proptest::prop_assert_eq!(parse(&super::encode(&map)).expect("parses"), map);
        }
    }

    #[test]
    fn a_cut_line_is_an_error() {
        assert!(parse(b"user.u1\t\nuser.u").is_err());
    }
}
