//! cyrus.index: one table per minor version, one decoder for all of them.
//!
//! The version is decided per file and never by the server's release: a 3.12 store may hold versions 6 to 19 side by
//! side. To add a version: one `vNN.rs` with its table, one line in [`LAYOUTS`].
//!
//! The header write is the commit point of the file. Whoever reads it takes the header no later than the records, reads
//! the header again at the end, and starts anew if it changed; [`uncommitted`] shows a writer that has changed records
//! and not yet the header.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

mod encode;
mod layout;
mod v06;
mod v07;
mod v08;
mod v09;
mod v10;
mod v12;
mod v13;
mod v14;
mod v15;
mod v16;
mod v17;
mod v18;
mod v19;
mod v20;

use super::bytes::{array_at, crc_holds, crc32, u32_at};
use super::{Fault, FormatError};
use crate::model::{MessageGuid, ModSeq, Options, Record, SyncCrcs, SystemFlags, Uid};
use layout::Slot;
use serde::Serialize;

pub use encode::{encode_header, encode_record, recount};
pub use layout::Layout;

/// Every version that was ever released; 11 was not.
pub const LAYOUTS: &[Layout] = &[
    v06::V06,
    v07::V07,
    v08::V08,
    v09::V09,
    v10::V10,
    v12::V12,
    v13::V13,
    v14::V14,
    v15::V15,
    v16::V16,
    v17::V17,
    v18::V18,
    v19::V19,
    v20::V20,
];

/// Enough bytes from the beginning of the file for [`parse_header`] of any version.
pub const MAX_HEADER_BYTES: usize = 192;

/// No version comes near this; larger records are damage.
const MAX_RECORD_BYTES: u32 = 1024;

const HEADER: &str = "cyrus.index header";
const RECORD: &str = "cyrus.index record";

/// The header. A field that the version lacks is 0, except where its line says otherwise. Times are seconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IndexHeader {
    pub generation_no: u32,
    pub format: u32,
    pub minor_version: u32,
    /// Bytes before the first record.
    pub start_offset: u32,
    pub record_size: u32,
    /// Records that count; what follows them in the file is left over from an aborted append.
    pub num_records: u32,
    pub last_appenddate: i64,
    /// Highest UID ever assigned.
    pub last_uid: Uid,
    /// Sum of the sizes of live messages.
    pub quota_mailbox_used: u64,
    pub pop3_last_login: i64,
    pub uidvalidity: u32,
    pub deleted: u32,
    pub answered: u32,
    pub flagged: u32,
    /// All bits as stored; [`IndexHeader::options`] gives those that replicate, as the server reads them.
    pub option_bits: u32,
    pub leaked_cache_records: u32,
    /// At least 1: Cyrus reads 0, and no field at all, as 1.
    pub highestmodseq: ModSeq,
    /// Highest modseq of a record that is physically gone; up to v10 nobody knows, so it is highestmodseq.
    pub deletedmodseq: ModSeq,
    /// Live records; up to v10 all of them.
    pub exists: u32,
    pub first_expunged: i64,
    pub last_repack_time: i64,
    /// CRC-32 of the whole cyrus.header file.
    pub header_file_crc: u32,
    /// As stored, not recomputed.
    pub sync_crcs: SyncCrcs,
    /// Last UID the owner was told about.
    pub recentuid: Uid,
    pub recenttime: i64,
    pub pop3_show_after: i64,
    pub quota_annot_used: u64,
    pub unseen: u32,
    pub createdmodseq: ModSeq,
    pub changes_epoch: i64,
    pub quota_deleted_used: u64,
    pub quota_expunged_used: u64,
}

/// One record with what is kept only on this disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IndexRecord {
    /// What replication is about; annotations are elsewhere and empty here.
    pub record: Record,
    /// The Date header, local midnight of its day.
    pub sentdate: i64,
    pub header_size: u32,
    /// The Date header in UTC (v12 and later).
    pub gmtime: i64,
    /// Up to v10.
    pub content_offset: u32,
    /// Up to v14.
    pub content_lines: u32,
    pub cache_version: u32,
    pub cache_offset: u64,
    pub cache_crc: u32,
    pub basecid: u64,
    /// v7 to v9: says nothing about the content.
    pub uuid: [u8; 12],
}

impl IndexHeader {
    const MAILBOX_DELETED: u32 = 0x8000_0000;

    /// Options that replicate, as every release reads them: a mailbox without a message has the new UIDLs of POP3, whatever
    /// is stored (`mailbox_buf_to_index_header` in 2.3 to 3.12).
    pub fn options(&self) -> Options {
        let empty = if self.exists == 0 { Options::POP3_NEW_UIDL } else { 0 };
        Options::from_index(self.option_bits | empty)
    }

    /// The mailbox is being removed: treat it as gone.
    pub fn is_deleted(&self) -> bool {
        self.option_bits & Self::MAILBOX_DELETED != 0
    }

    /// Bytes from the beginning of the file that hold the header and all records that count.
    pub fn file_bytes(&self) -> u64 {
        self.record_offset(self.num_records.saturating_add(1))
    }

    /// Offset of record `recno`, counted from 1.
    pub fn record_offset(&self, recno: u32) -> u64 {
        let before = u64::from(recno.saturating_sub(1)).saturating_mul(self.record_size.into());
        before.saturating_add(self.start_offset.into())
    }

    /// The version's table; always there for a header that [`parse_header`] gave.
    pub fn layout(&self) -> Result<&'static Layout, FormatError> {
        layout_of(self.minor_version)
    }
}

/// The table of a version; of one that is not known the newest.
pub fn layout(minor_version: u32) -> &'static Layout {
    layout_of(minor_version).unwrap_or(&v20::V20)
}

fn layout_of(minor_version: u32) -> Result<&'static Layout, FormatError> {
    LAYOUTS.iter().find(|layout| layout.minor_version == minor_version).ok_or_else(|| FormatError {
        part: HEADER,
        offset: 8,
        fault: Fault::Unsupported(format!("minor version {minor_version} is not known (6 to 10 and 12 to 20 are)")),
    })
}

fn truncated(part: &'static str, offset: u64, need: usize, have: usize) -> FormatError {
    FormatError { part, offset, fault: Fault::Truncated { need: need as u64, have: have as u64 } }
}

/// Reads the header from the first [`MAX_HEADER_BYTES`] of the file (or all of it).
pub fn parse_header(bytes: &[u8]) -> Result<IndexHeader, FormatError> {
    if bytes.is_empty() {
        return Err(FormatError { part: HEADER, offset: 0, fault: Fault::Torn("file is being created") });
    }
    let word = |at: usize| u32_at(bytes, at).ok_or_else(|| truncated(HEADER, 0, 24, bytes.len()));
    let layout = layout_of(word(8)?)?;
    let table = &layout.header;
    let short = || truncated(HEADER, 0, table.size, bytes.len());
    let all = bytes.get(..table.size).ok_or_else(short)?;
    check_crc(HEADER, 0, table.crc, all)?;

    let start_offset = word(12)?;
    let record_size = word(16)?;
    // Without checksums (up to v10) very old stores keep records longer than their version needs.
    let fits = |size: u32, expected: usize| match usize::try_from(size) {
        Ok(size) if layout.has_crc() => size == expected,
        Ok(size) => size >= expected && size <= MAX_RECORD_BYTES as usize && size % 4 == 0,
        Err(_) => false,
    };
    if !fits(start_offset, table.size) {
        let message = format!("start_offset is {start_offset}, expected {} for version {}", table.size, word(8)?);
        return Err(FormatError::value(HEADER, 12, message));
    }
    if !fits(record_size, layout.record.size) {
        let message = format!("record_size is {record_size}, expected {} for version {}", layout.record.size, word(8)?);
        return Err(FormatError::value(HEADER, 16, message));
    }

    let long = |slot: Slot| slot.read(all).ok_or_else(short);
    let short_word = |slot: Slot| long(slot).map(|value| value as u32);
    let seconds = |slot: Slot| long(slot).map(|value| value as i64);
    let highestmodseq = ModSeq(long(table.highestmodseq)?.max(1));
    let deletedmodseq = match table.deletedmodseq {
        Slot::Absent => highestmodseq,
        slot => ModSeq(long(slot)?),
    };
    Ok(IndexHeader {
        generation_no: word(0)?,
        format: word(4)?,
        minor_version: layout.minor_version,
        start_offset,
        record_size,
        num_records: word(20)?,
        last_appenddate: seconds(table.last_appenddate)?,
        last_uid: Uid(short_word(table.last_uid)?),
        quota_mailbox_used: long(table.quota_mailbox_used)?,
        pop3_last_login: seconds(table.pop3_last_login)?,
        uidvalidity: short_word(table.uidvalidity)?,
        deleted: short_word(table.deleted)?,
        answered: short_word(table.answered)?,
        flagged: short_word(table.flagged)?,
        option_bits: short_word(table.options)?,
        leaked_cache_records: short_word(table.leaked_cache_records)?,
        highestmodseq,
        deletedmodseq,
        exists: short_word(table.exists)?,
        first_expunged: seconds(table.first_expunged)?,
        last_repack_time: seconds(table.last_repack_time)?,
        header_file_crc: short_word(table.header_file_crc)?,
        sync_crcs: SyncCrcs { basic: short_word(table.sync_basic)?, annot: short_word(table.sync_annot)? },
        recentuid: Uid(short_word(table.recentuid)?),
        recenttime: seconds(table.recenttime)?,
        pop3_show_after: seconds(table.pop3_show_after)?,
        quota_annot_used: long(table.quota_annot_used)?,
        unseen: short_word(table.unseen)?,
        createdmodseq: ModSeq(long(table.createdmodseq)?),
        changes_epoch: seconds(table.changes_epoch)?,
        quota_deleted_used: long(table.quota_deleted_used)?,
        quota_expunged_used: long(table.quota_expunged_used)?,
    })
}

fn check_crc(part: &'static str, offset: u64, slot: Slot, bytes: &[u8]) -> Result<(), FormatError> {
    let Slot::U32(at) = slot else { return Ok(()) };
    let (Some(covered), Some(stored)) = (bytes.get(..at), u32_at(bytes, at)) else {
        return Err(truncated(part, offset, at.saturating_add(4), bytes.len()));
    };
    let computed = crc32(covered);
    if crc_holds(stored, computed) {
        return Ok(());
    }
    Err(FormatError { part, offset: offset.saturating_add(at as u64), fault: Fault::Crc { stored, computed } })
}

/// Reads record `recno` (counted from 1) from its own `record_size` bytes.
pub fn parse_record(header: &IndexHeader, recno: u32, bytes: &[u8]) -> Result<IndexRecord, FormatError> {
    let layout = header.layout()?;
    let table = &layout.record;
    let offset = header.record_offset(recno);
    let short = || truncated(RECORD, offset, table.size, bytes.len());
    let all = bytes.get(..table.size).ok_or_else(short)?;
    check_crc(RECORD, offset, table.crc, all)?;
    let long = |slot: Slot| slot.read(all).ok_or_else(short);
    let word = |slot: Slot| long(slot).map(|value| value as u32);
    let seconds = |slot: Slot| long(slot).map(|value| value as i64);
    let guid = match table.guid {
        Some(at) => array_at(all, at).ok_or_else(short)?,
        None => [0; 20],
    };
    let uuid = match table.uuid {
        Some(at) => array_at(all, at).ok_or_else(short)?,
        None => [0; 12],
    };
    let modseq = match table.modseq {
        Slot::Absent => 1,
        slot => long(slot)?,
    };
    let uid = Uid(word(table.uid)?);
    if uid.0 == 0 {
        return Err(FormatError { part: RECORD, offset, fault: Fault::Torn("uid is 0") });
    }
    let cache_version = word(table.cache_version)?;
    Ok(IndexRecord {
        record: Record {
            uid,
            modseq: ModSeq(modseq),
            last_updated: seconds(table.last_updated)?,
            internaldate: seconds(table.internaldate)?,
            size: long(table.message_size)?,
            guid: MessageGuid(guid),
            system_flags: SystemFlags(word(table.system_flags)?),
            user_flags: table.user_flag_bits(all).ok_or_else(short)?,
            cid: long(table.cid)?,
            savedate: seconds(table.savedate)?,
            createdmodseq: ModSeq(long(table.createdmodseq)?),
            annotations: Vec::new(),
        },
        sentdate: seconds(table.sentdate)?,
        header_size: word(table.header_size)?,
        gmtime: seconds(table.gmtime)?,
        content_offset: word(table.content_offset)?,
        content_lines: word(table.content_lines)?,
        cache_version: cache_version & 0xffff,
        cache_offset: u64::from(cache_version >> 16) << 32 | long(table.cache_offset)?,
        cache_crc: word(table.cache_crc)?,
        basecid: long(table.basecid)?,
        uuid,
    })
}

/// Reads all records from the bytes of the whole file, ascending by UID.
pub fn parse_records(header: &IndexHeader, file: &[u8]) -> Result<Vec<Record>, FormatError> {
    parse_index_records(header, file).map(|all| all.into_iter().map(|one| one.record).collect())
}

/// The same with everything a record holds.
pub fn parse_index_records(header: &IndexHeader, file: &[u8]) -> Result<Vec<IndexRecord>, FormatError> {
    let records = parse_unsorted(header, file)?;
    let mut last = 0;
    for (recno, found) in (1..).zip(&records) {
        let offset = header.record_offset(recno);
        let torn = |what| Err(FormatError { part: RECORD, offset, fault: Fault::Torn(what) });
        if found.record.uid.0 <= last {
            return torn("uid does not ascend");
        }
        last = found.record.uid.0;
        if found.record.uid > header.last_uid {
            return torn("uid is above last_uid of the header");
        }
    }
    Ok(records)
}

/// For `cyrus.expunge` of 2.3, which has the same layout and keeps records in the order they were expunged.
pub fn parse_unsorted(header: &IndexHeader, file: &[u8]) -> Result<Vec<IndexRecord>, FormatError> {
    let end = header.file_bytes();
    let start = usize::try_from(header.start_offset).ok();
    let body = start.zip(usize::try_from(end).ok()).and_then(|(start, end)| file.get(start..end));
    let Some(body) = body else {
        let offset = file.len() as u64;
        return Err(FormatError { part: RECORD, offset, fault: Fault::Torn("file ends before its last record") });
    };
    let size = usize::try_from(header.record_size).unwrap_or(1).max(1);
    (1..).zip(body.chunks_exact(size)).map(|(recno, bytes)| parse_record(header, recno, bytes)).collect()
}

/// UID of a record that is newer than the header: its writer has not committed yet. Read again in a moment; a stable
/// file that stays so is an odd one, not a damaged one. Says nothing up to v10, where modseqs are not kept.
pub fn uncommitted(header: &IndexHeader, records: &[Record]) -> Option<Uid> {
    let newer = |record: &&Record| record.modseq > header.highestmodseq;
    if header.minor_version < 12 { None } else { records.iter().find(newer).map(|record| record.uid) }
}
