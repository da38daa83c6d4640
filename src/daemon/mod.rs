//! Wiring and order of start and stop: arm capture, scan, live; close capture, finish jobs, write state.

mod caught_up;
pub mod control;
mod cross_check;
mod ground;
mod metrics;
pub mod moves;
pub mod report;
mod rhythm;
mod rooms;
pub mod scrub;
mod serve;
mod signals;
mod systemd;

pub use serve::{Ears, End, Service, serve};
pub use signals::Signals;

use crate::capture::{self, CaptureError, CaptureHandle, Settings};
use crate::engine::{Engine, Event, EventSink, Options, ReplicaStats, StandingOrder, Target};
use crate::model::{DirtyKey, MailStore, Notice, Scope};
use crate::spool::LiveSpool;
use cross_check::CrossChecker;
use rhythm::Stir;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// A source being followed.
pub struct Running {
    pub engine: Engine,
    capture: CaptureHandle,
    cross_check: Option<CrossChecker>,
    trouble: Trouble,
    stir: Stir,
}

/// The last time the source could not be read, and why.
type Trouble = Arc<Mutex<Option<(String, Instant)>>>;

/// Trouble with the source is told again and again while it lasts; older than this it is over.
const TROUBLE_LASTS: Duration = Duration::from_secs(10);

impl Running {
    /// Starts the engine, arms capture, then scans: what changed before the watches stood is found by the scan, what
    /// changes afterwards by the watches.
    pub fn start(
        store: Arc<LiveSpool>,
        targets: Vec<Target>,
        options: &Options,
        settings: Settings,
        events: EventSink,
    ) -> Result<Self, CaptureError> {
        let running = Self::arm(store, targets, options, settings, events, &[])?;
        running.engine.scan();
        Ok(running)
    }

    /// The same without the scan. `orders` are in force before anything can be sent.
    pub fn arm(
        store: Arc<LiveSpool>,
        targets: Vec<Target>,
        options: &Options,
        settings: Settings,
        events: EventSink,
        orders: &[StandingOrder],
    ) -> Result<Self, CaptureError> {
        let roots = capture::Roots::from(store.layout());
        let source: Arc<dyn MailStore> = store.clone();
        let (trouble, stir) = (Trouble::default(), Stir::default());
        let engine = Engine::start(source, targets, options, watching(events, trouble.clone(), stir.clone()));
        for order in orders {
            if let Err(error) = engine.order_about(Some(&order.replica), &order.subject, order.word) {
                warn!(%error, word = ?order.word, subject = ?order.subject, "a standing order is void");
            }
        }
        let started = Instant::now();
        let (cross_check, mut out): (_, cross_check::Out) = match &settings.cross_check {
            None => (None, Box::new(engine.notifier())),
            Some(log) => {
                let (checker, out) = CrossChecker::start(store, log, engine.notifier(), engine.notifier());
                (Some(checker), out)
            }
        };
        let theirs = stir.clone();
        let out = Box::new(move |notices| {
            theirs.stir();
            out(notices);
        });
        let capture = capture::start(roots, settings, out)?;
        wait_armed(&capture);
        info!(elapsed_ms = started.elapsed().as_millis() as u64, "capture armed");
        Ok(Self { engine, capture, cross_check, trouble, stir })
    }

    /// Asks for a catch-up scan.
    pub fn rescan(&self) {
        self.engine.notify(vec![Notice { key: DirtyKey::Rescan(Scope::Everything), seen_at: Instant::now() }]);
    }

    /// Everything the kernel has told so far is confirmed (or has failed `tries` times); false on timeout.
    pub fn settle(&self, tries: u32, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        self.capture.drain(deadline);
        self.engine.settle(tries, Some(deadline.saturating_duration_since(Instant::now())))
    }

    pub fn stats(&self) -> Vec<ReplicaStats> {
        self.engine.stats()
    }

    fn trouble(&self) -> Option<String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.as_ref().filter(|(_, at)| at.elapsed() < TROUBLE_LASTS).map(|(reason, _)| reason.clone())
    }

    /// Closes capture, finishes the jobs in flight up to `timeout`, makes receipts durable.
    pub fn stop(self, timeout: Duration) {
        self.capture.stop();
        drop(self.cross_check);
        self.engine.stop(timeout);
    }
}

/// Watches of a large store take their time. After a reload the watchdog runs already: it is told that they get on.
fn wait_armed(capture: &CaptureHandle) {
    let beats = || capture.pulses().iter().map(|pulse| pulse.look().0).fold(0, u64::wrapping_add);
    let (mut before, mut at) = (beats(), Instant::now());
    while !capture.is_armed() {
        std::thread::sleep(Duration::from_millis(2));
        if at.elapsed() > Duration::from_secs(1) {
            let now = beats();
            let watches = capture.stats().watches;
            let alive = if now == before { "" } else { "\nWATCHDOG=1" };
            systemd::notify(&format!("STATUS=arming capture, {watches} directories watched{alive}"));
            (before, at) = (now, Instant::now());
        }
    }
}

/// On its way to `events`: something goes on, and trouble with the source is remembered.
fn watching(events: EventSink, trouble: Trouble, stir: Stir) -> EventSink {
    Arc::new(move |event| {
        stir.stir();
        if let Event::SourceTrouble { reason } = event {
            *trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some((reason.clone(), Instant::now()));
        }
        events(event);
    })
}
