//! What replication costs, against Cyrus's own client in the same run, between real servers on this machine.
//!
//! `cargo bench --bench replication [-- append initial nothing idle]`. Every figure is a ratio of two commands that take
//! turns; `docs/performance.md` keeps the figures with the machine they come from.

mod shared;
#[path = "../tests/util/mod.rs"]
mod util;

use anyhow::{Context, ensure};
use shared::{Bench, at, done, ms, report, timed};
use std::process::Command;
use std::time::{Duration, Instant};
use util::process::Group;
use util::{CyrusServer, Imap, Options, Rng, Spooltap, cyrus, eventually, imap};

const BENCHES: &[Bench] = &[
    ("append", "from an append at the source to a client that sees it on the replica", append),
    ("initial", "first replication of 10 users with 500 messages of 4 KB each", initial),
    ("nothing", "a second `push -A` of 10,000 mailboxes with nothing changed", nothing),
    ("idle", "what an idle `run` asks the kernel in 10 s", idle),
];

fn main() -> anyhow::Result<()> {
    ensure!(cyrus::installed(), "the benches need an installed Cyrus, see tests/run");
    shared::run(BENCHES)
}

/// Appends measured with spooltap, and with sync_client, which takes a second for most of them.
const APPENDS: (usize, usize) = (400, 60);

fn append() -> anyhow::Result<()> {
    let ours = Pair::start(&["u1", "u2", "u3", "u4"], &[])?;
    let theirs = Pair::start(&["u1", "u2", "u3", "u4"], &[("sync_log", "yes"), ("sync_repeat_interval", "1")])?;
    let state = tempfile::tempdir()?;
    let mut spooltap = Spooltap::run(&ours.source.conf(), &ours.replica.url(), &state.path().join("state"))?;
    spooltap.wait_live(Duration::from_secs(30))?;
    done("sync_client -A", &theirs.source.tool("sync_client", &["-A"])?)?;
    let mut rolling = theirs.source.tool_command("sync_client", &["-r"]);
    let _rolling = Group::spawn(rolling.env("CYRUS_ISDAEMON", "1"))?;
    let mut rng = Rng::new(1);
    let (mut our, mut their) = (ours.watch("u1")?, theirs.watch("u1")?);
    // The first change opens connections and starts processes on both replicas.
    our.append_and_see()?;
    their.append_and_see()?;
    let (mut ours_took, mut theirs_took) = (Vec::new(), Vec::new());
    for turn in 0..APPENDS.1 {
        for _ in turn * APPENDS.0 / APPENDS.1..(turn + 1) * APPENDS.0 / APPENDS.1 {
            std::thread::sleep(Duration::from_millis(rng.below(40) as u64));
            ours_took.push(our.append_and_see()?);
        }
        // Its interval must not be met at the same phase again and again.
        std::thread::sleep(Duration::from_millis(rng.below(1000) as u64));
        theirs_took.push(their.append_and_see()?);
    }
    ours_took.sort_unstable();
    theirs_took.sort_unstable();
    for percent in [50, 99, 100] {
        let (our, their) = (at(&ours_took, percent), at(&theirs_took, percent));
        println!(
            "  p{percent}: spooltap run {:.1} ms, sync_client -r {:.1} ms, ratio {:.1}",
            ms(our),
            ms(their),
            ms(their) / ms(our)
        );
    }
    Ok(())
}

fn initial() -> anyhow::Result<()> {
    const ROUNDS: usize = 5;
    let users: Vec<String> = (1..=10).map(|number| format!("u{number}")).collect();
    let mut source = CyrusServer::start(Options::new().users(&users))?;
    for user in &users {
        fill(&mut source.imap(user)?, "INBOX", 500, 4096)?;
    }
    let state = tempfile::tempdir()?;
    let mut rounds = Vec::new();
    // One round more than counts: the first fills the caches.
    for round in 0..=ROUNDS {
        let replica = CyrusServer::start(Options::new())?;
        let (our, output) = timed(|| {
            Spooltap::once(&source.conf(), &replica.url(), &state.path().join(round.to_string()), &["push", "-A"])
        })?;
        done("spooltap push -A", &output)?;
        expect(&replica, &users, 500)?;
        drop(replica);
        let replica = CyrusServer::start(Options::new())?;
        source.set("sync_host", replica.csync().ip())?;
        source.set("sync_port", replica.csync().port())?;
        let (their, output) = timed(|| source.tool("sync_client", &["-A"]))?;
        done("sync_client -A", &output)?;
        expect(&replica, &users, 500)?;
        if round > 0 {
            rounds.push((our, their));
        }
    }
    report("push -A", "sync_client -A", &rounds);
    let best = rounds.iter().map(|(our, _)| *our).min().unwrap_or_default();
    println!("  {:.0} messages/s at best", 5000.0 / best.as_secs_f64());
    Ok(())
}

fn nothing() -> anyhow::Result<()> {
    const ROUNDS: usize = 5;
    let users: Vec<String> = (1..=20).map(|number| format!("u{number}")).collect();
    let pair = Pair::start(&users.iter().map(String::as_str).collect::<Vec<_>>(), &[])?;
    for user in &users {
        let mut session = pair.source.imap(user)?;
        for folder in 0..499 {
            session.send(format!("CREATE INBOX.f{folder}"));
        }
        for _ in 0..499 {
            session.receive()?;
        }
    }
    let state = tempfile::tempdir()?;
    let push =
        || Spooltap::once(&pair.source.conf(), &pair.replica.url(), &state.path().join("state"), &["push", "-A"]);
    let (first, output) = timed(push)?;
    done("spooltap push -A", &output)?;
    println!("  the first push -A of 10,000 mailboxes: {:.2} s", first.as_secs_f64());
    let mut rounds = Vec::new();
    for round in 0..=ROUNDS {
        let (our, output) = timed(push)?;
        done("spooltap push -A", &output)?;
        let (their, output) = timed(|| pair.source.tool("sync_client", &["-A"]))?;
        done("sync_client -A", &output)?;
        if round > 0 {
            rounds.push((our, their));
        }
    }
    report("push -A", "sync_client -A", &rounds);
    Ok(())
}

fn idle() -> anyhow::Result<()> {
    let pair = Pair::start(&["u1", "u2"], &[])?;
    let state = tempfile::tempdir()?;
    let mut spooltap = Spooltap::run(&pair.source.conf(), &pair.replica.url(), &state.path().join("state"))?;
    spooltap.wait_live(Duration::from_secs(30))?;
    std::thread::sleep(Duration::from_secs(2));
    let trace = state.path().join("strace");
    let pid = spooltap.pid().to_string();
    let status = Command::new("timeout")
        .args(["10", "strace", "-f", "-y", "-qq", "-p", &pid, "-o"])
        .arg(&trace)
        .stderr(std::process::Stdio::null())
        .status()
        .context("strace (package strace)")?;
    ensure!(status.code() == Some(124), "strace: {status}");
    let trace = std::fs::read_to_string(&trace)?;
    let base = pair.source.base().to_string_lossy().into_owned();
    let touching = trace.lines().filter(|line| line.contains(&base)).count();
    println!("  {} system calls in 10 s, {touching} of them on the source's files", trace.lines().count());
    Ok(())
}

/// A source and its replica.
struct Pair {
    source: CyrusServer,
    replica: CyrusServer,
}

impl Pair {
    fn start(users: &[&str], conf: &[(&str, &str)]) -> anyhow::Result<Self> {
        let replica = CyrusServer::start(Options::new())?;
        let mut options = Options::new().users(users).replicate_to(&replica);
        for (key, value) in conf {
            options = options.set(key, value);
        }
        Ok(Self { source: CyrusServer::start(options)?, replica })
    }

    /// Sessions of one user at both ends.
    fn watch(&self, user: &str) -> anyhow::Result<Watch> {
        let source = self.source.imap(user)?;
        let replica = eventually(Duration::from_secs(30), || {
            let mut session = self.replica.imap(user).ok()?;
            session.ok("SELECT INBOX").ok().map(|reply| (session, reply.exists()))
        });
        let (replica, have) = replica.context("the INBOX does not come to the replica")?;
        Ok(Watch { source, replica, have })
    }
}

struct Watch {
    source: Imap,
    replica: Imap,
    have: usize,
}

impl Watch {
    /// Time from the source's OK to the first NOOP that shows the message.
    fn append_and_see(&mut self) -> anyhow::Result<Duration> {
        let message = message(self.have, 1024);
        self.source.ok([format!("APPEND INBOX {{{}+}}\r\n", message.len()).as_bytes(), &message].concat())?;
        let since = Instant::now();
        loop {
            let seen = self.replica.ok("NOOP")?.exists();
            if seen > self.have {
                self.have = seen;
                return Ok(since.elapsed());
            }
            ensure!(since.elapsed() < Duration::from_secs(30), "an append does not come to the replica");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

fn message(number: usize, size: usize) -> Vec<u8> {
    let mut text = format!("From: a@lab.test\r\nSubject: message {number}\r\nMessage-ID: <{number}@lab.test>\r\n\r\n");
    let mut rng = Rng::new(number as u64);
    while text.len() < size {
        text.push_str(&format!("{:016x}{:016x}{:016x}\r\n", rng.next(), rng.next(), rng.next()));
    }
    text.into_bytes()
}

fn fill(session: &mut Imap, mailbox: &str, count: usize, size: usize) -> anyhow::Result<()> {
    for number in 0..count {
        let message = message(number, size);
        let command = format!("APPEND {} {{{}+}}\r\n", imap::quote(mailbox), message.len());
        session.ok([command.as_bytes(), &message].concat())?;
    }
    Ok(())
}

fn expect(replica: &CyrusServer, users: &[String], count: usize) -> anyhow::Result<()> {
    for user in users {
        let have = replica.imap(user)?.ok("SELECT INBOX")?.exists();
        ensure!(have == count, "{user} has {have} messages on the replica instead of {count}");
    }
    Ok(())
}
