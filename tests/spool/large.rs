//! A 2.3 mailbox with 50,000 messages: what a start costs, and what one new message costs.

use spooltap::archive::{Archive, ArchiveStore};
use spooltap::cyrus::header;
use spooltap::engine::{Backoff, Engine, Event, Options};
use spooltap::model::{MailStore, ReplicaTarget, Step, SystemFlags};
use spooltap::replica::ArchiveTarget;
use spooltap::spool::open_store;
use spooltap::state::State;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const MESSAGES: u32 = 50_000;
/// Different bodies; the others are hard links to them, as copies are in a real spool.
const BODIES: u32 = 20;
const ID: &str = "0123456789abcdef";

struct Spool {
    dir: tempfile::TempDir,
}

fn body(uid: u32) -> Vec<u8> {
    let number = uid % BODIES;
    format!("Subject: {number}\r\n\r\n{}", "x".repeat(number as usize)).into_bytes()
}

impl Spool {
    fn new() -> Self {
        let spool = Self { dir: tempfile::tempdir().expect("directory") };
        fs::create_dir_all(spool.path("spool/user/big")).expect("directory");
        fs::create_dir_all(spool.path("conf/user/b")).expect("directory");
        let conf = "configdirectory: @/conf\npartition-default: @/spool\nsievedir: @/sieve\nmboxlist_db: flat\n";
        let conf = conf.replace('@', &spool.dir.path().to_string_lossy());
        fs::write(spool.path("imapd.conf"), conf).expect("writes");
        fs::write(spool.path("conf/mailboxes.db"), "user.big\t0 default big\tlrswipkxtecda\t\n").expect("writes");
        let text = format!("\t{ID}\n\nbig\tlrswipkxtecda\t\n");
        fs::write(spool.mailbox("cyrus.header"), [header::MAGIC, text.as_bytes()].concat()).expect("writes");
        for uid in 1..=MESSAGES {
            match uid.checked_sub(BODIES).filter(|first| *first > 0) {
                None => fs::write(spool.message(uid), body(uid)).expect("writes"),
                Some(_) => fs::hard_link(spool.message((uid - 1) % BODIES + 1), spool.message(uid)).expect("links"),
            }
        }
        spool.write_index(MESSAGES);
        spool.write_seen("1:100");
        spool
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    fn mailbox(&self, file: &str) -> PathBuf {
        self.path("spool/user/big").join(file)
    }

    fn message(&self, uid: u32) -> PathBuf {
        self.mailbox(&format!("{uid}."))
    }

    /// Version 10, replaced as a whole.
    fn write_index(&self, last: u32) {
        let mut bytes = vec![0; 96];
        let mut words = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        for (at, value) in [(8, 10), (12, 96), (16, 88), (20, last), (28, last), (44, 1_600_000_000), (72, 1)] {
            words(at, value);
        }
        for uid in 1..=last {
            let mut record = [0; 88];
            let mut word = |at: usize, value: u32| record[at..at + 4].copy_from_slice(&value.to_be_bytes());
            let size = body((uid - 1) % BODIES + 1).len() as u32;
            for (at, value) in [(0, uid), (4, 1_600_000_000), (12, size), (28, 1_600_000_000), (84, 1)] {
                word(at, value);
            }
            bytes.extend_from_slice(&record);
        }
        fs::write(self.mailbox("cyrus.index.NEW"), bytes).expect("writes");
        fs::rename(self.mailbox("cyrus.index.NEW"), self.mailbox("cyrus.index")).expect("renames");
    }

    fn write_seen(&self, uids: &str) {
        let text = format!("{ID}\t1 1600000000 {MESSAGES} 1600000000 {uids}\n");
        fs::write(self.path("conf/user/b/big.seen"), text).expect("writes");
    }
}

/// What one life did.
#[derive(Default)]
struct Sent {
    /// Records and bodies of every update of a mailbox.
    updates: Vec<(usize, usize)>,
    /// All other steps.
    others: usize,
    hashed_bytes: u64,
}

/// One life of spooltap: opens everything anew, catches up, and goes.
fn life(spool: &Spool, archive: &Archive, receipts: &Path) -> Sent {
    let store = Arc::new(open_store(&spool.path("imapd.conf")).expect("opens"));
    let state = State::open(receipts, &store.identity().expect("identity")).expect("state");
    store.remember_in(state.memory());
    let target: Arc<dyn ReplicaTarget> = Arc::new(ArchiveTarget::of(archive.clone()));
    let replica = state.replica(&target.name());
    let backoff = Backoff { first: Duration::from_millis(1), most: Duration::from_millis(5) };
    let options = Options { lanes: 1, backoff, ..Options::default() };
    let sent: Arc<Mutex<Sent>> = Arc::default();
    let sink = sent.clone();
    let events = Arc::new(move |event: &Event<'_>| match event {
        Event::Applied(Step::Mailbox(update)) => {
            sink.lock().expect("lock").updates.push((update.records.len(), update.bodies.len()));
        }
        Event::Applied(_) => sink.lock().expect("lock").others += 1,
        _ => {}
    });
    let engine = Engine::start(store.clone(), vec![(target, replica)], &options, events);
    engine.scan();
    assert!(engine.settle(8, Some(Duration::from_secs(300))), "{:?}", engine.stats());
    let failed: Vec<_> = engine.stats().into_iter().flat_map(|stats| stats.queue.failed).collect();
    assert!(failed.is_empty(), "{failed:?}");
    engine.stop(Duration::from_secs(5));
    let sent = std::mem::take(&mut *sent.lock().expect("lock"));
    Sent { hashed_bytes: store.hashed_bytes(), ..sent }
}

#[test]
fn bodies_of_a_large_old_mailbox_are_read_once() {
    let (spool, receipts) = (Spool::new(), tempfile::tempdir().expect("directory"));
    let archive = Archive::with_store(Arc::new(object_store::memory::InMemory::new()), "memory:");
    let first = life(&spool, &archive, receipts.path());
    assert_eq!(first.updates.iter().map(|(records, _)| records).sum::<usize>(), MESSAGES as usize);
    let all: u64 = (1..=MESSAGES).map(|uid| body((uid - 1) % BODIES + 1).len() as u64).sum();
    assert_eq!(first.hashed_bytes, all);

    let second = life(&spool, &archive, receipts.path());
    assert!(second.updates.is_empty() && second.others == 0, "a restart sends {:?}", second.updates);
    assert_eq!(second.hashed_bytes, 0);

    // From here on the old bodies cannot be read: they are not there.
    (1..=MESSAGES).for_each(|uid| fs::remove_file(spool.message(uid)).expect("removes"));
    let new = MESSAGES + 1;
    fs::write(spool.message(new), body((new - 1) % BODIES + 1)).expect("writes");
    spool.write_index(new);
    let third = life(&spool, &archive, receipts.path());
    assert_eq!((third.updates.as_slice(), third.others), ([(1, 1)].as_slice(), 0));
    assert_eq!(third.hashed_bytes, body((new - 1) % BODIES + 1).len() as u64);

    // What the owner has seen is in another file, and is the flag of the messages.
    spool.write_seen("1:100,200:204");
    let fourth = life(&spool, &archive, receipts.path());
    assert_eq!((fourth.updates.as_slice(), fourth.others), ([(5, 0)].as_slice(), 0));
    assert_eq!(fourth.hashed_bytes, 0);
    let kept = ArchiveStore::open(archive).expect("opens");
    let entry = kept.listing().expect("lists").entries().next().expect("one mailbox").clone();
    let snapshot = kept.mailbox(&entry).expect("reads").expect("is there");
    let seen = snapshot.records.iter().filter(|record| record.system_flags.has(SystemFlags::SEEN));
    assert_eq!(seen.map(|record| record.uid.0).collect::<Vec<_>>(), (1..=100).chain(200..=204).collect::<Vec<_>>());
}
