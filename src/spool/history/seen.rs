//! Seen databases of users, read again only when their files have changed.

use super::super::layout::Layout;
use super::super::read;
use super::lock;
use crate::cyrus::{names, seen};
use crate::model::{SeenState, StoreError, Uid, UniqueId, UserId};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

type States = Arc<BTreeMap<UniqueId, SeenState>>;

#[derive(Default)]
pub(super) struct SeenFiles(Mutex<HashMap<UserId, ([u8; 32], States)>>);

impl SeenFiles {
    pub(super) fn of(&self, layout: &Layout, user: &UserId) -> Result<States, StoreError> {
        let paths = names::user_files(&layout.configdirectory, user, "seen", layout.hashing);
        // Before the reading: what is written meanwhile makes another stamp.
        let stamp = stamp(&paths);
        if let Some((known, states)) = lock(&self.0).get(user)
            && *known == stamp
        {
            return Ok(states.clone());
        }
        let (states, _) = seen::parse(&read::read_db(&paths)?);
        let states = Arc::new(states);
        lock(&self.0).insert(user.clone(), (stamp, states.clone()));
        Ok(states)
    }
}

fn stamp(paths: &[PathBuf]) -> [u8; 32] {
    let found = paths.iter().find_map(|path| std::fs::metadata(path).ok());
    found.map_or([0; 32], |meta| read::stamp(&meta))
}

/// `1:3,7` as pairs; what makes no sense is left out.
pub(super) fn ranges(set: &[u8]) -> Vec<(u32, u32)> {
    let number = |text: &[u8]| std::str::from_utf8(text).ok().and_then(|text| text.parse::<u32>().ok());
    let part = |part: &[u8]| {
        let mut ends = part.splitn(2, |&byte| byte == b':');
        let first = number(ends.next()?)?;
        let last = ends.next().map_or(Some(first), number)?;
        Some((first.min(last), first.max(last)))
    };
    let mut out: Vec<(u32, u32)> = set.split(|&byte| byte == b',').filter_map(part).collect();
    out.sort_unstable();
    out
}

pub(super) fn contains(ranges: &[(u32, u32)], uid: Uid) -> bool {
    let after = ranges.partition_point(|(first, _)| *first <= uid.0);
    // Ranges that real servers write do not overlap; where they do, the nearest ones are looked at.
    ranges.get(..after).unwrap_or_default().iter().rev().take(8).any(|(_, last)| uid.0 <= *last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_uids() {
        let check = |set: &str, uids: &[u32]| {
            let ranges = ranges(set.as_bytes());
            let found: Vec<u32> = (0..20).filter(|uid| contains(&ranges, Uid(*uid))).collect();
            assert_eq!(found, uids, "{set}");
        };
        check("1:3,7", &[1, 2, 3, 7]);
        check("7,3:1", &[1, 2, 3, 7]);
        check("", &[]);
        check("5:4294967295", &(5..20).collect::<Vec<_>>());
        check("x,2:,:3,4", &[4]);
        check("1:9,2,12", &[1, 2, 3, 4, 5, 6, 7, 8, 9, 12]);
    }
}
