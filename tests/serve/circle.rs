//! The circle: a live spool, `run`, `serve` in front of an archive, `push`, an empty real 3.6.1.

use super::super::archive::restore::restore;
use super::super::push::rules;
use super::super::util::diff::Exception;
use super::super::util::store::{fixtures, recordings_in};
use super::super::util::{CyrusServer, Options, Snapshot, Spooltap, cyrus, diff, snapshot};
use super::{Served, archive};
use spooltap::archive::{Archive, ArchiveStore};
use spooltap::replay::{Depth, Player, Recording, Speed, compare_replica};
use std::path::Path;
use std::time::{Duration, Instant};

const MADE_UP: Exception = Exception {
    at: &["users", "*", "others", "*"],
    why: "3.6 makes parents that are missing, with the rights of the mailbox above",
    allowed: |expected, found| expected.is_null() && found["seen"] == serde_json::json!([]),
};

/// Plays a whole recording through; what differs at its end.
fn around(recording: &Path) -> Vec<String> {
    let dir = tempfile::tempdir().expect("directory");
    let recording = Recording::open(recording).expect("recording");
    let served = Served::start(dir.path(), &[]);
    let conf = recording.unpack(&dir.path().join("source")).expect("unpacks");
    let mut run = Spooltap::run(&conf, &served.url(), &dir.path().join("state")).expect("starts");
    run.wait_live(Duration::from_secs(60)).expect("live");
    let mut player = Player::new(&recording, &dir.path().join("source"));
    let (mut truth, mut users) = (None, std::collections::BTreeSet::new());
    while let Some(mark) = player.next_mark(Speed::Asap).expect("plays") {
        users.extend(mark.truth["users"].as_object().into_iter().flat_map(|users| users.keys().cloned()));
        truth = Some(mark.truth.clone());
    }
    let truth = truth.expect("has marks");
    let kept = ArchiveStore::open(Archive::open(&archive(dir.path())).expect("opens")).expect("is there");
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = compare_replica(&kept, &truth, Depth::Bodies).unwrap_or_else(|error| vec![error.to_string()]);
        if found.is_empty() {
            break;
        }
        if Instant::now() > deadline {
            let serve: Vec<String> = served.log().lines().rev().take(20).map(str::to_owned).collect();
            return [found, vec![run.log_end(20)], serve].concat();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(run.terminate().expect("ends").success());
    assert!(served.terminate().success());
    let replica = CyrusServer::start(Options::new().names_of(&conf, recording.version())).expect("starts");
    let output = restore(&archive(dir.path()), &replica, &dir.path().join("restore"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let users: Vec<String> = users.into_iter().collect();
    let shown = snapshot(&replica, &users).expect("is read");
    diff(&Snapshot::recorded(&truth), &shown, &rules(recording.version()).and(&[MADE_UP]))
}

#[test]
fn every_recording_comes_around() {
    if !cyrus::installed() {
        return;
    }
    let mut faults = Vec::new();
    for path in recordings_in(&[fixtures().join("replays")]) {
        let found = around(&path);
        if !found.is_empty() {
            faults.push(format!("{}:\n{}", path.display(), found.join("\n")));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
