//! Objects of a folder that are promised before the disk has them by themselves.

use super::local::{folder_of, found, is_object, sync_folder};
use super::redo::{self, Promise, Redo};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// In a file of such a name for each process.
const NAME: &str = "redo-";

/// An object as it was promised.
#[derive(Serialize, Deserialize)]
struct Promised<'a> {
    path: &'a str,
    bytes: &'a [u8],
}

/// An object that is safe by its promise, and not yet by itself.
struct Unsettled {
    path: PathBuf,
    folder: PathBuf,
    promise: Promise,
}

/// Those of this process.
#[derive(Default)]
pub(super) struct Promises {
    redo: Mutex<Option<Arc<Redo>>>,
    unsettled: Mutex<Vec<Unsettled>>,
}

impl Promises {
    /// From now on something can be promised.
    pub fn begin(&self, root: &Path, name: &str) -> io::Result<()> {
        let mut redo = self.redo.lock().unwrap_or_else(PoisonError::into_inner);
        if redo.is_none() {
            *redo = Some(Redo::create(&root.join(format!("{NAME}{name}#1")))?);
        }
        Ok(())
    }

    /// Promises an object; `None` where that cannot be.
    pub fn promise(&self, path: &str, bytes: &[u8]) -> Option<Promise> {
        let promised = postcard::to_stdvec(&Promised { path, bytes }).ok()?;
        let redo = self.redo.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        redo.promise(&promised).ok()?
    }

    /// It has its name, and is to be settled.
    pub fn is_named(&self, promise: Promise, path: PathBuf, folder: PathBuf) {
        let unsettled = Unsettled { path, folder, promise };
        self.unsettled.lock().unwrap_or_else(PoisonError::into_inner).push(unsettled);
    }

    /// Brings to the disk what was promised in this folder.
    pub fn settle(&self, folder: &Path) -> io::Result<()> {
        self.settle_those(|one| one.folder == folder)
    }

    fn settle_those(&self, which: impl Fn(&Unsettled) -> bool) -> io::Result<()> {
        let mut unsettled = self.unsettled.lock().unwrap_or_else(PoisonError::into_inner);
        let promised: Vec<Unsettled> = unsettled.extract_if(.., |one| which(one)).collect();
        drop(unsettled);
        for Unsettled { path, folder, promise } in promised {
            match File::open(&path).and_then(|file| file.sync_data()).and_then(|()| sync_folder(&folder)) {
                // Somebody has published on top and taken it in, or it went with its mailbox.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                synced => synced?,
            }
            promise.take_back()?;
        }
        Ok(())
    }
}

impl Drop for Promises {
    fn drop(&mut self) {
        // What fails here is found by whoever opens the archive next.
        let _ = self.settle_those(|_| true);
    }
}

/// What those who are dead have promised becomes an object by `put`, if it is none and was not left behind since.
pub(super) fn recover(
    root: &Path,
    is_whole: &dyn Fn(&[u8]) -> bool,
    put: &dyn Fn(&str, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    for entry in found(fs::read_dir(root))?.into_iter().flatten() {
        let path = entry?.path();
        let is_redo = |name: &str| name.starts_with(NAME) && !is_object(name);
        if !path.file_name().and_then(|name| name.to_str()).is_some_and(is_redo) {
            continue;
        }
        let Some(left) = redo::Left::find(&path)? else { continue };
        for record in &left.records {
            if let Ok(promised) = postcard::from_bytes::<Promised<'_>>(record) {
                keep(root, &promised, is_whole, put)?;
            }
        }
        left.done()?;
    }
    Ok(())
}

fn keep(
    root: &Path,
    promised: &Promised<'_>,
    is_whole: &dyn Fn(&[u8]) -> bool,
    put: &dyn Fn(&str, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let is_below = Path::new(promised.path).components().all(|part| matches!(part, Component::Normal(_)));
    if !is_below {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("{:?} is promised outside", promised.path)));
    }
    let path = root.join(promised.path);
    let folder = folder_of(&path);
    match found(fs::read(&path))? {
        // It is what it should be, or somebody else's.
        Some(bytes) if is_whole(&bytes) => {
            File::open(&path)?.sync_all()?;
            sync_folder(&folder)
        }
        Some(_) => put(promised.path, promised.bytes),
        // The folder has gone, or what stood there before is of another time.
        None if !is_next(&folder, &path)? => Ok(()),
        None => put(promised.path, promised.bytes),
    }
}

/// Whether what stood before this generation is there, or something newer: then it was not left behind.
fn is_next(folder: &Path, path: &Path) -> io::Result<bool> {
    let number = |name: &Path| name.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok());
    let Some(own) = number(path) else { return Ok(false) };
    let mut newest = None;
    for entry in found(fs::read_dir(folder))?.into_iter().flatten() {
        let name = PathBuf::from(entry?.file_name());
        if name.extension().is_some_and(|extension| extension == "json") {
            newest = newest.max(number(&name));
        }
    }
    Ok(newest.is_some_and(|newest| newest >= own.saturating_sub(1)))
}

#[cfg(test)]
mod tests {
    use super::super::chain::is_whole;
    use super::super::local::Local;
    use super::*;

    fn copied(from: &Path) -> tempfile::TempDir {
        let to = tempfile::tempdir().expect("directory");
        for entry in walkdir::WalkDir::new(from).min_depth(1) {
            let entry = entry.expect("entry");
            let copy = to.path().join(entry.path().strip_prefix(from).expect("below"));
            if entry.file_type().is_dir() {
                fs::create_dir(copy).expect("makes");
            } else {
                fs::copy(entry.path(), copy).expect("copies");
            }
        }
        to
    }

    fn promises(dir: &Path) -> usize {
        let entries = fs::read_dir(dir).expect("lists").map(|entry| entry.expect("entry").file_name());
        entries.filter(|name| name.to_str().is_some_and(|name| name.starts_with(NAME))).count()
    }

    /// What a power cut may leave of an object that was promised, and of its folder.
    #[test]
    fn what_was_promised_is_there_after_a_power_cut() {
        let dir = tempfile::tempdir().expect("directory");
        let local = Local::new(dir.path().into());
        local.put("a/6.json", b"{\"n\":6}").expect("puts");
        local.provide().expect("makes ready");
        assert!(local.promise_text("a/7.json", b"{\"n\":7}\n").expect("promises"));
        assert!(!local.promise_text("a/7.json", b"{\"n\":8}\n").expect("is taken"));
        type Harm = fn(&Path) -> io::Result<()>;
        let whole = Some(&b"{\"n\":7}"[..]);
        let harms: [(&str, Harm, Option<&[u8]>); 8] = [
            ("none", |_| Ok(()), whole),
            ("no name", |dir| fs::remove_file(dir.join("a/7.json")), whole),
            ("no bytes", |dir| fs::write(dir.join("a/7.json"), [b'\n'; 16 << 10]), whole),
            ("half of it", |dir| fs::write(dir.join("a/7.json"), b"{\"n\":\n\n\n"), whole),
            ("somebody else was first", |dir| fs::write(dir.join("a/7.json"), b"{}"), Some(b"{}")),
            ("no folder", |dir| fs::remove_dir_all(dir.join("a")), None),
            ("something newer", |dir| fs::rename(dir.join("a/7.json"), dir.join("a/9.json")), whole),
            (
                "another time",
                |dir| {
                    fs::remove_file(dir.join("a/7.json"))?;
                    fs::rename(dir.join("a/6.json"), dir.join("a/2.json"))
                },
                None,
            ),
        ];
        for (what, harm, expected) in harms {
            let dir = copied(dir.path());
            harm(dir.path()).expect("harms");
            let after = Local::new(dir.path().into());
            after.recover(is_whole).expect(what);
            let found = after.get("a/7.json").expect("reads");
            assert_eq!(found.as_deref().map(<[u8]>::trim_ascii_end), expected, "{what}");
            assert_eq!(promises(dir.path()), 0, "{what}");
        }
        // Who lives is not told what to do, and one that was settled is not wanted any more.
        let beside = Local::new(dir.path().into());
        beside.recover(is_whole).expect("looks");
        assert_eq!(promises(dir.path()), 1);
        local.settle("b").expect("nothing there");
        local.settle("a").expect("settles");
        let later = copied(dir.path());
        fs::remove_file(later.path().join("a/7.json")).expect("removes");
        let after = Local::new(later.path().into());
        after.recover(is_whole).expect("recovers");
        assert_eq!(after.get("a/7.json").expect("reads"), None);
        drop(local);
        assert_eq!(promises(dir.path()), 0);
    }

    #[test]
    fn nothing_is_promised_outside() {
        for path in ["/etc/x.json", "../x.json", "a/../../x.json"] {
            let dir = tempfile::tempdir().expect("directory");
            let promised = Promised { path, bytes: b"{}" };
            let error = keep(dir.path(), &promised, &|_| true, &|_, _| Ok(())).expect_err("is refused");
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
        }
    }
}
