//! Recorded stores, unpacked in memory, with Cyrus's dumps of them.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

/// One store: `<release>-<variant>.tar.xz` and what stands beside it.
pub struct Store {
    pub name: String,
    /// Regular files by path inside the archive.
    pub files: BTreeMap<String, Vec<u8>>,
    beside: PathBuf,
}

impl Store {
    fn open(archive: &Path) -> Self {
        let file_name = archive.file_name().expect("archive has a name").to_string_lossy().into_owned();
        let name = file_name.strip_suffix(".tar.xz").expect("checked by the caller").to_owned();
        let unpacked = xz2::read::XzDecoder::new(std::fs::File::open(archive).expect("opens"));
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(unpacked).entries().expect("is a tar archive") {
            let mut entry = entry.expect("entry is whole");
            if entry.header().entry_type().is_file() || entry.header().entry_type().is_gnu_sparse() {
                let path = entry.path().expect("has a path").to_string_lossy().trim_start_matches("./").to_owned();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).expect("entry is whole");
                files.insert(path, bytes);
            }
        }
        Self { name, files, beside: archive.with_file_name("") }
    }

    /// `.mbexamine.txt` or `.dbdump.txt`, as sections `##### title` → text.
    pub fn dump(&self, suffix: &str) -> Vec<(String, Vec<u8>)> {
        let path = self.beside.join(format!("{}.{suffix}", self.name));
        let xz = path.with_file_name(format!("{}.{suffix}.xz", self.name));
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(_) => {
                let mut text = Vec::new();
                let file = std::fs::File::open(&xz).unwrap_or_else(|error| panic!("{}: {error}", xz.display()));
                xz2::read::XzDecoder::new(file).read_to_end(&mut text).expect("unpacks");
                text
            }
        };
        let mut sections: Vec<(String, Vec<u8>)> = Vec::new();
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            match line.strip_prefix(b"##### ") {
                Some(title) => sections.push((String::from_utf8_lossy(title).trim_end().to_owned(), Vec::new())),
                None => sections.last_mut().expect("dump starts with a title").1.extend_from_slice(line),
            }
        }
        // An empty line closes a section that holds something.
        for (_, text) in &mut sections {
            text.pop();
        }
        sections
    }

    /// A file that a dump names as `@BASE@/…`.
    pub fn file(&self, title: &str) -> &[u8] {
        let path = title.strip_prefix("@BASE@/").unwrap_or(title);
        self.files.get(path).unwrap_or_else(|| panic!("{}: no {path}", self.name))
    }
}

/// Folder of recordings that a clone may lack.
pub fn shared() -> Option<PathBuf> {
    let path = std::env::var_os("SPOOLTAP_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    path.is_dir().then_some(path)
}

/// Every store there is, one at a time (each is some 20 MB unpacked).
pub fn each(mut check: impl FnMut(&Store)) {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/formats")];
    folders.extend(shared().map(|shared| shared.join("spools")));
    let mut archives: BTreeMap<String, PathBuf> = BTreeMap::new();
    for folder in folders {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("folder is readable").path();
            let name = path.file_name().expect("has a name").to_string_lossy().into_owned();
            if name.ends_with(".tar.xz") {
                archives.insert(name, path);
            }
        }
    }
    assert!(archives.len() >= 2, "the fixtures are there");
    for archive in archives.values() {
        check(&Store::open(archive));
    }
}
