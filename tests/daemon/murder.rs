//! Servers of a Murder that are no source, and such as are no replica.

use crate::util::{CyrusServer, Options, Spooltap, cyrus, store};
use std::fs;
use std::process::Output;

#[track_caller]
fn check(output: &Output, code: i32, says: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    let said = says.iter().all(|part| text.contains(part));
    assert!(output.status.code() == Some(code) && said, "{:?} instead of {code}, {says:?}: {text}", output.status);
}

/// A store whose imapd.conf says this as well.
fn with(text: &str, without: &str) -> crate::util::Store {
    let store = store("3.6.1-a");
    let conf = fs::read_to_string(&store.conf).expect("reads");
    let kept = conf.lines().filter(|line| without.is_empty() || !line.starts_with(without));
    let conf = kept.map(|line| format!("{line}\n")).collect::<String>() + text;
    fs::write(&store.conf, conf).expect("writes");
    store
}

#[test]
fn a_front_end_and_the_master_are_no_sources() {
    let state = tempfile::tempdir().expect("directory");
    let replica = format!("file://{}/archive", state.path().display());
    let push = |conf| Spooltap::once(conf, &replica, state.path(), &["push", "-A"]).expect("runs");
    // A front end by its configuration: a master, and no partition.
    let front = with("mupdate_server: master.test\n", "partition-");
    check(&push(&front.conf), 66, &["front end of a Murder (mupdate_server master.test)", "back ends"]);
    // A front end or the master by its list: every mailbox is on another server. The master's imapd.conf need not say more.
    let master = with("", "");
    let list = master.dir.path().join("conf/mailboxes.db");
    let rows = ["user.u1", "user.u2"]
        .map(|name| format!("N{name}\t%(A %(u1 lrs) I x-{name} P back.test!default T r V 1 F 1 M 1)\n"));
    fs::write(&list, rows.concat()).expect("writes");
    let conf = fs::read_to_string(&master.conf).expect("reads") + "mboxlist_db: flat\n";
    fs::write(&master.conf, conf).expect("writes");
    check(&push(&master.conf), 66, &["all mailboxes in it are on other servers", "mupdate master", "back ends"]);
}

/// Only the IMAP port of a server tells that it is in a Murder; over csync the first mailbox is refused with the reason
/// (`cli::trouble`).
#[test]
fn a_back_end_is_no_replica() {
    if !cyrus::installed() {
        return;
    }
    let options = Options::new().set("mupdate_server", "127.0.0.1").set("mupdate_port", "1");
    let replica = CyrusServer::start(options).expect("starts");
    let source = store("3.6.1-d");
    let state = tempfile::tempdir().expect("directory");
    let url = format!("imap://repl@{}", replica.imap_address());
    let output = Spooltap::once(&source.conf, &url, state.path(), &["push", "-A"]).expect("runs");
    check(&output, 77, &["part of a Murder (mupdate://127.0.0.1/)", "mupdate_server"]);
}
