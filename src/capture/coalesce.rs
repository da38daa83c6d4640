//! Many notices → one per key. Pure: time is handed in.
//!
//! A burst of writes to one index is one notice, given once the key has been quiet for a moment, at the latest a
//! fixed time after the first; it keeps the time of the *first*, so that lag is never flattered.

use crate::model::{DirtyKey, Notice};
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// Holds keys back until they are quiet; one entry per key.
#[derive(Debug)]
pub struct Coalescer {
    quiet: Duration,
    most: Duration,
    held: HashMap<DirtyKey, Held>,
    /// When to look at a key again. May be earlier than its deadline, never later: a notice for a key that is held
    /// already does not move its slot, which keeps the hot path at one hash lookup.
    slots: BTreeMap<(Instant, u64), DirtyKey>,
    next_slot: u64,
}

#[derive(Debug)]
struct Held {
    first: Instant,
    last: Instant,
}

impl Coalescer {
    /// A key is given after `quiet` without a notice, at the latest `most` after its first.
    pub fn new(quiet: Duration, most: Duration) -> Self {
        Self { quiet, most, held: HashMap::new(), slots: BTreeMap::new(), next_slot: 0 }
    }

    pub fn notice(&mut self, notice: Notice) {
        if let Some(held) = self.held.get_mut(&notice.key) {
            held.first = held.first.min(notice.seen_at);
            held.last = held.last.max(notice.seen_at);
            return;
        }
        let held = Held { first: notice.seen_at, last: notice.seen_at };
        let deadline = self.deadline(&held);
        self.held.insert(notice.key.clone(), held);
        self.put_slot(deadline, notice.key);
    }

    fn deadline(&self, held: &Held) -> Instant {
        (held.last + self.quiet).min(held.first + self.most)
    }

    fn put_slot(&mut self, at: Instant, key: DirtyKey) {
        self.slots.insert((at, self.next_slot), key);
        self.next_slot = self.next_slot.wrapping_add(1);
    }

    /// Takes out what is due, longest held first.
    pub fn due(&mut self, now: Instant) -> Vec<Notice> {
        let mut out = Vec::new();
        while let Some(slot) = self.slots.first_entry().filter(|slot| slot.key().0 <= now) {
            let key = slot.remove();
            let Some(held) = self.held.get(&key) else { continue };
            let deadline = self.deadline(held);
            if deadline > now {
                self.put_slot(deadline, key);
                continue;
            }
            let seen_at = held.first;
            self.held.remove(&key);
            out.push(Notice { key, seen_at });
        }
        out
    }

    /// Takes out everything, due or not.
    pub fn flush(&mut self) -> Vec<Notice> {
        let slots = std::mem::take(&mut self.slots);
        let mut held = std::mem::take(&mut self.held);
        let out = slots.into_values().filter_map(|key| {
            let seen_at = held.remove(&key)?.first;
            Some(Notice { key, seen_at })
        });
        out.collect()
    }

    /// When to call `due` next; possibly a little early, never late. `None` when nothing is held.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.slots.first_key_value().map(|((at, _), _)| *at)
    }

    /// True when nothing is held.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MailboxRef;
    use proptest::prelude::*;

    fn key(name: &str) -> DirtyKey {
        DirtyKey::Mailbox(MailboxRef::Name(name.into()))
    }

    /// Plays `at_ms name` notices and asks every millisecond; gives `given_at_ms name seen_at_ms`.
    fn play(quiet: u64, most: u64, notices: &[(u64, &str)]) -> Vec<(u64, String, u64)> {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let mut coalescer = Coalescer::new(ms(quiet), ms(most));
        let mut out = Vec::new();
        for now in 0..200 {
            for (_, name) in notices.iter().filter(|(at, _)| *at == now) {
                coalescer.notice(Notice { key: key(name), seen_at: start + ms(now) });
            }
            assert_eq!(coalescer.next_deadline().is_none(), coalescer.is_empty());
            for notice in coalescer.due(start + ms(now)) {
                let seen = notice.seen_at.duration_since(start).as_millis() as u64;
                out.push((now, notice.key.to_string(), seen));
            }
        }
        assert!(coalescer.is_empty());
        out
    }

    fn check(notices: &[(u64, &str)], expected: &[(u64, &str, u64)]) {
        let expected: Vec<_> = expected.iter().map(|&(at, name, seen)| (at, format!("mailbox {name}"), seen)).collect();
        assert_eq!(play(2, 20, notices), expected);
    }

    #[test]
    fn a_burst_is_one_notice_with_the_time_of_its_first() {
        check(&[(0, "a"), (1, "a"), (2, "a")], &[(4, "a", 0)]);
        check(&[(0, "a"), (0, "b"), (1, "a")], &[(2, "b", 0), (3, "a", 0)]);
    }

    #[test]
    fn a_key_that_never_rests_is_given_all_the_same() {
        let stream: Vec<_> = (0..50).map(|at| (at, "a")).collect();
        check(&stream, &[(20, "a", 0), (41, "a", 21), (51, "a", 42)]);
    }

    #[test]
    fn a_key_comes_again_after_it_was_given() {
        check(&[(0, "a"), (10, "a")], &[(2, "a", 0), (12, "a", 10)]);
    }

    #[test]
    fn flush_gives_what_is_held_once() {
        let now = Instant::now();
        let mut coalescer = Coalescer::new(Duration::from_millis(2), Duration::from_millis(20));
        for name in ["a", "b", "a"] {
            coalescer.notice(Notice { key: key(name), seen_at: now });
        }
        assert_eq!(coalescer.flush().len(), 2);
        assert!(coalescer.flush().is_empty() && coalescer.next_deadline().is_none());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_late_or_younger_than_it_is(
            notices in proptest::collection::vec((0u64..100, 0usize..3), 0..60),
            quiet in 0u64..8,
            most in 0u64..30,
        ) {
            let names = ["a", "b", "c"];
            let mut sorted: Vec<_> = notices.iter().map(|&(at, name)| (at, names[name])).collect();
            sorted.sort();
            let given = play(quiet, most, &sorted);
            for (at, name) in sorted {
                let name = format!("mailbox {name}");
                prop_assert!(given.iter().any(|(out, key, seen)| *key == name && *seen <= at && at <= *out && *out <= seen + most));
            }
        }
    }
}
