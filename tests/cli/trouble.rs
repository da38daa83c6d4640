//! Trouble with a replica: each kind has one clear line, its exit code, and leaves both sides as they were.

use super::{check, said};
use crate::util::diff::Exception;
use crate::util::{CyrusServer, Options, Rules, Spooltap, Store, cyrus, diff, lock, snapshot, store};
use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

/// When the replica wrote its files; how a user's scripts count for quota.
pub const NOT_COMPARED: &[Exception] = &[
    Exception::always(&["users", "*", "mailboxes", "*", "vendor", "lastupdate"], "when this server wrote the files"),
    Exception::always(&["shared", "*", "vendor", "lastupdate"], "when this server wrote the files"),
];

/// A server that writes names as this source does.
pub fn server_for(source: &Store) -> CyrusServer {
    CyrusServer::start(Options::new().names_of(&source.conf, &source.release)).expect("starts")
}

/// Lines of what differs between the recorded truth and the replica.
pub fn differences(source: &Store, replica: &CyrusServer) -> Vec<String> {
    let shown = snapshot(replica, &source.users()).expect("is read");
    diff(&source.truth, &shown, &Rules::recorded(&source.release).and(NOT_COMPARED))
}

/// The mailbox list of a server as Cyrus's own tool prints it.
fn list(server: &CyrusServer) -> String {
    String::from_utf8_lossy(&server.tool("ctl_mboxlist", &["-d"]).expect("runs").stdout).into_owned()
}

fn spooltap(source: &Store, url: &str, password: &str, arguments: &[&str]) -> Output {
    let mut command = Spooltap::command(&source.conf, &source.dir.path().join("conf.spooltap"));
    command.env("SPOOLTAP_PASSWORD", password).args(["--replica", url]).args(arguments).output().expect("runs")
}

#[test]
fn a_replica_that_refuses_us_says_why_and_one_that_is_not_there_is_69() {
    if !cyrus::installed() {
        return;
    }
    let source = store::store("2.5.11-a");
    let replica = server_for(&source);
    let before = list(&replica);
    let url = replica.url();
    // A port that was free a moment ago.
    let nobody =
        std::net::TcpListener::bind((replica.csync().ip(), 0)).and_then(|socket| socket.local_addr()).expect("port");
    let cases: &[(&str, String, &str, i32, &[&str])] = &[
        ("wrong password", url.clone(), "wrong", 80, &["refuses the login of repl", "check user and password"]),
        ("no admin", url.replace("repl@", "u1@"), "secret", 81, &["permission denied", "one of the replica's admins"]),
        ("another service", url.replace(":2005", ":1143"), "secret", 77, &["not a csync service", "2005"]),
        ("nobody answers", format!("csync://repl@{nobody}"), "secret", 69, &["refused", "does sync_server listen"]),
        ("no such host", "csync://repl@no-such-host.invalid".into(), "secret", 69, &["is this the host"]),
    ];
    for (what, url, password, code, says) in cases {
        for command in [&["push", "-A"][..], &["verify"], &["run"]] {
            // A daemon waits until its replica is there.
            if command == ["run"] && *code == 69 {
                continue;
            }
            let output = spooltap(&source, url, password, command);
            check(what, &output, *code, says);
            assert!(said(&output).contains(url.as_str()), "{what}: names the replica: {}", said(&output));
            // A daemon has several replicas and logs each.
            let most = 1 + usize::from(command == ["run"]);
            assert!(said(&output).trim_end().lines().count() <= most, "{what}: {}", said(&output));
        }
    }
    assert_eq!(list(&replica), before);
}

#[test]
fn a_replica_in_a_murder_that_cannot_take_mailboxes_is_named_and_stays_as_it_was() {
    if !cyrus::installed() {
        return;
    }
    let source = store::store("2.5.11-a");
    let options = Options::new().names_of(&source.conf, &source.release);
    let options = [("server", "127.0.0.1"), ("port", "9"), ("authname", "x"), ("password", "x")]
        .into_iter()
        .fold(options, |options, (key, value)| options.set(&format!("mupdate_{key}"), value));
    let replica = CyrusServer::start(options).expect("starts");
    let before = list(&replica);
    let output = spooltap(&source, &replica.url(), "secret", &["push", "-A"]);
    check("push", &output, 1, &["user.u1: ", "part of a Murder", "mupdate"]);
    assert_eq!(list(&replica), before);
}

#[test]
fn a_partition_that_the_replica_lacks_stops_only_its_mailboxes_and_a_mapping_cures_it() {
    if !cyrus::installed() {
        return;
    }
    let source = store::store("3.6.1-d");
    let replica = server_for(&source);
    let output = spooltap(&source, &replica.url(), "secret", &["push", "-A"]);
    check("push", &output, 1, &["user.u1.OnP2: ", "add partition-p2 to its imapd.conf", "[partition]"]);
    let there = list(&replica);
    assert!(there.contains("\"user.u1\"") && there.contains("\"user.u6\""), "{there}");
    assert!(!there.contains("OnP2"), "{there}");

    let toml = source.dir.path().join("spooltap.toml");
    fs::write(&toml, "[partition]\np2 = \"default\"\n").expect("is written");
    let config = toml.to_str().expect("UTF-8");
    check(
        "push with a mapping",
        &spooltap(&source, &replica.url(), "secret", &["--config", config, "push", "-A"]),
        0,
        &[],
    );
    check("verify", &spooltap(&source, &replica.url(), "secret", &["--config", config, "verify"]), 0, &["equal"]);
    let differences = differences(&source, &replica);
    // Its root is told by the name of the partition.
    assert!(differences.iter().all(|line| line.contains("partition")), "{differences:#?}");
}

/// Holds Cyrus's kind of exclusive lock on a file until it is dropped.
fn hold(path: &Path) -> fs::File {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("opens");
    lock(&file);
    file
}

#[test]
fn a_lock_held_at_the_source_or_on_the_replica_keeps_up_nobody_else() {
    if !cyrus::installed() {
        return;
    }
    let source = store::store("2.5.11-a");
    let replica = server_for(&source);
    // At the source: what is committed is read beside the lock.
    let held = hold(&source.dir.path().join("spool/user/u9/cyrus.index"));
    let started = Instant::now();
    check("push", &spooltap(&source, &replica.url(), "secret", &["push", "-A"]), 0, &[]);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert_eq!(differences(&source, &replica), Vec::<String>::new());
    drop(held);

    // On the replica: that mailbox waits, the others go on.
    let replica = server_for(&source);
    check("push", &spooltap(&source, &replica.url(), "secret", &["push", "-u", "u9"]), 0, &[]);
    let index = find(&replica.base().join("spool"), "cyrus.index");
    let held = hold(&index);
    fs::remove_dir_all(source.dir.path().join("conf.spooltap")).expect("state is forgotten");
    let toml = source.dir.path().join("spooltap.toml");
    fs::write(&toml, "replica_timeout_seconds = 8\n").expect("is written");
    let output =
        spooltap(&source, &replica.url(), "secret", &["--config", toml.to_str().expect("UTF-8"), "push", "-A"]);
    check("push while locked there", &output, 1, &["u9: ", &replica.url(), "lost"]);
    drop(held);
    let differences = differences(&source, &replica);
    assert!(differences.iter().all(|line| line.contains("u9")), "{differences:#?}");
    check("push after that", &spooltap(&source, &replica.url(), "secret", &["push", "-A"]), 0, &[]);
    assert_eq!(self::differences(&source, &replica), Vec::<String>::new());
}

fn find(dir: &Path, name: &str) -> std::path::PathBuf {
    let mut found = walkdir::WalkDir::new(dir).into_iter().flatten().filter(|entry| entry.file_name() == name);
    found.next().expect("is there").into_path()
}
