//! Minor version 10 (Cyrus 2.3.10 to 2.3.20): record 88 bytes, with a 20-byte GUID, all zero by default.

use super::layout::{Layout, RecordLayout, Slot::U64};
use super::v09::V09;

pub(super) const V10: Layout = Layout {
    minor_version: 10,
    record: RecordLayout { size: 88, uuid: None, guid: Some(60), modseq: U64(80), ..V09.record },
    ..V09
};
