//! The moment up to which a replica has everything, by proof and not by silence.

use super::Running;
use crate::engine::ReplicaStats;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Three steps have to be proven: capture has handed on all that changed before a moment (its cookies), the router has
/// made items of that (its answer comes behind it), and no item is open that was seen before.
#[derive(Default)]
pub(super) struct CaughtUp {
    asked: Option<(Receiver<()>, Instant)>,
    routed: Option<Instant>,
}

impl CaughtUp {
    /// Once a second.
    pub(super) fn tick(&mut self, running: &Running) {
        match self.asked.take() {
            Some((answer, moment)) => match answer.try_recv() {
                Ok(()) | Err(TryRecvError::Disconnected) => self.routed = Some(moment),
                Err(TryRecvError::Empty) => self.asked = Some((answer, moment)),
            },
            None => self.ask(running),
        }
        if self.asked.is_none() {
            self.ask(running);
        }
        running.capture.prove();
    }

    fn ask(&mut self, running: &Running) {
        self.asked = running.capture.seen_until().map(|moment| (running.engine.begin_flush(), moment));
    }

    /// Seconds since 1970; `None` before the first proof.
    pub(super) fn at(&self, stats: &ReplicaStats) -> Option<u64> {
        let open = Duration::try_from_secs_f64(stats.queue.oldest_seconds).unwrap_or_default();
        let age = self.routed?.elapsed().max(open);
        let at = SystemTime::now().checked_sub(age)?;
        at.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs())
    }
}
