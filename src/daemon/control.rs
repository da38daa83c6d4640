//! The control socket: one JSON line asks, one JSON line answers. It stands in the state directory, which only we and
//! root can enter.

use super::report::Status;
use crate::engine::{Subject, Word};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

/// What is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    Status,
    Order {
        word: Word,
        subject: Subject,
        /// Name of one replica, or a part of it; all when absent.
        replica: Option<String>,
    },
    /// Moves a user from wherever he is to one replica.
    Move {
        user: String,
        /// Name of the replica, or a part of it.
        to: String,
    },
    /// Lifts the fuse on mass removals for some time.
    Allow {
        seconds: u64,
        replica: Option<String>,
    },
    /// A line of sync_log: what it names is looked at.
    Logged {
        line: Vec<u8>,
    },
}

/// What is answered.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Response {
    pub error: Option<String>,
    /// Failed items that are tried again.
    pub retried: Option<usize>,
    pub status: Option<Status>,
}

/// No daemon could be asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("no spooltap runs with the state directory of {}: {cause}; start it, or name its --state", path.display())]
    NotRunning { path: PathBuf, cause: io::Error },
    #[error("{}: {cause}", path.display())]
    Talk { path: PathBuf, cause: io::Error },
}

/// A question is short.
const MOST_BYTES: u64 = 64 << 10;
/// Nobody may keep a place for longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the socket of a state directory is.
pub fn socket_path(state: &Path) -> PathBuf {
    state.join("control")
}

/// Asks a running daemon.
pub fn ask(state: &Path, request: &Request) -> Result<Response, ControlError> {
    let path = socket_path(state);
    let mut stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(cause) => return Err(ControlError::NotRunning { path, cause }),
    };
    let mut talk = || {
        stream.set_read_timeout(Some(PATIENCE * 2))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new((&stream).take(64 << 20)).read_line(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    };
    talk().map_err(|cause| ControlError::Talk { path, cause })
}

/// The socket of a running daemon. It outlives a reload: who asks meanwhile waits, and is not told that nobody is there.
pub struct Door {
    path: PathBuf,
    listener: std::os::unix::net::UnixListener,
}

impl Door {
    /// A socket that a killed daemon left behind is replaced (the state's lock says that it is dead).
    fn open(path: PathBuf) -> io::Result<Self> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = std::os::unix::net::UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self { path, listener })
    }

    /// The one there is, if it is this state directory's; else a new one.
    pub(super) fn listen(door: &mut Option<Self>, state: &Path) -> io::Result<UnixListener> {
        let path = socket_path(state);
        if door.as_ref().is_none_or(|door| door.path != path) {
            *door = None;
        }
        let door = match door {
            Some(door) => door,
            None => door.insert(Self::open(path)?),
        };
        UnixListener::from_std(door.listener.try_clone()?)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One question and its answer.
pub(super) async fn talk(mut stream: tokio::net::UnixStream, answer: impl FnOnce(Request) -> Response) {
    let conversation = async {
        let mut line = Vec::new();
        let mut limited = (&mut stream).take(MOST_BYTES);
        let mut piece = [0; 4096];
        while !line.contains(&b'\n') {
            match limited.read(&mut piece).await {
                Ok(count @ 1..) => line.extend_from_slice(piece.get(..count).unwrap_or_default()),
                _ => return,
            }
        }
        let response = match serde_json::from_slice(&line) {
            Ok(request) => answer(request),
            Err(error) => Response { error: Some(format!("not understood: {error}")), ..Response::default() },
        };
        let mut out = serde_json::to_vec(&response).unwrap_or_default();
        out.push(b'\n');
        let _ = stream.write_all(&out).await;
    };
    let _ = tokio::time::timeout(PATIENCE, conversation).await;
}
