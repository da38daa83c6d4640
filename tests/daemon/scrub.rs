//! The continuous scrub of `run`, and `scan --paranoid`: damaged message files are named, whatever interrupts the reading.
//! No server is needed: the store is a recorded one.

use crate::util::{Spooltap, eventually, store};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

const LONG: Duration = Duration::from_secs(60);

struct Scene {
    store: store::Store,
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        Self { store: store::store("2.5.11-a"), dir: tempfile::tempdir().expect("directory") }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn command(&self, settings: &str) -> Command {
        let config = self.dir.path().join("spooltap.toml");
        fs::write(&config, settings).expect("is written");
        let mut command = Spooltap::command(&self.store.conf, &self.state());
        let replica = format!("file://{}/archive", self.dir.path().display());
        command.arg("--config").arg(config).args(["--replica", &replica]);
        command
    }

    fn says(&self, words: &[&str]) -> Output {
        self.command("").args(words).output().expect("runs")
    }

    fn run(&self, settings: &str) -> Spooltap {
        let mut command = self.command(settings);
        command.arg("run");
        let mut run = Spooltap::spawn(command, &self.state()).expect("starts");
        run.wait_live(LONG).expect("is live");
        run
    }

    /// A book of the state directory as a stop behind user.u2 leaves it, an hour ago.
    fn stopped_at_u2(&self, book: &str) -> String {
        let begun = an_hour_ago();
        let path = self.state().join(book);
        let text = fs::read_to_string(&path).expect("is there");
        let identity = serde_json::from_str::<Value>(&text).expect("is JSON")["store"].clone();
        let left = format!(
            r#"{{"store":{identity},"pass":{{"begun_at":{begun},"ended_at":null,"at":["user.u2",4294967295],"mailboxes":2,"messages":9,"bytes":9,"damaged_total":0,"damaged":[]}},"last":null}}"#
        );
        fs::write(path, &left).expect("is written");
        left
    }

    fn file(&self, mailbox: &str, name: &str) -> PathBuf {
        self.store.dir.path().join("spool/user").join(mailbox).join(name)
    }

    /// What `status --json` says, once the scrub is as wanted.
    #[track_caller]
    fn scrub(&self, what: &str, good: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let found = eventually(LONG, || {
            let output = self.says(&["status", "--json"]);
            last = serde_json::from_slice(&output.stdout).unwrap_or_default();
            good(&last["scrub"]).then(|| last.clone())
        });
        found.unwrap_or_else(|| panic!("not {what}: {last}"))
    }
}

fn an_hour_ago() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_secs() - 3600
}

/// Another message of the same size.
fn spoil(path: &Path) -> Vec<u8> {
    let good = fs::read(path).expect("is read");
    let mut bad = good.clone();
    bad[10] ^= 1;
    fs::write(path, bad).expect("is written");
    good
}

#[test]
fn a_scrub_names_damaged_files_over_a_kill_and_until_they_are_mended() {
    let scene = Scene::new();
    let bad = scene.file("u1", "3.");
    let good = spoil(&bad);
    let settings = "scrub_mib_per_second = 100\nscrub_every_seconds = 1\nbusy_io_percent = 0\n";
    let run = scene.run(settings);
    let damaged = |scrub: &Value| scrub["last"]["damaged_total"] == 1;
    let status = scene.scrub("damaged", damaged);
    let fault = status["faults"].to_string();
    assert!(fault.contains("user.u1 UID 3: ") && fault.contains(&bad.display().to_string()), "{fault}");
    let (last, mailboxes) = (&status["scrub"]["last"], status["scrub"]["mailboxes"].as_u64());
    assert!(
        last["messages"].as_u64() > Some(20) && last["mailboxes"].as_u64() == mailboxes && mailboxes > Some(5),
        "{status}"
    );
    assert!(run.log().contains("damage found by the scrub"), "{}", run.log_end(20));
    let table = scene.says(&["status"]);
    assert_eq!(table.status.code(), Some(1), "a warning");
    let table = String::from_utf8(table.stdout).expect("text");
    assert!(table.contains("scrub    ") && table.contains("  damaged: user.u1 UID 3"), "{table}");
    run.kill9();

    // The next life does not begin from nothing, and would not begin a pass for a week.
    let run = scene.run("scrub_mib_per_second = 100\n");
    scene.scrub("remembered", damaged);
    run.kill9();

    fs::write(&bad, good).expect("is written");
    let run = scene.run(settings);
    let status = scene.scrub("mended", |scrub| scrub["last"]["damaged_total"] == 0);
    assert!(!status["faults"].to_string().contains("scrub"), "{status}");
    run.terminate().expect("ends");
}

#[test]
fn a_scrub_goes_on_where_a_stop_has_left_it() {
    let scene = Scene::new();
    let settings = "scrub_mib_per_second = 100\nbusy_io_percent = 0\n";
    let run = scene.run(settings);
    scene.scrub("done", |scrub| !scrub["last"].is_null());
    run.terminate().expect("ends");
    spoil(&scene.file("u1", "3."));
    spoil(&scene.file("u3", "1."));
    scene.stopped_at_u2("scrub.json");
    let run = scene.run(settings);
    let status = scene.scrub("done", |scrub| !scrub["last"].is_null());
    let last = &status["scrub"]["last"];
    let begun = last["begun_at"].as_u64().expect("a time");
    assert!(begun <= an_hour_ago(), "it was gone on with: {status}");
    assert!(last["messages"].as_u64() > Some(9), "{status}");
    // What lies behind is the next pass's.
    let faults = status["faults"].to_string();
    assert!(faults.contains("user.u3 UID 1: ") && !faults.contains("user.u1 UID 3"), "{status}");
    run.terminate().expect("ends");
}

#[test]
fn a_paranoid_scan_reads_every_message_and_goes_on_after_a_kill() {
    let scene = Scene::new();
    let output = scene.says(&["scan", "--paranoid"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.ends_with(" 0 damaged\n"), "{text}");

    let (bad, gone) = (scene.file("u1", "3."), scene.file("u2", "12."));
    spoil(&bad);
    fs::remove_file(&gone).expect("is removed");
    let output = scene.says(&["scan", "--paranoid"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    for (name, path) in [("user.u1 UID 3", &bad), ("user.u2 UID 12", &gone)] {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
        assert!(line.contains(&path.display().to_string()), "{line}");
    }

    // A kill in the middle, which the file tells of: the next one goes on there.
    let left = scene.stopped_at_u2("paranoid.json");
    let output = scene.says(&["scan", "--paranoid"]);
    let (text, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(told.contains("going on at user.u2"), "{told}");
    assert!(!text.contains("user.u2 UID 12") && !text.contains("user.u1 UID 3"), "both lie behind: {text}");
    fs::write(scene.state().join("paranoid.json"), left).expect("is written");
    let output = scene.says(&["scan", "--paranoid", "--afresh"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("user.u2 UID 12"));
}
