//! Minor version 7 (Cyrus 2.3.0 to 2.3.3): record 72 bytes, with a UUID.

use super::layout::{Layout, RecordLayout};
use super::v06::V06;

pub(super) const V07: Layout =
    Layout { minor_version: 7, record: RecordLayout { size: 72, uuid: Some(60), ..V06.record }, ..V06 };
