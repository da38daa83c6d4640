//! `push` of whole stores of real servers into a real 3.6.1: what arrives, what is not sent again, what `verify` says
//! about it, that the source stays as it was, and what a spoiled replica needs.
//!
//! `tests/run stores DIR…` runs the first test for any folder with stores in the shape of `fixtures/spools`.

#[path = "push/deep.rs"]
mod deep;
#[path = "push/deleted.rs"]
mod deleted;
#[path = "push/listing.rs"]
mod listing;
#[path = "push/old.rs"]
mod old;
#[path = "push/options.rs"]
mod options;
#[path = "push/quirks.rs"]
mod quirks;
#[path = "push/spoiled.rs"]
mod spoiled;
#[path = "push/untouched.rs"]
mod untouched;

use super::util::diff::{Exception, has_scripts_apart};
use super::util::{CyrusServer, Evidence, Options, Rules, Spooltap, Store, cyrus, diff, snapshot, store};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Output;
use std::sync::Mutex;

/// Folders named by `tests/run stores`, one in a line.
const NAMED: &str = "SPOOLTAP_STORES";

/// Differences reported for one store.
const SHOWN: usize = 12;

#[test]
fn every_store_arrives_in_a_real_replica_and_nothing_is_sent_twice() {
    if !cyrus::installed() {
        return;
    }
    let stores = match std::env::var(NAMED) {
        Ok(named) => named.lines().flat_map(|dir| store::stores_in(Path::new(dir))).collect(),
        Err(_) => store::stores_in(&store::fixtures().join("spools")),
    };
    let stores: Vec<_> = stores.into_iter().filter(|(_, name)| is_supported(name)).collect();
    assert!(!stores.is_empty(), "no stores of a supported release in {:?}", std::env::var(NAMED));
    let count = stores.len();
    let (left, faults) = (Mutex::new(stores), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((folder, name)) = left.lock().expect("lock").pop() else { return };
                    match arrives(&folder, &name) {
                        Ok(said) => println!("{name}: {said}"),
                        Err(error) => faults.lock().expect("lock").push(format!("{name}: {error:#}")),
                    }
                }
            });
        }
    });
    let faults = faults.into_inner().expect("lock");
    assert!(faults.is_empty(), "{} of {count} stores:\n{}", faults.len(), faults.join("\n"));
}

/// Releases that are a source by now.
fn is_supported(name: &str) -> bool {
    ["2.3.", "2.4.", "2.5.", "3."].iter().any(|release| name.starts_with(release))
}

/// The last line of `verify`, if all is well.
fn arrives(folder: &Path, name: &str) -> anyhow::Result<String> {
    let truth: Value = serde_json::from_slice(&fs::read(folder.join(format!("{name}.truth.json")))?)?;
    let pair = Pair::new(store::store_in(folder, name))?;
    let talk = Talk::recorded_by(&pair.replica)?;
    let before = untouched::fingerprint(pair.source.dir.path());

    succeeds(&pair.spooltap(&["push", "-A"])?, "the first push")?;
    let first = talk.applied();
    anyhow::ensure!(!first.is_empty(), "the server's own record of the talk shows nothing");
    pair.equals_truth("after the first push")?;
    let listed = listing::differences(&truth, &pair.replica)?;
    anyhow::ensure!(listed.is_empty(), "mailbox list after the first push:\n{}", listed_lines(&listed));

    succeeds(&pair.spooltap(&["push", "-A"])?, "the second push")?;
    anyhow::ensure!(talk.applied() == first, "sent again: {}", talk.since(&first));
    succeeds(&pair.spooltap(&["scan"])?, "scan")?;
    let verified = pair.spooltap(&["verify"])?;
    succeeds(&verified, "verify")?;
    anyhow::ensure!(talk.applied() == first, "scan or verify sent {}", talk.since(&first));
    pair.equals_truth("at the end")?;

    // By hand all of them, otherwise one of each release.
    if std::env::var(NAMED).is_ok() || name.ends_with("-a") {
        fs::remove_dir_all(pair.state.path())?;
        succeeds(&pair.spooltap(&["push", "-A"])?, "the push after the state was lost")?;
        succeeds(&pair.spooltap(&["verify"])?, "verify after the state was lost")?;
        pair.equals_truth("after the state was lost")?;
    }

    let touched = untouched::changes(&before, &untouched::fingerprint(pair.source.dir.path()));
    anyhow::ensure!(touched.is_empty(), "the source was touched: {touched:?}");
    let mut evidence = Evidence::default();
    evidence.equal(&pair.source.truth.0, "");
    evidence.put_down("push", name);
    let said = String::from_utf8_lossy(&verified.stdout);
    Ok(said.lines().last().unwrap_or_default().to_owned())
}

/// What a replica shows differently from these stores, with the reason.
const STORES: &[Exception] = &[
    Exception::always(&["users", "*", "mailboxes", "*", "vendor", "lastupdate"], "when this server wrote the files"),
    Exception::always(&["shared", "*", "vendor", "lastupdate"], "when this server wrote the files"),
];

/// 3.6 keeps Sieve scripts as messages in a mailbox below INBOX, and these count for the quota.
const SCRIPTS: &[Exception] = &[
    Exception { at: QUOTA_MESSAGES, why: "scripts are messages in 3.6", allowed: |a, b| grown(a, b, 2) },
    Exception { at: QUOTA_STORAGE, why: "scripts are messages in 3.6", allowed: |a, b| grown(a, b, 2) },
];
pub const QUOTA_MESSAGES: &[&str] = &["users", "*", "mailboxes", "*", "quota", "*", "MESSAGE"];
pub const QUOTA_STORAGE: &[&str] = &["users", "*", "mailboxes", "*", "quota", "*", "STORAGE"];

/// How a real replica may show a store of this release.
pub fn rules(release: &str) -> Rules {
    let rules = Rules::recorded(release).and(STORES);
    if has_scripts_apart(release) { rules.and(SCRIPTS) } else { rules }
}

/// The same limit, and a little more in use.
pub fn grown(expected: &Value, found: &Value, most: u64) -> bool {
    let more = found[0].as_u64().zip(expected[0].as_u64()).and_then(|(found, expected)| found.checked_sub(expected));
    expected[1] == found[1] && more.is_some_and(|more| more <= most)
}

/// A recorded store and the replica it is pushed to.
struct Pair {
    source: Store,
    replica: CyrusServer,
    state: tempfile::TempDir,
}

impl Pair {
    fn new(source: Store) -> anyhow::Result<Self> {
        let mut options = Options::new().names_of(&source.conf, &source.release);
        for partition in source.partitions() {
            options = options.set(&format!("partition-{partition}"), format!("@BASE@/{partition}"));
        }
        let replica = CyrusServer::start(options)?;
        Ok(Self { source, replica, state: tempfile::Builder::new().prefix("spooltap-push-").tempdir()? })
    }

    /// Runs spooltap from this source to this replica.
    fn spooltap(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        Spooltap::once(&self.source.conf, &self.replica.url(), self.state.path(), arguments)
    }

    fn differences(&self) -> anyhow::Result<Vec<String>> {
        let shown = snapshot(&self.replica, &self.source.users())?;
        Ok(diff(&self.source.truth, &shown, &rules(&self.source.release)))
    }

    fn equals_truth(&self, when: &str) -> anyhow::Result<()> {
        let differences = self.differences()?;
        anyhow::ensure!(differences.is_empty(), "{when}:\n{}", listed_lines(&differences));
        Ok(())
    }
}

/// What the replica's sync_server itself recorded of the talks with it (Cyrus's telemetry log).
struct Talk(std::path::PathBuf);

impl Talk {
    fn recorded_by(replica: &CyrusServer) -> anyhow::Result<Self> {
        let dir = replica.base().join("conf/log").join(cyrus::REPLICATOR);
        fs::create_dir_all(&dir)?;
        cyrus::give_to_cyrus(&dir)?;
        Ok(Self(dir))
    }

    /// The commands that change what is stored, without their arguments, counted over all sessions so far.
    fn applied(&self) -> BTreeMap<String, usize> {
        let mut counted = BTreeMap::new();
        for log in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let text = fs::read(log.path()).unwrap_or_default();
            for line in text.split(|&byte| byte == b'\n').map(String::from_utf8_lossy) {
                let Some((_, command)) = line.split_once("APPLY ") else { continue };
                let command = command.split([' ', '\r']).next().unwrap_or_default();
                // This one only says what the session understands.
                if command != "CAPABILITIES" {
                    *counted.entry(command.to_owned()).or_default() += 1;
                }
            }
        }
        counted
    }

    /// What came since then.
    fn since(&self, then: &BTreeMap<String, usize>) -> String {
        let mut now = self.applied();
        now.retain(|command, count| then.get(command) != Some(count));
        format!("{now:?} where it was {then:?}")
    }
}

fn succeeds(output: &Output, what: &str) -> anyhow::Result<()> {
    anyhow::ensure!(output.status.success(), "{what} ended with {}:\n{}", output.status, said(output));
    Ok(())
}

/// Both outputs as text.
fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn listed_lines(differences: &[String]) -> String {
    let mut lines: Vec<String> = differences.iter().take(SHOWN).map(|line| format!("    {line}")).collect();
    if differences.len() > SHOWN {
        lines.push(format!("    and {} more", differences.len() - SHOWN));
    }
    lines.join("\n")
}

#[test]
fn a_quota_may_only_grow_by_what_scripts_need() {
    assert!(grown(&json!([7, 10]), &json!([8, 10]), 2));
    assert!(!grown(&json!([7, 10]), &json!([6, 10]), 2));
    assert!(!grown(&json!([7, 10]), &json!([8, 11]), 2));
    assert!(!grown(&json!([7, 10]), &json!([10, 10]), 2));
    assert!(!grown(&json!([7, 10]), &Value::Null, 2));
}
