//! `user_deny.db`: who may not use which services. User → `2 TAB services TAB message`, `1 TAB services` before 2.4.

use super::FormatError;

const PART: &str = "user_deny value";

/// One row's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// Patterns with commas between, `!` before one that is an exception.
    pub services: String,
    pub message: Option<String>,
}

/// Reads one value.
pub fn parse_value(value: &[u8]) -> Result<Denied, FormatError> {
    let fault = |what: &str| FormatError::value(PART, 0, what);
    let mut fields = value.splitn(3, |byte| *byte == b'\t');
    let version = fields.next().unwrap_or_default();
    if !matches!(version, b"1" | b"2") {
        return Err(fault("version is neither 1 nor 2"));
    }
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let services = fields.next().map(text).ok_or_else(|| fault("services are missing"))?;
    let message = fields.next().map(text).filter(|text| !text.is_empty());
    Ok(Denied { services, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read() {
        let denied = |services: &str, message: Option<&str>| Denied {
            services: services.into(),
            message: message.map(str::to_owned),
        };
        assert_eq!(
            parse_value(b"2\timap,!pop3\tclosed\tfor now").ok(),
            Some(denied("imap,!pop3", Some("closed\tfor now")))
        );
        assert_eq!(parse_value(b"1\t*").ok(), Some(denied("*", None)));
        for bad in [&b""[..], b"2", b"3\t*", b"x\t*"] {
            assert!(parse_value(bad).is_err(), "{bad:?}");
        }
    }
}
