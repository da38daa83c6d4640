//! Minor version 12 (Cyrus 2.4): header 128 bytes, record 96; checksums, expunged records, `\Seen` in the record.

use super::layout::{
    HeaderLayout, Layout, RecordLayout,
    Slot::{Absent, U32, U64},
};
use super::v10::V10;

pub(super) const V12: Layout = Layout {
    minor_version: 12,
    header: HeaderLayout {
        size: 128,
        deletedmodseq: U64(76),
        exists: U32(84),
        first_expunged: U32(88),
        last_repack_time: U32(92),
        header_file_crc: U32(96),
        sync_basic: U32(100),
        recentuid: U32(104),
        recenttime: U32(108),
        crc: U32(124),
        ..V10.header
    },
    record: RecordLayout {
        size: 96,
        gmtime: U32(20),
        content_offset: Absent,
        cache_crc: U32(88),
        crc: U32(92),
        ..V10.record
    },
};
