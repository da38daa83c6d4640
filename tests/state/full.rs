//! The state on a full disk.

use super::*;
use crate::util::{eventually, full};
use std::time::Duration;

/// Set where the test runs a second time, inside.
const INSIDE: &str = "SPOOLTAP_FULL_DISK";

fn put(state: &State, numbers: std::ops::Range<u32>) {
    let replica = state.replica("r");
    for number in numbers {
        let head = MailboxHead { name: format!("user.u{number}").as_str().into(), ..MailboxHead::default() };
        let view = MailboxView { head, ..MailboxView::default() };
        let receipt = MailboxReceipt { view, ..MailboxReceipt::default() };
        replica.put_mailbox(&format!("id-{number}").as_str().into(), &receipt);
    }
}

fn has(state: &State, number: u32) -> bool {
    state.replica("r").mailbox(&format!("id-{number}").as_str().into()).is_some()
}

/// What was known stays known, what comes is kept, and all of it is written when there is room again.
fn on_a_full_disk(dir: &Path) {
    let place = dir.join("state");
    let state = State::open(&place, "store").expect("opens");
    put(&state, 0..200);
    state.flush();
    let filler = dir.join("filler");
    full::fill(&filler, 0);
    put(&state, 200..6000);
    state.flush();
    assert!(fs::metadata(place.join(FILE)).expect("is there").len() < 2 << 20, "the disk was not full");
    for number in [0, 100, 199, 200, 5999] {
        let known = eventually(Duration::from_secs(10), || has(&state, number).then_some(()));
        assert!(known.is_some(), "{number} is not known on a full disk");
    }
    fs::remove_file(&filler).expect("makes room");
    let size = || fs::metadata(place.join(FILE)).expect("is there").len();
    let written = eventually(Duration::from_secs(15), || {
        state.flush();
        (size() > 1 << 20).then_some(())
    });
    assert!(written.is_some(), "{} bytes", size());
    drop(state);
    let state = State::open(&place, "store").expect("opens");
    assert!((0..6000).all(|number| has(&state, number)));
    // A start on a full disk puts nothing aside.
    drop(state);
    full::fill(&filler, 0);
    drop(State::open(&place, "store"));
    fs::remove_file(&filler).expect("makes room");
    let state = State::open(&place, "store").expect("opens");
    assert!((0..6000).all(|number| has(&state, number)));
    assert!(!place.join("state.redb.aside").exists());
}

#[test]
fn a_full_disk_is_waited_out() {
    if let Some(dir) = std::env::var_os(INSIDE) {
        return on_a_full_disk(Path::new(&dir));
    }
    let dir = tempfile::tempdir().expect("directory");
    let Some(mut command) = full::small_disk(dir.path(), 6 << 10) else { return };
    command.arg(std::env::current_exe().expect("a path")).args(["state::full::a_full_disk_is_waited_out", "--exact"]);
    let output = command.arg("--nocapture").env(INSIDE, dir.path()).output().expect("runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
