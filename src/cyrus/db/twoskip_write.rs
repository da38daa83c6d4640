//! A twoskip file as a whole: header, DUMMY, records in order, one COMMIT. Levels are those of a perfect skiplist, so
//! lookups are as quick as they can be; a server that goes on with the file draws its own.

use super::MAGIC;
use super::Map;
use super::twoskip::{FILLER, HEADER_BYTES, MAX_LEVEL};
use crate::cyrus::bytes::crc32;

/// Heads are kept within one block of the disk.
const BLOCK: usize = 512;

/// One entry before its pointers are known.
struct Entry<'a> {
    kind: u8,
    level: u8,
    key: &'a [u8],
    value: &'a [u8],
    pointers: Vec<u64>,
}

impl Entry<'_> {
    fn head_bytes(&self) -> usize {
        let long = |len: usize, most: usize| if len >= most { 8usize } else { 0 };
        let lengths = long(self.key.len(), 0xffff).saturating_add(long(self.value.len(), 0xffff_ffff));
        self.pointers.len().saturating_mul(8).saturating_add(lengths).saturating_add(16)
    }

    fn bytes(&self) -> usize {
        let body = self.key.len().saturating_add(self.value.len()).next_multiple_of(8);
        self.head_bytes().saturating_add(body)
    }

    fn put(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend([self.kind, self.level]);
        let (short_key, short_value) = (u16::try_from(self.key.len()), u32::try_from(self.value.len()));
        let short_key = short_key.ok().filter(|len| *len != u16::MAX);
        let short_value = short_value.ok().filter(|len| *len != u32::MAX);
        out.extend(short_key.unwrap_or(u16::MAX).to_be_bytes());
        out.extend(short_value.unwrap_or(u32::MAX).to_be_bytes());
        if short_key.is_none() {
            out.extend((self.key.len() as u64).to_be_bytes());
        }
        if short_value.is_none() {
            out.extend((self.value.len() as u64).to_be_bytes());
        }
        self.pointers.iter().for_each(|pointer| out.extend(pointer.to_be_bytes()));
        out.extend(crc32(out.get(start..).unwrap_or_default()).to_be_bytes());
        let used = self.key.len().saturating_add(self.value.len());
        let padding = [0; 8];
        let padding = padding.get(..used.next_multiple_of(8).saturating_sub(used)).unwrap_or_default();
        let body = [self.key, self.value, padding].concat();
        out.extend(crc32(&body).to_be_bytes());
        out.extend(body);
    }
}

/// Fillers before an entry that would stand at `end`, so that its head lies in one block.
fn fillers(end: usize, head: usize) -> usize {
    if head > BLOCK.saturating_sub(8) {
        return 0;
    }
    let crosses = |end: usize| (end.saturating_add(8)) % BLOCK > (end.saturating_sub(8).saturating_add(head)) % BLOCK;
    (0..BLOCK / 8).find(|count| !crosses(end.saturating_add(count.saturating_mul(8)))).unwrap_or(0)
}

pub(super) fn encode(map: &Map) -> Vec<u8> {
    let dummy = Entry { kind: b'=', level: MAX_LEVEL, key: b"", value: b"", pointers: vec![0; 32] };
    let mut entries = vec![dummy];
    for (number, (key, value)) in (1u64..).zip(map) {
        let level = (number.trailing_zeros() as u8).saturating_add(1).min(MAX_LEVEL);
        let pointers = vec![0; usize::from(level).saturating_add(1)];
        entries.push(Entry { kind: b'+', level, key, value, pointers });
    }
    let mut offsets = Vec::with_capacity(entries.len());
    let mut end = HEADER_BYTES;
    for entry in &entries {
        if entry.kind == b'+' {
            end = end.saturating_add(fillers(end, entry.head_bytes()).saturating_mul(8));
        }
        offsets.push(end);
        end = end.saturating_add(entry.bytes());
    }
    // From the back: what comes next on each level is what was met last.
    let mut next = [0u64; 32];
    for (entry, offset) in entries.iter_mut().zip(&offsets).rev() {
        for level in 0..usize::from(entry.level) {
            // Of the two places for the lowest level the second one is used.
            if let (Some(place), Some(next)) = (entry.pointers.get_mut(level.saturating_add(1)), next.get_mut(level)) {
                *place = *next;
                *next = *offset as u64;
            }
        }
    }
    let mut out = vec![0; HEADER_BYTES];
    for (entry, offset) in entries.iter().zip(&offsets) {
        while out.len() < *offset {
            out.extend(FILLER);
        }
        entry.put(&mut out);
    }
    if let Some(first) = offsets.get(1) {
        let commit = Entry { kind: b'$', level: 0, key: b"", value: b"", pointers: vec![*first as u64] };
        (0..fillers(out.len(), commit.head_bytes())).for_each(|_| out.extend(FILLER));
        commit.put(&mut out);
    }
    let header = header(map.len() as u64, out.len() as u64);
    if let Some(place) = out.get_mut(..HEADER_BYTES) {
        place.copy_from_slice(&header);
    }
    out
}

fn header(records: u64, end: u64) -> [u8; HEADER_BYTES] {
    let mut out = Vec::with_capacity(HEADER_BYTES);
    out.extend(MAGIC);
    out.extend(b"twoskip file\0\0\0\0");
    out.extend(1u32.to_be_bytes());
    // Generation, records, size after the last repack, end of what is committed.
    [1, records, end, end].iter().for_each(|number: &u64| out.extend(number.to_be_bytes()));
    out.extend([0; 4]);
    out.extend(crc32(&out).to_be_bytes());
    out.try_into().unwrap_or([0; HEADER_BYTES])
}

#[cfg(test)]
mod tests {
    use super::super::{Kind, parse, sniff};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_encoded_is_read_back(map: Map) {
            let file = encode(&map);
            prop_assert_eq!(sniff(&file), Kind::Twoskip);
            prop_assert_eq!(parse(&file).expect("parses"), map);
        }
    }

    #[test]
    fn heads_lie_in_one_block_and_long_values_are_read_back() {
        let map: Map =
            (0..500u32).map(|n| (format!("{n:05}").into_bytes(), vec![7; (n * 13 % 300) as usize])).collect();
        let long = Map::from([(vec![1; 70_000], vec![2; 100_000])]);
        for map in [map, long] {
            assert_eq!(parse(&encode(&map)).expect("parses"), map);
        }
    }
}
