//! What a `serve` in front of an archive takes, against a real sync_server, from the same real client in the same run.
//!
//! `cargo bench --bench serve [-- messages one]`. Both ends have on disk what they acknowledge.

mod shared;
#[path = "../tests/util/mod.rs"]
mod util;

use anyhow::ensure;
use shared::{Bench, at, done, ms, report, timed};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use util::cyrus::{PASSWORD, REPLICATOR};
use util::process::Group;
use util::{CyrusServer, Imap, Options, Rng, cyrus, eventually};

const BENCHES: &[Bench] = &[
    ("messages", "sync_client -A of 10 users with 500 messages of 4 KB each", messages),
    ("one", "sync_client -m of a mailbox with one new message, from its start to its end", one),
];

fn main() -> anyhow::Result<()> {
    ensure!(cyrus::installed(), "the benches need an installed Cyrus, see tests/run");
    shared::run(BENCHES)
}

/// A `spooltap serve` in front of an archive below this folder.
struct Served {
    address: SocketAddr,
    _group: Group,
}

impl Served {
    fn start(dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let passwords = dir.join("passwords");
        std::fs::write(&passwords, format!("{REPLICATOR}:{PASSWORD}\n"))?;
        std::fs::set_permissions(&passwords, PermissionsExt::from_mode(0o600))?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_spooltap"));
        command.args(["serve", "--archive", &format!("file://{}", dir.join("archive").display())]);
        command.args(["--listen", &address.to_string(), "--passwords"]).arg(&passwords);
        let group = Group::spawn(&mut command)?;
        let up = eventually(Duration::from_secs(30), || TcpStream::connect(address).ok());
        ensure!(up.is_some(), "serve does not listen");
        Ok(Self { address, _group: group })
    }
}

fn send_to(source: &mut CyrusServer, address: SocketAddr) -> anyhow::Result<()> {
    source.set("sync_host", address.ip())?;
    source.set("sync_port", address.port())
}

fn messages() -> anyhow::Result<()> {
    const ROUNDS: usize = 5;
    let users: Vec<String> = (1..=10).map(|number| format!("u{number}")).collect();
    let mut source = CyrusServer::start(Options::new().users(&users.iter().map(String::as_str).collect::<Vec<_>>()))?;
    for user in &users {
        let mut session = source.imap(user)?;
        for number in 0..500 {
            append(&mut session, number, 4096)?;
        }
    }
    let dir = tempfile::tempdir()?;
    let mut rounds = Vec::new();
    // One round more than counts: the first fills the caches.
    for round in 0..=ROUNDS {
        let served = Served::start(&dir.path().join(round.to_string()))?;
        send_to(&mut source, served.address)?;
        let (our, output) = timed(|| source.tool("sync_client", &["-A"]))?;
        done("sync_client -A to serve", &output)?;
        drop(served);
        let replica = CyrusServer::start(Options::new())?;
        send_to(&mut source, replica.csync())?;
        let (their, output) = timed(|| source.tool("sync_client", &["-A"]))?;
        done("sync_client -A to sync_server", &output)?;
        if round > 0 {
            rounds.push((our, their));
        }
    }
    report("serve", "sync_server", &rounds);
    Ok(())
}

fn one() -> anyhow::Result<()> {
    const MESSAGES: usize = 100;
    let mut source = CyrusServer::start(Options::new().users(&["u1"]))?;
    let replica = CyrusServer::start(Options::new())?;
    let dir = tempfile::tempdir()?;
    let served = Served::start(dir.path())?;
    let mut session = source.imap("u1")?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for number in 0..=MESSAGES {
        append(&mut session, number, 4096)?;
        for (address, took) in [(served.address, &mut ours), (replica.csync(), &mut theirs)] {
            send_to(&mut source, address)?;
            let (time, output) = timed(|| source.tool("sync_client", &["-m", "user.u1"]))?;
            done("sync_client -m", &output)?;
            // The first opens connections and starts processes.
            if number > 0 {
                took.push(time);
            }
        }
    }
    ours.sort_unstable();
    theirs.sort_unstable();
    for percent in [50, 99] {
        let (our, their) = (ms(at(&ours, percent)), ms(at(&theirs, percent)));
        println!("  p{percent}: serve {our:.1} ms, sync_server {their:.1} ms, ratio {:.2}", their / our);
    }
    Ok(())
}

fn append(session: &mut Imap, number: usize, size: usize) -> anyhow::Result<()> {
    let mut text = format!("From: a@lab.test\r\nSubject: message {number}\r\n\r\n");
    let mut rng = Rng::new(number as u64);
    while text.len() < size {
        text.push_str(&format!("{:016x}{:016x}{:016x}\r\n", rng.next(), rng.next(), rng.next()));
    }
    session.ok([format!("APPEND INBOX {{{}+}}\r\n", text.len()).as_bytes(), text.as_bytes()].concat())?;
    Ok(())
}
