//! How change is noticed.

pub mod coalesce;
pub mod derive;

pub use coalesce::Coalescer;
pub use derive::{Reach, Roots};
