//! Mailbox names and user ids ↔ directories and files, in every layout. Pure: makes paths, opens none.
//!
//! Source: Cyrus `imap/mboxname.c`, `imap/mailbox.c`; checked on stores of 2.3.19, 2.4.22, 2.5.11 and 3.6.1.

use crate::model::{MboxName, QuotaRoot, UniqueId, UserId};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What decides about hashing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hashing {
    /// imapd.conf `hashimapspool`: a hash level in the spool (user and quota files always have one).
    pub spool: bool,
    /// imapd.conf `fulldirhash`: which hash function.
    pub full: bool,
}

impl Hashing {
    /// The hash directory of a name: first letter (`q` for all else), or `A` to `W` with `fulldirhash`.
    pub fn dir(self, name: &[u8]) -> char {
        if self.full {
            let text = name.iter().take_while(|byte| !matches!(byte, 0 | b'.'));
            let n = text.fold(0u32, |n, &byte| ((n << 3) ^ (n >> 5)) ^ u32::from(byte));
            return (b'A'.wrapping_add((n % 23) as u8)) as char;
        }
        match name.first() {
            Some(byte) if byte.is_ascii_alphabetic() => byte.to_ascii_lowercase() as char,
            _ => 'q',
        }
    }
}

/// How dots of user names reach the hash: 2.x hashes the stored form (`joe^bloggs`), 3.0 and later the real one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Era {
    Two,
    Three,
}

fn push(path: &mut PathBuf, part: &[u8]) {
    // A component from a database never leaves its root: separators and dot names become harmless.
    let clean: Vec<u8> = part.iter().map(|&byte| if byte == b'/' || byte == 0 { b'_' } else { byte }).collect();
    match clean.as_slice() {
        b"." | b".." | b"" => path.push("_"),
        clean => path.push(OsStr::from_bytes(clean)),
    }
}

fn with_dots(part: &[u8]) -> Vec<u8> {
    part.iter().map(|&byte| if byte == b'^' { b'.' } else { byte }).collect()
}

fn with_carets(part: &[u8]) -> Vec<u8> {
    part.iter().map(|&byte| if byte == b'.' { b'^' } else { byte }).collect()
}

fn domain_dir(root: &Path, domain: &[u8], hashing: Hashing, hashed: bool) -> PathBuf {
    let mut path = root.join("domain");
    if hashed {
        path.push(hashing.dir(domain).to_string());
    }
    push(&mut path, domain);
    path
}

/// Directory of a mailbox found by name: all releases up to 3.4, flag `l` later.
pub fn mailbox_dir(root: &Path, name: &MboxName, hashing: Hashing, era: Era) -> PathBuf {
    let (domain, _) = name.domain_and_local();
    let mut path = match domain {
        Some(domain) => domain_dir(root, domain, hashing, hashing.spool),
        None => root.to_owned(),
    };
    let parts: Vec<&[u8]> = name.components().collect();
    if hashing.spool {
        let key = parts.get(1).or(parts.first()).copied().unwrap_or_default();
        let key = if era == Era::Three { with_dots(key) } else { key.to_vec() };
        path.push(hashing.dir(&key).to_string());
    }
    parts.iter().for_each(|part| push(&mut path, part));
    path
}

/// Directory of anything found by uniqueid (3.6 and later): `root/uuid/a/b/abc…`.
pub fn uuid_dir(root: &Path, id: &UniqueId) -> PathBuf {
    let mut path = root.join("uuid");
    for at in 0..2 {
        push(&mut path, id.as_bytes().get(at..=at).unwrap_or_default());
    }
    push(&mut path, id.as_bytes());
    path
}

fn user_parts(user: &UserId) -> (&[u8], Option<&[u8]>) {
    let bytes = user.as_bytes();
    match bytes.iter().rposition(|&byte| byte == b'@') {
        Some(at) => (bytes.get(..at).unwrap_or_default(), bytes.get(at.saturating_add(1)..)),
        None => (bytes, None),
    }
}

/// Where a user's file (`seen`, `sub` …) may be in by-name layouts, most likely first: real id and the stored form with
/// `^`, domain split off or not.
pub fn user_files(conf: &Path, user: &UserId, suffix: &str, hashing: Hashing) -> Vec<PathBuf> {
    let (local, domain) = user_parts(user);
    let mut out = Vec::new();
    for name in [local.to_vec(), with_carets(local)] {
        let mut path = match domain {
            Some(domain) => domain_dir(conf, domain, hashing, true),
            None => conf.to_owned(),
        };
        path.push("user");
        path.push(hashing.dir(&name).to_string());
        push(&mut path, &[&name, b".".as_slice(), suffix.as_bytes()].concat());
        out.push(path);
    }
    if domain.is_some() {
        let mut path = conf.join("user");
        path.push(hashing.dir(user.as_bytes()).to_string());
        push(&mut path, &[user.as_bytes(), b".", suffix.as_bytes()].concat());
        out.push(path);
    }
    out.dedup();
    out
}

/// Where a user's Sieve directory may be in by-name layouts, most likely first.
pub fn sieve_dirs(sievedir: &Path, user: &UserId, hashing: Hashing) -> Vec<PathBuf> {
    let (local, domain) = user_parts(user);
    let mut out = Vec::new();
    for name in [local.to_vec(), with_carets(local)] {
        let mut path = match domain {
            Some(domain) => domain_dir(sievedir, domain, hashing, true),
            None => sievedir.to_owned(),
        };
        path.push(hashing.dir(&name).to_string());
        push(&mut path, &name);
        out.push(path);
    }
    if domain.is_some() {
        let mut path = sievedir.to_owned();
        path.push(hashing.dir(user.as_bytes()).to_string());
        push(&mut path, user.as_bytes());
        out.push(path);
    }
    out.dedup();
    out
}

/// File of a quota root with `quota_db: quotalegacy`.
pub fn quota_file(conf: &Path, root: &QuotaRoot, hashing: Hashing) -> PathBuf {
    let name = MboxName::new(root.as_bytes());
    let (domain, local) = name.domain_and_local();
    let mut path = match domain {
        Some(domain) => domain_dir(conf, domain, hashing, true),
        None => conf.to_owned(),
    };
    path.push("quota");
    if local.is_empty() {
        path.push("root");
        return path;
    }
    let key = local.iter().position(|&byte| byte == b'.').and_then(|at| local.get(at.saturating_add(1)..));
    path.push(hashing.dir(key.unwrap_or(local)).to_string());
    push(&mut path, local);
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASIC: Hashing = Hashing { spool: true, full: false };
    const FULL: Hashing = Hashing { spool: true, full: true };

    #[test]
    fn hashes_of_the_reference() {
        for (name, letter) in [
            ("fred", 'E'),
            ("joe.bloggs", 'B'),
            ("joe^bloggs", 'L'),
            ("example.com", 'O'),
            ("shared", 'T'),
            ("cyrus", 'S'),
        ] {
            assert_eq!(FULL.dir(name.as_bytes()), letter, "{name}");
        }
        for (name, letter) in [("fred", 'f'), ("joe.bloggs", 'j'), ("1abc", 'q'), (".x", 'q'), ("\u{c9}a", 'q')] {
            assert_eq!(BASIC.dir(name.as_bytes()), letter, "{name}");
        }
    }

    #[test]
    fn directories_of_the_reference() {
        let check = |name: &str, hashing: Hashing, expected: &str| {
            let path = mailbox_dir(Path::new("/p"), &name.into(), hashing, Era::Two);
            assert_eq!(path, Path::new(expected));
        };
        check("user.joe^bloggs.Sub", BASIC, "/p/j/user/joe^bloggs/Sub");
        check("example.com!user.fred", BASIC, "/p/domain/e/example.com/f/user/fred");
        check("DELETED.user.fred.5F0C1A2B", BASIC, "/p/u/DELETED/user/fred/5F0C1A2B");
        check("user.joe^bloggs.Sub", Hashing::default(), "/p/user/joe^bloggs/Sub");
        check("public", BASIC, "/p/p/public");
        assert_eq!(uuid_dir(Path::new("/p"), &"abc".into()), Path::new("/p/uuid/a/b/abc"));
    }

    #[test]
    fn user_and_quota_files() {
        let conf = Path::new("/c");
        assert_eq!(user_files(conf, &"fred".into(), "seen", BASIC), [Path::new("/c/user/f/fred.seen")]);
        assert_eq!(
            user_files(conf, &"j.d@x.org".into(), "sub", BASIC),
            ["/c/domain/x/x.org/user/j/j.d.sub", "/c/domain/x/x.org/user/j/j^d.sub", "/c/user/j/j.d@x.org.sub"]
                .map(PathBuf::from)
        );
        assert_eq!(quota_file(conf, &"user.fred".into(), BASIC), Path::new("/c/quota/f/user.fred"));
        assert_eq!(quota_file(conf, &"x.org!".into(), BASIC), Path::new("/c/domain/x/x.org/quota/root"));
        assert_eq!(quota_file(conf, &"x.org!user.a".into(), BASIC), Path::new("/c/domain/x/x.org/quota/a/user.a"));
    }

    #[test]
    fn names_cannot_leave_their_root() {
        let path = mailbox_dir(Path::new("/p"), &MboxName::new(b"user.../../etc.."), Hashing::default(), Era::Three);
        assert!(path.starts_with("/p") && !path.components().any(|part| part.as_os_str() == ".."), "{path:?}");
    }
}
