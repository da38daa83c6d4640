//! What every subcommand that works on a source needs: configuration, the opened source, state, replicas.

use super::{Common, Exit, Failure};
use crate::capture;
use crate::config::{Config, Credentials, Raw, ReplicaConfig};
use crate::engine;
use crate::model::{MailStore, ReplicaError, ReplicaTarget};
use crate::spool::{LiveSpool, open_store};
use crate::state::State;
use std::path::PathBuf;
use std::sync::Arc;

pub(super) struct Setup {
    pub config: Config,
    pub store: Arc<LiveSpool>,
}

impl Setup {
    pub(super) fn open(common: &Common, need_replica: bool) -> Result<Self, Failure> {
        let faulty = |text: String| Failure::new(Exit::Config, anyhow::anyhow!(text));
        let file = match &common.config {
            Some(path) => Raw::read(path).map_err(faulty)?,
            None => Raw::default(),
        };
        let raw = file.overlay(Raw {
            imapd_conf: common.imapd_conf.clone(),
            channel: common.channel.clone(),
            state: common.state.clone(),
            replica: common.replica.clone(),
            password_file: common.password_file.clone(),
            compress: common.compress.clone(),
            lanes: common.lanes,
            allow_removals: common.allow_removals.then_some(true),
            ..Raw::default()
        });
        let path = raw.imapd_conf.clone().unwrap_or_else(|| "/etc/imapd.conf".into());
        let store = open_store(&path).map_err(|error| Failure::new(Exit::Source, error))?;
        let credentials =
            Credentials::gather(raw.password_file.as_deref()).map_err(|faults| Failure::new(Exit::Config, faults))?;
        let conf = store.conf();
        let look = |key: &str| match raw.channel.as_deref() {
            Some(channel) => conf.for_service(channel, key).map(str::to_owned),
            None => conf.get(key).map(str::to_owned),
        };
        let config = Config::check(&raw, &credentials, &look, need_replica)
            .map_err(|faults| Failure::new(Exit::Config, faults))?;
        Ok(Self { config, store: Arc::new(store) })
    }

    /// Our state; locked for this process.
    pub(super) fn state(&self) -> Result<State, Failure> {
        let identity = self.store.identity().map_err(|error| Failure::new(Exit::Source, error))?;
        State::open(&self.config.state, &identity).map_err(|error| Failure::new(Exit::State, error))
    }

    /// Our state where no daemon holds it; only for reading.
    pub(super) fn state_if_free(&self) -> Option<State> {
        self.state().ok()
    }

    pub(super) fn replica_targets(&self) -> Result<Vec<Arc<dyn ReplicaTarget>>, Failure> {
        let open = |replica: &ReplicaConfig| {
            crate::replica::open(replica, self.store.sieve_in_mailboxes()).map_err(replica_failure)
        };
        self.config.replicas.iter().map(open).collect()
    }

    /// Replicas with their receipts.
    pub(super) fn targets(&self, state: &State) -> Result<Vec<engine::Target>, Failure> {
        let targets = self.replica_targets()?;
        Ok(targets
            .into_iter()
            .zip(&self.config.replicas)
            .map(|(target, replica)| (target, state.replica(&replica.url)))
            .collect())
    }

    pub(super) fn capture_settings(&self) -> capture::Settings {
        capture::Settings { quiet: self.config.quiet, most: self.config.most, ..Default::default() }
    }

    /// Directories that capture watches.
    pub(super) fn watched_roots(&self) -> Vec<PathBuf> {
        capture::Roots::from(self.store.layout()).watched().into_iter().map(|(path, _)| path).collect()
    }
}

/// Exit code by what the replica said.
pub(super) fn replica_failure(error: ReplicaError) -> Failure {
    let exit = match error {
        ReplicaError::Lost { .. } => Exit::Replica,
        _ => Exit::Refused,
    };
    Failure::new(exit, error)
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
