//! Database readers against `cyr_dbtool … show` and friends.

use super::store;
use spooltap::cyrus::db;

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
