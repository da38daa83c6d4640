//! Requests that make a real `sync_server` die, keep a mode or store garbage are never sent. Each case was seen on running
//! servers (see `docs/csync.md`). What depends on what the server has just now is looked at in `update` and `steps`.

use crate::csync::{Dialect, Unannotation};
use crate::model::{Annotation, FlagName, MailboxUpdate, MboxName, QuotaLimits, Step, UniqueId, UserId};
use std::collections::HashSet;

/// Why this step must not be sent; `None` when it is safe.
pub(super) fn refuse(step: &Step, dialect: &Dialect) -> Option<String> {
    match step {
        Step::Mailbox(update) => mailbox(update, dialect),
        Step::Rename { uniqueid, from, to, .. } => id(uniqueid).or_else(|| name(from)).or_else(|| name(to)),
        Step::Remove { uniqueid, name: mailbox } | Step::Expunge { uniqueid, name: mailbox, .. } => {
            id(uniqueid).or_else(|| name(mailbox))
        }
        Step::Subscribe { user: who, name: mailbox } | Step::Unsubscribe { user: who, name: mailbox } => {
            // A line break in it is fatal to the server.
            user(who).or_else(|| name(mailbox))
        }
        // Without a uniqueid the server has no key and aborts.
        Step::Seen { user: who, uniqueid, seen } => user(who)
            .or_else(|| id(uniqueid))
            .or_else(|| long(&format!("seen state of {who}"), &seen.seenuids, dialect)),
        Step::Quota { root, limits } => {
            name(&MboxName::new(root.as_bytes())).or_else(|| quota(&format!("quota root {root}"), limits))
        }
        Step::Unquota { root } => name(&MboxName::new(root.as_bytes())),
        Step::ServerAnnotation(annotation) => annotated("the server", annotation, dialect),
        Step::RemoveServerAnnotation { .. } => (dialect.unannotation == Unannotation::Never).then(|| {
            "removing a server annotation would kill a sync_server 2.4, and this one does not tell its release; remove it \
             there by hand"
                .to_owned()
        }),
        Step::SievePut { user: who, name: script, content, .. } => user(who)
            .or_else(|| file(script.as_bytes()))
            .or_else(|| long(&format!("Sieve script {script} of {who}"), content, dialect)),
        Step::SieveRemove { user: who, name: script } | Step::SieveActivate { user: who, name: script } => {
            user(who).or_else(|| file(script.as_bytes()))
        }
        Step::SieveDeactivate { user: who } => user(who),
    }
}

fn mailbox(update: &MailboxUpdate, dialect: &Dialect) -> Option<String> {
    let head = &update.head;
    let mailbox = &head.name;
    if let Some(fault) = name(mailbox).or_else(|| id(&head.uniqueid)) {
        return Some(format!("{fault}; run reconstruct at the source"));
    }
    if let Some(letter) = head.mbtype.0.chars().find(|letter| !dialect.mbtypes.contains(*letter)) {
        return Some(format!("{mailbox}: this replica's release takes no mailbox of type {letter}"));
    }
    if head.mbtype.is_intermediate() {
        return None;
    }
    let used = update.records.iter().fold(0, |used, record| used | record.user_flags);
    let names = update.user_flags.iter().flatten().map(|flag| flag.as_bytes().to_ascii_lowercase());
    if names.collect::<HashSet<_>>().len() > 128 {
        return Some(format!("{mailbox}: more than 128 user flags"));
    }
    let set = update.user_flags.iter().take(128).enumerate().filter(|(bit, _)| used >> bit & 1 == 1);
    if let Some(flag) = set.filter_map(|(_, flag)| flag.as_ref()).find(|flag| !is_atom(flag)) {
        return Some(format!("{mailbox}: {flag:?} is no flag that IMAP can name; remove it from its messages"));
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
        } else if record.size == 0 && !record.is_expunged() {
            "has no byte in its message file; a server dies of that. Remove it, or run reconstruct at the source"
        } else if record.size > u64::from(u32::MAX) {
            "is larger than the protocol can say"
        } else {
            last = uid;
            continue;
        };
        return Some(format!("{mailbox}: UID {uid} {fault}"));
    }
    let mut annotations = update.annotations.iter().chain(update.records.iter().flat_map(|record| &record.annotations));
    annotations.find_map(|annotation| annotated(&mailbox.to_string(), annotation, dialect))
}

/// The characters of an IMAP atom, and no more than Cyrus's reader holds.
fn is_atom(flag: &FlagName) -> bool {
    let bytes = flag.as_bytes();
    let good = |byte: &u8| matches!(byte, 0x21..=0x7e) && !b"(){%*\"\\".contains(byte);
    (1..1024).contains(&bytes.len()) && bytes.iter().all(good)
}

fn name(name: &MboxName) -> Option<String> {
    if name.is_empty() {
        Some("a mailbox without a name".into())
    } else if name.as_bytes().iter().any(u8::is_ascii_control) {
        Some(format!("mailbox name {name:?} holds a control character"))
    } else {
        None
    }
}

/// It becomes part of a path there.
fn id(id: &UniqueId) -> Option<String> {
    let odd = |byte: &u8| *byte <= b' ' || matches!(byte, b'/' | 0x7f);
    (id.is_empty() || id.as_bytes().iter().any(odd)).then(|| format!("{id:?} can be no uniqueid"))
}

/// It becomes part of a path there.
fn user(user: &UserId) -> Option<String> {
    let odd = |byte: &u8| byte.is_ascii_control() || *byte == b'/';
    (user.is_empty() || user.as_bytes().iter().any(odd)).then(|| format!("{user:?} can be no user id"))
}

/// It becomes a file name there.
fn file(script: &[u8]) -> Option<String> {
    let odd = |byte: &u8| byte.is_ascii_control() || *byte == b'/';
    let text = || format!("{:?} can be no script name", String::from_utf8_lossy(script));
    (script.is_empty() || script.iter().any(odd)).then(text)
}

/// The protocol carries 32 bits: a larger limit would arrive as its remainder, 4 TiB as nothing at all.
fn quota(root: &str, limits: &QuotaLimits) -> Option<String> {
    let too_large = |limit: &&u64| **limit >= u64::from(u32::MAX);
    let limit = limits.limits.values().find(too_large)?;
    Some(format!("{root}: a limit of {limit} is more than the protocol can say; use {} or none", u32::MAX - 1))
}

fn annotated(place: &str, annotation: &Annotation, dialect: &Dialect) -> Option<String> {
    let entry = String::from_utf8_lossy(&annotation.entry);
    let (bytes, most) = (annotation.value.len(), dialect.max_annotation);
    if bytes > most {
        return Some(format!(
            "annotation {entry} of {place}: {bytes} bytes are more than this release has room for ({most})"
        ));
    }
    long(&format!("annotation {entry} of {place}"), &annotation.value, dialect)
}

fn long(what: &str, bytes: &[u8], dialect: &Dialect) -> Option<String> {
    (bytes.len() > dialect.max_literal).then(|| {
        format!("{what}: {} bytes are more than a server of this release reads ({})", bytes.len(), dialect.max_literal)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csync::Generation;
    use crate::model::{
        BodyRef, MailboxHead, MboxType, MessageGuid, ModSeq, QuotaResource, Record, SeenState, SyncCrcs, SystemFlags,
        Uid,
    };

    fn update(generation: Generation, change: impl FnOnce(&mut MailboxUpdate)) -> Option<String> {
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
        refuse(&Step::Mailbox(Box::new(update)), &Dialect::of(generation))
    }

    fn annotation(size: usize) -> Annotation {
        Annotation { entry: b"/comment".to_vec(), userid: "".into(), value: vec![b'x'; size], modseq: ModSeq(1) }
    }

    #[test]
    fn what_a_server_survives_is_let_through() {
        for generation in [Generation::V24, Generation::V25, Generation::V34, Generation::V36, Generation::V312] {
            assert_eq!(update(generation, |_| {}), None);
        }
        let good = |change: fn(&mut MailboxUpdate)| assert_eq!(update(Generation::V36, change), None);
        // Not told at all, so it may be as empty as it likes.
        good(|update| (update.records[0].size, update.records[0].system_flags.0) = (0, SystemFlags::EXPUNGED));
        // No message carries it.
        good(|update| update.user_flags = vec![Some("odd one".into())]);
        good(|update| (update.user_flags, update.records[0].user_flags) = (vec![Some("a]b:$NIL'+".into())], 1));
        good(|update| update.records[0].annotations = vec![annotation(131_072)]);
        assert_eq!(update(Generation::V32, |update| update.annotations = vec![annotation(200_000)]), None);
    }

    #[test]
    fn mailboxes_that_kill_or_corrupt_a_server_are_not_sent() {
        let check = |part: &str, change: fn(&mut MailboxUpdate)| {
            let text = update(Generation::V36, change).expect("refused");
            assert!(text.contains(part), "{text}");
        };
        check("above LAST_UID", |update| update.head.last_uid = Uid(0));
        check("above HIGHESTMODSEQ", |update| update.head.highestmodseq = ModSeq(1));
        check("no GUID", |update| update.records[0].guid = MessageGuid::default());
        check("out of order", |update| update.records.push(update.records[0].clone()));
        check("out of order", |update| update.records[0].uid = Uid(0));
        check("no byte", |update| update.records[0].size = 0);
        check("larger than", |update| update.records[0].size = 1 << 32);
        check("type j", |update| update.head.mbtype = MboxType("j".into()));
        for letter in ["r", "m", "z", "d", "x"] {
            let text = update(Generation::V312, |update| update.head.mbtype = MboxType(letter.into()));
            assert!(text.expect("refused").contains("takes no mailbox"), "{letter}");
        }
        for letter in ["f", "s", "i", "c"] {
            assert!(update(Generation::V24, |update| update.head.mbtype = MboxType(letter.into())).is_some());
        }
        check("128 user flags", |update| {
            update.user_flags = (0..129).map(|n| Some(format!("k{n}").as_str().into())).collect();
        });
        for flag in ["", "a b", "a)", "{3}", "a%", "a*", "a\"b", "a\\b", "\u{fc}", "a\r\nb", &"k".repeat(1024)] {
            let text = update(Generation::V36, |update| {
                (update.user_flags, update.records[0].user_flags) = (vec![None, Some(flag.into())], 0b10);
            });
            assert!(text.expect("refused").contains("no flag"), "{flag}");
        }
        check("no uniqueid", |update| update.head.uniqueid = Default::default());
        check("no uniqueid", |update| update.head.uniqueid = "../../x".into());
        check("without a name", |update| update.head.name = Default::default());
        check("control", |update| update.head.name = "user.a\r\nAPPLY".into());
        check("131073 bytes", |update| update.annotations = vec![annotation(131_073)]);
        check("131073 bytes", |update| update.records[0].annotations = vec![annotation(131_073)]);
    }

    #[test]
    fn other_steps_that_kill_or_corrupt_a_server_are_not_sent() {
        let check = |part: &str, generation: Generation, step: Step| {
            let text = refuse(&step, &Dialect::of(generation)).unwrap_or_else(|| panic!("{step:?}"));
            assert!(text.contains(part), "{text}");
        };
        let new = Generation::V36;
        let a = || UserId::from("a");
        let quota = |limit| Step::Quota {
            root: "user.a".into(),
            limits: QuotaLimits { limits: [(QuotaResource::Storage, limit)].into(), modseq: 0 },
        };
        check("more than the protocol", new, quota(1 << 32));
        check("more than the protocol", new, quota((1 << 32) - 1));
        assert_eq!(refuse(&quota((1 << 32) - 2), &Dialect::of(new)), None);
        check("control", new, Step::Subscribe { user: a(), name: "a\nb".into() });
        check("control", new, Step::Unsubscribe { user: a(), name: "a\tb".into() });
        check("no user id", new, Step::Subscribe { user: "../../b".into(), name: "x".into() });
        check("no user id", new, Step::SieveDeactivate { user: "".into() });
        let seen = |id: &str, uids: usize| Step::Seen {
            user: a(),
            uniqueid: id.into(),
            seen: SeenState { seenuids: vec![b'1'; uids], ..SeenState::default() },
        };
        check("no uniqueid", new, seen("", 1));
        check("more than a server", new, seen("x", 131_073));
        let put = |name: &str, size| Step::SievePut {
            user: a(),
            name: name.into(),
            last_update: 0,
            content: vec![b' '; size],
            compiled: Vec::new(),
        };
        check("no script name", new, put("../x", 1));
        check("more than a server", new, put("x", 131_073));
        assert_eq!(refuse(&put("x", 131_073), &Dialect::of(Generation::V25)), None);
        check("more than a server", new, Step::ServerAnnotation(annotation(131_073)));
        let remove = Step::RemoveServerAnnotation { entry: b"/comment".to_vec(), userid: "".into() };
        let unknown = Dialect { unannotation: Unannotation::Never, ..Dialect::of(Generation::V25) };
        assert!(refuse(&remove, &unknown).expect("refused").contains("would kill"));
        for generation in [Generation::V24, Generation::V25] {
            assert_eq!(refuse(&remove, &Dialect::of(generation)), None);
        }
        check("more than this release has room for", Generation::V24, Step::ServerAnnotation(annotation(4001)));
        assert_eq!(refuse(&Step::ServerAnnotation(annotation(4001)), &Dialect::of(Generation::V25)), None);
    }
}
