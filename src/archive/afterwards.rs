//! What is done for a mailbox after its update was confirmed: bodies that travelled with their records become objects of their own, and
//! superseded generations go. Until then they are safe where they are, and nobody publishes on top.

use crate::model::{MessageGuid, UniqueId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Mailboxes for which something is still being done.
#[derive(Default)]
pub(super) struct Afterwards {
    work: Mutex<Work>,
    done: Condvar,
}

#[derive(Default)]
struct Work {
    begun: u64,
    /// By when it was begun.
    all: BTreeMap<u64, OnItsWay>,
}

struct OnItsWay {
    id: UniqueId,
    /// These become objects of their own.
    bodies: BTreeSet<MessageGuid>,
}

/// Something is being done while this lives.
pub(super) struct Busy {
    afterwards: Arc<Afterwards>,
    number: u64,
}

impl Afterwards {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn begin(self: &Arc<Self>, id: &UniqueId, bodies: BTreeSet<MessageGuid>) -> Busy {
        let mut work = self.work();
        work.begun += 1;
        let number = work.begun;
        work.all.insert(number, OnItsWay { id: id.clone(), bodies });
        Busy { afterwards: self.clone(), number }
    }

    fn wait_while(&self, is_waited_for: impl Fn(&Work) -> bool) {
        let waited = self.done.wait_while(self.work(), |work| is_waited_for(work));
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits until nothing is being done for this mailbox.
    pub fn wait(&self, id: &UniqueId) {
        self.wait_while(|work| work.all.values().any(|busy| busy.id == *id));
    }

    /// Waits until none of these bodies is on its way: before somebody is told that it is not there.
    pub fn wait_for_bodies(&self, guids: &[MessageGuid]) {
        self.wait_while(|work| work.all.values().any(|busy| guids.iter().any(|guid| busy.bodies.contains(guid))));
    }

    /// Waits for all that has been begun; others may begin more for ever.
    pub fn wait_all(&self) {
        let begun = self.work().begun;
        self.wait_while(|work| work.all.first_key_value().is_some_and(|(first, _)| *first <= begun));
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.afterwards.work().all.remove(&self.number);
        self.afterwards.done.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_begun_is_waited_for() {
        let afterwards = Arc::new(Afterwards::default());
        let (one, two): (UniqueId, UniqueId) = ("id-1".into(), "id-2".into());
        let busy = afterwards.begin(&one, [MessageGuid([1; 20])].into());
        afterwards.wait(&two);
        afterwards.wait_for_bodies(&[MessageGuid([2; 20])]);
        std::thread::scope(|scope| {
            let wait = scope.spawn(|| afterwards.wait(&one));
            let wait_for_bodies = scope.spawn(|| afterwards.wait_for_bodies(&[MessageGuid([1; 20])]));
            let wait_all = scope.spawn(|| afterwards.wait_all());
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!wait.is_finished() && !wait_all.is_finished() && !wait_for_bodies.is_finished());
            let later = afterwards.begin(&two, BTreeSet::new());
            drop(busy);
            wait.join().expect("ends");
            wait_for_bodies.join().expect("ends");
            wait_all.join().expect("ends");
            drop(later);
        });
        afterwards.wait_all();
    }
}
