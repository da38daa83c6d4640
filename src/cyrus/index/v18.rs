//! Minor version 18 (3.9 development, early 3.10).

use super::layout::{HeaderLayout, Layout, Slot::U64};
use super::v17::V17;

pub(super) const V18: Layout = Layout {
    minor_version: 18,
    header: HeaderLayout { quota_deleted_used: U64(140), quota_expunged_used: U64(148), ..V17.header },
    ..V17
};
