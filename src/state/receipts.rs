//! Receipts of one replica, by kind and key.

use super::at_work::Slot;
use super::store::{Inner, Kind, pack, unpack};
use super::{MailboxReceipt, UserReceipt};
use crate::model::{Annotation, MboxName, QuotaLimits, QuotaRoot, UniqueId, UserId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Receipts of one replica. What is put after the `State` was dropped stays in memory.
#[derive(Clone)]
pub struct ReplicaState {
    pub(super) inner: Arc<Inner>,
    pub(super) name: Vec<u8>,
}

impl ReplicaState {
    fn prefix(&self, kind: Kind) -> Vec<u8> {
        let mut key = Vec::with_capacity(self.name.len() + 32);
        key.push(kind as isize as u8);
        key.extend_from_slice(&self.name);
        key.push(0);
        key
    }

    fn key(&self, kind: Kind, id: &[u8]) -> Vec<u8> {
        let mut key = self.prefix(kind);
        key.extend_from_slice(id);
        key
    }

    fn read<T: DeserializeOwned>(&self, kind: Kind, id: &[u8]) -> Option<T> {
        unpack(&self.inner.get(&self.key(kind, id))?)
    }

    fn write<T: Serialize>(&self, kind: Kind, id: &[u8], value: &T) {
        self.inner.put(self.key(kind, id), pack(value));
    }

    fn remove(&self, kind: Kind, id: &[u8]) {
        self.inner.put(self.key(kind, id), None);
    }

    fn each<T: DeserializeOwned>(&self, kind: Kind, call: &mut dyn FnMut(&[u8], T)) {
        let prefix = self.prefix(kind);
        self.inner.each(&prefix, &mut |key, value| {
            if let (Some(id), Some(value)) = (key.strip_prefix(prefix.as_slice()), unpack(value)) {
                call(id, value);
            }
        });
    }

    fn read_all<'a, T: DeserializeOwned>(&self, kind: Kind, ids: impl Iterator<Item = &'a [u8]>) -> Vec<Option<T>> {
        let mut out = Vec::with_capacity(ids.size_hint().0);
        self.inner.get_all(ids.map(|id| self.key(kind, id)), &mut |value| out.push(value.and_then(unpack)));
        out
    }

    pub fn mailbox(&self, id: &UniqueId) -> Option<MailboxReceipt> {
        self.read(Kind::Mailbox, id.as_bytes())
    }

    /// Those of several mailboxes, in their order.
    pub fn mailboxes_of<'a>(&self, ids: impl Iterator<Item = &'a UniqueId>) -> Vec<Option<MailboxReceipt>> {
        self.read_all(Kind::Mailbox, ids.map(UniqueId::as_bytes))
    }

    pub fn put_mailbox(&self, id: &UniqueId, receipt: &MailboxReceipt) {
        self.write(Kind::Mailbox, id.as_bytes(), receipt);
    }

    /// Said before a mailbox is made on the replica, or taken away; known at once to whoever comes after us. The name of one
    /// that cannot be found by its owner is remembered as well.
    pub fn begin_mailbox(&self, id: &UniqueId, shared_name: Option<&MboxName>) {
        self.inner.begun.add(&self.key(Kind::Mailbox, id.as_bytes()), shared_name);
    }

    /// Under which names mailboxes that cannot be found by their owner were begun.
    pub fn begun_names(&self) -> Vec<MboxName> {
        self.inner.begun.names()
    }

    /// Said before anything is sent for this lane; dropped when all of it was answered.
    pub fn at_work(&self, lane: &[u8]) -> Option<Slot> {
        let mut what = self.slot_prefix();
        what.extend(lane);
        self.inner.at_work.take(what)
    }

    /// Lanes that were at work when the one before us died, or that it was not sure of at its end.
    pub fn left_at_work(&self) -> Vec<(Slot, Vec<u8>)> {
        let prefix = self.slot_prefix();
        let mut out = Vec::new();
        for (slot, what) in self.inner.at_work.left() {
            match what.strip_prefix(prefix.as_slice()) {
                Some(lane) => out.push((slot, lane.to_vec())),
                None => slot.keep(),
            }
        }
        out
    }

    fn slot_prefix(&self) -> Vec<u8> {
        blake3::hash(&self.name).as_bytes().to_vec()
    }

    /// We have a receipt of it, or had begun to bring it there.
    pub fn is_ours(&self, id: &UniqueId) -> bool {
        self.inner.begun.has(&self.key(Kind::Mailbox, id.as_bytes())) || self.mailbox(id).is_some()
    }

    pub fn remove_mailbox(&self, id: &UniqueId) {
        self.remove(Kind::Mailbox, id.as_bytes());
    }

    /// All mailboxes with their names on the replica.
    pub fn mailboxes(&self) -> Vec<(UniqueId, MboxName)> {
        let mut out = Vec::new();
        self.for_each_mailbox(&mut |id, receipt| out.push((id, receipt.view.head.name)));
        out
    }

    /// Every mailbox there is a receipt of.
    pub fn each_mailbox_id(&self, call: &mut dyn FnMut(UniqueId)) {
        let prefix = self.prefix(Kind::Mailbox);
        self.inner.each(&prefix, &mut |key, _| {
            key.strip_prefix(prefix.as_slice()).into_iter().for_each(|id| call(UniqueId::new(id)))
        });
    }

    pub fn for_each_mailbox(&self, call: &mut dyn FnMut(UniqueId, MailboxReceipt)) {
        self.each(Kind::Mailbox, &mut |id, receipt| call(UniqueId::new(id), receipt));
    }

    /// Mailboxes that are to be removed, and since when (seconds since 1970) the source has them no more.
    pub fn removals(&self) -> Vec<(UniqueId, u64)> {
        let prefix = self.prefix(Kind::Removal);
        let mut out = Vec::new();
        self.inner.each(&prefix, &mut |key, value| {
            if let (Some(id), Some(since)) = (key.strip_prefix(&*prefix), unpack(value)) {
                out.push((UniqueId::new(id), since));
            }
        });
        out
    }

    pub fn put_removal(&self, id: &UniqueId, since: u64) {
        self.write(Kind::Removal, id.as_bytes(), &since);
    }

    pub fn remove_removal(&self, id: &UniqueId) {
        self.remove(Kind::Removal, id.as_bytes());
    }

    pub fn user(&self, user: &UserId) -> Option<UserReceipt> {
        self.read(Kind::User, user.as_bytes())
    }

    /// Those of several users, in their order.
    pub fn users_of<'a>(&self, users: impl Iterator<Item = &'a UserId>) -> Vec<Option<UserReceipt>> {
        self.read_all(Kind::User, users.map(UserId::as_bytes))
    }

    pub fn put_user(&self, user: &UserId, receipt: &UserReceipt) {
        self.write(Kind::User, user.as_bytes(), receipt);
    }

    pub fn remove_user(&self, user: &UserId) {
        self.remove(Kind::User, user.as_bytes());
    }

    pub fn quota(&self, root: &QuotaRoot) -> Option<QuotaLimits> {
        self.read(Kind::Quota, root.as_bytes())
    }

    pub fn quotas(&self) -> BTreeMap<QuotaRoot, QuotaLimits> {
        let mut out = BTreeMap::new();
        self.each(Kind::Quota, &mut |root, limits| {
            out.insert(QuotaRoot::new(root), limits);
        });
        out
    }

    /// The quota roots whose names begin in one of these ways; all where none is given. Sorted.
    pub fn quota_roots(&self, starts: &BTreeSet<MboxName>) -> Vec<QuotaRoot> {
        let prefix = self.prefix(Kind::Quota);
        let mut out = BTreeSet::new();
        let whole = BTreeSet::from([MboxName::default()]);
        for start in if starts.is_empty() { &whole } else { starts } {
            self.inner.each(&[prefix.as_slice(), start.as_bytes()].concat(), &mut |key, _| {
                out.extend(key.strip_prefix(prefix.as_slice()).map(QuotaRoot::new));
            });
        }
        out.into_iter().collect()
    }

    pub fn put_quota(&self, root: &QuotaRoot, limits: &QuotaLimits) {
        self.write(Kind::Quota, root.as_bytes(), limits);
    }

    pub fn remove_quota(&self, root: &QuotaRoot) {
        self.remove(Kind::Quota, root.as_bytes());
    }

    /// `None` before the first confirmation.
    pub fn server_annotations(&self) -> Option<Vec<Annotation>> {
        self.read(Kind::Server, b"")
    }

    pub fn put_server_annotations(&self, annotations: &[Annotation]) {
        self.write(Kind::Server, b"", &annotations.to_vec());
    }

    /// The replica's content of this lane was looked at once.
    pub fn primed(&self, lane: &str) -> bool {
        self.read::<bool>(Kind::Primed, lane.as_bytes()).unwrap_or(false)
    }

    /// The same of several lanes, in their order.
    pub fn primed_of<'a>(&self, lanes: impl Iterator<Item = &'a str>) -> Vec<bool> {
        let primed = self.read_all::<bool>(Kind::Primed, lanes.map(str::as_bytes));
        primed.into_iter().map(|primed| primed.unwrap_or(false)).collect()
    }

    pub fn set_primed(&self, lane: &str) {
        self.write(Kind::Primed, lane.as_bytes(), &true);
    }

    /// What the replica has in this lane is to be asked anew.
    pub fn unset_primed(&self, lane: &str) {
        self.remove(Kind::Primed, lane.as_bytes());
    }

    /// Returns when everything written so far is durable.
    pub fn flush(&self) {
        self.inner.flush();
    }
}
