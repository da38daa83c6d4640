//! One connection: requests, answers, what the server's words mean, and what it says it has.

use super::{Known, fatal};
use crate::csync::command::{self, Untagged};
use crate::csync::imap::{Dress, capabilities};
use crate::csync::tls::refused_ours;
use crate::csync::transport::Transport;
use crate::csync::{Dialect, Generation, Unannotation};
use crate::model::{
    AccountView, Denial, MailboxView, MboxName, MessageGuid, Partition, ReplicaError, SieveName, SieveScript, Uid,
    UniqueId,
};
use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What the server says first.
#[derive(Default)]
pub(super) struct Greeting {
    pub(super) mechanisms: Vec<String>,
    pub(super) compress: bool,
    pub(super) starttls: bool,
    pub(super) sieve_mailbox: bool,
    pub(super) archive: bool,
    /// An answer may stand in the line that names the mechanism.
    pub(super) initial: bool,
    /// The IMAP port takes replication.
    pub(super) replication: bool,
    /// It belongs to the Murder of this master; only the IMAP port tells.
    pub(super) mupdate: Option<String>,
    pub(super) banner: String,
}

/// One connection, logged in.
pub(super) struct Session {
    pub(super) url: String,
    pub(super) transport: Transport,
    /// On the IMAP port.
    pub(super) imap: Option<Dress>,
    /// The bytes to be sent next belong to a request that has begun.
    pub(super) begun: bool,
    /// When the last bytes went out.
    pub(super) sent_at: Option<Instant>,
    pub(super) dialect: Dialect,
    pub(super) partitions: BTreeMap<Partition, Partition>,
    pub(super) known: Arc<Mutex<Known>>,
    /// Bodies the server holds for this session.
    pub(super) staged: HashSet<(Partition, MessageGuid)>,
    /// Sieve scripts travel as mailboxes; else the server hides those.
    pub(super) sieve_mailboxes: bool,
    pub(super) dead: bool,
}

/// A mailbox of the server, as far as it decides what may be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct There {
    pub(super) uniqueid: UniqueId,
    /// The server's own name of it. Message files have to be staged here.
    pub(super) partition: Partition,
    /// Records above are new to it.
    pub(super) last_uid: Uid,
    /// A place holder without data.
    pub(super) intermediate: bool,
}

impl Session {
    /// Reads or changes what all sessions know of the server. Nothing that waits may happen inside.
    pub(super) fn known<T>(&self, with: impl FnOnce(&mut Known) -> T) -> T {
        with(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn lost(&mut self, cause: impl ToString) -> ReplicaError {
        self.dead = true;
        ReplicaError::Lost { replica: self.url.clone(), cause: cause.to_string() }
    }

    pub(super) fn send(&mut self, bytes: &[u8], last: bool) -> Result<(), ReplicaError> {
        if self.dead {
            return Err(self.lost("it was given up after an earlier fault"));
        }
        let first = !std::mem::replace(&mut self.begun, !last);
        let sent = match &mut self.imap {
            Some(dress) if first => self.transport.send(&dress.request(bytes), last),
            _ => self.transport.send(bytes, last),
        };
        self.sent_at = Some(Instant::now());
        sent.map_err(|error| self.last_words(&error))
    }

    /// A line that the server has asked for within a request.
    pub(super) fn send_more(&mut self, bytes: &[u8]) -> Result<(), ReplicaError> {
        self.begun = true;
        self.send(bytes, true)
    }

    /// Writing failed: a dying server may have said why before it closed.
    fn last_words(&mut self, error: &std::io::Error) -> ReplicaError {
        let _ = self.transport.timeout(Duration::from_secs(1));
        while let Ok(answer) = self.transport.answer() {
            if !answer.starts_with(b"* ") || answer.starts_with(b"* Fatal") || answer.starts_with(b"* BYE") {
                return self.lost(format!("{error}; it said: {}", String::from_utf8_lossy(&answer)));
            }
        }
        self.lost(error)
    }

    pub(super) fn answer(&mut self) -> Result<Vec<u8>, ReplicaError> {
        let answer = self.transport.answer().map_err(|error| match refused_ours(&error) {
            Some(told) => ReplicaError::Denied(Denial::OurCertificate, format!("{}: {told}", self.url)),
            None => self.lost(error),
        })?;
        let answer = match &self.imap {
            None => answer,
            Some(dress) => match dress.answer(&answer) {
                Some(plain) => plain.to_vec(),
                None => {
                    return Err(self.lost(format!(
                        "bad response: {:?} answers nothing we asked",
                        String::from_utf8_lossy(&answer)
                    )));
                }
            },
        };
        if answer.starts_with(b"BYE") || answer.starts_with(b"* BYE") || answer.starts_with(b"* Fatal error") {
            return Err(self.lost(String::from_utf8_lossy(&answer)));
        }
        Ok(answer)
    }

    /// What the server says first, or says anew under TLS.
    pub(super) fn greeting(&mut self, anew: bool) -> Result<Greeting, ReplicaError> {
        if self.imap.is_some() { self.imap_greeting(anew) } else { self.csync_greeting() }
    }

    /// An IMAP server greets once, and has to be asked for its capabilities.
    fn imap_greeting(&mut self, anew: bool) -> Result<Greeting, ReplicaError> {
        let mut greeting = Greeting::default();
        if !anew {
            let line = String::from_utf8_lossy(&self.answer()?).into_owned();
            if !line.starts_with("* OK") || line.contains("sync server") {
                return Err(fatal(format!(
                    "{} is not an IMAP service: it says {line:?}; check host and port",
                    self.url
                )));
            }
            greeting.banner = line;
        }
        self.capabilities(&mut greeting)?;
        Ok(greeting)
    }

    /// Asks an IMAP server what it can do now.
    pub(super) fn capabilities(&mut self, greeting: &mut Greeting) -> Result<(), ReplicaError> {
        self.send(b"CAPABILITY\r\n", true)?;
        let mut words = Vec::new();
        loop {
            let line = String::from_utf8_lossy(&self.answer()?).into_owned();
            match line.strip_prefix("* ") {
                Some(rest) => words.extend(capabilities(rest).unwrap_or_default()),
                None if line.starts_with("OK") => break,
                None => return Err(fatal(format!("{} tells no capabilities: {line}", self.url))),
            }
        }
        let has = |name: &str| words.iter().any(|word| word.eq_ignore_ascii_case(name));
        greeting.mechanisms = words.iter().filter_map(|word| word.strip_prefix("AUTH=")).map(str::to_owned).collect();
        greeting.compress = has("COMPRESS=DEFLATE");
        greeting.starttls = has("STARTTLS");
        greeting.sieve_mailbox = has("X-SIEVE-MAILBOX");
        greeting.archive = has("X-REPLICATION-ARCHIVE");
        greeting.initial = has("SASL-IR");
        greeting.replication = has("X-REPLICATION");
        greeting.mupdate = words.iter().find_map(|word| word.strip_prefix("MUPDATE=")).map(str::to_owned);
        Ok(())
    }

    fn csync_greeting(&mut self) -> Result<Greeting, ReplicaError> {
        let mut greeting = Greeting { initial: true, replication: true, ..Greeting::default() };
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
                Some("STARTTLS") => greeting.starttls = true,
                Some("SIEVE-MAILBOX") => greeting.sieve_mailbox = true,
                Some("REPLICATION-ARCHIVE") => greeting.archive = true,
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
    pub(super) fn line(&mut self, request: &[u8]) -> Result<(), ReplicaError> {
        self.request(request).map(drop)
    }

    /// One request; its untagged answers.
    pub(super) fn request(&mut self, request: &[u8]) -> Result<Vec<Untagged>, ReplicaError> {
        self.send(request, true)?;
        self.answers()
    }

    pub(super) fn answers(&mut self) -> Result<Vec<Untagged>, ReplicaError> {
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

    pub(super) fn refusal(&mut self, answer: &[u8]) -> ReplicaError {
        let text = String::from_utf8_lossy(answer).into_owned();
        let word = text.split_ascii_whitespace().nth(1).unwrap_or_default();
        match word {
            "IMAP_SYNC_CHECKSUM" | "IMAP_MAILBOX_CRC" | "IMAP_SYNC_CHANGED" => ReplicaError::Changed(text),
            "IMAP_MAILBOX_MOVED" => ReplicaError::Moved(text),
            "IMAP_MAILBOX_NONEXISTENT" | "IMAP_INVALID_USER" => ReplicaError::NoSuchMailbox(text),
            "IMAP_MAILBOX_LOCKED" => ReplicaError::Locked(text),
            "Permission" => ReplicaError::Denied(
                Denial::NotAdmin,
                format!(
                    "{}: permission denied; the user must be one of the replica's admins (imapd.conf there)",
                    self.url
                ),
            ),
            // The IMAP port knows the commands for admins only.
            "Unrecognized" if self.imap.is_some() => ReplicaError::Denied(
                Denial::NotAdmin,
                format!("{}: the user must be one of the replica's admins (imapd.conf there)", self.url),
            ),
            // The words of 2.4 and 2.5.
            _ if text.contains("Mailbox has been moved") => ReplicaError::Moved(text),
            _ if text.contains("Mailbox does not exist") => ReplicaError::NoSuchMailbox(text),
            _ if text.contains("Mailbox is locked") => ReplicaError::Locked(text),
            // Before 3.6 a server skips to the next line end only, and takes the rest of a file for commands.
            _ if text.contains("Replication parse failure") => self.lost(text),
            _ if text.contains("Failed to parse") && !self.dialect.skips_what_it_cannot_parse => self.lost(text),
            _ => ReplicaError::Refused(text),
        }
    }

    /// By what is offered and by read-only probes, where the banner names no version.
    pub(super) fn find_dialect(&mut self, greeting: &Greeting) -> Result<Dialect, ReplicaError> {
        if greeting.archive {
            return Ok(Dialect::of(Generation::V38));
        }
        if greeting.sieve_mailbox {
            return Ok(Dialect::of(Generation::V36));
        }
        for (probe, generation) in
            [(&b"GET UNIQUEIDS (spooltap)\r\n"[..], Generation::V34), (b"GET meta spooltap\r\n", Generation::V30)]
        {
            match self.line(probe) {
                Ok(()) | Err(ReplicaError::NoSuchMailbox(_)) => return Ok(Dialect::of(generation)),
                Err(ReplicaError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        // 2.5 or 2.4. The newer one's fields do the older one no harm, but it dies of one command.
        let max_annotation = Dialect::of(Generation::V24).max_annotation;
        Ok(Dialect { unannotation: Unannotation::Never, max_annotation, ..Dialect::of(Generation::V25) })
    }

    pub(super) fn partition(&self, partition: &Partition) -> Partition {
        self.partitions.get(partition).unwrap_or(partition).clone()
    }

    /// The source's name for a partition of the replica.
    pub(super) fn source_partition(&self, partition: &Partition) -> Partition {
        let mapped = self.partitions.iter().find(|(_, there)| *there == partition);
        mapped.map_or(partition, |(here, _)| here).clone()
    }

    fn learn(&mut self, view: &mut MailboxView) {
        let head = &mut view.head;
        let there = There {
            uniqueid: head.uniqueid.clone(),
            partition: head.partition.clone(),
            last_uid: head.last_uid,
            intermediate: head.mbtype.is_intermediate(),
        };
        self.known(|known| {
            if !head.partition.is_empty() {
                known.partitions.insert(head.partition.clone());
            }
            known.mailboxes.insert(head.name.clone(), there);
        });
        head.partition = self.source_partition(&head.partition);
    }

    /// A mailbox of that name would be among the known ones.
    pub(super) fn knows_all_of(&self, name: &MboxName) -> bool {
        name.owner().is_some_and(|user| self.known(|known| known.users.contains(&user)))
    }

    /// What the server has under this name right now.
    pub(super) fn look(&mut self, name: &MboxName) -> Result<Option<There>, ReplicaError> {
        self.look_at(std::slice::from_ref(name))?;
        Ok(self.known(|known| known.mailboxes.get(name).cloned()))
    }

    /// What the server has under these names right now.
    pub(super) fn look_at(&mut self, names: &[MboxName]) -> Result<Vec<MailboxView>, ReplicaError> {
        let mut out = Vec::new();
        for chunk in names.chunks(1000) {
            let views = self.account(&command::get_mailboxes(chunk))?.mailboxes;
            let there: HashSet<&MboxName> = views.iter().map(|view| &view.head.name).collect();
            let gone = chunk.iter().filter(|name| !there.contains(name));
            self.known(|known| gone.for_each(|name| drop(known.mailboxes.remove(name))));
            out.extend(views);
        }
        Ok(out)
    }

    /// One request for views, and all that was said.
    pub(super) fn account(&mut self, request: &[u8]) -> Result<AccountView, ReplicaError> {
        let lines = match self.request(request) {
            Err(ReplicaError::NoSuchMailbox(_)) => return Ok(AccountView::default()),
            other => other?,
        };
        let mut account = AccountView::default();
        for line in lines {
            match line {
                Untagged::Mailbox(mut view) => {
                    self.learn(&mut view);
                    let records = view.records.iter_mut().flatten().flat_map(|record| &mut record.annotations);
                    for annotation in records.chain(&mut view.annotations) {
                        annotation.userid = self.dialect.user_here(&annotation.userid);
                    }
                    account.mailboxes.push(*view);
                }
                Untagged::Quota(root, limits) => drop(account.quotas.insert(root, limits)),
                Untagged::Seen(id, seen) => drop(account.meta.seen.insert(id, seen)),
                Untagged::Subs(names) => account.meta.subs.extend(names),
                Untagged::Sieve { file, last_update, guid, active } => {
                    let script = file.strip_suffix(b".script");
                    if let Some(name) = script.map(SieveName::new) {
                        let script = SieveScript { guid, last_update, ..SieveScript::default() };
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
}
