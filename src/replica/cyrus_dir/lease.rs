//! One writer at a time, and never beside a Cyrus.
//!
//! Ours keep each other out by a lock on `conf/spooltap.lock`. A Cyrus that runs on the directory is found by its
//! processes (a command line that names the imapd.conf, or a file below configdirectory held open) and by a lock on
//! `mailboxes.db`. One that is started later stands still at its first look at the mailbox list, until we are gone: the
//! list is locked all the time, as a writer of Cyrus's would lock it.

use super::DirError;
use super::places::Places;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// Holds the directory for this process.
pub(super) struct Lease {
    _lock: Flock<File>,
}

/// A program that is just being started has all that its parent has, until it has begun.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Asks again for a while before it is believed that somebody is there.
pub(super) fn patiently<T>(take: impl Fn() -> Result<T, DirError>) -> Result<T, DirError> {
    for _ in 1..TRIES {
        match take() {
            Err(DirError::Busy { .. }) => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
    take()
}

impl Lease {
    pub fn take(places: &Places) -> Result<Self, DirError> {
        patiently(|| Self::try_take(places))
    }

    fn try_take(places: &Places) -> Result<Self, DirError> {
        let path = places.conf.join("spooltap.lock");
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = open.map_err(|error| DirError::io(&path, error))?;
        let busy = |who: String| DirError::Busy { dir: places.root.clone(), who };
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| busy(format!("another spooltap, which holds {}", path.display())))?;
        match process_on(places) {
            Some(who) => Err(busy(who)),
            None => Ok(Self { _lock: lock }),
        }
    }
}

/// The kind of lock that a Cyrus takes before it writes, on the whole file. Fails when anybody has one.
pub(super) fn lock_as_writer(file: &File) -> io::Result<()> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).map(drop).map_err(io::Error::from)
}

/// A process of a Cyrus on this directory. Of processes of other users nothing is seen: run as cyrus or as root.
fn process_on(places: &Places) -> Option<String> {
    let own = std::process::id().to_string();
    // Cyrus's master, which has started us as its sync_server, does not write itself.
    let parent = std::os::unix::process::parent_id().to_string();
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let pid = process.file_name();
        if !pid.as_bytes().iter().all(u8::is_ascii_digit) || pid == *own || pid == *parent {
            continue;
        }
        let dir = process.path();
        let name = std::fs::read_to_string(dir.join("comm")).unwrap_or_default();
        let who = |how: &str| Some(format!("process {} ({}), which {how}", pid.display(), name.trim()));
        let line = std::fs::read(dir.join("cmdline")).unwrap_or_default();
        let mut words = line.split(|&byte| byte == 0);
        if words.any(|word| word == b"-C") && words.next() == Some(places.conf_file.as_os_str().as_bytes()) {
            return who("was started with its imapd.conf");
        }
        let Ok(open) = std::fs::read_dir(dir.join("fd")) else { continue };
        let is_ours = |path: &Path| path.starts_with(&places.conf) && !path.ends_with("spooltap.lock");
        if open.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok()).any(|path| is_ours(&path)) {
            return who("has a file of its configdirectory open");
        }
    }
    None
}
