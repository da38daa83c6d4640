//! How change is noticed: a `Source` says which paths the server touched, `derive` says what that may have changed,
//! `coalesce` makes one notice of many. Everything here is a hint; the engine reads the store to learn the truth.
//!
//! A source may lose events, but never hides a loss: it sends `DirtyKey::Rescan` for what it cannot vouch for.

pub mod coalesce;
pub mod derive;
mod feed;
mod inotify;
mod mounts;
mod table;

pub use coalesce::Coalescer;
pub use derive::{Reach, Roots};
pub use feed::{Control, Feed, Orders, Tap, TapEvent, TouchKind};

use crate::model::{Disposition, Notice, Scope};
use feed::Counters;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One way of noticing change; runs on a thread of its own.
pub trait Source: Send {
    /// Runs until ordered to stop. Calls `Control::armed` once everything is watched; before it returns `Ok` it has
    /// handed on all it saw. After an error it is opened anew and everything counts as lost.
    fn run(&mut self, feed: &mut Feed, control: &Control) -> Result<(), CaptureError>;
}

/// How a source is called and opened.
pub struct SourceKind {
    pub name: &'static str,
    open: fn(&Roots) -> Result<Box<dyn Source>, CaptureError>,
}

/// Every source there is; the first is the default.
pub const SOURCES: &[SourceKind] = &[SourceKind { name: "inotify", open: inotify::open }];

/// How long notices are held back, and by what change is noticed.
#[derive(Clone)]
pub struct Settings {
    /// A key is handed on after this long without a further event.
    pub quiet: Duration,
    /// … and at the latest this long after its first event.
    pub most: Duration,
    /// A name from `SOURCES`.
    pub source: String,
    /// Sees every raw event.
    pub tap: Option<Tap>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            quiet: Duration::from_millis(2),
            most: Duration::from_millis(20),
            source: SOURCES.first().map(|kind| kind.name).unwrap_or_default().to_owned(),
            tap: None,
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { quiet, most, source, tap } = self;
        f.debug_struct("Settings")
            .field("quiet", quiet)
            .field("most", most)
            .field("source", source)
            .field("tap", &tap.is_some())
            .finish()
    }
}

/// Change cannot be noticed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("unknown capture source {name}; there are: {known}")]
    UnknownSource { name: String, known: String },
    /// EMFILE or ENFILE from `inotify_init`.
    #[error("no inotify instance is left: raise fs.inotify.max_user_instances (sysctl), or the limit of open files")]
    Instances(#[source] io::Error),
    #[error("{what}: {cause}")]
    System { what: &'static str, cause: io::Error },
    #[error("{}: {cause}", path.display())]
    Path { path: PathBuf, cause: io::Error },
}

impl CaptureError {
    /// What the daemon does about it.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::UnknownSource { .. } | Self::Instances(_) => Disposition::Stop,
            Self::System { .. } | Self::Path { .. } => Disposition::RetrySoon,
        }
    }
}

/// Figures of a running capture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaptureStats {
    pub source: &'static str,
    /// The initial set of watches stands.
    pub armed: bool,
    /// Directories watched now.
    pub watches: u64,
    /// Directories that should be watched and cannot be; they are compared every 30 s instead.
    pub unwatched: u64,
    pub events: u64,
    pub notices: u64,
    /// Times the kernel dropped events.
    pub overflows: u64,
    /// Times the source failed and was opened anew.
    pub restarts: u64,
}

/// A running capture; dropping it stops it.
pub struct CaptureHandle {
    control: Arc<Control>,
    counters: Arc<Counters>,
    source: &'static str,
    thread: Option<JoinHandle<()>>,
}

/// How long a source that failed rests before it is opened anew.
const REST: Duration = Duration::from_secs(1);

/// Starts capturing. `out` is called on the capturing thread: while it blocks, the kernel's queue fills.
pub fn start(
    roots: Roots,
    settings: Settings,
    out: Box<dyn FnMut(Vec<Notice>) + Send>,
) -> Result<CaptureHandle, CaptureError> {
    let kind = SOURCES.iter().find(|kind| kind.name == settings.source).ok_or_else(|| CaptureError::UnknownSource {
        name: settings.source.clone(),
        known: SOURCES.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", "),
    })?;
    let system = |what| move |cause| CaptureError::System { what, cause };
    let control = Arc::new(Control::new().map_err(|errno| system("eventfd")(errno.into()))?);
    let mut source = (kind.open)(&roots)?;
    let mut feed = Feed::new(roots.clone(), &settings, out);
    let counters = feed.counters.clone();
    let theirs = control.clone();
    let run = move || {
        loop {
            match source.run(&mut feed, &theirs) {
                Ok(()) => break,
                Err(error) => tracing::error!(source = kind.name, %error, "capture failed, starting it anew"),
            }
            feed.counters.restarts.fetch_add(1, Relaxed);
            // Nobody sees what happens from here to the next arming; the notice is told now and again after it.
            feed.lost(Scope::Everything, Instant::now());
            feed.flush();
            source = loop {
                std::thread::sleep(REST);
                if theirs.is_stopping() {
                    return theirs.armed();
                }
                match (kind.open)(&roots) {
                    Ok(source) => break source,
                    Err(error) => tracing::error!(source = kind.name, %error, "capture cannot be started"),
                }
            };
            feed.lost(Scope::Everything, Instant::now());
        }
        theirs.armed();
    };
    let thread = std::thread::Builder::new().name("capture".to_owned()).spawn(run).map_err(system("thread"))?;
    Ok(CaptureHandle { control, counters, source: kind.name, thread: Some(thread) })
}

impl CaptureHandle {
    /// Blocks until the initial set of watches stands: every change from here on is noticed.
    pub fn wait_armed(&self) {
        self.control.wait_armed();
    }

    /// Returns once everything the kernel reported before this call has been given to `out`, held back or not;
    /// false when the deadline came first. Touches nothing in the source.
    pub fn drain(&self, deadline: Instant) -> bool {
        let done = self.control.marker();
        done.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }

    /// Hands on what was seen, then ends.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.control.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(source = self.source, "capture ended in a panic");
        }
    }

    pub fn stats(&self) -> CaptureStats {
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed);
        CaptureStats {
            source: self.source,
            armed: self.control.is_armed(),
            watches: count(&self.counters.watches),
            unwatched: count(&self.counters.unwatched),
            events: count(&self.counters.events),
            notices: count(&self.counters.notices),
            overflows: count(&self.counters.overflows),
            restarts: count(&self.counters.restarts),
        }
    }
}

impl Drop for CaptureHandle {
    fn drop(&mut self) {
        self.end();
    }
}
