//! cyrusdb files: one reader per backend, chosen by what the file begins with and never by what imapd.conf says (a
//! server opens a file of another backend as it is, for years).
//!
//! [`parse`] turns a whole file into a map; uncommitted tails are left out. [`Follower`] keeps such a map up to date and
//! reads only what was appended. Neither opens a file. Whoever reads for them reads the first bytes no later than the
//! rest, and checks afterwards that the path still names the inode that was read: a repack of Cyrus 2.4 and later
//! leaves the old inode empty, and an empty file is an empty database.
//!
//! To add a backend: one file with a `BACKEND`, one line in [`BACKENDS`].
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

mod flat;
mod follow;
mod foreign;
mod quotalegacy;
mod skiplist;
mod twoskip;
mod twoskip_write;

use super::{Fault, FormatError};
use std::collections::BTreeMap;

pub use follow::{Change, Changes, FollowError, Follower, ReadAt};

/// Everything a database holds, in raw byte order of the keys.
pub type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// First four bytes of Cyrus's own binary files.
const MAGIC: [u8; 4] = [0xa1, 0x02, 0x8b, 0x0d];

/// Bytes from the beginning of a file that [`sniff`] can make use of.
pub const SNIFF_BYTES: usize = 512;

/// What a file is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Not one byte: an empty database of any backend.
    Empty,
    Twoskip,
    Skiplist,
    /// One quota root: its value is under the empty key.
    QuotaLegacy,
    Flat,
    Twom,
    Zeroskip,
    Berkeley,
    Sqlite,
    /// None of them.
    Unknown,
}

impl Kind {
    /// A file that can be read while its owner writes to it.
    pub fn is_readable(self) -> bool {
        matches!(self, Self::Empty | Self::Twoskip | Self::Skiplist | Self::QuotaLegacy | Self::Flat)
    }
}

/// One kind of file.
pub struct Backend {
    pub kind: Kind,
    /// As imapd.conf spells it.
    pub name: &'static str,
    recognise: fn(&[u8]) -> bool,
    load: fn(&[u8]) -> Result<Loaded, FormatError>,
    /// Reads on from a mark; `None` where the file is always replaced as a whole.
    tail: Option<follow::Tail>,
}

/// Order matters: `flat` takes any text.
pub const BACKENDS: &[Backend] = &[
    twoskip::BACKEND,
    skiplist::BACKEND,
    foreign::TWOM,
    foreign::ZEROSKIP,
    foreign::SQLITE,
    foreign::BERKELEY,
    quotalegacy::BACKEND,
    flat::BACKEND,
];

/// A whole file, and where its committed part ends.
struct Loaded {
    map: Map,
    mark: Mark,
}

/// Where a reader stands in a file that grows at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mark {
    /// Differs when the file was rewritten (twoskip: generation; skiplist: logstart and time of recovery).
    epoch: (u64, u64),
    /// First byte after what is committed and known.
    end: u64,
    order: Order,
}

/// What is known of the order a twoskip file keeps its keys in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Order {
    /// Neither order could be excluded, and they would sort these keys differently; or it is not raw.
    #[default]
    Unknown,
    /// Raw byte order for certain.
    Raw,
    /// These keys sort the same way in both.
    Either,
}

/// Says what a file is; [`SNIFF_BYTES`] of it are enough.
pub fn sniff(bytes: &[u8]) -> Kind {
    if bytes.is_empty() { Kind::Empty } else { backend_of(bytes).map_or(Kind::Unknown, |backend| backend.kind) }
}

/// A whole twoskip file, as its owner would leave it after a repack.
pub fn encode_twoskip(map: &Map) -> Vec<u8> {
    twoskip_write::encode(map)
}

/// A whole flat file.
pub fn encode_flat(map: &Map) -> Vec<u8> {
    flat::encode(map)
}

fn backend_of(bytes: &[u8]) -> Option<&'static Backend> {
    BACKENDS.iter().find(|backend| (backend.recognise)(bytes))
}

/// Reads a whole database file. Torn (see [`FormatError::is_torn`]) means: read the file again.
pub fn parse(bytes: &[u8]) -> Result<Map, FormatError> {
    load(bytes).map(|(_, loaded)| loaded.map)
}

fn load(bytes: &[u8]) -> Result<(Kind, Loaded), FormatError> {
    if bytes.is_empty() {
        return Ok((Kind::Empty, Loaded { map: Map::new(), mark: Mark::default() }));
    }
    match backend_of(bytes) {
        Some(backend) => Ok((backend.kind, (backend.load)(bytes)?)),
        // A new file is filled from its second record on: the header is written last.
        None if bytes.iter().take(20).all(|&byte| byte == 0) => Err(fault(Fault::Torn("file is being created"))),
        None => Err(fault(Fault::Magic)),
    }
}

fn fault(fault: Fault) -> FormatError {
    FormatError { part: "database", offset: 0, fault }
}
