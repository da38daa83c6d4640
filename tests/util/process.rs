//! Processes that end with the test, however it ends.

use super::eventually;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::Duration;

/// A process, all that it starts, and a shell that kills them when the pipe from us closes.
pub struct Group {
    leader: Child,
    guardian: Child,
}

impl Group {
    pub fn spawn(command: &mut Command) -> std::io::Result<Self> {
        let leader = command.process_group(0).spawn()?;
        let guardian = Command::new("/bin/sh")
            .arg("-c")
            .arg(format!("read -r _; kill -9 -{}", leader.id()))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Self { leader, guardian })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.leader.id() as i32)
    }

    /// The first process's, where it was asked for.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.leader.stdin.take()
    }

    /// The processes that are alive, with their names.
    pub fn members(&self) -> Vec<(Pid, String)> {
        members(self.pid())
    }

    /// To the first process only.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(self.pid(), signal);
    }

    /// How the first process ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.leader.try_wait().ok().flatten()
    }

    /// Kills all of them and waits until they are gone.
    pub fn kill9(&mut self) {
        let _ = self.guardian.kill();
        let _ = self.guardian.wait();
        let group = self.pid();
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.leader.wait();
        eventually(Duration::from_secs(5), || members(group).is_empty().then_some(()));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill9();
    }
}

pub fn members(group: Pid) -> Vec<(Pid, String)> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let found = processes.flatten().filter_map(|entry| {
        let id: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let (head, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let (state, _, pgrp) = (fields.next()?, fields.next()?, fields.next()?);
        let alive = state != "Z" && pgrp.parse() == Ok(group.as_raw());
        alive.then(|| (Pid::from_raw(id), head.split_once('(').map(|(_, comm)| comm.to_owned()).unwrap_or_default()))
    });
    found.collect()
}
