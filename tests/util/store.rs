//! Whole stores of real servers (`fixtures/spools`) with what IMAP showed of them, and where recordings lie.

use super::snapshot::Snapshot;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// An unpacked store.
pub struct Store {
    pub dir: TempDir,
    pub conf: PathBuf,
    pub release: String,
    pub truth: Snapshot,
}

impl Store {
    /// Logins of the accounts in it.
    pub fn users(&self) -> Vec<String> {
        self.truth.0["users"].as_object().into_iter().flat_map(|users| users.keys().cloned()).collect()
    }

    /// Directories of the partitions that imapd.conf names besides the default one, by name.
    pub fn partitions(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.conf).expect("imapd.conf");
        let names = text.lines().filter_map(|line| line.split_once(':')?.0.trim().strip_prefix("partition-"));
        names.filter(|name| *name != "default").map(ToOwned::to_owned).collect()
    }
}

/// Unpacks a store of `fixtures/spools`, `2.5.11-a` for example.
pub fn store(name: &str) -> Store {
    store_in(&fixtures().join("spools"), name)
}

/// Unpacks `NAME.tar.xz` of that folder.
pub fn store_in(folder: &Path, name: &str) -> Store {
    let dir = tempfile::Builder::new().prefix("spooltap-store-").tempdir().expect("directory");
    let packed = fs::File::open(folder.join(format!("{name}.tar.xz"))).expect("store");
    let mut archive = tar::Archive::new(xz2::read::XzDecoder::new(packed));
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.unpack(dir.path()).expect("store unpacks");
    let conf = dir.path().join("imapd.conf");
    let text = fs::read_to_string(&conf).expect("imapd.conf");
    fs::remove_file(&conf).expect("imapd.conf");
    fs::write(&conf, text.replace("@BASE@", &dir.path().to_string_lossy())).expect("imapd.conf");
    let truth = fs::read(folder.join(format!("{name}.truth.json"))).expect("truth");
    let truth: Value = serde_json::from_slice(&truth).expect("truth is JSON");
    let release = truth["version"].as_str().expect("release").to_owned();
    let truth = Snapshot::recorded(&truth);
    Store { dir, conf, release, truth }
}

/// Names of the stores in `fixtures/spools`.
pub fn stores() -> Vec<String> {
    stores_in(&fixtures().join("spools")).into_iter().map(|(_, name)| name).collect()
}

/// The stores in a folder, sorted, each with that folder.
pub fn stores_in(folder: &Path) -> Vec<(PathBuf, String)> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = files.filter_map(|file| file.file_name().to_str()?.strip_suffix(".tar.xz").map(ToOwned::to_owned));
    let mut stores: Vec<_> = names.map(|name| (folder.to_owned(), name)).collect();
    stores.sort();
    stores
}

/// Folders of recordings below these folders, or these folders themselves; sorted, each name once.
pub fn recordings_in(folders: &[PathBuf]) -> Vec<PathBuf> {
    let is_recording = |path: &PathBuf| path.join("ops.jsonl.gz").is_file();
    let mut out = Vec::new();
    for folder in folders {
        match is_recording(folder) {
            true => out.push(folder.clone()),
            false => {
                let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
                out.extend(entries.filter(is_recording));
            }
        }
    }
    out.sort_by_key(|path| path.file_name().map(ToOwned::to_owned));
    out.dedup_by_key(|path| path.file_name().map(ToOwned::to_owned));
    out
}

/// The recordings of releases that are supported as a source, in the repository and beside it.
pub fn recordings() -> Vec<PathBuf> {
    let mut all = recordings_in(&[fixtures().join("replays"), shared().join("replays")]);
    all.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        ["2.3.", "2.4.", "2.5.", "3."].iter().any(|release| name.starts_with(release))
    });
    all
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// More material, which may be missing.
fn shared() -> PathBuf {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    std::env::var_os("SPOOLTAP_SHARED").map_or_else(beside, PathBuf::from)
}
