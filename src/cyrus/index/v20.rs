//! Minor version 20 (3.13 development): header 192 bytes, record 144; times in nanoseconds.

use super::layout::{
    HeaderLayout, Layout, RecordLayout,
    Slot::{Nanos, U32, U64},
};
use super::v19::V19;

pub(super) const V20: Layout = Layout {
    minor_version: 20,
    header: HeaderLayout {
        size: 192,
        last_appenddate: Nanos(24),
        pop3_last_login: Nanos(40),
        last_uid: U32(88),
        uidvalidity: U32(92),
        recenttime: Nanos(104),
        pop3_show_after: Nanos(112),
        quota_annot_used: U64(152),
        changes_epoch: Nanos(160),
        first_expunged: Nanos(168),
        last_repack_time: Nanos(176),
        recentuid: U32(184),
        crc: U32(188),
        ..V19.header
    },
    record: RecordLayout {
        size: 144,
        cache_offset: U32(4),
        internaldate: Nanos(8),
        sentdate: Nanos(16),
        message_size: U64(24),
        header_size: U32(32),
        system_flags: U32(36),
        user_flags: 40,
        gmtime: Nanos(104),
        last_updated: Nanos(112),
        savedate: Nanos(120),
        basecid: U64(128),
        cache_crc: U32(136),
        crc: U32(140),
        ..V19.record
    },
};
