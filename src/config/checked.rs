//! The configuration we run on. `Config::check` gives the whole or all faults at once, each with its key and a cure.

use super::{Raw, Routes};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use zeroize::Zeroizing;

/// Where our state is, unless somebody says otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/spooltap";

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

/// When to compress what goes to a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compress {
    /// Not on loopback.
    Auto,
    On,
    Off,
}

/// Whether the password may be sent as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClearText {
    /// Where nobody can listen: on loopback.
    #[default]
    Auto,
    Always,
    Never,
}

/// When a connection is put under TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// Off loopback, always; on loopback never.
    #[default]
    Auto,
    Require,
    Never,
}

/// Whom we believe under TLS, and who we say we are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    pub mode: TlsMode,
    /// CAs instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// SHA-256 of the one certificate that is believed; neither its name nor its issuer counts then.
    pub pin_sha256: Option<[u8; 32]>,
    /// Our own, with its key.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// The name in the server's certificate, if it is not the host's.
    pub server_name: Option<String>,
}

/// How we may log in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    pub clear_text: ClearText,
    /// SASL mechanisms that may be used; empty: all.
    pub mechanisms: Vec<String>,
    pub tls: Tls,
}

/// One replica with everything needed to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaConfig {
    /// URL without password; its scheme says what kind of replica it is.
    pub url: String,
    pub password: Option<Secret>,
    pub realm: Option<String>,
    pub access: Access,
    pub compress: Compress,
    /// Longest wait for an answer.
    pub timeout: Duration,
    pub partitions: BTreeMap<String, String>,
}

/// The configuration we run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub imapd_conf: PathBuf,
    /// The sync channel that is ours; `None` is the default one.
    pub channel: Option<String>,
    pub state: PathBuf,
    pub replicas: Vec<ReplicaConfig>,
    pub routes: Routes,
    pub lanes: usize,
    pub quiet: Duration,
    pub most: Duration,
    /// `auto` or the name of a source of capture.
    pub capture: String,
    pub poll_every: Duration,
    pub scan_every: Duration,
    /// Everything is compared so often, whatever was noticed.
    pub rescan_every: Option<Duration>,
    pub shutdown_timeout: Duration,
    pub allow_removals: bool,
    pub allow_loss: bool,
    /// On loopback.
    pub metrics_listen: Option<SocketAddr>,
    pub metrics_file: Option<PathBuf>,
}

/// One thing that is wrong, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigFault {
    pub key: String,
    pub fault: String,
    pub cure: String,
}

/// Everything that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("configuration: {}", .0.iter().map(|fault| format!("{}: {} ({})", fault.key, fault.fault, fault.cure)).collect::<Vec<_>>().join("; "))]
pub struct ConfigFaults(pub Vec<ConfigFault>);

/// Passwords that do not stand in a configuration file.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// From `password_file`.
    pub file: Option<Secret>,
    /// systemd's `$CREDENTIALS_DIRECTORY/spooltap-password`.
    pub credential: Option<Secret>,
    /// `SPOOLTAP_PASSWORD`.
    pub environment: Option<Secret>,
}

impl Credentials {
    /// Reads them from where they may be.
    pub fn gather(password_file: Option<&Path>) -> Result<Self, ConfigFaults> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).map(|text| Secret::new(text.trim_end_matches(['\r', '\n']))).map_err(
                |error| {
                    ConfigFaults(vec![ConfigFault {
                        key: "password_file".into(),
                        fault: format!("{}: {error}", path.display()),
                        cure: "name a readable file that holds only the password".into(),
                    }])
                },
            )
        };
        // A credential's mode is systemd's affair; a file of one's own is not.
        if let Some(path) = password_file
            && let Ok(meta) = std::fs::metadata(path)
            && meta.mode() & 0o077 != 0
        {
            return Err(ConfigFaults(vec![ConfigFault {
                key: "password_file".into(),
                fault: format!(
                    "{}: others than its owner may read it (mode {:o})",
                    path.display(),
                    meta.mode() & 0o777
                ),
                cure: "chmod 600".into(),
            }]));
        }
        let credential = std::env::var_os("CREDENTIALS_DIRECTORY")
            .map(|dir| Path::new(&dir).join("spooltap-password"))
            .filter(|path| path.exists());
        Ok(Self {
            file: password_file.map(read).transpose()?,
            credential: credential.as_deref().map(read).transpose()?,
            environment: std::env::var("SPOOLTAP_PASSWORD").ok().map(Secret::new),
        })
    }

    fn best(&self) -> Option<&Secret> {
        self.file.as_ref().or(self.credential.as_ref()).or(self.environment.as_ref())
    }
}

impl Config {
    /// Checks everything. `imapd` looks an option up in imapd.conf (service and channel overrides applied).
    pub fn check(
        raw: &Raw,
        credentials: &Credentials,
        imapd: &dyn Fn(&str) -> Option<String>,
        need_replica: bool,
    ) -> Result<Self, ConfigFaults> {
        let mut faults = Vec::new();
        let mut fault = |key: &str, fault: String, cure: &str| {
            faults.push(ConfigFault { key: key.into(), fault, cure: cure.into() });
        };
        let compress = match raw.compress.as_deref() {
            None => match imapd("sync_compress").as_deref().map(switch) {
                Some(Some(true)) => Compress::On,
                _ => Compress::Auto,
            },
            Some("auto") => Compress::Auto,
            Some("on") => Compress::On,
            Some("off") => Compress::Off,
            Some(other) => {
                fault("compress", format!("unknown value {other}"), "use auto, on or off");
                Compress::Auto
            }
        };
        let timeout = raw
            .replica_timeout_seconds
            .or_else(|| imapd("sync_timeout").and_then(|text| seconds(&text)))
            .unwrap_or(1800)
            .max(3);
        let lanes = raw.lanes.unwrap_or(4);
        if !(1..=64).contains(&lanes) {
            fault("lanes", format!("{lanes} is out of range"), "use 1 to 64");
        }
        let (quiet, most) = (raw.quiet_ms.unwrap_or(2), raw.most_ms.unwrap_or(20));
        if most < quiet {
            fault("most_ms", format!("{most} is below quiet_ms {quiet}"), "make it at least quiet_ms");
        }
        let poll_ms = raw.poll_ms.unwrap_or(1000);
        if poll_ms < 10 {
            fault("poll_ms", format!("{poll_ms} is too often"), "use at least 10");
        }
        let scan_seconds = raw.scan_seconds.unwrap_or(60);
        if scan_seconds == 0 {
            fault("scan_seconds", "0 is too often".into(), "use at least 1");
        }
        let clear_text = match raw.cleartext.as_deref() {
            None | Some("auto") => ClearText::Auto,
            Some("always") => ClearText::Always,
            Some("never") => ClearText::Never,
            Some(other) => {
                fault("cleartext", format!("unknown value {other}"), "use auto, always or never");
                ClearText::Auto
            }
        };
        let mode = match raw.tls.mode.as_deref() {
            None | Some("auto") => TlsMode::Auto,
            Some("require") => TlsMode::Require,
            Some("never") => TlsMode::Never,
            Some(other) => {
                fault("tls.mode", format!("unknown value {other}"), "use auto, require or never");
                TlsMode::Auto
            }
        };
        let pin_sha256 = raw.tls.pin_sha256.as_deref().and_then(|text| {
            let pin = fingerprint(text);
            if pin.is_none() {
                fault("tls.pin_sha256", "is no SHA-256".into(), "write what `openssl x509 -fingerprint -sha256` says");
            }
            pin
        });
        if raw.tls.certificate.is_some() != raw.tls.key.is_some() {
            fault("tls.certificate", "needs a key, and a key a certificate".into(), "name both");
        }
        let tls = Tls {
            mode,
            ca_file: raw.tls.ca_file.clone(),
            pin_sha256,
            certificate: raw.tls.certificate.clone(),
            key: raw.tls.key.clone(),
            server_name: raw.tls.server_name.clone(),
        };
        let has_certificate = tls.certificate.is_some();
        let metrics_listen = raw.metrics_listen.as_deref().and_then(|text| match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Some(address),
            Ok(_) => {
                let cure = "use 127.0.0.1:PORT or [::1]:PORT, with a proxy in front of it, or metrics_file";
                fault("metrics_listen", format!("{text} can be reached from outside"), cure);
                None
            }
            Err(_) => {
                fault("metrics_listen", format!("{text} is no address"), "write 127.0.0.1:PORT");
                None
            }
        });
        let mut urls = raw.replica.clone();
        let mut realm = raw.realm.clone();
        if urls.is_empty()
            && let Some(host) = imapd("sync_host").filter(|host| !host.is_empty())
        {
            let user = imapd("sync_authname").unwrap_or_default();
            let port = imapd("sync_port").unwrap_or_else(|| "2005".into());
            // What sync_client does by sync_try_imap: the port says which service is meant.
            let (scheme, port) = match port.as_str() {
                "csync" => ("csync", "2005".to_owned()),
                "imap" | "143" => ("imap", "143".to_owned()),
                "imaps" | "993" => ("imaps", "993".to_owned()),
                _ => ("csync", port),
            };
            if user.is_empty() && !host.starts_with('/') {
                fault("sync_authname", "is not set".into(), "set it to an admin of the replica");
            }
            if port.parse::<u16>().is_err() {
                fault("sync_port", format!("{port} is no port number"), "use a number, csync, imap or imaps");
            }
            urls.push(if host.starts_with('/') {
                format!("csync+unix://{host}")
            } else if host.contains(':') && !host.starts_with('[') && host.matches(':').count() > 1 {
                format!("{scheme}://{}@[{host}]:{port}", percent(&user))
            } else {
                format!("{scheme}://{}@{host}:{port}", percent(&user))
            });
            realm = realm.or_else(|| imapd("sync_realm"));
        }
        if urls.is_empty() && need_replica {
            fault(
                "replica",
                "no replica is named".into(),
                "set sync_host in imapd.conf, or give --replica csync://USER@HOST:PORT or file:///DIR",
            );
        }
        let password = credentials.best().cloned().or_else(|| imapd("sync_password").map(Secret::new));
        let mut seen = std::collections::BTreeSet::new();
        for url in &urls {
            if !seen.insert(url) {
                fault("replica", format!("{url} is named twice"), "name each replica once");
            }
            match url.split_once("://") {
                Some((scheme @ ("csync" | "csyncs" | "imap" | "imaps"), rest)) => {
                    let (user, host) = rest.rsplit_once('@').unwrap_or(("", rest));
                    if user.contains(':') {
                        fault(
                            "replica",
                            "a password stands in the URL".into(),
                            "use password_file or SPOOLTAP_PASSWORD",
                        );
                    } else if user.is_empty() || host.is_empty() {
                        fault(
                            "replica",
                            format!("{url} names no user or host"),
                            &format!("write {scheme}://USER@HOST:PORT"),
                        );
                    } else if password.is_none() && !has_certificate {
                        fault(
                            "password",
                            format!("no password for {url}"),
                            "use password_file, the credential spooltap-password, SPOOLTAP_PASSWORD or sync_password",
                        );
                    }
                }
                Some(("csync+unix" | "file", rest)) if rest.starts_with('/') => {}
                Some((scheme @ ("csync+unix" | "file"), _)) => {
                    fault("replica", format!("{url}: the path must be absolute"), &format!("write {scheme}:///PATH"));
                }
                _ => fault(
                    "replica",
                    format!("{url}: unknown kind of replica"),
                    "use csync://, csyncs://, csync+unix://, imap://, imaps:// or file://",
                ),
            }
        }
        let routes = Routes::check(&raw.route, &urls, &mut faults);
        if !faults.is_empty() {
            return Err(ConfigFaults(faults));
        }
        let replicas = urls
            .into_iter()
            .map(|url| ReplicaConfig {
                password: password.clone().filter(|_| logs_in(&url)),
                url,
                realm: realm.clone(),
                access: Access { clear_text, mechanisms: raw.mechanisms.clone(), tls: tls.clone() },
                compress,
                timeout: Duration::from_secs(timeout),
                partitions: raw.partition.clone(),
            })
            .collect();
        Ok(Self {
            imapd_conf: raw.imapd_conf.clone().unwrap_or_else(|| "/etc/imapd.conf".into()),
            channel: raw.channel.clone().filter(|channel| !channel.is_empty()),
            state: raw.state.clone().unwrap_or_else(|| DEFAULT_STATE.into()),
            replicas,
            routes,
            lanes,
            quiet: Duration::from_millis(quiet),
            most: Duration::from_millis(most),
            // Which names there are is known where they are opened.
            capture: raw.capture.clone().unwrap_or_else(|| "auto".into()),
            poll_every: Duration::from_millis(poll_ms),
            scan_every: Duration::from_secs(scan_seconds),
            rescan_every: Some(Duration::from_secs(raw.rescan_seconds.unwrap_or(21_600)))
                .filter(|every| !every.is_zero()),
            shutdown_timeout: Duration::from_secs(raw.shutdown_timeout_seconds.unwrap_or(20)),
            allow_removals: raw.allow_removals.unwrap_or(false),
            allow_loss: raw.allow_loss.unwrap_or(false),
            metrics_listen,
            metrics_file: raw.metrics_file.clone(),
        })
    }
}

/// A replica that asks who we are.
fn logs_in(url: &str) -> bool {
    ["csync://", "csyncs://", "imap://", "imaps://"].iter().any(|scheme| url.starts_with(scheme))
}

/// 64 hex digits, with or without colons.
fn fingerprint(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> =
        text.chars().filter(|c| *c != ':').map(|c| c.to_digit(16).map(|digit| digit as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks(2).map(|pair| pair.iter().fold(0, |sum, digit| sum << 4 | digit)).collect();
    if digits.len() == 64 { bytes.try_into().ok() } else { None }
}

/// Cyrus's switch words.
fn switch(text: impl AsRef<str>) -> Option<bool> {
    match text.as_ref() {
        "1" | "yes" | "t" | "true" | "on" => Some(true),
        "0" | "no" | "f" | "false" | "off" => Some(false),
        _ => None,
    }
}

/// A Cyrus duration: plain seconds, or with a unit from 3.2 on (`30s`, `5m`, `1h`).
fn seconds(text: &str) -> Option<u64> {
    let (number, unit) = match text.trim().char_indices().find(|(_, c)| !c.is_ascii_digit()) {
        Some((at, _)) => text.trim().split_at(at),
        None => (text.trim(), "s"),
    };
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// User names in URLs: only `@`, `:`, `/` and `%` need to be written as `%XX`.
fn percent(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, c| {
        match c {
            '@' | ':' | '/' | '%' => out.push_str(&format!("%{:02X}", c as u32)),
            _ => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(raw: &str, imapd: &[(&str, &str)]) -> Result<Config, Vec<String>> {
        let raw: Raw = toml::from_str(raw).expect("parses");
        let look = |key: &str| imapd.iter().find(|(name, _)| *name == key).map(|(_, value)| value.to_string());
        Config::check(&raw, &Credentials::default(), &look, true)
            .map_err(|faults| faults.0.into_iter().map(|fault| fault.key).collect())
    }

    #[test]
    fn imapd_conf_of_a_master_needs_nothing_else() {
        let conf =
            [("sync_host", "replica"), ("sync_authname", "repl"), ("sync_password", "pw"), ("sync_compress", "1")];
        let config = check("", &conf).expect("is complete");
        assert_eq!(config.replicas[0].url, "csync://repl@replica:2005");
        assert_eq!(config.replicas[0].compress, Compress::On);
        assert_eq!(config.replicas[0].password, Some(Secret::new("pw")));
    }

    #[test]
    fn all_faults_come_at_once() {
        let raw =
            "lanes = 0\ncompress = \"yes\"\nquiet_ms = 30\nreplica = [\"csync://u@h:1\", \"ftp://x\", \"file://rel\"]";
        let mut keys = check(raw, &[]).expect_err("is faulty");
        keys.sort();
        assert_eq!(keys, ["compress", "lanes", "most_ms", "password", "replica", "replica"]);
    }

    #[test]
    fn a_password_in_a_url_is_refused_and_never_printed() {
        assert_eq!(check("replica = [\"csync://u:pw@h:1\"]", &[]).expect_err("refused"), ["replica"]);
        assert_eq!(format!("{:?}", Secret::new("pw")), "(secret)");
    }

    #[test]
    fn durations_of_both_eras() {
        assert_eq!([seconds("1800"), seconds("30m"), seconds("5x")], [Some(1800), Some(1800), None]);
    }
}
