//! One connection: requests, answers, what the server's words mean, and what it says it has.

use super::{Known, fatal};
use crate::csync::command::{self, Untagged};
use crate::csync::transport::Transport;
use crate::csync::{Dialect, Generation};
use crate::model::{
    AccountView, MailboxView, MboxName, MessageGuid, Partition, Replica, ReplicaError, SieveName, SieveScript, UniqueId,
};
use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

/// What the server says first.
pub(super) struct Greeting {
    pub(super) mechanisms: Vec<String>,
    pub(super) compress: bool,
    pub(super) sieve_mailbox: bool,
    pub(super) banner: String,
}

/// One connection, logged in.
pub(super) struct Session {
    pub(super) url: String,
    pub(super) transport: Transport,
    pub(super) dialect: Dialect,
    pub(super) partitions: BTreeMap<Partition, Partition>,
    pub(super) known: Arc<Mutex<Known>>,
    /// Bodies the server holds for this session.
    pub(super) staged: HashSet<(Partition, MessageGuid)>,
    pub(super) dead: bool,
}

impl Session {
    pub(super) fn lost(&mut self, cause: impl ToString) -> ReplicaError {
        self.dead = true;
        ReplicaError::Lost { replica: self.url.clone(), cause: cause.to_string() }
    }

    pub(super) fn send(&mut self, bytes: &[u8], last: bool) -> Result<(), ReplicaError> {
        if self.dead {
            return Err(self.lost("it was given up after an earlier fault"));
        }
        self.transport.send(bytes, last).map_err(|error| self.lost(error))
    }

    pub(super) fn answer(&mut self) -> Result<Vec<u8>, ReplicaError> {
        let answer = self.transport.answer().map_err(|error| self.lost(error))?;
        if answer.starts_with(b"BYE") || answer.starts_with(b"* BYE") || answer.starts_with(b"* Fatal error") {
            return Err(self.lost(String::from_utf8_lossy(&answer)));
        }
        Ok(answer)
    }

    pub(super) fn greeting(&mut self) -> Result<Greeting, ReplicaError> {
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
    pub(super) fn find_generation(&mut self, sieve_mailbox: bool) -> Result<Generation, ReplicaError> {
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

    pub(super) fn partition(&self, partition: &Partition) -> Partition {
        self.partitions.get(partition).unwrap_or(partition).clone()
    }

    /// The source's name for a partition of the replica.
    pub(super) fn source_partition(&self, partition: &Partition) -> Partition {
        let mapped = self.partitions.iter().find(|(_, there)| *there == partition);
        mapped.map_or(partition, |(here, _)| here).clone()
    }

    pub(super) fn learn(&self, view: &mut MailboxView) {
        if !view.head.partition.is_empty() {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.partitions.insert(view.head.partition.clone());
        }
        view.head.partition = self.source_partition(&view.head.partition);
    }

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
    pub(super) fn require(&mut self, name: &MboxName, uniqueid: &UniqueId) -> Result<(), ReplicaError> {
        let views = self.view_mailboxes(std::slice::from_ref(name))?;
        match views.iter().find(|view| view.head.name == *name) {
            None => Err(ReplicaError::NoSuchMailbox(name.to_string())),
            Some(view) if view.head.uniqueid != *uniqueid => {
                Err(ReplicaError::Moved(format!("{name} has uniqueid {} there, not {uniqueid}", view.head.uniqueid)))
            }
            Some(_) => Ok(()),
        }
    }
}
