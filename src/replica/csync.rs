//! A real `sync_server` as a replica.

use super::guard;
use crate::config::{Compress, ReplicaConfig, Secret};
use crate::csync::command::{self, Untagged};
use crate::csync::dialect::generation_of;
use crate::csync::sasl::Login;
use crate::csync::transport::Transport;
use crate::csync::{Dialect, Generation};
use crate::model::{
    AccountView, Annotation, BodyRef, BodySource, Capabilities, Disposition, MailboxUpdate, MailboxView, MboxName,
    MessageGuid, ModSeq, Partition, QuotaLimits, QuotaRoot, Replica, ReplicaError, ReplicaTarget, SieveName,
    SieveScript, Step, StoreError, Uid, UserId,
};
use sha1::{Digest, Sha1};
use std::collections::{BTreeMap, HashSet};
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Messages and bytes in one MESSAGE request.
const BATCH_MESSAGES: usize = 1024;
const BATCH_BYTES: usize = 4 << 20;
/// A larger body is not held in memory: it is hashed in a first pass and streamed in a second.
const WHOLE_BYTES: u64 = 4 << 20;
/// GUIDs in one RESERVE request.
const RESERVE_GUIDS: usize = 8192;
/// So many staged messages are dropped with a RESTART at the next quiet moment.
const STAGED_MOST: usize = 4096;
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

struct Greeting {
    mechanisms: Vec<String>,
    compress: bool,
    sieve_mailbox: bool,
    banner: String,
}

/// One connection, logged in.
struct Session {
    url: String,
    transport: Transport,
    dialect: Dialect,
    partitions: BTreeMap<Partition, Partition>,
    known: Arc<Mutex<Known>>,
    /// Bodies the server holds for this session.
    staged: HashSet<(Partition, MessageGuid)>,
    dead: bool,
}

impl Session {
    fn lost(&mut self, cause: impl ToString) -> ReplicaError {
        self.dead = true;
        ReplicaError::Lost { replica: self.url.clone(), cause: cause.to_string() }
    }

    fn send(&mut self, bytes: &[u8], last: bool) -> Result<(), ReplicaError> {
        if self.dead {
            return Err(self.lost("it was given up after an earlier fault"));
        }
        self.transport.send(bytes, last).map_err(|error| self.lost(error))
    }

    fn answer(&mut self) -> Result<Vec<u8>, ReplicaError> {
        let answer = self.transport.answer().map_err(|error| self.lost(error))?;
        if answer.starts_with(b"BYE") || answer.starts_with(b"* BYE") || answer.starts_with(b"* Fatal error") {
            return Err(self.lost(String::from_utf8_lossy(&answer)));
        }
        Ok(answer)
    }

    fn greeting(&mut self) -> Result<Greeting, ReplicaError> {
        let mut greeting =
            Greeting { mechanisms: Vec::new(), compress: false, sieve_mailbox: false, banner: String::new() };
        for _ in 0..100 {
            let line = String::from_utf8_lossy(&self.answer()?).into_owned();
            let mut words = line.split_ascii_whitespace();
            if words.next() != Some("*") {
                return Err(fatal(format!(
                    "{} is not a csync service: it says {line:?}; check host and port",
                    self.url
                )));
            }
            match words.next().map(str::to_ascii_uppercase).as_deref() {
                Some("SASL") => greeting.mechanisms = words.map(str::to_owned).collect(),
                Some("COMPRESS") => greeting.compress = words.any(|word| word.eq_ignore_ascii_case("DEFLATE")),
                Some("SIEVE-MAILBOX") => greeting.sieve_mailbox = true,
                Some("OK") if line.contains("sync server") => {
                    if line.contains("sync server v2.3") {
                        return Err(fatal(format!(
                            "{}: Cyrus 2.3 speaks another protocol, it can only be a source",
                            self.url
                        )));
                    }
                    greeting.banner = line;
                    return Ok(greeting);
                }
                Some("OK") => {
                    return Err(fatal(format!(
                        "{} is not a csync service: it says {line:?}; sync_server listens on its own port (2005)",
                        self.url
                    )));
                }
                _ => {}
            }
        }
        Err(fatal(format!("{}: the greeting does not end", self.url)))
    }

    /// One request, one line of answer.
    fn line(&mut self, request: &[u8]) -> Result<(), ReplicaError> {
        self.request(request).map(drop)
    }

    /// One request; its untagged answers.
    fn request(&mut self, request: &[u8]) -> Result<Vec<Untagged>, ReplicaError> {
        self.send(request, true)?;
        self.answers()
    }

    fn answers(&mut self) -> Result<Vec<Untagged>, ReplicaError> {
        let mut out = Vec::new();
        loop {
            let answer = self.answer()?;
            if let Some(line) = answer.strip_prefix(b"* ") {
                out.push(command::untagged(line).map_err(|error| self.lost(error))?);
                continue;
            }
            if answer.starts_with(b"OK") {
                return Ok(out);
            }
            return Err(self.refusal(&answer));
        }
    }

    fn refusal(&mut self, answer: &[u8]) -> ReplicaError {
        let text = String::from_utf8_lossy(answer).into_owned();
        let word = text.split_ascii_whitespace().nth(1).unwrap_or_default();
        match word {
            "IMAP_SYNC_CHECKSUM" | "IMAP_MAILBOX_CRC" | "IMAP_SYNC_CHANGED" => ReplicaError::Changed(text),
            "IMAP_MAILBOX_MOVED" => ReplicaError::Moved(text),
            "IMAP_MAILBOX_NONEXISTENT" | "IMAP_INVALID_USER" => ReplicaError::NoSuchMailbox(text),
            "IMAP_MAILBOX_LOCKED" => ReplicaError::Locked(text),
            "Permission" => fatal(format!(
                "{}: permission denied; the user must be one of the replica's admins (imapd.conf there)",
                self.url
            )),
            // After a framing error neither side knows where the next request begins.
            _ if text.starts_with("BAD") => self.lost(text),
            _ => ReplicaError::Refused(text),
        }
    }

    /// Read-only probes, where the banner names no version.
    fn find_generation(&mut self, sieve_mailbox: bool) -> Result<Generation, ReplicaError> {
        if sieve_mailbox {
            return Ok(Generation::V36);
        }
        if self.request(b"GET UNIQUEIDS (spooltap)\r\n").is_ok() {
            return Ok(Generation::V32);
        }
        if self.request(b"GET meta spooltap\r\n").is_ok() {
            return Ok(Generation::V30);
        }
        // The two differ in what a mailbox line says; without one, the older is the safe guess.
        Ok(Generation::V25)
    }

    fn partition(&self, partition: &Partition) -> Partition {
        self.partitions.get(partition).unwrap_or(partition).clone()
    }

    /// The source's name for a partition of the replica.
    fn source_partition(&self, partition: &Partition) -> Partition {
        let mapped = self.partitions.iter().find(|(_, there)| *there == partition);
        mapped.map_or(partition, |(here, _)| here).clone()
    }

    fn learn(&self, view: &mut MailboxView) {
        if !view.head.partition.is_empty() {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.partitions.insert(view.head.partition.clone());
        }
        view.head.partition = self.source_partition(&view.head.partition);
    }

    fn account(&mut self, request: &[u8]) -> Result<AccountView, ReplicaError> {
        let lines = match self.request(request) {
            Err(ReplicaError::NoSuchMailbox(_)) => return Ok(AccountView::default()),
            other => other?,
        };
        let mut account = AccountView::default();
        for line in lines {
            match line {
                Untagged::Mailbox(mut view) => {
                    self.learn(&mut view);
                    account.mailboxes.push(*view);
                }
                Untagged::Quota(root, limits) => drop(account.quotas.insert(root, limits)),
                Untagged::Seen(id, seen) => drop(account.meta.seen.insert(id, seen)),
                Untagged::Subs(names) => account.meta.subs.extend(names),
                Untagged::Sieve { file, last_update, guid, active } => {
                    let script = file.strip_suffix(b".script");
                    if let Some(name) = script.map(SieveName::new) {
                        let script = SieveScript { guid, last_update, content: Vec::new() };
                        account.meta.sieve.insert(name, script);
                    }
                    if active {
                        account.meta.active = file.strip_suffix(b".bc").or(script).map(SieveName::new);
                    }
                }
                _ => {}
            }
        }
        Ok(account)
    }

    /// The uniqueid under a name must be this one.
    fn require(&mut self, name: &MboxName, uniqueid: &crate::model::UniqueId) -> Result<(), ReplicaError> {
        let views = self.view_mailboxes(std::slice::from_ref(name))?;
        match views.iter().find(|view| view.head.name == *name) {
            None => Err(ReplicaError::NoSuchMailbox(name.to_string())),
            Some(view) if view.head.uniqueid != *uniqueid => {
                Err(ReplicaError::Moved(format!("{name} has uniqueid {} there, not {uniqueid}", view.head.uniqueid)))
            }
            Some(_) => Ok(()),
        }
    }

    fn mailbox(&mut self, update: &MailboxUpdate, bodies: &dyn BodySource) -> Result<(), ReplicaError> {
        let partition = self.partition(&update.head.partition);
        let staged: HashSet<MessageGuid> =
            self.staged.iter().filter(|(place, _)| *place == partition).map(|(_, guid)| *guid).collect();
        if let Some(reason) = guard::refuse(update, &self.dialect, &staged) {
            return Err(ReplicaError::Refused(reason));
        }
        if !update.bodies.is_empty() {
            self.require_partition(update, &partition)?;
            self.upload(update, &partition, bodies)?;
        }
        let request = command::mailbox(update, &partition, &self.dialect);
        match self.line(&request) {
            Err(ReplicaError::Refused(text)) if update.create && text.contains("Unknown/invalid partition") => {
                Err(ReplicaError::Refused(no_partition(&partition)))
            }
            other => other,
        }?;
        if !update.head.mbtype.is_intermediate() {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.partitions.insert(partition.clone());
        }
        if !self.dialect.annotations_inside {
            self.annotations_outside(update)?;
        }
        if self.staged.len() > STAGED_MOST {
            self.restart()?;
        }
        Ok(())
    }

    /// A file value that names an unknown partition kills a 3.x server, an empty mailbox on it is only refused. So the
    /// first mailbox on a partition nobody has seen yet is made empty first.
    fn require_partition(&mut self, update: &MailboxUpdate, partition: &Partition) -> Result<(), ReplicaError> {
        if self.known.lock().unwrap_or_else(PoisonError::into_inner).partitions.contains(partition) {
            return Ok(());
        }
        if update.create {
            let mut probe = update.clone();
            probe.head.last_uid = Uid(0);
            probe.head.recentuid = Uid(0);
            probe.head.highestmodseq = ModSeq(1);
            probe.crcs = Default::default();
            probe.since = None;
            (probe.records, probe.bodies, probe.annotations) = (Vec::new(), Vec::new(), Vec::new());
            match self.line(&command::mailbox(&probe, partition, &self.dialect)) {
                // It is there already, with content: then its partition is asked for below.
                Ok(()) | Err(ReplicaError::Changed(_)) => {}
                Err(ReplicaError::Refused(text)) => {
                    return Err(ReplicaError::Refused(format!("{text}; {}", no_partition(partition))));
                }
                Err(error) => return Err(error),
            }
        }
        let views = self.view_mailboxes(std::slice::from_ref(&update.head.name))?;
        let there = views.first().map(|view| self.partition(&view.head.partition));
        if there.as_ref() == Some(partition) {
            return Ok(());
        }
        Err(ReplicaError::Refused(no_partition(partition)))
    }

    fn upload(
        &mut self,
        update: &MailboxUpdate,
        partition: &Partition,
        bodies: &dyn BodySource,
    ) -> Result<(), ReplicaError> {
        let mut seen = HashSet::new();
        let mut wanted: Vec<&BodyRef> = update
            .bodies
            .iter()
            .filter(|body| !self.staged.contains(&(partition.clone(), body.guid)) && seen.insert(body.guid))
            .collect();
        if !update.reserve_from.is_empty() && !wanted.is_empty() {
            let mut missing = HashSet::new();
            for chunk in wanted.chunks(RESERVE_GUIDS) {
                let guids: Vec<MessageGuid> = chunk.iter().map(|body| body.guid).collect();
                for line in self.request(&command::reserve(partition, &update.reserve_from, &guids))? {
                    if let Untagged::Missing(guids) = line {
                        missing.extend(guids);
                    }
                }
            }
            let (upload, there): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|body| missing.contains(&body.guid));
            self.staged.extend(there.iter().map(|body| (partition.clone(), body.guid)));
            wanted = upload;
        }
        let mut batch: Vec<u8> = Vec::new();
        let mut in_batch: Vec<MessageGuid> = Vec::new();
        for body in wanted {
            if body.size > WHOLE_BYTES {
                self.stream(partition, body, bodies)?;
                continue;
            }
            let bytes = read_checked(body, bodies)?;
            if in_batch.len() >= BATCH_MESSAGES || batch.len() + bytes.len() > BATCH_BYTES {
                self.message_batch(partition, &mut batch, &mut in_batch)?;
            }
            batch.extend_from_slice(if in_batch.is_empty() { b"APPLY MESSAGE (" } else { b" " });
            batch.extend(command::file_head(partition, &body.guid, body.size));
            batch.extend_from_slice(&bytes);
            in_batch.push(body.guid);
        }
        self.message_batch(partition, &mut batch, &mut in_batch)
    }

    fn message_batch(
        &mut self,
        partition: &Partition,
        batch: &mut Vec<u8>,
        guids: &mut Vec<MessageGuid>,
    ) -> Result<(), ReplicaError> {
        if guids.is_empty() {
            return Ok(());
        }
        batch.extend_from_slice(b")\r\n");
        // The update that uses these bodies is sent only after the server has confirmed that it has them.
        self.line(batch)?;
        self.staged.extend(guids.drain(..).map(|guid| (partition.clone(), guid)));
        batch.clear();
        Ok(())
    }

    /// A large body: hashed once before the first byte leaves, and again while it is sent.
    fn stream(&mut self, partition: &Partition, body: &BodyRef, bodies: &dyn BodySource) -> Result<(), ReplicaError> {
        let mut buffer = vec![0; 256 << 10];
        hash_body(body, bodies, &mut buffer, &mut |_| Ok(()))?;
        let mut head = b"APPLY MESSAGE (".to_vec();
        head.extend(command::file_head(partition, &body.guid, body.size));
        self.send(&head, false)?;
        let sent = hash_body(body, bodies, &mut buffer, &mut |bytes| self.send(bytes, false));
        if let Err(error) = sent {
            // Half a file is on its way: only closing the connection keeps it from being used.
            self.dead = true;
            return Err(error);
        }
        self.line(b")\r\n")?;
        self.staged.insert((partition.clone(), body.guid));
        Ok(())
    }

    /// 2.4 keeps mailbox annotations apart from the mailbox.
    fn annotations_outside(&mut self, update: &MailboxUpdate) -> Result<(), ReplicaError> {
        let name = update.head.name.as_bytes();
        let lines = self.request(&command::get("ANNOTATION", name))?;
        let there: Vec<Annotation> = lines
            .into_iter()
            .filter_map(|line| match line {
                Untagged::Annotation(annotation) => Some(annotation),
                _ => None,
            })
            .collect();
        for annotation in &update.annotations {
            if !there.iter().any(|other| other.content() == annotation.content()) {
                self.annotation(name, annotation)?;
            }
        }
        Ok(())
    }

    fn annotation(&mut self, name: &[u8], annotation: &Annotation) -> Result<(), ReplicaError> {
        self.line(&command::apply_fields(
            "ANNOTATION",
            &[
                ("MBOXNAME", name),
                ("ENTRY", &annotation.entry),
                ("USERID", annotation.userid.as_bytes()),
                ("VALUE", &annotation.value),
            ],
        ))
    }

    fn sieve_put(
        &mut self,
        user: &UserId,
        name: &SieveName,
        last_update: i64,
        content: &[u8],
    ) -> Result<(), ReplicaError> {
        if self.dialect.sieve_replace {
            let meta = self.account(&command::get("META", user.as_bytes()))?.meta;
            if meta.sieve.contains_key(name) {
                self.sieve_remove(user, name)?;
            }
        }
        self.line(&command::sieve(user, name, last_update, content))
    }

    fn sieve_remove(&mut self, user: &UserId, name: &SieveName) -> Result<(), ReplicaError> {
        let file = [name.as_bytes(), b".script"].concat();
        let fields: [(&str, &[u8]); 2] = [("USERID", user.as_bytes()), ("FILENAME", &file)];
        match self.line(&command::apply_fields("UNSIEVE", &fields)) {
            // 3.6 says so of a script it does not have.
            Err(ReplicaError::Refused(text)) if text.contains("Unknown error") => {
                let meta = self.account(&command::get("META", user.as_bytes()))?.meta;
                if meta.sieve.contains_key(name) { Err(ReplicaError::Refused(text)) } else { Ok(()) }
            }
            other => other,
        }
    }
}

fn no_partition(partition: &Partition) -> String {
    format!(
        "the replica has no partition {partition}: add partition-{partition} to its imapd.conf, \
         or map it with [partition] in spooltap's configuration"
    )
}

fn body_error(body: &BodyRef, disposition: Disposition, fault: &str) -> ReplicaError {
    ReplicaError::Body(StoreError::new(
        disposition,
        format!("message file of UID {} {fault}; it is not sent; restore the file or run reconstruct", body.uid.0),
    ))
}

/// Reads a body whole and checks size and SHA-1.
fn read_checked(body: &BodyRef, bodies: &dyn BodySource) -> Result<Vec<u8>, ReplicaError> {
    let open = bodies.open(body).map_err(ReplicaError::Body)?;
    let mut bytes = Vec::with_capacity(usize::try_from(body.size).unwrap_or(0));
    open.reader
        .take(body.size.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|error| body_error(body, Disposition::RetrySoon, &format!("cannot be read: {error}")))?;
    if bytes.len() as u64 != body.size {
        return Err(body_error(
            body,
            Disposition::Quarantine,
            &format!("has not the {} bytes of its record", body.size),
        ));
    }
    if Sha1::digest(&bytes).as_slice() != body.guid.0 {
        return Err(body_error(
            body,
            Disposition::Quarantine,
            &format!("is not the message of its record (GUID {})", body.guid),
        ));
    }
    Ok(bytes)
}

/// Passes a body on in pieces and checks size and SHA-1.
fn hash_body(
    body: &BodyRef,
    bodies: &dyn BodySource,
    buffer: &mut [u8],
    pass: &mut dyn FnMut(&[u8]) -> Result<(), ReplicaError>,
) -> Result<(), ReplicaError> {
    let mut open = bodies.open(body).map_err(ReplicaError::Body)?;
    let (mut hash, mut left) = (Sha1::new(), body.size);
    while left > 0 {
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = open
            .reader
            .read(buffer.get_mut(..most).unwrap_or_default())
            .map_err(|error| body_error(body, Disposition::RetrySoon, &format!("cannot be read: {error}")))?;
        if count == 0 {
            return Err(body_error(body, Disposition::Quarantine, &format!("ends {left} bytes too early")));
        }
        let bytes = buffer.get(..count).unwrap_or_default();
        hash.update(bytes);
        pass(bytes)?;
        left = left.saturating_sub(count as u64);
    }
    if hash.finalize().as_slice() != body.guid.0 {
        return Err(body_error(
            body,
            Disposition::Quarantine,
            &format!("is not the message of its record (GUID {})", body.guid),
        ));
    }
    Ok(())
}

impl Replica for Session {
    fn view_user(&mut self, user: &UserId) -> Result<AccountView, ReplicaError> {
        self.account(&command::get("USER", user.as_bytes()))
    }

    fn view_mailboxes(&mut self, names: &[MboxName]) -> Result<Vec<MailboxView>, ReplicaError> {
        let mut out = Vec::new();
        for chunk in names.chunks(1000) {
            out.extend(self.account(&command::get_mailboxes(chunk))?.mailboxes);
        }
        Ok(out)
    }

    fn view_full(&mut self, name: &MboxName) -> Result<Option<MailboxView>, ReplicaError> {
        Ok(self.account(&command::get("FULLMAILBOX", name.as_bytes()))?.mailboxes.pop())
    }

    fn view_quota(&mut self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, ReplicaError> {
        match self.account(&command::get("QUOTA", root.as_bytes())) {
            Ok(mut account) => Ok(account.quotas.remove(root)),
            Err(ReplicaError::Refused(text)) if text.contains("Unknown error") => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn view_server_annotations(&mut self) -> Result<Vec<Annotation>, ReplicaError> {
        let lines = self.request(&command::get("ANNOTATION", b""))?;
        let mut out: Vec<Annotation> = lines
            .into_iter()
            .filter_map(|line| match line {
                Untagged::Annotation(annotation) => Some(annotation),
                _ => None,
            })
            .collect();
        out.sort_by(|a, b| a.content().cmp(&b.content()));
        Ok(out)
    }

    fn apply(&mut self, step: &Step, bodies: &dyn BodySource) -> Result<(), ReplicaError> {
        match step {
            Step::Mailbox(update) => self.mailbox(update, bodies),
            Step::Rename { uniqueid, from, to, partition, uidvalidity } => {
                self.require(from, uniqueid)?;
                let partition = self.partition(partition);
                self.line(&command::rename(from, to, &partition, *uidvalidity))
            }
            Step::Remove { uniqueid, name } => {
                self.require(name, uniqueid)?;
                self.line(&command::apply("UNMAILBOX", name.as_bytes()))
            }
            Step::Expunge { uniqueid, name, uids } => self.line(&command::expunge(name, uniqueid, uids)),
            Step::Subscribe { user, name } => {
                let fields: [(&str, &[u8]); 2] = [("USERID", user.as_bytes()), ("MBOXNAME", name.as_bytes())];
                self.line(&command::apply_fields("SUB", &fields))
            }
            Step::Unsubscribe { user, name } => {
                let fields: [(&str, &[u8]); 2] = [("USERID", user.as_bytes()), ("MBOXNAME", name.as_bytes())];
                self.line(&command::apply_fields("UNSUB", &fields))
            }
            Step::Seen { user, uniqueid, seen } => self.line(&command::seen(user, uniqueid, seen)),
            Step::Quota { root, limits } => self.line(&command::quota(root, limits)),
            Step::Unquota { root } => match self.line(&command::apply("UNQUOTA", root.as_bytes())) {
                Err(ReplicaError::Refused(_)) if self.view_quota(root)?.is_none() => Ok(()),
                other => other,
            },
            Step::ServerAnnotation(annotation) => self.annotation(b"", annotation),
            Step::RemoveServerAnnotation { entry, userid } => {
                if !self.dialect.unannotation {
                    return Err(ReplicaError::Refused(
                        "removing a server annotation would kill this release of sync_server; remove it there by hand"
                            .into(),
                    ));
                }
                let fields: [(&str, &[u8]); 3] = [("MBOXNAME", b""), ("ENTRY", entry), ("USERID", userid.as_bytes())];
                self.line(&command::apply_fields("UNANNOTATION", &fields))
            }
            Step::SievePut { user, name, last_update, content } => self.sieve_put(user, name, *last_update, content),
            Step::SieveRemove { user, name } => self.sieve_remove(user, name),
            Step::SieveActivate { user, name } => {
                let file = [name.as_bytes(), b".bc"].concat();
                let fields: [(&str, &[u8]); 2] = [("USERID", user.as_bytes()), ("FILENAME", &file)];
                self.line(&command::apply_fields("ACTIVATE_SIEVE", &fields))
            }
            Step::SieveDeactivate { user } => {
                self.line(&command::apply_fields("UNACTIVATE_SIEVE", &[("USERID", user.as_bytes())]))
            }
        }
    }

    fn ping(&mut self) -> Result<(), ReplicaError> {
        self.line(b"NOOP\r\n")
    }

    fn restart(&mut self) -> Result<(), ReplicaError> {
        self.staged.clear();
        self.send(b"RESTART\r\n", true)?;
        loop {
            // Some releases send the capability lines again before the answer.
            let answer = self.answer()?;
            if answer.starts_with(b"OK") {
                return Ok(());
            }
            if !answer.starts_with(b"* ") {
                return Err(self.refusal(&answer));
            }
        }
    }

    fn close(mut self: Box<Self>) {
        if !self.dead && self.transport.timeout(Duration::from_secs(2)).is_ok() {
            let _ = self.line(b"EXIT\r\n");
        }
    }

    fn traffic(&self) -> (u64, u64) {
        (self.transport.sent, self.transport.received)
    }
}
