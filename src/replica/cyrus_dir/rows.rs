//! What the rows of `mailboxes.db` say, by name and by uniqueid. Pure.

use crate::cyrus::db::Map;
use crate::cyrus::mboxlist::{self, Row};
use crate::model::{MailboxEntry, MboxName, UniqueId};
use std::collections::{BTreeMap, HashMap};

/// Mailboxes and place holders; no tombstones.
#[derive(Default)]
pub(super) struct Rows {
    by_name: BTreeMap<MboxName, MailboxEntry>,
    names: HashMap<UniqueId, MboxName>,
}

impl Rows {
    /// Refuses a list in which something stands that is not written here.
    pub fn new(map: &Map) -> Result<Self, String> {
        let mut rows = Self::default();
        for (key, value) in map {
            match mboxlist::row_for(key, value) {
                Ok(Some(Row::Name(listed))) if listed.mailbox.by_name && !listed.mailbox.mbtype.is_deleted() => {
                    return Err(format!(
                        "{} lies under its name, or the list is older than 3.6: run relocate_by_id of a Cyrus first",
                        listed.mailbox.name
                    ));
                }
                Ok(_) => rows.apply(key, Some(value)),
                Err(error) => return Err(format!("{error}, key {}", String::from_utf8_lossy(key))),
            }
        }
        Ok(rows)
    }

    /// One changed row.
    pub fn apply(&mut self, key: &[u8], value: Option<&[u8]>) {
        let Some(dbname) = key.strip_prefix(b"N") else { return };
        let name = mboxlist::name_of_dbname(dbname);
        let old = self.by_name.remove(&name);
        if let Some(old) = old.filter(|old| self.names.get(&old.uniqueid) == Some(&name)) {
            self.names.remove(&old.uniqueid);
        }
        let row = value.and_then(|value| mboxlist::row_for(key, value).ok().flatten());
        let Some(Row::Name(listed)) = row else { return };
        let mailbox = listed.mailbox;
        if mailbox.mbtype.is_deleted() || mailbox.mbtype.is_foreign() {
            return;
        }
        self.names.insert(mailbox.uniqueid.clone(), name.clone());
        self.by_name.insert(name, mailbox);
    }

    pub fn entry(&self, name: &MboxName) -> Option<&MailboxEntry> {
        self.by_name.get(name)
    }

    pub fn name(&self, id: &UniqueId) -> Option<&MboxName> {
        self.names.get(id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &MailboxEntry> {
        self.by_name.values()
    }

    /// A mailbox and all that are below it.
    pub fn below(&self, top: &MboxName) -> impl Iterator<Item = &MailboxEntry> {
        let prefix = top.as_bytes().to_vec();
        let inside = move |entry: &&MailboxEntry| {
            entry
                .name
                .as_bytes()
                .strip_prefix(prefix.as_slice())
                .is_some_and(|rest| matches!(rest.first(), None | Some(b'.')))
        };
        let same = top.as_bytes().to_vec();
        let range = self.by_name.range(top.clone()..).map(|(_, entry)| entry);
        range.take_while(move |entry| entry.name.as_bytes().starts_with(&same)).filter(inside)
    }
}
