//! Signals that a service obeys.

use super::systemd;
use std::io;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM and SIGINT.
pub(super) struct Ends {
    terminate: Signal,
    interrupt: Signal,
}

impl Ends {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    pub async fn recv(&mut self) {
        tokio::select! { _ = self.terminate.recv() => {}, _ = self.interrupt.recv() => {} }
    }
}

/// The signals that end a service. Made before the service starts, so that none is missed.
pub struct Signals {
    runtime: Runtime,
    ends: Ends,
}

impl Signals {
    pub fn new() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let ends = runtime.block_on(async { Ends::new() })?;
        Ok(Self { runtime, ends })
    }

    /// Tells the service manager that we are ready, and returns at SIGTERM or SIGINT; a second one leaves at once.
    pub fn wait(mut self) {
        systemd::notify("READY=1\nSTATUS=live");
        self.runtime.block_on(self.ends.recv());
        systemd::notify("STOPPING=1\nSTATUS=stopping");
        leave_at_second_signal();
    }
}

/// All that the daemon obeys. It lives longer than one start to the next reload: while nobody listens, the process does
/// not end by a signal any more, so one that comes then has to be found afterwards.
pub(super) struct Told {
    pub ends: Ends,
    pub hangup: Signal,
    pub scan: Signal,
}

impl Told {
    /// Inside of a runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            ends: Ends::new()?,
            hangup: signal(SignalKind::hangup())?,
            scan: signal(SignalKind::user_defined1())?,
        })
    }
}

/// The next start copes with a stop that was not waited for, because it copes with kill -9.
pub(super) fn leave_at_second_signal() {
    std::thread::spawn(move || {
        let Ok(runtime) = Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            if let Ok(mut ends) = Ends::new() {
                ends.recv().await;
                std::process::exit(75);
            }
        });
    });
}
