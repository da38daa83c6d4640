//! Engine events as log lines.

use crate::engine::Event;
use tracing::{debug, error, info, trace, warn};

/// Engine events as log lines: fixed text, facts as fields.
pub(super) fn log_event(event: &Event<'_>) {
    let name = |mailbox: &Option<crate::model::MboxName>| mailbox.as_ref().map(ToString::to_string).unwrap_or_default();
    match event {
        Event::Connected { replica } => debug!(replica, "connected"),
        Event::Disconnected { replica, cause, retry_in } => {
            warn!(replica, %cause, retry_ms = retry_in.as_millis() as u64, "replica lost or not reachable");
        }
        Event::Confirmed { item, mailbox, lag } => {
            debug!(%item, mailbox = name(mailbox), elapsed_ms = lag.as_secs_f64() * 1000.0, "confirmed");
        }
        Event::Applied(step) => trace!(step = super::push::describe(step), "applied"),
        Event::Planned(step) => info!(step = super::push::describe(step), "would apply"),
        Event::Failed { lane, item, mailbox, reason, quarantine: true } => {
            error!(%lane, %item, mailbox = name(mailbox), reason, "quarantined");
        }
        Event::Failed { lane, item, mailbox, reason, quarantine: false } => {
            debug!(%lane, %item, mailbox = name(mailbox), reason, "failed for now");
        }
        Event::Stray { name, uniqueid } => {
            warn!(mailbox = %name, %uniqueid, "mailbox exists only on the replica, it is left alone");
        }
        Event::Repair { mailbox, reason } => info!(%mailbox, reason, "comparing record by record"),
        Event::Rebuild { mailbox, reason, kept, kept_in } => {
            warn!(%mailbox, reason, kept, kept_in = name(kept_in), "making the replica's mailbox anew");
        }
        Event::SourceTrouble { reason } => warn!(reason, "source cannot be read, trying again"),
        Event::Scanned { checked, differ, elapsed } => {
            info!(checked, differ, elapsed_ms = elapsed.as_millis() as u64, "catch-up scan done");
        }
    }
}
