//! Every mechanism over every transport and in every mode of TLS, against one real server; and who is in the way.

use super::login::Lab;
use crate::util::tls::{self, Ca};
use crate::util::{CyrusServer, Options, cyrus};
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

const MECHANISMS: [&str; 6] = ["PLAIN", "LOGIN", "CRAM-MD5", "DIGEST-MD5", "SCRAM-SHA-1", "SCRAM-SHA-256"];

/// A server that offers everything, under a certificate that `ca` has signed for `replica.test`.
struct Stage {
    lab: Lab,
    server: CyrusServer,
    ca: Ca,
    dir: tempfile::TempDir,
    /// TLS from the first byte before its two ports.
    csyncs: SocketAddr,
    imaps: SocketAddr,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("permissions");
        let ca = Ca::new(dir.path(), "ca");
        let (certificate, key, _) = ca.sign(dir.path(), "replica.test", false);
        let options = Options::new()
            .set("sasl_mech_list", MECHANISMS.join(" ") + " EXTERNAL")
            .set("tls_server_cert", certificate.display())
            .set("tls_server_key", key.display())
            .set("tls_client_ca_file", ca.file.display())
            .set("tls_session_timeout", "0");
        let server = CyrusServer::start(options).expect("starts");
        let csyncs = tls::before(server.csync(), &certificate, &key);
        let imaps = tls::before(server.imap_address(), &certificate, &key);
        Self { lab: Lab::new(), server, ca, dir, csyncs, imaps }
    }

    /// Each transport in each mode of TLS that it has: the URL, and what is to be configured for it.
    fn ways(&self) -> Vec<(String, String)> {
        let tls = |mode: &str| {
            format!("[tls]\nmode = \"{mode}\"\nca_file = {:?}\nserver_name = \"replica.test\"\n", self.ca.file)
        };
        let (csync, imap) = (self.server.csync(), self.server.imap_address());
        vec![
            (format!("csync://repl@{csync}"), tls("never")),
            (format!("csync://repl@{csync}"), tls("require")),
            (format!("csyncs://repl@{}", self.csyncs), tls("auto")),
            (format!("imap://repl@{imap}"), tls("never")),
            (format!("imap://repl@{imap}"), tls("require")),
            (format!("imaps://repl@{}", self.imaps), tls("auto")),
        ]
    }
}

#[test]
fn every_mechanism_goes_over_every_transport_in_every_mode_of_tls() {
    if !cyrus::installed() {
        return;
    }
    let stage = Stage::new();
    let mut tried = 0;
    for (url, tls) in stage.ways() {
        for mechanism in MECHANISMS {
            let config = format!("mechanisms = [\"{mechanism}\"]\nrealm = \"lab.test\"\n{tls}");
            stage.lab.check(&url, &config, cyrus::PASSWORD, 0, "");
            tried += 1;
        }
        // Once for each way; each mechanism's refusal is seen elsewhere.
        let config = format!("mechanisms = [\"SCRAM-SHA-256\"]\n{tls}");
        stage.lab.check(&url, &config, "not-this-one", 80, "refuses the login of repl by SCRAM-SHA-256");
        stage.lab.check(&url.replace("repl@", "u1@"), &tls, cyrus::PASSWORD, 81, "one of the replica's admins");
    }
    assert_eq!(tried, 36);
    // By certificate, where the server itself ends TLS.
    let (ours, key, _) = stage.ca.sign(stage.dir.path(), "repl", false);
    for url in [stage.server.url(), format!("imap://repl@{}", stage.server.imap_address())] {
        let config = format!(
            "mechanisms = [\"EXTERNAL\"]\n[tls]\nmode = \"require\"\nca_file = {:?}\nserver_name = \"replica.test\"\n\
             certificate = {ours:?}\nkey = {key:?}\n",
            stage.ca.file
        );
        stage.lab.check(&url, &config, cyrus::PASSWORD, 0, "");
    }
}

/// Carries everything between a client and a server, and what one of them says in another word.
fn in_the_way(server: SocketAddr, of_server: bool, word: &'static [u8], instead: &'static [u8]) -> SocketAddr {
    assert_eq!(word.len(), instead.len());
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let carry = move |mut from: TcpStream, mut to: TcpStream, changes: bool| {
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut piece) {
            let bytes = &mut piece[..count];
            let at = bytes.windows(word.len()).position(|window| window == word);
            if let Some(at) = at.filter(|_| changes) {
                bytes[at..at + word.len()].copy_from_slice(instead);
            }
            if to.write_all(bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    };
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(server) else { continue };
            let pair = (client.try_clone().expect("clones"), server.try_clone().expect("clones"));
            std::thread::spawn(move || carry(server, client, of_server));
            std::thread::spawn(move || carry(pair.0, pair.1, !of_server));
        }
    });
    address
}

#[test]
fn who_is_in_the_way_of_tls_is_refused() {
    if !cyrus::installed() {
        return;
    }
    let stage = Stage::new();
    let required =
        format!("[tls]\nmode = \"require\"\nca_file = {:?}\nserver_name = \"replica.test\"\n", stage.ca.file);
    for (scheme, server) in [("csync", stage.server.csync()), ("imap", stage.server.imap_address())] {
        // What the server offers is hidden from us; what we ask for is hidden from the server.
        let hidden = in_the_way(server, true, b"STARTTLS", b"STARTXXX");
        let url = format!("{scheme}://repl@{hidden}");
        stage.lab.check(&url, &required, cyrus::PASSWORD, 83, "somebody on the way hides it");
        let unheard = in_the_way(server, false, b"STARTTLS\r", b"STARTXXX\r");
        let url = format!("{scheme}://repl@{unheard}");
        stage.lab.check(&url, &required, cyrus::PASSWORD, 83, "offers STARTTLS and refuses it");
    }
    // TLS from the first byte with a certificate that is nobody's, another's, or too old.
    let other = Ca::new(stage.dir.path(), "other");
    let proxies = |certificate: &(PathBuf, PathBuf, String)| {
        [("csyncs", stage.server.csync()), ("imaps", stage.server.imap_address())]
            .map(|(scheme, server)| format!("{scheme}://repl@{}", tls::before(server, &certificate.0, &certificate.1)))
    };
    let cases = [
        (other.sign(stage.dir.path(), "replica.test", false), 85, "nobody we believe has signed it"),
        (stage.ca.sign(stage.dir.path(), "elsewhere.test", false), 86, "it is for another name"),
        (stage.ca.sign(stage.dir.path(), "replica.test", true), 84, "it has expired"),
    ];
    for (certificate, code, says) in &cases {
        for url in proxies(certificate) {
            stage.lab.check(&url, &required, cyrus::PASSWORD, *code, says);
        }
    }
    // A port without TLS where TLS is to begin at once.
    let plain = format!("imaps://repl@{}", stage.server.imap_address());
    stage.lab.check(&plain, &required, cyrus::PASSWORD, 87, "TLS");
}
