//! Minor version 16 (Cyrus 3.2): record 112 bytes, with createdmodseq.

use super::layout::{
    HeaderLayout, Layout, RecordLayout,
    Slot::{U32, U64},
};
use super::v15::V15;

pub(super) const V16: Layout = Layout {
    minor_version: 16,
    header: HeaderLayout { createdmodseq: U64(128), ..V15.header },
    record: RecordLayout { size: 112, createdmodseq: U64(96), cache_crc: U32(104), crc: U32(108), ..V15.record },
};
