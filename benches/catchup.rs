//! What a catch-up scan of a large store costs, against `find` walking and stat-ing the same tree in the same run.
//!
//! `cargo bench --bench catchup [-- nothing changed]`. `SPOOLTAP_BENCH_MAILBOXES` makes it smaller, `SPOOLTAP_BENCH_DIR`
//! keeps the store for the next time.

mod shared;
#[path = "../tests/util/mod.rs"]
mod util;

use anyhow::{Context, ensure};
use shared::{Bench, Pushed, report, timed};
use spooltap::engine;
use spooltap::model::MailStore;
use spooltap::state::ReplicaState;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const BENCHES: &[Bench] = &[
    ("nothing", "catch-up with nothing changed", nothing),
    ("changed", "catch-up with 100 mailboxes changed, and their push to an archive", changed),
];

const ROUNDS: usize = 7;

fn main() -> anyhow::Result<()> {
    shared::run(BENCHES)
}

/// The peer: every entry, and all of stat.
fn find(base: &Path) -> anyhow::Result<Duration> {
    let mut command = Command::new("find");
    command.arg(base).args(["-printf", "%i %s %T@ %p\\n"]).stdout(Stdio::null());
    let (took, status) = timed(|| command.status().context("find"))?;
    ensure!(status.success(), "find: {status}");
    Ok(took)
}

fn differ(store: &dyn MailStore, state: &ReplicaState) -> anyhow::Result<usize> {
    Ok(engine::scan(store, state, None)?.differ.len())
}

fn nothing() -> anyhow::Result<()> {
    let pushed = Pushed::make()?;
    let (mut inside, mut whole) = (Vec::new(), Vec::new());
    // As the daemon does it, which knows the list; one round more than counts.
    {
        let (store, state) = pushed.open()?;
        let replica = state.replica(&pushed.url);
        for round in 0..=ROUNDS {
            let (our, found) = timed(|| differ(&store, &replica))?;
            ensure!(found == 0, "{found} things differ");
            let their = find(&pushed.store.base)?;
            inside.extend((round > 0).then_some((our, their)));
        }
    }
    for round in 0..=ROUNDS {
        let (our, text) = pushed.spooltap(&["scan"])?;
        ensure!(text.contains(" 0 things differ"), "{text}");
        let their = find(&pushed.store.base)?;
        whole.extend((round > 0).then_some((our, their)));
    }
    report("catch-up of a daemon", "find -printf", &inside);
    report("spooltap scan, from start to end", "find -printf", &whole);
    Ok(())
}

fn changed() -> anyhow::Result<()> {
    const CHANGED: usize = 100;
    let pushed = Pushed::make()?;
    let mut rounds = Vec::new();
    for round in 0..=ROUNDS {
        for n in 0..CHANGED {
            let header = pushed.store.dir(n * (pushed.store.mailboxes / CHANGED)).join("cyrus.header");
            // As Cyrus writes it: beside it, then in its place.
            let beside = header.with_extension("header.NEW");
            fs::copy(&header, &beside)?;
            fs::rename(&beside, &header)?;
        }
        let (_, text) = pushed.spooltap(&["scan"])?;
        ensure!(text.contains(" 100 things differ"), "{text}");
        let (our, _) = pushed.spooltap(&["push", "-A"])?;
        let their = find(&pushed.store.base)?;
        let (_, text) = pushed.spooltap(&["scan"])?;
        ensure!(text.contains(" 0 things differ"), "{text}");
        rounds.extend((round > 0).then_some((our, their)));
    }
    report("push -A with 100 changed", "find -printf", &rounds);
    Ok(())
}
