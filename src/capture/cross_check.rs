//! Two witnesses of the same change: what a source of capture showed, and what Cyrus wrote into its rolling log. Pure: times
//! and the disk are handed in.
//!
//! A record is *missed* when the files behind it changed after the last time its key was shown. A command that changes nothing
//! logs as well, so the record alone proves nothing.

use crate::model::{DirtyKey, UserPart};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A record comes before its commit, or after it; a source tells of the commit some milliseconds later.
const SETTLE: Duration = Duration::from_secs(2);
/// Without a proof of how far its queue was read, a source has this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Stamps of files are as coarse as the kernel's clock.
const COARSE: Duration = Duration::from_millis(50);
/// Keys remembered on each side; far more than change within `PATIENCE`.
const KEYS_MOST: usize = 200_000;

/// How often the two agreed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CrossStats {
    /// Keys that the log named.
    pub logged_total: u64,
    /// Of these, those whose change the source did not show.
    pub missed_total: u64,
    /// Keys that the source showed and the log did not name: changes by tools that write no log.
    pub unlogged_total: u64,
}

/// What each witness said, and what is not decided yet.
#[derive(Default)]
pub struct CrossCheck {
    shown: HashMap<DirtyKey, SystemTime>,
    /// Everything counts as shown up to here.
    all_shown: Option<SystemTime>,
    logged: HashMap<DirtyKey, SystemTime>,
    /// Records to be decided, by the time they were read; each key once.
    open: VecDeque<(SystemTime, DirtyKey)>,
    waiting: HashSet<DirtyKey>,
    /// Keys that were shown and should be logged.
    asked: VecDeque<(SystemTime, DirtyKey)>,
    forgot_at: Option<SystemTime>,
    stats: CrossStats,
}

impl CrossCheck {
    pub fn stats(&self) -> CrossStats {
        self.stats
    }

    /// A source has shown this key, which names its object.
    pub fn shown(&mut self, key: DirtyKey, at: SystemTime) {
        if matches!(key, DirtyKey::Rescan(_)) || self.shown.len() >= KEYS_MOST {
            self.all_shown = self.all_shown.max(Some(at));
            self.shown.clear();
            self.asked.clear();
            return;
        }
        // Whoever only reads does not log.
        let (key, may_be_unlogged) = match key {
            DirtyKey::Accessed(mailbox) => (DirtyKey::Mailbox(mailbox), false),
            key => {
                let always = is_always_logged(&key);
                (key, always)
            }
        };
        if may_be_unlogged && self.shown.get(&key).is_none_or(|last| *last + PATIENCE < at) {
            self.asked.push_back((at, key.clone()));
        }
        self.shown.insert(key, at);
    }

    /// A record of the log names this key.
    pub fn logged(&mut self, key: DirtyKey, at: SystemTime) {
        if matches!(key, DirtyKey::Rescan(_)) || self.logged.len() >= KEYS_MOST {
            return;
        }
        self.stats.logged_total += 1;
        self.logged.insert(key.clone(), at);
        if self.waiting.insert(key.clone()) {
            self.open.push_back((at, key));
        }
    }

    /// Decides what can be decided; gives the keys that were missed and have to be looked at now. All that changed before
    /// `proven` has been shown, and `changed_at` says when the files of a key were changed last.
    pub fn decide(
        &mut self,
        now: SystemTime,
        proven: Option<SystemTime>,
        changed_at: &dyn Fn(&DirtyKey) -> Option<SystemTime>,
    ) -> Vec<DirtyKey> {
        let mut missed = Vec::new();
        let until = proven.unwrap_or(UNIX_EPOCH).max(now - PATIENCE);
        let ripe = self.open.iter().take_while(|(at, _)| *at + SETTLE <= now).count();
        for (at, key) in self.open.drain(..ripe).collect::<Vec<_>>() {
            // A record of a mailbox that is gone is a matter of the list, which is named beside it.
            let changed = changed_at(&key);
            let is_shown = changed.is_none_or(|changed| self.shown_at(&key).is_some_and(|at| changed <= at + COARSE));
            if !is_shown && changed.is_some_and(|changed| changed.max(at) > until) {
                self.open.push_back((at, key));
                continue;
            }
            self.waiting.remove(&key);
            if !is_shown {
                self.stats.missed_total += 1;
                self.shown.insert(key.clone(), now);
                missed.push(key);
            }
        }
        let ripe = self.asked.iter().take_while(|(at, _)| *at + PATIENCE <= now).count();
        for (at, key) in self.asked.drain(..ripe) {
            let is_logged = self.logged.get(&key).is_some_and(|logged| *logged + PATIENCE >= at);
            self.stats.unlogged_total += u64::from(!is_logged);
        }
        self.forget(now);
        missed
    }

    fn shown_at(&self, key: &DirtyKey) -> Option<SystemTime> {
        let own = self.shown.get(key).copied();
        // A single database has all roots.
        let quotas = matches!(key, DirtyKey::Quota(_)).then(|| self.shown.get(&DirtyKey::AllQuotas).copied()).flatten();
        own.max(quotas).max(self.all_shown)
    }

    fn forget(&mut self, now: SystemTime) {
        if self.forgot_at.is_some_and(|at| at + PATIENCE > now) {
            return;
        }
        self.forgot_at = Some(now);
        self.logged.retain(|_, at| *at + PATIENCE * 3 > now);
        let open = &self.waiting;
        self.shown.retain(|key, at| *at + PATIENCE * 6 > now || open.contains(key));
    }
}

/// Every change of these is logged; of the others only some (a delivery changes a quota root, and annotations are logged
/// with their mailbox).
fn is_always_logged(key: &DirtyKey) -> bool {
    matches!(key, DirtyKey::Mailbox(_) | DirtyKey::User(_, UserPart::Subs | UserPart::Seen))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{MailboxRef, Scope};

    fn key(name: &str) -> DirtyKey {
        DirtyKey::Mailbox(MailboxRef::Name(name.into()))
    }

    /// Plays what was said at which second; gives what was missed at which, and the figures `logged missed unlogged`.
    fn play(said: &[(u64, &str)], changed: &[(&str, u64)], proven: bool) -> (Vec<String>, [u64; 3]) {
        let at = |second: u64| UNIX_EPOCH + Duration::from_secs(1_000_000 + second);
        let mut check = CrossCheck::default();
        let mut out = Vec::new();
        for second in 0..60 {
            for (_, said) in said.iter().filter(|(at, _)| *at == second) {
                match said.split_once(' ') {
                    Some(("shown", name)) => check.shown(key(name), at(second)),
                    Some(("logged", name)) => check.logged(key(name), at(second)),
                    Some(("read", name)) => check.shown(DirtyKey::Accessed(MailboxRef::Name(name.into())), at(second)),
                    _ => check.shown(DirtyKey::Rescan(Scope::Everything), at(second)),
                }
            }
            let changed_at = |asked: &DirtyKey| {
                let found = changed.iter().filter(|(name, when)| key(name) == *asked && *when <= second);
                found.map(|(_, when)| at(*when)).max()
            };
            let missed = check.decide(at(second), proven.then(|| at(second)), &changed_at);
            out.extend(missed.iter().map(|key| format!("{second} {key}")));
        }
        let stats = check.stats();
        (out, [stats.logged_total, stats.missed_total, stats.unlogged_total])
    }

    #[test]
    fn what_one_witness_alone_saw_is_counted() {
        let none = Vec::<String>::new();
        // Both saw it; the record comes first, or last.
        assert_eq!(play(&[(5, "shown a"), (5, "logged a")], &[("a", 5)], true), (none.clone(), [1, 0, 0]));
        assert_eq!(play(&[(5, "logged a"), (6, "shown a")], &[("a", 6)], true), (none.clone(), [1, 0, 0]));
        // The log alone: told once, when the source can have no excuse left.
        assert_eq!(play(&[(5, "logged a")], &[("a", 5)], true), (vec!["7 mailbox a".into()], [1, 1, 0]));
        assert_eq!(play(&[(5, "logged a")], &[("a", 5)], false), (vec!["15 mailbox a".into()], [1, 1, 0]));
        // What was shown before the change is no excuse.
        let said = [(2, "shown a"), (2, "logged a"), (5, "logged a")];
        assert_eq!(play(&said, &[("a", 2), ("a", 5)], true), (vec!["7 mailbox a".into()], [2, 1, 0]));
        // A command that changed nothing, and a mailbox that is gone.
        assert_eq!(
            play(&[(2, "shown a"), (2, "logged a"), (9, "logged a")], &[("a", 2)], true),
            (none.clone(), [2, 0, 0])
        );
        assert_eq!(play(&[(5, "logged a")], &[], true), (none.clone(), [1, 0, 0]));
        // Whoever compares everything has seen it.
        assert_eq!(play(&[(5, "logged a"), (6, "all")], &[("a", 5)], true), (none.clone(), [1, 0, 0]));
        // The source alone; who was only read is not expected in the log.
        assert_eq!(play(&[(5, "shown a"), (6, "shown a")], &[("a", 5)], true), (none.clone(), [0, 0, 1]));
        assert_eq!(play(&[(5, "read a")], &[("a", 1)], true), (none, [0, 0, 0]));
    }
}
