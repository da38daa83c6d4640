//! The figures for Prometheus: what its own tool says of the page, of the alerts, and whether the lag is true.

use super::{LONG, Lab, idle};
use crate::util::{CyrusServer, Gate, Options, Spooltap, cyrus, eventually};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Debian's promtool; `tests/run` says where it is, and that there has to be one.
fn promtool() -> Option<Command> {
    let named = std::env::var_os("SPOOLTAP_PROMTOOL").map(PathBuf::from);
    let program = named.unwrap_or_else(|| "/usr/bin/promtool".into());
    if program.exists() {
        return Some(Command::new(program));
    }
    assert!(std::env::var_os("SPOOLTAP_REQUIRE_CYRUS").is_none(), "promtool is missing: see tests/run");
    let _ = std::io::stderr().write_all(b"SKIPPED: needs promtool, see tests/run\n");
    None
}

#[track_caller]
fn is_content(output: &Output) {
    let said = [output.stdout.clone(), output.stderr.clone()].concat();
    let said = String::from_utf8_lossy(&said);
    // It ends with 0 when all it has to say is advice; there is to be none.
    assert!(output.status.success() && !said.contains("should"), "{said}");
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("connects");
    stream.write_all(request.as_bytes()).expect("writes");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("reads");
    answer
}

fn scrape(address: SocketAddr) -> String {
    let answer = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    answer.split_once("\r\n\r\n").expect("head and body").1.to_owned()
}

/// The value of a sample.
#[track_caller]
fn sample(page: &str, name: &str, labels: &[&str]) -> f64 {
    let is_it = |line: &&str| line.starts_with(&format!("{name}{{")) && labels.iter().all(|label| line.contains(label));
    let line = page.lines().find(is_it).unwrap_or_else(|| panic!("{name} {labels:?} is not in {page}"));
    line.rsplit_once(' ').and_then(|(_, value)| value.parse().ok()).expect("a number")
}

#[test]
fn figures_for_prometheus_over_http_and_as_a_file() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new(&["u1"]);
    let address = free_address();
    let file = lab.dir.path().join("spooltap.prom");
    lab.configure(&format!("metrics_listen = \"{address}\"\nmetrics_file = {:?}\n", file));
    let _spooltap = lab.start(&[]);
    lab.deliver("u1");
    lab.becomes("equal", |code, replica| code == 0 && idle(replica) && replica["confirmed_total"].as_u64() > Some(0));
    let ask = |request: &str| ask(address, request);
    let answer = ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, page) = answer.split_once("\r\n\r\n").expect("head and body");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    check_exposition(page);
    if let Some(mut promtool) = promtool() {
        let child = promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = child.stderr(Stdio::piped()).spawn().expect("starts");
        child.stdin.take().expect("piped").write_all(page.as_bytes()).expect("writes");
        is_content(&child.wait_with_output().expect("ends"));
    }
    let replica = format!("{{replica=\"{}\"}}", lab.replica());
    assert!(page.contains(&format!("spooltap_replica_lag_seconds{replica} 0\n")), "{page}");
    assert!(page.contains(&format!("spooltap_replica_usable{replica} 1\n")), "{page}");
    assert!(ask("GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(ask("POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    check_exposition(&fs::read_to_string(file).expect("the text file"));
}

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    let Some(mut promtool) = promtool() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rules = root.join("docs/monitoring/rules.yml");
    is_content(&promtool.args(["check", "rules"]).arg(&rules).output().expect("runs"));
    let tests = root.join("tests/daemon/rules.test.yml");
    let output = Command::new(promtool.get_program()).args(["test", "rules"]).arg(&tests).output().expect("runs");
    is_content(&output);
    // Each of them has a case in which it fires.
    let (rules, tests) = (fs::read_to_string(rules).expect("reads"), fs::read_to_string(tests).expect("reads"));
    let names: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() >= 8, "{names:?}");
    for name in names {
        let fires = tests.split("alertname: ").any(|case| {
            case.starts_with(&format!("{name}\n")) && case.lines().any(|line| line.trim().starts_with("- exp_labels"))
        });
        assert!(fires, "{name} never fires in tests/daemon/rules.test.yml");
    }
}

/// The lag as it is told is compared with the time since the change, as whoever made it has measured it.
#[test]
fn the_lag_is_never_lower_than_the_truth() {
    if !cyrus::installed() {
        return;
    }
    let source = CyrusServer::start(Options::new().source().users(&["u1"])).expect("starts");
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let gate = Gate::before(replica.csync()).expect("listens");
    let dir = tempfile::tempdir().expect("directory");
    let (conf, state) = (dir.path().join("spooltap.toml"), dir.path().join("state"));
    let address = free_address();
    fs::write(&conf, format!("metrics_listen = \"{address}\"\nreplica = [{:?}]\n", gate.url())).expect("writes");
    let start = || {
        let mut command = Spooltap::command(&source.conf(), &state);
        command.arg("--config").arg(&conf).arg("run");
        let mut spooltap = Spooltap::spawn(command, &state).expect("starts");
        spooltap.wait_live(LONG).expect("is live");
        spooltap
    };
    let lag = || sample(&scrape(address), "spooltap_replica_lag_seconds", &[]);
    let spooltap = start();
    eventually(LONG, || (idle(&spooltap.status()["replicas"][0]) && lag() == 0.0).then_some(())).expect("is idle");

    gate.hold_after(0);
    let begun = Instant::now();
    let answers = source.lmtp().expect("connects").deliver(&["u1"], b"From: a@b\r\nSubject: s\r\n\r\nt\r\n");
    assert!(answers.expect("delivers")[0].starts_with('2'));
    let changed = Instant::now();
    assert!(gate.wait_held(LONG), "nothing is sent");
    // What the kernel tells has to be read by somebody: that long a change is not known.
    let unknown = Duration::from_secs(1);
    let compare = |most: Duration| {
        let before = changed.elapsed();
        let told = lag();
        let after = begun.elapsed();
        assert!(told + unknown.as_secs_f64() >= before.as_secs_f64(), "{told} s told, it is {before:?}");
        assert!(told <= (after + most).as_secs_f64(), "{told} s told, it is {after:?}");
    };
    while changed.elapsed() < Duration::from_secs(4) {
        compare(Duration::ZERO);
        std::thread::sleep(Duration::from_millis(250));
    }
    // Over a death as well: then it counts from the last moment of which is known that all was confirmed.
    spooltap.kill9();
    let spooltap = start();
    compare(Duration::from_secs(90));
    let held = changed.elapsed();
    gate.open();
    eventually(LONG, || (idle(&spooltap.status()["replicas"][0]) && lag() == 0.0).then_some(())).expect("is idle");
    let url = gate.url();
    let confirmed = || sample(&scrape(address), "spooltap_replica_stage_lag_seconds_count", &[&url, "confirmed"]);
    eventually(LONG, || (confirmed() > 0.0).then_some(())).expect("is counted");

    // A change that is held up on the wire is read at once, and confirmed late.
    let replica = format!("replica=\"{url}\"");
    let count = |stage: &str, bound: &str| {
        let (stage, bound) = (format!("stage=\"{stage}\""), format!("le=\"{bound}\""));
        sample(&scrape(address), "spooltap_replica_stage_lag_seconds_bucket", &[&replica, &stage, &bound])
    };
    let slow = |stage: &str| count(stage, "+Inf") - count(stage, "2.5");
    let before = ["seen", "read", "sent", "confirmed"].map(slow);
    gate.hold_after(0);
    let answers = source.lmtp().expect("connects").deliver(&["u1"], b"From: a@b\r\nSubject: s2\r\n\r\nt\r\n");
    assert!(answers.expect("delivers")[0].starts_with('2'));
    assert!(gate.wait_held(LONG), "nothing is sent");
    std::thread::sleep(Duration::from_secs(3));
    gate.open();
    let confirmed = || slow("confirmed") > before[3] && idle(&spooltap.status()["replicas"][0]) && lag() == 0.0;
    eventually(LONG, || confirmed().then_some(())).expect("it was slow to be confirmed");
    // Held up on the wire, and not before; but for what was noticed of it while its lane was already at work.
    let [seen, read, _, confirmed] = ["seen", "read", "sent", "confirmed"].map(slow);
    assert_eq!(seen, before[0]);
    assert!(confirmed - before[3] > read - before[2], "{read} read, {confirmed} confirmed; before: {before:?}");
    assert!(held > Duration::ZERO);
    assert_eq!(status_of(&spooltap)["stages"][3]["stage"], "confirmed");
}

fn status_of(spooltap: &Spooltap) -> Value {
    spooltap.status()["replicas"][0].clone()
}

/// The text format: HELP, TYPE, then the samples of that family; a histogram's buckets ascend and end in the count.
fn check_exposition(page: &str) {
    let mut family = (String::new(), String::new());
    let mut seen = BTreeSet::new();
    let mut below: Option<f64> = None;
    assert!(page.ends_with('\n'));
    for line in page.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", "HELP", name, _] => family = (name.to_owned(), String::new()),
            ["#", "TYPE", name, kind] => {
                assert_eq!(name, family.0);
                assert!(["gauge", "counter", "histogram"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                family.1 = kind.to_owned();
            }
            _ => {
                let (sample, value) = line.rsplit_once(' ').expect("name and value");
                let value: f64 = value.parse().expect("a number");
                let (name, labels) = sample.split_once('{').unwrap_or((sample, "}"));
                let suffix = name.strip_prefix(family.0.as_str()).unwrap_or_else(|| panic!("{line} in {}", family.0));
                let suffixes: &[&str] = if family.1 == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                assert!(suffixes.contains(&suffix), "{line}");
                assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{line}");
                assert!(labels.ends_with('}') && seen.insert(sample.to_owned()), "{line}");
                match suffix {
                    "_bucket" => {
                        assert!(below.is_none_or(|below| below <= value), "{line}");
                        below = Some(value);
                    }
                    "_count" => assert_eq!(below.take(), Some(value), "{line}"),
                    _ => {}
                }
            }
        }
    }
    assert!(seen.len() > 20, "{page}");
}
