//! `spooltap scan`: what differs from the receipts.

use super::setup::Setup;
use super::{Common, Exit, Failure, Outcome};
use crate::model::MailStore;
use std::io::Write;

pub(super) fn scan(common: &Common) -> Outcome {
    let setup = Setup::open(common, true)?;
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
