//! What belongs to a user or to the server rather than to a mailbox: quota limits, subscriptions, seen state, Sieve
//! scripts, server annotations.

use super::push::{JobError, Pusher};
use super::queue::{Item, Lane};
use super::{diff, loss, scripts};
use crate::model::{
    AccountView, Capabilities, MailboxEntry, MailboxHead, MboxName, QuotaRoot, Replica, ReplicaError, SeenState, Step,
    UniqueId, UserId, UserPart,
};
use crate::state::UserReceipt;
use std::collections::{BTreeSet, HashSet};
use std::time::Instant;

/// What the replica has of a user, those of these names included that it does not list by itself.
pub(super) fn view_user(
    session: &mut dyn Replica,
    caps: &Capabilities,
    user: &UserId,
    names: impl FnOnce() -> BTreeSet<MboxName>,
) -> Result<AccountView, ReplicaError> {
    let mut view = session.view_user(user)?;
    if caps.lists_all {
        return Ok(view);
    }
    let listed: HashSet<&MboxName> = view.mailboxes.iter().map(|view| &view.head.name).collect();
    let others: Vec<MboxName> = names().into_iter().filter(|name| !listed.contains(name)).collect();
    view.mailboxes.extend(session.view_mailboxes(&others)?);
    Ok(view)
}

/// What server annotations are called where they are refused.
pub(super) const SERVER: &str = "the server";

impl Pusher<'_> {
    pub(super) fn quota(&mut self, root: &QuotaRoot, seen_at: Instant) -> Result<(), JobError> {
        let mine = self.store().quota(root)?;
        if let Some(limits) = &mine {
            self.shared.loses(&format_args!("quota root {root}"), loss::of_quota(limits, &self.caps))?;
        }
        let mine = mine.map(|limits| loss::reduced(&limits, &self.caps));
        let theirs = match self.shared.state.quota(root) {
            Some(limits) => Some(limits),
            None => self.session.view_quota(root)?,
        };
        if mine.is_none() && self.shared.keep {
            return Ok(());
        }
        if !diff::same_limits(mine.as_ref(), theirs.as_ref()) {
            if mine.is_none() {
                self.removal(&format_args!("quota root {root}"))?;
            }
            match &mine {
                Some(limits) => self.apply(&Step::Quota { root: root.clone(), limits: limits.clone() })?,
                None => self.unquota(root)?,
            }
            self.confirmed(&Item::Quota(root.clone()), None, seen_at);
        }
        if !self.shared.dry_run {
            match &mine {
                Some(limits) => self.shared.state.put_quota(root, limits),
                None => self.shared.state.remove_quota(root),
            }
        }
        Ok(())
    }

    /// Whether something may be taken from the replica for good.
    fn removal(&self, what: &dyn std::fmt::Display) -> Result<(), JobError> {
        self.shared.vanish_fuse(what, &self.source)?;
        self.shared.fuse(what)
    }

    pub(super) fn meta(&mut self, user: &UserId, part: UserPart, seen_at: Instant) -> Result<(), JobError> {
        // A user's data hangs on the INBOX. It went with it, or follows when the INBOX has arrived: a server that is told
        // before keeps it in another place and loses it then (3.6).
        let inbox = self.source.by_name(&user.inbox());
        if inbox.is_none_or(|inbox| !self.shared.dry_run && !self.has_arrived(inbox)) {
            self.shared.state.remove_user(user);
            return Ok(());
        }
        if part == UserPart::Sieve && self.store().sieve_in_mailboxes() && self.caps.sieve_mailboxes {
            return Ok(());
        }
        let fingerprint = self.store().user_fingerprint(user)?;
        let mine = scripts::user_meta(self.store(), &self.caps, user)?;
        let theirs = match self.shared.state.user(user) {
            Some(receipt) => receipt.meta,
            None => self.session.view_user(user)?.meta,
        };
        let parts = BTreeSet::from([part]);
        // Listed after the reading: what somebody has read was in the list before.
        let source = self.shared.source()?;
        let known = |id: &UniqueId| source.by_id(id).is_some();
        let mut steps = diff::diff_meta(user, &mine, &theirs, &parts, &known);
        if self.shared.keep {
            steps.retain(|step| !takes_away(step));
        }
        let changed = !steps.is_empty();
        // A directory that is gone looks like users who gave everything up.
        let given_up = match part {
            UserPart::Subs => mine.subs.is_empty() && !theirs.subs.is_empty(),
            UserPart::Sieve => mine.sieve.is_empty() && !theirs.sieve.is_empty(),
            UserPart::Seen => false,
        };
        if given_up && !self.shared.keep {
            self.removal(&format_args!("{part:?} of {user}"))?;
        }
        for step in &steps {
            self.apply(step)?;
        }
        if self.shared.keep {
            // It has more than is here: what that is, is asked anew next time.
            self.shared.state.remove_user(user);
            if changed {
                self.confirmed(&Item::Meta(part), Some(&user.inbox()), seen_at);
            }
        } else if !self.shared.dry_run {
            let meta = diff::confirmed_meta(&mine, &theirs, &parts, &known);
            let all = [UserPart::Subs, UserPart::Seen, UserPart::Sieve].into_iter().collect::<BTreeSet<_>>();
            let settled = diff::diff_meta(user, &mine, &meta, &all, &known).is_empty();
            let fingerprint = settled.then_some(fingerprint);
            self.shared.state.put_user(user, &UserReceipt { meta, fingerprint });
            if changed {
                self.confirmed(&Item::Meta(part), Some(&user.inbox()), seen_at);
            }
        }
        Ok(())
    }

    /// The replica confirmed it under this name: a receipt that was only written ahead has no UIDVALIDITY.
    fn has_arrived(&self, entry: &MailboxEntry) -> bool {
        let confirmed = |head: &MailboxHead| head.name == entry.name && head.uidvalidity != 0;
        entry.mbtype.is_intermediate()
            || self.shared.state.mailbox(&entry.uniqueid).is_some_and(|receipt| confirmed(&receipt.view.head))
    }

    pub(super) fn queue_meta(&self, user: &UserId) {
        for part in [UserPart::Subs, UserPart::Seen, UserPart::Sieve] {
            self.shared.queue.push(Lane::User(user.clone()), Item::Meta(part), Instant::now(), true);
        }
    }

    pub(super) fn server_annotations(&mut self, seen_at: Instant) -> Result<(), JobError> {
        let mine = self.store().server_annotations()?;
        self.shared.loses(&SERVER, loss::of_server(&mine, &self.caps))?;
        if !self.caps.server_annotations {
            return Ok(());
        }
        let theirs = match self.shared.state.server_annotations() {
            Some(annotations) => annotations,
            None => self.session.view_server_annotations()?,
        };
        let mut steps = diff::diff_server_annotations(&mine, &theirs);
        if self.shared.keep {
            steps.retain(|step| !takes_away(step));
        }
        for step in &steps {
            self.apply(step)?;
        }
        if !self.shared.dry_run {
            let now = if self.shared.keep { self.session.view_server_annotations()? } else { mine };
            self.shared.state.put_server_annotations(&now);
            if !steps.is_empty() {
                self.confirmed(&Item::ServerAnnotations, None, seen_at);
            }
        }
        Ok(())
    }
}

/// Something that the replica has would be lost by it.
fn takes_away(step: &Step) -> bool {
    match step {
        Step::Unsubscribe { .. }
        | Step::SieveRemove { .. }
        | Step::SieveDeactivate { .. }
        | Step::RemoveServerAnnotation { .. } => true,
        Step::Seen { seen, .. } => *seen == SeenState::default(),
        _ => false,
    }
}
