//! What the program says of itself: help, manual pages and completions agree, and leave nothing out.

use super::{bare, check, said};
use std::collections::BTreeMap;
use std::fs;

/// Names under `Commands:` of the help.
fn commands() -> Vec<String> {
    let help = said(&bare(&["--help"]));
    let list = help.split_once("Commands:\n").expect("has commands").1.split_once("\n\n").expect("ends").0;
    // Further lines of a description are indented deeper.
    let names = list.lines().filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')));
    let names = names.filter_map(|line| line.split_whitespace().next().map(str::to_owned));
    names.filter(|name| name != "help").collect()
}

/// Codes and their meaning, without the breaks of lines.
fn codes<'a>(rows: impl Iterator<Item = &'a str>) -> BTreeMap<u8, String> {
    let mut out = BTreeMap::new();
    let mut last = None;
    for row in rows.map(str::trim).filter(|row| !row.is_empty()) {
        let (first, rest) = row.split_once(' ').unwrap_or((row, ""));
        match (first.parse::<u8>(), last) {
            (Ok(code), _) => {
                out.insert(code, rest.trim().to_owned());
                last = Some(code);
            }
            (Err(_), Some(code)) => {
                let meaning: &mut String = out.entry(code).or_default();
                *meaning = format!("{meaning} {row}").trim().to_owned();
            }
            (Err(_), None) => {}
        }
    }
    out
}

#[test]
fn every_command_has_help_a_manual_page_and_completions() {
    let dir = tempfile::tempdir().expect("directory");
    let pages = dir.path().join("man1");
    check("man", &bare(&["man", pages.to_str().expect("UTF-8")]), 0, &[]);
    let page = |name: &str| fs::read_to_string(pages.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let front = page("spooltap.1");
    let shells = ["bash", "zsh", "fish"].map(|shell| (shell, bare(&["completions", shell])));
    let commands = commands();
    assert!(commands.len() >= 10, "{commands:?}");
    for command in &commands {
        check(command, &bare(&[command, "--help"]), 0, &["Usage: spooltap"]);
        let page = page(&format!("spooltap-{command}.1"));
        assert!(page.contains(".SH OPTIONS") && page.contains("password\\-file"), "{command}: {page}");
        let named = format!("spooltap\\-{}(1)", command.replace('-', "\\-"));
        assert!(front.contains(&named), "{command} is not in spooltap(1)");
        for (shell, completions) in &shells {
            check(shell, completions, 0, &[command]);
        }
    }
    // Commands with commands of their own have more.
    assert!(fs::read_dir(&pages).expect("is there").count() > commands.len());
    check("no shell", &bare(&["completions", "tea"]), 64, &["tea", "bash"]);
    check("no directory", &bare(&["man", "/proc/man1"]), 74, &["/proc/man1"]);
}

#[test]
fn exit_codes_are_the_same_in_help_and_manual() {
    let dir = tempfile::tempdir().expect("directory");
    check("man", &bare(&["man", dir.path().to_str().expect("UTF-8")]), 0, &[]);
    let page = fs::read_to_string(dir.path().join("spooltap.1")).expect("is there");
    let section = page.split_once(".SH \"EXIT STATUS\"").expect("has a section").1.split_once(".SH").expect("ends").0;
    let plain =
        section.replace(".TP", "").replace("\\fB", "").replace("\\fR", "").replace("\\-", "-").replace("\\*(Aq", "'");
    let help = said(&bare(&["--help"]));
    let told = codes(help.split_once("Exit codes:\n").expect("tells them").1.lines());
    assert_eq!(told, codes(plain.lines().filter(|line| !line.starts_with('.'))));
    // What these tests provoke is among them.
    assert!(
        [0, 1, 64, 65, 66, 69, 74, 77, 78, 80, 81, 82, 83, 84, 85, 86, 88].iter().all(|code| told.contains_key(code)),
        "{told:?}"
    );
}

/// The page as somebody reads it, without its macros.
fn words(page: &str) -> String {
    page.replace("\n.", "\n").replace(" ,", "")
}

#[test]
fn pages_by_hand_are_there_and_name_every_setting() {
    let dir = tempfile::tempdir().expect("directory");
    check("man", &bare(&["man", dir.path().to_str().expect("UTF-8")]), 0, &[]);
    let page = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(page("spooltap.7").contains(".Dt SPOOLTAP 7"));
    let settings = words(&page("spooltap.toml.5"));
    // Whoever types an unknown key is told all that exist.
    let mut known = 0;
    for place in ["", "[tls]\n", "[[route]]\n", "[[replica]]\nurl = \"file:///x\"\n"] {
        let file = dir.path().join("spooltap.toml");
        fs::write(&file, format!("{place}tea = 1\n")).expect("writes");
        let told = said(&bare(&["--config", file.to_str().expect("UTF-8"), "check"]));
        let keys = told.split_once("expected one of ").expect("tells them").1;
        for key in keys.split('`').skip(1).step_by(2) {
            let shown = settings.lines().any(|line| {
                let mut words = line.split([' ', ',']);
                words.next().is_some_and(|macros| macros == "It" || macros == "Ic") && words.any(|word| word == key)
            }) || settings.contains(&format!("Ic [{key}]"))
                || settings.contains(&format!("Ic [[{key}]]"));
            assert!(shown, "{place}{key} is not in spooltap.toml(5)");
            known += 1;
        }
    }
    assert!(known > 40, "{known} settings");
    let Ok(lint) = std::process::Command::new("mandoc")
        .args(["-T", "lint", "-W", "warning"])
        .arg(dir.path().join("spooltap.7"))
        .arg(dir.path().join("spooltap.toml.5"))
        .arg(dir.path().join("spooltap.1"))
        .output()
    else {
        return;
    };
    assert!(lint.status.success(), "{}", said(&lint));
}
