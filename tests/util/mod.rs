//! What the tests share: private instances of a real Cyrus, clients for its protocols, what IMAP shows as one value
//! (`snapshot`), how two such values differ (`diff`), a seeded workload, recorded stores, and the program under test.
//!
//! Every test that needs Cyrus begins with `if !cyrus::installed() { return; }`. Without Cyrus it
//! says on stderr that it was skipped; with `SPOOLTAP_REQUIRE_CYRUS=1`, as `tests/run` sets it, it fails.

// Tests and benches each use a part of it.
#![allow(dead_code, unused_imports)]

pub mod apart;
pub mod cyrus;
pub mod diff;
pub mod evidence;
pub mod full;
pub mod gate;
pub mod imap;
pub mod locks;
pub mod memory;
pub mod names;
pub mod process;
pub mod rng;
pub mod s3;
pub mod sieve;
pub mod smtp;
pub mod snapshot;
pub mod spooltap;
pub mod store;
pub mod tls;
pub mod workload;

pub use apart::{apart, beside};
pub use cyrus::{CyrusServer, Options};
pub use diff::{Rules, diff};
pub use evidence::Evidence;
pub use gate::Gate;
pub use imap::Imap;
pub use locks::lock;
pub use rng::Rng;
pub use snapshot::{Snapshot, Viewer, snapshot};
pub use spooltap::Spooltap;
pub use store::{Store, store};
pub use workload::Workload;

use std::time::{Duration, Instant};

/// Asks again until there is an answer or the time is over. Between two questions it sleeps as long as a question takes:
/// others have to get on as well.
pub fn eventually<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        let asked = Instant::now();
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(asked.elapsed().clamp(Duration::from_millis(5), Duration::from_millis(500)));
    }
}
