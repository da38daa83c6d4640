//! The configuration we run on. `Config::check` gives the whole or all faults at once, each with its key and a cure.

use super::Routes;
use super::raw::{Raw, RawReplica, RawTerms};
use super::secrets::{Credentials, Secret};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Where our state is, unless somebody says otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/spooltap";

/// When to compress what goes to a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compress {
    /// For peers that are far: not on loopback, and not where connecting takes less than 2 ms.
    Auto,
    On,
    Off,
}

/// A peer that is reached and answers within this time is in the same building: its network takes more than we can
/// compress (gigabits against some hundred megabits of one core), so compression would only cost time.
const NEAR: Duration = Duration::from_millis(2);

impl Compress {
    /// Whether it is worth it for this peer.
    pub fn is_for(self, loopback: bool, distance: Duration) -> bool {
        match self {
            Self::On => true,
            Self::Off => false,
            Self::Auto => !loopback && distance >= NEAR,
        }
    }
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
    /// What it is called by in rules and orders, beside its URL.
    pub name: Option<String>,
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
    /// A better source is tried again after so long, and then less often.
    pub capture_retry: Duration,
    /// Cyrus's log is watched beside capture.
    pub cross_check: bool,
    pub poll_every: Duration,
    pub scan_every: Duration,
    /// Everything is compared so often, whatever was noticed.
    pub rescan_every: Option<Duration>,
    /// Mailboxes that a scan looks at in a second at most; 0: no limit.
    pub scan_per_second: u64,
    /// Busy is a machine where a disk is waited for in so many percent of the time; 0: none ever is.
    pub busy_io_percent: u32,
    /// Bytes of message files in a second; 0: no scrub.
    pub scrub_rate: u64,
    pub scrub_every: Duration,
    pub shutdown_timeout: Duration,
    pub allow_removals: bool,
    pub removal_delay: Duration,
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
        let compress = match imapd("sync_compress").as_deref().map(switch) {
            Some(Some(true)) => Compress::On,
            _ => Compress::Auto,
        };
        let common = Terms::of(&raw.terms(), "", &Terms::first(compress), &mut fault);
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
        let capture_retry = raw.capture_retry_seconds.unwrap_or(30);
        if capture_retry == 0 {
            fault("capture_retry_seconds", "0 is too often".into(), "use at least 1");
        }
        if raw.cross_check == Some(true) && raw.capture.as_deref() == Some("synclog") {
            let cure = "leave it out: whoever consumes the log has nothing to compare it with";
            fault("cross_check", "capture is synclog".into(), cure);
        }
        let scan_seconds = raw.scan_seconds.unwrap_or(60);
        if scan_seconds == 0 {
            fault("scan_seconds", "0 is too often".into(), "use at least 1");
        }
        let busy_io_percent = raw.busy_io_percent.unwrap_or(50);
        if busy_io_percent > 100 {
            fault("busy_io_percent", format!("{busy_io_percent} is more than all"), "use 1 to 100, or 0 for never");
        }
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
        let mut given = raw.replica.clone();
        let mut realm = raw.realm.clone();
        if given.is_empty()
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
            let url = if host.starts_with('/') {
                format!("csync+unix://{host}")
            } else if host.contains(':') && !host.starts_with('[') && host.matches(':').count() > 1 {
                format!("{scheme}://{}@[{host}]:{port}", percent(&user))
            } else {
                format!("{scheme}://{}@{host}:{port}", percent(&user))
            };
            given.push(RawReplica::from(url.as_str()));
            realm = realm.or_else(|| imapd("sync_realm"));
        }
        if given.is_empty() && need_replica {
            fault(
                "replica",
                "no replica is named".into(),
                "set sync_host in imapd.conf, or give --replica csync://USER@HOST:PORT, file:///DIR or cyrus:///DIR",
            );
        }
        let fallback = credentials.best().cloned().or_else(|| imapd("sync_password").map(Secret::new));
        let mut names = BTreeMap::new();
        let mut replicas = Vec::new();
        for one in &given {
            let url = &one.url;
            let terms = Terms::of(&one.terms(), &format!("replica {url}: "), &common, &mut fault);
            let password = credentials.of(url).cloned().or_else(|| fallback.clone());
            for name in one.name.iter().chain([url]) {
                if names.insert(name.clone(), url.clone()).is_some() {
                    fault("replica", format!("{name} is named twice"), "name each replica once");
                }
            }
            check_url(url, password.is_some() || terms.access.tls.certificate.is_some(), &mut fault);
            replicas.push(ReplicaConfig {
                password: password.filter(|_| logs_in(url)),
                url: url.clone(),
                name: one.name.clone(),
                realm: one.realm.clone().or_else(|| realm.clone()),
                access: terms.access,
                compress: terms.compress,
                timeout: Duration::from_secs(one.timeout_seconds.unwrap_or(timeout).max(3)),
                partitions: if one.partition.is_empty() { raw.partition.clone() } else { one.partition.clone() },
            });
        }
        let routes = Routes::check(&raw.route, &names, &mut faults);
        if !faults.is_empty() {
            return Err(ConfigFaults(faults));
        }
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
            capture_retry: Duration::from_secs(capture_retry),
            cross_check: raw.cross_check.unwrap_or(false),
            poll_every: Duration::from_millis(poll_ms),
            scan_every: Duration::from_secs(scan_seconds),
            rescan_every: Some(Duration::from_secs(raw.rescan_seconds.unwrap_or(21_600)))
                .filter(|every| !every.is_zero()),
            scan_per_second: raw.scan_per_second.unwrap_or(0),
            busy_io_percent,
            scrub_rate: raw.scrub_mib_per_second.unwrap_or(0).saturating_mul(1 << 20),
            scrub_every: Duration::from_secs(raw.scrub_every_seconds.unwrap_or(604_800)),
            shutdown_timeout: Duration::from_secs(raw.shutdown_timeout_seconds.unwrap_or(20)),
            allow_removals: raw.allow_removals.unwrap_or(false),
            removal_delay: Duration::from_secs(raw.removal_delay_seconds.unwrap_or(0)),
            allow_loss: raw.allow_loss.unwrap_or(false),
            metrics_listen,
            metrics_file: raw.metrics_file.clone(),
        })
    }
}

/// What may differ from replica to replica.
#[derive(Clone)]
struct Terms {
    access: Access,
    compress: Compress,
}

type Fault<'a> = &'a mut dyn FnMut(&str, String, &str);

impl Terms {
    fn first(compress: Compress) -> Self {
        Self { access: Access::default(), compress }
    }

    /// What is typed, and what is not from `base`. `place` stands before the keys in faults.
    fn of(raw: &RawTerms<'_>, place: &str, base: &Self, mut fault: impl FnMut(&str, String, &str)) -> Self {
        let fault: Fault<'_> = &mut |key, what, cure| fault(&format!("{place}{key}"), what, cure);
        let compress = word(
            raw.compress,
            "compress",
            &[("auto", Compress::Auto), ("on", Compress::On), ("off", Compress::Off)],
            base.compress,
            fault,
        );
        let clear_text = word(
            raw.cleartext,
            "cleartext",
            &[("auto", ClearText::Auto), ("always", ClearText::Always), ("never", ClearText::Never)],
            base.access.clear_text,
            fault,
        );
        let mode = word(
            raw.tls.mode.as_deref(),
            "tls.mode",
            &[("auto", TlsMode::Auto), ("require", TlsMode::Require), ("never", TlsMode::Never)],
            base.access.tls.mode,
            fault,
        );
        let under = &base.access.tls;
        let pin_sha256 = match raw.tls.pin_sha256.as_deref() {
            None => under.pin_sha256,
            Some(text) => {
                let pin = fingerprint(text);
                if pin.is_none() {
                    let cure = "write what `openssl x509 -fingerprint -sha256` says";
                    fault("tls.pin_sha256", "is no SHA-256".into(), cure);
                }
                pin
            }
        };
        if raw.tls.certificate.is_some() != raw.tls.key.is_some() {
            fault("tls.certificate", "needs a key, and a key a certificate".into(), "name both");
        }
        let tls = Tls {
            mode,
            // Whom this one is to be believed by is said in one way: a CA of its own takes a common pin away.
            pin_sha256: pin_sha256.filter(|_| raw.tls.pin_sha256.is_some() || raw.tls.ca_file.is_none()),
            ca_file: raw.tls.ca_file.clone().or_else(|| under.ca_file.clone()),
            certificate: raw.tls.certificate.clone().or_else(|| under.certificate.clone()),
            key: raw.tls.key.clone().or_else(|| under.key.clone()),
            server_name: raw.tls.server_name.clone().or_else(|| under.server_name.clone()),
        };
        let mechanisms =
            if raw.mechanisms.is_empty() { base.access.mechanisms.clone() } else { raw.mechanisms.to_vec() };
        Self { access: Access { clear_text, mechanisms, tls }, compress }
    }
}

/// One of some words.
fn word<T: Copy>(typed: Option<&str>, key: &str, words: &[(&str, T)], default: T, fault: Fault<'_>) -> T {
    let Some(typed) = typed else { return default };
    if let Some((_, value)) = words.iter().find(|(word, _)| *word == typed) {
        return *value;
    }
    let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
    let cure = match known.split_last() {
        Some((last, before)) => format!("use {} or {last}", before.join(", ")),
        None => String::new(),
    };
    fault(key, format!("unknown value {typed}"), &cure);
    default
}

fn check_url(url: &str, can_log_in: bool, mut fault: impl FnMut(&str, String, &str)) {
    match url.split_once("://") {
        Some((scheme, rest)) if logs_in(url) => {
            let (user, host) = rest.rsplit_once('@').unwrap_or(("", rest));
            if user.contains(':') {
                fault("replica", "a password stands in the URL".into(), "use password_file or SPOOLTAP_PASSWORD");
            } else if user.is_empty() || host.is_empty() {
                let cure = format!("write {scheme}://USER@HOST:PORT");
                fault("replica", format!("{url} names no user or host"), &cure);
            } else if !can_log_in {
                fault(
                    "password",
                    format!("no password for {url}"),
                    "put it into /etc/spooltap/password (mode 600); or use password_file, the credential spooltap-password, SPOOLTAP_PASSWORD or sync_password",
                );
            }
        }
        Some(("s3", rest)) if !rest.is_empty() && !rest.starts_with('/') => {}
        Some(("csync+unix" | "file" | "cyrus", rest)) if rest.starts_with('/') => {}
        Some((scheme @ ("csync+unix" | "file" | "cyrus"), _)) => {
            fault("replica", format!("{url}: the path must be absolute"), &format!("write {scheme}:///PATH"));
        }
        _ => fault(
            "replica",
            format!("{url}: unknown kind of replica"),
            "use csync://, csyncs://, csync+unix://, imap://, imaps://, file://, s3:// or cyrus://",
        ),
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

    #[test]
    fn far_peers_are_compressed_for_unless_somebody_says_otherwise() {
        let far = Duration::from_millis(12);
        let near = Duration::from_micros(300);
        let cases = [
            (Compress::Auto, true, far, false),
            (Compress::Auto, false, near, false),
            (Compress::Auto, false, far, true),
            (Compress::On, true, near, true),
            (Compress::Off, false, far, false),
        ];
        for (wish, loopback, distance, expected) in cases {
            assert_eq!(wish.is_for(loopback, distance), expected, "{wish:?} {loopback} {distance:?}");
        }
    }

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
    fn a_replica_has_what_it_says_and_else_what_all_have() {
        let raw = "cleartext = \"never\"\ncompress = \"on\"\n[tls]\nca_file = \"/ca\"\n[[replica]]\nurl = \"csync://a@a\"\n\
                   name = \"a\"\n[[replica]]\nurl = \"imaps://b@b\"\nmechanisms = [\"PLAIN\"]\ncleartext = \"always\"\n\
                   timeout_seconds = 5\n[replica.tls]\nserver_name = \"x\"\n[[route]]\nusers = [\"u\"]\nto = [\"a\"]\n";
        let config = check(raw, &[("sync_password", "pw")]).expect("is complete");
        let [a, b] = &config.replicas[..] else { panic!("two") };
        assert_eq!((a.access.clear_text, b.access.clear_text), (ClearText::Never, ClearText::Always));
        assert_eq!((a.compress, b.compress, b.timeout.as_secs()), (Compress::On, Compress::On, 5));
        assert_eq!((&a.access.tls.ca_file, &b.access.tls.ca_file), (&Some("/ca".into()), &Some("/ca".into())));
        assert_eq!((&a.access.tls.server_name, b.access.tls.server_name.as_deref()), (&None, Some("x")));
        assert!(config.routes.wants(&a.url, b"u") && !config.routes.wants(&b.url, b"u"));
        let twice = "[[replica]]\nurl = \"file:///a\"\nname = \"x\"\n[[replica]]\nurl = \"file:///b\"\nname = \"x\"\n";
        assert_eq!(check(twice, &[]).expect_err("is faulty"), ["replica"]);
        let wrong = "[[replica]]\nurl = \"file:///a\"\n[replica.tls]\nmode = \"no\"\n";
        assert_eq!(check(wrong, &[]).expect_err("is faulty"), ["replica file:///a: tls.mode"]);
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
    fn work_that_can_wait_has_its_limits() {
        let config = check("replica = [\"file:///a\"]", &[]).expect("is complete");
        assert_eq!((config.scan_per_second, config.busy_io_percent, config.scrub_rate), (0, 50, 0));
        let raw =
            "replica = [\"file:///a\"]\nscrub_mib_per_second = 2\nscrub_every_seconds = 60\nscan_per_second = 9\n";
        let config = check(raw, &[]).expect("is complete");
        let found = (config.scan_per_second, config.scrub_rate, config.scrub_every.as_secs());
        assert_eq!(found, (9, 2 << 20, 60));
        let faults = check("replica = [\"file:///a\"]\nbusy_io_percent = 101", &[]).expect_err("is faulty");
        assert_eq!(faults, ["busy_io_percent"]);
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
