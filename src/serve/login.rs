//! Who may replicate to us: a file of users and passwords, and which of them are administrators.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use zeroize::Zeroizing;

/// Mechanisms that are offered.
pub(super) const MECHANISMS: &str = "PLAIN LOGIN";

/// The password file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoginsError {
    #[error("{path}: {cause}")]
    Read { path: String, cause: std::io::Error },
    #[error("{path}: others may read it (mode {mode:o}); chmod 600 {path}")]
    Open { path: String, mode: u32 },
    #[error("{path} line {line}: write USER:PASSWORD")]
    Line { path: String, line: usize },
    #[error("{0} is an administrator without a password; add a line {0}:PASSWORD")]
    Admin(String),
    #[error("{0}: nobody may log in; add a line USER:PASSWORD")]
    Nobody(String),
}

/// Users with their passwords, of which only hashes are kept.
#[derive(Clone, Debug, Default)]
pub struct Logins {
    users: BTreeMap<Vec<u8>, blake3::Hash>,
    admins: BTreeSet<Vec<u8>>,
}

impl Logins {
    /// Reads `USER:PASSWORD` lines. `admins` are those who may replicate; if none is named, all of them.
    pub fn read(path: &Path, admins: &[String]) -> Result<Self, LoginsError> {
        let shown = || path.display().to_string();
        let read = |cause| LoginsError::Read { path: shown(), cause };
        let mode = std::fs::metadata(path).map_err(read)?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(LoginsError::Open { path: shown(), mode: mode & 0o777 });
        }
        let text = Zeroizing::new(std::fs::read(path).map_err(read)?);
        let mut logins = Self::default();
        for (number, line) in text.split(|&byte| byte == b'\n').enumerate() {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let colon = line.iter().position(|&byte| byte == b':').filter(|at| *at > 0 && at + 1 < line.len());
            let Some((user, password)) = colon.and_then(|at| line.split_at_checked(at)) else {
                return Err(LoginsError::Line { path: shown(), line: number + 1 });
            };
            logins.users.insert(user.to_vec(), blake3::hash(password.get(1..).unwrap_or_default()));
        }
        if logins.users.is_empty() {
            return Err(LoginsError::Nobody(shown()));
        }
        if let Some(admin) = admins.iter().find(|admin| !logins.users.contains_key(admin.as_bytes()))
            && !admins.iter().any(|admin| logins.users.contains_key(admin.as_bytes()))
        {
            return Err(LoginsError::Admin(admin.clone()));
        }
        logins.admins = match admins {
            [] => logins.users.keys().cloned().collect(),
            named => named.iter().map(|admin| admin.as_bytes().to_vec()).collect(),
        };
        Ok(logins)
    }

    /// Hashes are compared in constant time.
    fn accepts(&self, user: &[u8], password: &[u8]) -> bool {
        let known = self.users.get(user);
        let same = blake3::hash(password) == known.copied().unwrap_or(blake3::Hash::from_bytes([0; 32]));
        same && known.is_some()
    }

    pub(super) fn is_admin(&self, user: &[u8]) -> bool {
        self.admins.contains(user)
    }
}

/// A login under way.
pub(super) enum Exchange {
    Plain,
    /// `LOGIN` asks twice.
    Name,
    Password(Vec<u8>),
}

/// What comes next.
pub(super) enum Turn {
    /// Say this after `+ `, and go on.
    Ask(&'static str, Exchange),
    Accepted(Vec<u8>),
    Refused,
}

/// `User Name` in the words of Cyrus SASL, as base64.
const NAME: &str = "VXNlcm5hbWU6";
const PASSWORD: &str = "UGFzc3dvcmQ6";

impl Exchange {
    /// A mechanism by its name.
    pub fn start(mechanism: &str) -> Option<Turn> {
        match mechanism.to_ascii_uppercase().as_str() {
            "PLAIN" => Some(Turn::Ask("", Self::Plain)),
            "LOGIN" => Some(Turn::Ask(NAME, Self::Name)),
            _ => None,
        }
    }

    /// The client's next bytes, decoded.
    pub fn step(self, logins: &Logins, input: &[u8]) -> Turn {
        match self {
            Self::Plain => {
                let mut parts = input.split(|&byte| byte == 0);
                match (parts.next(), parts.next(), parts.next(), parts.next()) {
                    // Nobody may act for somebody else.
                    (Some(as_user), Some(user), Some(password), None)
                        if (as_user.is_empty() || as_user == user) && logins.accepts(user, password) =>
                    {
                        Turn::Accepted(user.to_vec())
                    }
                    _ => Turn::Refused,
                }
            }
            Self::Name => Turn::Ask(PASSWORD, Self::Password(input.to_vec())),
            Self::Password(user) if logins.accepts(&user, input) => Turn::Accepted(user),
            Self::Password(_) => Turn::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str, mode: u32) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("passwords");
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).expect("mode");
        (dir, path)
    }

    #[test]
    fn only_the_right_password_of_the_right_user() {
        let (_dir, path) = file("# replication\nrepl:se:cret\nother:x\n", 0o600);
        let logins = Logins::read(&path, &["repl".into()]).expect("reads");
        let plain = |text: &[u8]| matches!(Exchange::Plain.step(&logins, text), Turn::Accepted(_));
        assert!(plain(b"\0repl\0se:cret") && plain(b"repl\0repl\0se:cret") && plain(b"\0other\0x"));
        for wrong in
            [&b"\0repl\0x"[..], b"\0repl\0", b"\0nobody\0", b"other\0repl\0se:cret", b"\0repl\0se:cret\0", b"repl", b""]
        {
            assert!(!plain(wrong), "{wrong:?}");
        }
        assert!(logins.is_admin(b"repl") && !logins.is_admin(b"other"));
        let Turn::Ask(_, password) = Exchange::Name.step(&logins, b"repl") else { panic!("asks") };
        assert!(matches!(password.step(&logins, b"se:cret"), Turn::Accepted(_)));
    }

    #[test]
    fn files_that_cannot_be_used_are_named_with_a_cure() {
        let error = |text: &str, mode, admins: &[String]| {
            let (_dir, path) = file(text, mode);
            Logins::read(&path, admins).expect_err("refused").to_string()
        };
        assert!(error("repl:x\n", 0o644, &[]).contains("chmod 600"));
        assert!(error("repl\n", 0o600, &[]).contains("line 1"));
        assert!(error("repl:\n", 0o600, &[]).contains("line 1"));
        assert!(error("# x\n", 0o600, &[]).contains("nobody"));
        assert!(error("repl:x\n", 0o600, &["cyrus".into()]).contains("cyrus"));
    }
}
