//! Engine events and steps as lines for people.

use crate::engine::Event;
use crate::model::Step;
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
        Event::Applied(step) => trace!(step = describe(step), "applied"),
        Event::Planned(step) => info!(step = describe(step), "would apply"),
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
        Event::Reduced { object, lost } => warn!(object, lost, "the replica cannot hold this, it is left out"),
        Event::SourceTrouble { reason } => warn!(reason, "source cannot be read, trying again"),
        Event::Scanned { checked, differ, elapsed } => {
            info!(checked, differ, elapsed_ms = elapsed.as_millis() as u64, "catch-up scan done");
        }
    }
}

/// A step in one line for people.
pub(super) fn describe(step: &Step) -> String {
    match step {
        Step::Mailbox(update) => format!(
            "{} mailbox {} uniqueid {}: {} records, {} bodies of {} bytes, modseq {}",
            if update.create { "create" } else { "update" },
            update.head.name,
            update.head.uniqueid,
            update.records.len(),
            update.bodies.len(),
            update.bodies.iter().map(|body| body.size).sum::<u64>(),
            update.head.highestmodseq.0
        ),
        Step::Rename { from, to, partition, .. } => format!("rename mailbox {from} to {to} on partition {partition}"),
        Step::Remove { uniqueid, name } => format!("remove mailbox {name} uniqueid {uniqueid}"),
        Step::Expunge { name, uids, .. } => format!("expunge {} messages in {name}", uids.len()),
        Step::Subscribe { user, name } => format!("subscribe {user} to {name}"),
        Step::Unsubscribe { user, name } => format!("unsubscribe {user} from {name}"),
        Step::Seen { user, uniqueid, .. } => format!("seen state of {user} in mailbox {uniqueid}"),
        Step::Quota { root, limits } => format!("quota {root}: {:?}", limits.limits),
        Step::Unquota { root } => format!("remove quota root {root}"),
        Step::ServerAnnotation(annotation) => {
            format!("server annotation {}", String::from_utf8_lossy(&annotation.entry))
        }
        Step::RemoveServerAnnotation { entry, .. } => {
            format!("remove server annotation {}", String::from_utf8_lossy(entry))
        }
        Step::SievePut { user, name, content, .. } => format!("sieve script {name} of {user}: {} bytes", content.len()),
        Step::SieveRemove { user, name } => format!("remove sieve script {name} of {user}"),
        Step::SieveActivate { user, name } => format!("activate sieve script {name} of {user}"),
        Step::SieveDeactivate { user } => format!("deactivate sieve of {user}"),
    }
}
