//! fanotify: one mark for a whole file system, however many directories are on it.
//!
//! Events name a directory by its handle, and what in it. The path is asked from the kernel when the event is read, so
//! it is the path of *then*: a directory that moved in between is reported where it is now, and its rename, which is in
//! the same queue, reports both places. Handles of directories that are gone by then are found through the removal
//! itself, whose event names the directory above (Linux 5.17 and later); what cannot be found is a loss, and said.
//!
//! Mounts cannot be marked instead (`FAN_MARK_MOUNT`): such marks get no event of names that come and go.

use super::derive::Roots;
use super::fanevent::{
    self, CREATE, DELETE, FanEvent, MODIFY, MOVED_FROM, MOVED_TO, ONDIR, Object, Place, Q_OVERFLOW, RENAME,
};
use super::feed::{Control, Feed, TouchKind};
use super::ground::{Area, Ground};
use super::mounts::{self, Mounts};
use super::{BACKLOG_MOST, BUFFER_BYTES, CaptureError, EVENTS_BETWEEN_READS, Reach, Source, handle, local, wait_also};
use crate::model::{DirtyKey, MailboxRef, Scope};
use nix::errno::Errno;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use nix::unistd::read;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

// Linux 5.9; nix does not name them.
const REPORT_FID: u32 = 0x200;
const REPORT_DIR_FID: u32 = 0x400;
const REPORT_NAME: u32 = 0x800;
/// Linux 5.17: what an event happened to, and renames as one event.
const REPORT_TARGET_FID: u32 = 0x1000;

/// Directories whose paths are remembered.
const PATHS_MOST: usize = 100_000;
/// Removed directories that are remembered, for events that happened in them before.
const GRAVES_MOST: usize = 100_000;
/// So long the removal of a directory that is gone is waited for; then its events are lost.
const MOURNING: Duration = Duration::from_millis(500);
/// … and so long when somebody waits for everything.
const PATIENCE: Duration = Duration::from_millis(50);
/// A comparison of everything is asked for so often at most on account of directories that cannot be found: they may be
/// anybody's.
const LOSS_EVERY: Duration = Duration::from_secs(10);
/// No path has more components than this.
const DEEPEST: usize = 2048;

struct FanotifySource {
    kernel: Fanotify,
    roots: Roots,
    areas: Vec<Area>,
    /// Renames come as one event.
    is_modern: bool,
    /// Our own directory.
    cookies: Option<Object>,
    systems: BTreeMap<[u8; 8], System>,
    /// Real path → the path we know it by; longest first.
    aliases: Vec<(PathBuf, PathBuf)>,
    /// `None`: nowhere near an area.
    paths: HashMap<Object, Option<PathBuf>>,
    graves: HashMap<Object, Place>,
    backlog: VecDeque<(FanEvent, Instant)>,
    orphans: VecDeque<(FanEvent, Instant)>,
    /// Events happened in a directory that cannot be found any more: since when, and when that was told last.
    unknown: Option<Instant>,
    told_at: Option<Instant>,
    /// Cookies that were read, and when.
    proofs: VecDeque<(OsString, Instant)>,
    buffer: Vec<u8>,
    mounts: Mounts,
}

/// A marked file system.
#[derive(Default)]
struct System {
    /// A path on each of its mounts that concern us. Opened for each batch anew: a descriptor that stays would keep the
    /// file system from being unmounted.
    mounts: BTreeMap<i32, PathBuf>,
    open: Vec<File>,
}

fn init() -> Result<(Fanotify, bool), Errno> {
    let start = |bits| {
        let flags = InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK;
        Fanotify::init(flags | InitFlags::from_bits_retain(bits), EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC)
    };
    match start(REPORT_FID | REPORT_DIR_FID | REPORT_NAME | REPORT_TARGET_FID) {
        Err(Errno::EINVAL) => start(REPORT_DIR_FID | REPORT_NAME).map(|kernel| (kernel, false)),
        started => started.map(|kernel| (kernel, true)),
    }
}

fn mark(kernel: &Fanotify, is_modern: bool, path: &Path) -> Result<(), Errno> {
    let moves = if is_modern { RENAME } else { MOVED_FROM | MOVED_TO };
    let mask = MaskFlags::from_bits_retain(MODIFY | CREATE | DELETE | ONDIR | moves);
    kernel.mark(MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM, mask, nix::fcntl::AT_FDCWD, Some(path))
}

/// What is in the way, and what cures it.
fn explain(errno: Errno) -> String {
    match errno {
        Errno::EPERM => "needs CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH (AmbientCapabilities= in the unit)".to_owned(),
        Errno::ENOSYS | Errno::EINVAL => "needs Linux 5.9 or later, with fanotify".to_owned(),
        Errno::EMFILE => "no fanotify group is left: raise fs.fanotify.max_user_groups (sysctl)".to_owned(),
        Errno::ENOSPC => "no fanotify mark is left: raise fs.fanotify.max_user_marks (sysctl)".to_owned(),
        Errno::EOPNOTSUPP | Errno::ENODEV | Errno::EXDEV => {
            "the file system has no handles that fanotify could report".to_owned()
        }
        errno => format!("fanotify: {errno}"),
    }
}

/// The nearest directory at or above `path` that exists.
fn standing(path: &Path) -> &Path {
    path.ancestors().find(|above| above.is_dir()).unwrap_or(Path::new("/"))
}

fn probe(path: &Path) -> Result<bool, Errno> {
    let (kernel, is_modern) = init()?;
    mark(&kernel, is_modern, path)?;
    let (kind, bytes, _) = handle::of(path)?;
    let mount = File::open(path).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    handle::open(mount.as_fd(), kind, &bytes)?;
    Ok(is_modern)
}

pub(super) fn fit(ground: &Ground, area: &Area) -> Result<String, String> {
    let local = local(ground, area)?;
    let is_modern = probe(standing(&area.path)).map_err(explain)?;
    let since = if is_modern { "5.17" } else { "5.9" };
    Ok(format!("{local}, one mark for all of it (Linux {since} or later)"))
}

pub(super) fn open(ground: &Ground) -> Result<Box<dyn Source>, CaptureError> {
    let (kernel, is_modern) =
        init().map_err(|errno| CaptureError::Fanotify { why: explain(errno), cause: errno.into() })?;
    Ok(Box::new(FanotifySource {
        kernel,
        roots: ground.roots.clone(),
        areas: ground.areas.clone(),
        is_modern,
        cookies: None,
        systems: BTreeMap::new(),
        aliases: Vec::new(),
        paths: HashMap::new(),
        graves: HashMap::new(),
        backlog: VecDeque::new(),
        orphans: VecDeque::new(),
        unknown: None,
        told_at: None,
        proofs: VecDeque::new(),
        buffer: vec![0; BUFFER_BYTES],
        mounts: Mounts::new(),
    }))
}

impl Source for FanotifySource {
    fn run(&mut self, feed: &mut Feed, control: &Control) -> Result<(), CaptureError> {
        let begun = Instant::now();
        self.mounts_changed();
        self.arm(feed)?;
        self.cookies = feed.cookies.as_ref().and_then(|cookies| self.mark_cookies(cookies.dir()).ok());
        let systems = self.systems.len();
        tracing::info!(systems, elapsed_ms = begun.elapsed().as_millis() as u64, "watching");
        feed.armed(control);
        loop {
            let mourning = self.orphans.front().map(|(_, since)| *since + MOURNING);
            let until = [feed.next_deadline(), mourning, self.loss_at()].into_iter().flatten().min();
            let mounts = wait_also(control, Some(self.kernel.as_fd()), self.mounts.descriptor(), until)?;
            let orders = control.take();
            if mounts && self.mounts_changed() {
                tracing::warn!("file systems of the store were mounted or unmounted, comparing everything");
                let seen_at = Instant::now();
                self.arm(feed)?;
                feed.lost(Scope::Everything, seen_at);
            }
            self.siphon(feed)?;
            let mut taken = 0usize;
            while let Some((event, seen_at)) = self.backlog.pop_front() {
                self.event(event, seen_at, feed)?;
                taken += 1;
                if taken.is_multiple_of(EVENTS_BETWEEN_READS) || (self.backlog.is_empty() && orders.wants_all()) {
                    self.siphon(feed)?;
                    feed.hand_on_in_burst();
                }
            }
            self.mourn(false, feed)?;
            if orders.wants_all() {
                self.wait_for_graves(feed)?;
                self.mourn(true, feed)?;
            }
            // Nothing of the store stays open while we sleep.
            self.systems.values_mut().for_each(|system| system.open.clear());
            if feed.round_done(orders, Instant::now()) {
                return Ok(());
            }
        }
    }
}

impl FanotifySource {
    /// Hands on cookies that nothing older waits for.
    fn prove(&mut self, feed: &mut Feed) {
        let orphan = self.orphans.iter().map(|(_, since)| *since).min();
        let open = [orphan, self.unknown].into_iter().flatten().min();
        while self.proofs.front().is_some_and(|(_, at)| open.is_none_or(|open| open > *at)) {
            if let Some((name, _)) = self.proofs.pop_front() {
                feed.cookie(&name);
            }
        }
    }

    /// A mark on the directory alone: it may be on another file system than the store.
    fn mark_cookies(&self, dir: &Path) -> Result<Object, Errno> {
        let mask = MaskFlags::from_bits_retain(CREATE);
        self.kernel.mark(MarkFlags::FAN_MARK_ADD, mask, nix::fcntl::AT_FDCWD, Some(dir))?;
        let (kind, handle, _) = handle::of(dir)?;
        Ok(Object { fsid: handle::fsid(dir)?, kind, handle: handle.into() })
    }

    fn mounts_changed(&mut self) -> bool {
        self.mounts.changed(self.areas.iter().map(|area| area.path.as_path()))
    }

    /// Marks every file system that areas, links and mounts below them lead to: marked first, looked at then.
    fn arm(&mut self, feed: &mut Feed) -> Result<(), CaptureError> {
        self.aliases.clear();
        self.paths.clear();
        self.systems.clear();
        let mut steps: Vec<(PathBuf, Reach)> = self.areas.iter().map(|area| (area.path.clone(), area.reach)).collect();
        let mut entered = HashSet::new();
        while let Some((shown, reach)) = steps.pop() {
            let real = mounts::real(&shown);
            if entered.insert(real.clone()) {
                self.mark(standing(&real))?;
                for point in mounts::below(&real) {
                    self.mark(&point)?;
                }
                if reach == Reach::Tree {
                    steps.extend(self.links(&shown));
                }
            }
            self.aliases.push((real, shown));
        }
        self.aliases.sort_by_key(|(real, _)| std::cmp::Reverse(real.as_os_str().len()));
        feed.counters.watches.store(self.systems.len() as u64, Relaxed);
        Ok(())
    }

    fn mark(&mut self, path: &Path) -> Result<(), CaptureError> {
        let fault = |errno: Errno| CaptureError::Fanotify {
            why: format!("{}: {}", path.display(), explain(errno)),
            cause: errno.into(),
        };
        mark(&self.kernel, self.is_modern, path).map_err(fault)?;
        let (_, _, mount) = handle::of(path).map_err(fault)?;
        let fsid = handle::fsid(path).map_err(fault)?;
        self.systems.entry(fsid).or_default().mounts.insert(mount, path.to_owned());
        Ok(())
    }

    /// Symbolic links to directories below `top`.
    fn links(&self, top: &Path) -> Vec<(PathBuf, Reach)> {
        let mut found = Vec::new();
        let mut steps = vec![top.to_owned()];
        while let Some(dir) = steps.pop() {
            // What cannot be read now tells by events when it can.
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let Ok(kind) = entry.file_type() else { continue };
                let path = entry.path();
                if self.roots.is_noise_dir(&path) {
                    continue;
                }
                if kind.is_dir() {
                    steps.push(path);
                } else if kind.is_symlink() && path.is_dir() {
                    found.push((path, Reach::Tree));
                }
            }
        }
        found
    }

    /// Takes over what the kernel holds at this moment, without looking at it.
    fn siphon(&mut self, feed: &mut Feed) -> Result<(), CaptureError> {
        while self.backlog.len() < BACKLOG_MOST {
            let bytes = match read(self.kernel.as_fd(), &mut self.buffer) {
                Ok(bytes) => bytes,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(CaptureError::System { what: "reading fanotify", cause: errno.into() }),
            };
            let seen_at = Instant::now();
            let events = fanevent::parse(self.buffer.get(..bytes).unwrap_or_default())
                .map_err(|fault| CaptureError::System { what: "reading fanotify", cause: io::Error::other(fault) })?;
            feed.counters.events.fetch_add(events.len() as u64, Relaxed);
            for event in events {
                let leaves = event.is(DELETE) && event.is(ONDIR);
                if let (true, Some(place), Some(target)) = (leaves, &event.place, &event.target) {
                    if self.graves.len() >= GRAVES_MOST {
                        self.graves.clear();
                    }
                    self.graves.insert(target.clone(), place.clone());
                }
                self.backlog.push_back((event, seen_at));
            }
        }
        Ok(())
    }

    /// A directory is gone a moment before its removal is told.
    fn wait_for_graves(&mut self, feed: &mut Feed) -> Result<(), CaptureError> {
        let until = Instant::now() + PATIENCE;
        while !self.orphans.is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
            self.siphon(feed)?;
            while let Some((event, seen_at)) = self.backlog.pop_front() {
                self.event(event, seen_at, feed)?;
            }
            self.mourn(false, feed)?;
        }
        Ok(())
    }

    /// When what cannot be found is to be told.
    fn loss_at(&self) -> Option<Instant> {
        self.unknown.map(|since| self.told_at.map_or(since, |told| told + LOSS_EVERY))
    }

    /// Events in directories that are gone, whose removal has not been seen yet.
    fn mourn(&mut self, at_once: bool, feed: &mut Feed) -> Result<(), CaptureError> {
        let now = Instant::now();
        for (event, since) in std::mem::take(&mut self.orphans) {
            if at_once || now.duration_since(since) >= MOURNING {
                let place = event.place.iter().chain(&event.new);
                if place.into_iter().any(|place| self.resolve(&place.dir) == Where::Gone) {
                    self.unknown.get_or_insert(since);
                    continue;
                }
            }
            self.event(event, since, feed)?;
        }
        if (at_once || self.loss_at().is_some_and(|at| at <= now))
            && let Some(since) = self.unknown.take()
        {
            self.told_at = Some(now);
            feed.lost(Scope::Everything, since);
        }
        if self.orphans.is_empty() && self.backlog.is_empty() {
            self.graves.clear();
        }
        self.prove(feed);
        Ok(())
    }

    fn event(&mut self, event: FanEvent, seen_at: Instant, feed: &mut Feed) -> Result<(), CaptureError> {
        if event.is(Q_OVERFLOW) {
            feed.counters.overflows.fetch_add(1, Relaxed);
            tracing::warn!(
                "fanotify queue overflowed, comparing everything; fs.fanotify.max_queued_events (sysctl) sets its length"
            );
            self.paths.clear();
            feed.lost(Scope::Everything, seen_at);
            return Ok(());
        }
        let Some(place) = &event.place else { return Ok(()) };
        if self.cookies.as_ref() == Some(&place.dir) {
            if event.is(CREATE) {
                // What is older and not found yet comes first.
                self.proofs.push_back((place.name().as_os_str().to_owned(), seen_at));
                self.prove(feed);
            }
            return Ok(());
        }
        let old = self.path(place);
        let new = event.new.as_ref().map(|place| self.path(place));
        if old == Where::Gone || new == Some(Where::Gone) {
            self.orphans.push_back((event, seen_at));
            return Ok(());
        }
        let is_dir = event.is(ONDIR);
        let (old, new) = (old.known(), new.and_then(Where::known));
        if is_dir && event.is(RENAME | MOVED_FROM | MOVED_TO) {
            // Every path below it is another one now.
            self.paths.clear();
            return self.moved(&event, old, new, seen_at, feed);
        }
        if event.is(RENAME) {
            for (kind, path) in [(TouchKind::MovedFrom, old), (TouchKind::MovedTo, new)] {
                if let Some(path) = path {
                    self.file(kind, &path, seen_at, feed)?;
                }
            }
            return Ok(());
        }
        let Some(path) = old else { return Ok(()) };
        let kinds = [
            (CREATE, TouchKind::Create),
            (MODIFY, TouchKind::Modify),
            (MOVED_FROM, TouchKind::MovedFrom),
            (MOVED_TO, TouchKind::MovedTo),
            (DELETE, TouchKind::Delete),
        ];
        // The kernel puts what happened to one name in a short time into one event.
        for (bit, kind) in kinds {
            if !event.is(bit) {
                continue;
            }
            if !is_dir {
                self.file(kind, &path, seen_at, feed)?;
            } else if self.is_above_area(&path) {
                self.root_changed(&path, seen_at, feed);
            } else if !self.roots.is_noise_dir(&path) && bit != MODIFY {
                feed.touched(kind, &path, true, seen_at);
            }
        }
        Ok(())
    }

    /// A file, or a link: one that leads to a directory brings another tree.
    fn file(&mut self, kind: TouchKind, path: &Path, seen_at: Instant, feed: &mut Feed) -> Result<(), CaptureError> {
        feed.touched(kind, path, false, seen_at);
        let name = path.file_name().unwrap_or_default().as_bytes();
        let came = matches!(kind, TouchKind::Create | TouchKind::MovedTo);
        let is_plain = name.ends_with(b".") || name.starts_with(b"cyrus.");
        if came && !is_plain && path.is_symlink() && path.is_dir() {
            self.arm(feed)?;
            feed.lost(Scope::Everything, seen_at);
        }
        Ok(())
    }

    fn is_above_area(&self, path: &Path) -> bool {
        self.aliases.iter().any(|(real, shown)| real.starts_with(path) || shown.starts_with(path))
    }

    fn root_changed(&mut self, path: &Path, seen_at: Instant, feed: &mut Feed) {
        tracing::info!(path = %path.display(), "a root came or went, comparing everything");
        self.paths.clear();
        feed.lost(Scope::Everything, seen_at);
    }

    /// A directory has another place: everything below it as well.
    fn moved(
        &mut self,
        event: &FanEvent,
        old: Option<PathBuf>,
        new: Option<PathBuf>,
        seen_at: Instant,
        feed: &mut Feed,
    ) -> Result<(), CaptureError> {
        let (old, new) = match event.is(RENAME) {
            true => (old, new),
            // Before 5.17 the two halves are events of their own.
            false if event.is(MOVED_TO) => (None, old),
            false => (old, None),
        };
        for path in [&old, &new].into_iter().flatten() {
            if self.is_above_area(path) {
                self.root_changed(path, seen_at, feed);
                self.arm(feed)?;
                return Ok(());
            }
        }
        if let Some(old) = &old {
            feed.touched(TouchKind::MovedFrom, old, true, seen_at);
        }
        let walked = match &new {
            Some(new) if !self.roots.is_noise_dir(new) => {
                feed.touched(TouchKind::MovedTo, new, true, seen_at);
                self.walk(new, old.as_deref(), seen_at, feed)
            }
            _ => false,
        };
        if !walked {
            // It has moved on, or out of our sight: what was below it is not to be known from here.
            match old.as_deref().map(|old| (old, self.roots.derive(old, true))) {
                Some((_, Some(DirtyKey::Mailbox(MailboxRef::Name(name))))) => feed.lost(Scope::Below(name), seen_at),
                Some((_, Some(DirtyKey::Mailbox(MailboxRef::Id(_))))) => {}
                Some((old, _)) if self.roots.is_noise_dir(old) => {}
                Some(_) => feed.lost(Scope::Everything, seen_at),
                None => {}
            }
        }
        Ok(())
    }

    /// Everything below `new` counts as touched, there and where it was before; false when not all could be seen.
    fn walk(&self, new: &Path, old: Option<&Path>, seen_at: Instant, feed: &mut Feed) -> bool {
        let mut steps = vec![PathBuf::new()];
        while let Some(below) = steps.pop() {
            let Ok(entries) = fs::read_dir(new.join(&below)) else { return false };
            for entry in entries {
                let Ok((entry, kind)) = entry.and_then(|entry| entry.file_type().map(|kind| (entry, kind))) else {
                    return false;
                };
                let is_dir = kind.is_dir();
                let rest = below.join(entry.file_name());
                if is_dir && self.roots.is_noise_dir(&new.join(&rest)) {
                    continue;
                }
                feed.touched(TouchKind::Found, &new.join(&rest), is_dir, seen_at);
                if let Some(old) = old {
                    feed.touched(TouchKind::Gone, &old.join(&rest), is_dir, seen_at);
                }
                if is_dir {
                    steps.push(rest);
                }
            }
        }
        true
    }

    fn path(&mut self, place: &Place) -> Where {
        match self.resolve(&place.dir) {
            Where::Known(dir) if place.name.is_empty() || &*place.name == b"." => Where::Known(dir),
            Where::Known(dir) => Where::Known(dir.join(place.name())),
            other => other,
        }
    }

    /// The path we know a directory by.
    fn resolve(&mut self, dir: &Object) -> Where {
        if let Some(path) = self.paths.get(dir) {
            return path.clone().map_or(Where::Elsewhere, Where::Known);
        }
        let mut names: Vec<Place> = Vec::new();
        let mut at = dir.clone();
        loop {
            match self.ask(&at) {
                Ok(real) => {
                    let real = names.iter().rev().fold(real, |path, place| path.join(place.name()));
                    let shown = self.shown(&real);
                    if names.is_empty() {
                        if self.paths.len() >= PATHS_MOST {
                            self.paths.clear();
                        }
                        self.paths.insert(dir.clone(), shown.clone());
                    }
                    return shown.map_or(Where::Elsewhere, Where::Known);
                }
                Err(Errno::ESTALE) if names.len() < DEEPEST => match self.graves.get(&at) {
                    Some(place) => {
                        names.push(place.clone());
                        at = place.dir.clone();
                    }
                    None => return Where::Gone,
                },
                Err(errno) => {
                    tracing::debug!(%errno, "a directory cannot be found by its handle");
                    return Where::Gone;
                }
            }
        }
    }

    /// The kernel's path of a directory.
    fn ask(&mut self, dir: &Object) -> Result<PathBuf, Errno> {
        // Of a file system that is not ours: below a mount that has been taken away.
        let system = self.systems.get_mut(&dir.fsid).ok_or(Errno::ENODEV)?;
        if system.open.is_empty() {
            system.open = system.mounts.values().filter_map(|path| File::open(path).ok()).collect();
        }
        let mut last = Err(Errno::ESTALE);
        for mount in &system.open {
            match handle::open(mount.as_fd(), dir.kind, &dir.handle) {
                Ok(found) => {
                    let link = format!("/proc/self/fd/{}", found.as_raw_fd());
                    let path = fs::read_link(&link).map_err(|_| Errno::EIO)?;
                    let bytes = path.as_os_str().as_bytes();
                    let is_gone = fs::metadata(&link).is_ok_and(|meta| meta.nlink() == 0);
                    let path = match bytes.strip_suffix(b" (deleted)") {
                        Some(before) if is_gone => PathBuf::from(std::ffi::OsStr::from_bytes(before)),
                        _ => path,
                    };
                    // Not to be reached through this mount.
                    if path.is_absolute()
                        && (self.aliases.iter().any(|(real, _)| path.starts_with(real)) || last.is_err())
                    {
                        last = Ok(path);
                    }
                }
                Err(errno) if last.is_err() => last = Err(errno),
                Err(_) => {}
            }
        }
        last
    }

    /// A real path as we know it; `None` when it is neither in an area nor above one.
    fn shown(&self, real: &Path) -> Option<PathBuf> {
        let inside = self.aliases.iter().find_map(|(root, shown)| {
            let rest = real.strip_prefix(root).ok()?;
            Some(if rest.as_os_str().is_empty() { shown.clone() } else { shown.join(rest) })
        });
        inside.or_else(|| self.aliases.iter().any(|(root, _)| root.starts_with(real)).then(|| real.to_owned()))
    }
}

/// Where a directory is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Where {
    Known(PathBuf),
    /// Nowhere near an area.
    Elsewhere,
    /// Removed, and nothing tells where it was.
    Gone,
}

impl Where {
    fn known(self) -> Option<PathBuf> {
        match self {
            Self::Known(path) => Some(path),
            _ => None,
        }
    }
}
