//! `spooltap verify`: are both sides equal?

use super::setup::Setup;
use super::{Common, Exit, Failure, Outcome};
use crate::engine::{Depth, Difference, Extent, Lane, verify as engine_verify};
use crate::model::{MailStore, UserId};
use clap::Args;
use std::collections::BTreeSet;
use std::io::Write;

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// Only these users
    #[arg(short = 'u', long = "user", value_name = "USER", num_args = 1..)]
    users: Vec<String>,
    /// Compare the replica with this archive instead of the live spool: file:///DIR
    #[arg(long, value_name = "URL")]
    from: Option<String>,
    /// Compare every record, also where the checksums over them agree
    #[arg(long)]
    records: bool,
    /// Compare every record, and hash the source's message files
    #[arg(long)]
    bodies: bool,
    /// The same, and have the replica give its message files back and hash them
    #[arg(long)]
    fetch: bool,
    /// Read at most so many MiB of message files in a second
    #[arg(long, value_name = "MIB")]
    rate: Option<u64>,
}

impl VerifyArgs {
    pub(super) fn everything() -> Self {
        Self { users: Vec::new(), from: None, records: false, bodies: false, fetch: false, rate: None }
    }

    /// Every record, and with `fetch` every message of both sides.
    pub(super) fn in_depth(fetch: bool) -> Self {
        Self { records: true, fetch, ..Self::everything() }
    }

    fn depth(&self) -> Depth {
        match self {
            Self { fetch: true, .. } => Depth::BothBodies,
            Self { bodies: true, .. } => Depth::Bodies,
            Self { records: true, .. } => Depth::Records,
            _ => Depth::Checksums,
        }
    }
}

pub(super) fn verify(common: &Common, args: &VerifyArgs) -> Outcome {
    let setup = Setup::open_from(common, args.from.as_deref())?;
    let state = setup.state_to_read();
    let lanes: Vec<Lane> = args.users.iter().map(|user| Lane::User(UserId::from(user.as_str()))).collect();
    let lanes = (!lanes.is_empty()).then_some(lanes);
    let share = setup.share()?;
    let mut out = std::io::stdout().lock();
    let mut equal = true;
    for (index, target) in setup.replica_targets()?.into_iter().enumerate() {
        let mut session = target.open().map_err(super::setup::replica_failure)?;
        let name = target.name();
        let lanes = match (&share, &lanes) {
            (None, lanes) => lanes.clone(),
            (Some(share), lanes) => {
                let all = lanes.clone().map_or_else(|| every_lane(&setup), Ok)?;
                Some(all.into_iter().filter(|lane| share(&name, lane)).collect())
            }
        };
        let bar = super::setup::bar(common.json, "lanes");
        let replica_state = state.as_ref().map(|state| state.replica(&setup.config.replicas[index].url));
        let report = engine_verify(
            &*setup.store,
            &mut *session,
            &target.capabilities(),
            replica_state.as_ref(),
            Extent { lanes: lanes.as_deref(), depth: args.depth(), rate: args.rate.map(|mib| mib << 20) },
            &mut |done, total| {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
            },
        );
        session.close();
        bar.finish_and_clear();
        let report = report.map_err(|error| match error {
            crate::engine::VerifyError::Store(error) => Failure::new(Exit::Source, error),
            crate::engine::VerifyError::Replica(error) => super::setup::replica_failure(error),
        })?;
        equal &= report.differences.is_empty() && report.unreadable.is_empty();
        if common.json {
            writeln!(out, "{}", serde_json::json!({ "replica": target.name(), "report": report }))?;
            continue;
        }
        for difference in &report.differences {
            writeln!(out, "{}", line(difference))?;
        }
        for (object, lost) in &report.not_held {
            writeln!(out, "{object}: the replica is too old for the {lost}; the rest is compared")?;
        }
        for (object, below) in &report.made_there {
            writeln!(out, "{object}: made by the replica itself, above {below}; it is empty, and goes with that")?;
        }
        for (object, reason) in &report.not_carried {
            writeln!(out, "{object}: not replicated: {reason}")?;
        }
        for (object, reason) in &report.unreadable {
            writeln!(out, "{object}: cannot be read at the source: {reason}")?;
        }
        writeln!(
            out,
            "{}: {} mailboxes, {} messages, {} users: {}",
            target.name(),
            report.mailboxes,
            report.messages,
            report.users,
            if report.differences.is_empty() && report.unreadable.is_empty() {
                "equal".to_owned()
            } else {
                format!("{} differences, {} unreadable", report.differences.len(), report.unreadable.len())
            }
        )?;
    }
    Ok(if equal { Exit::Ok } else { Exit::Differs })
}

/// A difference for people.
fn line(difference: &Difference) -> String {
    let values = if difference.source.is_empty() && difference.replica.is_empty() {
        String::new()
    } else {
        format!(": source {:?}, replica {:?}", difference.source, difference.replica)
    };
    format!("{}: {}: {}{values}", difference.lane, difference.object, difference.what)
}

fn every_lane(setup: &Setup<dyn MailStore>) -> Result<Vec<Lane>, Failure> {
    let listing = setup.store.listing().map_err(|error| Failure::new(Exit::Source, error))?;
    let prefix = setup.store.deleted_prefix();
    let mut lanes: BTreeSet<Lane> = listing.entries().map(|entry| Lane::of(&entry.name, prefix)).collect();
    lanes.insert(Lane::Server);
    Ok(lanes.into_iter().collect())
}
