//! The rolling log that Cyrus writes itself (`sync_log: yes`), for stores where the kernel cannot tell: consumed as
//! `sync_client` does, so nothing is lost and nothing of another channel is touched.
//!
//! The one place of capture that writes below `configdirectory`: it renames and removes files of its own channel.

use super::feed::{Control, Feed, TouchKind};
use super::ground::{Area, Ground};
use super::logtail::DirWatch;
use super::{CaptureError, Source, wait};
use crate::cyrus::sync_log::{self, Record};
use crate::model::{DirtyKey, MailboxRef, MboxName, QuotaRoot, Scope, UserId, UserPart, UserRef};
use crate::spool::lock::{Held, Kind, attempt};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Longest wait for a lock; a writer holds it for one line and its fsync.
const PATIENCE: Duration = Duration::from_secs(10);
/// Writers that find the log renamed open it again, so often at most; as in Cyrus.
const TRIES: usize = 64;
/// Between two takings of the log: it would be renamed for every record otherwise.
const GAP: Duration = Duration::from_millis(10);
/// How often the log is looked for where inotify does not work.
const LOOK: Duration = Duration::from_secs(1);
/// Cyrus writes 4096 at most.
const LINE_MOST: u64 = 65_536;

struct SynclogSource {
    log: PathBuf,
    watch: DirWatch,
}

pub(super) fn fit(ground: &Ground, _: &Area) -> Result<String, String> {
    ground.sync_log.as_ref().map(|log| format!("Cyrus writes {}", log.display())).map_err(Clone::clone)
}

pub(super) fn open(ground: &Ground) -> Result<Box<dyn Source>, CaptureError> {
    // `fit` has said so before.
    let log = ground.sync_log.clone().unwrap_or_default();
    let watch = DirWatch::new(log.parent().unwrap_or(Path::new("/")));
    Ok(Box::new(SynclogSource { log, watch }))
}

impl Source for SynclogSource {
    fn run(&mut self, feed: &mut Feed, control: &Control) -> Result<(), CaptureError> {
        self.watch.watch();
        self.consume(feed, control)?;
        feed.armed(control);
        loop {
            let look_at = Instant::now() + LOOK;
            let wake_at = feed.next_deadline().map_or(look_at, |deadline| deadline.min(look_at));
            wait(control, self.watch.fd(), Some(wake_at))?;
            let orders = control.take();
            self.watch.empty();
            self.watch.watch();
            self.consume(feed, control)?;
            let in_hurry = orders.wants_all();
            if feed.round_done(orders, Instant::now()) {
                return Ok(());
            }
            if !in_hurry {
                std::thread::sleep(GAP);
            }
        }
    }
}

impl SynclogSource {
    /// Takes the log until there is none.
    fn consume(&mut self, feed: &mut Feed, control: &Control) -> Result<(), CaptureError> {
        let begun = Instant::now();
        while !control.is_stopping() {
            let Some(taken) = Taken::take(&self.log).map_err(|cause| at(&self.log, cause))? else { break };
            taken.read(feed).map_err(|cause| at(&taken.run, cause))?;
            // The file goes only when what it said is out.
            feed.flush();
            taken.done().map_err(|cause| at(&self.log, cause))?;
        }
        feed.looked_until(begun);
        Ok(())
    }
}

fn at(path: &Path, cause: io::Error) -> CaptureError {
    CaptureError::Path { path: path.to_owned(), cause }
}

/// Takes a log out of its writers' hands, or the one that a reader before us has left; where it is now. Whoever has dealt
/// with all that it says removes it.
pub fn take(log: &Path) -> io::Result<Option<PathBuf>> {
    Ok(Taken::take(log)?.map(|taken| taken.run))
}

/// The log renamed, to be read; it stays until `done`, so that a death in between costs nothing.
struct Taken {
    run: PathBuf,
    file: File,
}

impl Taken {
    /// `None` when nothing was logged.
    fn take(log: &Path) -> io::Result<Option<Self>> {
        let mut run = log.as_os_str().to_owned();
        run.push("-run");
        let run = PathBuf::from(run);
        // One that is there already was left by a reader that died.
        if !run.try_exists()? {
            match fs::rename(log, &run) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                renamed => renamed?,
            }
        }
        let file = OpenOptions::new().read(true).write(true).open(&run)?;
        // A writer may have opened it before it was renamed. Whoever gets the lock after us sees the new name.
        drop(lock(&file)?);
        Ok(Some(Self { run, file }))
    }

    fn read(&self, feed: &mut Feed) -> io::Result<()> {
        let mut lines = BufReader::new(&self.file);
        let mut line = Vec::new();
        loop {
            line.clear();
            if lines.by_ref().take(LINE_MOST).read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            let now = Instant::now();
            feed.counters.events.fetch_add(1, Relaxed);
            let text = line.strip_suffix(b"\n").unwrap_or(&line);
            for key in keys_of(text) {
                feed.names(TouchKind::Logged, &self.run, key, now);
            }
        }
    }

    fn done(self) -> io::Result<()> {
        fs::remove_file(&self.run)
    }
}

/// What may differ after this line; nothing for an empty one.
pub fn keys_of(line: &[u8]) -> Vec<DirtyKey> {
    sync_log::parse(line).map(|record| keys(&record)).unwrap_or_default()
}

/// What may differ after a record. Names, ACLs and partitions are in the list alone, so each mailbox brings it along.
fn keys(record: &Record) -> Vec<DirtyKey> {
    let mailbox = |name: &[u8]| DirtyKey::Mailbox(MailboxRef::Name(MboxName::new(name)));
    let part = |user: &[u8], part| DirtyKey::User(UserRef::Name(UserId::new(user)), part);
    let meta = |user: &[u8]| [UserPart::Subs, UserPart::Seen, UserPart::Sieve].map(|one| part(user, one)).to_vec();
    match record {
        Record::User(user) | Record::Unuser(user) => {
            let mut keys = meta(user);
            keys.push(DirtyKey::MailboxList);
            keys.push(DirtyKey::Rescan(Scope::Below(UserId::new(user).inbox())));
            keys
        }
        Record::Meta(user) => meta(user),
        Record::Mailbox(name) => vec![DirtyKey::MailboxList, mailbox(name)],
        Record::Mailboxes(one, two) => vec![DirtyKey::MailboxList, mailbox(one), mailbox(two)],
        Record::Quota(root) => vec![DirtyKey::Quota(QuotaRoot::new(root))],
        Record::Annotation(name) if name.is_empty() => vec![DirtyKey::Annotations],
        Record::Annotation(name) => vec![DirtyKey::Annotations, mailbox(name)],
        Record::Seen(user, _) => vec![part(user, UserPart::Seen)],
        Record::Sub(user, _) => vec![part(user, UserPart::Subs)],
        Record::Unknown(line) => {
            let line = String::from_utf8_lossy(line);
            tracing::warn!(%line, "sync_log has a line that is no record, comparing everything");
            vec![DirtyKey::Rescan(Scope::Everything)]
        }
    }
}

/// An exclusive lock, waited for.
fn lock(file: &File) -> io::Result<Held<'_>> {
    let begun = Instant::now();
    loop {
        if let Some(held) = attempt(file, Kind::Exclusive)? {
            return Ok(held);
        }
        if begun.elapsed() >= PATIENCE {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "somebody has kept it locked for 10 s"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Adds whole lines to a log as Cyrus's own writers do.
pub fn append(log: &Path, lines: &[u8]) -> io::Result<()> {
    for _ in 0..TRIES {
        let mut file = open_log(log)?;
        let locked = file.try_clone()?;
        let held = lock(&locked)?;
        // Taken by a reader since we opened it: what we write there may never be read.
        let is_log = fs::metadata(log).is_ok_and(|there| {
            file.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (there.dev(), there.ino()))
        });
        if is_log {
            file.write_all(lines)?;
            file.sync_all()?;
            drop(held);
            return Ok(());
        }
    }
    Err(io::Error::other(format!("{} was taken away {TRIES} times in a row", log.display())))
}

/// Opens it for appending; makes it, and its directory, as Cyrus does, belonging to whom the directory above belongs.
fn open_log(log: &Path) -> io::Result<File> {
    let open = || OpenOptions::new().append(true).mode(0o640).create_new(true).open(log);
    match OpenOptions::new().append(true).open(log) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        opened => return opened,
    }
    let dir = log.parent().ok_or(io::ErrorKind::NotFound)?;
    if !dir.try_exists()? {
        let above = dir.ancestors().skip(1).find(|above| above.exists()).ok_or(io::ErrorKind::NotFound)?;
        let owner = fs::metadata(above)?;
        let missing: Vec<&Path> = dir.ancestors().take_while(|path| *path != above).collect();
        for path in missing.into_iter().rev() {
            match fs::DirBuilder::new().mode(0o755).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => give(&File::open(path)?, &owner)?,
            }
        }
    }
    match open() {
        Ok(file) => {
            give(&file, &fs::metadata(dir)?)?;
            Ok(file)
        }
        // Somebody else was quicker.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => OpenOptions::new().append(true).open(log),
        Err(error) => Err(error),
    }
}

/// What root makes is of no use to Cyrus unless it is given to it.
fn give(file: &File, like: &fs::Metadata) -> io::Result<()> {
    match nix::unistd::geteuid().is_root() {
        true => fchown(file, Some(like.uid()), Some(like.gid())),
        false => Ok(()),
    }
}

/// Where Cyrus logs for a channel; the default channel has no name.
pub fn log_path(configdirectory: &Path, channel: Option<&str>) -> PathBuf {
    let dir = configdirectory.join("sync");
    match channel {
        Some(channel) => dir.join(std::ffi::OsStr::from_bytes(channel.as_bytes())).join("log"),
        None => dir.join("log"),
    }
}

/// The channels that Cyrus logs to; `None` is the default one.
pub fn channels(sync_log_channels: Option<&str>) -> Vec<Option<String>> {
    match sync_log_channels {
        None => vec![None],
        Some(text) => {
            let names = text.split(' ').filter(|name| !name.is_empty());
            names.map(|name| (name != "\"\"").then(|| name.to_owned())).collect()
        }
    }
}
