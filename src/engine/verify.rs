//! Both sides compared, mailbox by mailbox, through the replica's own words. Nothing is changed on either.

use super::held::{guid_of, why_not};
use super::pace::Pace;
use super::queue::Lane;
use super::scrub::Found;
use super::{account, diff, loss};
use crate::model::{
    Capabilities, Disposition, Listing, MailStore, MailboxEntry, MailboxSnapshot, MailboxView, MboxName, Replica,
    ReplicaError, StoreError, SystemFlags, Uid, UniqueId, UserPart,
};
use crate::state::ReplicaState;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// One thing that is not the same on both sides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Lane: `user alice`, `shared news`, `server`.
    pub lane: String,
    /// Mailbox, quota root or kind of user data.
    pub object: String,
    /// Field that differs, or `missing on the replica`, `only on the replica`.
    pub what: String,
    pub source: String,
    pub replica: String,
}

/// Result of a verification.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VerifyReport {
    pub mailboxes: usize,
    pub messages: usize,
    pub users: usize,
    pub differences: Vec<Difference>,
    /// Objects that could not be read at the source, with the reason.
    pub unreadable: Vec<(String, String)>,
    /// What the replica is too old to hold, by object; no difference.
    pub not_held: Vec<(String, String)>,
    /// Empty mailboxes that the replica has made by itself above one of the source's, with that one's name; no difference.
    pub made_there: Vec<(String, String)>,
    /// What the source holds and no replication carries; no difference.
    pub not_carried: Vec<(String, String)>,
    /// Of the source's message files.
    pub hashed_bytes: u64,
    /// Of message files that the replica gave back.
    pub fetched_bytes: u64,
}

/// Why a verification could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("{0}")]
    Store(#[from] crate::model::StoreError),
    #[error("{0}")]
    Replica(#[from] ReplicaError),
}

/// How far a verification looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depth {
    /// Records only where the checksums over them differ.
    #[default]
    Checksums,
    /// Every record of every mailbox.
    Records,
    /// And the source's message files are what their records say.
    Bodies,
    /// And what the replica gives back as those messages.
    BothBodies,
}

/// What is verified, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extent<'a> {
    /// All when `None`.
    pub lanes: Option<&'a [Lane]>,
    pub depth: Depth,
    /// Bytes of message files in a second, at most.
    pub rate: Option<u64>,
}

/// Compares the lanes (all when `None`); `progress` is called after each with how many are done of how many.
pub fn verify(
    store: &dyn MailStore,
    session: &mut dyn Replica,
    caps: &Capabilities,
    state: Option<&ReplicaState>,
    extent: Extent<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<VerifyReport, VerifyError> {
    let lanes = extent.lanes;
    let source = store.listing()?;
    let prefix = store.deleted_prefix();
    let mut all: BTreeSet<Lane> = source.entries().map(|entry| Lane::of(&entry.name, prefix)).collect();
    all.insert(Lane::Server);
    if let Some(lanes) = lanes {
        all = lanes.iter().cloned().collect();
    }
    let mut verifier = Verifier {
        store,
        session,
        caps,
        state,
        source,
        extent,
        pace: Pace::new(extent.rate),
        report: VerifyReport::default(),
    };
    let total = all.len();
    for (done, lane) in all.into_iter().enumerate() {
        verifier.lane(&lane)?;
        progress(done + 1, total);
    }
    let asked = |name: &MboxName| lanes.is_none_or(|lanes| lanes.contains(&Lane::of(name, prefix)));
    let left_out = verifier.source.unreadable.iter().filter(|left_out| asked(&left_out.name));
    let left_out = left_out.map(|left_out| (left_out.name.to_string(), left_out.reason.clone()));
    verifier.report.unreadable.extend(left_out);
    verifier.report.not_carried = store.not_carried()?;
    Ok(verifier.report)
}

struct Verifier<'a> {
    store: &'a dyn MailStore,
    session: &'a mut dyn Replica,
    caps: &'a Capabilities,
    state: Option<&'a ReplicaState>,
    source: Arc<Listing>,
    extent: Extent<'a>,
    pace: Pace,
    report: VerifyReport,
}

impl Verifier<'_> {
    fn differ(
        &mut self,
        lane: &Lane,
        object: impl ToString,
        what: impl ToString,
        source: impl ToString,
        replica: impl ToString,
    ) {
        self.report.differences.push(Difference {
            lane: lane.to_string(),
            object: object.to_string(),
            what: what.to_string(),
            source: source.to_string(),
            replica: replica.to_string(),
        });
    }

    fn lane(&mut self, lane: &Lane) -> Result<(), VerifyError> {
        if *lane == Lane::Server {
            return self.server(lane);
        }
        let prefix = self.store.deleted_prefix();
        let entries: Vec<_> = super::names::entries_in(&self.source, lane, prefix).into_iter().cloned().collect();
        let view = match lane {
            Lane::User(user) => {
                self.report.users += 1;
                let names = || entries.iter().map(|entry| entry.name.clone()).collect();
                account::view_user(self.session, self.caps, user, names)?
            }
            _ => {
                let names: Vec<MboxName> = entries.iter().map(|entry| entry.name.clone()).collect();
                let mailboxes = self.session.view_mailboxes(&names)?;
                crate::model::AccountView { mailboxes, ..Default::default() }
            }
        };
        let mut views: HashMap<UniqueId, MailboxView> =
            view.mailboxes.iter().map(|view| (view.head.uniqueid.clone(), view.clone())).collect();
        for entry in &entries {
            let theirs = views.remove(&entry.uniqueid);
            if entry.mbtype.is_intermediate() || entry.mbtype.is_sieve() && !self.caps.sieve_mailboxes {
                continue;
            }
            self.report.mailboxes += 1;
            let Some(theirs) = theirs else {
                self.differ(lane, &entry.name, "missing on the replica", &entry.uniqueid, "");
                continue;
            };
            if theirs.head.name != entry.name {
                self.differ(lane, &entry.name, "name", &entry.name, &theirs.head.name);
                continue;
            }
            let snapshot = match self.store.mailbox(entry) {
                Ok(Some(snapshot)) => snapshot,
                Ok(None) => continue,
                Err(error) => {
                    self.report.unreadable.push((entry.name.to_string(), error.to_string()));
                    continue;
                }
            };
            self.report.messages += snapshot.records.iter().filter(|record| !record.is_expunged()).count();
            self.mailbox(lane, entry, snapshot, &theirs)?;
        }
        let mut others: Vec<_> = views.into_iter().collect();
        others.sort_by(|(_, one), (_, other)| one.head.name.cmp(&other.head.name));
        for (id, view) in others {
            if view.head.mbtype.is_intermediate() || self.source.by_id(&id).is_some() {
                continue;
            }
            if let Some(below) = self.made_for(&view) {
                self.report.made_there.push((view.head.name.to_string(), below));
            } else {
                self.differ(lane, &view.head.name, "only on the replica", "", id);
            }
        }
        if let Lane::User(user) = lane {
            self.quotas(lane, &view.quotas)?;
            if self.source.by_name(&user.inbox()).is_some() {
                self.meta(lane, user, &view.meta)?;
            }
        }
        Ok(())
    }

    /// The mailbox of the source's that this one, which the source does not have, was made for. See `fill_in`.
    fn made_for(&self, view: &MailboxView) -> Option<String> {
        let name = &view.head.name;
        let can_be = view.head.last_uid == Uid(0) && name.owner().is_some() && !name.is_inbox();
        if !can_be || self.source.by_name(name).is_some() {
            return None;
        }
        let below = MboxName::new([name.as_bytes(), b"."].concat());
        self.source.beginning_with(below).next().map(|entry| entry.name.to_string())
    }

    fn mailbox(
        &mut self,
        lane: &Lane,
        entry: &MailboxEntry,
        mut snapshot: MailboxSnapshot,
        theirs: &MailboxView,
    ) -> Result<(), VerifyError> {
        if let Some(lost) = loss::of_mailbox(&snapshot, self.caps) {
            self.report.not_held.push((snapshot.head.name.to_string(), lost));
        }
        diff::reduce(&mut snapshot, self.caps);
        let lift = self.state.and_then(|state| state.mailbox(&entry.uniqueid)).and_then(|receipt| receipt.lift);
        if let Some(lift) = &lift {
            diff::apply_lift(&mut snapshot, lift);
        }
        let name = snapshot.head.name.clone();
        let fields = diff::head_differences(&snapshot, theirs);
        for field in &fields {
            let (mine, other) = (field_text(&snapshot, field), view_text(theirs, field));
            if *field == "OPTIONS" && !self.caps.keeps_options {
                let text =
                    format!("changed options: source {mine:?}, replica {other:?}, as the mailbox was made there");
                self.report.not_held.push((name.to_string(), text));
                continue;
            }
            self.differ(lane, &name, field, mine, other);
        }
        let crcs = diff::crcs(&snapshot, self.caps);
        let same = theirs.crc_basic.is_none_or(|theirs| theirs == crcs.basic)
            && (crcs.annot == 0 || theirs.crc_annot.is_none_or(|theirs| theirs == crcs.annot));
        if same && self.extent.depth == Depth::Checksums {
            return Ok(());
        }
        if self.extent.depth >= Depth::Bodies {
            self.bodies(lane, entry, &snapshot, theirs)?;
        }
        let Some(full) = self.session.view_full(&name)? else { return Ok(()) };
        let mut have: BTreeMap<_, _> = full.records.iter().flatten().map(|record| (record.uid, record)).collect();
        for record in &snapshot.records {
            match have.remove(&record.uid) {
                None if record.is_expunged() => {}
                None => {
                    let bodies = self.store.bodies(entry)?;
                    if let Some(reason) = why_not(&*bodies, record) {
                        self.report.unreadable.push((format!("{name} UID {}", record.uid.0), reason));
                        continue;
                    }
                    self.differ(lane, format!("{name} UID {}", record.uid.0), "missing on the replica", record.guid, "")
                }
                Some(other) if record.is_expunged() && other.is_expunged() => {}
                Some(other) => {
                    for field in diff::record_differences((record, &snapshot.user_flags), (other, &full.user_flags)) {
                        let mine = record_text(record, &snapshot.user_flags, field);
                        let theirs = record_text(other, &full.user_flags, field);
                        self.differ(lane, format!("{name} UID {}", record.uid.0), field, mine, theirs);
                    }
                }
            }
        }
        for other in have.values().filter(|record| !record.is_expunged()) {
            self.differ(lane, format!("{name} UID {}", other.uid.0), "only on the replica", "", other.guid);
        }
        Ok(())
    }

    /// Hashes the message files of one mailbox.
    fn bodies(
        &mut self,
        lane: &Lane,
        entry: &MailboxEntry,
        snapshot: &MailboxSnapshot,
        theirs: &MailboxView,
    ) -> Result<(), VerifyError> {
        let bodies = self.store.bodies(entry)?;
        for record in snapshot.records.iter().filter(|record| !record.is_expunged()) {
            let object = format!("{} UID {}", entry.name, record.uid.0);
            match super::scrub::look(self.store, entry, &*bodies, record)? {
                Found::Whole => {}
                Found::Gone => continue,
                Found::Damaged(reason) => {
                    self.report.unreadable.push((object, reason));
                    continue;
                }
            }
            self.hashed(record.size);
            if self.extent.depth < Depth::BothBodies {
                continue;
            }
            let Some(body) = self.session.message(&theirs.head, record)? else {
                self.differ(lane, object, "message file missing on the replica", record.guid, "");
                continue;
            };
            let (guid, size) = guid_of(body.reader)
                .map_err(|error| StoreError::new(Disposition::RetrySoon, format!("{object}: {error}")))?;
            self.report.fetched_bytes += size;
            if guid != record.guid {
                self.differ(lane, object, "message file", record.guid, format!("{guid} ({size} bytes)"));
            }
        }
        Ok(())
    }

    /// Counts what was read, and waits where that was too fast.
    fn hashed(&mut self, bytes: u64) {
        self.report.hashed_bytes += bytes;
        let until = self.pace.spend(bytes);
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    }

    fn quotas(
        &mut self,
        lane: &Lane,
        theirs: &BTreeMap<crate::model::QuotaRoot, crate::model::QuotaLimits>,
    ) -> Result<(), VerifyError> {
        let prefix = self.store.deleted_prefix();
        let mut mine = BTreeMap::new();
        for root in super::names::roots_in(&self.store.quota_roots()?, lane, prefix) {
            if let Some(limits) = self.store.quota(&root)? {
                mine.insert(root, limits);
            }
        }
        for (root, limits) in &mut mine {
            let lost = loss::of_quota(limits, self.caps).map(|lost| (format!("quota root {root}"), lost));
            self.report.not_held.extend(lost);
            *limits = loss::reduced(limits, self.caps);
        }
        let roots: BTreeSet<_> = mine.keys().chain(theirs.keys()).cloned().collect();
        for root in roots {
            let there = match theirs.get(&root) {
                Some(limits) => Some(limits.clone()),
                None => self.session.view_quota(&root)?,
            };
            if !diff::same_limits(mine.get(&root), there.as_ref()) {
                let text = |quota: Option<&crate::model::QuotaLimits>| {
                    quota.map_or("no quota root".to_owned(), |quota| format!("{:?}", quota.limits))
                };
                self.differ(lane, format!("quota {root}"), "limits", text(mine.get(&root)), text(there.as_ref()));
            }
        }
        Ok(())
    }

    fn meta(
        &mut self,
        lane: &Lane,
        user: &crate::model::UserId,
        theirs: &crate::model::UserMeta,
    ) -> Result<(), VerifyError> {
        let mine = match super::scripts::user_meta(self.store, self.caps, user) {
            Ok(mine) => mine,
            Err(error) => {
                self.report.unreadable.push((format!("data of {user}"), error.to_string()));
                return Ok(());
            }
        };
        let mut parts = BTreeSet::from([UserPart::Subs, UserPart::Seen]);
        if !(self.store.sieve_in_mailboxes() && self.caps.sieve_mailboxes) {
            parts.insert(UserPart::Sieve);
        }
        let source = Arc::new(&self.source);
        let steps = diff::diff_meta(user, &mine, theirs, &parts, &|id| source.by_id(id).is_some());
        for step in steps {
            use crate::model::Step;
            let (object, what) = match step {
                Step::Subscribe { name, .. } => (format!("subscription {name}"), "missing on the replica"),
                Step::Unsubscribe { name, .. } => (format!("subscription {name}"), "only on the replica"),
                Step::Seen { uniqueid, .. } => (format!("seen state of mailbox {uniqueid}"), "SEENUIDS"),
                Step::SievePut { name, .. } => (format!("sieve script {name}"), "GUID"),
                Step::SieveActivate { name, .. } => (format!("sieve script {name}"), "not active on the replica"),
                Step::SieveDeactivate { .. } => ("sieve".to_owned(), "active on the replica"),
                Step::SieveRemove { name, .. } => (format!("sieve script {name}"), "only on the replica"),
                _ => continue,
            };
            self.differ(lane, object, what, "", "");
        }
        Ok(())
    }

    fn server(&mut self, lane: &Lane) -> Result<(), VerifyError> {
        let mine = self.store.server_annotations()?;
        if !self.caps.server_annotations {
            let lost = loss::of_server(&mine, self.caps);
            self.report.not_held.extend(lost.map(|lost| (account::SERVER.to_owned(), lost)));
            return Ok(());
        }
        let theirs = self.session.view_server_annotations()?;
        for step in diff::diff_server_annotations(&mine, &theirs) {
            use crate::model::Step;
            match step {
                Step::ServerAnnotation(annotation) => {
                    let entry = String::from_utf8_lossy(&annotation.entry).into_owned();
                    self.differ(lane, entry, "server annotation", annotation.value.len(), "");
                }
                Step::RemoveServerAnnotation { entry, .. } => {
                    let entry = String::from_utf8_lossy(&entry).into_owned();
                    self.differ(lane, entry, "server annotation only on the replica", "", "");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn field_text(snapshot: &MailboxSnapshot, field: &str) -> String {
    let view = MailboxView {
        head: snapshot.head.clone(),
        annotations: snapshot.annotations.clone(),
        ..MailboxView::default()
    };
    view_text(&view, field)
}

fn view_text(view: &MailboxView, field: &str) -> String {
    let head = &view.head;
    match field {
        "UIDVALIDITY" => head.uidvalidity.to_string(),
        "LAST_UID" => head.last_uid.0.to_string(),
        "HIGHESTMODSEQ" => head.highestmodseq.0.to_string(),
        "RECENTUID" => head.recentuid.0.to_string(),
        "RECENTTIME" => head.recenttime.to_string(),
        "POP3_LAST_LOGIN" => head.pop3_last_login.to_string(),
        "POP3_SHOW_AFTER" => head.pop3_show_after.to_string(),
        "OPTIONS" => head.options.letters(),
        "MBOXTYPE" => head.mbtype.0.clone(),
        "ACL" => String::from_utf8_lossy(&head.acl).replace('\t', " "),
        "FOLDERMODSEQ" => head.foldermodseq.0.to_string(),
        "ANNOTATIONS" => view
            .annotations
            .iter()
            .map(|a| format!("{} {:?} ({} bytes)", String::from_utf8_lossy(&a.entry), a.userid, a.value.len()))
            .collect::<Vec<_>>()
            .join(", "),
        _ => String::new(),
    }
}

fn record_text(record: &crate::model::Record, names: &[Option<crate::model::FlagName>], field: &str) -> String {
    match field {
        "MODSEQ" => record.modseq.0.to_string(),
        "FLAGS" => {
            let user: Vec<String> =
                diff::flag_names(record, names).iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
            format!("{:#x} {}", record.system_flags.0 & SystemFlags::REPLICATED, user.join(" "))
        }
        "LAST_UPDATED" => record.last_updated.to_string(),
        "INTERNALDATE" => record.internaldate.to_string(),
        "GUID" => record.guid.to_string(),
        "THRID" => format!("{:016x}", record.cid),
        "SAVEDATE" => record.savedate.to_string(),
        "CREATEDMODSEQ" => record.createdmodseq.0.to_string(),
        "ANNOTATIONS" => format!("{} annotations", record.annotations.len()),
        _ => String::new(),
    }
}
