//! Blocking calls on an object store, for threads that read mail with blocking code. The only place that knows
//! `object_store` and tokio; a room above sees paths, bytes and `ArchiveError`. Files of this machine are `local`'s, but for bodies
//! that come or go in parts.

use super::ArchiveError;
use super::local::Local;
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    MultipartUpload, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    local::LocalFileSystem,
};
use std::future::Future;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use url::Url;

/// Requests on their way at one time, where order does not matter.
const CONCURRENT: usize = 16;

/// A place in an object store, and how much went to and fro.
#[derive(Clone)]
pub(super) struct Objects {
    store: Arc<dyn ObjectStore>,
    /// The same place, if it is a folder of this machine.
    local: Option<Arc<Local>>,
    root: Path,
    pub name: Arc<str>,
    traffic: Arc<Traffic>,
    /// One of these is held by whoever changes something that all sessions of this process change: they would only be in
    /// each other's way.
    turns: Arc<[Mutex<()>; 16]>,
}

#[derive(Default)]
struct Traffic {
    written: AtomicU64,
    read: AtomicU64,
}

/// An object in a listing: the last part of its path.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    pub file: String,
    /// Changes when the object is written anew.
    pub etag: String,
}

fn runtime() -> Result<&'static Runtime, ArchiveError> {
    static RUNTIME: OnceLock<io::Result<Runtime>> = OnceLock::new();
    let made = RUNTIME.get_or_init(|| Builder::new_multi_thread().worker_threads(2).enable_all().build());
    made.as_ref().map_err(|error| ArchiveError::Runtime(error.to_string()))
}

fn wait<T>(future: impl Future<Output = Result<T, ArchiveError>>) -> Result<T, ArchiveError> {
    runtime()?.block_on(future)
}

/// A bucket, as the usual variables describe it (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT` …). A store that does not
/// answer is soon the engine's affair, which knows what else there is to do.
fn s3(url: &str) -> object_store::Result<AmazonS3> {
    // The HTTP client takes the process's cryptography; who was first has chosen the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let retry = RetryConfig { max_retries: 3, retry_timeout: Duration::from_secs(20), ..RetryConfig::default() };
    AmazonS3Builder::from_env().with_url(url).with_retry(retry).build()
}

impl Objects {
    pub fn open(url: &str) -> Result<Self, ArchiveError> {
        let bad = |fault: String| ArchiveError::Url { url: url.to_owned(), fault };
        let parsed = Url::parse(url).map_err(|error| bad(error.to_string()))?;
        let root = || Path::from_url_path(parsed.path()).map_err(|error| bad(error.to_string()));
        let mut local = None;
        let (store, root): (Arc<dyn ObjectStore>, Path) = match parsed.scheme() {
            "file" if parsed.host_str().is_some() || parsed.path() == "/" => {
                return Err(bad("write file:///DIR with the whole path of a directory".to_owned()));
            }
            // What we confirm has to survive a power cut: the receipts that rely on it do.
            "file" => {
                let root = root()?;
                let folder = Local::new(std::path::Path::new("/").join(root.as_ref()));
                folder.recover(super::chain::is_whole).map_err(|error| {
                    let text = "what was promised before a power cut cannot be put in its place; open it once as somebody who may write there";
                    bad(format!("{text}: {error}"))
                })?;
                local = Some(Arc::new(folder));
                (Arc::new(LocalFileSystem::new().with_fsync(true).with_automatic_cleanup(true)), root)
            }
            "s3" if parsed.host_str().is_none() => {
                return Err(bad("write s3://BUCKET or s3://BUCKET/FOLDER".to_owned()));
            }
            "s3" => (Arc::new(s3(url).map_err(|error| bad(error.to_string()))?), root()?),
            scheme => return Err(bad(format!("no archive is kept at {scheme}://; use file:// or s3://"))),
        };
        Ok(Self::new(store, root, url, local))
    }

    pub fn new(store: Arc<dyn ObjectStore>, root: Path, name: &str, local: Option<Arc<Local>>) -> Self {
        Self { store, local, root, name: name.into(), traffic: Arc::default(), turns: Arc::default() }
    }

    /// Waits until nobody else in this process changes this folder.
    pub fn turn(&self, folder: &str) -> MutexGuard<'_, ()> {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(folder) as usize;
        let [first, ..] = &*self.turns;
        let turn = self.turns.get(hash % self.turns.len()).unwrap_or(first);
        turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same place with counters of its own.
    pub fn counted_apart(&self) -> Self {
        Self { traffic: Arc::default(), ..self.clone() }
    }

    /// Bytes written and read.
    pub fn traffic(&self) -> (u64, u64) {
        (self.traffic.written.load(Ordering::Relaxed), self.traffic.read.load(Ordering::Relaxed))
    }

    fn at(&self, path: &str) -> Path {
        path.split('/').fold(self.root.clone(), |at, part| at.join(part))
    }

    fn failed(&self, path: &str, cause: object_store::Error) -> ArchiveError {
        ArchiveError::Store { object: format!("{}/{path}", self.name), cause }
    }

    /// What a folder of this machine says, told as an object store would.
    fn told<T>(&self, path: &str, result: io::Result<T>) -> Result<T, ArchiveError> {
        result.map_err(|error| self.failed(path, object_store::Error::Generic { store: "file", source: error.into() }))
    }

    fn wrote(&self, bytes: usize) {
        self.traffic.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// `None` when there is no such object.
    pub fn get(&self, path: &str) -> Result<Option<Vec<u8>>, ArchiveError> {
        let Some(local) = &self.local else { return wait(self.get_async(path)) };
        let bytes = self.told(path, local.get(path))?;
        self.traffic.read.fetch_add(bytes.as_ref().map_or(0, Vec::len) as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    async fn get_async(&self, path: &str) -> Result<Option<Vec<u8>>, ArchiveError> {
        let bytes = match self.store.get(&self.at(path)).await {
            Ok(found) => found.bytes().await,
            Err(error) => Err(error),
        };
        match bytes {
            Ok(bytes) => {
                self.traffic.read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                Ok(Some(bytes.into()))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(path, error)),
        }
    }

    /// Writes an object that must not exist yet; false when it does. It is there whole or not at all.
    pub fn create(&self, path: &str, bytes: Vec<u8>) -> Result<bool, ArchiveError> {
        let size = bytes.len();
        if let Some(local) = &self.local {
            let created = self.told(path, local.create(path, &bytes))?;
            self.wrote(if created { size } else { 0 });
            return Ok(created);
        }
        let options = PutOptions::from(PutMode::Create);
        wait(async {
            match self.store.put_opts(&self.at(path), bytes.into(), options).await {
                Ok(_) => {
                    self.wrote(size);
                    Ok(true)
                }
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(false),
                Err(error) => Err(self.failed(path, error)),
            }
        })
    }

    /// The same, for a text to which empty lines at its end make no difference: they may be there.
    pub fn create_text(&self, path: &str, bytes: Vec<u8>) -> Result<bool, ArchiveError> {
        self.text(path, bytes, Local::create_text)
    }

    /// The same for somebody who waits. `settle` has to follow, behind the confirmation.
    pub fn promise_text(&self, path: &str, bytes: Vec<u8>) -> Result<bool, ArchiveError> {
        self.text(path, bytes, Local::promise_text)
    }

    fn text(
        &self,
        path: &str,
        bytes: Vec<u8>,
        create: fn(&Local, &str, &[u8]) -> io::Result<bool>,
    ) -> Result<bool, ArchiveError> {
        let Some(local) = &self.local else { return self.create(path, bytes) };
        let created = self.told(path, create(local, path, &bytes))?;
        self.wrote(if created { bytes.len() } else { 0 });
        Ok(created)
    }

    /// Makes what was promised in this folder be there by itself.
    pub fn settle(&self, folder: &str) -> Result<(), ArchiveError> {
        self.local.as_ref().map_or(Ok(()), |local| self.told(folder, local.settle(folder)))
    }

    /// Makes ready for texts that somebody will wait for. Where that fails, they are written as others are.
    pub fn provide(&self) {
        if let Some(local) = &self.local
            && let Err(error) = local.provide()
        {
            tracing::debug!(archive = %self.name, %error, "nothing can be made ready");
        }
    }

    /// Begins to write an object whose content its name fixes; `Puts` waits for it.
    pub fn begin_put(&self, path: String, bytes: Vec<u8>, puts: &mut Puts) -> Result<(), ArchiveError> {
        let objects = self.clone();
        let size = bytes.len();
        if let Some(local) = self.local.clone() {
            let put = move || objects.told(&path, local.put(&path, &bytes)).map(|()| objects.wrote(size));
            return puts.push(runtime()?.spawn_blocking(put), size);
        }
        let task = runtime()?.spawn(async move {
            let put = objects.store.put(&objects.at(&path), PutPayload::from(bytes)).await;
            put.map(|_| objects.wrote(size)).map_err(|error| objects.failed(&path, error))
        });
        puts.push(task, size)
    }

    /// Makes sure of an object that was found there: its name may be younger than what the disk has.
    pub fn assure(&self, path: &str) -> Result<(), ArchiveError> {
        self.local.as_ref().map_or(Ok(()), |local| self.told(path, local.assure(path)))
    }

    /// Begins an object that comes in parts and is there only once it was completed.
    pub fn begin_parts(&self, path: &str) -> Result<Parts, ArchiveError> {
        let upload =
            wait(async { self.store.put_multipart(&self.at(path)).await.map_err(|error| self.failed(path, error)) })?;
        Ok(Parts { upload, objects: self.clone(), path: path.to_owned() })
    }

    /// Sizes of these objects, in order; `None` where there is none.
    pub fn sizes(&self, paths: &[String]) -> Result<Vec<Option<u64>>, ArchiveError> {
        if let Some(local) = &self.local {
            return paths.iter().map(|path| self.told(path, local.size(path))).collect();
        }
        wait(async {
            let heads = paths.iter().map(|path| async move {
                match self.store.head(&self.at(path)).await {
                    Ok(meta) => Ok(Some(meta.size)),
                    Err(object_store::Error::NotFound { .. }) => Ok(None),
                    Err(error) => Err(self.failed(path, error)),
                }
            });
            futures::stream::iter(heads).buffered(CONCURRENT).try_collect().await
        })
    }

    /// Objects and folders straight below a folder; empty when there is none.
    pub fn list(&self, folder: &str) -> Result<(Vec<Listed>, Vec<String>), ArchiveError> {
        match &self.local {
            Some(local) => self.told(folder, local.list(folder)),
            None => wait(self.list_async(folder)),
        }
    }

    async fn list_async(&self, folder: &str) -> Result<(Vec<Listed>, Vec<String>), ArchiveError> {
        let found = match self.store.list_with_delimiter(Some(&self.at(folder))).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(Default::default()),
            Err(error) => return Err(self.failed(folder, error)),
        };
        let file = |path: &Path| path.filename().unwrap_or_default().to_owned();
        let objects = found.objects.iter().map(|meta| Listed {
            file: file(&meta.location),
            etag: meta.e_tag.clone().unwrap_or_else(|| meta.last_modified.to_string()),
        });
        Ok((objects.collect(), found.common_prefixes.iter().map(file).collect()))
    }

    /// Lets something be done that nobody waits for.
    pub fn behind(&self, work: impl FnOnce() + Send + 'static) -> Result<(), ArchiveError> {
        drop(runtime()?.spawn_blocking(work));
        Ok(())
    }

    /// Several of one kind of call at a time; results in order.
    pub fn many<T: Send + 'static, I: Send + 'static>(
        &self,
        inputs: Vec<I>,
        call: impl Fn(&Objects, I) -> Result<T, ArchiveError> + Clone + Send + 'static,
    ) -> Result<Vec<T>, ArchiveError> {
        if inputs.len() < 2 {
            return inputs.into_iter().map(|input| call(self, input)).collect();
        }
        let runtime = runtime()?;
        let tasks = inputs.into_iter().map(|input| {
            let (objects, call) = (self.clone(), call.clone());
            async move {
                // On a thread where blocking is allowed: `call` is written with the blocking calls above.
                let done = runtime.spawn_blocking(move || call(&objects, input)).await;
                done.map_err(|error| ArchiveError::Runtime(error.to_string()))?
            }
        });
        wait(futures::stream::iter(tasks).buffered(CONCURRENT).try_collect())
    }

    /// Deletes objects; those that are gone already count as deleted.
    pub fn delete(&self, paths: Vec<String>) -> Result<(), ArchiveError> {
        if let Some(local) = &self.local {
            return paths.iter().try_for_each(|path| self.told(path, local.delete(path)));
        }
        wait(async {
            let deletes = paths.iter().map(|path| async move {
                match self.store.delete(&self.at(path)).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                    Err(error) => Err(self.failed(path, error)),
                }
            });
            futures::stream::iter(deletes).buffered(CONCURRENT).try_collect().await
        })
    }

    /// An object's size and its bytes as a reader; `None` when there is none.
    pub fn stream(&self, path: &str) -> Result<Option<(u64, Download)>, ArchiveError> {
        wait(async {
            match self.store.get(&self.at(path)).await {
                Ok(found) => {
                    let size = found.meta.size;
                    let traffic = self.traffic.clone();
                    Ok(Some((
                        size,
                        Download {
                            stream: found.into_stream().map_ok(Vec::from).boxed(),
                            chunk: Vec::new(),
                            at: 0,
                            traffic,
                        },
                    )))
                }
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(self.failed(path, error)),
            }
        })
    }
}

/// Writes that are on their way; bounded in number and bytes.
#[derive(Default)]
pub(super) struct Puts {
    tasks: std::collections::VecDeque<(tokio::task::JoinHandle<Result<(), ArchiveError>>, usize)>,
    bytes: usize,
}

impl Puts {
    const BYTES: usize = 32 << 20;

    fn push(
        &mut self,
        task: tokio::task::JoinHandle<Result<(), ArchiveError>>,
        size: usize,
    ) -> Result<(), ArchiveError> {
        self.tasks.push_back((task, size));
        self.bytes += size;
        while self.tasks.len() > CONCURRENT || self.bytes > Self::BYTES {
            if !self.first()? {
                break;
            }
        }
        Ok(())
    }

    fn first(&mut self) -> Result<bool, ArchiveError> {
        let Some((task, size)) = self.tasks.pop_front() else { return Ok(false) };
        self.bytes -= size;
        wait(async { task.await.map_err(|error| ArchiveError::Runtime(error.to_string()))? })?;
        Ok(true)
    }

    /// Waits for all of them.
    pub fn finish(mut self) -> Result<(), ArchiveError> {
        while self.first()? {}
        Ok(())
    }
}

/// An object that is being written in parts.
pub(super) struct Parts {
    upload: Box<dyn MultipartUpload>,
    objects: Objects,
    path: String,
}

impl Parts {
    pub fn push(&mut self, bytes: Vec<u8>) -> Result<(), ArchiveError> {
        let size = bytes.len();
        let part = self.upload.put_part(bytes.into());
        wait(async { part.await.map_err(|error| self.objects.failed(&self.path, error)) })?;
        self.objects.wrote(size);
        Ok(())
    }

    /// From now on the object is there.
    pub fn complete(mut self) -> Result<(), ArchiveError> {
        wait(async {
            self.upload.complete().await.map_err(|error| self.objects.failed(&self.path, error))?;
            Ok(())
        })
    }

    /// As if it had never been begun.
    pub fn abort(mut self) -> Result<(), ArchiveError> {
        wait(async { self.upload.abort().await.map_err(|error| self.objects.failed(&self.path, error)) })
    }
}

/// Reads an object while it is being fetched.
pub(super) struct Download {
    stream: BoxStream<'static, object_store::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    at: usize,
    traffic: Arc<Traffic>,
}

impl Read for Download {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.at >= self.chunk.len() {
            let runtime = runtime().map_err(io::Error::other)?;
            match runtime.block_on(self.stream.next()) {
                None => return Ok(0),
                Some(chunk) => {
                    self.chunk = chunk.map_err(io::Error::other)?;
                    self.at = 0;
                    self.traffic.read.fetch_add(self.chunk.len() as u64, Ordering::Relaxed);
                }
            }
        }
        let count = self.chunk.get(self.at..).unwrap_or_default().read(out)?;
        self.at += count;
        Ok(count)
    }
}
