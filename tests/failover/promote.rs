//! A replica takes over: a directory on which a real Cyrus is started then, and a real server. Nothing is pushed over it.

use super::check;
use crate::cyrus_dir::Place;
use crate::util::{CyrusServer, Options, Spooltap, cyrus};
use std::path::Path;
use std::process::Output;

pub fn deliver(server: &CyrusServer, users: &[&str], text: &str) {
    let text = format!("From: a@lab.test\r\nSubject: {text}\r\n\r\n{text}\r\n");
    let said = server.lmtp().expect("connects").deliver(users, text.as_bytes()).expect("delivers");
    assert!(said.iter().all(|line| line.starts_with('2')), "{said:?}");
}

fn exists(server: &CyrusServer, user: &str) -> usize {
    server.imap(user).expect("logs in").ok("SELECT INBOX").expect("selects").exists()
}

#[test]
fn a_directory_takes_over_and_nothing_is_pushed_over_it() {
    if !cyrus::installed() {
        return;
    }
    let mut source = CyrusServer::start(Options::new().source().users(&["u1", "u2"])).expect("starts");
    let mut place = Place::new(Options::new()).expect("is set up");
    let (conf, url) = (source.conf(), place.url());
    let state = place.state.path().join("state");
    let ask = |state: &Path, arguments: &[&str]| Spooltap::once(&conf, &url, state, arguments).expect("runs");
    for number in 0..5 {
        deliver(&source, &["u1", "u2"], &format!("arrives {number}"));
    }
    source.admin().expect("logs in").ok("SETQUOTA user.u1 (STORAGE 10000)").expect("sets");
    check(&ask(&state, &["push", "-A"]), 0, "");
    deliver(&source, &["u1"], "does not arrive");
    source.kill9();

    let refused = ask(&state, &["promote"]);
    check(&refused, 1, "only at the source user.u1 UID 6: ");
    check(&refused, 1, "last check: 2 mailboxes, 10 messages, 2 users, 1 quota roots: whole");
    check(&refused, 1, "NO-GO");
    check(&ask(&state, &["promote", "--force", "--dry-run"]), 1, "missing sasl_pwcheck_method: auxprop");
    check(&ask(&state, &["push", "-u", "u2"]), 0, "");
    // Killed on the way, again and again.
    for number in 0..6 {
        let mut command = Spooltap::command(&conf, &state);
        command.args(["--replica", &url, "promote", "--force", "--write-conf"]);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut child = command.spawn().expect("starts");
        std::thread::sleep(std::time::Duration::from_millis(5 + number * 40));
        let _ = child.kill();
        child.wait().expect("ends");
    }
    check(&ask(&state, &["promote", "--force", "--write-conf", "--bodies"]), 0, "promoted: cyrus://");
    let conf_there = std::fs::read_to_string(place.dir().join("imapd.conf")).expect("reads");
    assert_eq!(conf_there.matches("sasl_pwcheck_method").count(), 1, "{conf_there}");
    check(&ask(&state, &["promote"]), 0, "promoted: cyrus://");

    // This source and any other.
    let fresh = place.state.path().join("fresh");
    for state in [&state, &fresh] {
        check(&ask(state, &["push", "-A"]), 89, "was promoted");
        check(&ask(state, &["run"]), 89, "failback");
        check(&ask(state, &["migrate", "seed"]), 89, "failback");
    }
    assert!(place.dir().join("cyrus.conf").exists());
    place.boot().expect("starts on what was promoted");
    assert_eq!((exists(&place.server, "u1"), exists(&place.server, "u2")), (5, 5));
    deliver(&place.server, &["u1"], "goes on");
    assert_eq!(exists(&place.server, "u1"), 6);
    let found = place.mendable().expect("runs");
    assert!(found.is_empty(), "{found:?}");
    check(&ask(&state, &["promote", "--json"]), 0, "\"promoted\":true");
}

#[test]
fn a_store_that_is_not_whole_is_not_promoted() {
    if !cyrus::installed() {
        return;
    }
    let source = CyrusServer::start(Options::new().source().users(&["u1"])).expect("starts");
    let place = Place::new(Options::new()).expect("is set up");
    let state = place.state.path().join("state");
    let ask = |arguments: &[&str]| Spooltap::once(&source.conf(), &place.url(), &state, arguments).expect("runs");
    for number in 0..3 {
        deliver(&source, &["u1"], &number.to_string());
    }
    check(&ask(&["push", "-A"]), 0, "");
    check(&ask(&["promote", "--dry-run", "--bodies"]), 0, "GO cyrus://");
    let messages = walkdir::WalkDir::new(place.dir().join("spool")).into_iter().flatten();
    let message = messages.into_iter().find(|file| file.file_name() == "2.").expect("a message").into_path();
    let text = std::fs::read(&message).expect("reads");
    let mut damaged = text.clone();
    damaged[20] ^= 1;
    std::fs::write(&message, &damaged).expect("writes");
    check(&ask(&["promote", "--bodies"]), 1, "FAULT user.u1 UID 2: its file is another message");
    std::fs::remove_file(&message).expect("removes");
    check(&ask(&["promote"]), 1, "FAULT user.u1 UID 2");
    check(&ask(&["push", "-A"]), 0, "");
    std::fs::write(&message, &text).expect("writes");
    check(&ask(&["promote", "--bodies"]), 0, "promoted");
}

#[test]
fn a_server_takes_over_from_a_source_that_is_gone() {
    if !cyrus::installed() {
        return;
    }
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let source = CyrusServer::start(Options::new().source().users(&["u1"])).expect("starts");
    let dir = tempfile::tempdir().expect("directory");
    let state = dir.path().join("state");
    let url = replica.url();
    let at = |conf: &Path, state: &Path, arguments: &[&str]| -> Output {
        Spooltap::once(conf, &url, state, arguments).expect("runs")
    };
    deliver(&source, &["u1"], "arrives");
    let mut run = Spooltap::run(&source.conf(), &url, &state).expect("starts");
    run.wait_live(std::time::Duration::from_secs(60)).expect("is live");
    check(&at(&source.conf(), &state, &["drain", "--wait"]), 0, "drained");
    check(&at(&source.conf(), &state, &["promote"]), 74, "daemon runs");
    run.kill9();
    // Its disk is gone.
    let gone = dir.path().join("gone.conf");
    check(&at(&gone, &state, &["promote"]), 1, "the source cannot be read");
    check(&at(&gone, &state, &["promote"]), 1, "the last that the daemon wrote down");
    let promoted = at(&gone, &state, &["promote", "--force"]);
    check(&promoted, 0, "promoted: csync://");
    check(&promoted, 0, "sync_server line");
    for state in [state.clone(), dir.path().join("another")] {
        check(&at(&source.conf(), &state, &["push", "-A"]), 89, "was promoted");
    }
    // Everybody can read it, and comparing is allowed.
    let told = replica.admin().expect("logs in").ok("GETMETADATA \"\" /shared/vendor/spooltap/promoted");
    let told = told.expect("answers").lines.iter().map(|line| line.text()).collect::<String>();
    assert!(told.contains("seconds") || told.contains("csync://"), "{told}");
    check(&at(&source.conf(), &state, &["verify"]), 0, "equal");
    let archive = format!("file://{}", dir.path().join("archive").display());
    let output = Spooltap::once(&source.conf(), &archive, &state, &["promote"]).expect("runs");
    check(&output, 64, "an archive serves nobody");
}
