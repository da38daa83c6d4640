//! What a source is given to watch, and what kind of file system that lies on.

use super::Settings;
use super::cookies::Cookies;
use super::derive::{Reach, Roots};
use super::feed::lock;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// One root of the store: a partition, a directory of databases.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Area {
    pub path: PathBuf,
    pub reach: Reach,
}

/// Everything a source has to know to be opened.
#[derive(Clone)]
pub struct Ground {
    pub(super) roots: Roots,
    pub(super) areas: Vec<Area>,
    /// Directories of another source's areas that it cannot watch itself; `poll` serves them.
    pub(super) relief: Option<Arc<Relief>>,
    /// Another source of kernel events stands by: when watches run out, end instead of comparing what is left.
    pub(super) has_successor: bool,
    /// Shortest time between two looks of `poll`.
    pub(super) poll_every: Duration,
    /// How often `scan` asks for a comparison.
    pub(super) scan_every: Duration,
    /// A directory of ours whose files the kernel's queue has to tell of.
    pub(super) cookies: Option<Arc<Cookies>>,
    /// The log that `synclog` consumes, or why there is none.
    pub(super) sync_log: Result<PathBuf, String>,
    /// Where lock files tell what changed, or why they do not.
    pub(super) locks: Result<PathBuf, String>,
    /// This source was asked for, whatever `auto` would take.
    pub(super) is_demanded: bool,
}

impl Ground {
    pub(super) fn new(roots: Roots, settings: &Settings, cookies: Option<Arc<Cookies>>) -> Self {
        let areas = roots.watched().into_iter().map(|(path, reach)| Area { path, reach }).collect();
        Self {
            roots,
            areas,
            relief: None,
            has_successor: false,
            poll_every: settings.poll_every,
            scan_every: settings.scan_every,
            cookies,
            sync_log: settings.sync_log.clone(),
            locks: settings.locks.clone(),
            is_demanded: settings.source != super::AUTO,
        }
    }
}

/// Directories that wait for a source which needs no watch.
pub struct Relief {
    /// Each with those who asked for it.
    dirs: Mutex<BTreeMap<PathBuf, BTreeSet<u64>>>,
    askers: AtomicU64,
    /// Rung when the first directory comes.
    bell: Box<dyn Fn() + Send + Sync>,
}

impl Relief {
    pub(super) fn new(bell: Box<dyn Fn() + Send + Sync>) -> Arc<Self> {
        Arc::new(Self { dirs: Mutex::default(), askers: AtomicU64::new(0), bell })
    }

    pub(super) fn dirs(&self) -> BTreeSet<PathBuf> {
        lock(&self.dirs).keys().cloned().collect()
    }
}

/// One source's directories that others look after; given back when the source ends.
pub struct Asker {
    relief: Arc<Relief>,
    id: u64,
}

impl Asker {
    pub(super) fn new(relief: Arc<Relief>) -> Self {
        let id = relief.askers.fetch_add(1, Relaxed);
        Self { relief, id }
    }

    /// Asks for this directory to be looked after; true when nobody has asked before.
    pub(super) fn ask(&self, path: &Path) -> bool {
        let mut dirs = lock(&self.relief.dirs);
        let is_new = !dirs.contains_key(path);
        dirs.entry(path.to_owned()).or_default().insert(self.id);
        if is_new && dirs.len() == 1 {
            (self.relief.bell)();
        }
        is_new
    }

    /// These are all that are still to be looked after.
    pub(super) fn keep(&self, still: &BTreeSet<PathBuf>) {
        lock(&self.relief.dirs).retain(|path, askers| {
            if !still.contains(path) {
                askers.remove(&self.id);
            }
            !askers.is_empty()
        });
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.keep(&BTreeSet::new());
    }
}

/// What a directory lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsKind {
    /// Every change goes through this kernel.
    Local(&'static str),
    /// Others may change it without this kernel's knowledge.
    Remote(&'static str),
    /// A number we do not know; taken for local.
    Unknown(i64),
}

impl fmt::Display for FsKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(name) | Self::Remote(name) => f.write_str(name),
            Self::Unknown(magic) => write!(f, "file system {magic:#x}"),
        }
    }
}

/// `f_type` of statfs(2), from the kernel's `magic.h` and its neighbours.
const LOCAL: &[(i64, &str)] = &[
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0x0102_1994, "tmpfs"),
    (0x2fc1_2fc1, "zfs"),
    (0xf2f5_2010, "f2fs"),
    (0x794c_7630, "overlay"),
    (0x5265_4973, "reiserfs"),
    (0x3153_464a, "jfs"),
    (0xca45_1a4e, "bcachefs"),
    (0x8584_58f6, "ramfs"),
];
const REMOTE: &[(i64, &str)] = &[
    (0x6969, "nfs"),
    (0x6573_5546, "fuse"),
    (0xff53_4d42, "cifs"),
    (0xfe53_4d42, "smb2"),
    (0x517b, "smb"),
    (0x00c3_6400, "ceph"),
    (0x5346_414f, "afs"),
    (0x6b41_4653, "afs"),
    (0x0102_1997, "9p"),
    (0x7461_636f, "ocfs2"),
    (0x0116_1970, "gfs2"),
    (0x0bd0_0bd0, "lustre"),
    (0x4750_4653, "gpfs"),
    (0x7375_7245, "coda"),
];

/// The same as `/proc/self/mountinfo` spells them.
pub(super) fn is_remote_name(name: &[u8]) -> bool {
    let base = name.split(|&byte| byte == b'.').next().unwrap_or(name);
    matches!(base, b"nfs" | b"nfs4" | b"fuse" | b"cifs" | b"smb3" | b"ceph" | b"afs" | b"9p" | b"ocfs2" | b"gfs2")
        || matches!(base, b"lustre" | b"gpfs" | b"coda" | b"virtiofs")
}

fn kind_of(magic: i64) -> FsKind {
    // The type is 32 bits; some machines extend its sign.
    let magic = magic & 0xffff_ffff;
    let find = |table: &[(i64, &'static str)]| table.iter().find(|(known, _)| *known == magic).map(|(_, name)| *name);
    match (find(LOCAL), find(REMOTE)) {
        (Some(name), _) => FsKind::Local(name),
        (_, Some(name)) => FsKind::Remote(name),
        _ => FsKind::Unknown(magic),
    }
}

/// The kind of file system a path is on, or would be on if it does not exist yet.
pub fn fs_kind(path: &Path) -> std::io::Result<FsKind> {
    for above in path.ancestors() {
        match nix::sys::statfs::statfs(above) {
            // Signed and unsigned, of 32 and 64 bits: another one for each C library and machine.
            Ok(stat) => return Ok(kind_of(i128::from(stat.filesystem_type().0) as i64)),
            Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(std::io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_known_by_their_numbers() {
        // Values of statfs(2) as the manual page prints them.
        assert_eq!(kind_of(0xef53), FsKind::Local("ext4"));
        assert_eq!(kind_of(0x6969), FsKind::Remote("nfs"));
        assert_eq!(kind_of(0xff53_4d42_u32 as i32 as i64), FsKind::Remote("cifs"));
        assert_eq!(kind_of(0x9123_683e), FsKind::Local("btrfs"));
        assert_eq!(kind_of(0x1234), FsKind::Unknown(0x1234));
        assert!(is_remote_name(b"fuse.sshfs") && is_remote_name(b"nfs4") && !is_remote_name(b"ext4"));
    }

    #[test]
    fn what_does_not_exist_is_where_its_parent_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let missing = fs_kind(&dir.path().join("no/such/place")).expect("known");
        assert_eq!(missing, fs_kind(dir.path()).expect("known"));
    }

    #[test]
    fn relief_rings_once_for_the_first() {
        let (bell, rung) = std::sync::mpsc::channel();
        let relief = Relief::new(Box::new(move || bell.send(()).expect("somebody listens")));
        let (one, two) = (Asker::new(relief.clone()), Asker::new(relief.clone()));
        assert!(one.ask(Path::new("/a")) && one.ask(Path::new("/b")) && !two.ask(Path::new("/a")));
        assert_eq!(rung.try_iter().count(), 1);
        one.keep(&BTreeSet::from(["/b".into()]));
        assert_eq!(relief.dirs(), BTreeSet::from(["/a".into(), "/b".into()]));
        drop(two);
        assert_eq!(relief.dirs(), BTreeSet::from(["/b".into()]));
        drop(one);
        assert_eq!(relief.dirs(), BTreeSet::new());
    }
}
