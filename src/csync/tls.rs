//! TLS on top of a connected socket, by rustls: whom we believe, who we say we are.

use crate::config::Tls;
use crate::model::Denial;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme, StreamOwned};
use sha2::{Digest, Sha256};
use std::io;
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

/// No TLS session.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{path}: {cause}")]
    File { path: String, cause: String },
    #[error("{0} is no server name that a certificate can have; set server_name in [tls]")]
    Name(String),
    #[error("the server's certificate is refused: {1}")]
    Certificate(Denial, String),
    #[error("TLS: {0}")]
    Protocol(String),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl TlsError {
    /// What is to be mended; `None` when the connection broke or our own files are at fault.
    pub fn denial(&self) -> Option<Denial> {
        match self {
            Self::Certificate(denial, _) => Some(*denial),
            Self::Protocol(_) => Some(Denial::Tls),
            Self::Name(_) => Some(Denial::OtherName),
            Self::File { .. } | Self::Io(_) => None,
        }
    }
}

/// A connection under TLS.
pub type TlsStream = StreamOwned<ClientConnection, TcpStream>;

fn file(path: &Path, cause: impl ToString) -> TlsError {
    TlsError::File { path: path.display().to_string(), cause: cause.to_string() }
}

/// What the server thought of our certificate. Under TLS 1.3 it says so after our side of the handshake is done, where
/// the first answer is read.
pub fn refused_ours(error: &io::Error) -> Option<String> {
    use rustls::AlertDescription as Alert;
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::AlertReceived(
            alert @ (Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::DecryptError
            | Alert::CertificateRequired),
        ) => Some(format!(
            "the server refuses our certificate ({alert:?}): renew it, or name its CA there (tls_client_ca_file)"
        )),
        _ => None,
    }
}

/// Shakes hands. The stream's timeouts hold for that, too.
pub fn connect(mut stream: TcpStream, host: &str, tls: &Tls) -> Result<TlsStream, TlsError> {
    let name = tls.server_name.as_deref().unwrap_or(host);
    let name = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))?;
    let config = config(tls)?;
    let mut session = ClientConnection::new(Arc::new(config), name).map_err(|error| told(&error))?;
    while session.is_handshaking() {
        if let Err(error) = session.complete_io(&mut stream) {
            let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            return Err(inner.map_or_else(|| told_io(&error), told));
        }
    }
    Ok(StreamOwned::new(session, stream))
}

fn told_io(error: &io::Error) -> TlsError {
    TlsError::Io(io::Error::new(error.kind(), format!("{error} while shaking hands for TLS")))
}

fn told(error: &rustls::Error) -> TlsError {
    use rustls::CertificateError as Bad;
    let rustls::Error::InvalidCertificate(bad) = error else { return TlsError::Protocol(error.to_string()) };
    let (denial, cure) = match bad {
        Bad::UnknownIssuer => {
            (Denial::Stranger, "nobody we believe has signed it; name its CA as ca_file, or its pin_sha256 in [tls]")
        }
        Bad::ApplicationVerificationFailure => (Denial::Stranger, "it is not the one whose pin_sha256 is set"),
        Bad::Expired | Bad::ExpiredContext { .. } => (Denial::Expired, "it has expired"),
        Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
            (Denial::Expired, "it is not valid yet; is the clock right?")
        }
        Bad::NotValidForName | Bad::NotValidForNameContext { .. } => {
            (Denial::OtherName, "it is for another name; set server_name in [tls]")
        }
        _ => return TlsError::Certificate(Denial::Tls, format!("{bad:?}")),
    };
    TlsError::Certificate(denial, cure.to_owned())
}

fn config(tls: &Tls) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| told(&error))?;
    let verifier: Arc<dyn ServerCertVerifier> = match &tls.pin_sha256 {
        Some(pin) => Arc::new(Pinned { pin: *pin, provider }),
        None => {
            let roots = Arc::new(roots(tls)?);
            let built = WebPkiServerVerifier::builder_with_provider(roots, provider).build();
            built.map_err(|error| TlsError::Protocol(error.to_string()))?
        }
    };
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let (Some(certificate), Some(key)) = (&tls.certificate, &tls.key) else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates(certificate)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| file(key, error))?;
    builder.with_client_auth_cert(chain, private).map_err(|error| file(certificate, error))
}

/// The certificates in a PEM file, at least one.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let chain = CertificateDer::pem_file_iter(path).map_err(|error| file(path, error))?;
    let chain: Result<Vec<_>, _> = chain.collect();
    let chain = chain.map_err(|error| file(path, error))?;
    if chain.is_empty() { Err(file(path, "holds no certificate")) } else { Ok(chain) }
}

fn roots(tls: &Tls) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    match &tls.ca_file {
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|error| file(path, error))?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                return Err(TlsError::Certificate(
                    Denial::Stranger,
                    "this system has no CA; name one as ca_file in [tls], or the certificate itself as pin_sha256"
                        .into(),
                ));
            }
        }
    }
    Ok(roots)
}

/// Believes one certificate only, whatever it says of names and times.
#[derive(Debug)]
struct Pinned {
    pin: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if <[u8; 32]>::from(Sha256::digest(end_entity)) == self.pin {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
