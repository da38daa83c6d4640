//! Names from the wire: none may become a path that leaves the store, whatever kind of store it is.

use crate::model::{MboxName, Partition, UniqueId, UserId};

/// Cyrus's own limit is 490.
const MAX_NAME: usize = 490;
const MAX_ID: usize = 64;
const MAX_PARTITION: usize = 64;
/// Each byte may take three in the name of an object.
const MAX_USER: usize = 80;

fn is_plain(byte: u8) -> bool {
    byte > 0x1f && byte != 0x7f && byte != b'/'
}

/// Components between dots, after an optional domain; none empty.
pub(super) fn mailbox(name: &MboxName) -> bool {
    let (domain, local) = name.domain_and_local();
    let plain = name.as_bytes().iter().copied().all(is_plain);
    let whole = |part: &[u8]| !part.is_empty() && part.split(|&byte| byte == b'.').all(|part| !part.is_empty());
    plain && name.as_bytes().len() <= MAX_NAME && whole(local) && domain.is_none_or(whole)
}

pub(super) fn user(user: &UserId) -> bool {
    let bytes = user.as_bytes();
    !bytes.is_empty() && bytes.len() <= MAX_USER && bytes.iter().copied().all(is_plain) && !bytes.starts_with(b".")
}

/// 16 hex digits, a UUID, 24 letters and digits.
pub(super) fn uniqueid(id: &UniqueId) -> bool {
    let bytes = id.as_bytes();
    let good = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    !bytes.is_empty() && bytes.len() <= MAX_ID && bytes.iter().all(good)
}

pub(super) fn partition(partition: &Partition) -> bool {
    let bytes = partition.as_bytes();
    let good = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    !bytes.is_empty() && bytes.len() <= MAX_PARTITION && bytes.iter().all(good)
}

/// The name of a script, without its suffix.
pub(super) fn script(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= 255 && name.iter().copied().all(is_plain) && !name.starts_with(b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_real_servers_have_is_good() {
        for name in [
            "user.u1",
            "dom.test!user.jane^doe.Work &AOk-",
            "DELETED.user.u1.x.6B050F77",
            "shared.news",
            "user.u1.#sieve",
        ] {
            assert!(mailbox(&name.into()), "{name}");
        }
        for id in ["221cc15c6b050f33", "mzb3mw031vhl89h0chmwnole", "769f8b1f-a363-4dac-9d50-22a2a2b2c840"] {
            assert!(uniqueid(&id.into()), "{id}");
        }
        assert!(user(&"jane.doe@dom.test".into()) && partition(&"default".into()) && script(b"main script"));
    }

    #[test]
    fn what_could_leave_the_store_is_not() {
        for name in [
            "",
            ".",
            "..",
            "user..x",
            ".user",
            "user.x.",
            "user.a/b",
            "user.../../x",
            "!user.x",
            "a\0b",
            "a\nb",
            "dom..x!user.y",
        ] {
            assert!(!mailbox(&name.into()), "{name:?}");
        }
        assert!(!mailbox(&"x".repeat(491).as_str().into()));
        for id in ["", "..", "a/b", "a.b", "a b", "a\0"] {
            assert!(!uniqueid(&id.into()) && !partition(&id.into()), "{id:?}");
        }
        for name in ["", ".", "..", "a/b", "../x", "a\0"] {
            assert!(!user(&name.into()) && !script(name.as_bytes()), "{name:?}");
        }
    }
}
