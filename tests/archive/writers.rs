//! Several programs write to one archive at the same time.

use super::*;
use hooked::{Hooked, Hooks};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Lets somebody else do something between a writer's first object and its next look at the folder.
struct Between {
    put: AtomicBool,
    then: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Hooks for Between {
    fn after_put(&self) {
        self.put.store(true, Ordering::SeqCst);
    }

    fn before_list(&self) {
        if self.put.load(Ordering::SeqCst)
            && let Some(then) = self.then.lock().expect("lock").take()
        {
            // A blocking session, and this is no thread for one.
            std::thread::spawn(then).join().expect("is done");
        }
    }
}

fn quota(root: &str, number: u64) -> Step {
    Step::Quota {
        root: root.into(),
        limits: QuotaLimits { limits: [(QuotaResource::Storage, number)].into(), modseq: 0 },
    }
}

/// What one has just published and another has gone on from is not taken back.
#[test]
fn what_others_stand_on_stays() {
    let none = Bodies::default();
    for (size, is_folded) in [(20_000, false), (1, true)] {
        let store = memory();
        session(&store).apply(&quota("user.u0", 1), &none).expect("applies");
        let other = Arc::new(Mutex::new(session(&store)));
        let then: Box<dyn FnOnce() + Send> = Box::new(move || {
            other.lock().expect("lock").apply(&quota("user.u2", 2), &Bodies::default()).expect("applies");
        });
        let hooks = Between { put: AtomicBool::new(false), then: Mutex::new(Some(then)) };
        let between: Arc<dyn ObjectStore> = Arc::new(Hooked { inner: store.clone(), hooks });
        // Large, so that the other's change stands on it; or small, so that it is taken in.
        let note =
            Annotation { entry: b"/motd".to_vec(), userid: "".into(), value: vec![b'x'; size], modseq: ModSeq(0) };
        session(&between).apply(&Step::ServerAnnotation(note.clone()), &none).expect("applies");
        let kept = ArchiveStore::open(Archive::with_store(store, "memory:")).expect("opens");
        let roots: Vec<_> = kept.quotas().expect("is whole").into_keys().map(|root| root.to_string()).collect();
        assert_eq!(roots, ["user.u0", "user.u2"], "{is_folded}");
        assert_eq!(kept.server_annotations().expect("is whole"), [note], "{is_folded}");
    }
}

/// What one was told is done stays done, whoever else writes.
#[test]
fn writers_at_the_same_time_lose_nothing() {
    let store = memory();
    let acked = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (store, acked) = (&store, &acked);
            scope.spawn(move || {
                let mut session = session(store);
                for number in 1..150 {
                    let root = format!("user.u{thread}x{}", number % 20);
                    match session.apply(&quota(&root, number), &Bodies::default()) {
                        Ok(()) => drop(acked.lock().expect("lock").insert(root, number)),
                        // Too many were quicker.
                        Err(error) => assert!(error.to_string().contains("somebody else"), "{error}"),
                    }
                }
            });
        }
    });
    let kept = ArchiveStore::open(Archive::with_store(store, "memory:")).expect("opens").quotas().expect("reads");
    let acked = acked.into_inner().expect("lock");
    assert!(acked.len() > 40, "{}", acked.len());
    for (root, number) in acked {
        // One that was refused may have come in all the same.
        let kept = kept.get(&QuotaRoot::new(root.as_bytes())).map(|kept| kept.limits[&QuotaResource::Storage]);
        assert!(kept.is_some_and(|kept| kept >= number), "{root}: {kept:?} of {number}");
    }
}
