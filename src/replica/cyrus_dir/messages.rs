//! Message files: brought under names nobody knows, checked against their GUIDs, given their own names, and then, all
//! together, put on the disk. What a mailbox here has already is linked.

use super::DirError;
use super::disk::Disk;
use super::held::{Appending, Facts, Held};
use super::promises::{Message, Messages};
use super::syncers::Pending;
use crate::archive::Change;
use crate::cyrus::date;
use crate::model::{BodyRef, BodySource, Disposition, MessageGuid, Record, StoreError, Uid};
use sha1::{Digest, Sha1};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Where messages of other mailboxes lie, by GUID.
pub(super) type Elsewhere = HashMap<MessageGuid, PathBuf>;

/// As much of a message is looked at for its header.
const MAX_HEADER: usize = 1 << 20;

const CHUNK: usize = 256 << 10;

/// More new files than this are brought to the disk together.
const FEW: usize = 4;

/// Messages under their staging names; what is not published is removed.
pub(super) struct Staged<'a> {
    disk: &'a Disk,
    /// Of the mailbox.
    dir: PathBuf,
    files: Vec<Waits>,
    /// Those that have their own names by now.
    published: Vec<PathBuf>,
    /// Those of them, and their directory, that are on their way to the disk.
    pending: Vec<(PathBuf, Pending)>,
    pub facts: HashMap<Uid, Facts>,
    /// They may be promised, all together.
    pub promisable: Option<Messages>,
    /// Bytes that came from the source.
    pub brought: u64,
}

/// One under its staging name.
struct Waits {
    uid: Uid,
    path: PathBuf,
    /// It has other names.
    linked: bool,
}

pub(super) fn message_path(dir: &Path, uid: Uid) -> PathBuf {
    dir.join(format!("{}.", uid.0))
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        self.files.iter().for_each(|file| drop(std::fs::remove_file(&file.path)));
    }
}

/// Where the messages of one change wait for their names.
pub(super) struct Waiting<'a> {
    /// Of the same file system as the mailbox.
    pub dir: &'a Path,
    /// One that nobody else has there.
    pub number: u64,
    /// Somebody waits.
    pub may_promise: bool,
}

/// Stages every message of `change` that is new in the mailbox.
pub(super) fn stage<'a>(
    disk: &'a Disk,
    waiting: &Waiting<'_>,
    held: &Held,
    change: &Change,
    bodies: &[BodyRef],
    source: &dyn BodySource,
    elsewhere: &dyn Fn() -> Result<Elsewhere, DirError>,
) -> Result<Staged<'a>, DirError> {
    let mut staged = Staged {
        disk,
        dir: held.dir().to_owned(),
        files: Vec::new(),
        published: Vec::new(),
        pending: Vec::new(),
        facts: HashMap::new(),
        promisable: waiting.may_promise.then(Messages::default),
        brought: 0,
    };
    let mut chunk = Vec::new();
    let new: Vec<&Record> =
        change.records.iter().filter(|record| !record.is_expunged() && held.record(record.uid).is_none()).collect();
    if new.is_empty() {
        return Ok(staged);
    }
    disk.make_dir_for_now(waiting.dir).map_err(|error| DirError::io(waiting.dir, error))?;
    let brought: HashMap<MessageGuid, &BodyRef> = bodies.iter().map(|body| (body.guid, body)).collect();
    let wanted: HashSet<MessageGuid> = new.iter().map(|record| record.guid).collect();
    let mut known: Elsewhere = held
        .mailbox
        .records
        .iter()
        .filter(|record| !record.is_unlinked() && wanted.contains(&record.guid))
        .map(|record| (record.guid, message_path(held.dir(), record.uid)))
        .collect();
    let mut asked = false;
    for record in new {
        let mut path = waiting.dir.join(format!("{}.{}.{}", waiting.number, record.uid.0, record.guid));
        staged.files.push(Waits { uid: record.uid, path: path.clone(), linked: true });
        // The one that a run before this has left under its own name is not trusted, only read.
        let own = message_path(held.dir(), record.uid);
        let when = SystemTime::UNIX_EPOCH + Duration::from_secs(record.internaldate.max(0).unsigned_abs());
        let mut facts = staged.link(&own, &path, record, when, &mut chunk)?;
        if facts.is_none() {
            if !known.contains_key(&record.guid) && !asked {
                asked = true;
                for (guid, path) in elsewhere()? {
                    known.entry(guid).or_insert(path);
                }
            }
            if let Some(from) = known.get(&record.guid) {
                facts = staged.link(from, &path, record, when, &mut chunk)?;
            }
        }
        if facts.is_none()
            && let Some(body) = brought.get(&record.guid)
        {
            // What is promised may have its name at once, if nobody has it: what is there may have other names too.
            if staged.promisable.as_ref().is_some_and(|all| all.has_room(body.size)) && !own.exists() {
                path = own;
            }
            if let Some(file) = staged.files.last_mut() {
                (file.path, file.linked) = (path.clone(), false);
            }
            facts = Some(staged.bring(&path, body, when, &mut chunk, source)?);
        }
        if staged.files.last().is_some_and(|file| file.linked) {
            staged.promisable = None;
        }
        let Some(facts) = facts else {
            return Err(DirError::Changed(format!("the body {} is not here", record.guid)));
        };
        known.insert(record.guid, path);
        staged.facts.insert(record.uid, facts.dated(record.internaldate));
    }
    Ok(staged)
}

impl Staged<'_> {
    /// A further name for a message that is here, if it is what it ought to be.
    fn link(
        &self,
        from: &Path,
        to: &Path,
        record: &Record,
        when: SystemTime,
        chunk: &mut Vec<u8>,
    ) -> Result<Option<Facts>, DirError> {
        if !std::fs::metadata(from).is_ok_and(|meta| meta.len() == record.size) {
            return Ok(None);
        }
        let mut checked = Checked::default();
        let mut file = File::open(from).map_err(|error| DirError::io(from, error))?;
        fit(chunk, record.size);
        loop {
            let count = file.read(chunk).map_err(|error| DirError::io(from, error))?;
            if count == 0 {
                break;
            }
            checked.add(chunk.get(..count).unwrap_or_default());
        }
        if checked.guid() != record.guid {
            return Ok(None);
        }
        self.disk.link(from, to).map_err(|error| DirError::io(to, error))?;
        File::open(to).and_then(|file| file.set_modified(when)).map_err(|error| DirError::io(to, error))?;
        Ok(Some(checked.facts()))
    }

    /// Brings a message from the source.
    fn bring(
        &mut self,
        path: &Path,
        body: &BodyRef,
        when: SystemTime,
        chunk: &mut Vec<u8>,
        source: &dyn BodySource,
    ) -> Result<Facts, DirError> {
        let wrong = |disposition, fault: String| {
            let message = format!("message file of UID {} is not what its record says: {fault}", body.uid.0);
            DirError::Body { uid: body.uid, error: StoreError::new(disposition, message) }
        };
        let reader = source.open(body).map_err(|error| DirError::Body { uid: body.uid, error })?.reader;
        // One byte too many is as wrong as one too few.
        let mut reader = reader.take(body.size.saturating_add(1));
        let file = self.disk.create(path).map_err(|error| DirError::io(path, error))?;
        let mut checked = Checked::default();
        self.promisable.take_if(|messages| !messages.has_room(body.size));
        let mut kept = self.promisable.as_ref().map(|_| Vec::new());
        fit(chunk, body.size);
        loop {
            let count = match reader.read(chunk) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(wrong(Disposition::RetrySoon, error.to_string())),
            };
            let bytes = chunk.get(..count).unwrap_or_default();
            checked.add(bytes);
            self.brought += bytes.len() as u64;
            if let Some(kept) = &mut kept {
                kept.extend_from_slice(bytes);
            }
            self.disk.write(&file, path, bytes).map_err(|error| DirError::io(path, error))?;
        }
        if checked.size != body.size {
            return Err(wrong(Disposition::Quarantine, format!("{} bytes, expected {}", checked.size, body.size)));
        }
        let guid = checked.guid();
        if guid != body.guid {
            return Err(wrong(Disposition::Quarantine, format!("SHA-1 is {guid}, expected {}", body.guid)));
        }
        file.set_modified(when).map_err(|error| DirError::io(path, error))?;
        if let Some((messages, bytes)) = self.promisable.as_mut().zip(kept) {
            let modified = when.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            messages.push(Message { uid: body.uid, modified, bytes });
        }
        Ok(checked.facts())
    }

    /// Gives every message its name in the mailbox; nothing may name them before `sync`.
    pub fn publish(&mut self) -> Result<(), DirError> {
        for Waits { uid, path, linked } in std::mem::take(&mut self.files) {
            let to = message_path(&self.dir, uid);
            if path == to {
                self.published.push(to);
                continue;
            }
            let renamed = self.disk.rename(&path, &to);
            // Two names of one file: then the rename has done nothing.
            if linked || renamed.is_err() {
                let _ = std::fs::remove_file(&path);
            }
            renamed.map_err(|error| DirError::io(&to, error))?;
            self.published.push(to);
        }
        Ok(())
    }

    /// From here on few are on their way to the disk.
    pub fn begin_sync(&mut self) -> Result<(), DirError> {
        if self.pending.is_empty() && (1..FEW).contains(&self.published.len()) {
            for path in self.published.iter().chain([&self.dir]) {
                let pending = self.disk.sync_beside(path).map_err(|error| DirError::io(path, error))?;
                self.pending.push((path.clone(), pending));
            }
        }
        Ok(())
    }

    /// Waits until they are on the disk, bytes and names, and with them the records that were appended to `index`. Few
    /// messages by themselves, beside each other; more with all else that was written: a file system that keeps a
    /// journal writes that out once, with the first file.
    pub fn sync(&mut self, index: Option<&Appending<'_>>) -> Result<(), DirError> {
        self.begin_sync()?;
        if self.published.len() >= FEW {
            return self.disk.sync_all_below(&self.dir).map_err(|error| DirError::io(&self.dir, error));
        }
        index.map_or(Ok(()), |index| index.sync(self.disk))?;
        for (path, pending) in std::mem::take(&mut self.pending) {
            pending.wait().map_err(|error| DirError::io(&path, error))?;
        }
        Ok(())
    }
}

/// As much room as a message of that size takes, within limits.
fn fit(chunk: &mut Vec<u8>, size: u64) {
    // One more, so that the end is seen at once.
    let wanted = usize::try_from(size.saturating_add(1)).unwrap_or(CHUNK).min(CHUNK);
    if chunk.len() < wanted {
        chunk.resize(wanted, 0);
    }
}

/// A message on its way through: hash, length, header.
#[derive(Default)]
struct Checked {
    sha1: Sha1,
    size: u64,
    /// Up to the empty line, or all there is room for.
    head: Vec<u8>,
    header_size: Option<usize>,
}

impl Checked {
    fn add(&mut self, bytes: &[u8]) {
        self.sha1.update(bytes);
        self.size += bytes.len() as u64;
        if self.header_size.is_some() || self.head.len() >= MAX_HEADER {
            return;
        }
        let from = self.head.len().saturating_sub(3);
        self.head.extend_from_slice(bytes);
        self.header_size = header_end(&self.head, from);
    }

    fn guid(&self) -> MessageGuid {
        MessageGuid(self.sha1.clone().finalize().into())
    }

    fn facts(self) -> Facts {
        let header_size = self.header_size.unwrap_or(usize::try_from(self.size).unwrap_or(usize::MAX));
        let head = self.head.get(..header_size.min(self.head.len())).unwrap_or_default();
        let sent = date_value(head).map(|value| date::parse(&value)).unwrap_or_default();
        let sentdate = sent.day.and_then(local_midnight).unwrap_or(0);
        Facts { header_size: u32::try_from(header_size).unwrap_or(u32::MAX), sentdate, gmtime: sent.gmtime }
    }
}

impl Facts {
    /// A message that does not say when it was sent, was sent when it came: so a server fills in the record.
    fn dated(self, internaldate: i64) -> Self {
        let gmtime = if self.gmtime == 0 { internaldate } else { self.gmtime };
        let day = || Some(local_midnight(day_of(internaldate)?)?.max(0));
        let sentdate = if self.sentdate == 0 { day().unwrap_or(0) } else { self.sentdate };
        Self { gmtime, sentdate, ..self }
    }
}

/// The day of a time, by the clock of this machine.
fn day_of(seconds: i64) -> Option<(i32, u32, u32)> {
    use chrono::{Datelike, TimeZone};
    let time = chrono::Local.timestamp_opt(seconds, 0).single()?;
    Some((time.year(), time.month(), time.day()))
}

/// Where the body begins; `from` is where to look first.
fn header_end(head: &[u8], from: usize) -> Option<usize> {
    // A message without a header begins with the empty line.
    if head.starts_with(b"\r\n") {
        return Some(2);
    }
    let rest = head.get(from..)?;
    rest.windows(4).position(|four| four == b"\r\n\r\n").map(|at| from + at + 4)
}

/// The first Date header, unfolded.
fn date_value(head: &[u8]) -> Option<Vec<u8>> {
    let mut lines = head.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let first = lines.find_map(|line| {
        let (name, value) = line.split_at_checked(5)?;
        name.eq_ignore_ascii_case(b"date:").then_some(value)
    })?;
    let mut value = first.to_vec();
    for line in lines.take_while(|line| matches!(line.first(), Some(b' ' | b'\t'))) {
        value.extend_from_slice(line);
    }
    Some(value)
}

/// Cyrus keeps the day by the clock of the machine it runs on.
fn local_midnight((year, month, day): (i32, u32, u32)) -> Option<i64> {
    use chrono::TimeZone;
    let midnight = chrono::NaiveDate::from_ymd_opt(year, month, day)?.and_hms_opt(0, 0, 0)?;
    Some(chrono::Local.from_local_datetime(&midnight).earliest()?.timestamp()).filter(|seconds| *seconds >= 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_end_where_the_body_begins_however_the_pieces_come() {
        let text = b"From: a\r\nDate: Mon, 7 Feb 1994\r\n 21:52:25 -0800 (PST)\r\nX: y\r\n\r\nbody\r\n\r\nmore";
        for size in 1..text.len() {
            let mut checked = Checked::default();
            text.chunks(size).for_each(|piece| checked.add(piece));
            let facts = checked.facts();
            assert_eq!((facts.header_size, facts.gmtime), (63, 760_686_745), "pieces of {size}");
        }
        assert_eq!(text.get(63..67), Some(&b"body"[..]));
    }
}
