//! What every replica must do, over a table of them: an archive, a directory in Cyrus's own format, a `spooltap serve` before
//! each of them, and a real `sync_server` by TCP, compressed, by a
//! UNIX socket and under TLS, and the same server by its IMAP port. `promises` are the checks, `trouble` what only a server with a network before it can go through,
//! `proxy` the network that goes wrong.

#[path = "replica_contract/promises.rs"]
mod promises;

use crate::archive::memory;
use crate::serve::{KINDS, Served};
use crate::util::cyrus::{self, PASSWORD, REPLICATOR};
use crate::util::tls::{self, Ca};
use crate::util::{CyrusServer, Options};
use spooltap::archive::Archive;
use spooltap::config::{Compress, ReplicaConfig, Secret, Tls, TlsMode};
use spooltap::model::{Replica, ReplicaTarget};
use spooltap::replica::{self, ArchiveTarget};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
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
        name: None,
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

/// A server with a second partition and further doors: a UNIX socket for csync, and IMAP under TLS; its accounts are made
/// by replication alone.
fn server(certificate: &Path, key: &Path) -> (CyrusServer, String) {
    let options = Options::new()
        .set("partition-second", "@BASE@/second")
        .set("tls_server_cert", certificate.display())
        .set("tls_server_key", key.display());
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
    let imap = text.lines().find(|line| line.trim_start().starts_with("imap ")).expect("an imap service");
    let imaps = imap.replace("imap cmd", "imaps cmd").replacen("imapd ", "imapd -s ", 1).replace(":1143", ":1993");
    std::fs::write(&services, text.replace(line, &format!("{line}\n{unix}\n{imaps}"))).expect("cyrus.conf");
    server.boot().expect("starts");
    (server, format!("csync+unix://{socket}"))
}

#[test]
fn an_archive_keeps_every_promise() {
    let archive = Archive::with_store(memory(), "memory:");
    promises::all(&Subject { target: Arc::new(ArchiveTarget::of(archive)) }, "a");
}

#[test]
fn a_cyrus_directory_keeps_every_promise() {
    let dir = tempfile::Builder::new().prefix("spooltap-contract-").tempdir().expect("directory");
    let url = format!("cyrus://{}", dir.path().join("store").display());
    promises::all(&Subject { target: target(&config(url), false) }, "d");
}

#[test]
fn serve_keeps_every_promise_of_what_is_behind_it() {
    for kind in KINDS {
        let dir = tempfile::tempdir().expect("directory");
        let served = Served::of(kind, dir.path(), &[]);
        promises::all(&Subject { target: target(&config(served.url()), false) }, "s");
    }
}

#[test]
fn a_real_server_keeps_every_promise() {
    if !cyrus::installed() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("permissions");
    let ca = Ca::new(dir.path(), "ca");
    let (certificate, key, _) = ca.sign(dir.path(), "replica.test", false);
    let (server, unix) = server(&certificate, &key);
    let trust = Tls { ca_file: Some(ca.file.clone()), server_name: Some("replica.test".into()), ..Tls::default() };
    let by = |scheme: &str, address: SocketAddr| config(format!("{scheme}://{REPLICATOR}@{address}"));
    let under_tls = |mut config: ReplicaConfig, mode: TlsMode| {
        config.access.tls = Tls { mode, ..trust.clone() };
        config
    };
    let imap = server.imap_address();
    let doors = [
        by("csync", server.csync()),
        ReplicaConfig { compress: Compress::On, ..by("csync", server.csync()) },
        config(unix),
        under_tls(by("csync", server.csync()), TlsMode::Require),
        under_tls(by("csyncs", tls::before(server.csync(), &certificate, &key)), TlsMode::Auto),
        by("imap", imap),
        ReplicaConfig { compress: Compress::On, ..under_tls(by("imap", imap), TlsMode::Require) },
        under_tls(by("imaps", SocketAddr::new(imap.ip(), 1993)), TlsMode::Auto),
    ];
    for (number, config) in doors.into_iter().enumerate() {
        // Each with accounts of its own: many replicas in one server.
        promises::all(&Subject { target: target(&config, false) }, &format!("r{number}"));
    }
}
