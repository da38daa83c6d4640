//! What the real `sync_client`s of 2.4.22, 2.5.11 and 3.6.1 sent in recorded talks, step by step, sent to both kinds of store. What
//! their own servers took is taken, and what the store then shows has the checksums that the clients promised.

use super::super::cyrus_dir::Place;
use super::super::util::cyrus::{PASSWORD, REPLICATOR};
use super::super::util::store::fixtures;
use super::super::util::{Options, cyrus as real};
use super::talk::Talk;
use super::{KINDS, Kind, Served};
use spooltap::csync::codec::Splitter;
use spooltap::csync::command::{Untagged, untagged};
use spooltap::csync::intake::{Files, Intake};
use spooltap::model::{MailboxView, MboxName, MessageGuid};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Steps before which the recorded replica was changed behind its client's back.
const BY_HAND: [&str; 2] = ["splitbrain", "replica-lost-folder"];

struct Nowhere;

impl Files for Nowhere {
    fn begin(&mut self, _guid: MessageGuid, _size: u64) {}
    fn data(&mut self, _bytes: &[u8]) {}
    fn end(&mut self) {}
}

/// Requests as they were sent.
fn requests(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let (mut intake, mut out) = (Intake::new(1 << 30), Vec::new());
    while !bytes.is_empty() {
        let (used, line) = intake.take(bytes, &mut Nowhere).expect("a request");
        if line.is_some() {
            out.push(bytes[..used].to_vec());
        }
        bytes = &bytes[used..];
    }
    out
}

/// The last line of each answer, the greeting left out.
fn verdicts(bytes: &[u8]) -> Vec<String> {
    let mut splitter = Splitter::default();
    splitter.push(bytes);
    let answers = std::iter::from_fn(|| splitter.next_answer().expect("an answer"));
    let last = answers.filter(|line| !line.starts_with(b"* "));
    last.map(|line| String::from_utf8_lossy(&line).into_owned()).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Plays the talks of a folder in order against one server; what was not as it should be.
fn play(kind: Kind, folder: &Path, apart: bool) -> Vec<String> {
    let dir = tempfile::tempdir().expect("directory");
    let served = Served::of(kind, dir.path(), &[]);
    let mut talks: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("talks").flatten().map(|entry| entry.path()).collect();
    talks.retain(|path| {
        let name = name_of(path);
        let compressed = name.ends_with(".c2s") && path.with_file_name(format!("{name}.plain")).exists();
        (name.ends_with(".c2s") || name.ends_with(".c2s.plain")) && !compressed && name.contains(".roll.") == apart
    });
    talks.sort();
    assert!(talks.len() > 20, "{}", folder.display());
    let (mut faults, mut promised, mut inboxes) = (Vec::new(), 0, BTreeSet::new());
    for path in talks {
        let theirs = path.with_file_name(name_of(&path).replace(".c2s", ".s2c"));
        let theirs = verdicts(&std::fs::read(theirs).expect("answers"));
        let mut talk = Talk::login(served.address, REPLICATOR, PASSWORD).expect("logs in");
        for (number, request) in requests(&std::fs::read(&path).expect("requests")).into_iter().enumerate() {
            if request.starts_with(b"AUTHENTICATE") || request.starts_with(b"COMPRESS") {
                continue;
            }
            let start = String::from_utf8_lossy(&request[..request.len().min(100)]).into_owned();
            let answer = talk.said(&request);
            let theirs = theirs.get(number).map(String::as_str).unwrap_or_default();
            // What a store in Cyrus's own format has no place for, each with what a real client then does about it.
            let reason = match () {
                _ if kind == Kind::Archive => None,
                // It is not told that mailboxes of scripts are taken, and sends the scripts as such.
                _ if start.contains("MBOXTYPE f ") => Some("NO IMAP_MAILBOX_NOTSUPPORTED "),
                // It lies under the INBOX's uniqueid: the client comes back with it when the INBOX is there.
                _ if start.starts_with("APPLY SUB ") && !inboxes.contains(&user_of(&start)) => {
                    Some("NO IMAP_MAILBOX_NONEXISTENT ")
                }
                _ => None,
            };
            if let Some(reason) = reason {
                if !answer.starts_with(reason) {
                    faults.push(format!("{kind:?} {}: {start:?}: {answer}", name_of(&path)));
                }
                continue;
            }
            // There somebody changed the replica by hand before, or the server had died (2.4.22, of UNANNOTATION).
            let apart = BY_HAND.iter().any(|step| name_of(&path).contains(step)) || theirs.is_empty();
            let same = answer.split(' ').next() == theirs.split(' ').next();
            if answer.starts_with("BAD") || !same && !apart {
                faults.push(format!("{}: {start:?}: {answer}, there {theirs}", name_of(&path)));
            }
            let line = request.strip_prefix(b"APPLY ").filter(|_| answer.starts_with("OK"));
            let Some(Ok(Untagged::Mailbox(view))) = line.map(|line| untagged(line.trim_ascii_end())) else { continue };
            let same = |shown: &MailboxView| {
                shown.head.highestmodseq == view.head.highestmodseq
                    && shown.head.last_uid == view.head.last_uid
                    && (view.crc_basic.is_none_or(|crc| crc == 0) || shown.crc_basic == view.crc_basic)
            };
            inboxes.extend(view.head.name.owner().filter(|_| view.head.name.is_inbox()).map(|user| user.to_string()));
            match shown(&mut talk, &view.head.name) {
                Some(shown) if same(&shown) => promised += 1,
                shown => faults.push(format!("{}: {start:?}: shown {shown:?}", name_of(&path))),
            }
        }
    }
    if kind == Kind::Cyrus && real::installed() {
        assert!(served.terminate().success());
        faults.extend(a_real_server_on(&kind.place(dir.path())));
    }
    if promised < 15 {
        faults.push(format!("only {promised} mailboxes were compared"));
    }
    faults
}

/// `%(USERID u1 …` → `u1`.
fn user_of(request: &str) -> String {
    request.split_whitespace().skip_while(|word| !word.ends_with("USERID")).nth(1).unwrap_or_default().to_owned()
}

/// What a real server that is started on a store finds to mend in it.
fn a_real_server_on(store: &Path) -> Vec<String> {
    let mut place = Place::with_copy(Options::new(), store).expect("is copied");
    place.boot().expect("starts");
    place.mendable().expect("runs")
}

fn shown(talk: &mut Talk, name: &MboxName) -> Option<MailboxView> {
    let request = spooltap::csync::command::get_mailboxes(std::slice::from_ref(name));
    let lines = talk.ask(&request).expect("answers");
    lines.iter().find_map(|line| match untagged(line.strip_prefix(b"* ")?) {
        Ok(Untagged::Mailbox(view)) => Some(*view),
        _ => None,
    })
}

#[test]
fn what_real_clients_sent_is_taken() {
    let mut faults = BTreeMap::new();
    for release in ["2.4.22", "2.5.11", "3.6.1"] {
        let packed = fixtures().join(format!("csync/clients/{release}.tar.xz"));
        let dir = tempfile::tempdir().expect("directory");
        let file = std::fs::File::open(packed).expect("talks");
        tar::Archive::new(xz2::read::XzDecoder::new(file)).unpack(dir.path()).expect("unpacks");
        let both = |folder: &Path, apart| KINDS.into_iter().flat_map(move |kind| play(kind, folder, apart)).collect();
        let found: Vec<String> = both(dir.path(), false);
        faults.insert(release, found);
        let shared = std::env::var_os("SPOOLTAP_SHARED").map(PathBuf::from);
        let shared = shared.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared")).join("traces");
        if shared.join(release).is_dir() {
            faults.entry(release).or_default().extend(both(&shared.join(release), true));
        }
    }
    let faults: Vec<String> = faults
        .into_iter()
        .flat_map(|(release, faults)| faults.into_iter().map(move |fault| format!("{release} {fault}")))
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
