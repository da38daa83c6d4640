//! The recorded POSIX locks, held by the player as open-file-description locks.
//!
//! A POSIX lock belongs to a process and a file, and the player is one process: as POSIX locks all of them would be
//! its own. An open-file-description lock on the recorded handle conflicts with every other program (and with every
//! other description in this one), as the server's did. Where a process locks a file through two handles, the
//! earlier lock is let go first, because two descriptions exclude each other.

use super::ops::LockType;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

/// A process and a file, as the lock's owner is.
type Owner = (u64, u64, u64);

#[derive(Default)]
pub(super) struct Locks {
    held: HashMap<Owner, Vec<u64>>,
}

impl Locks {
    /// Waits until the lock is there: somebody who reads the store may hold it just now.
    pub fn lock(
        &mut self,
        files: &HashMap<u64, File>,
        pid: u64,
        h: u64,
        kind: LockType,
        range: (i64, i64),
    ) -> io::Result<()> {
        let file = open_file(files, h)?;
        let handles = self.held.entry(owner(pid, file)?).or_default();
        for other in handles.iter().filter(|&&other| other != h) {
            if let Some(other) = files.get(other) {
                set(other, libc::F_UNLCK, range)?;
            }
        }
        set(file, if kind == LockType::R { libc::F_RDLCK } else { libc::F_WRLCK }, range)?;
        if !handles.contains(&h) {
            handles.push(h);
        }
        Ok(())
    }

    /// An unlock that belongs to a handle which is closed by now has nothing left to do.
    pub fn unlock(&mut self, files: &HashMap<u64, File>, pid: u64, h: u64, range: (i64, i64)) -> io::Result<()> {
        let Some(file) = files.get(&h) else { return Ok(()) };
        let owner = owner(pid, file)?;
        for other in self.held.get(&owner).into_iter().flatten().filter_map(|other| files.get(other)) {
            set(other, libc::F_UNLCK, range)?;
        }
        if range == (0, 0) {
            self.held.remove(&owner);
        }
        Ok(())
    }
}

pub(super) fn open_file(files: &HashMap<u64, File>, h: u64) -> io::Result<&File> {
    files.get(&h).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "handle is not open"))
}

fn owner(pid: u64, file: &File) -> io::Result<Owner> {
    let meta = file.metadata()?;
    Ok((pid, meta.dev(), meta.ino()))
}

fn set(file: &File, kind: libc::c_int, (start, len): (i64, i64)) -> io::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLKW(&lock)) {
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
    }
}
