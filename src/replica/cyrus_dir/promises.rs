//! New messages that somebody waits for: what goes into the mailbox's files is promised with one wait for the disk, written, and brought
//! to the disk behind the confirmation. After a power cut it is written again.
//!
//! The index's header says whether a promise is of today: it has to be the one that was there before, or one that a promise has made.
//! A Cyrus that was started in between has changed it, or there is nothing to do.

use super::DirError;
use super::disk::{self, Disk};
use super::held::{Appending, index_path};
use super::messages::message_path;
use super::places::Places;
use super::store::{check_id, lock};
use crate::archive::{LeftPromises, Promise, Redo};
use crate::model::{Partition, Uid, UniqueId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

/// In configdirectory.
const NAME: &str = "spooltap.redo";

/// Longer messages are brought to the disk by themselves.
const MOST_BYTES: usize = 64 << 10;

/// What comes within this time is brought to the disk together.
const TOGETHER: Duration = Duration::from_millis(4);

/// A message file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Message {
    pub uid: Uid,
    /// Since 1970.
    pub modified: Duration,
    pub bytes: Vec<u8>,
}

/// All messages of one change; nothing where one of them is not to be promised.
#[derive(Debug, Default)]
pub(super) struct Messages {
    all: Vec<Message>,
    bytes: usize,
}

impl Messages {
    /// Room for one of this size.
    pub fn has_room(&self, size: u64) -> bool {
        usize::try_from(size).is_ok_and(|size| self.bytes.saturating_add(size) <= MOST_BYTES)
    }

    pub fn push(&mut self, message: Message) {
        self.bytes += message.bytes.len();
        self.all.push(message);
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

/// What is promised.
#[derive(Debug, Serialize, Deserialize)]
struct Promised {
    partition: Partition,
    uniqueid: UniqueId,
    messages: Vec<Message>,
    /// Of the index: where records are written and which, and its header, now and then.
    offset: u64,
    records: Vec<u8>,
    before: Vec<u8>,
    header: Vec<u8>,
}

/// What was promised, and is in the files now.
pub(super) struct Written {
    dir: PathBuf,
    uids: Vec<Uid>,
    promise: Promise,
}

/// Brings to the disk what was promised, in order.
#[derive(Default)]
pub(super) struct Promises {
    redo: Mutex<Option<Arc<Redo>>>,
    settler: Arc<Settler>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Settler {
    jobs: Mutex<Jobs>,
    changed: Condvar,
}

#[derive(Default)]
struct Jobs {
    waiting: Vec<Written>,
    /// Directories at work.
    busy: Vec<PathBuf>,
    /// Somebody waits.
    is_urgent: bool,
    is_over: bool,
}

impl Promises {
    /// From now on something can be promised. Without it everything is only slower.
    pub fn begin(&self, places: &Places) {
        let mut redo = lock(&self.redo);
        if redo.is_none() {
            match Redo::create(&places.conf.join(NAME)) {
                Ok(created) => *redo = Some(created),
                Err(error) => tracing::debug!(%error, "nothing can be promised"),
            }
        }
    }

    pub fn are_possible(&self) -> bool {
        lock(&self.redo).is_some()
    }

    /// Promises what is about to be written; `None` where that cannot be.
    pub fn promise(
        &self,
        partition: &Partition,
        uniqueid: &UniqueId,
        dir: &Path,
        messages: Messages,
        appending: &Appending<'_>,
    ) -> Option<Written> {
        let redo = lock(&self.redo).clone()?;
        let mut before = vec![0; appending.header.len()];
        appending.file.read_exact_at(&mut before, 0).ok()?;
        let uids = messages.all.iter().map(|message| message.uid).collect();
        let promised = Promised {
            partition: partition.clone(),
            uniqueid: uniqueid.clone(),
            messages: messages.all,
            offset: appending.offset,
            records: appending.records.to_vec(),
            before,
            header: appending.header.to_vec(),
        };
        let promise = redo.promise(&postcard::to_stdvec(&promised).ok()?).ok()??;
        Some(Written { dir: dir.to_owned(), uids, promise })
    }

    /// All of it is in the files: behind the confirmation it goes to the disk.
    pub fn written(&self, written: Written, disk: &Disk) {
        let mut thread = lock(&self.thread);
        if thread.is_none() {
            let (settler, disk) = (self.settler.clone(), disk.clone());
            *thread = std::thread::Builder::new().name("settle".into()).spawn(move || settler.run(&disk)).ok();
        }
        lock(&self.settler.jobs).waiting.push(written);
        match thread.is_some() {
            true => self.settler.changed.notify_all(),
            false => settle(std::mem::take(&mut lock(&self.settler.jobs).waiting), disk),
        }
    }

    /// Waits until what was written to this mailbox is on the disk: before anything else is changed there.
    pub fn wait(&self, dir: &Path) {
        let is_pending =
            |jobs: &Jobs| jobs.waiting.iter().any(|job| job.dir == dir) || jobs.busy.iter().any(|at| at == dir);
        let mut jobs = lock(&self.settler.jobs);
        while is_pending(&jobs) {
            jobs.is_urgent = true;
            self.settler.changed.notify_all();
            jobs = self.settler.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for all of it; nothing can be promised any more.
    pub fn finish(&self) {
        lock(&self.redo).take();
        lock(&self.settler.jobs).is_over = true;
        self.settler.changed.notify_all();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

impl Settler {
    fn run(&self, disk: &Disk) {
        let mut jobs = lock(&self.jobs);
        loop {
            if jobs.waiting.is_empty() {
                if jobs.is_over {
                    return;
                }
                jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let soon = |jobs: &mut Jobs| !jobs.is_urgent && !jobs.is_over;
            (jobs, _) = self.changed.wait_timeout_while(jobs, TOGETHER, soon).unwrap_or_else(PoisonError::into_inner);
            let all = std::mem::take(&mut jobs.waiting);
            jobs.busy = all.iter().map(|job| job.dir.clone()).collect();
            jobs.is_urgent = false;
            drop(jobs);
            settle(all, disk);
            jobs = lock(&self.jobs);
            jobs.busy.clear();
            self.changed.notify_all();
        }
    }
}

/// Messages and names first, the index that speaks of them last.
fn settle(all: Vec<Written>, disk: &Disk) {
    let dirs: BTreeSet<&PathBuf> = all.iter().map(|job| &job.dir).collect();
    let sync = |path: &Path| disk.sync(&File::open(path)?, path);
    let synced = all
        .iter()
        .flat_map(|job| job.uids.iter().map(|uid| message_path(&job.dir, *uid)))
        .try_for_each(|path| sync(&path))
        .and_then(|()| dirs.iter().try_for_each(|dir| disk.sync_dir(dir)))
        .and_then(|()| dirs.iter().try_for_each(|dir| sync(&index_path(dir))));
    let taken_back = synced.and_then(|()| all.into_iter().try_for_each(|job| job.promise.take_back()));
    if let Err(error) = taken_back {
        // The promises stand: whoever opens the directory next writes all of it again.
        tracing::error!(%error, "what was acknowledged cannot be brought to its place on the disk; open the directory anew");
    }
}

/// Writes again what a power cut may have taken, in these directories.
pub(super) fn recover(places: &Places, disk: &Disk) -> Result<Vec<PathBuf>, DirError> {
    let path = places.conf.join(NAME);
    let mut dirs = Vec::new();
    let Some(left) = LeftPromises::find(&path).map_err(|error| DirError::io(&path, error))? else { return Ok(dirs) };
    let read = |record: &Vec<u8>| postcard::from_bytes::<Promised>(record).ok();
    let mut all: Vec<Promised> = left.records.iter().filter_map(read).collect();
    while let Some(first) = all.first() {
        let id = first.uniqueid.clone();
        let (theirs, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|promised| promised.uniqueid == id);
        all = others;
        dirs.extend(write_again(places, disk, &theirs)?);
    }
    left.done().map_err(|error| DirError::io(&path, error))?;
    Ok(dirs)
}

/// The promises of one mailbox.
fn write_again(places: &Places, disk: &Disk, all: &[Promised]) -> Result<Option<PathBuf>, DirError> {
    // Those that stand on each other, up to the last.
    let mut run: Vec<&Promised> = Vec::new();
    for promised in all {
        if run.last().is_some_and(|last| last.header != promised.before) {
            run.clear();
        }
        run.push(promised);
    }
    let Some(first) = run.first() else { return Ok(None) };
    check_id(&first.uniqueid)?;
    let Ok(dir) = places.mailbox(&first.partition, &first.uniqueid) else { return Ok(None) };
    let path = index_path(&dir);
    let io = |error| DirError::io(&path, error);
    let file = match OpenOptions::new().read(true).write(true).open(&path) {
        // With its mailbox.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.map_err(io)?,
    };
    let mut now = vec![0; first.before.len()];
    file.read_exact_at(&mut now, 0).map_err(io)?;
    if now != first.before && run.iter().all(|promised| promised.header != now) {
        return Ok(None);
    }
    for promised in &run {
        for message in &promised.messages {
            let path = message_path(&dir, message.uid);
            put(disk, &path, message).map_err(|error| DirError::io(&path, error))?;
        }
        disk.write_at(&file, &path, promised.offset, &promised.records).map_err(io)?;
    }
    disk.sync_dir(&dir).map_err(|error| DirError::io(&dir, error))?;
    disk.sync(&file, &path).map_err(io)?;
    if let Some(last) = run.last() {
        disk.write_at(&file, &path, 0, &last.header).map_err(io)?;
    }
    disk.sync(&file, &path).map_err(io)?;
    tracing::info!(dir = %dir.display(), updates = run.len(), "acknowledged messages were written again");
    Ok(Some(dir))
}

fn put(disk: &Disk, path: &Path, message: &Message) -> io::Result<()> {
    let file = if disk::read(path)?.as_ref() == Some(&message.bytes) {
        File::open(path)?
    } else {
        let file = disk.create(path)?;
        disk.write(&file, path, &message.bytes)?;
        file
    };
    file.set_modified(SystemTime::UNIX_EPOCH + message.modified)?;
    disk.sync(&file, path)
}
