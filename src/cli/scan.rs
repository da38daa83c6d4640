//! `spooltap scan`: what differs from the receipts.

use super::setup::Setup;
use super::{Common, Exit, Failure, Outcome};
use crate::daemon::scrub::Leaf;
use crate::engine::{Bustle, Pace, Pass};
use crate::model::{MailStore, MboxName};
use clap::Args;
use std::io::Write;
use std::time::{Duration, Instant};

#[derive(Debug, Args)]
pub(super) struct ScanArgs {
    /// Also read every message file and compare it with its GUID; a scan that was interrupted goes on where it was
    #[arg(long)]
    paranoid: bool,
    /// Read at most so many MiB of message files in a second
    #[arg(long, value_name = "MIB", requires = "paranoid")]
    rate: Option<u64>,
    /// Begin with the first mailbox, whatever was interrupted
    #[arg(long, requires = "paranoid")]
    afresh: bool,
}

/// How far a paranoid scan is, is written down so often.
const SAVE_EVERY: Duration = Duration::from_secs(5);

pub(super) fn scan(common: &Common, args: &ScanArgs) -> Outcome {
    let setup = Setup::open(common, true)?;
    if args.paranoid {
        return paranoid(common, args, &setup);
    }
    let state = setup.state()?;
    let listing = setup.store.listing().map_err(|error| Failure::new(Exit::Source, error))?;
    let mut out = std::io::stdout().lock();
    let mut differs = !listing.unreadable.is_empty();
    for left_out in listing.unreadable.iter() {
        if common.json {
            let line = serde_json::json!({ "object": format!("mailbox {}", left_out.name), "reason": left_out.reason });
            writeln!(out, "{line}")?;
        } else {
            writeln!(out, "mailbox {left_out}")?;
        }
    }
    for replica in &setup.config.replicas {
        let mut report = crate::engine::scan(&*setup.store, &state.replica(&replica.url), None)
            .map_err(|error| Failure::new(Exit::Source, error))?;
        if let Some(share) = setup.share()? {
            report.differ.retain(|(lane, ..)| share(&replica.url, lane));
        }
        differs |= !report.differ.is_empty();
        for (lane, item, reason) in &report.differ {
            let object = match item {
                crate::engine::Item::Mailbox(id) => {
                    listing.by_id(id).map_or_else(|| item.to_string(), |entry| format!("mailbox {}", entry.name))
                }
                other => other.to_string(),
            };
            if common.json {
                let line = serde_json::json!({
                    "replica": replica.url, "lane": lane.to_string(), "object": object, "reason": reason
                });
                writeln!(out, "{line}")?;
            } else {
                writeln!(out, "{lane}: {object}: {reason}")?;
            }
        }
        if !common.json {
            writeln!(
                out,
                "{}: {} mailboxes checked, {} things differ",
                replica.url,
                report.checked,
                report.differ.len()
            )?;
        }
    }
    Ok(if differs { Exit::Differs } else { Exit::Ok })
}

/// Needs no receipts, and so it can be said beside a running daemon.
fn paranoid(common: &Common, args: &ScanArgs, setup: &Setup) -> Outcome {
    // A store of before 2.4 keeps its GUIDs in our state.
    let _state = setup.state_to_read();
    let source = |error| Failure::new(Exit::Source, error);
    let path = setup.config.state.join("paranoid.json");
    let identity = setup.store.identity().map_err(source)?;
    let mut leaf = Leaf::open(&path, &identity);
    if args.afresh {
        leaf.pass = None;
    }
    if let Some(place) = leaf.pass.as_ref().and_then(Pass::place).map(MboxName::to_string) {
        eprintln!("going on at {place}; --afresh begins with the first mailbox");
    }
    let mut pass = leaf.pass.take().unwrap_or_else(Pass::begin);
    let bar = super::setup::bar(common.json, "mailboxes");
    bar.set_length(setup.store.listing().map_err(source)?.len() as u64);
    let mut saved = Instant::now();
    let mut failed = None;
    let result =
        pass.run(&*setup.store, &mut Pace::new(args.rate.map(|mib| mib << 20)), &mut Bustle::new(0), &mut |pass| {
            bar.set_position(pass.mailboxes as u64);
            if saved.elapsed() >= SAVE_EVERY {
                saved = Instant::now();
                leaf.pass = Some(pass.clone());
                failed = leaf.save(&path).err();
            }
            failed.is_none()
        });
    bar.finish_and_clear();
    leaf.pass = (!matches!(result, Ok(true))).then(|| pass.clone());
    leaf.save(&path)?;
    result.map_err(source)?;
    if let Some(error) = failed {
        return Err(Failure::new(Exit::State, anyhow::anyhow!("{}: {error}", path.display())));
    }
    let mut out = std::io::stdout().lock();
    if common.json {
        writeln!(out, "{}", serde_json::to_value(&pass).map_err(std::io::Error::other)?)?;
    } else {
        for damage in &pass.damaged {
            writeln!(out, "{damage}")?;
        }
        writeln!(
            out,
            "{} mailboxes, {} messages, {} bytes read: {} damaged",
            pass.mailboxes, pass.messages, pass.bytes, pass.damaged_total
        )?;
    }
    Ok(if pass.damaged_total == 0 { Exit::Ok } else { Exit::Differs })
}
