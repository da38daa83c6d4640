//! One line of `ops.jsonl.gz`.

use serde::Deserialize;

/// A line: when (milliseconds since the recording began), by which process, and what.
#[derive(Debug, Deserialize)]
pub(super) struct Line {
    pub n: u64,
    pub t: u64,
    #[serde(default)]
    pub pid: u64,
    #[serde(flatten)]
    pub op: Op,
}

/// The three step lines and the file operations. Paths are relative to the store; `h` names an open file.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(super) enum Op {
    Begin { step: u64, what: String },
    Done { step: u64, what: String, result: String },
    Mark { step: u64, what: String, truth: u64 },
    Open { h: u64, path: String, flags: Vec<String>, mode: Option<String> },
    Pwrite { h: u64, off: u64, data: Option<String>, zeros: Option<u64> },
    Ftruncate { h: u64, size: u64 },
    Fsync { h: Option<u64>, path: Option<String> },
    Fdatasync { h: Option<u64>, path: Option<String> },
    Close { h: u64 },
    Lock { h: u64, r#type: LockType, start: i64, len: i64 },
    Unlock { h: u64, start: i64, len: i64 },
    Rename { path: String, to: String },
    Link { path: String, to: String },
    Symlink { target: String, path: String },
    Unlink { path: String },
    Rmdir { path: String },
    Mkdir { path: String, mode: String },
    Chmod { path: String, mode: String },
    Fchmod { h: u64, mode: String },
    Truncate { path: String, size: u64 },
    Utimens { path: String, atime_ns: Option<i64>, mtime_ns: Option<i64> },
    Futimens { h: u64, atime_ns: Option<i64>, mtime_ns: Option<i64> },
    Fallocate { h: u64, off: i64, len: i64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LockType {
    R,
    W,
}

impl Op {
    /// The word in the recording and the path or handle, for messages.
    pub fn describe(&self) -> String {
        let h = |word: &str, h: &u64| format!("{word} h={h}");
        let path = |word: &str, path: &str| format!("{word} {path}");
        match self {
            Self::Begin { step, .. } => format!("begin {step}"),
            Self::Done { step, .. } => format!("done {step}"),
            Self::Mark { step, .. } => format!("mark {step}"),
            Self::Open { path: at, .. } => path("open", at),
            Self::Pwrite { h: at, .. } => h("pwrite", at),
            Self::Ftruncate { h: at, .. } => h("ftruncate", at),
            Self::Fsync { h: at, path: dir } | Self::Fdatasync { h: at, path: dir } => match (at, dir) {
                (Some(at), _) => h("fsync", at),
                (None, dir) => path("fsync", dir.as_deref().unwrap_or_default()),
            },
            Self::Close { h: at } => h("close", at),
            Self::Lock { h: at, .. } => h("lock", at),
            Self::Unlock { h: at, .. } => h("unlock", at),
            Self::Rename { path: from, to } => format!("rename {from} to {to}"),
            Self::Link { path: from, to } => format!("link {from} to {to}"),
            Self::Symlink { path: at, .. } => path("symlink", at),
            Self::Unlink { path: at } => path("unlink", at),
            Self::Rmdir { path: at } => path("rmdir", at),
            Self::Mkdir { path: at, .. } => path("mkdir", at),
            Self::Chmod { path: at, .. } => path("chmod", at),
            Self::Fchmod { h: at, .. } => h("fchmod", at),
            Self::Truncate { path: at, .. } => path("truncate", at),
            Self::Utimens { path: at, .. } => path("utimens", at),
            Self::Futimens { h: at, .. } => h("futimens", at),
            Self::Fallocate { h: at, .. } => h("fallocate", at),
        }
    }
}
