//! CRAM-MD5 (RFC 2195) and DIGEST-MD5 (RFC 2831), the client's side, without a security layer.

use super::sasl::Identity;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use md5::{Digest as _, Md5};
use std::collections::BTreeMap;
use zeroize::Zeroizing;

/// `user HEX(HMAC-MD5(password, challenge))`
pub(super) fn cram(user: &str, password: &str, challenge: &[u8]) -> Vec<u8> {
    // Any length of key will do, so this cannot fail.
    let Ok(mut mac) = Hmac::<Md5>::new_from_slice(password.as_bytes()) else { return Vec::new() };
    mac.update(challenge);
    format!("{user} {}", hex(&mac.finalize().into_bytes())).into_bytes()
}

/// One DIGEST-MD5 exchange.
pub(super) struct Digest {
    user: String,
    password: Zeroizing<String>,
    realm: Option<String>,
    service: &'static str,
    host: String,
    cnonce: String,
    /// What the server has to answer.
    expected: Option<String>,
}

impl Digest {
    pub(super) fn new(who: &Identity<'_>, nonce: &[u8; 16]) -> Self {
        Self {
            user: who.user.to_owned(),
            password: Zeroizing::new(who.password.to_owned()),
            realm: who.realm.map(str::to_owned),
            service: who.service,
            host: who.host.to_owned(),
            cnonce: STANDARD.encode(nonce),
            expected: None,
        }
    }

    /// Answers a challenge; `true` when the server has shown that it knows the password.
    pub(super) fn step(&mut self, challenge: &[u8], out: &mut Vec<u8>) -> Result<bool, &'static str> {
        let said = directives(challenge)?;
        if let Some(expected) = &self.expected {
            return match said.get("rspauth") {
                Some(values) if values.iter().any(|value| value == expected) => Ok(true),
                _ => Err("the server does not know the password"),
            };
        }
        let one = |key: &str| said.get(key).and_then(|values| values.first()).map(String::as_str);
        let nonce = one("nonce").ok_or("the challenge has no nonce")?;
        if one("algorithm") != Some("md5-sess") {
            return Err("the challenge is not for md5-sess");
        }
        if one("qop").is_some_and(|qop| !qop.split(',').any(|kind| kind.trim() == "auth")) {
            return Err("the server wants a security layer; set sasl_minimum_layer: 0 there, or use TLS");
        }
        let utf8 = one("charset") == Some("utf-8");
        let realm = self.realm.clone().or_else(|| one("realm").map(str::to_owned)).unwrap_or_default();
        let uri = format!("{}/{}", self.service, self.host);
        // Without the server's word for UTF-8 names are ISO 8859-1 where they can be.
        let bytes = |text: &str| match utf8 || !text.chars().all(|c| u32::from(c) < 256) {
            true => text.as_bytes().to_vec(),
            false => text.chars().filter_map(|c| u8::try_from(u32::from(c)).ok()).collect(),
        };
        let narrow = |text: &str| text.chars().filter_map(|c| u8::try_from(u32::from(c)).ok()).collect::<Vec<u8>>();
        // RFC 2831: in the secret itself ISO 8859-1 is used wherever it can be.
        let secret = |text: &str| match text.chars().all(|c| u32::from(c) < 256) {
            true => narrow(text),
            false => text.as_bytes().to_vec(),
        };
        let mut a1 = Zeroizing::new(Vec::new());
        let joined = Zeroizing::new([secret(&self.user), secret(&realm), secret(&self.password)].join(&b':'));
        a1.extend_from_slice(&Md5::digest(&*joined));
        a1.extend_from_slice(format!(":{nonce}:{}", self.cnonce).as_bytes());
        let ha1 = hex(&Md5::digest(&*a1));
        let answer = |a2: String| {
            let ha2 = hex(&Md5::digest(a2.as_bytes()));
            hex(&Md5::digest(format!("{ha1}:{nonce}:00000001:{}:auth:{ha2}", self.cnonce).as_bytes()))
        };
        let response = answer(format!("AUTHENTICATE:{uri}"));
        self.expected = Some(answer(format!(":{uri}")));
        let quoted = |bytes: Vec<u8>| {
            let mut out = vec![b'"'];
            for byte in bytes {
                if matches!(byte, b'"' | b'\\') {
                    out.push(b'\\');
                }
                out.push(byte);
            }
            out.push(b'"');
            out
        };
        if utf8 {
            out.extend_from_slice(b"charset=utf-8,");
        }
        out.extend_from_slice(b"username=");
        out.extend(quoted(bytes(&self.user)));
        if !realm.is_empty() {
            out.extend_from_slice(b",realm=");
            out.extend(quoted(bytes(&realm)));
        }
        let rest = format!(
            ",nonce=\"{nonce}\",cnonce=\"{}\",nc=00000001,qop=auth,digest-uri=\"{uri}\",response={response}",
            self.cnonce
        );
        out.extend_from_slice(rest.as_bytes());
        Ok(false)
    }
}

/// `key=value,key="value"`; a key may come several times.
fn directives(text: &[u8]) -> Result<BTreeMap<String, Vec<String>>, &'static str> {
    let text = std::str::from_utf8(text).map_err(|_| "the challenge is not UTF-8")?;
    let mut out: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut rest = text.trim_start_matches([',', ' ', '\t']);
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=').ok_or("the challenge is no list of key=value")?;
        let mut value = String::new();
        rest = match after.strip_prefix('"') {
            Some(quoted) => {
                let mut chars = quoted.char_indices();
                loop {
                    match chars.next().ok_or("a quoted value does not end")? {
                        (_, '\\') => value.push(chars.next().ok_or("a quoted value does not end")?.1),
                        (at, '"') => break quoted.get(at.saturating_add(1)..).unwrap_or_default(),
                        (_, c) => value.push(c),
                    }
                }
            }
            None => {
                let (plain, after) = after.split_once(',').unwrap_or((after, ""));
                value.push_str(plain.trim());
                after
            }
        };
        out.entry(key.trim().to_ascii_lowercase()).or_default().push(value);
        rest = rest.trim_start_matches([',', ' ', '\t']);
    }
    Ok(out)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 2195.
    #[test]
    fn cram_of_the_rfc() {
        let answer = cram("tim", "tanstaaftanstaaf", b"<1896.697170952@postoffice.reston.mci.net>");
        assert_eq!(String::from_utf8_lossy(&answer), "tim b913a602c7eda7a495b4e6e7334d3890");
    }

    /// The example of RFC 2831, section 4.
    #[test]
    fn digest_of_the_rfc() {
        let who =
            Identity { user: "chris", password: "secret", realm: None, service: "imap", host: "elwood.innosoft.com" };
        let mut digest = Digest::new(&who, &[0; 16]);
        digest.cnonce = "OA6MHXh6VqTrRk".into();
        let challenge =
            br#"realm="elwood.innosoft.com",nonce="OA6MG9tEQGm2hh",qop="auth",algorithm=md5-sess,charset=utf-8"#;
        let mut out = Vec::new();
        assert_eq!(digest.step(challenge, &mut out), Ok(false));
        let text = String::from_utf8(out).expect("text");
        assert_eq!(
            text,
            "charset=utf-8,username=\"chris\",realm=\"elwood.innosoft.com\",nonce=\"OA6MG9tEQGm2hh\",\
             cnonce=\"OA6MHXh6VqTrRk\",nc=00000001,qop=auth,digest-uri=\"imap/elwood.innosoft.com\",\
             response=d388dad90d4bbd760a152321f2143af7"
        );
        assert!(digest.step(b"rspauth=ea40f60335c427b5527b84dbabcdffff", &mut Vec::new()).is_err());
        assert_eq!(digest.step(b"rspauth=ea40f60335c427b5527b84dbabcdfffd", &mut Vec::new()), Ok(true));
    }

    #[test]
    fn challenges_that_are_none() {
        let who = Identity { user: "u", password: "p", realm: None, service: "csync", host: "h" };
        for text in
            ["", "nonce", "nonce=\"x", "nonce=\"x\\", "nonce=\"x\"", "nonce=\"x\",algorithm=md5-sess,qop=\"auth-conf\""]
        {
            assert!(Digest::new(&who, &[0; 16]).step(text.as_bytes(), &mut Vec::new()).is_err(), "{text}");
        }
    }
}
