//! `spooltap run` is killed with SIGKILL again and again while a recording is played, each time in the middle of
//! something else. What the archive, or the directory in Cyrus's own format, then is after one more start is what IMAP
//! showed.

use spooltap::archive::{Archive, ArchiveStore};
use spooltap::model::MailStore;
use spooltap::replay::{Depth, Player, Recording, Speed, compare_replica};
use spooltap::spool::open_store;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The log is shown when the test fails.
fn start(place: &Path, conf: &Path, url: &str) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(place.join("log")).expect("log");
    Command::new(env!("CARGO_BIN_EXE_spooltap"))
        .arg("run")
        .arg("--imapd-conf")
        .arg(conf)
        .arg("--state")
        .arg(place.join("state"))
        .arg("--replica")
        .arg(url)
        .arg("--allow-removals")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("starts")
}

#[test]
fn killed_again_and_again_it_arrives() {
    let dir = tempfile::tempdir().expect("directory");
    let url = format!("file://{}", dir.path().join("archive").display());
    arrives_at(dir.path(), &url, &|| {
        Ok(Box::new(ArchiveStore::open(Archive::open(&url).map_err(|error| error.to_string())?).map_err(said)?))
    });
}

#[test]
fn killed_again_and_again_it_arrives_in_a_cyrus_directory() {
    let dir = tempfile::tempdir().expect("directory");
    let store = dir.path().join("store");
    let conf = store.join("imapd.conf");
    let open = || -> Result<Box<dyn MailStore>, String> { Ok(Box::new(open_store(&conf).map_err(said)?)) };
    arrives_at(dir.path(), &format!("cyrus://{}", store.display()), &open);
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

type Open<'a> = &'a dyn Fn() -> Result<Box<dyn MailStore>, String>;

fn arrives_at(place: &Path, url: &str, open: Open<'_>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/replays/2.5.11-a");
    let recording = Recording::open(&folder).expect("recording");
    let conf = recording.unpack(&place.join("source")).expect("unpacks");
    let mut player = Player::new(&recording, &place.join("source"));
    let play = std::thread::spawn(move || while player.next_mark(Speed::Recorded(20.0)).expect("plays").is_some() {});
    let mut kills = 0;
    while !play.is_finished() {
        let mut run = start(place, &conf, url);
        // From before anything was done to in the middle of live work.
        std::thread::sleep(Duration::from_millis(20 + kills * 67 % 400));
        run.kill().expect("kills");
        run.wait().expect("ends");
        kills += 1;
    }
    play.join().expect("played");
    assert!(kills >= 10, "{kills}");
    let (_, truth) = recording.truths().last().expect("has marks").expect("reads");
    let found = arrives(place, &conf, &truth, url, open);
    let log = std::fs::read_to_string(place.join("log")).expect("log");
    assert!(found.is_empty(), "after {kills} kills:\n{}\n{log}", found.join("\n"));
}

/// One more life, which ends in good order; what still differs after it.
fn arrives(place: &Path, conf: &Path, truth: &serde_json::Value, url: &str, open: Open<'_>) -> Vec<String> {
    let said = || std::fs::read_to_string(place.join("log")).expect("log");
    let before = said().len();
    let mut run = start(place, conf, url);
    let deadline = Instant::now() + Duration::from_secs(20);
    // Earlier than that it does not hear a signal.
    while !said()[before..].contains(" live") && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let found = loop {
        let found = match open().map(|kept| compare_replica(&*kept, truth, Depth::Bodies)) {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => vec![error.to_string()],
            Err(error) => vec![error],
        };
        if found.is_empty() || Instant::now() > deadline {
            break found;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let pid = nix::unistd::Pid::from_raw(run.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signals");
    assert_eq!(run.wait().expect("ends").code(), Some(0));
    found
}
