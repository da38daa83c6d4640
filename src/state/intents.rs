//! Which mailboxes we have begun to bring to a replica, written before the first byte goes there.
//!
//! Receipts are written a moment late. A mailbox that was made on the replica in the last moment of our life, and that the
//! source has removed before the next start, is ours all the same: without this it would stay there for ever, in the way
//! of the next one of its name. A line is written without `fsync`: it has to survive us, not the machine. Where it is
//! lost nonetheless, such a mailbox counts as the replica's own and is reported.

use std::collections::HashSet;
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
}

impl Intents {
    /// Reads what is there; lines that were cut are left out.
    pub fn open(path: &Path) -> Self {
        let fresh = std::fs::metadata(path).is_ok_and(|meta| meta.len() > MOST_BYTES);
        let text = if fresh { Vec::new() } else { std::fs::read(path).unwrap_or_default() };
        let mut known = HashSet::new();
        for line in text.split(|&byte| byte == b'\n') {
            let text = std::str::from_utf8(line).ok().filter(|text| text.len() == 32);
            known.extend(text.and_then(|text| u128::from_str_radix(text, 16).ok()).map(u128::to_be_bytes));
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
        Self(Mutex::new(Inner { file: file.ok(), known }))
    }

    pub fn add(&self, key: &[u8]) {
        let key = short(key);
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.known.insert(key)
            && let Some(file) = &mut inner.file
        {
            let line = format!("{:032x}\n", u128::from_be_bytes(key));
            if let Err(error) = file.write_all(line.as_bytes()) {
                warn!(%error, "what is begun cannot be remembered");
            }
        }
    }

    pub fn has(&self, key: &[u8]) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).known.contains(&short(key))
    }

    /// All receipts are in the database: nothing is begun any more.
    pub fn clear(&self) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.known.clear();
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
        Intents::open(&path).add(b"one");
        let text = std::fs::read(&path).expect("written at once");
        std::fs::write(&path, [&text, &text[..7]].concat()).expect("cut");
        let again = Intents::open(&path);
        assert!(again.has(b"one") && !again.has(b"two"));
        again.add(b"two");
        let again = Intents::open(&path);
        assert!(again.has(b"one") && again.has(b"two"));
        again.clear();
        assert!(!Intents::open(&path).has(b"one"));
    }
}
