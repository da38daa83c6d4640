//! One test binary, modules by capability; helpers in `util`.

mod util;

#[global_allocator]
static COUNTING: util::memory::Counting = util::memory::Counting;

mod archive;
mod capture;
mod cli;
mod compatibility;
mod cyrus_dir;
mod cyrus_live;
mod daemon;
mod derive;
mod failover;
mod formats;
mod package;
mod push;
mod recovery;
mod replay;
mod replica_contract;
mod rooms;
mod serve;
mod spool;
mod state;
