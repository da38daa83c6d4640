//! Files of real servers, cut and changed at every kind of place: an error or the right value, and never a panic.

use super::store;
use crate::util::{Rng, memory};
use proptest::prelude::*;
use spooltap::cyrus::imapd_conf::ImapdConf;
use spooltap::cyrus::{db, header, index, mboxlist};
use spooltap::dlist::Parser;
use std::collections::BTreeMap;
use std::sync::OnceLock;

struct Sample {
    path: String,
    bytes: Vec<u8>,
}

/// Small files of each kind from every store, `path` for the messages.
fn samples() -> &'static [Sample] {
    static SAMPLES: OnceLock<Vec<Sample>> = OnceLock::new();
    SAMPLES.get_or_init(|| {
        let mut samples = Vec::new();
        store::each(|store| {
            let mut taken = std::collections::HashMap::new();
            let mut files: Vec<_> = store.files.iter().collect();
            // The largest of each kind that is still small.
            files.sort_by_key(|(_, bytes)| std::cmp::Reverse(bytes.len()));
            for (path, bytes) in files.into_iter().filter(|(_, bytes)| (1..16_000).contains(&bytes.len())) {
                let name = path.rsplit('/').next().unwrap_or_default();
                let kind = match name {
                    "cyrus.index" | "cyrus.header" => name.to_owned(),
                    _ if path.contains("/quota/") => "quota".to_owned(),
                    _ if name.ends_with(".db") || name.ends_with(".seen") || name.ends_with(".sub") => {
                        format!("{:?}", db::sniff(bytes))
                    }
                    _ => continue,
                };
                let number = taken.entry(kind).or_insert(0);
                *number += 1;
                if *number <= 2 {
                    samples.push(Sample { path: format!("{} {path}", store.name), bytes: bytes.clone() });
                }
            }
        });
        samples
    })
}

/// What the readers make of a file, as far as it decides anything; `Err` for an error.
fn reading(path: &str, bytes: &[u8]) -> Result<String, String> {
    if path.ends_with("cyrus.index") {
        let header = index::parse_header(bytes).map_err(|error| error.to_string())?;
        let records = index::parse_records(&header, bytes).map_err(|error| error.to_string())?;
        return Ok(format!("{header:?} {records:?}"));
    }
    if path.ends_with("cyrus.header") {
        return header::parse(bytes).map(|header| format!("{header:?}")).map_err(|error| error.to_string());
    }
    let map = db::parse(bytes).map_err(|error| error.to_string())?;
    for (key, value) in &map {
        let _ = mboxlist::row_for(key, value);
    }
    Ok(format!("{map:?}"))
}

/// Every bit that matters is under a checksum.
fn is_checked(sample: &Sample) -> bool {
    if sample.path.ends_with("cyrus.index") {
        let header = index::parse_header(&sample.bytes).expect("good file");
        return header.layout().expect("known version").has_crc();
    }
    !sample.path.ends_with("cyrus.header") && db::sniff(&sample.bytes) == db::Kind::Twoskip
}

#[test]
fn every_truncation_is_an_error_or_an_earlier_state() {
    for sample in samples() {
        let whole = reading(&sample.path, &sample.bytes);
        if matches!(db::sniff(&sample.bytes), db::Kind::Sqlite | db::Kind::Berkeley | db::Kind::Unknown)
            && !sample.path.contains("cyrus.")
        {
            assert!(whole.is_err());
            continue;
        }
        let whole = whole.unwrap_or_else(|error| panic!("{}: {error}", sample.path));
        let log_starts = match db::sniff(&sample.bytes) {
            db::Kind::Skiplist => u32::from_be_bytes(sample.bytes[40..44].try_into().expect("four bytes")) as usize,
            // Any line end is as good as the last one.
            db::Kind::Flat if !sample.path.contains("cyrus.") => 0,
            _ => usize::MAX,
        };
        for end in (1..sample.bytes.len()).step_by(if sample.bytes.len() > 4000 { 7 } else { 1 }) {
            match reading(&sample.path, &sample.bytes[..end]) {
                Ok(cut) => assert!(end >= log_starts || cut == whole, "{} cut at {end} gave {cut}", sample.path),
                Err(error) => assert!(!error.is_empty()),
            }
        }
    }
}

/// Reads as the program does.
fn read(path: &str, bytes: &[u8]) -> bool {
    if path.ends_with("cyrus.index") {
        let header = index::parse_header(bytes);
        return header.and_then(|header| index::parse_records(&header, bytes)).is_ok();
    }
    if path.ends_with("cyrus.header") {
        return header::parse(bytes).is_ok();
    }
    if path.ends_with("imapd.conf") {
        return ImapdConf::parse(&String::from_utf8_lossy(bytes), &mut |_| Ok(String::new())).is_ok();
    }
    db::parse(bytes).is_ok()
}

/// Corruptions of each format in an ordinary run; `SPOOLTAP_CORRUPTIONS=100000` for all.
const CORRUPTIONS: usize = 3000;

/// Rows, nodes and flag names have a size of their own, however short what they hold.
const EACH_FILE: usize = 8192;

/// A file of every format of every release, as large as there is below that.
fn one_of_each() -> BTreeMap<String, Vec<Sample>> {
    let mut kinds: BTreeMap<String, Vec<Sample>> = BTreeMap::new();
    store::each(|store| {
        let mut largest: BTreeMap<String, (&String, &Vec<u8>)> = BTreeMap::new();
        for (path, bytes) in store.files.iter().filter(|(_, bytes)| (1..200_000).contains(&bytes.len())) {
            let name = path.rsplit('/').next().unwrap_or_default();
            let kind = match name {
                "cyrus.index" => index::parse_header(bytes)
                    .map_or("cyrus.index".to_owned(), |header| format!("cyrus.index {}", header.minor_version)),
                "cyrus.header" | "imapd.conf" => name.to_owned(),
                _ if path.contains("/quota/") => "quota".to_owned(),
                _ if name.ends_with(".db") || name.ends_with(".seen") || name.ends_with(".sub") => {
                    format!("{:?}", db::sniff(bytes))
                }
                _ => continue,
            };
            let best = largest.entry(kind).or_insert((path, bytes));
            if best.1.len() < bytes.len() {
                *best = (path, bytes);
            }
        }
        for (kind, (path, bytes)) in largest {
            kinds
                .entry(kind)
                .or_default()
                .push(Sample { path: format!("{} {path}", store.name), bytes: bytes.clone() });
        }
    });
    kinds
}

#[test]
fn damage_takes_no_memory() {
    let wanted = std::env::var("SPOOLTAP_CORRUPTIONS").ok().and_then(|count| count.parse().ok());
    let each = wanted.unwrap_or(CORRUPTIONS);
    let kinds = one_of_each();
    for kind in ["Twoskip", "Skiplist", "Flat", "cyrus.header", "cyrus.index 10", "cyrus.index 12", "cyrus.index 13"] {
        assert!(kinds.contains_key(kind), "no {kind} among {:?}", kinds.keys());
    }
    let mut rng = Rng::new(11);
    for (kind, samples) in &kinds {
        let (mut good, mut most) = (0, 0.0_f64);
        for number in 0..each {
            let sample = &samples[number % samples.len()];
            let mut bytes = sample.bytes.clone();
            for _ in 0..1 + rng.below(4) {
                // Headers decide the most, and are small.
                let reach = if rng.below(2) == 0 { bytes.len() } else { bytes.len().min(200) };
                let at = rng.below(reach);
                match rng.below(5) {
                    0 => bytes[at] = rng.below(256) as u8,
                    1 => bytes[at] ^= 1 << rng.below(8),
                    2 => bytes[at..].iter_mut().take(4).for_each(|byte| *byte = 0xff),
                    3 => bytes[at..].iter_mut().take(8).for_each(|byte| *byte = 0),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            let (read, taken) = memory::peak(|| read(&sample.path, &bytes));
            good += usize::from(read);
            most = most.max(taken.saturating_sub(EACH_FILE) as f64 / bytes.len() as f64);
            assert!(taken <= 2 * bytes.len() + EACH_FILE, "{}: {taken} for {} bytes", sample.path, bytes.len());
        }
        println!(
            "{kind}: {each} corruptions of {} files, {good} readable, at most {most:.2} of the file",
            samples.len()
        );
    }
}

/// Lists that are nothing but lists take fifty times their text, unless they are given less.
#[test]
fn lists_take_no_more_memory_than_they_are_given() {
    const GIVEN: usize = 8 << 20;
    for piece in ["()", "a ", "\"\" ", "%()", "NIL ", "(a)", "{0}\n", "%(a b)", "(((((a)))))", "abcdefghijklmnop "] {
        let text = format!("({})", piece.repeat(1_000_000));
        let (result, taken) = memory::peak(|| Parser::within(text.as_bytes(), GIVEN).value());
        assert!(result.expect_err("is too much").is_heavy(), "{piece}");
        assert!(taken <= GIVEN, "{piece}: {taken}");
        let text = format!("({})", piece.repeat(5_000));
        assert!(Parser::within(text.as_bytes(), GIVEN).value().is_ok(), "{piece}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn random_damage_is_found_or_harmless(
        which in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let sample = which.get(samples());
        let mut bytes = sample.bytes.clone();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()).max(1));
        }
        if let Ok(found) = reading(&sample.path, &bytes)
            && is_checked(sample)
        {
            prop_assert_eq!(found, reading(&sample.path, &sample.bytes).expect("good file"), "{}", sample.path);
        }
    }

    #[test]
    fn random_bytes_after_a_magic_are_an_error_or_a_value(
        magic in prop::sample::select(vec![
            &b"\xa1\x02\x8b\x0dskiplist file\0\0\0\0\0\0\x01\0\0\0\x02\0\0\0\x14\0\0\0\x04\0\0\0\x01\0\0\0\x90\0\0\0\0"[..],
            b"\xa1\x02\x8b\x0dtwoskip file\0\0\0\0",
            b"%(",
            b"",
        ]),
        bytes in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let file = [magic, &bytes].concat();
        let _ = db::parse(&file);
        let _ = db::Follower::new().update(1, &mut |at, len| {
            let start = (at as usize).min(file.len());
            Ok(file[start..start.saturating_add(len).min(file.len())].to_vec())
        });
    }
}
