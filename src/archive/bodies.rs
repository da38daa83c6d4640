//! Message bodies and Sieve scripts: objects named by the SHA-1 of their content, written once, never changed.

use super::ArchiveError;
use super::objects::{Objects, Puts};
use crate::model::{BodyRef, BodySource, Disposition, MessageGuid, StoreError, Uid};
use sha1::{Digest, Sha1};
use std::collections::HashSet;
use std::io::Read;

/// Larger bodies travel in parts of this size, so that memory is bounded.
const PART: usize = 8 << 20;

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
    let wrong = |fault: String| {
        let message = format!("message file of UID {} is not what its record says: {fault}", body.uid.0);
        PutError::Body { uid: body.uid, error: StoreError::new(Disposition::Quarantine, message) }
    };
    let mut reader = source.open(body).map_err(|error| PutError::Body { uid: body.uid, error })?.reader;
    let mut parts = None;
    let (mut size, mut sha1) = (0, Sha1::new());
    loop {
        let mut part = Vec::with_capacity(body.size.min(PART as u64) as usize);
        if let Err(error) = reader.by_ref().take(PART as u64).read_to_end(&mut part) {
            let message = format!("message file of UID {} cannot be read: {error}", body.uid.0);
            let error = StoreError::new(Disposition::RetrySoon, message);
            return Err(PutError::Body { uid: body.uid, error });
        }
        size += part.len() as u64;
        sha1.update(&part);
        let last = part.len() < PART || size >= body.size;
        if last {
            let mut more = [0];
            // One byte too many is as wrong as one too few.
            size += reader.read(&mut more).unwrap_or(0) as u64;
            let guid = MessageGuid(sha1.clone().finalize().into());
            let fault = if size != body.size {
                Some(format!("{size} bytes, expected {}", body.size))
            } else if guid != body.guid {
                Some(format!("SHA-1 is {guid}, expected {}", body.guid))
            } else {
                None
            };
            return match (parts, fault) {
                (None, None) => Ok(objects.begin_put(body_path(&body.guid), part, puts)?),
                (Some(parts), None) => finish(parts, part),
                (parts, Some(fault)) => {
                    if let Some(parts) = parts {
                        super::objects::Parts::abort(parts)?;
                    }
                    Err(wrong(fault))
                }
            };
        }
        let upload = match &mut parts {
            Some(parts) => parts,
            none => none.insert(objects.begin_parts(&body_path(&body.guid))?),
        };
        upload.push(part)?;
    }
}

fn finish(mut parts: super::objects::Parts, last: Vec<u8>) -> Result<(), PutError> {
    parts.push(last)?;
    Ok(parts.complete()?)
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
