//! What a replica that is older than its source cannot hold. It is said before anything is sent, and goes on only when
//! that was allowed. Pure.

use crate::model::{Annotation, Capabilities, MailboxSnapshot, QuotaLimits, QuotaResource, Record};

/// What of a mailbox would be lost, in words; `None` when nothing is.
pub fn of_mailbox(snapshot: &MailboxSnapshot, caps: &Capabilities) -> Option<String> {
    let live = || snapshot.records.iter().filter(|record| !record.is_expunged());
    let count = |holds: &dyn Fn(&Record) -> bool| live().filter(|record| holds(record)).count();
    let annotated = if caps.message_annotations { 0 } else { count(&|record| !record.annotations.is_empty()) };
    let saved = if caps.keeps_savedate { 0 } else { count(&|record| record.savedate != 0) };
    let lost = [(annotated, "annotations"), (saved, "dates of saving")];
    let mut lost: Vec<String> = lost
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{what} of {count} messages"))
        .collect();
    if !caps.keeps_options && snapshot.head.pop3_show_after != 0 {
        lost.push("date of pop3showafter".to_owned());
    }
    (!lost.is_empty()).then(|| lost.join(" and "))
}

/// What of the server's own annotations would be lost.
pub fn of_server(annotations: &[Annotation], caps: &Capabilities) -> Option<String> {
    (!caps.server_annotations && !annotations.is_empty())
        .then(|| format!("{} annotations of the server", annotations.len()))
}

/// What of a quota root would be lost.
pub fn of_quota(limits: &QuotaLimits, caps: &Capabilities) -> Option<String> {
    let others = limits.limits.keys().filter(|resource| **resource != QuotaResource::Storage);
    let others: Vec<String> = others.map(|resource| format!("{resource:?}")).collect();
    (!caps.quota_resources && !others.is_empty()).then(|| format!("limits of {}", others.join(", ")))
}

/// The limits that such a replica can hold.
pub fn reduced(limits: &QuotaLimits, caps: &Capabilities) -> QuotaLimits {
    let mut limits = limits.clone();
    limits.limits.retain(|resource, _| caps.quota_resources || *resource == QuotaResource::Storage);
    limits
}

/// What is told of an object that is refused.
pub fn refusal(object: &dyn std::fmt::Display, lost: &str) -> String {
    format!(
        "{object}: the replica is too old for the {lost}; nothing of it is sent; take a newer replica, or --allow-loss"
    )
}
