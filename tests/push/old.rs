//! Stores of releases that nobody has at hand any more, made of one of 2.3.19: the records cut down to what the index
//! versions 6 to 9 have, the databases as text.

use super::{Pair, Talk, listed_lines, succeeds};
use crate::util::{Store, cyrus, store};
use spooltap::cyrus::db;
use std::fs;
use std::path::{Path, PathBuf};

/// Sizes of version 10, which 2.3.10 and later write.
const HEADER: usize = 96;
const RECORD: usize = 88;

/// The same index in an older version: what it does not have is gone.
fn older(bytes: &[u8], minor: u32) -> Vec<u8> {
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    assert_eq!((word(8), word(12) as usize, word(16) as usize), (10, HEADER, RECORD));
    let (header, record) = match minor {
        6 => (76, 60),
        7 => (76, 72),
        8 => (92, 80),
        _ => (96, 80),
    };
    let mut out = bytes[..header].to_vec();
    for (at, value) in [(8, minor), (12, header as u32), (16, record as u32)] {
        out[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    if minor < 8 {
        out[68..].fill(0);
    }
    for old in bytes[HEADER..].chunks_exact(RECORD).take(word(20) as usize) {
        let mut new = old[..60].to_vec();
        if minor >= 7 {
            // A UUID, which says nothing about the message.
            new.extend_from_slice(b"\x02uuid\0\0\0");
            new.extend_from_slice(&old[..4]);
        }
        if minor >= 8 {
            new.extend_from_slice(&old[80..88]);
        }
        assert_eq!(new.len(), record);
        out.extend(new);
    }
    out
}

/// A database as the text that the `flat` backend of 2.3 writes.
fn flat(path: &Path) {
    let rows = db::parse(&fs::read(path).expect("a file")).expect("is good");
    let text: Vec<u8> = rows.iter().flat_map(|(key, value)| [&key[..], b"\t", value, b"\n"].concat()).collect();
    fs::write(path, text).expect("is written");
}

fn files(store: &Store, fits: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let files = walkdir::WalkDir::new(store.dir.path()).into_iter().flatten();
    let files = files.filter(|file| file.file_type().is_file() && fits(&file.file_name().to_string_lossy()));
    files.map(walkdir::DirEntry::into_path).collect()
}

/// What is different from the truth of the store it was made of.
fn differences(name: &str, minor: u32) -> anyhow::Result<Vec<String>> {
    let source = store::store(name);
    let (mut indexes, mut expunged) = (0, 0);
    for path in files(&source, |name| matches!(name, "cyrus.index" | "cyrus.expunge")) {
        let bytes = fs::read(&path)?;
        match path.ends_with("cyrus.expunge") {
            true => expunged += (bytes.len() - HEADER) / RECORD,
            false => indexes += 1,
        }
        fs::write(path, older(&bytes, minor))?;
    }
    let databases = files(&source, |name| name == "mailboxes.db" || name.ends_with(".seen"));
    databases.iter().for_each(|path| flat(path));
    anyhow::ensure!(indexes > 15 && databases.len() > 5, "{indexes} indexes, {} databases", databases.len());
    anyhow::ensure!(name != "2.3.19-c" || expunged > 0, "nothing is expunged and still there");
    let pair = Pair::new(source)?;
    let talk = Talk::recorded_by(&pair.replica)?;
    succeeds(&pair.spooltap(&["push", "-A"])?, "push")?;
    let first = talk.applied();
    succeeds(&pair.spooltap(&["verify"])?, "verify")?;
    succeeds(&pair.spooltap(&["push", "-A"])?, "the second push")?;
    anyhow::ensure!(talk.applied() == first, "sent again: {}", talk.since(&first));
    let mut differences = pair.differences()?;
    if minor < 8 {
        // Where the store had CONDSTORE on; this version has no place for it.
        differences.retain(|line| !line.contains("modseq: "));
    }
    Ok(differences)
}

#[test]
fn every_index_version_of_2_3_and_text_databases_arrive() {
    if !cyrus::installed() {
        return;
    }
    for (name, minor) in [("2.3.19-a", 6), ("2.3.19-c", 7), ("2.3.19-b", 8), ("2.3.19-c", 9)] {
        let found = differences(name, minor).unwrap_or_else(|error| vec![format!("{error:#}")]);
        assert!(found.is_empty(), "{name} with indexes of version {minor}:\n{}", listed_lines(&found));
    }
}
