//! Bytes as JSON text that people can read: UTF-8 as it stands, everything else (and `\`) as `\xNN`.

use serde::{Deserialize, Deserializer, Serializer};

pub(super) fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for char in chunk.valid().chars() {
            match char {
                '\\' => out.push_str("\\x5c"),
                char => out.push(char),
            }
        }
        chunk.invalid().iter().for_each(|byte| out.push_str(&format!("\\x{byte:02x}")));
    }
    out
}

pub(super) fn unescape(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\\x") {
        let (before, escaped) = rest.split_at(at);
        out.extend_from_slice(before.as_bytes());
        let digits = escaped.get(2..4);
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = escaped.get(4..).unwrap_or_default();
            }
            None => {
                out.extend_from_slice(b"\\x");
                rest = escaped.get(2..).unwrap_or_default();
            }
        }
    }
    out.extend_from_slice(rest.as_bytes());
    out
}

pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&escape(bytes))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    Ok(unescape(&String::deserialize(deserializer)?))
}

/// A name as one part of an object's path: letters, digits and `-_@` as they are, a dot unless it comes first,
/// everything else as `=NN`. Never empty, never `.`, never longer than it must be for the eye.
pub(super) fn path_part(bytes: &[u8]) -> String {
    let plain = |(at, byte): (usize, &u8)| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'@' => (*byte as char).to_string(),
        b'.' if at > 0 => ".".to_owned(),
        byte => format!("={byte:02x}"),
    };
    if bytes.is_empty() { "=".to_owned() } else { bytes.iter().enumerate().map(plain).collect() }
}

/// The name that gave this part of a path.
pub(super) fn from_path_part(part: &str) -> Vec<u8> {
    let mut pieces = part.split('=');
    let mut out = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        if let Some(byte) = piece.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            out.push(byte);
            out.extend_from_slice(piece.get(2..).unwrap_or_default().as_bytes());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_stays_readable() {
        assert_eq!(escape("Grüße\tx".as_bytes()), "Grüße\tx");
        assert_eq!(escape(b"a\\b\xff"), "a\\x5cb\\xff");
        assert_eq!(path_part(b"u3@dom.test"), "u3@dom.test");
        assert_eq!(path_part(b"../a b"), "=2e.=2fa=20b");
        assert_eq!(path_part(b""), "=");
    }

    proptest! {
        #[test]
        fn bytes_survive(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            prop_assert_eq!(unescape(&escape(&bytes)), bytes.clone());
            prop_assert_eq!(from_path_part(&path_part(&bytes)), bytes);
        }

        #[test]
        fn any_text_is_some_bytes(text in ".{0,40}") {
            unescape(&text);
            from_path_part(&text);
        }
    }
}
