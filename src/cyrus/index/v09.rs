//! Minor version 9 (Cyrus 2.3.7 to 2.3.9): header 96 bytes, one more spare word.

use super::layout::{HeaderLayout, Layout};
use super::v08::V08;

pub(super) const V09: Layout = Layout { minor_version: 9, header: HeaderLayout { size: 96, ..V08.header }, ..V08 };
