//! An archive as something mail is read from: what a restore is.

use super::index::Index;
use super::shapes::Row;
use super::{Archive, ArchiveError, accounts, bodies, chain};
use crate::model::{
    Annotation, Body, BodyRef, BodySource, ChangedAnnotations, Disposition, Fingerprint, Listing, MailStore,
    MailboxEntry, MailboxRef, MailboxSnapshot, MboxName, MessageGuid, QuotaLimits, QuotaRoot, StoreError, Uid,
    UniqueId, UserId, UserMeta,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// imapd.conf `deletedprefix`, which nobody changes and no csync message tells.
pub(super) const DELETED_PREFIX: &[u8] = b"DELETED";

type Mark = Option<(u64, String)>;

type Server = (BTreeMap<QuotaRoot, QuotaLimits>, Vec<Annotation>);

/// Something that was read, as long as its mark stays the same.
struct Remembered<T>(Mutex<Option<(Mark, Arc<T>)>>);

impl<T> Remembered<T> {
    fn get(&self, mark: Mark, read: impl FnOnce() -> Result<T, ArchiveError>) -> Result<Arc<T>, ArchiveError> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, value)) = &*known
            && *of == mark
        {
            return Ok(value.clone());
        }
        let value = Arc::new(read()?);
        *known = Some((mark, value.clone()));
        Ok(value)
    }
}

/// Reads an archive. Others may write to it meanwhile: each mailbox is read as it was at one moment.
pub struct ArchiveStore {
    archive: Archive,
    id: String,
    listing: Remembered<Listing>,
    server: Remembered<Server>,
}

impl From<ArchiveError> for StoreError {
    fn from(error: ArchiveError) -> Self {
        // A source has no connection of its own to renew: trying again is the cure for an absent object store.
        let disposition = match error.disposition() {
            Disposition::Reconnect => Disposition::RetrySoon,
            disposition => disposition,
        };
        Self::new(disposition, error.to_string())
    }
}

impl ArchiveStore {
    /// An archive must be there: an empty place is refused, not read as an empty store.
    pub fn open(archive: Archive) -> Result<Self, StoreError> {
        let id = archive
            .id()?
            .ok_or_else(|| StoreError::new(Disposition::Stop, format!("there is no archive at {}", archive.name())))?;
        // What is read once need not be remembered, nor does it push out what a writer remembers.
        let archive = Archive { cache: Arc::default(), ..archive };
        Ok(Self { archive, id, listing: Remembered(Mutex::default()), server: Remembered(Mutex::default()) })
    }

    /// Where the mailbox of this uniqueid stands in the index now.
    fn row(&self, id: &UniqueId) -> Result<Option<(MboxName, Row)>, ArchiveError> {
        self.archive.index.look(&self.archive.objects, |rows| {
            let name = rows.name(id)?;
            Some((name.clone(), rows.row(name)?.clone()))
        })
    }

    fn server(&self) -> Result<Arc<Server>, ArchiveError> {
        let objects = &self.archive.objects;
        self.server.get(accounts::server_mark(objects)?, || accounts::server(objects))
    }
}

/// The innermost root above a mailbox, as Cyrus looks it up: roots come and go without a word to the mailbox. A root
/// beside it that its header names stays: 3.6 keeps the old one when a mailbox is renamed.
fn quota_root(
    roots: &BTreeMap<QuotaRoot, QuotaLimits>,
    name: &MboxName,
    header: Option<QuotaRoot>,
) -> Option<QuotaRoot> {
    let above = |root: &QuotaRoot| {
        let rest = name.as_bytes().strip_prefix(root.as_bytes());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b".") || root.as_bytes().ends_with(b"!"))
    };
    let beside = header.filter(|root| roots.contains_key(root) && !above(root));
    beside.or_else(|| roots.keys().filter(|root| above(root)).max_by_key(|root| root.as_bytes().len()).cloned())
}

fn mark(parts: &impl serde::Serialize) -> Fingerprint {
    Fingerprint(serde_json::to_vec(parts).unwrap_or_default())
}

impl MailStore for ArchiveStore {
    fn identity(&self) -> Result<String, StoreError> {
        Ok(format!("archive {}", self.id))
    }

    fn listing(&self) -> Result<Arc<Listing>, StoreError> {
        let objects = &self.archive.objects;
        let listing = self.listing.get(Index::mark(objects)?, || {
            self.archive.index.look(objects, |rows| rows.iter().map(|(name, row)| Arc::new(row.entry(name))).collect())
        });
        Ok(listing?)
    }

    fn mailbox(&self, entry: &MailboxEntry) -> Result<Option<MailboxSnapshot>, StoreError> {
        let Some((name, row)) = self.row(&entry.uniqueid)? else { return Ok(None) };
        let Some((_, mailbox)) = self.archive.load(&name, &row)? else { return Ok(None) };
        let mut snapshot = mailbox.snapshot();
        snapshot.head.quotaroot = quota_root(&self.server()?.0, &name, snapshot.head.quotaroot.take());
        Ok(Some(snapshot))
    }

    fn fingerprint(&self, entry: &MailboxEntry) -> Result<Option<Fingerprint>, StoreError> {
        let Some((name, row)) = self.row(&entry.uniqueid)? else { return Ok(None) };
        let newest = chain::newest(&self.archive.objects, &Archive::folder(&entry.uniqueid))?;
        Ok(Some(mark(&(newest, name, row))))
    }

    fn user_fingerprint(&self, user: &UserId) -> Result<Fingerprint, StoreError> {
        Ok(mark(&accounts::mark(&self.archive.objects, user)?))
    }

    fn bodies(&self, entry: &MailboxEntry) -> Result<Box<dyn BodySource>, StoreError> {
        let archive = self.archive.clone();
        Ok(Box::new(ArchiveBodies { archive, row: self.row(&entry.uniqueid)?, guids: OnceLock::new() }))
    }

    fn users(&self) -> Result<Vec<UserId>, StoreError> {
        let mut users: BTreeSet<UserId> = self.archive.index.look(&self.archive.objects, |rows| {
            rows.iter().filter(|(name, _)| name.is_inbox()).filter_map(|(name, _)| name.owner()).collect()
        })?;
        users.extend(accounts::users(&self.archive.objects)?);
        Ok(users.into_iter().collect())
    }

    fn user_meta(&self, user: &UserId) -> Result<UserMeta, StoreError> {
        Ok(accounts::meta(&self.archive.objects, user, true)?)
    }

    fn quotas(&self) -> Result<BTreeMap<QuotaRoot, QuotaLimits>, StoreError> {
        Ok(self.server()?.0.clone())
    }

    fn quota(&self, root: &QuotaRoot) -> Result<Option<QuotaLimits>, StoreError> {
        Ok(self.server()?.0.get(root).cloned())
    }

    fn server_annotations(&self) -> Result<Vec<Annotation>, StoreError> {
        Ok(self.server()?.1.clone())
    }

    fn annotated_mailboxes(&self) -> Result<BTreeMap<UniqueId, Vec<Annotation>>, StoreError> {
        let rows = self
            .archive
            .index
            .look(&self.archive.objects, |rows| rows.iter().map(|(name, row)| (name.clone(), row.clone())).collect())?;
        let views = self.archive.heads(rows)?.into_iter().filter(|view| !view.annotations.is_empty());
        Ok(views.map(|view| (view.head.uniqueid, view.annotations)).collect())
    }

    fn changed_annotations(&self) -> Result<ChangedAnnotations, StoreError> {
        // Nobody says when another writes to an archive; who asks all the same is told everything.
        let mailboxes = self.annotated_mailboxes()?.into_keys().map(MailboxRef::Id).collect();
        Ok(ChangedAnnotations { mailboxes, server: true })
    }

    fn sieve_in_mailboxes(&self) -> bool {
        let any =
            self.archive.index.look(&self.archive.objects, |rows| rows.iter().any(|(_, row)| row.mbtype.is_sieve()));
        any.unwrap_or(false)
    }

    fn deleted_prefix(&self) -> &[u8] {
        DELETED_PREFIX
    }
}

struct ArchiveBodies {
    archive: Archive,
    row: Option<(MboxName, Row)>,
    guids: OnceLock<HashMap<Uid, (MessageGuid, u64)>>,
}

impl ArchiveBodies {
    fn guids(&self) -> &HashMap<Uid, (MessageGuid, u64)> {
        self.guids.get_or_init(|| {
            let Some((name, row)) = &self.row else { return HashMap::new() };
            // Whoever asks is about to read the mailbox anyway and hears of the error there.
            let Ok(Some((chain, mailbox))) = self.archive.load(name, row) else { return HashMap::new() };
            let guids = mailbox.records.iter().map(|record| (record.uid, (record.guid, record.size))).collect();
            self.archive.keep(&row.uniqueid, chain, mailbox);
            guids
        })
    }
}

impl BodySource for ArchiveBodies {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        let path = bodies::body_path(&body.guid);
        match self.archive.body(&body.guid, self.row.as_ref().map(|(_, row)| &row.uniqueid))? {
            Some(body) => Ok(body),
            None => {
                let message = format!("{}/{path}: is missing (UID {})", self.archive.name(), body.uid.0);
                Err(StoreError::new(Disposition::Quarantine, message))
            }
        }
    }

    fn exists(&self, uid: Uid) -> bool {
        let Some(body) = self.guids().get(&uid) else { return false };
        let is_carried = || {
            let id = self.row.as_ref().map(|(_, row)| &row.uniqueid)?;
            self.archive.carried_body(id, &body.0).ok()?
        };
        bodies::missing(&self.archive.objects, [*body].into_iter()).is_ok_and(|missing| missing.is_empty())
            || is_carried().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_root_counts() {
        let roots = ["user.u1", "user.u1.Work", "dom.test!", "dom.test!user.u3"];
        let roots = roots.map(|root| (QuotaRoot::from(root), QuotaLimits::default())).into();
        let check = |name: &str, header: Option<&str>, expected: &str| {
            let found = quota_root(&roots, &name.into(), header.map(QuotaRoot::from))
                .map(|root| root.to_string())
                .unwrap_or_default();
            assert_eq!(found, expected, "{name}");
        };
        check("user.u1", None, "user.u1");
        check("user.u1.Work.Sub", None, "user.u1.Work");
        check("user.u1.Workshop", None, "user.u1");
        check("user.u10", None, "");
        check("user.u1.Projects", Some("user.u1.Work"), "user.u1.Work");
        check("user.u1.Projects", Some("user.u1.Gone"), "user.u1");
        check("user.u1.Work", Some("user.u1"), "user.u1.Work");
        check("dom.test!user.u4", None, "dom.test!");
        check("dom.test!user.u3.Sent", None, "dom.test!user.u3");
    }
}
