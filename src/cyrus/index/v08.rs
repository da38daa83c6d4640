//! Minor version 8 (Cyrus 2.3.4 to 2.3.6): header 92 bytes, record 80, with modseqs.

use super::layout::{HeaderLayout, Layout, RecordLayout, Slot::U64};
use super::v07::V07;

pub(super) const V08: Layout = Layout {
    minor_version: 8,
    header: HeaderLayout { size: 92, highestmodseq: U64(68), ..V07.header },
    record: RecordLayout { size: 80, modseq: U64(72), ..V07.record },
};
