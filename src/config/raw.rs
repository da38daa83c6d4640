//! The configuration as typed. Unknown keys are refused with their place in the file.

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// `spooltap.toml`; every key may be left out. The command line overrides single values.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    /// Cyrus's configuration. Default `/etc/imapd.conf`.
    pub imapd_conf: Option<PathBuf>,
    /// Service name whose overrides in imapd.conf count (`SERVICE_key`).
    pub service: Option<String>,
    /// sync channel whose `CHANNEL_sync_*` options name the replica.
    pub channel: Option<String>,
    /// Directory of our own state. Default `/var/lib/spooltap`.
    pub state: Option<PathBuf>,
    /// URLs: `csync://USER@HOST:PORT` (or `csyncs`, `imap`, `imaps`), `csync+unix:///PATH`, `file:///DIR`,
    /// `cyrus:///DIR`; or tables with what a replica has of its own.
    #[serde(default)]
    pub replica: Vec<RawReplica>,
    /// File that holds the password for csync replicas.
    pub password_file: Option<PathBuf>,
    /// SASL realm. Default: `sync_realm`.
    pub realm: Option<String>,
    /// Whether the password may be sent as it is: `auto` (only on loopback), `always`, `never`. Default `auto`.
    pub cleartext: Option<String>,
    /// SASL mechanisms that may be used, of EXTERNAL, PLAIN, LOGIN, SCRAM-SHA-256, SCRAM-SHA-1, DIGEST-MD5, CRAM-MD5.
    #[serde(default)]
    pub mechanisms: Vec<String>,
    /// `auto`, `on`, `off`. Default: `sync_compress` or `auto`.
    pub compress: Option<String>,
    /// Sessions per replica. Default 4.
    pub lanes: Option<usize>,
    /// A key is read this long after the last event for it. Default 2.
    pub quiet_ms: Option<u64>,
    /// … and at the latest this long after the first. Default 20.
    pub most_ms: Option<u64>,
    /// How change is noticed: `auto` or the name of a source. Default `auto`.
    pub capture: Option<String>,
    /// A better source is tried again after so long, then after twice as long, and so on. Default 30.
    pub capture_retry_seconds: Option<u64>,
    /// Watch Cyrus's rolling log (of `channel`) beside capture, without consuming it; needs `sync_log: yes`.
    pub cross_check: Option<bool>,
    /// Shortest time between two looks of the source `poll`. Default 1000.
    pub poll_ms: Option<u64>,
    /// How often the source `scan` compares everything. Default 60.
    pub scan_seconds: Option<u64>,
    /// How often everything is compared, whatever was noticed; 0 for never. Default 21600.
    pub rescan_seconds: Option<u64>,
    /// Mailboxes that a scan of the daemon looks at in a second, at most; 0 for no limit. Default 0.
    pub scan_per_second: Option<u64>,
    /// Scans of the daemon take turns, and the scrub waits, while somebody waits for a disk in so many percent of the time
    /// (`/proc/pressure/io`); 0 for never. Default 50.
    pub busy_io_percent: Option<u32>,
    /// Message files are read again and compared with their GUIDs, so many MiB in a second; 0 for never. Default 0.
    pub scrub_mib_per_second: Option<u64>,
    /// From the beginning of one scrub of everything to that of the next. Default 604800.
    pub scrub_every_seconds: Option<u64>,
    /// Time for jobs in flight at stop. Default 20.
    pub shutdown_timeout_seconds: Option<u64>,
    /// Read timeout of a replica's answers. Default: `sync_timeout` or 1800.
    pub replica_timeout_seconds: Option<u64>,
    /// Lift the fuse on mass removals.
    pub allow_removals: Option<bool>,
    /// A mailbox that is gone at the source stays on the replicas for so long. Default 0.
    pub removal_delay_seconds: Option<u64>,
    /// Leave out what an older replica cannot hold, instead of refusing the mailbox.
    pub allow_loss: Option<bool>,
    /// Address on loopback where Prometheus finds `/metrics`. Default: none.
    pub metrics_listen: Option<String>,
    /// File for the text-file collector of node_exporter. Default: none.
    pub metrics_file: Option<PathBuf>,
    /// Privacy of csync connections.
    #[serde(default)]
    pub tls: RawTls,
    /// Which users go to which replica. Default: all to all.
    #[serde(default)]
    pub route: Vec<RawRoute>,
    /// Partition of the source → partition of the replica, where the names differ.
    #[serde(default)]
    pub partition: BTreeMap<String, String>,
}

/// One of `replica = [ … ]`: a URL, or a table `[[replica]]`. What it does not say is as for all.
#[derive(Clone, Debug, Default)]
pub struct RawReplica(pub RawReplicaTable);

/// `[[replica]]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawReplicaTable {
    pub url: String,
    /// Short name for rules, orders and the credential `spooltap-password-NAME`.
    pub name: Option<String>,
    /// File that holds its password.
    pub password_file: Option<PathBuf>,
    /// systemd credential that holds its password.
    pub credential: Option<String>,
    pub realm: Option<String>,
    pub cleartext: Option<String>,
    #[serde(default)]
    pub mechanisms: Vec<String>,
    pub compress: Option<String>,
    pub timeout_seconds: Option<u64>,
    #[serde(default)]
    pub tls: RawTls,
    #[serde(default)]
    pub partition: BTreeMap<String, String>,
}

impl From<&str> for RawReplica {
    fn from(url: &str) -> Self {
        Self(RawReplicaTable { url: url.to_owned(), ..RawReplicaTable::default() })
    }
}

impl std::ops::Deref for RawReplica {
    type Target = RawReplicaTable;

    fn deref(&self) -> &RawReplicaTable {
        &self.0
    }
}

/// By hand, because an untagged enum would not name the key that is wrong.
impl<'de> Deserialize<'de> for RawReplica {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = RawReplica;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a URL or a table with a url")
            }

            fn visit_str<E>(self, url: &str) -> Result<RawReplica, E> {
                Ok(url.into())
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawReplica, A::Error> {
                RawReplicaTable::deserialize(MapAccessDeserializer::new(map)).map(RawReplica)
            }
        }
        from.deserialize_any(Either)
    }
}

/// What is said for all replicas, or for one.
pub(super) struct RawTerms<'a> {
    pub cleartext: Option<&'a str>,
    pub mechanisms: &'a [String],
    pub compress: Option<&'a str>,
    pub tls: &'a RawTls,
}

macro_rules! terms {
    ($kind:ty) => {
        impl $kind {
            pub(super) fn terms(&self) -> RawTerms<'_> {
                RawTerms {
                    cleartext: self.cleartext.as_deref(),
                    mechanisms: &self.mechanisms,
                    compress: self.compress.as_deref(),
                    tls: &self.tls,
                }
            }
        }
    };
}

terms!(Raw);
terms!(RawReplicaTable);

/// `[tls]`; every key may be left out.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawTls {
    /// `auto` (off loopback always, on loopback never), `require`, `never`. Default `auto`.
    pub mode: Option<String>,
    /// PEM file with the CAs to be believed. Default: the system's.
    pub ca_file: Option<PathBuf>,
    /// SHA-256 of the only certificate to be believed, in hex.
    pub pin_sha256: Option<String>,
    /// Our certificate and its key, PEM, for SASL EXTERNAL.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// Name in the server's certificate. Default: the host of the URL.
    pub server_name: Option<String>,
}

/// One rule; the first that fits a user decides.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawRoute {
    /// Names of users, `*` for anything (`*@example.org`). Default: everybody.
    #[serde(default)]
    pub users: Vec<String>,
    /// To each of these replicas.
    #[serde(default)]
    pub to: Vec<String>,
    /// Or to `copies` of these, chosen by the user's name.
    #[serde(default)]
    pub spread: Vec<String>,
    pub copies: Option<usize>,
}

impl Raw {
    /// Reads a TOML file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        toml::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Values of `over` (the command line) win.
    pub fn overlay(mut self, over: Self) -> Self {
        macro_rules! take {
            ($($field:ident),*) => { $( if over.$field.is_some() { self.$field = over.$field; } )* };
        }
        take!(
            imapd_conf,
            service,
            channel,
            state,
            password_file,
            realm,
            cleartext,
            compress,
            lanes,
            quiet_ms,
            most_ms,
            capture,
            capture_retry_seconds,
            poll_ms,
            scan_seconds,
            rescan_seconds,
            scan_per_second,
            busy_io_percent,
            scrub_mib_per_second,
            scrub_every_seconds,
            shutdown_timeout_seconds,
            replica_timeout_seconds,
            allow_removals,
            removal_delay_seconds,
            allow_loss,
            metrics_listen,
            metrics_file
        );
        if !over.replica.is_empty() {
            // By name or URL one of the file is chosen, with all that it says there.
            let of_file = |given: RawReplica| {
                let is_it = |one: &&RawReplica| one.url == given.url || one.name.as_deref() == Some(&given.url);
                self.replica.iter().find(is_it).cloned().unwrap_or(given)
            };
            self.replica = over.replica.into_iter().map(of_file).collect();
        }
        self.partition.extend(over.partition);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let error = toml::from_str::<Raw>("lanes = 2\nlane = 3\n").expect_err("refused").to_string();
        assert!(error.contains("lane"), "{error}");
    }

    #[test]
    fn a_replica_is_a_url_or_a_table() {
        let raw: Raw =
            toml::from_str("replica = [\"file:///a\", { url = \"file:///b\", name = \"b\" }]").expect("parses");
        assert_eq!(raw.replica.iter().map(|one| one.url.as_str()).collect::<Vec<_>>(), ["file:///a", "file:///b"]);
        let raw: Raw =
            toml::from_str("[[replica]]\nurl = \"file:///a\"\n[replica.tls]\nmode = \"never\"\n").expect("parses");
        assert_eq!(raw.replica[0].tls.mode.as_deref(), Some("never"));
        for (wrong, named) in
            [("[[replica]]\nurl = \"x\"\npasword = 1\n", "pasword"), ("replica = [1]", "a URL or a table")]
        {
            let error = toml::from_str::<Raw>(wrong).expect_err("refused").to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn the_command_line_wins() {
        let file: Raw = toml::from_str("lanes = 2\nreplica = [\"file:///a\"]\n").expect("parses");
        let over = Raw { lanes: Some(3), ..Raw::default() };
        let both = file.overlay(over);
        assert_eq!((both.lanes, both.replica.len()), (Some(3), 1));
    }
}
