//! Removals that wait. Where an admin wants it so, a mailbox that the source has no more stays on the replica for some
//! time: noted down when it was first missed, and taken away when the time is over, or kept if the source has it again.

use super::queue::{Item, Lane};
use super::{Shared, lock};
use crate::model::{MboxName, UniqueId};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What waits, and until when. By a clock that nobody sets: whoever sets the other one hastens nothing.
#[derive(Default)]
pub(super) struct Waits(Mutex<BTreeMap<UniqueId, Wait>>);

struct Wait {
    lane: Lane,
    due: Instant,
    /// It is among the items by now, and its own affair.
    is_queued: bool,
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Waits {
    /// How many, and how long until the first is due.
    pub(super) fn shown(&self) -> (usize, Option<f64>) {
        let waits = lock(&self.0);
        let first = waits.values().map(|wait| wait.due.saturating_duration_since(Instant::now()).as_secs_f64());
        (waits.len(), first.reduce(f64::min))
    }
}

impl Shared {
    /// What waited when those before us ended. How long it has waited is told by the wall clock; no longer than the whole
    /// time remains in any case.
    pub(super) fn inherit_waits(&self) {
        for (id, since) in self.state.removals() {
            let Some(name) = self.names().name(&id).cloned() else {
                self.state.remove_removal(&id);
                continue;
            };
            let waited = Duration::from_secs(unix_now().saturating_sub(since));
            let due = Instant::now() + self.removal_delay.saturating_sub(waited);
            let lane = Lane::of(&name, self.store.deleted_prefix());
            lock(&self.waits.0).insert(id, Wait { lane, due, is_queued: false });
        }
    }

    /// Whether the removal of this mailbox has to wait still; notes down since when.
    pub(super) fn has_to_wait(&self, id: &UniqueId, name: &MboxName) -> bool {
        if self.removal_delay.is_zero() || self.dry_run {
            return false;
        }
        let mut waits = lock(&self.waits.0);
        let now = Instant::now();
        let wait = waits.entry(id.clone()).or_insert_with(|| {
            self.state.put_removal(id, unix_now());
            let lane = Lane::of(name, self.store.deleted_prefix());
            Wait { lane, due: now + self.removal_delay, is_queued: false }
        });
        now < wait.due
    }

    /// It is removed, or the source has it again.
    pub(super) fn waits_no_more(&self, id: &UniqueId) {
        if lock(&self.waits.0).remove(id).is_some() {
            self.state.remove_removal(id);
        }
    }

    /// Queues what has waited long enough, and says when more will have.
    pub(super) fn waits_due(&self) -> Option<Instant> {
        let now = Instant::now();
        let mut waits = lock(&self.waits.0);
        let mut due = Vec::new();
        for (id, wait) in waits.iter_mut().filter(|(_, wait)| wait.due <= now && !wait.is_queued) {
            wait.is_queued = true;
            due.push((wait.lane.clone(), Item::Mailbox(id.clone())));
        }
        let next = waits.values().map(|wait| wait.due).filter(|due| *due > now).min();
        drop(waits);
        // Whatever stops it (a fuse, a replica that is gone) is told and tried again like everything else.
        due.into_iter().for_each(|(lane, item)| self.push(lane, item, now, false));
        next
    }
}

#[cfg(test)]
#[path = "patience_tests.rs"]
mod tests;
