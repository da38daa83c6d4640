//! Cyrus's nested list text, both ways. It is on the csync wire and in mailboxes.db, cyrus.header and quota values.
//!
//! `NIL`, atom, `"quoted"`, `{n}CRLF bytes` (also `{n+}`), `(list of values)`, `%(KEY value …)`, and on the wire
//! `%{partition guid size}CRLF bytes`. Source of the grammar: Cyrus `imap/dlist.c`; forms seen from running servers.

use crate::model::MessageGuid;
use std::io::Write;

/// One value of the list text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Nil,
    /// Atom, quoted string, literal or flag: the bytes are what counts.
    Text(Vec<u8>),
    List(Vec<Value>),
    Kv(Vec<(Vec<u8>, Value)>),
    /// A message file with its bytes. Apart, so that the other values, of which there are millions, are small.
    File(Box<MessageFile>),
}

/// `%{partition guid size}` and as many bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MessageFile {
    pub partition: Vec<u8>,
    pub guid: MessageGuid,
    pub data: Vec<u8>,
}

/// Text that is not a dlist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("list text at byte {offset}: {fault}")]
pub struct DlistError {
    pub offset: usize,
    pub fault: &'static str,
}

/// Nesting deeper than this is refused; Cyrus itself never goes beyond 6.
const MAX_DEPTH: usize = 32;

/// Smallest piece that the allocator gives, and what it keeps with each.
const PIECE: usize = 16;

/// A list with room for more than this may be moved when it grows, and then stands there twice for a moment.
const MOVED: usize = 1024;

/// The fault of a value that needs more memory than it may have.
const HEAVY: &str = "the value takes too much memory";

/// Reads values from a slice that holds all of them.
pub struct Parser<'a> {
    input: &'a [u8],
    at: usize,
    /// Memory that may still be taken. A list of empty lists takes fifty times its text.
    left: usize,
}

/// Parses one value and requires that nothing but white space follows.
pub fn parse(input: &[u8]) -> Result<Value, DlistError> {
    let mut parser = Parser::new(input);
    let value = parser.value()?;
    parser.end()?;
    Ok(value)
}

impl<'a> Parser<'a> {
    pub fn new(input: &'a [u8]) -> Self {
        Self::within(input, usize::MAX)
    }

    /// One whose values may take so much memory, in bytes.
    pub fn within(input: &'a [u8], memory: usize) -> Self {
        Self { input, at: 0, left: memory }
    }

    fn weigh(&mut self, bytes: usize) -> Result<(), DlistError> {
        match self.left.checked_sub(bytes) {
            Some(left) => self.left = left,
            None => return self.fault(HEAVY),
        }
        Ok(())
    }

    fn weigh_text(&mut self, len: usize) -> Result<(), DlistError> {
        self.weigh(len.max(PIECE).saturating_add(PIECE))
    }

    /// Before one more is put into a list: does it grow?
    fn weigh_growth<T>(&mut self, items: &[T], room: usize) -> Result<(), DlistError> {
        if items.len() < room {
            return Ok(());
        }
        let grown = room.saturating_mul(2).max(4);
        let taken = if grown > MOVED { grown } else { grown.saturating_sub(room) };
        self.weigh(taken.saturating_mul(size_of::<T>()).saturating_add(PIECE))
    }

    /// Offset of the next byte to be read.
    pub fn offset(&self) -> usize {
        self.at
    }

    fn fault<T>(&self, fault: &'static str) -> Result<T, DlistError> {
        Err(DlistError { offset: self.at, fault })
    }

    fn peek(&self) -> Option<u8> {
        self.input.get(self.at).copied()
    }

    fn rest(&self) -> &'a [u8] {
        self.input.get(self.at..).unwrap_or_default()
    }

    /// Skips blanks and line ends, as Cyrus does between values.
    pub fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    /// Nothing but white space is left.
    pub fn end(&mut self) -> Result<(), DlistError> {
        self.skip_space();
        if self.at == self.input.len() { Ok(()) } else { self.fault("unexpected bytes after the value") }
    }

    /// `KEY value`, as on the top level of the wire and inside `%(`.
    pub fn item(&mut self) -> Result<(Vec<u8>, Value), DlistError> {
        self.item_at(0)
    }

    /// One value.
    pub fn value(&mut self) -> Result<Value, DlistError> {
        self.value_at(0)
    }

    fn item_at(&mut self, depth: usize) -> Result<(Vec<u8>, Value), DlistError> {
        self.skip_space();
        let key = match self.text()? {
            Value::Text(key) => key,
            _ => b"NIL".to_vec(),
        };
        Ok((key, self.value_at(depth)?))
    }

    fn value_at(&mut self, depth: usize) -> Result<Value, DlistError> {
        if depth > MAX_DEPTH {
            return self.fault("lists are nested too deep");
        }
        self.skip_space();
        match (self.peek(), self.input.get(self.at + 1)) {
            (Some(b'('), _) => {
                self.at += 1;
                let mut items = Vec::new();
                while !self.closed()? {
                    self.weigh_growth(&items, items.capacity())?;
                    items.push(self.value_at(depth + 1)?);
                }
                Ok(Value::List(items))
            }
            (Some(b'%'), Some(b'(')) => {
                self.at += 2;
                let mut items = Vec::new();
                while !self.closed()? {
                    self.weigh_growth(&items, items.capacity())?;
                    items.push(self.item_at(depth + 1)?);
                }
                Ok(Value::Kv(items))
            }
            (Some(b'%'), Some(b'{')) => {
                self.at += 2;
                self.file()
            }
            (Some(b'%'), _) => self.fault("% must be followed by ( or {"),
            _ => self.text(),
        }
    }

    /// At the closing parenthesis of a list? Then steps over it.
    fn closed(&mut self) -> Result<bool, DlistError> {
        self.skip_space();
        match self.peek() {
            Some(b')') => {
                self.at += 1;
                Ok(true)
            }
            Some(_) => Ok(false),
            None => self.fault("list is not closed"),
        }
    }

    fn text(&mut self) -> Result<Value, DlistError> {
        match self.peek() {
            None => self.fault("value is missing"),
            Some(b'"') => {
                let text = self.quoted()?;
                self.weigh_text(text.capacity())?;
                Ok(Value::Text(text))
            }
            Some(b'{') => {
                self.at += 1;
                let size = self.braced_number()?;
                self.literal(size).map(Value::Text)
            }
            Some(_) => {
                let rest = self.rest();
                let end = rest
                    .iter()
                    .position(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | b'(' | b')'))
                    .unwrap_or(rest.len());
                if end == 0 {
                    return self.fault("value is missing");
                }
                let atom = rest.get(..end).unwrap_or_default();
                self.at += end;
                self.weigh_text(end)?;
                Ok(if atom == b"NIL" { Value::Nil } else { Value::Text(atom.to_vec()) })
            }
        }
    }

    fn quoted(&mut self) -> Result<Vec<u8>, DlistError> {
        let mut out = Vec::new();
        let mut bytes = self.rest().iter().enumerate().skip(1);
        while let Some((at, &byte)) = bytes.next() {
            match byte {
                b'"' => {
                    self.at += at + 1;
                    return Ok(out);
                }
                b'\\' => match bytes.next() {
                    Some((_, &byte)) => out.push(byte),
                    None => break,
                },
                b'\r' | b'\n' => break,
                _ => out.push(byte),
            }
        }
        self.fault("quoted string is not closed")
    }

    /// `digits["+"]"}" [CR] LF`, the opening brace already read.
    fn braced_number(&mut self) -> Result<usize, DlistError> {
        let number = self.number()?;
        if self.peek() == Some(b'+') {
            self.at += 1;
        }
        self.brace_end()?;
        Ok(number)
    }

    fn number(&mut self) -> Result<usize, DlistError> {
        let digits = self.rest().iter().take_while(|byte| byte.is_ascii_digit()).count();
        let text = self.rest().get(..digits).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default();
        let Ok(number) = text.parse() else { return self.fault("number expected") };
        self.at += digits;
        Ok(number)
    }

    fn brace_end(&mut self) -> Result<(), DlistError> {
        let rest = self.rest();
        let skip = if rest.starts_with(b"}\r\n") {
            3
        } else if rest.starts_with(b"}\n") {
            2
        } else {
            return self.fault("literal size must end with } and a line end");
        };
        self.at += skip;
        Ok(())
    }

    fn literal(&mut self, size: usize) -> Result<Vec<u8>, DlistError> {
        let Some(data) = self.rest().get(..size) else { return self.fault("literal is cut short") };
        self.at += size;
        self.weigh_text(size)?;
        Ok(data.to_vec())
    }

    fn file(&mut self) -> Result<Value, DlistError> {
        let mut word = || {
            self.skip_space();
            match self.text()? {
                Value::Text(word) => Ok(word),
                _ => self.fault("file value needs a partition and a GUID"),
            }
        };
        let (partition, guid) = (word()?, word()?);
        let Some(guid) = MessageGuid::parse_hex(&guid) else { return self.fault("GUID must have 40 hex digits") };
        self.skip_space();
        let size = self.number()?;
        self.brace_end()?;
        let data = self.literal(size)?;
        Ok(Value::File(Box::new(MessageFile { partition, guid, data })))
    }
}

impl DlistError {
    /// The text may be good, but was given too little memory.
    pub fn is_heavy(&self) -> bool {
        self.fault == HEAVY
    }
}

impl Value {
    /// A string value.
    pub fn text(bytes: impl AsRef<[u8]>) -> Self {
        Self::Text(bytes.as_ref().to_vec())
    }

    /// A number, as decimal text.
    pub fn number(number: impl std::fmt::Display) -> Self {
        Self::Text(number.to_string().into_bytes())
    }

    /// The bytes of a string; `None` for NIL and everything else.
    pub fn as_text(&self) -> Option<&[u8]> {
        match self {
            Self::Text(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// A decimal number that fits; a leading `-` is accepted for times before 1970.
    pub fn as_number<N: std::str::FromStr>(&self) -> Option<N> {
        std::str::from_utf8(self.as_text()?).ok()?.parse().ok()
    }

    /// Children of `( … )`.
    pub fn as_list(&self) -> Option<&[Value]> {
        match self {
            Self::List(items) => Some(items),
            _ => None,
        }
    }

    /// Children of `%( … )`. An empty `()` counts as an empty one: 2.4 does not keep the difference.
    pub fn as_kv(&self) -> Option<&[(Vec<u8>, Value)]> {
        match self {
            Self::Kv(items) => Some(items),
            Self::List(items) if items.is_empty() => Some(&[]),
            _ => None,
        }
    }

    /// First child of that key in a `%( … )`, as Cyrus looks it up.
    pub fn field(&self, key: &str) -> Option<&Value> {
        self.as_kv()?.iter().find(|(name, _)| name == key.as_bytes()).map(|(_, value)| value)
    }

    /// Appends the text of this value to `out`.
    pub fn encode(&self, out: &mut Vec<u8>, literals: Literals) {
        match self {
            Self::Nil => out.extend_from_slice(b"NIL"),
            Self::Text(bytes) => encode_text(bytes, out, literals),
            Self::List(items) => {
                out.push(b'(');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(b' ');
                    }
                    item.encode(out, literals);
                }
                out.push(b')');
            }
            Self::Kv(items) => {
                out.extend_from_slice(b"%(");
                for (index, (key, value)) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(b' ');
                    }
                    encode_text(key, out, literals);
                    out.push(b' ');
                    value.encode(out, literals);
                }
                out.push(b')');
            }
            Self::File(file) => {
                let MessageFile { partition, guid, data } = &**file;
                out.extend_from_slice(b"%{");
                encode_text(partition, out, literals);
                let _ = write!(out, " {guid} {}}}\r\n", data.len());
                out.extend_from_slice(data);
            }
        }
    }
}

/// How a literal announces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Literals {
    /// `{n+}`: what a client must send; every server takes it.
    NonSynchronizing,
    /// `{n}`: what a server and a file must hold; every reader takes it.
    Plain,
}

/// Atom if it can be one, else quoted, else a literal. 0x1F counts as no atom byte: every reader takes it quoted.
pub fn encode_text(bytes: &[u8], out: &mut Vec<u8>, literals: Literals) {
    let short = bytes.len() < 1024;
    let atom =
        |byte: &u8| matches!(byte, 0x21..=0x7e) && !matches!(byte, b'{' | b'(' | b')' | b'"' | b'%' | b'*' | b'\\');
    let quotable = |byte: &u8| matches!(byte, 0x01..=0x7f) && !matches!(byte, b'\r' | b'\n' | b'"' | b'%' | b'\\');
    if short && !bytes.is_empty() && bytes != b"NIL" && bytes.iter().all(atom) {
        out.extend_from_slice(bytes);
    } else if short && bytes.iter().all(quotable) {
        out.push(b'"');
        out.extend_from_slice(bytes);
        out.push(b'"');
    } else {
        let plus = if literals == Literals::NonSynchronizing { "+" } else { "" };
        let _ = write!(out, "{{{}{plus}}}\r\n", bytes.len());
        out.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(input: &[u8], expected: &[u8]) {
        let value = parse(input).expect("parses");
        let mut out = Vec::new();
        value.encode(&mut out, Literals::NonSynchronizing);
        assert_eq!(String::from_utf8_lossy(&out), String::from_utf8_lossy(expected));
    }

    #[test]
    fn values_that_cyrus_writes() {
        check(
            b"%(A %(fred lrswipkxtecdan) I 3e9d P default V 1415)",
            b"%(A %(fred lrswipkxtecdan) I 3e9d P default V 1415)",
        );
        check(b"%(S (167 100000) M (1))\n", b"%(S (167 100000) M (1))");
        check(b"(a \"b c\" NIL \"NIL\" \"\")", b"(a \"b c\" NIL \"NIL\" \"\")");
        check(b"({3}\r\na%b {2+}\r\n\xff\xfe)", b"({3+}\r\na%b {2+}\r\n\xff\xfe)");
        check(b"(\r\n  %(UID 1) \r\n  %(UID 2))", b"(%(UID 1) %(UID 2))");
        check(b"%(N user\x1ffred)", b"%(N \"user\x1ffred\")");
        check(
            b"(%{default de1a24f844ec1fb8728748225d649c3655d68214 3}\r\nabc x)",
            b"(%{default de1a24f844ec1fb8728748225d649c3655d68214 3}\r\nabc x)",
        );
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole: &[u8] = b"%(A %(\"f r\" x) B ({3+}\r\nabc) F %{p de1a24f844ec1fb8728748225d649c3655d68214 1}\r\nz)";
        assert!(parse(whole).is_ok());
        for end in 0..whole.len() {
            assert!(parse(&whole[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn depth_is_bounded() {
        assert!(parse(&b"(".repeat(100_000)).is_err());
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![Just(Value::Nil), prop::collection::vec(any::<u8>(), 0..40).prop_map(Value::Text)];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::List),
                prop::collection::vec(("[A-Z]{1,8}".prop_map(String::into_bytes), inner), 0..6).prop_map(Value::Kv),
            ]
        })
    }

    #[test]
    fn values_take_no_more_than_they_may() {
        let text = format!("({})", "()".repeat(10_000));
        assert!(parse(text.as_bytes()).is_ok());
        let error = Parser::within(text.as_bytes(), 300_000).value().expect_err("is heavy");
        assert!(error.is_heavy(), "{error}");
        assert!(Parser::within(text.as_bytes(), 5_000_000).value().is_ok());
        assert!(!parse(b"(").expect_err("is cut").is_heavy());
    }

    proptest! {
        #[test]
        fn what_is_encoded_parses_to_the_same(value in any_value()) {
            for literals in [Literals::NonSynchronizing, Literals::Plain] {
                let mut out = Vec::new();
                value.encode(&mut out, literals);
                prop_assert_eq!(&parse(&out).expect("parses"), &value);
            }
        }

        #[test]
        fn any_bytes_give_a_value_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
