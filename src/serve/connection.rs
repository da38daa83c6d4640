//! One connection: bytes in and out, compressed or not, logging in, and the words of the protocol around requests.

use super::login::{Exchange, MECHANISMS, Turn};
use super::session::{Refused, Session};
use super::stage::Stage;
use super::{Present, Stream};
use crate::csync::intake::{Files, Intake, Line};
use crate::csync::request::{self, Fault};
use crate::model::MessageGuid;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};
use tracing::{debug, info, warn};

/// Longest line of somebody who has not logged in.
const STRANGER_BYTES: usize = 8 << 10;
/// Wrong passwords on one connection, and how long each answer takes.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);
/// A peer that takes nothing for so long is gone.
const WRITE: Duration = Duration::from_secs(120);
/// Values take more memory than their text.
const PARSED: usize = 6;
/// Memory is counted in steps of this: what is less counts for nothing, so that strangers take none from good clients.
const STEP: usize = 64 << 10;
/// Requests of somebody without rights, and lines that are none, until the connection is closed.
const PATIENCE: u32 = 20;

/// Bytes of one connection.
struct Wire {
    stream: Stream,
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
    fn new(stream: Stream) -> io::Result<Self> {
        match &stream {
            Stream::Tcp(stream) => stream.set_write_timeout(Some(WRITE))?,
            Stream::Unix(stream) => stream.set_write_timeout(Some(WRITE))?,
        }
        let (raw, plain, out) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { stream, raw, raw_at: 0, plain, plain_at: 0, inflate: None, deflate: None, out, unflushed: false })
    }

    fn receive(&mut self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        self.raw.resize(64 << 10, 0);
        self.raw_at = 0;
        let count = loop {
            let result = match &mut self.stream {
                Stream::Tcp(stream) => stream.set_read_timeout(timeout).and_then(|()| stream.read(&mut self.raw)),
                Stream::Unix(stream) => stream.set_read_timeout(timeout).and_then(|()| stream.read(&mut self.raw)),
            };
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

    /// The next bytes, at least one; `used` says how many were taken.
    fn bytes(&mut self, timeout: Duration) -> io::Result<&[u8]> {
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

    /// From here on both ways are compressed; what has been received already was sent so.
    fn start_deflate(&mut self) {
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
        match &mut self.stream {
            Stream::Tcp(stream) => stream.write_all(bytes),
            Stream::Unix(stream) => stream.write_all(bytes),
        }
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

/// Nobody who has not logged in stages anything.
struct Nowhere;

impl Files for Nowhere {
    fn begin(&mut self, _guid: MessageGuid, _size: u64) {}
    fn data(&mut self, _bytes: &[u8]) {}
    fn end(&mut self) {}
}

/// Memory of all connections that this one has.
struct Share<'a> {
    guest: &'a Present,
    held: usize,
}

impl Share<'_> {
    /// Counts what is held now; an error when there is no more to be had.
    fn hold(&mut self, bytes: usize) -> io::Result<()> {
        let bytes = bytes / STEP * STEP;
        let shared = &self.guest.shared;
        if bytes > self.held {
            if !shared.reserve(bytes - self.held) {
                return Err(io::Error::new(io::ErrorKind::OutOfMemory, "all clients together need too much memory"));
            }
        } else {
            shared.release(self.held - bytes);
        }
        self.held = bytes;
        Ok(())
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.guest.shared.release(self.held);
    }
}

enum Who {
    Stranger,
    /// Logged in, but no administrator.
    Nobody,
    Admin(Box<Session>),
}

/// Serves one client until it leaves.
pub(super) fn serve(stream: Stream, guest: &Present) -> io::Result<()> {
    let local = matches!(stream, Stream::Unix(_));
    let peer = stream.peer();
    let mut talk = Talk {
        wire: Wire::new(stream)?,
        guest,
        share: Share { guest, held: 0 },
        intake: Intake::new(STRANGER_BYTES),
        who: Who::Stranger,
        exchange: None,
        tries: 0,
        patience: PATIENCE,
        deadline: Instant::now() + guest.shared.settings.limits.login,
        peer,
    };
    let name = &guest.shared.settings.name;
    let version = env!("CARGO_PKG_VERSION");
    if local {
        talk.logged_in(b"local")?;
    } else {
        talk.say(&format!("* SASL {MECHANISMS}"))?;
        talk.say("* COMPRESS DEFLATE")?;
        talk.say("* SIEVE-MAILBOX")?;
    }
    talk.say(&format!("* OK {name} Cyrus sync server 3.12-spooltap-{version}"))?;
    talk.wire.flush()?;
    let result = talk.run();
    if let Err(error) = &result
        && error.kind() != io::ErrorKind::UnexpectedEof
    {
        let _ = talk.say(&format!("* Fatal error: {error}")).and_then(|()| talk.wire.flush());
    }
    if let Who::Admin(session) = talk.who {
        session.close();
    }
    match result {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        other => other,
    }
}

struct Talk<'a> {
    wire: Wire,
    guest: &'a Present,
    share: Share<'a>,
    intake: Intake,
    who: Who,
    exchange: Option<Exchange>,
    tries: u32,
    patience: u32,
    deadline: Instant,
    peer: String,
}

impl Talk<'_> {
    fn say(&mut self, line: &str) -> io::Result<()> {
        self.wire.write_all(line.as_bytes())?;
        self.wire.write_all(b"\r\n")
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            let line = self.line()?;
            let go_on = self.command(line)?;
            // An answer to what came together goes out together.
            self.wire.flush()?;
            if !go_on {
                return Ok(());
            }
            if self.guest.shared.is_stopping() && self.intake.is_idle() {
                return Ok(());
            }
        }
    }

    fn line(&mut self) -> io::Result<Line> {
        loop {
            let timeout = match self.who {
                Who::Stranger => {
                    let left = self.deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "logging in takes too long"));
                    }
                    left
                }
                _ => self.guest.shared.settings.limits.silence,
            };
            let bytes = self.wire.bytes(timeout)?;
            let taken = match &mut self.who {
                Who::Admin(session) => self.intake.take(bytes, &mut session.stage),
                _ => self.intake.take(bytes, &mut Nowhere),
            };
            let (used, line) = taken.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            self.wire.plain_at += used;
            let staged = match &self.who {
                Who::Admin(session) => session.stage.held(),
                _ => 0,
            };
            match line {
                None => self.share.hold(self.intake.held() + staged)?,
                Some(line) => {
                    self.share.hold(line.bytes.len().saturating_mul(PARSED) + staged)?;
                    return Ok(line);
                }
            }
        }
    }

    /// One command; false when the connection is to be closed.
    fn command(&mut self, line: Line) -> io::Result<bool> {
        if let Some(exchange) = self.exchange.take() {
            return self.answered(exchange, &line.bytes);
        }
        let text = String::from_utf8_lossy(line.bytes.get(..line.bytes.len().min(64)).unwrap_or_default());
        let mut words = text.split(' ');
        let verb = words.next().unwrap_or_default().to_ascii_uppercase();
        if matches!(self.who, Who::Nobody) && verb != "AUTHENTICATE" {
            self.say("NO Permission denied")?;
            return Ok(self.bear_with() && verb != "EXIT");
        }
        match verb.as_str() {
            "EXIT" => {
                self.say("OK Finished")?;
                return Ok(false);
            }
            "NOOP" => self.say("OK Noop completed")?,
            "RESTART" => {
                if let Who::Admin(session) = &mut self.who
                    && let Err(refused) = session.restart()
                {
                    return self.refuse(refused, &verb);
                }
                self.say("OK Restarting")?;
            }
            "AUTHENTICATE" => return self.authenticate(&line.bytes),
            "COMPRESS" => match words.next().map(str::to_ascii_uppercase).as_deref() {
                Some("DEFLATE") if self.wire.deflate.is_some() => self.say("NO Compression already active: DEFLATE")?,
                Some("DEFLATE") => {
                    self.say("OK DEFLATE active")?;
                    self.wire.flush()?;
                    self.wire.start_deflate();
                }
                Some(other) => self.say(&format!("NO Unknown compression algorithm: {}", other.escape_debug()))?,
                None => self.say("BAD Missing required argument to Compress")?,
            },
            "GET" | "APPLY" | "RESTORE" => return self.request(&line, &verb),
            "" => {
                self.say("BAD Null command")?;
                return Ok(self.bear_with());
            }
            // A client of 3.x takes us for an IMAP server first and waits for its tag.
            "C01" | "Q01" => {
                self.say(&format!("{verb} BAD Unrecognized command"))?;
                return Ok(verb == "C01");
            }
            _ => {
                self.say("BAD IMAP_PROTOCOL_ERROR Unrecognized command")?;
                return Ok(self.bear_with());
            }
        }
        Ok(true)
    }

    /// Patience with what no good client says ends.
    fn bear_with(&mut self) -> bool {
        self.patience = self.patience.saturating_sub(1);
        self.patience > 0
    }

    fn request(&mut self, line: &Line, verb: &str) -> io::Result<bool> {
        let Who::Admin(session) = &mut self.who else {
            self.say("NO Please authenticate first")?;
            return Ok(self.bear_with());
        };
        match request::parse(line) {
            Ok(request) => {
                if let Err(refused) = session.request(request, &mut self.wire) {
                    return self.refuse(refused, verb);
                }
                self.say("OK success")?;
                Ok(true)
            }
            Err(Fault::Parse(fault)) => {
                debug!(peer = self.peer, fault, "request cannot be read");
                self.say(&format!("BAD IMAP_PROTOCOL_ERROR Failed to parse {verb} line"))?;
                Ok(true)
            }
            Err(Fault::Near(field)) => {
                self.say(&format!("NO IMAP_PROTOCOL_BAD_PARAMETERS near {field}"))?;
                Ok(true)
            }
            Err(Fault::Unknown(_)) => {
                self.say("NO IMAP_PROTOCOL_ERROR Protocol error")?;
                Ok(true)
            }
        }
    }

    fn refuse(&mut self, refused: Refused, verb: &str) -> io::Result<bool> {
        match refused {
            Refused::No(text) => {
                debug!(peer = self.peer, verb, text, "refused");
                self.say(&format!("NO {text}"))?;
                Ok(true)
            }
            Refused::Gone(cause) => {
                warn!(peer = self.peer, verb, cause, "request failed");
                Err(io::Error::other("the store cannot be used"))
            }
        }
    }

    fn authenticate(&mut self, line: &[u8]) -> io::Result<bool> {
        if !matches!(self.who, Who::Stranger) {
            self.say("BAD Already authenticated")?;
            return Ok(self.bear_with());
        }
        let text = String::from_utf8_lossy(line).into_owned();
        let mut words = text.split(' ').skip(1);
        let turn = words.next().filter(|word| !word.is_empty()).map(Exchange::start);
        match (turn, words.next()) {
            (None, _) => {
                self.say("BAD Missing required argument to Authenticate")?;
                Ok(self.bear_with())
            }
            (Some(None), _) => {
                self.say("NO no mechanism available")?;
                Ok(self.bear_with())
            }
            (Some(Some(Turn::Ask(_, exchange))), Some(initial)) => self.answered(exchange, initial.as_bytes()),
            (Some(Some(turn)), _) => self.turn(turn),
        }
    }

    /// The client's next bytes of a login.
    fn answered(&mut self, exchange: Exchange, text: &[u8]) -> io::Result<bool> {
        if text == b"*" {
            self.say("BAD Client canceled authentication")?;
            return Ok(self.bear_with());
        }
        let decoded = if text == b"=" { Ok(Vec::new()) } else { STANDARD.decode(text) };
        match decoded {
            Ok(bytes) => {
                let bytes = zeroize::Zeroizing::new(bytes);
                let turn = exchange.step(&self.guest.shared.settings.logins, &bytes);
                self.turn(turn)
            }
            Err(_) => {
                self.say("BAD Invalid base64 string")?;
                Ok(self.bear_with())
            }
        }
    }

    fn turn(&mut self, turn: Turn) -> io::Result<bool> {
        match turn {
            Turn::Ask(question, exchange) => {
                self.exchange = Some(exchange);
                self.say(&format!("+ {question}"))?;
                Ok(true)
            }
            Turn::Accepted(user) => {
                if self.guest.shared.settings.logins.is_admin(&user) {
                    self.logged_in(&user)?;
                } else {
                    info!(peer = self.peer, user = %String::from_utf8_lossy(&user).escape_debug(), "is no administrator");
                    self.who = Who::Nobody;
                }
                self.say("OK Success (no protection)")?;
                Ok(true)
            }
            Turn::Refused => {
                self.tries += 1;
                warn!(peer = self.peer, "login refused");
                std::thread::sleep(PAUSE);
                self.say("NO authentication failure")?;
                Ok(self.tries < TRIES)
            }
        }
    }

    fn logged_in(&mut self, user: &[u8]) -> io::Result<()> {
        let shared = &self.guest.shared;
        if !shared.admit(self.guest.id) {
            return Err(io::Error::other("too many connections"));
        }
        let replica = shared.target.open().map_err(|error| {
            warn!(%error, "store cannot be opened");
            io::Error::other("the store cannot be used")
        })?;
        let limits = &shared.settings.limits;
        let stage = Stage::new(shared.settings.stage.clone(), limits.staged_bytes);
        self.intake.limit = limits.request_bytes;
        self.who = Who::Admin(Box::new(Session::new(replica, stage)));
        debug!(peer = self.peer, user = %String::from_utf8_lossy(user).escape_debug(), "logged in");
        Ok(())
    }
}
