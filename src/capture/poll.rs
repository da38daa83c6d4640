//! Looks again and again: lists every directory, stats what can change in place, compares with what it saw before. For
//! file systems that others change without this kernel's knowledge (NFS, FUSE, clusters), and for directories that
//! got no watch.
//!
//! Two paces: databases and directories that changed of late are looked at every `poll_every`; a round of everything
//! takes its time from how long the last one took, so that looking never costs more than a fixed share of the machine.
//!
//! Time stamps have a granularity, and a server's clock is not ours. So no stamp is compared with a clock: what was
//! seen to change is told once more at each look until `SETTLE` has passed since, whatever its stamp says.

use super::derive::{Reach, Roots};
use super::feed::{Control, Feed, TouchKind};
use super::ground::{Area, Ground, Relief};
use super::{CaptureError, Source, wait};
use crate::model::{DirtyKey, Scope, pulse};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// A full round may take this part of the time: one of 0.5 s comes every 10 s.
const SHARE: u32 = 20;
/// … and comes after this long at the latest, however long it takes.
const LONGEST: Duration = Duration::from_secs(300);
/// Longer than the stamps of any file system in use are coarse, and than NFS keeps attributes by default.
const SETTLE: Duration = Duration::from_secs(5);
/// Directories that are looked at in the quick pace because they changed of late.
const HOT_MOST: usize = 1000;
/// … for so long.
const HOT_FOR: Duration = Duration::from_secs(30);

/// What a directory held. Files of one key are one group: a mailbox is one, a directory of users' files has many.
struct Seen {
    round: u64,
    groups: Vec<Group>,
}

struct Group {
    /// A file of the group, to tell what was touched.
    file: Box<OsStr>,
    digest: u64,
    changed_at: Option<Instant>,
}

struct PollSource {
    roots: Roots,
    areas: Vec<Area>,
    relief: Option<Arc<Relief>>,
    every: Duration,
    dirs: HashMap<PathBuf, Seen>,
    hot: HashMap<PathBuf, Instant>,
    round: u64,
    troubled: bool,
}

pub(super) fn open(ground: &Ground) -> Result<Box<dyn Source>, CaptureError> {
    Ok(Box::new(PollSource {
        roots: ground.roots.clone(),
        areas: ground.areas.clone(),
        relief: ground.relief.clone(),
        every: ground.poll_every,
        dirs: HashMap::new(),
        hot: HashMap::new(),
        round: 0,
        troubled: false,
    }))
}

impl Source for PollSource {
    fn run(&mut self, feed: &mut Feed, control: &Control) -> Result<(), CaptureError> {
        // Directories of another source got no watch some time ago: they are new to us, not to the world.
        let mut pace = self.full(self.relief.is_some(), feed, control);
        feed.armed(control);
        let (mut full_at, mut quick_at) = (Instant::now() + pace, Instant::now() + self.every);
        loop {
            let next = full_at.min(quick_at);
            wait(control, None, Some(feed.next_deadline().map_or(next, |deadline| deadline.min(next))))?;
            let orders = control.take();
            let now = Instant::now();
            if now >= full_at || orders.wants_all() {
                pace = self.full(true, feed, control);
                full_at = Instant::now() + pace;
                quick_at = Instant::now() + self.every;
            } else if now >= quick_at {
                self.quick(feed);
                quick_at = Instant::now() + self.every;
            }
            if feed.round_done(orders, Instant::now()) {
                return Ok(());
            }
        }
    }
}

impl PollSource {
    /// Looks at everything; gives the time until the next such round. With `report`, what was not known counts as
    /// touched.
    fn full(&mut self, report: bool, feed: &mut Feed, control: &Control) -> Duration {
        let begun = Instant::now();
        self.round += 1;
        let mut linked = HashSet::new();
        let mut steps: Vec<(PathBuf, Reach)> = self.areas.iter().map(|area| (area.path.clone(), area.reach)).collect();
        if let Some(relief) = &self.relief {
            steps.extend(relief.dirs().into_iter().map(|path| (path, Reach::Tree)));
        }
        let tops: HashSet<PathBuf> = steps.iter().map(|(path, _)| path.clone()).collect();
        while let Some((path, reach)) = steps.pop() {
            if control.is_stopping() {
                return self.every;
            }
            match self.look(&path, reach, report, feed) {
                Ok(below) => {
                    for (below, link) in below {
                        // Two links may lead to each other: a directory behind one is entered once.
                        let is_new = !link || id(&below).is_some_and(|id| linked.insert(id));
                        if is_new && (!link || !below.canonicalize().is_ok_and(|real| path.starts_with(real))) {
                            steps.push((below, Reach::Tree));
                        }
                    }
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    if !std::mem::replace(&mut self.troubled, true) {
                        tracing::error!(path = %path.display(), %error, "directory cannot be looked at, comparing everything instead");
                    }
                    self.keep_below(&path);
                    feed.lost(Scope::Everything, Instant::now());
                }
            }
            feed.hand_on_in_burst();
        }
        self.forget(&tops, feed);
        feed.counters.watches.store(self.dirs.len() as u64, Relaxed);
        // Before this moment nothing changed that has not been told.
        feed.looked_until(begun);
        (begun.elapsed() * SHARE).clamp(self.every, LONGEST.max(self.every))
    }

    /// What lies below a directory that cannot be read has not vanished.
    fn keep_below(&mut self, path: &Path) {
        let round = self.round;
        self.dirs.iter_mut().filter(|(dir, _)| dir.starts_with(path)).for_each(|(_, seen)| seen.round = round);
    }

    /// Databases, and what changed of late.
    fn quick(&mut self, feed: &mut Feed) {
        let now = Instant::now();
        self.hot.retain(|_, at| now.duration_since(*at) < HOT_FOR);
        let flat =
            self.areas.iter().filter(|area| area.reach == Reach::Flat).map(|area| (area.path.clone(), area.reach));
        let hot = self.hot.keys().map(|path| (path.clone(), Reach::Tree));
        for (path, reach) in flat.chain(hot).collect::<Vec<_>>() {
            if let Ok(below) = self.look(&path, reach, true, feed) {
                for (below, link) in below {
                    if !link && !self.dirs.contains_key(&below) {
                        self.hot_now(&below, now);
                    }
                }
            }
        }
    }

    fn hot_now(&mut self, path: &Path, now: Instant) {
        if self.hot.len() < HOT_MOST {
            self.hot.insert(path.to_owned(), now);
        }
    }

    /// Looks at one directory; gives those below it, each with whether it is a link.
    fn look(&mut self, path: &Path, reach: Reach, report: bool, feed: &mut Feed) -> io::Result<Vec<(PathBuf, bool)>> {
        let mut below = Vec::new();
        let mut found: BTreeMap<DirtyKey, (OsString, u64)> = BTreeMap::new();
        for entry in std::fs::read_dir(path)? {
            pulse::beat();
            let entry = entry?;
            let kind = match entry.file_type() {
                Ok(kind) => kind,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            let full = entry.path();
            let link = kind.is_symlink();
            if kind.is_dir() || (link && full.is_dir()) {
                if reach == Reach::Tree && !self.roots.is_noise_dir(&full) {
                    below.push((full, link));
                }
                continue;
            }
            let Some(key) = self.roots.derive(&full, false) else { continue };
            let name = entry.file_name();
            let mut hasher = DefaultHasher::new();
            name.hash(&mut hasher);
            // Message files are written before they get their name, and never after.
            if !name.as_bytes().ends_with(b".") {
                match entry.metadata() {
                    Ok(meta) => {
                        (meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()).hash(&mut hasher);
                        (meta.ctime(), meta.ctime_nsec()).hash(&mut hasher);
                    }
                    Err(error) if is_gone(&error) => continue,
                    Err(error) => return Err(error),
                }
            }
            let group = found.entry(key).or_insert_with(|| (name, 0));
            // The order of a listing means nothing.
            group.1 = group.1.wrapping_add(hasher.finish());
        }
        self.compare(path, found, report, feed);
        Ok(below)
    }

    fn compare(&mut self, path: &Path, found: BTreeMap<DirtyKey, (OsString, u64)>, report: bool, feed: &mut Feed) {
        let now = Instant::now();
        let before = self.dirs.remove(path);
        let is_new = before.is_none();
        let mut old: HashMap<DirtyKey, Group> = HashMap::new();
        for group in before.into_iter().flat_map(|seen| seen.groups) {
            if let Some(key) = self.roots.derive(&path.join(&*group.file), false) {
                old.insert(key, group);
            }
        }
        let mut touched = false;
        let groups = found.into_iter().map(|(key, (file, digest))| {
            let was = old.remove(&key);
            let mut changed_at = was.as_ref().and_then(|group| group.changed_at);
            let differs = was.is_none_or(|group| group.digest != digest);
            if differs && (report || !is_new) {
                changed_at = Some(now);
            }
            if let Some(at) = changed_at {
                feed.counters.events.fetch_add(1, Relaxed);
                let kind = if is_new { TouchKind::Found } else { TouchKind::Modify };
                feed.touched(kind, &path.join(&file), false, now);
                touched |= differs;
                if now.duration_since(at) >= SETTLE {
                    changed_at = None;
                }
            }
            Group { file: file.into_boxed_os_str(), digest, changed_at }
        });
        let groups: Vec<Group> = groups.collect();
        for (_, gone) in old {
            touched = true;
            feed.counters.events.fetch_add(1, Relaxed);
            feed.touched(TouchKind::Gone, &path.join(&*gone.file), false, now);
        }
        if is_new && report {
            feed.touched(TouchKind::Found, path, true, now);
        }
        self.dirs.insert(path.to_owned(), Seen { round: self.round, groups });
        if touched {
            self.hot_now(path, now);
        }
    }

    /// Directories that this round did not meet are gone.
    fn forget(&mut self, tops: &HashSet<PathBuf>, feed: &mut Feed) {
        let now = Instant::now();
        let round = self.round;
        let gone: Vec<PathBuf> =
            self.dirs.iter().filter(|(_, seen)| seen.round != round).map(|(path, _)| path.clone()).collect();
        for path in gone {
            let Some(seen) = self.dirs.remove(&path) else { continue };
            feed.touched(TouchKind::Gone, &path, true, now);
            for group in &seen.groups {
                feed.touched(TouchKind::Gone, &path.join(&*group.file), false, now);
            }
            if tops.contains(&path) {
                feed.lost(Scope::Everything, now);
            }
        }
    }
}

fn id(path: &Path) -> Option<(u64, u64)> {
    path.metadata().ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Not there, or there is something else under its name.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
