//! Every step of the seam, and everything that can be asked.

use super::session::Session;
use crate::csync::command::{self, Untagged};
use crate::model::{
    AccountView, Annotation, BodySource, MailboxView, MboxName, QuotaLimits, QuotaRoot, Replica, ReplicaError,
    SieveName, Step, UserId,
};
use std::time::Duration;

impl Session {
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
