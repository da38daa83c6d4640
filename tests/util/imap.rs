//! A small blocking IMAP client: literals in both directions, commands sent ahead of their answers.

use anyhow::{Context, anyhow, bail};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A token of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    Nil,
    /// An atom, a quoted string or a literal.
    Text(Vec<u8>),
    List(Vec<Token>),
}

impl Token {
    /// Text, with bytes that are no UTF-8 read as latin-1, as the recordings do.
    pub fn text(&self) -> String {
        match self {
            Self::Text(bytes) => text(bytes),
            _ => String::new(),
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Text(bytes) => bytes,
            _ => &[],
        }
    }

    pub fn list(&self) -> &[Token] {
        match self {
            Self::List(items) => items,
            _ => &[],
        }
    }

    pub fn number(&self) -> Option<u64> {
        self.text().parse().ok()
    }

    /// The items of a list two by two.
    pub fn pairs(&self) -> impl Iterator<Item = (&Token, &Token)> {
        self.list().chunks_exact(2).map(|pair| (&pair[0], &pair[1]))
    }
}

pub fn text(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| char::from(byte)).collect()
}

/// One line from the server with its literals in it.
#[derive(Clone, Debug)]
pub struct Line(pub Vec<u8>);

impl Line {
    pub fn text(&self) -> String {
        text(&self.0)
    }

    /// The tokens after `* NAME `, or after `* NUMBER NAME `, if the line is of that name.
    pub fn tokens(&self, name: &str) -> Option<Vec<Token>> {
        let mut rest = self.0.strip_prefix(b"* ")?;
        if rest.first()?.is_ascii_digit() {
            rest = &rest[rest.iter().position(|&byte| byte == b' ')? + 1..];
        }
        let end = rest.iter().position(|&byte| byte == b' ').unwrap_or(rest.len());
        rest[..end].eq_ignore_ascii_case(name.as_bytes()).then(|| tokens(rest.get(end + 1..).unwrap_or_default()))
    }

    /// The number after `[NAME ` in an untagged status answer.
    pub fn code(&self, name: &str) -> Option<u64> {
        let line = self.text();
        let rest = line.split_once(&format!("[{name} "))?.1;
        rest.split([']', ' ']).next()?.parse().ok()
    }
}

/// The tagged answer to a command and what came before it.
#[derive(Clone, Debug)]
pub struct Reply {
    pub ok: bool,
    /// `OK Completed`.
    pub status: String,
    pub lines: Vec<Line>,
}

impl Reply {
    /// The tokens of each line of that name.
    pub fn all(&self, name: &str) -> Vec<Vec<Token>> {
        self.lines.iter().filter_map(|line| line.tokens(name)).collect()
    }

    /// The number in a code of an untagged answer.
    pub fn code(&self, name: &str) -> Option<u64> {
        self.lines.iter().find_map(|line| line.code(name))
    }

    /// `* 12 EXISTS` → 12; the last one counts.
    pub fn exists(&self) -> usize {
        let mut counts = self.lines.iter().filter_map(|line| {
            line.text().strip_suffix(" EXISTS").and_then(|line| line.strip_prefix("* ")?.parse().ok())
        });
        counts.next_back().unwrap_or_default()
    }
}

/// A session.
pub struct Imap {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
    unsent: Vec<u8>,
    waiting: VecDeque<String>,
    count: u32,
    pub login: String,
}

impl Imap {
    /// Connects and logs in.
    pub fn login(address: SocketAddr, login: &str, password: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let reader = BufReader::with_capacity(65536, stream.try_clone()?);
        let mut imap =
            Self { stream, reader, unsent: Vec::new(), waiting: VecDeque::new(), count: 0, login: login.into() };
        imap.line().context("greeting")?;
        imap.ok(format!("LOGIN {} {}", quote(login), quote(password)))?;
        Ok(imap)
    }

    /// Puts a command behind those already on their way; `receive` gives the answers in the same order.
    pub fn send(&mut self, command: impl AsRef<[u8]>) {
        self.count += 1;
        let tag = format!("a{}", self.count);
        self.unsent.extend_from_slice(tag.as_bytes());
        self.unsent.push(b' ');
        self.unsent.extend_from_slice(command.as_ref());
        self.unsent.extend_from_slice(b"\r\n");
        self.waiting.push_back(tag);
    }

    /// Sends what `send` collected.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        if !self.unsent.is_empty() {
            self.stream.write_all(&self.unsent)?;
            self.unsent.clear();
        }
        Ok(())
    }

    /// The answer to the oldest command not answered yet.
    pub fn receive(&mut self) -> anyhow::Result<Reply> {
        self.flush()?;
        let tag = self.waiting.pop_front().ok_or_else(|| anyhow!("no command is waiting"))?;
        let start = format!("{tag} ");
        let mut lines = Vec::new();
        loop {
            let line = self.line()?;
            if let Some(status) = line.0.strip_prefix(start.as_bytes()) {
                let status = text(status);
                return Ok(Reply { ok: status.starts_with("OK"), status, lines });
            }
            lines.push(line);
        }
    }

    /// A command and its answer, whatever that is; an error means that the session is lost.
    pub fn run(&mut self, command: impl AsRef<[u8]>) -> anyhow::Result<Reply> {
        self.send(command);
        self.receive()
    }

    /// A command that must be answered with OK.
    pub fn ok(&mut self, command: impl AsRef<[u8]>) -> anyhow::Result<Reply> {
        let command = command.as_ref();
        let reply = self.run(command)?;
        if !reply.ok {
            let shown = text(&command[..command.len().min(120)]);
            bail!("{}: {} → {}", self.login, shown, reply.status);
        }
        Ok(reply)
    }

    fn line(&mut self) -> anyhow::Result<Line> {
        let mut bytes = Vec::new();
        loop {
            let start = bytes.len();
            if self.reader.read_until(b'\n', &mut bytes)? == 0 {
                bail!("{}: the server closed the connection", self.login);
            }
            let Some(length) = literal_at_end(&bytes[start..]) else { break };
            let start = bytes.len();
            bytes.resize(start + length, 0);
            self.reader.read_exact(&mut bytes[start..])?;
        }
        while bytes.last().is_some_and(|byte| matches!(byte, b'\r' | b'\n')) {
            bytes.pop();
        }
        Ok(Line(bytes))
    }
}

fn literal_at_end(line: &[u8]) -> Option<usize> {
    let line = line.strip_suffix(b"}\r\n")?;
    let open = line.iter().rposition(|&byte| byte == b'{')?;
    std::str::from_utf8(&line[open + 1..]).ok()?.parse().ok()
}

/// A quoted string; for bytes that may not stand in one, `literal`.
pub fn quote(value: &str) -> String {
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
}

/// A literal that needs no go-ahead (LITERAL+).
pub fn literal(value: &[u8]) -> Vec<u8> {
    let mut out = format!("{{{}+}}\r\n", value.len()).into_bytes();
    out.extend_from_slice(value);
    out
}

/// The tokens of a line, literals included.
pub fn tokens(mut rest: &[u8]) -> Vec<Token> {
    let mut open: Vec<Vec<Token>> = vec![Vec::new()];
    while let Some(&byte) = rest.first() {
        let top = open.last_mut().expect("one list is always open");
        match byte {
            b' ' => rest = &rest[1..],
            b'(' => {
                open.push(Vec::new());
                rest = &rest[1..];
            }
            b')' => {
                rest = &rest[1..];
                if open.len() > 1 {
                    let list = open.pop().expect("counted");
                    open.last_mut().expect("one list is always open").push(Token::List(list));
                }
            }
            b'"' => {
                let mut value = Vec::new();
                let mut at = 1;
                while let Some(&byte) = rest.get(at).filter(|&&byte| byte != b'"') {
                    if byte == b'\\' {
                        at += 1;
                    }
                    value.extend(rest.get(at));
                    at += 1;
                }
                top.push(Token::Text(value));
                rest = rest.get(at + 1..).unwrap_or_default();
            }
            b'{' => {
                let end = rest.windows(3).position(|three| three == b"}\r\n").unwrap_or(rest.len());
                let length: usize = text(&rest[1..end.max(1)]).trim_end_matches('+').parse().unwrap_or_default();
                let body = rest.get(end + 3..).unwrap_or_default();
                let (value, after) = body.split_at(length.min(body.len()));
                top.push(Token::Text(value.to_vec()));
                rest = after;
            }
            _ => {
                // A section such as BODY[HEADER (X)] is one atom.
                let (mut at, mut depth) = (0, 0);
                while let Some(&byte) = rest.get(at) {
                    match byte {
                        b'[' => depth += 1,
                        b']' => depth -= 1,
                        b' ' | b'(' | b')' | b'"' if depth <= 0 => break,
                        _ => {}
                    }
                    at += 1;
                }
                let atom = &rest[..at];
                top.push(if atom.eq_ignore_ascii_case(b"NIL") { Token::Nil } else { Token::Text(atom.to_vec()) });
                rest = &rest[at..];
            }
        }
    }
    while open.len() > 1 {
        let list = open.pop().expect("counted");
        open.last_mut().expect("one list is always open").push(Token::List(list));
    }
    open.pop().expect("one list is always open")
}

#[test]
fn answers_in_tokens() {
    let t = |value: &str| Token::Text(value.into());
    let line = Line(b"* 3 FETCH (UID 7 FLAGS (\\Seen \"a b\") BODY[] {5}\r\nx)\r\ny X NIL)".to_vec());
    let expected = Token::List(vec![
        t("UID"),
        t("7"),
        t("FLAGS"),
        Token::List(vec![t("\\Seen"), t("a b")]),
        t("BODY[]"),
        t("x)\r\ny"),
        t("X"),
        Token::Nil,
    ]);
    assert_eq!(line.tokens("FETCH"), Some(vec![expected]));
    assert_eq!(line.tokens("LIST"), None);
    let line = Line(b"* OK [HIGHESTMODSEQ 41] Ok".to_vec());
    assert_eq!(line.code("HIGHESTMODSEQ"), Some(41));
    assert_eq!(tokens(b"\"a\\\"b\" ()"), [t("a\"b"), Token::List(vec![])]);
    assert_eq!(literal_at_end(b"* X {12}\r\n"), Some(12));
    assert_eq!(literal_at_end(b"* X 12}\r\n"), None);
}
