//! A real `sync_server` as a replica. Here its address and the way to a logged-in connection; `session` asks and answers,
//! `update` brings one mailbox there, `steps` everything else, `guard` refuses what would harm the server.

mod guard;
mod session;
mod sieve;
mod steps;
#[cfg(test)]
mod tests;
mod update;
mod url;

use crate::config::{Access, ClearText, Compress, ReplicaConfig, Secret, TlsMode};
use crate::csync::command::{self, Untagged};
use crate::csync::dialect::generation_of;
use crate::csync::imap::Dress;
use crate::csync::sasl::{Identity, Login, SaslError, Terms};
use crate::csync::tls::TlsError;
use crate::csync::transport::Transport;
use crate::csync::{Dialect, Generation};
use crate::model::{Capabilities, Denial, MboxName, Partition, Replica, ReplicaError, ReplicaTarget, UserId};
use session::{Greeting, Session, There};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use url::Address;

/// Longest wait while logging in.
const GREETING: Duration = Duration::from_secs(15);

/// A `sync_server` to be reached.
pub struct CsyncTarget {
    url: String,
    address: Address,
    password: Option<Secret>,
    realm: Option<String>,
    access: Access,
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
    /// Mailboxes as last seen or sent.
    mailboxes: HashMap<MboxName, There>,
    /// Users of whom every mailbox was seen: what is not in `mailboxes` did not exist then.
    users: HashSet<UserId>,
}

fn fatal(text: impl Into<String>) -> ReplicaError {
    ReplicaError::Fatal(text.into())
}

impl CsyncTarget {
    /// A target for `csync://` and `csync+unix://`.
    pub(super) fn open(config: &ReplicaConfig, sieve_wish: bool) -> Result<Arc<dyn ReplicaTarget>, ReplicaError> {
        let address = url::parse(&config.url).map_err(|fault| fatal(format!("{}: {fault}", config.url)))?;
        Ok(Arc::new(Self::new(config, address, sieve_wish)))
    }

    fn new(config: &ReplicaConfig, address: Address, sieve_wish: bool) -> Self {
        let partition = |name: &String| Partition::from(name.as_str());
        Self {
            url: config.url.clone(),
            address,
            password: config.password.clone(),
            realm: config.realm.clone(),
            access: config.access.clone(),
            compress: config.compress,
            timeout: config.timeout,
            partitions: config.partitions.iter().map(|(from, to)| (partition(from), partition(to))).collect(),
            sieve_wish,
            shared: Arc::default(),
        }
    }

    fn lost(&self, cause: &dyn std::fmt::Display) -> ReplicaError {
        ReplicaError::Lost { replica: self.url.clone(), cause: cause.to_string() }
    }

    fn denied(&self, denial: Denial, cause: impl std::fmt::Display) -> ReplicaError {
        ReplicaError::Denied(denial, format!("{}: {cause}", self.url))
    }

    fn connect(&self) -> Result<Session, ReplicaError> {
        let transport = match &self.address {
            Address::Tcp { host, port, .. } => Transport::tcp(host, *port),
            Address::Unix(path) => Transport::unix(path),
        };
        let mut session = Session {
            url: self.url.clone(),
            transport: transport.map_err(|error| {
                self.lost(&format!("{error}; is this the host, and does sync_server listen on that port?"))
            })?,
            imap: self.address.is_imap().then(Dress::default),
            begun: false,
            sent_at: None,
            dialect: Dialect::of(Generation::V32),
            partitions: self.partitions.clone(),
            known: self.shared.clone(),
            staged: HashSet::new(),
            sieve_mailboxes: false,
            dead: false,
        };
        session.transport.timeout(GREETING).map_err(|error| self.lost(&error))?;
        let implicit = matches!(&self.address, Address::Tcp { kind, .. } if kind.tls);
        if let Address::Tcp { host, .. } = &self.address
            && implicit
        {
            self.handshake(&mut session, host)?;
        }
        let mut greeting = session.greeting(false)?;
        if let Address::Tcp { host, .. } = &self.address
            && !implicit
            && self.wants_tls(&session)
        {
            let banner = std::mem::take(&mut greeting.banner);
            greeting = self.start_tls(&mut session, &greeting, host)?;
            if greeting.banner.is_empty() {
                greeting.banner = banner;
            }
        }
        if let Address::Tcp { user, host, .. } = &self.address {
            self.login(&mut session, &greeting, user, host)?;
        }
        if session.imap.is_some() {
            session.capabilities(&mut greeting)?;
            // Its mailboxes would stand in the list that all front ends share, beside those of the source.
            if let Some(master) = &greeting.mupdate {
                return Err(fatal(format!(
                    "{}: the replica is part of a Murder ({master}): it would announce the source's mailboxes as its own; take \
                     mupdate_server out of its imapd.conf for as long as it is a replica",
                    self.url
                )));
            }
            if !greeting.replication {
                return Err(fatal(format!(
                    "{}: the server takes no replication on this port (3.0 and later do); use csync://",
                    self.url
                )));
            }
        }
        let wanted = self.compress.is_for(session.transport.loopback, session.transport.distance);
        // Asked only where it is offered: an older server answers BAD.
        if wanted && greeting.compress && session.line(b"COMPRESS DEFLATE\r\n").is_ok() {
            session.transport.start_deflate();
        }
        session.transport.timeout(self.timeout).map_err(|error| self.lost(&error))?;
        session.dialect = match generation_of(&greeting.banner) {
            Some(generation) => Dialect::of(generation),
            None => session.find_dialect(&greeting)?,
        };
        // The first request that needs an admin: better now than with the first mailbox.
        session.request(&command::get_mailboxes(&[]))?;
        let mut sieve = false;
        if self.sieve_wish && greeting.sieve_mailbox {
            let lines = session.request(b"APPLY CAPABILITIES (SIEVE-MAILBOX)\r\n")?;
            sieve = lines.iter().any(
                |line| matches!(line, Untagged::Enabled(names) if names.iter().any(|name| name == "SIEVE-MAILBOX")),
            );
        }
        session.sieve_mailboxes = sieve;
        let mut known = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        known.dialect = Some((session.dialect, sieve));
        // Whatever happened to the server since: nothing is taken for known.
        known.partitions.clear();
        known.mailboxes.clear();
        known.users.clear();
        drop(known);
        Ok(session)
    }

    fn wants_tls(&self, session: &Session) -> bool {
        match self.access.tls.mode {
            TlsMode::Require => true,
            TlsMode::Never => false,
            TlsMode::Auto => !session.transport.loopback,
        }
    }

    /// STARTTLS; the server greets anew under it, and only that greeting counts.
    fn start_tls(&self, session: &mut Session, greeting: &Greeting, host: &str) -> Result<Greeting, ReplicaError> {
        if !greeting.starttls {
            return Err(self.denied(
                Denial::NoTls,
                "the server does not offer STARTTLS, or somebody on the way hides it: give it a certificate \
                 (tls_server_cert, tls_server_key), or set mode = \"never\" in [tls]",
            ));
        }
        session.line(b"STARTTLS\r\n").map_err(|error| match error {
            ReplicaError::Lost { .. } => error,
            error => self.denied(
                Denial::NoTls,
                format!("the server offers STARTTLS and refuses it, or somebody on the way does: {error}"),
            ),
        })?;
        self.handshake(session, host)?;
        session.greeting(true)
    }

    fn handshake(&self, session: &mut Session, host: &str) -> Result<(), ReplicaError> {
        session.transport.start_tls(host, &self.access.tls).map_err(|error| match error {
            TlsError::Io(error) => self.lost(&error),
            error => match error.denial() {
                Some(denial) => self.denied(denial, &error),
                None => fatal(format!("{}: {error}", self.url)),
            },
        })
    }

    fn login(&self, session: &mut Session, greeting: &Greeting, user: &str, host: &str) -> Result<(), ReplicaError> {
        let password = self.password.as_ref().map_or("", |password| password.expose());
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(|error| fatal(format!("no random numbers: {error}")))?;
        let terms = Terms {
            clear: match self.access.clear_text {
                ClearText::Always => true,
                ClearText::Never => false,
                ClearText::Auto => session.transport.is_private(),
            },
            certificate: self.access.tls.certificate.is_some(),
            password: self.password.is_some(),
            only: &self.access.mechanisms,
            nonce,
        };
        let realm = self.realm.as_deref();
        let who =
            Identity { user, password, realm, service: if session.imap.is_some() { "imap" } else { "csync" }, host };
        let denied = |error: SaslError| self.denied(error.denial(), &error);
        let mut login = Login::start(&greeting.mechanisms, &who, &terms).map_err(denied)?;
        let mut line = login.command().map_err(denied)?;
        // What could stand in the first line and may not is the answer to an empty challenge.
        let mut kept = None;
        if !greeting.initial
            && let Some((before, initial)) = line.trim_end().rsplit_once(' ').filter(|(before, _)| before.contains(' '))
        {
            kept = Some(format!("{initial}\r\n"));
            line = format!("{before}\r\n");
        }
        session.send(line.as_bytes(), true)?;
        loop {
            let answer = session.answer()?;
            if session.imap.is_some() && answer.starts_with(b"* ") {
                continue;
            }
            if answer.starts_with(b"+")
                && let Some(initial) = kept.take()
            {
                session.send_more(initial.as_bytes())?;
                continue;
            }
            if answer.starts_with(b"OK") {
                return login.accepted().map_err(denied);
            }
            match answer.strip_prefix(b"+") {
                Some(challenge) => {
                    line = login.answer(challenge).map_err(denied)?;
                    session.send_more(line.as_bytes())?;
                }
                None => {
                    let text = String::from_utf8_lossy(&answer);
                    // The server's own trouble, such as saslauthd being down, passes.
                    if ["generic", "transient", "temporar"].iter().any(|word| text.contains(word)) {
                        return Err(session.lost(format!("login: {text}")));
                    }
                    let told = format!(
                        "{} refuses the login of {user} by {}: {}; check user and password (sync_authname, sync_password)",
                        self.url,
                        login.mechanism(),
                        text
                    );
                    return Err(ReplicaError::Denied(Denial::Login, told));
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
