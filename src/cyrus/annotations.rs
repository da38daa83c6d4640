//! Annotation databases: the global one (mailbox and server annotations) and `cyrus.annotations` (messages).
//!
//! Keys are fields that end in NUL: mailbox (name up to 3.4, uniqueid later, empty = server) or UID, entry, userid. The
//! value begins with its length as a native `unsigned long` of which the low half was byte-swapped.

use super::{FormatError, db::Map};
use crate::model::{Annotation, ModSeq, Uid, UserId};
use std::collections::BTreeMap;

const PART: &str = "annotation";
/// How 3.6 and later store the owner's own userid.
const OWNER: &[u8] = b"[.OwNeR.]";
/// Flag of a removed message annotation that is kept as a tombstone (3.2 and later).
const DELETED: u8 = 1;

/// The three fields of a key: mailbox or UID, entry, userid.
pub fn parse_key(key: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let mut fields = key.split(|&byte| byte == 0);
    let (scope, entry) = (fields.next()?, fields.next()?);
    Some((scope, entry, fields.next().unwrap_or_default()))
}

/// Value and modseq; `None` for a tombstone.
pub fn parse_value(value: &[u8]) -> Result<Option<(Vec<u8>, ModSeq)>, FormatError> {
    let (data, is_tombstone, modseq) = parse_tail(value)?;
    Ok((!is_tombstone).then(|| (data.to_vec(), modseq)))
}

/// Value, whether it is a tombstone, modseq.
fn parse_tail(value: &[u8]) -> Result<(&[u8], bool, ModSeq), FormatError> {
    let fault = |what: &str| FormatError::value(PART, 0, what);
    let be = |at: usize| {
        let bytes = value.get(at..at.checked_add(4)?)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    let nul_at = |at: usize| value.get(at) == Some(&0);
    // 64-bit little endian: length, four zero bytes. 64-bit big endian: the other way round. 32 bits: no zero bytes.
    let wide = [(0usize, 8usize), (4, 8)];
    let mut found = None;
    for (at, start) in wide.into_iter().chain([(0, 4)]) {
        let other = if at == 0 { 4 } else { 0 };
        let Some(len) = be(at) else { continue };
        let Ok(len) = usize::try_from(len) else { continue };
        let Some(end) = start.checked_add(len) else { continue };
        if (start == 4 || be(other) == Some(0)) && nul_at(end) {
            found = Some((start, end));
            break;
        }
    }
    let (start, end) = found.ok_or_else(|| fault("length does not fit the value"))?;
    let data = value.get(start..end).unwrap_or_default();
    // Content type, a native long, then from 3.2 on modseq and flags.
    let rest = value.get(end.saturating_add(1)..).unwrap_or_default();
    let after_type = rest.iter().position(|&byte| byte == 0).and_then(|at| rest.get(at.saturating_add(1)..));
    let word = if start == 8 { 8 } else { 4 };
    let tail = after_type.and_then(|rest| rest.get(word..)).unwrap_or_default();
    let modseq = tail.get(..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
    let is_tombstone = tail.get(8).is_some_and(|flags| flags & DELETED != 0);
    Ok((data, is_tombstone, ModSeq(modseq)))
}

/// The highest modseq of any entry, removed ones included; 0 where the release keeps none (before 3.2).
pub fn highest_modseq(map: &Map) -> ModSeq {
    map.values().filter_map(|value| parse_tail(value).ok()).map(|(_, _, modseq)| modseq).max().unwrap_or_default()
}

/// A key as 3.6 and later write it: `scope` is a uniqueid, a UID in decimal, or nothing for the server.
pub fn encode_key(scope: &[u8], entry: &[u8], userid: &UserId, owner: Option<&UserId>) -> Vec<u8> {
    let userid = if owner == Some(userid) { OWNER } else { userid.as_bytes() };
    [scope, b"\0", entry, b"\0", userid, b"\0"].concat()
}

/// A value as a 64-bit little-endian server of 3.2 and later writes it.
pub fn encode_value(value: &[u8], modseq: ModSeq) -> Vec<u8> {
    let mut out = (value.len() as u32).to_be_bytes().to_vec();
    out.extend([0; 4]);
    out.extend_from_slice(value);
    out.extend_from_slice(b"\0text/plain\0");
    out.extend([0; 8]);
    out.extend(modseq.0.to_be_bytes());
    out.push(0);
    out
}

/// How userids are stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Userids<'a> {
    /// Whose mailbox it is: stands for `[.OwNeR.]`.
    pub owner: Option<&'a UserId>,
    /// `unixhierarchysep`: 2.x stores `jane^doe` for `jane.doe`.
    pub carets: bool,
}

fn annotation(entry: &[u8], userid: &[u8], userids: Userids<'_>, value: Vec<u8>, modseq: ModSeq) -> Annotation {
    let userid = match userids.owner {
        Some(owner) if userid == OWNER => owner.clone(),
        _ if userids.carets => {
            let dots: Vec<u8> = userid.iter().map(|&byte| if byte == b'^' { b'.' } else { byte }).collect();
            dots.into()
        }
        _ => UserId::new(userid),
    };
    Annotation { entry: entry.to_vec(), userid, value, modseq }
}

/// Annotations of one mailbox (or, with an empty `scope`, of the server) out of the global database, sorted.
pub fn of_scope(map: &Map, scope: &[u8], userids: Userids<'_>) -> Result<Vec<Annotation>, FormatError> {
    let prefix = [scope, b"\0"].concat();
    let mut out = Vec::new();
    for (key, value) in map.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix)) {
        let Some((_, entry, userid)) = parse_key(key) else { continue };
        if let Some((value, modseq)) = parse_value(value)? {
            out.push(annotation(entry, userid, userids, value, modseq));
        }
    }
    out.sort_by(|a, b| a.content().cmp(&b.content()));
    Ok(out)
}

/// Scopes (mailbox names or uniqueids) that have annotations.
pub fn scopes(map: &Map) -> impl Iterator<Item = &[u8]> {
    let mut last: Option<&[u8]> = None;
    map.keys().filter_map(|key| parse_key(key)).map(|(scope, _, _)| scope).filter(move |scope| {
        let new = last != Some(scope);
        last = Some(scope);
        new
    })
}

/// Message annotations of `cyrus.annotations` by UID, sorted. Virtual ones that a replica of an older index version
/// stored as real ones are left in place: the caller knows whether the index has the field.
pub fn of_messages(map: &Map, userids: Userids<'_>) -> Result<BTreeMap<Uid, Vec<Annotation>>, FormatError> {
    let mut out: BTreeMap<Uid, Vec<Annotation>> = BTreeMap::new();
    for (key, value) in map {
        let Some((uid, entry, userid)) = parse_key(key) else { continue };
        let uid = std::str::from_utf8(uid).ok().and_then(|uid| uid.parse().ok());
        let uid = uid.ok_or_else(|| FormatError::value(PART, 0, "key does not begin with a UID"))?;
        if let Some((value, modseq)) = parse_value(value)? {
            out.entry(Uid(uid)).or_default().push(annotation(entry, userid, userids, value, modseq));
        }
    }
    out.values_mut().for_each(|list| list.sort_by(|a, b| a.content().cmp(&b.content())));
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Key and value as a running 3.6.1 stored them.
    #[test]
    fn a_value_of_3_6() {
        let mut value = b"\0\0\0\x01\0\0\0\0x\0text/plain\0".to_vec();
        value.extend([0; 8]);
        value.extend(0x2bu64.to_be_bytes());
        value.push(0);
        assert_eq!(parse_value(&value).expect("parses"), Some((b"x".to_vec(), ModSeq(0x2b))));
        *value.last_mut().expect("flags") = 1;
        assert_eq!(parse_value(&value).expect("parses"), None);
        assert_eq!(parse_key(b"3\0/comment\0[.OwNeR.]\0"), Some((b"3".as_slice(), b"/comment".as_slice(), OWNER)));
    }

    proptest::proptest! {
        #[test]
        fn what_is_encoded_is_read_back(data: Vec<u8>, modseq: u64) {
            let value = encode_value(&data, ModSeq(modseq));
            proptest::prop_assert_eq!(parse_value(&value).expect("parses"), Some((data, ModSeq(modseq))));
        }
    }

    #[test]
    fn keys_are_encoded_as_3_6_has_them() {
        let owner = UserId::from("fred");
        assert_eq!(encode_key(b"3", b"/comment", &owner, Some(&owner)), b"3\0/comment\0[.OwNeR.]\0");
        assert_eq!(encode_key(b"", b"/comment", &UserId::default(), None), b"\0/comment\0\0");
    }

    #[test]
    fn lengths_of_other_machines() {
        assert_eq!(parse_value(b"\0\0\0\0\0\0\0\x02ab\0").expect("big endian"), Some((b"ab".to_vec(), ModSeq(0))));
        assert_eq!(parse_value(b"\0\0\0\x02ab\0text/plain\0").expect("32 bits"), Some((b"ab".to_vec(), ModSeq(0))));
        for bad in [b"".as_slice(), b"\0\0\0\x09\0\0\0\0x\0", b"\xff\xff\xff\xff\0\0\0\0x\0"] {
            assert!(parse_value(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn scopes_are_told_apart() {
        let value = b"\0\0\0\x01\0\0\0\0x\0text/plain\0".to_vec();
        let keys =
            [b"\0/comment\0\0".as_slice(), b"user.a\0/comment\0a\0", b"user.a\0/comment\0\0", b"user.ab\0/c\0\0"];
        let map: Map = keys.into_iter().map(|key| (key.to_vec(), value.clone())).collect();
        assert_eq!(scopes(&map).collect::<Vec<_>>(), [b"".as_slice(), b"user.a", b"user.ab"]);
        let own = of_scope(&map, b"user.a", Userids::default()).expect("reads");
        assert_eq!(own.iter().map(|a| a.userid.to_string()).collect::<Vec<_>>(), ["", "a"]);
        assert_eq!(of_scope(&map, b"", Userids::default()).expect("reads").len(), 1);
    }
}
