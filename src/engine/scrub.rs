//! Message files read again and compared with their GUIDs, mailbox by mailbox and as slowly as is wanted, so that damage is
//! found while somebody still has a good copy. A pass can be left at any message and gone on with, by another process too.

use super::held::{is_settled, why_not};
use super::pace::{Bustle, Pace};
use crate::model::{
    BodySource, Disposition, MailStore, MailboxEntry, MailboxSnapshot, MboxName, Record, StoreError, Uid,
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// One way through all message files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    /// Seconds since 1970, as all times here.
    pub begun_at: u64,
    pub ended_at: Option<u64>,
    /// The mailbox at hand, and the last message of it that was looked at.
    at: Option<(MboxName, Uid)>,
    /// Looked at from start to end.
    pub mailboxes: usize,
    pub messages: u64,
    pub bytes: u64,
    pub damaged_total: u64,
    /// The first of them.
    pub damaged: Vec<Damage>,
}

/// A message that cannot be had, or is another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    pub mailbox: MboxName,
    /// 0: the mailbox itself.
    pub uid: u32,
    pub file: Option<String>,
    pub reason: String,
    pub found_at: u64,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.uid, &self.file) {
            (0, _) => write!(f, "{}: {}", self.mailbox, self.reason),
            (uid, Some(file)) if !self.reason.contains(file.as_str()) => {
                write!(f, "{} UID {uid}: {file}: {}", self.mailbox, self.reason)
            }
            (uid, _) => write!(f, "{} UID {uid}: {}", self.mailbox, self.reason),
        }
    }
}

/// More are counted, and not kept.
const DAMAGED_MOST: usize = 1000;
/// What opening a file is taken for, in bytes.
const OPENING: u64 = 4096;
/// Between two questions whether to go on.
const NAP: Duration = Duration::from_millis(50);
/// The mailbox at hand has been looked at.
const ALL: Uid = Uid(u32::MAX);

/// What became of a message that was looked at.
pub(super) enum Found {
    Whole,
    /// Expunged meanwhile, or so new that its file may still be on its way.
    Gone,
    Damaged(String),
}

/// Hashes the file of one message; one that is no good is looked at twice.
pub(super) fn look(
    store: &dyn MailStore,
    entry: &MailboxEntry,
    bodies: &dyn BodySource,
    record: &Record,
) -> Result<Found, StoreError> {
    let Some(reason) = why_not(bodies, record) else { return Ok(Found::Whole) };
    let now = store.mailbox(entry)?.map(|now| now.records).unwrap_or_default();
    let is_there = now.iter().any(|now| now.uid == record.uid && !now.is_expunged());
    Ok(if is_there { Found::Damaged(reason) } else { Found::Gone })
}

impl Pass {
    pub fn begin() -> Self {
        Self { begun_at: now(), ..Self::default() }
    }

    /// As if all up to this mailbox had been looked at.
    #[cfg(test)]
    pub(crate) fn leave_at(&mut self, name: MboxName) {
        self.at = Some((name, ALL));
    }

    /// The last mailbox that was looked at, wholly or in part.
    pub fn place(&self) -> Option<&MboxName> {
        self.at.as_ref().map(|(name, _)| name)
    }

    /// Goes on to the end; false when `goes_on`, which is asked at least every second, did not want that. After an error the
    /// same can be called again.
    pub fn run(
        &mut self,
        store: &dyn MailStore,
        pace: &mut Pace,
        bustle: &mut Bustle,
        goes_on: &mut dyn FnMut(&Self) -> bool,
    ) -> Result<bool, StoreError> {
        while let Some(entry) = self.next(store)? {
            if !goes_on(self) {
                return Ok(false);
            }
            if !entry.mbtype.is_intermediate() && !self.mailbox(store, &entry, pace, bustle, goes_on)? {
                return Ok(false);
            }
            self.at = Some((entry.name.clone(), ALL));
            self.mailboxes += 1;
        }
        self.ended_at = Some(now());
        goes_on(self);
        Ok(true)
    }

    /// The one that was left, or the next by name.
    fn next(&self, store: &dyn MailStore) -> Result<Option<Arc<MailboxEntry>>, StoreError> {
        let listing = store.listing()?;
        Ok(match &self.at {
            None => listing.entries().next().cloned(),
            Some((name, uid)) => {
                let mut rest = listing.from(name).skip_while(|entry| entry.name == *name && *uid == ALL);
                rest.next().cloned()
            }
        })
    }

    fn mailbox(
        &mut self,
        store: &dyn MailStore,
        entry: &MailboxEntry,
        pace: &mut Pace,
        bustle: &mut Bustle,
        goes_on: &mut dyn FnMut(&Self) -> bool,
    ) -> Result<bool, StoreError> {
        let Some(snapshot) = self.read(store, entry)? else { return Ok(true) };
        let bodies = store.bodies(entry)?;
        let live = |record: &&Record| !record.is_expunged();
        if !bodies.is_there() && snapshot.records.iter().any(|record| live(&record)) {
            self.damage(entry, Uid(0), None, "the directory of its messages is missing".to_owned());
            return Ok(true);
        }
        let from = self.at.as_ref().filter(|(name, _)| *name == entry.name).map_or(Uid(0), |(_, uid)| *uid);
        for record in snapshot.records.iter().filter(live).filter(|record| record.uid > from) {
            while bustle.is_busy() {
                if !rest(NAP * 10, &mut || goes_on(self)) {
                    return Ok(false);
                }
            }
            match look(store, entry, &*bodies, record)? {
                Found::Damaged(reason) if is_settled(record) => {
                    self.damage(entry, record.uid, bodies.place(record.uid), reason);
                }
                Found::Whole | Found::Gone | Found::Damaged(_) => {}
            }
            self.messages += 1;
            self.bytes += record.size;
            self.at = Some((entry.name.clone(), record.uid));
            let until = pace.spend(record.size.saturating_add(OPENING));
            if !rest(until.saturating_duration_since(Instant::now()), &mut || goes_on(self)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// `None`: gone, or named as damaged.
    fn read(&mut self, store: &dyn MailStore, entry: &MailboxEntry) -> Result<Option<MailboxSnapshot>, StoreError> {
        match store.mailbox(entry) {
            Err(error) if error.disposition == Disposition::Stop => Err(error),
            Err(_) => {
                std::thread::sleep(NAP);
                Ok(match store.mailbox(entry) {
                    Ok(snapshot) => snapshot,
                    Err(error) => {
                        self.damage(entry, Uid(0), None, error.message);
                        None
                    }
                })
            }
            other => other,
        }
    }

    fn damage(&mut self, entry: &MailboxEntry, uid: Uid, file: Option<String>, reason: String) {
        self.damaged_total += 1;
        if self.damaged.len() < DAMAGED_MOST {
            let damage = Damage { mailbox: entry.name.clone(), uid: uid.0, file, reason, found_at: now() };
            self.damaged.push(damage);
        }
    }
}

/// Asks at least once, and again and again during a long pause.
fn rest(time: Duration, goes_on: &mut dyn FnMut() -> bool) -> bool {
    let until = Instant::now() + time;
    loop {
        if !goes_on() {
            return false;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(NAP));
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeStore;
    use super::super::tests::make;
    use super::*;

    fn store() -> FakeStore {
        let store = FakeStore::default();
        store.change(|content| {
            for (id, name) in [("i1", "user.u1"), ("i2", "user.u1.a"), ("i3", "user.u2")] {
                make(content, id, name, 3);
            }
            content.lost.entry("i2".into()).or_default().insert(Uid(2));
        });
        store
    }

    fn go(pass: &mut Pass, store: &FakeStore, goes_on: &mut dyn FnMut(&Pass) -> bool) -> bool {
        pass.run(store, &mut Pace::new(None), &mut Bustle::new(0), goes_on).expect("reads")
    }

    #[test]
    fn what_is_damaged_is_named() {
        let (store, mut pass) = (store(), Pass::begin());
        assert!(go(&mut pass, &store, &mut |_| true));
        assert_eq!((pass.mailboxes, pass.messages, pass.damaged_total), (3, 9, 1));
        assert_eq!((pass.damaged[0].mailbox.to_string().as_str(), pass.damaged[0].uid), ("user.u1.a", 2));
        assert!(pass.ended_at.is_some());
    }

    #[test]
    fn stopped_anywhere_and_gone_on_with_each_message_is_looked_at_once() {
        let whole = {
            let (store, mut pass) = (store(), Pass::begin());
            assert!(go(&mut pass, &store, &mut |_| true));
            pass
        };
        for stop_at in 0..20 {
            let (store, mut pass, mut asked) = (store(), Pass::begin(), 0);
            let done = go(&mut pass, &store, &mut |_| {
                asked += 1;
                asked <= stop_at
            });
            // As another process would have it.
            let text = serde_json::to_string(&pass).expect("writes");
            let mut pass: Pass = serde_json::from_str(&text).expect("reads");
            assert!(done || go(&mut pass, &store, &mut |_| true));
            assert_eq!((pass.mailboxes, pass.messages, pass.bytes), (whole.mailboxes, whole.messages, whole.bytes));
            assert_eq!(pass.damaged_total, 1, "stopped at {stop_at}");
        }
    }

    #[test]
    fn a_mailbox_that_went_is_passed_over() {
        let (store, mut pass, mut asked) = (store(), Pass::begin(), 0);
        let stop = |_: &Pass| {
            asked += 1;
            asked < 6
        };
        assert!(!go(&mut pass, &store, &mut { stop }));
        assert_eq!(pass.place(), Some(&"user.u1.a".into()));
        store.change(|content| content.mailboxes.remove(&"i2".into()));
        assert!(go(&mut pass, &store, &mut |_| true));
        assert_eq!(pass.mailboxes, 2);
    }
}
