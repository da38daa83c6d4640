//! systemd hears of us while every room gets on, and no longer: threads are really stopped here, one by one.

use super::unit::{Stage, Unit};
use super::{LONG, idle};
use crate::util::{CyrusServer, Gate, Options, cyrus, eventually};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use std::fs;
use std::time::{Duration, Instant};

/// The thread of this name (the kernel keeps 15 characters of it).
fn thread(process: i32, name: &str) -> Pid {
    let found = fs::read_dir(format!("/proc/{process}/task")).expect("runs").flatten().find_map(|task| {
        let comm = fs::read_to_string(task.path().join("comm")).ok()?;
        (comm.trim_end() == name).then(|| task.file_name().to_str()?.parse().ok()).flatten()
    });
    Pid::from_raw(found.unwrap_or_else(|| panic!("no thread is called {name}")))
}

/// Stops one thread of another process until it is let go.
fn stop(thread: Pid) {
    ptrace::seize(thread, ptrace::Options::empty()).expect("seizes");
    ptrace::interrupt(thread).expect("interrupts");
    waitpid(thread, Some(WaitPidFlag::__WALL)).expect("stops");
}

#[test]
fn systemd_hears_of_us_while_every_room_gets_on_and_no_longer() {
    if !cyrus::installed() {
        return;
    }
    let source = CyrusServer::start(Options::new().source().users(&["u1"])).expect("starts");
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let gate = Gate::before(replica.csync()).expect("listens");
    let config = format!("imapd_conf = {:?}\nreplica = [{:?}]\nlanes = 1\n", source.conf(), gate.url());
    let stage = Stage::new(Unit::read(&["spooltap.service"]), &config);
    // WatchdogSec= is a minute: half of it without a move is too long. Here everything is twelve times as fast.
    assert_eq!(stage.unit.get("WatchdogSec"), "60");
    let limit = Duration::from_millis(2500);
    let mut spooltap = stage.start(&[("WATCHDOG_USEC", (2 * limit.as_micros()).to_string())]);
    spooltap.wait_live(LONG).expect("is live");
    stage.told("READY=1");
    stage.told("WATCHDOG=1");

    // A replica that takes nothing for long is its own trouble, not ours.
    eventually(LONG, || idle(&stage.status().1["replicas"][0]).then_some(())).expect("is idle");
    gate.hold_after(0);
    let answers = source.lmtp().expect("connects").deliver(&["u1"], b"From: a@b\r\nSubject: s\r\n\r\nt\r\n");
    assert!(answers.expect("delivers")[0].starts_with('2'));
    assert!(gate.wait_held(LONG), "nothing is sent");
    let held = Instant::now();
    while held.elapsed() < limit * 2 {
        stage.told("WATCHDOG=1");
    }
    let (_, status) = stage.status();
    assert_eq!(status["replicas"][0]["running"], 1, "{status}");
    let named = status["wedged"].to_string();
    assert!(!named.contains("lane"), "{named}");
    gate.open();
    eventually(LONG, || idle(&stage.status().1["replicas"][0]).then_some(())).expect("is idle again");

    let rooms =
        [("router", "router"), ("lane-0", "lane 0 of"), ("capture-inotify", "capture by inotify"), ("state", "state")];
    let threads = rooms.map(|(thread_name, _)| thread(spooltap.pid(), thread_name));
    threads.iter().for_each(|thread| stop(*thread));
    let names = |status: &serde_json::Value| -> Vec<String> {
        let wedged = status["wedged"].as_array().into_iter().flatten();
        wedged.filter_map(|one| one["room"].as_str().map(str::to_owned)).collect()
    };
    for (at, (_, room)) in rooms.iter().enumerate() {
        let is_named = || names(&stage.status().1).iter().any(|name| name.starts_with(room));
        eventually(LONG, || is_named().then_some(())).unwrap_or_else(|| panic!("{room}: {}", stage.status().1));
        let (code, status) = stage.status();
        assert!(code == 2 && status["faults"].to_string().contains(room), "{code} {status}");
        // As long as this one stands still, nothing is told that would keep systemd from restarting us.
        stage.tellings();
        std::thread::sleep(Duration::from_millis(1200));
        let told = stage.tellings();
        assert!(!told.iter().any(|line| line == "WATCHDOG=1"), "{room}: {told:?}");
        ptrace::detach(threads[at], None).expect("lets go");
        eventually(LONG, || (!is_named()).then_some(())).unwrap_or_else(|| panic!("{room} is still named"));
    }
    stage.told("WATCHDOG=1");
    assert!(spooltap.log().contains("does not get on any more"), "{}", spooltap.log_end(5));
    let stopped = Instant::now();
    assert_eq!(spooltap.terminate().expect("ends").code(), Some(0));
    assert!(stopped.elapsed() < stage.unit.stop_timeout());
}
