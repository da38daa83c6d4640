//! How long changes take, stage by stage, always counted from the kernel's notice.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Upper bounds of the histograms, in seconds.
const BOUNDS: [f64; 14] = [0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0, 300.0, 3600.0];
/// So many of the last ones are kept for the percentiles.
const RECENT: usize = 4096;

/// How far a change has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It stands in the queue.
    Seen,
    /// The source has been read and compared.
    Read,
    /// All of it is handed to the network.
    Sent,
    /// The replica has confirmed it.
    Confirmed,
}

const STAGES: [(Stage, &str); 4] =
    [(Stage::Seen, "seen"), (Stage::Read, "read"), (Stage::Sent, "sent"), (Stage::Confirmed, "confirmed")];

/// One stage as it is shown.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StageLag {
    pub stage: String,
    pub count: u64,
    pub sum_seconds: f64,
    /// The upper bound in seconds, and how many were not slower.
    pub buckets: Vec<(f64, u64)>,
}

#[derive(Clone, Copy, Default)]
struct Histogram {
    count: u64,
    sum: Duration,
    buckets: [u64; BOUNDS.len()],
}

impl Histogram {
    fn add(&mut self, lag: Duration) {
        self.count += 1;
        self.sum = self.sum.saturating_add(lag);
        for (bucket, bound) in self.buckets.iter_mut().zip(BOUNDS) {
            *bucket += u64::from(lag.as_secs_f64() <= bound);
        }
    }
}

#[derive(Default)]
pub(super) struct Lags {
    stages: [Histogram; STAGES.len()],
    recent: VecDeque<Duration>,
}

/// When one item passed its stages.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Passed {
    pub read_at: Option<Instant>,
    pub sent_at: Option<Instant>,
}

impl Lags {
    pub(super) fn add(&mut self, stage: Stage, lag: Duration) {
        if let Some(at) = STAGES.iter().position(|(other, _)| *other == stage)
            && let Some(histogram) = self.stages.get_mut(at)
        {
            histogram.add(lag);
        }
        if stage == Stage::Confirmed {
            if self.recent.len() >= RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back(lag);
        }
    }

    /// An item that was seen at this moment is confirmed now.
    pub(super) fn confirmed(&mut self, seen_at: Instant, passed: Passed, now: Instant) {
        let read_at = passed.read_at.unwrap_or(now);
        // Where nobody knows when it was sent, it was not later than confirmed.
        let sent_at = passed.sent_at.filter(|at| *at >= read_at).unwrap_or(now);
        for (stage, at) in [(Stage::Read, read_at), (Stage::Sent, sent_at), (Stage::Confirmed, now)] {
            self.add(stage, at.saturating_duration_since(seen_at));
        }
    }

    pub(super) fn shown(&self) -> Vec<StageLag> {
        let one = |((_, name), histogram): (&(Stage, &str), &Histogram)| StageLag {
            stage: (*name).to_owned(),
            count: histogram.count,
            sum_seconds: histogram.sum.as_secs_f64(),
            buckets: BOUNDS.into_iter().zip(histogram.buckets).collect(),
        };
        STAGES.iter().zip(&self.stages).map(one).collect()
    }

    /// Of the last confirmed ones.
    pub(super) fn percentiles<const N: usize>(&self, shares: [f64; N]) -> [f64; N] {
        let mut recent: Vec<Duration> = self.recent.iter().copied().collect();
        recent.sort_unstable();
        shares.map(|share| {
            let index = (recent.len() as f64 * share) as usize;
            recent.get(index.min(recent.len().saturating_sub(1))).map_or(0.0, Duration::as_secs_f64)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_counts_from_the_notice() {
        let seen_at = Instant::now();
        let after = |millis| seen_at + Duration::from_millis(millis);
        let mut lags = Lags::default();
        lags.add(Stage::Seen, Duration::from_millis(3));
        lags.confirmed(seen_at, Passed { read_at: Some(after(8)), sent_at: Some(after(90)) }, after(400));
        // Nothing is known of the way there.
        lags.confirmed(seen_at, Passed::default(), after(2000));
        let shown = lags.shown();
        let upto = |stage: usize, bound: f64| {
            shown[stage].buckets.iter().find(|(upper, _)| *upper == bound).map(|(_, count)| *count).expect("a bound")
        };
        assert_eq!(
            shown.iter().map(|one| one.stage.as_str()).collect::<Vec<_>>(),
            ["seen", "read", "sent", "confirmed"]
        );
        assert_eq!(shown.iter().map(|one| one.count).collect::<Vec<_>>(), [1, 2, 2, 2]);
        assert_eq!((upto(0, 0.005), upto(1, 0.005), upto(1, 0.01)), (1, 0, 1));
        assert_eq!((upto(2, 0.05), upto(2, 0.1), upto(3, 0.25), upto(3, 0.5), upto(3, 2.5)), (0, 1, 0, 1, 2));
        assert!((shown[3].sum_seconds - 2.4).abs() < 1e-9);
        assert_eq!(lags.percentiles([0.0, 0.99]), [0.4, 2.0]);
    }
}
