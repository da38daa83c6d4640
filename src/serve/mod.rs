//! The other end of csync: a server in front of any `Replica`, for real `sync_client`s and for `spooltap run`.
//!
//! `Server` listens and keeps the limits, `wire` moves bytes, `connection` speaks, `login` decides who may, `session` turns requests
//! into steps, `stage` keeps bodies between `MESSAGE` and the `MAILBOX` that needs them, `names` refuses what must not
//! become a path. Each connection has a thread and a session of its own with the replica.

mod connection;
mod distance;
mod inherited;
mod login;
mod names;
mod session;
mod stage;
mod tls;
mod wire;

pub use inherited::listeners as inherited_listeners;
pub use login::{Logins, LoginsError};
pub use tls::server_config;

use crate::config::{ClearText, Compress};
use crate::model::{ReplicaError, ReplicaTarget};
use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// What a client may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections that are logged in.
    pub connections: usize,
    /// Connections that are not; of more, the oldest has to go.
    pub strangers: usize,
    /// Longest time from connecting to being logged in.
    pub login: Duration,
    /// Longest silence of a client.
    pub silence: Duration,
    /// Longest request, files not counted.
    pub request_bytes: usize,
    /// Requests and small bodies of all connections in memory.
    pub memory_bytes: usize,
    /// Bodies that one connection may have staged.
    pub staged_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 100,
            strangers: 50,
            login: Duration::from_secs(30),
            silence: Duration::from_secs(1800),
            request_bytes: 256 << 20,
            memory_bytes: 1 << 30,
            staged_bytes: 64 << 30,
        }
    }
}

/// How a server is set up.
pub struct Settings {
    /// Stands in the greeting.
    pub name: String,
    pub logins: Logins,
    pub limits: Limits,
    /// Where large bodies wait, as files without names.
    pub stage: PathBuf,
    /// Our certificate, if TLS is offered.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Where a password may be said without TLS.
    pub cleartext: ClearText,
    /// To whom compression is offered.
    pub compress: Compress,
}

/// Where clients come in.
pub enum Listener {
    /// They log in.
    Tcp(TcpListener),
    /// Whoever may open the socket is an administrator.
    Unix(UnixListener),
}

pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(false)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(Stream::Unix(stream))
            }
        }
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => listener.set_nonblocking(true),
            Self::Unix(listener) => listener.set_nonblocking(true),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Stream {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
        })
    }

    fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(how),
            Self::Unix(stream) => stream.shutdown(how),
        };
    }

    /// From this very machine.
    fn is_near(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.peer_addr().is_ok_and(|address| address.ip().to_canonical().is_loopback()),
            Self::Unix(_) => true,
        }
    }

    fn distance(&self) -> Duration {
        match self {
            Self::Tcp(stream) => distance::round_trip(stream),
            Self::Unix(_) => Duration::ZERO,
        }
    }

    fn peer(&self) -> String {
        match self {
            Self::Tcp(stream) => stream.peer_addr().map_or_else(|_| "unknown".into(), |address| address.to_string()),
            Self::Unix(_) => "local".into(),
        }
    }
}

/// What all connections share.
struct Shared {
    settings: Settings,
    target: Arc<dyn ReplicaTarget>,
    guests: Mutex<Guests>,
    memory: AtomicUsize,
    stopping: AtomicBool,
}

#[derive(Default)]
struct Guests {
    next: u64,
    /// In order of arrival.
    all: BTreeMap<u64, Guest>,
}

struct Guest {
    stream: Stream,
    logged_in: bool,
}

impl Shared {
    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody came. Of too many who have not logged in the oldest goes: a good client logs in within milliseconds.
    fn enter(&self, stream: &Stream) -> io::Result<u64> {
        let stream = stream.try_clone()?;
        let mut guests = self.guests();
        let strangers: Vec<u64> = guests.all.iter().filter(|(_, guest)| !guest.logged_in).map(|(id, _)| *id).collect();
        if strangers.len() >= self.settings.limits.strangers
            && let Some(guest) = strangers.first().and_then(|oldest| guests.all.remove(oldest))
        {
            guest.stream.shutdown(Shutdown::Both);
        }
        let id = guests.next;
        guests.next += 1;
        guests.all.insert(id, Guest { stream, logged_in: false });
        Ok(id)
    }

    /// Somebody has logged in; false when the house is full.
    fn admit(&self, id: u64) -> bool {
        let mut guests = self.guests();
        let full = guests.all.values().filter(|guest| guest.logged_in).count() >= self.settings.limits.connections;
        match guests.all.get_mut(&id) {
            Some(guest) if !full => {
                guest.logged_in = true;
                true
            }
            _ => false,
        }
    }

    fn leave(&self, id: u64) {
        self.guests().all.remove(&id);
    }

    /// Counts memory that is about to be used; false when there is none left.
    fn reserve(&self, bytes: usize) -> bool {
        let limit = self.settings.limits.memory_bytes;
        let take = |used: usize| used.checked_add(bytes).filter(|used| *used <= limit);
        self.memory.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn release(&self, bytes: usize) {
        self.memory.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

/// A server that listens, until `stop`.
pub struct Server {
    shared: Arc<Shared>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Starts to listen. The replica is opened once before, so that what is wrong with it is told at once.
    pub fn start(
        listeners: Vec<Listener>,
        target: Arc<dyn ReplicaTarget>,
        settings: Settings,
    ) -> Result<Self, ReplicaError> {
        target.open()?.close();
        let shared = Arc::new(Shared {
            settings,
            target,
            guests: Mutex::default(),
            memory: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
        });
        let mut threads = Vec::new();
        for listener in listeners {
            let shared = shared.clone();
            let run = move || accept(&listener, &shared);
            let started = std::thread::Builder::new().name("accept".into()).spawn(run);
            threads.push(started.map_err(|error| ReplicaError::Fatal(format!("no thread to listen on: {error}")))?);
        }
        Ok(Self { shared, threads })
    }

    /// Connections that are logged in, and all.
    pub fn connections(&self) -> (usize, usize) {
        let guests = self.shared.guests();
        (guests.all.values().filter(|guest| guest.logged_in).count(), guests.all.len())
    }

    /// Listens no more; requests that have begun are finished, up to `timeout`.
    pub fn stop(self, timeout: Duration) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for thread in self.threads {
            let _ = thread.join();
        }
        for guest in self.shared.guests().all.values() {
            guest.stream.shutdown(Shutdown::Read);
        }
        let end = Instant::now() + timeout;
        while !self.shared.guests().all.is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        for guest in self.shared.guests().all.values() {
            guest.stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept(listener: &Listener, shared: &Arc<Shared>) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    if let Err(error) = listener.set_nonblocking() {
        warn!(%error, "cannot listen");
        return;
    }
    while !shared.is_stopping() {
        let mut polled = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, PollTimeout::from(100_u8)) {
            Ok(0) | Err(_) => continue,
            Ok(_) => {}
        }
        let stream = match listener.accept() {
            Ok(stream) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                warn!(%error, "cannot take a connection");
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let Ok(id) = shared.enter(&stream) else { continue };
        let guest = Present { shared: shared.clone(), id };
        let peer = stream.peer();
        let run = move || {
            match connection::serve(stream, &guest) {
                Ok(()) => {}
                Err(error) => info!(peer, %error, "connection ended"),
            }
            drop(guest);
        };
        // A thread that cannot be had takes its guest with it.
        if let Err(error) = std::thread::Builder::new().name("csync".into()).spawn(run) {
            warn!(%error, "no thread for a connection");
        }
    }
}

/// A guest that leaves when this is dropped, in a panic too.
struct Present {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Present {
    fn drop(&mut self) {
        self.shared.leave(self.id);
    }
}
