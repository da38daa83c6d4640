//! Whether every room still gets something done. A room that does not is named, and systemd is told nothing any more, so
//! that it restarts us.

use super::{Running, systemd};
use crate::model::Pulse;
use crate::model::pulse::Doing;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use tracing::error;

/// A room that does not move.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Wedged {
    pub room: String,
    /// For so long; nothing, when its thread has ended.
    pub seconds: Option<u64>,
}

/// A room that gets nothing done for so long is wedged, where systemd does not say how often it wants to hear of us.
const LONGEST: Duration = Duration::from_secs(30);

/// What was seen of the rooms before.
pub(super) struct Rooms {
    limit: Duration,
    /// Beats, and since when there were no more. By address: the rooms of a source that was replaced are other ones.
    seen: HashMap<usize, (Arc<Pulse>, u64, Instant)>,
    /// The router was asked for a sign of life that comes behind all that it was told before.
    asked: Option<(Receiver<()>, Instant)>,
    /// When capture gave out all it had.
    captured: Option<Instant>,
    told: Vec<Wedged>,
}

impl Rooms {
    pub(super) fn new() -> Self {
        let limit = systemd::watchdog().map_or(LONGEST, |every| every / 2);
        Self { limit, seen: HashMap::new(), asked: None, captured: None, told: Vec::new() }
    }

    /// Who is wedged now.
    pub(super) fn wedged(&self) -> &[Wedged] {
        &self.told
    }

    /// Once a second.
    pub(super) fn look(&mut self, running: &Running, more: &[Arc<Pulse>]) {
        let now = Instant::now();
        let mut wedged = Vec::new();
        let pulses: Vec<Arc<Pulse>> = running
            .engine
            .pulses()
            .iter()
            .cloned()
            .chain(running.capture.pulses())
            .chain(more.iter().cloned())
            .collect();
        self.seen.retain(|_, (pulse, ..)| pulses.iter().any(|other| Arc::ptr_eq(pulse, other)));
        for pulse in pulses {
            let (beats, doing) = pulse.look();
            let key = Arc::as_ptr(&pulse) as usize;
            let (_, before, since) = self.seen.entry(key).or_insert_with(|| (pulse.clone(), beats, now));
            if *before != beats || doing != Doing::Working {
                (*before, *since) = (beats, now);
            }
            let quiet = now.duration_since(*since);
            let room = pulse.room().to_owned();
            match doing {
                Doing::Dead => wedged.push(Wedged { room, seconds: None }),
                _ if quiet > self.limit => wedged.push(Wedged { room, seconds: Some(quiet.as_secs()) }),
                _ => {}
            }
        }
        let mut add = |room: &str, quiet: Duration| {
            if quiet > self.limit && !wedged.iter().any(|other| other.room.starts_with(room)) {
                wedged.push(Wedged { room: room.to_owned(), seconds: Some(quiet.as_secs()) });
            }
        };
        // They move; do they also get through what they were given?
        let quick = running.capture.stats().sources.iter().all(|source| source.source.contains("notify"));
        let captured = self.captured.get_or_insert(now);
        // Only what is driven by events answers at once; a scan takes as long as it takes.
        if !quick || running.capture.drain(now + Duration::from_millis(100)) {
            *captured = now;
        }
        add("capture", now.duration_since(*captured));
        if self.asked.as_ref().is_none_or(|(answer, _)| super::serve::is_over(answer)) {
            self.asked = Some((running.engine.begin_flush(), now));
        }
        if let Some((_, at)) = self.asked.as_mut() {
            if running.engine.scan_progress().is_some() {
                *at = now;
            }
            add("router", now.duration_since(*at));
        }
        for one in &wedged {
            if !self.told.iter().any(|old| old.room == one.room) {
                error!(room = one.room, "does not get on any more; waiting to be restarted");
            }
        }
        self.told = wedged;
    }
}
