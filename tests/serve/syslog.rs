//! What a syslog daemon hears of us under Cyrus's names: a socket of ours stands at /dev/log, in a mount namespace of its own.

use super::super::util::{CyrusServer, Options, cyrus};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

/// With a /dev that has only what is in `dev`, and the usual devices.
const INSIDE: &str = "for name in null zero random urandom; do : > \"$0/$name\" && mount --bind \"/dev/$name\" \"$0/$name\" || exit 99; \
                      done; mount --rbind \"$0\" /dev || exit 99; exec \"$@\"";

fn inside(dev: &Path, program: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", INSIDE]).arg(dev).arg(program).args(arguments);
    command.env_remove("SPOOLTAP_LOG").output().expect("unshare runs")
}

#[test]
fn syslog_hears_the_words_that_monitoring_looks_for() {
    if !cyrus::installed() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let dev = dir.path().join("dev");
    std::fs::create_dir(&dev).expect("directory");
    if !inside(&dev, Path::new("true"), &[]).status.success() {
        let _ = std::io::Write::write_all(
            &mut std::io::stderr(),
            b"SKIPPED: syslog needs a mount namespace of its own (unshare --mount)\n",
        );
        return;
    }
    let socket = UnixDatagram::bind(dev.join("log")).expect("binds");
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("has a limit");
    let client = dir.path().join("sync_client");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_spooltap"), &client).expect("links");
    let source =
        CyrusServer::start(Options::new().source().set("sync_host", "127.0.0.1").set("sync_port", 1).users(&["u1"]))
            .expect("starts");
    let conf = source.conf().display().to_string();
    let heard = |prefix: Option<&str>, arguments: &[&str], head: &str, words: &[&str]| {
        let mut conf = conf.clone();
        if let Some(prefix) = prefix {
            let text = std::fs::read_to_string(&conf).expect("imapd.conf") + &format!("syslog_prefix: {prefix}\n");
            conf = dir.path().join("imapd.conf").display().to_string();
            std::fs::write(&conf, text).expect("imapd.conf");
        }
        let output = inside(&dev, &client, &[&["-C", &conf], arguments].concat());
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
        let mut all = Vec::new();
        let mut bytes = [0; 8192];
        // Priority of mail.err, a date, the ident with the process.
        let found =
            std::iter::from_fn(|| socket.recv(&mut bytes).ok().map(|count| bytes[..count].to_vec())).any(|line| {
                let line = String::from_utf8_lossy(&line).into_owned();
                let found =
                    line.starts_with("<19>") && line.contains(head) && words.iter().all(|word| line.contains(word));
                all.push(line);
                found
            });
        assert!(found, "{words:?} not in {all:?}");
    };
    heard(None, &["-o", "-u", "u1"], " sync_client[", &["SYNCERROR: ", "127.0.0.1:1", "refused"]);
    heard(Some("site"), &["-o", "-m", "user.nobody"], " site/sync_client[", &["SYNCERROR: ", "refused"]);
}
