//! `serve` is killed with SIGKILL again and again under load: what it acknowledged is there, and what it did not can be
//! said again.

use super::super::archive::Source;
use super::super::cyrus_dir::Place;
use super::super::util::imap::quote;
use super::super::util::{Options, cyrus, eventually};
use super::{Kind, Served, open};
use sha1::{Digest, Sha1};
use spooltap::archive::{Archive, ArchiveStore};
use spooltap::model::{BodyRef, MailStore, MessageGuid, ReplicaError};
use spooltap::spool::open_store;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Deaths in CI; more by `SPOOLTAP_KILLS`.
const KILLS: u64 = 12;

/// Appends and flags messages until the server is gone, or `ended` and it has trouble; how many records were acknowledged.
fn load(
    served: &Served,
    source: &mut Source,
    acked: &mut Source,
    number: usize,
    (acks, ended): (&AtomicU64, &AtomicBool),
) {
    let Ok(mut session) = super::target(&served.url()).open() else { return };
    // What was in doubt when the last one died is said again, on top of what is there.
    let mut since = match session.view_full(&source.snapshot.head.name) {
        Ok(Some(view)) if view.head.highestmodseq == source.snapshot.head.highestmodseq => Some(source.since()),
        Ok(Some(_)) => Some(acked.since()),
        Ok(None) => None,
        Err(_) => return,
    };
    let mut first = true;
    loop {
        if !std::mem::take(&mut first) || since.is_none() {
            let count = source.snapshot.records.len();
            source.append(&format!("From: {number}\r\n\r\n{count} {}\r\n", "x".repeat(count * 37 % 3000)));
            if count % 3 == 2 {
                source.touch(count as u32 / 2, |record| record.system_flags.0 ^= 0x10);
            }
        }
        match session.apply(&source.step(since), &source.bodies) {
            Ok(()) => {
                *acked = source.clone();
                acks.fetch_add(1, Ordering::SeqCst);
                since = Some(source.since());
            }
            Err(ReplicaError::Lost { .. }) => return,
            Err(_) if ended.load(Ordering::SeqCst) => return,
            Err(error) => panic!("{error}"),
        }
    }
}

/// A life under load: however slow this machine is, something is acknowledged in it; then a moment more, and it is ended.
pub(super) fn live(served: &Served, boxes: &mut [Two], moment: Duration, end: impl FnOnce()) {
    let ended = AtomicBool::new(false);
    let acks = AtomicU64::new(0);
    let (ended, acks) = (&ended, &acks);
    std::thread::scope(|scope| {
        for (number, (source, acked)) in boxes.iter_mut().enumerate() {
            scope.spawn(move || {
                while !ended.load(Ordering::SeqCst) {
                    load(served, source, acked, number, (acks, ended));
                }
            });
        }
        let acked = eventually(Duration::from_secs(60), || (acks.load(Ordering::SeqCst) > 0).then_some(()));
        std::thread::sleep(moment);
        ended.store(true, Ordering::SeqCst);
        end();
        // Not before the server is dead: who loads it ends only then.
        assert!(acked.is_some(), "nothing was acknowledged");
    });
}

/// With SIGKILL.
pub(super) fn kill(served: &Served) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(served.pid()), nix::sys::signal::Signal::SIGKILL).expect("kills");
}

/// Mailboxes get no larger than what so many lives bring; then others are begun.
const GENERATION: u64 = 40;

/// A mailbox as it was last sent, and as it was last acknowledged.
pub(super) type Two = (Source, Source);

pub(super) fn generation(number: u64) -> Vec<Two> {
    let fresh = |which: u64| Source::new(&format!("kill{number:03}{which}"), &format!("user.k{number}x{which}"));
    (0..3).map(|which| (fresh(which), fresh(which))).collect()
}

/// Everything that was acknowledged is in what the dead server has left, and everything that is there is whole.
pub(super) fn holds(store: &dyn MailStore, boxes: &[Two], when: &str) {
    let listing = store.listing().expect("lists");
    for (source, acked) in boxes {
        let want = &acked.snapshot;
        if want.records.is_empty() {
            continue;
        }
        let entry = listing.by_name(&want.head.name).expect("is listed");
        let found = store.mailbox(entry).expect("reads").expect("is there");
        // Either the last that was acknowledged, or one more that was not heard of.
        let is = |source: &Source| {
            found.records == source.snapshot.records && found.head.highestmodseq == source.snapshot.head.highestmodseq
        };
        assert!(is(acked) || is(source), "{when}: {:?}", found.head);
        let bodies = store.bodies(entry).expect("bodies");
        for record in &found.records {
            let body = BodyRef { uid: record.uid, guid: record.guid, size: record.size, copied: false };
            let mut bytes = Vec::new();
            bodies.open(&body).expect("has its body").reader.read_to_end(&mut bytes).expect("reads");
            assert_eq!(MessageGuid(Sha1::digest(&bytes).into()), record.guid);
        }
    }
}

/// What a dead server has left, as something mail is read from.
pub(super) fn left(kind: Kind, dir: &Path) -> Box<dyn MailStore> {
    match kind {
        Kind::Archive => {
            let archive = Archive::open(&kind.url(dir)).expect("opens");
            Box::new(ArchiveStore::open(archive).expect("is there"))
        }
        Kind::Cyrus => Box::new(open_store(&kind.place(dir).join("imapd.conf")).expect("opens")),
    }
}

fn dies(kind: Kind, dir: &Path) -> Vec<Two> {
    let kills: u64 = std::env::var("SPOOLTAP_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS);
    let mut served = Served::of(kind, dir, &[]);
    drop(open(&served));
    let (mut boxes, mut done) = (generation(0), Vec::new());
    for kill in 0..kills {
        if kill > 0 && kill % GENERATION == 0 {
            done.append(&mut std::mem::replace(&mut boxes, generation(kill / GENERATION)));
        }
        let address = served.address;
        live(&served, &mut boxes, Duration::from_micros(kill * 7919 % 90_000), || self::kill(&served));
        holds(&*left(kind, dir), &boxes, &format!("after kill {kill}"));
        served.kill9();
        served = Served::of_at(kind, dir, address, &[]);
    }
    done.append(&mut boxes);
    let total: usize = done.iter().map(|(_, acked)| acked.snapshot.records.len()).sum();
    println!("{kills} deaths, {total} messages in {} mailboxes acknowledged", done.len());
    assert!(total as u64 >= kills, "only {total} messages in {kills} lives");
    assert_eq!(served.terminate().code(), Some(0));
    holds(&*left(kind, dir), &done, "at the end");
    done
}

#[test]
fn what_was_acknowledged_is_there() {
    let dir = tempfile::tempdir().expect("directory");
    dies(Kind::Archive, dir.path());
}

/// And a real server starts on what is left of the last one, which is not closed in good order either.
#[test]
fn what_was_acknowledged_is_there_in_a_cyrus_directory() {
    if !cyrus::installed() {
        return;
    }
    let mut place = Place::new(Options::new()).expect("is set up");
    let base = place.server.base().to_owned();
    let boxes = dies(Kind::Cyrus, &base);
    place.boot().expect("starts");
    let mut imap = place.server.imap("u1").expect("logs in");
    let mut shown = BTreeMap::new();
    for row in imap.ok("LIST \"\" *").expect("lists").all("LIST") {
        let name = row.last().expect("a name").text();
        let count = imap.ok(format!("SELECT {}", quote(&name))).expect("selects").exists() as usize;
        shown.insert(name, count);
    }
    // What was acknowledged last, or the one more that was not heard of.
    for (source, acked) in boxes.iter().filter(|(_, acked)| !acked.snapshot.records.is_empty()) {
        let count = |source: &Source| Some(source.snapshot.records.len());
        let found = shown.get(&acked.snapshot.head.name.to_string()).copied();
        assert!(found == count(acked) || found == count(source), "{:?}: {shown:?}", acked.snapshot.head);
    }
    let found = place.mendable().expect("is checked");
    assert!(found.is_empty(), "{found:?}");
}
