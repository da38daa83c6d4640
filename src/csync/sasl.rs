//! Logging in, bytes to bytes: the mechanisms behind the base64 lines of the protocol. PLAIN, LOGIN, SCRAM and EXTERNAL
//! are rsasl's; CRAM-MD5 and DIGEST-MD5, which some old servers offer alone, are in `digest`.

use super::digest;
use crate::model::Denial;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rsasl::prelude::{Mechname, SASLClient, SASLConfig, Session, State};
use zeroize::Zeroizing;

/// No login is possible.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SaslError {
    #[error("the server offers {offered}, and none of it can be used: allow one of {known} there")]
    NoMechanism { offered: String, known: String },
    #[error(
        "the server offers {offered}, which sends the password in clear over this connection: use TLS, let it offer \
         SCRAM-SHA-256, or set cleartext = \"always\""
    )]
    ClearText { offered: String },
    #[error("mechanism {mechanism} failed: {cause}")]
    Step { mechanism: String, cause: String },
}

impl SaslError {
    /// What is to be mended.
    pub fn denial(&self) -> Denial {
        match self {
            Self::NoMechanism { .. } | Self::ClearText { .. } => Denial::Mechanism,
            Self::Step { .. } => Denial::Login,
        }
    }
}

/// Who we are.
pub struct Identity<'a> {
    pub user: &'a str,
    pub password: &'a str,
    /// For DIGEST-MD5; the others know none, and Cyrus's own client leaves `sync_realm` out of them. Who needs one there
    /// writes `user@realm`.
    pub realm: Option<&'a str>,
    /// As DIGEST-MD5 wants it.
    pub service: &'static str,
    pub host: &'a str,
}

/// What may be used.
pub struct Terms<'a> {
    /// The password may be sent as it is: nobody can listen.
    pub clear: bool,
    /// We have shown a certificate.
    pub certificate: bool,
    /// There is a password.
    pub password: bool,
    /// Only these, by name; empty: all.
    pub only: &'a [String],
    /// From a good source of chance, used once.
    pub nonce: [u8; 16],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    External,
    /// The password itself goes to the server.
    Clear,
    Scram,
    Digest,
    Cram,
}

/// Every mechanism, in the order of preference where nobody can listen: what works with every password database of a
/// server comes first. Where somebody could, the clear ones are left out.
const KNOWN: &[(&str, Kind)] = &[
    ("EXTERNAL", Kind::External),
    ("PLAIN", Kind::Clear),
    ("LOGIN", Kind::Clear),
    ("SCRAM-SHA-256", Kind::Scram),
    ("SCRAM-SHA-1", Kind::Scram),
    ("DIGEST-MD5", Kind::Digest),
    ("CRAM-MD5", Kind::Cram),
];

/// Servers ask for thousands; a number without bound would keep us busy for hours.
const MOST_ROUNDS: u64 = 1_000_000;

enum Exchange {
    Rsasl(Box<Session>),
    Cram { user: String, password: Zeroizing<String> },
    Digest(digest::Digest),
}

/// One exchange.
pub struct Login {
    exchange: Exchange,
    mechanism: &'static str,
    kind: Kind,
    finished: bool,
}

impl Login {
    /// Chooses a mechanism. `offered` are names as the server printed them.
    pub fn start(offered: &[String], who: &Identity<'_>, terms: &Terms<'_>) -> Result<Self, SaslError> {
        let is_offered = |name: &str| offered.iter().any(|offer| offer.eq_ignore_ascii_case(name));
        let is_wanted =
            |name: &str| terms.only.is_empty() || terms.only.iter().any(|only| only.eq_ignore_ascii_case(name));
        let common = || KNOWN.iter().filter(|(name, _)| is_offered(name) && is_wanted(name));
        let usable = |kind: Kind| match kind {
            Kind::External => terms.certificate,
            Kind::Clear => terms.password && terms.clear,
            Kind::Scram | Kind::Digest | Kind::Cram => terms.password,
        };
        let shown = || if offered.is_empty() { "no mechanism".into() } else { offered.join(" ") };
        let Some((mechanism, kind)) = common().find(|(_, kind)| usable(*kind)).copied() else {
            if terms.password && common().any(|(_, kind)| *kind == Kind::Clear) {
                return Err(SaslError::ClearText { offered: shown() });
            }
            let known: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).filter(|name| is_wanted(name)).collect();
            return Err(SaslError::NoMechanism { offered: shown(), known: known.join(", ") });
        };
        let fault = |cause: String| SaslError::Step { mechanism: mechanism.into(), cause };
        let exchange = match kind {
            Kind::External | Kind::Clear | Kind::Scram => {
                let config = match kind {
                    Kind::External => SASLConfig::builder().with_defaults().with_callback(NoAuthzid),
                    _ => SASLConfig::with_credentials(None, who.user.to_owned(), who.password.to_owned()),
                };
                let config = config.map_err(|error| fault(error.to_string()))?;
                let name = Mechname::parse(mechanism.as_bytes()).map_err(|error| fault(error.to_string()))?;
                let session = SASLClient::new(config).start_suggested(&[name]);
                Exchange::Rsasl(Box::new(session.map_err(|error| fault(error.to_string()))?))
            }
            Kind::Digest => Exchange::Digest(digest::Digest::new(who, &terms.nonce)),
            Kind::Cram => {
                Exchange::Cram { user: who.user.to_owned(), password: Zeroizing::new(who.password.to_owned()) }
            }
        };
        Ok(Self { exchange, mechanism, kind, finished: false })
    }

    /// Its name.
    pub fn mechanism(&self) -> &'static str {
        self.mechanism
    }

    /// The first line to send.
    pub fn command(&mut self) -> Result<String, SaslError> {
        let first = match &self.exchange {
            Exchange::Rsasl(session) => session.are_we_first(),
            Exchange::Cram { .. } | Exchange::Digest(_) => false,
        };
        if !first {
            return Ok(format!("AUTHENTICATE {}\r\n", self.mechanism));
        }
        let first = self.step(None)?;
        Ok(format!("AUTHENTICATE {} {}\r\n", self.mechanism, if first.is_empty() { "=" } else { &first }))
    }

    /// The line to send after the server's `+ BASE64`.
    pub fn answer(&mut self, challenge: &[u8]) -> Result<String, SaslError> {
        if self.finished {
            // The server speaks last (its proof); an empty line says that it was seen.
            return Ok("\r\n".into());
        }
        let challenge = STANDARD.decode(challenge.trim_ascii()).map_err(|error| self.fault(error))?;
        Ok(format!("{}\r\n", self.step(Some(&challenge))?))
    }

    /// The server says that all is well. It has to have shown that it knows the password, where the mechanism asks that.
    pub fn accepted(&self) -> Result<(), SaslError> {
        match self.kind {
            Kind::Scram | Kind::Digest if !self.finished => {
                Err(self
                    .fault("the server let us in without showing that it knows the password; it may be another one"))
            }
            _ => Ok(()),
        }
    }

    fn fault(&self, cause: impl ToString) -> SaslError {
        SaslError::Step { mechanism: self.mechanism.into(), cause: cause.to_string() }
    }

    fn step(&mut self, input: Option<&[u8]>) -> Result<String, SaslError> {
        let mut out = Zeroizing::new(Vec::new());
        let challenge = input.unwrap_or_default();
        // rsasl 2.3.1 takes the first two bytes of every attribute without looking whether there are two.
        if self.kind == Kind::Scram
            && input.is_some()
            && challenge.split(|byte| *byte == b',').any(|attribute| attribute.len() < 2)
        {
            return Err(self.fault("an attribute without a value"));
        }
        if self.kind == Kind::Scram && rounds(challenge) > MOST_ROUNDS {
            return Err(self.fault(format!("the server wants more than {MOST_ROUNDS} rounds of hashing")));
        }
        let result = match &mut self.exchange {
            Exchange::Rsasl(session) => match session.step(input, &mut *out) {
                Ok(state) => Ok(matches!(state, State::Finished(_))),
                Err(error) => Err(error.to_string()),
            },
            Exchange::Cram { user, password } => {
                out.extend(digest::cram(user, password, challenge));
                Ok(true)
            }
            Exchange::Digest(digest) => digest.step(challenge, &mut out).map_err(str::to_owned),
        };
        self.finished = result.map_err(|cause| self.fault(cause))?;
        Ok(STANDARD.encode(out.as_slice()))
    }
}

/// How often a SCRAM server wants the password hashed (`i=` of its first message); what is no number is not ours to judge.
fn rounds(challenge: &[u8]) -> u64 {
    let field = challenge.split(|byte| *byte == b',').find_map(|field| field.strip_prefix(b"i="));
    field.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or_default()
}

/// EXTERNAL: who we are is in the certificate.
struct NoAuthzid;

impl rsasl::callback::SessionCallback for NoAuthzid {}

#[cfg(test)]
mod tests {
    use super::*;

    const WHO: Identity<'static> =
        Identity { user: "repl", password: "secret", realm: None, service: "csync", host: "r.test" };

    fn terms(clear: bool) -> Terms<'static> {
        Terms { clear, certificate: false, password: true, only: &[], nonce: [7; 16] }
    }

    fn start(offered: &str, terms: &Terms<'_>) -> Result<Login, SaslError> {
        Login::start(&offered.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>(), &WHO, terms)
    }

    fn chosen(offered: &str, terms: &Terms<'_>) -> String {
        match start(offered, terms) {
            Ok(login) => login.mechanism.to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn plain_as_a_real_client_sends_it() {
        let mut login = start("DIGEST-MD5 PLAIN", &terms(true)).expect("starts");
        assert_eq!(login.command().expect("first"), "AUTHENTICATE PLAIN AHJlcGwAc2VjcmV0\r\n");
        assert_eq!(login.accepted(), Ok(()));
    }

    #[test]
    fn login_answers_two_questions() {
        let mut login = start("LOGIN", &terms(true)).expect("starts");
        assert_eq!(login.command().expect("first"), "AUTHENTICATE LOGIN\r\n");
        assert_eq!(login.answer(b"VXNlcm5hbWU6").expect("name"), "cmVwbA==\r\n");
        assert_eq!(login.answer(b"UGFzc3dvcmQ6").expect("password"), "c2VjcmV0\r\n");
    }

    #[test]
    fn external_names_nobody() {
        let mut login = start("EXTERNAL PLAIN", &Terms { certificate: true, ..terms(true) }).expect("starts");
        assert_eq!(login.command().expect("first"), "AUTHENTICATE EXTERNAL =\r\n");
    }

    #[test]
    fn the_password_goes_in_clear_only_where_nobody_listens() {
        let all = "LOGIN PLAIN CRAM-MD5 DIGEST-MD5 SCRAM-SHA-1 SCRAM-SHA-256 GSSAPI EXTERNAL";
        assert_eq!(chosen(all, &terms(true)), "PLAIN");
        assert_eq!(chosen(all, &terms(false)), "SCRAM-SHA-256");
        assert_eq!(chosen("cram-md5 plain", &terms(false)), "CRAM-MD5");
        assert!(chosen("LOGIN PLAIN", &terms(false)).contains("in clear"));
        let only = ["DIGEST-MD5".to_owned()];
        assert_eq!(chosen(all, &Terms { only: &only, ..terms(true) }), "DIGEST-MD5");
        assert!(chosen("PLAIN", &Terms { only: &only, ..terms(true) }).contains("allow one of DIGEST-MD5"));
    }

    #[test]
    fn without_a_common_mechanism_the_cure_is_named() {
        let error = chosen("GSSAPI", &terms(true));
        assert!(error.contains("GSSAPI") && error.contains("allow one of"), "{error}");
    }

    #[test]
    fn a_server_that_proves_nothing_is_not_believed() {
        let mut login = start("SCRAM-SHA-1", &terms(false)).expect("starts");
        login.command().expect("first");
        assert!(login.accepted().is_err());
    }

    #[test]
    fn a_server_cannot_keep_us_busy() {
        let only = [];
        let terms = Terms { clear: false, certificate: false, password: true, only: &only, nonce: [0; 16] };
        let who = Identity { user: "u", password: "p", realm: None, service: "csync", host: "h" };
        let mut login = Login::start(&["SCRAM-SHA-1".to_owned()], &who, &terms).expect("is known");
        let first = login.command().expect("begins");
        let first = STANDARD.decode(first.trim().rsplit(' ').next().expect("has data")).expect("is base64");
        let nonce = String::from_utf8(first).expect("is text").rsplit_once("r=").expect("has a nonce").1.to_owned();
        let challenge = STANDARD.encode(format!("r={nonce}x,s=c2FsdA==,i=4294967295"));
        let error = login.answer(challenge.as_bytes()).expect_err("too many");
        assert!(error.to_string().contains("rounds of hashing"), "{error}");
    }

    #[test]
    fn attributes_without_a_value_are_an_error() {
        for challenge in ["", ",", "r", "r=x,", "r=x,s", "r=x,s=y,", "v", "e"] {
            let only = [];
            let terms = Terms { clear: false, certificate: false, password: true, only: &only, nonce: [0; 16] };
            let who = Identity { user: "u", password: "p", realm: None, service: "csync", host: "h" };
            let mut login = Login::start(&["SCRAM-SHA-256".to_owned()], &who, &terms).expect("is known");
            login.command().expect("begins");
            assert!(login.answer(STANDARD.encode(challenge).as_bytes()).is_err(), "{challenge}");
        }
    }
}
