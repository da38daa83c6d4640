//! Minor version 15 (3.1 development): the line count gives its place to the save date.

use super::layout::{
    Layout, RecordLayout,
    Slot::{Absent, U32},
};
use super::v14::V14;

pub(super) const V15: Layout = Layout {
    minor_version: 15,
    record: RecordLayout { content_lines: Absent, savedate: U32(52), ..V14.record },
    ..V14
};
