//! Where the fields of a version stand: the vocabulary of the tables `v06` … `v20`.

use crate::cyrus::bytes::{array_at, u32_at, u64_at};

/// Place and width of one field, big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// The version has no such field: it reads as 0.
    Absent,
    U32(usize),
    U64(usize),
    /// Nanoseconds since 1970; reads as seconds.
    Nanos(usize),
}

use Slot::Absent;

impl Slot {
    /// `None` when the bytes end before the field does.
    pub(super) fn read(self, bytes: &[u8]) -> Option<u64> {
        match self {
            Self::Absent => Some(0),
            Self::U32(at) => u32_at(bytes, at).map(u64::from),
            Self::U64(at) => u64_at(bytes, at),
            Self::Nanos(at) => u64_at(bytes, at).map(|nanos| nanos / 1_000_000_000),
        }
    }

    /// Puts a value in; what has more bits than the place loses the high ones, as in Cyrus.
    pub(super) fn write(self, bytes: &mut [u8], value: u64) {
        let mut put = |at: usize, new: &[u8]| {
            if let Some(place) = at.checked_add(new.len()).and_then(|end| bytes.get_mut(at..end)) {
                place.copy_from_slice(new);
            }
        };
        match self {
            Self::Absent => {}
            Self::U32(at) => put(at, &(value as u32).to_be_bytes()),
            Self::U64(at) => put(at, &value.to_be_bytes()),
            Self::Nanos(at) => put(at, &value.saturating_mul(1_000_000_000).to_be_bytes()),
        }
    }
}

/// The first 24 bytes are the same everywhere and are not listed.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeaderLayout {
    pub size: usize,
    pub last_appenddate: Slot,
    pub last_uid: Slot,
    pub quota_mailbox_used: Slot,
    pub pop3_last_login: Slot,
    pub uidvalidity: Slot,
    pub deleted: Slot,
    pub answered: Slot,
    pub flagged: Slot,
    pub options: Slot,
    pub leaked_cache_records: Slot,
    pub highestmodseq: Slot,
    pub deletedmodseq: Slot,
    pub exists: Slot,
    pub first_expunged: Slot,
    pub last_repack_time: Slot,
    pub header_file_crc: Slot,
    pub sync_basic: Slot,
    pub sync_annot: Slot,
    pub recentuid: Slot,
    pub recenttime: Slot,
    pub pop3_show_after: Slot,
    pub quota_annot_used: Slot,
    pub unseen: Slot,
    pub createdmodseq: Slot,
    pub changes_epoch: Slot,
    pub quota_deleted_used: Slot,
    pub quota_expunged_used: Slot,
    /// CRC-32 of all bytes before it.
    pub crc: Slot,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct RecordLayout {
    pub size: usize,
    pub uid: Slot,
    pub internaldate: Slot,
    pub sentdate: Slot,
    pub message_size: Slot,
    pub header_size: Slot,
    /// The Date header in UTC; up to v10 this place is content_offset.
    pub gmtime: Slot,
    pub content_offset: Slot,
    pub cache_offset: Slot,
    pub last_updated: Slot,
    pub system_flags: Slot,
    /// Four words.
    pub user_flags: usize,
    pub content_lines: Slot,
    pub savedate: Slot,
    /// Low half: version of the cache entry. High half: bits 32 to 47 of cache_offset (3.10 and later).
    pub cache_version: Slot,
    /// 12 bytes that tell nothing about the content.
    pub uuid: Option<usize>,
    /// 20 bytes.
    pub guid: Option<usize>,
    pub modseq: Slot,
    pub cid: Slot,
    pub createdmodseq: Slot,
    pub basecid: Slot,
    pub cache_crc: Slot,
    /// CRC-32 of all bytes of the record before it.
    pub crc: Slot,
}

/// One minor version.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub minor_version: u32,
    pub(super) header: HeaderLayout,
    pub(super) record: RecordLayout,
}

impl Layout {
    pub fn header_bytes(&self) -> usize {
        self.header.size
    }

    pub fn record_bytes(&self) -> usize {
        self.record.size
    }

    /// Header and records carry checksums (2.4 and later).
    pub fn has_crc(&self) -> bool {
        self.header.crc != Absent
    }
}

impl RecordLayout {
    /// Bit *n* of the result is user flag *n*.
    pub(super) fn user_flag_bits(&self, bytes: &[u8]) -> Option<u128> {
        let words: [u8; 16] = array_at(bytes, self.user_flags)?;
        Some(words.chunks_exact(4).rev().fold(0, |all, word| all << 32 | u128::from(u32_at(word, 0).unwrap_or(0))))
    }
}
