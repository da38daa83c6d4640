//! skiplist, version 1.2: sorted records up to `logstart`, then a log of transactions, each closed by COMMIT.
//!
//! The file is replayed from its beginning and pointers are ignored: a writer changes them in place at any time. There
//! is no checksum anywhere, so what does not parse in the log is called torn first and damage only when it stays.

use super::follow::{Edit, FollowError, ReadAt, read_to_end};
use super::{Backend, Fault, FormatError, Kind, Loaded, MAGIC, Map, Mark, Order};
use crate::cyrus::bytes::{Cursor, u32_at};
use std::collections::{BTreeMap, HashMap};

pub(super) const BACKEND: Backend =
    Backend { kind: Kind::Skiplist, name: "skiplist", recognise, load, tail: Some(tail) };

const HEADER_BYTES: usize = 48;
const MAX_LEVEL: u32 = 20;
/// Header and DUMMY record; an empty database has its `logstart` here.
const FIRST_RECORD: u64 = 144;

const INORDER: u32 = 1;
const ADD: u32 = 2;
const DELETE: u32 = 4;
const COMMIT: u32 = 255;
const DUMMY: u32 = 257;
const END_OF_POINTERS: u32 = u32::MAX;

fn recognise(bytes: &[u8]) -> bool {
    bytes.strip_prefix(&MAGIC).is_some_and(|rest| rest.starts_with(b"skiplist file\0\0\0"))
}

/// Checks the header; gives `(logstart, last_recovery)`.
fn header(bytes: &[u8]) -> Result<(u64, u64), FormatError> {
    let mut cursor = Cursor::new("skiplist header", bytes);
    if cursor.remaining() < HEADER_BYTES {
        return Err(cursor.fault(Fault::Torn("file ends in its header")));
    }
    cursor.take(20)?;
    let (version, minor) = (cursor.u32()?, cursor.u32()?);
    if version != 1 || minor > 2 {
        return Err(cursor.fault(Fault::Unsupported(format!("skiplist version {version}.{minor} is not known"))));
    }
    let max_level = cursor.u32()?;
    if max_level != MAX_LEVEL {
        return Err(cursor.fault(Fault::Value(format!("maximal level is {max_level}, expected {MAX_LEVEL}"))));
    }
    let (_cur_level, _list_size) = (cursor.u32()?, cursor.u32()?);
    let (logstart, last_recovery) = (u64::from(cursor.u32()?), u64::from(cursor.u32()?));
    if logstart < FIRST_RECORD {
        return Err(cursor.fault(Fault::Value(format!("log starts at {logstart}, inside the header"))));
    }
    Ok((logstart, last_recovery))
}

enum Entry<'a> {
    Sorted(&'a [u8], &'a [u8]),
    Add(&'a [u8], &'a [u8]),
    /// Offset of the record that is no more.
    Delete(u64),
    Commit,
    /// DUMMY, or a word of zeros between records (left by the recovery of old releases).
    Nothing,
}

fn entry<'a>(cursor: &mut Cursor<'a>) -> Result<Entry<'a>, FormatError> {
    let start = cursor.clone();
    let kind = cursor.u32()?;
    match kind {
        0 => Ok(Entry::Nothing),
        COMMIT => Ok(Entry::Commit),
        DELETE => Ok(Entry::Delete(cursor.u32()?.into())),
        INORDER | ADD | DUMMY => {
            let key = padded(cursor)?;
            let data = padded(cursor)?;
            let mut levels = 0u32;
            while cursor.u32()? != END_OF_POINTERS {
                levels = levels.saturating_add(1);
                if levels > MAX_LEVEL {
                    return Err(start.fault(Fault::Value("record has no end of its pointers".into())));
                }
            }
            Ok(match kind {
                INORDER => Entry::Sorted(key, data),
                ADD => Entry::Add(key, data),
                _ => Entry::Nothing,
            })
        }
        other => Err(start.fault(Fault::Value(format!("record type {other} is not known")))),
    }
}

fn padded<'a>(cursor: &mut Cursor<'a>) -> Result<&'a [u8], FormatError> {
    let len = u64::from(cursor.u32()?);
    let bytes = cursor.take_u64(len)?;
    cursor.take_u64(len.next_multiple_of(4).saturating_sub(len))?;
    Ok(bytes)
}

/// What one entry of a closed transaction does.
enum Op<'a> {
    Set(&'a [u8], &'a [u8]),
    /// The key of the record at that offset goes.
    Remove(u64),
}

/// The part of a log that counts.
struct Log<'a> {
    /// With the offset of each entry, in order.
    ops: Vec<(u64, Op<'a>)>,
    /// First byte after the last COMMIT.
    end: u64,
}

fn log<'a>(cursor: &mut Cursor<'a>) -> Result<Log<'a>, FormatError> {
    let mut log = Log { ops: Vec::new(), end: cursor.offset() };
    let mut open = Vec::new();
    while !cursor.is_at_end() {
        let at = cursor.offset();
        match entry(cursor) {
            Ok(Entry::Nothing) => {}
            Ok(Entry::Add(key, data)) => open.push((at, Op::Set(key, data))),
            Ok(Entry::Delete(target)) => open.push((at, Op::Remove(target))),
            Ok(Entry::Commit) => {
                log.ops.append(&mut open);
                log.end = cursor.offset();
            }
            // The file ends inside a record: its transaction is not closed either.
            Err(FormatError { fault: Fault::Truncated { .. }, .. }) => break,
            Ok(Entry::Sorted(..)) | Err(_) => return Err(torn(at, "record does not parse")),
        }
    }
    Ok(log)
}

fn torn(offset: u64, what: &'static str) -> FormatError {
    FormatError { part: "skiplist log", offset, fault: Fault::Torn(what) }
}

const NO_VICTIM: &str = "deleted record is not there";

fn load(bytes: &[u8]) -> Result<Loaded, FormatError> {
    let (logstart, last_recovery) = header(bytes)?;
    let Some((sorted, rest)) = usize::try_from(logstart).ok().and_then(|at| bytes.split_at_checked(at)) else {
        return Err(torn(bytes.len() as u64, "file is shorter than its header says"));
    };
    let mut live: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
    let mut key_at: HashMap<u64, &[u8]> = HashMap::new();
    let mut cursor = Cursor::new("skiplist record", sorted);
    cursor.take(HEADER_BYTES)?;
    while !cursor.is_at_end() {
        let start = cursor.clone();
        match entry(&mut cursor)? {
            Entry::Sorted(key, data) | Entry::Add(key, data) => {
                key_at.insert(start.offset(), key);
                live.insert(key, data);
            }
            Entry::Nothing => {}
            Entry::Delete(_) | Entry::Commit => {
                return Err(start.fault(Fault::Value("log record among the sorted ones".into())));
            }
        }
    }
    let log = log(&mut Cursor::based("skiplist log", logstart, rest))?;
    for (at, op) in log.ops {
        match op {
            Op::Set(key, data) => {
                key_at.insert(at, key);
                live.insert(key, data);
            }
            Op::Remove(target) => {
                key_at.get(&target).and_then(|key| live.remove(key)).ok_or_else(|| torn(at, NO_VICTIM))?;
            }
        }
    }
    let map: Map = live.into_iter().map(|(key, data)| (key.to_vec(), data.to_vec())).collect();
    Ok(Loaded { map, mark: Mark { epoch: (logstart, last_recovery), end: log.end, order: Order::Raw } })
}

fn tail(edit: &mut Edit<'_>, mark: &mut Mark, read: &mut ReadAt<'_>) -> Result<bool, FollowError> {
    let head = read(0, HEADER_BYTES)?;
    if !recognise(&head) || header(&head)? != mark.epoch {
        return Ok(false);
    }
    // One word before the mark (a COMMIT or the end of a record) tells whether the file still reaches that far.
    let bytes = read_to_end(mark.end.saturating_sub(4), read)?;
    if !matches!(u32_at(&bytes, 0), Some(COMMIT | END_OF_POINTERS)) {
        return Ok(false);
    }
    let log = log(&mut Cursor::based("skiplist log", mark.end, bytes.get(4..).unwrap_or_default()))?;
    for (at, op) in log.ops {
        match op {
            Op::Set(key, data) => edit.set(key, data),
            Op::Remove(target) => {
                let key = key_at(target, read)?;
                if !key.is_some_and(|key| edit.remove(&key)) {
                    return Err(torn(at, NO_VICTIM).into());
                }
            }
        }
    }
    mark.end = log.end;
    Ok(true)
}

/// Key of the record at that offset; keys of records never change.
fn key_at(offset: u64, read: &mut ReadAt<'_>) -> Result<Option<Vec<u8>>, FollowError> {
    let head = read(offset, 8)?;
    let (Some(INORDER | ADD), Some(len)) = (u32_at(&head, 0), u32_at(&head, 4)) else { return Ok(None) };
    let Ok(len) = usize::try_from(len) else { return Ok(None) };
    let key = read(offset.saturating_add(8), len)?;
    Ok((key.len() == len).then_some(key))
}
