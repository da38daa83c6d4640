//! Is a store whole? Every row of its list has a mailbox, every record of a message its file, every user's data can be read.

use super::held::guid_of;
use crate::model::{BodyRef, MailStore, MailboxEntry, QuotaRoot, Record, StoreError};
use std::collections::BTreeMap;

/// What was looked at, and what is wrong.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Whole {
    pub mailboxes: usize,
    pub messages: usize,
    pub users: usize,
    pub quotas: usize,
    /// Bytes and messages by quota root, summed up from the records.
    #[serde(skip)]
    pub used: BTreeMap<QuotaRoot, (u64, u64)>,
    /// Object, and what is wrong with it.
    pub faults: Vec<(String, String)>,
}

/// Reads all of a store; with `hash` the messages as well. Its list has to be readable.
pub fn whole(store: &dyn MailStore, hash: bool, progress: &mut dyn FnMut(usize, usize)) -> Result<Whole, StoreError> {
    let listing = store.listing()?;
    let mut found = Whole::default();
    found.faults.extend(listing.unreadable.iter().map(|row| (row.name.to_string(), row.reason.clone())));
    for (done, entry) in listing.entries().enumerate() {
        progress(done, listing.len());
        if !entry.mbtype.is_intermediate() {
            found.mailboxes += 1;
            if let Err(error) = mailbox(store, entry, hash, &mut found) {
                found.faults.push((entry.name.to_string(), error.to_string()));
            }
        }
    }
    for user in store.users()? {
        found.users += 1;
        if let Err(error) = store.user_meta(&user) {
            found.faults.push((format!("data of {user}"), error.to_string()));
        }
    }
    found.quotas = store.quotas()?.len();
    Ok(found)
}

fn mailbox(store: &dyn MailStore, entry: &MailboxEntry, hash: bool, found: &mut Whole) -> Result<(), StoreError> {
    let Some(snapshot) = store.mailbox(entry)? else {
        found.faults.push((entry.name.to_string(), "is in the list and has no files".into()));
        return Ok(());
    };
    let head = &snapshot.head;
    let mut fault = |what: &dyn std::fmt::Display, reason: String| found.faults.push((what.to_string(), reason));
    if head.uniqueid != entry.uniqueid {
        fault(&entry.name, format!("is {} in the list and {} in its header", entry.uniqueid, head.uniqueid));
    }
    if let Some(last) = snapshot.records.last().filter(|last| last.uid > head.last_uid) {
        fault(&entry.name, format!("has UID {} above its last UID {}", last.uid.0, head.last_uid.0));
    }
    let bodies = store.bodies(entry)?;
    let (mut bytes, mut messages) = (0u64, 0u64);
    for record in snapshot.records.iter().filter(|record| !record.is_expunged()) {
        messages += 1;
        bytes = bytes.saturating_add(record.size);
        if let Err(reason) = message(&*bodies, record, hash) {
            fault(&format_args!("{} UID {}", entry.name, record.uid.0), reason);
        }
    }
    found.messages += messages as usize;
    if let Some(root) = &head.quotaroot {
        let used = found.used.entry(root.clone()).or_default();
        *used = (used.0.saturating_add(bytes), used.1 + messages);
    }
    Ok(())
}

fn message(bodies: &dyn crate::model::BodySource, record: &Record, hash: bool) -> Result<(), String> {
    let body = BodyRef { uid: record.uid, guid: record.guid, size: record.size, copied: false };
    let open = bodies.open(&body).map_err(|error| error.to_string())?;
    if open.size != record.size {
        return Err(format!("its file has {} bytes, its record says {}", open.size, record.size));
    }
    if !hash {
        return Ok(());
    }
    match guid_of(open.reader) {
        Ok((guid, _)) if guid == record.guid => Ok(()),
        Ok((guid, _)) => Err(format!("its file is another message: GUID {guid}, expected {}", record.guid)),
        Err(error) => Err(format!("its file cannot be read: {error}")),
    }
}
