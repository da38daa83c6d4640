//! Bytes of one connection: TLS below, compression above, both once agreed on.

use super::Stream;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A peer that takes nothing for so long is gone.
const WRITE: Duration = Duration::from_secs(120);

enum Link {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
    /// Its handshake failed.
    Gone,
}

trait ReadWrite: Read + Write {}

impl<T: Read + Write> ReadWrite for T {}

impl Link {
    fn io(&mut self) -> io::Result<&mut dyn ReadWrite> {
        match self {
            Self::Tcp(stream) => Ok(stream),
            Self::Unix(stream) => Ok(stream),
            Self::Tls(stream) => Ok(&mut **stream),
            Self::Gone => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn set_read_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
            Self::Unix(stream) => stream.set_read_timeout(timeout),
            Self::Tls(stream) => stream.sock.set_read_timeout(timeout),
            Self::Gone => Ok(()),
        }
    }
}

/// Bytes of one connection.
pub(super) struct Wire {
    link: Link,
    raw: Vec<u8>,
    raw_at: usize,
    plain: Vec<u8>,
    plain_at: usize,
    inflate: Option<Decompress>,
    deflate: Option<Compress>,
    out: Vec<u8>,
    /// Something was written since the last flush.
    unflushed: bool,
}

impl Wire {
    pub fn new(stream: Stream) -> io::Result<Self> {
        let link = match stream {
            Stream::Tcp(stream) => stream.set_write_timeout(Some(WRITE)).map(|()| Link::Tcp(stream))?,
            Stream::Unix(stream) => stream.set_write_timeout(Some(WRITE)).map(|()| Link::Unix(stream))?,
        };
        let (raw, plain, out) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { link, raw, raw_at: 0, plain, plain_at: 0, inflate: None, deflate: None, out, unflushed: false })
    }

    pub fn is_tls(&self) -> bool {
        matches!(self.link, Link::Tls(_))
    }

    pub fn is_packed(&self) -> bool {
        self.deflate.is_some()
    }

    /// Shakes hands; everything from here on is under TLS. What the client said in clear after it had asked for TLS must not
    /// be taken for what it says under it.
    pub fn start_tls(&mut self, config: Arc<ServerConfig>, deadline: Instant) -> io::Result<()> {
        if self.plain_at < self.plain.len() || self.raw_at < self.raw.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the client went on talking after STARTTLS"));
        }
        match std::mem::replace(&mut self.link, Link::Gone) {
            Link::Tcp(mut stream) => {
                let mut session = ServerConnection::new(config).map_err(io::Error::other)?;
                while session.is_handshaking() {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake takes too long"));
                    }
                    stream.set_read_timeout(Some(left))?;
                    session.complete_io(&mut stream)?;
                }
                self.link = Link::Tls(Box::new(StreamOwned::new(session, stream)));
            }
            other => self.link = other,
        }
        Ok(())
    }

    fn receive(&mut self, timeout: Duration) -> io::Result<()> {
        self.raw.resize(64 << 10, 0);
        self.raw_at = 0;
        self.link.set_read_timeout(timeout)?;
        let count = loop {
            let result = self.link.io()?.read(&mut self.raw);
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.raw.clear();
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the client is silent"));
                }
                Err(error) => {
                    self.raw.clear();
                    return Err(error);
                }
                Ok(count) => break count,
            }
        };
        self.raw.truncate(count);
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the client closed the connection"));
        }
        Ok(())
    }

    /// The next bytes, at least one; `used` is to be told how many were taken.
    pub fn bytes(&mut self, timeout: Duration) -> io::Result<&[u8]> {
        while self.plain_at >= self.plain.len() {
            if self.raw_at >= self.raw.len() {
                self.receive(timeout)?;
            }
            self.plain_at = 0;
            let input = self.raw.get(self.raw_at..).unwrap_or_default();
            match &mut self.inflate {
                None => {
                    std::mem::swap(&mut self.plain, &mut self.raw);
                    self.plain_at = self.raw_at;
                    self.raw.clear();
                    self.raw_at = 0;
                }
                Some(inflate) => {
                    self.plain.clear();
                    self.plain.reserve(64 << 10);
                    let before = inflate.total_in();
                    let status = inflate.decompress_vec(input, &mut self.plain, FlushDecompress::None);
                    if status.map_err(io::Error::other)? == Status::StreamEnd {
                        return Err(io::Error::other("the compressed stream ended"));
                    }
                    let used = usize::try_from(inflate.total_in() - before).unwrap_or(usize::MAX);
                    if used == 0 && self.plain.is_empty() {
                        return Err(io::Error::other("the compressed stream stands still"));
                    }
                    self.raw_at = self.raw_at.saturating_add(used);
                }
            }
        }
        Ok(self.plain.get(self.plain_at..).unwrap_or_default())
    }

    /// So many of them were taken.
    pub fn used(&mut self, count: usize) {
        self.plain_at = self.plain_at.saturating_add(count);
    }

    /// From here on both ways are compressed; what has been received already was sent so.
    pub fn start_deflate(&mut self) {
        let rest = self.plain.get(self.plain_at..).unwrap_or_default().to_vec();
        self.raw = rest;
        self.raw_at = 0;
        self.plain.clear();
        self.plain_at = 0;
        self.inflate = Some(Decompress::new(false));
        self.deflate = Some(Compress::new(Compression::fast(), false));
    }

    fn send(&mut self, last: bool) -> io::Result<()> {
        let bytes = std::mem::take(&mut self.out);
        let Some(deflate) = &mut self.deflate else { return self.write_raw(&bytes) };
        let flush = if last { FlushCompress::Sync } else { FlushCompress::None };
        let mut packed = Vec::with_capacity(bytes.len() / 2 + 64);
        let mut input = bytes.as_slice();
        loop {
            let before = deflate.total_in();
            packed.reserve(4096);
            deflate.compress_vec(input, &mut packed, flush).map_err(io::Error::other)?;
            let used = usize::try_from(deflate.total_in() - before).unwrap_or(usize::MAX);
            input = input.get(used..).unwrap_or_default();
            // Room left means that everything was put out.
            if input.is_empty() && packed.len() < packed.capacity() {
                break;
            }
        }
        self.write_raw(&packed)
    }

    fn write_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        let io = self.link.io()?;
        io.write_all(bytes)?;
        io.flush()
    }
}

/// Collects; what is much goes out before the end.
impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.extend_from_slice(bytes);
        self.unflushed = true;
        if self.out.len() > 256 << 10 {
            self.send(false)?;
        }
        Ok(bytes.len())
    }

    /// Not a byte if there is nothing to say: a real client that finds some right behind `OK DEFLATE active`, before it
    /// has switched over, loses the first byte of what follows.
    fn flush(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.unflushed) {
            return Ok(());
        }
        self.send(true)
    }
}
