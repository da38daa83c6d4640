//! docs/compatibility.md: made from what the tests have shown, and never more than that.

use super::util::evidence::{FOLDER, OBJECTS, STEPS};
use super::util::store::{fixtures, recordings_in, stores};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// `check`: the document must not claim more than this run's evidence. `write`: make it anew.
const STAGE: &str = "SPOOLTAP_EVIDENCE_STAGE";

const LAYOUTS: &[(&str, &str)] = &[
    ("a", "defaults of the release, `.` as separator"),
    ("b", "hashimapspool, fulldirhash, unixhierarchysep, virtdomains"),
    ("c", "delayed delete and expunge, metapartition for header, index and cache"),
    ("d", "a second partition; conversations on 3.6"),
    ("e", "delayed delete and expunge, conversations; from 3.6 on directories by uniqueid"),
];

/// Letter in the table, name of the evidence, what was done.
const WAYS: &[(char, &str, &str)] = &[
    (
        'L',
        "live",
        "a recording of that server played while `spooltap run` follows it into a real 3.6.1; IMAP at every mark",
    ),
    ('P', "push", "a store of that server pushed into a real 3.6.1; IMAP, `verify`, and nothing sent the second time"),
    ('A', "archive", "the recording followed into an archive, read back at every mark with all bodies"),
    ('R', "restore", "the store pushed into an archive, and from there into a real 3.6.1; IMAP"),
];

const NOT: &str = "not tested";

fn document() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/compatibility.md")
}

/// Names of the recordings and stores in the repository: others may stand beside it and do not count.
fn names() -> BTreeSet<String> {
    let recordings = recordings_in(&[fixtures().join("replays")]).into_iter();
    let recordings = recordings.filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    recordings.chain(stores()).collect()
}

/// Name and kind → letters.
type Shown = BTreeMap<(String, String), BTreeSet<char>>;

fn evidence(folder: &Path) -> Shown {
    let (names, mut shown) = (names(), Shown::new());
    for file in std::fs::read_dir(folder).expect("evidence").flatten() {
        let found: Value = serde_json::from_slice(&std::fs::read(file.path()).expect("reads")).expect("is JSON");
        let letter = WAYS.iter().find(|(_, way, _)| found["way"] == *way).expect("a known way").0;
        let name = found["name"].as_str().expect("name").to_owned();
        for kind in found["kinds"].as_array().into_iter().flatten().filter(|_| names.contains(&name)) {
            shown.entry((name.clone(), kind.as_str().expect("kind").to_owned())).or_default().insert(letter);
        }
    }
    shown
}

fn kinds() -> impl Iterator<Item = &'static str> {
    OBJECTS.iter().map(|(kind, _)| *kind).chain(STEPS.iter().map(|(kind, _)| *kind))
}

fn render(shown: &Shown) -> String {
    let mut out = String::from(
        "# Compatibility\n\
         Made by the test run (`tests/run compatibility`) from what the tests have shown; do not edit. A letter stands where the\n\
         recording or store of that release had such an object, or such a step, and both sides were equal:\n\n",
    );
    for (letter, _, what) in WAYS {
        out += &format!("- **{letter}**: {what}.\n");
    }
    out += "\nLayouts: ";
    out += &LAYOUTS.iter().map(|(letter, what)| format!("**{letter}** {what}")).collect::<Vec<_>>().join("; ");
    out += ".\n";
    let releases: BTreeSet<String> =
        names().iter().filter_map(|name| Some(name.rsplit_once('-')?.0.to_owned())).collect();
    for release in releases {
        out += &format!("\n## Source {release}\n| | {} |\n", LAYOUTS.map_letters().join(" | "));
        out += &format!("|---{}|\n", "|---".repeat(LAYOUTS.len()));
        for kind in kinds() {
            let cells = LAYOUTS.iter().map(|(layout, _)| {
                let letters = shown.get(&(format!("{release}-{layout}"), kind.to_owned()));
                letters
                    .map_or(NOT.to_owned(), |letters| letters.iter().map(char::to_string).collect::<Vec<_>>().join(" "))
            });
            out += &format!("| {kind} | {} |\n", cells.collect::<Vec<_>>().join(" | "));
        }
    }
    out += "\n## Not tested\n\
            Other releases than these as a source (index versions 6 to 9, 14 to 16, 18 and 20 by tables and made-up files); in this run,\n\
            other releases than 3.6.1 as a replica (tried by hand: docs/csync.md); `sieveusehomedir`; more than two partitions.\n";
    out
}

trait Letters {
    fn map_letters(&self) -> Vec<&'static str>;
}

impl Letters for [(&'static str, &'static str)] {
    fn map_letters(&self) -> Vec<&'static str> {
        self.iter().map(|(letter, _)| *letter).collect()
    }
}

/// The cells of a document, as evidence.
fn claims(text: &str) -> Shown {
    let (mut release, mut out) = ("", Shown::new());
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("## Source ") {
            release = name;
        }
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let Some(kind) = cells.get(1).filter(|kind| kinds().any(|known| known == **kind)) else { continue };
        for ((layout, _), cell) in LAYOUTS.iter().zip(&cells[2..]) {
            if *cell != NOT {
                let letters = cell.split(' ').filter_map(|letter| letter.chars().next()).collect();
                out.insert((format!("{release}-{layout}"), (*kind).to_owned()), letters);
            }
        }
    }
    out
}

#[test]
fn the_document_claims_what_this_run_has_shown() {
    let text = std::fs::read_to_string(document()).unwrap_or_default();
    let claimed = claims(&text);
    match (std::env::var(STAGE).as_deref(), std::env::var_os(FOLDER)) {
        (Ok("write"), Some(folder)) => {
            let shown = evidence(Path::new(&folder));
            std::fs::write(document(), render(&shown)).expect("writes");
        }
        (Ok("check"), Some(folder)) => {
            let shown = evidence(Path::new(&folder));
            let too_much: Vec<_> = claimed
                .iter()
                .filter(|(cell, letters)| !shown.get(cell).is_some_and(|shown| letters.is_subset(shown)))
                .collect();
            assert!(too_much.is_empty(), "docs/compatibility.md claims what was not shown: {too_much:?}");
            if shown != claimed {
                println!("docs/compatibility.md can say more: tests/run compatibility");
            }
        }
        // The other tests are still running: at least the document is one that `render` makes, of recordings there are.
        _ => {
            assert_eq!(render(&claimed), text, "docs/compatibility.md was edited by hand: tests/run compatibility");
            let known = names();
            assert!(claimed.len() > 50 && claimed.keys().all(|(name, _)| known.contains(name)));
        }
    }
}
