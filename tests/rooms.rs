//! The map of the rooms (`docs/ARCHITECTURE.md`) is true: who names whom, and which files touch no file, socket or clock.
//! What only tests use is not looked at.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// From below to above; a room may name what is below it. Rooms of one line do not know each other.
const LEVELS: &[&[&str]] = &[
    &["model"],
    // What a room is to run with is a struct of `config`, handed down to it.
    &["dlist", "config"],
    &["cyrus", "csync"],
    &["archive", "spool", "state"],
    &["replica"],
    &["capture", "engine", "serve", "replay"],
    &["daemon"],
    &["cli"],
];

/// What must not be named although it is below, and why.
const NEVER: &[(&str, &[&str], &str)] = &[
    ("cyrus", &["config"], "it reads what Cyrus wrote, whoever asks"),
    ("engine", &["spool", "replica", "archive", "csync"], "any store with any replica: it names no concrete one"),
    ("replica", &["spool"], "bodies reach it as readers"),
    ("capture", &["replica", "archive", "state", "csync"], "it notices, and knows nothing of where things go"),
    ("serve", &["spool", "state"], "it stands before a replica"),
    ("archive", &["csync"], "it is written and read through the seams"),
    ("spool", &["csync"], "it is the source's disk"),
    ("state", &["cyrus", "csync"], "it remembers receipts"),
];

/// Files and folders whose code takes bytes and times and gives values.
const PURE: &[&str] = &[
    "model",
    "dlist.rs",
    "cyrus",
    "csync/codec.rs",
    "csync/command.rs",
    "csync/sasl.rs",
    "csync/dialect.rs",
    "csync/imap.rs",
    "capture/derive.rs",
    "capture/coalesce.rs",
    "engine/diff.rs",
];

/// What a pure file does not name.
const IMPURE: &[&str] =
    &["std::fs", "std::net", "std::process", "std::thread", "std::env", "tokio", "::now()", "File::open"];

/// The only file that may hold `unsafe` lies here.
const UNSAFE: &str = "capture";

/// And the one file that takes descriptors from systemd and from Cyrus's `master`: only their numbers are told.
const HANDED_OVER: &str = "serve/inherited.rs";

#[test]
fn rooms_name_only_what_is_below_them() {
    let mut faults = Vec::new();
    let mut found = 0;
    for (path, text) in sources() {
        for room in named(&path, &text) {
            found += 1;
            faults.extend(judge(&room_of(&path), &room).map(|fault| format!("src/{}: {fault}", path.display())));
        }
    }
    assert!(found > 100, "only {found} uses of rooms found: is this the right way to look for them?");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn pure_files_touch_nothing() {
    let mut faults = Vec::new();
    let sources = sources();
    for pure in PURE {
        let files: Vec<_> = sources.iter().filter(|(path, _)| path.starts_with(pure)).collect();
        assert!(!files.is_empty(), "src/{pure} does not exist");
        for (path, text) in files {
            faults.extend(impurities(text).into_iter().map(|what| format!("src/{}: {what}", path.display())));
        }
    }
    let may = |path: &Path| room_of(path) == UNSAFE || path == Path::new(HANDED_OVER);
    for (path, text) in sources.iter().filter(|(path, _)| !may(path)) {
        if words(text).any(|word| word == "unsafe") {
            faults.push(format!("src/{}: unsafe outside of {UNSAFE}", path.display()));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_room_is_on_the_map() {
    let rooms: BTreeSet<String> = sources().iter().map(|(path, _)| room_of(path)).collect();
    let rooms: BTreeSet<&str> =
        rooms.iter().map(String::as_str).filter(|room| !["lib", "main"].contains(room)).collect();
    let mapped: BTreeSet<&str> = LEVELS.iter().flat_map(|level| level.iter().copied()).collect();
    assert_eq!(rooms, mapped);
    let map = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/ARCHITECTURE.md")).expect("map");
    let front = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).expect("front door");
    for room in rooms {
        assert!(map.contains(&format!("| `{room}` |")), "docs/ARCHITECTURE.md does not tell what {room} is");
        assert!(front.contains(&format!("pub mod {room};")), "src/lib.rs does not open {room}");
    }
}

/// Why this room must not name that one.
fn judge(room: &str, named: &str) -> Option<String> {
    let level = |room: &str| LEVELS.iter().position(|level| level.contains(&room));
    if room == named || ["lib", "main"].contains(&room) {
        return None;
    }
    let Some((here, there)) = level(room).zip(level(named)) else {
        return Some(format!("{room} names {named}, which is no room"));
    };
    if there >= here {
        return Some(format!("{room} names {named}, which is not below it"));
    }
    let never = NEVER.iter().find(|(who, whom, _)| *who == room && whom.contains(&named));
    never.map(|(_, _, why)| format!("{room} names {named}: {why}"))
}

/// Rooms that a file names, by `crate::…` or by enough `super::`.
fn named(path: &Path, text: &str) -> BTreeSet<String> {
    let depth = match path.file_name().is_some_and(|name| name == "mod.rs" || name == "lib.rs" || name == "main.rs") {
        true => path.components().count() - 1,
        false => path.components().count(),
    };
    let mut out = BTreeSet::new();
    let all_up = "super::".repeat(depth.max(1));
    for start in ["crate::", &all_up] {
        for (at, _) in text.match_indices(start) {
            let before = text[..at].chars().next_back();
            // `$crate::` and longer words are something else; one `super::` more would leave the crate.
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            out.extend(heads(&text[at + start.len()..]));
        }
    }
    // Names of the crate's root that are no modules.
    out.retain(|name| !["Error", "Result"].contains(&name.as_str()));
    out
}

/// The first names of a path, or of each path of a group in braces.
fn heads(text: &str) -> Vec<String> {
    let word =
        |text: &str| text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let Some(group) = text.strip_prefix('{') else { return vec![word(text)] };
    let (mut depth, mut start, mut out) = (1, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 || depth == 1 && c == ',' {
            out.push(word(&group[start..at]));
            start = at + 1;
        }
        if depth == 0 {
            break;
        }
    }
    out.retain(|word| !word.is_empty());
    out
}

fn impurities(text: &str) -> Vec<&'static str> {
    IMPURE.iter().copied().filter(|what| text.contains(what)).collect()
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// The first part of a path below `src`.
fn room_of(path: &Path) -> String {
    let first = path.components().next().expect("a name").as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// Every file below `src` that is not for tests alone, without its comments and tests.
fn sources() -> Vec<(PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = walkdir::WalkDir::new(&src).into_iter().map(|entry| entry.expect("is readable").into_path());
    let files: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|end| end == "rs")).collect();
    let texts: Vec<(PathBuf, String)> = files
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).expect("is text");
            (path.strip_prefix(&src).expect("is below").to_owned(), text)
        })
        .collect();
    let tests: BTreeSet<PathBuf> = texts.iter().flat_map(|(path, text)| test_files(path, text)).collect();
    let code = texts.into_iter().filter(|(path, _)| !tests.contains(path));
    code.map(|(path, text)| (path, product(&text))).collect()
}

/// Files that this one declares as `#[cfg(test)] mod NAME;`.
fn test_files(path: &Path, text: &str) -> Vec<PathBuf> {
    let dir = match path.file_stem().is_some_and(|stem| stem == "mod" || stem == "lib" || stem == "main") {
        true => path.parent().expect("has a folder").to_owned(),
        false => path.with_extension(""),
    };
    let mut out = Vec::new();
    for (at, mark) in text.match_indices("#[cfg(test)]") {
        let rest = text[at + mark.len()..].trim_start();
        let attribute = rest.strip_prefix("#[path = \"").and_then(|rest| rest.split_once("\"]"));
        let (named, rest) = attribute.map_or((None, rest), |(name, rest)| (Some(name), rest.trim_start()));
        let rest = rest.strip_prefix("pub(crate) ").or_else(|| rest.strip_prefix("pub(super) ")).unwrap_or(rest);
        let Some((name, _)) = rest.strip_prefix("mod ").and_then(|rest| rest.split_once(';')) else { continue };
        if name.chars().all(|c| c.is_alphanumeric() || c == '_') {
            out.push(match named {
                Some(named) => path.parent().expect("has a folder").join(named),
                None => dir.join(format!("{name}.rs")),
            });
        }
    }
    out
}

/// What is compiled into the product: no comments, and nothing from the tests at the foot on.
fn product(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    let lines = text[..end].lines().map(|line| match line.trim_start().starts_with("//") {
        true => "",
        false => line.split_once(" // ").map_or(line, |(code, _)| code),
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn planted_faults_are_found() {
    let check = |path: &str, text: &str| {
        let path = Path::new(path);
        let faults = named(path, &product(text)).into_iter().filter_map(|room| judge(&room_of(path), &room));
        faults.collect::<Vec<_>>().join("; ")
    };
    assert_eq!(check("cyrus/db/mod.rs", "use crate::dlist::parse;\nuse crate::model::{Uid, ModSeq};"), "");
    assert_eq!(check("model/ids.rs", "use crate::dlist;"), "model names dlist, which is not below it");
    assert_eq!(check("cyrus/a.rs", "fn f() { crate::csync::x() }"), "cyrus names csync, which is not below it");
    assert_eq!(
        check("spool/a.rs", "use crate::{model::{A, B}, state::C, cyrus};"),
        "spool names state, which is not below it"
    );
    assert_eq!(check("state/a.rs", "use super::super::engine::Engine;"), "state names engine, which is not below it");
    assert_eq!(check("state/mod.rs", "use super::engine::Engine;"), "state names engine, which is not below it");
    assert_eq!(check("state/deep/a.rs", "use super::super::engine::Engine;"), "");
    assert!(check("engine/a.rs", "use crate::spool::LiveSpool;").starts_with("engine names spool: any store"));
    assert_eq!(check("engine/a.rs", "use crate::attic::X;"), "engine names attic, which is no room");
    assert_eq!(
        check("cyrus/a.rs", "// use crate::engine::X;\n#[cfg(test)]\nmod tests {\n use crate::engine::X; }"),
        ""
    );
    assert_eq!(check("main.rs", "use spooltap::cli;"), "");

    assert_eq!(impurities("let x = std::fs::read(path); let now = Instant::now();"), ["std::fs", "::now()"]);
    assert_eq!(impurities("fn decode(bytes: &[u8]) -> u32 { 0 }"), Vec::<&str>::new());
    assert!(words("unsafe { f() }").any(|word| word == "unsafe"));
    assert!(!words("#![deny(unsafe_code)]").any(|word| word == "unsafe"));

    let declared = test_files(
        Path::new("engine/mod.rs"),
        "#[cfg(test)]\nmod fake;\n#[cfg(test)]\n#[path = \"x_tests.rs\"]\nmod y;\nmod queue;",
    );
    assert_eq!(declared, [PathBuf::from("engine/fake.rs"), PathBuf::from("engine/x_tests.rs")]);
    assert_eq!(
        test_files(Path::new("engine/diff.rs"), "#[cfg(test)]\nmod more;"),
        [PathBuf::from("engine/diff/more.rs")]
    );
}
