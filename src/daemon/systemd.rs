//! What systemd is told, through `$NOTIFY_SOCKET`; nothing where there is none.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Sends one notification, for example `READY=1`.
pub(super) fn notify(message: &str) {
    let Ok(path) = std::env::var("NOTIFY_SOCKET") else { return };
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    if let (Ok(address), Ok(socket)) = (address, UnixDatagram::unbound()) {
        let _ = socket.send_to_addr(message.as_bytes(), &address);
    }
}

/// `Type=notify-reload` wants the time, on the clock that it compares with.
pub(super) fn notify_reloading() {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    let micros = now.map_or(0, |now| now.tv_sec().unsigned_abs() * 1_000_000 + now.tv_nsec().unsigned_abs() / 1000);
    notify(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
}

/// The unit's `WatchdogSec=`, if it has one and it is meant for this process.
pub(super) fn watchdog() -> Option<Duration> {
    let own = std::process::id().to_string();
    let micros = std::env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    std::env::var("WATCHDOG_PID").map_or(true, |pid| pid == own).then(|| Duration::from_micros(micros))
}
