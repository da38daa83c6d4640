//! What we wait for. Cyrus holds an exclusive fcntl lock on a file while it commits, until after its fsync. We ask the
//! kernel whether somebody does (`F_OFD_GETLK`): that takes no lock and can delay nobody.
//!
//! Asked through an open-file description of our own, so closing another descriptor of the file drops nothing, neither
//! ours nor Cyrus's.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::File;
use std::time::{Duration, Instant};

/// Longest wait for a writer. A multi-record operation of 2.x can hold its lock for seconds; what is read then is
/// checked for being committed anyway.
const PATIENCE: Duration = Duration::from_millis(100);

/// Does somebody hold an exclusive lock on this file?
pub fn is_locked(file: &File) -> bool {
    let mut ask = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // A file system that cannot tell counts as not locked: the reading itself is verified.
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut ask)).is_ok() && ask.l_type != libc::F_UNLCK as libc::c_short
}

/// Waits until no writer is at work, but not longer than `PATIENCE`.
pub fn wait_for_writer(file: &File) {
    let started = Instant::now();
    let mut pause = Duration::from_micros(50);
    while is_locked(file) && started.elapsed() < PATIENCE {
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
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
            let arg = libc::flock {
                l_type: kind as libc::c_short,
                l_whence: libc::SEEK_SET as libc::c_short,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            };
            fcntl(&theirs, FcntlArg::F_OFD_SETLK(&arg)).expect("locks");
        };
        assert!(!is_locked(&ours));
        lock(libc::F_RDLCK);
        assert!(!is_locked(&ours));
        lock(libc::F_WRLCK);
        assert!(is_locked(&ours));
        let started = Instant::now();
        wait_for_writer(&ours);
        assert!(started.elapsed() >= PATIENCE && started.elapsed() < PATIENCE * 5);
        lock(libc::F_UNLCK);
        assert!(!is_locked(&ours));
    }
}
