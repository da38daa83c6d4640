//! Passwords, and where they come from: none stands in a configuration file.

use super::checked::{ConfigFault, ConfigFaults};
use super::raw::Raw;
use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// The credential for every replica that has none of its own; with `-NAME` behind it, for the replica of that name.
const CREDENTIAL: &str = "spooltap-password";

/// Where the unit's credential comes from. Whoever may read it, root at a terminal, need not name it.
const USUAL_FILE: &str = "/etc/spooltap/password";

/// A password. Never printed, wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// The password itself: for SASL only.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Passwords as they were found.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// From `password_file`.
    file: Option<Secret>,
    /// systemd's `$CREDENTIALS_DIRECTORY/spooltap-password`.
    credential: Option<Secret>,
    /// `SPOOLTAP_PASSWORD`.
    environment: Option<Secret>,
    /// From `/etc/spooltap/password`.
    usual: Option<Secret>,
    /// By URL, where a replica has its own.
    own: BTreeMap<String, Secret>,
}

impl Credentials {
    /// Reads them from where they may be.
    pub fn gather(raw: &Raw) -> Result<Self, ConfigFaults> {
        let dir = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        let credential = |name: &str| dir.as_ref().map(|dir| dir.join(name)).filter(|path| path.exists());
        let mut faults = Vec::new();
        let mut keep = |read: Result<Secret, ConfigFault>| read.map_err(|fault| faults.push(fault)).ok();
        let mut out = Self {
            file: raw.password_file.as_deref().and_then(|path| keep(private(path))),
            // The unit gives an empty one where no file is.
            credential: credential(CREDENTIAL)
                .and_then(|path| keep(read(&path)))
                .filter(|secret| !secret.expose().is_empty()),
            environment: std::env::var("SPOOLTAP_PASSWORD").ok().map(Secret::new),
            usual: None,
            own: BTreeMap::new(),
        };
        let usual = Path::new(USUAL_FILE);
        if out.best().is_none() && std::fs::File::open(usual).is_ok() {
            out.usual = keep(private(usual));
        }
        for replica in &raw.replica {
            let named = replica.name.as_ref().map(|name| format!("{CREDENTIAL}-{name}"));
            let own = match (&replica.password_file, &replica.credential) {
                (Some(path), _) => keep(private(path)),
                (None, Some(name)) => keep(match credential(name) {
                    Some(path) => read(&path),
                    None => Err(ConfigFault {
                        key: format!("replica {}: credential", replica.url),
                        fault: format!("there is no credential {name}"),
                        cure: format!("LoadCredential={name}:/etc/spooltap/{name} in the unit"),
                    }),
                }),
                (None, None) => named.and_then(|name| credential(&name)).and_then(|path| keep(read(&path))),
            };
            out.own.extend(own.map(|secret| (replica.url.clone(), secret)));
        }
        if faults.is_empty() { Ok(out) } else { Err(ConfigFaults(faults)) }
    }

    /// The one of this replica alone.
    pub(super) fn of(&self, url: &str) -> Option<&Secret> {
        self.own.get(url)
    }

    /// The one for all others.
    pub(super) fn best(&self) -> Option<&Secret> {
        self.file.as_ref().or(self.credential.as_ref()).or(self.environment.as_ref()).or(self.usual.as_ref())
    }
}

fn read(path: &Path) -> Result<Secret, ConfigFault> {
    let text = std::fs::read_to_string(path).map(Zeroizing::new).map_err(|error| ConfigFault {
        key: "password_file".into(),
        fault: format!("{}: {error}", path.display()),
        cure: "name a readable file that holds only the password".into(),
    })?;
    Ok(Secret::new(text.trim_end_matches(['\r', '\n'])))
}

/// A credential's mode is systemd's affair; a file of one's own is not.
fn private(path: &Path) -> Result<Secret, ConfigFault> {
    if let Ok(meta) = std::fs::metadata(path)
        && meta.mode() & 0o077 != 0
    {
        return Err(ConfigFault {
            key: "password_file".into(),
            fault: format!("{}: others than its owner may read it (mode {:o})", path.display(), meta.mode() & 0o777),
            cure: "chmod 600".into(),
        });
    }
    read(path)
}
