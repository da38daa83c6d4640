//! Under Cyrus's own names: `sync_client` with its options and exit codes, and both programs started by Cyrus's own
//! `master` from lines of cyrus.conf.

use super::super::cyrus_dir::SCRIPTS;
use super::super::util::cyrus::{PASSWORD, REPLICATOR};
use super::super::util::process::Group;
use super::super::util::{CyrusServer, Options, Rules, cyrus, diff, eventually, snapshot};
use super::Kind;
use super::clients::{WRITTEN, shows_the_same, work};
use super::talk::Talk;
use nix::sys::signal::Signal;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// A link of that name to our program, in a directory of its own.
fn link(dir: &Path, name: &str) -> PathBuf {
    let link = dir.join(name);
    symlink(env!("CARGO_BIN_EXE_spooltap"), &link).expect("links");
    link
}

fn run(program: &Path, conf: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.arg("-C").arg(conf).args(arguments).env_remove("SPOOLTAP_LOG").output().expect("runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn same(source: &CyrusServer, replica: &CyrusServer) {
    let users = source.users();
    let differences = diff(
        &snapshot(source, users).expect("is read"),
        &snapshot(replica, users).expect("is read"),
        &Rules::live().and(&WRITTEN),
    );
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn sync_client_takes_the_options_of_cyrus() {
    if !cyrus::installed() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let client = link(dir.path(), "sync_client");
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let source = CyrusServer::start(
        Options::new().source().replicate_to(&replica).set("sync_log", "yes").users(&["u1", "u2", "jane.doe"]),
    )
    .expect("starts");
    let conf = source.conf();
    work(&source, 1);
    for arguments in
        [&["-v", "-A"][..], &["-u", "u1", "u2"], &["-s", "jane.doe"], &["-m", "user.u1", "-z"], &["-vo", "-l", "-A"]]
    {
        let output = run(&client, &conf, arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", said(&output));
    }
    same(&source, &replica);
    work(&source, 2);
    let names = dir.path().join("names");
    std::fs::write(&names, "# who\nu1\n\nu2\njane.doe\n").expect("written");
    let output = run(&client, &conf, &["-u", "-f", names.to_str().expect("a path")]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    same(&source, &replica);
    // One log file.
    source.lmtp().expect("connects").deliver(&["u1", "u2"], b"Subject: log\r\n\r\nx\r\n").expect("delivers");
    let log = dir.path().join("log");
    std::fs::write(&log, "MAILBOX user.u1\nMAILBOX user.u2\nSUB u1 user.u1\n").expect("written");
    let output = run(&client, &conf, &["-R", "-f", log.to_str().expect("a path")]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(log.exists());
    same(&source, &replica);
    // What has been logged so far, taken as a rolling client takes it.
    source.lmtp().expect("connects").deliver(&["u1"], b"Subject: once\r\n\r\nx\r\n").expect("delivers");
    let log = source.base().join("conf/sync/log");
    assert!(log.exists());
    let output = run(&client, &conf, &["-R", "-1"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(!log.exists() && !log.with_file_name("log-run").exists());
    same(&source, &replica);
    let output = run(&client, &conf, &["-r", "-1"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    // Of all, those whose names begin so.
    source.lmtp().expect("connects").deliver(&["u1", "jane.doe"], b"Subject: some\r\n\r\nx\r\n").expect("delivers");
    let uidnext = |server: &CyrusServer, user: &str| {
        server
            .imap(user)
            .expect("logs in")
            .ok("STATUS INBOX (UIDNEXT)")
            .map(|reply| format!("{reply:?}"))
            .expect("asks")
    };
    let before = uidnext(&replica, "jane.doe");
    let output = run(&client, &conf, &["-A", "user.u"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_eq!(uidnext(&replica, "jane.doe"), before);
    let output = run(&client, &conf, &["-A", "user."]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    same(&source, &replica);
    // What cannot be.
    let address = format!("{}", replica.csync());
    let check = |arguments: &[&str], code: i32, word: &str| {
        let output = run(&client, &conf, arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", said(&output));
        assert!(said(&output).contains(word), "{arguments:?}: {}", said(&output));
    };
    check(&[], 64, "one of");
    check(&["-u", "u1", "-A"], 64, "one of");
    check(&["-y"], 64, "unknown option -y");
    check(&["-u"], 64, "needs a name");
    check(&["-p", "default", "-u", "u1"], 64, "-p is not supported");
    check(&["-d", "3", "-u", "u1", "-S", &address], 0, "-d has no effect");
    check(&["-o", "-u", "u1", "-S", "127.0.0.1:1"], 1, "lost");
    check(&["-m", "user.nobody"], 1, "does not exist");
    let lone = CyrusServer::prepare(Options::new()).expect("is set up");
    let output = run(&client, &lone.conf(), &["-A"]);
    assert_eq!(output.status.code(), Some(70), "{}", said(&output));
    let by_word = Command::new(env!("CARGO_BIN_EXE_spooltap")).args(["sync_client", "-y"]).output().expect("runs");
    assert_eq!(by_word.status.code(), Some(64));
}

/// What a SERVICES line of the replica's master starts as `sync_server`, and what that keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    /// Cyrus's own.
    Real,
    /// Ours, in front of what imapd.conf names.
    Named(Kind),
    /// Ours, in front of the store that this very imapd.conf describes.
    Own,
}

/// Both ends are started by Cyrus's `master`: the replica by a SERVICES line, the source by a START line, first Cyrus's own
/// client and then ours, with nothing changed in these lines but the path.
#[test]
fn cyrus_master_runs_both_names_against_their_counterparts_and_each_other() {
    if !cyrus::installed() {
        return;
    }
    for server in [Server::Real, Server::Named(Kind::Archive), Server::Named(Kind::Cyrus), Server::Own] {
        under_master(server);
    }
}

/// The lines of cyrus.conf with a program of ours in the place of a real one; `only` is the one service that is kept.
fn with_ours(server: &CyrusServer, name: &str, only: Option<&str>) {
    // Cyrus's user may not be let into the place where we were built.
    let program = server.base().join(name);
    std::fs::copy(env!("CARGO_BIN_EXE_spooltap"), &program).expect("copies");
    let services = server.base().join("cyrus.conf");
    let text = std::fs::read_to_string(&services).expect("cyrus.conf");
    let ours = text.replace(&server.program(name).display().to_string(), &program.display().to_string());
    assert_ne!(text, ours);
    let is_kept = |line: &&str| {
        let word = line.split_whitespace().next().unwrap_or_default();
        only.is_none_or(|only| !line.contains("listen=") || word == only)
    };
    let lines: Vec<&str> = ours.lines().filter(is_kept).collect();
    std::fs::write(&services, lines.join("\n") + "\n").expect("cyrus.conf");
}

fn under_master(server: Server) {
    let mut options = Options::new().set("spooltap_passwords", "@BASE@/passwords");
    match server {
        Server::Named(Kind::Archive) => options = options.set("spooltap_archive", "file://@BASE@/served/archive"),
        Server::Named(Kind::Cyrus) => options = options.set("spooltap_store", "cyrus://@BASE@/served/store"),
        Server::Real | Server::Own => {}
    }
    let mut replica = CyrusServer::prepare(options).expect("is set up");
    let place = replica.base().join("served");
    std::fs::create_dir(&place).expect("directory");
    let passwords = replica.base().join("passwords");
    std::fs::write(&passwords, format!("{REPLICATOR}:{PASSWORD}\n")).expect("passwords");
    std::fs::set_permissions(&passwords, PermissionsExt::from_mode(0o600)).expect("mode");
    let services = replica.base().join("cyrus.conf");
    let unchanged = std::fs::read_to_string(&services).expect("cyrus.conf");
    let mut alone = None;
    match server {
        Server::Real => {}
        Server::Named(_) => with_ours(&replica, "sync_server", None),
        // Nobody else may be at work on that store meanwhile.
        Server::Own => {
            with_ours(&replica, "sync_server", Some("csync"));
            cyrus::give_to_cyrus(replica.base()).expect("changes owner");
            let mut master = Command::new(replica.program("master"));
            master.arg("-C").arg(replica.conf()).arg("-M").arg(&services).arg("-p").arg(replica.base().join("pid"));
            master.current_dir(replica.base()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            alone = Some(Group::spawn(cyrus::as_cyrus(&mut master)).expect("starts"));
        }
    }
    if server != Server::Own {
        replica.boot().expect("starts");
    }
    let answers = eventually(Duration::from_secs(60), || Talk::login(replica.csync(), REPLICATOR, PASSWORD).ok());
    assert!(answers.is_some(), "{server:?}: the sync_server does not answer");
    drop(answers);

    let settings = Options::new()
        .replicate_to(&replica)
        .set("sync_log", "yes")
        .set("sync_shutdown_file", "@BASE@/conf/sync/stop")
        .source()
        .users(&["u1", "u2", "jane.doe"]);
    let mut source = CyrusServer::start(settings).expect("starts");
    let services = source.base().join("cyrus.conf");
    let line =
        format!("  syncclient cmd=\"{} -C {} -r\"\n", source.program("sync_client").display(), source.conf().display());
    let text =
        std::fs::read_to_string(&services).expect("cyrus.conf").replace("START {\n", &format!("START {{\n{line}"));
    std::fs::write(&services, text).expect("cyrus.conf");
    for (round, ours) in [(1, false), (2, true)] {
        source.stop().expect("stops");
        if ours {
            with_ours(&source, "sync_client", None);
        }
        source.boot().expect("starts");
        work(&source, round);
        let log = source.base().join("conf/sync/log");
        let idle = eventually(Duration::from_secs(60), || {
            let quiet = || !log.exists() && !log.with_file_name("log-run").exists();
            (quiet() && {
                std::thread::sleep(Duration::from_millis(500));
                quiet()
            })
            .then_some(())
        });
        assert_eq!(idle, Some(()), "{server:?}: the log is not taken");
        // It ends when what it took up is done, and takes the file away.
        let stop = source.base().join("conf/sync/stop");
        std::fs::write(&stop, "").expect("asks it to stop");
        assert_eq!(eventually(Duration::from_secs(60), || (!stop.exists()).then_some(())), Some(()), "{server:?}");
        if ours {
            let client = source.base().join("sync_client");
            let gone = eventually(Duration::from_secs(60), || (!is_running(&client)).then_some(()));
            assert_eq!(gone, Some(()), "it does not end");
        }
    }
    match server {
        Server::Named(kind) => shows_the_same(&source, kind, &place),
        Server::Real => same(&source, &replica),
        // Now with all its services, started by lines as they were.
        Server::Own => {
            drop(alone);
            std::fs::write(replica.base().join("cyrus.conf"), unchanged).expect("cyrus.conf");
            replica.boot().expect("starts");
            replica.sieve("jane.doe").expect("logs in").list().expect("lists");
            let differences = diff(
                &snapshot(&source, source.users()).expect("is read"),
                &snapshot(&replica, source.users()).expect("is read"),
                &Rules::live().and(&WRITTEN).and(SCRIPTS),
            );
            assert!(differences.is_empty(), "{}", differences.join("\n"));
        }
    }
}

/// systemd opens the port and starts the server at the first connection.
#[test]
fn systemd_hands_the_socket_over() {
    let activate = Path::new("/usr/bin/systemd-socket-activate");
    if !activate.exists() {
        eprintln!("not checked: systemd-socket-activate is not installed");
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let passwords = dir.path().join("passwords");
    std::fs::write(&passwords, format!("{REPLICATOR}:{PASSWORD}\n")).expect("passwords");
    std::fs::set_permissions(&passwords, PermissionsExt::from_mode(0o600)).expect("mode");
    let address = super::free_port();
    let mut command = Command::new(activate);
    command.arg("-l").arg(address.to_string()).arg(env!("CARGO_BIN_EXE_spooltap"));
    command
        .args(["serve", "--listen", "inherited", "--archive", &super::archive(dir.path()), "--passwords"])
        .arg(&passwords);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut group = Group::spawn(&mut command).expect("starts");
    let talk = eventually(Duration::from_secs(60), || Talk::login(address, REPLICATOR, PASSWORD).ok());
    assert_eq!(talk.expect("logs in").said(b"GET USER u1\r\n"), "OK success");
    group.signal(Signal::SIGTERM);
    let ended = eventually(Duration::from_secs(60), || group.ended());
    assert_eq!(ended.and_then(|status| status.code()), Some(0));
}

/// A process runs this program.
fn is_running(program: &Path) -> bool {
    let all = std::fs::read_dir("/proc").expect("lists").flatten();
    all.filter_map(|entry| std::fs::read_link(entry.path().join("exe")).ok()).any(|exe| exe == program)
}
