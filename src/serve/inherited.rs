//! Sockets that somebody else has opened for us: systemd by socket activation, or Cyrus's `master` for a SERVICES entry.
#![allow(unsafe_code)]

use super::Listener;
use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

/// Where systemd's begin.
const SYSTEMD: RawFd = 3;
/// Where `master` puts its one (`LISTEN_FD` of Cyrus).
const MASTER: RawFd = 4;

/// All of them; empty when nobody has handed over any. To be called once, before anything else is opened.
pub fn listeners() -> Vec<Listener> {
    let number = |key: &str| std::env::var(key).ok().and_then(|text| text.parse::<i64>().ok());
    let first = if number("LISTEN_PID") == Some(i64::from(std::process::id())) {
        let count = number("LISTEN_FDS").and_then(|count| RawFd::try_from(count).ok()).unwrap_or(0);
        SYSTEMD..SYSTEMD.saturating_add(count.clamp(0, 16))
    } else if std::env::var_os("CYRUS_SERVICE").is_some() {
        MASTER..MASTER + 1
    } else {
        0..0
    };
    first.filter_map(listener).collect()
}

fn listener(fd: RawFd) -> Option<Listener> {
    let what = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    if !what.to_string_lossy().starts_with("socket:") {
        return None;
    }
    // SAFETY: the descriptor is open, as /proc has just said, and it is ours alone: it was handed over at the start of
    // this process, and this is called once, before anything here could have been given the same number.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let tcp = TcpListener::from(fd);
    // Only an address of the internet says that it is one.
    if tcp.local_addr().is_ok() {
        return Some(Listener::Tcp(tcp));
    }
    Some(Listener::Unix(UnixListener::from(OwnedFd::from(tcp))))
}
