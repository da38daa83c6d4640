//! Two stores that may both have been worked on, compared record by record: what is here (in the store that is read), what is
//! there (on the replica), what both have otherwise. Nothing is changed on either.

use super::account;
use super::names::entries_in;
use super::queue::Lane;
use super::verify::VerifyError;
use super::{diff, scripts};
use crate::model::{
    AccountView, Capabilities, FlagName, Listing, MailStore, MailboxEntry, MailboxSnapshot, MailboxView, MboxName,
    Record, Replica, SieveName, StoreError, SystemFlags, UniqueId, UserId, UserMeta,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

/// Who has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Here,
    There,
    /// Both, and not alike.
    Both,
}

/// One thing that is not the same on both sides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mismatch {
    pub lane: String,
    pub object: String,
    pub side: Side,
    pub what: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Here => "only here ",
            Side::There => "only there",
            Side::Both => "differs   ",
        };
        write!(f, "{side} {}: {}", self.object, self.what)
    }
}

/// What the replica has of one mailbox and this side has not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Surplus {
    pub name: MboxName,
    pub uniqueid: UniqueId,
    /// The mailbox of this uniqueid is here as well.
    pub shared: bool,
    /// With head and flag table, without records.
    pub view: MailboxView,
    /// Live messages.
    pub only_there: Vec<Record>,
    /// Messages that both have, whose flags were changed there later than here.
    pub newer: Vec<Record>,
}

/// All that two sides do not have alike.
#[derive(Clone, Debug, Default)]
pub struct Sides {
    pub mismatches: Vec<Mismatch>,
    /// What cannot be read here, and so is not compared.
    pub unreadable: Vec<String>,
    pub surplus: Vec<Surplus>,
    pub subscriptions: Vec<(UserId, MboxName)>,
    /// Scripts that are not here, with their texts; one that has another text here is called `NAME.replica-only`.
    pub scripts: Vec<(UserId, SieveName, Vec<u8>)>,
}

/// Compares `lanes`: those of both lists, where the other one can be had.
pub fn sides(
    store: &dyn MailStore,
    session: &mut dyn Replica,
    caps: &Capabilities,
    lanes: &BTreeSet<Lane>,
    names_there: &[MboxName],
) -> Result<Sides, VerifyError> {
    let source = store.listing()?;
    let mut comparison = Comparison { store, session, caps, source, names_there, found: Sides::default() };
    for lane in lanes {
        match lane {
            Lane::Server => comparison.server()?,
            _ => comparison.lane(lane)?,
        }
    }
    let left_out = comparison.source.unreadable.iter().map(|left_out| left_out.to_string());
    comparison.found.unreadable.extend(left_out);
    Ok(comparison.found)
}

struct Comparison<'a> {
    store: &'a dyn MailStore,
    session: &'a mut dyn Replica,
    caps: &'a Capabilities,
    source: Arc<Listing>,
    names_there: &'a [MboxName],
    found: Sides,
}

impl Comparison<'_> {
    fn differ(&mut self, lane: &Lane, object: impl ToString, side: Side, what: impl ToString) {
        let (object, what) = (object.to_string(), what.to_string());
        self.found.mismatches.push(Mismatch { lane: lane.to_string(), object, side, what });
    }

    fn lane(&mut self, lane: &Lane) -> Result<(), VerifyError> {
        let prefix = self.store.deleted_prefix();
        let entries: Vec<_> = entries_in(&self.source, lane, prefix).into_iter().cloned().collect();
        let theirs = self.names_there.iter().filter(|name| Lane::of(name, prefix) == *lane).cloned();
        let view = match lane {
            Lane::User(user) => {
                let names = || entries.iter().map(|entry| entry.name.clone()).chain(theirs).collect();
                account::view_user(self.session, self.caps, user, names)?
            }
            _ => {
                let names: BTreeSet<MboxName> = entries.iter().map(|entry| entry.name.clone()).chain(theirs).collect();
                let mailboxes = self.session.view_mailboxes(&names.into_iter().collect::<Vec<_>>())?;
                AccountView { mailboxes, ..AccountView::default() }
            }
        };
        let mut views: BTreeMap<UniqueId, MailboxView> =
            view.mailboxes.into_iter().map(|view| (view.head.uniqueid.clone(), view)).collect();
        for entry in entries {
            let theirs = views.remove(&entry.uniqueid).filter(|theirs| !theirs.head.mbtype.is_intermediate());
            if self.is_passed_over(entry.mbtype.is_sieve()) {
                continue;
            }
            if entry.mbtype.is_intermediate() {
                // A name here, and a mailbox there.
                if let Some(theirs) = theirs {
                    self.mailbox_there(lane, theirs)?;
                }
                continue;
            }
            let snapshot = match self.store.mailbox(&entry) {
                Ok(Some(snapshot)) => snapshot,
                Ok(None) => continue,
                Err(error) => {
                    self.found.unreadable.push(format!("{}: cannot be read: {error}", entry.name));
                    continue;
                }
            };
            match theirs {
                Some(theirs) => self.mailbox(lane, &entry, snapshot, theirs)?,
                None => self.only_here(lane, &entry.name, &snapshot),
            }
        }
        for (id, theirs) in views {
            let passed_over =
                theirs.head.mbtype.is_intermediate() || self.is_passed_over(theirs.head.mbtype.is_sieve());
            if !passed_over && self.source.by_id(&id).is_none() {
                self.mailbox_there(lane, theirs)?;
            }
        }
        match lane {
            Lane::User(user) => self.meta(lane, user, &view.meta),
            _ => Ok(()),
        }
    }

    fn is_passed_over(&self, is_sieve: bool) -> bool {
        is_sieve && !self.caps.sieve_mailboxes
    }

    fn only_here(&mut self, lane: &Lane, name: &MboxName, snapshot: &MailboxSnapshot) {
        self.differ(lane, name, Side::Here, "mailbox");
        for record in snapshot.records.iter().filter(|record| !record.is_expunged()) {
            self.differ(lane, uid_of(name, record), Side::Here, record.guid);
        }
    }

    fn mailbox_there(&mut self, lane: &Lane, view: MailboxView) -> Result<(), VerifyError> {
        let name = view.head.name.clone();
        let here = self.source.by_name(&name).filter(|entry| !entry.mbtype.is_intermediate());
        let said = match (here, self.source.is_tombstone(&view.head.uniqueid)) {
            (Some(_), _) => "mailbox of a name that another one has here",
            (None, true) => "mailbox, deleted here",
            (None, false) => "mailbox",
        };
        self.differ(lane, &name, Side::There, said);
        let Some(full) = self.session.view_full(&name)? else { return Ok(()) };
        let only_there: Vec<Record> =
            full.records.iter().flatten().filter(|record| !record.is_expunged()).cloned().collect();
        for record in &only_there {
            self.differ(lane, uid_of(&name, record), Side::There, record.guid);
        }
        let view = MailboxView { records: None, ..full };
        let uniqueid = view.head.uniqueid.clone();
        self.found.surplus.push(Surplus { name, uniqueid, shared: false, view, only_there, newer: Vec::new() });
        Ok(())
    }

    fn mailbox(
        &mut self,
        lane: &Lane,
        entry: &MailboxEntry,
        mut snapshot: MailboxSnapshot,
        theirs: MailboxView,
    ) -> Result<(), VerifyError> {
        diff::reduce(&mut snapshot, self.caps);
        let (name, there) = (&entry.name, theirs.head.name.clone());
        if there != *name {
            self.differ(lane, name, Side::Both, format_args!("is called {there} there"));
        }
        for field in diff::head_differences(&snapshot, &theirs) {
            // The others follow from the records.
            if matches!(field, "UIDVALIDITY" | "OPTIONS" | "ACL" | "ANNOTATIONS") {
                self.differ(lane, name, Side::Both, field);
            }
        }
        let crcs = diff::crcs(&snapshot, self.caps);
        let same_records = theirs.crc_basic == Some(crcs.basic)
            && (crcs.annot == 0 || theirs.crc_annot.is_none_or(|annot| annot == crcs.annot))
            && theirs.head.last_uid == snapshot.head.last_uid;
        if same_records {
            return Ok(());
        }
        let Some(full) = self.session.view_full(&there)?.filter(|full| full.head.uniqueid == entry.uniqueid) else {
            return Ok(());
        };
        let records = full.records.clone().unwrap_or_default();
        let have: HashMap<_, &Record> = records.iter().map(|record| (record.uid, record)).collect();
        let mut newer = Vec::new();
        for record in &snapshot.records {
            let here = !record.is_expunged();
            let object = uid_of(name, record);
            match have.get(&record.uid) {
                None if here => self.differ(lane, object, Side::Here, record.guid),
                None => {}
                Some(other) if other.is_expunged() && !here => {}
                Some(other) if other.guid != record.guid => {
                    if here {
                        self.differ(lane, &object, Side::Here, record.guid);
                    }
                    if !other.is_expunged() {
                        self.differ(lane, &object, Side::There, other.guid);
                    }
                }
                Some(other) if here && other.is_expunged() => self.differ(lane, object, Side::Both, "deleted there"),
                Some(_) if !here => self.differ(lane, object, Side::Both, "deleted here"),
                Some(other) => {
                    let fields = diff::record_differences((record, &snapshot.user_flags), (other, &full.user_flags));
                    if fields.contains(&"FLAGS") {
                        let later = if other.modseq > record.modseq { "there" } else { "here" };
                        let (mine, theirs) =
                            (flags_of(record, &snapshot.user_flags), flags_of(other, &full.user_flags));
                        let what = format!("flags: here {mine}, there {theirs}, changed {later} last");
                        self.differ(lane, object, Side::Both, what);
                        newer.extend((other.modseq > record.modseq).then(|| (*other).clone()));
                    } else if fields.iter().any(|field| !matches!(*field, "MODSEQ" | "LAST_UPDATED")) {
                        self.differ(lane, object, Side::Both, fields.join(", "));
                    }
                }
            }
        }
        let known: BTreeSet<_> = snapshot.records.iter().map(|record| record.uid).collect();
        for other in records.iter().filter(|record| !record.is_expunged() && !known.contains(&record.uid)) {
            self.differ(lane, uid_of(name, other), Side::There, other.guid);
        }
        let only_there = diff::only_there(&snapshot, &records);
        if !only_there.is_empty() || !newer.is_empty() {
            let view = MailboxView { records: None, ..full };
            let (name, uniqueid) = (name.clone(), entry.uniqueid.clone());
            self.found.surplus.push(Surplus { name, uniqueid, shared: true, view, only_there, newer });
        }
        Ok(())
    }

    fn meta(&mut self, lane: &Lane, user: &UserId, theirs: &UserMeta) -> Result<(), VerifyError> {
        let mine = match self.source.by_name(&user.inbox()).filter(|inbox| !inbox.mbtype.is_intermediate()) {
            Some(_) => scripts::user_meta(self.store, self.caps, user)?,
            None => UserMeta::default(),
        };
        for name in mine.subs.difference(&theirs.subs) {
            self.differ(lane, format_args!("subscription {name}"), Side::Here, user);
        }
        for name in theirs.subs.difference(&mine.subs) {
            self.differ(lane, format_args!("subscription {name}"), Side::There, user);
            self.found.subscriptions.push((user.clone(), name.clone()));
        }
        if self.store.sieve_in_mailboxes() && self.caps.sieve_mailboxes {
            return Ok(());
        }
        for (name, script) in &mine.sieve {
            match theirs.sieve.get(name) {
                None => self.differ(lane, format_args!("sieve script {name}"), Side::Here, user),
                Some(other) if other.guid != script.guid => {
                    self.differ(lane, format_args!("sieve script {name}"), Side::Both, user);
                    let aside = SieveName::new([name.as_bytes(), b".replica-only"].concat());
                    if !theirs.sieve.contains_key(&aside) {
                        let text = self.session.script(user, name)?;
                        self.found.scripts.extend(text.map(|text| (user.clone(), aside, text)));
                    }
                }
                Some(_) => {}
            }
        }
        for name in theirs.sieve.keys().filter(|name| !mine.sieve.contains_key(*name)) {
            self.differ(lane, format_args!("sieve script {name}"), Side::There, user);
            let text = self.session.script(user, name)?;
            self.found.scripts.extend(text.map(|text| (user.clone(), name.clone(), text)));
        }
        Ok(())
    }

    fn server(&mut self) -> Result<(), VerifyError> {
        let (mine, theirs) = (self.store.server_annotations()?, self.session.view_server_annotations()?);
        for step in diff::diff_server_annotations(&mine, &theirs) {
            let (entry, side) = match &step {
                crate::model::Step::ServerAnnotation(annotation) => (&annotation.entry, Side::Here),
                crate::model::Step::RemoveServerAnnotation { entry, .. } => (entry, Side::There),
                _ => continue,
            };
            let entry = String::from_utf8_lossy(entry).into_owned();
            self.differ(&Lane::Server, entry, side, "server annotation");
        }
        Ok(())
    }
}

/// Every lane of a store.
pub fn lanes(store: &dyn MailStore) -> Result<BTreeSet<Lane>, StoreError> {
    let prefix = store.deleted_prefix();
    let mut lanes: BTreeSet<Lane> = store.listing()?.entries().map(|entry| Lane::of(&entry.name, prefix)).collect();
    lanes.insert(Lane::Server);
    Ok(lanes)
}

fn uid_of(name: &MboxName, record: &Record) -> String {
    format!("{name} UID {}", record.uid.0)
}

fn flags_of(record: &Record, names: &[Option<FlagName>]) -> String {
    const SYSTEM: [(u32, &str); 5] = [
        (SystemFlags::ANSWERED, "\\answered"),
        (SystemFlags::FLAGGED, "\\flagged"),
        (SystemFlags::DELETED, "\\deleted"),
        (SystemFlags::DRAFT, "\\draft"),
        (SystemFlags::SEEN, "\\seen"),
    ];
    let system = SYSTEM.iter().filter(|(bit, _)| record.system_flags.has(*bit)).map(|(_, name)| (*name).to_owned());
    let user = diff::flag_names(record, names).into_iter().map(|name| String::from_utf8_lossy(&name).into_owned());
    format!("({})", system.chain(user).collect::<Vec<_>>().join(" "))
}
