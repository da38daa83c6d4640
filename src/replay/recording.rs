//! The files of a recording, from a folder or from bytes compiled into the program.

use super::ReplayError;
use flate2::read::GzDecoder;
use serde_json::Value;
use std::borrow::Cow;
use std::fs;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

type Bytes = Arc<Cow<'static, [u8]>>;

/// A store at rest, the operations a server made on it, and what IMAP showed after each step.
#[derive(Clone)]
pub struct Recording {
    base: Bytes,
    ops: Bytes,
    truth: Bytes,
    info: Value,
}

/// The lines of one gzip file.
pub(super) type Lines = std::io::Lines<BufReader<Box<dyn Read + Send>>>;

impl Recording {
    /// Reads the folder of one recording.
    pub fn open(dir: &Path) -> Result<Self, ReplayError> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read(&path).map_err(|cause| ReplayError::File { path, cause })
        };
        Self::from_parts(
            read("base.tar.gz")?.into(),
            read("ops.jsonl.gz")?.into(),
            read("truth.jsonl.gz")?.into(),
            &read("info.json")?,
        )
    }

    /// A recording that is compiled into the program: the bytes of `base.tar.gz`, `ops.jsonl.gz`, `truth.jsonl.gz`
    /// and `info.json`.
    pub fn from_parts(
        base: Cow<'static, [u8]>,
        ops: Cow<'static, [u8]>,
        truth: Cow<'static, [u8]>,
        info: &[u8],
    ) -> Result<Self, ReplayError> {
        let info = serde_json::from_slice(info).map_err(|error| format_error("info.json", error))?;
        Ok(Self { base: Arc::new(base), ops: Arc::new(ops), truth: Arc::new(truth), info })
    }

    /// Cyrus release the server had, `2.5.11`.
    pub fn version(&self) -> &str {
        self.info.get("version").and_then(Value::as_str).unwrap_or_default()
    }

    /// Number of lines in the operations.
    pub fn ops(&self) -> u64 {
        self.info.get("ops").and_then(Value::as_u64).unwrap_or_default()
    }

    /// Step of the last mark.
    pub fn last_mark(&self) -> u64 {
        self.info.get("last_mark").and_then(Value::as_u64).unwrap_or_default()
    }

    /// Unpacks the store below `root`, which is created, and returns the path of its imapd.conf, which names `root`.
    pub fn unpack(&self, root: &Path) -> Result<PathBuf, ReplayError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |cause| ReplayError::File { path, cause }
        };
        fs::create_dir_all(root).map_err(failed(root))?;
        let root = fs::canonicalize(root).map_err(failed(root))?;
        let mut archive = tar::Archive::new(GzDecoder::new(Cursor::new(self.base.as_ref().as_ref())));
        archive.set_preserve_permissions(true);
        archive.set_preserve_mtime(true);
        archive.set_preserve_ownerships(false);
        archive.unpack(&root).map_err(failed(&root))?;
        let conf = root.join("imapd.conf");
        let text = fs::read_to_string(&conf).map_err(failed(&conf))?;
        // Modes in the archive may forbid writing to the file that stands there.
        fs::remove_file(&conf).map_err(failed(&conf))?;
        fs::write(&conf, text.replace("@BASE@", &root.to_string_lossy())).map_err(failed(&conf))?;
        Ok(conf)
    }

    pub(super) fn op_lines(&self) -> Lines {
        lines(&self.ops)
    }

    /// What IMAP showed at each mark, in order: the step and its state.
    pub fn truths(&self) -> impl Iterator<Item = Result<(u64, Value), ReplayError>> + Send + use<> {
        lines(&self.truth).map(|line| {
            let line = line.map_err(|error| format_error("truth", error))?;
            let mut line: Value = serde_json::from_str(&line).map_err(|error| format_error("truth", error))?;
            let step = line.get("step").and_then(Value::as_u64);
            match (step, line.get_mut("state")) {
                (Some(step), Some(state)) => Ok((step, state.take())),
                _ => Err(format_error("truth", "a line has no step or no state")),
            }
        })
    }
}

fn lines(bytes: &Bytes) -> Lines {
    let reader: Box<dyn Read + Send> = Box::new(GzDecoder::new(Cursor::new(Shared(bytes.clone()))));
    BufReader::new(reader).lines()
}

/// Lets a cursor own its share of the bytes.
struct Shared(Bytes);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref()
    }
}

pub(super) fn format_error(part: &'static str, fault: impl ToString) -> ReplayError {
    ReplayError::Format { part, fault: fault.to_string() }
}

/// A recorded path below the store; one that leads out of it is refused.
pub(super) fn inside(root: &Path, path: &str) -> Result<PathBuf, std::io::Error> {
    let path = Path::new(path);
    if path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        Ok(root.join(path))
    } else {
        Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "path leads out of the store"))
    }
}
