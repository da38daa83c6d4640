//! A real `sync_server` as a replica. Here its address and the way to a logged-in connection; `session` asks and answers,
//! `update` brings one mailbox there, `steps` everything else, `guard` refuses what would harm the server.

mod guard;
mod session;
mod steps;
mod update;

use crate::config::{Compress, ReplicaConfig, Secret};
use crate::csync::command::{self, Untagged};
use crate::csync::dialect::generation_of;
use crate::csync::sasl::Login;
use crate::csync::transport::Transport;
use crate::csync::{Dialect, Generation};
use crate::model::{Capabilities, Partition, Replica, ReplicaError, ReplicaTarget};
use session::{Greeting, Session};
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Longest wait while logging in.
const GREETING: Duration = Duration::from_secs(15);

enum Address {
    Tcp { user: String, host: String, port: u16 },
    Unix(PathBuf),
}

/// A `sync_server` to be reached.
pub struct CsyncTarget {
    url: String,
    address: Address,
    password: Option<Secret>,
    compress: Compress,
    timeout: Duration,
    partitions: BTreeMap<Partition, Partition>,
    sieve_wish: bool,
    shared: Arc<Mutex<Known>>,
}

/// What was learned of the server, shared by all sessions.
#[derive(Default)]
struct Known {
    dialect: Option<(Dialect, bool)>,
    /// Partitions that exist over there.
    partitions: HashSet<Partition>,
}

fn fatal(text: impl Into<String>) -> ReplicaError {
    ReplicaError::Fatal(text.into())
}

fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let hex = (first == b'%').then(|| tail.get(..2)).flatten();
        match hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

impl CsyncTarget {
    /// `csync://USER@HOST:PORT`.
    pub(super) fn tcp(config: &ReplicaConfig, sieve_wish: bool) -> Result<Arc<dyn ReplicaTarget>, ReplicaError> {
        let bad = || fatal(format!("{}: write csync://USER@HOST:PORT", config.url));
        let rest = config.url.strip_prefix("csync://").ok_or_else(bad)?.trim_end_matches('/');
        let (user, place) = rest.rsplit_once('@').ok_or_else(bad)?;
        let (host, port) = match place.strip_prefix('[').and_then(|place| place.split_once(']')) {
            Some((host, port)) => (host, port.strip_prefix(':')),
            None => match place.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (place, None),
            },
        };
        let port = port.map_or(Ok(2005), str::parse).map_err(|_| bad())?;
        let address = Address::Tcp { user: unescape(user), host: host.to_owned(), port };
        Ok(Arc::new(Self::new(config, address, sieve_wish)))
    }

    /// `csync+unix:///PATH`: whoever may connect is logged in.
    pub(super) fn unix(config: &ReplicaConfig, sieve_wish: bool) -> Result<Arc<dyn ReplicaTarget>, ReplicaError> {
        let path = config.url.strip_prefix("csync+unix://").unwrap_or_default();
        Ok(Arc::new(Self::new(config, Address::Unix(path.into()), sieve_wish)))
    }

    fn new(config: &ReplicaConfig, address: Address, sieve_wish: bool) -> Self {
        let partition = |name: &String| Partition::from(name.as_str());
        Self {
            url: config.url.clone(),
            address,
            password: config.password.clone(),
            compress: config.compress,
            timeout: config.timeout,
            partitions: config.partitions.iter().map(|(from, to)| (partition(from), partition(to))).collect(),
            sieve_wish,
            shared: Arc::default(),
        }
    }

    fn lost(&self, error: &io::Error) -> ReplicaError {
        ReplicaError::Lost { replica: self.url.clone(), cause: error.to_string() }
    }

    fn connect(&self) -> Result<Session, ReplicaError> {
        let transport = match &self.address {
            Address::Tcp { host, port, .. } => Transport::tcp(host, *port),
            Address::Unix(path) => Transport::unix(path),
        };
        let mut session = Session {
            url: self.url.clone(),
            transport: transport.map_err(|error| self.lost(&error))?,
            dialect: Dialect::of(Generation::V32),
            partitions: self.partitions.clone(),
            known: self.shared.clone(),
            staged: HashSet::new(),
            dead: false,
        };
        session.transport.timeout(GREETING).map_err(|error| self.lost(&error))?;
        let greeting = session.greeting()?;
        if let Address::Tcp { user, .. } = &self.address {
            self.login(&mut session, &greeting, user)?;
        }
        let wanted = match self.compress {
            Compress::On => true,
            Compress::Off => false,
            Compress::Auto => !session.transport.loopback && greeting.compress,
        };
        if wanted && session.line(b"COMPRESS DEFLATE\r\n").is_ok() {
            session.transport.start_deflate();
        }
        session.transport.timeout(self.timeout).map_err(|error| self.lost(&error))?;
        let generation = match generation_of(&greeting.banner) {
            Some(generation) => generation,
            None => session.find_generation(greeting.sieve_mailbox)?,
        };
        session.dialect = Dialect::of(generation);
        // The first request that needs an admin: better now than with the first mailbox.
        session.request(&command::get_mailboxes(&[]))?;
        let mut sieve = false;
        if self.sieve_wish && greeting.sieve_mailbox {
            let lines = session.request(b"APPLY CAPABILITIES (SIEVE-MAILBOX)\r\n")?;
            sieve = lines.iter().any(
                |line| matches!(line, Untagged::Enabled(names) if names.iter().any(|name| name == "SIEVE-MAILBOX")),
            );
        }
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).dialect = Some((session.dialect, sieve));
        Ok(session)
    }

    fn login(&self, session: &mut Session, greeting: &Greeting, user: &str) -> Result<(), ReplicaError> {
        let password = self.password.as_ref().ok_or_else(|| fatal(format!("{}: no password is known", self.url)))?;
        let mut login = Login::start(&greeting.mechanisms, user, password.expose())
            .map_err(|error| fatal(format!("{}: {error}", self.url)))?;
        let mut line = login.command().map_err(|error| fatal(error.to_string()))?;
        loop {
            session.send(line.as_bytes(), true)?;
            let answer = session.answer()?;
            if answer.starts_with(b"OK") {
                return Ok(());
            }
            match answer.strip_prefix(b"+") {
                Some(challenge) => line = login.answer(challenge).map_err(|error| fatal(error.to_string()))?,
                None => {
                    return Err(fatal(format!(
                        "{} refuses the login of {user}: {}; check user, password and realm (sync_authname, sync_password)",
                        self.url,
                        String::from_utf8_lossy(&answer)
                    )));
                }
            }
        }
    }
}

impl ReplicaTarget for CsyncTarget {
    fn name(&self) -> String {
        self.url.clone()
    }

    fn open(&self) -> Result<Box<dyn Replica>, ReplicaError> {
        Ok(Box::new(self.connect()?))
    }

    fn capabilities(&self) -> Capabilities {
        let known = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let (dialect, sieve) = known.dialect.unwrap_or((Dialect::of(Generation::V32), false));
        dialect.capabilities(sieve)
    }
}
