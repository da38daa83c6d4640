//! Fsyncs beside each other: what has to be on the disk before one commit waits for the disk once, not file by file.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SendError, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Threads at most. When all are at work, who asks does it himself: nobody waits for anybody else's files.
const MOST: usize = 16;

/// Threads that wait for something to bring to the disk; they end with this.
#[derive(Clone, Default)]
pub(super) struct Syncers(Arc<Pool>);

#[derive(Default)]
struct Pool {
    idle: Mutex<Vec<Sender<Job>>>,
    threads: AtomicUsize,
}

struct Job {
    file: File,
    done: SyncSender<io::Result<()>>,
    /// Of the thread that does it. Kept by whoever lends the thread out, so that it ends with the pool.
    way: Sender<Job>,
}

/// A file that is on its way to the disk.
pub(super) enum Pending {
    Done(io::Result<()>),
    Running(Receiver<io::Result<()>>),
}

impl Pending {
    pub fn wait(self) -> io::Result<()> {
        match self {
            Self::Done(result) => result,
            Self::Running(done) => done.recv().unwrap_or_else(|_| Err(io::Error::other("the thread that syncs died"))),
        }
    }
}

impl Syncers {
    /// Begins to bring a file to the disk.
    pub fn sync(&self, file: File) -> Pending {
        let Some(way) = self.0.worker() else { return Pending::Done(file.sync_all()) };
        let (done, pending) = mpsc::sync_channel(1);
        let job = Job { file, done, way: way.clone() };
        match way.send(job) {
            Ok(()) => Pending::Running(pending),
            Err(SendError(job)) => Pending::Done(job.file.sync_all()),
        }
    }
}

impl Pool {
    /// A thread with nothing to do, a new one if there may be more.
    fn worker(self: &Arc<Self>) -> Option<Sender<Job>> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if idle.is_some() {
            return idle;
        }
        let more = |threads: usize| (threads < MOST).then_some(threads.saturating_add(1));
        self.threads.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        let (way, jobs) = mpsc::channel();
        let pool = Arc::downgrade(self);
        match std::thread::Builder::new().name("fsync".into()).spawn(move || work(&jobs, &pool)) {
            Ok(_) => Some(way),
            Err(_) => {
                self.threads.fetch_sub(1, Ordering::Relaxed);
                None
            }
        }
    }
}

fn work(jobs: &Receiver<Job>, pool: &Weak<Pool>) {
    while let Ok(Job { file, done, way }) = jobs.recv() {
        let result = file.sync_all();
        drop(file);
        // Free again before anybody hears of it, so that what comes next finds this thread.
        if let Some(pool) = pool.upgrade() {
            pool.idle.lock().unwrap_or_else(PoisonError::into_inner).push(way);
        }
        let _ = done.send(result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(count: usize) -> Vec<File> {
        (0..count).map(|_| tempfile::tempfile().expect("file")).collect()
    }

    #[test]
    fn threads_are_used_again_are_no_more_than_there_may_be_and_end() {
        let syncers = Syncers::default();
        for _ in 0..3 {
            let pending: Vec<Pending> = files(3).into_iter().map(|file| syncers.sync(file)).collect();
            pending.into_iter().for_each(|pending| pending.wait().expect("is synced"));
        }
        assert!(syncers.0.threads.load(Ordering::Relaxed) <= 3);
        let pending: Vec<Pending> = files(100).into_iter().map(|file| syncers.sync(file)).collect();
        pending.into_iter().for_each(|pending| pending.wait().expect("is synced"));
        assert!(syncers.0.threads.load(Ordering::Relaxed) <= MOST);
        let pool = Arc::downgrade(&syncers.0);
        let way = syncers.0.worker().expect("a thread");
        drop(syncers);
        assert!(pool.upgrade().is_none());
        // Lent out when the pool ended: it does what it is told, and then ends.
        let (done, pending) = mpsc::sync_channel(1);
        let job = Job { file: tempfile::tempfile().expect("file"), done, way: way.clone() };
        way.send(job).expect("is alive");
        drop(way);
        assert!(pending.recv().expect("is done").is_ok() && pending.recv().is_err());
    }

    #[test]
    fn what_the_disk_says_is_heard() {
        let (end, _other) = io::pipe().expect("pipe");
        let file = File::from(std::os::fd::OwnedFd::from(end));
        assert!(Syncers::default().sync(file).wait().is_err());
    }
}
