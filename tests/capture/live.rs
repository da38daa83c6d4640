//! A real server, random clients, and each source of change alone: what it noticed is on a real replica. And one daemon
//! whose sources fail and recover all the time, for the reasons for which they fail in the field.
//!
//! `SPOOLTAP_OPERATIONS=520` makes it as long as the workload of `cyrus_live`, `SPOOLTAP_SEEDS` plays others.

use super::super::cyrus_live::{LIMIT, differences, flavour, operations, rules, seeds};
use super::super::util::rng::Rng;
use super::super::util::{CyrusServer, Spooltap, Workload, cyrus, eventually, workload::work};
use serde_json::Value;
use spooltap::capture::SOURCES;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const OPERATIONS: usize = 150;

/// More than there is time for.
const MOST_OPERATIONS: usize = 20_000;

/// Times at which something happens to the sources.
const TROUBLES: usize = 12;

/// Short enough for a test that the better source comes back while it runs.
/// The clients may delete as many folders as they like.
const CONFIG: &str = "capture_retry_seconds = 1\nscan_seconds = 2\nallow_removals = true\n";

struct Follower {
    name: &'static str,
    replica: CyrusServer,
    spooltap: Spooltap,
}

fn config(state: &Path) -> anyhow::Result<String> {
    let path = state.join("spooltap.toml");
    fs::write(&path, CONFIG)?;
    Ok(path.to_string_lossy().into_owned())
}

/// `None` where this source cannot be used.
fn follow(source: &CyrusServer, seed: u64, state: &Path, name: &'static str) -> anyhow::Result<Option<Follower>> {
    if name == "fanotify" && !fanotify_is_allowed(state) {
        return Ok(None);
    }
    let replica = CyrusServer::start(flavour(seed))?;
    let arguments = ["--config", &config(state)?, "--capture", name];
    let spooltap = Spooltap::run_with(&source.conf(), &replica.url(), &state.join(name), &arguments)?;
    Ok(Some(Follower { name, replica, spooltap }))
}

fn fanotify_is_allowed(dir: &Path) -> bool {
    let settings = super::sources::settings("fanotify");
    let roots = super::roots(dir);
    spooltap::capture::start(roots, settings, Box::new(|_| ()))
        .map_err(|error| println!("fanotify is skipped: {error}"))
        .is_ok()
}

fn each_alone(seed: u64) -> anyhow::Result<Vec<String>> {
    let mut workload = Workload::new(seed, operations(OPERATIONS));
    // What is done twice between two looks is seen once: see there.
    workload.names_stay = true;
    let source = CyrusServer::start(flavour(seed).set("sync_log", "yes"))?;
    workload.prepare(&source)?;
    let state = tempfile::tempdir()?;
    let mut followers = Vec::new();
    for kind in SOURCES {
        followers.extend(follow(&source, seed, state.path(), kind.name)?);
    }
    for follower in &mut followers {
        follower.spooltap.wait_live(LIMIT)?;
    }
    let done = work(&source, &workload);
    anyhow::ensure!(done.operations() >= workload.operations, "only {} operations succeeded", done.operations());
    let mut faults = Vec::new();
    for follower in &mut followers {
        let name = follower.name;
        let differences = differences(&source, &follower.replica, done.ended, &rules())?;
        let used = sources(&follower.spooltap.status());
        if used != BTreeSet::from([name.to_owned()]) {
            faults.push(format!("seed {seed}: {name}: is followed by {used:?}"));
        }
        if !differences.is_empty() {
            let log = follower.spooltap.log_end(20);
            faults.push(format!("seed {seed}: {name}:\n    {}\nit said\n{log}", differences.join("\n    ")));
        }
        println!("seed {seed}: {name}: {} differences", differences.len());
    }
    Ok(faults)
}

fn sources(status: &Value) -> BTreeSet<String> {
    let areas = status["source"]["areas"].as_array().cloned().unwrap_or_default();
    areas.iter().filter_map(|one| one["capture"].as_str().map(str::to_owned)).collect()
}

#[test]
fn each_source_alone_brings_all_that_clients_did() {
    if !cyrus::installed() {
        return;
    }
    for seed in seeds(&[3]) {
        let faults = each_alone(seed).unwrap_or_else(|error| vec![format!("seed {seed}: {error:#}")]);
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }
}

/// Arguments of unshare(1): a user namespace of its own.
fn own_namespace() -> &'static str {
    // The servers of root run as another user, who has to be mapped as well: `map_everybody`.
    if nix::unistd::geteuid().is_root() { "-U" } else { "-Ur" }
}

/// Waits for its users, and becomes the program.
const WHEN_MAPPED: &str = "until test -n \"$(cat /proc/self/uid_map)\"; do sleep 0.02; done; exec \"$@\"";

fn map_everybody(daemon: &Spooltap) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    for map in ["gid_map", "uid_map"] {
        let path = format!("/proc/{}/{map}", daemon.pid());
        // Refused until it is in its namespace.
        let written = eventually(LIMIT, || fs::write(&path, "0 0 65536").ok());
        anyhow::ensure!(written.is_some(), "{path} cannot be written");
    }
    Ok(())
}

/// A limit of the user namespace that the daemon lives in.
fn limit(daemon: &Spooltap, name: &str, value: u64) -> anyhow::Result<()> {
    let line = format!("echo {value} > /proc/sys/user/{name}");
    let output = Command::new("nsenter")
        .args(["--user", "--preserve-credentials", "--target", &daemon.pid().to_string(), "sh", "-c", &line])
        .output()?;
    anyhow::ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn restore(daemon: &Spooltap) -> anyhow::Result<()> {
    limit(daemon, "max_inotify_instances", 100)?;
    limit(daemon, "max_inotify_watches", 100_000)
}

/// The daemon sleeps while more happens beside the mailboxes than the kernel keeps for it.
fn overflow(daemon: &Spooltap, source: &CyrusServer) -> anyhow::Result<()> {
    let longest: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")?.trim().parse()?;
    let pid = nix::unistd::Pid::from_raw(daemon.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?;
    let conf = source.conf().parent().expect("has one").join("conf");
    let files = [conf.join("noise-1"), conf.join("noise-2")];
    let flooded = (0..longest).try_for_each(|n| fs::write(&files[n % 2], "x"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT)?;
    files.iter().try_for_each(fs::remove_file)?;
    Ok(flooded?)
}

/// Beside the users' own: a watch for it is what is missing.
fn one_more_directory(source: &CyrusServer, round: usize) -> anyhow::Result<()> {
    Ok(fs::create_dir_all(source.conf().parent().expect("has one").join(format!("conf/user/more/{round}")))?)
}

/// What was seen of the daemon while it had trouble.
#[derive(Debug, Default)]
struct Seen {
    sources: BTreeSet<String>,
    restarts: u64,
    overflows: u64,
}

impl Seen {
    fn look(&mut self, daemon: &Spooltap) {
        let status = daemon.status();
        self.sources.extend(sources(&status));
        let count = |name: &str| status["source"][name].as_u64().unwrap_or_default();
        (self.restarts, self.overflows) = (count("restarts_total"), count("overflows_total"));
    }
}

/// Things that happen to sources, in random order, while the workload runs.
fn trouble(workload: &Workload, daemon: &Spooltap, source: &CyrusServer) -> anyhow::Result<Seen> {
    let (mut rng, mut seen, mut kind) = (Rng::new(workload.seed), Seen::default(), 0);
    for round in 0.. {
        if round >= TROUBLES && workload.progress() >= operations(OPERATIONS) {
            break;
        }
        // Each kind at least once, whatever the dice say.
        kind = if round < 5 { round } else { (kind + 1 + rng.below(4)) % 5 };
        match kind {
            0 => overflow(daemon, source)?,
            // Locks need few watches.
            1 => limit(daemon, "max_inotify_watches", 60).and_then(|()| one_more_directory(source, round))?,
            // Not even those: it is found by looking.
            2 => limit(daemon, "max_inotify_watches", 0).and_then(|()| one_more_directory(source, round))?,
            3 => restore(daemon)?,
            // Nothing comes back for a while.
            _ => limit(daemon, "max_inotify_instances", 0)?,
        }
        let until = Instant::now() + Duration::from_millis(300 + rng.below(1500) as u64);
        // The first time it has to be seen, however long that takes on a busy machine.
        let patience = Instant::now() + LIMIT;
        loop {
            seen.look(daemon);
            let shown = match round {
                0 => seen.overflows > 0,
                1 => seen.sources.contains("locks"),
                2 => seen.sources.contains("poll"),
                _ => true,
            };
            let now = Instant::now();
            if (now >= until && shown) || now >= patience {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    restore(daemon)?;
    Ok(seen)
}

fn under_trouble(seed: u64) -> anyhow::Result<Option<String>> {
    // As many as there is time for until the last trouble.
    let mut workload = Workload::new(seed, MOST_OPERATIONS);
    // Whoever looks for trouble takes accounts that go and come as well.
    (workload.names_stay, workload.accounts_stay) = (true, std::env::var_os("SPOOLTAP_RENAMES").is_none());
    let source = CyrusServer::start(flavour(seed))?;
    workload.prepare(&source)?;
    let replica = CyrusServer::start(flavour(seed))?;
    let state = tempfile::tempdir()?;
    // In a user namespace of its own limits are ours to set, and fanotify is not allowed.
    let ours = Spooltap::command(&source.conf(), &state.path().join("state"));
    let mut command = Command::new("unshare");
    command.args([own_namespace(), "sh", "-c", WHEN_MAPPED, "sh"]);
    command.arg(ours.get_program()).args(ours.get_args()).stdin(Stdio::null());
    command.envs(ours.get_envs().filter_map(|(key, value)| Some((key, value?))));
    command.args(["--replica", &replica.url(), "--config", &config(state.path())?, "run"]);
    let mut spooltap = Spooltap::spawn(command, &state.path().join("state"))?;
    map_everybody(&spooltap)?;
    spooltap.wait_live(LIMIT)?;
    let (done, seen) = std::thread::scope(|scope| {
        let troubled = scope.spawn(|| {
            let seen = trouble(&workload, &spooltap, &source);
            workload.stop.store(true, Ordering::Relaxed);
            seen
        });
        (work(&source, &workload), troubled.join().expect("does not panic"))
    });
    let mut seen = seen?;
    anyhow::ensure!(done.operations() >= operations(OPERATIONS), "only {} operations succeeded", done.operations());
    let differences = differences(&source, &replica, Instant::now(), &rules())?;
    let back = eventually(LIMIT, || {
        seen.look(&spooltap);
        (sources(&spooltap.status()) == BTreeSet::from(["inotify".to_owned()])).then_some(())
    });
    println!("seed {seed}: {seen:?}");
    if let Some(status) = spooltap.ended() {
        anyhow::bail!("spooltap ended ({status}):\n{}", spooltap.log_end(20));
    }
    let log = spooltap.log_end(60);
    anyhow::ensure!(back.is_some(), "inotify did not come back: {seen:?}\n{log}");
    for source in ["inotify", "locks", "poll"] {
        anyhow::ensure!(seen.sources.contains(source), "{source} never served: {seen:?}\n{log}");
    }
    anyhow::ensure!(seen.restarts >= 2 && seen.overflows > 0, "there was to be more trouble: {seen:?}\n{log}");
    let fault = || format!("seed {seed}:\n    {}\n{log}\n{}", differences.join("\n    "), done.journal.join("\n"));
    Ok((!differences.is_empty()).then(fault))
}

#[test]
fn sources_fail_and_recover_and_nothing_is_missed() {
    let allowed = Command::new("unshare").args([own_namespace(), "true"]).output();
    if !cyrus::installed() || !allowed.is_ok_and(|output| output.status.success()) {
        println!("skipped: no Cyrus, or no user namespace is possible here");
        return;
    }
    // A flavour without lock files by name, which are in many directories.
    for seed in seeds(&[7]) {
        let fault = under_trouble(seed).unwrap_or_else(|error| Some(format!("seed {seed}: {error:#}")));
        assert!(fault.is_none(), "{}", fault.unwrap_or_default());
    }
}
