//! The configuration as typed. Unknown keys are refused with their place in the file.

use serde::Deserialize;
use std::collections::BTreeMap;
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
    /// URLs: `csync://USER@HOST:PORT` (or `csyncs`, `imap`, `imaps`), `csync+unix:///PATH`, `file:///DIR`.
    #[serde(default)]
    pub replica: Vec<String>,
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
    /// Shortest time between two looks of the source `poll`. Default 1000.
    pub poll_ms: Option<u64>,
    /// How often the source `scan` compares everything. Default 60.
    pub scan_seconds: Option<u64>,
    /// How often everything is compared, whatever was noticed; 0 for never. Default 21600.
    pub rescan_seconds: Option<u64>,
    /// Time for jobs in flight at stop. Default 20.
    pub shutdown_timeout_seconds: Option<u64>,
    /// Read timeout of a replica's answers. Default: `sync_timeout` or 1800.
    pub replica_timeout_seconds: Option<u64>,
    /// Lift the fuse on mass removals.
    pub allow_removals: Option<bool>,
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
            poll_ms,
            scan_seconds,
            rescan_seconds,
            shutdown_timeout_seconds,
            replica_timeout_seconds,
            allow_removals,
            allow_loss,
            metrics_listen,
            metrics_file
        );
        if !over.replica.is_empty() {
            self.replica = over.replica;
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
    fn the_command_line_wins() {
        let file: Raw = toml::from_str("lanes = 2\nreplica = [\"file:///a\"]\n").expect("parses");
        let over = Raw { lanes: Some(3), ..Raw::default() };
        let both = file.overlay(over);
        assert_eq!((both.lanes, both.replica.len()), (Some(3), 1));
    }
}
