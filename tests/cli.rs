//! The command line as somebody meets it who types it: usage, configuration, exit codes, and what it says of trouble. The
//! built program is run, nothing else.

#[path = "cli/damage.rs"]
mod damage;
#[path = "cli/help.rs"]
mod help;
#[path = "cli/trouble.rs"]
mod trouble;

use super::util::{Spooltap, store};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// The program without any option, and without a password in the environment.
fn bare(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spooltap"));
    command.args(arguments).env_remove("SPOOLTAP_PASSWORD").env_remove("CREDENTIALS_DIRECTORY");
    command.output().expect("runs")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// It ended with this code and said all of this.
fn check(what: &str, output: &Output, code: i32, says: &[&str]) {
    let said = said(output);
    assert_eq!(output.status.code(), Some(code), "{what}: {said}");
    for part in says {
        assert!(said.contains(part), "{what}: {part:?} is not in: {said}");
    }
}

#[test]
fn wrong_usage_is_64_and_questions_are_0() {
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&[], 64, &["Usage:"]),
        (&["--no-such-option"], 64, &["--no-such-option"]),
        (&["no-such-command"], 64, &["no-such-command"]),
        (&["push"], 64, &["--all", "--user", "--mailbox", "--meta"]),
        (&["push", "-A", "-u", "jane"], 64, &["cannot be used with"]),
        (&["push", "-A", "--lanes", "many"], 64, &["--lanes", "many"]),
        (&["inspect"], 64, &["<FILE>"]),
        (&["--help"], 0, &["run", "push", "scan", "inspect", "events", "verify", "check", "demo"]),
        (&["--version"], 0, &["spooltap 0."]),
    ];
    for (arguments, code, says) in cases {
        check(&format!("{arguments:?}"), &bare(arguments), *code, says);
    }
}

#[test]
fn a_faulty_configuration_is_78_with_all_its_faults_at_once() {
    let source = store::store("2.5.11-a");
    let dir = tempfile::tempdir().expect("directory");
    let toml = dir.path().join("spooltap.toml");
    let conf = source.conf.to_str().expect("UTF-8");
    let with = |text: &str, command: &str| {
        fs::write(&toml, text).expect("is written");
        bare(
            &["-C", conf, "--config", toml.to_str().expect("UTF-8"), "--state", "/nonexistent/state", command, "-A"]
                [..7 + usize::from(command == "push")],
        )
    };
    let many = "lanes = 0\ncompress = \"yes\"\nquiet_ms = 30\n\
                replica = [\"csync://u@h:1\", \"ftp://x\", \"file://rel\", \"csync://jane:pass-word@h\"]\n";
    let faults = [
        "lanes",
        "use 1 to 64",
        "compress",
        "use auto, on or off",
        "most_ms",
        "ftp://x",
        "csync://, csyncs://, csync+unix://, imap://, imaps://, file://, s3://",
        "file://rel",
        "the path must be absolute",
        "a password stands in the URL",
        "password_file",
    ];
    for command in ["check", "push", "run", "scan", "verify"] {
        let output = with(many, command);
        check(command, &output, 78, &faults);
        assert!(!said(&output).contains("pass-word"), "{}", said(&output));
    }
    let cases: &[(&str, &[&str])] = &[
        ("lanes = 2\nlane = 3\n", &["spooltap.toml", "line 2", "unknown field `lane`"]),
        ("[partitions]\nx = \"y\"\n", &["spooltap.toml", "unknown field `partitions`"]),
        ("lanes = \"two\"\n", &["spooltap.toml", "line 1", "invalid type"]),
        ("lanes = \n", &["spooltap.toml", "line 1"]),
        ("", &["replica", "no replica is named", "--replica csync://USER@HOST:PORT"]),
        ("password_file = \"/nonexistent/password\"\n", &["password_file", "/nonexistent/password", "readable file"]),
    ];
    for (text, says) in cases {
        check(text, &with(text, "check"), 78, says);
    }
    assert!(!Path::new("/nonexistent").exists());
}

#[test]
fn check_prints_what_would_be_run() {
    let source = store::store("2.5.11-a");
    let dir = tempfile::tempdir().expect("directory");
    let state = dir.path().join("state");
    let run = |arguments: &[&str]| {
        let mut command = Spooltap::command(&source.conf, &state);
        command.args(["--replica", "csync://jane@replica.test:2006"]).args(arguments).output().expect("runs")
    };
    let base = source.dir.path().to_str().expect("UTF-8");
    check("check", &run(&["check"]), 0, &[base, "22 mailboxes", "csync://jane@replica.test:2006", "watched"]);
    let json: serde_json::Value = serde_json::from_slice(&run(&["check", "--json"]).stdout).expect("is JSON");
    assert_eq!((&json["mailboxes"], &json["lanes"]), (&22.into(), &4.into()));
    assert!(!state.exists(), "check writes nothing");
}

#[test]
fn a_source_or_state_that_cannot_be_used_has_its_code() {
    let source = store::store("2.5.11-a");
    let conf = source.conf.to_str().expect("UTF-8");
    let dir = tempfile::tempdir().expect("directory");
    let state = dir.path().join("state");
    let archive = format!("file://{}", dir.path().join("archive").display());
    let push = |conf: &str, state: &Path| {
        let mut command = Spooltap::command(Path::new(conf), state);
        command.args(["--replica", &archive, "push", "-A"]).output().expect("runs")
    };
    check(
        "no imapd.conf",
        &push("/nonexistent/imapd.conf", &state),
        66,
        &["/nonexistent/imapd.conf", "name the file with -C"],
    );
    let below_a_file = source.conf.join("state");
    check("state below a file", &push(conf, &below_a_file), 74, &[below_a_file.to_str().expect("UTF-8")]);
    check("all is well", &push(conf, &state), 0, &[]);

    let mut running = Spooltap::run(&source.conf, &archive, &state).expect("starts");
    running.wait_live(std::time::Duration::from_secs(20)).expect("is live");
    check("state in use", &push(conf, &state), 74, &["state", "another spooltap"]);
    assert!(running.terminate().expect("ends").success());

    let list = source.dir.path().join("conf/mailboxes.db");
    fs::remove_file(&list).expect("is removed");
    check("no list", &push(conf, &state), 66, &["mailboxes.db", "nothing is replicated"]);
}

#[test]
fn a_password_is_neither_in_an_argument_nor_in_what_is_said() {
    // No option takes one.
    for command in ["", "run", "push", "scan", "inspect", "events", "verify", "check", "demo"] {
        let help = said(&bare(&[command, "--help"][usize::from(command.is_empty())..]));
        let options = help.split_whitespace().filter(|word| word.starts_with("--") && word.contains("pass"));
        let options: Vec<&str> = options.collect();
        assert!(options.iter().all(|option| *option == "--password-file"), "{command}: {options:?}");
    }
    let source = store::store("2.5.11-a");
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("password");
    fs::write(&file, "Xyzzy-4711\n").expect("is written");
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("mode");
    for log in ["text", "json"] {
        let mut command = Spooltap::command(&source.conf, &dir.path().join("state"));
        command.env("SPOOLTAP_PASSWORD", "Plugh-4712").args([
            "-vv",
            "--log-format",
            log,
            "--replica",
            "csync://u@127.0.0.1:9",
        ]);
        let output = command.arg("--password-file").arg(&file).args(["push", "-A"]).output().expect("runs");
        check("push", &output, 69, &["csync://u@127.0.0.1:9"]);
        assert!(!said(&output).contains("4711") && !said(&output).contains("4712"), "{}", said(&output));
    }
}
