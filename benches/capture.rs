//! What noticing costs: making watches, deriving keys, idling, and one mailbox more in a very long list.
//!
//! `cargo bench --bench capture [-- derive watch idle list]`. `SPOOLTAP_BENCH_MAILBOXES` and `SPOOLTAP_BENCH_ROWS` make it
//! smaller, `SPOOLTAP_BENCH_DIR` keeps the store for the next time. `fanotify` is left out without its privilege.

mod shared;
#[path = "../tests/util/mod.rs"]
mod util;

use anyhow::{Context, ensure};
use shared::{Bench, LargeStore, Pushed, at, done, ms, timed};
use spooltap::capture::{self, Roots, Settings};
use spooltap::model::MailStore;
use spooltap::spool::{Layout, open_store};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use util::{Spooltap, cyrus};

const BENCHES: &[Bench] = &[
    ("derive", "paths to keys on one core", derive),
    ("watch", "from nothing to all directories of a large store watched, and our memory for it", watch),
    ("idle", "what a daemon on a large store takes of one processor while nothing happens", idle),
    ("list", "one mailbox more in a long mailboxes.db, against reading all of it", list),
];

fn main() -> anyhow::Result<()> {
    shared::run(BENCHES)
}

fn roots(store: &LargeStore) -> anyhow::Result<Roots> {
    Ok(Roots::from(open_store(&store.conf)?.layout()))
}

fn derive() -> anyhow::Result<()> {
    const EVENTS: usize = 4_000_000;
    let layout = Layout {
        configdirectory: "/var/lib/cyrus".into(),
        partitions: [("default".into(), "/var/spool/cyrus/mail".into())].into(),
        mailboxes_db: "/var/lib/cyrus/mailboxes.db".into(),
        annotations_db: "/var/lib/cyrus/annotations.db".into(),
        sievedir: "/var/lib/cyrus/sieve".into(),
        ..Layout::default()
    };
    let roots = Roots::from(&layout);
    // What a delivery, a change of flags and a user's own files touch, for many users.
    let touched = ["1234.", "cyrus.index", "cyrus.cache", "Folder/cyrus.index", "Folder/Below/17.", "cyrus.header"];
    let mut paths: Vec<PathBuf> = Vec::new();
    for n in 0..1000 {
        let mailbox = Path::new("/var/spool/cyrus/mail/user").join(format!("user{n}"));
        paths.extend(touched.iter().map(|name| mailbox.join(name)));
        paths.extend(["seen", "sub"].map(|kind| format!("/var/lib/cyrus/user/u/user{n}.{kind}").into()));
    }
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let since = Instant::now();
        let found = paths.iter().cycle().take(EVENTS).filter(|path| roots.derive(path, false).is_some()).count();
        best = best.min(since.elapsed());
        ensure!(found > EVENTS / 2, "keys are derived");
    }
    let millions = EVENTS as f64 / best.as_secs_f64() / 1e6;
    println!("  {millions:.2} million events/s at best, ratio {millions:.2} to the 1 million that is wanted");
    Ok(())
}

fn watch() -> anyhow::Result<()> {
    let store = LargeStore::make()?;
    store.warm()?;
    let directories = walkdir::WalkDir::new(&store.base).into_iter().flatten();
    let directories = directories.filter(|entry| entry.file_type().is_dir()).count();
    let settings = |source: &str| Settings { source: source.to_owned(), ..Settings::default() };
    for source in ["fanotify", "inotify"] {
        let before = private_bytes("self")?;
        let since = Instant::now();
        let handle = match capture::start(roots(&store)?, settings(source), Box::new(drop)) {
            Ok(handle) => handle,
            Err(error) => {
                println!("  {source}: left out: {error}");
                continue;
            }
        };
        handle.wait_armed();
        let took = since.elapsed();
        let bytes = private_bytes("self")?.saturating_sub(before);
        let stats = handle.stats();
        handle.stop();
        println!(
            "  {source}: {} watches on {directories} directories in {:.2} s, {} bytes of ours for each of {} mailboxes, ratio \
             {:.2} to the 300 that are wanted",
            stats.watches,
            took.as_secs_f64(),
            bytes / store.mailboxes as u64,
            store.mailboxes,
            bytes as f64 / store.mailboxes as f64 / 300.0
        );
        ensure!(stats.unwatched == 0, "{} directories have no watch: raise max_user_watches", stats.unwatched);
    }
    // The peer: whoever makes watches has to walk the tree.
    let mut find = Command::new("find");
    find.arg(&store.base).args(["-type", "d"]).stdout(Stdio::null());
    let (took, status) = timed(|| Ok(find.status()?))?;
    ensure!(status.success(), "find: {status}");
    println!("  find -type d: {:.2} s", took.as_secs_f64());
    Ok(())
}

fn private_bytes(process: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

fn idle() -> anyhow::Result<()> {
    let seconds = shared::size("SPOOLTAP_BENCH_SECONDS", 60) as u64;
    let pushed = Pushed::make()?;
    for source in ["inotify", "fanotify"] {
        let mut command = Spooltap::command(&pushed.store.conf, &pushed.state);
        command.args(["--replica", &pushed.url, "--capture", source, "run"]);
        let mut run = Spooltap::spawn(command, &pushed.state)?;
        if let Err(error) = run.wait_live(Duration::from_secs(600)) {
            println!("  {source}: left out: {error}");
            continue;
        }
        std::thread::sleep(Duration::from_secs(10));
        let before = ticks(run.pid())?;
        std::thread::sleep(Duration::from_secs(seconds));
        let took = ticks(run.pid())? - before;
        let memory = private_bytes(&run.pid().to_string())? >> 20;
        let percent = took as f64 / seconds as f64;
        println!(
            "  {source}: {percent:.3} % of one processor in {seconds} s, {memory} MiB, ratio {:.2} to the 0.1 % that is wanted",
            percent / 0.1
        );
        run.terminate()?;
    }
    Ok(())
}

/// Hundredths of a second that a process has had, in user and system mode.
fn ticks(pid: i32) -> anyhow::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').context("stat")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

fn list() -> anyhow::Result<()> {
    ensure!(cyrus::installed(), "this bench needs an installed Cyrus, see tests/run");
    let rows = shared::size("SPOOLTAP_BENCH_ROWS", 1_000_000);
    let dir = tempfile::tempdir()?;
    let conf = dir.path().join("imapd.conf");
    let base = dir.path().display();
    fs::write(&conf, format!("configdirectory: {base}\npartition-default: {base}/spool\nadmins: cyrus\n"))?;
    let flat = dir.path().join("flat");
    let mut out = std::io::BufWriter::new(fs::File::create(&flat)?);
    let row = |n: usize| format!("%(A %(u lrswipkxtecda) I {n:036x} P default V 1790000000 F 1 M 1790000000)");
    for n in 0..rows {
        writeln!(out, "user.u{:06}.folder-{:02}\t{}", n / 20, n % 20, row(n))?;
    }
    out.flush()?;
    drop(out);
    let mailboxes_db = dir.path().join("mailboxes.db");
    cyrus::give_to_cyrus(dir.path())?;
    let tool = |name: &str| {
        let mut command = Command::new(Path::new(cyrus::PROGRAMS).join(name));
        cyrus::as_cyrus(command.arg("-C").arg(&conf));
        command
    };
    // Cyrus's tool itself rewrites the two latter as a whole for every change.
    for (kind, rounds) in [("twoskip", 20), ("skiplist", 5), ("flat", 5)] {
        let _ = fs::remove_file(&mailboxes_db);
        let mut convert = tool("cvt_cyrusdb");
        done("cvt_cyrusdb", &convert.arg(&flat).arg("flat").arg(&mailboxes_db).arg(kind).output()?)?;
        let store = open_store(&conf)?;
        let (all, mut before) = timed(|| Ok(store.listing()?))?;
        ensure!(before.len() == rows, "{} rows were read", before.len());
        let mut took = Vec::new();
        for round in 0..rounds {
            let (key, value) = (format!("user.u000007.new-{round:02}"), row(rows + round));
            let mut set = tool("cyr_dbtool");
            done("cyr_dbtool", &set.arg(&mailboxes_db).args([kind, "set", &key, &value]).output()?)?;
            // As the router does it: the new list, and what is different in it.
            let (one, now) = timed(|| {
                let now = store.listing()?;
                ensure!(now.since(&before).count() == 1, "one mailbox differs");
                Ok(now)
            })?;
            ensure!(now.len() == rows + round + 1, "the new mailbox is seen");
            took.push((one, all));
            before = now;
        }
        shared::report(&format!("{kind}: one mailbox more"), "all rows", &took);
        let mut took: Vec<Duration> = took.into_iter().map(|(one, _)| one).collect();
        took.sort_unstable();
        println!(
            "  {kind}: all {rows} rows {:.0} ms, one more {:.2} ms (at most {:.2} ms)",
            ms(all),
            ms(at(&took, 50)),
            ms(at(&took, 100))
        );
    }
    Ok(())
}
