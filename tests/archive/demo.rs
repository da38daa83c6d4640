//! `spooltap demo` as a user runs it: exit code and last line, with a true recording and with a false one.

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

fn demo(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_spooltap")).arg("demo").args(args).output().expect("runs");
    let text = String::from_utf8(output.stdout).expect("text") + &String::from_utf8_lossy(&output.stderr);
    (output.status.code(), text)
}

#[test]
fn the_demo_ends_with_equal() {
    let (code, text) = demo(&["--speed", "0"]);
    assert_eq!((code, text.lines().last()), (Some(0), Some("equal")), "{text}");
    assert!(text.lines().any(|line| line.contains(" ms  create mailbox user.u3.R11 ")), "{text}");
}

#[test]
fn a_planted_difference_is_found() {
    let dir = tempfile::tempdir().expect("directory");
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/replays/2.5.11-a");
    for file in ["base.tar.gz", "ops.jsonl.gz", "info.json"] {
        std::fs::copy(fixture.join(file), dir.path().join(file)).expect("copies");
    }
    let mut truth = String::new();
    let packed = std::fs::read(fixture.join("truth.jsonl.gz")).expect("reads");
    GzDecoder::new(&*packed).read_to_string(&mut truth).expect("unpacks");
    // The last step's message of 172 bytes is said to have 173.
    let (before, last) = truth.trim_end().rsplit_once('\n').expect("lines");
    let planted = last.replacen("\"size\":172}", "\"size\":173}", 1);
    assert_ne!(planted, last);
    let mut out = GzEncoder::new(Vec::new(), Compression::fast());
    write!(out, "{before}\n{planted}\n").expect("packs");
    std::fs::write(dir.path().join("truth.jsonl.gz"), out.finish().expect("packs")).expect("writes");
    let (code, text) = demo(&["--speed", "0", "--recording", dir.path().to_str().expect("text")]);
    assert_eq!((code, text.lines().last()), (Some(1), Some("not equal")), "{text}");
    assert!(text.contains("/ size: expected 173, found 172"), "{text}");
}
