//! Debian's own `sync_client` 3.6.1 replicates into either kind of store; what is restored from an archive, and what a
//! real server shows that is started on a store in Cyrus's own format, is what the source shows.

use super::super::archive::restore::restore;
use super::super::cyrus_dir::{Place, SCRIPTS, goes_on};
use super::super::util::diff::Exception;
use super::super::util::{CyrusServer, Options, Rules, Snapshot, cyrus, diff, eventually, snapshot};
use super::{KINDS, Kind, Served, archive};
use std::path::Path;
use std::process::Output;
use std::time::Duration;

pub(super) const WRITTEN: [Exception; 2] = [
    Exception::always(&["users", "*", "mailboxes", "*", "vendor", "lastupdate"], "when this server wrote the files"),
    Exception::always(&["shared", "*", "vendor", "lastupdate"], "when this server wrote the files"),
];

pub(super) fn served_source(served: &Served) -> Options {
    Options::new()
        .set("sync_host", served.address.ip())
        .set("sync_port", served.address.port())
        .set("sync_log", "yes")
        .source()
        .users(&["u1", "u2", "jane.doe"])
}

pub(super) fn good(what: &str, output: &Output, served: &Served) {
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let log = served.log();
    let end: Vec<&str> = log.lines().rev().take(12).collect();
    assert!(output.status.success(), "{what}: {said}\n{}", end.join("\n"));
}

/// A server takes scripts into a mailbox of theirs when their owner first looks: those do who have one in `expected`.
pub(super) fn take_in_scripts(place: &Place, expected: &Snapshot, users: &[String]) {
    let names = place.server.names();
    let has_one = |user: &&String| {
        let scripts = format!("{}.#sieve", names.inbox(user));
        expected.0["names"].as_array().is_some_and(|all| all.iter().any(|name| *name == scripts.as_str()))
    };
    for user in users.iter().filter(has_one) {
        place.server.sieve(user).expect("logs in").list().expect("lists");
    }
}

/// What a store holds, as a real server shows it.
#[track_caller]
pub(super) fn shows_the_same(source: &CyrusServer, kind: Kind, dir: &Path) {
    let users = source.users();
    let expected = snapshot(source, users).expect("is read");
    let compare = |shown: &Snapshot, rules: &Rules| {
        let differences = diff(&expected, shown, rules);
        assert!(differences.is_empty(), "{kind:?}: {}", differences.join("\n"));
    };
    let rules = Rules::beside(&source.release().expect("greets")).and(&WRITTEN);
    if kind == Kind::Archive {
        let replica = CyrusServer::start(Options::new()).expect("starts");
        let state = tempfile::tempdir().expect("directory");
        let output = restore(&archive(dir), &replica, state.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return compare(&snapshot(&replica, users).expect("is read"), &rules);
    }
    // A copy: nobody but us may be at work on the one that is served.
    let mut place = Place::with_copy(Options::new(), &kind.place(dir)).expect("is copied");
    place.boot().expect("starts");
    assert_eq!(place.mendable().expect("runs"), Vec::<String>::new(), "to mend before anybody looked");
    take_in_scripts(&place, &expected, users);
    compare(&snapshot(&place.server, users).expect("is read"), &rules.and(SCRIPTS));
    goes_on(&place, users).expect("goes on");
    assert_eq!(place.mendable().expect("runs"), Vec::<String>::new(), "to mend afterwards");
}

/// Work of every kind on three accounts.
pub(super) fn work(source: &CyrusServer, round: u32) {
    let mut lmtp = source.lmtp().expect("connects");
    for number in 0..4 {
        let text = format!("From: a@x.test\r\nSubject: {round}.{number}\r\n\r\n{}\r\n", "body ".repeat(1 + number * 9));
        lmtp.deliver(&["u1", "u2", "jane.doe"], text.as_bytes()).expect("delivers");
    }
    let large = format!("Subject: large {round}\r\n\r\n{}", "0123456789abcdef\r\n".repeat(30_000));
    lmtp.deliver(&["u1"], large.as_bytes()).expect("delivers");
    let mut imap = source.imap("u1").expect("logs in");
    for command in [
        format!("CREATE INBOX.Work{round}"),
        format!("CREATE \"INBOX.With Space{round}\""),
        format!("SUBSCRIBE INBOX.Work{round}"),
        format!("SETACL INBOX.Work{round} u2 lrs"),
        format!("SETMETADATA INBOX.Work{round} (/private/comment \"mine {round}\")"),
        "SELECT INBOX".into(),
        "STORE 1 +FLAGS (\\Seen \\Flagged Work$1)".into(),
        format!("STORE 2:3 +FLAGS ($Label{round} \\Answered)"),
        format!("COPY 1:3 INBOX.Work{round}"),
        "STORE 2 +FLAGS (\\Deleted)".into(),
        "EXPUNGE".into(),
    ] {
        imap.ok(command).expect("works");
    }
    if round > 1 {
        imap.ok(format!("RENAME INBOX.Work{} INBOX.Renamed{round}", round - 1)).expect("works");
        imap.ok(format!("DELETE \"INBOX.With Space{}\"", round - 1)).expect("works");
    }
    let mut other = source.imap("u2").expect("logs in");
    other.ok(format!("SELECT user.u1.Work{round}")).expect("works");
    other.ok("STORE 1 +FLAGS (\\Seen)").expect("works");
    source.admin().expect("logs in").ok(format!("SETQUOTA user.u1 (STORAGE {})", 100_000 + round)).expect("works");
    let mut sieve = source.sieve("jane.doe").expect("logs in");
    sieve.put("main", &format!("keep; # {round}\r\n")).expect("puts");
    sieve.activate("main").expect("activates");
}

#[test]
fn sync_client_by_hand() {
    if !cyrus::installed() {
        return;
    }
    KINDS.into_iter().for_each(by_hand);
}

fn by_hand(kind: Kind) {
    let dir = tempfile::tempdir().expect("directory");
    // As for a client that is far away: it takes what it is offered.
    let served = Served::of(kind, dir.path(), &["--compress", "on"]);
    let source = CyrusServer::start(served_source(&served)).expect("starts");
    for round in 1..4 {
        work(&source, round);
        match round {
            1 => good("-A", &source.tool("sync_client", &["-v", "-A"]).expect("runs"), &served),
            2 => {
                for user in source.users() {
                    good("-u", &source.tool("sync_client", &["-v", "-u", user]).expect("runs"), &served);
                }
            }
            _ => {
                good("-u", &source.tool("sync_client", &["-v", "-u", "u1", "u2", "jane.doe"]).expect("runs"), &served);
                good("-s", &source.tool("sync_client", &["-v", "-s", "u1", "u2", "jane.doe"]).expect("runs"), &served);
            }
        }
        shows_the_same(&source, kind, dir.path());
    }
    // New mail by mailbox name.
    source.lmtp().expect("connects").deliver(&["u1"], b"Subject: m\r\n\r\nlast\r\n").expect("delivers");
    good("-m", &source.tool("sync_client", &["-v", "-m", "user.u1"]).expect("runs"), &served);
    shows_the_same(&source, kind, dir.path());
    assert_eq!(served.terminate().code(), Some(0));
}

#[test]
fn sync_client_rolling() {
    if !cyrus::installed() {
        return;
    }
    KINDS.into_iter().for_each(rolling);
}

fn rolling(kind: Kind) {
    let dir = tempfile::tempdir().expect("directory");
    let served = Served::of(kind, dir.path(), &[]);
    let source =
        CyrusServer::start(served_source(&served).set("sync_shutdown_file", "@BASE@/conf/sync/stop")).expect("starts");
    good("-A", &source.tool("sync_client", &["-v", "-A"]).expect("runs"), &served);
    std::thread::scope(|scope| {
        let rolling = scope.spawn(|| source.tool("sync_client", &["-v", "-R", "-d", "1"]));
        (1..3).for_each(|round| work(&source, round));
        // It has taken up everything when it has nothing to do for a while.
        let log = source.base().join("conf/sync/log");
        let idle = eventually(Duration::from_secs(60), || {
            let quiet = || !log.exists() && !log.with_file_name("log-run").exists();
            (quiet() && {
                std::thread::sleep(Duration::from_millis(300));
                quiet()
            })
            .then_some(())
        });
        std::fs::write(source.base().join("conf/sync/stop"), "").expect("asks it to stop");
        good("-R", &rolling.join().expect("joins").expect("runs"), &served);
        assert_eq!(idle, Some(()));
    });
    shows_the_same(&source, kind, dir.path());
    assert_eq!(served.terminate().code(), Some(0));
}
