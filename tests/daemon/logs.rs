//! The log: three forms with the same fields, no flood, and nothing in it that is nobody's business.

use super::{LONG, Lab, idle};
use crate::util::{CyrusServer, Options, Spooltap, apart, cyrus, eventually, store};
use base64::Engine;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

/// One entry as the journal gets it: lines `KEY=value`, or a key, a length and that many bytes.
fn entry(mut bytes: &[u8]) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
        let (line, rest) = (String::from_utf8_lossy(&bytes[..end]).into_owned(), &bytes[end + 1..]);
        match line.split_once('=') {
            Some((key, value)) => {
                out.insert(key.to_owned(), value.to_owned());
                bytes = rest;
            }
            None => {
                let size = u64::from_le_bytes(rest[..8].try_into().expect("eight bytes")) as usize;
                out.insert(line, String::from_utf8_lossy(&rest[8..8 + size]).into_owned());
                bytes = &rest[8 + size + 1..];
            }
        }
    }
    out
}

#[test]
fn text_json_and_journal_name_the_same_fields() {
    let source = store("3.6.1-d");
    let dir = tempfile::tempdir().expect("directory");
    let push = |form: &str| {
        let state = dir.path().join(form);
        let mut command = Spooltap::command(&source.conf, &state);
        command
            .args(["--log-format", form, "-v", "--replica"])
            .arg(format!("file://{}/{form}-archive", dir.path().display()));
        command.args(["push", "-A"]);
        command
    };
    let json = push("json").output().expect("runs");
    assert!(json.status.success(), "{}", String::from_utf8_lossy(&json.stderr));
    let lines: Vec<Value> =
        String::from_utf8_lossy(&json.stderr).lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let confirmed = lines.iter().find(|line| line["fields"]["message"] == "confirmed").expect("is told");
    let names: BTreeSet<String> = confirmed["fields"].as_object().expect("fields").keys().cloned().collect();
    assert!(["message", "item", "mailbox", "elapsed_ms"].iter().all(|name| names.contains(*name)), "{names:?}");
    let text = push("text").output().expect("runs");
    let text = String::from_utf8_lossy(&text.stderr).into_owned();
    let line = text.lines().find(|line| line.contains(" confirmed ")).expect("is told");
    assert!(names.iter().filter(|name| *name != "message").all(|name| line.contains(&format!("{name}="))), "{line}");

    // A journal of our own, in the place where only this process sees it.
    let place = dir.path().join("journal");
    fs::create_dir(&place).expect("makes");
    let journal = UnixDatagram::bind(place.join("socket")).expect("binds");
    journal.set_read_timeout(Some(Duration::from_secs(1))).expect("sets");
    let inner = push("journald");
    let script = format!(
        "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal && mount --bind '{}' /run/systemd/journal",
        place.display()
    );
    let mut command = apart(&script, &inner);
    let reader = std::thread::spawn(move || {
        let (mut buffer, mut entries, mut idle) = (vec![0; 256 << 10], Vec::new(), 0);
        while idle < LONG.as_secs() {
            match journal.recv(&mut buffer) {
                Ok(count) => entries.push(entry(&buffer[..count])),
                Err(_) => idle += 1,
            }
            if entries.iter().any(|entry| entry.get("MESSAGE").is_some_and(|message| message == "confirmed")) {
                break;
            }
        }
        entries
    });
    let output = command.output().expect("runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let entries = reader.join().expect("reads");
    let confirmed = entries.iter().find(|entry| entry.get("MESSAGE").is_some_and(|message| message == "confirmed"));
    let confirmed = confirmed.unwrap_or_else(|| panic!("is not told: {entries:?}"));
    assert!(names.iter().all(|name| confirmed.contains_key(&name.to_uppercase())), "{confirmed:?}");
    assert_eq!(confirmed.get("SYSLOG_IDENTIFIER").map(String::as_str), Some("spooltap"));
    // Where there is no journal it says so.
    let mut command = push("journald");
    let mut outer = apart("mount -t tmpfs tmpfs /run", &command);
    let output = outer.output().expect("runs");
    assert_eq!(output.status.code(), Some(78), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(command.args(["--log-format", "prose"]).output().expect("runs").status.code(), Some(64));
}

#[test]
fn what_goes_wrong_for_long_does_not_flood_the_log() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new(&["u1"]);
    lab.configure("");
    let spooltap = lab.start(&[]);
    lab.becomes("idle", |_, replica| idle(replica));
    // The list is read again every tenth of a second, each time in vain.
    let list = lab.source.base().join("conf/mailboxes.db");
    let good = fs::read(&list).expect("reads");
    fs::write(&list, b"").expect("writes");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(spooltap.pid()), nix::sys::signal::Signal::SIGUSR1)
        .expect("signals");
    let says = || spooltap.log().matches("source cannot be read").count();
    eventually(LONG, || (says() > 0).then_some(())).expect("is told");
    let tries = lab.becomes("in trouble", |code, _| code == 2);
    assert!(tries["source"]["trouble"].is_string());
    std::thread::sleep(Duration::from_secs(3));
    assert!(says() <= 3, "told {} times: {}", says(), spooltap.log_end(10));
    fs::write(&list, good).expect("writes");
    lab.becomes("healed", |code, replica| code == 0 && idle(replica));
}

#[test]
fn neither_secrets_nor_mail_are_in_the_log() {
    if !cyrus::installed() {
        return;
    }
    let source = CyrusServer::start(Options::new().source().users(&["u1"])).expect("starts");
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let dir = tempfile::tempdir().expect("directory");
    let state = dir.path().join("state");
    let mut command = Spooltap::command(&source.conf(), &state);
    // Everything that any crate has to say.
    command.env("SPOOLTAP_LOG", "trace").args(["--replica", &replica.url(), "run"]);
    let mut spooltap = Spooltap::spawn(command, &state).expect("starts");
    spooltap.wait_live(LONG).expect("is live");
    let message = b"From: absender-5521@lab.test\r\nTo: u1@lab.test\r\nSubject: betreff-7713\r\n\r\ninhalt-9942\r\n";
    let answers = source.lmtp().expect("connects").deliver(&["u1"], message).expect("delivers");
    assert!(answers[0].starts_with('2'), "{answers:?}");
    source.sieve("u1").expect("logs in").put("skript", "# geheim-3318\r\nkeep;\r\n").expect("puts");
    let status = || spooltap.status()["replicas"][0].clone();
    let there = || Some(replica.imap("u1").ok()?.ok("EXAMINE INBOX").ok()?.exists());
    eventually(LONG, || (there() == Some(1) && idle(&status())).then_some(())).expect("arrives");
    // A wrong password is told as such, and not as what it is.
    let mut wrong = Spooltap::command(&source.conf(), &dir.path().join("other"));
    wrong.env("SPOOLTAP_LOG", "trace").env("SPOOLTAP_PASSWORD", "falsch-6627");
    let wrong = wrong.args(["--replica", &replica.url(), "push", "-A"]).output().expect("runs");
    assert_eq!(wrong.status.code(), Some(80));
    let log = spooltap.log() + &String::from_utf8_lossy(&wrong.stderr);
    assert!(log.contains("applied") && log.contains("user.u1"), "is not the whole log");
    let encoded = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let plain = [encoded(&format!("\0repl\0{}", cyrus::PASSWORD)), encoded("\0repl\0falsch-6627")];
    let named = log.replace("(secret)", "").contains(cyrus::PASSWORD);
    assert!(!named, "the password is in the log");
    for word in ["betreff-7713", "inhalt-9942", "geheim-3318", "absender-5521", "falsch-6627"]
        .into_iter()
        .chain(plain.iter().map(String::as_str))
    {
        let found = log.lines().find(|line| line.contains(word));
        assert!(found.is_none(), "{word}: {found:?}");
    }
}
