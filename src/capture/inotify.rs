//! inotify: one watch per directory.
//!
//! Nothing between a `mkdir` and our watch is lost: a directory is watched *first* and listed *then*, and what the
//! listing shows counts as touched. What comes later is an event. The same walk mends everything else: a directory
//! that moved in, a root that appeared, a queue that overflowed.
//!
//! The thread sleeps in `poll` on the inotify descriptor and the orders, without any timer while nothing is held
//! back and nothing is unwatched.

use super::derive::{Reach, Roots};
use super::feed::{Control, Feed, TouchKind};
use super::ground::{Asker, Ground};
use super::mounts::Mounts;
use super::table::{Dir, Role, Table};
use super::{BACKLOG_MOST, BUFFER_BYTES, CaptureError, EVENTS_BETWEEN_READS, Source, wait_also};
use crate::model::{DirtyKey, MailboxRef, Scope};
use ::inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};
use nix::errno::Errno;
use std::collections::{BTreeSet, HashSet, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// No CLOSE_WRITE: Cyrus keeps databases and indexes open for hours, so MODIFY is the signal. No ATTRIB: it would
/// say nothing that the CREATE or MODIFY beside it does not.
fn mask() -> WatchMask {
    WatchMask::MODIFY
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVED_FROM
        | WatchMask::MOVED_TO
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR
}

/// Of lock files only the end matters: it comes when all is written.
fn mask_of_locks() -> WatchMask {
    WatchMask::CLOSE_WRITE | mask().difference(WatchMask::MODIFY)
}

/// How often directories without a watch are tried again, and compared meanwhile.
const RETRY: Duration = Duration::from_secs(30);
/// Unwatched directories remembered one by one; with more, all roots are walked again.
const UNWATCHED_MOST: usize = 1000;
/// Unwatched directories that are named one by one to the engine; with more, everything is compared.
const SCOPES_MOST: usize = 32;
/// Directories walked between two looks at the kernel's queue.
const SIPHON_EVERY: usize = 32;
/// So many events back a repeated MODIFY is recognised and dropped before anything is made of it.
const REPEAT_WITHIN: usize = 8;

struct Raw {
    wd: i32,
    mask: EventMask,
    name: Option<Box<OsStr>>,
    seen_at: Instant,
}

/// A directory to be watched and listed.
struct Step {
    path: PathBuf,
    parent: Option<i32>,
    role: Role,
    /// Reached through a symbolic link: may be a second way to a directory that is watched already.
    link: bool,
}

pub(super) struct InotifySource {
    inotify: Inotify,
    watches: Watches,
    roots: Roots,
    plan: Vec<(PathBuf, Role)>,
    /// Roots that do not exist, by their place in `plan`.
    unborn: BTreeSet<usize>,
    table: Table<WatchDescriptor>,
    buffer: Vec<u8>,
    backlog: VecDeque<Raw>,
    unwatched: Unwatched,
    mounts: Mounts,
    /// Watches met by the walk after an overflow; those not met are of directories that are gone.
    met: Option<HashSet<i32>>,
    /// Looks after directories without a watch; without it they are compared.
    relief: Option<Asker>,
    has_successor: bool,
    /// The watch of our own directory.
    cookies: Option<WatchDescriptor>,
    /// A watch that cannot be had or done without, and another source can take over.
    exhausted: Option<CaptureError>,
    /// When to compare what no event tells of, and how often.
    compare: Option<(Instant, Duration)>,
}

#[derive(Default)]
struct Unwatched {
    dirs: BTreeSet<PathBuf>,
    all: bool,
    retry_at: Option<Instant>,
    told: bool,
}

pub(super) fn open(ground: &Ground) -> Result<Box<dyn Source>, CaptureError> {
    let plan = ground.areas.iter().map(|area| (area.path.clone(), role(area.reach)));
    Ok(Box::new(InotifySource::new(ground, plan.collect(), None)?))
}

pub(super) fn role(reach: Reach) -> Role {
    match reach {
        Reach::Flat => Role::Flat,
        Reach::Tree => Role::Tree,
    }
}

impl InotifySource {
    /// Watches these directories, in this order.
    pub(super) fn new(
        ground: &Ground,
        plan: Vec<(PathBuf, Role)>,
        compare_every: Option<Duration>,
    ) -> Result<Self, CaptureError> {
        let inotify = Inotify::init().map_err(CaptureError::Instances)?;
        Ok(Self {
            compare: compare_every.map(|every| (Instant::now() + every, every)),
            watches: inotify.watches(),
            inotify,
            roots: ground.roots.clone(),
            plan,
            cookies: None,
            relief: ground.relief.clone().map(Asker::new),
            has_successor: ground.has_successor,
            exhausted: None,
            unborn: BTreeSet::new(),
            table: Table::default(),
            buffer: vec![0; BUFFER_BYTES],
            backlog: VecDeque::new(),
            unwatched: Unwatched::default(),
            mounts: Mounts::new(),
            met: None,
        })
    }
}

impl Source for InotifySource {
    fn run(&mut self, feed: &mut Feed, control: &Control) -> Result<(), CaptureError> {
        let begun = Instant::now();
        // Before the walk: what is mounted during it is then a change.
        self.mounts_changed();
        for root in 0..self.plan.len() {
            self.arm(root, false, feed);
        }
        // A watch that cannot be had leaves `seen_until` unknown, which is the truth.
        self.cookies =
            feed.cookies.as_ref().and_then(|cookies| self.watches.add(cookies.dir(), WatchMask::CREATE).ok());
        self.give_up()?;
        self.count(feed);
        tracing::info!(watches = self.table.len(), elapsed_ms = begun.elapsed().as_millis() as u64, "watching");
        feed.armed(control);
        loop {
            let mounts = self.wait(feed, control)?;
            let orders = control.take();
            if mounts && self.mounts_changed() {
                tracing::warn!("file systems of the store were mounted or unmounted, comparing everything");
                let seen_at = Instant::now();
                self.rewalk(false, feed);
                feed.lost(Scope::Everything, seen_at);
            }
            self.siphon(feed)?;
            let mut taken = 0usize;
            while let Some(raw) = self.backlog.pop_front() {
                self.event(raw, feed);
                taken += 1;
                // The kernel's queue is short; ours is not. And someone who waits wants the kernel's empty.
                if taken.is_multiple_of(EVENTS_BETWEEN_READS) || (self.backlog.is_empty() && orders.wants_all()) {
                    self.siphon(feed)?;
                    // In the middle of a long burst nothing has been quiet by the clock of its events: not earlier
                    // than now and then, or every event would become a notice of its own.
                    feed.hand_on_in_burst();
                }
            }
            let now = Instant::now();
            if self.unwatched.retry_at.is_some_and(|at| at <= now) {
                self.retry(feed);
            }
            if let Some((_, every)) = self.compare.filter(|(at, _)| *at <= now) {
                self.compare = Some((now + every, every));
                feed.lost(Scope::Everything, now);
            }
            self.give_up()?;
            self.count(feed);
            if feed.round_done(orders, now) {
                return Ok(());
            }
        }
    }
}

impl InotifySource {
    /// Sleeps until there is something to do; true when something was mounted or unmounted.
    fn wait(&self, feed: &Feed, control: &Control) -> Result<bool, CaptureError> {
        let compare_at = self.compare.map(|(at, _)| at);
        let wake_at = [feed.next_deadline(), self.unwatched.retry_at, compare_at].into_iter().flatten().min();
        wait_also(control, Some(self.inotify.as_fd()), self.mounts.descriptor(), wake_at)
    }

    /// Ends this source when it cannot have a watch and another one needs none.
    fn give_up(&mut self) -> Result<(), CaptureError> {
        self.exhausted.take().map_or(Ok(()), Err)
    }

    fn mounts_changed(&mut self) -> bool {
        self.mounts.changed(self.plan.iter().map(|(path, _)| path.as_path()))
    }

    /// Takes over what the kernel holds at this moment, without looking at it.
    fn siphon(&mut self, feed: &Feed) -> Result<(), CaptureError> {
        while self.backlog.len() < BACKLOG_MOST {
            let events = match self.inotify.read_events(&mut self.buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(cause) => return Err(CaptureError::System { what: "reading inotify", cause }),
            };
            let seen_at = Instant::now();
            for event in events {
                feed.counters.events.fetch_add(1, Relaxed);
                let wd = event.wd.get_watch_descriptor_id();
                // The earlier one has not been looked at either, so what it leads to is read after both.
                let is_repeat = event.mask == EventMask::MODIFY
                    && self.backlog.iter().rev().take(REPEAT_WITHIN).any(|held| {
                        held.wd == wd && held.mask == EventMask::MODIFY && held.name.as_deref() == event.name
                    });
                if !is_repeat {
                    let name = event.name.map(|name| name.to_owned().into_boxed_os_str());
                    self.backlog.push_back(Raw { wd, mask: event.mask, name, seen_at });
                }
            }
        }
        Ok(())
    }

    fn count(&self, feed: &Feed) {
        feed.counters.watches.store(self.table.len() as u64, Relaxed);
        feed.counters.unwatched.store(self.unwatched.dirs.len() as u64, Relaxed);
    }

    fn event(&mut self, raw: Raw, feed: &mut Feed) {
        let Raw { wd, mask, name, seen_at } = raw;
        if mask.contains(EventMask::Q_OVERFLOW) {
            return self.overflow(feed, seen_at);
        }
        if self.cookies.as_ref().is_some_and(|cookies| cookies.get_watch_descriptor_id() == wd) {
            return name.iter().for_each(|name| feed.cookie(name));
        }
        // Events of a watch we removed: whoever removed it has reported or will walk what it stood for.
        let Some(role) = self.table.get(wd).map(|dir| dir.role) else { return };
        if mask.contains(EventMask::IGNORED) {
            return self.gone(wd, feed, seen_at);
        }
        if mask.contains(EventMask::MOVE_SELF) {
            return self.moved(wd, feed, seen_at);
        }
        let Some(name) = name else { return };
        let Some(path) = self.table.path(wd).map(|dir| dir.join(&*name)) else {
            // Its place is unknown for the moment, what it holds is not to be guessed.
            return feed.lost(Scope::Everything, seen_at);
        };
        let is_dir = mask.contains(EventMask::ISDIR);
        let kind = touch_kind(mask);
        let came = matches!(kind, TouchKind::Create | TouchKind::MovedTo);
        match role {
            Role::Locks if mask.contains(EventMask::CLOSE_WRITE) => self.released(&path, feed, seen_at),
            Role::Locks if came && is_dir => self.walk(Step { path, parent: Some(wd), role, link: false }, true, feed),
            // Locks that are held in it are let go where nobody looks.
            Role::Locks if is_dir && kind == TouchKind::MovedFrom => feed.lost(Scope::Everything, seen_at),
            Role::Locks => {}
            Role::Tree if is_dir && self.roots.is_noise_dir(&path) => {}
            Role::Tree => {
                let known = feed.touched(kind, &path, is_dir, seen_at);
                if came && is_dir {
                    self.walk(Step { path, parent: Some(wd), role, link: false }, true, feed);
                } else if is_dir && kind == TouchKind::MovedFrom && !known {
                    // Neither Cyrus nor an admin with a plan moves these; whatever is below has changed its place.
                    feed.lost(Scope::Everything, seen_at);
                }
            }
            Role::Flat | Role::Ladder => {
                if role == Role::Flat && !is_dir {
                    feed.touched(kind, &path, is_dir, seen_at);
                }
                if came {
                    // A symbolic link may lead to a root as well.
                    let below = (0..self.plan.len())
                        .filter(|&root| is_dir || self.unborn.contains(&root))
                        .filter(|&root| self.root_path(root).starts_with(&path));
                    let below: Vec<usize> = below.collect();
                    below.into_iter().for_each(|root| self.arm(root, true, feed));
                }
            }
        }
    }

    fn root_path(&self, root: usize) -> &Path {
        self.plan.get(root).map(|(path, _)| path.as_path()).unwrap_or(Path::new(""))
    }

    /// The directory of locks that holds this path.
    fn lock_root(&self, path: &Path) -> Option<&Path> {
        let roots = self.plan.iter().filter(|(_, role)| *role == Role::Locks).map(|(root, _)| root.as_path());
        roots.into_iter().find(|root| path.starts_with(root))
    }

    /// Somebody has let go of a lock.
    fn released(&self, path: &Path, feed: &mut Feed, seen_at: Instant) {
        let below = self.lock_root(path).and_then(|root| path.strip_prefix(root).ok());
        for key in below.map(|below| self.roots.derive_lock(below)).unwrap_or_default() {
            feed.names(TouchKind::Released, path, key, seen_at);
        }
    }

    fn trees(&self) -> impl Iterator<Item = &Path> {
        self.plan.iter().filter(|(_, role)| *role == Role::Tree).map(|(path, _)| path.as_path())
    }

    /// Watches one root and all below it; without it, the nearest directory above.
    fn arm(&mut self, root: usize, report: bool, feed: &mut Feed) {
        let Some((path, role)) = self.plan.get(root).cloned() else { return };
        loop {
            match self.add(&path, role) {
                Ok(_) => {
                    if self.unborn.remove(&root) {
                        tracing::info!(path = %path.display(), "root is watched now");
                    }
                    return self.walk(Step { path, parent: None, role, link: false }, report, feed);
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    self.unborn.insert(root);
                    return self.cannot_watch(&path, error, feed);
                }
            }
            if self.unborn.insert(root) {
                tracing::info!(path = %path.display(), "root does not exist, waiting for it");
            }
            let Some(next) = self.ladder(&path, feed) else { return };
            // Created after we looked for it and before the directory above was watched: look once more.
            if !next.is_dir() {
                return;
            }
        }
    }

    /// Watches the nearest existing directory above `path`; gives the one that is missing below it.
    fn ladder(&mut self, path: &Path, feed: &mut Feed) -> Option<PathBuf> {
        let mut missing = path;
        while let Some(above) = missing.parent() {
            match self.add(above, Role::Ladder) {
                Ok(watch) => {
                    let wd = watch.get_watch_descriptor_id();
                    self.meet(wd);
                    if self.table.get(wd).is_none() {
                        let name = above.as_os_str().to_owned().into_boxed_os_str();
                        self.table.insert(wd, Dir { watch, parent: None, name, role: Role::Ladder });
                    }
                    return Some(missing.to_owned());
                }
                Err(error) if is_gone(&error) => missing = above,
                Err(error) => {
                    self.cannot_watch(above, error, feed);
                    return None;
                }
            }
        }
        None
    }

    fn add(&mut self, path: &Path, role: Role) -> io::Result<WatchDescriptor> {
        let mask = if role == Role::Locks { mask_of_locks() } else { mask() };
        self.watches.add(path, mask)
    }

    fn meet(&mut self, wd: i32) {
        if let Some(met) = &mut self.met {
            met.insert(wd);
        }
    }

    /// Watches a directory and everything below it, each first and then listed; with `report`, all that is found
    /// counts as touched.
    fn walk(&mut self, first: Step, report: bool, feed: &mut Feed) {
        let mut steps = vec![first];
        let mut walked = 0usize;
        while let Some(step) = steps.pop() {
            if self.exhausted.is_some() {
                return;
            }
            walked += 1;
            if walked.is_multiple_of(SIPHON_EVERY) {
                // An error comes again at the next read in the main loop, and ends this source there.
                let _ = self.siphon(feed);
                feed.hand_on_in_burst();
            }
            let watch = match self.add(&step.path, step.role) {
                Ok(watch) => watch,
                // Gone again, or not a directory any more: the watch above it tells the rest.
                Err(error) if is_gone(&error) => continue,
                Err(error) => {
                    self.cannot_watch(&step.path, error, feed);
                    continue;
                }
            };
            let wd = watch.get_watch_descriptor_id();
            if !self.register(wd, watch, &step, feed) {
                continue;
            }
            if report {
                feed.touched(TouchKind::Found, &step.path, true, Instant::now());
            }
            if let Err(error) = self.list(wd, &step, report, feed, &mut steps)
                && !is_gone(&error)
            {
                self.cannot_watch(&step.path, error, feed);
            }
        }
    }

    fn list(
        &mut self,
        wd: i32,
        step: &Step,
        report: bool,
        feed: &mut Feed,
        steps: &mut Vec<Step>,
    ) -> Result<(), io::Error> {
        for entry in std::fs::read_dir(&step.path)? {
            let entry = entry?;
            let kind = match entry.file_type() {
                Ok(kind) => kind,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            let link = kind.is_symlink();
            let path = entry.path();
            let is_dir = kind.is_dir() || (link && path.is_dir());
            if is_dir {
                if matches!(step.role, Role::Tree | Role::Locks) && !self.roots.is_noise_dir(&path) {
                    steps.push(Step { path, parent: Some(wd), role: step.role, link });
                }
            } else if report && step.role == Role::Locks {
                self.released(&path, feed, Instant::now());
            } else if report {
                feed.touched(TouchKind::Found, &path, false, Instant::now());
            }
        }
        Ok(())
    }

    /// Enters a watch in the table; false when there is nothing to walk because it is known by another way.
    fn register(&mut self, wd: i32, watch: WatchDescriptor, step: &Step, feed: &mut Feed) -> bool {
        self.meet(wd);
        let name = match step.parent {
            Some(_) => step.path.file_name().unwrap_or_default().to_owned(),
            None => step.path.as_os_str().to_owned(),
        };
        let Some(known) = self.table.get_mut(wd) else {
            self.table.insert(wd, Dir { watch, parent: step.parent, name: name.into_boxed_os_str(), role: step.role });
            return true;
        };
        let same_place = known.parent == step.parent && *known.name == *name;
        if same_place {
            known.role = known.role.max(step.role);
            return true;
        }
        if known.role == Role::Ladder {
            // It was only on the way to a root that did not exist; now it is part of a tree itself.
            known.role = step.role;
            self.table.place(wd, step.parent, name);
            return true;
        }
        let under_itself = step.parent.is_some_and(|parent| self.table.is_within(parent, wd));
        let is_root = self.table.get(wd).is_some_and(|dir| dir.parent.is_none());
        if step.link || under_itself || is_root {
            let known = self.table.path(wd).unwrap_or_default();
            tracing::warn!(path = %step.path.display(), known = %known.display(), "second way to the same directory");
            return false;
        }
        self.report_gone(wd, feed, Instant::now());
        self.table.place(wd, step.parent, name);
        true
    }

    /// The directory and all known below it have left the place where the table has them.
    fn report_gone(&self, wd: i32, feed: &mut Feed, seen_at: Instant) {
        for below in self.table.within(wd) {
            match self.table.path(below) {
                Some(path) => {
                    feed.touched(TouchKind::Gone, &path, true, seen_at);
                }
                None => feed.lost(Scope::Everything, seen_at),
            }
        }
    }

    /// The kernel ended a watch: the directory was deleted or unmounted.
    fn gone(&mut self, wd: i32, feed: &mut Feed, seen_at: Instant) {
        let Some(dir) = self.table.remove(wd) else { return };
        if dir.parent.is_none() {
            self.root_gone(Path::new(&*dir.name), feed, seen_at);
        }
    }

    fn root_gone(&mut self, path: &Path, feed: &mut Feed, seen_at: Instant) {
        let affected: Vec<usize> =
            (0..self.plan.len()).filter(|&root| self.root_path(root).starts_with(path)).collect();
        for root in affected {
            if self.plan.get(root).is_some_and(|(_, role)| *role >= Role::Tree) && !self.unborn.contains(&root) {
                feed.lost(Scope::Everything, seen_at);
            }
            self.arm(root, true, feed);
        }
    }

    /// A watched directory has a new name; events before this one may have told us where it is now.
    fn moved(&mut self, wd: i32, feed: &mut Feed, seen_at: Instant) {
        let Some(path) = self.table.path(wd) else { return self.forget(wd, feed, seen_at) };
        let (parent, role) = self.table.get(wd).map_or((None, Role::Tree), |dir| (dir.parent, dir.role));
        match self.add(&path, role) {
            Ok(watch) if watch.get_watch_descriptor_id() == wd => {}
            Ok(_) => {
                // Another directory took the name already.
                self.forget(wd, feed, seen_at);
                self.walk(Step { path, parent, role, link: false }, true, feed);
            }
            Err(_) => self.forget(wd, feed, seen_at),
        }
    }

    /// Drops the watches of a directory that has left its place, and of all below. Should it turn up elsewhere in a
    /// watched tree, its MOVED_TO is still to come, and walks it.
    fn forget(&mut self, wd: i32, feed: &mut Feed, seen_at: Instant) {
        self.report_gone(wd, feed, seen_at);
        let mut roots = Vec::new();
        for below in self.table.within(wd) {
            let Some(dir) = self.table.remove(below) else { continue };
            if dir.parent.is_none() {
                roots.push(PathBuf::from(&*dir.name));
            }
            // EINVAL: the kernel has ended it already.
            let _ = self.watches.remove(dir.watch);
        }
        roots.iter().for_each(|path| self.root_gone(path, feed, seen_at));
    }

    /// Events were dropped, among them perhaps new directories: walk everything, *then* ask for a comparison, so
    /// that nothing can change unseen between the two.
    fn overflow(&mut self, feed: &mut Feed, seen_at: Instant) {
        feed.counters.overflows.fetch_add(1, Relaxed);
        tracing::warn!(
            "inotify queue overflowed, comparing everything; fs.inotify.max_queued_events (sysctl) sets its length"
        );
        self.rewalk(false, feed);
        feed.lost(Scope::Everything, seen_at);
    }

    fn rewalk(&mut self, report: bool, feed: &mut Feed) {
        self.met = Some(HashSet::new());
        for root in 0..self.plan.len() {
            self.arm(root, report, feed);
        }
        let met = self.met.take().unwrap_or_default();
        let stale: Vec<i32> = self.table.wds().filter(|wd| !met.contains(wd)).collect();
        for wd in stale {
            if let Some(dir) = self.table.remove(wd) {
                let _ = self.watches.remove(dir.watch);
            }
        }
    }

    /// A directory that should be watched and cannot be.
    fn cannot_watch(&mut self, path: &Path, error: io::Error, feed: &mut Feed) {
        let now = Instant::now();
        let errno = error.raw_os_error().map(Errno::from_raw);
        // Every ext4 mount point has one, and only root may look into it.
        if errno == Some(Errno::EACCES) && path.file_name().is_some_and(|name| name == "lost+found") {
            return;
        }
        if errno == Some(Errno::ENOSPC) && self.has_successor {
            self.exhausted.get_or_insert(CaptureError::Watches(error));
            return;
        }
        if self.lock_root(path).is_some() {
            // What is locked there would change unseen: nothing that is compared now and then makes up for that.
            let why = format!("its lock files cannot be watched: {error}");
            self.exhausted.get_or_insert(CaptureError::Unfit { source_name: "locks", path: path.to_owned(), why });
            return;
        }
        if !self.unwatched.told {
            self.unwatched.told = true;
            let cure = match errno {
                Some(Errno::ENOSPC) => "raise fs.inotify.max_user_watches (sysctl)",
                Some(Errno::EMFILE | Errno::ENFILE) => "raise the limit of open files",
                Some(Errno::EACCES | Errno::EPERM) => "let this user read and search it",
                _ => "see the error",
            };
            tracing::error!(path = %path.display(), %error, cure, "directory cannot be watched, looking at it again and again instead");
        }
        if self.unwatched.dirs.len() < UNWATCHED_MOST {
            self.unwatched.dirs.insert(path.to_owned());
        } else {
            self.unwatched.all = true;
        }
        self.unwatched.retry_at.get_or_insert(now + RETRY);
        if let Some(relief) = &self.relief {
            let asked: Vec<&Path> = match self.unwatched.all {
                true => self.trees().collect(),
                false => vec![path],
            };
            if asked.into_iter().filter(|path| relief.ask(path)).count() == 0 {
                // It is looked after already.
                return;
            }
        }
        let scope = match self.roots.derive(path, true) {
            Some(DirtyKey::Mailbox(MailboxRef::Name(name))) if self.unwatched.dirs.len() <= SCOPES_MOST => {
                Scope::Below(name)
            }
            _ => Scope::Everything,
        };
        feed.lost(scope, now);
    }

    /// Tries the unwatched directories again; what fails once more counts as lost once more.
    fn retry(&mut self, feed: &mut Feed) {
        let Unwatched { dirs, all, .. } =
            std::mem::replace(&mut self.unwatched, Unwatched { told: true, ..Unwatched::default() });
        if all {
            self.rewalk(true, feed);
        }
        for path in dirs {
            if let Some(root) = (0..self.plan.len()).find(|&root| self.root_path(root) == path) {
                self.arm(root, true, feed);
                continue;
            }
            let parent = path.parent().and_then(|above| self.add(above, Role::Tree).ok());
            let parent = parent.map(|watch| watch.get_watch_descriptor_id()).filter(|wd| self.table.get(*wd).is_some());
            // Without the directory above nothing is left to be watched here.
            if let Some(parent) = parent {
                self.walk(Step { path, parent: Some(parent), role: Role::Tree, link: false }, true, feed);
            }
        }
        if let Some(relief) = &self.relief {
            // Events of those that have a watch now are seen; what changed before it was told by the walk.
            let mut still = self.unwatched.dirs.clone();
            if self.unwatched.all {
                still.extend(self.trees().map(Path::to_owned));
            }
            relief.keep(&still);
        }
        if self.unwatched.retry_at.is_none() {
            self.unwatched.told = false;
            tracing::info!(watches = self.table.len(), "every directory is watched again");
        }
    }
}

fn touch_kind(mask: EventMask) -> TouchKind {
    if mask.contains(EventMask::CREATE) {
        TouchKind::Create
    } else if mask.contains(EventMask::DELETE) {
        TouchKind::Delete
    } else if mask.contains(EventMask::MOVED_FROM) {
        TouchKind::MovedFrom
    } else if mask.contains(EventMask::MOVED_TO) {
        TouchKind::MovedTo
    } else {
        TouchKind::Modify
    }
}

/// Not there, or there is something else under its name.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
