//! Capture against recordings of real servers: at every mark, every file that changed is covered by a key.
//!
//! The way back from a key to files is taken from `cyrus::names`, which knows nothing of `derive`.

use crate::capture::start;
use spooltap::capture::{Roots, Settings};
use spooltap::cyrus::names::{self, Era, Hashing};
use spooltap::model::{DirtyKey, MailboxRef, UserPart, UserRef};
use spooltap::replay::{Player, Recording, Speed};
use spooltap::spool::{Layout, open_store};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// Everything of a store that is replicated, by path; the value changes with the content.
fn contents(root: &Path) -> BTreeMap<PathBuf, blake3::Hash> {
    let files = walkdir::WalkDir::new(root).into_iter().flatten().filter(|entry| !entry.file_type().is_dir());
    let wanted = files.filter(|entry| {
        let name = entry.file_name().to_string_lossy();
        let path = entry.path().strip_prefix(root).expect("below").to_string_lossy();
        let user = path.starts_with("conf/user/") || path.starts_with("conf/domain/");
        let suffix = [".seen", ".sub", "seen.db", "sub.db"].iter().any(|suffix| name.ends_with(suffix));
        let quota = path.starts_with("conf/") && path.contains("quota/");
        let mailbox = ["cyrus.index", "cyrus.header", "cyrus.annotations", "cyrus.expunge"].contains(&&*name)
            || (path.starts_with("spool/") && !path.contains("stage.") && name.ends_with('.'));
        let global = ["conf/mailboxes.db", "conf/annotations.db"].contains(&&*path);
        let kept = mailbox || global || quota || (user && suffix) || path.starts_with("sieve/");
        kept && !name.ends_with(".NEW")
    });
    let hash = |path: &Path| match path.is_symlink() {
        true => blake3::hash(std::fs::read_link(path).expect("a link").as_os_str().as_encoded_bytes()),
        false => blake3::hash(&std::fs::read(path).expect("readable")),
    };
    wanted.map(|entry| (entry.path().to_owned(), hash(entry.path()))).collect()
}

/// Files, or directories of files, that a key stands for.
fn stands_for(key: &DirtyKey, layout: &Layout, roots: &Roots) -> Vec<PathBuf> {
    let hashing: Hashing = layout.hashing;
    let conf = &layout.configdirectory;
    match key {
        DirtyKey::MailboxList => vec![layout.mailboxes_db.clone()],
        DirtyKey::Annotations => vec![layout.annotations_db.clone()],
        DirtyKey::Mailbox(mailbox) | DirtyKey::Accessed(mailbox) => {
            let dirs = roots.spool.iter().chain(&roots.meta).flat_map(|root| match mailbox {
                MailboxRef::Name(name) => {
                    [Era::Two, Era::Three].map(|era| names::mailbox_dir(root, name, hashing, era)).to_vec()
                }
                MailboxRef::Id(id) => vec![names::uuid_dir(root, id)],
            });
            dirs.collect()
        }
        DirtyKey::User(user, part) => match (user, part) {
            (UserRef::Name(user), UserPart::Seen) => names::user_files(conf, user, "seen", hashing),
            (UserRef::Name(user), UserPart::Subs) => names::user_files(conf, user, "sub", hashing),
            (UserRef::Name(user), UserPart::Sieve) => names::sieve_dirs(&layout.sievedir, user, hashing),
            (UserRef::Inbox(id), UserPart::Seen) => vec![names::uuid_dir(&conf.join("user"), id).join("seen.db")],
            (UserRef::Inbox(id), UserPart::Subs) => vec![names::uuid_dir(&conf.join("user"), id).join("sub.db")],
            (UserRef::Inbox(id), UserPart::Sieve) => vec![names::uuid_dir(&layout.sievedir, id)],
        },
        DirtyKey::Quota(root) => vec![names::quota_file(conf, root, hashing)],
        DirtyKey::AllQuotas | DirtyKey::Rescan(_) => Vec::new(),
    }
}

fn check(recording: &Path, source: &str) -> Vec<String> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recording = Recording::open(recording).expect("a recording");
    let conf = recording.unpack(dir.path()).expect("unpacks");
    let store = open_store(&conf).expect("opens");
    let layout = store.layout();
    let roots = Roots::from(layout);
    let locks = store.is_modern().then(|| layout.lock_root.clone()).ok_or_else(|| "too old".to_owned());
    let settings = Settings { source: source.to_owned(), locks, ..Settings::default() };
    let (given, handle) = start(roots.clone(), settings);
    handle.wait_armed();
    let mut player = Player::new(&recording, dir.path());
    let mut before = contents(dir.path());
    let (mut faults, mut marks, mut changes) = (Vec::new(), 0, 0);
    while let Some(mark) = player.next_mark(Speed::Asap).expect("plays") {
        marks += 1;
        assert!(handle.drain(Instant::now() + Duration::from_secs(30)), "drained in time");
        let given = std::mem::take(&mut *given.lock().unwrap_or_else(PoisonError::into_inner));
        let keys: BTreeSet<DirtyKey> = given.into_iter().map(|notice| notice.key).collect();
        let covered: BTreeSet<PathBuf> = keys.iter().flat_map(|key| stands_for(key, layout, &roots)).collect();
        let after = contents(dir.path());
        let changed = before.keys().chain(after.keys()).filter(|path| before.get(*path) != after.get(*path));
        for path in changed {
            changes += 1;
            let is_covered = covered.contains(path) || path.parent().is_some_and(|dir| covered.contains(dir));
            if !is_covered {
                let path = path.strip_prefix(dir.path()).expect("below");
                faults.push(format!("step {} ({}): {} is not covered", mark.step, mark.what, path.display()));
            }
        }
        if let Some(key) = keys.iter().find(|key| matches!(key, DirtyKey::Rescan(_))) {
            faults.push(format!("step {} ({}): {key}", mark.step, mark.what));
        }
        before = after;
    }
    println!("{} by {source}: {marks} marks, {changes} changed files, {:?}", recording.version(), handle.stats());
    assert!(marks > 10 && changes > marks, "the recording holds something");
    faults
}

#[test]
fn every_change_of_a_real_server_is_covered_by_a_key() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = std::env::var_os("SPOOLTAP_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
    let dirs = [root.join("fixtures/replays"), shared.join("replays")];
    let found: BTreeMap<_, _> = dirs
        .iter()
        .filter_map(|dir| std::fs::read_dir(dir).ok())
        .flat_map(|dir| dir.flatten().map(|entry| (entry.file_name(), entry.path())))
        .filter(|(_, path)| path.is_dir())
        .collect();
    if found.is_empty() {
        println!("skipped: no recordings in fixtures/replays or ../shared/replays");
    }
    let mut faults = Vec::new();
    for (name, path) in found {
        let name = name.to_string_lossy();
        for source in ["auto", "locks"] {
            // Before 3.6 a session keeps its lock from one command to the next.
            if source == "auto" || name.starts_with("3.6") {
                faults.extend(check(&path, source).into_iter().map(|fault| format!("{name} {source} {fault}")));
            }
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

/// Uniqueids of mailboxes in the recording of 3.6.1.
const IDS_OF_3_6: &[(&str, &str)] = &[
    ("user.u1", "cyep0qmotfa5j0f7pundy3wj"),
    ("user.u1.Foo", "dm2m0696mt0a03lplrkujbhx"),
    ("user.u1.#sieve", "tucooit2tah3ql4a387jhc0s"),
    ("user.u2", "fvqulwulrhrl54z8hj9eo7qg"),
];

/// The keys of which one is enough to cover a sync_log record; none for records that say nothing here.
fn enough_for(record: &str) -> Vec<String> {
    let words: Vec<&str> = record.split_whitespace().collect();
    let id = |name: &str| IDS_OF_3_6.iter().find(|(known, _)| *known == name).map(|(_, id)| *id);
    let user = |part: &str, user: &str| {
        let inbox = format!("user.{user}");
        [Some(format!("{part} {user}")), id(&inbox).map(|id| format!("{part}-id {id}"))].into_iter().flatten()
    };
    match words.as_slice() {
        ["MAILBOX" | "APPEND" | "ACL", name] => {
            let named = [Some(format!("mailbox {name}")), id(name).map(|id| format!("mailbox-id {id}"))];
            // What was created, renamed or deleted is found by comparing the list.
            named.into_iter().flatten().chain(["mailbox-list".to_owned()]).collect()
        }
        ["SEEN", name, _] => user("seen", name).collect(),
        ["SUB", name, _] => user("subs", name).collect(),
        ["SIEVE", name] => user("sieve", name).chain(["mailbox-list".to_owned()]).collect(),
        ["META" | "USER", name] => ["seen", "subs", "sieve"]
            .into_iter()
            .flat_map(|part| user(part, name).collect::<Vec<_>>())
            .chain(["mailbox-list".to_owned()])
            .collect(),
        ["QUOTA", root] => vec![format!("quota {root}")],
        ["ANNOTATION", _] => vec!["annotations".to_owned()],
        _ => Vec::new(),
    }
}

#[test]
fn the_paths_alone_say_what_the_servers_own_log_says() {
    let roots =
        Roots { spool: vec!["spool".into()], conf: "conf".into(), sieve: Some("sieve".into()), ..Roots::default() };
    for release in ["2.3.19", "2.4.22", "2.5.11", "3.6.1"] {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/derive").join(format!("{release}.txt"));
        let text = std::fs::read_to_string(file).expect("readable");
        let mut records_checked = 0;
        for line in text.lines() {
            let fields: Vec<&str> = line.split(" | ").collect();
            let [operation, events, log] = fields.as_slice() else { continue };
            let keys: BTreeSet<String> = events
                .split("; ")
                .filter_map(|event| event.split_once('='))
                // Closing a file changes nothing; we do not listen to it.
                .filter(|(_, kinds)| kinds.split('+').any(|kind| !kind.starts_with("CLOSE") && kind != "ATTRIB"))
                .filter_map(|(path, kinds)| {
                    roots.derive(Path::new(path.trim_end_matches('/')), kinds.contains("ISDIR"))
                })
                .map(|key| key.to_string())
                .collect();
            let is_new_place = events.contains("CREATE,ISDIR");
            for record in log.trim_start_matches("log:").split(" / ").map(str::trim) {
                let enough = enough_for(record);
                if enough.is_empty() {
                    continue;
                }
                records_checked += 1;
                // The source of a COPY is named in the log, and nothing of it changes.
                let is_copied_from = *operation == "copy" && record == "MAILBOX user.u1";
                let covered = is_copied_from || is_new_place || enough.iter().any(|key| keys.contains(key));
                assert!(covered, "{release} {operation}: {record} is not in {keys:?}");
            }
        }
        println!("{release}: {records_checked} records of the server's log covered");
        assert!(records_checked > 40);
    }
}
