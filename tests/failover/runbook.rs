//! `docs/failover.md`: its runbooks are done, step by step, with real servers, and say what the page says.

use super::failback::messages;
use super::promote::deliver;
use crate::cyrus_dir::Place;
use crate::util::cyrus::PASSWORD;
use crate::util::{CyrusServer, Options, cyrus, snapshot};
use std::collections::BTreeSet;
use std::process::Command;

const PAGE: &str = include_str!("../../docs/failover.md");

/// A command of the page, what it says, and its exit code.
#[derive(Debug, Default)]
struct Step {
    command: String,
    says: Vec<String>,
    code: i32,
}

fn steps(title: &str) -> Vec<Step> {
    let section = PAGE.split_once(&format!("\n## {title}\n")).expect("is on the page").1;
    let section = section.split("\n## ").next().unwrap_or_default();
    let mut steps: Vec<Step> = Vec::new();
    for line in section.lines().filter_map(|line| line.strip_prefix("    ")) {
        match (line.strip_prefix("$ "), steps.last_mut()) {
            (Some(command), _) => steps.push(Step { command: command.to_owned(), ..Step::default() }),
            (None, Some(step)) => match line.strip_prefix('[').and_then(|code| code.strip_suffix(']')?.parse().ok()) {
                Some(code) => step.code = code,
                None => step.says.push(line.trim().to_owned()),
            },
            (None, None) => panic!("{line}: no command before it"),
        }
    }
    steps
}

/// `…` stands for anything.
fn fits(pattern: &str, line: &str) -> bool {
    let mut parts = pattern.split('…');
    let Some(mut rest) = line.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        match (parts.peek().is_none(), rest.find(part)) {
            (true, _) => return rest.ends_with(part),
            (false, Some(at)) => rest = &rest[at + part.len()..],
            (false, None) => return false,
        }
    }
    true
}

/// The names of the page are those of this test.
struct Names(Vec<(&'static str, String)>);

impl Names {
    fn here(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, (name, here)| text.replace(name, here))
    }
}

fn walk(title: &str, names: &Names, at_least: usize, systemctl: &mut dyn FnMut(&str)) {
    let steps = steps(title);
    assert!(steps.len() >= at_least, "{title}: {} steps", steps.len());
    for step in steps {
        if let Some(words) = step.command.strip_prefix("systemctl ") {
            assert!(step.says.is_empty() && step.code == 0, "{step:?}");
            systemctl(words);
            continue;
        }
        let line = names.here(&step.command);
        let mut command = match line.strip_prefix("spooltap ") {
            Some(words) => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_spooltap"));
                command.args(words.split(' ')).env("SPOOLTAP_PASSWORD", PASSWORD).env("SPOOLTAP_CONFIG", "/dev/null");
                if !line.contains(" --state ") {
                    command.arg("--state").arg(names.here("/var/lib/spooltap"));
                }
                command
            }
            None => {
                let mut command = Command::new("/bin/sh");
                command.arg("-c").arg(&line);
                command
            }
        };
        let output = command.env_remove("SPOOLTAP_LOG").output().expect("runs");
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(step.code), "{}:\n{said}", step.command);
        let mut lines = said.lines().map(str::trim);
        for pattern in &step.says {
            let wanted = names.here(pattern);
            assert!(
                lines.any(|line| fits(&wanted, line)),
                "{}: {pattern:?} is not (or not there) in\n{said}",
                step.command
            );
        }
    }
}

fn inbox(server: &CyrusServer) -> Vec<(u64, String)> {
    let shown = messages(&snapshot(server, &["u1"]).expect("is read"));
    let found = shown.into_iter().filter(|((name, _), _)| name == "user.u1");
    found.map(|((_, uid), hash)| (uid, hash)).collect()
}

fn source() -> CyrusServer {
    let source = CyrusServer::start(Options::new().source().users(&["u1"])).expect("starts");
    for number in 0..3 {
        deliver(&source, &["u1"], &format!("both {number}"));
    }
    source
}

/// Each once, and as many as there were.
fn all_there(inbox: &[(u64, String)], count: usize) {
    assert_eq!(inbox.len(), count, "{inbox:?}");
    assert_eq!(inbox.iter().map(|(_, hash)| hash).collect::<BTreeSet<_>>().len(), count, "{inbox:?}");
}

#[test]
fn a_directory_stands_by() {
    if !cyrus::installed() {
        return;
    }
    let mut source = source();
    let mut place = Place::new(Options::new()).expect("is set up");
    let at = |name: &str| place.state.path().join(name).display().to_string();
    let names = Names(vec![
        ("/etc/imapd.conf", source.conf().display().to_string()),
        ("/srv/standby", place.dir().display().to_string()),
        ("/srv/old", at("old")),
        ("/var/lib/spooltap-back", at("back")),
        ("/var/lib/spooltap", at("state")),
    ]);
    walk("Runbook: a directory stands by", &names, 16, &mut |words| match words {
        "stop cyrus-imapd" => {
            deliver(&source, &["u1"], "has not arrived");
            source.kill9();
        }
        "start cyrus-imapd" => source.boot().expect("starts"),
        "start cyrus-standby" => {
            place.boot().expect("starts");
            deliver(&place.server, &["u1"], "came to the standby");
        }
        "stop cyrus-standby" => place.server.stop().expect("stops"),
        other => panic!("systemctl {other}: nobody does that"),
    });
    all_there(&inbox(&source), 5);
}

#[test]
fn a_server_stands_by() {
    if !cyrus::installed() {
        return;
    }
    let mut source = source();
    let standby = CyrusServer::start(Options::new()).expect("starts");
    let dir = tempfile::tempdir().expect("directory");
    let at = |name: &str| dir.path().join(name).display().to_string();
    let names = Names(vec![
        ("/etc/imapd.conf", source.conf().display().to_string()),
        ("/srv/standby/imapd.conf", standby.conf().display().to_string()),
        ("csync://repl@standby:2005", standby.url()),
        ("csync://repl@old:2005", source.url()),
        ("/var/lib/spooltap-back", at("back")),
        ("/var/lib/spooltap", at("state")),
    ]);
    walk("Runbook: a server stands by", &names, 9, &mut |words| match words {
        "stop cyrus-imapd" => {
            deliver(&source, &["u1"], "has not arrived");
            source.kill9();
        }
        "start cyrus-imapd" => {
            deliver(&standby, &["u1"], "came to the standby");
            source.boot().expect("starts");
        }
        other => panic!("systemctl {other}: nobody does that"),
    });
    let both = [inbox(&source), inbox(&standby)];
    all_there(&both[0], 5);
    assert_eq!(both[0], both[1]);
}

#[test]
fn patterns_fit_what_they_say() {
    for (pattern, line, expected) in [
        ("NO-GO", "NO-GO", true),
        ("NO-GO", "NO-GO x", false),
        ("a … c", "a b c", true),
        ("a … c", "a b d", false),
        ("…was…", "it was so", true),
        ("…was…", "it is so", false),
        ("x …", "x 1 2", true),
    ] {
        assert_eq!(fits(pattern, line), expected, "{pattern} {line}");
    }
}
