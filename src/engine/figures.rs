//! Figures of one replica.

use super::fuse::FUSE;
use super::{Failure, Lane, QueueStats, Shared, StageLag, lock};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;

/// Figures of one replica.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ReplicaStats {
    pub replica: String,
    pub sessions: u64,
    #[serde(flatten)]
    pub queue: QueueStats,
    pub confirmed_total: u64,
    pub lag_p50_seconds: f64,
    pub lag_p99_seconds: f64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub mailboxes: usize,
    pub fatal: Option<String>,
    /// Why removals are stopped.
    pub fuse: Option<String>,
    /// Mailboxes that are gone at the source and stay here for a while (`removal_delay_seconds`).
    #[serde(default)]
    pub removals_waiting: usize,
    #[serde(default)]
    pub next_removal_seconds: Option<f64>,
    /// Changes on the replica that did not come from here.
    #[serde(default)]
    pub meddled: Meddled,
    /// What was sent before compression, where sessions are compressed.
    #[serde(default)]
    pub compressed: Option<Compressed>,
    /// How long changes took to each stage.
    #[serde(default)]
    pub stages: Vec<StageLag>,
}

/// Bytes sent in compressed sessions.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Compressed {
    pub plain_bytes: u64,
    pub sent_bytes: u64,
}

/// What was found on a replica that nobody here has done.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Meddled {
    /// Times that a mailbox there was not what the replica had confirmed.
    pub count: u64,
    /// The last one, and when (seconds since 1970).
    pub mailbox: String,
    pub at: u64,
}

impl Shared {
    /// With what the list names and nobody can replicate.
    pub(super) fn queue_stats(&self) -> QueueStats {
        let mut stats = self.queue.stats();
        let source = lock(&self.source).clone();
        stats.failed.extend(source.unreadable.iter().map(|left_out| Failure {
            lane: Lane::of(&left_out.name, self.store.deleted_prefix()).to_string(),
            item: "list".into(),
            mailbox: Some(left_out.name.to_string()),
            reason: left_out.reason.clone(),
            tries: 0,
            quarantined: true,
            next_try_seconds: None,
        }));
        let left_out = source.unreadable.len();
        stats.failed_total += left_out;
        stats.quarantined += left_out;
        stats
    }

    pub(super) fn stats(&self) -> ReplicaStats {
        let (stages, [lag_p50_seconds, lag_p99_seconds]) = {
            let lags = lock(&self.lags);
            (lags.shown(), lags.percentiles([0.5, 0.99]))
        };
        let (removals_waiting, next_removal_seconds) = self.waits.shown();
        let queue = self.queue_stats();
        let fuse = queue.failed.iter().find(|failure| failure.reason.starts_with(FUSE));
        ReplicaStats {
            replica: self.target.name(),
            sessions: self.connected.load(Ordering::Relaxed),
            fuse: fuse.map(|failure| failure.reason.clone()),
            removals_waiting,
            next_removal_seconds,
            meddled: lock(&self.meddled).clone(),
            compressed: Some(*lock(&self.compressed)).filter(|both| both.plain_bytes > 0),
            queue,
            confirmed_total: stages.last().map_or(0, |confirmed| confirmed.count),
            lag_p50_seconds,
            lag_p99_seconds,
            sent_bytes: self.traffic[0].load(Ordering::Relaxed),
            received_bytes: self.traffic[1].load(Ordering::Relaxed),
            mailboxes: self.names().len(),
            fatal: lock(&self.fatal).clone(),
            stages,
        }
    }
}
