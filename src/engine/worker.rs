//! A thread with a session of its own: takes a lane at a time, and opens the session anew when it is lost.

use super::queue::{IdleTimeout, Job, Outcome};
use super::{Event, Shared, fence, lock, push, watched};
use crate::model::{ReplicaError, pulse};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The same trouble with a replica is told this often.
const TELL_AGAIN: Duration = Duration::from_secs(30);

pub(super) struct Worker {
    pub shared: Arc<Shared>,
    pub stopping: Arc<AtomicBool>,
    pub reconnect_most: Duration,
    pub stop_on_fatal: bool,
}

type Session = Box<dyn crate::model::Replica>;

/// Figures of a session that are in the sums already.
#[derive(Default)]
struct Counted {
    traffic: (u64, u64),
    compressed: (u64, u64),
}

impl Worker {
    pub fn run(&self) {
        let mut session: Option<Session> = None;
        let mut counted = Counted::default();
        loop {
            match self.shared.queue.take(self.shared.doubts_due()) {
                Ok(None) => break,
                Err(IdleTimeout) => {
                    if session.as_mut().is_some_and(|session| session.ping().is_err()) {
                        self.drop_session(&mut session);
                    }
                }
                Ok(Some(job)) => {
                    if session.is_none() {
                        session = self.connect();
                        counted = Counted::default();
                    }
                    self.work(job, &mut session);
                    self.count(&session, &mut counted);
                }
            }
        }
        if let Some(session) = session {
            self.shared.connected.fetch_sub(1, Ordering::Relaxed);
            session.close();
        }
    }

    fn count(&self, session: &Option<Session>, counted: &mut Counted) {
        if let Some(session) = session {
            let now = session.traffic();
            self.shared.traffic[0].fetch_add(now.0.saturating_sub(counted.traffic.0), Ordering::Relaxed);
            self.shared.traffic[1].fetch_add(now.1.saturating_sub(counted.traffic.1), Ordering::Relaxed);
            counted.traffic = now;
            if let Some((plain, sent)) = session.compression() {
                let mut sum = lock(&self.shared.compressed);
                sum.plain_bytes += plain.saturating_sub(counted.compressed.0);
                sum.sent_bytes += sent.saturating_sub(counted.compressed.1);
                counted.compressed = (plain, sent);
            }
        }
    }

    fn work(&self, mut job: Job, session: &mut Option<Session>) {
        job.slots.extend(self.shared.at_work(&job.lane).map(|slot| (job.lane.clone(), slot)));
        let (outcomes, lost) = match session {
            None => (job.items.drain(..).map(|(item, at)| (item, at, Outcome::Requeue, None)).collect(), None),
            Some(session) => push::Pusher::new(&self.shared, &mut **session).run(&mut job),
        };
        let slots = std::mem::take(&mut job.slots);
        if let Some(error) = lost {
            // What was sent may still be carried out, by a server process that does not know we are gone.
            let now = Instant::now();
            slots.into_iter().for_each(|(lane, slot)| self.shared.doubts.add(lane, Some(slot), now));
            self.trouble(&error, Duration::ZERO);
            self.drop_session(session);
        }
        self.shared.queue.finish(job, outcomes);
    }

    fn drop_session(&self, session: &mut Option<Session>) {
        if session.take().is_some() {
            self.shared.connected.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn trouble(&self, error: &ReplicaError, retry_in: Duration) {
        let (replica, cause) = (self.shared.target.name(), error.to_string());
        let mut told = lock(&self.shared.told);
        if told.as_ref().is_some_and(|(last, at)| *last == cause && at.elapsed() < TELL_AGAIN) {
            return;
        }
        *told = Some((cause.clone(), Instant::now()));
        drop(told);
        (self.shared.events)(&Event::Disconnected { replica: &replica, cause, retry_in });
    }

    /// Opens a session; keeps trying, with growing pauses, until it works or we are told to stop.
    fn connect(&self) -> Option<Session> {
        let mut pause = Duration::from_millis(100);
        loop {
            match pulse::abroad(|| fence::open(&*self.shared.target)) {
                Ok(session) => {
                    *lock(&self.shared.fatal) = None;
                    self.shared.connected.fetch_add(1, Ordering::Relaxed);
                    (self.shared.events)(&Event::Connected { replica: &self.shared.target.name() });
                    return Some(Box::new(watched::Watched(session)));
                }
                Err(error) => {
                    self.trouble(&error, pause);
                    let fatal = error.is_fatal();
                    *lock(&self.shared.fatal) = Some(error.to_string());
                    if self.stop_on_fatal && (fatal || pause > Duration::from_secs(2)) {
                        self.shared.queue.close();
                        return None;
                    }
                    let (failed_at, until) = (Instant::now(), Instant::now() + pause);
                    while Instant::now() < until
                        && lock(&self.shared.reconnect_now).is_none_or(|asked_at| asked_at < failed_at)
                    {
                        if self.stopping.load(Ordering::Relaxed) {
                            return None;
                        }
                        pulse::beat();
                        std::thread::sleep(Duration::from_millis(20).min(pause));
                    }
                    pause = (pause * 2).min(self.reconnect_most);
                }
            }
        }
    }
}
