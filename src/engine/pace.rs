//! How fast work that can wait may go: a rate, and a look at what else the machine does.

use std::time::{Duration, Instant};

/// Bytes (or anything else that is counted) in a second, at most.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    per_second: Option<u64>,
    /// What was spent until now is paid for at this moment.
    free_at: Instant,
}

impl Pace {
    /// `None` or 0: as fast as it goes.
    pub fn new(per_second: Option<u64>) -> Self {
        Self { per_second: per_second.filter(|rate| *rate > 0), free_at: Instant::now() }
    }

    /// Spends so many; gives the moment to go on at.
    pub fn spend(&mut self, count: u64) -> Instant {
        let now = Instant::now();
        if let Some(rate) = self.per_second {
            // Time that was not made use of is not saved up for a burst.
            self.free_at = self.free_at.max(now) + Duration::from_secs_f64(count as f64 / rate as f64);
            return self.free_at;
        }
        now
    }
}

/// Whether the machine has other things to do.
#[derive(Clone, Copy, Debug)]
pub struct Bustle {
    limit_percent: u32,
    looked: Option<(Instant, bool)>,
}

/// The kernel's average is over ten seconds; looking more often tells nothing.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Where the kernel does not count waiting (before 4.20, or switched off): so many ready to run per processor.
const LOAD_PER_PROCESSOR: f64 = 2.0;

impl Bustle {
    /// Busy when, of the last ten seconds, somebody waited for a disk in so many percent; 0: never.
    pub fn new(limit_percent: u32) -> Self {
        Self { limit_percent, looked: None }
    }

    pub fn is_busy(&mut self) -> bool {
        if self.limit_percent == 0 {
            return false;
        }
        match self.looked {
            Some((at, busy)) if at.elapsed() < LOOK_EVERY => busy,
            _ => {
                let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
                let processors = std::thread::available_parallelism().map_or(1, usize::from);
                let busy = match waiting(&read("/proc/pressure/io")) {
                    Some(percent) => percent >= f64::from(self.limit_percent),
                    None => load(&read("/proc/loadavg")) >= LOAD_PER_PROCESSOR * processors as f64,
                };
                self.looked = Some((Instant::now(), busy));
                busy
            }
        }
    }
}

/// Percent of the last ten seconds in which at least one task waited for a disk.
fn waiting(pressure: &str) -> Option<f64> {
    let some = pressure.lines().find_map(|line| line.strip_prefix("some "))?;
    some.split(' ').find_map(|field| field.strip_prefix("avg10=")?.parse().ok())
}

/// Of the last minute; 0 where it cannot be read.
fn load(loadavg: &str) -> f64 {
    loadavg.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_understood() {
        let text = "some avg10=12.34 avg60=1.00 avg300=0.20 total=5\nfull avg10=9.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(waiting(text), Some(12.34));
        assert_eq!((waiting(""), waiting("some total=1")), (None, None));
        assert_eq!((load("3.50 2.00 1.00 1/200 4711\n"), load("")), (3.5, 0.0));
        assert!(!Bustle::new(0).is_busy());
    }

    #[test]
    fn a_rate_is_kept_and_idleness_is_not_saved_up() {
        let mut pace = Pace::new(Some(1000));
        let first = pace.spend(500);
        let second = pace.spend(1500);
        assert!(second.duration_since(first) >= Duration::from_millis(1499), "{:?}", second - first);
        // A pace that was not used for long.
        pace.free_at = Instant::now() - Duration::from_secs(3600);
        assert!(pace.spend(1000) >= Instant::now() + Duration::from_millis(900));
        assert!(Pace::new(Some(0)).spend(1 << 40) <= Instant::now());
    }
}
