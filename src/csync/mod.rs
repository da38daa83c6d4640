//! The replication protocol of Cyrus (csync), client side. `codec` splits the server's bytes into answers, `command`
//! makes requests and reads answers, `dialect` knows what each release takes, `sasl` logs in: all without a socket.
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
pub mod sasl;
pub mod transport;

#[cfg(test)]
mod recorded;

pub use dialect::{Dialect, Generation};
