//! quotalegacy: one file per quota root, always replaced as a whole. Its value stands under the empty key.
//!
//! 2.3 and 2.4 keep two lines (bytes used, limit); they are joined by a blank here, which is how the same value looks in
//! any other backend. 2.5 and later keep list text and a line end.

use super::{Backend, Fault, FormatError, Kind, Loaded, Map, Mark};

pub(super) const BACKEND: Backend =
    Backend { kind: Kind::QuotaLegacy, name: "quotalegacy", recognise, load, tail: None };

fn recognise(bytes: &[u8]) -> bool {
    let line = bytes.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let number = |line: &[u8]| !line.is_empty() && line.iter().all(|byte| byte.is_ascii_digit() || *byte == b'-');
    bytes.starts_with(b"%(") || number(line)
}

fn load(bytes: &[u8]) -> Result<Loaded, FormatError> {
    let part = "quota file";
    // The line end is the last byte written: without it the file was cut.
    let Some(text) = bytes.strip_suffix(b"\n") else {
        let have = bytes.len() as u64;
        let fault = Fault::Truncated { need: have.saturating_add(1), have };
        return Err(FormatError { part, offset: 0, fault });
    };
    let value = if text.starts_with(b"%(") {
        text.to_vec()
    } else {
        let mut lines = text.split(|&byte| byte == b'\n');
        let (Some(used), Some(limit), None) = (lines.next(), lines.next(), lines.next()) else {
            return Err(FormatError::value(part, 0, "two lines expected: bytes used, limit"));
        };
        [used, limit].join(&b' ')
    };
    Ok(Loaded { map: Map::from([(Vec::new(), value)]), mark: Mark::default() })
}

#[cfg(test)]
mod tests {
    use super::super::parse;

    fn check(file: &[u8], value: Option<&[u8]>) {
        let found = parse(file).ok().and_then(|map| map.get(&b""[..]).cloned());
        assert_eq!(found.as_deref(), value);
    }

    #[test]
    fn both_shapes() {
        check(b"2224\n51200\n", Some(b"2224 51200"));
        check(b"15170\n-1\n", Some(b"15170 -1"));
        check(b"%(S (167 100000) M (1))\n", Some(b"%(S (167 100000) M (1))"));
        check(b"%(S (167 100000) M (1))", None);
        check(b"2224\n512", None);
        check(b"2224\n", None);
    }
}
