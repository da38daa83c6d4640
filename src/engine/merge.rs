//! Two sides of a mailbox become one: messages of the one are appended to the other under new UIDs, above those that both
//! sides have given out, as Cyrus does it. Flags that were changed later win. One update for each mailbox: it is there or
//! it is not, and said again nothing is left to be done.

use super::diff;
use super::push::NoBodies;
use crate::model::{
    Body, BodyRef, BodySource, Capabilities, Disposition, FlagName, MailboxHead, MailboxSnapshot, MailboxUpdate,
    MailboxView, MboxName, ModSeq, Record, Replica, ReplicaError, Since, Step, StoreError, SyncCrcs, SystemFlags, Uid,
    UniqueId, UserFlags,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

/// What is to be added to a mailbox.
pub struct Addition<'a> {
    pub name: &'a MboxName,
    pub uniqueid: &'a UniqueId,
    /// Flag table of the records below.
    pub user_flags: &'a [Option<FlagName>],
    /// Messages; those whose bytes the mailbox has already are left out.
    pub messages: &'a [Record],
    /// Messages that the mailbox has, with the flags they are to get.
    pub flags: &'a [Record],
    /// No UID up to this one is given to anything.
    pub above: Uid,
    /// The mailbox on the other side that the messages are fetched from.
    pub from: &'a MailboxHead,
}

/// Somebody works in the mailbox while we do; each time it is looked at anew.
const TRIES: usize = 8;

/// Adds to a mailbox; how many messages came, and how many got other flags.
pub fn add(
    to: &mut dyn Replica,
    caps: &Capabilities,
    addition: &Addition<'_>,
    from: &mut dyn Replica,
) -> Result<(usize, usize), ReplicaError> {
    let from = Mutex::new(from);
    let mut last = None;
    for attempt in 0..TRIES {
        let Some(full) = to.view_full(addition.name)? else {
            return Err(ReplicaError::NoSuchMailbox(addition.name.to_string()));
        };
        if full.head.uniqueid != *addition.uniqueid {
            let why = format!("{} has uniqueid {} there", addition.name, full.head.uniqueid);
            return Err(ReplicaError::Moved(why));
        }
        let Some(plan) = plan(&full, addition, caps, attempt + 2 < TRIES) else { return Ok((0, 0)) };
        let bodies = Fetched { from: &from, head: addition.from, records: &plan.origin };
        match to.apply(&Step::Mailbox(Box::new(plan.update)), &bodies) {
            Ok(()) => return Ok((plan.origin.len(), plan.flags)),
            Err(error @ (ReplicaError::Changed(_) | ReplicaError::Locked(_))) => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| ReplicaError::Changed(addition.name.to_string())))
}

struct Plan {
    update: MailboxUpdate,
    /// New UID → the record on the other side.
    origin: BTreeMap<Uid, Record>,
    flags: usize,
}

/// `None` when there is nothing to be done. `strict`: with all that lets the replica find out that it has changed.
fn plan(full: &MailboxView, addition: &Addition<'_>, caps: &Capabilities, strict: bool) -> Option<Plan> {
    let records = full.records.clone().unwrap_or_default();
    let have: BTreeSet<_> = records.iter().filter(|record| !record.is_expunged()).map(|record| record.guid).collect();
    let mut table = full.user_flags.clone();
    let bits: Vec<UserFlags> = addition.user_flags.iter().map(|name| slot(&mut table, name.as_ref())).collect();
    let moved = |flags: UserFlags| {
        bits.iter().enumerate().filter(|(bit, _)| flags >> bit & 1 == 1).fold(0, |all, (_, slot)| all | slot)
    };
    let modseq = ModSeq(full.head.highestmodseq.0.saturating_add(1));
    let mut uid = full.head.last_uid.max(addition.above);
    let mut origin = BTreeMap::new();
    let mut changed = Vec::new();
    for record in addition.flags {
        let found = records.iter().find(|have| have.uid == record.uid && have.guid == record.guid);
        let Some(found) = found.filter(|have| !have.is_expunged()) else { continue };
        let (system, user) = (record.system_flags.0 & SystemFlags::REPLICATED, moved(record.user_flags));
        if (found.system_flags.0 & SystemFlags::REPLICATED, found.user_flags) != (system, user) {
            changed.push(Record { system_flags: SystemFlags(system), user_flags: user, modseq, ..found.clone() });
        }
    }
    let flags = changed.len();
    let mut head = full.head.clone();
    for record in addition.messages.iter().filter(|record| !have.contains(&record.guid)) {
        uid = Uid(uid.0.checked_add(1)?);
        let mut new = Record {
            uid,
            modseq,
            createdmodseq: modseq,
            user_flags: moved(record.user_flags),
            system_flags: SystemFlags(record.system_flags.0 & SystemFlags::REPLICATED),
            ..record.clone()
        };
        new.annotations.iter_mut().for_each(|annotation| annotation.modseq = modseq);
        head.last_appenddate = head.last_appenddate.max(record.internaldate);
        origin.insert(uid, record.clone());
        changed.push(new);
    }
    if changed.is_empty() {
        return None;
    }
    head.last_uid = uid;
    head.highestmodseq = modseq;
    let mut all: BTreeMap<Uid, Record> = records.into_iter().map(|record| (record.uid, record)).collect();
    all.extend(changed.iter().map(|record| (record.uid, record.clone())));
    let mut snapshot = MailboxSnapshot {
        head: head.clone(),
        user_flags: table.clone(),
        records: all.into_values().collect(),
        ..MailboxSnapshot::default()
    };
    diff::reduce(&mut snapshot, caps);
    let known = full.crc_basic.zip(full.crc_annot).filter(|_| strict && caps.checks_since);
    let since = known.map(|(basic, annot)| Since { modseq: full.head.highestmodseq, crcs: SyncCrcs { basic, annot } });
    // A server that has miscounted its own sums before would refuse every update; 0 says that they are not known.
    let crcs = if strict { diff::crcs(&snapshot, caps) } else { SyncCrcs::default() };
    let bodies =
        origin.iter().map(|(uid, record)| BodyRef { uid: *uid, guid: record.guid, size: record.size, copied: false });
    let bodies = bodies.collect();
    let wanted: BTreeSet<Uid> = changed.iter().map(|record| record.uid).collect();
    snapshot.records.retain(|record| wanted.contains(&record.uid));
    let update = MailboxUpdate {
        head,
        crcs,
        since,
        user_flags: table,
        annotations: full.annotations.clone(),
        records: snapshot.records,
        bodies,
        reserve_from: Vec::new(),
        create: false,
    };
    Some(Plan { update, origin, flags })
}

/// The bit of a flag in `table`, which gets it where it has not; none where there is no room.
fn slot(table: &mut Vec<Option<FlagName>>, name: Option<&FlagName>) -> UserFlags {
    let Some(name) = name else { return 0 };
    let same = |other: &FlagName| other.as_bytes().eq_ignore_ascii_case(name.as_bytes());
    let found = table.iter().position(|slot| slot.as_ref().is_some_and(same));
    let at = found.or_else(|| table.iter().position(Option::is_none)).unwrap_or(table.len());
    if at >= UserFlags::BITS as usize {
        return 0;
    }
    if at == table.len() {
        table.push(None);
    }
    if let Some(slot) = table.get_mut(at).filter(|slot| slot.is_none()) {
        *slot = Some(name.clone());
    }
    1 << at
}

/// Bytes of messages that another side gives back.
struct Fetched<'a, 'b> {
    from: &'a Mutex<&'b mut dyn Replica>,
    head: &'a MailboxHead,
    records: &'a BTreeMap<Uid, Record>,
}

impl BodySource for Fetched<'_, '_> {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        let missing = |why: String| {
            StoreError::new(Disposition::RetrySoon, format!("message of {} UID {}: {why}", self.head.name, body.uid.0))
        };
        let record = self.records.get(&body.uid).ok_or_else(|| missing("is not asked for".into()))?;
        let mut from = self.from.lock().unwrap_or_else(PoisonError::into_inner);
        match from.message(self.head, record) {
            Ok(Some(found)) => Ok(found),
            Ok(None) => Err(missing("is not given back".into())),
            Err(error) => Err(missing(error.to_string())),
        }
    }
}

/// Makes a mailbox that only the other side has.
pub fn create(
    to: &mut dyn Replica,
    caps: &Capabilities,
    view: &MailboxView,
    messages: &[Record],
    from: &mut dyn Replica,
) -> Result<usize, ReplicaError> {
    let mut snapshot = MailboxSnapshot {
        head: view.head.clone(),
        user_flags: view.user_flags.clone(),
        annotations: view.annotations.clone(),
        records: messages.to_vec(),
        ..MailboxSnapshot::default()
    };
    diff::reduce(&mut snapshot, caps);
    let origin: BTreeMap<Uid, Record> = messages.iter().map(|record| (record.uid, record.clone())).collect();
    let update = MailboxUpdate {
        head: view.head.clone(),
        crcs: diff::crcs(&snapshot, caps),
        since: None,
        user_flags: snapshot.user_flags,
        annotations: snapshot.annotations,
        bodies: diff::wanted_bodies(&snapshot.records, Uid(0)).collect(),
        records: snapshot.records,
        reserve_from: Vec::new(),
        create: true,
    };
    let from = Mutex::new(from);
    to.apply(&Step::Mailbox(Box::new(update)), &Fetched { from: &from, head: &view.head, records: &origin })?;
    Ok(messages.len())
}

/// Takes the messages of a mailbox that was put aside (`NAME.replica-only-HASH`) back into the mailbox it was put aside from,
/// and removes it when each of them is there. How many came.
pub fn take_back(
    session: &mut dyn Replica,
    second: &mut dyn Replica,
    caps: &Capabilities,
    aside: &MboxName,
    above: Uid,
) -> Result<usize, ReplicaError> {
    let (Some(full), Some(name)) = (session.view_full(aside)?, put_aside_from(aside)) else { return Ok(0) };
    let Some(into) = session.view_mailboxes(std::slice::from_ref(&name))?.pop() else { return Ok(0) };
    // Only what we made ourselves is removed: its uniqueid begins as its name ends.
    let id = full.head.uniqueid.clone();
    if !aside.as_bytes().ends_with(id.as_bytes().get(..8).unwrap_or(b"?")) {
        return Ok(0);
    }
    let messages: Vec<Record> = full.records.iter().flatten().filter(|record| !record.is_expunged()).cloned().collect();
    let addition = Addition {
        name: &name,
        uniqueid: &into.head.uniqueid,
        user_flags: &full.user_flags,
        messages: &messages,
        flags: &[],
        above,
        from: &full.head,
    };
    let (count, _) = add(session, caps, &addition, second)?;
    let there = session.view_full(&name)?.and_then(|view| view.records).unwrap_or_default();
    let alive: BTreeSet<_> = there.iter().filter(|record| !record.is_expunged()).map(|record| record.guid).collect();
    if messages.iter().all(|record| alive.contains(&record.guid)) {
        session.apply(&Step::Remove { uniqueid: id, name: aside.clone() }, &NoBodies)?;
    }
    Ok(count)
}

const ASIDE: &[u8] = b".replica-only-";

/// The mailbox that one was put aside from, by its name.
pub fn put_aside_from(aside: &MboxName) -> Option<MboxName> {
    let bytes = aside.as_bytes();
    let at = bytes.len().checked_sub(8 + ASIDE.len())?;
    let (name, rest) = bytes.split_at_checked(at)?;
    let hash = rest.strip_prefix(ASIDE)?;
    hash.iter().all(u8::is_ascii_hexdigit).then(|| MboxName::new(name))
}

/// A name beside this one for what only the replica has.
pub(super) fn aside_name(name: &MboxName, hash: &str) -> MboxName {
    [name.as_bytes(), ASIDE, hash.get(..8).unwrap_or("00000000").as_bytes()].concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MessageGuid;

    #[test]
    fn names_beside_a_mailbox_are_known_again() {
        let name = MboxName::new("user.a.x");
        let aside = aside_name(&name, "0123456789abcdef");
        assert_eq!(aside, MboxName::new("user.a.x.replica-only-01234567"));
        assert_eq!(put_aside_from(&aside), Some(name));
        for other in ["user.a", "user.a.replica-only-0123", "user.a.replica-only-0123456z", ".replica-only-"] {
            assert_eq!(put_aside_from(&MboxName::new(other)), None, "{other}");
        }
    }

    fn record(uid: u32, guid: u8, modseq: u64) -> Record {
        Record { uid: Uid(uid), guid: MessageGuid([guid; 20]), modseq: ModSeq(modseq), size: 5, ..Record::default() }
    }

    #[test]
    fn messages_get_uids_above_both_sides_and_come_once() {
        let caps = super::super::fake::CAPS;
        let flag = |name: &str| Some(FlagName::from(name));
        let head = MailboxHead {
            uniqueid: "id".into(),
            name: "user.a".into(),
            last_uid: Uid(4),
            highestmodseq: ModSeq(9),
            ..MailboxHead::default()
        };
        let gone = Record { system_flags: SystemFlags(SystemFlags::EXPUNGED), ..record(3, 3, 8) };
        let mut full = MailboxView {
            head: head.clone(),
            crc_basic: Some(1),
            crc_annot: Some(2),
            user_flags: vec![flag("a"), None],
            records: Some(vec![record(1, 1, 2), record(2, 2, 9), gone]),
            ..MailboxView::default()
        };
        let marked = Record { user_flags: 0b10, ..record(5, 50, 7) };
        let flagged = Record { system_flags: SystemFlags(SystemFlags::SEEN), user_flags: 0b01, ..record(1, 1, 12) };
        let (messages, flags) = ([record(4, 2, 3), marked, record(6, 3, 7)], [flagged, record(9, 9, 9)]);
        let table = [flag("A"), flag("b")];
        let addition = Addition {
            name: &head.name,
            uniqueid: &head.uniqueid,
            user_flags: &table,
            messages: &messages,
            flags: &flags,
            above: Uid(7),
            from: &head,
        };
        let made = plan(&full, &addition, &caps, true).expect("something to do");
        // The second is there already, the last was deleted there and comes again.
        let uids: Vec<(u32, u8)> = made.origin.iter().map(|(uid, record)| (uid.0, record.guid.0[0])).collect();
        assert_eq!(uids, [(8, 50), (9, 3)]);
        let update = made.update;
        assert_eq!((update.head.last_uid, update.head.highestmodseq), (Uid(9), ModSeq(10)));
        assert_eq!(update.user_flags, [flag("a"), flag("b")]);
        let shown: Vec<_> =
            update.records.iter().map(|one| (one.uid.0, one.user_flags, one.system_flags.0, one.modseq.0)).collect();
        assert_eq!(shown, [(1, 1, SystemFlags::SEEN, 10), (8, 0b10, 0, 10), (9, 0, 0, 10)]);
        let mut all: BTreeMap<Uid, Record> =
            full.records.take().expect("records").into_iter().map(|record| (record.uid, record)).collect();
        all.extend(update.records.into_iter().map(|record| (record.uid, record)));
        let after = MailboxView {
            head: update.head,
            user_flags: update.user_flags,
            records: Some(all.into_values().collect()),
            ..full
        };
        assert!(plan(&after, &addition, &caps, true).is_none(), "a second time nothing is left");
    }
}
