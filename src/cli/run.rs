//! `spooltap run`: the daemon, in the foreground.

use super::setup::{Setup, replica_failure};
use super::{Common, Exit, Failure, Outcome};
use crate::daemon::moves::Hands;
use crate::daemon::scrub::{Scrub, ScrubSettings};
use crate::daemon::{self, Ears, End, Running, Service};
use crate::engine::{Options, ScanPace, fence};
use crate::model::{Denial, ReplicaError};
use crate::state::hand_over;
use clap::Args;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tracing::{error, info, warn};

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Where the figures of `status.json` are written every second they change [default: STATE/status.json]
    #[arg(long, value_name = "FILE")]
    status_file: Option<PathBuf>,
}

pub(super) fn run(common: &Common, args: &RunArgs) -> Outcome {
    let mut setup = Setup::open(common, true)?;
    refusals(&setup)?;
    let mut ears = Ears::new()?;
    loop {
        match once(common, args, &setup, &mut ears)? {
            End::Stop => return Ok(Exit::Ok),
            End::Reload(fresh) => setup = fresh,
        }
    }
}

/// Wrong credentials are better told now than in a loop; but where one replica works, the others hold up nobody.
fn refusals(setup: &Setup) -> Result<(), Failure> {
    setup.none_is_promoted()?;
    let mut refused = None;
    let targets = setup.replica_targets()?;
    let mut usable = 0;
    for target in &targets {
        match fence::open(&**target) {
            Ok(session) => {
                usable += 1;
                session.close();
            }
            // This source was taken over from: it feeds nobody any more.
            Err(error @ ReplicaError::Denied(Denial::Promoted, _)) => return Err(replica_failure(error)),
            Err(error) if error.is_fatal() => {
                error!(replica = %target.name(), %error, "replica refuses us");
                refused.get_or_insert(error);
            }
            Err(error) => {
                usable += 1;
                warn!(replica = %target.name(), %error, "replica is not reachable yet");
            }
        }
    }
    refused.filter(|_| usable == 0).map_or(Ok(()), |error| Err(replica_failure(error)))
}

/// From one start to a stop, or to a reload: then everything is started anew but the process. No change is lost, because
/// capture is armed before the scan that finds what happened in between.
fn once(common: &Common, args: &RunArgs, setup: &Setup, ears: &mut Ears) -> Result<End<Setup>, Failure> {
    let config = &setup.config;
    let state = setup.state()?;
    let moves = setup.moves()?;
    let options = Options {
        lanes: config.lanes,
        allow_removals: config.allow_removals,
        allow_loss: config.allow_loss,
        removal_delay: config.removal_delay,
        share: Some(moves.share(setup.rules())),
        scan_pace: ScanPace { per_second: config.scan_per_second, busy_percent: config.busy_io_percent },
        ..Options::default()
    };
    let service = Service {
        state: config.state.clone(),
        status_file: args.status_file.clone().unwrap_or_else(|| config.state.join("status.json")),
        metrics_listen: config.metrics_listen,
        metrics_file: config.metrics_file.clone(),
        rescan_every: config.rescan_every,
        rooms: vec![state.pulse()],
        health: state.health(),
    };
    let running = Running::arm(
        setup.store.clone(),
        setup.targets(&state)?,
        &options,
        setup.capture_settings(),
        Arc::new(super::log::log_event),
        &service.orders(),
    )
    .map_err(|error| Failure::new(super::setup::capture_exit(&error), error))?;
    hand_over(&config.state.join("cookies"));
    let settings =
        ScrubSettings { rate: config.scrub_rate, every: config.scrub_every, busy_percent: config.busy_io_percent };
    let scrub =
        Scrub::open(settings, setup.store.clone(), &config.state).map_err(|error| Failure::new(Exit::Source, error))?;
    let reload = || match Setup::open(common, true) {
        Ok(fresh) => Some(fresh),
        Err(failure) => {
            error!(error = format!("{:#}", failure.error), "the new configuration is faulty, the old one stays");
            None
        }
    };
    let hands = Hands::new(moves.clone(), running.engine.mover());
    let end = beside(
        "moves",
        move |stop| hands.work(stop),
        || {
            let mut serve = || daemon::serve(&running, &service, (&moves, scrub.as_deref()), &reload, ears);
            match scrub.clone() {
                Some(scrub) => beside("scrub", move |stop| scrub.work(stop), serve),
                None => serve(),
            }
        },
    )?;
    info!("{}", if matches!(end, End::Stop) { "stopping" } else { "reloading" });
    running.stop(config.shutdown_timeout);
    state.flush();
    info!("stopped");
    Ok(end)
}

/// Has something done on a thread of its own beside `with`.
fn beside<T>(name: &str, work: impl FnOnce(&AtomicBool) + Send + 'static, with: impl FnOnce() -> T) -> T {
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    let thread = std::thread::Builder::new().name(name.into()).spawn(move || work(&told));
    let out = with();
    stop.store(true, Ordering::Relaxed);
    // It may wait for a replica that does not answer; the next start goes on where it was.
    let deadline = Instant::now() + Duration::from_secs(5);
    while thread.as_ref().is_ok_and(|thread| !thread.is_finished()) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    out
}
