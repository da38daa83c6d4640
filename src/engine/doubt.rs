//! Lanes whose replica may change behind our back. A server carries out what it has read of a session, also when the session
//! was cut or its client killed: a lane that was at work then is looked at again, some moments later and some time later.

use super::queue::Lane;
use crate::state::Slot;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long after a loss its lanes are looked at. A request is over in milliseconds, unless somebody holds the mailbox.
const LOOKS: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(10), Duration::from_secs(60)];

#[derive(Default)]
pub(super) struct Doubts(Mutex<HashMap<Lane, Doubt>>);

struct Doubt {
    since: Instant,
    looked: usize,
    /// Gives the lane back when the last look was ordered.
    _slot: Option<Slot>,
}

impl Doubt {
    fn due(&self) -> Option<Instant> {
        LOOKS.get(self.looked).map(|after| self.since + *after)
    }
}

impl Doubts {
    fn lock(&self) -> MutexGuard<'_, HashMap<Lane, Doubt>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, lane: Lane, slot: Option<Slot>, since: Instant) {
        self.lock().insert(lane, Doubt { since, looked: 0, _slot: slot });
    }

    /// Lanes to be looked at now.
    pub fn due(&self, now: Instant) -> Vec<Lane> {
        let mut doubts = self.lock();
        let due: Vec<Lane> = doubts
            .iter_mut()
            .filter(|(_, doubt)| doubt.due().is_some_and(|at| at <= now))
            .map(|(lane, doubt)| {
                doubt.looked += 1;
                lane.clone()
            })
            .collect();
        doubts.retain(|_, doubt| doubt.due().is_some());
        due
    }

    /// What the replica has in this lane may be ours without our knowing.
    pub fn is_in(&self, lane: &Lane) -> bool {
        self.lock().contains_key(lane)
    }

    /// When the next look is due.
    pub fn next(&self) -> Option<Instant> {
        self.lock().values().filter_map(Doubt::due).min()
    }
}

impl Drop for Doubts {
    /// What is in doubt at our end is in doubt for those after us.
    fn drop(&mut self) {
        for doubt in self.lock().drain().map(|(_, doubt)| doubt) {
            if let Some(slot) = doubt._slot {
                slot.keep();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_looked_at_three_times_and_a_new_loss_begins_anew() {
        let doubts = Doubts::default();
        let (lane, start) = (Lane::Server, Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        doubts.add(lane.clone(), None, start);
        assert_eq!((doubts.due(start), doubts.next()), (vec![], Some(at(1))));
        assert_eq!((doubts.due(at(2)), doubts.next()), (vec![lane.clone()], Some(at(10))));
        doubts.add(lane.clone(), None, at(5));
        for second in [6, 15, 65] {
            assert_eq!((doubts.due(at(second - 1)), doubts.due(at(second))), (vec![], vec![lane.clone()]), "{second}");
        }
        assert_eq!((doubts.due(at(1000)), doubts.next()), (vec![], None));
    }
}
