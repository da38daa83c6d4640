//! Limits of quota roots, and which mailboxes belong to which.

use super::DirError;
use super::held;
use super::store::{Store, lock};
use crate::model::{MailboxEntry, MboxName, QuotaLimits, QuotaRoot, UserId};
use std::collections::BTreeMap;

impl Store {
    pub fn limits(&self, root: &QuotaRoot) -> Option<QuotaLimits> {
        lock(&self.quotas).limits(root).cloned()
    }

    pub fn limits_of(&self, user: &UserId) -> BTreeMap<QuotaRoot, QuotaLimits> {
        let quotas = lock(&self.quotas);
        let theirs =
            quotas.iter().filter(|(root, _)| self.owner(&MboxName::new(root.as_bytes())).as_ref() == Some(user));
        theirs.map(|(root, limits)| (root.clone(), limits.clone())).collect()
    }

    pub fn quota(&self, root: &QuotaRoot, limits: &QuotaLimits) -> Result<(), DirError> {
        check_root(root)?;
        let _turn = lock(&self.quota_turn);
        lock(&self.quotas).set(&self.places, &self.disk, root, limits)?;
        // Said again after a crash the root is not new, and some mailboxes may not belong to it yet.
        self.retarget_below(root)
    }

    pub fn unquota(&self, root: &QuotaRoot) -> Result<(), DirError> {
        let _turn = lock(&self.quota_turn);
        lock(&self.quotas).remove(&self.places, &self.disk, root)?;
        // Said again after a crash the root is gone, and some mailboxes may still name it.
        self.retarget_below(root)
    }

    fn retarget_below(&self, root: &QuotaRoot) -> Result<(), DirError> {
        let text = root.as_bytes();
        let entries: Vec<MailboxEntry> = match text.strip_suffix(b"!") {
            Some(domain) => {
                let list = lock(&self.list);
                let inside = |entry: &&MailboxEntry| entry.name.domain_and_local().0 == Some(domain);
                list.rows.iter().filter(inside).cloned().collect()
            }
            None => lock(&self.list).rows.below(&MboxName::new(text)).cloned().collect(),
        };
        for entry in entries.iter().filter(|entry| !entry.mbtype.is_intermediate()) {
            let _mine = self.stripe(entry.uniqueid.as_bytes());
            // Gone or renamed meanwhile: whoever did that knows the root.
            if self.entry(&entry.name).as_ref() != Some(entry) {
                continue;
            }
            if held::quotaroot_at(&self.dir(entry)?)? != lock(&self.quotas).root_of(&entry.name) {
                self.retarget(entry, None)?;
            }
        }
        Ok(())
    }

    /// Brings name, quota root and uidvalidity in a mailbox's files in line with the list and the roots there are.
    pub(super) fn retarget(&self, entry: &MailboxEntry, uidvalidity: Option<u32>) -> Result<(), DirError> {
        let _changing = self.change(&entry.uniqueid)?;
        let Some(mut held) = self.load(entry)? else { return Ok(()) };
        let before = held.quotaroot().cloned();
        let root = lock(&self.quotas).root_of(&entry.name);
        let mut head = held.mailbox.head.clone();
        head.uidvalidity = uidvalidity.unwrap_or(head.uidvalidity);
        held.write_head(&self.disk, &head, root.clone())?;
        if before != root {
            let taken = held.taken();
            let (from, to) = (before.as_ref().map(|root| (root, taken)), root.as_ref().map(|root| (root, taken)));
            lock(&self.quotas).moved(&self.places, &self.disk, from, to)?;
        }
        Ok(())
    }
}

/// It becomes the name of a file.
fn check_root(root: &QuotaRoot) -> Result<(), DirError> {
    let bytes = root.as_bytes();
    let odd = |part: &[u8]| part.is_empty() || part == b"." || part == b"..";
    let is_odd = bytes.strip_suffix(b"!").unwrap_or(bytes).split(|&byte| byte == b'!').any(odd);
    match bytes.is_empty() || bytes.len() > 240 || bytes.iter().any(|byte| matches!(byte, b'/' | 0)) || is_odd {
        true => Err(DirError::Refused(format!("{root} can be no quota root"))),
        false => Ok(()),
    }
}
