//! What the real `sync_client`s of 2.4.22, 2.5.11 and 3.6.1 sent in recorded talks, step by step, sent to an archive. What
//! their own servers took is taken, and what an archive then shows has the checksums that the clients promised.

use super::super::util::cyrus::{PASSWORD, REPLICATOR};
use super::super::util::store::fixtures;
use super::Served;
use super::talk::Talk;
use spooltap::csync::codec::Splitter;
use spooltap::csync::command::{Untagged, untagged};
use spooltap::csync::intake::{Files, Intake};
use spooltap::model::{MailboxView, MboxName, MessageGuid};
use std::collections::BTreeMap;
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
fn play(folder: &Path, apart: bool) -> Vec<String> {
    let dir = tempfile::tempdir().expect("directory");
    let served = Served::start(dir.path(), &[]);
    let mut talks: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("talks").flatten().map(|entry| entry.path()).collect();
    talks.retain(|path| {
        let name = name_of(path);
        let compressed = name.ends_with(".c2s") && path.with_file_name(format!("{name}.plain")).exists();
        (name.ends_with(".c2s") || name.ends_with(".c2s.plain")) && !compressed && name.contains(".roll.") == apart
    });
    talks.sort();
    assert!(talks.len() > 20, "{}", folder.display());
    let (mut faults, mut promised) = (Vec::new(), 0);
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
            match shown(&mut talk, &view.head.name) {
                Some(shown) if same(&shown) => promised += 1,
                shown => faults.push(format!("{}: {start:?}: shown {shown:?}", name_of(&path))),
            }
        }
    }
    if promised < 15 {
        faults.push(format!("only {promised} mailboxes were compared"));
    }
    faults
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
        faults.insert(release, play(dir.path(), false));
        let shared = std::env::var_os("SPOOLTAP_SHARED").map(PathBuf::from);
        let shared = shared.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared")).join("traces");
        if shared.join(release).is_dir() {
            faults.entry(release).or_default().extend(play(&shared.join(release), true));
        }
    }
    let faults: Vec<String> = faults
        .into_iter()
        .flat_map(|(release, faults)| faults.into_iter().map(move |fault| format!("{release} {fault}")))
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
