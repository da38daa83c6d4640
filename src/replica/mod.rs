//! Where steps go. `TARGETS` maps URL schemes to constructors; a new kind of replica is one file and one line.

mod archive;
mod csync;
mod cyrus_dir;

use crate::config::ReplicaConfig;
use crate::model::{ReplicaError, ReplicaTarget};
use std::sync::Arc;

pub use archive::ArchiveTarget;
pub use csync::CsyncTarget;
pub use cyrus_dir::{CyrusDirTarget, Hook, Verdict};

type Open = fn(&ReplicaConfig, bool) -> Result<Arc<dyn ReplicaTarget>, ReplicaError>;

/// URL schemes and what opens them.
pub const TARGETS: &[(&str, Open)] = &[
    ("csync", CsyncTarget::open),
    ("csyncs", CsyncTarget::open),
    ("csync+unix", CsyncTarget::open),
    ("imap", CsyncTarget::open),
    ("imaps", CsyncTarget::open),
    ("cyrus", |config, _| Ok(Arc::new(CyrusDirTarget::new(&config.url)?))),
    ("file", archive),
    ("s3", archive),
];

fn archive(config: &ReplicaConfig, _: bool) -> Result<Arc<dyn ReplicaTarget>, ReplicaError> {
    Ok(Arc::new(ArchiveTarget::new(&config.url)?))
}

/// A target for a checked configuration. `sieve_in_mailboxes`: the source keeps its Sieve scripts in mailboxes.
pub fn open(config: &ReplicaConfig, sieve_in_mailboxes: bool) -> Result<Arc<dyn ReplicaTarget>, ReplicaError> {
    let scheme = config.url.split_once("://").map_or("", |(scheme, _)| scheme);
    match TARGETS.iter().find(|(name, _)| *name == scheme) {
        Some((_, open)) => open(config, sieve_in_mailboxes),
        None => Err(ReplicaError::Fatal(format!("{}: no kind of replica has this scheme", config.url))),
    }
}
