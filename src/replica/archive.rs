//! An archive as something mail is replicated to. All of it is in `archive`; here its answers become the seam's.

use crate::archive::{ApplyError, Archive, ArchiveError, Writer};
use crate::model::{
    AccountView, AnnotCrc, Annotation, Body, BodySource, Capabilities, Disposition, MailboxView, MboxName, MessageGuid,
    QuotaLimits, QuotaRoot, Replica, ReplicaError, ReplicaTarget, SieveName, Step, UniqueId, UserId,
};
use std::collections::BTreeSet;

/// An archive by its URL. Sessions share what they know of it.
pub struct ArchiveTarget {
    archive: Archive,
}

impl ArchiveTarget {
    /// `file:///DIR`; the archive is made when the first session opens.
    pub fn new(url: &str) -> Result<Self, ReplicaError> {
        Archive::open(url).map(Self::of).map_err(|error| ReplicaError::Fatal(error.to_string()))
    }

    /// A target for an archive that is open already.
    pub fn of(archive: Archive) -> Self {
        Self { archive }
    }
}

impl ReplicaTarget for ArchiveTarget {
    fn name(&self) -> String {
        self.archive.name().to_owned()
    }

    fn open(&self) -> Result<Box<dyn Replica>, ReplicaError> {
        let session = Session { writer: self.archive.writer(), name: self.name() };
        session.check(self.archive.ensure())?;
        Ok(Box::new(session))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            annot_crc: AnnotCrc::New,
            checks_since: true,
            sieve_mailboxes: true,
            intermediates: true,
            keeps_savedate: true,
            message_annotations: true,
            quota_resources: true,
            server_annotations: true,
            keeps_options: true,
            lists_all: true,
        }
    }
}

struct Session {
    writer: Writer,
    name: String,
}

impl Session {
    fn check<T>(&self, result: Result<T, ArchiveError>) -> Result<T, ReplicaError> {
        result.map_err(|error| match error.disposition() {
            Disposition::Stop => ReplicaError::Fatal(error.to_string()),
            Disposition::Reconnect => ReplicaError::Lost { replica: self.name.clone(), cause: error.to_string() },
            Disposition::RetrySoon => ReplicaError::Changed(error.to_string()),
            Disposition::Quarantine => ReplicaError::Refused(error.to_string()),
        })
    }
}

impl Replica for Session {
    fn view_user(&mut self, user: &UserId) -> Result<AccountView, ReplicaError> {
        self.check(self.writer.view_user(user))
    }

    fn view_mailboxes(&mut self, names: &[MboxName]) -> Result<Vec<MailboxView>, ReplicaError> {
        self.check(self.writer.view_mailboxes(names))
    }

    fn view_full(&mut self, name: &MboxName) -> Result<Option<MailboxView>, ReplicaError> {
        self.check(self.writer.view_full(name))
    }

    fn view_uniqueid(&mut self, id: &UniqueId) -> Result<Option<MailboxView>, ReplicaError> {
        self.check(self.writer.view_uniqueid(id))
    }

    fn view_quota(&mut self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, ReplicaError> {
        self.check(self.writer.view_quota(root))
    }

    fn view_server_annotations(&mut self) -> Result<Vec<Annotation>, ReplicaError> {
        self.check(self.writer.view_server_annotations())
    }

    fn has_bodies(
        &mut self,
        guids: &[MessageGuid],
        _names: &[MboxName],
    ) -> Result<BTreeSet<MessageGuid>, ReplicaError> {
        self.check(self.writer.has_bodies(guids))
    }

    fn body(&mut self, name: &MboxName, guid: &MessageGuid) -> Result<Option<Body>, ReplicaError> {
        self.check(self.writer.body(name, guid))
    }

    fn script(&mut self, user: &UserId, name: &SieveName) -> Result<Option<Vec<u8>>, ReplicaError> {
        self.check(self.writer.script(user, name))
    }

    fn apply(&mut self, step: &Step, bodies: &dyn BodySource) -> Result<(), ReplicaError> {
        self.writer.apply(step, bodies).or_else(|error| match error {
            ApplyError::Archive(error) => self.check(Err(error)),
            ApplyError::Changed(reason) => Err(ReplicaError::Changed(reason)),
            ApplyError::NoSuchMailbox(name) => Err(ReplicaError::NoSuchMailbox(name.to_string())),
            ApplyError::Moved(reason) => Err(ReplicaError::Moved(reason)),
            ApplyError::Refused(reason) => Err(ReplicaError::Refused(reason)),
            ApplyError::Body { uid, error } => Err(ReplicaError::Body { uid, error }),
        })
    }

    fn ping(&mut self) -> Result<(), ReplicaError> {
        self.check(self.writer.ping())
    }

    /// Nothing is staged: a body that no mailbox names yet is kept for the next one that does.
    fn restart(&mut self) -> Result<(), ReplicaError> {
        Ok(())
    }

    fn be_quick(&mut self) {
        self.writer.be_quick();
    }

    fn close(self: Box<Self>) {
        self.writer.finish();
    }

    fn traffic(&self) -> (u64, u64) {
        self.writer.traffic()
    }
}
