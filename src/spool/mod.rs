//! The source's disk, opened read-only. `layout` says where things are, `lock` asks whether a writer is at work (it takes
//! no lock), `read` gives stable bytes or says torn, `store` puts the `cyrus` parsers together into a `MailStore`.

mod changed;
mod history;
pub mod layout;
mod list;
pub mod lock;
mod mailbox;
mod quota_roots;
pub mod read;
mod store;
mod users;

pub use layout::Layout;
pub use store::{LiveSpool, open_store, read_conf};

use crate::cyrus::FormatError;
use crate::model::{Disposition, StoreError};
use std::path::Path;

/// A file could not be read.
fn io_error(path: &Path, error: &std::io::Error) -> StoreError {
    let cure = match error.kind() {
        std::io::ErrorKind::PermissionDenied => "; run spooltap as the user cyrus, or as one who may read the store",
        _ => "",
    };
    StoreError::new(Disposition::RetrySoon, format!("{}: {error}{cure}", path.display()))
}

/// A file did not have the shape its format promises.
fn format_error(path: &Path, error: &FormatError) -> StoreError {
    let (disposition, cure) = if error.is_torn() {
        (Disposition::RetrySoon, "")
    } else if error.is_unsupported() {
        (Disposition::Quarantine, "; it is not damaged, but this release of spooltap cannot read it")
    } else {
        (Disposition::Quarantine, "; run Cyrus's reconstruct on the mailbox")
    };
    StoreError::new(disposition, format!("{}: {error}{cure}", path.display()))
}
