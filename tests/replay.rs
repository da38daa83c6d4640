//! Recordings of real servers, played on a copy of their store while `spooltap run` watches it: at every mark a real
//! 3.6.1 replica shows over IMAP what the recorded server showed.
//!
//! `tests/run replay DIR…` runs this for any folder of that format.

use super::util::{CyrusServer, Evidence, Options, Rules, Snapshot, Spooltap, Viewer, cyrus, diff, eventually, store};
use spooltap::capture::{Roots, Settings};
use spooltap::replay::{Mark, Player, Recording, Speed};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Longest time from the end of a step to equality.
const LIMIT: Duration = Duration::from_secs(20);

/// The same after a mark that did not become equal: the recording has failed, the rest is for the report.
const LIMIT_AFTER_FAULT: Duration = Duration::from_millis(500);

/// Recordings named by `tests/run replay`, one in a line.
const NAMED: &str = "SPOOLTAP_REPLAYS";

/// Differences reported for one mark.
const SHOWN: usize = 12;

#[test]
fn every_mark_of_every_recording_reaches_a_real_replica() {
    replay_all("auto");
}

#[test]
fn every_mark_is_reached_with_fanotify_too() {
    // It sees every file system of the machine's that a store is on; without the privilege there is nothing to see.
    let dir = tempfile::tempdir().expect("directory");
    let roots = Roots { conf: dir.path().to_owned(), ..Roots::default() };
    let settings = Settings { source: "fanotify".to_owned(), ..Settings::default() };
    match spooltap::capture::start(roots, settings, Box::new(|_| ())) {
        Ok(_) => replay_all("fanotify"),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED: without the privilege for fanotify: {error}");
        }
    }
}

/// Every so many marks spooltap ends and is started again: asked to, killed, and killed with its state lost.
const ENDS: &[(usize, End)] =
    &[(15, End::Asked), (40, End::Killed), (65, End::Lost), (90, End::Killed), (105, End::Lost)];

/// After this mark `verify` looks, while the daemon runs.
const VERIFIED: usize = 50;

#[derive(Clone, Copy, PartialEq)]
enum End {
    Asked,
    Killed,
    Lost,
}

#[test]
fn a_source_without_history_is_followed_through_deaths_and_a_lost_state() {
    if !cyrus::installed() {
        return;
    }
    let recordings = match std::env::var(NAMED) {
        Ok(named) => store::recordings_in(&named.lines().map(PathBuf::from).collect::<Vec<_>>()),
        Err(_) => vec![store::fixtures().join("replays/2.3.19-a")],
    };
    let faults: Vec<String> = recordings.iter().flat_map(|dir| replay(dir, "auto", ENDS)).collect();
    assert!(faults.is_empty(), "{} marks are not equal:\n{}", faults.len(), faults.join("\n"));
}

fn replay_all(capture: &str) {
    if !cyrus::installed() {
        return;
    }
    let recordings = match std::env::var(NAMED) {
        Ok(named) => store::recordings_in(&named.lines().map(PathBuf::from).collect::<Vec<_>>()),
        // What fanotify and inotify tell differs by kind of operation, not by recording: two have all of them.
        Err(_) if capture == "fanotify" => {
            let mut some = store::recordings();
            some.retain(|dir| dir.ends_with("2.5.11-a") || dir.ends_with("3.6.1-a"));
            some
        }
        Err(_) => store::recordings(),
    };
    assert!(!recordings.is_empty(), "no recordings in {:?}", std::env::var(NAMED));
    let count = recordings.len();
    let (left, faults) = (Mutex::new(recordings), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(dir) = left.lock().expect("lock").pop() else { return };
                    let found = replay(&dir, capture, &[]);
                    faults.lock().expect("lock").extend(found);
                }
            });
        }
    });
    let faults = faults.into_inner().expect("lock");
    assert!(faults.is_empty(), "in {count} recordings {} marks are not equal:\n{}", faults.len(), faults.join("\n"));
}

/// One text for each mark that did not become equal.
fn replay(dir: &Path, capture: &str, ends: &[(usize, End)]) -> Vec<String> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match try_replay(dir, &name, capture, ends) {
        Ok(faults) => faults,
        Err(error) => vec![format!("{name}: {error:#}")],
    }
}

fn try_replay(dir: &Path, name: &str, capture: &str, ends: &[(usize, End)]) -> anyhow::Result<Vec<String>> {
    let recording = Recording::open(dir)?;
    let source = tempfile::Builder::new().prefix("spooltap-replay-").tempdir()?;
    let conf = recording.unpack(&source.path().join("store"))?;
    let replica = CyrusServer::start(Options::new().names_of(&conf, recording.version()))?;
    let state = source.path().join("state");
    let start = || Spooltap::run_with(&conf, &replica.url(), &state, &["--capture", capture]);
    let mut spooltap = start()?;
    spooltap.wait_live(LIMIT)?;
    let mut player = Player::new(&recording, &source.path().join("store"));
    let rules = Rules::recorded(recording.version());
    let mut viewer = Viewer::new(&replica);
    let mut logins = BTreeSet::new();
    let (mut faults, mut lags) = (Vec::new(), Vec::new());
    let (mut marks, mut evidence) = (0, Evidence::default());
    while let Some(mark) = player.next_mark(Speed::Asap)? {
        marks += 1;
        if let Some((_, end)) = ends.iter().find(|(at, _)| *at == marks) {
            // In the middle of what the step has just caused.
            match end {
                End::Asked => drop(spooltap.terminate()?),
                End::Killed | End::Lost => spooltap.kill9(),
            }
            if *end == End::Lost {
                std::fs::remove_dir_all(&state)?;
            }
            spooltap = start()?;
            spooltap.wait_live(LIMIT)?;
        }
        let users = mark.truth["users"].as_object().into_iter().flat_map(|users| users.keys().cloned());
        logins.extend(users);
        let logins: Vec<&String> = logins.iter().collect();
        let since = Instant::now();
        let limit = if faults.is_empty() { LIMIT } else { LIMIT_AFTER_FAULT };
        match wait_for(&mark, &mut viewer, &logins, &rules, limit)? {
            differences if differences.is_empty() => {
                lags.push(since.elapsed());
                evidence.equal(&mark.truth, &mark.what);
            }
            differences => faults.push(format!("{name} step {} ({}):\n{}", mark.step, mark.what, listed(&differences))),
        }
        if !ends.is_empty() && marks == VERIFIED {
            // The daemon holds its state, and what it remembers becomes durable a quarter of a second later.
            let verify = || Spooltap::once(&conf, &replica.url(), &state, &["verify"]);
            let mut last = None;
            eventually(LIMIT, || {
                let said = verify().ok()?;
                let equal = said.status.success();
                last = Some(said);
                equal.then_some(())
            })
            .ok_or_else(|| anyhow::anyhow!("verify beside the daemon: {last:?}"))?;
        }
        if let Some(status) = spooltap.ended() {
            anyhow::bail!("spooltap ended ({status}) at step {}:\n{}", mark.step, spooltap.log_end(20));
        }
    }
    if !faults.is_empty() {
        faults.push(format!("{name}: spooltap said\n{}", spooltap.log_end(40)));
    }
    if faults.is_empty() && ends.is_empty() {
        evidence.put_down("live", name);
    }
    let status = spooltap.terminate()?;
    anyhow::ensure!(status.success(), "spooltap ended with {status} after SIGTERM");
    lags.sort_unstable();
    let at = |percent: usize| lags.get(lags.len().saturating_sub(1) * percent / 100).copied().unwrap_or_default();
    println!("{name}: {} marks equal, time to equality p50 {:?}, p99 {:?}", lags.len(), at(50), at(99));
    Ok(faults)
}

/// What still differs when the time is over.
fn wait_for(
    mark: &Mark,
    viewer: &mut Viewer,
    logins: &[&String],
    rules: &Rules,
    limit: Duration,
) -> anyhow::Result<Vec<String>> {
    let truth = Snapshot::recorded(&mark.truth);
    let mut look = || match viewer.snapshot(logins) {
        Ok(shown) => diff(&truth, &shown, rules),
        Err(error) => {
            viewer.reset();
            vec![format!("the replica cannot be read: {error:#}")]
        }
    };
    let equal = eventually(limit, || Some(look()).filter(Vec::is_empty));
    if equal.is_none() {
        // What an old session does not see is Cyrus's own affair.
        viewer.reset();
        return Ok(viewer
            .snapshot(logins)
            .map_or_else(|e| vec![format!("{e:#}")], |shown| diff(&truth, &shown, rules)));
    }
    Ok(Vec::new())
}

fn listed(differences: &[String]) -> String {
    let mut lines: Vec<String> = differences.iter().take(SHOWN).map(|line| format!("    {line}")).collect();
    if differences.len() > SHOWN {
        lines.push(format!("    and {} more", differences.len() - SHOWN));
    }
    lines.join("\n")
}
