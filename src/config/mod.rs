//! What is to be run. `raw.rs` is what was typed (TOML file and command line, all optional); `checked.rs` is what we
//! run on, or every fault at once. What imapd.conf knows is read from there, not asked again.

mod checked;
mod raw;
mod routes;
mod secrets;

pub use checked::{
    Access, ClearText, Compress, Config, ConfigFault, ConfigFaults, DEFAULT_STATE, ReplicaConfig, Tls, TlsMode,
};
pub use raw::Raw;
pub use routes::Routes;
pub use secrets::{Credentials, Secret};
