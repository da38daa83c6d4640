//! Where somebody waits for confirmations, small bodies are in the mailbox's object at first, and become objects of their own behind
//! the confirmation. Whatever happens in between, none is lost.

use super::*;
use hooked::{Hooked, Hooks};
use object_store::Result;
use object_store::path::Path;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes no bodies while it is set.
struct NoBodies(Arc<AtomicBool>);

impl Hooks for NoBodies {
    fn before_put(&self, at: &Path) -> Result<()> {
        match self.0.load(Ordering::SeqCst) && at.as_ref().starts_with("bodies/") {
            true => Err(object_store::Error::Generic { store: "no bodies", source: "full".into() }),
            false => Ok(()),
        }
    }
}

fn no_bodies(inner: &Arc<dyn ObjectStore>, full: &Arc<AtomicBool>) -> Arc<dyn ObjectStore> {
    Arc::new(Hooked { inner: inner.clone(), hooks: NoBodies(full.clone()) })
}

fn quick(store: &Arc<dyn ObjectStore>) -> Box<dyn Replica> {
    let mut session = session(store);
    session.be_quick();
    session
}

/// How many bodies are objects of their own.
fn own_bodies(store: &Arc<dyn ObjectStore>) -> usize {
    let list =
        || async { store.list_with_delimiter(Some(&Path::from("bodies"))).await.expect("lists").common_prefixes };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let folders = runtime.block_on(list());
    let count = |folder: &Path| runtime.block_on(store.list_with_delimiter(Some(folder))).expect("lists").objects.len();
    folders.iter().map(count).sum()
}

fn everything(session: &mut dyn Replica, store: &Arc<dyn ObjectStore>, source: &Source) {
    let name = &source.snapshot.head.name;
    let kept = ArchiveStore::open(Archive::with_store(store.clone(), "memory:")).expect("opens");
    let listing = kept.listing().expect("lists");
    let entry = listing.by_name(name).expect("is listed");
    assert_eq!(kept.mailbox(entry).expect("reads").expect("is there").records, source.snapshot.records);
    let bodies = kept.bodies(entry).expect("bodies");
    for record in &source.snapshot.records {
        let expected = &source.bodies.0[&record.guid];
        let read = |mut body: Body| {
            let mut bytes = Vec::new();
            body.reader.read_to_end(&mut bytes).expect("reads");
            assert_eq!((&bytes, body.size), (expected, expected.len() as u64));
        };
        let body = BodyRef { uid: record.uid, guid: record.guid, size: record.size, copied: false };
        read(bodies.open(&body).expect("has its body"));
        assert!(bodies.exists(record.uid));
        read(session.body(name, &record.guid).expect("is asked").expect("has its body"));
    }
}

/// A source with a few messages, all in the archive, applied one by one.
fn append(session: &mut dyn Replica, source: &mut Source, texts: &[&str]) {
    for text in texts {
        let since = source.since();
        source.append(text);
        session.apply(&source.step(Some(since)), &source.bodies).expect("applies");
    }
}

const TEXTS: [&str; 4] = ["From: a\r\n\r\none", "From: b\r\n\r\nzw\u{f6}lf \\x41 \"\u{0}", "\u{1}\u{7f}", ""];

fn begun(session: &mut dyn Replica) -> Source {
    let source = Source::new("id-1", "user.u1");
    session.apply(&source.step(None), &source.bodies).expect("applies");
    source
}

#[test]
fn they_become_objects_of_their_own() {
    let store = memory();
    let mut session = quick(&store);
    let mut source = begun(&mut *session);
    append(&mut *session, &mut source, &TEXTS);
    everything(&mut *session, &store, &source);
    session.close();
    assert_eq!(own_bodies(&store), TEXTS.len());
    // The last one only, for nothing has been published on top of it.
    let mut session = self::session(&store);
    everything(&mut *session, &store, &source);
}

/// Those that could not be put aside stay where they are, and nobody publishes on top of them before they are.
#[test]
fn none_is_lost_where_they_cannot() {
    let (inner, full) = (memory(), Arc::new(AtomicBool::new(false)));
    let store = no_bodies(&inner, &full);
    let mut session = quick(&store);
    let mut source = begun(&mut *session);
    append(&mut *session, &mut source, &TEXTS[..1]);
    session.close();
    let mut session = quick(&store);
    full.store(true, Ordering::SeqCst);
    // With nothing to tell of it but that it is in the mailbox's object.
    append(&mut *session, &mut source, &TEXTS[1..2]);
    everything(&mut *session, &store, &source);
    let (since, acked) = (source.since(), source.clone());
    source.append(TEXTS[2]);
    let step = source.step(Some(since));
    let refused = session.apply(&step, &source.bodies);
    assert!(matches!(refused, Err(ReplicaError::Lost { .. })), "{refused:?}");
    everything(&mut *session, &store, &acked);
    assert_eq!(own_bodies(&inner), 1);
    full.store(false, Ordering::SeqCst);
    session.apply(&step, &source.bodies).expect("applies");
    session.close();
    assert_eq!(own_bodies(&inner), 3);
    everything(&mut *self::session(&store), &store, &source);
}

/// One that died between the confirmation and the rest: another program, which does not put off anything, goes on from there.
#[test]
fn others_go_on_from_them() {
    for write in [true, false] {
        let (inner, full) = (memory(), Arc::new(AtomicBool::new(false)));
        let dying = no_bodies(&inner, &full);
        let mut session = quick(&dying);
        let mut source = begun(&mut *session);
        full.store(true, Ordering::SeqCst);
        append(&mut *session, &mut source, &TEXTS[1..2]);
        session.close();
        assert_eq!(own_bodies(&inner), 0);
        let mut next = self::session(&inner);
        everything(&mut *next, &inner, &source);
        if write {
            append(&mut *next, &mut source, &TEXTS[2..3]);
        } else {
            // What takes records in takes no bodies along.
            let step = Step::Expunge { uniqueid: "id-1".into(), name: "user.u1".into(), uids: vec![Uid(1)] };
            next.apply(&step, &Bodies::default()).expect("applies");
            source.snapshot.records[0].system_flags.0 |= SystemFlags::EXPUNGED;
        }
        everything(&mut *next, &inner, &source);
        assert_eq!(own_bodies(&inner), 1 + usize::from(write));
    }
}

/// What is sent is looked at as closely as ever.
#[test]
fn a_body_that_is_none_is_not_carried() {
    let store = memory();
    let mut session = quick(&store);
    let mut source = begun(&mut *session);
    let before = dump(&store);
    let since = source.since();
    source.append(TEXTS[0]);
    for wrong in ["From: a\r\n\r\nONE", "From: a\r\n\r\non", "From: a\r\n\r\none more"] {
        let mut bodies = source.bodies.clone();
        bodies.0.values_mut().for_each(|body| *body = wrong.as_bytes().to_vec());
        let refused = session.apply(&source.step(Some(since)), &bodies);
        assert!(matches!(refused, Err(ReplicaError::Body { uid: Uid(1), .. })), "{refused:?}");
        assert_eq!(dump(&store), before);
    }
    session.apply(&source.step(Some(since)), &source.bodies).expect("applies");
}

/// Large ones, and many, are objects before anything names them.
#[test]
fn heavy_bodies_are_not_carried() {
    let (inner, full) = (memory(), Arc::new(AtomicBool::new(false)));
    let store = no_bodies(&inner, &full);
    let mut session = quick(&store);
    let mut source = begun(&mut *session);
    full.store(true, Ordering::SeqCst);
    let (small, large) = (vec!["x".repeat(100); 17], vec!["x".repeat((64 << 10) + 1)]);
    for texts in [small, large] {
        let since = source.since();
        let mut next = source.clone();
        texts.iter().enumerate().for_each(|(number, text)| next.append(&format!("{number}{text}")));
        let refused = session.apply(&next.step(Some(since)), &next.bodies);
        assert!(matches!(refused, Err(ReplicaError::Lost { .. })), "{refused:?}");
    }
    append(&mut *session, &mut source, &TEXTS[..1]);
    everything(&mut *session, &store, &source);
}

/// Bodies take their time to become objects.
struct Slow;

impl Hooks for Slow {
    fn before_put(&self, at: &Path) -> Result<()> {
        if at.as_ref().starts_with("bodies/") {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        Ok(())
    }
}

/// Fails without `wait_for_bodies`: who asks right after the confirmation was told that it is not there.
#[test]
fn one_that_is_on_its_way_is_there_and_can_be_relied_on() {
    let store: Arc<dyn ObjectStore> = Arc::new(Hooked { inner: memory(), hooks: Slow });
    let mut session = quick(&store);
    let mut source = begun(&mut *session);
    append(&mut *session, &mut source, &TEXTS[..1]);
    let guid = source.snapshot.records[0].guid;
    assert_eq!(session.has_bodies(&[guid], &[]).expect("is asked"), [guid].into());
    let mut other = Source::new("id-2", "user.u2");
    other.append(TEXTS[1]);
    let mut copied = other.step(None);
    if let Step::Mailbox(update) = &mut copied {
        update.bodies.clear();
    }
    append(&mut *session, &mut source, &TEXTS[1..2]);
    session.apply(&copied, &Bodies::default()).expect("relies on the other's");
}
