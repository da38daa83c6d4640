//! `docs/operations.md`, followed command by command: real Cyrus servers, the package as it is, and a machine that is a copy
//! of this one: an overlay over its file system, thrown away afterwards. What is replaced there is told by name: `systemctl`
//! (`systemctl.sh` beside this file) and `journalctl`.

use super::{package, tools};
use crate::util::process::Group;
use crate::util::{CyrusServer, Options, cyrus, eventually};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const PAGE: &str = include_str!("../../docs/operations.md");

/// A part of the page under one heading: commands and TOML blocks.
struct Section {
    title: &'static str,
    commands: Vec<&'static str>,
    blocks: Vec<&'static str>,
}

fn sections() -> Vec<Section> {
    PAGE.split("\n## ")
        .skip(1)
        .map(|text| {
            let commands =
                text.lines().filter_map(|line| line.strip_prefix("    ")).filter(|line| !line.starts_with(' '));
            Section {
                title: text.lines().next().unwrap_or_default(),
                commands: commands.collect(),
                blocks: text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect(),
            }
        })
        .collect()
}

/// A shell inside the copy of this machine.
struct Machine {
    input: ChildStdin,
    lines: Receiver<String>,
    _shell: Group,
}

const ENTER: &str = r#"
mount -t tmpfs tmpfs "$0"
cd "$0"
mkdir up work root
mount -t overlay overlay -o "lowerdir=/,upperdir=$0/up,workdir=$0/work" root
for dir in dev sys; do mount --rbind /$dir root/$dir; done
mount -t proc proc root/proc
mkdir -p "root$1" && mount --rbind "$1" "root$1"
mount -t tmpfs tmpfs root/run
exec chroot root /bin/bash -u
"#;

impl Machine {
    /// `shared` is seen there as well: the servers are in it.
    fn enter(dir: &Path, shared: &Path) -> Self {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "sh", "-euc", ENTER]);
        command.arg(dir).arg(shared).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        command.env("DEBIAN_FRONTEND", "noninteractive").env("HOME", "/root");
        let (reader, writer) = std::io::pipe().expect("pipe");
        command.stdin(Stdio::piped()).stdout(writer.try_clone().expect("pipe")).stderr(writer);
        let mut shell = Group::spawn(&mut command).expect("starts");
        drop(command);
        let input = shell.stdin().expect("stdin");
        let (told, lines) = channel();
        std::thread::spawn(move || {
            BufReader::new(reader).lines().map_while(Result::ok).all(|line| told.send(line).is_ok())
        });
        Self { input, lines, _shell: shell }
    }

    /// Runs a line as if typed, with `secret` as what is typed next; exit code and what it said.
    fn types(&mut self, line: &str) -> (i32, String) {
        let quoted = line.replace('\'', r"'\''");
        let around = format!("(echo secret | bash -c '{quoted}') 2>&1; code=$?; echo; echo \"=== $code\"\n");
        self.input.write_all(around.as_bytes()).expect("writes");
        let mut said = String::new();
        loop {
            let next = self.lines.recv_timeout(Duration::from_secs(120));
            let next = next.unwrap_or_else(|error| panic!("{line}: {error}: {said}"));
            match next.strip_prefix("=== ").and_then(|code| code.parse().ok()) {
                Some(code) => return (code, said),
                None => said.extend([next.as_str(), "\n"]),
            }
        }
    }

    #[track_caller]
    fn does(&mut self, line: &str) -> String {
        let (code, said) = self.types(line);
        assert_eq!(code, 0, "{line}: {said}");
        said
    }
}

/// What a command of the page has to say, where its exit code alone would not show that it did its work. Every command
/// ends with 0, but for those named in `ends`.
const SAYS: &[(&str, &str)] = &[
    ("spooltap check", "csync://repl@replica.example:2005"),
    ("spooltap push --dry-run", "jane"),
    ("spooltap drain --wait", "everything is confirmed"),
    ("spooltap failover-check", "GO"),
    ("spooltap status", "ok"),
    ("spooltap status --json", "\"lag_seconds\""),
    ("curl", "spooltap_replica_lag_seconds"),
    ("journalctl", " live"),
    ("systemctl status", "active (running)"),
    ("openssl", "Fingerprint="),
];

#[test]
fn every_command_of_operations_md_does_what_the_page_says() {
    if !cyrus::installed() || !tools(&["cargo-deb", "apt", "curl", "openssl", "setpriv", "unshare"]) {
        return;
    }
    let users = ["jane", "u1"];
    let source = CyrusServer::start(Options::new().source().users(&users)).expect("starts");
    let [replica, near, far] = [(); 3].map(|()| CyrusServer::start(Options::new()).expect("starts"));
    source.admin().expect("logs in").ok("CREATE user.jane.Broken").expect("creates");
    let mut lmtp = source.lmtp().expect("connects");
    let mut deliver = |user: &str| {
        let answers = lmtp.deliver(&[user], b"Subject: x\r\n\r\ny\r\n").expect("delivers");
        assert!(answers[0].starts_with('2'), "{answers:?}");
    };
    users.into_iter().for_each(&mut deliver);

    let dir = tempfile::tempdir().expect("directory");
    let temporary = source.base().parent().expect("has one").to_owned();
    let mut machine = Machine::enter(dir.path(), &temporary);
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port().to_string();
    let to_be_written = tempfile::tempdir().expect("directory");
    let write = |machine: &mut Machine, path: &str, text: &str| {
        let here = to_be_written.path().join("file");
        fs::write(&here, text.replace("9417", &port)).expect("writes");
        machine.does(&format!("install -D -m 0644 {} {path}", here.display()));
    };
    // What "Before" asks for, and who is who.
    write(&mut machine, "/etc/imapd.conf", &fs::read_to_string(source.conf()).expect("imapd.conf"));
    let mut hosts = "127.0.0.1 localhost\n".to_owned();
    for (server, names) in [(&replica, "replica.example"), (&near, "a.example"), (&far, "b.example c.example")] {
        hosts.push_str(&format!("{} {names}\n", server.csync().ip()));
    }
    write(&mut machine, "/etc/hosts", &hosts);
    write(&mut machine, "/usr/bin/systemctl", include_str!("systemctl.sh"));
    write(&mut machine, "/usr/bin/journalctl", "#!/bin/sh\nexec cat /var/log/spooltap.service.log\n");
    machine.does("chmod 755 /usr/bin/systemctl /usr/bin/journalctl");
    fs::copy(package(), to_be_written.path().join("spooltap_0.1.0-1_amd64.deb")).expect("package");
    let at = to_be_written.path().display().to_string();
    machine
        .does(&format!("openssl req -x509 -newkey rsa:2048 -nodes -keyout {at}/key -out {at}/server.pem -subj /CN=x"));

    let messages = |server: &CyrusServer, user: &str| {
        let reply = server.admin().ok()?.ok(format!("EXAMINE user.{user}")).ok()?;
        Some(reply.exists())
    };
    let mut count = 0;
    for Section { title, commands, blocks } in sections() {
        // Parts that are about another machine, or other settings, have their own.
        let mut own = String::new();
        match title {
            "Several replicas" => {
                write(
                    &mut machine,
                    "/etc/spooltap/several.toml",
                    &format!("state = \"/var/lib/several\"\n{}", blocks[0]),
                );
                own = "SPOOLTAP_CONFIG=/etc/spooltap/several.toml ".into();
                machine.does(&format!("{own}spooltap push -A"));
                assert_eq!((messages(&near, "jane"), messages(&far, "jane")), (Some(2), None));
            }
            "A source on which nothing can be installed" => {
                machine.does("cp /etc/imapd.conf /etc/spooltap/source-imapd.conf");
                write(
                    &mut machine,
                    "/etc/spooltap/remote.toml",
                    &format!("state = \"/var/lib/remote\"\n{}", blocks[0]),
                );
                own = "SPOOLTAP_CONFIG=/etc/spooltap/remote.toml ".into();
            }
            _ => {}
        }
        for command in commands {
            if title == "Install" && command == "spooltap check" {
                write(&mut machine, "/etc/spooltap/spooltap.toml", blocks[0]);
            }
            let line = format!("cd {at}; {own}{}", command.replace("9417", &port));
            let mut said = (0, String::new());
            // A check of the state of things is repeated, as somebody at a terminal would.
            let limit = if command.starts_with("spooltap status") { 30 } else { 0 };
            eventually(Duration::from_secs(limit), || {
                said = machine.types(&line);
                (said.0 == 0).then_some(())
            });
            let (code, said) = said;
            // Limits of this machine are none of ours.
            let good = code == 0 || command.starts_with("spooltap doctor") && code == 1 && !said.contains("BAD");
            let log = if good { String::new() } else { machine.types("journalctl").1 };
            assert!(good, "{title}: {command}: exit code {code}: {said}\n{log}");
            let wanted = SAYS
                .iter()
                .filter(|(start, _)| command.split(" #").next().is_some_and(|words| words.starts_with(start)));
            for (_, part) in wanted.filter(|_| own.is_empty()) {
                assert!(part == &"ok" && command.contains("json") || said.contains(part), "{title}: {command}: {said}");
            }
            count += 1;
            if command.starts_with("systemctl enable --now") {
                deliver("jane");
                let arrived = eventually(Duration::from_secs(30), || (messages(&replica, "jane")? == 2).then_some(()));
                assert!(arrived.is_some(), "{}", machine.types("journalctl").1);
            }
        }
        match title {
            "Several replicas" => assert_eq!((messages(&near, "jane"), messages(&far, "jane")), (None, Some(2))),
            "Repair, state, logs" => {
                // What root typed meanwhile is the daemon's.
                assert_eq!(machine.does("find /var/lib/spooltap -user root"), "\n");
            }
            _ => {}
        }
    }
    assert!(count >= 40, "{count} commands");
    let left =
        machine.does("find /etc/spooltap /usr/bin/spooltap /usr/lib/spooltap /var/lib/spooltap 2>/dev/null; true");
    assert!(left.contains("/etc/spooltap/password") && !left.contains("spooltap.toml"), "{left}");
    assert!(!left.contains("/usr") && !left.contains("/var/lib"), "{left}");
}
