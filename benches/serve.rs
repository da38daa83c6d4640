//! What a `serve` takes, in front of an archive and of a store in Cyrus's own format, against a real sync_server, from the same
//! real client in the same run.
//!
//! `cargo bench --bench serve [-- messages ack one]`. All have on disk what they acknowledge. A `serve` offers no compression to a
//! client of the same machine; with `SPOOLTAP_BENCH_COMPRESS=on` it does, as a sync_server always does. Then the client is at work most
//! of the time.

mod shared;
#[path = "../tests/util/mod.rs"]
mod util;

use anyhow::ensure;
use shared::{Bench, at, done, ms, report, timed};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use util::cyrus::{PASSWORD, REPLICATOR};
use util::process::Group;
use util::{CyrusServer, Imap, Options, Rng, cyrus, eventually};

const BENCHES: &[Bench] = &[
    ("messages", "sync_client -A of 10 users with 500 messages of 4 KB each", messages),
    (
        "ack",
        "what a client waits for the server while it brings one new message, from its first question about the mailbox",
        ack,
    ),
    ("one", "sync_client -m of a mailbox with one new message, from its start to its end", one),
];

fn main() -> anyhow::Result<()> {
    ensure!(cyrus::installed(), "the benches need an installed Cyrus, see tests/run");
    shared::run(BENCHES)
}

/// What is served, below a folder.
const STORES: [(&str, &str); 2] = [("archive", "file"), ("cyrus", "cyrus")];

/// A `spooltap serve` in front of a store below this folder.
struct Served {
    address: SocketAddr,
    _group: Group,
}

impl Served {
    fn start(dir: &Path, (name, scheme): (&str, &str)) -> anyhow::Result<Self> {
        let dir = &dir.join(name);
        std::fs::create_dir_all(dir)?;
        let passwords = dir.join("passwords");
        std::fs::write(&passwords, format!("{REPLICATOR}:{PASSWORD}\n"))?;
        std::fs::set_permissions(&passwords, PermissionsExt::from_mode(0o600))?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_spooltap"));
        command.args(["serve", "--store", &format!("{scheme}://{}", dir.join("store").display())]);
        command.args(["--listen", &address.to_string(), "--passwords"]).arg(&passwords);
        command.args(std::env::var("SPOOLTAP_BENCH_COMPRESS").ok().map(|whom| format!("--compress={whom}")));
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
    let mut rounds = STORES.map(|_| Vec::new());
    // All stay until the end: ext4 without a journal looks, at each file that is made, through the inodes that were freed in
    // the last minute. The stores of one round, taken away, made the next one measure that.
    let mut replicas = Vec::new();
    // One round more than counts: the first fills the caches.
    for round in 0..=ROUNDS {
        let mut ours = Vec::new();
        for store in STORES {
            let served = Served::start(&dir.path().join(round.to_string()), store)?;
            send_to(&mut source, served.address)?;
            let (our, output) = timed(|| source.tool("sync_client", &["-A"]))?;
            done("sync_client -A to serve", &output)?;
            ours.push(our);
        }
        let mut replica = CyrusServer::start(Options::new())?;
        send_to(&mut source, replica.csync())?;
        let (their, output) = timed(|| source.tool("sync_client", &["-A"]))?;
        done("sync_client -A to sync_server", &output)?;
        for (rounds, our) in rounds.iter_mut().zip(ours).filter(|_| round > 0) {
            rounds.push((our, their));
        }
        replica.stop()?;
        replicas.push(replica);
    }
    for ((name, _), rounds) in STORES.iter().zip(&rounds) {
        report(&format!("serve ({name})"), "sync_server", rounds);
        let rate = |pick: fn(&(Duration, Duration)) -> Duration| {
            let mut all: Vec<Duration> = rounds.iter().map(pick).collect();
            all.sort_unstable();
            users.len() as f64 * 500.0 / at(&all, 50).as_secs_f64()
        };
        println!("  messages/s: {:.0} against {:.0}", rate(|round| round.0), rate(|round| round.1));
    }
    Ok(())
}

/// Both ends of an address that measures how long a client waits for its server.
struct Clock {
    address: SocketAddr,
    /// What was waited for in each session, in the answers to its last questions: the mailbox's state, reservation, message, records,
    /// goodbye. What comes before them (greeting, login, compression) is not the same for all.
    waited: Arc<Mutex<Vec<Duration>>>,
}

const QUESTIONS: usize = 5;

impl Clock {
    fn before(server: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let waited = Arc::new(Mutex::new(Vec::new()));
        let all = waited.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let all = all.clone();
                std::thread::spawn(move || {
                    let took = carry(client, server).unwrap_or_default();
                    all.lock().expect("lock").push(took.into_iter().rev().take(QUESTIONS).sum());
                });
            }
        });
        Ok(Self { address, waited })
    }

    /// What was waited for in the session that has just ended.
    fn last(&self) -> anyhow::Result<Duration> {
        let last = eventually(Duration::from_secs(10), || self.waited.lock().expect("lock").pop());
        last.ok_or_else(|| anyhow::anyhow!("no session went through"))
    }
}

/// Carries bytes both ways; how long each answer took, from the last byte of the question to the first of the answer.
fn carry(mut client: TcpStream, server: SocketAddr) -> std::io::Result<Vec<Duration>> {
    let mut server = TcpStream::connect(server)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let asked = Arc::new(Mutex::new(Some(Instant::now())));
    let (mut from, mut to, told) = (client.try_clone()?, server.try_clone()?, asked.clone());
    let up = std::thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count) = from.read(&mut bytes) {
            if count == 0 || to.write_all(&bytes[..count]).is_err() {
                break;
            }
            *told.lock().expect("lock") = Some(Instant::now());
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut took, mut bytes) = (Vec::new(), vec![0; 64 << 10]);
    while let Ok(count) = server.read(&mut bytes) {
        if count == 0 {
            break;
        }
        took.extend(asked.lock().expect("lock").take().map(|since| since.elapsed()));
        client.write_all(&bytes[..count])?;
    }
    let _ = client.shutdown(Shutdown::Write);
    let _ = up.join();
    Ok(took)
}

fn ack() -> anyhow::Result<()> {
    const MESSAGES: usize = 150;
    let mut source = CyrusServer::start(Options::new().users(&["u1"]))?;
    let replica = CyrusServer::start(Options::new())?;
    let dir = tempfile::tempdir()?;
    let served = STORES.map(|store| Served::start(dir.path(), store));
    let mut places = Vec::new();
    for (store, served) in STORES.iter().zip(&served) {
        let served = served.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        places.push((format!("serve ({})", store.0), Clock::before(served.address)?, Vec::new()));
    }
    places.push(("sync_server".to_owned(), Clock::before(replica.csync())?, Vec::new()));
    let mut session = source.imap("u1")?;
    for number in 0..=MESSAGES {
        append(&mut session, number, 4096)?;
        for (_, clock, waited) in &mut places {
            send_to(&mut source, clock.address)?;
            done("sync_client -m", &source.tool("sync_client", &["-m", "user.u1"])?)?;
            let took = clock.last()?;
            // The first makes the mailbox.
            if number > 0 {
                waited.push(took);
            }
        }
    }
    places.iter_mut().for_each(|(_, _, waited)| waited.sort_unstable());
    let theirs = places.last().map(|(_, _, waited)| waited.clone()).unwrap_or_default();
    for (name, _, waited) in &places {
        let of = |percent| (ms(at(waited, percent)), ms(at(&theirs, percent)));
        let ((p50, their50), (p99, their99)) = (of(50), of(99));
        println!(
            "  {name}: p50 {p50:.2} ms ({:.2} of sync_server's), p99 {p99:.2} ms ({:.2})",
            p50 / their50,
            p99 / their99
        );
    }
    Ok(())
}

fn one() -> anyhow::Result<()> {
    const MESSAGES: usize = 100;
    let mut source = CyrusServer::start(Options::new().users(&["u1"]))?;
    let replica = CyrusServer::start(Options::new())?;
    let dir = tempfile::tempdir()?;
    let mut places = Vec::new();
    for store in STORES {
        places.push((format!("serve ({})", store.0), Some(Served::start(dir.path(), store)?), Vec::new()));
    }
    places.push(("sync_server".to_owned(), None, Vec::new()));
    let mut session = source.imap("u1")?;
    for number in 0..=MESSAGES {
        append(&mut session, number, 4096)?;
        for (_, served, took) in &mut places {
            send_to(&mut source, served.as_ref().map_or(replica.csync(), |served| served.address))?;
            let (time, output) = timed(|| source.tool("sync_client", &["-m", "user.u1"]))?;
            done("sync_client -m", &output)?;
            // The first opens connections and starts processes.
            if number > 0 {
                took.push(time);
            }
        }
    }
    for (name, _, mut took) in places {
        took.sort_unstable();
        println!("  {name}: p50 {:.1} ms, p99 {:.1} ms", ms(at(&took, 50)), ms(at(&took, 99)));
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
