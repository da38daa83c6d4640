//! The writer dies at every single change it makes to a file, before it, in the middle of it and after it; or the disk
//! refuses that one change and goes on.

use super::*;
use crate::archive::crash::life;
use sha1::{Digest, Sha1};
use spooltap::replica::{Hook, Verdict};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

/// What happens to the change that is hit.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Hit {
    /// It is not done, nor anything after it.
    Dead,
    /// It is done (written by half), and nothing after it.
    DeadAfter,
    /// It is refused, and all others are done.
    Refused,
    /// It is done, or written by half, and said to have failed; all others are done.
    Doubted,
}

fn failing(left: Arc<AtomicI64>, hit: Hit) -> Hook {
    let error = move || match hit {
        Hit::Doubted => std::io::Error::from_raw_os_error(nix::libc::EIO),
        _ => std::io::Error::from(std::io::ErrorKind::StorageFull),
    };
    Arc::new(move |_, _| match left.fetch_sub(1, Ordering::SeqCst) {
        1 if matches!(hit, Hit::DeadAfter | Hit::Doubted) => Verdict::FailAfter(error()),
        1 => Verdict::Fail(error()),
        left if left < 1 && matches!(hit, Hit::Dead | Hit::DeadAfter) => Verdict::Fail(error()),
        _ => Verdict::Go,
    })
}

/// Every kind of step; the accounts are there at the end.
fn steps() -> (Vec<Step>, Bodies) {
    let (mut steps, mut bodies) = life();
    let mut other = Source::new("id-3", "user.u2");
    let mut first = vec![other.step(None)];
    // The everyday case: mail comes, and the index grows by some records.
    for text in ["From: c\r\n\r\nfour", "From: c\r\n\r\nfive"] {
        let since = other.since();
        other.append(text);
        other.append(&format!("{text} and more"));
        first.push(other.step(Some(since)));
    }
    bodies.0.extend(other.bodies.0);
    steps.splice(0..0, first);
    steps.pop();
    (steps, bodies)
}

/// In memory where that is possible: hundreds of lives with all their syncs.
pub(super) fn place() -> tempfile::TempDir {
    let mut builder = tempfile::Builder::new();
    builder.prefix("spooltap-crash-");
    builder.tempdir_in("/dev/shm").or_else(|_| builder.tempdir()).expect("directory")
}

pub(super) fn target(dir: &Path, hook: Option<Hook>) -> CyrusDirTarget {
    CyrusDirTarget::with_hook(&format!("cyrus://{}/store", dir.display()), hook).expect("a URL")
}

/// Everything a fresh session sees, quota usage too. All messages are read and hashed.
pub(super) fn dump(dir: &Path) -> BTreeMap<String, String> {
    let target = target(dir, None);
    let mut session = target.open().expect("opens");
    let mut out = BTreeMap::new();
    let mut last_uids: BTreeMap<String, u32> = BTreeMap::new();
    for user in ["u1", "u2"].map(UserId::from) {
        let account = session.view_user(&user).expect("views");
        out.insert(format!("{user}"), format!("{:?} {:?}", account.meta, account.quotas));
        for head in account.mailboxes.iter().map(|view| &view.head) {
            last_uids.insert(head.uniqueid.to_string(), head.last_uid.0);
            let view = session.view_full(&head.name).expect("views").expect("is there");
            for record in view.records.iter().flatten().filter(|record| !record.is_expunged()) {
                let body = session.body(&head.name, &record.guid).expect("reads").expect("has its body");
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut { body.reader }, &mut bytes).expect("reads");
                assert_eq!(MessageGuid(Sha1::digest(&bytes).into()), record.guid, "{} {}", head.name, record.uid.0);
            }
            out.insert(format!("{}", head.name), format!("{view:?}"));
        }
    }
    // Nothing lies there that was not acknowledged, for somebody's `reconstruct` to find.
    for file in walkdir::WalkDir::new(dir.join("store/spool")).into_iter().flatten() {
        let name = file.file_name().to_string_lossy();
        let Some(uid) = name.strip_suffix('.').and_then(|uid| uid.parse::<u32>().ok()) else { continue };
        let id = file.path().parent().and_then(Path::file_name).expect("a mailbox").to_string_lossy();
        assert!(last_uids.get(&*id).is_none_or(|last| uid <= *last), "{}", file.path().display());
    }
    out.insert("annotations".into(), format!("{:?}", session.view_server_annotations().expect("views")));
    for file in walkdir::WalkDir::new(dir.join("store/conf/quota")).into_iter().flatten() {
        if file.file_type().is_file() {
            out.insert(
                file.path().strip_prefix(dir).expect("below").display().to_string(),
                text(&fs::read(file.path()).expect("reads")),
            );
        }
    }
    out
}

/// The number of the step that fails, and why.
fn apply(session: &mut dyn Replica, steps: &[Step], bodies: &Bodies) -> Option<(usize, String)> {
    for (number, step) in steps.iter().enumerate() {
        match session.apply(step, bodies) {
            Ok(()) => {}
            // Said again after it was done.
            Err(ReplicaError::NoSuchMailbox(_)) if matches!(step, Step::Remove { .. }) => {}
            Err(error) => return Some((number, format!("{error}: {step:?}"))),
        }
    }
    None
}

/// Lets every so-manieth change fail in this way, each in a life of its own.
fn fails(hit: Hit, every: usize) {
    let (steps, bodies) = steps();
    let whole = place();
    let seen: Arc<Mutex<Vec<&'static str>>> = Arc::default();
    let sink = seen.clone();
    let hook: Hook = Arc::new(move |name, _| {
        sink.lock().expect("lock").push(name);
        Verdict::Go
    });
    let all = target(whole.path(), Some(hook));
    assert_eq!(apply(&mut *all.open().expect("opens"), &steps, &bodies), None);
    drop(all);
    let seen = seen.lock().expect("lock");
    let changes = seen.len() as i64;
    let kinds: BTreeSet<&str> = seen.iter().copied().collect();
    // `syncfs` and `link` need many messages, and copies.
    let known =
        ["create", "mkdir", "remove", "remove_tree", "rename", "symlink", "sync", "sync_dir", "write", "write_at"];
    assert!(known.iter().all(|name| kinds.contains(name)) && kinds.contains("write_at 0"), "{kinds:?}");
    let expected = dump(whole.path());
    assert!(changes > 200, "{changes} changes");
    for at in (1..=changes).step_by(every) {
        let dir = place();
        let dying = target(dir.path(), Some(failing(Arc::new(AtomicI64::new(at)), hit)));
        let mut from = 0;
        if let Ok(mut session) = dying.open() {
            from = apply(&mut *session, &steps, &bodies).map_or(steps.len(), |(at, _)| at);
            if matches!(hit, Hit::Refused | Hit::Doubted) {
                // The same session says it again, and goes on.
                let rest = steps.get(from..).unwrap_or_default();
                assert_eq!(apply(&mut *session, rest, &bodies), None, "{hit:?} at {at}");
                from = steps.len();
            }
        }
        drop(dying);
        // It can be read as it is, and every message that is named is there.
        dump(dir.path());
        let again = target(dir.path(), None);
        let rest = steps.get(from..).unwrap_or_default();
        let failed = apply(&mut *again.open().expect("opens"), rest, &bodies);
        assert_eq!(failed, None, "{hit:?} at {at}");
        drop(again);
        assert_eq!(dump(dir.path()), expected, "{hit:?} at {at}, step {from}");
    }
}

#[test]
fn wherever_it_is_cut_the_store_is_whole_and_can_be_gone_on_with() {
    fails(Hit::Dead, 1);
}

#[test]
fn wherever_it_is_cut_in_the_middle_the_store_is_whole() {
    fails(Hit::DeadAfter, 2);
}

#[test]
fn whatever_the_disk_refuses_it_goes_on() {
    fails(Hit::Refused, 3);
}

#[test]
fn whatever_the_disk_does_and_denies_it_goes_on() {
    fails(Hit::Doubted, 4);
}

/// A real server on some of them, as they were left.
#[test]
fn a_real_cyrus_starts_on_what_a_death_has_left() {
    if !cyrus::installed() {
        return;
    }
    let (steps, bodies) = steps();
    let mut shown = 0;
    for at in [40, 75, 110, 150, 190, 230] {
        let mut place = Place::new(Options::new().set("unixhierarchysep", "yes")).expect("is set up");
        let hook = failing(Arc::new(AtomicI64::new(at)), Hit::DeadAfter);
        let dying = CyrusDirTarget::with_hook(&place.url(), Some(hook)).expect("a URL");
        let _ = apply(&mut *dying.open().expect("opens"), &steps, &bodies);
        drop(dying);
        place.boot().expect("starts");
        let mut imap = place.server.imap("u1").expect("logs in");
        let listed = imap.ok("LIST \"\" *").expect("lists").all("LIST");
        shown += listed.len();
        for row in listed {
            let name = crate::util::imap::quote(&row.last().expect("a name").text());
            let looks = |imap: &mut Imap| -> anyhow::Result<()> {
                if imap.ok(format!("SELECT {name}"))?.exists() > 0 {
                    imap.ok("FETCH 1:* (UID FLAGS ENVELOPE RFC822.SIZE)")?;
                }
                Ok(())
            };
            looks(&mut imap).unwrap_or_else(|error| panic!("at {at}: {error}"));
        }
    }
    assert!(shown > 4, "{shown} mailboxes");
}
