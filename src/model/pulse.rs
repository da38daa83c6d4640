//! Signs of life: whoever works on a thread of its own counts what it gets done, and whoever watches over it looks
//! whether the number grows. No clock is asked for here, so a beat costs next to nothing.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

/// Signs of life of one room.
#[derive(Debug)]
pub struct Pulse {
    room: String,
    beats: AtomicU64,
    doing: AtomicU8,
}

/// What is to be expected of a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Nobody works there at this time.
    Absent,
    /// It beats, or it is stuck.
    Working,
    /// It waits for another machine, which may take its time.
    Abroad,
    /// Its thread has ended in the middle of its work.
    Dead,
}

const DOINGS: [Doing; 4] = [Doing::Absent, Doing::Working, Doing::Abroad, Doing::Dead];

thread_local! {
    static MINE: RefCell<Option<Arc<Pulse>>> = const { RefCell::new(None) };
}

/// Something got done on this thread.
pub fn beat() {
    MINE.with_borrow(|mine| {
        if let Some(pulse) = mine {
            pulse.beats.fetch_add(1, Relaxed);
        }
    });
}

/// The pulse of this thread, for those who help it.
pub fn mine() -> Option<Arc<Pulse>> {
    MINE.with_borrow(Clone::clone)
}

/// Beats of this thread count for that pulse from now on.
pub fn help(pulse: Option<Arc<Pulse>>) {
    MINE.set(pulse);
}

/// Carries out what waits for another machine.
pub fn abroad<T>(work: impl FnOnce() -> T) -> T {
    turn(Doing::Abroad, work)
}

/// Carries out what is done here, in the middle of something that waits for another machine.
pub fn at_home<T>(work: impl FnOnce() -> T) -> T {
    turn(Doing::Working, work)
}

fn turn<T>(to: Doing, work: impl FnOnce() -> T) -> T {
    struct Back(Option<(Arc<Pulse>, u8)>);
    impl Drop for Back {
        fn drop(&mut self) {
            if let Some((pulse, before)) = &self.0 {
                pulse.doing.store(*before, Relaxed);
                beat();
            }
        }
    }
    let _back = Back(mine().map(|pulse| {
        let before = pulse.doing.swap(to as u8, Relaxed);
        beat();
        (pulse, before)
    }));
    work()
}

impl Pulse {
    pub fn new(room: impl Into<String>) -> Arc<Self> {
        Arc::new(Self { room: room.into(), beats: AtomicU64::new(0), doing: AtomicU8::new(Doing::Absent as u8) })
    }

    /// What it is called for people.
    pub fn room(&self) -> &str {
        &self.room
    }

    /// How much got done so far, and what is going on.
    pub fn look(&self) -> (u64, Doing) {
        let doing = DOINGS.get(usize::from(self.doing.load(Relaxed))).copied().unwrap_or(Doing::Dead);
        (self.beats.load(Relaxed), doing)
    }

    /// This thread works in the room for as long as `work` takes; when that ends in a panic the room is dead.
    pub fn during<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
        struct Leave {
            pulse: Arc<Pulse>,
            before: Option<Arc<Pulse>>,
            how: Doing,
        }
        impl Drop for Leave {
            fn drop(&mut self) {
                self.pulse.doing.store(self.how as u8, Relaxed);
                MINE.set(self.before.take());
            }
        }
        let mut leave = Leave { pulse: self.clone(), before: MINE.replace(Some(self.clone())), how: Doing::Dead };
        self.doing.store(Doing::Working as u8, Relaxed);
        beat();
        let out = work();
        leave.how = Doing::Absent;
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_is_counted_and_how_it_ended_is_known() {
        let pulse = Pulse::new("room");
        assert_eq!(pulse.look(), (0, Doing::Absent));
        beat();
        let inside = pulse.clone();
        pulse.during(|| {
            let (first, doing) = inside.look();
            assert_eq!(doing, Doing::Working);
            beat();
            assert_eq!(inside.look().0, first + 1);
            abroad(|| {
                assert_eq!(inside.look().1, Doing::Abroad);
                at_home(|| assert_eq!(inside.look().1, Doing::Working));
                assert_eq!(inside.look().1, Doing::Abroad);
            });
            assert_eq!(inside.look().1, Doing::Working);
            let inner = Pulse::new("inner");
            let before = inside.look().0;
            inner.during(beat);
            assert_eq!((inside.look().0, inner.look().1), (before, Doing::Absent));
            beat();
            assert_eq!(inside.look().0, before + 1);
        });
        assert_eq!(pulse.look().1, Doing::Absent);
        let broken = pulse.clone();
        let ended = std::panic::catch_unwind(move || broken.during(|| abroad(|| panic!("on purpose"))));
        assert!(ended.is_err());
        assert_eq!(pulse.look().1, Doing::Dead);
    }
}
