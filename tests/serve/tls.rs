//! `serve` with a certificate: real clients and our own come in under TLS, and nobody says a password before it.

use super::super::util::tls::Ca;
use super::super::util::{CyrusServer, cyrus};
use super::clients::{good, served_source, shows_the_same, work};
use super::{Kind, Served, target_with};
use spooltap::config::{Access, ClearText, Tls, TlsMode};
use spooltap::model::ReplicaError;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

/// Under no circumstances a password without TLS, not even from here.
fn start(dir: &Path, ca: &Ca) -> Served {
    let (certificate, key, _) = ca.sign(dir, "serve.test", false);
    let [certificate, key] = [&certificate, &key].map(|path| path.to_str().expect("is text"));
    Served::start(dir, &["--tls-cert", certificate, "--tls-key", key, "--cleartext", "never"])
}

#[test]
fn a_real_sync_client_puts_everything_under_tls() {
    if !cyrus::installed() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let served = start(dir.path(), &Ca::new(dir.path(), "ca"));
    let source = CyrusServer::start(served_source(&served)).expect("starts");
    work(&source, 1);
    good("-A", &source.tool("sync_client", &["-v", "-A"]).expect("runs"), &served);
    shows_the_same(&source, Kind::Archive, dir.path());
}

#[test]
fn our_own_client_believes_it_or_does_not() {
    let dir = tempfile::tempdir().expect("directory");
    let (ca, other) = (Ca::new(dir.path(), "ca"), Ca::new(dir.path(), "other"));
    let served = start(dir.path(), &ca);
    let with = |mode: TlsMode, ca: &Ca| {
        let tls =
            Tls { mode, ca_file: Some(ca.file.clone()), server_name: Some("serve.test".into()), ..Tls::default() };
        let access = Access { tls, clear_text: ClearText::Always, ..Access::default() };
        target_with(&served.url(), access).open()
    };
    let mut session = with(TlsMode::Require, &ca).expect("opens");
    session.ping().expect("answers");
    assert!(session.view_user(&"nobody".into()).expect("answers").mailboxes.is_empty());
    let said = |result: Result<(), ReplicaError>| result.expect_err("is refused").to_string();
    assert!(said(with(TlsMode::Require, &other).map(drop)).contains("nobody we believe has signed it"));
    let bare = said(with(TlsMode::Never, &ca).map(drop));
    assert!(bare.contains("offers none of") || bare.contains("mechanism"), "{bare}");
}

/// Says something and gets what is said until the connection ends.
fn talk(served: &Served, text: &[u8]) -> String {
    let mut stream = TcpStream::connect(served.address).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("sets");
    let mut reader = BufReader::new(stream.try_clone().expect("clones"));
    let mut said = String::new();
    while !said.contains("* OK") {
        assert_ne!(reader.read_line(&mut said).expect("greets"), 0, "{said}");
    }
    stream.write_all(text).expect("says");
    let mut rest = Vec::new();
    let _ = reader.read_to_end(&mut rest);
    said + &String::from_utf8_lossy(&rest)
}

#[test]
fn nothing_said_in_clear_counts_under_tls() {
    let dir = tempfile::tempdir().expect("directory");
    let served = start(dir.path(), &Ca::new(dir.path(), "ca"));
    let said = talk(&served, b"AUTHENTICATE PLAIN AHJlcGwAeA==\r\nEXIT\r\n");
    assert!(said.contains("* STARTTLS\r\n") && !said.contains("* SASL"), "{said}");
    assert!(said.contains("NO the password would go in clear"), "{said}");
    // A command that somebody on the way has put behind STARTTLS.
    let said = talk(&served, b"STARTTLS\r\nNOOP\r\n");
    assert!(said.contains("OK Begin TLS") && !said.contains("OK Noop"), "{said}");
}
