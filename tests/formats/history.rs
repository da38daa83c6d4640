//! Readers at every moment of a file's life: recorded file operations of real servers are played on a disk in memory,
//! and after each write (and in the middle of it) what the readers say must be the state before or after a transaction.

use super::store;
use serde_json::Value;
use spooltap::cyrus::{db, header, index, mboxlist};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{BufRead, Read};
use std::path::Path;

/// Inodes, names and open files.
#[derive(Default)]
struct Disk {
    files: HashMap<u64, Vec<u8>>,
    names: BTreeMap<String, u64>,
    handles: HashMap<u64, u64>,
    last_ino: u64,
}

/// What an operation did to the contents of files.
enum Effect {
    Nothing,
    /// The bytes from `offset` on are new; what was there before is in `old` (the whole file).
    Wrote {
        ino: u64,
        offset: usize,
        old: Vec<u8>,
    },
    /// Names lead elsewhere now, or a file was cut.
    Moved,
}

fn text<'a>(op: &'a Value, key: &str) -> &'a str {
    op[key].as_str().unwrap_or_else(|| panic!("{key} in {op}"))
}

fn number(op: &Value, key: &str) -> u64 {
    op[key].as_u64().unwrap_or_else(|| panic!("{key} in {op}"))
}

impl Disk {
    fn create(&mut self, path: &str, bytes: Vec<u8>) -> u64 {
        self.last_ino += 1;
        self.files.insert(self.last_ino, bytes);
        self.names.insert(path.to_owned(), self.last_ino);
        self.last_ino
    }

    fn unpack(&mut self, archive: &mut tar::Archive<impl Read>) {
        for entry in archive.entries().expect("is a tar archive") {
            let mut entry = entry.expect("entry is whole");
            if entry.header().entry_type().is_file() {
                let path = entry.path().expect("has a path").to_string_lossy().trim_start_matches("./").to_owned();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).expect("entry is whole");
                self.create(&path, bytes);
            }
        }
    }

    fn play(&mut self, op: &Value) -> Effect {
        match text(op, "op") {
            "open" => {
                let has = |flag: &str| op["flags"].as_array().expect("flags").iter().any(|found| found == flag);
                let path = text(op, "path");
                let known = self.names.get(path).copied();
                let ino = known.unwrap_or_else(|| self.create(path, Vec::new()));
                self.handles.insert(number(op, "h"), ino);
                if has("TRUNC") {
                    self.files.insert(ino, Vec::new());
                }
                if has("TRUNC") || known.is_none() { Effect::Moved } else { Effect::Nothing }
            }
            "pwrite" => {
                use base64::Engine;
                let ino = self.handles[&number(op, "h")];
                let data = match op.get("zeros") {
                    Some(zeros) => vec![0; zeros.as_u64().expect("a number") as usize],
                    None => base64::engine::general_purpose::STANDARD.decode(text(op, "data")).expect("is base64"),
                };
                let offset = number(op, "off") as usize;
                let file = self.files.get_mut(&ino).expect("inode exists");
                let old = file.clone();
                file.resize(file.len().max(offset + data.len()), 0);
                file[offset..offset + data.len()].copy_from_slice(&data);
                Effect::Wrote { ino, offset, old }
            }
            "ftruncate" => {
                let ino = self.handles[&number(op, "h")];
                self.files.get_mut(&ino).expect("inode exists").resize(number(op, "size") as usize, 0);
                Effect::Moved
            }
            "truncate" => {
                let ino = self.names[text(op, "path")];
                self.files.get_mut(&ino).expect("inode exists").resize(number(op, "size") as usize, 0);
                Effect::Moved
            }
            "rename" => {
                let (from, to) = (text(op, "path"), text(op, "to"));
                let below = format!("{from}/");
                let moved: Vec<String> =
                    self.names.keys().filter(|name| *name == from || name.starts_with(&below)).cloned().collect();
                for name in moved {
                    let ino = self.names.remove(&name).expect("listed a moment ago");
                    self.names.insert(format!("{to}{}", &name[from.len()..]), ino);
                }
                Effect::Moved
            }
            "link" => {
                let ino = self.names[text(op, "path")];
                self.names.insert(text(op, "to").to_owned(), ino);
                Effect::Moved
            }
            "unlink" => {
                self.names.remove(text(op, "path"));
                Effect::Moved
            }
            _ => Effect::Nothing,
        }
    }
}

fn is_database(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let quota = path.starts_with("conf/quota/") || path.contains("/quota/");
    matches!(name, "mailboxes.db" | "annotations.db" | "cyrus.annotations" | "seen.db" | "sub.db")
        || ((quota || name.ends_with(".seen") || name.ends_with(".sub")) && !name.ends_with(".NEW"))
}

fn is_index(path: &str) -> bool {
    path.ends_with("/cyrus.index")
}

/// What is known of one database: its follower, and the states it may show while a writer is at work.
#[derive(Default)]
struct Watched {
    ino: u64,
    follower: db::Follower,
    /// As it was when nobody held a lock.
    rest: Option<db::Map>,
    /// The other state seen since.
    after: Option<db::Map>,
}

#[derive(Default)]
struct Seen {
    updates: u64,
    tails: u64,
    torn: u64,
    indexes: u64,
    changed: u64,
}

fn read_of(file: &[u8]) -> impl FnMut(u64, usize) -> std::io::Result<Vec<u8>> + '_ {
    |offset, len| {
        let start = (offset as usize).min(file.len());
        Ok(file[start..start.saturating_add(len).min(file.len())].to_vec())
    }
}

fn look_at_database(at: &str, watched: &mut Watched, ino: u64, file: &[u8], seen: &mut Seen) {
    seen.updates += 1;
    watched.ino = ino;
    let before = watched.follower.map().clone();
    match watched.follower.update(ino, &mut read_of(file)) {
        Ok(changes) => {
            seen.tails += u64::from(!changes.reloaded);
            seen.changed += changes.changed.len() as u64;
            let mut expected = before;
            for change in changes.changed {
                assert_eq!(expected.get(&change.key), change.old.as_ref(), "{at}");
                match change.new {
                    Some(new) => drop(expected.insert(change.key, new)),
                    None => drop(expected.remove(&change.key)),
                }
            }
            assert_eq!(&expected, watched.follower.map(), "{at}: changes are not the difference");
        }
        Err(error) => {
            assert!(error.is_torn(), "{at}: {error}");
            seen.torn += 1;
            assert_eq!(&before, watched.follower.map(), "{at}: an error changed the map");
            return;
        }
    }
    let map = watched.follower.map();
    match db::parse(file) {
        Ok(whole) => assert_eq!(&whole, map, "{at}: follower and whole file differ"),
        Err(error) => assert!(error.is_torn(), "{at}: {error}"),
    }
    if !matches!(watched.follower.kind(), Some(db::Kind::Twoskip | db::Kind::Skiplist)) {
        return;
    }
    match &watched.rest {
        Some(rest) if rest == map => assert!(watched.after.is_none(), "{at}: a transaction was taken back"),
        Some(_) => match &watched.after {
            None => watched.after = Some(map.clone()),
            Some(after) => assert!(after == map, "{at}: half a transaction was seen"),
        },
        None => {}
    }
}

fn look_at_index(at: &str, file: &[u8], whole_write: bool, seen: &mut Seen) {
    seen.indexes += 1;
    let parsed = index::parse_header(file).and_then(|head| Ok((index::parse_records(&head, file)?, head)));
    match parsed {
        Ok(_) => {}
        Err(error) if error.is_torn() => seen.torn += 1,
        // Without checksums half a header is what it is.
        Err(error) => assert!(!whole_write, "{at}: {error}"),
    }
}

fn at_rest(at: &str, disk: &Disk, watched: &mut HashMap<String, Watched>) {
    for (path, ino) in &disk.names {
        let file = &disk.files[ino];
        let at = format!("{at} {path}");
        if is_database(path) {
            let map = db::parse(file).unwrap_or_else(|error| panic!("{at}: {error}"));
            if let Some(watched) = watched.get_mut(path) {
                assert!(watched.follower.map() == &map, "{at}: follower is not up to date");
                (watched.rest, watched.after) = (Some(map.clone()), None);
            }
            if path.ends_with("mailboxes.db") {
                let list = mboxlist::parse(&map, None);
                assert!(list.faults.is_empty(), "{at}: {:?}", list.faults);
            }
        } else if is_index(path) {
            let head = index::parse_header(file).unwrap_or_else(|error| panic!("{at}: {error}"));
            let records = index::parse_records(&head, file).unwrap_or_else(|error| panic!("{at}: {error}"));
            assert_eq!(index::uncommitted(&head, &records), None, "{at}");
            let other = path.replace("cyrus.index", "cyrus.header");
            let other = header::parse(&disk.files[&disk.names[&other]]).unwrap_or_else(|error| panic!("{at}: {error}"));
            assert!(head.minor_version < 12 || head.header_file_crc == other.file_crc, "{at}: cyrus.header is another");
        }
    }
}

/// Plays one recording: `base.tar.gz` or `.xz`, `ops.jsonl.gz` or `.xz`.
fn follow(name: &str, folder: &Path) -> Seen {
    let open = |file: &str| -> Box<dyn Read> {
        match std::fs::File::open(folder.join(format!("{file}.gz"))) {
            Ok(packed) => Box::new(flate2::read::GzDecoder::new(packed)),
            Err(_) => {
                let path = folder.join(format!("{file}.xz"));
                let packed = std::fs::File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                Box::new(xz2::read::XzDecoder::new(packed))
            }
        }
    };
    let mut disk = Disk::default();
    disk.unpack(&mut tar::Archive::new(open("base.tar")));
    let mut watched: HashMap<String, Watched> = HashMap::new();
    let mut last_ino: HashMap<String, u64> = HashMap::new();
    let mut seen = Seen::default();
    for line in std::io::BufReader::new(open("ops.jsonl")).lines() {
        let op: Value = serde_json::from_str(&line.expect("is text")).expect("is JSON");
        let at = format!("{name} op {}", op["n"]);
        if op["op"] == "mark" {
            at_rest(&at, &disk, &mut watched);
            continue;
        }
        if op["op"] == "unlock" || op["op"] == "close" {
            let ino = disk.handles[&number(&op, "h")];
            for watched in watched.values_mut().filter(|watched| watched.ino == ino) {
                (watched.rest, watched.after) = (Some(watched.follower.map().clone()), None);
            }
        }
        let effect = disk.play(&op);
        let touched: BTreeSet<String> = match &effect {
            Effect::Nothing => continue,
            Effect::Wrote { ino, .. } => {
                disk.names.iter().filter(|(_, of)| *of == ino).map(|(n, _)| n.clone()).collect()
            }
            Effect::Moved => disk
                .names
                .iter()
                .filter(|(name, ino)| (is_database(name) || is_index(name)) && last_ino.get(*name) != Some(ino))
                .map(|(name, _)| name.clone())
                .collect(),
        };
        for path in touched {
            let at = format!("{at} {path}");
            let ino = disk.names[&path];
            let file = &disk.files[&ino];
            last_ino.insert(path.clone(), ino);
            // The same write seen half done.
            let half = match &effect {
                Effect::Wrote { offset, old, .. } => {
                    let written = (offset + (file.len().min(offset + 4096) - offset) / 2).min(file.len());
                    let mut half = file[..written].to_vec();
                    half.extend_from_slice(old.get(written..).unwrap_or_default());
                    Some(half)
                }
                _ => None,
            };
            for (file, whole) in half.iter().map(|half| (half, false)).chain([(file, true)]) {
                if is_database(&path) {
                    // A new file gets its name with its first bytes still missing.
                    look_at_database(&at, watched.entry(path.clone()).or_default(), ino, file, &mut seen);
                } else if is_index(&path) {
                    look_at_index(&at, file, whole, &mut seen);
                }
            }
        }
    }
    seen
}

#[test]
fn readers_are_right_at_every_moment_of_a_recording() {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/formats/histories")];
    folders.extend(store::shared().map(|shared| shared.join("replays")));
    let mut recordings = BTreeMap::new();
    for folder in folders.iter().filter(|folder| folder.is_dir()) {
        for entry in std::fs::read_dir(folder).expect("folder is readable") {
            let path = entry.expect("folder is readable").path();
            if path.is_dir() {
                recordings.insert(path.file_name().expect("has a name").to_string_lossy().into_owned(), path);
            }
        }
    }
    assert!(!recordings.is_empty(), "the fixtures are there");
    for (name, path) in recordings {
        let seen = follow(&name, &path);
        println!(
            "{name}: {} looks at databases ({} tails, {} keys changed), {} at indexes, {} torn",
            seen.updates, seen.tails, seen.changed, seen.indexes, seen.torn
        );
        assert!(seen.tails > 100 && seen.changed > 100, "{name}: the recording has too little in it");
    }
}
