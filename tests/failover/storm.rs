//! A source that dies in the middle of work: what had not reached the replica is listed to the last message, the users go on
//! there, and on the way back nothing is lost.

use super::check;
use super::failback::{listed, messages, missing};
use crate::cyrus_dir::Place;
use crate::util::process::members;
use crate::util::workload::everybody;
use crate::util::{CyrusServer, Options, Snapshot, Spooltap, Workload, cyrus, eventually, snapshot};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Output;
use std::sync::atomic::Ordering;
use std::time::Duration;

type Shown = BTreeMap<(String, u64), String>;

/// Operations; more by hand.
fn operations() -> usize {
    std::env::var("SPOOLTAP_STORM").ok().and_then(|text| text.parse().ok()).unwrap_or(240)
}

fn seed() -> u64 {
    std::env::var("SPOOLTAP_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(11)
}

/// Ids of mailboxes by name: a folder may have been renamed where nobody told the other side.
fn ids(shown: &Snapshot) -> BTreeMap<String, String> {
    let users = shown.0["users"].as_object().into_iter().flat_map(|users| users.values());
    let all = users.map(|user| &user["mailboxes"]).chain([&shown.0["shared"]]);
    let all = all.filter_map(|mailboxes| mailboxes.as_object()).flatten();
    all.filter_map(|(name, mailbox)| Some((name.clone(), mailbox["mailboxid"].as_str()?.to_owned()))).collect()
}

fn names_of(ids: &BTreeMap<String, String>, id: &str) -> Vec<String> {
    ids.iter().filter(|(_, have)| *have == id).map(|(name, _)| name.clone()).collect()
}

fn by_id(all: Shown, ids: &BTreeMap<String, String>) -> Shown {
    all.into_iter().filter_map(|((name, uid), hash)| Some(((ids.get(&name)?.clone(), uid), hash))).collect()
}

fn shown(server: &CyrusServer) -> Snapshot {
    snapshot(server, &everybody()).expect("is read")
}

/// Kills every process of a server while others still use the handle.
fn kill_now(server: &CyrusServer) {
    let pid = fs::read_to_string(server.base().join("master.pid")).expect("master.pid");
    let pid = Pid::from_raw(pid.trim().parse().expect("a number"));
    for (member, _) in members(pid) {
        let _ = kill(member, Signal::SIGKILL);
    }
    let _ = killpg(pid, Signal::SIGKILL);
}

/// The source dies after half of the work; the daemon some operations before it.
fn storm(source: &CyrusServer, url: &str, state: &Path) {
    let mut workload = Workload::new(seed(), operations());
    (workload.names_stay, workload.accounts_stay) = (true, true);
    workload.prepare(source).expect("is prepared");
    let mut run = Spooltap::run(&source.conf(), url, state).expect("starts");
    run.wait_live(Duration::from_secs(120)).expect("is live");
    std::thread::scope(|scope| {
        let working = scope.spawn(|| workload.run(source));
        let reaches = |share: usize| {
            eventually(Duration::from_secs(120), || (workload.progress() >= operations() * share / 100).then_some(()))
        };
        reaches(50).expect("works");
        run.kill9();
        reaches(60).expect("works on");
        kill_now(source);
        workload.stop.store(true, Ordering::Relaxed);
        let done = working.join().expect("ends");
        println!("seed {}: {} operations before the end", seed(), done.operations());
    });
}

fn hashes(all: &Shown) -> BTreeSet<String> {
    all.values().cloned().collect()
}

#[test]
fn a_directory_takes_over_in_the_middle_of_work() {
    if !cyrus::installed() {
        return;
    }
    let mut source = CyrusServer::start(Options::new().source()).expect("starts");
    let mut place = Place::new(Options::new()).expect("is set up");
    let (conf, url, old) = (source.conf(), place.url(), format!("cyrus://{}", source.base().display()));
    let (state, back) = (place.state.path().join("state"), place.state.path().join("back"));
    storm(&source, &url, &state);
    source.kill9();
    let ask = |arguments: &[&str]| Spooltap::once(&conf, &url, &state, arguments).expect("runs");
    check(&ask(&["failover-check"]), 1, "NO-GO");
    let listing = ask(&["promote", "--json"]);
    check(&ask(&["promote", "--force", "--write-conf"]), 0, "promoted");
    place.boot().expect("starts");
    let truth = compared(&mut source, &place.server, &listing);
    go_on(&place.server);
    let at_replica = messages(&shown(&place.server));
    let conf = place.server.conf();
    let returned = |arguments: &[&str]| -> Output {
        Spooltap::once(&conf, &old, &back, &[&["failback"], arguments].concat()).expect("runs")
    };
    check(&returned(&[]), 1, "nothing was changed");
    check(&returned(&["--yes"]), 0, "in line");
    place.server.stop().expect("stops");
    source.boot().expect("starts");
    whole(&source, &truth, &at_replica);
}

#[test]
fn a_server_takes_over_in_the_middle_of_work() {
    if !cyrus::installed() {
        return;
    }
    let mut source = CyrusServer::start(Options::new().source()).expect("starts");
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let (conf, url, old) = (source.conf(), replica.url(), source.url());
    let dir = tempfile::tempdir().expect("directory");
    let (state, back) = (dir.path().join("state"), dir.path().join("back"));
    storm(&source, &url, &state);
    source.kill9();
    let ask = |arguments: &[&str]| Spooltap::once(&conf, &url, &state, arguments).expect("runs");
    check(&ask(&["failover-check"]), 1, "NO-GO");
    let listing = ask(&["promote", "--json"]);
    check(&ask(&["promote", "--force"]), 0, "promoted");
    let truth = compared(&mut source, &replica, &listing);
    go_on(&replica);
    let at_replica = messages(&shown(&replica));
    source.boot().expect("starts, with nobody let in");
    let conf = replica.conf();
    let returned = |arguments: &[&str]| -> Output {
        Spooltap::once(&conf, &old, &back, &[&["failback"], arguments].concat()).expect("runs")
    };
    let disk = source.conf().display().to_string();
    check(&returned(&["--yes", "--merge", "--source-sync", &url, "--old-conf", &disk]), 0, "in line");
    whole(&source, &truth, &at_replica);
    whole(&replica, &truth, &at_replica);
}

/// The list of what had not arrived is what IMAP shows of both sides; all messages of the source.
fn compared(source: &mut CyrusServer, replica: &CyrusServer, listing: &Output) -> Shown {
    source.boot().expect("starts for a look");
    let (at_source, at_replica) = (shown(source), shown(replica));
    source.kill9();
    let (here, there) = (ids(&at_source), ids(&at_replica));
    let names = there.clone().into_iter().chain(here.clone()).collect();
    let before = by_id(messages(&at_source), &here);
    let mut expected = missing(&before, &by_id(messages(&at_replica), &there));
    // Whose rights changed at the end is not shown to everybody on both sides; the replica's admin sees the name.
    let named: BTreeSet<&str> =
        at_replica.0["names"].as_array().into_iter().flatten().filter_map(|name| name.as_str()).collect();
    let hidden =
        here.iter().filter(|(name, id)| named.contains(name.as_str()) && !there.values().any(|have| have == *id));
    let hidden: BTreeSet<&String> = hidden.map(|(_, id)| id).collect();
    expected.retain(|(id, _), _| !hidden.contains(id));
    assert!(!expected.is_empty(), "something was lost on the way, or this test shows nothing");
    let mut listed = by_id(listed(listing, "here"), &names);
    listed.retain(|(id, _), _| !hidden.contains(id));
    let odd: Vec<_> = expected.iter().filter(|(key, _)| !listed.contains_key(*key)).collect();
    let odd: Vec<_> = odd.iter().map(|((id, _), _)| (names_of(&here, id), names_of(&there, id))).collect();
    let said = String::from_utf8_lossy(&listing.stdout);
    let named: BTreeSet<_> = at_replica.0["names"].as_array().into_iter().flatten().map(|n| n.to_string()).collect();
    assert_eq!(listed, expected, "seed {}: {odd:?}\n{said}\n{named:?}", seed());
    println!("{} of {} messages had not arrived", expected.len(), before.len());
    messages(&at_source)
}

fn go_on(replica: &CyrusServer) {
    for number in 0..3 {
        super::promote::deliver(replica, &["u1", "u2"], &format!("after the end {number}"));
    }
}

/// Every message that either side had is there.
fn whole(server: &CyrusServer, at_source: &Shown, at_replica: &Shown) {
    let now = hashes(&messages(&shown(server)));
    let lost: Vec<_> = at_replica.iter().filter(|(_, hash)| !now.contains(*hash)).collect();
    assert!(lost.is_empty(), "seed {}: of the replica {lost:?}", seed());
    let lost: Vec<_> = at_source.iter().filter(|(_, hash)| !now.contains(*hash)).collect();
    assert!(lost.is_empty(), "seed {}: of the source {lost:?}", seed());
}
