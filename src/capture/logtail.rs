//! Cyrus's rolling log read beside whoever consumes it: nothing is locked, renamed, removed or written.
//!
//! The consumer renames `log` to `log-run`, reads and removes it. A file that was open when it was renamed is read on until
//! it is removed: nobody writes to it after that. What is made, consumed and removed between two looks is not seen.

use ::inotify::{EventMask, Inotify, WatchMask};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Cyrus writes 4096 at most.
const LINE_MOST: usize = 65_536;
/// Files of a log that are renamed and not removed yet; a consumer has one.
const FILES_MOST: usize = 8;

/// Tells when something happens in a directory, where the kernel can.
pub(super) struct DirWatch {
    dir: PathBuf,
    kernel: Option<Inotify>,
    is_watched: bool,
}

impl DirWatch {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), kernel: Inotify::init().ok(), is_watched: false }
    }

    /// Watches it, once it is there.
    pub fn watch(&mut self) {
        let Some(kernel) = self.kernel.as_ref().filter(|_| !self.is_watched) else { return };
        let mask = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::ONLYDIR;
        self.is_watched = kernel.watches().add(&self.dir, mask).is_ok();
    }

    /// Readable when something has happened.
    pub fn fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.kernel.as_ref().map(AsFd::as_fd)
    }

    pub fn empty(&mut self) {
        let Some(kernel) = &mut self.kernel else { return };
        let mut buffer = [0; 4096];
        while let Ok(events) = kernel.read_events(&mut buffer) {
            if events.into_iter().any(|event| event.mask.contains(EventMask::IGNORED)) {
                self.is_watched = false;
            }
        }
    }
}

/// One file that is, or was, the log.
struct Part {
    file: File,
    place: (u64, u64),
    read: u64,
    line: Vec<u8>,
}

/// Follows a log from its present end.
pub struct LogTail {
    log: PathBuf,
    run: PathBuf,
    parts: Vec<Part>,
    watch: DirWatch,
}

impl LogTail {
    pub fn new(log: &Path) -> Self {
        let mut run = log.as_os_str().to_owned();
        run.push("-run");
        let mut watch = DirWatch::new(log.parent().unwrap_or(Path::new("/")));
        watch.watch();
        let mut tail = Self { log: log.to_owned(), run: run.into(), parts: Vec::new(), watch };
        tail.open();
        for part in &mut tail.parts {
            part.read = part.file.metadata().map_or(0, |meta| meta.len());
        }
        tail
    }

    /// Sleeps until something happens to the log, at most so long.
    pub fn wait(&mut self, most: Duration) {
        self.watch.watch();
        let mut fds: Vec<PollFd<'_>> =
            self.watch.fd().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).into_iter().collect();
        // A signal only makes it earlier.
        let _ = ppoll(&mut fds, Some(TimeSpec::from_duration(most)), None);
        self.watch.empty();
    }

    /// Gives every whole line that was added since the last call, without its line end.
    pub fn read(&mut self, line: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        self.open();
        let mut result = Ok(());
        self.parts.retain_mut(|part| {
            // Asked before it is read: nothing is written to a file that is removed.
            let is_gone = part.file.metadata().map_or(true, |meta| meta.nlink() == 0);
            if let Err(error) = part.read(line) {
                result = Err(error);
                return false;
            }
            !is_gone
        });
        result
    }

    /// The log as it is now, and the one its consumer has, if they are not open yet.
    fn open(&mut self) {
        // First the log: one that is renamed in between is then found under its new name.
        for path in [&self.log, &self.run] {
            let Ok(file) = File::open(path) else { continue };
            let Ok(place) = file.metadata().map(|meta| (meta.dev(), meta.ino())) else { continue };
            if self.parts.len() < FILES_MOST && !self.parts.iter().any(|part| part.place == place) {
                self.parts.push(Part { file, place, read: 0, line: Vec::new() });
            }
        }
    }
}

impl Part {
    fn read(&mut self, line: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = [0; 8192];
        loop {
            let count = match self.file.read_at(&mut buffer, self.read) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.read += count as u64;
            for piece in buffer.get(..count).unwrap_or_default().split_inclusive(|byte| *byte == b'\n') {
                if self.line.len() < LINE_MOST {
                    self.line.extend_from_slice(piece);
                }
                if piece.ends_with(b"\n") {
                    line(self.line.trim_ascii_end());
                    self.line.clear();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn lines(tail: &mut LogTail) -> Vec<String> {
        let mut out = Vec::new();
        tail.read(&mut |line| out.push(String::from_utf8_lossy(line).into_owned())).expect("read");
        out
    }

    #[test]
    fn a_log_that_is_renamed_and_removed_is_read_to_its_end() {
        // Fails when only the file that has the name of the log is read.
        let dir = tempfile::tempdir().expect("directory");
        let (log, run) = (dir.path().join("log"), dir.path().join("log-run"));
        fs::write(&log, "MAILBOX before\n").expect("written");
        let mut tail = LogTail::new(&log);
        assert_eq!(lines(&mut tail), [""; 0]);
        let mut writer = fs::OpenOptions::new().append(true).open(&log).expect("opened");
        io::Write::write_all(&mut writer, b"MAILBOX a\nMAIL").expect("written");
        assert_eq!(lines(&mut tail), ["MAILBOX a"]);
        // A writer that had it open before it was renamed, and a new log beside it.
        fs::rename(&log, &run).expect("renamed");
        fs::write(&log, "MAILBOX c\n").expect("written");
        assert_eq!(lines(&mut tail), ["MAILBOX c"]);
        io::Write::write_all(&mut writer, b"BOX b\n").expect("written");
        fs::remove_file(&run).expect("removed");
        assert_eq!(lines(&mut tail), ["MAILBOX b"]);
        assert_eq!(tail.parts.len(), 1);
        // Renamed before it was ever seen.
        fs::rename(&log, &run).expect("renamed");
        assert_eq!(lines(&mut tail), [""; 0]);
        fs::remove_file(&run).expect("removed");
        fs::write(&run, "MAILBOX d\n").expect("written");
        assert_eq!(lines(&mut tail), ["MAILBOX d"]);
        // Nothing of it is changed.
        assert_eq!(fs::read_to_string(&run).expect("there"), "MAILBOX d\n");
    }
}
