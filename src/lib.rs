//! spooltap replicates Cyrus IMAP mail stores by watching the files of an unmodified server.
//!
//! Rooms in reading order:

pub mod dlist;
pub mod model;
