//! Minor version 13 (Cyrus 2.5, 3.0): record 104 bytes, with the conversation id; annotations in quota and checksum.

use super::layout::{
    HeaderLayout, Layout, RecordLayout,
    Slot::{U32, U64},
};
use super::v12::V12;

pub(super) const V13: Layout = Layout {
    minor_version: 13,
    header: HeaderLayout { pop3_show_after: U32(112), quota_annot_used: U32(116), sync_annot: U32(120), ..V12.header },
    record: RecordLayout { size: 104, cid: U64(88), cache_crc: U32(96), crc: U32(100), ..V12.record },
};
