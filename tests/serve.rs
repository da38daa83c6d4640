//! `spooltap serve`: real clients replicate into an archive, and into a store in Cyrus's own format, through it, and nothing
//! else gets in.

#[path = "serve/circle.rs"]
mod circle;
#[path = "serve/clients.rs"]
mod clients;
#[path = "serve/full.rs"]
mod full;
#[path = "serve/grammar.rs"]
mod grammar;
#[path = "serve/hostile.rs"]
mod hostile;
#[path = "serve/kill.rs"]
mod kill;
#[path = "serve/names.rs"]
mod names;
#[path = "serve/power.rs"]
mod power;
#[path = "serve/releases.rs"]
mod releases;
#[path = "serve/stores.rs"]
mod stores;
#[path = "serve/syslog.rs"]
mod syslog;
#[path = "serve/talk.rs"]
mod talk;
#[path = "serve/tls.rs"]
mod tls;

use super::util::cyrus::{PASSWORD, REPLICATOR};
use super::util::eventually;
use super::util::process::Group;
use nix::sys::signal::Signal;
use spooltap::config::{Access, Compress, ReplicaConfig, Secret};
use spooltap::model::{Replica, ReplicaTarget};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Archive,
    /// A directory in Cyrus's own format.
    Cyrus,
}

pub(crate) const KINDS: [Kind; 2] = [Kind::Archive, Kind::Cyrus];

impl Kind {
    /// Where it is kept, below the directory of a server.
    pub(crate) fn place(self, dir: &Path) -> PathBuf {
        match self {
            Self::Archive => dir.join("archive"),
            Self::Cyrus => dir.join("store"),
        }
    }

    pub(crate) fn url(self, dir: &Path) -> String {
        let scheme = if self == Self::Archive { "file" } else { "cyrus" };
        format!("{scheme}://{}", self.place(dir).display())
    }
}

/// A `spooltap serve` in front of a store of its own.
pub(crate) struct Served {
    group: Group,
    dir: PathBuf,
    pub(crate) address: SocketAddr,
}

impl Served {
    /// Serves `DIR/archive`; more arguments may follow.
    pub(crate) fn start(dir: &Path, arguments: &[&str]) -> Self {
        Self::of(Kind::Archive, dir, arguments)
    }

    /// The same, of either kind.
    pub(crate) fn of(kind: Kind, dir: &Path, arguments: &[&str]) -> Self {
        Self::of_at(kind, dir, free_port(), arguments)
    }

    fn of_at(kind: Kind, dir: &Path, address: SocketAddr, arguments: &[&str]) -> Self {
        let passwords = dir.join("passwords");
        std::fs::write(&passwords, format!("{REPLICATOR}:{PASSWORD}\nuser:{PASSWORD}\n")).expect("passwords");
        std::fs::set_permissions(&passwords, PermissionsExt::from_mode(0o600)).expect("mode");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("serve.log")).expect("log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_spooltap"));
        command.args(["serve", "--store", &kind.url(dir), "--listen", &address.to_string()]);
        command.arg("--passwords").arg(&passwords).args(["--admins", REPLICATOR]).args(arguments);
        command.env("SPOOLTAP_LOG", "warn,spooltap=debug").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut served = Self { group: Group::spawn(&mut command).expect("starts"), dir: dir.to_owned(), address };
        let up = eventually(Duration::from_secs(60), || {
            (TcpStream::connect(address).is_ok() || served.group.ended().is_some()).then(|| served.group.ended())
        });
        assert_eq!(up, Some(None), "{}", served.log());
        served
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("serve.log")).unwrap_or_default()
    }

    pub(crate) fn url(&self) -> String {
        format!("csync://{REPLICATOR}@{}", self.address)
    }

    pub(crate) fn kill9(mut self) {
        self.group.kill9();
    }

    pub(crate) fn pid(&self) -> i32 {
        self.group.pid().as_raw()
    }

    pub(crate) fn terminate(mut self) -> ExitStatus {
        self.group.signal(Signal::SIGTERM);
        eventually(Duration::from_secs(60), || self.group.ended()).unwrap_or_else(|| panic!("{}", self.log()))
    }
}

/// URL of the archive that is served.
pub(crate) fn archive(dir: &Path) -> String {
    Kind::Archive.url(dir)
}

fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port")
}

/// How our own client reaches it.
pub(crate) fn target(url: &str) -> Arc<dyn ReplicaTarget> {
    target_with(url, Access::default())
}

pub(crate) fn target_with(url: &str, access: Access) -> Arc<dyn ReplicaTarget> {
    let config = ReplicaConfig {
        url: url.to_owned(),
        name: None,
        password: Some(Secret::new(PASSWORD)),
        realm: None,
        access,
        compress: Compress::Auto,
        timeout: Duration::from_secs(30),
        partitions: Default::default(),
    };
    spooltap::replica::open(&config, false).expect("a target")
}

/// A session of our own client.
pub(crate) fn open(served: &Served) -> Box<dyn Replica> {
    target(&served.url()).open().expect("opens")
}
