//! `spooltap check`: what would be run.

use super::setup::Setup;
use super::{Common, Exit, Outcome};
use crate::model::MailStore;
use std::io::Write;

pub(super) fn check(common: &Common) -> Outcome {
    let setup = Setup::open(common, true)?;
    let listing = setup.store.listing().map_err(|error| super::Failure::new(Exit::Source, error))?;
    let layout = setup.store.layout();
    let config = &setup.config;
    let mut out = std::io::stdout().lock();
    if common.json {
        let value = serde_json::json!({
            "imapd_conf": config.imapd_conf,
            "configdirectory": layout.configdirectory,
            "mailboxes": listing.len(),
            "left_out": listing.unreadable.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "state": config.state,
            "replicas": config.replicas.iter().map(|replica| &replica.url).collect::<Vec<_>>(),
            "lanes": config.lanes,
            "capture": config.capture,
            "quiet_ms": config.quiet.as_millis() as u64,
            "most_ms": config.most.as_millis() as u64,
        });
        writeln!(out, "{value}")?;
        return Ok(Exit::Ok);
    }
    writeln!(out, "source     {}: {} mailboxes", config.imapd_conf.display(), listing.len())?;
    for left_out in listing.unreadable.iter() {
        writeln!(out, "  left out {left_out}")?;
    }
    writeln!(out, "  configdirectory {}", layout.configdirectory.display())?;
    for root in setup.watched_roots() {
        writeln!(out, "  watched  {}", root.display())?;
    }
    writeln!(out, "state      {}", config.state.display())?;
    for replica in &config.replicas {
        let compress = format!("{:?}", replica.compress).to_lowercase();
        writeln!(out, "replica    {} ({} sessions, compression {compress})", replica.url, config.lanes)?;
        let from = match &replica.password {
            Some(_) => "password known",
            None => "no password needed",
        };
        writeln!(out, "  {from}, answers awaited for {} s", replica.timeout.as_secs())?;
    }
    writeln!(
        out,
        "capture    {}; a key is read {} ms after its last event, {} ms after its first at the latest",
        config.capture,
        config.quiet.as_millis(),
        config.most.as_millis()
    )?;
    writeln!(
        out,
        "losses     {}",
        if config.allow_loss {
            "an older replica gets what it can hold"
        } else {
            "what an older replica cannot hold is refused"
        }
    )?;
    writeln!(out, "removals   {}", if config.allow_removals { "not limited" } else { "limited by the fuse" })?;
    Ok(Exit::Ok)
}
