//! A user's seen database: mailbox uniqueid → `1 lastread lastuid lastchange uids`.

use super::{FormatError, db::Map};
use crate::model::{SeenState, Uid, UniqueId};
use std::collections::BTreeMap;

const PART: &str = "seen database value";

/// Reads one value.
pub fn parse_value(value: &[u8]) -> Result<SeenState, FormatError> {
    let fault = |what: &str| FormatError::value(PART, 0, what);
    let mut words = value.split(|&byte| byte == b' ').filter(|word| !word.is_empty());
    let mut number = |what: &str| {
        let word = words.next().and_then(|word| std::str::from_utf8(word).ok());
        word.and_then(|word| word.parse::<i64>().ok()).ok_or_else(|| fault(what))
    };
    if number("format version is missing")? != 1 {
        return Err(fault("format version is not 1"));
    }
    let lastread = number("lastread is no number")?;
    let lastuid = number("lastuid is no number")?;
    let lastuid = u32::try_from(lastuid).map_err(|_| fault("lastuid is out of range"))?;
    let lastchange = number("lastchange is no number")?;
    let seenuids = words.next().unwrap_or_default().to_vec();
    if !seenuids.iter().all(|byte| byte.is_ascii_digit() || matches!(byte, b':' | b',')) {
        return Err(fault("UIDs are no sequence set"));
    }
    Ok(SeenState { lastread, lastuid: Uid(lastuid), lastchange, seenuids })
}

/// One value, as all releases write it.
pub fn encode_value(seen: &SeenState) -> Vec<u8> {
    let numbers = format!("1 {} {} {} ", seen.lastread, seen.lastuid.0, seen.lastchange);
    [numbers.as_bytes(), &seen.seenuids].concat()
}

/// Values that could not be read, by key.
pub type Faults = Vec<(Vec<u8>, FormatError)>;

/// Reads all values; those that cannot be read are left out and named.
pub fn parse(map: &Map) -> (BTreeMap<UniqueId, SeenState>, Faults) {
    let (mut out, mut faults) = (BTreeMap::new(), Vec::new());
    for (key, value) in map {
        match parse_value(value) {
            Ok(seen) => drop(out.insert(UniqueId::new(key), seen)),
            Err(error) => faults.push((key.clone(), error)),
        }
    }
    (out, faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_real_servers() {
        let seen = parse_value(b"1 1795493753 4 1795493752 1:3,7").expect("parses");
        assert_eq!(
            (seen.lastread, seen.lastuid, seen.seenuids.as_slice()),
            (1_795_493_753, Uid(4), b"1:3,7".as_slice())
        );
        assert_eq!(encode_value(&seen), b"1 1795493753 4 1795493752 1:3,7");
        assert_eq!(parse_value(b"1 0 0 0 ").expect("parses").seenuids, b"");
        assert_eq!(encode_value(&parse_value(b"1 0 0 0 ").expect("parses")), b"1 0 0 0 ");
        for bad in [b"".as_slice(), b"2 1 1 1 1", b"1 x 1 1 1", b"1 1 1", b"1 1 99999999999 1 1", b"1 1 1 1 abc"] {
            assert!(parse_value(bad).is_err(), "{bad:?}");
        }
    }
}
