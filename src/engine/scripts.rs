//! Sieve scripts of a source that keeps them as messages, for a replica that keeps them as files.

use crate::cyrus::sieve;
use crate::model::{
    BodyRef, Capabilities, Disposition, MailStore, MailboxEntry, MessageGuid, SieveScript, StoreError, UserId, UserMeta,
};
use sha1::{Digest, Sha1};
use std::io::Read;
use std::sync::Arc;

/// A script larger than this is refused by every server.
const MAX_BYTES: u64 = 4 << 20;

/// A user's data as a replica of this kind is to have it.
pub(super) fn user_meta(store: &dyn MailStore, caps: &Capabilities, user: &UserId) -> Result<UserMeta, StoreError> {
    let mut meta = store.user_meta(user)?;
    if store.sieve_in_mailboxes()
        && !caps.sieve_mailboxes
        && let Some(entry) = folder(store, user)?
    {
        read(store, &entry, &mut meta)?;
    }
    Ok(meta)
}

fn folder(store: &dyn MailStore, user: &UserId) -> Result<Option<Arc<MailboxEntry>>, StoreError> {
    let (listing, inbox) = (store.listing()?, user.inbox());
    let mut theirs = listing.beginning_with(inbox);
    Ok(theirs.find(|entry| entry.mbtype.is_sieve() && entry.name.owner().as_ref() == Some(user)).cloned())
}

/// The newest message of a name is the script, the flagged one is active. A file of the same name is what was compiled
/// from it, or what it was made from.
fn read(store: &dyn MailStore, entry: &MailboxEntry, meta: &mut UserMeta) -> Result<(), StoreError> {
    let Some(snapshot) = store.mailbox(entry)? else { return Ok(()) };
    let bodies = store.bodies(entry)?;
    for record in snapshot.records.iter().filter(|record| !record.is_expunged()) {
        let body = BodyRef { uid: record.uid, guid: record.guid, size: record.size, copied: false };
        let mut message = Vec::new();
        let read = bodies.open(&body)?.reader.take(MAX_BYTES).read_to_end(&mut message);
        read.map_err(|error| {
            let message = format!("{}: message {} cannot be read: {error}", entry.name, record.uid.0);
            StoreError::new(Disposition::RetrySoon, message)
        })?;
        let Some((name, content)) = sieve::of_message(&message) else { continue };
        if record.system_flags.has(crate::model::SystemFlags::FLAGGED) {
            meta.active = Some(name.clone());
        } else {
            meta.active.take_if(|active| *active == name);
        }
        let guid = MessageGuid(Sha1::digest(&content).into());
        meta.sieve
            .insert(name, SieveScript { guid, last_update: record.internaldate, content, ..SieveScript::default() });
    }
    Ok(())
}
