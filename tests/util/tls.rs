//! Certificates, and a TLS end before a server that has none of its own.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A CA that signs certificates into a folder.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub file: PathBuf,
}

impl Ca {
    pub fn new(dir: &Path, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let file = dir.join(format!("{name}.pem"));
        fs::write(&file, params.self_signed(&key).expect("signs").pem()).expect("writes");
        Self { issuer: Issuer::new(params, key), file }
    }

    /// Certificate, key, and the certificate's SHA-256.
    pub fn sign(&self, dir: &Path, name: &str, expired: bool) -> (PathBuf, PathBuf, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, name);
        if expired {
            (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        }
        let signed = params.signed_by(&key, &self.issuer).expect("signs");
        let paths = ["crt", "key"].map(|kind| dir.join(format!("{name}-{expired}.{kind}")));
        fs::write(&paths[0], signed.pem()).expect("writes");
        fs::write(&paths[1], key.serialize_pem()).expect("writes");
        let digest = <sha2::Sha256 as sha2::Digest>::digest(signed.der());
        let [certificate, key] = paths;
        (certificate, key, digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Listens for TLS on an address of its own and carries what is in it to the server, for as long as the test runs.
pub fn before(server: SocketAddr, certificate: &Path, key: &Path) -> SocketAddr {
    let chain = CertificateDer::pem_file_iter(certificate).expect("reads").map(|one| one.expect("a certificate"));
    let key = PrivateKeyDer::from_pem_file(key).expect("a key");
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain.collect(), key))
        .expect("a configuration");
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let config = config.clone();
            std::thread::spawn(move || carry(client, &config, server));
        }
    });
    address
}

fn carry(mut client: TcpStream, config: &Arc<ServerConfig>, server: SocketAddr) -> std::io::Result<()> {
    let mut plain = TcpStream::connect(server)?;
    client.set_nodelay(true)?;
    plain.set_nodelay(true)?;
    let mut tls = ServerConnection::new(config.clone()).map_err(std::io::Error::other)?;
    let mut buffer = [0; 16 << 10];
    loop {
        while tls.wants_write() {
            tls.write_tls(&mut client)?;
        }
        let ready = {
            let mut both = [&client, &plain].map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN));
            poll(&mut both, PollTimeout::NONE)?;
            both.map(|one| one.any() == Some(true))
        };
        if ready[0] {
            if tls.read_tls(&mut client)? == 0 {
                return Ok(());
            }
            let state = tls.process_new_packets().map_err(std::io::Error::other)?;
            let mut bytes = vec![0; state.plaintext_bytes_to_read()];
            tls.reader().read_exact(&mut bytes)?;
            plain.write_all(&bytes)?;
        }
        if ready[1] {
            let count = plain.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            tls.writer().write_all(&buffer[..count])?;
        }
    }
}
