//! spooltap replicates Cyrus IMAP mail stores by watching the files of an unmodified server.
//!
//! Rooms in reading order; each folder's front door is its `mod.rs`. Dependencies point down this list's reverse:
//! `cli → daemon → { capture, engine, serve } → { spool, replica, archive, state } → { cyrus, csync } → dlist → model`.

pub mod model;

pub mod dlist;

pub mod cyrus;

pub mod csync;

pub mod spool;

pub mod archive;

pub mod replica;

pub mod state;

pub mod capture;

pub mod engine;

pub mod serve;

pub mod config;

pub mod daemon;

pub mod replay;

pub mod cli;
