//! What is remembered of one mailbox, and how a reading is compared with it. Pure but for `load` and `save`.

use crate::model::{FlagName, MailboxSnapshot, Memory, MessageGuid, ModSeq, Record, SystemFlags, Uid, UniqueId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// UIDs in one block; a change writes its block and the head.
const BLOCK_UIDS: u32 = 1024;
/// An expunged record is kept this long, so that replicas that were away hear of it by modseq …
const KEEP_SECONDS: i64 = 30 * 24 * 3600;
/// … unless there are more of them than this.
const KEEP_EXPUNGED: usize = 10_000;
/// So many new messages share a modseq. A large transfer goes in parts of ascending modseqs: were all the same, each record
/// would be sent again with the last part.
const TOGETHER: u64 = 250;
/// First byte of every value.
const VERSION: u8 = 1;

/// Flags that 2.3 keeps in the index, and `\Seen`, which it does not.
const FLAGS: u32 = SystemFlags::ANSWERED
    | SystemFlags::FLAGGED
    | SystemFlags::DELETED
    | SystemFlags::DRAFT
    | SystemFlags::SEEN
    | SystemFlags::EXPUNGED;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Head {
    highestmodseq: ModSeq,
    deletedmodseq: ModSeq,
    /// Blocks that hold something.
    blocks: BTreeSet<u32>,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Line {
    uid: Uid,
    /// 0: its GUID is known and it was not given out yet.
    modseq: ModSeq,
    guid: MessageGuid,
    size: u64,
    internaldate: i64,
    /// Of everything a client can see change.
    mark: u64,
    /// When it was expunged; 0 = live.
    expunged: i64,
    /// The message file is gone as well.
    unlinked: bool,
}

impl Line {
    /// Up to this the two are the same message.
    fn is_of(&self, record: &Record) -> bool {
        (self.uid, self.size, self.internaldate) == (record.uid, record.size, record.internaldate)
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    head: Head,
    /// Ascending by UID.
    lines: Vec<Line>,
    /// Blocks to be saved.
    dirty: BTreeSet<u32>,
    head_dirty: bool,
}

/// Uniqueid of a key.
pub(super) fn mailbox_of(key: &[u8]) -> &[u8] {
    key.get(..key.len().saturating_sub(5)).unwrap_or_default()
}

/// The head is block 0, the others count from 1.
fn key(id: &UniqueId, block: u32) -> Vec<u8> {
    [id.as_bytes(), b"\0", &block.to_be_bytes()].concat()
}

fn block_of(uid: Uid) -> u32 {
    uid.0 / BLOCK_UIDS + 1
}

fn unpack<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Option<T> {
    postcard::from_bytes(bytes.strip_prefix(&[VERSION])?).ok()
}

fn pack<T: Serialize>(value: &T) -> Option<Vec<u8>> {
    postcard::to_extend(value, vec![VERSION]).ok()
}

impl Ledger {
    /// What cannot be read counts as lost: all of it, because half a ledger would take the rest for new.
    pub(super) fn load(memory: &dyn Memory, id: &UniqueId) -> Self {
        Self::try_load(memory, id).unwrap_or_default()
    }

    fn try_load(memory: &dyn Memory, id: &UniqueId) -> Option<Self> {
        let head: Head = unpack(&memory.get(&key(id, 0))?)?;
        let mut lines = Vec::new();
        for block in &head.blocks {
            lines.extend(unpack::<Vec<Line>>(&memory.get(&key(id, *block))?)?);
        }
        let ascending = lines.windows(2).all(|pair| matches!(pair, [a, b] if a.uid < b.uid));
        ascending.then_some(Self { head, lines, dirty: BTreeSet::new(), head_dirty: false })
    }

    /// Puts what has changed into the memory, in one go.
    pub(super) fn save(&mut self, memory: &dyn Memory, id: &UniqueId) {
        if self.dirty.is_empty() && !self.head_dirty {
            return;
        }
        let mut entries = Vec::new();
        for block in std::mem::take(&mut self.dirty) {
            let lines = self.lines_of(block);
            let value = if lines.is_empty() { None } else { pack(&lines) };
            match value {
                None => self.head.blocks.remove(&block),
                Some(_) => self.head.blocks.insert(block),
            };
            entries.push((key(id, block), value));
        }
        entries.push((key(id, 0), pack(&self.head)));
        self.head_dirty = false;
        memory.put(entries);
    }

    fn lines_of(&self, block: u32) -> &[Line] {
        let start = self.lines.partition_point(|line| block_of(line.uid) < block);
        let end = self.lines.partition_point(|line| block_of(line.uid) <= block);
        self.lines.get(start..end).unwrap_or_default()
    }

    pub(super) fn len(&self) -> usize {
        self.lines.len()
    }

    fn find(&self, uid: Uid) -> Result<usize, usize> {
        self.lines.binary_search_by_key(&uid, |line| line.uid)
    }

    /// The GUID of this message is known.
    pub(super) fn knows(&self, record: &Record) -> bool {
        self.find(record.uid).ok().and_then(|at| self.lines.get(at)).is_some_and(|line| line.is_of(record))
    }

    pub(super) fn learn(&mut self, record: &Record, guid: MessageGuid) {
        let line = Line {
            uid: record.uid,
            modseq: ModSeq(0),
            guid,
            size: record.size,
            internaldate: record.internaldate,
            mark: 0,
            expunged: 0,
            unlinked: false,
        };
        self.dirty.insert(block_of(record.uid));
        match self.find(record.uid) {
            // Another message under the UID of an old one.
            Ok(at) => self.lines[at] = line,
            Err(at) => self.lines.insert(at, line),
        }
    }

    /// Compares a reading with what is remembered, and fills it in. Every record in it was learned before, except
    /// expunged ones without a file, which are left out. `now` in seconds since 1970.
    pub(super) fn apply(&mut self, snapshot: &mut MailboxSnapshot, now: i64) {
        let first = self.head.highestmodseq == ModSeq(0);
        // Above 1 the server keeps modseqs itself (option CONDSTORE), and clients have seen them.
        let own = snapshot.head.highestmodseq > ModSeq(1);
        let start = if own { snapshot.head.highestmodseq } else { ModSeq(now.max(1) as u64) };
        let next = if first { start } else { ModSeq(self.head.highestmodseq.0.saturating_add(1)) };
        let mut highest = self.head.highestmodseq;
        let names: Vec<u64> = snapshot.user_flags.iter().map(|name| name.as_ref().map_or(0, hash_of_name)).collect();

        let mut raw = std::mem::take(&mut snapshot.records).into_iter().peekable();
        let mut records = Vec::with_capacity(self.lines.len());
        let mut fresh = 0;
        let (lines, dirty) = (std::mem::take(&mut self.lines), &mut self.dirty);
        let mut kept = Vec::with_capacity(lines.len());
        for mut line in lines {
            while raw.next_if(|record| record.uid < line.uid).is_some() {}
            let Some(mut record) = raw.next_if(|record| record.uid == line.uid && line.is_of(record)) else {
                if line.modseq == ModSeq(0) {
                    dirty.insert(block_of(line.uid));
                    continue;
                }
                if line.expunged == 0 {
                    (line.modseq, line.expunged, line.unlinked, line.mark) = (next, now, true, 0);
                    highest = highest.max(next);
                    dirty.insert(block_of(line.uid));
                } else if !line.unlinked {
                    // cyr_expire took the file away: nothing to tell.
                    line.unlinked = true;
                    dirty.insert(block_of(line.uid));
                }
                records.push(tombstone(&line));
                kept.push(line);
                continue;
            };
            record.system_flags.0 &= FLAGS;
            let mark = mark_of(&record, &names);
            if line.mark != mark || line.modseq == ModSeq(0) {
                fresh += u64::from(line.modseq == ModSeq(0));
                let next = ModSeq(next.0.saturating_add(fresh.saturating_sub(1) / TOGETHER));
                line.modseq = match (own, first) {
                    (true, true) => record.modseq.max(ModSeq(1)),
                    (true, false) => next.max(record.modseq),
                    (false, _) => next,
                };
                line.mark = mark;
                line.expunged = if record.is_expunged() { record.last_updated.max(1) } else { 0 };
                line.unlinked = false;
                highest = highest.max(line.modseq);
                dirty.insert(block_of(line.uid));
            }
            (record.modseq, record.guid) = (line.modseq, line.guid);
            records.push(record);
            kept.push(line);
        }
        self.lines = kept;
        if first || own {
            highest = highest.max(start);
        }
        self.head_dirty |= highest != self.head.highestmodseq;
        self.head.highestmodseq = highest;
        if self.prune(now) {
            records.retain(|record| self.find(record.uid).is_ok());
        }
        snapshot.records = records;
        snapshot.head.highestmodseq = self.head.highestmodseq;
        snapshot.deletedmodseq = self.head.deletedmodseq;
    }

    /// Lets go of what was expunged long ago; true if there was some.
    fn prune(&mut self, now: i64) -> bool {
        let mut gone: Vec<(ModSeq, Uid, i64)> = self
            .lines
            .iter()
            .filter(|line| line.expunged != 0 && line.unlinked)
            .map(|line| (line.modseq, line.uid, line.expunged))
            .collect();
        gone.sort_unstable();
        let surplus = gone.len().saturating_sub(KEEP_EXPUNGED);
        let old = gone
            .iter()
            .enumerate()
            .filter(|(at, (_, _, at_time))| *at < surplus || at_time.saturating_add(KEEP_SECONDS) < now);
        let old: BTreeSet<(Uid, ModSeq)> = old.map(|(_, (modseq, uid, _))| (*uid, *modseq)).collect();
        if old.is_empty() {
            return false;
        }
        self.dirty.extend(old.iter().map(|(uid, _)| block_of(*uid)));
        self.lines.retain(|line| !old.contains(&(line.uid, line.modseq)));
        let highest = old.iter().map(|(_, modseq)| *modseq).max().unwrap_or_default();
        self.head.deletedmodseq = self.head.deletedmodseq.max(highest);
        true
    }
}

fn tombstone(line: &Line) -> Record {
    Record {
        uid: line.uid,
        modseq: line.modseq,
        last_updated: line.expunged,
        internaldate: line.internaldate,
        size: line.size,
        guid: line.guid,
        system_flags: SystemFlags(SystemFlags::EXPUNGED | SystemFlags::UNLINKED),
        ..Record::default()
    }
}

/// Bits and names may be numbered anew; what counts is the set of names.
fn mark_of(record: &Record, names: &[u64]) -> u64 {
    let mut flags = 0u64;
    let mut bits = record.user_flags;
    while bits != 0 {
        let bit = bits.trailing_zeros() as usize;
        flags = flags.wrapping_add(names.get(bit).copied().unwrap_or_default());
        bits &= bits - 1;
    }
    let mut hash = blake3::Hasher::new();
    hash.update(&record.system_flags.0.to_be_bytes());
    hash.update(&flags.to_be_bytes());
    hash.update(&record.last_updated.to_be_bytes());
    first_word(&hash)
}

fn hash_of_name(name: &FlagName) -> u64 {
    first_word(blake3::Hasher::new().update(&name.as_bytes().to_ascii_lowercase()))
}

fn first_word(hash: &blake3::Hasher) -> u64 {
    let hash = hash.finalize();
    hash.as_bytes().iter().take(8).fold(0, |word, &byte| word << 8 | u64::from(byte))
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
