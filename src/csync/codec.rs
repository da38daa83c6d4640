//! Splits what a server sends into whole answers. An answer line ends at a line end, but not inside a list, a quoted
//! string, a literal or a file: 2.4 breaks lines inside lists.

/// The bytes cannot be an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("an answer of more than {0} bytes")]
    TooLong(usize),
    #[error("an answer with a size that is no number")]
    Size,
}

/// One answer may not be longer: the record list of a mailbox of two million messages.
pub const MAX_ANSWER: usize = 512 << 20;

/// Collects bytes and gives whole answers.
#[derive(Debug, Default)]
pub struct Splitter {
    buffer: Vec<u8>,
    /// Bytes of `buffer` already given out.
    start: usize,
    /// Where scanning goes on.
    at: usize,
    depth: usize,
    quoted: bool,
    /// Lists are counted only in lines that hold one.
    list: Option<bool>,
}

/// Answers that are followed by a list value.
const LISTS: [&[u8]; 10] = [
    b"* MAILBOX ",
    b"* MISSING ",
    b"* LSUB ",
    b"* SEEN ",
    b"* QUOTA ",
    b"* SIEVE ",
    b"* ANNOTATION ",
    b"* ENABLED ",
    b"* MESSAGE ",
    b"* FILE ",
];

impl Splitter {
    /// Adds what was received.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 && self.start == self.buffer.len() {
            self.buffer.clear();
            self.at = 0;
            self.start = 0;
        } else if self.start > 1 << 20 {
            self.buffer.drain(..self.start);
            self.at = self.at.saturating_sub(self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Nothing is left that was not given out.
    pub fn is_empty(&self) -> bool {
        self.start == self.buffer.len()
    }

    /// The next whole answer without its line end; `None` when more bytes are needed.
    pub fn next_answer(&mut self) -> Result<Option<Vec<u8>>, CodecError> {
        loop {
            if self.at.saturating_sub(self.start) > MAX_ANSWER {
                return Err(CodecError::TooLong(MAX_ANSWER));
            }
            let line = self.buffer.get(self.start..).unwrap_or_default();
            if self.list.is_none() {
                // Enough to tell the kind, or a whole short line.
                if line.len() < 13 && !line.contains(&b'\n') {
                    return Ok(None);
                }
                self.list = Some(LISTS.iter().any(|prefix| line.starts_with(prefix)));
            }
            let list = self.list == Some(true);
            let Some(&byte) = self.buffer.get(self.at) else { return Ok(None) };
            match byte {
                b'\\' if list && self.quoted => {
                    if self.buffer.get(self.at.saturating_add(1)).is_none() {
                        return Ok(None);
                    }
                    self.at = self.at.saturating_add(1);
                }
                b'"' if list => self.quoted = !self.quoted,
                b'(' if list && !self.quoted => self.depth = self.depth.saturating_add(1),
                b')' if list && !self.quoted => self.depth = self.depth.saturating_sub(1),
                b'{' if list && !self.quoted => match self.literal()? {
                    Literal::None => {}
                    Literal::Incomplete => return Ok(None),
                    Literal::Ends(end) => {
                        self.at = end;
                        continue;
                    }
                },
                b'\n' if self.depth == 0 && !self.quoted => {
                    let end = self.at;
                    let mut answer = self.buffer.get(self.start..end).unwrap_or_default().to_vec();
                    if answer.last() == Some(&b'\r') {
                        answer.pop();
                    }
                    self.at = end.saturating_add(1);
                    self.start = self.at;
                    self.list = None;
                    return Ok(Some(answer));
                }
                _ => {}
            }
            self.at = self.at.saturating_add(1);
        }
    }

    /// At `{`: a literal or file size up to `}` and a line end, and all of its bytes?
    fn literal(&self) -> Result<Literal, CodecError> {
        let rest = self.buffer.get(self.at..).unwrap_or_default();
        let Some(close) = rest.iter().take(4096).position(|&byte| byte == b'}') else {
            return Ok(if rest.len() < 4096 { Literal::Incomplete } else { Literal::None });
        };
        let inside = rest.get(1..close).unwrap_or_default();
        let inside = inside.strip_suffix(b"+").unwrap_or(inside);
        let digits = inside.rsplit(|&byte| byte == b' ').next().unwrap_or_default();
        let after = rest.get(close.saturating_add(1)..).unwrap_or_default();
        let line_end = match after {
            [b'\n', ..] => 1,
            [b'\r', b'\n', ..] => 2,
            [] | [b'\r'] => return Ok(Literal::Incomplete),
            _ => return Ok(Literal::None),
        };
        let size: usize =
            std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).ok_or(CodecError::Size)?;
        if size > MAX_ANSWER {
            return Err(CodecError::TooLong(MAX_ANSWER));
        }
        let end = self.at.saturating_add(close).saturating_add(1).saturating_add(line_end).saturating_add(size);
        Ok(if end <= self.buffer.len() { Literal::Ends(end) } else { Literal::Incomplete })
    }
}

enum Literal {
    None,
    Incomplete,
    Ends(usize),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TALK: &[u8] = b"* SASL PLAIN DIGEST-MD5\r\n* OK host (x Cyrus sync server 3.6\r\n\
        * MAILBOX %(MBOXNAME \"a)\\\"b\" N {5+}\r\na\r\n)( RECORD (\r\n  %(UID 1) \r\n  %(UID 2)))\r\nOK success\r\n\
        * MESSAGE %{default de1a24f844ec1fb8728748225d649c3655d68214 4}\r\n(\r\n\"\r\nNO it's {3} \"odd\r\n* LSUB ()\nOK\n";

    fn whole() -> Vec<Vec<u8>> {
        let mut splitter = Splitter::default();
        splitter.push(TALK);
        std::iter::from_fn(|| splitter.next_answer().expect("no error")).collect()
    }

    #[test]
    fn answers_end_where_they_end() {
        let answers = whole();
        assert_eq!(answers.len(), 8, "{answers:?}");
        assert_eq!(answers[0], b"* SASL PLAIN DIGEST-MD5");
        assert!(answers[2].ends_with(b"%(UID 2)))"));
        assert!(answers[4].ends_with(b"(\r\n\""));
        assert_eq!(answers[5], b"NO it's {3} \"odd");
        assert_eq!(answers[7], b"OK");
    }

    #[test]
    fn the_pieces_they_come_in_do_not_matter() {
        let expected = whole();
        for size in 1..20 {
            let (mut splitter, mut got) = (Splitter::default(), Vec::new());
            for piece in TALK.chunks(size) {
                splitter.push(piece);
                while let Some(answer) = splitter.next_answer().expect("no error") {
                    got.push(answer);
                }
            }
            assert_eq!(got, expected, "pieces of {size}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_or_wait(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut splitter = Splitter::default();
            splitter.push(b"* MAILBOX ");
            splitter.push(&bytes);
            for _ in 0..400 {
                if !matches!(splitter.next_answer(), Ok(Some(_))) { break }
            }
        }
    }
}
