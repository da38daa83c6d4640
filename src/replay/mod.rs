//! Recordings of what a real server did to its mail store, played again: `Recording` is the folder (or the bytes of
//! its files), `Player` makes the recorded file operations on an unpacked copy, stopping at each mark, where the
//! recording also says what IMAP showed (`Mark::truth`).
//!
//! Used by `spooltap demo`, by the tests, and by whoever wants to watch the watcher.

mod compare;
mod locks;
mod ops;
mod player;
mod recording;

pub use compare::{Depth, compare, compare_replica};
pub use player::{Mark, Phase, Player, Speed, StepEvent};
pub use recording::Recording;

use std::path::PathBuf;

/// A recording could not be read or played.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("{part} of the recording: {fault}")]
    Format { part: &'static str, fault: String },
    #[error("{}: {cause}", path.display())]
    File { path: PathBuf, cause: std::io::Error },
    /// The store did not take an operation that the real server's store took.
    #[error("operation {n} ({op}) of the recording: {cause}")]
    Operation { n: u64, op: String, cause: std::io::Error },
}
