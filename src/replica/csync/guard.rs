//! Requests that make a real `sync_server` die, keep a mode or store garbage are never sent. Each case was seen on running
//! servers (see `docs/csync.md`).

use crate::csync::Dialect;
use crate::model::MailboxUpdate;
use std::collections::HashSet;

/// Why this update must not be sent; `None` when it is safe. Whether live records have message files depends on what the
/// server has: that is the uploader's own check.
pub(super) fn refuse(update: &MailboxUpdate, dialect: &Dialect) -> Option<String> {
    let head = &update.head;
    let name = &head.name;
    if name.is_empty() || head.uniqueid.is_empty() {
        return Some(format!("mailbox {name:?} has no name or no uniqueid; run reconstruct at the source"));
    }
    if let Some(letter) = head.mbtype.0.chars().find(|letter| !dialect.mbtypes.contains(*letter)) {
        return Some(format!("{name}: this replica knows no mailbox type {letter}, its release is too old for it"));
    }
    if head.mbtype.is_intermediate() {
        return None;
    }
    let flags = update.user_flags.iter().flatten().map(|flag| flag.as_bytes().to_ascii_lowercase());
    if flags.collect::<HashSet<_>>().len() > 128 {
        return Some(format!("{name}: more than 128 user flags"));
    }
    let mut last = 0;
    for record in &update.records {
        let uid = record.uid.0;
        let fault = if uid <= last {
            "is out of order"
        } else if record.uid > head.last_uid {
            "is above LAST_UID"
        } else if record.modseq > head.highestmodseq {
            "has a modseq above HIGHESTMODSEQ"
        } else if record.guid.is_null() {
            "has no GUID; run reconstruct -G at the source"
        } else if record.size > u64::from(u32::MAX) {
            "is larger than the protocol can say"
        } else {
            last = uid;
            continue;
        };
        return Some(format!("{name}: UID {uid} {fault}"));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csync::Generation;
    use crate::model::{BodyRef, MailboxHead, MboxType, MessageGuid, ModSeq, Record, SyncCrcs, Uid};

    fn update(change: impl FnOnce(&mut MailboxUpdate)) -> Option<String> {
        let guid = MessageGuid([1; 20]);
        let record = Record { uid: Uid(1), modseq: ModSeq(2), guid, size: 3, ..Record::default() };
        let mut update = MailboxUpdate {
            head: MailboxHead {
                name: "user.a".into(),
                uniqueid: "x".into(),
                last_uid: Uid(2),
                highestmodseq: ModSeq(2),
                ..MailboxHead::default()
            },
            crcs: SyncCrcs::default(),
            since: None,
            user_flags: Vec::new(),
            annotations: Vec::new(),
            bodies: vec![BodyRef { uid: Uid(1), guid, size: 3, copied: false }],
            records: vec![record],
            reserve_from: Vec::new(),
            create: true,
        };
        change(&mut update);
        refuse(&update, &Dialect::of(Generation::V36))
    }

    #[test]
    fn what_a_server_survives_is_let_through() {
        assert_eq!(update(|_| {}), None);
    }

    #[test]
    fn what_kills_or_corrupts_a_server_is_not_sent() {
        let check = |part: &str, change: fn(&mut MailboxUpdate)| {
            let text = update(change).expect("refused");
            assert!(text.contains(part), "{text}");
        };
        check("above LAST_UID", |update| update.head.last_uid = Uid(0));
        check("above HIGHESTMODSEQ", |update| update.head.highestmodseq = ModSeq(1));
        check("no GUID", |update| update.records[0].guid = MessageGuid::default());
        check("out of order", |update| update.records.push(update.records[0].clone()));
        check("no mailbox type j", |update| update.head.mbtype = MboxType("j".into()));
        check("128 user flags", |update| {
            update.user_flags = (0..129).map(|n| Some(format!("k{n}").as_str().into())).collect();
        });
        check("no uniqueid", |update| update.head.uniqueid = Default::default());
    }
}
