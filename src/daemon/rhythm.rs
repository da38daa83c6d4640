//! How often the daemon looks at itself: every second while something goes on, seldom while nothing does. A machine that
//! has nothing to do is to be left alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

const LIVELY: Duration = Duration::from_secs(1);
/// So many looks that showed nothing new, and we rest.
const UNCHANGED: u32 = 10;
/// Between two looks while we rest, unless systemd wants to hear of us more often.
pub(super) const RESTING: Duration = Duration::from_secs(5);

/// Ends a rest at once. For whoever sees that something goes on; costs next to nothing while we do not rest.
#[derive(Clone, Default)]
pub(super) struct Stir(Arc<Rest>);

#[derive(Default)]
struct Rest {
    resting: AtomicBool,
    over: Notify,
}

impl Stir {
    pub fn stir(&self) {
        if self.0.resting.load(Relaxed) && self.0.resting.swap(false, Relaxed) {
            self.0.over.notify_one();
        }
    }
}

pub(super) struct Rhythm {
    stir: Stir,
    longest: Duration,
    unchanged: u32,
    next: Instant,
}

impl Rhythm {
    pub fn new(stir: Stir, longest: Duration) -> Self {
        Self { stir, longest, unchanged: 0, next: Instant::now() }
    }

    /// Returns when it is time to look. May be given up and asked again.
    pub async fn due(&self) {
        tokio::select! {
            () = tokio::time::sleep_until(self.next) => {}
            () = self.stir.0.over.notified() => {}
        }
    }

    /// Looked just now; what was seen had changed, or had not.
    pub fn looked(&mut self, changed: bool) {
        let stirred = self.unchanged >= UNCHANGED && !self.stir.0.resting.load(Relaxed);
        self.unchanged = if changed || stirred { 0 } else { self.unchanged.saturating_add(1) };
        let rests = self.unchanged >= UNCHANGED;
        self.stir.0.resting.store(rests, Relaxed);
        self.next = Instant::now() + if rests { self.longest.max(LIVELY) } else { LIVELY };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rests_when_nothing_changes_and_is_stirred_at_once() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("runtime").block_on(async {
            let stir = Stir::default();
            let mut rhythm = Rhythm::new(stir.clone(), RESTING);
            let waited = async |rhythm: &Rhythm| {
                let since = Instant::now();
                rhythm.due().await;
                since.elapsed()
            };
            assert_eq!(waited(&rhythm).await, Duration::ZERO);
            for _ in 0..UNCHANGED - 1 {
                rhythm.looked(false);
                assert_eq!(waited(&rhythm).await, LIVELY);
            }
            // One change, and it begins again.
            rhythm.looked(true);
            assert_eq!(waited(&rhythm).await, LIVELY);
            for _ in 0..UNCHANGED {
                rhythm.looked(false);
            }
            assert_eq!(waited(&rhythm).await, RESTING);
            rhythm.looked(false);
            stir.stir();
            stir.stir();
            assert_eq!(waited(&rhythm).await, Duration::ZERO);
            // What stirred may show only later.
            for _ in 0..UNCHANGED {
                rhythm.looked(false);
                assert_eq!(waited(&rhythm).await, LIVELY);
            }
            rhythm.looked(false);
            assert_eq!(waited(&rhythm).await, RESTING);
        });
    }
}
