//! STARTTLS with a real server: whom we believe, whom we do not, and who we are by certificate.

use super::login::Lab;
use crate::util::tls::Ca;
use crate::util::{CyrusServer, Options, cyrus};
use std::fs;
use std::os::unix::fs::PermissionsExt;

#[test]
fn a_certificate_is_believed_for_a_reason_or_refused_with_one() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new();
    let dir = tempfile::tempdir().expect("directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("permissions");
    let (ca, other) = (Ca::new(dir.path(), "ca"), Ca::new(dir.path(), "other"));
    let (certificate, key, pin) = ca.sign(dir.path(), "replica.test", false);
    let (expired, expired_key, _) = ca.sign(dir.path(), "replica.test", true);
    let (ours, our_key, _) = ca.sign(dir.path(), "repl", false);
    let (stale, stale_key, _) = ca.sign(dir.path(), "repl", true);
    let (strange, strange_key, _) = other.sign(dir.path(), "stranger", false);
    let options = Options::new()
        .set("sasl_mech_list", "PLAIN EXTERNAL")
        .set("allowplaintext", "no")
        .set("tls_server_cert", certificate.display())
        .set("tls_server_key", key.display())
        .set("tls_client_ca_file", ca.file.display())
        .set("tls_session_timeout", "0");
    let mut server = CyrusServer::start(options).expect("starts");
    let tls = |more: &str| format!("[tls]\nmode = \"require\"\n{more}");
    let by_ca = tls(&format!("ca_file = {:?}\nserver_name = \"replica.test\"\n", ca.file));
    let url = server.url();
    let password = cyrus::PASSWORD;
    lab.check(&url, &by_ca, password, 0, "");
    lab.check(&url, &format!("cleartext = \"never\"\n{by_ca}"), password, 82, "sends the password in clear");
    lab.check(&url, &by_ca, "not-this-one", 80, "refuses the login of repl by PLAIN");
    lab.check(&url, &tls(&format!("pin_sha256 = {pin:?}\n")), password, 0, "");
    lab.check(&url, &tls(&format!("pin_sha256 = {:?}\n", pin.replace(['0', '1'], "2"))), password, 85, "pin_sha256");
    let foreign = tls(&format!("ca_file = {:?}\nserver_name = \"replica.test\"\n", other.file));
    lab.check(&url, &foreign, password, 85, "nobody we believe has signed it");
    lab.check(&url, &tls(&format!("ca_file = {:?}\n", ca.file)), password, 86, "it is for another name");
    // Our own certificate instead of a password.
    let external = format!("mechanisms = [\"EXTERNAL\"]\n{by_ca}certificate = {ours:?}\nkey = {our_key:?}\n");
    lab.check(&url, &external, password, 0, "");
    for (theirs, why) in [((&stale, &stale_key), "CertificateExpired"), ((&strange, &strange_key), "UnknownCA")] {
        let theirs = format!("{by_ca}certificate = {:?}\nkey = {:?}\n", theirs.0, theirs.1);
        lab.check(&url, &theirs, password, 88, &format!("refuses our certificate ({why})"));
    }
    lab.check(&url, &format!("mechanisms = [\"EXTERNAL\"]\n{by_ca}"), password, 82, "none of it can be used");

    server.set("tls_server_cert", expired.display()).expect("sets");
    server.set("tls_server_key", expired_key.display()).expect("sets");
    server.restart().expect("restarts");
    lab.check(&url, &by_ca, password, 84, "it has expired");

    let bare = CyrusServer::start(Options::new()).expect("starts");
    lab.check(&bare.url(), &by_ca, password, 83, "does not offer STARTTLS");
}
