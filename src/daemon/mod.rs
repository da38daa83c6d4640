//! Wiring and order of start and stop: arm capture, scan, live; close capture, finish jobs, write state.

mod systemd;

use crate::capture::{self, CaptureError, CaptureHandle, Settings};
use crate::engine::{Engine, EventSink, Options, ReplicaStats, Target};
use crate::model::{DirtyKey, MailStore, Notice, Scope};
use crate::spool::LiveSpool;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// A source being followed.
pub struct Running {
    pub engine: Engine,
    capture: CaptureHandle,
}

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
        let roots = capture::Roots::from(store.layout());
        let source: Arc<dyn MailStore> = store;
        let engine = Engine::start(source, targets, options, events);
        let started = Instant::now();
        let capture = capture::start(roots, settings, Box::new(engine.notifier()))?;
        capture.wait_armed();
        info!(elapsed_ms = started.elapsed().as_millis() as u64, "capture armed");
        engine.scan();
        Ok(Self { engine, capture })
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

    /// Closes capture, finishes the jobs in flight up to `timeout`, makes receipts durable.
    pub fn stop(self, timeout: Duration) {
        self.capture.stop();
        self.engine.stop(timeout);
    }
}

/// Serves until SIGTERM or SIGINT; a second one leaves at once. SIGUSR1 asks for a scan.
pub fn serve_until_signal(running: &Running, status: &Path) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut scan = signal(SignalKind::user_defined1())?;
        systemd::notify("READY=1\nSTATUS=live");
        info!("live");
        let mut last = String::new();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = scan.recv() => running.rescan(),
                _ = tick.tick() => write_status(running, status, &mut last),
            }
        }
        write_status(running, status, &mut last);
        systemd::notify("STOPPING=1");
        // A second signal leaves at once; the next start copes, because it copes with kill -9.
        std::thread::spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            runtime.block_on(async {
                if let (Ok(mut terminate), Ok(mut interrupt)) =
                    (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
                {
                    tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
                    std::process::exit(75);
                }
            });
        });
        Ok(())
    })
}

/// Writes the figures when they changed; by rename, so that a reader sees the old or the new ones whole.
fn write_status(running: &Running, path: &Path, last: &mut String) {
    let text = serde_json::json!({ "pid": std::process::id(), "replicas": running.stats() }).to_string();
    if text == *last {
        return;
    }
    let fresh = path.with_extension("json.new");
    if let Err(error) = std::fs::write(&fresh, &text).and_then(|()| std::fs::rename(&fresh, path)) {
        warn!(%error, "status file cannot be written");
    }
    *last = text;
}
