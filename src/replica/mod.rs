//! Where a delta goes, one `Replica` each.

mod archive;

pub use archive::ArchiveTarget;
