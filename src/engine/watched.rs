//! A session whose owner is known to wait for another machine: a slow replica is no reason to believe that a worker is
//! stuck. What is read of the source meanwhile is done here.

use crate::model::{
    AccountView, Annotation, Body, BodyRef, BodySource, MailboxHead, MailboxView, MboxName, MessageGuid, QuotaLimits,
    QuotaRoot, Record, Replica, ReplicaError, SieveName, Step, StoreError, Uid, UniqueId, UserId, pulse,
};
use std::collections::BTreeSet;
use std::io::{self, Read};
use std::time::Instant;

pub(super) struct Watched(pub Box<dyn Replica>);

struct Here<'a>(&'a dyn BodySource);

struct HereReader(Box<dyn Read + Send>);

impl Read for HereReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        pulse::at_home(|| self.0.read(buffer))
    }
}

impl BodySource for Here<'_> {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        let Body { size, reader } = pulse::at_home(|| self.0.open(body))?;
        Ok(Body { size, reader: Box::new(HereReader(reader)) })
    }

    fn exists(&self, uid: Uid) -> bool {
        pulse::at_home(|| self.0.exists(uid))
    }

    fn is_there(&self) -> bool {
        pulse::at_home(|| self.0.is_there())
    }

    fn has_copies(&self, uid: Uid) -> bool {
        pulse::at_home(|| self.0.has_copies(uid))
    }
}

impl Replica for Watched {
    fn view_user(&mut self, user: &UserId) -> Result<AccountView, ReplicaError> {
        pulse::abroad(|| self.0.view_user(user))
    }

    fn view_mailboxes(&mut self, names: &[MboxName]) -> Result<Vec<MailboxView>, ReplicaError> {
        pulse::abroad(|| self.0.view_mailboxes(names))
    }

    fn view_full(&mut self, name: &MboxName) -> Result<Option<MailboxView>, ReplicaError> {
        pulse::abroad(|| self.0.view_full(name))
    }

    fn view_uniqueid(&mut self, id: &UniqueId) -> Result<Option<MailboxView>, ReplicaError> {
        pulse::abroad(|| self.0.view_uniqueid(id))
    }

    fn view_quota(&mut self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, ReplicaError> {
        pulse::abroad(|| self.0.view_quota(root))
    }

    fn view_server_annotations(&mut self) -> Result<Vec<Annotation>, ReplicaError> {
        pulse::abroad(|| self.0.view_server_annotations())
    }

    fn has_bodies(&mut self, guids: &[MessageGuid], names: &[MboxName]) -> Result<BTreeSet<MessageGuid>, ReplicaError> {
        pulse::abroad(|| self.0.has_bodies(guids, names))
    }

    fn body(&mut self, name: &MboxName, guid: &MessageGuid) -> Result<Option<Body>, ReplicaError> {
        pulse::abroad(|| self.0.body(name, guid))
    }

    fn message(&mut self, head: &MailboxHead, record: &Record) -> Result<Option<Body>, ReplicaError> {
        pulse::abroad(|| self.0.message(head, record))
    }

    fn script(&mut self, user: &UserId, name: &SieveName) -> Result<Option<Vec<u8>>, ReplicaError> {
        pulse::abroad(|| self.0.script(user, name))
    }

    fn apply(&mut self, step: &Step, bodies: &dyn BodySource) -> Result<(), ReplicaError> {
        pulse::abroad(|| self.0.apply(step, &Here(bodies)))
    }

    fn ping(&mut self) -> Result<(), ReplicaError> {
        pulse::abroad(|| self.0.ping())
    }

    fn restart(&mut self) -> Result<(), ReplicaError> {
        pulse::abroad(|| self.0.restart())
    }

    fn close(self: Box<Self>) {
        pulse::abroad(|| self.0.close());
    }

    fn sent_at(&self) -> Option<Instant> {
        self.0.sent_at()
    }

    fn compression(&self) -> Option<(u64, u64)> {
        self.0.compression()
    }

    fn traffic(&self) -> (u64, u64) {
        self.0.traffic()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeStore;
    use super::super::{Engine, Options};
    use super::pulse::Doing;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn a_scan_that_is_stuck_is_the_scanners_trouble() {
        let store = Arc::new(FakeStore::default());
        let engine = Engine::start(store.clone(), Vec::new(), &Options::default(), Arc::new(|_| {}));
        let look = |room: &str| engine.pulses().iter().find(|pulse| pulse.room() == room).expect("a room").look();
        // Whoever reads the store now waits for ever.
        let held = store.0.lock().expect("lock");
        let done = engine.begin_scan();
        while look("scanner").1 != Doing::Working {
            std::thread::sleep(Duration::from_millis(1));
        }
        let before = look("scanner");
        std::thread::sleep(Duration::from_millis(1500));
        assert_eq!(look("scanner"), before);
        assert_eq!(look("router").1, Doing::Abroad);
        drop(held);
        let _ = done.recv();
        let before = look("router").0;
        while look("router").0 == before || look("router").1 != Doing::Working {
            std::thread::sleep(Duration::from_millis(1));
        }
        engine.stop(Duration::from_secs(1));
    }
}
