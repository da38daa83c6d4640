//! The fuzz targets' functions over files of real servers, cut and damaged. `fuzz/seed` writes the same files as the
//! fuzzers' first corpus.

#[path = "../../fuzz/parsers.rs"]
#[allow(dead_code)]
mod fuzz;

use super::store;
use crate::util::Rng;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use spooltap::csync::codec::Splitter;
use spooltap::cyrus::db;
use std::collections::BTreeMap;
use std::path::Path;

/// Seeds are small: a fuzzer changes few bytes at a time.
const MOST_BYTES: usize = 6000;
const EACH: usize = 12;

#[derive(Default)]
struct Seeds(BTreeMap<&'static str, Vec<Vec<u8>>>);

impl Seeds {
    fn add(&mut self, parser: &'static str, bytes: &[u8]) {
        let list = self.0.entry(parser).or_default();
        if !bytes.is_empty() && bytes.len() <= MOST_BYTES && list.len() < EACH && !list.iter().any(|old| old == bytes) {
            list.push(bytes.to_vec());
        }
    }
}

fn seeds() -> Seeds {
    let mut seeds = Seeds::default();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    store::each(|store| {
        let mut files: Vec<_> = store.files.iter().filter(|(_, bytes)| bytes.len() <= MOST_BYTES).collect();
        files.sort_by_key(|(_, bytes)| std::cmp::Reverse(bytes.len()));
        let mut taken = BTreeMap::new();
        for (path, bytes) in files {
            let name = path.rsplit('/').next().unwrap_or_default();
            let parser = match name {
                "cyrus.index" => "index",
                "cyrus.header" => "header",
                "imapd.conf" => "imapd_conf",
                _ if name.starts_with("cyrus.") => continue,
                _ => match db::sniff(bytes) {
                    db::Kind::Twoskip => "twoskip",
                    db::Kind::Skiplist => "skiplist",
                    db::Kind::Flat | db::Kind::QuotaLegacy if path.contains("/quota/") || name.ends_with(".sub") => {
                        "flat"
                    }
                    _ => continue,
                },
            };
            // Two of a kind from every store, so that every release is among them.
            let count = taken.entry(parser).or_insert(0);
            *count += 1;
            if *count <= 2 {
                seeds.add(parser, bytes);
            }
            if *count == 1 {
                seeds.add("encoders", bytes);
            }
        }
        for (_, bytes) in store.files.iter().filter(|(path, _)| path.ends_with("mailboxes.db")) {
            for (key, value) in db::parse(bytes).expect("a good file").iter().take(3) {
                seeds.add("mboxlist", &[&key[..], b"\n", value].concat());
                seeds.add("dlist", value);
            }
        }
        // The values of small databases: quota roots, seen states, annotations of 2.3 and of 3.6.
        for (path, bytes) in &store.files {
            let holds_values = path.ends_with(".seen") || path.contains("/quota/") || path.ends_with("annotations.db");
            if holds_values && let Ok(map) = db::parse(bytes) {
                for (key, value) in map.iter().take(1) {
                    seeds.add("values", &[&key[..], b"\n", value].concat());
                    seeds.add("encoders", &[&key[..], b"\n", value].concat());
                }
            }
        }
    });
    for entry in std::fs::read_dir(fixtures.join("csync")).expect("fixtures") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|kind| kind == "s2c") {
            let bytes = std::fs::read(&path).expect("a file");
            let mut splitter = Splitter::default();
            splitter.push(&bytes);
            while let Ok(Some(answer)) = splitter.next_answer() {
                let list = answer.iter().position(|byte| *byte == b'%' || *byte == b'(');
                if let Some(at) = list.filter(|_| answer.starts_with(b"* ")) {
                    seeds.add("dlist", &answer[at..]);
                    if let Some(view) = answer.strip_prefix(b"* MAILBOX ") {
                        seeds.add("mailbox_view", view);
                    }
                }
            }
            seeds.add("codec", &bytes[..bytes.len().min(MOST_BYTES)]);
        }
        if path.extension().is_some_and(|kind| kind == "c2s") {
            let bytes = std::fs::read(&path).expect("a file");
            seeds.add("intake", &bytes[..bytes.len().min(MOST_BYTES)]);
        }
    }
    // As cyrus-imapd's sync_log.c writes them, and the challenges of RFC 5802, RFC 2831 and RFC 2195.
    seeds
        .add("sync_log", b"USER u1\nMAILBOX {3+}\r\na b\nSEEN u1 user.u2\nRENAME a \"b c\"\nAPPEND user.u1\nMETA u1\n");
    for challenge in [
        "r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096\nv=rmF9pqV8S7suAoZWja4dJRkFsKQ=",
        "realm=\"elwood.innosoft.com\",nonce=\"OA6MG9tEQGm2hh\",qop=\"auth\",algorithm=md5-sess,charset=utf-8",
        "<1896.697170952@postoffice.reston.mci.net>",
    ] {
        let lines: Vec<String> = challenge.lines().map(|line| BASE64.encode(line)).collect();
        seeds.add("sasl", lines.join("\n").as_bytes());
    }
    for entry in walkdir::WalkDir::new(fixtures.join("replays")) {
        let entry = entry.expect("an entry");
        if entry.file_name() == "imapd.conf" {
            seeds.add("imapd_conf", &std::fs::read(entry.path()).expect("a file"));
        }
    }
    // What fuzzing has found; each was a failure once.
    for entry in walkdir::WalkDir::new(fixtures.join("hostile")).min_depth(2) {
        let entry = entry.expect("an entry");
        let folder = entry.path().parent().and_then(Path::file_name).expect("a folder");
        let (parser, _) = fuzz::PARSERS.iter().find(|(name, _)| folder == *name).expect("is named after a parser");
        seeds.0.entry(parser).or_default().push(std::fs::read(entry.path()).expect("a file"));
    }
    seeds
}

#[test]
fn every_parser_takes_any_damage() {
    let seeds = seeds();
    for (name, parse) in fuzz::PARSERS {
        let list = seeds.0.get(name).unwrap_or_else(|| panic!("no seed for {name}"));
        let mut rng = Rng::new(7);
        for seed in list {
            parse(seed);
            for end in (0..seed.len()).step_by(seed.len() / 300 + 1) {
                parse(&seed[..end]);
            }
            for _ in 0..300 {
                let mut bytes = seed.clone();
                for _ in 0..1 + rng.below(4) {
                    let at = rng.below(bytes.len());
                    match rng.below(4) {
                        0 => bytes[at] = rng.below(256) as u8,
                        1 => bytes[at] ^= 1 << rng.below(8),
                        2 => bytes[at..].iter_mut().take(4).for_each(|byte| *byte = 0xff),
                        _ => {
                            let piece: Vec<u8> = bytes[at..].iter().take(16).copied().collect();
                            let to = rng.below(bytes.len());
                            bytes.splice(to..to, piece);
                        }
                    }
                }
                parse(&bytes);
            }
        }
    }
}

/// Writes the corpus where `fuzz/seed` wants it; without that, sees that there is one for every target.
#[test]
fn every_fuzz_target_has_seeds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).expect("fuzz/Cargo.toml");
    let seeds = seeds();
    for (name, _) in fuzz::PARSERS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is no fuzz target");
        assert!(folder.join(format!("fuzz_targets/{name}.rs")).exists(), "{name} has no file");
        let list = seeds.0.get(name).unwrap_or_else(|| panic!("no seed for {name}"));
        if let Some(corpus) = std::env::var_os("SPOOLTAP_FUZZ_CORPUS") {
            let place = Path::new(&corpus).join(name);
            std::fs::create_dir_all(&place).expect("a folder");
            for (number, bytes) in list.iter().enumerate() {
                std::fs::write(place.join(format!("fixture-{number}")), bytes).expect("writes");
            }
        }
    }
}
