//! `docs/operations.md`: its commands exist, its settings are taken.

use spooltap::config::{Config, Credentials, Raw};
use std::process::Command;

const PAGE: &str = include_str!("../../docs/operations.md");

#[test]
fn every_command_is_taken() {
    let mut count = 0;
    for line in PAGE.lines().filter_map(|line| line.strip_prefix("    spooltap ")) {
        let words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        // Faults of what stands before are told first.
        let output = Command::new(env!("CARGO_BIN_EXE_spooltap")).args(words).arg("--help").output().expect("runs");
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        count += 1;
    }
    assert!(count >= 15, "{count} commands");
    let mistaken =
        Command::new(env!("CARGO_BIN_EXE_spooltap")).args(["status", "--warn", "--help"]).output().expect("runs");
    assert!(!mistaken.status.success(), "a mistake would not be seen");
}

#[test]
fn every_setting_is_taken() {
    let blocks: Vec<&str> = PAGE.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(blocks.len() >= 5, "{} blocks", blocks.len());
    for block in blocks {
        let mut raw: Raw = toml::from_str(block).unwrap_or_else(|error| panic!("{block}: {error}"));
        if raw.replica.is_empty() {
            raw.replica.push("csync://repl@replica.example".into());
        }
        let file = tempfile::NamedTempFile::new().expect("a file");
        // Made with mode 0600, and anything else is refused.
        std::fs::write(file.path(), "secret\n").expect("writes");
        raw.password_file = Some(file.path().to_owned());
        raw.replica.iter_mut().for_each(|one| one.0.password_file = None);
        let credentials = Credentials::gather(&raw).expect("reads");
        Config::check(&raw, &credentials, &|_| None, true).unwrap_or_else(|faults| panic!("{block}: {faults}"));
    }
}
