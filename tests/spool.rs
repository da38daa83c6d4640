//! The live spool against what IMAP showed, at every mark of recordings of real servers.

#[path = "spool/followed.rs"]
mod followed;
#[path = "spool/half.rs"]
mod half;
#[path = "spool/large.rs"]
mod large;

use spooltap::replay::{Depth, Player, Recording, Speed, compare};
use spooltap::spool::open_store;
use std::path::{Path, PathBuf};

pub fn recordings() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = std::env::var_os("SPOOLTAP_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
    let mut out: Vec<PathBuf> = [root.join("fixtures/replays"), shared.join("replays")]
        .iter()
        .filter_map(|dir| std::fs::read_dir(dir).ok())
        .flat_map(|dir| dir.flatten().map(|entry| entry.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            ["2.3.", "2.4.", "2.5.", "3."].iter().any(|release| name.starts_with(release))
        })
        .collect();
    out.sort_by_key(|path| path.file_name().map(ToOwned::to_owned));
    out.dedup_by_key(|path| path.file_name().map(ToOwned::to_owned));
    out
}

#[test]
fn every_mark_reads_as_imap_showed_it() {
    let mut faults = Vec::new();
    for path in recordings() {
        let name = path.file_name().expect("name").to_string_lossy().into_owned();
        let dir = tempfile::tempdir().expect("directory");
        let recording = Recording::open(&path).expect("recording");
        let conf = recording.unpack(dir.path()).expect("unpacks");
        let store = open_store(&conf).expect("opens");
        let mut player = Player::new(&recording, dir.path());
        while let Some(mark) = player.next_mark(Speed::Asap).expect("plays") {
            match compare(&store, &mark.truth, Depth::Bodies) {
                Ok(differences) => faults.extend(
                    differences.into_iter().map(|text| format!("{name} step {} ({}): {text}", mark.step, mark.what)),
                ),
                Err(error) => faults.push(format!("{name} step {} ({}): {error}", mark.step, mark.what)),
            }
        }
    }
    assert!(faults.is_empty(), "{} differences:\n{}", faults.len(), faults[..faults.len().min(40)].join("\n"));
}
