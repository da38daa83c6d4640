//! No kernel, no log: everything is compared again and again. For stores that nothing else can watch, and as the last
//! source that is left.

use super::feed::{Control, Feed};
use super::ground::Ground;
use super::{CaptureError, Source, wait};
use crate::model::Scope;
use std::time::{Duration, Instant};

struct ScanSource {
    every: Duration,
}

pub(super) fn open(ground: &Ground) -> Result<Box<dyn Source>, CaptureError> {
    Ok(Box::new(ScanSource { every: ground.scan_every }))
}

impl Source for ScanSource {
    fn run(&mut self, feed: &mut Feed, control: &Control) -> Result<(), CaptureError> {
        feed.armed(control);
        let mut next = Instant::now() + self.every;
        loop {
            let wake_at = feed.next_deadline().map_or(next, |deadline| deadline.min(next));
            wait(control, None, Some(wake_at))?;
            let orders = control.take();
            let now = Instant::now();
            // Nobody can know what changed: whoever asks for all gets a comparison of all.
            if now >= next || orders.wants_all() {
                feed.lost(Scope::Everything, now);
                feed.looked_until(now);
                next = now + self.every;
            }
            if feed.round_done(orders, now) {
                return Ok(());
            }
        }
    }
}
