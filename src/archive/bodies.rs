//! Message bodies and Sieve scripts: objects named by the SHA-1 of their content, written once, never changed.

use super::ArchiveError;
use super::objects::{Objects, Puts};
use super::shapes::StoredBody;
use crate::model::{BodyRef, BodySource, Disposition, MessageGuid, StoreError, Uid};
use sha1::{Digest, Sha1};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::io::Read;

/// Larger bodies travel in parts of this size, so that memory is bounded.
const PART: usize = 8 << 20;

/// So many bodies, and so many bytes of them, may travel with their records.
const CARRIED: usize = 16;
const CARRIED_BYTES: u64 = 64 << 10;

/// Bodies that travel with their records.
pub(super) type Carried = BTreeMap<MessageGuid, StoredBody>;

/// Why bodies could not be put.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// A body is not what its record says, or cannot be read; nothing of it was kept.
    #[error("{error}")]
    Body { uid: Uid, error: StoreError },
    #[error("{0}")]
    Archive(#[from] ArchiveError),
}

pub(super) fn body_path(guid: &MessageGuid) -> String {
    let hex = guid.to_string();
    format!("bodies/{}/{hex}.eml", hex.get(..2).unwrap_or_default())
}

fn script_path(guid: &MessageGuid) -> String {
    let hex = guid.to_string();
    format!("scripts/{}/{hex}.sieve", hex.get(..2).unwrap_or_default())
}

/// Which of these are not there in the right size.
pub(super) fn missing(
    objects: &Objects,
    bodies: impl Iterator<Item = (MessageGuid, u64)>,
) -> Result<HashSet<MessageGuid>, ArchiveError> {
    let bodies: Vec<_> = bodies.collect();
    let paths: Vec<String> = bodies.iter().map(|(guid, _)| body_path(guid)).collect();
    let sizes = objects.sizes(&paths)?;
    let missing = bodies.iter().zip(sizes).filter(|((_, size), found)| *found != Some(*size));
    Ok(missing.map(|((guid, _), _)| *guid).collect())
}

/// Puts the bodies that are not there yet. Each is read and hashed before it gets its name.
pub(super) fn put(objects: &Objects, bodies: &[BodyRef], source: &dyn BodySource) -> Result<(), PutError> {
    let mut missing = missing(objects, bodies.iter().map(|body| (body.guid, body.size)))?;
    let mut puts = Puts::default();
    for body in bodies {
        if missing.remove(&body.guid) {
            put_one(objects, body, source, &mut puts)?;
        }
    }
    Ok(puts.finish()?)
}

fn put_one(objects: &Objects, body: &BodyRef, source: &dyn BodySource, puts: &mut Puts) -> Result<(), PutError> {
    let mut reader = open(body, source)?;
    if body.size < PART as u64 {
        return Ok(objects.begin_put(body_path(&body.guid), whole(body, &mut reader)?, puts)?);
    }
    let mut parts = objects.begin_parts(&body_path(&body.guid))?;
    let (mut size, mut sha1) = (0, Sha1::new());
    loop {
        let part = read(body, &mut reader, PART)?;
        size += part.len() as u64;
        sha1.update(&part);
        let last = part.len() < PART || size >= body.size;
        if !last {
            parts.push(part)?;
            continue;
        }
        // One byte too many is as wrong as one too few.
        size += read(body, &mut reader, 1)?.len() as u64;
        if let Err(error) = check(body, size, sha1) {
            parts.abort()?;
            return Err(error);
        }
        parts.push(part)?;
        return Ok(parts.complete()?);
    }
}

fn open(body: &BodyRef, source: &dyn BodySource) -> Result<Box<dyn Read + Send>, PutError> {
    Ok(source.open(body).map_err(|error| PutError::Body { uid: body.uid, error })?.reader)
}

fn read(body: &BodyRef, reader: &mut dyn Read, most: usize) -> Result<Vec<u8>, PutError> {
    let mut bytes = Vec::with_capacity(usize::try_from(body.size).unwrap_or(usize::MAX).min(most));
    reader.take(most as u64).read_to_end(&mut bytes).map_err(|error| {
        let message = format!("message file of UID {} cannot be read: {error}", body.uid.0);
        PutError::Body { uid: body.uid, error: StoreError::new(Disposition::RetrySoon, message) }
    })?;
    Ok(bytes)
}

/// All of a body that is not large.
fn whole(body: &BodyRef, reader: &mut dyn Read) -> Result<Vec<u8>, PutError> {
    let mut bytes = read(body, reader, PART)?;
    bytes.extend(read(body, reader, 1)?);
    check(body, bytes.len() as u64, Sha1::new_with_prefix(&bytes))?;
    Ok(bytes)
}

fn check(body: &BodyRef, size: u64, sha1: Sha1) -> Result<(), PutError> {
    let guid = MessageGuid(sha1.finalize().into());
    let fault = if size != body.size {
        format!("{size} bytes, expected {}", body.size)
    } else if guid != body.guid {
        format!("SHA-1 is {guid}, expected {}", body.guid)
    } else {
        return Ok(());
    };
    let message = format!("message file of UID {} is not what its record says: {fault}", body.uid.0);
    Err(PutError::Body { uid: body.uid, error: StoreError::new(Disposition::Quarantine, message) })
}

/// Whether they may travel with their records at first.
pub(super) fn are_light(bodies: &[BodyRef]) -> bool {
    let sizes = bodies.iter().try_fold(0_u64, |sum, body| sum.checked_add(body.size));
    !bodies.is_empty() && bodies.len() <= CARRIED && sizes.is_some_and(|sum| sum <= CARRIED_BYTES)
}

/// Those that are not there yet, read and hashed.
pub(super) fn carried(objects: &Objects, bodies: &[BodyRef], source: &dyn BodySource) -> Result<Carried, PutError> {
    let missing = missing(objects, bodies.iter().map(|body| (body.guid, body.size)))?;
    let mut carried = Carried::new();
    for body in bodies.iter().filter(|body| missing.contains(&body.guid)) {
        if let Entry::Vacant(place) = carried.entry(body.guid) {
            place.insert(StoredBody(whole(body, &mut open(body, source)?)?));
        }
    }
    Ok(carried)
}

/// Makes objects of their own of them. Those that seem to be there may be what somebody has left who died over it.
pub(super) fn lay_down(objects: &Objects, carried: Carried) -> Result<(), ArchiveError> {
    let missing = missing(objects, carried.iter().map(|(guid, body)| (*guid, body.0.len() as u64)))?;
    let mut puts = Puts::default();
    for (guid, body) in carried {
        match missing.contains(&guid) {
            true => objects.begin_put(body_path(&guid), body.0, &mut puts)?,
            false => objects.assure(&body_path(&guid))?,
        }
    }
    puts.finish()
}

/// Puts the text of a script and returns its name.
pub(super) fn put_script(objects: &Objects, text: &[u8]) -> Result<MessageGuid, ArchiveError> {
    let guid = MessageGuid(Sha1::digest(text).into());
    objects.create(&script_path(&guid), text.to_vec())?;
    Ok(guid)
}

/// The text of a script.
pub(super) fn script(objects: &Objects, guid: &MessageGuid) -> Result<Vec<u8>, ArchiveError> {
    let path = script_path(guid);
    let text = objects.get(&path)?;
    text.ok_or_else(|| ArchiveError::Format { object: format!("{}/{path}", objects.name), fault: "is missing".into() })
}
