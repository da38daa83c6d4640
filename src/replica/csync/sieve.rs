//! Sieve scripts by the SIEVE commands, around what single releases do with them.

use super::session::Session;
use crate::csync::command::{self, Untagged};
use crate::model::{MboxName, MessageGuid, ReplicaError, SieveName, UserId, UserMeta};
use sha1::{Digest, Sha1};

fn script_file(name: &SieveName) -> Vec<u8> {
    [name.as_bytes(), b".script"].concat()
}

fn bytecode_file(name: &SieveName) -> Vec<u8> {
    [name.as_bytes(), b".bc"].concat()
}

impl Session {
    fn meta(&mut self, user: &UserId) -> Result<UserMeta, ReplicaError> {
        Ok(self.account(&command::get("META", user.as_bytes()))?.meta)
    }

    fn sieve_file(&mut self, what: &str, user: &UserId, file: &[u8]) -> Result<(), ReplicaError> {
        let fields: [(&str, &[u8]); 2] = [("USERID", user.as_bytes()), ("FILENAME", file)];
        self.line(&command::apply_fields(what, &fields))
    }

    /// The text of a script as the server has it.
    pub(super) fn sieve_text(&mut self, user: &UserId, name: &SieveName) -> Result<Vec<u8>, ReplicaError> {
        let lines = self.request(&command::fetch_sieve(user, &script_file(name)))?;
        let text = lines.into_iter().find_map(|line| match line {
            Untagged::SieveText(text) => Some(text),
            _ => None,
        });
        text.ok_or_else(|| ReplicaError::Refused(format!("Sieve script {name} of {user} cannot be fetched")))
    }

    /// 2.4 names scripts without their GUIDs: they are made from the texts.
    pub(super) fn complete_sieve(&mut self, user: &UserId, meta: &mut UserMeta) -> Result<(), ReplicaError> {
        for (name, script) in meta.sieve.iter_mut().filter(|(_, script)| script.guid.is_null()) {
            let text = self.sieve_text(user, name)?;
            script.guid = MessageGuid(Sha1::digest(&text).into());
        }
        Ok(())
    }

    pub(super) fn sieve_put(
        &mut self,
        user: &UserId,
        name: &SieveName,
        last_update: i64,
        content: &[u8],
    ) -> Result<(), ReplicaError> {
        let put = |session: &mut Self, content: &[u8]| {
            session.line(&command::sieve(user, &script_file(name), last_update, content))
        };
        let mut before = None;
        let mut active = false;
        if self.dialect.sieve_replace {
            let meta = self.meta(user)?;
            if let Some(old) = meta.sieve.get(name) {
                if old.guid == MessageGuid(Sha1::digest(content).into()) {
                    return Ok(());
                }
                active = meta.active.as_ref() == Some(name);
                before = Some(self.sieve_text(user, name)?);
                self.sieve_remove(user, name)?;
            }
        }
        match put(self, content) {
            Ok(()) => {}
            Err(ReplicaError::Refused(text)) => {
                // It does not compile there. An old script is better than none.
                if let Some(before) = before {
                    put(self, &before)?;
                    if active {
                        self.sieve_activate(user, name)?;
                    }
                }
                return Err(ReplicaError::Refused(format!("Sieve script {name} of {user}: {text}")));
            }
            Err(error) => return Err(error),
        }
        if active { self.sieve_activate(user, name) } else { Ok(()) }
    }

    /// Up to 2.5 a script is a file like any other, and its bytecode another: nothing over there compiles it.
    pub(super) fn sieve_put_compiled(
        &mut self,
        user: &UserId,
        name: &SieveName,
        last_update: i64,
        compiled: &[u8],
    ) -> Result<(), ReplicaError> {
        if self.dialect.compiles_sieve || compiled.is_empty() {
            return Ok(());
        }
        self.line(&command::sieve(user, &bytecode_file(name), last_update, compiled))
    }

    pub(super) fn sieve_remove(&mut self, user: &UserId, name: &SieveName) -> Result<(), ReplicaError> {
        match self.sieve_file("UNSIEVE", user, &script_file(name)) {
            // 3.6 says so of a script it does not have.
            Err(ReplicaError::Refused(text)) if self.meta(user)?.sieve.contains_key(name) => {
                return Err(ReplicaError::Refused(format!("Sieve script {name} of {user}: {text}")));
            }
            Ok(()) | Err(ReplicaError::Refused(_)) => {}
            Err(error) => return Err(error),
        }
        if !self.dialect.sieve_in_mailbox {
            // The compiled script is a file of its own there.
            return match self.sieve_file("UNSIEVE", user, &bytecode_file(name)) {
                Err(ReplicaError::Refused(_)) => Ok(()),
                other => other,
            };
        }
        let inbox = user.inbox();
        if self.known(|known| known.mailboxes.get(&inbox).is_none_or(|inbox| inbox.intermediate)) {
            return self.drop_empty_sieve(user);
        }
        Ok(())
    }

    pub(super) fn sieve_activate(&mut self, user: &UserId, name: &SieveName) -> Result<(), ReplicaError> {
        match self.sieve_file("ACTIVATE_SIEVE", user, &bytecode_file(name)) {
            Err(ReplicaError::Refused(text)) => {
                Err(ReplicaError::Refused(format!("Sieve script {name} of {user} cannot be activated: {text}")))
            }
            other => other,
        }
    }

    pub(super) fn sieve_deactivate(&mut self, user: &UserId) -> Result<(), ReplicaError> {
        match self.line(&command::apply_fields("UNACTIVATE_SIEVE", &[("USERID", user.as_bytes())])) {
            // 3.6 says so of a user without any script.
            Err(ReplicaError::Refused(_)) if self.meta(user)?.active.is_none() => Ok(()),
            other => other,
        }
    }

    /// From 3.6 on scripts live in a mailbox below INBOX, which a session that speaks of scripts does not see. When INBOX
    /// goes it stays, and INBOX with it as a place holder. With the last script gone, both may follow.
    pub(super) fn drop_empty_sieve(&mut self, user: &UserId) -> Result<(), ReplicaError> {
        if !self.dialect.sieve_in_mailbox || self.sieve_mailboxes {
            return Ok(());
        }
        let inbox = user.inbox();
        let account = self.account(&command::get("USER", user.as_bytes()))?;
        let below = [inbox.as_bytes(), b"."].concat();
        let (mut place_holder, mut others) = (false, false);
        for head in account.mailboxes.iter().map(|view| &view.head) {
            place_holder |= head.name == inbox && head.mbtype.is_intermediate();
            others |= head.name.as_bytes().starts_with(&below);
        }
        if !place_holder || others || !self.meta(user)?.sieve.is_empty() {
            return Ok(());
        }
        for name in [MboxName::new([&below, b"#sieve".as_slice()].concat()), inbox] {
            match self.line(&command::apply("UNMAILBOX", name.as_bytes())) {
                Ok(()) | Err(ReplicaError::NoSuchMailbox(_) | ReplicaError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
            self.known(|known| known.mailboxes.remove(&name));
        }
        Ok(())
    }
}
