//! File handles, by which fanotify names directories: the three system calls that nothing safe wraps.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;
use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// MAX_HANDLE_SZ.
const MOST_BYTES: usize = 128;

/// A `struct file_handle` with room for the longest handle.
#[repr(C)]
struct Buffer {
    bytes: u32,
    kind: i32,
    handle: [u8; MOST_BYTES],
}

fn c_path(path: &Path) -> Result<CString, Errno> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

/// Opens what a handle names, as a place only (`O_PATH`). `mount` is any file of the same mount, opened for
/// reading. ESTALE: it is gone.
pub fn open(mount: BorrowedFd<'_>, kind: i32, handle: &[u8]) -> Result<OwnedFd, Errno> {
    let mut buffer = Buffer { bytes: handle.len() as u32, kind, handle: [0; MOST_BYTES] };
    buffer.handle.get_mut(..handle.len()).ok_or(Errno::EOVERFLOW)?.copy_from_slice(handle);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: `buffer` has the layout of struct file_handle followed by at least `bytes` bytes, and lives until the
    // call returns; the kernel only reads it.
    let fd = unsafe { libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut buffer).cast(), flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Type and bytes of a path's handle, and the id of the mount it is on.
pub fn of(path: &Path) -> Result<(i32, Vec<u8>, i32), Errno> {
    let path = c_path(path)?;
    let mut buffer = Buffer { bytes: MOST_BYTES as u32, kind: 0, handle: [0; MOST_BYTES] };
    let mut mount = 0;
    // SAFETY: `buffer` has the layout of struct file_handle with room for `bytes` bytes; it, `path` and `mount` live
    // until the call returns, and the kernel writes no more than it was told there is room for.
    let done = unsafe {
        libc::name_to_handle_at(
            libc::AT_FDCWD,
            path.as_ptr(),
            (&raw mut buffer).cast(),
            &raw mut mount,
            libc::AT_SYMLINK_FOLLOW,
        )
    };
    Errno::result(done)?;
    let bytes = buffer.handle.get(..buffer.bytes as usize).ok_or(Errno::EOVERFLOW)?;
    Ok((buffer.kind, bytes.to_vec(), mount))
}

/// The id of the file system a path is on, as fanotify reports it.
pub fn fsid(path: &Path) -> Result<[u8; 8], Errno> {
    let path = c_path(path)?;
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `path` ends with NUL and `stat` has room for one struct statfs; both live until the call returns.
    Errno::result(unsafe { libc::statfs(path.as_ptr(), stat.as_mut_ptr()) })?;
    // SAFETY: all bytes were zeroed, and every bit pattern of these integers is a value.
    let stat = unsafe { stat.assume_init() };
    // SAFETY: `fsid_t` is two 32-bit integers without padding; its fields are not public.
    Ok(unsafe { std::mem::transmute::<libc::fsid_t, [u8; 8]>(stat.f_fsid) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn a_handle_leads_back_or_is_stale() {
        let dir = tempfile::tempdir().expect("a directory");
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).expect("created");
        let Ok((kind, bytes, mount)) = of(&inner) else {
            println!("skipped: this file system has no handles");
            return;
        };
        assert_eq!(of(dir.path()).expect("has one").2, mount);
        assert_eq!(fsid(&inner), fsid(dir.path()));
        let at = File::open(dir.path()).expect("opened");
        match open(at.as_fd(), kind, &bytes) {
            Err(Errno::EPERM) => println!("skipped: needs CAP_DAC_READ_SEARCH"),
            opened => {
                let opened = opened.expect("opened");
                let link = std::fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd()));
                drop(opened);
                assert_eq!(link.expect("a link"), inner.canonicalize().expect("exists"));
                std::fs::remove_dir(&inner).expect("removed");
                assert_eq!(open(at.as_fd(), kind, &bytes).err(), Some(Errno::ESTALE));
            }
        }
        assert_eq!(open(at.as_fd(), 1, &[0; 200]).err(), Some(Errno::EOVERFLOW));
    }
}
