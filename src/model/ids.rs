//! Identifiers. Names and keys are bytes, not `String`: disks hold what disks hold.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Message UID inside one mailbox; 0 never names a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Uid(pub u32);

/// Modification sequence; grows with every change of a mailbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ModSeq(pub u64);

/// SHA-1 of the whole message file; all zero means "not set".
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageGuid(pub [u8; 20]);

impl MessageGuid {
    /// True for the all-zero GUID of a record that has none.
    pub fn is_null(&self) -> bool {
        self.0 == [0; 20]
    }

    /// Parses exactly 40 hexadecimal digits, either case.
    pub fn parse_hex(text: &[u8]) -> Option<Self> {
        if text.len() != 40 {
            return None;
        }
        let mut out = [0u8; 20];
        for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
            let digit = |c: u8| (c as char).to_digit(16).map(|d| d as u8);
            let [high, low] = pair else { return None };
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        Some(Self(out))
    }
}

impl fmt::Display for MessageGuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MessageGuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for MessageGuid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for MessageGuid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            Self::parse_hex(text.as_bytes()).ok_or_else(|| serde::de::Error::custom("a GUID has 40 hexadecimal digits"))
        } else {
            Ok(Self(<[u8; 20]>::deserialize(deserializer)?))
        }
    }
}

/// Bytes as text for people and for JSON: printable ASCII as it is, everything else (and `\`) as `\xNN`.
pub(crate) fn escape(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for &byte in bytes {
        match byte {
            b'\\' => f.write_str("\\x5c")?,
            0x20..=0x7e => write!(f, "{}", byte as char)?,
            _ => write!(f, "\\x{byte:02x}")?,
        }
    }
    Ok(())
}

fn unescape(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, tail)) = rest.split_first() {
        let hex = (first == b'\\')
            .then(|| tail.strip_prefix(b"x"))
            .flatten()
            .and_then(|digits| digits.get(..2))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match hex {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

macro_rules! byte_string {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<[u8]>);

        impl $name {
            /// Wraps bytes exactly as they stand.
            pub fn new(bytes: impl AsRef<[u8]>) -> Self {
                Self(bytes.as_ref().into())
            }

            /// The bytes exactly as they stand.
            pub fn as_bytes(&self) -> &[u8] {
                &self.0
            }

            /// True when there is not one byte.
            pub fn is_empty(&self) -> bool {
                self.0.is_empty()
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self::new(text)
            }
        }

        impl From<Vec<u8>> for $name {
            fn from(bytes: Vec<u8>) -> Self {
                Self(bytes.into())
            }
        }

        impl AsRef<[u8]> for $name {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                escape(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"")?;
                escape(&self.0, f)?;
                f.write_str("\"")
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    serializer.serialize_bytes(&self.0)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    Ok(Self(unescape(&String::deserialize(deserializer)?).into()))
                } else {
                    Ok(Self(Vec::<u8>::deserialize(deserializer)?.into()))
                }
            }
        }
    };
}

byte_string!(
    /// Mailbox name in Cyrus's classic internal form (*intname*): `[domain!]component.component`, a literal dot
    /// inside a component is `^`, non-ASCII is modified UTF-7. The same form travels over csync.
    MboxName
);
byte_string!(
    /// Opaque, case-sensitive identity of a mailbox: 16 hex digits, a UUID or 24 alphanumerics, by release.
    UniqueId
);
byte_string!(
    /// User id in external form, as csync carries it: `alice`, `al.ice`, `alice@example.com`.
    UserId
);
byte_string!(
    /// Name of a spool partition, as `partition-NAME` in imapd.conf spells it.
    Partition
);
byte_string!(
    /// Internal name of a quota root, the same form as a mailbox name; `domain!` is a whole domain.
    QuotaRoot
);
byte_string!(
    /// Name of a Sieve script without any suffix.
    SieveName
);
byte_string!(
    /// A user flag (keyword) exactly as the mailbox header spells it.
    FlagName
);

impl MboxName {
    /// Splits `domain!rest`; the domain is `None` where there is no `!`.
    pub fn domain_and_local(&self) -> (Option<&[u8]>, &[u8]) {
        match self.0.iter().position(|&byte| byte == b'!') {
            Some(at) => (self.0.get(..at), self.0.get(at + 1..).unwrap_or_default()),
            None => (None, &self.0),
        }
    }

    /// The components after the domain.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.domain_and_local().1.split(|&byte| byte == b'.')
    }

    /// The live name that a delayed-deleted mailbox once had: `DELETED.user.u.X.5F0C1A2B` gives `user.u.X`.
    /// `None` when the name is not below `prefix` (imapd.conf `deletedprefix`).
    pub fn without_deleted(&self, prefix: &[u8]) -> Option<MboxName> {
        let (domain, local) = self.domain_and_local();
        let rest = local.strip_prefix(prefix)?.strip_prefix(b".")?;
        let end = rest.iter().rposition(|&byte| byte == b'.')?;
        let mut out = Vec::with_capacity(self.0.len());
        if let Some(domain) = domain {
            out.extend_from_slice(domain);
            out.push(b'!');
        }
        out.extend_from_slice(rest.get(..end)?);
        Some(out.into())
    }

    /// Whose mailbox it is. A delayed-deleted one keeps its owner, in Cyrus's eyes as well.
    pub fn account(&self, deleted_prefix: &[u8]) -> Option<UserId> {
        self.without_deleted(deleted_prefix).as_ref().unwrap_or(self).owner()
    }

    /// The name below `prefix` that a deleted mailbox of this name has, but for the time at its end.
    pub fn with_deleted(&self, prefix: &[u8]) -> MboxName {
        let (domain, local) = self.domain_and_local();
        let domain = domain.map(|domain| [domain, b"!"].concat()).unwrap_or_default();
        [domain.as_slice(), prefix, b".", local].concat().into()
    }

    /// The user who owns the mailbox, in external form; `None` for shared ones and for `DELETED.` names.
    pub fn owner(&self) -> Option<UserId> {
        let (domain, local) = self.domain_and_local();
        let rest = local.strip_prefix(b"user.")?;
        let part = rest.split(|&byte| byte == b'.').next().filter(|part| !part.is_empty())?;
        let mut user: Vec<u8> = part.iter().map(|&byte| if byte == b'^' { b'.' } else { byte }).collect();
        if let Some(domain) = domain {
            user.push(b'@');
            user.extend_from_slice(domain);
        }
        Some(user.into())
    }

    /// True for `user.NAME` itself, with or without a domain.
    pub fn is_inbox(&self) -> bool {
        let (_, local) = self.domain_and_local();
        local.strip_prefix(b"user.").is_some_and(|rest| !rest.is_empty() && !rest.contains(&b'.'))
    }

    /// The name one level up; `None` at the top.
    pub fn parent(&self) -> Option<MboxName> {
        let (_, local) = self.domain_and_local();
        let at = local.iter().rposition(|&byte| byte == b'.')?;
        let cut = self.0.len() - (local.len() - at);
        self.0.get(..cut).map(MboxName::new)
    }
}

impl UserId {
    /// The user's INBOX in internal form: dots of the local part become `^`, the text after the last `@` the domain.
    pub fn inbox(&self) -> MboxName {
        let (local, domain) = match self.0.iter().rposition(|&byte| byte == b'@') {
            Some(at) => (self.0.get(..at).unwrap_or_default(), self.0.get(at + 1..)),
            None => (&*self.0, None),
        };
        let mut out = Vec::with_capacity(self.0.len() + 6);
        if let Some(domain) = domain {
            out.extend_from_slice(domain);
            out.push(b'!');
        }
        out.extend_from_slice(b"user.");
        out.extend(local.iter().map(|&byte| if byte == b'.' { b'^' } else { byte }));
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_and_inbox_are_each_others_reverse() {
        for (name, user) in
            [("user.fred.T1", "fred"), ("dom.test!user.u3", "u3@dom.test"), ("user.jane^doe.X", "jane.doe")]
        {
            let owner = MboxName::from(name).owner().expect("has an owner");
            assert_eq!(owner, UserId::from(user));
            assert!(name.starts_with(&owner.inbox().to_string()), "{name}");
        }
        assert_eq!(MboxName::from("shared.news").owner(), None);
        assert_eq!(MboxName::from("DELETED.user.u1.X.6B050AE9").owner(), None);
        assert!(MboxName::from("dom.test!user.u3").is_inbox());
        assert!(!MboxName::from("user.u3.Sent").is_inbox());
    }

    #[test]
    fn a_deleted_name_gives_the_live_one() {
        let check = |name: &str| MboxName::from(name).without_deleted(b"DELETED").map(|live| live.to_string());
        assert_eq!(check("DELETED.user.u1.X.6B050AE9").as_deref(), Some("user.u1.X"));
        assert_eq!(check("dom.test!DELETED.user.u3.6B050AE9").as_deref(), Some("dom.test!user.u3"));
        assert_eq!(check("user.u1.X"), None);
        let account = |name: &str| MboxName::from(name).account(b"DELETED").map(|user| user.to_string());
        assert_eq!(account("DELETED.user.u1.X.6B050AE9").as_deref(), Some("u1"));
        assert_eq!(account("dom.test!DELETED.user.u3.6B050AE9").as_deref(), Some("u3@dom.test"));
        assert_eq!(account("DELETED.shared.news.6B050AE9"), None);
        for name in ["user.u1.X", "dom.test!user.u3"] {
            let deleted = MboxName::from(name).with_deleted(b"DELETED");
            assert_eq!(check(&format!("{deleted}.6B050AE9")).as_deref(), Some(name));
        }
    }

    #[test]
    fn bytes_survive_the_trip_through_text() {
        let name = MboxName::new(b"user.u1.a\\b\xff\x1f");
        let text = serde_json::to_string(&name).expect("serialises");
        assert_eq!(serde_json::from_str::<MboxName>(&text).expect("parses"), name);
        let packed = postcard::to_stdvec(&name).expect("packs");
        assert_eq!(postcard::from_bytes::<MboxName>(&packed).expect("unpacks"), name);
    }

    #[test]
    fn parents_stop_at_the_domain() {
        let parent = |name: &str| MboxName::from(name).parent().map(|name| name.to_string());
        assert_eq!(parent("dom!user.u1.a").as_deref(), Some("dom!user.u1"));
        assert_eq!(parent("dom!user"), None);
    }
}
