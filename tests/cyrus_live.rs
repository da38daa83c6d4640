//! Both ends are real servers: a random workload of many clients on one that writes no `sync_log`, `spooltap run` beside
//! it, and a replica that shows over IMAP what the source shows, moments after the last operation.
//!
//! `SPOOLTAP_SEEDS=4,5,6` plays other seeds than the usual ones, `SPOOLTAP_OPERATIONS` another number of operations,
//! and a failure leaves what was done, said and different in the folder `SPOOLTAP_REPORTS`.

use crate::util::diff::{Exception, RAW_QUOTA};
use crate::util::workload::{Done, everybody, work};
use crate::util::{CyrusServer, Options, Rules, Spooltap, Viewer, Workload, cyrus, diff};
use std::path::Path;
use std::time::{Duration, Instant};

const SEEDS: [u64; 3] = [1, 2, 3];

/// Operations that succeed in a workload.
const OPERATIONS: usize = 520;

/// Longest time from the last operation to equality. On an idle machine it takes a moment (it is printed); where the
/// servers wait for a busy disk, so does everything.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Within this time it should be equal; the first look is taken then, and the time that was needed is printed.
const PROMISED: Duration = Duration::from_secs(2);

/// Differences reported.
const SHOWN: usize = 25;

/// What may differ between the two servers.
pub fn rules() -> Rules {
    and_what_is_written(Rules::live())
}

fn and_what_is_written(rules: Rules) -> Rules {
    let written = "when cyrus.index was written last, by either server";
    rules.and(&[
        Exception::always(&["users", "*", "mailboxes", "*", "vendor", "lastupdate"], written),
        Exception::always(&["shared", "*", "vendor", "lastupdate"], written),
        RAW_QUOTA,
    ])
}

/// The names of the store, how it deletes, and where it keeps what: another one for each seed.
pub fn flavour(seed: u64) -> Options {
    let options = Options::new().set("partition-second", "@BASE@/second").set("sync_log", "no");
    match seed % 5 {
        1 => options.set("delete_mode", "immediate").set("expunge_mode", "immediate"),
        2 => options
            .set("delete_mode", "delayed")
            .set("expunge_mode", "delayed")
            .set("metapartition-default", "@BASE@/meta")
            .set("metapartition_files", "header index cache expunge"),
        3 => options
            .set("delete_mode", "delayed")
            .set("expunge_mode", "immediate")
            .set("unixhierarchysep", "yes")
            .set("mailbox_legacy_dirs", "yes"),
        4 => options
            .set("delete_mode", "immediate")
            .set("expunge_mode", "delayed")
            .set("unixhierarchysep", "yes")
            .set("virtdomains", "userid")
            .set("conversations", "yes"),
        _ => options
            .set("delete_mode", "delayed")
            .set("expunge_mode", "delayed")
            .set("mailbox_legacy_dirs", "yes")
            .set("hashimapspool", "yes")
            .set("fulldirhash", "yes")
            .set("quota_db", "twoskip"),
    }
}

/// A source, what follows it, and the replica.
struct Pair {
    source: CyrusServer,
    replica: CyrusServer,
    spooltap: Spooltap,
    state: tempfile::TempDir,
}

impl Pair {
    fn start(seed: u64, workload: &Workload) -> anyhow::Result<Self> {
        let source = CyrusServer::start(flavour(seed).source())?;
        workload.prepare(&source)?;
        let replica = CyrusServer::start(flavour(seed))?;
        let state = tempfile::tempdir()?;
        let mut spooltap = follow(&source, &replica, &state.path().join("state"))?;
        spooltap.wait_live(LIMIT)?;
        Ok(Self { source, replica, spooltap, state })
    }
}

pub fn follow(source: &CyrusServer, replica: &CyrusServer, state: &Path) -> anyhow::Result<Spooltap> {
    Spooltap::run(&source.conf(), &replica.url(), state)
}

/// It ends in good order, and finds both sides equal as well.
fn said_by_itself(pair: Pair) -> anyhow::Result<()> {
    let status = pair.spooltap.terminate()?;
    anyhow::ensure!(status.success(), "spooltap ended with {status} after SIGTERM");
    let (conf, state) = (pair.source.conf(), pair.state.path().join("state"));
    let output = Spooltap::once(&conf, &pair.replica.url(), &state, &["verify"])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "verify ended with {}:\n{said}", output.status);
    println!("verify: {}", said.trim_end());
    Ok(())
}

/// Looks at both, then at the replica until it is equal or the time is over: what the replica shows otherwise.
pub fn differences(
    source: &CyrusServer,
    replica: &CyrusServer,
    since: Instant,
    rules: &Rules,
) -> anyhow::Result<Vec<String>> {
    let look = |server| Viewer::new(server).snapshot(&everybody());
    // A look at everything takes its time: what it shows is not older than its beginning.
    let (truth, mut looked, mut shown) = std::thread::scope(|scope| {
        let truth = scope.spawn(|| look(source));
        std::thread::sleep(PROMISED.saturating_sub(since.elapsed()));
        let looked = since.elapsed();
        let shown = look(replica);
        (truth.join().expect("does not panic"), looked, shown)
    });
    let truth = truth?;
    loop {
        let mut last = match &shown {
            Ok(shown) => diff(&truth, shown, rules),
            Err(error) => vec![format!("the replica cannot be read: {error:#}")],
        };
        if last.iter().all(|line| line.contains(CHECKSUMS)) {
            last.retain(|line| !is_miscount(line, source) && !is_miscount(line, replica));
        }
        if last.is_empty() {
            println!("equal for whoever looked {looked:.1?} after the last operation");
        }
        if last.is_empty() || since.elapsed() > LIMIT {
            return Ok(last);
        }
        looked = since.elapsed();
        // What an old session does not see is Cyrus's own affair: a new one each time.
        shown = look(replica);
    }
}

const CHECKSUMS: &str = " / vendor / synccrcs / ";

/// Whether a line is about a checksum only, and one that this server's own check does not confirm: what it is counted from
/// is compared by itself. One of them: the sum over private annotations has the name of the account in it, and stays as it
/// was when the account is renamed.
fn is_miscount(line: &str, server: &CyrusServer) -> bool {
    let Some((place, _)) = line.split_once(CHECKSUMS) else { return false };
    let mailbox = place.rsplit(" / ").next().unwrap_or_default();
    let miscounts = server.miscounts(mailbox).unwrap_or(false);
    if miscounts {
        println!("Cyrus's own checksum is wrong: {line}");
    }
    miscounts
}

pub fn seeds(usual: &[u64]) -> Vec<u64> {
    match std::env::var("SPOOLTAP_SEEDS") {
        Ok(seeds) => seeds.split(',').map(|seed| seed.trim().parse().expect("SPOOLTAP_SEEDS: numbers")).collect(),
        Err(_) => usual.to_vec(),
    }
}

pub fn operations(usual: usize) -> usize {
    std::env::var("SPOOLTAP_OPERATIONS").map_or(usual, |count| count.parse().expect("SPOOLTAP_OPERATIONS: number"))
}

#[test]
fn what_random_clients_did_is_on_the_replica() {
    if !cyrus::installed() {
        return;
    }
    let faults: Vec<String> = seeds(&SEEDS)
        .into_iter()
        .filter_map(|seed| play(seed).unwrap_or_else(|error| Some(format!("seed {seed}: {error:#}"))))
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// What went wrong.
fn play(seed: u64) -> anyhow::Result<Option<String>> {
    let workload = Workload::new(seed, operations(OPERATIONS));
    let mut pair = Pair::start(seed, &workload)?;
    let done: Done = work(&pair.source, &workload);
    let rules = and_what_is_written(Rules::beside(&pair.source.release()?));
    let differences = differences(&pair.source, &pair.replica, done.ended, &rules)?;
    let figures = pair.spooltap.status()["replicas"][0].clone();
    println!("seed {seed}: lag p50 {} s, p99 {} s", figures["lag_p50_seconds"], figures["lag_p99_seconds"]);
    if let Some(status) = pair.spooltap.ended() {
        anyhow::bail!("spooltap ended ({status}):\n{}", pair.spooltap.log_end(20));
    }
    if differences.is_empty() {
        let missing = done.missing();
        anyhow::ensure!(missing.is_empty(), "no operation of these kinds succeeded: {missing:?}");
        anyhow::ensure!(done.operations() >= workload.operations, "only {} operations succeeded", done.operations());
        let (before, log) = (listings(&pair)?, pair.spooltap.log());
        return said_by_itself(pair).map(|()| None).inspect_err(|_| {
            report(seed, &done, &log, &[]).and_then(|()| write_listings(seed, &before)).expect("is written");
        });
    }
    let more = differences.len().saturating_sub(SHOWN);
    let shown: Vec<&str> = differences.iter().take(SHOWN).map(String::as_str).collect();
    report(seed, &done, &pair.spooltap.log(), &differences)?;
    write_listings(seed, &listings(&pair)?)?;
    let log = pair.spooltap.log_end(40);
    Ok(Some(format!("seed {seed}:\n    {}\n    and {more} more\nspooltap said\n{log}", shown.join("\n    "))))
}

/// What was done, said and different, for who asked for it.
fn report(seed: u64, done: &Done, log: &str, differences: &[String]) -> anyhow::Result<()> {
    let Ok(folder) = std::env::var("SPOOLTAP_REPORTS") else { return Ok(()) };
    std::fs::write(format!("{folder}/journal-{seed}"), done.journal.join("\n"))?;
    std::fs::write(format!("{folder}/log-{seed}"), log)?;
    std::fs::write(format!("{folder}/differences-{seed}"), differences.join("\n"))?;
    Ok(())
}

/// The mailbox lists of both sides, as their own tool prints them.
fn listings(pair: &Pair) -> anyhow::Result<[Vec<u8>; 2]> {
    let list = |server: &CyrusServer| anyhow::Ok(server.tool("ctl_mboxlist", &["-d"])?.stdout);
    Ok([list(&pair.source)?, list(&pair.replica)?])
}

fn write_listings(seed: u64, listings: &[Vec<u8>; 2]) -> anyhow::Result<()> {
    let Ok(folder) = std::env::var("SPOOLTAP_REPORTS") else { return Ok(()) };
    for (name, listing) in ["source", "replica"].iter().zip(listings) {
        std::fs::write(format!("{folder}/{name}-{seed}"), listing)?;
    }
    Ok(())
}

/// What is changed on the replica behind everybody's back, and where that has to be seen.
const PLANTED: [(&str, &str, &str); 12] = [
    ("u1", "UID STORE 1 +FLAGS (\\Flagged)", "messages / 1 / flags: \"\\\\Flagged\" not expected"),
    ("u1", "UID STORE 1 +FLAGS (planted)", "messages / 1 / flags: \"planted\" not expected"),
    ("u1", "UID STORE 2 ANNOTATION (/comment (value.priv \"x\"))", "user.u1 / messages / 2 / annotations"),
    ("u1", "APPEND INBOX {24+}\r\nSubject: planted\r\n\r\nx\r\n\r\n", "user.u1 / uidnext"),
    ("u1", "SETACL INBOX u2 lr", "user.u1 / acl / u2"),
    ("u1", "SETMETADATA INBOX (/shared/comment \"x\")", "user.u1 / annotations / /comment"),
    ("u1", "CREATE INBOX.planted", "names: \"user.u1.planted\" not expected"),
    ("u1", "SUBSCRIBE INBOX.planted", "users / u1 / subscribed"),
    ("u2", "DELETE INBOX.Work.2026", "names: \"user.u2.Work.2026\" missing"),
    ("u2", "RENAME INBOX.Sent INBOX.Gone", "names: \"user.u2.Sent\" missing"),
    ("cyrus", "SETQUOTA user.u2 (STORAGE 4711)", "user.u2 / quota / user.u2"),
    ("cyrus", "SETMETADATA \"\" (/shared/comment \"x\")", "server_annotations / /comment"),
];

#[test]
fn a_difference_on_the_replica_is_found() {
    if !cyrus::installed() {
        return;
    }
    let (workload, state) = (Workload::new(1, 0), tempfile::tempdir().expect("directory"));
    let source = CyrusServer::start(flavour(2).source()).expect("source");
    workload.prepare(&source).expect("prepares");
    let mut lmtp = source.lmtp().expect("connects");
    for subject in ["one", "two"] {
        lmtp.deliver(&["u1", "u2"], format!("Subject: {subject}\r\n\r\nx\r\n").as_bytes()).expect("delivers");
    }
    source.sieve("u2").expect("logs in").put("main", "keep;\r\n").expect("script");
    let truth = Viewer::new(&source).snapshot(&everybody()).expect("snapshot");
    let truth_again = Viewer::new(&source).snapshot(&everybody()).expect("snapshot");
    let rules = rules();
    let replica = CyrusServer::start(flavour(2)).expect("replica");
    let pushed = Spooltap::once(&source.conf(), &replica.url(), &state.path().join("state"), &["push", "-A"]);
    assert!(pushed.expect("runs").status.success());
    let look = || diff(&truth_again, &Viewer::new(&replica).snapshot(&everybody()).expect("snapshot"), &rules);
    assert_eq!(
        look(),
        Vec::<String>::new(),
        "looking at the source changed it: {:?}",
        diff(&truth, &truth_again, &rules)
    );
    for (login, command, _) in PLANTED {
        let mut session = replica.imap(login).expect("logs in");
        if command.starts_with("UID") {
            session.ok("SELECT INBOX").expect("selects");
        }
        session.ok(command).expect(command);
        session.ok("LOGOUT").expect("says goodbye");
    }
    replica.sieve("u2").expect("logs in").put("main", "discard;\r\n").expect("script");
    let found = look();
    let places = PLANTED.iter().map(|(_, _, place)| *place).chain(["users / u2 / sieve / main / sha1"]);
    for place in places {
        assert!(found.iter().any(|line| line.contains(place)), "nothing at {place} in {found:#?}");
    }
}
