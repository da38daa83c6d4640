//! Every way of logging in, against a real server that offers just that one.

use crate::util::{CyrusServer, Options, Spooltap, cyrus, store};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

pub(super) struct Lab {
    conf: std::path::PathBuf,
    _store: crate::util::Store,
    dir: tempfile::TempDir,
}

impl Lab {
    pub(super) fn new() -> Self {
        let store = store("3.6.1-d");
        Self { conf: store.conf.clone(), _store: store, dir: tempfile::tempdir().expect("directory") }
    }

    /// `push` of one user: a whole session, and nothing much to send.
    fn push(&self, url: &str, toml: &str, password: &str) -> (i32, String) {
        let config = self.dir.path().join("spooltap.toml");
        fs::write(&config, toml).expect("writes");
        let state = tempfile::tempdir().expect("directory");
        let mut command = Spooltap::command(&self.conf, state.path());
        command.env("SPOOLTAP_PASSWORD", password).arg("--config").arg(config);
        command.args(["--replica", url, "push", "-s", "nobody"]);
        let Output { status, stderr, .. } = command.output().expect("runs");
        (status.code().expect("a code"), String::from_utf8_lossy(&stderr).into_owned())
    }

    #[track_caller]
    pub(super) fn check(&self, url: &str, toml: &str, password: &str, code: i32, says: &str) {
        let (found, text) = self.push(url, toml, password);
        assert!(found == code && text.contains(says), "{url} {toml}: {found} instead of {code}, {says}: {text}");
        assert!(!text.contains(password), "a password is shown: {text}");
    }
}

fn offering(mechanisms: &str) -> CyrusServer {
    CyrusServer::start(Options::new().set("sasl_mech_list", mechanisms)).expect("starts")
}

#[test]
fn every_mechanism_lets_us_in_and_a_wrong_password_does_not() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new();
    let mut server = offering("PLAIN LOGIN CRAM-MD5 DIGEST-MD5 SCRAM-SHA-1 SCRAM-SHA-256");
    for mechanism in ["PLAIN", "LOGIN", "CRAM-MD5", "DIGEST-MD5", "SCRAM-SHA-1", "SCRAM-SHA-256"] {
        let only = format!("mechanisms = [\"{mechanism}\"]\nrealm = \"lab.test\"\n");
        let url = server.url();
        lab.check(&url, &only, cyrus::PASSWORD, 0, "");
        lab.check(&url, &only, "not-this-one", 80, &format!("refuses the login of repl by {mechanism}"));
    }
    // Where somebody could listen the password is not sent; what needs no password sent is taken by itself.
    lab.check(&server.url(), "cleartext = \"never\"\n", cyrus::PASSWORD, 0, "");
    server.set("sasl_mech_list", "PLAIN LOGIN").expect("sets");
    server.restart().expect("restarts");
    lab.check(&server.url(), "cleartext = \"never\"\n", cyrus::PASSWORD, 82, "sends the password in clear");
    lab.check(&server.url(), "mechanisms = [\"SCRAM-SHA-256\"]\n", cyrus::PASSWORD, 82, "allow one of SCRAM-SHA-256");
    // The password as systemd hands it over, and as a file that is nobody else's.
    let credentials = lab.dir.path().join("credentials");
    let secret = credentials.join("spooltap-password");
    fs::create_dir(&credentials).expect("makes");
    fs::write(&secret, format!("{}\n", cyrus::PASSWORD)).expect("writes");
    for (mode, code) in [(0o640, 78), (0o600, 0)] {
        fs::set_permissions(&secret, fs::Permissions::from_mode(mode)).expect("mode");
        lab.check(&server.url(), &format!("password_file = {secret:?}\n"), "not-this-one", code, "");
    }
    let state = tempfile::tempdir().expect("directory");
    let mut command = Spooltap::command(&lab.conf, state.path());
    command.env_remove("SPOOLTAP_PASSWORD").env("CREDENTIALS_DIRECTORY", &credentials);
    let output = command.args(["--replica", &server.url(), "push", "-s", "nobody"]).output().expect("runs");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));

    // A replica's own: here every common password is wrong, and the one replica is not asked for the other's.
    fs::write(credentials.join("spooltap-password"), "not-this-one").expect("writes");
    fs::write(credentials.join("spooltap-password-far"), cyrus::PASSWORD).expect("writes");
    fs::write(credentials.join("other"), cyrus::PASSWORD).expect("writes");
    let own = lab.dir.path().join("own");
    fs::write(&own, cyrus::PASSWORD).expect("writes");
    fs::set_permissions(&own, fs::Permissions::from_mode(0o600)).expect("mode");
    let url = server.url();
    for (more, code) in [
        (format!("password_file = {own:?}\n"), 0),
        ("credential = \"other\"\n".to_owned(), 0),
        ("credential = \"missing\"\n".to_owned(), 78),
        ("name = \"far\"\n".to_owned(), 0),
        ("name = \"near\"\n".to_owned(), 80),
        ("name = \"far\"\n[replica.tls]\nmode = \"require\"\n".to_owned(), 83),
        ("name = \"far\"\nmechanisms = [\"SCRAM-SHA-1\"]\n".to_owned(), 82),
    ] {
        let config = lab.dir.path().join("own.toml");
        fs::write(&config, format!("[[replica]]\nurl = {url:?}\n{more}")).expect("writes");
        let state = tempfile::tempdir().expect("directory");
        let mut command = Spooltap::command(&lab.conf, state.path());
        command.env("SPOOLTAP_PASSWORD", "not-this-one").env("CREDENTIALS_DIRECTORY", &credentials);
        let output = command.arg("--config").arg(&config).args(["push", "-s", "nobody"]).output().expect("runs");
        assert_eq!(output.status.code(), Some(code), "{more}: {}", String::from_utf8_lossy(&output.stderr));
    }

    // The IMAP port of the same server has words of its own for the same things.
    let imap = format!("imap://repl@{}", server.imap_address());
    lab.check(&imap, "", cyrus::PASSWORD, 0, "");
    lab.check(&imap, "", "not-this-one", 80, "refuses the login of repl by PLAIN");
    lab.check(&imap.replace("repl@", "u1@"), "", cyrus::PASSWORD, 81, "must be one of the replica's admins");
    lab.check(&imap, "[tls]\nmode = \"require\"\n", cyrus::PASSWORD, 83, "does not offer STARTTLS");
    lab.check(&imap.replace("imap:", "csync:"), "", cyrus::PASSWORD, 77, "is not a csync service");
    lab.check(&server.url().replace("csync:", "imap:"), "", cyrus::PASSWORD, 77, "is not an IMAP service");
    let stranger = server.url().replace("repl@", "u1@");
    lab.check(&stranger, "", cyrus::PASSWORD, 81, "permission denied; the user must be one of the replica's admins");
}
