//! Tests against recorded talks of real servers: `fixtures/csync`, and all of `../shared/traces` where it is there.

use super::codec::Splitter;
use super::command::{self, Untagged};
use super::{Dialect, Generation};
use crate::cyrus::synccrc;
use crate::model::{MailboxUpdate, Since, SyncCrcs};
use std::path::{Path, PathBuf};

fn talks(suffix: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = std::env::var_os("SPOOLTAP_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
    let mut folders = vec![root.join("fixtures/csync")];
    let more = ["2.4.22", "2.5.11", "3.6.1", "2.4.22-to-3.6.1", "2.5.11-to-3.6.1"];
    folders.extend(more.iter().map(|name| shared.join("traces").join(name)).filter(|folder| folder.is_dir()));
    let mut out = Vec::new();
    for folder in folders {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.to_string_lossy().into_owned();
            if name.ends_with(suffix) || name.ends_with(&format!("{suffix}.plain")) {
                let bytes = std::fs::read(&path).expect("a file");
                // Beside a `.plain` file this one is compressed from some point on.
                if name.ends_with(".plain") || !path.with_file_name(format!("{name}.plain")).exists() {
                    out.push((path, bytes));
                }
            }
        }
    }
    assert!(out.len() >= 6, "fixtures are missing");
    out
}

fn answers(path: &Path, bytes: &[u8]) -> Vec<Vec<u8>> {
    let (mut splitter, mut out) = (Splitter::default(), Vec::new());
    for piece in bytes.chunks(97) {
        splitter.push(piece);
        while let Some(answer) = splitter.next_answer().unwrap_or_else(|error| panic!("{}: {error}", path.display())) {
            out.push(answer);
        }
    }
    out
}

#[test]
fn every_answer_of_every_talk_is_understood() {
    let mut full_views = 0;
    for (path, bytes) in talks(".s2c") {
        let answers = answers(&path, &bytes);
        assert!(answers.iter().any(|line| line.starts_with(b"* OK ")), "{}", path.display());
        let start = answers.iter().position(|line| line.starts_with(b"OK ")).unwrap_or(0);
        for line in &answers[start..] {
            let Some(line) = line.strip_prefix(b"* ") else {
                let first = line.split(|&byte| byte == b' ').next().unwrap_or_default();
                assert!(matches!(first, b"OK" | b"NO" | b"BAD" | b"+"), "{}: {line:?}", path.display());
                continue;
            };
            match command::untagged(line).unwrap_or_else(|error| panic!("{}: {error}", path.display())) {
                Untagged::Other => assert!(line.starts_with(b"MESSAGE "), "{}: {line:?}", path.display()),
                // What a server says of a whole mailbox adds up to the checksum it says.
                Untagged::Mailbox(view) => {
                    if let (Some(records), Some(crc)) = (&view.records, view.crc_basic) {
                        assert_eq!(synccrc::basic(records, &view.user_flags), crc, "{}", path.display());
                        full_views += 1;
                    }
                }
                _ => {}
            }
        }
    }
    assert!(full_views >= 3, "{full_views}");
}

/// What 3.6.1's own client sent, read and printed again.
#[test]
fn updates_are_printed_as_a_real_client_prints_them() {
    let mut compared = 0;
    for (path, bytes) in talks(".c2s") {
        let by_3_6 = path.to_string_lossy().contains("3.6.1") && !path.to_string_lossy().contains("-to-3.6.1");
        if !by_3_6 {
            continue;
        }
        for line in bytes.split(|&byte| byte == b'\n').filter_map(|line| line.strip_prefix(b"APPLY ")) {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            // Lines with literals go on after the line end; intermediates have a form of their own.
            let text = String::from_utf8_lossy(line);
            if !text.starts_with("MAILBOX ") || text.contains("}") || text.contains("MBOXTYPE ei") {
                continue;
            }
            let Ok(Untagged::Mailbox(view)) = command::untagged(line) else { panic!("{}: {text}", path.display()) };
            let number = |key: &str| {
                let rest = text.split(&format!(" {key} ")).nth(1)?;
                rest.split([' ', ')']).next()?.parse::<u64>().ok()
            };
            let since = number("SINCE_MODSEQ").map(|modseq| Since {
                modseq: crate::model::ModSeq(modseq),
                crcs: SyncCrcs {
                    basic: number("SINCE_CRC").unwrap_or_default() as u32,
                    annot: number("SINCE_CRC_ANNOT").unwrap_or_default() as u32,
                },
            });
            let update = MailboxUpdate {
                head: view.head.clone(),
                crcs: SyncCrcs { basic: view.crc_basic.unwrap_or_default(), annot: view.crc_annot.unwrap_or_default() },
                since,
                user_flags: view.user_flags.clone(),
                annotations: view.annotations.clone(),
                records: view.records.clone().unwrap_or_default(),
                bodies: Vec::new(),
                reserve_from: Vec::new(),
                create: false,
            };
            let again = command::mailbox(&update, &view.head.partition, &Dialect::of(Generation::V36));
            let again = String::from_utf8_lossy(&again).into_owned();
            // Our flag table is in order of first sight, the header's order is not told; LAST_APPENDDATE is not ours to say.
            let sorted = |text: &str| {
                let mut words: Vec<String> =
                    text.trim_end().split([' ', '(', ')']).filter(|word| !word.is_empty()).map(str::to_owned).collect();
                words.sort();
                words
            };
            assert_eq!(sorted(&again), sorted(&format!("APPLY {text}")), "{}", path.display());
            compared += 1;
        }
    }
    assert!(compared >= 3, "{compared}");
}
