//! A client made by hand: it sends whatever it is told to and reads whole answers.

use base64::Engine as _;
use spooltap::csync::codec::Splitter;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

pub(crate) struct Talk {
    stream: TcpStream,
    splitter: Splitter,
}

/// `NUL user NUL password`, as a line.
pub(crate) fn plain(user: &str, password: &str) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(format!("\0{user}\0{password}"));
    format!("AUTHENTICATE PLAIN {text}\r\n")
}

impl Talk {
    /// Connects and reads the greeting.
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        let mut talk = Self { stream, splitter: Splitter::default() };
        while !talk.answer()?.starts_with(b"* OK") {}
        Ok(talk)
    }

    /// Connects and logs in.
    pub(crate) fn login(address: SocketAddr, user: &str, password: &str) -> io::Result<Self> {
        let mut talk = Self::connect(address)?;
        let answers = talk.ask(plain(user, password).as_bytes())?;
        match answers.last() {
            Some(last) if last.starts_with(b"OK") => Ok(talk),
            other => Err(io::Error::other(format!("{:?}", other.map(|line| String::from_utf8_lossy(line))))),
        }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The way there, for somebody who sends while this one reads.
    pub(crate) fn writer(&self) -> TcpStream {
        self.stream.try_clone().expect("a second handle")
    }

    /// Reads to the end without understanding it; how many bytes came.
    pub(crate) fn drain(&mut self) -> usize {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        let (mut bytes, mut all) = ([0; 16 << 10], 0);
        while let Ok(count @ 1..) = self.stream.read(&mut bytes) {
            all += count;
        }
        all
    }

    pub(crate) fn answer(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = [0; 16 << 10];
        loop {
            if let Some(answer) = self.splitter.next_answer().map_err(io::Error::other)? {
                return Ok(answer);
            }
            match self.stream.read(&mut bytes)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.splitter.push(&bytes[..count]),
            }
        }
    }

    /// All lines of the answer to one request, the last one without `*`.
    pub(crate) fn ask(&mut self, request: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.send(request)?;
        let mut out = Vec::new();
        loop {
            out.push(self.answer()?);
            if out.last().is_some_and(|line| !line.starts_with(b"* ") || line.starts_with(b"* Fatal")) {
                return Ok(out);
            }
        }
    }

    /// The last line of the answer, as text; how the connection ended if there is none.
    pub(crate) fn said(&mut self, request: &[u8]) -> String {
        match self.ask(request) {
            Ok(lines) => lines.last().map(|line| String::from_utf8_lossy(line).into_owned()).unwrap_or_default(),
            Err(error) => error.kind().to_string(),
        }
    }
}
