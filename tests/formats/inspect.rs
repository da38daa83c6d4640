//! `inspect` over every file of the recorded stores: shown, or refused by name.

use super::store;
use spooltap::cli::inspect::inspect;

#[test]
fn every_file_of_a_store_is_shown_or_refused_by_name() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut shown = std::collections::BTreeMap::<String, usize>::new();
    store::each(|store| {
        for (path, bytes) in &store.files {
            let name = path.rsplit('/').next().unwrap_or_default();
            // Message files are not ours to show; caches and environments of Berkeley databases are large.
            if name.ends_with('.') || bytes.len() > 1_000_000 {
                continue;
            }
            let file = folder.path().join(name);
            std::fs::write(&file, bytes).expect("writes");
            let (mut text, mut json) = (Vec::new(), Vec::new());
            let result = inspect(&file, false, &mut text).and_then(|()| inspect(&file, true, &mut json));
            let readable = matches!(name, "cyrus.index" | "cyrus.header" | "imapd.conf" | "cyrus.annotations")
                || ["mailboxes.db", "annotations.db", ".seen", "seen.db", ".sub", "sub.db", ".bc"]
                    .iter()
                    .any(|end| name.ends_with(end))
                || path.contains("/quota/");
            match result {
                Ok(()) => {
                    let json: serde_json::Value = serde_json::from_slice(&json).expect("is JSON");
                    let format = json["format"].as_str().expect("has a format").to_owned();
                    assert!(String::from_utf8_lossy(&text).contains(&format), "{} {path}", store.name);
                    *shown.entry(format).or_default() += 1;
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    assert!(!readable, "{} {path}: {error}", store.name);
                    assert!(error.contains(name), "{} {path}: {error}", store.name);
                }
            }
            std::fs::remove_file(&file).expect("removes");
        }
    });
    let expected =
        ["cyrus.header", "cyrus.index", "database", "imapd.conf", "mailbox list", "quota root", "sieve bytecode"];
    for format in expected {
        assert!(shown.contains_key(format), "no {format} among {shown:?}");
    }
}
