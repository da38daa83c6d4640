//! Lock files: 3.6 and later take one per mailbox for each command, all in a handful of directories, and let it go when
//! everything is written. So a few watches tell of every mailbox, however many there are, and no privilege is needed.
//!
//! They tell of reading as well, and not what was done: the engine looks at the index's header first. What is not kept in
//! mailboxes has no lock of this kind: those directories are watched as they are. Who changes files without a lock
//! (a restore by rsync) is found by the comparison that is asked for every `COMPARE`.

use super::ground::{Area, Ground};
use super::inotify::{InotifySource, role};
use super::table::Role;
use super::{CaptureError, FsKind, Reach, Source, fs_kind, local};
use nix::unistd::{AccessFlags, access};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What happens without a lock is no change by Cyrus: rare, and an admin's own work.
const COMPARE: Duration = Duration::from_secs(3600);

pub(super) fn fit(ground: &Ground, area: &Area) -> Result<String, String> {
    let root = ground.locks.as_ref().map_err(Clone::clone)?;
    let shown = root.display();
    if let Ok(kind @ FsKind::Remote(_)) = fs_kind(root) {
        return Err(format!("{kind} does not tell who lets go of the locks in {shown}"));
    }
    // Locks on this machine's disk are taken by this machine's server alone; but others may still write to the store.
    let place = local(ground, area).or_else(|why| if ground.is_demanded { Ok(why) } else { Err(why) })?;
    if watched_trees(ground).iter().any(|tree| root.starts_with(tree)) {
        return Err(format!("the locks in {shown} lie among the mailboxes"));
    }
    match access(root, AccessFlags::R_OK | AccessFlags::X_OK) {
        Ok(()) => {}
        // Made by the server with the first lock.
        Err(nix::errno::Errno::ENOENT) => {}
        Err(errno) => return Err(format!("{shown}: {errno}")),
    }
    Ok(format!("{place}, Cyrus keeps its locks in {shown}"))
}

fn watched_trees(ground: &Ground) -> Vec<PathBuf> {
    let trees = ground.roots.watched().into_iter().filter(|(_, reach)| *reach == Reach::Tree);
    trees.map(|(path, _)| path).collect()
}

pub(super) fn open(ground: &Ground) -> Result<Box<dyn Source>, CaptureError> {
    // `fit` has said so before.
    let root = ground.locks.clone().unwrap_or_default();
    // First of all: what comes last may find no watch left, and be looked after by another source.
    let mut plan = vec![(root, Role::Locks)];
    let serves = |path: &Path| {
        let holds = |area: &Area| area.path == path || (area.reach == Reach::Tree && path.starts_with(&area.path));
        ground.areas.iter().any(holds)
    };
    let beside = ground.roots.beside_mailboxes().into_iter().filter(|(path, _)| serves(path));
    plan.extend(beside.map(|(path, reach)| (path, role(reach))));
    Ok(Box::new(InotifySource::new(ground, plan, Some(COMPARE))?))
}
