//! The way back, after both sides were worked on: a promoted directory and a real server; what is listed is what IMAP shows;
//! nothing that only one side has is lost, however often it is killed on the way.

use super::check;
use super::promote::deliver;
use crate::cyrus_dir::Place;
use crate::util::imap::literal;
use crate::util::{CyrusServer, Options, Rng, Snapshot, Spooltap, cyrus, snapshot};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

pub const USERS: [&str; 2] = ["u1", "u2"];

/// (mailbox, UID) → SHA-1 of every message that IMAP shows, but for the folders that hold scripts.
pub fn messages(shown: &Snapshot) -> BTreeMap<(String, u64), String> {
    let mut out = BTreeMap::new();
    let users = shown.0["users"].as_object().into_iter().flat_map(|users| users.values());
    let all = users.map(|user| &user["mailboxes"]).chain([&shown.0["shared"]]);
    for (name, mailbox) in all.filter_map(Value::as_object).flatten() {
        if name.contains("#sieve") {
            continue;
        }
        for (uid, message) in mailbox["messages"].as_object().into_iter().flatten() {
            let uid = uid.parse().expect("a UID");
            out.insert((name.clone(), uid), message["sha1"].as_str().expect("a hash").to_owned());
        }
    }
    out
}

/// The messages that a listing names on one side, in the shape of `messages`.
pub fn listed(output: &Output, side: &str) -> BTreeMap<(String, u64), String> {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.starts_with('{')).expect("a line of JSON");
    let report: Value = serde_json::from_str(line).expect("is JSON");
    let all = report["differences"].as_array().expect("differences").iter();
    all.filter(|one| one["side"] == side)
        .filter_map(|one| {
            let (mailbox, uid) = one["object"].as_str()?.split_once(" UID ")?;
            let what = one["what"].as_str()?.to_owned();
            Some(((mailbox.to_owned(), uid.parse().ok()?), what))
        })
        .filter(|((mailbox, _), _)| !mailbox.contains("#sieve") && !mailbox.starts_with("DELETED"))
        .collect()
}

/// What the first has and the second has not, message by message.
pub fn missing(
    here: &BTreeMap<(String, u64), String>,
    there: &BTreeMap<(String, u64), String>,
) -> BTreeMap<(String, u64), String> {
    let alike = |key: &(String, u64), hash: &String| there.get(key) == Some(hash);
    here.iter().filter(|(key, hash)| !alike(key, hash)).map(|(key, hash)| (key.clone(), hash.clone())).collect()
}

fn hashes(all: &BTreeMap<(String, u64), String>) -> BTreeSet<String> {
    all.values().cloned().collect()
}

fn in_inbox(all: &BTreeMap<(String, u64), String>, hash: &str) -> bool {
    all.iter().any(|((name, _), have)| name.starts_with("user.u1") && have == hash)
}

fn append(server: &CyrusServer, user: &str, folder: &str, text: &str) {
    let text = format!("From: a@lab.test\r\nSubject: {text}\r\n\r\n{text}\r\n");
    let command = [format!("APPEND {folder} ").into_bytes(), literal(text.as_bytes())].concat();
    server.imap(user).expect("logs in").ok(command).expect("appends");
}

fn say(server: &CyrusServer, user: &str, commands: &[&str]) {
    let mut imap = server.imap(user).expect("logs in");
    for command in commands {
        imap.ok(command).expect(command);
    }
}

fn shown(server: &CyrusServer) -> Snapshot {
    snapshot(server, &USERS).expect("is read")
}

/// Before anything goes wrong.
fn prepare(source: &CyrusServer) {
    for number in 0..5 {
        deliver(source, &USERS, &format!("both have it {number}"));
    }
    say(source, "u1", &["CREATE INBOX.Sent", "SUBSCRIBE INBOX.Sent"]);
    append(source, "u1", "INBOX.Sent", "sent");
}

/// What the source's users did and nobody replicated.
fn work_at_the_source(source: &CyrusServer) {
    deliver(source, &["u1"], "source alone 1");
    deliver(source, &["u1"], "source alone 2");
    say(source, "u1", &["CREATE INBOX.OnlyA", "SUBSCRIBE INBOX.OnlyA", "CREATE INBOX.Twice"]);
    append(source, "u1", "INBOX.OnlyA", "in a folder of the source alone");
    append(source, "u1", "INBOX.Twice", "in a folder made on both sides, here");
    say(source, "u1", &["SELECT INBOX", "UID STORE 1 +FLAGS (\\Flagged $urgent)"]);
}

/// And what they did where they were let in then.
fn work_at_the_replica(replica: &CyrusServer) {
    deliver(replica, &["u1"], "replica alone");
    say(replica, "u1", &["CREATE INBOX.OnlyB", "CREATE INBOX.Twice"]);
    append(replica, "u1", "INBOX.OnlyB", "in a folder of the replica alone");
    append(replica, "u1", "INBOX.Twice", "in a folder made on both sides, there");
    let expunge =
        ["SELECT INBOX", "UID STORE 2 +FLAGS (\\Deleted)", "UID EXPUNGE 2", "UID STORE 3 +FLAGS (\\Answered)"];
    say(replica, "u1", &expunge);
}

fn flags(shown: &Snapshot, uid: &str) -> Value {
    shown.0["users"]["u1"]["mailboxes"]["user.u1"]["messages"][uid]["flags"].clone()
}

/// A directory that was promoted, with a real Cyrus at work on it, and the old source, which is down.
struct Split {
    source: CyrusServer,
    place: Place,
    /// What IMAP showed at the source before it died, and shows at the replica now.
    at_source: Snapshot,
    at_replica: Snapshot,
    /// Deleted at the replica after it had arrived there.
    deleted: String,
}

impl Split {
    fn new() -> Self {
        let mut source = CyrusServer::start(Options::new().source().users(&USERS)).expect("starts");
        let mut place = Place::new(Options::new()).expect("is set up");
        prepare(&source);
        let (conf, url) = (source.conf(), place.url());
        let state = place.state.path().join("state");
        let ask = |arguments: &[&str]| Spooltap::once(&conf, &url, &state, arguments).expect("runs");
        check(&ask(&["push", "-A"]), 0, "");
        work_at_the_source(&source);
        let at_source = shown(&source);
        source.kill9();
        let refused = ask(&["promote", "--json"]);
        let before = messages(&at_source);
        // The list is what it lacks: all that came after the push.
        let arrived = before
            .iter()
            .filter(|((name, uid), _)| name == "user.u2" || name == "user.u1.Sent" || name == "user.u1" && *uid <= 5);
        let arrived: BTreeMap<_, _> = arrived.map(|(key, hash)| (key.clone(), hash.clone())).collect();
        assert_eq!(listed(&refused, "here"), missing(&before, &arrived));
        check(&refused, 1, "\"promoted\":false");
        check(&ask(&["promote", "--force", "--write-conf"]), 0, "promoted");
        place.boot().expect("starts");
        assert_eq!(messages(&shown(&place.server)), arrived, "what had reached the replica is there");
        work_at_the_replica(&place.server);
        let at_replica = shown(&place.server);
        let deleted = before[&("user.u1".to_owned(), 2)].clone();
        Self { source, place, at_source, at_replica, deleted }
    }

    fn state(&self) -> PathBuf {
        self.place.state.path().join("back")
    }

    fn old(&self) -> String {
        format!("cyrus://{}", self.source.base().display())
    }

    fn back(&self, arguments: &[&str]) -> Output {
        let arguments = [&["failback"], arguments].concat();
        Spooltap::once(&self.place.server.conf(), &self.old(), &self.state(), &arguments).expect("runs")
    }

    /// Every message that either side had; the one that was deleted is u2's as well.
    fn everything(&self) -> BTreeSet<String> {
        let mut all = hashes(&messages(&self.at_source));
        all.extend(hashes(&messages(&self.at_replica)));
        all
    }
}

#[test]
fn a_split_is_listed_and_nothing_of_either_side_is_lost() {
    if !cyrus::installed() {
        return;
    }
    let mut split = Split::new();
    let listing = split.back(&["--json"]);
    check(&listing, 1, "plan");
    let (before, after) = (messages(&split.at_source), messages(&split.at_replica));
    let mut only_there = missing(&before, &after);
    // Both knew it, and the new source has deleted it.
    only_there.retain(|_, hash| *hash != split.deleted);
    assert_eq!(listed(&listing, "there"), only_there);
    assert_eq!(listed(&listing, "here"), missing(&after, &before));
    let text = split.back(&[]);
    for line in [
        "differs    user.u1 UID 1: flags: here (), there (\\flagged $urgent), changed there last",
        "differs    user.u1 UID 2: deleted here",
        "differs    user.u1 UID 3: flags: here (\\answered), there (), changed here last",
        "only there user.u1.OnlyA: mailbox",
        "only here  user.u1.OnlyB: mailbox",
        "only there user.u1.Twice: mailbox of a name that another one has here",
        "only there subscription user.u1.OnlyA: u1",
    ] {
        check(&text, 1, line);
    }
    check(&split.back(&["--plan", "0123456789ab"]), 1, "nothing was changed");
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    let plan = text.rsplit_once("--plan ").expect("a plan").1.split(' ').next().expect("a word").to_owned();
    let done = split.back(&["--plan", &plan]);
    check(&done, 0, "in line: cyrus://");
    check(&done, 0, "kept       user.u1.OnlyA");
    split.place.server.stop().expect("stops");
    split.source.boot().expect("starts again");
    let now = shown(&split.source);
    let there = messages(&now);
    assert!(hashes(&there).is_superset(&split.everything()), "{there:#?}");
    assert!(!in_inbox(&there, &split.deleted), "deleted is deleted");
    // Beside it, not in it; and what the new source has is under its own UIDs.
    assert_eq!(missing(&after, &there), BTreeMap::new());
    let aside: BTreeSet<&str> =
        there.keys().filter(|(name, _)| name.contains("replica-only")).map(|(name, _)| name.as_str()).collect();
    assert_eq!(aside.len(), 2, "{aside:?}");
    assert_eq!((flags(&now, "1"), flags(&now, "3")), (serde_json::json!([]), serde_json::json!(["\\Answered"])));
    assert!(now.0["users"]["u1"]["subscribed"].to_string().contains("user.u1.OnlyA"));
    // The roles are as before: what was promoted is a replica again.
    let (conf, url) = (split.source.conf(), split.place.url());
    let state = split.place.state.path().join("state");
    let ask = |arguments: &[&str]| Spooltap::once(&conf, &url, &state, arguments).expect("runs");
    check(&ask(&["push", "-A"]), 89, "was promoted");
    check(&ask(&["failback", "--release"]), 0, "is a replica again");
    check(&ask(&["push", "-A"]), 0, "");
    check(&ask(&["failback"]), 64, "never promoted");
}

#[test]
fn merged_on_the_old_source_alone_and_killed_at_random_moments() {
    if !cyrus::installed() {
        return;
    }
    let mut split = Split::new();
    let seed = std::env::var("SPOOLTAP_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7);
    let mut rng = Rng::new(seed);
    // As long as one whole run takes without being killed is not known before: from early to late.
    let mut kills = 0;
    for number in 0..8u64 {
        let mut command = Spooltap::command(&split.place.server.conf(), &split.state());
        command.args(["--replica", &split.old(), "failback", "--yes", "--merge"]);
        let mut child =
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("starts");
        let until = Instant::now() + Duration::from_millis(10 + number * 120 + rng.below(150) as u64);
        while Instant::now() < until && child.try_wait().expect("waits").is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        if child.try_wait().expect("waits").is_none() {
            child.kill().expect("kills");
            kills += 1;
        }
        child.wait().expect("ends");
    }
    println!("seed {seed}: {kills} kills");
    check(&split.back(&["--yes", "--merge"]), 0, "in line: cyrus://");
    split.place.server.stop().expect("stops");
    split.source.boot().expect("starts again");
    let now = shown(&split.source);
    let there = messages(&now);
    assert!(hashes(&there).is_superset(&split.everything()), "seed {seed}: {there:#?}");
    assert!(!in_inbox(&there, &split.deleted), "deleted is deleted");
    assert_eq!(missing(&messages(&split.at_replica), &there), BTreeMap::new());
    // In the mailbox itself, above all UIDs that either side has given out, each once.
    let inbox: Vec<(&u64, &String)> =
        there.iter().filter(|((name, _), _)| name == "user.u1").map(|((_, uid), hash)| (uid, hash)).collect();
    let uids: Vec<u64> = inbox.iter().map(|(uid, _)| **uid).collect();
    // Which ones depends on how far it had come when it was killed: what is done again gives out new ones again.
    assert!(uids.len() == 7 && uids.starts_with(&[1, 3, 4, 5, 6]) && uids[5] > 7, "{uids:?}");
    assert_eq!(inbox.iter().map(|(_, hash)| hash.as_str()).collect::<BTreeSet<_>>().len(), 7);
    assert!(!there.keys().any(|(name, _)| name.starts_with("user.u1.replica-only")), "{there:#?}");
    let marked = flags(&now, "1").to_string();
    assert!(marked.contains("Flagged") && marked.contains("$urgent"), "{marked}");
    assert_eq!(flags(&now, "3"), serde_json::json!(["\\Answered"]));
}

#[test]
fn merged_on_both_sides_by_the_sources_own_server() {
    if !cyrus::installed() {
        return;
    }
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let mut source = CyrusServer::start(Options::new().source().users(&USERS)).expect("starts");
    let dir = tempfile::tempdir().expect("directory");
    prepare(&source);
    let forth = |conf: &Path, arguments: &[&str]| {
        Spooltap::once(conf, &replica.url(), &dir.path().join("forth"), arguments).expect("runs")
    };
    check(&forth(&source.conf(), &["push", "-A"]), 0, "");
    work_at_the_source(&source);
    let at_source = messages(&shown(&source));
    source.kill9();
    check(&forth(&source.conf(), &["promote", "--force"]), 0, "promoted");
    work_at_the_replica(&replica);
    let at_replica = messages(&shown(&replica));
    // The old machine is back, with nobody let in: its sync_server takes what comes.
    source.boot().expect("starts again");
    let (back, url) = (dir.path().join("back"), source.url());
    let back = |arguments: &[&str]| Spooltap::once(&replica.conf(), &url, &back, arguments).expect("runs");
    check(&back(&["failback"]), 1, "only there user.u1 UID 7");
    let own = replica.url();
    check(&back(&["failback", "--yes", "--merge", "--source-sync", &own]), 0, "in line: csync://");
    let (here, there) = (shown(&replica), shown(&source));
    let deleted = &at_source[&("user.u1".to_owned(), 2)];
    let mut everything = hashes(&at_source);
    everything.extend(hashes(&at_replica));
    assert_eq!(hashes(&messages(&here)), everything);
    assert!(!in_inbox(&messages(&here), deleted), "deleted is deleted");
    // What clients of the promoted server know is under the UIDs they know it by.
    assert_eq!(missing(&at_replica, &messages(&here)), BTreeMap::new());
    assert_eq!(missing(&messages(&here), &messages(&there)), BTreeMap::new());
    for shown in [&here, &there] {
        let uids: Vec<u64> =
            messages(shown).keys().filter(|(name, _)| name == "user.u1").map(|(_, uid)| *uid).collect();
        assert_eq!(uids, [1, 3, 4, 5, 6, 8, 9]);
        assert!(flags(shown, "1").to_string().contains("$urgent"), "{}", flags(shown, "1"));
        assert_eq!(flags(shown, "3"), serde_json::json!(["\\Answered"]));
    }
    let subscribed = here.0["users"]["u1"]["subscribed"].to_string();
    assert!(subscribed.contains("user.u1.OnlyA"), "{subscribed}");
    let verified = back(&["verify", "--records"]);
    // Two mailboxes of one name, and the messages of the one are in the other by now.
    check(&verified, 1, "user.u1.Twice.replica-only-");
    check(&verified, 1, " 1 differences, 0 unreadable");
    check(&forth(&source.conf(), &["failback", "--release"]), 0, "is a replica again");
}
