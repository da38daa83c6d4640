//! A network before a replica: counts what goes to it, message by message, and can hold it up at a given byte.

use super::cyrus::REPLICATOR;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Listens on an address of its own for as long as the test runs.
pub struct Gate {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    sent: u64,
    /// Not a byte more than this is let through.
    limit: u64,
    /// Each piece is held up so long.
    delay: Duration,
    /// Connections from before the last cut carry nothing any more.
    cuts: u64,
    /// How often the body of this GUID was sent, and its size.
    bodies: BTreeMap<String, (u64, u64)>,
}

/// Bodies sent so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    pub count: u64,
    pub bytes: u64,
    /// Of these, what had been sent before.
    pub repeated_bytes: u64,
}

impl Gate {
    /// In front of the server at this address.
    pub fn before(server: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = State { sent: 0, limit: u64::MAX, delay: Duration::ZERO, cuts: 0, bodies: BTreeMap::new() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let all = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (shared, cuts) = (all.clone(), all.state.lock().expect("lock").cuts);
                std::thread::spawn(move || {
                    let _ = carry(&shared, cuts, client, server);
                });
            }
        });
        Ok(Self { address, shared })
    }

    /// The URL of the replica behind it.
    pub fn url(&self) -> String {
        format!("csync://{REPLICATOR}@{}", self.address)
    }

    pub fn sent_bytes(&self) -> u64 {
        self.shared.state.lock().expect("lock").sent
    }

    pub fn bodies(&self) -> Sent {
        let mut out = Sent::default();
        for (count, size) in self.shared.state.lock().expect("lock").bodies.values() {
            out.count += count;
            out.bytes += count * size;
            out.repeated_bytes += (count - 1) * size;
        }
        out
    }

    /// Lets so many bytes more through, then nothing.
    pub fn hold_after(&self, bytes: u64) {
        let mut state = self.shared.state.lock().expect("lock");
        state.limit = state.sent + bytes;
        self.shared.changed.notify_all();
    }

    /// Waits until it holds something up; false when nothing more came in that time.
    pub fn wait_held(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.shared.state.lock().expect("lock");
        while state.sent < state.limit {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.shared.changed.wait_timeout(state, left).expect("lock").0;
        }
        true
    }

    /// From now on each piece (of 4 KiB at most) is held up so long.
    pub fn delay(&self, delay: Duration) {
        self.shared.state.lock().expect("lock").delay = delay;
    }

    /// Breaks all connections and forgets what was held up; new ones are carried without limit.
    pub fn cut(&self) {
        let mut state = self.shared.state.lock().expect("lock");
        state.cuts += 1;
        state.limit = u64::MAX;
        self.shared.changed.notify_all();
    }

    /// Lets everything through again.
    pub fn open(&self) {
        self.shared.state.lock().expect("lock").limit = u64::MAX;
        self.shared.changed.notify_all();
    }
}

fn carry(shared: &Shared, cuts: u64, mut client: TcpStream, server: SocketAddr) -> std::io::Result<()> {
    let mut server = TcpStream::connect(server)?;
    server.set_nodelay(true)?;
    client.set_nodelay(true)?;
    let (mut from, mut to) = (server.try_clone()?, client.try_clone()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
    let (mut scan, mut buffer) = (Scan::default(), [0; 4096]);
    loop {
        let count = client.read(&mut buffer).unwrap_or_default();
        let mut bytes = &buffer[..count];
        if bytes.is_empty() {
            return server.shutdown(Shutdown::Both);
        }
        let delay = shared.state.lock().expect("lock").delay;
        std::thread::sleep(delay);
        while !bytes.is_empty() {
            let mut state = shared.state.lock().expect("lock");
            while state.sent >= state.limit && state.cuts == cuts {
                state = shared.changed.wait(state).expect("lock");
            }
            if state.cuts != cuts {
                let _ = client.shutdown(Shutdown::Both);
                return server.shutdown(Shutdown::Both);
            }
            let now = bytes.len().min(usize::try_from(state.limit - state.sent).unwrap_or(usize::MAX));
            let (first, rest) = bytes.split_at(now);
            state.sent += now as u64;
            for (guid, size) in scan.bodies(first) {
                state.bodies.entry(guid).or_insert((0, size)).0 += 1;
            }
            drop(state);
            shared.changed.notify_all();
            server.write_all(first)?;
            bytes = rest;
        }
    }
}

/// Finds `%{PARTITION GUID SIZE}` in a stream, and leaves out the bodies that follow.
#[derive(Default)]
struct Scan {
    line: Vec<u8>,
    skip: u64,
}

impl Scan {
    fn bodies(&mut self, mut bytes: &[u8]) -> Vec<(String, u64)> {
        let mut out = Vec::new();
        while let Some((&byte, rest)) = bytes.split_first() {
            if self.skip > 0 {
                let skipped = bytes.len().min(usize::try_from(self.skip).unwrap_or(usize::MAX));
                self.skip -= skipped as u64;
                bytes = &bytes[skipped..];
                continue;
            }
            bytes = rest;
            self.line.push(byte);
            if byte != b'\n' {
                continue;
            }
            if let Some((guid, size)) = body_head(&std::mem::take(&mut self.line)) {
                self.skip = size;
                out.push((guid, size));
            }
        }
        out
    }
}

fn body_head(line: &[u8]) -> Option<(String, u64)> {
    let line = String::from_utf8_lossy(line);
    let head = line.strip_suffix("}\r\n")?.rsplit_once("%{")?.1;
    let [_, guid, size] = head.split(' ').collect::<Vec<_>>()[..] else { return None };
    Some((guid.to_owned(), size.parse().ok()?))
}

#[test]
fn bodies_are_counted_across_any_cut() {
    let guid = "de1a24f844ec1fb8728748225d649c3655d68214";
    let stream =
        format!("APPLY MESSAGE (%{{default {guid} 9}}\r\n%{{a b 1}}\r %{{default {guid} 2}}\r\n\r\n)\r\nNOOP\r\n");
    for at in 0..stream.len() {
        let (mut scan, (one, two)) = (Scan::default(), stream.as_bytes().split_at(at));
        let found: Vec<_> = scan.bodies(one).into_iter().chain(scan.bodies(two)).collect();
        assert_eq!(found, [(guid.to_owned(), 9), (guid.to_owned(), 2)], "cut at {at}");
    }
}
