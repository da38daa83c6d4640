//! The socket: blocking, one write per request, raw DEFLATE both ways once agreed on. TLS has its place between the
//! stream and the compression.

use super::codec::Splitter;
use super::tls::{TlsError, TlsStream};
use crate::config::Tls;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream>),
    /// Its handshake failed.
    Gone,
}

impl Stream {
    fn io(&mut self) -> io::Result<&mut dyn ReadWrite> {
        match self {
            Self::Tcp(stream) => Ok(stream),
            Self::Unix(stream) => Ok(stream),
            Self::Tls(stream) => Ok(&mut **stream),
            Self::Gone => Err(io::Error::new(io::ErrorKind::NotConnected, "there is no connection")),
        }
    }
}

trait ReadWrite: Read + Write {}

impl<T: Read + Write> ReadWrite for T {}

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// A peer that takes nothing for so long is gone.
const WRITE: Duration = Duration::from_secs(120);

/// One connection.
pub struct Transport {
    stream: Stream,
    splitter: Splitter,
    deflate: Option<(Compress, Decompress)>,
    /// What was sent before compression began, and what went into it.
    sent_before: u64,
    plain: u64,
    scratch: Vec<u8>,
    pub sent: u64,
    pub received: u64,
    pub loopback: bool,
    /// How long it took to connect: one way there and back.
    pub distance: Duration,
}

impl Transport {
    /// Connects by TCP to the first address that answers.
    pub fn tcp(host: &str, port: u16) -> io::Result<Self> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (host, port).to_socket_addrs()? {
            let begun = Instant::now();
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    stream.set_write_timeout(Some(WRITE))?;
                    return Ok(Self::new(Stream::Tcp(stream), address.ip().is_loopback(), begun.elapsed()));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Connects to a UNIX socket.
    pub fn unix(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_write_timeout(Some(WRITE))?;
        Ok(Self::new(Stream::Unix(stream), true, Duration::ZERO))
    }

    fn new(stream: Stream, loopback: bool, distance: Duration) -> Self {
        Self {
            stream,
            splitter: Splitter::default(),
            deflate: None,
            sent_before: 0,
            plain: 0,
            scratch: vec![0; 64 << 10],
            sent: 0,
            received: 0,
            loopback,
            distance,
        }
    }

    /// Longest wait for bytes from now on.
    pub fn timeout(&mut self, timeout: Duration) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => stream.set_read_timeout(Some(timeout)),
            Stream::Unix(stream) => stream.set_read_timeout(Some(timeout)),
            Stream::Tls(stream) => stream.sock.set_read_timeout(Some(timeout)),
            Stream::Gone => Ok(()),
        }
    }

    /// Everything from here on is under TLS; on an error the connection is gone. What the server sent before it knew of
    /// TLS must not be taken for what it says under it: there is to be none.
    pub fn start_tls(&mut self, host: &str, tls: &Tls) -> Result<(), TlsError> {
        if !self.splitter.is_empty() {
            return Err(TlsError::Protocol("the server went on talking after it had agreed to TLS".into()));
        }
        match std::mem::replace(&mut self.stream, Stream::Gone) {
            Stream::Tcp(stream) => {
                self.stream = Stream::Tls(Box::new(super::tls::connect(stream, host, tls)?));
                Ok(())
            }
            other => {
                self.stream = other;
                Ok(())
            }
        }
    }

    /// Nobody on the way can read along.
    pub fn is_private(&self) -> bool {
        self.loopback || matches!(self.stream, Stream::Tls(_))
    }

    /// Everything from here on, both ways, is one raw DEFLATE stream per direction.
    pub fn start_deflate(&mut self) {
        self.deflate = Some((Compress::new(Compression::fast(), false), Decompress::new(false)));
        self.sent_before = self.sent;
    }

    /// Bytes before and after compression, since it is on.
    pub fn compression(&self) -> Option<(u64, u64)> {
        self.deflate.as_ref().map(|_| (self.plain, self.sent.saturating_sub(self.sent_before)))
    }

    fn raw_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sent = self.sent.saturating_add(bytes.len() as u64);
        let io = self.stream.io()?;
        io.write_all(bytes)?;
        io.flush()
    }

    /// Sends bytes; `last` ends a request, so everything up to here must reach the peer now.
    pub fn send(&mut self, bytes: &[u8], last: bool) -> io::Result<()> {
        let Some((compress, _)) = &mut self.deflate else { return self.raw_write(bytes) };
        self.plain = self.plain.saturating_add(bytes.len() as u64);
        let flush = if last { FlushCompress::Sync } else { FlushCompress::None };
        let mut out = Vec::with_capacity((bytes.len() / 2).saturating_add(64));
        let mut input = bytes;
        loop {
            let before = compress.total_in();
            out.reserve(4096);
            compress.compress_vec(input, &mut out, flush).map_err(io::Error::other)?;
            let used = usize::try_from(compress.total_in().saturating_sub(before)).unwrap_or(usize::MAX);
            input = input.get(used..).unwrap_or_default();
            // Room left means that everything was put out.
            if input.is_empty() && out.len() < out.capacity() {
                break;
            }
        }
        self.raw_write(&out)
    }

    /// The next whole answer; waits for it.
    pub fn answer(&mut self) -> io::Result<Vec<u8>> {
        loop {
            let answer =
                self.splitter.next_answer().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            if let Some(answer) = answer {
                return Ok(answer);
            }
            let count = match self.stream.io()?.read(&mut self.scratch) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
                }
                Err(error) => return Err(error),
            };
            self.received = self.received.saturating_add(count as u64);
            let input = self.scratch.get(..count).unwrap_or_default();
            match &mut self.deflate {
                None => self.splitter.push(input),
                Some((_, decompress)) => inflate(decompress, input, &mut self.splitter)?,
            }
        }
    }
}

fn inflate(decompress: &mut Decompress, mut input: &[u8], splitter: &mut Splitter) -> io::Result<()> {
    let mut out = vec![0u8; 64 << 10];
    loop {
        let (before_in, before_out) = (decompress.total_in(), decompress.total_out());
        let status = decompress.decompress(input, &mut out, FlushDecompress::None).map_err(io::Error::other)?;
        let used = usize::try_from(decompress.total_in().saturating_sub(before_in)).unwrap_or(usize::MAX);
        let made = usize::try_from(decompress.total_out().saturating_sub(before_out)).unwrap_or(0);
        splitter.push(out.get(..made).unwrap_or_default());
        input = input.get(used..).unwrap_or_default();
        match status {
            Status::StreamEnd => return Err(io::Error::other("the compressed stream ended")),
            _ if input.is_empty() && made < out.len() => return Ok(()),
            _ if used == 0 && made == 0 => return Ok(()),
            _ => {}
        }
    }
}
