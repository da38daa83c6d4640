//! Which mailboxes we have begun to bring to a replica, written before the first byte goes there.
//!
//! Receipts are written a moment late. A mailbox that was made on the replica in the last moment of our life, and that the
//! source has removed before the next start, is ours all the same: without this it would stay there for ever, in the way
//! of the next one of its name. A line is written without `fsync`: it has to survive us, not the machine. Where it is
//! lost nonetheless, such a mailbox counts as the replica's own and is reported.

use crate::model::MboxName;
use std::collections::{BTreeSet, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use tracing::warn;

/// Longer than what a million new mailboxes write; it begins anew.
const MOST_BYTES: u64 = 64 << 20;

pub(super) struct Intents(Mutex<Inner>);

struct Inner {
    file: Option<File>,
    known: HashSet<[u8; 16]>,
    names: BTreeSet<MboxName>,
}

impl Intents {
    /// Reads what is there; lines that were cut are left out.
    pub fn open(path: &Path) -> Self {
        let fresh = std::fs::metadata(path).is_ok_and(|meta| meta.len() > MOST_BYTES);
        let text = if fresh { Vec::new() } else { std::fs::read(path).unwrap_or_default() };
        let (mut known, mut names) = (HashSet::new(), BTreeSet::new());
        for line in text.split(|&byte| byte == b'\n') {
            let Ok(line) = std::str::from_utf8(line) else { continue };
            let (key, name) = line.split_once(' ').map_or((line, None), |(key, name)| (key, Some(name)));
            let Ok(key) =
                u128::from_str_radix(key, 16).map_err(drop).and_then(|n| (key.len() == 32).then_some(n).ok_or(()))
            else {
                continue;
            };
            known.insert(key.to_be_bytes());
            names.extend(name.and_then(|name| serde_json::from_str::<MboxName>(name).ok()));
        }
        let mut options = OpenOptions::new();
        let options = if fresh { options.write(true).truncate(true) } else { options.append(true) };
        let mut file = options.create(true).open(path);
        if let Ok(file) = &mut file
            && !text.is_empty()
            && !text.ends_with(b"\n")
        {
            let _ = file.write_all(b"\n");
        }
        if let Err(error) = &file {
            warn!(path = %path.display(), %error, "what is begun cannot be remembered");
        }
        Self(Mutex::new(Inner { file: file.ok(), known, names }))
    }

    pub fn add(&self, key: &[u8], name: Option<&MboxName>) {
        let key = short(key);
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = inner.known.insert(key);
        let new_name = name.is_some_and(|name| inner.names.insert(name.clone()));
        if (new || new_name)
            && let Some(file) = &mut inner.file
        {
            let name = name.and_then(|name| serde_json::to_string(name).ok()).map(|name| format!(" {name}"));
            let line = format!("{:032x}{}\n", u128::from_be_bytes(key), name.unwrap_or_default());
            if let Err(error) = file.write_all(line.as_bytes()) {
                warn!(%error, "what is begun cannot be remembered");
            }
        }
    }

    pub fn has(&self, key: &[u8]) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).known.contains(&short(key))
    }

    pub fn names(&self) -> Vec<MboxName> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).names.iter().cloned().collect()
    }

    /// All receipts are in the database: nothing is begun any more.
    pub fn clear(&self) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.known.clear();
        inner.names.clear();
        if let Some(file) = &inner.file {
            let _ = file.set_len(0);
        }
    }
}

fn short(key: &[u8]) -> [u8; 16] {
    let mut out = [0; 16];
    out.iter_mut().zip(blake3::hash(key).as_bytes()).for_each(|(to, from)| *to = *from);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_begun_survives_and_a_cut_line_harms_nobody() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("begun");
        let name = MboxName::new(b"shared.a b\n\xff");
        Intents::open(&path).add(b"one", Some(&name));
        let text = std::fs::read(&path).expect("written at once");
        std::fs::write(&path, [&text, &text[..7]].concat()).expect("cut");
        let again = Intents::open(&path);
        assert!(again.has(b"one") && !again.has(b"two"));
        assert_eq!(again.names(), [name]);
        again.add(b"two", None);
        let again = Intents::open(&path);
        assert!(again.has(b"one") && again.has(b"two"));
        again.clear();
        assert!(!Intents::open(&path).has(b"one"));
    }
}
