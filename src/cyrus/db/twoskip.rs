//! twoskip, version 1: records in order of writing up to `current_size`, which the last header write of a transaction
//! moves on; what lies beyond is not committed.
//!
//! The file is replayed from its beginning, because keys and values never change once written while pointers do. A
//! DELETE does not name its victim but only the record after it, so the victim follows from the order of the keys.
//! Cyrus 2.5 with `improved_mboxlist_sort` orders them by another collation; a walk along the lowest level of pointers
//! tells, where the file stands still enough to allow it.

use super::follow::{Edit, FollowError, ReadAt};
use super::{Backend, Fault, FormatError, Kind, Loaded, MAGIC, Map, Mark, Order};
use crate::cyrus::bytes::{Cursor, crc_holds, crc32};
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

pub(super) const BACKEND: Backend = Backend { kind: Kind::Twoskip, name: "twoskip", recognise, load, tail: Some(tail) };

const PART: &str = "twoskip record";
pub(super) const HEADER_BYTES: usize = 64;
const DUMMY_OFFSET: u64 = 64;
/// Header and DUMMY record.
const FIRST_RECORD: u64 = 336;
pub(super) const MAX_LEVEL: u8 = 31;
/// Type, level, two lengths, two long lengths, 32 pointers, two checksums.
const LONGEST_HEAD: usize = 8 + 16 + 32 * 8 + 8;
/// Put before a record whose head would cross a block of 512 bytes (3.1 and later).
pub(super) const FILLER: [u8; 8] = [0x20, 0x42, 0x4c, 0x41, 0x4e, 0x4b, 0x07, 0xa0];

fn recognise(bytes: &[u8]) -> bool {
    bytes.strip_prefix(&MAGIC).is_some_and(|rest| rest.starts_with(b"twoskip file\0\0\0\0"))
}

struct Header {
    generation: u64,
    records: u64,
    /// End of what is committed.
    end: u64,
    /// A transaction is open, or was when its writer died.
    dirty: bool,
}

impl Header {
    const DIRTY: u32 = 1;

    /// The header that opens a transaction may have counted a record as gone already: the one about to be replaced.
    fn counts(&self, found: usize) -> bool {
        let found = found as u64;
        found == self.records || (self.dirty && found == self.records.saturating_add(1))
    }
}

fn header(bytes: &[u8]) -> Result<Header, FormatError> {
    let mut cursor = Cursor::new("twoskip header", bytes);
    let Ok(all) = cursor.clone().take(HEADER_BYTES) else {
        return Err(cursor.fault(Fault::Torn("file ends in its header")));
    };
    cursor.take(20)?;
    let version = cursor.u32()?;
    let (generation, records, _repack_size, end, flags) =
        (cursor.u64()?, cursor.u64()?, cursor.u64()?, cursor.u64()?, cursor.u32()?);
    if !crc_holds(cursor.clone().u32()?, crc32(all.get(..60).unwrap_or_default())) {
        return Err(cursor.fault(Fault::Torn("crc of the header is wrong")));
    }
    if version != 1 {
        return Err(cursor.fault(Fault::Unsupported(format!("twoskip version {version} is not known"))));
    }
    if end < FIRST_RECORD || end % 8 != 0 {
        return Err(cursor.fault(Fault::Value(format!("committed size {end} is impossible"))));
    }
    Ok(Header { generation, records, end, dirty: flags & Header::DIRTY != 0 })
}

#[derive(Clone, Copy)]
enum Entry<'a> {
    Dummy { next: [u64; 2] },
    Record { key: &'a [u8], value: &'a [u8], next: [u64; 2] },
    Delete { next: u64 },
    Nothing,
}

/// The head of a record as far as it never changes, and its lowest pointers.
struct Head {
    kind: u8,
    key_len: u64,
    value_len: u64,
    next: [u64; 2],
}

fn head(cursor: &mut Cursor<'_>) -> Result<Head, FormatError> {
    let start = cursor.clone();
    let (kind, level) = (cursor.u8()?, cursor.u8()?);
    if !matches!(kind, b'=' | b'+' | b'-' | b'$') || level > MAX_LEVEL {
        return Err(start.fault(Fault::Value(format!("record type {kind:#04x} of level {level} is not known"))));
    }
    let (short_key, short_value) = (cursor.u16()?, cursor.u32()?);
    let key_len = if short_key == u16::MAX { cursor.u64()? } else { short_key.into() };
    let value_len = if short_value == u32::MAX { cursor.u64()? } else { short_value.into() };
    let first = cursor.u64()?;
    let second = if level > 0 { cursor.u64()? } else { 0 };
    cursor.take(usize::from(level.saturating_sub(1)).saturating_mul(8))?;
    Ok(Head { kind, key_len, value_len, next: [first, second] })
}

/// One entry with both checksums verified.
fn entry<'a>(cursor: &mut Cursor<'a>) -> Result<Entry<'a>, FormatError> {
    if cursor.rest().starts_with(&FILLER) {
        cursor.take(FILLER.len())?;
        return Ok(Entry::Nothing);
    }
    let start = cursor.clone();
    let head = head(cursor)?;
    let head_bytes = start.rest().len().saturating_sub(cursor.remaining());
    let (head_crc, tail_crc) = (cursor.u32()?, cursor.u32()?);
    if !crc_holds(head_crc, crc32(start.rest().get(..head_bytes).unwrap_or_default())) {
        // Pointers and this checksum are rewritten in place.
        return Err(start.fault(Fault::Torn("crc of the record's head is wrong")));
    }
    let body = cursor.clone();
    let key = cursor.take_u64(head.key_len)?;
    let value = cursor.take_u64(head.value_len)?;
    let used = head.key_len.saturating_add(head.value_len);
    cursor.take_u64(used.next_multiple_of(8).saturating_sub(used))?;
    let body_bytes = body.remaining().saturating_sub(cursor.remaining());
    let computed = crc32(body.rest().get(..body_bytes).unwrap_or_default());
    if !crc_holds(tail_crc, computed) {
        return Err(body.fault(Fault::Crc { stored: tail_crc, computed }));
    }
    let [first, _] = head.next;
    Ok(match head.kind {
        b'=' => Entry::Dummy { next: head.next },
        b'+' => Entry::Record { key, value, next: head.next },
        b'-' => Entry::Delete { next: first },
        _ => Entry::Nothing,
    })
}

type Pair<'a> = (&'a [u8], &'a [u8]);

fn load(bytes: &[u8]) -> Result<Loaded, FormatError> {
    let header = header(bytes)?;
    let fault = |fault| FormatError { part: "twoskip header", offset: 32, fault };
    let Some(committed) = usize::try_from(header.end).ok().and_then(|end| bytes.get(..end)) else {
        return Err(fault(Fault::Torn("file is shorter than its header says")));
    };
    let mut entries: HashMap<u64, Entry<'_>> = HashMap::new();
    let mut replayed: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
    let mut cursor = Cursor::new(PART, committed);
    cursor.take(HEADER_BYTES)?;
    while !cursor.is_at_end() {
        let at = cursor.offset();
        let entry = entry(&mut cursor)?;
        match entry {
            Entry::Record { key, value, .. } => {
                replayed.insert(key, value);
            }
            Entry::Delete { next } => {
                // Found nothing: the keys have another order, and the walk below has to tell.
                let after = after_delete(&entries, next);
                if let Some(victim) = after.and_then(|after| victim(&replayed, after)).copied() {
                    replayed.remove(victim);
                }
            }
            Entry::Dummy { .. } | Entry::Nothing => {}
        }
        entries.insert(at, entry);
    }
    let walked = walk(&entries, header.end).filter(|pairs| header.counts(pairs.len()));
    let sorted = |pairs: &[Pair<'_>], order: fn(&[u8], &[u8]) -> Ordering| {
        pairs.windows(2).all(|pair| matches!(pair, [(left, _), (right, _)] if order(left, right).is_lt()))
    };
    let (pairs, order) = match walked {
        Some(pairs) if sorted(&pairs, Ord::cmp) => {
            let order = if sorted(&pairs, mailbox_order) { Order::Either } else { Order::Raw };
            (pairs, order)
        }
        Some(pairs) if sorted(&pairs, mailbox_order) => (pairs, Order::Unknown),
        _ if header.counts(replayed.len()) => (replayed.into_iter().collect(), Order::Unknown),
        _ => return Err(fault(Fault::Torn("number of records is not the one announced"))),
    };
    let map: Map = pairs.into_iter().map(|(key, value)| (key.to_vec(), value.to_vec())).collect();
    Ok(Loaded { map, mark: Mark { epoch: (header.generation, 0), end: header.end, order } })
}

/// Key of the record a DELETE points to (`Some(None)` at the end of the list); `None` when there is no such record.
fn after_delete<'a>(entries: &HashMap<u64, Entry<'a>>, mut next: u64) -> Option<Option<&'a [u8]>> {
    for _ in 0..=entries.len() {
        if next == 0 {
            return Some(None);
        }
        match entries.get(&next)? {
            Entry::Record { key, .. } => return Some(Some(key)),
            Entry::Delete { next: further } => next = *further,
            Entry::Dummy { .. } | Entry::Nothing => return None,
        }
    }
    None
}

/// The greatest key before `after`, or of all.
fn victim<'a, K: Ord + std::borrow::Borrow<[u8]>, V>(map: &'a BTreeMap<K, V>, after: Option<&[u8]>) -> Option<&'a K> {
    let end = after.map_or(Bound::Unbounded, Bound::Excluded);
    map.range::<[u8], _>((Bound::Unbounded, end)).next_back().map(|(key, _)| key)
}

/// Follows the lowest pointers, as Cyrus does; `None` when they lead nowhere, which commits during the read can cause.
fn walk<'a>(entries: &HashMap<u64, Entry<'a>>, end: u64) -> Option<Vec<Pair<'a>>> {
    // Of the two alternatives the larger one that is committed counts.
    let lowest = |next: [u64; 2]| next.into_iter().filter(|&offset| offset < end).max();
    let Some(Entry::Dummy { next }) = entries.get(&DUMMY_OFFSET) else { return None };
    let mut at = lowest(*next)?;
    let mut pairs = Vec::new();
    for _ in 0..entries.len() {
        if at == 0 {
            break;
        }
        at = match entries.get(&at)? {
            Entry::Record { key, value, next } => {
                pairs.push((*key, *value));
                lowest(*next)?
            }
            Entry::Delete { next } => *next,
            Entry::Dummy { .. } | Entry::Nothing => return None,
        };
    }
    (at == 0).then_some(pairs)
}

/// The order of 2.3 to 2.5 with `improved_mboxlist_sort`: separators before everything else.
pub(super) fn mailbox_order(left: &[u8], right: &[u8]) -> Ordering {
    let rank = |byte: &u8| match byte {
        b'\t' | b'\n' => 1,
        b'.' => 2,
        1..=8 => byte.saturating_add(2),
        other => *other,
    };
    left.iter().map(rank).cmp(right.iter().map(rank))
}

fn tail(edit: &mut Edit<'_>, mark: &mut Mark, read: &mut ReadAt<'_>) -> Result<bool, FollowError> {
    let head = read(0, HEADER_BYTES)?;
    if !recognise(&head) {
        return Ok(false);
    }
    let header = header(&head)?;
    if (header.generation, 0) != mark.epoch || header.end < mark.end {
        return Ok(false);
    }
    let Ok(len) = usize::try_from(header.end.saturating_sub(mark.end)) else { return Ok(false) };
    let bytes = read(mark.end, len)?;
    // With nothing new, the last known byte tells whether the file was cut.
    let is_whole = if len == 0 { read(mark.end.saturating_sub(1), 1)?.len() == 1 } else { bytes.len() == len };
    if !is_whole {
        let fault = Fault::Torn("file is shorter than its header says");
        return Err(FormatError { part: "twoskip header", offset: 40, fault }.into());
    }
    let mut cursor = Cursor::based(PART, mark.end, &bytes);
    while !cursor.is_at_end() {
        match entry(&mut cursor)? {
            Entry::Record { key, value, .. } => {
                edit.set(key, value);
                if mark.order == Order::Either && !fits_both_orders(edit.map(), key) {
                    mark.order = Order::Unknown;
                }
            }
            Entry::Delete { .. } if mark.order == Order::Unknown => return Ok(false),
            Entry::Delete { next } => {
                let Some(after) = key_after(next, read)? else { return Ok(false) };
                let victim = victim(edit.map(), after.as_deref()).cloned();
                if !victim.is_some_and(|victim| edit.remove(&victim)) {
                    return Ok(false);
                }
            }
            Entry::Dummy { .. } | Entry::Nothing => {}
        }
    }
    mark.end = header.end;
    Ok(header.counts(edit.map().len()))
}

/// The neighbours of a key stand on the same sides of it in both orders.
fn fits_both_orders(map: &Map, key: &[u8]) -> bool {
    let before = map.range::<[u8], _>((Bound::Unbounded, Bound::Excluded(key))).next_back();
    let after = map.range::<[u8], _>((Bound::Excluded(key), Bound::Unbounded)).next();
    before.is_none_or(|(before, _)| mailbox_order(before, key).is_lt())
        && after.is_none_or(|(after, _)| mailbox_order(key, after).is_lt())
}

/// The same as `after_delete`, read from the file.
fn key_after(mut offset: u64, read: &mut ReadAt<'_>) -> Result<Option<Option<Vec<u8>>>, FollowError> {
    for _ in 0..1000 {
        if offset == 0 {
            return Ok(Some(None));
        }
        let bytes = read(offset, LONGEST_HEAD)?;
        let mut cursor = Cursor::based(PART, offset, &bytes);
        let head = head(&mut cursor)?;
        if head.kind == b'-' {
            [offset, _] = head.next;
            continue;
        }
        let (start, Ok(len)) = (cursor.offset().saturating_add(8), usize::try_from(head.key_len)) else {
            return Ok(None);
        };
        if head.kind != b'+' {
            return Ok(None);
        }
        let key = read(start, len)?;
        return Ok((key.len() == len).then_some(Some(key)));
    }
    Ok(None)
}
