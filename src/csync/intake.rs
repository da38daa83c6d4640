//! Splits what a client sends into whole requests. A request line ends at a line end, but not inside a list or a
//! literal. The bytes of files never stay here: they are handed on as they come.

use crate::model::MessageGuid;

/// The bytes cannot become a request; where the next one begins is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IntakeError {
    #[error("request is longer than {0} bytes")]
    TooLong(usize),
    #[error("size is no number")]
    Size,
    #[error("file without partition, GUID and size")]
    File,
    #[error("lists are nested too deep")]
    Depth,
}

/// Takes the bytes of files.
pub trait Files {
    fn begin(&mut self, guid: MessageGuid, size: u64);
    fn data(&mut self, bytes: &[u8]);
    fn end(&mut self);
}

/// A whole request without its line end. Of a file only the head is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    pub bytes: Vec<u8>,
    pub files: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Text,
    /// Bytes of a literal, as many as are still to come.
    Literal(u64),
    /// Bytes of a file.
    File(u64),
}

/// Deeper than any list of the protocol.
const MAX_DEPTH: usize = 64;

/// Longer than any `%{partition guid size}`.
const MAX_TAG: usize = 512;

/// Words whose arguments may hold lists, quoted strings, literals and files.
const LISTS: [&[u8]; 3] = [b"GET", b"APPLY", b"RESTORE"];

/// Collects one request after another.
#[derive(Debug)]
pub struct Intake {
    line: Vec<u8>,
    files: usize,
    state: State,
    depth: usize,
    quoted: bool,
    escaped: bool,
    list: Option<bool>,
    /// Longest request, files not counted.
    pub limit: usize,
}

impl Intake {
    pub fn new(limit: usize) -> Self {
        Self {
            line: Vec::new(),
            files: 0,
            state: State::Text,
            depth: 0,
            quoted: false,
            escaped: false,
            list: None,
            limit,
        }
    }

    /// Bytes of the unfinished request.
    pub fn held(&self) -> usize {
        self.line.capacity()
    }

    /// Nothing of a request has come yet.
    pub fn is_idle(&self) -> bool {
        self.line.is_empty()
    }

    /// Takes bytes up to the end of a request; says how many, and gives the request if it is whole.
    pub fn take(&mut self, input: &[u8], files: &mut dyn Files) -> Result<(usize, Option<Line>), IntakeError> {
        let mut at = 0_usize;
        while let Some(&byte) = input.get(at) {
            match self.state {
                State::Literal(left) | State::File(left) if left > 0 => {
                    let rest = input.get(at..).unwrap_or_default();
                    let count = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                    let part = rest.get(..count).unwrap_or_default();
                    let left = left.saturating_sub(count as u64);
                    at = at.saturating_add(count);
                    match self.state {
                        State::File(_) => {
                            files.data(part);
                            self.state = State::File(left);
                        }
                        _ => {
                            self.line.extend_from_slice(part);
                            self.state = State::Literal(left);
                        }
                    }
                    self.finish_bytes(files);
                    continue;
                }
                _ => {}
            }
            at = at.saturating_add(1);
            self.line.push(byte);
            if self.line.len() > self.limit {
                return Err(IntakeError::TooLong(self.limit));
            }
            if self.text(byte, files)? {
                return Ok((at, Some(self.finish())));
            }
        }
        Ok((at, None))
    }

    fn finish_bytes(&mut self, files: &mut dyn Files) {
        match self.state {
            State::File(0) => {
                files.end();
                self.state = State::Text;
            }
            State::Literal(0) => self.state = State::Text,
            _ => {}
        }
    }

    /// One byte outside literals and files; true at the end of the request.
    fn text(&mut self, byte: u8, files: &mut dyn Files) -> Result<bool, IntakeError> {
        let list = match self.list {
            Some(list) => list,
            None if byte == b' ' => {
                let word = self.line.get(..self.line.len().saturating_sub(1)).unwrap_or_default();
                let list = LISTS.iter().any(|known| known.eq_ignore_ascii_case(word));
                self.list = Some(list);
                list
            }
            None => false,
        };
        if !list {
            return Ok(byte == b'\n');
        }
        if self.quoted {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.quoted = false,
                // No reader takes a line end inside quotes: the line is at its end, and not a good one.
                b'\n' => return Ok(true),
                _ => {}
            }
            return Ok(false);
        }
        match byte {
            b'"' => self.quoted = true,
            b'(' => {
                self.depth = self.depth.saturating_add(1);
                if self.depth > MAX_DEPTH {
                    return Err(IntakeError::Depth);
                }
            }
            b')' => self.depth = self.depth.saturating_sub(1),
            b'\n' => {
                return Ok(!self.line_end(files)? && self.depth == 0);
            }
            _ => {}
        }
        Ok(false)
    }

    /// At a line end: do the bytes of a literal or a file follow?
    fn line_end(&mut self, files: &mut dyn Files) -> Result<bool, IntakeError> {
        let line = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Some(inside) = line.strip_suffix(b"}") else { return Ok(false) };
        // No further back than a tag can begin: a long request with many line ends would be searched again at each.
        let first = inside.len().saturating_sub(MAX_TAG);
        let near = inside.get(first..).unwrap_or_default();
        let Some(open) = near.iter().rposition(|&byte| byte == b'{') else { return Ok(false) };
        let open = open.saturating_add(first);
        let head = inside.get(open.saturating_add(1)..).unwrap_or_default();
        if open.checked_sub(1).and_then(|before| inside.get(before)) == Some(&b'%') {
            let mut words = head.split(|&byte| byte == b' ').rev().filter(|word| !word.is_empty());
            let size = words.next().and_then(number).ok_or(IntakeError::File)?;
            let guid = words.next().and_then(MessageGuid::parse_hex).ok_or(IntakeError::File)?;
            words.next().ok_or(IntakeError::File)?;
            self.files = self.files.saturating_add(1);
            files.begin(guid, u64::from(size));
            self.state = State::File(u64::from(size));
        } else {
            let size = number(head.strip_suffix(b"+").unwrap_or(head)).ok_or(IntakeError::Size)?;
            if usize::try_from(size).unwrap_or(usize::MAX).saturating_add(self.line.len()) > self.limit {
                return Err(IntakeError::TooLong(self.limit));
            }
            self.state = State::Literal(u64::from(size));
        }
        self.finish_bytes(files);
        Ok(true)
    }

    fn finish(&mut self) -> Line {
        let mut bytes = std::mem::take(&mut self.line);
        bytes.pop();
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        let files = self.files;
        *self = Self::new(self.limit);
        Line { bytes, files }
    }
}

/// Sizes on the wire have 32 bits.
fn number(digits: &[u8]) -> Option<u32> {
    let digits = Some(digits).filter(|digits| digits.iter().all(u8::is_ascii_digit))?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Default, PartialEq, Eq, Debug, Clone)]
    struct Kept(Vec<(String, u64, Vec<u8>, bool)>);

    impl Files for Kept {
        fn begin(&mut self, guid: MessageGuid, size: u64) {
            self.0.push((guid.to_string(), size, Vec::new(), false));
        }
        fn data(&mut self, bytes: &[u8]) {
            self.0.last_mut().expect("began").2.extend_from_slice(bytes);
        }
        fn end(&mut self) {
            self.0.last_mut().expect("began").3 = true;
        }
    }

    /// Requests, files, and the error that ended them.
    fn split(input: &[u8], piece: usize) -> (Vec<Line>, Kept, Option<IntakeError>) {
        let (mut intake, mut kept, mut lines) = (Intake::new(1 << 16), Kept::default(), Vec::new());
        for part in input.chunks(piece.max(1)) {
            let mut rest = part;
            while !rest.is_empty() {
                match intake.take(rest, &mut kept) {
                    Ok((count, line)) => {
                        lines.extend(line);
                        rest = &rest[count..];
                    }
                    Err(error) => return (lines, kept, Some(error)),
                }
            }
        }
        (lines, kept, None)
    }

    const TALK: &[u8] = b"AUTHENTICATE PLAIN AHJlcGwAc2VjcmV0\r\nNOOP\n\r\nget USER \"a(b\\\"\"\r\n\
        APPLY SIEVE %(USERID a CONTENT {6+}\r\n)(\"\r\n{)\r\nAPPLY MESSAGE (%{default de1a24f844ec1fb8728748225d649c3655d68214 4}\r\n\
        (\r\n\" %{default de1a24f844ec1fb8728748225d649c3655d68214 0}\r\n)\r\nAPPLY MAILBOX %(A b RECORD (\r\n  %(UID 1) \r\n  %(UID 2)))\r\n\
        GET MAILBOXES ({0+}\r\n)\r\nNOOP (\r\nGET USER {3}\r\nabc\r\nGET USER a}\r\n";

    #[test]
    fn requests_end_where_they_end_whatever_pieces_they_come_in() {
        let (lines, kept, error) = split(TALK, TALK.len());
        assert_eq!(error, None);
        let text: Vec<String> = lines.iter().map(|line| String::from_utf8_lossy(&line.bytes).into_owned()).collect();
        assert_eq!(text.len(), 11, "{text:?}");
        assert_eq!(text[1], "NOOP");
        assert_eq!(text[2], "");
        assert_eq!(text[4], "APPLY SIEVE %(USERID a CONTENT {6+}\r\n)(\"\r\n{)");
        assert!(text[6].ends_with("%(UID 2)))"));
        assert_eq!(text[8], "NOOP (");
        assert_eq!(text[9], "GET USER {3}\r\nabc");
        assert_eq!((lines[5].files, kept.0.len()), (2, 2));
        assert_eq!((kept.0[0].1, kept.0[0].2.as_slice(), kept.0[0].3), (4, &b"(\r\n\""[..], true));
        assert_eq!((kept.0[1].1, kept.0[1].3), (0, true));
        for piece in 1..40 {
            let (again, files, error) = split(TALK, piece);
            assert_eq!((&again, &files, error), (&lines, &kept, None), "pieces of {piece}");
        }
    }

    #[test]
    fn what_has_no_end_is_refused() {
        let error = |input: &[u8]| split(input, 1000).2;
        assert_eq!(error(&[b'x'; 70_000]), Some(IntakeError::TooLong(1 << 16)));
        assert_eq!(error(b"GET USER {99999+}\r\n"), Some(IntakeError::TooLong(1 << 16)));
        assert_eq!(error(b"GET USER {99999999999999999999+}\r\n"), Some(IntakeError::Size));
        assert_eq!(error(b"APPLY MESSAGE (%{default x 4}\r\n"), Some(IntakeError::File));
        assert_eq!(
            error(b"APPLY MESSAGE (%{default de1a24f844ec1fb8728748225d649c3655d68214 4294967296}\r\n"),
            Some(IntakeError::File)
        );
        assert_eq!(error(&[&b"GET USER "[..], &[b'('; 100]].concat()), Some(IntakeError::Depth));
    }

    /// Line ends that look like the end of a tag were searched back to the beginning of the request, each of them: hours.
    #[test]
    fn many_line_ends_take_no_longer_than_others() {
        let request = [&b"GET MAILBOXES ("[..], &b"}\n".repeat(2_000_000), b")\n"].concat();
        let mut intake = Intake::new(8 << 20);
        let (used, line) = intake.take(&request, &mut Kept::default()).expect("a request");
        assert_eq!((used, line.map(|line| line.bytes.len())), (request.len(), Some(request.len() - 1)));
    }

    proptest! {
        #[test]
        fn any_bytes_end_or_wait(start in 0_usize..3, bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let start: &[u8] = [&b"GET USER "[..], b"APPLY MESSAGE (%{default de1a24f844ec1fb8728748225d649c3655d68214 ", b""][start];
            let whole = [start, &bytes].concat();
            let (lines, kept, error) = split(&whole, whole.len());
            let (again, files, same) = split(&whole, 1);
            prop_assert_eq!((lines, kept, error), (again, files, same));
        }
    }
}
