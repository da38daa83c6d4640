//! Database readers against `cyr_dbtool … show` and friends.

use super::store;
use spooltap::cyrus::db;
use std::io::Read;

/// What the dump prints for a map: `key TAB value LF`. The tool of 2.4 stops at the first NUL of either.
fn shown(map: &db::Map, release: &str) -> Vec<u8> {
    let upto_nul = |bytes: &[u8]| {
        let end = bytes.iter().position(|&byte| byte == 0).filter(|_| release.starts_with("2.4"));
        bytes[..end.unwrap_or(bytes.len())].to_vec()
    };
    map.iter().flat_map(|(key, value)| [&upto_nul(key)[..], b"\t", &upto_nul(value), b"\n"].concat()).collect()
}

fn sorted_lines(text: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<&[u8]> = text.split(|&byte| byte == b'\n').collect();
    lines.sort();
    lines
}

#[test]
fn every_dumped_database_reads_as_cyrus_reads_it() {
    let mut compared = 0;
    store::each(|store| {
        for (title, text) in store.dump("dbdump.txt") {
            let (path, kind) = title.rsplit_once(" (").expect("title is: path (kind)");
            let expected = match kind {
                "twoskip)" => db::Kind::Twoskip,
                "skiplist)" => db::Kind::Skiplist,
                "flat)" => db::Kind::Flat,
                _ => continue,
            };
            let bytes = store.file(path);
            let at = format!("{} {path}", store.name);
            if !bytes.is_empty() {
                assert_eq!(db::sniff(bytes), expected, "{at}");
            }
            let map = db::parse(bytes).unwrap_or_else(|error| panic!("{at}: {error}"));
            let shown = shown(&map, &store.name);
            // flat files are dumped in their own order.
            assert_eq!(sorted_lines(&shown), sorted_lines(&text), "{at}: other contents");
            if expected != db::Kind::Flat {
                assert!(shown == text, "{at}: other order");
            }
            compared += 1;
        }
    });
    assert!(compared > 20, "only {compared} databases compared");
}

/// Follows a database through its states, looking at every `stride`th one.
fn follow(archive: &std::path::Path, stride: usize) {
    let unpacked = xz2::read::XzDecoder::new(std::fs::File::open(archive).expect("opens"));
    let mut follower = db::Follower::new();
    let (mut states, mut tails, mut file, mut ino) = (0, 0, Vec::new(), 0);
    for entry in tar::Archive::new(unpacked).entries().expect("is a tar archive") {
        let mut entry = entry.expect("entry is whole");
        let name = entry.path().expect("has a path").to_string_lossy().into_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).expect("entry is whole");
        if let Some(rest) = name.strip_suffix(".db") {
            ino = rest.split('.').nth(1).and_then(|ino| ino.parse().ok()).expect("name has the inode");
            file = bytes;
            continue;
        }
        let at = format!("{} {name}", archive.display());
        let map = db::parse(&file).unwrap_or_else(|error| panic!("{at}: {error}"));
        assert!(shown(&map, "") == bytes, "{at}: whole file");
        states += 1;
        if states % stride != 0 {
            continue;
        }
        let changes = follower.update(ino, &mut |offset, len| {
            let start = (offset as usize).min(file.len());
            Ok(file[start..start.saturating_add(len).min(file.len())].to_vec())
        });
        let changes = changes.unwrap_or_else(|error| panic!("{at}: {error}"));
        assert!(follower.map() == &map, "{at}: follower");
        tails += usize::from(!changes.reloaded);
    }
    assert!(states >= 100 && tails > 0, "{}: {tails} tails in {states} states", archive.display());
}

#[test]
fn followers_keep_up_with_every_transaction() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/formats/states");
    for entry in std::fs::read_dir(folder).expect("fixtures are there") {
        let path = entry.expect("folder is readable").path();
        for stride in [1, 2, 5] {
            follow(&path, stride);
        }
    }
}
