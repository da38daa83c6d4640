//! Bodies between `MESSAGE` and the `MAILBOX` that needs them. Small ones stay in memory, the others in one file
//! without a name, which is gone with its connection, however that ends.

use crate::csync::intake::Files;
use crate::model::{Body, BodyRef, BodySource, Disposition, MessageGuid, StoreError};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Larger bodies go to the file.
const SMALL: u64 = 256 << 10;

/// More than this of one connection goes to the file too.
const IN_MEMORY: usize = 16 << 20;

/// What a body takes in the table beside its bytes.
const EACH: usize = 160;

enum Staged {
    Memory(Arc<[u8]>),
    File { at: u64, size: u64 },
}

enum Coming {
    Memory(Vec<u8>),
    File {
        at: u64,
    },
    /// Why it is not kept.
    Lost,
}

/// The bodies of one connection.
pub(super) struct Stage {
    dir: PathBuf,
    limit: u64,
    bodies: HashMap<MessageGuid, Staged>,
    memory: usize,
    file: Option<Arc<File>>,
    file_bytes: u64,
    coming: Option<(MessageGuid, u64, u64, Coming)>,
    fault: Option<String>,
}

impl Stage {
    pub fn new(dir: PathBuf, limit: u64) -> Self {
        Self { dir, limit, bodies: HashMap::new(), memory: 0, file: None, file_bytes: 0, coming: None, fault: None }
    }

    /// Bytes in memory: what is known of each body counts as well, for there may be millions without a single byte.
    pub fn held(&self) -> usize {
        let coming = match &self.coming {
            Some((_, _, _, Coming::Memory(buffer))) => buffer.capacity(),
            _ => 0,
        };
        self.memory.saturating_add(coming).saturating_add(self.bodies.len().saturating_mul(EACH))
    }

    pub fn has(&self, guid: &MessageGuid) -> bool {
        self.bodies.contains_key(guid)
    }

    /// Why a file of the last request was not kept.
    pub fn take_fault(&mut self) -> Option<String> {
        self.fault.take()
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Self::new(std::mem::take(&mut self.dir), self.limit);
    }

    fn open(&mut self) -> io::Result<Arc<File>> {
        if let Some(file) = &self.file {
            return Ok(file.clone());
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.join(format!(".spooltap-stage-{}-{number}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        let file = Arc::new(file);
        self.file = Some(file.clone());
        Ok(file)
    }

    fn append(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.open()?.write_all_at(bytes, at)
    }
}

impl Files for Stage {
    fn begin(&mut self, guid: MessageGuid, size: u64) {
        let coming = if self.file_bytes.saturating_add(self.memory as u64).saturating_add(size) > self.limit {
            self.fault = Some(format!("more than {} bytes are staged", self.limit));
            Coming::Lost
        } else if size <= SMALL && self.memory + (size as usize) <= IN_MEMORY {
            Coming::Memory(Vec::with_capacity(size as usize))
        } else {
            Coming::File { at: self.file_bytes }
        };
        self.coming = Some((guid, size, 0, coming));
    }

    fn data(&mut self, bytes: &[u8]) {
        let Some((guid, size, done, mut coming)) = self.coming.take() else { return };
        match &mut coming {
            Coming::Memory(buffer) => buffer.extend_from_slice(bytes),
            Coming::File { at } => {
                if let Err(error) = self.append(*at + done, bytes) {
                    self.fault = Some(format!("{}: {error}", self.dir.display()));
                    coming = Coming::Lost;
                }
            }
            Coming::Lost => {}
        }
        self.coming = Some((guid, size, done + bytes.len() as u64, coming));
    }

    fn end(&mut self) {
        let Some((guid, size, _, coming)) = self.coming.take() else { return };
        let staged = match coming {
            Coming::Memory(buffer) => {
                self.memory += buffer.len();
                Staged::Memory(buffer.into())
            }
            Coming::File { at } => {
                self.file_bytes = at + size;
                Staged::File { at, size }
            }
            Coming::Lost => return,
        };
        if let Some(Staged::Memory(old)) = self.bodies.insert(guid, staged) {
            self.memory -= old.len();
        }
    }
}

impl BodySource for Stage {
    fn open(&self, body: &BodyRef) -> Result<Body, StoreError> {
        let missing = || StoreError::new(Disposition::RetrySoon, format!("the body {} was not sent", body.guid));
        Ok(match self.bodies.get(&body.guid).ok_or_else(missing)? {
            Staged::Memory(bytes) => {
                Body { size: bytes.len() as u64, reader: Box::new(io::Cursor::new(bytes.clone())) }
            }
            Staged::File { at, size } => {
                let file = self.file.clone().ok_or_else(missing)?;
                Body { size: *size, reader: Box::new(Part { file, at: *at, end: at + size }) }
            }
        })
    }
}

/// A stretch of the file.
struct Part {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Part {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(out.len());
        let count = self.file.read_at(out.get_mut(..most).unwrap_or_default(), self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(stage: &mut Stage, number: u8, bytes: &[u8]) -> MessageGuid {
        let guid = MessageGuid([number; 20]);
        stage.begin(guid, bytes.len() as u64);
        bytes.chunks(1000).for_each(|part| stage.data(part));
        stage.end();
        guid
    }

    fn get(stage: &Stage, guid: MessageGuid) -> Vec<u8> {
        let mut out = Vec::new();
        let body = BodyRef { uid: Default::default(), guid, size: 0, copied: false };
        BodySource::open(stage, &body).expect("is staged").reader.read_to_end(&mut out).expect("reads");
        out
    }

    #[test]
    fn large_and_small_come_back() {
        let dir = tempfile::tempdir().expect("directory");
        let mut stage = Stage::new(dir.path().into(), 1 << 30);
        let large: Vec<u8> = (0..600_000_u32).map(|n| n as u8).collect();
        let one = put(&mut stage, 1, &large);
        let two = put(&mut stage, 2, b"small");
        let three = put(&mut stage, 3, &large[1..]);
        let empty = put(&mut stage, 4, b"");
        assert_eq!((get(&stage, one), get(&stage, three)), (large.clone(), large[1..].to_vec()));
        assert_eq!((get(&stage, two), get(&stage, empty)), (b"small".to_vec(), Vec::new()));
        assert_eq!(put(&mut stage, 2, b"again"), two);
        assert_eq!((get(&stage, two), stage.held()), (b"again".to_vec(), 5 + 4 * EACH));
        assert_eq!(std::fs::read_dir(dir.path()).expect("lists").count(), 0);
        stage.clear();
        assert!(!stage.has(&one) && stage.held() == 0);
    }

    #[test]
    fn what_is_too_much_is_not_kept_and_said() {
        let dir = tempfile::tempdir().expect("directory");
        let mut stage = Stage::new(dir.path().into(), 10);
        let one = put(&mut stage, 1, b"0123456789");
        let two = put(&mut stage, 2, b"x");
        assert!(stage.has(&one) && !stage.has(&two));
        assert!(stage.take_fault().expect("a fault").contains("10"));
        let mut nowhere = Stage::new("/nonexistent".into(), 1 << 30);
        put(&mut nowhere, 1, &[0; 300_000]);
        assert!(nowhere.take_fault().expect("a fault").contains("nonexistent"));
    }
}
