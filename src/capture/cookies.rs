//! Proof of how far the kernel's queue is drained: a file made in a directory of our own, which the same queue tells
//! of. What the kernel had told before it has been read when its name is read.

use super::feed::lock;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

/// Cookies that may be under way; older ones are forgotten (an overflow has eaten them).
const MOST: usize = 16;

pub struct Cookies {
    dir: PathBuf,
    made: Mutex<Made>,
}

#[derive(Default)]
struct Made {
    next: u64,
    at: VecDeque<(u64, Instant)>,
    told: bool,
}

impl Cookies {
    /// Makes the directory, and removes what an earlier process left in it.
    pub(super) fn new(dir: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        for entry in std::fs::read_dir(dir)?.flatten() {
            if number(&entry.file_name()).is_some() {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(Self { dir: dir.to_owned(), made: Mutex::default() })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes one. The moment is taken before: whatever changed until then is ahead of it in the queue.
    pub(super) fn make(&self) {
        let mut made = lock(&self.made);
        made.next += 1;
        let (name, now) = (made.next, Instant::now());
        if made.at.len() >= MOST {
            made.at.pop_front();
        }
        made.at.push_back((name, now));
        let path = self.dir.join(name.to_string());
        let done = std::fs::File::create(&path).and_then(|_| std::fs::remove_file(&path));
        if let Err(error) = done
            && !std::mem::replace(&mut made.told, true)
        {
            tracing::warn!(path = %path.display(), %error, "how far changes were noticed cannot be proven");
        }
    }

    /// When the cookie of this name was made.
    pub(super) fn moment(&self, name: &OsStr) -> Option<Instant> {
        let number = number(name)?;
        lock(&self.made).at.iter().find(|(made, _)| *made == number).map(|(_, at)| *at)
    }
}

fn number(name: &OsStr) -> Option<u64> {
    name.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_cookies_are_known_by_their_names_and_leave_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("7"), "").expect("written");
        std::fs::write(dir.path().join("kept"), "").expect("written");
        let cookies = Cookies::new(dir.path()).expect("made");
        let before = Instant::now();
        (0..20).for_each(|_| cookies.make());
        assert!(cookies.moment(OsStr::new("20")).is_some_and(|at| at >= before));
        assert_eq!(cookies.moment(OsStr::new("1")), None);
        assert_eq!(cookies.moment(OsStr::new("x")), None);
        let left: Vec<_> = std::fs::read_dir(dir.path()).expect("there").flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["kept"]);
    }
}
