//! `spooltap run`: the daemon, in the foreground.

use super::setup::Setup;
use super::{Common, Exit, Failure, Outcome};
use crate::daemon::{self, Running};
use crate::engine::Options;
use clap::Args;
use std::path::PathBuf;
use std::sync::Arc;
use tracing::{info, warn};

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Where the figures of `status.json` are written every second they change [default: STATE/status.json]
    #[arg(long, value_name = "FILE")]
    status_file: Option<PathBuf>,
}

pub(super) fn run(common: &Common, args: &RunArgs) -> Outcome {
    let setup = Setup::open(common, true)?;
    let state = setup.state()?;
    let options =
        Options { lanes: setup.config.lanes, allow_removals: setup.config.allow_removals, ..Options::default() };
    // Wrong credentials are better told now than in a loop.
    for target in setup.replica_targets()? {
        match target.open() {
            Ok(session) => session.close(),
            Err(error @ crate::model::ReplicaError::Fatal(_)) => return Err(super::setup::replica_failure(error)),
            Err(error) => warn!(replica = %target.name(), %error, "replica is not reachable yet"),
        }
    }
    let running = Running::start(
        setup.store.clone(),
        setup.targets(&state)?,
        &options,
        setup.capture_settings(),
        Arc::new(super::log::log_event),
    )
    .map_err(|error| Failure::new(super::setup::capture_exit(&error), error))?;
    let status = args.status_file.clone().unwrap_or_else(|| setup.config.state.join("status.json"));
    daemon::serve_until_signal(&running, &status)?;
    info!("stopping");
    running.stop(setup.config.shutdown_timeout);
    state.flush();
    info!("stopped");
    Ok(Exit::Ok)
}
