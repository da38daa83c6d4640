//! Records of `sync/log`: `TYPE SP arg [SP arg]`, one in a line, of every release.

/// What a record says has changed. Names are internal names, users external ids, as in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Everything of a user; 2.3 and 2.4 also for one who is gone.
    User(Vec<u8>),
    Unuser(Vec<u8>),
    /// Sieve scripts (2.3), later anything outside of mailboxes.
    Meta(Vec<u8>),
    /// `MAILBOX`, `APPEND`, `ACL`, `UNMAILBOX`.
    Mailbox(Vec<u8>),
    /// `DOUBLEMAILBOX` and `RENAME`: both belong together.
    Mailboxes(Vec<u8>, Vec<u8>),
    Quota(Vec<u8>),
    /// Of a mailbox, or of the server where the name is empty.
    Annotation(Vec<u8>),
    /// The second word is a uniqueid (2.4 and later) or a name.
    Seen(Vec<u8>, Vec<u8>),
    Sub(Vec<u8>, Vec<u8>),
    /// Not a record of any release, or two that ran together: it says only that something changed.
    Unknown(Vec<u8>),
}

/// Reads one line without its line end; `None` for an empty one.
pub fn parse(line: &[u8]) -> Option<Record> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.iter().all(u8::is_ascii_whitespace) {
        return None;
    }
    Some(known(line).unwrap_or_else(|| Record::Unknown(line.to_vec())))
}

fn known(line: &[u8]) -> Option<Record> {
    let (kind, rest) = word(line)?;
    let kind = kind.to_ascii_uppercase();
    let (one, rest) = word(rest)?;
    let record = match kind.as_slice() {
        b"USER" => Record::User(one),
        b"UNUSER" => Record::Unuser(one),
        b"META" | b"SIEVE" => Record::Meta(one),
        b"MAILBOX" | b"APPEND" | b"ACL" | b"UNMAILBOX" => Record::Mailbox(one),
        b"QUOTA" => Record::Quota(one),
        b"ANNOTATION" => Record::Annotation(one),
        b"DOUBLEMAILBOX" | b"RENAME" | b"SEEN" | b"SUB" | b"UNSUB" => {
            let (two, rest) = word(rest)?;
            let make = match kind.as_slice() {
                b"SEEN" => Record::Seen,
                b"SUB" | b"UNSUB" => Record::Sub,
                _ => Record::Mailboxes,
            };
            return is_end(rest).then(|| make(one, two));
        }
        _ => return None,
    };
    is_end(rest).then_some(record)
}

fn is_end(rest: &[u8]) -> bool {
    rest.iter().all(|byte| matches!(byte, b' ' | b'\t'))
}

/// The first word, bare or quoted, and what follows it.
fn word(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let blanks = text.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    let text = text.get(blanks..)?;
    let Some(quoted) = text.strip_prefix(b"\"") else {
        let end = text.iter().position(|byte| matches!(byte, b' ' | b'\t' | b'(' | b')' | b'"')).unwrap_or(text.len());
        return (end > 0).then(|| text.split_at_checked(end).map(|(word, rest)| (word.to_vec(), rest)))?;
    };
    let mut word = Vec::new();
    let mut rest = quoted;
    loop {
        match rest {
            [b'"', after @ ..] => return Some((word, after)),
            [b'\\', byte, after @ ..] => {
                word.push(*byte);
                rest = after;
            }
            [byte, after @ ..] => {
                word.push(*byte);
                rest = after;
            }
            [] => return None,
        }
    }
}

/// One argument as every release writes it. `None` when it has a line end, which no record can hold.
pub fn quote(argument: &[u8]) -> Option<Vec<u8>> {
    if argument.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
        return None;
    }
    let special = |byte: &u8| matches!(byte, b' ' | b'\t' | b'(' | b')' | b'"' | b'\\' | b'{' | b'}');
    if !argument.is_empty() && !argument.iter().any(special) {
        return Some(argument.to_vec());
    }
    let mut out = vec![b'"'];
    for &byte in argument {
        if matches!(byte, b'\\' | b'"' | b'{' | b'}') {
            out.push(b'\\');
        }
        out.push(byte);
    }
    out.push(b'"');
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(line: &str, expected: Record) {
        assert_eq!(parse(line.as_bytes()), Some(expected), "{line}");
    }

    #[test]
    fn records_of_every_release() {
        let text = |text: &str| text.as_bytes().to_vec();
        check("USER u1", Record::User(text("u1")));
        check("UNUSER u1", Record::Unuser(text("u1")));
        check("META u1", Record::Meta(text("u1")));
        check("SIEVE u1", Record::Meta(text("u1")));
        for kind in ["MAILBOX", "mailbox", "APPEND", "ACL", "UNMAILBOX"] {
            check(&format!("{kind} user.u1.Sent"), Record::Mailbox(text("user.u1.Sent")));
        }
        check("DOUBLEMAILBOX user.u1 user.u1.Sent", Record::Mailboxes(text("user.u1"), text("user.u1.Sent")));
        check("RENAME user.a user.b", Record::Mailboxes(text("user.a"), text("user.b")));
        check("QUOTA dom.test!user.u3", Record::Quota(text("dom.test!user.u3")));
        check("ANNOTATION \"\"", Record::Annotation(text("")));
        check("SEEN u1 4rmscy31", Record::Seen(text("u1"), text("4rmscy31")));
        check("SUB u1 user.u2", Record::Sub(text("u1"), text("user.u2")));
        check("UNSUB u1 user.u2", Record::Sub(text("u1"), text("user.u2")));
    }

    #[test]
    fn quoted_names() {
        check("MAILBOX \"user.u1.A B\"", Record::Mailbox(b"user.u1.A B".to_vec()));
        check(r#"MAILBOX "user.u1.\{x\}\"\\""#, Record::Mailbox(br#"user.u1.{x}"\"#.to_vec()));
    }

    #[test]
    fn what_is_no_record_is_told_as_such() {
        for line in [
            "MAILBOX",
            "SEEN u1",
            "MAILBOX a b",
            "MAILBOX user.aMAILBOX user.b",
            "X y",
            "MAILBOX \"a",
            "(",
            "MAILBOX (a",
        ] {
            assert_eq!(parse(line.as_bytes()), Some(Record::Unknown(line.as_bytes().to_vec())), "{line}");
        }
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b" \r"), None);
        assert_eq!(quote(b"a\nb"), None);
    }

    proptest! {
        #[test]
        fn what_is_quoted_is_read(name in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Some(quoted) = quote(&name) {
                let line = [b"SUB u ".to_vec(), quoted].concat();
                // A name of blanks only, or a form feed, is still a name.
                prop_assert_eq!(parse(&line), Some(Record::Sub(b"u".to_vec(), name)));
            }
        }

        #[test]
        fn no_line_panics(line in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = parse(&line);
        }
    }
}
