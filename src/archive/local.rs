//! Objects as files of this machine, for `file:`. Plain blocking calls on the thread that asks: whoever waits for a confirmation
//! waits for the disk alone. Nothing is taken for written before the disk has it: a file is synced before it gets its
//! name, and the folder after; or, where somebody waits, it was promised to a file that is synced (`redo`).

use super::objects::Listed;
use super::promised::{self, Promises};
use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};

/// Made ready for texts that end with a line: more empty lines make no difference to them.
const SPARE: &str = "spare-";
const SPARE_BYTES: usize = 16 << 10;
const PADDING: u8 = b'\n';
/// So many at one time.
const SPARES: usize = 4;

/// A folder in which the objects are.
pub(super) struct Local {
    root: PathBuf,
    /// Files without a meaning yet, to be written over: all of them the disk has but for what will stand in them.
    spares: Mutex<Vec<Staged>>,
    /// What they are called; nobody else's are called so, or one could be taken for another.
    spare: String,
    swept: Once,
    promises: Promises,
    /// Folders that have a name which the disk may not have yet.
    naming: Mutex<HashMap<PathBuf, usize>>,
    named: Condvar,
}

/// A file that has its bytes and not its name. If it never gets one, it goes.
struct Staged {
    file: File,
    at: PathBuf,
    named: bool,
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.named {
            let _ = fs::remove_file(&self.at);
        }
    }
}

/// While it lives, the folder has such a name.
struct Naming<'a> {
    local: &'a Local,
    folder: PathBuf,
}

impl Drop for Naming<'_> {
    fn drop(&mut self) {
        let mut naming = self.local.naming();
        if let Some(count) = naming.get_mut(&self.folder) {
            *count -= 1;
            if *count == 0 {
                naming.remove(&self.folder);
            }
        }
        drop(naming);
        self.local.named.notify_all();
    }
}

/// How a file gets its name; false when it is not to have it.
type Rename = fn(&Path, &Path) -> io::Result<bool>;

/// False when something has that name.
fn rename_to_new(from: &Path, to: &Path) -> io::Result<bool> {
    // `nix` has the call for glibc alone.
    #[cfg(target_env = "gnu")]
    {
        use nix::errno::Errno;
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => return Ok(true),
            Err(Errno::EEXIST) => return Ok(false),
            // Not every file system can do it.
            Err(Errno::EINVAL | Errno::ENOSYS) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    match fs::hard_link(from, to) {
        Ok(()) => fs::remove_file(from).map(|()| true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) fn found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn folder_of(path: &Path) -> PathBuf {
    path.parent().map_or_else(|| PathBuf::from("/"), Path::to_owned)
}

pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Changes when the object is written anew.
fn etag(meta: &Metadata) -> String {
    format!("{:x}-{:x}-{:x}-{:x}", meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len())
}

/// Names with `#` and a number are of files that are being written.
pub(super) fn is_object(name: &str) -> bool {
    name.rsplit_once('#').is_none_or(|(_, number)| number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()))
}

impl Local {
    pub fn new(root: PathBuf) -> Self {
        let spare = format!("{SPARE}{:016x}", RandomState::new().hash_one(std::process::id()));
        Self {
            root,
            spares: Mutex::default(),
            spare,
            swept: Once::new(),
            promises: Promises::default(),
            naming: Mutex::default(),
            named: Condvar::new(),
        }
    }

    fn naming(&self) -> MutexGuard<'_, HashMap<PathBuf, usize>> {
        self.naming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self, folder: &Path) -> Naming<'_> {
        *self.naming().entry(folder.to_owned()).or_default() += 1;
        Naming { local: self, folder: folder.to_owned() }
    }

    /// What somebody else in this process has just named is not seen before it is there for good: it would be built on.
    fn settled(&self, folder: &Path) {
        let mut naming = self.naming();
        while naming.contains_key(folder) {
            naming = self.named.wait(naming).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub fn get(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        found(fs::read(self.root.join(path)))
    }

    pub fn size(&self, path: &str) -> io::Result<Option<u64>> {
        let path = self.root.join(path);
        let size = found(fs::metadata(&path))?.map(|meta| meta.len());
        if size.is_some() {
            self.settled(&folder_of(&path));
        }
        Ok(size)
    }

    /// Objects and folders straight below a folder.
    pub fn list(&self, folder: &str) -> io::Result<(Vec<Listed>, Vec<String>)> {
        let folder = self.root.join(folder);
        self.settled(&folder);
        let (mut objects, mut folders) = (Vec::new(), Vec::new());
        for entry in found(fs::read_dir(&folder))?.into_iter().flatten() {
            // Nothing of ours has such a name.
            let Ok(file) = entry?.file_name().into_string() else { continue };
            if !is_object(&file) {
                continue;
            }
            // One that has gone meanwhile is not there.
            let Some(meta) = found(fs::metadata(folder.join(&file)))? else { continue };
            if meta.is_dir() {
                folders.push(file);
            } else {
                objects.push(Listed { etag: etag(&meta), file });
            }
        }
        Ok((objects, folders))
    }

    /// False when there is one already.
    pub fn create(&self, path: &str, bytes: &[u8]) -> io::Result<bool> {
        self.write(path, bytes, rename_to_new)
    }

    /// The same, for a text to which empty lines at its end make no difference: they may be there.
    pub fn create_text(&self, path: &str, bytes: &[u8]) -> io::Result<bool> {
        let at = self.root.join(path);
        // Whatever is the matter with a spare file, it goes, and another file is taken.
        if let Some(spare) = self.spare(&folder_of(&at), bytes)
            && spare.file.sync_data().is_ok()
        {
            match self.publish(spare, &at, rename_to_new) {
                // Another program has taken it away, or its folder.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                done => return done,
            }
        }
        self.create(path, bytes)
    }

    /// The same for somebody who waits: it is promised, which the disk is waited for once. `settle` has to follow.
    pub fn promise_text(&self, path: &str, bytes: &[u8]) -> io::Result<bool> {
        let at = self.root.join(path);
        let folder = folder_of(&at);
        let Some(mut spare) = self.spare(&folder, bytes) else { return self.create_text(path, bytes) };
        // Before it has its name: a name may get to the disk at any moment, and what it names has to be there then.
        let Some(promise) = self.promises.promise(path, bytes) else { return self.create_text(path, bytes) };
        let renamed = {
            let _naming = self.name(&folder);
            rename_to_new(&spare.at, &at)
        };
        if matches!(renamed, Ok(true)) {
            spare.named = true;
            self.promises.is_named(promise, at, folder);
            return Ok(true);
        }
        promise.take_back()?;
        match renamed {
            Err(error) if error.kind() == ErrorKind::NotFound => self.create(path, bytes),
            other => other,
        }
    }

    /// Brings to the disk what was promised in this folder.
    pub fn settle(&self, folder: &str) -> io::Result<()> {
        self.promises.settle(&self.root.join(folder))
    }

    /// What a power cut has left as a promise becomes an object.
    pub fn recover(&self, is_whole: impl Fn(&[u8]) -> bool) -> io::Result<()> {
        promised::recover(&self.root, &is_whole, &|path, bytes| self.put(path, bytes))
    }

    /// Whatever was there before.
    pub fn put(&self, path: &str, bytes: &[u8]) -> io::Result<()> {
        self.write(path, bytes, |from, to| fs::rename(from, to).map(|()| true)).map(drop)
    }

    fn write(&self, path: &str, bytes: &[u8], rename: Rename) -> io::Result<bool> {
        let path = self.root.join(path);
        let mut staged = stage(&path)?;
        staged.file.write_all(bytes)?;
        staged.file.sync_all()?;
        self.publish(staged, &path, rename)
    }

    fn publish(&self, mut staged: Staged, path: &Path, rename: Rename) -> io::Result<bool> {
        let folder = folder_of(path);
        let _naming = self.name(&folder);
        staged.named = rename(&staged.at, path)?;
        if staged.named {
            sync_folder(&folder)?;
        }
        Ok(staged.named)
    }

    fn spares(&self) -> MutexGuard<'_, Vec<Staged>> {
        self.spares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes ready for texts that somebody will wait for. Before the first ones go those that others have left: whoever still
    /// has one does without.
    pub fn provide(&self) -> io::Result<()> {
        self.swept.call_once(|| self.sweep_spares());
        self.promises.begin(&self.root, self.spare.strip_prefix(SPARE).unwrap_or_default())?;
        while self.spares().len() < SPARES {
            let mut spare = stage(&self.root.join(&self.spare))?;
            spare.file.write_all(&[PADDING; SPARE_BYTES])?;
            spare.file.sync_all()?;
            self.spares().push(spare);
        }
        Ok(())
    }

    fn sweep_spares(&self) {
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let is_spare = |name: &str| name.starts_with(SPARE) && !is_object(name);
            if entry.file_name().to_str().is_some_and(is_spare) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// A text in a file that was made ready for it. To write over what the disk has is all that is to be done: neither a place
    /// nor a name is to be found. The disk does not have it yet.
    fn spare(&self, folder: &Path, bytes: &[u8]) -> Option<Staged> {
        if bytes.len() > SPARE_BYTES || bytes.last() != Some(&PADDING) {
            return None;
        }
        let device = fs::metadata(folder).ok()?.dev();
        let spare = self.spares().pop()?;
        if spare.file.metadata().ok()?.dev() != device {
            return None;
        }
        spare.file.write_all_at(bytes, 0).ok()?;
        Some(spare)
    }

    /// The disk has the name of this object when this is done.
    pub fn assure(&self, path: &str) -> io::Result<()> {
        sync_folder(&folder_of(&self.root.join(path)))
    }

    /// What is gone already counts as deleted. Folders that become empty go too.
    pub fn delete(&self, path: &str) -> io::Result<()> {
        let path = self.root.join(path);
        found(fs::remove_file(&path))?;
        let above = path.ancestors().skip(1).take_while(|folder| *folder != self.root);
        let _ = above.map(fs::remove_dir).take_while(Result::is_ok).count();
        Ok(())
    }
}

/// A file beside its future name; folders that are not there are made, and the disk has them before anything is in them.
fn stage(path: &Path) -> io::Result<Staged> {
    let mut number = 1_u64;
    loop {
        let mut at = path.as_os_str().to_owned();
        at.push(format!("#{number}"));
        let at = PathBuf::from(at);
        match File::options().write(true).create_new(true).open(&at) {
            Ok(file) => return Ok(Staged { file, at, named: false }),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            // Again and again, because somebody else may take away a folder that is empty.
            Err(error) if error.kind() == ErrorKind::NotFound => make_folders(&folder_of(path))?,
            Err(error) => return Err(error),
        }
    }
}

fn make_folders(folder: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = folder.ancestors().take_while(|folder| !folder.exists()).collect();
    fs::create_dir_all(folder)?;
    // Each has a name in the one above it.
    missing.iter().filter_map(|folder| folder.parent()).filter(|above| above.exists()).try_for_each(sync_folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("lists").map(|entry| entry.expect("entry").file_name());
        let mut names: Vec<_> = entries.map(|name| name.into_string().expect("a name")).collect();
        names.sort();
        names
    }

    #[test]
    fn objects_come_and_go_whole() {
        let dir = tempfile::tempdir().expect("directory");
        let local = Local::new(dir.path().join("not/yet"));
        assert_eq!(local.get("a/1.json").expect("asks"), None);
        assert_eq!(local.size("a/1.json").expect("asks"), None);
        assert!(local.list("a").expect("lists").0.is_empty());
        assert!(local.create("a/1.json", b"one").expect("creates"));
        assert!(!local.create("a/1.json", b"other").expect("is asked"));
        assert_eq!(local.get("a/1.json").expect("reads").as_deref(), Some(&b"one"[..]));
        let etag = |local: &Local| local.list("a").expect("lists").0.pop().expect("an object").etag;
        let first = etag(&local);
        local.put("a/1.json", b"other").expect("puts");
        assert_ne!(etag(&local), first);
        assert_eq!(local.size("a/1.json").expect("asks"), Some(5));
        assert_eq!(files(&dir.path().join("not/yet/a")), ["1.json"]);
        local.put("b/c/2.json", b"").expect("puts");
        assert_eq!(local.list("").expect("lists").1.len(), 2);
        local.delete("b/c/2.json").expect("deletes");
        local.delete("b/c/2.json").expect("is gone already");
        assert_eq!(files(&dir.path().join("not/yet")), ["a"]);
    }

    /// A crash leaves it; nobody takes it for an object, and it is in nobody's way.
    #[test]
    fn what_a_crash_left_is_no_object() {
        let dir = tempfile::tempdir().expect("directory");
        let local = Local::new(dir.path().into());
        local.put("a/1.json", b"one").expect("puts");
        fs::write(dir.path().join("a/2.json#1"), "ha").expect("writes");
        let (objects, _) = local.list("a").expect("lists");
        assert_eq!(objects.iter().map(|object| object.file.as_str()).collect::<Vec<_>>(), ["1.json"]);
        assert!(local.create("a/2.json", b"two").expect("creates"));
        assert_eq!(files(&dir.path().join("a")), ["1.json", "2.json", "2.json#1"]);
    }

    /// It is on a file that cannot be renamed into its place that this shows.
    #[test]
    fn what_fails_leaves_nothing() {
        let dir = tempfile::tempdir().expect("directory");
        let local = Local::new(dir.path().into());
        fs::create_dir_all(dir.path().join("a/1.json")).expect("directory");
        assert!(local.put("a/1.json", b"one").is_err());
        assert!(!local.create("a/1.json", b"one").expect("is taken"));
        assert_eq!(files(&dir.path().join("a")), ["1.json"]);
    }

    fn spares(dir: &Path) -> usize {
        files(dir).iter().filter(|name| name.starts_with(SPARE)).count()
    }

    /// Texts that fit are written over what was made ready, once; others, and what is no text, are written anew.
    #[test]
    fn texts_stand_in_files_that_were_made_ready() {
        let dir = tempfile::tempdir().expect("directory");
        let local = Local::new(dir.path().into());
        fs::write(dir.path().join("spare-0#7"), "left by a crash").expect("writes");
        local.put("a/0.json", b"one").expect("puts");
        local.provide().expect("makes ready");
        // An object, and the file of promises.
        assert_eq!((spares(dir.path()), files(dir.path()).len()), (SPARES, SPARES + 2));
        let size = |path: &str| local.size(path).expect("asks").expect("is there") as usize;
        assert!(local.create_text("a/1.json", b"{}\n").expect("creates"));
        assert_eq!(size("a/1.json"), SPARE_BYTES);
        let text = local.get("a/1.json").expect("reads").expect("is there");
        assert_eq!(text.trim_ascii_end(), b"{}");
        assert!(!local.create_text("a/1.json", b"[]\n").expect("is asked"));
        assert_eq!(local.get("a/1.json").expect("reads"), Some(text));
        assert_eq!(spares(dir.path()), SPARES - 2);
        assert!(local.create_text("a/2.json", b"no line").expect("creates"));
        assert!(local.create_text("a/3.json", &[PADDING; SPARE_BYTES + 1]).expect("creates"));
        assert!(local.create_text("new/4.json", b"{}\n").expect("creates"));
        assert_eq!((size("a/2.json"), size("a/3.json"), size("new/4.json")), (7, SPARE_BYTES + 1, 3));
        assert_eq!(spares(dir.path()), SPARES - 2);
        drop(local);
        assert_eq!(files(dir.path()), ["a", "new"]);
    }

    /// One takes the other's away; what the other then writes is its own all the same.
    #[test]
    fn two_programs_do_not_take_each_others_files_for_theirs() {
        let dir = tempfile::tempdir().expect("directory");
        let (one, two) = (Local::new(dir.path().into()), Local::new(dir.path().into()));
        one.put("a/0.json", b"one").expect("puts");
        one.provide().expect("makes ready");
        two.provide().expect("makes ready");
        assert_eq!(spares(dir.path()), SPARES);
        assert!(one.create_text("a/1.json", b"1\n").expect("creates"));
        assert!(two.create_text("a/2.json", b"2\n").expect("creates"));
        assert_eq!(one.get("a/1.json").expect("reads").as_deref(), Some(&b"1\n"[..]));
        let text = two.get("a/2.json").expect("reads").expect("is there");
        assert_eq!((text.trim_ascii_end(), text.len()), (&b"2"[..], SPARE_BYTES));
    }

    /// A name that the disk may not have yet is waited for by whoever would build on it.
    #[test]
    fn what_is_being_named_is_waited_for() {
        let dir = tempfile::tempdir().expect("directory");
        let local = Local::new(dir.path().into());
        local.put("a/1.json", b"one").expect("puts");
        let naming = local.name(&dir.path().join("a"));
        std::thread::scope(|scope| {
            let listed = scope.spawn(|| local.list("a").expect("lists").0.len());
            let other = scope.spawn(|| local.list("b").expect("lists").0.len());
            assert_eq!(other.join().expect("ends"), 0);
            assert!(!listed.is_finished());
            drop(naming);
            assert_eq!(listed.join().expect("ends"), 1);
        });
    }
}
