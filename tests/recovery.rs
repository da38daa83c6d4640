//! Deaths: of `spooltap run` at any moment, of the replica's `sync_server` in the middle of an upload, of the state
//! database. What was confirmed is not sent again, and in the end both sides are equal.

use crate::cyrus_live::{LIMIT, differences, flavour, rules, seeds};
use crate::util::diff::Exception;
use crate::util::gate::Sent;
use crate::util::imap::{literal, quote};
use crate::util::workload::{RESIDENTS, work};
use crate::util::{CyrusServer, Gate, Rng, Spooltap, Workload, cyrus};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// What each account has in `Scene::filled`.
const FOLDERS: usize = 8;
const MESSAGES: usize = 6;
const MESSAGE_BYTES: usize = 4096;

/// A death costs at most what was on its way, and that is one mailbox for each session.
const SESSIONS: u64 = 4;
const MAILBOX_BYTES: u64 = (MESSAGES * MESSAGE_BYTES) as u64;

/// A session that lost its client goes on with what it has read, beside the next one. The mail arrives all the same, but now
/// and then a real server's own count of it does not (`quota -f` there counts anew). Limits are compared.
const USAGE: Exception = Exception {
    at: &["users", "*", "mailboxes", "*", "quota", "*", "*"],
    why: "the replica's own count",
    allowed: |expected, found| expected[1] == found[1],
};
const SHARED_USAGE: Exception = Exception { at: &["shared", "*", "quota", "*", "*"], ..USAGE };

struct Scene {
    source: CyrusServer,
    replica: CyrusServer,
    /// Between spooltap and the replica.
    gate: Gate,
    dir: TempDir,
}

impl Scene {
    fn new(seed: u64) -> anyhow::Result<Self> {
        let source = CyrusServer::start(flavour(seed).source())?;
        let replica = CyrusServer::start(flavour(seed))?;
        let gate = Gate::before(replica.csync())?;
        Ok(Self { source, replica, gate, dir: tempfile::tempdir()? })
    }

    /// With as many messages in as many mailboxes that their first replication can be interrupted many times.
    fn filled(seed: u64) -> anyhow::Result<Self> {
        let scene = Self::new(seed)?;
        Workload::new(seed, 0).prepare(&scene.source)?;
        let mut rng = Rng::new(seed);
        for login in RESIDENTS {
            let mut session = scene.source.imap(login)?;
            for number in 0..FOLDERS {
                let folder = quote(&format!("INBOX{}f{number}", scene.source.names().separator()));
                session.send(format!("CREATE {folder}"));
                for _ in 0..MESSAGES {
                    let mut command = format!("APPEND {folder} ").into_bytes();
                    command.extend(literal(&message(&mut rng)));
                    session.send(command);
                }
                for _ in 0..=MESSAGES {
                    anyhow::ensure!(session.receive()?.ok, "{folder} of {login} is not filled");
                }
            }
        }
        Ok(scene)
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn run(&self) -> anyhow::Result<Spooltap> {
        Spooltap::run(&self.source.conf(), &self.gate.url(), &self.state())
    }

    /// Both sides show the same.
    fn check(&self, spooltap: &Spooltap, since: Instant) -> anyhow::Result<()> {
        let found = differences(&self.source, &self.replica, since, &rules().and(&[USAGE, SHARED_USAGE]))?;
        let (found, status, log) = (found.join("\n"), spooltap.status(), spooltap.log_end(40));
        anyhow::ensure!(found.is_empty(), "differences:\n{found}\nspooltap is at {status} and said\n{log}");
        Ok(())
    }

    /// A message that was sent twice for more than what each death may cost.
    fn check_repeated(&self, deaths: u64) -> anyhow::Result<Sent> {
        let sent = self.gate.bodies();
        println!("{deaths} deaths: {sent:?}");
        let allowed = deaths * SESSIONS * MAILBOX_BYTES;
        anyhow::ensure!(sent.repeated_bytes <= allowed, "{deaths} deaths may repeat {allowed} bytes: {sent:?}");
        Ok(sent)
    }
}

/// All bodies of a scene in bytes.
const ALL_BYTES: u64 = RESIDENTS.len() as u64 * FOLDERS as u64 * MAILBOX_BYTES;

fn message(rng: &mut Rng) -> Vec<u8> {
    let mut text = format!("Subject: {:x}\r\n\r\n", rng.next()).into_bytes();
    while text.len() + 18 <= MESSAGE_BYTES {
        text.extend(format!("{:016x}\r\n", rng.next()).bytes());
    }
    text.resize(MESSAGE_BYTES - 2, b'x');
    text.extend(b"\r\n");
    text
}

/// Moments in the upload of everything, in bytes after the death before.
fn moments(seed: u64, count: usize) -> Vec<u64> {
    let mut rng = Rng::new(seed);
    let part = ALL_BYTES as usize / (count + 2);
    (0..count).map(|_| (part / 2 + rng.below(part)) as u64).collect()
}

#[test]
fn killed_during_the_first_replication_it_goes_on_where_it_was() {
    if !cyrus::installed() {
        return;
    }
    killed_during_the_first_replication(1).expect("recovers");
}

fn killed_during_the_first_replication(seed: u64) -> anyhow::Result<()> {
    let scene = Scene::filled(seed)?;
    let moments = moments(seed, 6);
    for (number, bytes) in moments.iter().enumerate() {
        scene.gate.hold_after(*bytes);
        let run = scene.run()?;
        anyhow::ensure!(scene.gate.wait_held(LIMIT), "death {number} comes too late:\n{}", run.log_end(20));
        run.kill9();
        scene.gate.cut();
    }
    let run = scene.run()?;
    scene.check(&run, Instant::now())?;
    let sent = scene.check_repeated(moments.len() as u64)?;
    anyhow::ensure!(sent.bytes - sent.repeated_bytes == ALL_BYTES, "not all of {ALL_BYTES} bytes are in {sent:?}");
    // Once more with nothing to do: no body, and no more than questions.
    run.kill9();
    let before = scene.gate.sent_bytes();
    let mut run = scene.run()?;
    run.wait_live(LIMIT)?;
    scene.check(&run, Instant::now())?;
    anyhow::ensure!(scene.gate.bodies() == sent, "a start with nothing to do sent bodies");
    let asked = scene.gate.sent_bytes() - before;
    anyhow::ensure!(asked < 16 << 10, "a start with nothing to do sent {asked} bytes");
    Ok(())
}

#[test]
fn without_its_state_it_compares_everything_and_uploads_nothing_again() {
    if !cyrus::installed() {
        return;
    }
    without_its_state(2).expect("recovers");
}

fn without_its_state(seed: u64) -> anyhow::Result<()> {
    let scene = Scene::filled(seed)?;
    scene.gate.hold_after(ALL_BYTES / 2);
    let run = scene.run()?;
    anyhow::ensure!(scene.gate.wait_held(LIMIT), "{}", run.log_end(20));
    run.kill9();
    scene.gate.cut();
    forget(&scene.state())?;
    let run = scene.run()?;
    scene.check(&run, Instant::now())?;
    let sent = scene.check_repeated(1)?;
    anyhow::ensure!(sent.bytes - sent.repeated_bytes == ALL_BYTES, "not all of {ALL_BYTES} bytes are in {sent:?}");
    // When everything is there, and the source goes on while nobody remembers anything.
    run.kill9();
    forget(&scene.state())?;
    let new = b"Subject: new\r\n\r\nx\r\n";
    let answers = scene.source.lmtp()?.deliver(&["u1"], new)?;
    anyhow::ensure!(answers.iter().all(|answer| answer.starts_with('2')), "{answers:?}");
    let run = scene.run()?;
    scene.check(&run, Instant::now())?;
    let again = scene.gate.bodies();
    anyhow::ensure!(again.count == sent.count + 1, "{} bodies for one message", again.count - sent.count);
    anyhow::ensure!(again.repeated_bytes == sent.repeated_bytes, "sent again: {again:?}");
    Ok(())
}

fn forget(state: &Path) -> anyhow::Result<()> {
    anyhow::ensure!(state.is_dir(), "there is no state in {}", state.display());
    Ok(std::fs::remove_dir_all(state)?)
}

#[test]
fn a_replica_killed_in_the_middle_of_an_upload_gets_the_rest() {
    if !cyrus::installed() {
        return;
    }
    a_replica_killed(3).expect("recovers");
}

fn a_replica_killed(seed: u64) -> anyhow::Result<()> {
    let scene = Scene::filled(seed)?;
    let moments = moments(seed, 5);
    let mut run = None;
    for bytes in &moments {
        scene.gate.hold_after(*bytes);
        if run.is_none() {
            run = Some(scene.run()?);
        }
        anyhow::ensure!(scene.gate.wait_held(LIMIT), "no upload to be interrupted");
        anyhow::ensure!(scene.replica.kill_processes("sync_server") > 0, "no sync_server to be killed");
        scene.gate.open();
    }
    let mut run = run.expect("was started");
    scene.check(&run, Instant::now())?;
    anyhow::ensure!(run.ended().is_none(), "spooltap died with the replica:\n{}", run.log_end(20));
    let sent = scene.check_repeated(moments.len() as u64)?;
    anyhow::ensure!(sent.bytes - sent.repeated_bytes == ALL_BYTES, "not all of {ALL_BYTES} bytes are in {sent:?}");
    Ok(())
}

#[test]
fn killed_at_any_moment_of_a_workload_it_converges() {
    if !cyrus::installed() {
        return;
    }
    for seed in seeds(&[4]) {
        killed_at_any_moment(seed).unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
    }
}

fn killed_at_any_moment(seed: u64) -> anyhow::Result<()> {
    let scene = Scene::filled(seed)?;
    let mut workload = Workload::new(seed, 300);
    // Whoever looks for trouble takes them as well.
    workload.names_stay = std::env::var_os("SPOOLTAP_RENAMES").is_none();
    let mut rng = Rng::new(seed ^ 0x6b69_6c6c);
    let (done, kills) = std::thread::scope(|scope| {
        let busy = scope.spawn(|| work(&scene.source, &workload));
        let mut kills = 0;
        let killed = loop {
            if busy.is_finished() && kills >= 6 {
                break Ok(());
            }
            if let Err(error) = kill_once(&scene, &mut rng, kills) {
                break Err(error);
            }
            kills += 1;
        };
        workload.stop.fetch_or(killed.is_err(), Ordering::Relaxed);
        let done = busy.join().expect("does not panic");
        killed.map(|()| (done, kills))
    })?;
    println!("seed {seed}: {kills} times killed during {} operations", done.operations());
    let run = scene.run()?;
    scene.check(&run, Instant::now())?;
    let sent = scene.gate.bodies();
    println!("seed {seed}: {sent:?}");
    // Copies and equal messages are among the repeated ones. One start from nothing would be as much as all again.
    anyhow::ensure!(sent.repeated_bytes < ALL_BYTES, "{kills} kills: {sent:?}");
    Ok(())
}

/// One start and its death: while it starts, after some bytes, or some time after it has begun to follow live.
fn kill_once(scene: &Scene, rng: &mut Rng, number: usize) -> anyhow::Result<()> {
    let mut run = scene.run()?;
    match number % 3 {
        0 => std::thread::sleep(Duration::from_millis(5 + rng.below(120) as u64)),
        1 => {
            scene.gate.hold_after(rng.below(ALL_BYTES as usize / 6) as u64);
            scene.gate.wait_held(Duration::from_millis(1500));
        }
        _ => {
            run.wait_live(LIMIT)?;
            std::thread::sleep(Duration::from_millis(rng.below(900) as u64));
        }
    }
    let ended = run.ended();
    anyhow::ensure!(ended.is_none(), "spooltap ended by itself ({ended:?}):\n{}", run.log_end(20));
    run.kill9();
    // The server still carries out what the dead had sent, behind the back of whoever is started now.
    scene.gate.cut();
    Ok(())
}
