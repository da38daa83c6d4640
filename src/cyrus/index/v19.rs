//! Minor version 19 (Cyrus 3.10, 3.12): fields of the header in another order, every 64-bit one aligned.

use super::layout::{
    HeaderLayout, Layout,
    Slot::{U32, U64},
};
use super::v18::V18;

pub(super) const V19: Layout = Layout {
    minor_version: 19,
    header: HeaderLayout {
        exists: U32(60),
        options: U32(64),
        leaked_cache_records: U32(68),
        highestmodseq: U64(72),
        deletedmodseq: U64(80),
        quota_deleted_used: U64(136),
        quota_expunged_used: U64(144),
        changes_epoch: U32(152),
        ..V18.header
    },
    ..V18
};
