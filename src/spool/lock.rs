//! What we wait for. Cyrus holds an exclusive fcntl lock on a file while it commits, until after its fsync. We ask the
//! kernel whether somebody does (`F_OFD_GETLK`): that takes no lock and can delay nobody.
//!
//! Asked through an open-file description of our own, so closing another descriptor of the file drops nothing, neither
//! ours nor Cyrus's.
//!
//! Only where a file changes faster than it can be read is a lock taken (`share`): shared, not waited for in the kernel,
//! held for one reading.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;
use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

/// Longest wait for a writer. A multi-record operation of 2.x can hold its lock for seconds; what is read then is
/// checked for being committed anyway.
const PATIENCE: Duration = Duration::from_millis(100);

/// The whole file, as Cyrus locks it.
fn whole(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Does somebody hold an exclusive lock on this file? Of a build of Cyrus with flock nothing is seen here.
pub fn is_locked(file: &File) -> bool {
    let mut ask = whole(libc::F_RDLCK);
    // A file system that cannot tell counts as not locked: the reading itself is verified.
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut ask)).is_ok() && ask.l_type != libc::F_UNLCK as libc::c_short
}

/// Waits until no writer is at work, but not longer than `PATIENCE`; false when one still is.
pub fn wait_for_writer(file: &File) -> bool {
    let started = Instant::now();
    let mut pause = Duration::from_micros(50);
    while is_locked(file) {
        if started.elapsed() >= PATIENCE {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    }
    true
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Shared,
    Exclusive,
}

/// A lock of ours; gone when dropped.
pub struct Held<'a> {
    file: &'a File,
    _flock: Option<Flock<File>>,
}

/// Takes a lock of both kinds that Cyrus can be built with, or says that somebody else has one that is in its way. It
/// belongs to this open file alone.
pub fn attempt(file: &File, kind: Kind) -> io::Result<Option<Held<'_>>> {
    let (range, whole_file) = match kind {
        Kind::Shared => (libc::F_RDLCK, FlockArg::LockSharedNonblock),
        Kind::Exclusive => (libc::F_WRLCK, FlockArg::LockExclusiveNonblock),
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole(range))) {
        Ok(_) => {}
        Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    }
    let mut held = Held { file, _flock: None };
    match Flock::lock(file.try_clone()?, whole_file) {
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        // A file system without this kind has nobody who uses it.
        flock => {
            held._flock = flock.ok();
            Ok(Some(held))
        }
    }
}

/// Takes a shared lock, unless a writer keeps the file for longer than `patience`. Writers wait while it is held: read,
/// and drop it.
pub fn share(file: &File, patience: Duration) -> Option<Held<'_>> {
    let started = Instant::now();
    loop {
        // Where it cannot be had for another reason the reading itself is verified.
        if let Ok(Some(held)) = attempt(file, Kind::Shared) {
            return Some(held);
        }
        if started.elapsed() >= patience {
            return None;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // What cannot be unlocked is unlocked when the file is closed.
        let _ = fcntl(self.file, FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_seen_and_a_reader_is_not() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let ours = File::open(file.path()).expect("opens");
        let theirs = file.reopen().expect("opens");
        let lock = |kind: libc::c_int| {
            fcntl(&theirs, FcntlArg::F_OFD_SETLK(&whole(kind))).expect("locks");
        };
        assert!(!is_locked(&ours));
        lock(libc::F_RDLCK);
        assert!(!is_locked(&ours));
        lock(libc::F_WRLCK);
        assert!(is_locked(&ours));
        let started = Instant::now();
        assert!(!wait_for_writer(&ours));
        assert!(started.elapsed() >= PATIENCE && started.elapsed() < PATIENCE * 5);
        lock(libc::F_UNLCK);
        assert!(!is_locked(&ours));
    }

    #[test]
    fn a_shared_lock_keeps_writers_away_while_it_is_held_and_yields_to_them() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let ours = File::open(file.path()).expect("opens");
        let theirs = file.reopen().expect("opens");
        let exclusive = || fcntl(&theirs, FcntlArg::F_OFD_SETLK(&whole(libc::F_WRLCK))).is_ok();
        let held = share(&ours, Duration::ZERO).expect("is free");
        // Closing another descriptor of the file drops nothing.
        drop(File::open(file.path()).expect("opens"));
        assert!(!exclusive());
        drop(held);
        assert!(exclusive());
        assert!(share(&ours, Duration::from_millis(2)).is_none());
        fcntl(&theirs, FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK))).expect("unlocks");
        let flock = Flock::lock(file.reopen().expect("opens"), FlockArg::LockExclusiveNonblock).expect("locks");
        assert!(share(&ours, Duration::ZERO).is_none());
        // What could not be had as a whole is not kept in part.
        assert!(exclusive());
        fcntl(&theirs, FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK))).expect("unlocks");
        drop(flock);
        assert!(share(&ours, Duration::ZERO).is_some());
    }
}
