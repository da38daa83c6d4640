//! The program under test, as a process of its own.

use super::cyrus::PASSWORD;
use super::eventually;
use super::process::Group;
use anyhow::{Context, anyhow};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;

/// A `spooltap run` in the background.
pub struct Spooltap {
    group: Group,
    state: PathBuf,
    log: PathBuf,
    /// What the log held when this one started.
    before: usize,
}

impl Spooltap {
    /// `spooltap -C CONF --state STATE`, with the password of our replicas in the environment.
    pub fn command(conf: &Path, state: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spooltap"));
        command.arg("-C").arg(conf).arg("--state").arg(state).env("SPOOLTAP_PASSWORD", PASSWORD);
        command.env_remove("SPOOLTAP_LOG").env("SPOOLTAP_CONFIG", "/dev/null").stdin(Stdio::null());
        command
    }

    /// Runs a command that ends by itself, `push -A` for example.
    pub fn once(conf: &Path, replica: &str, state: &Path, arguments: &[&str]) -> anyhow::Result<Output> {
        Ok(Self::command(conf, state).args(["--replica", replica]).args(arguments).output()?)
    }

    /// Starts `spooltap run`; what it says is added to `STATE.log`.
    pub fn run(conf: &Path, replica: &str, state: &Path) -> anyhow::Result<Self> {
        Self::run_with(conf, replica, state, &[])
    }

    /// The same with more arguments, `--capture poll` for example.
    pub fn run_with(conf: &Path, replica: &str, state: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Self::command(conf, state);
        command.args(["--replica", replica]).args(arguments).arg("run");
        Self::spawn(command, state)
    }

    /// Starts a command in the background; what it says is added to `STATE.log`.
    pub fn spawn(mut command: Command, state: &Path) -> anyhow::Result<Self> {
        let log = state.with_extension("log");
        let file = fs::OpenOptions::new().create(true).append(true).open(&log)?;
        let before = file.metadata()?.len() as usize;
        command.stdout(file.try_clone()?).stderr(file);
        Ok(Self { group: Group::spawn(&mut command)?, state: state.to_owned(), log, before })
    }

    /// Waits until it follows the source live.
    pub fn wait_live(&mut self, limit: Duration) -> anyhow::Result<()> {
        let said = |run: &Self| run.log().get(run.before..).is_some_and(|log| log.contains(" live\n"));
        let live = eventually(limit, || (said(self) || self.ended().is_some()).then(|| self.ended()));
        match live {
            Some(None) => Ok(()),
            _ => Err(anyhow!("spooltap is not live: {}", self.log())),
        }
    }

    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.group.ended()
    }

    /// SIGTERM, and how it ended.
    pub fn terminate(mut self) -> anyhow::Result<ExitStatus> {
        self.group.signal(Signal::SIGTERM);
        eventually(Duration::from_secs(20), || self.group.ended())
            .with_context(|| format!("spooltap does not end: {}", self.log()))
    }

    pub fn kill9(mut self) {
        self.group.kill9();
    }

    pub fn pid(&self) -> i32 {
        self.group.pid().as_raw()
    }

    /// All it said so far, of earlier starts with the same state as well.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The last lines of it.
    pub fn log_end(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// `status.json`, or null while there is none.
    pub fn status(&self) -> Value {
        let text = fs::read_to_string(self.state.join("status.json")).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }
}
