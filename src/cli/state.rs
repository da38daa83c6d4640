//! `spooltap state`: what is remembered of the replicas. All of it may be dropped at the price of a full comparison.

use super::setup::Setup;
use super::{Common, Exit, Failure, Outcome};
use crate::model::MailStore;
use crate::state::{StateError, StateFile};
use clap::Subcommand;
use std::io::Write;

#[derive(Debug, Subcommand)]
pub(super) enum StateCommand {
    /// Reads all of it: whether it is whole, of this store, and what is in it; exit code 1 when it would not be used
    Check,
    /// Every receipt as a line of JSON
    Export,
    /// Forgets all receipts, or those of --replica: everything is compared anew at the next start
    Drop,
}

pub(super) fn state(common: &Common, command: &StateCommand) -> Outcome {
    let fault = |error: StateError| Failure::new(Exit::State, error);
    let setup = Setup::open(common, false)?;
    let mut out = std::io::stdout().lock();
    let Some(mut file) = StateFile::open(&setup.config.state).map_err(fault)? else {
        match common.json {
            true => writeln!(out, "null")?,
            false => writeln!(out, "nothing is remembered in {}", setup.config.state.display())?,
        }
        return Ok(Exit::Ok);
    };
    match command {
        StateCommand::Check => {
            let identity = setup.store.identity().map_err(|error| Failure::new(Exit::Source, error))?;
            let report = file.check().map_err(fault)?;
            let usable = report.is_usable(&identity);
            if common.json {
                let mut value = serde_json::to_value(&report).unwrap_or_default();
                value["usable"] = usable.into();
                writeln!(out, "{value}")?;
            } else {
                writeln!(
                    out,
                    "store    {}{}",
                    report.store,
                    if report.store == identity { "" } else { " (another one)" }
                )?;
                writeln!(out, "format   {}", report.format)?;
                writeln!(out, "pages    {}", if report.sound { "whole" } else { "damaged" })?;
                writeln!(
                    out,
                    "closed   {}",
                    if report.closed { "in good order" } else { "no: lanes are looked at anew" }
                )?;
                if report.unreadable > 0 {
                    writeln!(out, "unreadable {}: compared anew", report.unreadable)?;
                }
                for (name, counts) in &report.replicas {
                    writeln!(
                        out,
                        "replica  {name}: {} mailboxes ({} not finished), {} users, {} quota roots, {} lanes",
                        counts.mailboxes, counts.unfinished, counts.users, counts.quota_roots, counts.lanes
                    )?;
                }
            }
            Ok(if usable { Exit::Ok } else { Exit::Differs })
        }
        StateCommand::Export => {
            let mut failed = None;
            file.export(&mut |entry| {
                if failed.is_none() {
                    failed = writeln!(out, "{}", serde_json::to_string(&entry).unwrap_or_default()).err();
                }
            })
            .map_err(fault)?;
            match failed {
                Some(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
                _ => Ok(Exit::Ok),
            }
        }
        StateCommand::Drop => {
            let mut count = 0;
            match common.replica.is_empty() {
                true => count += file.drop_receipts(None).map_err(fault)?,
                false => {
                    for replica in super::setup::named_replicas(common)? {
                        count += file.drop_receipts(Some(&replica)).map_err(fault)?;
                    }
                }
            }
            match common.json {
                true => writeln!(out, "{}", serde_json::json!({ "dropped": count }))?,
                false => writeln!(out, "{count} entries dropped; the next start compares everything")?,
            }
            Ok(Exit::Ok)
        }
    }
}
