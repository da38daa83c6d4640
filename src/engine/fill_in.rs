//! Folders that a replica makes by itself: told of `user.a.x.y` while it has no `user.a.x`, a 3.6 makes an empty one of
//! its own, under a uniqueid that the source never had. It goes when that for which it was made is gone from there.

use super::push::{JobError, Pusher};
use crate::model::{MboxName, Step, Uid};

impl Pusher<'_> {
    /// A mailbox was new there: what the replica has made above it is known from here on.
    pub(super) fn look_above(&mut self, name: &MboxName) -> Result<(), JobError> {
        if self.shared.dry_run {
            return Ok(());
        }
        let mut unknown: Vec<MboxName> = above(name).collect();
        unknown.retain(|name| self.shared.names().id(name).is_none());
        if unknown.is_empty() {
            return Ok(());
        }
        for view in self.session.view_mailboxes(&unknown)? {
            let id = view.head.uniqueid.clone();
            match self.source.by_id(&id).is_some() || self.shared.state.is_ours(&id) {
                true => self.put_view(&id, view, None),
                false => self.shared.names().set_stray(&id, &view.head.name, view.head.last_uid),
            }
        }
        Ok(())
    }

    /// A mailbox has left this name there: folders above it that are none of ours, never held mail and have nothing below
    /// them any more, on either side, go as well.
    pub(super) fn clear_above(&mut self, name: &MboxName) -> Result<(), JobError> {
        if self.shared.dry_run {
            return Ok(());
        }
        // An earlier life may have known them; none is looked for where the source has all of them.
        let is_unknown =
            |name: MboxName| self.source.by_name(&name).is_none() && self.shared.names().id(&name).is_none();
        if above(name).any(is_unknown) {
            self.look_above(name)?;
        }
        for above in above(name) {
            let Some(id) = self.shared.names().id(&above).cloned() else { continue };
            let stray = self.shared.names().stray(&id) == Some(Uid(0));
            if !stray || self.source.by_name(&above).is_some() || self.has_below(&above) {
                break;
            }
            let view = self.session.view_mailboxes(std::slice::from_ref(&above))?.pop();
            match view {
                Some(view) if view.head.uniqueid == id && view.head.last_uid == Uid(0) => {
                    self.apply(&Step::Remove { uniqueid: id.clone(), name: above.clone() })?;
                    self.forget(&id);
                }
                Some(view) if view.head.uniqueid == id => {
                    self.shared.names().set_stray(&id, &above, view.head.last_uid);
                    break;
                }
                _ => self.forget(&id),
            }
        }
        Ok(())
    }

    fn has_below(&self, name: &MboxName) -> bool {
        let below = [name.as_bytes(), b"."].concat();
        let lane = super::queue::Lane::of(name, self.store().deleted_prefix());
        let is_below = |name: &MboxName| name.as_bytes().starts_with(&below);
        self.source.beginning_with(MboxName::new(&below)).next().is_some()
            || self.shared.names().in_lane(&lane).iter().any(is_below)
    }
}

/// What lies between a user's mailbox and the INBOX, the nearest first. Nothing is made above other mailboxes.
fn above(name: &MboxName) -> impl Iterator<Item = MboxName> {
    let first = name.owner().and_then(|_| name.parent());
    std::iter::successors(first, MboxName::parent).take_while(|name| name.owner().is_some() && !name.is_inbox())
}
