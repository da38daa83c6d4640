//! Minor version 17 (Cyrus 3.4, 3.6, 3.8).

use super::layout::{HeaderLayout, Layout, Slot::U32};
use super::v16::V16;

pub(super) const V17: Layout =
    Layout { minor_version: 17, header: HeaderLayout { changes_epoch: U32(136), ..V16.header }, ..V16 };
