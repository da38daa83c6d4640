//! The circle: a live spool, `run`, `serve` in front of an archive, `push`, an empty real 3.6.1; and a live spool, `run`,
//! `serve` in front of a store in Cyrus's own format, on which a real 3.6.1 starts.

use super::super::archive::restore::restore;
use super::super::cyrus_dir::{Place, SCRIPTS, copy_store};
use super::super::push::rules;
use super::super::util::diff::Exception;
use super::super::util::store::{fixtures, recordings_in};
use super::super::util::{CyrusServer, Options, Snapshot, Spooltap, cyrus, diff, snapshot};
use super::clients::take_in_scripts;
use super::{KINDS, Kind, Served, archive};
use spooltap::archive::{Archive, ArchiveStore};
use spooltap::model::MailStore;
use spooltap::replay::{Depth, Player, Recording, Speed, compare_replica};
use spooltap::spool::open_store;
use std::path::Path;
use std::time::{Duration, Instant};

const MADE_UP: Exception = Exception {
    at: &["users", "*", "others", "*"],
    why: "3.6 makes parents that are missing, with the rights of the mailbox above",
    allowed: |expected, found| expected.is_null() && found["seen"] == serde_json::json!([]),
};

/// What is kept, as something mail can be read from.
fn kept(kind: Kind, dir: &Path) -> anyhow::Result<Box<dyn MailStore>> {
    if kind == Kind::Archive {
        return Ok(Box::new(ArchiveStore::open(Archive::open(&archive(dir))?)?));
    }
    // A copy, read as a live spool is read: the one that is served is locked.
    let copy = dir.join("copy");
    if copy.exists() {
        std::fs::remove_dir_all(&copy)?;
    }
    copy_store(&kind.place(dir), &copy)?;
    Ok(Box::new(open_store(&copy.join("imapd.conf"))?))
}

/// Plays a whole recording through; what differs at its end.
fn around(kind: Kind, recording: &Path) -> Vec<String> {
    let dir = tempfile::tempdir().expect("directory");
    let recording = Recording::open(recording).expect("recording");
    let served = Served::of(kind, dir.path(), &[]);
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
    // There scripts are files until a server takes them into a mailbox of theirs.
    let mut wanted = truth.clone();
    if let Some(names) = wanted["names"].as_array_mut().filter(|_| kind == Kind::Cyrus) {
        names.retain(|name| !name.as_str().is_some_and(|name| name.ends_with(".#sieve")));
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = kept(kind, dir.path()).and_then(|store| Ok(compare_replica(&*store, &wanted, Depth::Bodies)?));
        let found = found.unwrap_or_else(|error| vec![error.to_string()]);
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
    let users: Vec<String> = users.into_iter().collect();
    let (options, rules) = (Options::new().names_of(&conf, recording.version()), rules(recording.version()));
    if kind == Kind::Cyrus {
        let mut place = Place::with_copy(options, &kind.place(dir.path())).expect("is copied");
        place.boot().expect("starts");
        let mendable = place.mendable().expect("runs");
        take_in_scripts(&place, &Snapshot::recorded(&truth), &users);
        let shown = snapshot(&place.server, &users).expect("is read");
        return [mendable, diff(&Snapshot::recorded(&truth), &shown, &rules.and(&[MADE_UP]).and(SCRIPTS))].concat();
    }
    let replica = CyrusServer::start(options).expect("starts");
    let output = restore(&archive(dir.path()), &replica, &dir.path().join("restore"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let shown = snapshot(&replica, &users).expect("is read");
    diff(&Snapshot::recorded(&truth), &shown, &rules.and(&[MADE_UP]))
}

#[test]
fn every_recording_comes_around() {
    if !cyrus::installed() {
        return;
    }
    let mut faults = Vec::new();
    let all = std::env::var_os("SPOOLTAP_CIRCLE").is_some();
    for path in recordings_in(&[fixtures().join("replays")]) {
        // All of them once more is for a quiet machine.
        let is_short = ["2.3.19-a", "2.5.11-c", "3.6.1-c"].iter().any(|name| path.ends_with(name));
        let kinds = KINDS.into_iter().filter(|kind| *kind == Kind::Archive || is_short || all);
        for kind in kinds {
            let found = around(kind, &path);
            if !found.is_empty() {
                faults.push(format!("{kind:?} {}:\n{}", path.display(), found.join("\n")));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
