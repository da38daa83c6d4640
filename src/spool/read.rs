//! Stable bytes of files that somebody else writes. Live files are copied with `pread` into our own buffers: a mapping of
//! a file that Cyrus truncates would be a SIGBUS.

use super::{format_error, io_error, lock};
use crate::cyrus::db::{self, Change, FollowError, Follower, Map};
use crate::model::{Disposition, StoreError, pulse};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Reads of a file that stays torn are repeated so often, with growing pauses.
pub(super) const TRIES: u32 = 12;
/// From this try on a shared lock is taken for the time of one reading, if it can be had within `SHARE_PATIENCE`.
pub(super) const SHARE_FROM: u32 = 6;
pub(super) const SHARE_PATIENCE: Duration = Duration::from_millis(20);
/// No file that is read whole may be larger; the largest real one (an index of ten million messages) stays below.
pub(super) const MAX_BYTES: u64 = 2 << 30;

/// Pause before try number `n`.
pub(super) fn pause(n: u32) {
    std::thread::sleep(Duration::from_millis(1 << n.min(4)));
}

/// Opens for reading only; without touching the access time where the kernel lets us.
pub(super) fn open(path: &Path) -> io::Result<File> {
    pulse::beat();
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(nix::libc::O_NOATIME | nix::libc::O_NONBLOCK | nix::libc::O_CLOEXEC);
    match options.open(path) {
        // Only the owner may ask for that.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            options.custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_CLOEXEC).open(path)
        }
        other => other,
    }
}

/// Opens the first of these that exists.
pub(super) fn open_first(paths: &[PathBuf]) -> Result<Option<(File, &Path)>, StoreError> {
    for path in paths {
        match open(path) {
            Ok(file) => return Ok(Some((file, path))),
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(io_error(path, &error)),
        }
    }
    Ok(None)
}

pub(super) fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Up to `len` bytes at `offset`; fewer where the file ends.
pub(super) fn read_at(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let there = file.metadata()?.len().saturating_sub(offset);
    let mut buffer = vec![0; len.min(usize::try_from(there).unwrap_or(usize::MAX))];
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => {
                filled += count;
                pulse::beat();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(filled);
    Ok(buffer)
}

/// A whole file that is only ever replaced by rename, so what is read is consistent.
pub(super) fn read_whole(file: &File, path: &Path) -> Result<Vec<u8>, StoreError> {
    let size = file.metadata().map_err(|error| io_error(path, &error))?.len();
    if size > MAX_BYTES {
        return Err(StoreError::new(
            Disposition::Quarantine,
            format!("{}: {size} bytes are more than any file of its kind has", path.display()),
        ));
    }
    read_at(file, 0, usize::try_from(size).unwrap_or(usize::MAX)).map_err(|error| io_error(path, &error))
}

/// The path still leads to the file we read.
pub(super) fn is_same(file: &File, path: &Path) -> io::Result<bool> {
    let (own, now) = (file.metadata()?, std::fs::metadata(path)?);
    Ok((own.ino(), own.dev()) == (now.ino(), now.dev()))
}

/// One database file followed by its tail.
#[derive(Debug, Default)]
pub(super) struct Followed {
    follower: Follower,
    file: Option<File>,
    /// What the file was before it was last read, where its kind is only ever replaced as a whole.
    whole: Option<[u8; 32]>,
    /// Applied to the map and not handed out yet: an update that failed afterwards must not lose them.
    pending: BTreeMap<Vec<u8>, Change>,
}

impl Followed {
    /// Brings the map up to date; what has changed since the last call that succeeded, ascending by key.
    pub(super) fn update(&mut self, path: &Path) -> Result<Vec<Change>, StoreError> {
        for n in 0..TRIES {
            let meta = std::fs::metadata(path).map_err(|error| io_error(path, &error))?;
            // A flat database of a large store is not read again and again for being asked.
            if self.whole.is_some() && self.whole == Some(stamp(&meta)) {
                return Ok(std::mem::take(&mut self.pending).into_values().collect());
            }
            self.whole = None;
            // The old file is closed after the new one was opened: else both could have the same inode number.
            if !self.file.as_ref().is_some_and(|file| same_file(file, &meta)) {
                self.file = Some(open(path).map_err(|error| io_error(path, &error))?);
            }
            let Some(file) = &self.file else { continue };
            if n > 0 {
                lock::wait_for_writer(file);
            }
            // Whoever writes all the time is asked to wait for one reading.
            let _shared = (n >= SHARE_FROM).then(|| lock::share(file, SHARE_PATIENCE));
            match self.follower.update(meta.ino(), &mut |offset, len| read_at(file, offset, len)) {
                Ok(changes) => {
                    for change in changes.changed {
                        match self.pending.entry(change.key.clone()) {
                            Entry::Vacant(place) => drop(place.insert(change)),
                            Entry::Occupied(mut place) => place.get_mut().new = change.new,
                        }
                    }
                    // Replaced meanwhile? Then a repack may have emptied the file under our hands.
                    if is_same(file, path).unwrap_or(false) {
                        self.whole = (self.follower.kind() == Some(db::Kind::Flat)).then(|| stamp(&meta));
                        return Ok(std::mem::take(&mut self.pending).into_values().collect());
                    }
                }
                Err(error) if error.is_torn() && n + 1 < TRIES => pause(n),
                Err(FollowError::Format(error)) => return Err(format_error(path, &error)),
                Err(FollowError::Io(error)) => return Err(io_error(path, &error)),
            }
        }
        Err(too_fast(path))
    }

    pub(super) fn map(&self) -> &Map {
        self.follower.map()
    }
}

fn same_file(file: &File, now: &Metadata) -> bool {
    file.metadata().is_ok_and(|own| (own.ino(), own.dev()) == (now.ino(), now.dev()))
}

/// A small database read once; empty where there is none of these files.
pub(super) fn read_db(paths: &[PathBuf]) -> Result<Map, StoreError> {
    for n in 0..TRIES {
        let Some((file, path)) = open_first(paths)? else { return Ok(Map::new()) };
        if n > 0 {
            lock::wait_for_writer(&file);
        }
        let Some(bytes) = read_unreplaced(&file, path)? else {
            pause(n);
            continue;
        };
        match db::parse(&bytes) {
            Ok(map) => return Ok(map),
            Err(error) if error.is_torn() && n + 1 < TRIES => pause(n),
            Err(error) => return Err(format_error(path, &error)),
        }
    }
    Err(too_fast(paths.first().map_or(Path::new(""), PathBuf::as_path)))
}

/// The bytes of a database; `None` when the path leads to another file by now, because a repack of a skiplist empties
/// the old one: what was read of it may be an older state, or none.
pub(super) fn read_unreplaced(file: &File, path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    let bytes = read_whole(file, path)?;
    Ok(is_same(file, path).unwrap_or(false).then_some(bytes))
}

/// Nobody is at work on the first of these databases that exists; none is waited for.
pub(super) fn is_settled(paths: &[PathBuf]) -> bool {
    match open_first(paths) {
        Ok(Some((file, _))) => !lock::is_locked(&file),
        // What cannot be opened is a matter for who reads it.
        _ => true,
    }
}

fn too_fast(path: &Path) -> StoreError {
    let message = format!("{}: changes faster than it can be read", path.display());
    StoreError::new(Disposition::RetrySoon, message)
}

/// Inode, size and modification time: changes whenever a file is written or replaced.
pub(super) fn stamp(meta: &Metadata) -> [u8; 32] {
    let mut out = [0; 32];
    out[..8].copy_from_slice(&meta.ino().to_be_bytes());
    out[8..16].copy_from_slice(&meta.size().to_be_bytes());
    out[16..24].copy_from_slice(&meta.mtime().to_be_bytes());
    out[24..].copy_from_slice(&meta.mtime_nsec().to_be_bytes());
    out
}
