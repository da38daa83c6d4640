//! The same requests on the IMAP port of a 3.x server (`SYNCGET`, `SYNCAPPLY` in an admin's login): each gets a tag and
//! another verb, the payload and the untagged answers stay as they are. Without this the rest of the room knows one form.

use std::borrow::Cow;

/// One connection to an IMAP port.
#[derive(Debug, Default)]
pub struct Dress {
    /// Of the request that was begun last.
    tag: u64,
}

/// The verb of the csync port, and what stands for it.
const VERBS: &[(&str, &str)] =
    &[("GET ", "SYNCGET "), ("APPLY ", "SYNCAPPLY "), ("RESTART\r\n", "SYNCRESTART\r\n"), ("EXIT\r\n", "LOGOUT\r\n")];

impl Dress {
    /// The first bytes of a request as they are to be sent.
    pub fn request(&mut self, plain: &[u8]) -> Vec<u8> {
        self.tag = self.tag.wrapping_add(1);
        let mut out = format!("S{} ", self.tag).into_bytes();
        let rest = VERBS.iter().find_map(|(verb, imap)| Some((plain.strip_prefix(verb.as_bytes())?, imap)));
        match rest {
            Some((rest, imap)) => {
                out.extend_from_slice(imap.as_bytes());
                out.extend_from_slice(rest);
            }
            None => out.extend_from_slice(plain),
        }
        out
    }

    /// An answer as the csync port gives it; `None` for an answer to another request.
    pub fn answer<'a>(&self, line: &'a [u8]) -> Option<&'a [u8]> {
        if line.starts_with(b"* ") || line.starts_with(b"+") {
            return Some(line);
        }
        line.strip_prefix(format!("S{} ", self.tag).as_bytes())
    }
}

/// The words of `* CAPABILITY …`, or of `[CAPABILITY …]` in a greeting.
pub fn capabilities(line: &str) -> Option<Vec<String>> {
    let at = line.find("CAPABILITY ")?;
    let words: Cow<'_, str> = line.get(at..)?.split(']').next()?.into();
    Some(words.split_ascii_whitespace().skip(1).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_gets_a_tag_and_the_verb_of_the_imap_port() {
        let mut dress = Dress::default();
        for (plain, expected) in [
            ("GET USER alice\r\n", "S1 SYNCGET USER alice\r\n"),
            ("APPLY MESSAGE (%{default x 1}\r\n", "S2 SYNCAPPLY MESSAGE (%{default x 1}\r\n"),
            ("RESTART\r\n", "S3 SYNCRESTART\r\n"),
            ("NOOP\r\n", "S4 NOOP\r\n"),
            ("EXIT\r\n", "S5 LOGOUT\r\n"),
        ] {
            assert_eq!(String::from_utf8_lossy(&dress.request(plain.as_bytes())), expected);
        }
    }

    #[test]
    fn an_answer_is_ours_or_nobodys() {
        let mut dress = Dress::default();
        dress.request(b"NOOP\r\n");
        for (line, expected) in [
            ("S1 OK success", Some("OK success")),
            ("* MAILBOX %()", Some("* MAILBOX %()")),
            ("+ bm9uY2U=", Some("+ bm9uY2U=")),
            ("S10 OK success", None),
            ("S0 OK success", None),
            ("OK success", None),
        ] {
            assert_eq!(dress.answer(line.as_bytes()), expected.map(str::as_bytes), "{line}");
        }
    }

    #[test]
    fn capabilities_of_a_greeting_and_of_an_answer() {
        let greeting = "* OK [CAPABILITY IMAP4rev1 AUTH=PLAIN SASL-IR] v361b.example Cyrus IMAP 3.6.1-4 server ready";
        let words = capabilities(greeting).expect("some");
        assert_eq!(words, ["IMAP4rev1", "AUTH=PLAIN", "SASL-IR"]);
        assert_eq!(capabilities("* CAPABILITY IMAP4rev1 X-REPLICATION").expect("some").len(), 2);
        assert_eq!(capabilities("* OK ready"), None);
    }
}
