//! `csync://USER@HOST:PORT` and its kin, with `%XX` in the user; `csync+unix:///path`.

use std::path::PathBuf;

/// How a scheme is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    scheme: &'static str,
    /// `None`: nobody has agreed on one.
    port: Option<u16>,
    /// `SYNCGET` and `SYNCAPPLY` inside an IMAP login.
    pub(super) imap: bool,
    /// TLS from the first byte on.
    pub(super) tls: bool,
}

const KINDS: &[Kind] = &[
    Kind { scheme: "csync", port: Some(2005), imap: false, tls: false },
    // sync_server itself has no such port; a TLS proxy before it has.
    Kind { scheme: "csyncs", port: None, imap: false, tls: true },
    Kind { scheme: "imap", port: Some(143), imap: true, tls: false },
    Kind { scheme: "imaps", port: Some(993), imap: true, tls: true },
];

/// Where a server listens, and who we are there.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Address {
    Tcp {
        user: String,
        host: String,
        port: u16,
        kind: Kind,
    },
    /// Whoever may connect is logged in.
    Unix(PathBuf),
}

impl Address {
    /// The protocol is IMAP's.
    pub(super) fn is_imap(&self) -> bool {
        matches!(self, Self::Tcp { kind, .. } if kind.imap)
    }
}

/// Reads a URL; the error says what is wrong and how to write it.
pub(super) fn parse(url: &str) -> Result<Address, String> {
    if let Some(path) = url.strip_prefix("csync+unix://") {
        if !path.starts_with('/') {
            return Err("the path must be absolute; write csync+unix:///PATH".into());
        }
        return Ok(Address::Unix(PathBuf::from(path)));
    }
    let (scheme, rest) = url.split_once("://").unwrap_or(("csync", ""));
    let kind = KINDS.iter().find(|kind| kind.scheme == scheme).copied();
    let kind = kind.ok_or_else(|| "write csync://USER@HOST:PORT".to_owned())?;
    let cure = format!("write {}://USER@HOST:PORT", kind.scheme);
    let rest = rest.trim_end_matches('/');
    let (user, place) = rest.rsplit_once('@').filter(|(user, _)| !user.is_empty()).ok_or(format!("no user; {cure}"))?;
    let (host, port) = match place.strip_prefix('[') {
        Some(v6) => {
            let (host, rest) = v6.split_once(']').ok_or(format!("an address without ]; {cure}"))?;
            (host, rest.strip_prefix(':'))
        }
        None => match place.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    let port = match port {
        None => kind.port.ok_or(format!("no port, and {} has none of its own; {cure}", kind.scheme))?,
        Some(port) => port.parse().map_err(|_| format!("{port} is no port number; {cure}"))?,
    };
    if host.is_empty() {
        return Err(format!("no host; {cure}"));
    }
    let user = percent_decoded(user).ok_or("the user must be UTF-8 with %XX for special characters")?;
    Ok(Address::Tcp { user, host: host.to_owned(), port, kind })
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let mut digit = || (bytes.next()? as char).to_digit(16);
            let (high, low) = (digit()?, digit()?);
            out.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(url: &str, expected: Option<(&str, &str, u16)>) {
        let got = parse(url).ok().map(|place| match place {
            Address::Tcp { user, host, port, .. } => (user, host, port),
            Address::Unix(path) => (String::new(), path.display().to_string(), 0),
        });
        assert_eq!(got, expected.map(|(user, host, port)| (user.into(), host.into(), port)), "{url}");
    }

    #[test]
    fn urls() {
        check("csync://repl@r.test:2006", Some(("repl", "r.test", 2006)));
        check("csync://re%40pl@r.test", Some(("re@pl", "r.test", 2005)));
        check("csync://a@b@r.test/", Some(("a@b", "r.test", 2005)));
        check("csync://repl@[::1]:99", Some(("repl", "::1", 99)));
        check("imap://repl@r.test", Some(("repl", "r.test", 143)));
        check("imaps://repl@r.test", Some(("repl", "r.test", 993)));
        check("csyncs://repl@r.test:2006", Some(("repl", "r.test", 2006)));
        check("csyncs://repl@r.test", None);
        check("csync+unix:///run/sync", Some(("", "/run/sync", 0)));
        for wrong in
            ["csync://r.test", "csync://@r.test", "csync://u@", "csync://u@h:x", "csync://u%4@h", "csync+unix://x"]
        {
            check(wrong, None);
        }
    }
}
