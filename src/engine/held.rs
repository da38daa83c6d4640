//! Messages whose file is missing, or is not the message of its record. They are held back, so that everything else of
//! their mailbox arrives; each is named as a failure and tried again.
//!
//! Csync cannot bring in a message below a UID that the replica has: when the file is back, the mailbox is made anew.

use super::push::{JobError, Pusher};
use super::{Shared, lock};
use crate::model::{
    BodyRef, BodySource, Disposition, MailboxEntry, MailboxSnapshot, MessageGuid, Record, StoreError, Uid, UniqueId,
};
use sha1::{Digest, Sha1};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// More in one mailbox are no single losses: a copy that is being made, a partition that is not there.
const MOST: usize = 64;

/// Younger records may still get their file: a network mount shows index and spool at different moments.
const SETTLED: Duration = Duration::from_secs(10);

/// A file that is there is hashed again this often.
const HASH_AGAIN: Duration = Duration::from_secs(5);

/// A message that is not sent.
pub(super) struct Held {
    reason: String,
    looked: Instant,
    /// There was no file of the right size to be hashed.
    no_file: bool,
}

/// By mailbox.
pub(super) type AllHeld = BTreeMap<UniqueId, BTreeMap<Uid, Held>>;

impl Shared {
    pub(super) fn is_holding(&self, id: &UniqueId) -> bool {
        lock(&self.held).contains_key(id)
    }

    fn is_held(&self, id: &UniqueId, uid: Uid) -> bool {
        lock(&self.held).get(id).is_some_and(|held| held.contains_key(&uid))
    }

    fn put_held(&self, id: &UniqueId, uid: Uid, reason: String, no_file: bool) {
        let held = Held { reason, looked: Instant::now(), no_file };
        lock(&self.held).entry(id.clone()).or_default().insert(uid, held);
    }

    fn release(&self, id: &UniqueId, uid: Uid) {
        let mut all = lock(&self.held);
        let Some(held) = all.get_mut(id) else { return };
        held.remove(&uid);
        if held.is_empty() {
            all.remove(id);
        }
    }
}

impl Pusher<'_> {
    /// What is told when all else of the mailbox has arrived.
    pub(super) fn tell_held(&self, entry: &MailboxEntry) -> Result<(), JobError> {
        let all = lock(&self.shared.held);
        let Some(held) = all.get(&entry.uniqueid) else { return Ok(()) };
        let list: Vec<String> = held.iter().map(|(uid, held)| format!("UID {}: {}", uid.0, held.reason)).collect();
        Err(JobError::Held(format!("everything but this has arrived: {}", list.join("; "))))
    }

    /// Holds back a message that could not be sent; false when that says something about more than this message.
    pub(super) fn hold(&self, entry: &MailboxEntry, uid: Uid, error: &StoreError) -> Result<bool, JobError> {
        let id = &entry.uniqueid;
        let many = lock(&self.shared.held).get(id).is_some_and(|held| held.len() >= MOST);
        if many || self.shared.is_held(id, uid) || !self.store().bodies(entry)?.is_there() {
            return Ok(false);
        }
        // It may have been expunged just now.
        let Some(now) = self.store().mailbox(entry)? else { return Ok(false) };
        let Some(record) = now.records.iter().find(|record| record.uid == uid) else { return Ok(false) };
        if !is_settled(record) {
            return Ok(false);
        }
        self.shared.put_held(id, uid, error.message.clone(), false);
        Ok(true)
    }

    /// Leaves the messages that are held back out of a reading, those that are whole by now excepted.
    pub(super) fn leave_held_out(&self, entry: &MailboxEntry, raw: &mut MailboxSnapshot) -> Result<(), JobError> {
        let id = &entry.uniqueid;
        // Before 2.4 no GUID can be known of a message without a file.
        let nameless = |record: &&Record| !record.is_expunged() && record.guid == MessageGuid::default();
        let nameless: Vec<BodyRef> = raw.records.iter().filter(nameless).map(body_of).collect();
        if nameless.is_empty() && !self.shared.is_holding(id) {
            return Ok(());
        }
        let bodies = self.store().bodies(entry)?;
        let is_due = |held: &Held| held.no_file || held.looked.elapsed() >= HASH_AGAIN;
        let known: Vec<(Uid, bool)> = lock(&self.shared.held)
            .get(id)
            .map(|held| held.iter().map(|(uid, held)| (*uid, is_due(held))).collect())
            .unwrap_or_default();
        for (uid, is_due) in known {
            let Some(record) = raw.records.iter().find(|record| record.uid == uid) else {
                self.shared.release(id, uid);
                continue;
            };
            match fault_of(&*bodies, &body_of(record), is_due) {
                Look::Whole => self.shared.release(id, uid),
                // Expunged, and gone for good.
                Look::NoFile(_) if record.is_expunged() => self.shared.release(id, uid),
                Look::NoFile(error) => self.shared.put_held(id, uid, error.message, true),
                Look::Other(error) => self.shared.put_held(id, uid, error.message, false),
                Look::Unknown => {}
            }
        }
        for body in nameless {
            let reason = match bodies.open(&body) {
                Err(error) => error.message,
                Ok(_) => "its GUID is not known".to_owned(),
            };
            self.shared.put_held(id, body.uid, reason, true);
        }
        self.drop_held(id, raw);
        Ok(())
    }

    fn drop_held(&self, id: &UniqueId, raw: &mut MailboxSnapshot) {
        let all = lock(&self.shared.held);
        if let Some(held) = all.get(id) {
            raw.records.retain(|record| record.is_expunged() || !held.contains_key(&record.uid));
        }
    }

    /// Holds back, of these UIDs, the messages that could not be sent; with `hash` also those whose file is another one.
    pub(super) fn hold_unsendable(
        &self,
        entry: &MailboxEntry,
        raw: &mut MailboxSnapshot,
        uids: &BTreeSet<Uid>,
        hash: bool,
    ) -> Result<bool, JobError> {
        let bodies = self.store().bodies(entry)?;
        let mut faults = Vec::new();
        for record in raw.records.iter().filter(|record| !record.is_expunged() && uids.contains(&record.uid)) {
            match fault_of(&*bodies, &body_of(record), hash) {
                Look::NoFile(error) => faults.push((record, error, true)),
                Look::Other(error) => faults.push((record, error, false)),
                Look::Whole | Look::Unknown => {}
            }
        }
        let Some((_, first, _)) = faults.first() else { return Ok(false) };
        if !bodies.is_there() || faults.len() > MOST || faults.iter().any(|(record, ..)| !is_settled(record)) {
            let count = faults.len();
            let message = format!("{} (and {} more)", first.message, count.saturating_sub(1));
            return Err(StoreError::new(Disposition::RetrySoon, message).into());
        }
        for (record, error, no_file) in faults {
            self.shared.put_held(&entry.uniqueid, record.uid, error.message, no_file);
        }
        self.drop_held(&entry.uniqueid, raw);
        Ok(true)
    }

    /// Bodies of these are not sent: an expunged message whose file is no good has none.
    pub(super) fn is_held(&self, id: &UniqueId, uid: Uid) -> bool {
        self.shared.is_held(id, uid)
    }
}

fn body_of(record: &Record) -> BodyRef {
    BodyRef { uid: record.uid, guid: record.guid, size: record.size, copied: false }
}

pub(super) fn is_settled(record: &Record) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    record.last_updated.saturating_add(SETTLED.as_secs() as i64) <= now.as_secs() as i64
}

enum Look {
    Whole,
    NoFile(StoreError),
    /// Another message, or not to be read.
    Other(StoreError),
    /// It has the right size, and more was not looked at.
    Unknown,
}

fn fault_of(bodies: &dyn BodySource, body: &BodyRef, hash: bool) -> Look {
    let open = match bodies.open(body) {
        Ok(open) => open,
        Err(error) => return Look::NoFile(error),
    };
    if !hash {
        return Look::Unknown;
    }
    match guid_of(open.reader) {
        Ok((guid, _)) if guid == body.guid => Look::Whole,
        Ok((guid, size)) => Look::Other(StoreError::new(
            Disposition::Quarantine,
            format!(
                "message file of UID {} is not the message of its record: GUID {guid} ({size} bytes), expected {}; it is \
                 not sent; restore the file or run reconstruct",
                body.uid.0, body.guid
            ),
        )),
        Err(error) => Look::Other(StoreError::new(
            Disposition::RetrySoon,
            format!("message file of UID {} cannot be read: {error}", body.uid.0),
        )),
    }
}

/// Why the message of a record cannot be sent.
pub(super) fn why_not(bodies: &dyn BodySource, record: &Record) -> Option<String> {
    match fault_of(bodies, &body_of(record), true) {
        Look::NoFile(error) | Look::Other(error) => Some(error.message),
        Look::Whole | Look::Unknown => None,
    }
}

/// SHA-1 and length of what a reader gives.
pub(super) fn guid_of(mut reader: impl Read) -> std::io::Result<(MessageGuid, u64)> {
    let (mut hash, mut size, mut buffer) = (Sha1::new(), 0, vec![0; 64 << 10]);
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok((MessageGuid(hash.finalize().into()), size)),
            Ok(count) => {
                hash.update(buffer.get(..count).unwrap_or_default());
                size += count as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
