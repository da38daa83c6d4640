//! Cyrus's kind of lock, as one of its processes holds it.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::File;

/// Locks a whole file exclusively, waiting for it; held until the file is closed. Bound to this opening of the file: no
/// other thread of the tests can drop it.
pub fn lock(file: &File) {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLKW(&whole)).expect("locked");
}
