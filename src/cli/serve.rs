//! `spooltap serve`: a csync server in front of a store of ours, in the foreground.

use super::{Common, Exit, Failure, Outcome};
use crate::config::{ClearText, Compress, ReplicaConfig};
use crate::cyrus::imapd_conf::ImapdConf;
use crate::serve::{Limits, Listener, Logins, Server, Settings};
use crate::spool::read_conf;
use anyhow::Context;
use clap::Args;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;
use tracing::info;

/// Schemes of what can be served: stores that are ours alone.
const STORES: [&str; 3] = ["cyrus", "file", "s3"];

/// The sockets of systemd or of Cyrus's `master`.
const INHERITED: &str = "inherited";

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// What is served: an archive (file:///DIR, s3://BUCKET/PREFIX) or a store in Cyrus's own format (cyrus:///DIR, or
    /// cyrus:///IMAPD.CONF for one that is set up already); made if it is not there
    #[arg(long, visible_alias = "archive", value_name = "URL")]
    store: String,
    /// Where to listen: ADDRESS:PORT, the path of a UNIX socket, or `inherited`; may be repeated
    #[arg(long, value_name = "WHERE", default_value = "[::]:2005")]
    listen: Vec<String>,
    /// Who may log in: a file with lines USER:PASSWORD that only its owner may read
    #[arg(long, value_name = "FILE")]
    passwords: Option<PathBuf>,
    /// Who of them may replicate [default: admins of the imapd.conf named with -C, else all]
    #[arg(long, value_name = "USER", num_args = 1..)]
    admins: Vec<String>,
    /// Our certificate and those above it, as PEM: offers STARTTLS [default: tls_server_cert of the imapd.conf named with -C]
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its key, as PEM [default: tls_server_key]
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Where a password may come without TLS [default: from loopback if there is a certificate, else from everywhere]
    #[arg(long, value_name = "WHERE", value_parser = ["never", "loopback", "always"])]
    cleartext: Option<String>,
    /// Whom compression is offered: clients that are not on this machine and at least 2 ms away (auto), all, or nobody
    #[arg(long, value_name = "WHOM", value_parser = ["auto", "on", "off"], default_value = "auto")]
    compress: String,
    /// Name in the greeting [default: this machine's]
    #[arg(long, value_name = "NAME")]
    servername: Option<String>,
    /// Most connections at a time
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    max_connections: usize,
    /// Longest silence of a client
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    timeout: u64,
    /// Memory for requests of all connections
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    max_memory: usize,
    /// Longest request, bodies not counted
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    max_request: usize,
    /// Bodies that one connection may have sent and not yet used
    #[arg(long, value_name = "MIB", default_value_t = 65_536)]
    max_staged: u64,
    /// Where large bodies wait until they are used [default: TMPDIR or /tmp]
    #[arg(long, value_name = "DIR")]
    stage: Option<PathBuf>,
}

pub(super) fn serve(common: &Common, args: &ServeArgs) -> Outcome {
    let faulty = |error: anyhow::Error| Failure::new(Exit::Config, error);
    let scheme = args.store.split_once("://").map_or("", |(scheme, _)| scheme);
    if !STORES.contains(&scheme) {
        let text = "is no store that can be served; write file:///DIR, s3://BUCKET/PREFIX or cyrus:///DIR";
        return Err(faulty(anyhow::anyhow!("{} {text}", args.store)));
    }
    // Before anything else is opened: descriptors are handed over by their numbers.
    let inherited = match args.listen.iter().any(|place| place == INHERITED) {
        true => crate::serve::inherited_listeners(),
        false => Vec::new(),
    };
    let signals = crate::daemon::Signals::new()?;
    let mut listeners = inherited;
    for place in args.listen.iter().filter(|place| *place != INHERITED) {
        listeners.push(listen(place).map_err(faulty)?);
    }
    if listeners.is_empty() {
        return Err(faulty(anyhow::anyhow!(
            "no socket was handed over; start it by systemd or Cyrus's master, or name a place"
        )));
    }
    let conf = common.imapd_conf.as_deref().map(read_conf).transpose();
    let conf = conf.map_err(|error| Failure::new(Exit::Config, error))?;
    let logins = match &args.passwords {
        Some(path) => {
            let conf_admins = || conf.as_ref().and_then(|conf| conf.get("admins")).unwrap_or_default();
            let admins = match args.admins.as_slice() {
                [] => conf_admins().split_ascii_whitespace().map(str::to_owned).collect(),
                named => named.to_vec(),
            };
            Logins::read(path, &admins).map_err(|error| Failure::new(Exit::Config, error))?
        }
        None if listeners.iter().all(|listener| matches!(listener, Listener::Unix(_))) => Logins::default(),
        None => return Err(faulty(anyhow::anyhow!("nobody could log in; name a password file with --passwords"))),
    };
    let tls = certificate(args, conf.as_ref());
    let tls = tls.map(|(certificate, key)| crate::serve::server_config(&certificate, &key)).transpose();
    let tls = tls.map_err(|error| Failure::new(Exit::Config, error))?;
    let allowed = conf.as_ref().is_some_and(|conf| conf.switch("allowplaintext", false));
    let cleartext = match (args.cleartext.as_deref(), &tls) {
        (Some("never"), _) => ClearText::Never,
        (Some("loopback"), _) => ClearText::Auto,
        (None, Some(_)) if !allowed => ClearText::Auto,
        _ => ClearText::Always,
    };
    let replica = ReplicaConfig {
        url: args.store.clone(),
        name: None,
        password: None,
        realm: None,
        access: Default::default(),
        compress: Compress::Auto,
        timeout: Duration::from_secs(args.timeout),
        partitions: Default::default(),
    };
    let target = crate::replica::open(&replica, false).map_err(|error| Failure::new(Exit::Config, error))?;
    let limits = Limits {
        connections: args.max_connections,
        silence: Duration::from_secs(args.timeout.max(3)),
        request_bytes: args.max_request << 20,
        memory_bytes: args.max_memory << 20,
        staged_bytes: args.max_staged << 20,
        ..Limits::default()
    };
    let own_name = || nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let name = args.servername.clone().or_else(own_name).unwrap_or_else(|| "localhost".into());
    let stage = args.stage.clone().unwrap_or_else(std::env::temp_dir);
    let compress = match args.compress.as_str() {
        "on" => Compress::On,
        "off" => Compress::Off,
        _ => Compress::Auto,
    };
    let settings = Settings { name, logins, limits, stage, tls, cleartext, compress };
    let server = Server::start(listeners, target, settings).map_err(|error| Failure::new(Exit::State, error))?;
    info!(store = args.store, listen = args.listen.join(" "), "serving");
    signals.wait();
    info!("stopping");
    server.stop(Duration::from_secs(20));
    info!("stopped");
    Ok(Exit::Ok)
}

/// Our certificate and its key: named here, or as a `sync_server` of this imapd.conf has them (2.4 called them otherwise).
fn certificate(args: &ServeArgs, conf: Option<&ImapdConf>) -> Option<(PathBuf, PathBuf)> {
    let named = |names: [&str; 4]| {
        let found = names.into_iter().find_map(|name| conf?.get(name));
        found.filter(|path| *path != "disabled").map(PathBuf::from)
    };
    args.tls_cert.clone().zip(args.tls_key.clone()).or_else(|| {
        let certificate = named(["csync_tls_server_cert", "csync_tls_cert_file", "tls_server_cert", "tls_cert_file"]);
        certificate.zip(named(["csync_tls_server_key", "csync_tls_key_file", "tls_server_key", "tls_key_file"]))
    })
}

/// Opens a place to listen at.
fn listen(place: &str) -> anyhow::Result<Listener> {
    if place.starts_with('/') {
        // One that a former server has left; anything else stays.
        use std::os::unix::fs::FileTypeExt;
        if std::fs::symlink_metadata(place).is_ok_and(|meta| meta.file_type().is_socket())
            && std::os::unix::net::UnixStream::connect(place).is_err()
        {
            std::fs::remove_file(place).with_context(|| format!("cannot listen at {place}"))?;
        }
        let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(place);
        nix::sys::stat::umask(mask);
        return Ok(Listener::Unix(listener.with_context(|| format!("cannot listen at {place}"))?));
    }
    Ok(Listener::Tcp(TcpListener::bind(place).with_context(|| format!("cannot listen at {place}"))?))
}
