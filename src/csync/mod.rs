//! The replication protocol of Cyrus (csync). Client side: `codec` splits the server's bytes into answers, `command`
//! makes requests and reads answers, `dialect` knows what each release takes, `sasl` logs in. Server side: `intake` splits
//! the client's bytes into requests and files, `request` reads them, `reply` makes answers. All without a socket:
//! `transport` is the only part with one.
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

pub mod codec;
pub mod command;
pub mod dialect;
mod digest;
pub mod imap;
pub mod intake;
pub mod reply;
pub mod request;
pub mod sasl;
pub mod tls;
pub mod transport;

#[cfg(test)]
mod recorded;

pub use dialect::{Dialect, Generation, Unannotation};
