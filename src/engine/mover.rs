//! What a move of a user from some replicas to another needs of the engine: fill, look whether it is quiet, compare, and
//! take away what is certainly elsewhere. When each may happen is decided by whoever keeps the book of moves.

use super::fuse::FUSE;
use super::push::{JobError, NoBodies};
use super::queue::{Item, Lane};
use super::verify::{Depth, Extent, VerifyError, verify};
use super::{Engine, Shared};
use crate::model::{MboxName, QuotaRoot, Replica, ReplicaError, Step, StoreError, UniqueId, UserId};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

/// Why a move does not go on. Everything is tried again; nothing is lost meanwhile.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{0}")]
    Replica(#[from] ReplicaError),
    /// Somebody has to do something.
    #[error("{0}")]
    Refused(String),
}

impl From<JobError> for MoveError {
    fn from(error: JobError) -> Self {
        match error {
            JobError::Store(error) => Self::Store(error),
            JobError::Replica(error) => Self::Replica(error),
            other => Self::Refused(other.to_string()),
        }
    }
}

impl From<VerifyError> for MoveError {
    fn from(error: VerifyError) -> Self {
        match error {
            VerifyError::Store(error) => Self::Store(error),
            VerifyError::Replica(error) => Self::Replica(error),
        }
    }
}

/// The replicas of an engine; outlives borrows of it.
#[derive(Clone)]
pub struct Mover {
    replicas: Vec<Arc<Shared>>,
}

impl Engine {
    pub fn mover(&self) -> Mover {
        Mover { replicas: self.replicas.clone() }
    }

    /// A replica is to have this user.
    pub fn has(&self, replica: &str, user: &str) -> bool {
        let lane = Lane::User(UserId::from(user));
        self.replicas.iter().any(|shared| shared.target.name() == replica && shared.wants(&lane))
    }
}

impl Mover {
    /// Names of the replicas.
    pub fn names(&self) -> Vec<String> {
        self.replicas.iter().map(|shared| shared.target.name()).collect()
    }

    /// The source has such a user.
    pub fn knows(&self, user: &UserId) -> bool {
        let source = self.replicas.first().and_then(|shared| shared.source().ok());
        source.is_some_and(|source| source.by_name(&user.inbox()).is_some())
    }

    fn replica(&self, name: &str) -> Result<&Shared, MoveError> {
        let found = self.replicas.iter().find(|shared| shared.target.name() == name);
        found
            .map(|shared| &**shared)
            .ok_or_else(|| MoveError::Refused(format!("{name} is no replica of ours any more")))
    }

    /// The replica gets all of a user.
    pub fn fill(&self, name: &str, user: &UserId) -> Result<(), MoveError> {
        self.replica(name)?.push(Lane::User(user.clone()), Item::Compare, Instant::now(), false);
        Ok(())
    }

    /// What of the user has failed, waits or runs there, if anything does.
    pub fn open_work(&self, name: &str, user: &UserId) -> Result<Option<String>, MoveError> {
        Ok(self.replica(name)?.queue.open_work(&Lane::User(user.clone())))
    }

    /// The first thing that the replica has otherwise than the source.
    pub fn difference(&self, name: &str, user: &UserId) -> Result<Option<String>, MoveError> {
        let shared = self.replica(name)?;
        let mut session = shared.target.open()?;
        let lanes = [Lane::User(user.clone())];
        let caps = shared.target.capabilities();
        // Every record: what is equal here is what allows the other side to be emptied.
        let extent = Extent { lanes: Some(&lanes), depth: Depth::Records, rate: None };
        let report = verify(&*shared.store, &mut *session, &caps, Some(&shared.state), extent, &mut |_, _| {});
        session.close();
        let report = report?;
        if report.mailboxes == 0 {
            return Err(MoveError::Refused(format!("the source has no mailbox of {user}")));
        }
        let differs = report.differences.first().map(|one| format!("{}: {}", one.object, one.what));
        Ok(differs.or_else(|| report.unreadable.first().map(|(object, why)| format!("{object}: {why}"))))
    }

    /// Removes a user from one replica. Each mailbox has to be in the source's list and on the `keeper` under its
    /// uniqueid, which is looked at twice; if there is one more here, nothing at all is removed.
    pub fn take_away(&self, name: &str, user: &UserId, keeper: &str) -> Result<usize, MoveError> {
        let (shared, keeper) = (self.replica(name)?, self.replica(keeper)?);
        let source = shared.source_again()?;
        if source.by_name(&user.inbox()).is_none() {
            return Err(MoveError::Refused(format!("{FUSE}: the source has no INBOX of {user}; nothing is removed")));
        }
        if let Some(row) = source.unreadable.first() {
            return Err(MoveError::Refused(format!("nothing is removed while the source's list has a bad row: {row}")));
        }
        shared.vanish_fuse(user, &source)?;
        let (mut here, mut there) = (shared.target.open()?, keeper.target.open()?);
        let result = Self::empty(shared, &mut *here, &mut *there, user, &|id| source.by_id(id).is_some());
        here.close();
        there.close();
        result
    }

    fn empty(
        shared: &Shared,
        here: &mut dyn Replica,
        there: &mut dyn Replica,
        user: &UserId,
        in_source: &dyn Fn(&UniqueId) -> bool,
    ) -> Result<usize, MoveError> {
        let view = here.view_user(user)?;
        let kept: HashSet<UniqueId> =
            there.view_user(user)?.mailboxes.into_iter().map(|view| view.head.uniqueid).collect();
        let is_safe = |id: &UniqueId| in_source(id) && kept.contains(id);
        let mut mailboxes: Vec<(UniqueId, MboxName)> = Vec::new();
        for view in view.mailboxes {
            let head = view.head;
            if !is_safe(&head.uniqueid) && !head.mbtype.is_intermediate() {
                return Err(MoveError::Refused(format!(
                    "{} is on {} only; nothing of {user} is removed there until somebody has looked after it",
                    head.name,
                    shared.target.name()
                )));
            }
            mailboxes.push((head.uniqueid, head.name));
        }
        // The INBOX last, with it goes what hangs on it; children before their parents.
        mailboxes.sort_by(|a, b| (a.1.is_inbox(), &b.1).cmp(&(b.1.is_inbox(), &a.1)));
        let mut apply = |step: Step| match here.apply(&step, &NoBodies) {
            Ok(()) | Err(ReplicaError::NoSuchMailbox(_)) => {
                (shared.events)(&super::Event::Applied(&step));
                Ok(())
            }
            Err(error) => Err(MoveError::from(error)),
        };
        let user_of = || user.clone();
        if view.meta.active.is_some() {
            apply(Step::SieveDeactivate { user: user_of() })?;
        }
        for name in view.meta.sieve.into_keys() {
            apply(Step::SieveRemove { user: user_of(), name })?;
        }
        for name in view.meta.subs {
            apply(Step::Unsubscribe { user: user_of(), name })?;
        }
        let count = mailboxes.len();
        for (uniqueid, name) in mailboxes {
            // The second look: it is there now, under the name it has at the source.
            let still = there.view_mailboxes(std::slice::from_ref(&name))?;
            if !still.iter().any(|view| view.head.uniqueid == uniqueid) && in_source(&uniqueid) {
                return Err(MoveError::Refused(format!("{name} is not on the new replica under that name just now")));
            }
            shared.fuse(&name)?;
            apply(Step::Remove { uniqueid: uniqueid.clone(), name })?;
            shared.names().remove(&uniqueid);
            shared.state.remove_mailbox(&uniqueid);
        }
        let roots: Vec<QuotaRoot> = view.quotas.into_keys().collect();
        for root in roots {
            apply(Step::Unquota { root: root.clone() })?;
            shared.state.remove_quota(&root);
        }
        let lane = Lane::User(user.clone());
        shared.state.remove_user(user);
        shared.state.unset_primed(&lane.to_string());
        let left = here.view_user(user)?.mailboxes;
        if let Some(left) = left.iter().find(|view| !view.head.mbtype.is_intermediate()) {
            return Err(MoveError::Refused(format!("{} is still there after it was removed", left.head.name)));
        }
        // Receipts of what was removed before we died.
        let stale: Vec<UniqueId> = {
            let names = shared.names();
            names.in_lane(&lane).iter().filter_map(|name| names.id(name).cloned()).collect()
        };
        for id in stale {
            shared.names().remove(&id);
            shared.state.remove_mailbox(&id);
        }
        shared.state.flush();
        Ok(count)
    }
}
