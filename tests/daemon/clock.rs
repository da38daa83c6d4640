//! Somebody sets the clock of the machine.

use super::{Lab, idle};
use crate::util::cyrus;
use std::fs;

/// Shifts the wall clock of one process, and leaves the one alone that nobody can set.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

#[test]
fn a_clock_that_is_set_is_told_and_changes_arrive_all_the_same() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new(&["u1"]);
    lab.configure("");
    let clock = lab.dir.path().join("clock");
    fs::write(&clock, "+0").expect("writes");
    let environment = [
        ("LD_PRELOAD", FAKETIME.to_owned()),
        ("FAKETIME_TIMESTAMP_FILE", clock.display().to_string()),
        ("FAKETIME_NO_CACHE", "1".to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ("NO_FAKE_STAT", "1".to_owned()),
    ];
    let spooltap = lab.start(&environment);
    lab.deliver("u1");
    lab.becomes("equal", |code, replica| code == 0 && idle(replica));
    assert!(lab.status().1["ground"]["clock_jump_seconds"].is_null(), "{}", lab.status().1);
    // An hour forward, two hours back: steps within one correction count together.
    for (set, jumped) in [("+3600", 3600), ("-3600", -3600)] {
        fs::write(&clock, set).expect("writes");
        lab.deliver("u1");
        let told = |seconds: i64| (seconds - jumped).abs() < 10;
        let shown = lab.becomes(set, |_, replica| {
            idle(replica) && lab.status().1["ground"]["clock_jump_seconds"].as_i64().is_some_and(told)
        });
        let replica = &shown["replicas"][0];
        assert!(replica["lag_seconds"].as_f64().is_some_and(|lag| lag < 60.0), "{shown}");
        assert!(replica["lag_p99_seconds"].as_f64().is_some_and(|lag| lag < 60.0), "{shown}");
        lab.arrives("u1");
        assert!(spooltap.log().contains("the clock was set"), "{}", spooltap.log_end(5));
    }
    assert!(spooltap.terminate().expect("ends").success());
}
