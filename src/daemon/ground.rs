//! What the daemon stands on: room for its state, a state that can be written, a clock that runs.

use crate::state::Health;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};
use tracing::warn;

/// Shown of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GroundStatus {
    /// Free for our user on the file system of the state directory.
    pub free_bytes: Option<u64>,
    /// Why receipts are in memory only.
    pub state_trouble: Option<String>,
    /// The wall clock was set: by so many seconds, so many seconds ago.
    pub clock_jump_seconds: Option<i64>,
    pub clock_jumped_ago_seconds: Option<u64>,
}

/// Below this there is soon no room for receipts; below that there is none.
pub(super) const LITTLE_ROOM: u64 = 256 << 20;
pub(super) const NO_ROOM: u64 = 32 << 20;
/// A clock that is kept right goes faster or slower, and does not jump so far.
const JUMP: Duration = Duration::from_secs(5);
/// It is told for so long.
const TOLD_FOR: Duration = Duration::from_secs(3600);

/// Compares the wall clock with the one that nobody sets.
#[derive(Default)]
pub(super) struct Clock {
    before: Option<(Instant, SystemTime)>,
    jumped: Option<(i64, Instant)>,
}

impl Clock {
    /// Once a second; says by how much it has just jumped.
    pub(super) fn look(&mut self, now: Instant, wall: SystemTime) -> Option<i64> {
        let (then, wall_then) = self.before.replace((now, wall))?;
        let passed = now.duration_since(then).as_secs_f64();
        let told = match wall.duration_since(wall_then) {
            Ok(forward) => forward.as_secs_f64(),
            Err(backward) => -backward.duration().as_secs_f64(),
        };
        let jump = told - passed;
        if jump.abs() < JUMP.as_secs_f64() {
            return None;
        }
        // Several small steps within one correction count together.
        let earlier = self.jumped.filter(|(_, at)| now.duration_since(*at) < TOLD_FOR).map_or(0, |(jump, _)| jump);
        self.jumped = Some((earlier + jump.round() as i64, now));
        Some(jump.round() as i64)
    }

    fn shown(&self, now: Instant) -> Option<(i64, u64)> {
        let (jump, at) = self.jumped?;
        let ago = now.duration_since(at);
        (ago < TOLD_FOR).then_some((jump, ago.as_secs()))
    }
}

/// Looked at once a second.
#[derive(Default)]
pub(super) struct Ground {
    clock: Clock,
    free_bytes: Option<u64>,
    short: bool,
}

impl Ground {
    pub(super) fn look(&mut self, state: &Path) {
        if let Some(seconds) = self.clock.look(Instant::now(), SystemTime::now()) {
            warn!(seconds, "the clock was set; lags and delays go on by another one");
        }
        let stat = nix::sys::statvfs::statvfs(state).ok();
        self.free_bytes = stat.map(|stat| stat.blocks_available() * stat.fragment_size());
        let short = self.free_bytes.is_some_and(|free| free < LITTLE_ROOM);
        if short && !self.short {
            warn!(path = %state.display(), free_bytes = self.free_bytes, "little room is left for the state");
        }
        self.short = short;
    }

    pub(super) fn shown(&self, state: &Health) -> GroundStatus {
        let jump = self.clock.shown(Instant::now());
        GroundStatus {
            free_bytes: self.free_bytes,
            state_trouble: state.trouble(),
            clock_jump_seconds: jump.map(|(jump, _)| jump),
            clock_jumped_ago_seconds: jump.map(|(_, ago)| ago),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_is_noticed_and_one_that_drifts_is_not() {
        let (start, wall) = (Instant::now(), SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000));
        let mut clock = Clock::default();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let shows = |seconds: f64| wall + Duration::from_secs_f64(seconds);
        assert_eq!(clock.look(after(0), shows(0.0)), None);
        assert_eq!(clock.look(after(1), shows(1.2)), None);
        // Asleep for an hour: both clocks agree.
        assert_eq!(clock.look(after(3601), shows(3600.9)), None);
        assert_eq!(clock.look(after(3602), shows(7201.9)), Some(3600));
        assert_eq!(clock.shown(after(3603)), Some((3600, 1)));
        assert_eq!(clock.look(after(3604), shows(3.9)), Some(-7200));
        assert_eq!(clock.shown(after(3604)), Some((-3600, 0)));
        assert_eq!(clock.look(after(3605), shows(4.9)), None);
        assert_eq!(clock.shown(after(9000)), None);
    }
}
