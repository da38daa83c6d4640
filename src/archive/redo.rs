//! What was promised and is not in its place for good: records in one file, which has its length before anything is promised, so that
//! a record is there after a single wait for the disk. Whoever wrote one does behind it what makes it needless, and takes it back.
//! After a power cut those that are left say what has to be done again.
//!
//! ```text
//! 0   "spooltap redo 1\n"
//! 16  32 bytes by chance, which nobody else knows: the key of the hashes below
//! 64  records, one behind the other:
//!     8  "wanted\r\n", or zeros when it was taken back
//!     8  number, one more than that of the record before; little endian, as the length
//!     8  length of what follows the hash
//!     32 blake3 with the key, over number, length and content
//!     …  content
//! ```
//!
//! Where the numbers do not go on, or a hash is not right, the records end: what is behind them is of an earlier lap. Mail stands in
//! the content, and cannot pass for a record without the key.

use super::local::{folder_of, sync_folder};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

const MAGIC: &[u8; 16] = b"spooltap redo 1\n";
const START: u64 = 64;
const WANTED: &[u8; 8] = b"wanted\r\n";
const HEAD: usize = 56;

/// Room for records. When it is full, nothing can be promised before something was taken back.
const BYTES: u64 = 2 << 20;

/// A file of records that this process writes.
pub(crate) struct Redo {
    file: Flock<File>,
    path: PathBuf,
    key: [u8; 32],
    state: Mutex<State>,
    synced: Condvar,
}

#[derive(Default)]
struct State {
    /// Where the next one begins, and its number.
    at: u64,
    next: u64,
    /// Promised and not taken back.
    wanted: u64,
    /// The disk has those below this number.
    synced: u64,
    is_syncing: bool,
}

/// A promise.
pub(crate) struct Promise {
    redo: Arc<Redo>,
    at: u64,
}

/// What the last one has left.
pub(crate) struct Left {
    pub records: Vec<Vec<u8>>,
    /// Nobody else does it meanwhile.
    _file: Flock<File>,
    path: PathBuf,
}

impl Redo {
    /// A new file; there must be none.
    pub fn create(path: &Path) -> io::Result<Arc<Self>> {
        let mut key = [0; 32];
        for part in key.chunks_mut(8) {
            // Hashers with keys of the operating system's making.
            part.copy_from_slice(&RandomState::new().hash_one(std::process::id()).to_le_bytes());
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        let mut file =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| io::Error::from(errno))?;
        let mut start = vec![0; START as usize];
        start[..16].copy_from_slice(MAGIC);
        start[16..48].copy_from_slice(&key);
        let written = file
            .write_all(&start)
            .and_then(|()| io::copy(&mut io::Read::take(io::repeat(0), BYTES - START), &mut *file))
            .and_then(|_| file.sync_all())
            .and_then(|()| sync_folder(&folder_of(path)));
        if let Err(error) = written {
            let _ = fs::remove_file(path);
            return Err(error);
        }
        let state = Mutex::new(State { at: START, next: 1, synced: 1, ..State::default() });
        Ok(Arc::new(Self { file, path: path.to_owned(), key, state, synced: Condvar::new() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Promises: the disk has it when this is done. `None` where there is no room. Of several that come together the disk is waited
    /// for once.
    pub fn promise(self: &Arc<Self>, content: &[u8]) -> io::Result<Option<Promise>> {
        let bytes = (HEAD + content.len()) as u64;
        let mut state = self.state();
        if state.wanted == 0 {
            state.at = START;
        }
        let (at, number) = (state.at, state.next);
        if at.saturating_add(bytes) > BYTES {
            return Ok(None);
        }
        // Nobody else's comes to stand behind one that is not written.
        self.file.write_all_at(&record(&self.key, number, content), at)?;
        state.at += bytes;
        state.next += 1;
        state.wanted += 1;
        while state.synced <= number {
            if state.is_syncing {
                state = self.synced.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.is_syncing = true;
            let written = state.next;
            drop(state);
            let result = self.file.sync_data();
            state = self.state();
            state.is_syncing = false;
            if result.is_ok() {
                state.synced = state.synced.max(written);
            }
            self.synced.notify_all();
            result?;
        }
        Ok(Some(Promise { redo: self.clone(), at }))
    }
}

impl Drop for Redo {
    /// Nothing is wanted any more, or it is left to whoever comes next.
    fn drop(&mut self) {
        if self.state().wanted == 0 {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Promise {
    /// It is needless now, for good.
    pub fn take_back(self) -> io::Result<()> {
        self.redo.file.write_all_at(&[0; WANTED.len()], self.at)?;
        self.redo.file.sync_data()?;
        self.redo.state().wanted -= 1;
        Ok(())
    }
}

impl Left {
    /// What is wanted according to a file, in the order in which it was promised; `None` if there is no such file, or somebody is at
    /// work with it.
    pub fn find(path: &Path) -> io::Result<Option<Self>> {
        let file = match OpenOptions::new().read(true).open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(None) };
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(&*file, BYTES), &mut bytes)?;
        Ok(Some(Self { records: wanted(&bytes), _file: file, path: path.to_owned() }))
    }

    /// All of it was done. Who may not write finds it done the next time as well.
    pub fn done(self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {}
            removed => removed?,
        }
        sync_folder(&folder_of(&self.path))
    }
}

fn hash(key: &[u8; 32], head: &[u8], content: &[u8]) -> blake3::Hash {
    blake3::Hasher::new_keyed(key).update(head).update(content).finalize()
}

fn record(key: &[u8; 32], number: u64, content: &[u8]) -> Vec<u8> {
    let head = [number.to_le_bytes(), (content.len() as u64).to_le_bytes()].concat();
    [WANTED, &head[..], hash(key, &head, content).as_bytes(), content].concat()
}

fn wanted(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    let Some((MAGIC, rest)) = bytes.split_first_chunk::<16>() else { return out };
    let (Some((key, _)), Some(mut rest)) = (rest.split_first_chunk::<32>(), bytes.get(START as usize..)) else {
        return out;
    };
    let mut expected = None;
    while let Some(One { mark, number, content, behind }) = first(key, rest) {
        if expected.is_some_and(|expected| expected != number) {
            break;
        }
        if mark == WANTED {
            out.push(content.to_vec());
        }
        expected = number.checked_add(1);
        rest = behind;
    }
    out
}

struct One<'a> {
    mark: &'a [u8],
    number: u64,
    content: &'a [u8],
    /// It.
    behind: &'a [u8],
}

/// The first record.
fn first<'a>(key: &[u8; 32], bytes: &'a [u8]) -> Option<One<'a>> {
    let (head, rest) = bytes.split_at_checked(HEAD)?;
    let (mark, head) = head.split_at_checked(8)?;
    let (head, told) = head.split_at_checked(16)?;
    let (number, length) = head.split_first_chunk::<8>()?;
    let length = u64::from_le_bytes(length.try_into().ok()?);
    let (content, behind) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    let is_right = hash(key, head, content).as_bytes() == told;
    is_right.then_some(One { mark, number: u64::from_le_bytes(*number), content, behind })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redo() -> (tempfile::TempDir, PathBuf, Arc<Redo>) {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("redo");
        let redo = Redo::create(&path).expect("creates");
        (dir, path, redo)
    }

    fn promised(redo: &Arc<Redo>, content: impl AsRef<[u8]>) -> Promise {
        redo.promise(content.as_ref()).expect("promises").expect("there is room")
    }

    fn left(path: &Path) -> Vec<String> {
        let bytes = fs::read(path).expect("reads");
        wanted(&bytes).into_iter().map(|content| String::from_utf8(content).expect("text")).collect()
    }

    #[test]
    fn what_was_promised_and_not_taken_back_is_found_in_order() {
        let (_dir, path, redo) = redo();
        let promise = |text| promised(&redo, text);
        assert!(left(&path).is_empty());
        let (one, two, three) = (promise("one"), promise("two"), promise("three"));
        assert_eq!(left(&path), ["one", "two", "three"]);
        two.take_back().expect("takes back");
        assert_eq!(left(&path), ["one", "three"]);
        // Who lives is left alone.
        assert!(Left::find(&path).expect("looks").is_none());
        one.take_back().expect("takes back");
        three.take_back().expect("takes back");
        // From the start again; those behind it are of an earlier lap, whether they were taken back or not.
        let four = promise("3333");
        assert_eq!(left(&path), ["3333"]);
        drop(four);
        drop(redo);
        let found = Left::find(&path).expect("looks").expect("is there");
        assert_eq!(found.records, [b"3333"]);
        found.done().expect("is removed");
        assert!(Left::find(&path).expect("looks").is_none());
        drop(Redo::create(&path).expect("creates"));
        assert!(!path.exists(), "nothing is wanted");
    }

    #[test]
    fn of_an_earlier_lap_nothing_counts() {
        let (_dir, path, redo) = redo();
        let promise = |text| promised(&redo, text);
        let all = ["a", "b", "c"].map(promise);
        let file = fs::read(&path).expect("reads");
        all.into_iter().for_each(|promise| promise.take_back().expect("takes back"));
        let again = promise("d");
        // As if the disk had never heard that they were taken back.
        let mut bytes = fs::read(&path).expect("reads");
        let behind = START as usize + HEAD + 1;
        bytes[behind..].copy_from_slice(&file[behind..]);
        assert_eq!(wanted(&bytes), [b"d"]);
        drop(again);
    }

    #[test]
    fn without_room_nothing_is_promised() {
        let (_dir, _, redo) = redo();
        let much = vec![7; BYTES as usize / 2];
        assert!(redo.promise(&vec![0; BYTES as usize]).expect("is asked").is_none());
        let one = promised(&redo, &much);
        assert!(redo.promise(&much).expect("is asked").is_none());
        one.take_back().expect("takes back");
        assert!(redo.promise(&much).expect("promises").is_some());
    }

    #[test]
    fn many_at_a_time_are_all_there() {
        let (_dir, path, redo) = redo();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let redo = &redo;
                scope.spawn(move || {
                    for n in 0..50 {
                        let promise = promised(redo, format!("{thread} {n}"));
                        if n % 2 == 0 {
                            promise.take_back().expect("takes back");
                        }
                    }
                });
            }
        });
        let mut found = left(&path);
        found.sort();
        let mut expected: Vec<String> =
            (0..8).flat_map(|thread| (0..50).filter(|n| n % 2 == 1).map(move |n| format!("{thread} {n}"))).collect();
        expected.sort();
        assert_eq!(found, expected);
    }

    proptest::proptest! {
        /// Whatever stands in the file, and wherever it was cut.
        #[test]
        fn damage_ends_the_records_and_nothing_else(
            contents in proptest::collection::vec(proptest::collection::vec(proptest::num::u8::ANY, 0..40), 1..6),
            at in 0..400_usize,
            flip in 0..=255_u8,
            cut in 0..600_usize,
        ) {
            let key = [3; 32];
            let mut bytes = vec![0; START as usize];
            bytes[..16].copy_from_slice(MAGIC);
            bytes[16..48].copy_from_slice(&key);
            for (number, content) in contents.iter().enumerate() {
                bytes.extend(record(&key, number as u64 + 7, content));
            }
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= flip;
            }
            bytes.truncate(cut);
            let found = wanted(&bytes);
            // A mark that is damaged takes its own record back.
            let mut contents = contents.iter();
            assert!(found.iter().all(|content| contents.any(|expected| expected == content)));
        }
    }
}
