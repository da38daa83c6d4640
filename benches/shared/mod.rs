//! What the benches share: a large store that needs no Cyrus (`large`), and how figures are taken and shown.

// Each bench uses a part of it.
#![allow(dead_code, unused_imports)]

pub mod large;

pub use large::{LargeStore, Pushed};

use anyhow::ensure;
use std::process::Output;
use std::time::{Duration, Instant};

/// Name, what it measures, how.
pub type Bench = (&'static str, &'static str, fn() -> anyhow::Result<()>);

/// Runs those that the command line names, or all.
pub fn run(benches: &[Bench]) -> anyhow::Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    for (name, what, run) in benches {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            println!("{name}: {what}");
            run()?;
        }
    }
    Ok(())
}

/// A number from the environment, for a quick look at a smaller size.
pub fn size(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

pub fn done(what: &str, output: &Output) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what} ended with {}: {said}", output.status);
    Ok(())
}

pub fn timed<T>(run: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(Duration, T)> {
    let since = Instant::now();
    let result = run()?;
    Ok((since.elapsed(), result))
}

/// The medians, and the median of the ratios of the rounds: how often ours fits into theirs.
pub fn report(our_name: &str, their_name: &str, rounds: &[(Duration, Duration)]) {
    let sorted = |pick: fn(&(Duration, Duration)) -> Duration| {
        let mut all: Vec<Duration> = rounds.iter().map(pick).collect();
        all.sort_unstable();
        all
    };
    let mut ratios: Vec<f64> = rounds.iter().map(|(our, their)| ms(*their) / ms(*our)).collect();
    ratios.sort_by(f64::total_cmp);
    println!(
        "  {our_name} {:.2} ms, {their_name} {:.0} ms, ratio {:.2} ({:.2} to {:.2} in {} rounds)",
        ms(at(&sorted(|round| round.0), 50)),
        ms(at(&sorted(|round| round.1), 50)),
        ratios[ratios.len() / 2],
        ratios[0],
        ratios[ratios.len() - 1],
        rounds.len()
    );
}

pub fn at(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
