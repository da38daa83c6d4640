//! Archives: what a replica must do, what a crash may not do, and whole recordings kept in one and read back.

#[path = "archive/carried.rs"]
mod carried;
#[path = "archive/crash.rs"]
pub(crate) mod crash;
#[path = "archive/demo.rs"]
mod demo;
#[path = "archive/hooked.rs"]
mod hooked;
#[path = "archive/kill.rs"]
mod kill;
#[path = "archive/replays.rs"]
mod replays;
#[path = "archive/restore.rs"]
pub(crate) mod restore;
#[path = "archive/s3.rs"]
mod s3;
#[path = "archive/steps.rs"]
mod steps;
#[path = "archive/writers.rs"]
mod writers;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use sha1::{Digest, Sha1};
use spooltap::archive::{Archive, ArchiveStore};
use spooltap::cyrus::synccrc::{self, AnnotRule};
use spooltap::model::*;
use spooltap::replica::ArchiveTarget;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

const ANNOT: AnnotRule = AnnotRule { start: 12_345_678, thrid: true, savedate: true, createdmodseq: true };

/// Bodies by GUID.
#[derive(Clone, Default)]
pub(crate) struct Bodies(pub(crate) HashMap<MessageGuid, Vec<u8>>);

impl Bodies {
    pub(crate) fn add(&mut self, text: &str) -> (MessageGuid, u64) {
        let guid = MessageGuid(Sha1::digest(text).into());
        self.0.insert(guid, text.as_bytes().to_vec());
        (guid, text.len() as u64)
    }
}

impl BodySource for Bodies {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        let bytes = self.0.get(&body.guid).cloned();
        let bytes = bytes.ok_or_else(|| StoreError::new(Disposition::RetrySoon, "no such file"))?;
        Ok(Body { size: bytes.len() as u64, reader: Box::new(std::io::Cursor::new(bytes)) })
    }
}

/// A mailbox as a source has it; updates are made from it.
#[derive(Clone, Default)]
pub(crate) struct Source {
    pub(crate) snapshot: MailboxSnapshot,
    pub(crate) bodies: Bodies,
}

impl Source {
    pub(crate) fn new(id: &str, name: &str) -> Self {
        let head = MailboxHead {
            uniqueid: id.into(),
            name: name.into(),
            partition: "default".into(),
            acl: b"u1\tlrswipkxtecdan\t".to_vec(),
            options: Options(Options::POP3_NEW_UIDL),
            uidvalidity: 1_700_000_000,
            highestmodseq: ModSeq(1),
            ..MailboxHead::default()
        };
        Self { snapshot: MailboxSnapshot { head, ..MailboxSnapshot::default() }, bodies: Bodies::default() }
    }

    pub(crate) fn append(&mut self, text: &str) {
        let (guid, size) = self.bodies.add(text);
        let head = &mut self.snapshot.head;
        head.last_uid.0 += 1;
        head.highestmodseq.0 += 1;
        self.snapshot.records.push(Record {
            uid: head.last_uid,
            modseq: head.highestmodseq,
            last_updated: 1_700_000_001,
            internaldate: 1_600_000_000,
            size,
            guid,
            ..Record::default()
        });
    }

    /// Changes one record at a new modseq.
    pub(crate) fn touch(&mut self, uid: u32, change: impl Fn(&mut Record)) {
        let head = &mut self.snapshot.head;
        head.highestmodseq.0 += 1;
        let record = self.snapshot.records.iter_mut().find(|record| record.uid == Uid(uid)).expect("there");
        record.modseq = head.highestmodseq;
        change(record);
    }

    pub(crate) fn crcs(&self) -> SyncCrcs {
        let (records, flags) = (&self.snapshot.records, &self.snapshot.user_flags);
        SyncCrcs { basic: synccrc::basic(records, flags), annot: synccrc::annot(records, ANNOT) }
    }

    pub(crate) fn since(&self) -> Since {
        Since { modseq: self.snapshot.head.highestmodseq, crcs: self.crcs() }
    }

    /// Everything above `after`, with the bodies of new messages.
    pub(crate) fn update(&self, after: Option<Since>) -> MailboxUpdate {
        let modseq = after.map_or(ModSeq(0), |since| since.modseq);
        let records: Vec<Record> =
            self.snapshot.records.iter().filter(|record| record.modseq > modseq).cloned().collect();
        let bodies = records.iter().filter(|record| self.bodies.0.contains_key(&record.guid));
        let bodies = bodies.map(|r| BodyRef { uid: r.uid, guid: r.guid, size: r.size, copied: false }).collect();
        MailboxUpdate {
            head: self.snapshot.head.clone(),
            crcs: self.crcs(),
            since: after,
            user_flags: self.snapshot.user_flags.clone(),
            annotations: self.snapshot.annotations.clone(),
            records,
            bodies,
            reserve_from: Vec::new(),
            create: after.is_none(),
        }
    }

    pub(crate) fn step(&self, after: Option<Since>) -> Step {
        Step::Mailbox(Box::new(self.update(after)))
    }
}

fn session(store: &Arc<dyn ObjectStore>) -> Box<dyn Replica> {
    ArchiveTarget::of(Archive::with_store(store.clone(), "memory:")).open().expect("opens")
}

pub(crate) fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

/// Everything a fresh reader finds, as text; every body of a live message is read and hashed.
fn dump(store: &Arc<dyn ObjectStore>) -> BTreeMap<String, String> {
    let store = ArchiveStore::open(Archive::with_store(store.clone(), "memory:")).expect("opens");
    let mut out = BTreeMap::new();
    for entry in store.listing().expect("listing").entries() {
        let mut snapshot = store.mailbox(entry).expect("reads").expect("is there");
        // A root follows from the roots there are.
        snapshot.head.quotaroot = None;
        let bodies = store.bodies(entry).expect("bodies");
        for record in snapshot.records.iter().filter(|record| !record.is_expunged()) {
            let body = BodyRef { uid: record.uid, guid: record.guid, size: record.size, copied: false };
            let mut bytes = Vec::new();
            bodies.open(&body).expect("has its body").reader.read_to_end(&mut bytes).expect("reads");
            assert_eq!(MessageGuid(Sha1::digest(&bytes).into()), record.guid, "{} {}", entry.name, record.uid.0);
        }
        let (head, flags) = (&snapshot.head, &snapshot.user_flags);
        out.insert(format!("{} head", entry.name), format!("{entry:?} {head:?} {:?}", snapshot.annotations));
        out.insert(format!("{} records", entry.name), format!("{flags:?} {:?}", snapshot.records));
    }
    for user in store.users().expect("users") {
        let meta = store.user_meta(&user).expect("meta");
        if meta != UserMeta::default() {
            out.insert(format!("user {user}"), format!("{meta:?}"));
        }
    }
    out.insert("quotas".into(), format!("{:?}", store.quotas().expect("quotas")));
    out.insert("annotations".into(), format!("{:?}", store.server_annotations().expect("annotations")));
    out
}
