//! How far away a client is, as the kernel has measured it while the connection was made.

use nix::libc::{self, IPPROTO_TCP, TCP_INFO};
use nix::sys::socket::getsockopt;
use nix::{getsockopt_impl, sockopt_impl};
use std::net::TcpStream;
use std::time::Duration;

/// `struct tcp_info` of linux/tcp.h up to `tcpi_rttvar`: every kernel has that much of it.
type Info = [u32; 19];

/// Of `tcpi_rtt`, microseconds.
const RTT: usize = 17;

sockopt_impl!(TcpInfo, GetOnly, IPPROTO_TCP, TCP_INFO, Info);

/// The round trip; nothing where it is not known.
pub(super) fn round_trip(stream: &TcpStream) -> Duration {
    let info = getsockopt(stream, TcpInfo).unwrap_or_default();
    Duration::from_micros(info.get(RTT).copied().unwrap_or_default().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn this_machine_is_near_and_yet_not_at_no_distance() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
        let _client = TcpStream::connect(listener.local_addr().expect("address")).expect("connects");
        let (stream, _) = listener.accept().expect("accepts");
        let round_trip = round_trip(&stream);
        assert!(!round_trip.is_zero() && round_trip < Duration::from_millis(500), "{round_trip:?}");
    }
}
