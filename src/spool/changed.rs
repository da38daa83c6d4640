//! When the files behind a key were changed last, as the file system says: a question about the disk, not about contents.

use super::layout::{Layout, MetaFile};
use super::users;
use crate::cyrus::names;
use crate::model::{DirtyKey, MailboxEntry, MailboxRef, MboxName, UserPart, UserRef};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The latest change of any file of a key that names its object; `None` where there is none. `find` looks a mailbox up.
pub(super) fn changed_at(
    layout: &Layout,
    key: &DirtyKey,
    find: &dyn Fn(&MboxName) -> Option<MailboxEntry>,
) -> Option<SystemTime> {
    match key {
        DirtyKey::MailboxList => changed(&layout.mailboxes_db),
        DirtyKey::Annotations => changed(&layout.annotations_db),
        DirtyKey::Mailbox(MailboxRef::Name(name)) => {
            let entry = find(name)?;
            let files =
                [MetaFile::Index, MetaFile::Header].into_iter().flat_map(|file| layout.meta_files(&entry, file));
            files.filter_map(|path| changed(&path)).max()
        }
        DirtyKey::User(UserRef::Name(user), part) => {
            let places = users::places(layout, user, find(&user.inbox()).as_ref());
            let paths = match part {
                UserPart::Subs => places.subs,
                UserPart::Seen => places.seen,
                UserPart::Sieve => {
                    let files =
                        places.sieve.iter().flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten());
                    let mut paths: Vec<_> = files.map(|file| file.path()).collect();
                    paths.extend(places.sieve);
                    paths
                }
            };
            paths.iter().filter_map(|path| changed(path)).max()
        }
        DirtyKey::Quota(root) => match &layout.quotas_db {
            Some(db) => changed(db),
            None => changed(&names::quota_file(&layout.configdirectory, root, layout.hashing)),
        },
        DirtyKey::AllQuotas => layout.quotas_db.as_deref().and_then(changed),
        _ => None,
    }
}

fn changed(path: &Path) -> Option<SystemTime> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    let (seconds, nanoseconds) = (u64::try_from(meta.ctime()).ok()?, u32::try_from(meta.ctime_nsec()).ok()?);
    UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds))
}
