//! Every step of the seam, and everything that can be asked.

use super::guard;
use super::session::{Session, There};
use super::update::cannot_be_made;
use crate::csync::Dialect;
use crate::csync::command::{self, Untagged};
use crate::model::{
    AccountView, Annotation, Body, BodySource, MailboxHead, MailboxView, MboxName, Partition, QuotaLimits, QuotaRoot,
    Record, Replica, ReplicaError, SieveName, Step, Uid, UniqueId, UserId,
};
use std::time::{Duration, Instant};

impl Session {
    /// Renames or moves one mailbox.
    fn rename(
        &mut self,
        uniqueid: &UniqueId,
        from: &MboxName,
        to: &MboxName,
        partition: &Partition,
        uidvalidity: u32,
    ) -> Result<(), ReplicaError> {
        let partition = self.partition(partition);
        self.look_at(&[from.clone(), to.clone()])?;
        let (old, new) = self.known(|known| (known.mailboxes.get(from).cloned(), known.mailboxes.get(to).cloned()));
        let there = match (old, new) {
            // Said before, in part or as a whole, and the answer was lost.
            (_, Some(new)) if new.uniqueid == *uniqueid => new,
            (None, _) => return Err(ReplicaError::NoSuchMailbox(from.to_string())),
            (Some(old), _) if old.uniqueid != *uniqueid => return Err(other_id(from, &old, uniqueid)),
            (Some(_), Some(new)) if !new.intermediate => return Err(other_id(to, &new, uniqueid)),
            (Some(old), _) => {
                self.rename_request(from, to, &old.partition, uidvalidity)?;
                old
            }
        };
        // A server that is told both at once changes the name only, and says OK (seen on 3.6.1).
        if there.intermediate || partition.is_empty() || there.partition == partition {
            return Ok(());
        }
        let known_partition = self.known(|known| known.partitions.contains(&partition));
        match self.rename_request(to, to, &partition, uidvalidity) {
            Err(ReplicaError::Refused(text)) if !known_partition => {
                Err(ReplicaError::Refused(format!("{text}; {}", cannot_be_made(&partition))))
            }
            other => other,
        }
    }

    fn rename_request(
        &mut self,
        from: &MboxName,
        to: &MboxName,
        partition: &Partition,
        uidvalidity: u32,
    ) -> Result<(), ReplicaError> {
        self.known(|known| known.mailboxes.remove(from));
        self.known(|known| known.mailboxes.remove(to));
        self.line(&command::rename(from, to, partition, uidvalidity)).map_err(|error| match error {
            ReplicaError::Refused(text) => ReplicaError::Refused(format!("{from} to {to}: {text}")),
            other => other,
        })
    }

    fn remove(&mut self, uniqueid: &UniqueId, name: &MboxName) -> Result<(), ReplicaError> {
        match self.look(name)? {
            None => return Err(ReplicaError::NoSuchMailbox(name.to_string())),
            Some(there) if there.uniqueid != *uniqueid => return Err(other_id(name, &there, uniqueid)),
            Some(_) => {}
        }
        self.known(|known| known.mailboxes.remove(name));
        self.line(&command::apply("UNMAILBOX", name.as_bytes()))?;
        match name.owner().filter(|_| name.is_inbox()) {
            Some(user) => self.drop_empty_sieve(&user),
            None => Ok(()),
        }
    }

    fn expunge(&mut self, uniqueid: &UniqueId, name: &MboxName, uids: &[Uid]) -> Result<(), ReplicaError> {
        if uids.is_empty() {
            return Ok(());
        }
        match self.line(&command::expunge(name, uniqueid, uids)) {
            // 3.6 says so when it has none of them.
            Err(ReplicaError::Refused(text)) => {
                let full = self.view_full(name)?.ok_or_else(|| ReplicaError::NoSuchMailbox(name.to_string()))?;
                let live =
                    full.records.iter().flatten().any(|record| !record.is_expunged() && uids.contains(&record.uid));
                if live { Err(ReplicaError::Refused(format!("{name}: {text}"))) } else { Ok(()) }
            }
            other => other,
        }
    }
}

/// A step with every user under the name that the server has for him.
fn with_users_of(dialect: &Dialect, step: &Step) -> Step {
    let mut step = step.clone();
    match &mut step {
        Step::Subscribe { user, .. }
        | Step::Unsubscribe { user, .. }
        | Step::Seen { user, .. }
        | Step::SievePut { user, .. }
        | Step::SieveRemove { user, .. }
        | Step::SieveActivate { user, .. }
        | Step::SieveDeactivate { user }
        | Step::ServerAnnotation(Annotation { userid: user, .. })
        | Step::RemoveServerAnnotation { userid: user, .. } => *user = dialect.user_there(user),
        Step::Mailbox(update) => {
            let all = update.records.iter_mut().flat_map(|record| &mut record.annotations);
            let mut other = false;
            for annotation in all {
                let user = dialect.user_there(&annotation.userid);
                other |= user != annotation.userid;
                annotation.userid = user;
            }
            if other {
                // The sum is over the names as well: the server would find another one.
                update.crcs.annot = 0;
            }
            for annotation in &mut update.annotations {
                annotation.userid = dialect.user_there(&annotation.userid);
            }
        }
        Step::Rename { .. }
        | Step::Remove { .. }
        | Step::Expunge { .. }
        | Step::Quota { .. }
        | Step::Unquota { .. } => {}
    }
    step
}

fn other_id(name: &MboxName, there: &There, uniqueid: &UniqueId) -> ReplicaError {
    ReplicaError::Moved(format!("{name} has uniqueid {} there, not {uniqueid}", there.uniqueid))
}

impl Replica for Session {
    fn view_user(&mut self, user: &UserId) -> Result<AccountView, ReplicaError> {
        self.known(|known| known.mailboxes.retain(|name, _| name.owner().as_ref() != Some(user)));
        let there = self.dialect.user_there(user);
        let mut account = self.account(&command::get("USER", there.as_bytes()))?;
        if account.mailboxes.iter().all(|view| view.head.mbtype.is_intermediate()) {
            // 3.4 and later leave the rest out for a user without a mailbox.
            account.meta = self.account(&command::get("META", there.as_bytes()))?.meta;
        }
        if self.dialect.lists_all || !account.mailboxes.is_empty() {
            self.known(|known| known.users.insert(user.clone()));
        }
        self.complete_sieve(&there, &mut account.meta)?;
        self.annotations_apart(&mut account.mailboxes)?;
        Ok(account)
    }

    fn view_mailboxes(&mut self, names: &[MboxName]) -> Result<Vec<MailboxView>, ReplicaError> {
        let mut views = self.look_at(names)?;
        self.annotations_apart(&mut views)?;
        Ok(views)
    }

    fn view_full(&mut self, name: &MboxName) -> Result<Option<MailboxView>, ReplicaError> {
        let mut views = self.account(&command::get("FULLMAILBOX", name.as_bytes()))?.mailboxes;
        self.annotations_apart(&mut views)?;
        Ok(views.pop())
    }

    fn view_uniqueid(&mut self, id: &UniqueId) -> Result<Option<MailboxView>, ReplicaError> {
        if !self.dialect.uniqueids {
            return Ok(None);
        }
        let mut views = self.account(&command::get_uniqueid(id))?.mailboxes;
        views.retain(|view| view.head.uniqueid == *id && !view.head.mbtype.is_deleted());
        self.annotations_apart(&mut views)?;
        Ok(views.pop())
    }

    fn message(&mut self, head: &MailboxHead, record: &Record) -> Result<Option<Body>, ReplicaError> {
        let partition = self.partition(&head.partition);
        let request = command::fetch(&head.name, &partition, &head.uniqueid, &record.guid, record.uid);
        let answers = match self.request(&request) {
            Err(ReplicaError::NoSuchMailbox(_)) => return Ok(None),
            answers => answers?,
        };
        let file = answers.into_iter().find_map(|answer| match answer {
            Untagged::Message(data) => Some(data),
            _ => None,
        });
        Ok(file.map(|data| Body { size: data.len() as u64, reader: Box::new(std::io::Cursor::new(data)) }))
    }

    fn script(&mut self, user: &UserId, name: &SieveName) -> Result<Option<Vec<u8>>, ReplicaError> {
        let there = self.dialect.user_there(user);
        self.sieve_text(&there, name).map(Some)
    }

    fn view_quota(&mut self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, ReplicaError> {
        match self.account(&command::get("QUOTA", root.as_bytes())) {
            Ok(mut account) => Ok(account.quotas.remove(root)),
            Err(ReplicaError::Refused(text)) if text.contains("Unknown error") => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn view_server_annotations(&mut self) -> Result<Vec<Annotation>, ReplicaError> {
        self.view_annotations(b"")
    }

    fn apply(&mut self, step: &Step, bodies: &dyn BodySource) -> Result<(), ReplicaError> {
        if let Some(reason) = guard::refuse(step, &self.dialect) {
            return Err(ReplicaError::Refused(reason));
        }
        let renamed;
        let step = match self.dialect.carets {
            true => {
                renamed = with_users_of(&self.dialect, step);
                &renamed
            }
            false => step,
        };
        match step {
            Step::Mailbox(update) => self.mailbox(update, bodies),
            Step::Rename { uniqueid, from, to, partition, uidvalidity } => {
                self.rename(uniqueid, from, to, partition, *uidvalidity)
            }
            Step::Remove { uniqueid, name } => self.remove(uniqueid, name),
            Step::Expunge { uniqueid, name, uids } => self.expunge(uniqueid, name, uids),
            Step::Subscribe { user, name } => {
                let fields: [(&str, &[u8]); 2] = [("USERID", user.as_bytes()), ("MBOXNAME", name.as_bytes())];
                self.line(&command::apply_fields("SUB", &fields))
            }
            Step::Unsubscribe { user, name } => {
                let fields: [(&str, &[u8]); 2] = [("USERID", user.as_bytes()), ("MBOXNAME", name.as_bytes())];
                self.line(&command::apply_fields("UNSUB", &fields))
            }
            Step::Seen { user, uniqueid, seen } => self.line(&command::seen(user, uniqueid, seen)),
            Step::Quota { root, limits } => self.line(&command::quota(root, limits, &self.dialect)),
            Step::Unquota { root } => match self.line(&command::apply("UNQUOTA", root.as_bytes())) {
                Err(ReplicaError::Refused(_)) if self.view_quota(root)?.is_none() => Ok(()),
                other => other,
            },
            Step::ServerAnnotation(annotation) => self.annotation(b"", annotation),
            Step::RemoveServerAnnotation { entry, userid } => self.unannotate(b"", entry, userid),
            Step::SievePut { user, name, last_update, content, compiled } => {
                self.sieve_put(user, name, *last_update, content)?;
                self.sieve_put_compiled(user, name, *last_update, compiled)
            }
            Step::SieveRemove { user, name } => self.sieve_remove(user, name),
            Step::SieveActivate { user, name } => self.sieve_activate(user, name),
            Step::SieveDeactivate { user } => self.sieve_deactivate(user),
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

    fn sent_at(&self) -> Option<Instant> {
        self.sent_at
    }

    fn compression(&self) -> Option<(u64, u64)> {
        self.transport.compression()
    }

    fn traffic(&self) -> (u64, u64) {
        (self.transport.sent, self.transport.received)
    }
}
