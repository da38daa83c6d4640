//! Logging in, bytes to bytes: rsasl's mechanisms behind the base64 lines of the protocol.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rsasl::prelude::{Mechname, SASLClient, SASLConfig, Session, State};

/// No login is possible.
#[derive(Debug, thiserror::Error)]
pub enum SaslError {
    #[error(
        "the server offers {offered}; spooltap can use PLAIN and LOGIN: allow one of them there (allowplaintext: yes)"
    )]
    NoMechanism { offered: String },
    #[error("mechanism {mechanism} failed: {cause}")]
    Step { mechanism: String, cause: String },
}

/// One exchange.
pub struct Login {
    session: Session,
    mechanism: String,
    finished: bool,
}

impl Login {
    /// Chooses a mechanism. `offered` are names as the server printed them. There is no realm: PLAIN and LOGIN know none,
    /// and Cyrus's own client leaves `sync_realm` out of them. Who needs one writes `user@realm`.
    pub fn start(offered: &[String], user: &str, password: &str) -> Result<Self, SaslError> {
        let none = || SaslError::NoMechanism {
            offered: if offered.is_empty() { "no mechanism".into() } else { offered.join(" ") },
        };
        let names: Vec<&Mechname> = offered.iter().filter_map(|name| Mechname::parse(name.as_bytes()).ok()).collect();
        let config = SASLConfig::with_credentials(None, user.to_owned(), password.to_owned()).map_err(|_| none())?;
        let session = SASLClient::new(config).start_suggested(&names).map_err(|_| none())?;
        let mechanism = session.get_mechname().as_str().to_owned();
        Ok(Self { session, mechanism, finished: false })
    }

    /// The first line to send.
    pub fn command(&mut self) -> Result<String, SaslError> {
        if !self.session.are_we_first() {
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

    fn fault(&self, cause: impl ToString) -> SaslError {
        SaslError::Step { mechanism: self.mechanism.clone(), cause: cause.to_string() }
    }

    fn step(&mut self, input: Option<&[u8]>) -> Result<String, SaslError> {
        let mut out = zeroize::Zeroizing::new(Vec::new());
        let state = self.session.step(input, &mut *out).map_err(|error| self.fault(error))?;
        self.finished = matches!(state, State::Finished(_));
        Ok(STANDARD.encode(out.as_slice()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_as_a_real_client_sends_it() {
        let mut login = Login::start(&["DIGEST-MD5".into(), "PLAIN".into()], "repl", "secret").expect("starts");
        assert_eq!(login.command().expect("first"), "AUTHENTICATE PLAIN AHJlcGwAc2VjcmV0\r\n");
    }

    #[test]
    fn login_answers_two_questions() {
        let mut login = Login::start(&["LOGIN".into()], "repl", "secret").expect("starts");
        assert_eq!(login.command().expect("first"), "AUTHENTICATE LOGIN\r\n");
        assert_eq!(login.answer(b"VXNlcm5hbWU6").expect("name"), "cmVwbA==\r\n");
        assert_eq!(login.answer(b"UGFzc3dvcmQ6").expect("password"), "c2VjcmV0\r\n");
    }

    #[test]
    fn without_a_common_mechanism_the_cure_is_named() {
        let error = Login::start(&["GSSAPI".into()], "a", "b").err().expect("fails").to_string();
        assert!(error.contains("GSSAPI") && error.contains("allowplaintext"), "{error}");
    }
}
