//! What is installed beside the program: units, alert rules, dashboard.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

const UNITS: &[&str] = &[
    "spooltap.service",
    "spooltap@.service",
    "spooltap-scan.service",
    "spooltap-scan.timer",
    "spooltap-serve.service",
    "spooltap-serve.socket",
];

/// The units with the program under test in the place of the installed one.
fn installed() -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().expect("directory");
    let paths = UNITS.iter().map(|name| {
        let text = read(&format!("systemd/{name}")).replace("/usr/bin/spooltap", env!("CARGO_BIN_EXE_spooltap"));
        let path = dir.path().join(name.replace("@.", "@shop."));
        fs::write(&path, text).expect("writes");
        path
    });
    let paths = paths.collect();
    (dir, paths)
}

fn analyze(words: &[&str], path: &Path) -> Option<(bool, String)> {
    let output = Command::new("systemd-analyze").args(words).arg(path).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

#[test]
fn units_are_understood_and_leave_little_open() {
    let (_dir, paths) = installed();
    for path in &paths {
        let Some((good, said)) = analyze(&["verify", "--man=no"], path) else {
            eprintln!("not checked: systemd-analyze is not installed");
            return;
        };
        // It looks at other units of the system as well.
        let own: Vec<&str> = said.lines().filter(|line| line.contains("spooltap")).collect();
        assert!(good || own.is_empty(), "{}: {said}", path.display());
        assert!(own.is_empty(), "{}: {own:?}", path.display());
    }
    for path in paths.iter().filter(|path| {
        ["shop", "spooltap.service", "serve.service"].iter().any(|name| path.to_string_lossy().contains(name))
    }) {
        // Threshold in tenths: an exposure of 2.0.
        let (good, said) =
            analyze(&["security", "--offline=true", "--no-pager", "--threshold=20"], path).expect("is installed");
        let figure = said.lines().find(|line| line.contains("Overall exposure")).unwrap_or(&said);
        println!("{}: {figure}", path.display());
        assert!(good, "{}: {figure}", path.display());
    }
}

#[test]
fn the_commands_of_the_units_exist() {
    for unit in UNITS {
        let text = read(&format!("systemd/{unit}"));
        for line in text.lines() {
            let Some((key, command)) = line.split_once('=').filter(|(key, _)| key.starts_with("Exec")) else {
                continue;
            };
            let Some(words) = command.strip_prefix("/usr/bin/spooltap ") else { continue };
            let mut command = Command::new(env!("CARGO_BIN_EXE_spooltap"));
            let output = command.args(words.split(' ')).arg("--help").output().expect("runs");
            assert!(output.status.success(), "{unit} {key}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    for drop_in in ["own-user.conf", "fanotify.conf", "paths.conf"] {
        assert!(read(&format!("systemd/drop-ins/{drop_in}")).contains("[Service]"));
    }
}

#[test]
fn rules_and_dashboard_ask_for_figures_that_exist() {
    let dashboard: serde_json::Value = serde_json::from_str(&read("docs/monitoring/dashboard.json")).expect("is JSON");
    assert!(dashboard["panels"].as_array().is_some_and(|panels| panels.len() >= 6));
    let source = read("src/daemon/metrics.rs");
    let names = |text: &str| -> BTreeSet<String> {
        let word = |c: char| !(c.is_ascii_lowercase() || c == '_');
        text.split(word).filter(|name| name.starts_with("spooltap_")).map(str::to_owned).collect()
    };
    let known = names(&source);
    for text in [read("docs/monitoring/rules.yml"), dashboard.to_string()] {
        for name in names(&text) {
            let family = name.trim_end_matches("_bucket");
            assert!(known.contains(family), "{name} is no figure of ours");
        }
    }
}
