//! What every subcommand that works on a source needs: configuration, the opened source, state, replicas.

use super::{Common, Exit, Failure};
use crate::archive::{Archive, ArchiveStore};
use crate::capture;
use crate::config::{Config, Credentials, DEFAULT_STATE, Raw, ReplicaConfig};
use crate::cyrus::imapd_conf::ImapdConf;
use crate::daemon::moves::Moves;
use crate::engine;
use crate::model::{MailStore, ReplicaError, ReplicaTarget, StoreError};
use crate::spool::{LiveSpool, open_store, read_conf};
use crate::state::{Promotions, State};
use std::path::PathBuf;
use std::sync::Arc;

/// Other sources than the live spool: URL schemes and what opens them.
const SOURCES: &[(&str, OpenSource)] = &[("file", archive), ("s3", archive)];

fn archive(url: &str) -> Result<Arc<dyn MailStore>, StoreError> {
    Ok(Arc::new(ArchiveStore::open(Archive::open(url).map_err(StoreError::from)?)?))
}

type OpenSource = fn(&str) -> Result<Arc<dyn MailStore>, StoreError>;

pub(super) struct Setup<S: ?Sized = LiveSpool> {
    pub config: Config,
    pub store: Arc<S>,
}

impl Setup {
    /// With the live spool that imapd.conf describes.
    pub(super) fn open(common: &Common, need_replica: bool) -> Result<Self, Failure> {
        let raw = typed(common)?;
        let path = raw.imapd_conf.clone().unwrap_or_else(|| "/etc/imapd.conf".into());
        let store = open_store(&path).map_err(|error| Failure::new(Exit::Source, error))?;
        let config = checked(&raw, Some(store.conf()), need_replica)?;
        Ok(Self { config, store: Arc::new(store) })
    }

    pub(super) fn capture_settings(&self) -> capture::Settings {
        capture::Settings {
            quiet: self.config.quiet,
            most: self.config.most,
            source: self.config.capture.clone(),
            come_back: self.config.capture_retry,
            poll_every: self.config.poll_every,
            scan_every: self.config.scan_every,
            sync_log: self.sync_log(),
            cross_check: self.cross_check(),
            locks: self.locks(),
            cookies: Some(self.config.state.join("cookies")),
            ..Default::default()
        }
    }

    /// The log to be watched beside capture, if that is wanted.
    fn cross_check(&self) -> Option<PathBuf> {
        let log = self.config.cross_check.then(|| self.sync_log())?;
        log.inspect_err(|why| tracing::warn!(why, "cross_check is asked for, but there is no log")).ok()
    }

    /// The rolling log of our channel, or why Cyrus writes none.
    fn sync_log(&self) -> Result<PathBuf, String> {
        let conf = self.store.conf();
        if !conf.switch("sync_log", false) {
            return Err("sync_log is off in imapd.conf; set sync_log: yes".to_owned());
        }
        let known = capture::synclog::channels(conf.get("sync_log_channels"));
        if !known.contains(&self.config.channel) {
            let ours = self.config.channel.as_deref().unwrap_or("\"\"");
            let known = conf.get("sync_log_channels").unwrap_or("\"\"");
            return Err(format!("Cyrus does not log to channel {ours}; add it to sync_log_channels, now {known}"));
        }
        Ok(capture::synclog::log_path(&self.store.layout().configdirectory, self.config.channel.as_deref()))
    }

    /// Where the server keeps its locks, or why they do not tell what changed.
    fn locks(&self) -> Result<PathBuf, String> {
        match self.store.is_modern() {
            true => Ok(self.store.layout().lock_root.clone()),
            false => {
                Err("needs Cyrus 3.6 or later, whose sessions let go of their locks after each command".to_owned())
            }
        }
    }

    /// Directories that capture watches.
    pub(super) fn watched_roots(&self) -> Vec<PathBuf> {
        capture::Roots::from(self.store.layout()).watched().into_iter().map(|(path, _)| path).collect()
    }
}

impl Setup<dyn MailStore> {
    /// With the source of this URL, or else the live spool.
    pub(super) fn open_from(common: &Common, from: Option<&str>) -> Result<Self, Failure> {
        let Some(url) = from else {
            let Setup { config, store } = Setup::open(common, true)?;
            return Ok(Self { config, store });
        };
        let mut raw = typed(common)?;
        // Receipts of another source are another state: those of the live spool stay where they are.
        let state = raw.state.take().unwrap_or_else(|| DEFAULT_STATE.into());
        let name = blake3::hash(url.as_bytes()).to_hex();
        raw.state = Some(state.join(format!("from-{}", name.get(..16).unwrap_or_default())));
        // An archive needs no Cyrus beside it; an imapd.conf that is named is asked for sync_host and the like.
        let conf = raw.imapd_conf.as_deref().map(read_conf).transpose();
        let config = checked(&raw, conf.map_err(|error| Failure::new(Exit::Config, error))?.as_ref(), true)?;
        let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
        let Some((_, open)) = SOURCES.iter().find(|(name, _)| *name == scheme) else {
            return Err(Failure::new(Exit::Config, anyhow::anyhow!("{url}: unknown kind of source; use file:///DIR")));
        };
        let store = open(url).map_err(|error| Failure::new(Exit::Source, error))?;
        Ok(Self { config, store })
    }
}

/// Read where no other is named, if it is there.
const OWN_CONFIG: &str = "/etc/spooltap/spooltap.toml";

/// The file and the command line laid over it.
fn typed(common: &Common) -> Result<Raw, Failure> {
    let usual = || Some(PathBuf::from(OWN_CONFIG)).filter(|path| path.exists());
    let file = match common.config.clone().or_else(usual) {
        Some(path) => Raw::read(&path).map_err(|text| Failure::new(Exit::Config, anyhow::anyhow!(text)))?,
        None => Raw::default(),
    };
    Ok(file.overlay(Raw {
        imapd_conf: common.imapd_conf.clone(),
        channel: common.channel.clone(),
        state: common.state.clone(),
        replica: common.replica.iter().map(|url| url.as_str().into()).collect(),
        password_file: common.password_file.clone(),
        compress: common.compress.clone(),
        lanes: common.lanes,
        capture: common.capture.clone(),
        allow_removals: common.allow_removals.then_some(true),
        allow_loss: common.allow_loss.then_some(true),
        ..Raw::default()
    }))
}

/// The replicas named on the command line, by URL or by the name that the file gives them.
pub(super) fn named_replicas(common: &Common) -> Result<Vec<String>, Failure> {
    if common.replica.is_empty() {
        return Ok(Vec::new());
    }
    Ok(typed(common)?.replica.iter().map(|one| one.url.clone()).collect())
}

/// The URL of what may be a name in the configuration.
pub(super) fn named_replica(common: &Common, given: &str) -> Result<String, Failure> {
    let all = typed(common)?.replica;
    let named = all.iter().find(|one| one.name.as_deref() == Some(given));
    Ok(named.map_or_else(|| given.to_owned(), |one| one.url.clone()))
}

/// The configuration where no imapd.conf can be read.
pub(super) fn config_alone(common: &Common) -> Result<Config, Failure> {
    checked(&typed(common)?, None, true)
}

/// How one more server is spoken to: as replicas are.
pub(super) fn config_of(common: &Common, url: &str) -> Result<ReplicaConfig, Failure> {
    let mut raw = typed(common)?;
    raw.replica = vec![url.into()];
    let conf = raw.imapd_conf.as_deref().and_then(|path| read_conf(path).ok());
    let config = checked(&raw, conf.as_ref(), true)?;
    let one = config.replicas.into_iter().next();
    one.ok_or_else(|| Failure::new(Exit::Usage, anyhow::anyhow!("{url} names no server")))
}

/// Where our state is, without a look at anything else.
pub(super) fn state_dir(common: &Common) -> Result<PathBuf, Failure> {
    Ok(typed(common)?.state.unwrap_or_else(|| DEFAULT_STATE.into()))
}

fn checked(raw: &Raw, conf: Option<&ImapdConf>, need_replica: bool) -> Result<Config, Failure> {
    let credentials = Credentials::gather(raw).map_err(|faults| Failure::new(Exit::Config, faults))?;
    let look = |key: &str| match raw.channel.as_deref() {
        Some(channel) => conf?.for_service(channel, key).map(str::to_owned),
        None => conf?.get(key).map(str::to_owned),
    };
    Config::check(raw, &credentials, &look, need_replica).map_err(|faults| Failure::new(Exit::Config, faults))
}

impl<S: MailStore + ?Sized> Setup<S> {
    /// Our state; locked for this process.
    pub(super) fn state(&self) -> Result<State, Failure> {
        let identity = self.store.identity().map_err(|error| Failure::new(Exit::Source, error))?;
        let state = State::open(&self.config.state, &identity).map_err(|error| Failure::new(Exit::State, error))?;
        self.store.remember_in(state.memory());
        Ok(state)
    }

    /// Our state for reading: itself, or a copy of it where a daemon holds it.
    pub(super) fn state_to_read(&self) -> Option<State> {
        self.state().ok().or_else(|| {
            let copy = State::open_copy(&self.config.state, &self.store.identity().ok()?)?;
            self.store.remember_in(copy.memory());
            Some(copy)
        })
    }

    pub(super) fn replica_targets(&self) -> Result<Vec<Arc<dyn ReplicaTarget>>, Failure> {
        let open = |replica: &ReplicaConfig| {
            crate::replica::open(replica, self.store.sieve_in_mailboxes()).map_err(replica_failure)
        };
        self.config.replicas.iter().map(open).collect()
    }

    /// As far as our own state knows; the replicas themselves are asked by whoever writes to them.
    pub(super) fn none_is_promoted(&self) -> Result<(), Failure> {
        let book = Promotions::open(&self.config.state).map_err(|error| Failure::new(Exit::State, error))?;
        let promoted = self.config.replicas.iter().find_map(|replica| book.of(&replica.url));
        match promoted {
            Some(promotion) => {
                let why = engine::fence::refusal(&promotion.replica, promotion);
                Err(Failure::new(Exit::Promoted, anyhow::anyhow!(why)))
            }
            None => Ok(()),
        }
    }

    /// The book of users who were moved.
    pub(super) fn moves(&self) -> Result<Arc<Moves>, Failure> {
        Moves::open(&self.config.state).map_err(|error| Failure::new(Exit::State, error))
    }

    /// Which lanes a replica is to have by the rules.
    pub(super) fn rules(&self) -> Option<engine::Share> {
        let routes = self.config.routes.clone();
        if routes.is_empty() {
            return None;
        }
        Some(Arc::new(move |replica: &str, lane: &engine::Lane| match lane {
            engine::Lane::User(user) => routes.wants(replica, user.as_bytes()),
            _ => true,
        }))
    }

    /// The same by the rules and the book of moves; `None`: every replica has all.
    pub(super) fn share(&self) -> Result<Option<engine::Share>, Failure> {
        let (moves, rules) = (self.moves()?, self.rules());
        Ok(if moves.all().is_empty() { rules } else { Some(moves.share(rules)) })
    }

    /// Replicas with their receipts, to be written to: none of them may have been promoted.
    pub(super) fn targets(&self, state: &State) -> Result<Vec<engine::Target>, Failure> {
        self.none_is_promoted()?;
        let targets = self.replica_targets()?;
        Ok(targets
            .into_iter()
            .zip(&self.config.replicas)
            .map(|(target, replica)| (target, state.replica(&replica.url)))
            .collect())
    }
}

/// Exit code by what the replica said.
pub(super) fn replica_failure(error: ReplicaError) -> Failure {
    let exit = match error {
        ReplicaError::Lost { .. } => Exit::Replica,
        ReplicaError::Denied(denial, _) => denial.into(),
        _ => Exit::Refused,
    };
    Failure::new(exit, error)
}

/// Exit code by what capture said.
pub(super) fn capture_exit(error: &capture::CaptureError) -> Exit {
    match error {
        capture::CaptureError::UnknownSource { .. } => Exit::Config,
        _ => Exit::Source,
    }
}

/// A progress bar on a terminal, nothing elsewhere.
pub(super) fn bar(json: bool, what: &str) -> indicatif::ProgressBar {
    use std::io::IsTerminal;
    if json || !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::with_draw_target(None, indicatif::ProgressDrawTarget::hidden());
    }
    let template = format!("{{elapsed_precise}} [{{bar:40}}] {{pos}}/{{len}} {what}, {{eta}} left");
    let style = indicatif::ProgressStyle::with_template(&template);
    indicatif::ProgressBar::no_length().with_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()))
}
