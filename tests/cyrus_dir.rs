//! A directory in Cyrus's own format: what a real 3.6.1 that is started on it shows, what its own checks say of it, and
//! that it goes on from there.

#[path = "cyrus_dir/crash.rs"]
mod crash;
#[path = "cyrus_dir/edges.rs"]
mod edges;
#[path = "cyrus_dir/promises.rs"]
mod promises;

use super::archive::{Bodies, Source};
use super::push::{QUOTA_MESSAGES, QUOTA_STORAGE, grown, rules};
use super::util::cyrus::Options;
use super::util::diff::Exception;
use super::util::imap::{Imap, text};
use super::util::{CyrusServer, Spooltap, Store, cyrus, diff, snapshot, store};
use anyhow::Context;
use spooltap::model::*;
use spooltap::replica::CyrusDirTarget;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

/// A server that is not started, and a directory below its own for the store it will be started on.
pub struct Place {
    pub server: CyrusServer,
    pub state: tempfile::TempDir,
}

impl Place {
    pub fn new(options: Options) -> anyhow::Result<Self> {
        let server = CyrusServer::prepare(options)?;
        Ok(Self { server, state: tempfile::Builder::new().prefix("spooltap-dir-").tempdir()? })
    }

    /// With a copy of a store that lies elsewhere.
    pub fn with_copy(options: Options, store: &Path) -> anyhow::Result<Self> {
        let place = Self::new(options)?;
        copy_store(store, &place.dir())?;
        Ok(place)
    }

    pub fn dir(&self) -> PathBuf {
        self.server.base().join("store")
    }

    pub fn url(&self) -> String {
        format!("cyrus://{}", self.dir().display())
    }

    /// Starts the server with the options that stand in the directory.
    pub fn boot(&mut self) -> anyhow::Result<()> {
        for line in fs::read_to_string(self.dir().join("imapd.conf"))?.lines().filter(|line| !line.starts_with('#')) {
            let (key, value) = line.split_once(": ").expect("an option");
            self.server.set(key, value)?;
        }
        self.server.boot()
    }

    fn tool(&self, name: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let Output { status, stdout, stderr } = self.server.tool(name, arguments)?;
        let said = format!("{}{}", text(&stdout), text(&stderr));
        anyhow::ensure!(status.success(), "{name} {arguments:?} ended with {status}: {said}");
        Ok(said)
    }

    /// What the checks that come with the server find to mend; nothing, hopefully.
    pub fn mendable(&self) -> anyhow::Result<Vec<String>> {
        let mut found = Vec::new();
        let dir = self.dir();
        for name in ["mailboxes.db", "annotations.db"] {
            let path = dir.join("conf").join(name);
            if path.exists() {
                let said = self.tool("cyr_dbtool", &[path.to_str().expect("text"), "twoskip", "consistent"])?;
                found.extend(said.lines().filter(|line| !line.contains("Yes, consistent")).map(str::to_owned));
                self.tool("cyr_dbtool", &[path.to_str().expect("text"), "twoskip", "show"])?;
            }
        }
        // The names of mailboxes, one in a line, and nothing else.
        let said = self.tool("reconstruct", &["-n", "-r", "*"])?;
        found.extend(said.lines().filter(|line| is_fault(line)).map(|line| format!("reconstruct: {line}")));
        let said = self.tool("mbexamine", &["*"])?;
        let odd = |line: &&str| line.contains("rong") || line.contains("CRC Error") || line.contains("mismatch");
        found.extend(said.lines().filter(odd).map(|line| format!("mbexamine: {line}")));
        let said = self.tool("quota", &["-n", "-f"])?;
        let said = said.lines().filter(|line| line.contains(": ") && (line.contains("was") || line.contains("now")));
        found.extend(said.map(|line| format!("quota: {line}")));
        Ok(found)
    }
}

/// Copies a store as it is at this moment; its imapd.conf then says where the copy is.
pub fn copy_store(from: &Path, to: &Path) -> anyhow::Result<()> {
    // Files may come and go under our hands.
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).output()?;
    let conf = to.join("imapd.conf");
    let text = fs::read_to_string(&conf).with_context(|| text(&copied.stderr))?;
    fs::write(conf, text.replace(&from.display().to_string(), &to.display().to_string()))?;
    Ok(())
}

/// A line of `reconstruct -n` that is more than a mailbox's name.
fn is_fault(line: &str) -> bool {
    let words =
        [" uid ", "mismatch", "updating", "removing", "not found", "future", "bogus", "failed", "Failed", "wrong"];
    words.iter().any(|word| line.contains(word))
}

fn succeeds(output: &Output, what: &str) -> anyhow::Result<()> {
    let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
    anyhow::ensure!(output.status.success(), "{what} ended with {}:\n{said}", output.status);
    Ok(())
}

#[test]
fn a_real_cyrus_starts_on_every_store_and_finds_nothing_to_mend() {
    if !cyrus::installed() {
        return;
    }
    let named = std::env::var("SPOOLTAP_STORES").ok();
    let stores = match named {
        Some(named) => named.lines().flat_map(|dir| store::stores_in(Path::new(dir))).collect(),
        None => store::stores_in(&store::fixtures().join("spools")),
    };
    let only = std::env::var("SPOOLTAP_STORE").unwrap_or_default();
    let stores: Vec<_> = stores.into_iter().filter(|(_, name): &(_, String)| name.starts_with(&only)).collect();
    let (left, faults) = (Mutex::new(stores), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((folder, name)) = left.lock().expect("lock").pop() else { return };
                    if let Err(error) = starts_on(store::store_in(&folder, &name)) {
                        faults.lock().expect("lock").push(format!("{name}: {error:#}"));
                    }
                }
            });
        }
    });
    let faults = faults.into_inner().expect("lock");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn starts_on(source: Store) -> anyhow::Result<()> {
    let mut place = Place::new(Options::new().names_of(&source.conf, &source.release))?;
    let push = |what: &str| {
        let output = Spooltap::once(&source.conf, &place.url(), place.state.path(), &["push", "-A"])?;
        succeeds(&output, what)
    };
    push("the first push")?;
    push("the second push")?;
    let verified = Spooltap::once(&source.conf, &place.url(), place.state.path(), &["verify"])?;
    succeeds(&verified, "verify")?;
    place.boot()?;
    let found = place.mendable()?;
    anyhow::ensure!(found.is_empty(), "to mend before anybody looked: {}", shown(&found));
    let seen = snapshot(&place.server, &source.users())?;
    let differences = diff(&source.truth, &seen, &rules(&source.release).and(SCRIPTS));
    anyhow::ensure!(differences.is_empty(), "{}", shown(&differences));
    goes_on(&place, &source.users())?;
    let found = place.mendable()?;
    anyhow::ensure!(found.is_empty(), "to mend afterwards: {}", shown(&found));
    Ok(())
}

/// New mail arrives in every INBOX, under a new UID.
pub fn goes_on(place: &Place, users: &[String]) -> anyhow::Result<()> {
    let mut went_on = 0;
    for user in users {
        let mut imap = place.server.imap(user)?;
        let uidnext = |imap: &mut Imap| -> anyhow::Result<u64> {
            let found = imap.ok("SELECT INBOX")?.code("UIDNEXT");
            found.ok_or_else(|| anyhow::anyhow!("{user} has no UIDNEXT"))
        };
        let before = uidnext(&mut imap)?;
        // Not by LMTP: a script would say where it goes.
        match imap.ok("APPEND INBOX {26+}\r\nFrom: a@b\r\n\r\nnew mail\r\n\r\n\r\n") {
            // Some had no right to it before either.
            Err(error) if error.to_string().contains("Permission denied") => continue,
            said => said?,
        };
        anyhow::ensure!(uidnext(&mut imap)? == before + 1, "{user}: the new message has not UID {before}");
        went_on += 1;
    }
    anyhow::ensure!(went_on > 0, "nobody may append");
    Ok(())
}

/// Scripts are compiled by the server when mail comes for the first time.
#[test]
fn scripts_work_on_the_first_delivery() {
    if !cyrus::installed() {
        return;
    }
    let mut place = Place::new(Options::new().set("unixhierarchysep", "yes")).expect("is set up");
    let target = CyrusDirTarget::new(&place.url()).expect("a URL");
    let mut session = target.open().expect("opens");
    let none = Bodies::default();
    let script = b"require [\"fileinto\"];\r\nfileinto \"INBOX/Sorted\";\r\n".to_vec();
    let (inbox, sorted) = (Source::new("inboxofu1", "user.u1"), Source::new("sortedofu1", "user.u1.Sorted"));
    let (user, name): (UserId, SieveName) = ("u1".into(), "sort it".into());
    for step in [
        inbox.step(None),
        sorted.step(None),
        Step::SievePut {
            user: user.clone(),
            name: name.clone(),
            last_update: 1_700_000_000,
            content: script,
            compiled: Vec::new(),
        },
        Step::SieveActivate { user, name },
    ] {
        session.apply(&step, &none).expect("applies");
    }
    drop((session, target));
    place.boot().expect("starts");
    let said = place.server.lmtp().expect("connects").deliver(&["u1"], b"From: a@b\r\n\r\nhello\r\n").expect("answers");
    assert!(said.iter().all(|line| line.starts_with('2')), "{said:?}");
    let mut imap = place.server.imap("u1").expect("logs in");
    assert_eq!(imap.ok("SELECT INBOX").expect("selects").exists(), 0);
    assert_eq!(imap.ok("SELECT INBOX/Sorted").expect("selects").exists(), 1);
    let found = place.mendable().expect("runs");
    assert!(found.is_empty(), "{}", shown(&found));
}

/// Two writers would destroy the store.
#[test]
fn nobody_writes_beside_a_running_cyrus_or_another_spooltap() {
    if !cyrus::installed() {
        return;
    }
    let mut place = Place::new(Options::new()).expect("is set up");
    let target = CyrusDirTarget::new(&place.url()).expect("a URL");
    let inbox = Source::new("inboxofu1", "user.u1");
    target.open().expect("opens").apply(&inbox.step(None), &inbox.bodies).expect("applies");
    let refused = |says: &str| {
        let other = CyrusDirTarget::new(&place.url()).expect("a URL");
        let error = other.open().map(drop).expect_err("refused").to_string();
        assert!(error.contains(says), "{error}");
    };
    refused("another spooltap");
    drop(target);
    place.boot().expect("starts");
    let url = place.url();
    let mut imap = place.server.imap("u1").expect("logs in");
    imap.ok("SELECT INBOX").expect("selects");
    let other = CyrusDirTarget::new(&url).expect("a URL");
    let error = other.open().map(drop).expect_err("refused").to_string();
    assert!(error.contains("configdirectory open") || error.contains("imapd.conf"), "{error}");
    drop(imap);
    place.server.stop().expect("stops");
    let target = CyrusDirTarget::new(&url).expect("a URL");
    target.open().expect("opens again");
}

/// Scripts lie in files until their owner comes; then they become messages, as in 3.6, and count.
pub const SCRIPTS: &[Exception] = &[
    Exception { at: QUOTA_MESSAGES, why: "scripts are files at first", allowed: |a, b| grown(b, a, 2) },
    Exception { at: QUOTA_STORAGE, why: "scripts are files at first", allowed: |a, b| grown(b, a, 2) },
];

fn shown(lines: &[String]) -> String {
    let mut out = lines.iter().take(20).map(|line| format!("\n    {line}")).collect::<String>();
    if lines.len() > 20 {
        out.push_str(&format!("\n    and {} more", lines.len() - 20));
    }
    out
}
