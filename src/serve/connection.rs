//! One connection: bytes in and out, compressed or not, logging in, and the words of the protocol around requests.

use super::login::{Exchange, MECHANISMS, Turn};
use super::session::{Refused, Session};
use super::stage::Stage;
use super::wire::Wire;
use super::{Present, Stream};
use crate::config::ClearText;
use crate::csync::intake::{Files, Intake, Line};
use crate::csync::request::{self, Fault, Request};
use crate::model::MessageGuid;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::io::{self, Write};
use std::time::{Duration, Instant};
use tracing::{debug, info, warn};

/// Longest line of somebody who has not logged in.
const STRANGER_BYTES: usize = 8 << 10;
/// Wrong passwords on one connection, and how long each answer takes.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);
/// Values take more memory than their text: so many times at least is set aside for them.
const PARSED: usize = 6;
/// Memory is counted in steps of this: what is less counts for nothing, so that strangers take none from good clients.
const STEP: usize = 64 << 10;
/// Requests of somebody without rights, and lines that are none, until the connection is closed.
const PATIENCE: u32 = 20;

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
    let (peer, near) = (stream.peer(), stream.is_near());
    let packs = guest.shared.settings.compress.is_for(near, stream.distance());
    let mut talk = Talk {
        wire: Wire::new(stream)?,
        guest,
        share: Share { guest, held: 0 },
        intake: Intake::new(STRANGER_BYTES),
        who: Who::Stranger,
        exchange: None,
        mechanism: "",
        tries: 0,
        patience: PATIENCE,
        deadline: Instant::now() + guest.shared.settings.limits.login,
        peer,
        near,
        packs,
    };
    if local {
        talk.logged_in(b"local")?;
    }
    talk.greet()?;
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
    /// The one asked for last.
    mechanism: &'static str,
    tries: u32,
    patience: u32,
    deadline: Instant,
    peer: String,
    /// Nobody can read along on the way.
    near: bool,
    /// Compression is worth it on the way.
    packs: bool,
}

impl Talk<'_> {
    fn say(&mut self, line: &str) -> io::Result<()> {
        self.wire.write_all(line.as_bytes())?;
        self.wire.write_all(b"\r\n")
    }

    /// What we can do. Said again under TLS, and then without compression, as a `sync_server` does.
    fn greet(&mut self) -> io::Result<()> {
        let settings = &self.guest.shared.settings;
        if matches!(self.who, Who::Stranger) {
            if self.may_log_in() {
                self.say(&format!("* SASL {MECHANISMS}"))?;
            }
            if settings.tls.is_some() && !self.wire.is_tls() {
                self.say("* STARTTLS")?;
            }
            if self.packs && !self.wire.is_tls() {
                self.say("* COMPRESS DEFLATE")?;
            }
            if self.guest.shared.target.capabilities().sieve_mailboxes {
                self.say("* SIEVE-MAILBOX")?;
            }
        }
        let version = env!("CARGO_PKG_VERSION");
        self.say(&format!("* OK {} Cyrus sync server 3.12-spooltap-{version}", settings.name))?;
        self.wire.flush()
    }

    /// Both mechanisms say the password in clear.
    fn may_log_in(&self) -> bool {
        self.wire.is_tls()
            || match self.guest.shared.settings.cleartext {
                ClearText::Always => true,
                ClearText::Auto => self.near,
                ClearText::Never => false,
            }
    }

    fn start_tls(&mut self) -> io::Result<bool> {
        let Some(tls) = self.guest.shared.settings.tls.clone() else {
            self.say("NO TLS is not set up here")?;
            return Ok(self.bear_with());
        };
        if self.wire.is_tls() {
            self.say("NO Already successfully executed STARTTLS")?;
            return Ok(self.bear_with());
        }
        if !matches!(self.who, Who::Stranger) || self.wire.is_packed() {
            self.say("NO STARTTLS comes before everything else")?;
            return Ok(self.bear_with());
        }
        self.say("OK Begin TLS negotiation now")?;
        self.wire.flush()?;
        self.wire.start_tls(tls, self.deadline)?;
        self.greet()?;
        Ok(true)
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
            self.wire.used(used);
            let held = match &line {
                Some(line) => line.bytes.len(),
                None => self.intake.held(),
            };
            self.share.hold(held.saturating_add(self.staged()))?;
            if let Some(line) = line {
                return Ok(line);
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
            "STARTTLS" => return self.start_tls(),
            "COMPRESS" => match words.next().map(str::to_ascii_uppercase).as_deref() {
                Some("DEFLATE") if self.wire.is_packed() => self.say("NO Compression already active: DEFLATE")?,
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
        if !matches!(self.who, Who::Admin(_)) {
            self.say("NO Please authenticate first")?;
            return Ok(self.bear_with());
        }
        let parsed = self.parsed(line)?;
        let Who::Admin(session) = &mut self.who else { return Ok(false) };
        match parsed {
            Ok(request) => {
                if let Err(refused) = session.request(request, &mut self.wire) {
                    return self.refuse(refused, verb);
                }
                self.say("OK success")?;
                Ok(true)
            }
            Err(Fault::Heavy) => Err(io::Error::new(io::ErrorKind::OutOfMemory, "the request takes too much memory")),
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

    /// Reads a request. Its values take more memory than its text, and how much is known only then: what they may take
    /// is counted first, and more if that is not enough.
    fn parsed(&mut self, line: &Line) -> io::Result<Result<Request, Fault>> {
        let mut memory = line.bytes.len().saturating_mul(PARSED).saturating_add(STEP);
        loop {
            self.share.hold(line.bytes.len().saturating_add(memory).saturating_add(self.staged()))?;
            match request::parse_within(line, memory) {
                Err(Fault::Heavy) => memory = memory.saturating_add(memory / 4),
                other => return Ok(other),
            }
        }
    }

    /// Memory for what was sent and not used yet.
    fn staged(&self) -> usize {
        match &self.who {
            Who::Admin(session) => session.held(),
            _ => 0,
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
        if !self.may_log_in() {
            self.say("NO the password would go in clear, say STARTTLS first")?;
            return Ok(self.bear_with());
        }
        let text = String::from_utf8_lossy(line).into_owned();
        let mut words = text.split(' ').skip(1);
        let asked = words.next().filter(|word| !word.is_empty());
        let known = |name: &&str| asked.is_some_and(|asked| asked.eq_ignore_ascii_case(name));
        self.mechanism = MECHANISMS.split(' ').find(known).unwrap_or("unknown");
        let turn = asked.map(Exchange::start);
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
                warn!(peer = self.peer, mechanism = self.mechanism, "login refused");
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
        self.who = Who::Admin(Box::new(Session::new(replica, shared.target.capabilities().sieve_mailboxes, stage)));
        debug!(peer = self.peer, user = %String::from_utf8_lossy(user).escape_debug(), "logged in");
        Ok(())
    }
}
