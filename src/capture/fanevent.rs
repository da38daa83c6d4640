//! What the kernel writes into a fanotify descriptor: `struct fanotify_event_metadata` and the records behind it, in
//! the byte order of the machine. Pure.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub const MODIFY: u64 = 0x2;
pub const MOVED_FROM: u64 = 0x40;
pub const MOVED_TO: u64 = 0x80;
pub const CREATE: u64 = 0x100;
pub const DELETE: u64 = 0x200;
pub const Q_OVERFLOW: u64 = 0x4000;
pub const RENAME: u64 = 0x1000_0000;
pub const ONDIR: u64 = 0x4000_0000;

/// A directory or file, by file system and handle.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Object {
    pub fsid: [u8; 8],
    pub kind: i32,
    pub handle: Box<[u8]>,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub dir: Object,
    pub name: Box<[u8]>,
}

impl Place {
    pub fn name(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.name))
    }
}

/// One event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FanEvent {
    pub mask: u64,
    /// Where it happened; of a rename, the old place.
    pub place: Option<Place>,
    /// The new place of a rename.
    pub new: Option<Place>,
    /// What it happened to.
    pub target: Option<Object>,
}

impl FanEvent {
    pub fn is(&self, bits: u64) -> bool {
        self.mask & bits != 0
    }
}

/// The kernel says something we cannot read: everything since the last event is lost.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("fanotify event at byte {offset}: {what}")]
pub struct FanFault {
    pub offset: usize,
    pub what: &'static str,
}

/// Metadata version 3, since Linux 2.6.37.
const VERSION: u8 = 3;
const METADATA_BYTES: usize = 24;

const INFO_FID: u8 = 1;
const INFO_DFID_NAME: u8 = 2;
const INFO_DFID: u8 = 3;
const INFO_OLD_DFID_NAME: u8 = 10;
const INFO_NEW_DFID_NAME: u8 = 12;

fn take<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// All events of one read.
pub fn parse(buffer: &[u8]) -> Result<Vec<FanEvent>, FanFault> {
    let mut events = Vec::new();
    let mut offset = 0;
    while let Some(rest) = buffer.get(offset..).filter(|rest| !rest.is_empty()) {
        let fault = |what| FanFault { offset, what };
        let length = take::<4>(rest, 0).map(u32::from_ne_bytes).ok_or_else(|| fault("is cut"))? as usize;
        let event = rest.get(..length).filter(|event| event.len() >= METADATA_BYTES);
        let event = event.ok_or_else(|| fault("is cut"))?;
        if event.get(4) != Some(&VERSION) {
            return Err(fault("is of an unknown version"));
        }
        let head = take::<2>(event, 6).map(u16::from_ne_bytes).ok_or_else(|| fault("is cut"))? as usize;
        let mask = take::<8>(event, 8).map(u64::from_ne_bytes).ok_or_else(|| fault("is cut"))?;
        let infos = event.get(head..).filter(|_| head >= METADATA_BYTES).ok_or_else(|| fault("is cut"))?;
        events.push(event_of(mask, infos).ok_or_else(|| fault("has a record that is cut"))?);
        offset += length;
    }
    Ok(events)
}

fn event_of(mask: u64, mut infos: &[u8]) -> Option<FanEvent> {
    let mut event = FanEvent { mask, ..FanEvent::default() };
    while !infos.is_empty() {
        let length = u16::from_ne_bytes(take(infos, 2)?) as usize;
        let info = infos.get(..length).filter(|info| info.len() >= 4)?;
        match *info.first()? {
            INFO_FID => event.target = Some(object(info)?.0),
            INFO_DFID_NAME | INFO_OLD_DFID_NAME => event.place = Some(place(info)?),
            INFO_NEW_DFID_NAME => event.new = Some(place(info)?),
            INFO_DFID => event.place = Some(Place { dir: object(info)?.0, name: Box::default() }),
            // Of a later kernel: it was not asked for.
            _ => {}
        }
        infos = infos.get(length..)?;
    }
    Some(event)
}

fn object(info: &[u8]) -> Option<(Object, &[u8])> {
    let fsid = take(info, 4)?;
    let bytes = u32::from_ne_bytes(take(info, 12)?) as usize;
    let kind = i32::from_ne_bytes(take(info, 16)?);
    let (handle, rest) = info.get(20..)?.split_at_checked(bytes)?;
    Some((Object { fsid, kind, handle: handle.into() }, rest))
}

fn place(info: &[u8]) -> Option<Place> {
    let (dir, rest) = object(info)?;
    let end = rest.iter().position(|&byte| byte == 0)?;
    Some(Place { dir, name: rest.get(..end)?.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn info(kind: u8, handle: &[u8], name: Option<&str>) -> Vec<u8> {
        let mut out = vec![0; 4];
        out.extend([7; 8]);
        out.extend((handle.len() as u32).to_ne_bytes());
        out.extend(1i32.to_ne_bytes());
        out.extend(handle);
        if let Some(name) = name {
            out.extend(name.as_bytes());
            out.push(0);
        }
        while !out.len().is_multiple_of(4) {
            out.push(0);
        }
        out[0] = kind;
        let length = out.len() as u16;
        out[2..4].copy_from_slice(&length.to_ne_bytes());
        out
    }

    fn event(mask: u64, infos: &[Vec<u8>]) -> Vec<u8> {
        let infos = infos.concat();
        let mut out = ((METADATA_BYTES + infos.len()) as u32).to_ne_bytes().to_vec();
        out.extend([VERSION, 0]);
        out.extend((METADATA_BYTES as u16).to_ne_bytes());
        out.extend(mask.to_ne_bytes());
        out.extend([0xff; 8]);
        out.extend(infos);
        out
    }

    #[test]
    fn events_with_names_targets_and_renames() {
        let bytes = [
            event(CREATE | ONDIR, &[info(INFO_DFID_NAME, b"dir1", Some("x")), info(INFO_FID, b"file", None)]),
            event(
                RENAME,
                &[info(INFO_OLD_DFID_NAME, b"dir1", Some("a.NEW")), info(INFO_NEW_DFID_NAME, b"dir2", Some("a"))],
            ),
            event(Q_OVERFLOW, &[]),
        ]
        .concat();
        let events = parse(&bytes).expect("parses");
        assert_eq!(events.len(), 3);
        assert!(events[0].is(CREATE) && events[0].is(ONDIR));
        assert_eq!(events[0].place.as_ref().map(|place| &*place.name), Some(b"x".as_slice()));
        assert_eq!(events[0].target.as_ref().map(|target| &*target.handle), Some(b"file".as_slice()));
        assert_eq!(
            events[1].new.as_ref().map(|place| (&*place.dir.handle, &*place.name)),
            Some((b"dir2".as_slice(), b"a".as_slice()))
        );
        assert!(events[2].is(Q_OVERFLOW) && events[2].place.is_none());
        for end in 1..bytes.len() {
            let _ = parse(&bytes[..end]);
        }
        assert!(parse(&bytes[..bytes.len() - 1]).is_err());
    }

    proptest! {
        #[test]
        fn nothing_the_kernel_could_say_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }
    }
}
