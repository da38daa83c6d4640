//! Archives in a bucket, over HTTP: there and back, through outages and deaths, and what is said when it refuses.

use super::super::push::rules;
use super::super::util::s3::{BUCKET, S3};
use super::super::util::store::{Store, store};
use super::super::util::{CyrusServer, Options, Spooltap, cyrus, diff, eventually, snapshot};
use super::restore;
use spooltap::archive::{Archive, ArchiveStore};
use spooltap::replay::{Depth, Player, Recording, Speed, compare_replica};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

const URL: &str = "s3://mail/store";
const LIMIT: Duration = Duration::from_secs(60);

fn push(source: &Store, state: &Path, url: &str, variables: &[(&str, String)]) -> Output {
    let mut command = Spooltap::command(&source.conf, state);
    command.envs(variables.iter().map(|(key, value)| (*key, value))).args(["--replica", url, "push", "-A"]);
    command.output().expect("runs")
}

fn ended(output: &Output, exit: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(exit), "{said}");
    said
}

#[test]
fn a_store_goes_to_a_bucket_and_comes_back() {
    if !cyrus::installed() {
        return;
    }
    let (s3, place, source) = (S3::start().expect("S3"), tempfile::tempdir().expect("directory"), store("3.6.1-a"));
    let state = place.path().join("state");
    ended(&push(&source, &state, URL, &s3.variables()), 0);
    // The bucket holds it, and not a folder of that name in somebody's working directory.
    assert!(s3.folder("store/archive.json").is_file());
    let server = CyrusServer::start(Options::new().names_of(&source.conf, &source.release)).expect("starts");
    let variables = s3.variables();
    let from_bucket = |command: &mut Command| command.envs(variables.clone()).output().expect("runs");
    ended(&from_bucket(&mut restore::command(URL, &server, &state)), 0);
    let shown = snapshot(&server, &source.users()).expect("is read");
    let differences = diff(&source.truth, &shown, &rules(&source.release));
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    let mut verify = Spooltap::command(&source.conf, &state);
    ended(&from_bucket(verify.args(["--replica", URL, "verify"])), 0);
}

#[test]
fn outages_and_deaths_leave_the_bucket_whole() {
    let (mut s3, dir) = (S3::start().expect("S3"), tempfile::tempdir().expect("directory"));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/replays/2.5.11-a");
    let recording = Recording::open(&folder).expect("recording");
    let conf = recording.unpack(&dir.path().join("source")).expect("unpacks");
    let state = dir.path().join("state");
    let variables = s3.variables();
    let start = || {
        let mut command = Spooltap::command(&conf, &state);
        command.envs(variables.clone()).args(["--replica", URL, "--allow-removals", "run"]);
        Spooltap::spawn(command, &state).expect("starts")
    };
    let mut player = Player::new(&recording, &dir.path().join("source"));
    let (mut run, mut marks, mut outages) = (start(), 0, 0);
    run.wait_live(LIMIT).expect("is live");
    while player.next_mark(Speed::Recorded(40.0)).expect("plays").is_some() {
        marks += 1;
        match marks % 12 {
            4 => s3.stop(),
            7 => {
                s3.go_on().expect("goes on");
                outages += 1;
            }
            10 => {
                run.kill9();
                run = start();
            }
            _ => {}
        }
    }
    assert!(outages >= 2, "{outages}");
    s3.stop();
    s3.go_on().expect("goes on");
    let (_, truth) = recording.truths().last().expect("has marks").expect("reads");
    let found = || {
        let archive = Archive::open(&format!("file://{}", s3.folder("store").display())).expect("opens");
        match ArchiveStore::open(archive) {
            Ok(kept) => compare_replica(&kept, &truth, Depth::Bodies).unwrap_or_else(|error| vec![error.to_string()]),
            Err(error) => vec![error.to_string()],
        }
    };
    let equal = eventually(LIMIT, || found().is_empty().then_some(()));
    assert!(equal.is_some(), "{}\n{}", found().join("\n"), run.log_end(40));
    assert!(run.terminate().expect("ends").success());
}

#[test]
fn a_bucket_that_will_not_have_us_is_named_with_its_reason() {
    let (mut s3, place, source) = (S3::start().expect("S3"), tempfile::tempdir().expect("directory"), store("3.6.1-a"));
    let state = place.path().join("state");
    let with = |key: &str, value: &str| {
        let mut variables = s3.variables();
        variables.iter_mut().filter(|(name, _)| *name == key).for_each(|(_, old)| *old = value.to_owned());
        variables
    };
    let said = ended(&push(&source, &state, URL, &with("AWS_SECRET_ACCESS_KEY", "wrong")), 77);
    assert!(said.contains(URL) && said.contains("SignatureDoesNotMatch"), "{said}");
    s3.stop();
    let said = ended(&push(&source, &state, URL, &s3.variables()), 69);
    assert!(said.contains(URL), "{said}");
    assert!(!said.contains("only for tests"), "{said}");
    assert_eq!(std::fs::read_dir(s3.folder("")).expect("bucket").count(), 0, "of {BUCKET}");
}
