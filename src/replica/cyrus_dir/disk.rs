//! Every change of a file goes through here: what is made has the modes Cyrus gives, what is replaced is replaced by a
//! rename of something that is on the disk already, and a test can let any single operation fail.

use super::syncers::{Pending, Syncers};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a test says to an operation before it is done.
pub enum Verdict {
    Go,
    /// Nothing of it is done.
    Fail(io::Error),
    /// It is done, or half of it where there are bytes to write, and nobody hears of it.
    FailAfter(io::Error),
}

/// Asked before every operation that changes anything, with its name and the path.
pub type Hook = Arc<dyn Fn(&'static str, &Path) -> Verdict + Send + Sync>;

/// The hands of the writer.
#[derive(Clone, Default)]
pub(super) struct Disk {
    hook: Option<Hook>,
    syncers: Syncers,
}

impl Disk {
    pub fn new(hook: Option<Hook>) -> Self {
        Self { hook, syncers: Syncers::default() }
    }

    fn act<T>(&self, name: &'static str, path: &Path, action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match self.hook.as_ref().map_or(Verdict::Go, |hook| hook(name, path)) {
            Verdict::Go => action(),
            Verdict::Fail(error) => Err(error),
            Verdict::FailAfter(error) => action().and(Err(error)),
        }
    }

    /// A new, empty file; one that is there already is emptied.
    pub fn create(&self, path: &Path) -> io::Result<File> {
        self.act("create", path, || {
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)
        })
    }

    pub fn write(&self, mut file: &File, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.put("write", path, bytes, |bytes| file.write_all(bytes))
    }

    pub fn write_at(&self, file: &File, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match offset {
            // A header is less than a block.
            0 => self.act("write_at 0", path, || file.write_all_at(bytes, 0)),
            _ => self.put("write_at", path, bytes, |bytes| file.write_all_at(bytes, offset)),
        }
    }

    fn put(
        &self,
        name: &'static str,
        path: &Path,
        bytes: &[u8],
        write: impl FnOnce(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        match self.hook.as_ref().map_or(Verdict::Go, |hook| hook(name, path)) {
            Verdict::Go => write(bytes),
            Verdict::Fail(error) => Err(error),
            Verdict::FailAfter(error) => write(bytes.get(..bytes.len() / 2).unwrap_or_default()).and(Err(error)),
        }
    }

    pub fn sync(&self, file: &File, path: &Path) -> io::Result<()> {
        self.act("sync", path, || file.sync_all())
    }

    /// The same while the caller goes on. A directory is brought to the disk like any file.
    pub fn sync_beside(&self, path: &Path) -> io::Result<Pending> {
        let file = File::open(path)?;
        Ok(match self.hook.as_ref().map_or(Verdict::Go, |hook| hook("sync", path)) {
            Verdict::Go => self.syncers.sync(file),
            Verdict::Fail(error) => Pending::Done(Err(error)),
            Verdict::FailAfter(error) => Pending::Done(file.sync_all().and(Err(error))),
        })
    }

    /// The same for bytes that are in their place already, without what a file is dated with.
    pub fn sync_data(&self, file: &File, path: &Path) -> io::Result<()> {
        self.act("sync", path, || file.sync_data())
    }

    /// Everything written to the file system that holds this directory.
    pub fn sync_all_below(&self, dir: &Path) -> io::Result<()> {
        self.act("syncfs", dir, || Ok(nix::unistd::syncfs(File::open(dir)?)?))
    }

    /// The names in a directory.
    pub fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.act("sync_dir", dir, || File::open(dir)?.sync_all())
    }

    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.act("rename", to, || fs::rename(from, to))
    }

    /// A second name for a file, on another file system a copy of it.
    pub fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.act("link", to, || match fs::hard_link(from, to) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(to)?;
                fs::hard_link(from, to)
            }
            // Another file system, or as many links as it takes.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let modified = fs::metadata(from)?.modified()?;
                let mut copy = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(to)?;
                io::copy(&mut File::open(from)?, &mut copy)?;
                copy.set_modified(modified)?;
                copy.sync_all()
            }
            linked => linked,
        })
    }

    pub fn symlink(&self, target: &Path, path: &Path) -> io::Result<()> {
        self.act("symlink", path, || std::os::unix::fs::symlink(target, path))
    }

    /// Removes a file; one that is not there is gone already.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        self.act("remove", path, || absent_is_fine(fs::remove_file(path)))
    }

    /// Removes a directory with everything in it.
    pub fn remove_tree(&self, dir: &Path) -> io::Result<()> {
        self.act("remove_tree", dir, || absent_is_fine(fs::remove_dir_all(dir)))
    }

    /// Makes a directory and those above it, each made known to the disk.
    pub fn make_dir(&self, dir: &Path) -> io::Result<()> {
        self.make_dirs(dir, true)
    }

    /// The same, for what nothing stands on, or on which nothing stands before the whole file system is on the disk.
    pub fn make_dir_for_now(&self, dir: &Path) -> io::Result<()> {
        self.make_dirs(dir, false)
    }

    fn make_dirs(&self, dir: &Path, durable: bool) -> io::Result<()> {
        if dir.is_dir() {
            return Ok(());
        }
        self.act("mkdir", dir, || {
            let missing: Vec<PathBuf> =
                dir.ancestors().take_while(|dir| !dir.exists()).map(Path::to_path_buf).collect();
            for dir in missing.iter().rev() {
                match DirBuilder::new().mode(0o755).create(dir) {
                    // Somebody was quicker.
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                    _ => {}
                }
                if durable {
                    File::open(dir.parent().unwrap_or(dir))?.sync_all()?;
                }
            }
            Ok(())
        })
    }

    /// Puts these bytes in the place of a file: `PATH.NEW`, on the disk, then renamed.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.replace_with(path, bytes, |_| Ok(())).map(drop)
    }

    /// The same; `before` is done with the new file before it gets its name.
    pub fn replace_with(
        &self,
        path: &Path,
        bytes: &[u8],
        before: impl FnOnce(&File) -> io::Result<()>,
    ) -> io::Result<File> {
        let mut new = path.as_os_str().to_owned();
        new.push(".NEW");
        let new = PathBuf::from(new);
        let done = self.create(&new).and_then(|file| {
            self.write(&file, &new, bytes)?;
            before(&file)?;
            self.sync(&file, &new)?;
            self.rename(&new, path)?;
            Ok(file)
        });
        if done.is_err() {
            // What a full disk has left half-way must not fill it.
            let _ = fs::remove_file(&new);
        }
        let file = done?;
        self.sync_dir(path.parent().unwrap_or(path))?;
        Ok(file)
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The bytes of a file of ours; `None` where there is none.
pub(super) fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}
