//! `serve` on a disk that becomes full: clients are told, nothing acknowledged is lost, and it goes on when there is room.

use super::super::archive::Source;
use super::super::cyrus_dir::Place;
use super::super::util::full::{fill, seen_by, small_disk};
use super::super::util::imap::quote;
use super::super::util::process::Group;
use super::super::util::{Options, cyrus, eventually};
use super::{Kind, free_port, target};
use sha1::{Digest, Sha1};
use spooltap::model::{MailboxView, MboxName, MessageGuid, Replica, ReplicaError};
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// Everything that was acknowledged is shown, and can be fetched.
fn shows(session: &mut dyn Replica, acked: &Source) {
    let name: MboxName = acked.snapshot.head.name.clone();
    let view: MailboxView = session.view_full(&name).expect("views").expect("is there");
    let records = view.records.expect("records");
    for record in &acked.snapshot.records {
        assert!(records.contains(record), "{record:?} of {}", records.len());
        let mut body = session.message(&view.head, record).expect("reads").expect("has its body");
        let mut bytes = Vec::new();
        body.reader.read_to_end(&mut bytes).expect("reads");
        assert_eq!(MessageGuid(Sha1::digest(&bytes).into()), record.guid);
    }
}

/// The store is left where it was, on the ordinary disk; false where this machine cannot do it.
fn waited_out(kind: Kind, dir: &Path) -> bool {
    let small = dir.join("store");
    std::fs::create_dir(&small).expect("directory");
    let Some(mut command) = small_disk(&small, 4 << 10) else { return false };
    let passwords = dir.join("passwords");
    std::fs::write(&passwords, format!("{}:{}\n", cyrus::REPLICATOR, cyrus::PASSWORD)).expect("passwords");
    std::fs::set_permissions(&passwords, PermissionsExt::from_mode(0o600)).expect("mode");
    let log = dir.join("serve.log");
    let address = free_port();
    command.arg(env!("CARGO_BIN_EXE_spooltap")).args(["serve", "--store"]);
    let scheme = if kind == Kind::Archive { "file" } else { "cyrus" };
    command.arg(format!("{scheme}://{}", small.display())).arg("--stage").arg(&small);
    command.args(["--listen", &address.to_string()]).arg("--passwords").arg(&passwords);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&log).expect("log"));
    let mut group = Group::spawn(&mut command).expect("starts");
    let up = eventually(Duration::from_secs(60), || TcpStream::connect(address).ok());
    assert!(up.is_some(), "{:?} {}", group.ended(), std::fs::read_to_string(&log).expect("log"));
    let inside = |path: &Path| seen_by(group.pid().as_raw(), path);
    let replica = target(&format!("csync://{}@{address}", cyrus::REPLICATOR));
    let mut session = replica.open().expect("opens");
    let mut source = Source::new("full0001", "user.full");
    source.append("Subject: first\r\n\r\nfirst\r\n");
    session.apply(&source.step(None), &source.bodies).expect("applies");
    let mut acked = source.clone();
    // Bodies that wait in memory, and one that waits in a file.
    for (round, (keep, size)) in [(60, 3_000), (200, 900_000), (0, 10)].into_iter().enumerate() {
        let filler = small.join("filler");
        fill(&inside(&filler), keep);
        let refused = (0..60).find_map(|number| {
            source.append(&format!("Subject: {round} {number}\r\n\r\n{}\r\n", "x".repeat(size)));
            match session.apply(&source.step(Some(acked.since())), &source.bodies) {
                Ok(()) => {
                    acked = source.clone();
                    None
                }
                Err(error) => Some(error),
            }
        });
        let refused = refused.unwrap_or_else(|| panic!("{kind:?} {round}: the disk was not full"));
        if matches!(refused, ReplicaError::Lost { .. }) {
            session = replica.open().expect("opens");
        }
        // What was acknowledged can be read on a full disk as well.
        shows(&mut *session, &acked);
        std::fs::remove_file(inside(&filler)).expect("makes room");
        let done = eventually(Duration::from_secs(20), || {
            let since = match session.view_full(&source.snapshot.head.name) {
                Ok(Some(view)) if view.head.highestmodseq == source.snapshot.head.highestmodseq => source.since(),
                Ok(_) => acked.since(),
                Err(_) => {
                    session = replica.open().ok()?;
                    return None;
                }
            };
            session.apply(&source.step(Some(since)), &source.bodies).ok()
        });
        let said = || std::fs::read_to_string(&log).expect("log");
        assert!(done.is_some(), "{kind:?} {round}: it does not go on, {refused}: {}", said());
        acked = source.clone();
        shows(&mut *session, &acked);
        assert!(!said().contains("panicked"), "{}", said());
    }
    session.close();
    let copied = std::process::Command::new("cp").arg("-a").arg(inside(&small).join(".")).arg(&small).status();
    assert!(copied.expect("runs").success());
    true
}

#[test]
fn an_archive_on_a_full_disk_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().expect("directory");
    waited_out(Kind::Archive, dir.path());
}

/// And a real server finds nothing to mend in it.
#[test]
fn a_cyrus_directory_on_a_full_disk_goes_on_when_there_is_room() {
    if !cyrus::installed() {
        return;
    }
    let mut place = Place::new(Options::new()).expect("is set up");
    let base = place.server.base().to_owned();
    if !waited_out(Kind::Cyrus, &base) {
        return;
    }
    place.boot().expect("starts");
    let found = place.mendable().expect("is checked");
    assert_eq!(found, Vec::<String>::new());
    let mut imap = place.server.imap("u1").expect("logs in");
    let rows = imap.ok("LIST \"\" *").expect("lists").all("LIST");
    let names = rows.iter().map(|row| quote(&row.last().expect("a name").text()));
    let counts: Vec<_> = names.map(|name| imap.ok(format!("SELECT {name}")).expect("selects").exists()).collect();
    assert!(counts.iter().any(|count| *count > 4), "{counts:?}");
}
