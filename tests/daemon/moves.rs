//! A user goes from one replica to another: while mail comes in, and killed at every step.

use super::LONG;
use crate::util::imap::literal;
use crate::util::{CyrusServer, Gate, Options, Spooltap, cyrus, eventually};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const FOLDERS: [&str; 3] = ["INBOX", "INBOX.Sent", "INBOX.Sent.2023"];

/// A source with two users, and two replicas of which the first one gets them.
struct Lab {
    source: CyrusServer,
    old: CyrusServer,
    new: CyrusServer,
    gates: [Gate; 2],
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let source = CyrusServer::start(Options::new().users(&["u1", "u2"])).expect("starts");
        let old = CyrusServer::start(Options::new()).expect("starts");
        let new = CyrusServer::start(Options::new()).expect("starts");
        let gates = [Gate::before(old.csync()).expect("listens"), Gate::before(new.csync()).expect("listens")];
        let dir = tempfile::tempdir().expect("directory");
        let [a, b] = gates.each_ref().map(Gate::url);
        let text = format!(
            "[[replica]]\nname = \"old\"\nurl = {a:?}\n[[replica]]\nname = \"new\"\nurl = {b:?}\n[[route]]\nto = [\"old\"]\n"
        );
        fs::write(dir.path().join("spooltap.toml"), text).expect("writes");
        let mut imap = source.imap("u1").expect("logs in");
        for folder in &FOLDERS[1..] {
            imap.ok(format!("CREATE {folder}")).expect("creates");
            imap.ok(format!("SUBSCRIBE {folder}")).expect("subscribes");
            for number in 0..4 {
                let text = format!("From: a@lab.test\r\nSubject: {folder} {number}\r\n\r\n{}\r\n", "x".repeat(500));
                imap.ok([format!("APPEND {folder} ").into_bytes(), literal(text.as_bytes())].concat())
                    .expect("appends");
            }
        }
        source.sieve("u1").expect("logs in").put("main", "keep;\r\n").expect("puts");
        source.sieve("u1").expect("logs in").activate("main").expect("activates");
        let lab = Self { source, old, new, gates, dir };
        lab.deliver(5);
        lab
    }

    fn deliver(&self, count: usize) {
        let mut lmtp = self.source.lmtp().expect("connects");
        for number in 0..count {
            let text = format!("From: a@lab.test\r\nSubject: {number}\r\n\r\ny\r\n");
            let answers = lmtp.deliver(&["u1", "u2"], text.as_bytes()).expect("delivers");
            assert!(answers.iter().all(|answer| answer.starts_with('2')), "{answers:?}");
        }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Spooltap::command(&self.source.conf(), &self.state());
        command.arg("--config").arg(self.dir.path().join("spooltap.toml")).args(words);
        command
    }

    fn says(&self, words: &[&str]) -> String {
        let output = self.command(words).output().expect("runs");
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{words:?}: {said}");
        said
    }

    /// How far the book says it is.
    fn phase(&self) -> String {
        let text = fs::read(self.state().join("moves.json")).unwrap_or_default();
        let book: Value = serde_json::from_slice(&text).unwrap_or_default();
        book[0]["phase"].as_str().unwrap_or("none").to_owned()
    }

    fn end(&self) {
        let (source, old, new) = (counts(&self.source), counts(&self.old), counts(&self.new));
        assert_eq!((&new, &old), (&source, &[None; 3]), "whole on exactly one side");
        assert!(self.old.sieve("u1").map_or(true, |mut sieve| sieve.list().unwrap_or_default().is_empty()));
        assert_eq!(self.new.sieve("u1").expect("logs in").list().expect("lists").len(), 1);
        // The neighbour stays where he was.
        let inbox =
            |server: &CyrusServer| server.imap("u2").ok()?.ok("EXAMINE INBOX").ok().map(|answer| answer.exists());
        assert_eq!((inbox(&self.old), inbox(&self.new)), (inbox(&self.source), None));
        assert_eq!(self.says(&["verify"]).matches(": equal").count(), 2);
    }
}

/// Messages in each of u1's mailboxes.
fn counts(server: &CyrusServer) -> [Option<usize>; 3] {
    let Ok(mut imap) = server.imap("u1") else { return [None; 3] };
    FOLDERS.map(|folder| imap.ok(format!("EXAMINE {folder}")).ok().map(|answer| answer.exists()))
}

#[test]
fn a_user_moves_while_mail_comes_in() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new();
    let mut spooltap = Spooltap::spawn(lab.command(&["run"]), &lab.state()).expect("starts");
    spooltap.wait_live(LONG).expect("is live");
    eventually(LONG, || (counts(&lab.old) == counts(&lab.source)).then_some(())).expect("is seeded");
    let said = std::thread::scope(|scope| {
        let moved = scope.spawn(|| lab.says(&["move", "u1", "--to", "new"]));
        for _ in 0..10 {
            lab.deliver(3);
        }
        moved.join().expect("moves")
    });
    assert!(said.lines().last().is_some_and(|line| line.ends_with(": done") || line.ends_with("done")), "{said}");
    lab.deliver(2);
    eventually(LONG, || (counts(&lab.new) == counts(&lab.source)).then_some(())).expect("goes on at the new one");
    let wrong = lab.command(&["move", "nobody", "--to", "new"]).output().expect("runs");
    assert_eq!(wrong.status.code(), Some(64), "{}", String::from_utf8_lossy(&wrong.stderr));
    assert!(lab.says(&["status"]).contains("move     u1 to"));
    lab.says(&["drain", "--wait"]);
    lab.end();
    // And back: what was emptied is filled again.
    lab.says(&["move", "u1", "--to", "old"]);
    assert_eq!((counts(&lab.old), counts(&lab.new)), (counts(&lab.source), [None; 3]));
    assert!(spooltap.terminate().expect("ends").success());
}

/// Each try lets some bytes more through to one side and is killed there; it ends by itself when there is no step left.
#[test]
fn killed_at_every_step_of_a_move_the_user_is_whole_somewhere() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new();
    lab.says(&["push", "-A"]);
    let whole = counts(&lab.source);
    let mut kills = Vec::new();
    for (side, step) in [(1, 500), (0, 25)] {
        for try_number in 1.. {
            assert!(try_number < 60, "no end: {kills:?}");
            lab.gates[side].hold_after(try_number * step);
            let mut one = Spooltap::spawn(lab.command(&["move", "u1", "--to", "new"]), &lab.state()).expect("starts");
            let held = eventually(LONG, || {
                if lab.gates[side].wait_held(Duration::from_millis(20)) {
                    return Some(true);
                }
                // The second side is not touched before the first one is filled.
                (one.ended().is_some() || side == 1 && lab.phase() != "none" && lab.phase() != "filling")
                    .then_some(false)
            });
            let held = held.unwrap_or_else(|| panic!("neither held nor done after {kills:?}: {}", one.log_end(12)));
            one.kill9();
            lab.gates[side].cut();
            let phase = lab.phase();
            kills.push((side, phase.clone()));
            let holder = if phase == "none" || phase == "filling" { &lab.old } else { &lab.new };
            assert_eq!(counts(holder), whole, "{kills:?}");
            if !held {
                break;
            }
        }
    }
    let killed = |what: (usize, &str)| kills.iter().filter(|(side, phase)| (*side, phase.as_str()) == what).count();
    assert!(killed((1, "filling")) >= 3 && killed((0, "emptying")) >= 5, "{kills:?}");
    lab.says(&["move", "u1", "--to", "new"]);
    lab.end();
}
