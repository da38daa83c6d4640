//! `spooltap move`: a user goes from the replicas that have him to another one.

use super::setup::{Setup, named_replica, state_dir};
use super::{Common, Exit, Failure, Outcome};
use crate::daemon::control::{self, ControlError, Request};
use crate::daemon::moves::{Hands, Move, Phase, begin};
use crate::engine::{Engine, Options};
use clap::Args;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Debug, Args)]
pub(super) struct MoveArgs {
    /// Who is to be moved, as he logs in
    user: String,
    /// The replica that is to have the user alone: its URL, its name in the configuration, or a part of the URL
    #[arg(long, value_name = "REPLICA")]
    to: String,
    /// Wait no longer than this; a daemon goes on without us, and the same command goes on where it was
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
}

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);

pub(super) fn relocate(common: &Common, args: &MoveArgs) -> Outcome {
    let state = state_dir(common)?;
    let to = named_replica(common, &args.to)?;
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    match control::ask(&state, &Request::Move { user: args.user.clone(), to: to.clone() }) {
        Ok(response) => match response.error {
            Some(error) => Err(Failure::new(Exit::Usage, anyhow::anyhow!(error))),
            None => follow(args, deadline, &mut || Ok(super::control::ask_status(common)?.moves)),
        },
        Err(ControlError::NotRunning { .. }) => alone(common, args, &to, deadline),
        Err(error) => Err(Failure::new(Exit::NoDaemon, error)),
    }
}

/// Without a daemon: what changes meanwhile is not followed, it is seen when both sides are compared.
fn alone(common: &Common, args: &MoveArgs, to: &str, deadline: Instant) -> Outcome {
    let setup = Setup::open(common, true)?;
    let state = setup.state()?;
    let moves = setup.moves()?;
    let config = &setup.config;
    let options = Options {
        lanes: config.lanes,
        allow_removals: config.allow_removals,
        allow_loss: config.allow_loss,
        removal_delay: config.removal_delay,
        share: Some(moves.share(setup.rules())),
        ..Options::default()
    };
    let engine = Engine::start(setup.store.clone(), setup.targets(&state)?, &options, Arc::new(super::log::log_event));
    let mover = engine.mover();
    let begun = begin(&moves, &mover, &args.user, to, &|name| engine.has(name, &args.user));
    let outcome = begun.map_err(|error| Failure::new(Exit::Usage, anyhow::anyhow!(error))).and_then(|()| {
        let mut hands = Hands::new(moves.clone(), mover);
        follow(args, deadline, &mut || {
            hands.look();
            Ok(moves.all())
        })
    });
    engine.stop(setup.config.shutdown_timeout);
    state.flush();
    outcome
}

/// Tells how far it is, until it is done.
fn follow(args: &MoveArgs, deadline: Instant, look: &mut dyn FnMut() -> Result<Vec<Move>, Failure>) -> Outcome {
    let mut told = None;
    loop {
        let all = look()?;
        let Some(one) = all.into_iter().find(|one| one.user == args.user) else {
            return Err(Failure::new(Exit::State, anyhow::anyhow!("the move is not in the book any more")));
        };
        let now = (one.phase, one.trouble.clone());
        if told.as_ref() != Some(&now) {
            let phase = format!("{:?}", one.phase).to_lowercase();
            let why = one.trouble.map_or_else(String::new, |trouble| format!(": {trouble}"));
            writeln!(io::stdout(), "{} to {}: {phase}{why}", one.user, one.to)?;
            told = Some(now);
        }
        if one.phase == Phase::Done {
            return Ok(Exit::Ok);
        }
        if Instant::now() >= deadline {
            return Ok(Exit::Interrupted);
        }
        std::thread::sleep(LOOK);
    }
}
