//! How change is noticed: a `Source` says which paths the server touched, `derive` says what that may have changed,
//! `coalesce` makes one notice of many. Everything here is a hint; the engine reads the store to learn the truth.
//!
//! A source may lose events, but never hides a loss: it sends `DirtyKey::Rescan` for what it cannot vouch for.

pub mod coalesce;
mod conductor;
mod cookies;
mod cross_check;
pub mod derive;
mod fanevent;
mod fanotify;
mod feed;
mod ground;
mod handle;
mod inotify;
mod locks;
mod logtail;
mod mounts;
mod poll;
mod scan;
pub mod survey;
pub mod synclog;
mod table;

pub use coalesce::Coalescer;
pub use conductor::{CaptureHandle, start};
pub use cross_check::{CrossCheck, CrossStats};
pub use derive::{Reach, Roots};
pub use feed::{Control, Feed, Orders, Tap, TapEvent, TouchKind};
pub use ground::{Area, FsKind, Ground, fs_kind};
pub use logtail::LogTail;

use crate::model::{Disposition, pulse};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use serde::Serialize;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// One way of noticing change; runs on a thread of its own.
pub trait Source: Send {
    /// Runs until ordered to stop. Calls `Feed::armed` once everything is watched; before it returns `Ok` it has
    /// handed on all it saw. After an error everything of its areas counts as lost.
    fn run(&mut self, feed: &mut Feed, control: &Control) -> Result<(), CaptureError>;
}

/// How a source is called and opened.
pub struct SourceKind {
    pub name: &'static str,
    /// Tells of every change at once; the others find out by and by.
    pub prompt: bool,
    /// Nothing better is tried again while it serves.
    pub settled: bool,
    /// Taken by `auto` in the order of the table; the others have to be asked for.
    pub auto: bool,
    /// Whether it can serve an area, and why (not).
    fit: fn(&Ground, &Area) -> Result<String, String>,
    open: fn(&Ground) -> Result<Box<dyn Source>, CaptureError>,
}

/// Every source there is, in the order in which `auto` would have them.
pub const SOURCES: &[SourceKind] = &[
    SourceKind { name: "inotify", prompt: true, settled: true, auto: true, fit: local, open: inotify::open },
    SourceKind { name: "fanotify", prompt: true, settled: true, auto: true, fit: fanotify::fit, open: fanotify::open },
    SourceKind { name: "locks", prompt: true, settled: false, auto: true, fit: locks::fit, open: locks::open },
    SourceKind { name: "poll", prompt: false, settled: false, auto: true, fit: any_place, open: poll::open },
    SourceKind { name: "synclog", prompt: false, settled: false, auto: false, fit: synclog::fit, open: synclog::open },
    SourceKind { name: "scan", prompt: false, settled: false, auto: true, fit: any_place, open: scan::open },
];

/// One read of a kernel's queue.
const BUFFER_BYTES: usize = 256 * 1024;
/// Events looked at between two reads of the kernel's queue.
const EVENTS_BETWEEN_READS: usize = 512;
/// Events held here; more are left to the kernel, which says so when it drops them.
const BACKLOG_MOST: usize = 1_000_000;

/// Nobody sleeps longer in one go.
const BREATH: Duration = Duration::from_secs(1);

/// The value of `capture` that chooses by itself.
pub const AUTO: &str = "auto";

fn local(_: &Ground, area: &Area) -> Result<String, String> {
    match fs_kind(&area.path) {
        Ok(kind @ FsKind::Remote(_)) => Err(format!("{kind} does not tell what other machines change")),
        Ok(kind) => Ok(format!("{kind} is local")),
        // Whoever opens it will say more.
        Err(error) => Ok(format!("kind of file system unknown: {error}")),
    }
}

fn any_place(_: &Ground, _: &Area) -> Result<String, String> {
    Ok("works on every file system".to_owned())
}

/// Sleeps until an order comes, `also` can be read, or it is time; or less.
fn wait(control: &Control, also: Option<BorrowedFd<'_>>, until: Option<Instant>) -> Result<(), CaptureError> {
    wait_also(control, also, None, until).map(drop)
}

/// The same; true when something was mounted or unmounted.
fn wait_also(
    control: &Control,
    also: Option<BorrowedFd<'_>>,
    mounts: Option<BorrowedFd<'_>>,
    until: Option<Instant>,
) -> Result<bool, CaptureError> {
    let mut fds = vec![PollFd::new(control.as_fd(), PollFlags::POLLIN)];
    fds.extend(also.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    let place = fds.len();
    fds.extend(mounts.map(|fd| PollFd::new(fd, PollFlags::POLLPRI)));
    // Whoever waits says now and then that it does.
    let timeout = until.map_or(BREATH, |at| at.saturating_duration_since(Instant::now()).min(BREATH));
    let woken = ppoll(&mut fds, Some(TimeSpec::from_duration(timeout)), None);
    pulse::beat();
    match woken {
        Ok(_) => Ok(fds.get(place).and_then(PollFd::any).unwrap_or(false)),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(CaptureError::System { what: "poll", cause: errno.into() }),
    }
}

/// How long notices are held back, and by what change is noticed.
#[derive(Clone)]
pub struct Settings {
    /// A key is handed on after this long without a further event.
    pub quiet: Duration,
    /// … and at the latest this long after its first event.
    pub most: Duration,
    /// A name from `SOURCES`, or `AUTO`.
    pub source: String,
    /// Shortest time between two looks of `poll`.
    pub poll_every: Duration,
    /// How often `scan` asks for a comparison.
    pub scan_every: Duration,
    /// A better source is tried again after this long, then after twice as long, and so on.
    pub come_back: Duration,
    /// The log that `synclog` consumes, or why there is none.
    pub sync_log: Result<PathBuf, String>,
    /// The log that whoever started capture compares with what it shows.
    pub cross_check: Option<PathBuf>,
    /// Where this server keeps its lock files, or why they do not tell what changed.
    pub locks: Result<PathBuf, String>,
    /// A directory of ours, made when it is missing, in which `CaptureHandle::prove` makes files.
    pub cookies: Option<PathBuf>,
    /// Sees every raw event.
    pub tap: Option<Tap>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            quiet: Duration::from_millis(2),
            most: Duration::from_millis(20),
            source: AUTO.to_owned(),
            poll_every: Duration::from_secs(1),
            scan_every: Duration::from_secs(60),
            come_back: Duration::from_secs(30),
            sync_log: Err("no sync_log is named".to_owned()),
            cross_check: None,
            locks: Err("no directory of locks is named".to_owned()),
            cookies: None,
            tap: None,
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { quiet, most, source, poll_every, scan_every, come_back, sync_log, cross_check, locks, cookies, tap } =
            self;
        f.debug_struct("Settings")
            .field("quiet", quiet)
            .field("most", most)
            .field("source", source)
            .field("poll_every", poll_every)
            .field("scan_every", scan_every)
            .field("come_back", come_back)
            .field("sync_log", sync_log)
            .field("cross_check", cross_check)
            .field("locks", locks)
            .field("cookies", cookies)
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
    /// ENOSPC from `inotify_add_watch`.
    #[error("no inotify watch is left: raise fs.inotify.max_user_watches (sysctl)")]
    Watches(#[source] io::Error),
    #[error("{why}")]
    Fanotify {
        why: String,
        #[source]
        cause: io::Error,
    },
    /// The source that was asked for cannot serve this.
    #[error("{source_name} cannot watch {}: {why}", path.display())]
    Unfit { source_name: &'static str, path: PathBuf, why: String },
    #[error("{what}: {cause}")]
    System { what: &'static str, cause: io::Error },
    #[error("{}: {cause}", path.display())]
    Path { path: PathBuf, cause: io::Error },
}

impl CaptureError {
    /// The same source would fail again at once.
    fn is_lasting(&self) -> bool {
        matches!(self, Self::Watches(_) | Self::Instances(_) | Self::Unfit { .. })
    }

    /// What the daemon does about it.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::UnknownSource { .. } | Self::Instances(_) | Self::Unfit { .. } => Disposition::Stop,
            Self::Fanotify { .. } | Self::Watches(_) | Self::System { .. } | Self::Path { .. } => {
                Disposition::RetrySoon
            }
        }
    }
}

/// Figures of a running capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CaptureStats {
    /// The sources at work, each with what it serves.
    pub sources: Vec<SourceStats>,
    /// The initial set of watches stands.
    pub armed: bool,
    /// Directories watched now.
    pub watches: u64,
    /// Directories that got no watch; another source looks after them.
    pub unwatched: u64,
    pub events: u64,
    pub notices: u64,
    /// Times the kernel dropped events.
    pub overflows: u64,
    /// Times a source failed and was opened anew, or another one took over.
    pub restarts: u64,
}

/// Figures of one source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SourceStats {
    pub source: &'static str,
    /// Why this one serves these areas.
    pub reason: String,
    pub areas: Vec<PathBuf>,
    pub watches: u64,
    pub unwatched: u64,
    pub events: u64,
    pub notices: u64,
    pub overflows: u64,
}
