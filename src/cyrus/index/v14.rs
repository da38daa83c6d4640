//! Minor version 14 (3.1 development): header 160 bytes.

use super::layout::{HeaderLayout, Layout, Slot::U32};
use super::v13::V13;

pub(super) const V14: Layout = Layout {
    minor_version: 14,
    header: HeaderLayout { size: 160, unseen: U32(124), crc: U32(156), ..V13.header },
    ..V13
};
