//! Recordings of real servers, replicated into an archive by the engine: what is read back is what IMAP showed.

use super::super::spool::recordings;
use super::super::util::Evidence;
use object_store::memory::InMemory;
use spooltap::archive::{Archive, ArchiveStore};
use spooltap::capture::Settings;
use spooltap::daemon::Running;
use spooltap::engine::{Backoff, Engine, Options};
use spooltap::model::{MailStore, ReplicaTarget};
use spooltap::replay::{Depth, Player, Recording, Speed, compare_replica};
use spooltap::replica::ArchiveTarget;
use spooltap::spool::open_store;
use spooltap::state::State;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An engine from `store` to `target` with receipts in `dir`.
fn start(store: Arc<dyn MailStore>, target: ArchiveTarget, dir: &Path) -> (Engine, State) {
    let state = State::open(dir, &store.identity().expect("identity")).expect("state");
    store.remember_in(state.memory());
    let target: Arc<dyn ReplicaTarget> = Arc::new(target);
    let replica = state.replica(&target.name());
    let backoff = Backoff { first: Duration::from_millis(1), most: Duration::from_millis(5) };
    let options = Options { lanes: 2, backoff, allow_removals: true, ..Options::default() };
    (Engine::start(store, vec![(target, replica)], &options, Arc::new(|_| {})), state)
}

fn settle(engine: &Engine) {
    engine.scan();
    assert!(engine.settle(8, Some(Duration::from_secs(30))), "{:?}", engine.stats());
    let failed: Vec<_> = engine.stats().into_iter().flat_map(|stats| stats.queue.failed).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn every_mark_of_every_recording_is_kept() {
    let mut faults = Vec::new();
    for path in recordings() {
        let name = path.file_name().expect("name").to_string_lossy().into_owned();
        let (spool, receipts) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
        let recording = Recording::open(&path).expect("recording");
        let conf = recording.unpack(spool.path()).expect("unpacks");
        let archive = Archive::with_store(Arc::new(InMemory::new()), "memory:");
        let store = Arc::new(open_store(&conf).expect("opens"));
        let (engine, _state) = start(store, ArchiveTarget::of(archive.clone()), receipts.path());
        let mut player = Player::new(&recording, spool.path());
        let (mut last, mut evidence, before) = (None, Evidence::default(), faults.len());
        while let Some(mark) = player.next_mark(Speed::Asap).expect("plays") {
            settle(&engine);
            let kept = ArchiveStore::open(archive.clone()).expect("opens");
            let differences = compare_replica(&kept, &mark.truth, Depth::Bodies).expect("reads");
            if differences.is_empty() {
                evidence.equal(&mark.truth, &mark.what);
            }
            let place = format!("{name} step {} ({})", mark.step, mark.what);
            faults.extend(differences.into_iter().map(|text| format!("{place}: {text}")));
            last = Some(mark.truth);
        }
        engine.stop(Duration::from_secs(5));
        if faults.len() == before {
            evidence.put_down("archive", &name);
        }
        faults.extend(last.and_then(|truth| restore(archive, &truth)).map(|text| format!("{name} restored: {text}")));
    }
    assert!(faults.is_empty(), "{} differences:\n{}", faults.len(), faults[..faults.len().min(40)].join("\n"));
}

/// Reads an archive back into an empty one, as a restore does; the first thing that differs there.
fn restore(archive: Archive, truth: &serde_json::Value) -> Option<String> {
    let receipts = tempfile::tempdir().expect("directory");
    let copy = Archive::with_store(Arc::new(InMemory::new()), "memory:copy");
    let store = Arc::new(ArchiveStore::open(archive).expect("opens"));
    let (engine, state) = start(store.clone(), ArchiveTarget::of(copy.clone()), receipts.path());
    settle(&engine);
    engine.stop(Duration::from_secs(5));
    drop(state);
    // A second look finds nothing to do.
    let (engine, state) = start(store.clone(), ArchiveTarget::of(copy.clone()), receipts.path());
    let report = spooltap::engine::scan(&*store, &state.replica("memory:copy"), None).expect("scans");
    assert!(report.differ.is_empty(), "{:?}", report.differ);
    engine.stop(Duration::from_secs(5));
    let copy = ArchiveStore::open(copy).expect("opens");
    compare_replica(&copy, truth, Depth::Bodies).expect("reads").into_iter().next()
}

/// A recording played at full speed, without a rest at any step: the watcher, the readers and the engine run after a
/// store that never holds still, and arrive where it ends.
#[test]
fn a_store_that_never_rests_is_caught_up_with() {
    let mut faults = Vec::new();
    for path in recordings() {
        let name = path.file_name().expect("name").to_string_lossy().into_owned();
        let (spool, receipts) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
        let recording = Recording::open(&path).expect("recording");
        let conf = recording.unpack(spool.path()).expect("unpacks");
        let archive = Archive::with_store(Arc::new(InMemory::new()), "memory:");
        let store = Arc::new(open_store(&conf).expect("opens"));
        let state = State::open(receipts.path(), &store.identity().expect("identity")).expect("state");
        store.remember_in(state.memory());
        let target: Arc<dyn ReplicaTarget> = Arc::new(ArchiveTarget::of(archive.clone()));
        let targets = vec![(target, state.replica("memory:"))];
        let options = Options { allow_removals: true, ..Options::default() };
        let running = Running::start(store, targets, &options, Settings::default(), Arc::new(|_| {})).expect("starts");
        Player::new(&recording, spool.path()).finish().expect("plays");
        let (_, truth) = recording.truths().last().expect("has marks").expect("reads");
        let deadline = Instant::now() + Duration::from_secs(20);
        let found = loop {
            running.settle(8, Duration::from_secs(10));
            let kept = ArchiveStore::open(archive.clone()).expect("opens");
            let found = compare_replica(&kept, &truth, Depth::Bodies).expect("reads");
            if found.is_empty() || Instant::now() > deadline {
                break found;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        faults.extend(found.into_iter().map(|text| format!("{name}: {text}")));
        faults
            .extend(running.stats().into_iter().flat_map(|stats| stats.queue.failed).map(|f| format!("{name}: {f:?}")));
        running.stop(Duration::from_secs(5));
    }
    assert!(faults.is_empty(), "{} differences:\n{}", faults.len(), faults[..faults.len().min(40)].join("\n"));
}
