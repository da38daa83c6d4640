//! What every replica must do, over a table of them: an archive, and a real `sync_server` by TCP, compressed, and by a
//! UNIX socket. `promises` are the checks, `trouble` what only a server with a network before it can go through,
//! `proxy` the network that goes wrong.

#[path = "replica_contract/promises.rs"]
mod promises;

use crate::archive::memory;
use crate::util::cyrus::{self, PASSWORD};
use crate::util::{CyrusServer, Options};
use spooltap::archive::Archive;
use spooltap::config::{Compress, ReplicaConfig, Secret};
use spooltap::model::{Replica, ReplicaTarget};
use spooltap::replica::{self, ArchiveTarget};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A replica of the table, with the accounts that may be used there.
struct Subject {
    target: Arc<dyn ReplicaTarget>,
}

impl Subject {
    fn open(&self) -> Box<dyn Replica> {
        self.target.open().unwrap_or_else(|error| panic!("{}: {error}", self.target.name()))
    }
}

/// How a server is reached.
fn config(url: String) -> ReplicaConfig {
    ReplicaConfig {
        url,
        password: Some(Secret::new(PASSWORD)),
        realm: None,
        access: Default::default(),
        compress: Compress::Auto,
        timeout: Duration::from_secs(30),
        partitions: BTreeMap::new(),
    }
}

fn target(config: &ReplicaConfig, sieve_in_mailboxes: bool) -> Arc<dyn ReplicaTarget> {
    replica::open(config, sieve_in_mailboxes).unwrap_or_else(|error| panic!("{}: {error}", config.url))
}

/// A server with a second partition and a UNIX socket for csync; its accounts are made by replication alone.
fn server() -> (CyrusServer, String) {
    let options = Options::new().set("partition-second", "@BASE@/second");
    let mut server = CyrusServer::prepare(options).expect("is set up");
    let socket = server.base().join("conf/socket/csync").display().to_string();
    let services = server.base().join("cyrus.conf");
    let text = std::fs::read_to_string(&services).expect("cyrus.conf");
    let line = text.lines().find(|line| line.trim_start().starts_with("csync ")).expect("a csync service");
    let (name, rest) = line.split_once(" listen=").expect("where it listens");
    let unix = format!(
        "{} listen=\"{socket}\" {}",
        name.replace("csync ", "csyncunix "),
        rest.split_once(' ').expect("more").1
    );
    std::fs::write(&services, text.replace(line, &format!("{line}\n{unix}"))).expect("cyrus.conf");
    server.boot().expect("starts");
    (server, format!("csync+unix://{socket}"))
}

#[test]
fn an_archive_keeps_every_promise() {
    let archive = Archive::with_store(memory(), "memory:");
    promises::all(&Subject { target: Arc::new(ArchiveTarget::of(archive)) }, "a");
}

#[test]
fn a_real_server_keeps_every_promise() {
    if !cyrus::installed() {
        return;
    }
    let (server, unix) = server();
    let plain = config(server.url());
    let compressed = ReplicaConfig { compress: Compress::On, ..plain.clone() };
    for (number, config) in [plain, compressed, config(unix)].into_iter().enumerate() {
        // Each with accounts of its own: three replicas in one server.
        promises::all(&Subject { target: target(&config, false) }, &format!("r{number}"));
    }
}
