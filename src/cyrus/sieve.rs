//! Sieve script files: `NAME.script`, `NAME.bc`, and the link `defaultbc` (very old: `default`) to the active one.

use crate::model::SieveName;
use base64::Engine;

/// Name of the script in a `.script` file.
pub fn script_name(file: &[u8]) -> Option<SieveName> {
    file.strip_suffix(b".script").filter(|name| !name.is_empty()).map(SieveName::new)
}

/// The active script, by the target of `defaultbc` or `default`.
pub fn active_name(link_target: &[u8]) -> Option<SieveName> {
    let file = link_target.rsplit(|&byte| byte == b'/').next()?;
    let name = file.strip_suffix(b".bc").or_else(|| file.strip_suffix(b".script"))?;
    (!name.is_empty()).then(|| SieveName::new(name))
}

/// Name and text of a script that 3.6 and later keep as a message; `None` for a message that is none.
pub fn of_message(message: &[u8]) -> Option<(SieveName, Vec<u8>)> {
    let end = message.windows(4).position(|four| four == b"\r\n\r\n")?;
    let (head, text) = (message.get(..end)?, message.get(end.checked_add(4)?..)?);
    let mut lines = head.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let first = lines.find_map(|line| {
        let (name, value) = line.split_at_checked(8)?;
        name.eq_ignore_ascii_case(b"subject:").then_some(value)
    })?;
    let mut subject = first.to_vec();
    for line in lines.take_while(|line| matches!(line.first(), Some(b' ' | b'\t'))) {
        subject.extend_from_slice(line);
    }
    let name = decoded(subject.trim_ascii());
    (!name.is_empty()).then(|| (SieveName::from(name), text.to_vec()))
}

/// A header value with its encoded words (RFC 2047) decoded. Cyrus writes them in UTF-8.
fn decoded(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = value;
    let mut after_word = false;
    while let Some(first) = rest.first() {
        if let Some((bytes, after)) = encoded_word(rest) {
            // Blanks between two encoded words belong to neither.
            if after_word {
                out.truncate(out.trim_ascii_end().len());
            }
            out.extend(bytes);
            rest = after;
            after_word = true;
            continue;
        }
        after_word &= first.is_ascii_whitespace();
        out.push(*first);
        rest = rest.get(1..).unwrap_or_default();
    }
    out
}

/// `=?UTF-8?Q?text?=` at the beginning, decoded, and what follows it.
fn encoded_word(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut parts = text.strip_prefix(b"=?")?.splitn(3, |&byte| byte == b'?');
    let (charset, encoding, rest) = (parts.next()?, parts.next()?, parts.next()?);
    if !charset.eq_ignore_ascii_case(b"utf-8") && !charset.eq_ignore_ascii_case(b"us-ascii") {
        return None;
    }
    let end = rest.windows(2).position(|two| two == b"?=")?;
    let (word, after) = (rest.get(..end)?, rest.get(end.checked_add(2)?..)?);
    let bytes = match encoding {
        b"B" | b"b" => base64::engine::general_purpose::STANDARD.decode(word).ok()?,
        b"Q" | b"q" => quoted(word),
        _ => return None,
    };
    Some((bytes, after))
}

fn quoted(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut bytes = word.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'_' => out.push(b' '),
            b'=' => {
                let digits: Vec<u8> = bytes.by_ref().take(2).copied().collect();
                let digits = std::str::from_utf8(&digits).ok();
                out.extend(digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()));
            }
            byte => out.push(byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_in_messages() {
        let check = |head: &str, expected: Option<&str>| {
            let message = format!("{head}\r\n\r\nkeep;\r\n");
            let found = of_message(message.as_bytes());
            assert_eq!(found, expected.map(|name| (SieveName::from(name), b"keep;\r\n".to_vec())), "{head}");
        };
        check("From: <u1@lab.test>\r\nSubject: main\r\nDate: x", Some("main"));
        check("subject: =?UTF-8?Q?gr=C3=BCn_1?=\r\n =?UTF-8?Q?2?= x", Some("gr\u{fc}n 12 x"));
        check("Subject: =?utf-8?B?Z3LDvG4=?=", Some("gr\u{fc}n"));
        check("Subject: =?koi8-r?Q?x?=", Some("=?koi8-r?Q?x?="));
        check("From: x", None);
        check("Subject: ", None);
        assert_eq!(of_message(b"Subject: x\r\n"), None);
    }

    #[test]
    fn names() {
        assert_eq!(script_name(b"main.script"), Some("main".into()));
        assert_eq!(script_name(b"main.bc"), None);
        assert_eq!(active_name(b"main.bc"), Some("main".into()));
        assert_eq!(active_name(b"/sieve/m/me/main.script"), Some("main".into()));
        assert_eq!(active_name(b"main"), None);
    }
}
