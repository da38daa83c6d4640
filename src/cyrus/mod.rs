//! Bytes in, values out, for every file Cyrus writes. No paths opened, no clock, no async.

pub mod annotations;
pub mod bytes;
pub mod db;
pub mod header;
pub mod imapd_conf;
pub mod index;
pub mod mboxlist;
pub mod names;
pub mod quota;
pub mod seen;
pub mod sieve;
pub mod subs;
pub mod synccrc;

/// A file did not have the shape its format promises.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part} at byte {offset:#x}: {fault}")]
pub struct FormatError {
    pub part: &'static str,
    pub offset: u64,
    pub fault: Fault,
}

/// What is wrong at that place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("{need} bytes expected, {have} are there")]
    Truncated { need: u64, have: u64 },
    #[error("magic bytes are not those of this format")]
    Magic,
    #[error("crc is {stored:08x}, expected {computed:08x}")]
    Crc { stored: u32, computed: u32 },
    /// Unknown is not damaged: a version or backend this release of spooltap cannot read.
    #[error("{0}")]
    Unsupported(String),
    #[error("{0}")]
    Value(String),
}

impl FormatError {
    /// A value that cannot be right.
    pub fn value(part: &'static str, offset: u64, fault: impl Into<String>) -> Self {
        Self { part, offset, fault: Fault::Value(fault.into()) }
    }
}
