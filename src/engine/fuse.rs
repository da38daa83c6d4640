//! Too many removals in too short a time are an accident until somebody says otherwise.

use super::push::JobError;
use super::{Shared, lock};
use crate::model::{Listing, UniqueId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Removals within this time count together.
const FUSE_WINDOW: Duration = Duration::from_secs(600);
/// So many are never suspicious.
const FUSE_FREE: usize = 50;
/// So many mailboxes may vanish from the source's list at once and without a word.
const VANISH_FREE: usize = 10;
/// How a reason begins when the fuse stopped a removal.
pub(super) const FUSE: &str = "mass removal stopped";

/// The last list of which it was seen that it is the one we know.
pub(super) struct GoodList {
    listing: Arc<Listing>,
    /// So many of the replica's mailboxes are not in it, at most.
    vanished: usize,
    /// `ReplicaNames::added` at that time.
    added: usize,
}

impl Shared {
    pub(super) fn is_allowed(&self) -> bool {
        self.allow_removals || self.dry_run || lock(&self.allowed_until).is_some_and(|until| Instant::now() < until)
    }

    /// Counts a removal; too many in too short a time are an accident until somebody says otherwise.
    pub(super) fn fuse(&self, what: &dyn std::fmt::Display) -> Result<(), JobError> {
        if self.is_allowed() {
            return Ok(());
        }
        let now = Instant::now();
        let mut removals = lock(&self.removals);
        while removals.front().is_some_and(|at| now.duration_since(*at) > FUSE_WINDOW) {
            removals.pop_front();
        }
        let total = self.names().len() + removals.len();
        let limit = FUSE_FREE.max(total / 4);
        if removals.len() >= limit {
            return Err(JobError::Conflict(format!(
                "{FUSE}: {what} is kept on the replica, there were {} removals in the last {} minutes and the fuse \
                 allows {limit}; check the source, then say `spooltap allow`",
                removals.len(),
                FUSE_WINDOW.as_secs() / 60
            )));
        }
        removals.push_back(now);
        Ok(())
    }

    /// A list that lacks most of what it had, without one word of deletion (2.5 and later keep tombstones), is another
    /// list: cut, restored, or of another store. Nothing is concluded from such a one.
    pub(super) fn vanish_fuse(&self, what: &dyn std::fmt::Display, source: &Arc<Listing>) -> Result<(), JobError> {
        if self.is_allowed() {
            return Ok(());
        }
        // A list that was found good stays good for this replica: what it has only shrinks by removals.
        let mut good = lock(&self.good_list);
        if good.as_ref().is_some_and(|good| Arc::ptr_eq(&good.listing, source)) {
            return Ok(());
        }
        let names = self.names();
        let total = names.ours_len();
        let is_gone = |id: &UniqueId| source.by_id(id).is_none() && !source.is_tombstone(id);
        // From one good list to the next no more can have vanished than what is different, and what was made in between.
        let at_most = good.as_ref().map(|good| {
            let gone = source.since(&good.listing).filter(|(_, now)| now.is_none());
            let gone = gone.filter_map(|(before, _)| before).filter(|entry| is_gone(&entry.uniqueid)).count();
            good.vanished + gone + (names.added() - good.added)
        });
        let limit = VANISH_FREE.max(total / 2);
        let count = match at_most {
            Some(count) if count <= limit => count,
            _ => names.ours().filter(|id| is_gone(id)).count(),
        };
        let added = names.added();
        drop(names);
        if count > limit {
            return Err(JobError::Conflict(format!(
                "{FUSE}: {what} stays on the replica as it is, {count} of {total} mailboxes have vanished from the source's list; \
                 check the source, then say `spooltap allow`"
            )));
        }
        *good = Some(GoodList { listing: source.clone(), vanished: count, added });
        Ok(())
    }
}
