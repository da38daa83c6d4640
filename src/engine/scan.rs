//! Catch-up: which keys differ from the receipts? Reads directory entries, stat and index headers only.

use super::queue::{Item, Lane};
use crate::model::{MailStore, MboxName, StoreError, UniqueId, UserPart};
use crate::state::{MailboxReceipt, ReplicaState};
use std::collections::HashMap;

/// Result of a scan.
#[derive(Debug, Default)]
pub struct ScanReport {
    /// Mailboxes looked at.
    pub checked: usize,
    /// What has to be compared, with the reason.
    pub differ: Vec<(Lane, Item, &'static str)>,
}

/// Compares the source with the receipts of one replica; `below` limits it to a mailbox and its children.
pub fn scan(store: &dyn MailStore, state: &ReplicaState, below: Option<&MboxName>) -> Result<ScanReport, StoreError> {
    let prefix = store.deleted_prefix();
    let listing = store.listing()?;
    let annotated = store.annotated_mailboxes()?;
    let mut receipts: HashMap<UniqueId, MailboxReceipt> = HashMap::with_capacity(listing.entries.len());
    state.for_each_mailbox(&mut |id, receipt| {
        receipts.insert(id, receipt);
    });
    let wanted = |name: &MboxName| {
        below.is_none_or(|top| {
            let rest = name.as_bytes().strip_prefix(top.as_bytes());
            rest.is_some_and(|rest| rest.is_empty() || rest.first() == Some(&b'.'))
        })
    };
    let mut report = ScanReport::default();
    for entry in listing.entries.iter().filter(|entry| wanted(&entry.name)) {
        report.checked += 1;
        let lane = Lane::of(&entry.name, prefix);
        let reason = match receipts.remove(&entry.uniqueid) {
            None => Some("not yet replicated"),
            Some(receipt) if receipt.view.head.name != entry.name => Some("renamed"),
            Some(receipt) if entry.mbtype.is_intermediate() => {
                (receipt.view.head.mbtype != entry.mbtype).then_some("became a place holder")
            }
            Some(receipt) if receipt.fingerprint.is_none() => Some("last comparison was not finished"),
            Some(receipt) => {
                let empty = Vec::new();
                let mine = annotated.get(&entry.uniqueid).unwrap_or(&empty);
                let theirs = &receipt.view.annotations;
                let same = mine.len() == theirs.len()
                    && mine.iter().zip(theirs).all(|(mine, theirs)| mine.content() == theirs.content());
                if !same {
                    Some("mailbox annotations")
                } else {
                    // An unreadable mailbox is looked at by its job, which says what is wrong with it.
                    let now = store.fingerprint(entry).ok().flatten();
                    (now != receipt.fingerprint).then_some("files changed")
                }
            }
        };
        report.differ.extend(reason.map(|reason| (lane, Item::Mailbox(entry.uniqueid.clone()), reason)));
    }
    for (id, receipt) in receipts {
        let name = &receipt.view.head.name;
        if wanted(name) && !listing.entries.iter().any(|entry| entry.uniqueid == id) {
            report.differ.push((Lane::of(name, prefix), Item::Mailbox(id), "gone at the source"));
        }
    }
    if below.is_some_and(|top| top.owner().is_none()) {
        return Ok(report);
    }
    users(store, state, below, &mut report)?;
    let (mine, theirs) = (store.quotas()?, state.quotas());
    for root in mine.keys().chain(theirs.keys().filter(|root| !mine.contains_key(*root))) {
        if !super::diff::same_limits(mine.get(root), theirs.get(root)) {
            report.differ.push((super::quota_lane(root, prefix), Item::Quota(root.clone()), "quota limits"));
        }
    }
    if state.server_annotations().as_ref() != Some(&store.server_annotations()?) {
        report.differ.push((Lane::Server, Item::ServerAnnotations, "server annotations"));
    }
    Ok(report)
}

fn users(
    store: &dyn MailStore,
    state: &ReplicaState,
    below: Option<&MboxName>,
    report: &mut ScanReport,
) -> Result<(), StoreError> {
    let only = below.and_then(MboxName::owner);
    for user in store.users()? {
        if only.as_ref().is_some_and(|only| *only != user) {
            continue;
        }
        let receipt = state.user(&user);
        let fingerprint = store.user_fingerprint(&user).ok();
        let reason = match receipt {
            None => "not yet replicated",
            Some(receipt) if receipt.fingerprint.is_none() || receipt.fingerprint != fingerprint => "files changed",
            Some(_) => continue,
        };
        for part in [UserPart::Subs, UserPart::Seen, UserPart::Sieve] {
            report.differ.push((Lane::User(user.clone()), Item::Meta(part), reason));
        }
    }
    Ok(())
}
