//! A mailbox on the replica that cannot take the source's content is made anew. Mail that only the replica has is put
//! into a mailbox of its own beside it first, by hard links over there, and is never touched again.

use super::Event;
use super::push::{JobError, Pusher};
use crate::model::{
    MailboxEntry, MailboxHead, MailboxSnapshot, MailboxView, MboxName, MessageGuid, ModSeq, Record, Step, Uid, UniqueId,
};

/// Saves `only_there` into `NAME.replica-only-HASH` and removes the mailbox, identified by its uniqueid.
///
/// Name and uniqueid of the rescue mailbox come from its content, so a rebuild that was interrupted and is repeated
/// makes the same one again.
pub(super) fn rebuild(
    pusher: &mut Pusher<'_>,
    entry: &MailboxEntry,
    full: &MailboxView,
    reason: &str,
    only_there: &[Record],
) -> Result<(), JobError> {
    let mut kept = None;
    if !only_there.is_empty() {
        let snapshot = rescue_mailbox(entry, full, only_there);
        let crcs = super::diff::crcs(&snapshot, &pusher.caps);
        let bodies = super::diff::wanted_bodies(&snapshot.records, Uid(0)).collect();
        let update = crate::model::MailboxUpdate {
            head: snapshot.head.clone(),
            crcs,
            since: None,
            user_flags: snapshot.user_flags.clone(),
            annotations: Vec::new(),
            records: snapshot.records,
            bodies,
            reserve_from: vec![full.head.name.clone()],
            create: true,
        };
        kept = Some(update.head.name.clone());
        pusher.apply(&Step::Mailbox(Box::new(update)))?;
    }
    (pusher.shared.events)(&Event::Rebuild {
        mailbox: entry.name.clone(),
        reason: reason.to_owned(),
        kept: only_there.len(),
        kept_in: kept,
    });
    pusher.shared.fuse(&entry.name)?;
    pusher.apply(&Step::Remove { uniqueid: entry.uniqueid.clone(), name: entry.name.clone() })?;
    if !pusher.shared.dry_run {
        // With an INBOX goes all else that a server keeps of its user.
        pusher.names_changed(&entry.name, &entry.name);
    }
    Ok(())
}

fn hash_of(uniqueid: &UniqueId, guids: &[MessageGuid]) -> String {
    let mut hash = blake3::Hasher::new();
    hash.update(uniqueid.as_bytes());
    guids.iter().for_each(|guid| {
        hash.update(&guid.0);
    });
    hash.finalize().to_hex().to_string()
}

/// The name of the mailbox into which these messages are put when the mailbox that has them is made anew.
pub fn aside_for(name: &MboxName, uniqueid: &UniqueId, guids: &[MessageGuid]) -> MboxName {
    super::merge::aside_name(name, &hash_of(uniqueid, guids))
}

fn rescue_mailbox(entry: &MailboxEntry, full: &MailboxView, only_there: &[Record]) -> MailboxSnapshot {
    let guids: Vec<_> = only_there.iter().map(|record| record.guid).collect();
    let hex = hash_of(&entry.uniqueid, &guids);
    let name = super::merge::aside_name(&entry.name, &hex);
    let records: Vec<Record> = only_there
        .iter()
        .zip(1u32..)
        .map(|(record, uid)| Record {
            uid: Uid(uid),
            modseq: ModSeq(u64::from(uid) + 1),
            createdmodseq: ModSeq(0),
            cid: 0,
            ..record.clone()
        })
        .collect();
    let last = records.last().map_or(Uid(0), |record| record.uid);
    MailboxSnapshot {
        head: MailboxHead {
            uniqueid: UniqueId::new(hex.get(..24).unwrap_or(&hex)),
            name,
            last_uid: last,
            highestmodseq: ModSeq(u64::from(last.0) + 1),
            recentuid: Uid(0),
            createdmodseq: ModSeq(1),
            foldermodseq: ModSeq(1),
            partition: full.head.partition.clone(),
            acl: full.head.acl.clone(),
            options: full.head.options,
            uidvalidity: full.head.uidvalidity,
            ..MailboxHead::default()
        },
        user_flags: full.user_flags.clone(),
        records,
        minor_version: 17,
        ..MailboxSnapshot::default()
    }
}
