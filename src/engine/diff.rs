//! Snapshot × what the replica has → steps. Pure: no I/O, no clock.
//!
//! The everyday way is `diff_mailbox`: everything above the replica's modseq and UID, nothing else. What it cannot
//! express (the replica is ahead, records vanished unheard) goes through `repair`, which looks at every record of both
//! sides and never asks the source to change: modseqs of the replica are *lifted* instead.

use crate::cyrus::synccrc;
use crate::model::{
    AnnotCrc, Annotation, BodyRef, Capabilities, FENCE, FlagName, MailboxSnapshot, MailboxUpdate, MailboxView,
    MboxName, ModSeq, QuotaLimits, Record, SeenState, Since, Step, SyncCrcs, SystemFlags, Uid, UniqueId, UserId,
    UserMeta, UserPart,
};
use crate::state::Lift;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// What an ordinary comparison of one mailbox comes to.
#[derive(Debug)]
pub enum MailboxDiff {
    Same,
    Update(Box<MailboxUpdate>),
    /// The modseqs do not tell; both sides have to be compared record by record.
    Repair(&'static str),
}

/// What a record-by-record comparison comes to.
#[derive(Debug)]
pub enum Repair {
    /// Nothing that only the replica has is lost by this: surplus records the source once had are marked expunged,
    /// everything else is brought in line at modseqs above the replica's.
    Lift { expunge: Vec<Uid>, update: Box<MailboxUpdate>, lift: Option<Lift> },
    /// The replica's mailbox cannot take the source's content (GUID conflict, UIDs beyond the source's, a message
    /// expunged there but alive here, a higher uidvalidity). It has to be made anew; `only_there` are live messages that
    /// exist on the replica alone and must be kept.
    Rebuild { reason: String, only_there: Vec<Record> },
}

/// The checksums a replica with these capabilities computes for this content.
pub fn crcs(snapshot: &MailboxSnapshot, caps: &Capabilities) -> SyncCrcs {
    let basic = synccrc::basic(&snapshot.records, &snapshot.user_flags);
    let annot = match annot_rule(caps.annot_crc) {
        Some(rule) => synccrc::annot(&snapshot.records, rule),
        None => 0,
    };
    SyncCrcs { basic, annot }
}

/// The rule by which such a replica computes the annotation checksum; `None` where it has none.
pub fn annot_rule(kind: AnnotCrc) -> Option<synccrc::AnnotRule> {
    match kind {
        AnnotCrc::None => None,
        AnnotCrc::Old => Some(synccrc::AnnotRule { start: 0, thrid: true, savedate: false, createdmodseq: false }),
        AnnotCrc::New => {
            Some(synccrc::AnnotRule { start: 12_345_678, thrid: true, savedate: true, createdmodseq: true })
        }
    }
}

/// The source's state as this replica is to see it: with the modseqs it was lifted to before.
pub fn apply_lift(snapshot: &mut MailboxSnapshot, lift: &Lift) {
    let shift = |modseq: ModSeq| ModSeq(modseq.0.saturating_add(lift.offset));
    for record in &mut snapshot.records {
        if record.modseq > lift.since {
            record.modseq = shift(record.modseq);
        } else if let Some(fixed) = lift.fixed.get(&record.uid) {
            record.modseq = *fixed;
        }
    }
    if snapshot.deletedmodseq > lift.since {
        snapshot.deletedmodseq = shift(snapshot.deletedmodseq);
    }
    snapshot.head.highestmodseq = shift(snapshot.head.highestmodseq);
    snapshot.head.foldermodseq = snapshot.head.foldermodseq.max(ModSeq(0));
}

/// Takes out of a snapshot what the replica cannot hold, so that both sides are compared by what both can say.
pub fn reduce(snapshot: &mut MailboxSnapshot, caps: &Capabilities) {
    if !caps.message_annotations {
        snapshot.records.iter_mut().for_each(|record| record.annotations.clear());
    }
    if !caps.keeps_options {
        snapshot.head.pop3_show_after = 0;
    }
    if !caps.keeps_savedate {
        for record in &mut snapshot.records {
            record.savedate = 0;
            record.createdmodseq = ModSeq(0);
        }
    }
    for record in &mut snapshot.records {
        record.system_flags.0 &= SystemFlags::REPLICATED | SystemFlags::UNLINKED;
        for annotation in &mut record.annotations {
            if annotation.modseq == ModSeq(0) {
                annotation.modseq = record.modseq;
            }
        }
    }
}

/// The ordinary comparison: `view` is a receipt or what the replica just said; `snapshot` is lifted and reduced.
///
/// `base` is the modseq up to which the replica certainly has the source's changes. That is not its own HIGHESTMODSEQ: a
/// RENAME, or somebody else, raises that one over there without any change of ours having arrived.
pub fn diff_mailbox(
    snapshot: &MailboxSnapshot,
    view: Option<&MailboxView>,
    base: ModSeq,
    caps: &Capabilities,
    trust_view: bool,
) -> MailboxDiff {
    let crcs = crcs(snapshot, caps);
    let Some(view) = view else {
        return MailboxDiff::Update(Box::new(update(snapshot, crcs, None, snapshot.records.clone(), true)));
    };
    let (new, old) = (&snapshot.head, &view.head);
    if old.highestmodseq > new.highestmodseq || old.last_uid > new.last_uid || old.uidvalidity > new.uidvalidity {
        return MailboxDiff::Repair("the replica is ahead of the source");
    }
    if snapshot.deletedmodseq > base && old.last_uid > Uid(0) {
        return MailboxDiff::Repair("records were removed at the source before the replica heard of them");
    }
    let records: Vec<Record> =
        snapshot.records.iter().filter(|record| record.uid > old.last_uid || record.modseq > base).cloned().collect();
    if records.is_empty() && same_head(snapshot, view) && same_crcs(crcs, view) {
        return MailboxDiff::Same;
    }
    if records.is_empty() && new.highestmodseq == old.highestmodseq && !same_crcs(crcs, view) {
        return MailboxDiff::Repair("checksums differ at the same modseq");
    }
    let since = (trust_view && caps.checks_since && old.highestmodseq > ModSeq(0)).then(|| Since {
        modseq: old.highestmodseq,
        crcs: SyncCrcs { basic: view.crc_basic.unwrap_or(0), annot: view.crc_annot.unwrap_or(0) },
    });
    MailboxDiff::Update(Box::new(update(snapshot, crcs, since, records, false)))
}

/// An update that says the head again, and of records nothing.
pub fn head_update(snapshot: &MailboxSnapshot, caps: &Capabilities) -> MailboxUpdate {
    update(snapshot, crcs(snapshot, caps), None, Vec::new(), false)
}

fn same_crcs(crcs: SyncCrcs, view: &MailboxView) -> bool {
    let wild = |mine: u32, theirs: Option<u32>| theirs.is_none_or(|theirs| theirs == mine);
    wild(crcs.basic, view.crc_basic) && (crcs.annot == 0 || wild(crcs.annot, view.crc_annot))
}

/// Everything that replication carries besides records; the name and partition are the renames' business.
pub fn same_head(snapshot: &MailboxSnapshot, view: &MailboxView) -> bool {
    head_differences(snapshot, view).is_empty()
}

/// Names of the header fields that differ, as csync spells them.
pub fn head_differences(snapshot: &MailboxSnapshot, view: &MailboxView) -> Vec<&'static str> {
    let (new, old) = (&snapshot.head, &view.head);
    let both = |mine: ModSeq, theirs: ModSeq| mine == theirs || mine == ModSeq(0) || theirs == ModSeq(0);
    let fields = [
        ("UIDVALIDITY", new.uidvalidity == old.uidvalidity),
        ("LAST_UID", new.last_uid == old.last_uid),
        ("HIGHESTMODSEQ", new.highestmodseq == old.highestmodseq),
        ("RECENTUID", new.recentuid == old.recentuid),
        ("RECENTTIME", new.recenttime == old.recenttime),
        ("POP3_LAST_LOGIN", new.pop3_last_login == old.pop3_last_login),
        ("POP3_SHOW_AFTER", new.pop3_show_after == old.pop3_show_after),
        ("OPTIONS", new.options == old.options),
        ("MBOXTYPE", new.mbtype == old.mbtype),
        ("ACL", new.acl == old.acl),
        ("FOLDERMODSEQ", both(new.foldermodseq, old.foldermodseq)),
        ("ANNOTATIONS", same_annotations(&snapshot.annotations, &view.annotations)),
    ];
    fields.into_iter().filter(|(_, same)| !same).map(|(field, _)| field).collect()
}

fn same_annotations(mine: &[Annotation], theirs: &[Annotation]) -> bool {
    mine.len() == theirs.len() && mine.iter().zip(theirs).all(|(mine, theirs)| mine.content() == theirs.content())
}

fn update(
    snapshot: &MailboxSnapshot,
    crcs: SyncCrcs,
    since: Option<Since>,
    records: Vec<Record>,
    create: bool,
) -> MailboxUpdate {
    MailboxUpdate {
        head: snapshot.head.clone(),
        crcs,
        since,
        user_flags: snapshot.user_flags.clone(),
        annotations: snapshot.annotations.clone(),
        records,
        bodies: Vec::new(),
        reserve_from: Vec::new(),
        create,
    }
}

/// Bodies an update has to bring: those of records above the replica's last UID whose file should exist.
pub fn wanted_bodies(records: &[Record], after: Uid) -> impl Iterator<Item = BodyRef> + '_ {
    records.iter().filter(move |record| record.uid > after && !record.is_unlinked()).map(|record| BodyRef {
        uid: record.uid,
        guid: record.guid,
        size: record.size,
        copied: false,
    })
}

/// Cuts a large first transfer into a state that a replica can keep: the first `count` new records.
///
/// The intermediate HIGHESTMODSEQ lies below the modseq of everything that is still to come, so the rest is found by the
/// ordinary comparison afterwards. Records with a higher modseq are sent with the intermediate one and once more later.
pub fn first_part(
    snapshot: &MailboxSnapshot,
    view: Option<&MailboxView>,
    caps: &Capabilities,
    count: usize,
    bytes: u64,
) -> Option<MailboxUpdate> {
    let after = view.map_or(Uid(0), |view| view.head.last_uid);
    let floor = view.map_or(ModSeq(1), |view| view.head.highestmodseq);
    let mut total = 0u64;
    let new: Vec<&Record> = snapshot.records.iter().filter(|record| record.uid > after).collect();
    let cut = new
        .iter()
        .enumerate()
        .find(|(index, record)| {
            total = total.saturating_add(record.size);
            *index >= count || (total > bytes && *index > 0)
        })
        .map(|(index, _)| index)?;
    let last = new.get(cut.checked_sub(1)?)?.uid;
    let rest = new.get(cut..)?.iter().map(|record| record.modseq.0).min()?;
    let modseq = floor.max(ModSeq(rest.saturating_sub(1)));
    let mut part = snapshot.clone();
    part.records.retain(|record| record.uid <= last);
    // Old records the replica already has stay as they are there until the last part.
    let mut send: Vec<Record> = part.records.iter().filter(|record| record.uid > after).cloned().collect();
    for record in &mut send {
        record.modseq = record.modseq.min(modseq);
    }
    part.head.highestmodseq = modseq;
    part.head.last_uid = last;
    if let Some(view) = view {
        part.head.recentuid = view.head.recentuid;
        part.head.recenttime = view.head.recenttime;
        part.head.pop3_last_login = view.head.pop3_last_login;
    } else {
        part.head.recentuid = part.head.recentuid.min(last);
    }
    // The checksum of a half-way state is only known exactly when nothing but new records is in it.
    let exact = after == Uid(0);
    part.records = send.clone();
    let crcs = if exact { crcs(&part, caps) } else { SyncCrcs { basic: 0, annot: 0 } };
    Some(update(&part, crcs, None, send, view.is_none()))
}

type RecordContent<'a> = (
    u32,
    BTreeSet<Vec<u8>>,
    i64,
    i64,
    crate::model::MessageGuid,
    u64,
    i64,
    ModSeq,
    Vec<(&'a [u8], &'a UserId, &'a [u8])>,
);

fn record_content<'a>(record: &'a Record, names: &[Option<FlagName>]) -> RecordContent<'a> {
    (
        record.system_flags.0 & SystemFlags::REPLICATED,
        flag_names(record, names),
        record.last_updated,
        record.internaldate,
        record.guid,
        record.cid,
        record.savedate,
        record.createdmodseq,
        record.annotations.iter().map(Annotation::content).collect(),
    )
}

/// Names of the user flags set on a record, lower-cased as both sides compare them.
pub fn flag_names(record: &Record, names: &[Option<FlagName>]) -> BTreeSet<Vec<u8>> {
    names
        .iter()
        .enumerate()
        .filter(|(bit, _)| *bit < 128 && record.user_flags >> bit & 1 == 1)
        .filter_map(|(_, name)| name.as_ref())
        .map(|name| name.as_bytes().to_ascii_lowercase())
        .collect()
}

/// Names of the record fields that differ between two sides.
pub fn record_differences(
    mine: (&Record, &[Option<FlagName>]),
    theirs: (&Record, &[Option<FlagName>]),
) -> Vec<&'static str> {
    let (a, b) = (record_content(mine.0, mine.1), record_content(theirs.0, theirs.1));
    let fields = [
        ("MODSEQ", mine.0.modseq == theirs.0.modseq),
        ("FLAGS", a.0 == b.0 && a.1 == b.1),
        ("LAST_UPDATED", a.2 == b.2),
        ("INTERNALDATE", a.3 == b.3),
        ("GUID", a.4 == b.4),
        ("THRID", a.5 == b.5),
        ("SAVEDATE", a.6 == b.6),
        ("CREATEDMODSEQ", a.7 == b.7),
        ("ANNOTATIONS", a.8 == b.8),
    ];
    fields.into_iter().filter(|(_, same)| !same).map(|(field, _)| field).collect()
}

/// Record-by-record comparison with everything the replica has. `snapshot` is reduced but not lifted.
pub fn repair(snapshot: &MailboxSnapshot, full: &MailboxView, caps: &Capabilities) -> Repair {
    let theirs = full.records.as_deref().unwrap_or_default();
    let mine: HashMap<Uid, &Record> = snapshot.records.iter().map(|record| (record.uid, record)).collect();
    let have: HashMap<Uid, &Record> = theirs.iter().map(|record| (record.uid, record)).collect();
    if let Some(reason) = rebuild_reason(snapshot, full, &mine, theirs) {
        let only_there = only_there(snapshot, theirs);
        return Repair::Rebuild { reason, only_there };
    }
    let expunge: Vec<Uid> = theirs
        .iter()
        .filter(|record| !record.is_expunged() && !mine.contains_key(&record.uid))
        .map(|record| record.uid)
        .collect();

    let differs = |record: &Record| match have.get(&record.uid) {
        None => false,
        Some(other) if record.is_expunged() && other.is_expunged() => false,
        Some(other) => {
            other.modseq > record.modseq
                || record_content(record, &snapshot.user_flags) != record_content(other, &full.user_flags)
        }
    };
    // Where the source is ahead anyway, its own modseq is above everything the replica's clients have seen.
    let ahead = full.head.highestmodseq.max(snapshot.head.highestmodseq);
    let any = snapshot.records.iter().any(&differs) || !expunge.is_empty();
    let above = snapshot.head.highestmodseq > full.head.highestmodseq;
    let top = if any && !above { ModSeq(ahead.0.saturating_add(1)) } else { ahead };

    let mut lifted = snapshot.clone();
    let mut records = Vec::new();
    for record in &mut lifted.records {
        if differs(record) {
            // A change the replica has not seen yet keeps the source's own modseq.
            if record.modseq <= full.head.highestmodseq {
                record.modseq = top;
            }
            records.push(record.clone());
            continue;
        }
        match have.get(&record.uid) {
            // The checksum covers the modseq the replica will hold, which is its own where content is equal.
            Some(other) if record.is_expunged() == other.is_expunged() => record.modseq = other.modseq,
            Some(_) => {}
            None if record.uid > full.head.last_uid => records.push(record.clone()),
            None => {}
        }
    }
    lifted.head.highestmodseq = top;
    let fixed: BTreeMap<Uid, ModSeq> = lifted
        .records
        .iter()
        .filter(|record| mine.get(&record.uid).is_some_and(|own| own.modseq != record.modseq))
        .map(|record| (record.uid, record.modseq))
        .collect();
    let offset = top.0.saturating_sub(snapshot.head.highestmodseq.0);
    let lift = (offset > 0 || !fixed.is_empty()).then_some(Lift { since: snapshot.head.highestmodseq, offset, fixed });
    let crcs = crcs(&lifted, caps);
    Repair::Lift { expunge, update: Box::new(update(&lifted, crcs, None, records, false)), lift }
}

/// Live messages that the replica's mailbox has and the source's has not: neither alive nor known to have been deleted.
pub fn only_there(snapshot: &MailboxSnapshot, theirs: &[Record]) -> Vec<Record> {
    let ours: HashSet<_> =
        snapshot.records.iter().filter(|record| !record.is_expunged()).map(|record| record.guid).collect();
    let known: HashSet<_> = snapshot.records.iter().map(|record| (record.uid, record.guid)).collect();
    let is_only_there = |record: &&Record| {
        !record.is_expunged() && !ours.contains(&record.guid) && !known.contains(&(record.uid, record.guid))
    };
    theirs.iter().filter(is_only_there).cloned().collect()
}

fn rebuild_reason(
    snapshot: &MailboxSnapshot,
    full: &MailboxView,
    mine: &HashMap<Uid, &Record>,
    theirs: &[Record],
) -> Option<String> {
    if full.head.uidvalidity > snapshot.head.uidvalidity {
        return Some(format!(
            "its uidvalidity {} is above the source's {}",
            full.head.uidvalidity, snapshot.head.uidvalidity
        ));
    }
    if full.head.last_uid > snapshot.head.last_uid {
        return Some(format!(
            "it has UIDs up to {}, the source up to {}",
            full.head.last_uid.0, snapshot.head.last_uid.0
        ));
    }
    theirs
        .iter()
        .find_map(|other| {
            let own = mine.get(&other.uid);
            match own {
                Some(own) if own.guid != other.guid && !(own.is_expunged() && other.is_expunged()) => {
                    Some(format!("UID {} is another message there", other.uid.0))
                }
                Some(own) if other.is_expunged() && !own.is_expunged() => {
                    Some(format!("UID {} is expunged there but not at the source", other.uid.0))
                }
                _ => None,
            }
        })
        .or_else(|| {
            let have: HashSet<Uid> = theirs.iter().map(|record| record.uid).collect();
            let missing = snapshot.records.iter().find(|record| {
                !record.is_expunged() && record.uid <= full.head.last_uid && !have.contains(&record.uid)
            })?;
            Some(format!("UID {} is missing there below its last UID", missing.uid.0))
        })
}

/// Steps that bring a user's data outside mailboxes in line. `seen` is sent only for mailboxes in `known`.
pub fn diff_meta(
    user: &UserId,
    mine: &UserMeta,
    theirs: &UserMeta,
    parts: &BTreeSet<UserPart>,
    known: &dyn Fn(&UniqueId) -> bool,
) -> Vec<Step> {
    let mut steps = Vec::new();
    if parts.contains(&UserPart::Subs) {
        let step = |name: &MboxName| Step::Subscribe { user: user.clone(), name: name.clone() };
        steps.extend(mine.subs.difference(&theirs.subs).map(step));
        let step = |name: &MboxName| Step::Unsubscribe { user: user.clone(), name: name.clone() };
        steps.extend(theirs.subs.difference(&mine.subs).map(step));
    }
    if parts.contains(&UserPart::Sieve) {
        for (name, script) in &mine.sieve {
            if theirs.sieve.get(name).is_none_or(|other| other.guid != script.guid) {
                steps.push(Step::SievePut {
                    user: user.clone(),
                    name: name.clone(),
                    last_update: script.last_update,
                    content: script.content.clone(),
                    compiled: script.compiled.clone(),
                });
            }
        }
        match &mine.active {
            // A script put anew may have lost its active mark on the replica.
            Some(active) => {
                let put = mine.sieve.get(active).map(|s| s.guid) != theirs.sieve.get(active).map(|s| s.guid);
                if put || theirs.active.as_ref() != Some(active) {
                    steps.push(Step::SieveActivate { user: user.clone(), name: active.clone() });
                }
            }
            None if theirs.active.is_some() => steps.push(Step::SieveDeactivate { user: user.clone() }),
            None => {}
        }
        for name in theirs.sieve.keys().filter(|name| !mine.sieve.contains_key(*name)) {
            steps.push(Step::SieveRemove { user: user.clone(), name: name.clone() });
        }
    }
    if parts.contains(&UserPart::Seen) {
        for (uniqueid, seen) in &mine.seen {
            if known(uniqueid) && theirs.seen.get(uniqueid) != Some(seen) {
                steps.push(Step::Seen { user: user.clone(), uniqueid: uniqueid.clone(), seen: seen.clone() });
            }
        }
        for uniqueid in read_only_there(mine, theirs).filter(|id| known(id)) {
            let seen = SeenState::default();
            steps.push(Step::Seen { user: user.clone(), uniqueid: uniqueid.clone(), seen });
        }
    }
    steps
}

/// Mailboxes of which the replica says that the user has read something, and the source has no value at all: left over
/// there from an account of the same name. No server has a request that takes a value away, so it is emptied.
fn read_only_there<'a>(mine: &'a UserMeta, theirs: &'a UserMeta) -> impl Iterator<Item = &'a UniqueId> {
    let left = theirs.seen.iter().filter(|(id, seen)| !seen.seenuids.is_empty() && !mine.seen.contains_key(*id));
    left.map(|(id, _)| id).filter(|_| !mine.seen_incomplete)
}

/// What the replica has of a user after those steps.
pub fn confirmed_meta(
    mine: &UserMeta,
    theirs: &UserMeta,
    parts: &BTreeSet<UserPart>,
    known: &dyn Fn(&UniqueId) -> bool,
) -> UserMeta {
    let mut out = theirs.clone();
    if parts.contains(&UserPart::Subs) {
        out.subs = mine.subs.clone();
    }
    if parts.contains(&UserPart::Sieve) {
        out.sieve = mine.sieve.clone();
        for script in out.sieve.values_mut() {
            (script.content, script.compiled) = (Vec::new(), Vec::new());
        }
        out.active = mine.active.clone();
    }
    if parts.contains(&UserPart::Seen) {
        let emptied = read_only_there(mine, theirs).map(|id| (id, SeenState::default()));
        let sent = emptied.chain(mine.seen.iter().map(|(id, seen)| (id, seen.clone())));
        // What was left out was not said, and is when its mailbox is known.
        out.seen.extend(sent.filter(|(id, _)| known(id)).map(|(id, seen)| (id.clone(), seen)));
    }
    out
}

/// Limits equal? Usage and modseq are the replica's own affair.
pub fn same_limits(mine: Option<&QuotaLimits>, theirs: Option<&QuotaLimits>) -> bool {
    mine.map(|quota| &quota.limits) == theirs.map(|quota| &quota.limits)
}

/// Steps for server annotations.
pub fn diff_server_annotations(mine: &[Annotation], theirs: &[Annotation]) -> Vec<Step> {
    // What says that a store was promoted is said of that store alone.
    let carried = |annotation: &&Annotation| annotation.entry != FENCE;
    let (mine, theirs) = (mine.iter().filter(carried), theirs.iter().filter(carried));
    let key = |annotation: &Annotation| (annotation.entry.clone(), annotation.userid.clone());
    let have: HashMap<_, _> = theirs.clone().map(|annotation| (key(annotation), &annotation.value)).collect();
    let want: HashSet<_> = mine.clone().map(key).collect();
    let set = mine.filter(|annotation| have.get(&key(annotation)) != Some(&&annotation.value));
    let gone = theirs.filter(|annotation| !want.contains(&key(annotation)));
    set.cloned()
        .map(Step::ServerAnnotation)
        .chain(gone.map(|annotation| Step::RemoveServerAnnotation {
            entry: annotation.entry.clone(),
            userid: annotation.userid.clone(),
        }))
        .collect()
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
