//! Requests of real clients (`fixtures/csync`), taken apart and put together in another way: fields that are missing, twice or of
//! another kind, numbers at every edge, names that would be paths, lengths that lie, lists that do not end.

use super::super::util::Rng;
use super::super::util::store::fixtures;
use spooltap::csync::intake::{Files, Intake};
use spooltap::dlist::{self, Literals, MessageFile, Value};
use spooltap::model::MessageGuid;
use std::collections::BTreeMap;
use std::io::Read;

struct Nowhere;

impl Files for Nowhere {
    fn begin(&mut self, _guid: MessageGuid, _size: u64) {}
    fn data(&mut self, _bytes: &[u8]) {}
    fn end(&mut self) {}
}

/// `GET` or `APPLY`, what, and the rest as a value.
#[derive(Clone)]
struct Request(Vec<u8>, Vec<u8>, Value);

/// What real clients said, in the order in which they said it, and every value that stood under a key.
pub(super) struct Recorded {
    talks: Vec<Vec<Request>>,
    values: BTreeMap<Vec<u8>, Vec<Value>>,
    keys: Vec<Vec<u8>>,
}

impl Recorded {
    pub(super) fn read() -> Self {
        let (mut talks, mut values) = (Vec::new(), BTreeMap::new());
        for release in ["2.4.22", "2.5.11", "3.6.1"] {
            let packed =
                std::fs::File::open(fixtures().join(format!("csync/clients/{release}.tar.xz"))).expect("talks");
            let mut packed = tar::Archive::new(xz2::read::XzDecoder::new(packed));
            for entry in packed.entries().expect("talks") {
                let mut entry = entry.expect("a talk");
                let name = entry.path().expect("a name").display().to_string();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).expect("requests");
                // What is compressed from some point on stands beside as it was before.
                let Some(lines) = (name.ends_with(".c2s") || name.ends_with(".plain")).then(|| split(&bytes)) else {
                    continue;
                };
                let talk: Vec<Request> = lines.iter().filter_map(|line| request(line)).collect();
                talk.iter().for_each(|request| collect(&request.2, &mut values));
                talks.extend(Some(talk).filter(|talk| !talk.is_empty()));
            }
        }
        let count: usize = talks.iter().map(Vec::len).sum();
        assert!(talks.len() > 20 && count > 500 && values.len() > 40, "{} {count} {}", talks.len(), values.len());
        let keys = values.keys().cloned().collect();
        Self { talks, values, keys }
    }
}

fn split(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let (mut intake, mut out) = (Intake::new(1 << 30), Vec::new());
    while !bytes.is_empty() {
        let Ok((used, line)) = intake.take(bytes, &mut Nowhere) else { break };
        if line.is_some() {
            out.push(bytes[..used].to_vec());
        }
        bytes = &bytes[used..];
    }
    out
}

fn request(line: &[u8]) -> Option<Request> {
    let mut words = line.splitn(3, |byte| *byte == b' ');
    let (verb, what, rest) = (words.next()?, words.next()?, words.next()?);
    let known = matches!(verb, b"GET" | b"APPLY" | b"RESTORE");
    known.then(|| Some(Request(verb.to_vec(), what.to_vec(), dlist::parse(rest.trim_ascii_end()).ok()?)))?
}

fn collect(value: &Value, values: &mut BTreeMap<Vec<u8>, Vec<Value>>) {
    match value {
        Value::List(items) => items.iter().for_each(|item| collect(item, values)),
        Value::Kv(items) => {
            for (key, item) in items {
                let list = values.entry(key.clone()).or_default();
                if list.len() < 40 && !list.contains(item) {
                    list.push(item.clone());
                }
                collect(item, values);
            }
        }
        _ => {}
    }
}

const NUMBERS: &[&str] = &[
    "0",
    "1",
    "2",
    "-1",
    "2147483647",
    "2147483648",
    "4294967294",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551614",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "99999999999999999999999999999999999999999",
    "007",
    "+5",
    "1e3",
    "0x10",
    "",
    " ",
];

const NAMES: &[&str] = &[
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "user",
    "user.",
    "user..x",
    "user.f1",
    "user.f1.Sub",
    "user.f1.Sub.Sub.Sub.Sub.Sub.Sub.Sub.Sub.Sub.Sub.Sub.Sub",
    "user.f2",
    "user.f^3",
    "d.test!user.f4",
    "!",
    "!!",
    "user.f1/../../x",
    "DELETED.user.f1.6B12AB34",
    "DELETED",
    "user.f1.\u{1e}",
    "user.f1.\u{1f}",
    "a\u{0}b",
    "a\tb",
    "a\r\nb",
    "a\"b",
    "a\\b",
    "%s%n",
    "NIL",
    "nil",
    "~",
    "user.\u{e4}\u{f6}",
    "user.&AOQ-",
    "spooltap",
    "cyrus.index",
    "defaultbc",
    "m.script",
    "m.bc",
    "../m.script",
];

/// Makes requests from what was recorded.
pub(super) struct Mutants<'a> {
    pub(super) rng: Rng,
    pub(super) from: &'a Recorded,
}

impl Mutants<'_> {
    /// A part of a talk, with some requests changed, left out, said twice, or others between them.
    pub(super) fn burst(&mut self, lines: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let talk = self.rng.pick(&self.from.talks).clone();
        let mut at = self.rng.below(talk.len());
        for _ in 0..lines {
            match self.rng.below(40) {
                0 => out.extend(self.between()),
                1 => at += 1,
                2 => at = at.saturating_sub(1),
                _ => {}
            }
            let mut request = talk[at % talk.len()].clone();
            at += 1;
            for _ in 0..self.rng.below(4) {
                self.change(&mut request.2);
            }
            match self.rng.below(60) {
                0 => request.1 = self.rng.pick(&self.from.talks[0]).1.clone(),
                1 => request.0 = b"apply".to_vec(),
                2 => request.0 = b"RESTORE".to_vec(),
                3 => request.1 = [b"LOCAL_", &request.1[..]].concat(),
                _ => {}
            }
            let mut line = [&request.0[..], b" ", &request.1, b" "].concat();
            self.write(&request.2, &mut line);
            line.extend_from_slice(if self.rng.below(20) == 0 { b"\n" } else { b"\r\n" });
            self.spoil(&mut line);
            out.extend(line);
        }
        out
    }

    /// What is no request with a list.
    fn between(&mut self) -> Vec<u8> {
        const LINES: &[&str] = &[
            "RESTART\r\n",
            "NOOP\r\n",
            "\r\n",
            " \r\n",
            "GET\r\n",
            "GET \r\n",
            "APPLY  \r\n",
            "XYZZY\r\n",
            "COMPRESS\r\n",
            "COMPRESS LZMA\r\n",
            "STARTTLS\r\n",
            "STARTTLS x\r\n",
            "AUTHENTICATE\r\n",
            "AUTHENTICATE PLAIN\r\n",
            "AUTHENTICATE PLAIN AAAA\r\n",
            "AUTHENTICATE GSSAPI =\r\n",
            "APPLY UNUSER f1\r\n",
            "APPLY UNUSER \"\"\r\n",
            "GET USER \"\"\r\n",
            "C01 CAPABILITY\r\n",
        ];
        self.rng.pick(LINES).as_bytes().to_vec()
    }

    fn text(&mut self) -> Value {
        match self.rng.below(8) {
            0 => Value::text("x".repeat(1 + self.rng.below(900))),
            1 => Value::Text((0..self.rng.below(30)).map(|_| self.rng.below(256) as u8).collect()),
            2 => Value::text(format!("{:040x}", self.rng.below(4))),
            3 => Value::text(format!("f000000{}", self.rng.below(4))),
            4 => Value::text(self.rng.pick(NUMBERS)),
            _ => Value::text(self.rng.pick(NAMES)),
        }
    }

    fn known(&mut self, key: Option<&[u8]>) -> Value {
        let key = key.map_or_else(|| self.rng.pick(&self.from.keys).clone(), <[u8]>::to_vec);
        let known = self.from.values.get(&key).map(|list| self.rng.pick(list).clone());
        known.unwrap_or(Value::Nil)
    }

    /// Another value in the place of one.
    fn other(&mut self, old: &Value) -> Value {
        match self.rng.below(12) {
            0 => Value::Nil,
            1 => Value::List(vec![old.clone()]),
            2 => Value::List(Vec::new()),
            3 => Value::Kv(Vec::new()),
            4 => Value::Kv(vec![(b"KEY".to_vec(), old.clone())]),
            5 => {
                // Deeper than anybody reads, or just not.
                (0..self.rng.below(70)).fold(Value::Nil, |inner, _| Value::List(vec![inner]))
            }
            6 => Value::File(Box::new(MessageFile {
                partition: b"default".to_vec(),
                guid: MessageGuid::default(),
                data: b"abc".to_vec(),
            })),
            7 => Value::List((0..self.rng.below(300)).map(|_| old.clone()).collect()),
            8 => self.known(None),
            _ => self.text(),
        }
    }

    /// Changes something somewhere inside.
    fn change(&mut self, value: &mut Value) {
        match value {
            Value::List(items) if !items.is_empty() && self.rng.below(8) > 0 => {
                let at = self.rng.below(items.len());
                match self.rng.below(12) {
                    0 => drop(items.remove(at)),
                    1 => items.insert(at, items[at].clone()),
                    2 => items.swap(at, 0),
                    3 => items.truncate(at),
                    _ => self.change(&mut items[at]),
                }
            }
            Value::Kv(items) if !items.is_empty() && self.rng.below(10) > 0 => {
                let at = self.rng.below(items.len());
                match self.rng.below(16) {
                    0 => drop(items.remove(at)),
                    1 => items.insert(at, items[at].clone()),
                    2 => items.swap(at, 0),
                    3 => items[at].0 = self.rng.pick(&self.from.keys).clone(),
                    4 => items[at].0.make_ascii_lowercase(),
                    5..=8 => items[at].1 = self.known(Some(&items[at].0.clone())),
                    9 => {
                        let key = self.rng.pick(&self.from.keys).clone();
                        let value = self.known(Some(&key));
                        items.insert(at, (key, value));
                    }
                    _ => self.change(&mut items[at].1),
                }
            }
            Value::Text(bytes) if bytes.iter().all(u8::is_ascii_digit) && self.rng.below(4) > 0 => {
                *bytes = match self.rng.below(3) {
                    0 => self.rng.below(10).to_string().into_bytes(),
                    _ => self.rng.pick(NUMBERS).as_bytes().to_vec(),
                }
            }
            Value::Text(bytes) if !bytes.is_empty() && self.rng.below(2) == 0 => {
                let at = self.rng.below(bytes.len());
                match self.rng.below(4) {
                    0 => bytes[at] = self.rng.below(256) as u8,
                    1 => drop(bytes.remove(at)),
                    2 => bytes.truncate(at),
                    _ => bytes.insert(at, *self.rng.pick(b"./\\\"\0\r\n(){}%^! ~")),
                }
            }
            Value::File(file) => match self.rng.below(3) {
                0 => file.guid.0[0] ^= 1,
                1 => file.data.push(b'x'),
                _ => file.data.clear(),
            },
            other => *other = self.other(other),
        }
    }

    /// Mostly as Cyrus writes it.
    fn write(&mut self, value: &Value, out: &mut Vec<u8>) {
        match value {
            Value::List(items) => {
                out.push(b'(');
                for (at, item) in items.iter().enumerate() {
                    if at > 0 {
                        self.blank(out);
                    }
                    self.write(item, out);
                }
                out.push(b')');
            }
            Value::Kv(items) => {
                out.extend_from_slice(b"%(");
                for (at, (key, item)) in items.iter().enumerate() {
                    if at > 0 {
                        self.blank(out);
                    }
                    Value::text(key).encode(out, Literals::NonSynchronizing);
                    self.blank(out);
                    self.write(item, out);
                }
                out.push(b')');
            }
            Value::Text(bytes) if self.rng.below(60) == 0 => {
                let size = match self.rng.below(30) {
                    0 => (bytes.len() + 1).to_string(),
                    1 => bytes.len().saturating_sub(1).to_string(),
                    2 => self.rng.pick(NUMBERS).to_string(),
                    _ => bytes.len().to_string(),
                };
                let plus = if self.rng.below(4) == 0 { "" } else { "+" };
                let end = if self.rng.below(6) == 0 { "\n" } else { "\r\n" };
                out.extend_from_slice(format!("{{{size}{plus}}}{end}").as_bytes());
                out.extend_from_slice(bytes);
            }
            Value::File(file) if self.rng.below(8) == 0 => {
                let MessageFile { guid, data, .. } = &**file;
                let size = match self.rng.below(10) {
                    0 => self.rng.pick(NUMBERS).to_string(),
                    1 => (data.len() + 1).to_string(),
                    2 => data.len().saturating_sub(1).to_string(),
                    _ => data.len().to_string(),
                };
                let partition = *self.rng.pick(&["default", "../x", "\"\"", "default default", "NIL", "{1+}\r\nx"]);
                out.extend_from_slice(format!("%{{{partition} {guid} {size}}}\r\n").as_bytes());
                out.extend_from_slice(data);
            }
            other => other.encode(out, Literals::NonSynchronizing),
        }
    }

    fn blank(&mut self, out: &mut Vec<u8>) {
        const BLANKS: &[&[u8]] = &[b"  ", b"\t", b"\r\n", b"\n", b" \r\n ", b""];
        out.extend_from_slice(if self.rng.below(200) == 0 { self.rng.pick::<&[u8]>(BLANKS) } else { b" " });
    }

    /// Now and then a byte is another one, is missing, or the line ends early.
    fn spoil(&mut self, line: &mut Vec<u8>) {
        let at = self.rng.below(line.len());
        match self.rng.below(120) {
            0 => line[at] = self.rng.below(256) as u8,
            1 => drop(line.remove(at)),
            2 => {
                line.truncate(at);
                line.extend_from_slice(b"\r\n");
            }
            3 => line.insert(at, *self.rng.pick(b"()\"{}%\\\r\n\0 ")),
            4 => {
                let piece: Vec<u8> = line[at..].iter().take(40).copied().collect();
                line.splice(at..at, piece);
            }
            _ => {}
        }
    }
}
