//! One timer a session, in a dense byte array: the byte is the tick at which it is due, modulo 255, or 0 for none.
//!
//! A tick looks through the array for its own byte, at memory speed: 300,000 idle sessions cost a few microseconds
//! a second and one byte each.

use std::time::{Duration, Instant};

/// How fine timers are.
pub(crate) const TICK: Duration = Duration::from_secs(1);
/// The furthest that a timer can be set, in ticks.
const TICKS_MAX: u64 = 254;

pub(crate) struct Timers {
    due: Vec<u8>,
    tick: u64,
    start: Instant,
}

impl Timers {
    pub(crate) fn new(start: Instant) -> Self {
        Self { due: Vec::new(), tick: 0, start }
    }

    /// Ticks since the start, as of the last `advance`.
    pub(crate) fn tick(&self) -> u64 {
        self.tick
    }

    /// `duration` in ticks, rounded up, at least one; at most 136 years, so that sums of them never overflow.
    pub(crate) fn ticks(duration: Duration) -> u64 {
        u32::try_from(duration.as_nanos().div_ceil(TICK.as_nanos())).unwrap_or(u32::MAX).max(1).into()
    }

    /// Sets the slot's timer `ticks` from now; a longer one than the array can tell fires early, to be set again.
    pub(crate) fn set(&mut self, slot: u32, ticks: u64) {
        let slot = slot as usize;
        if slot >= self.due.len() {
            self.due.resize(slot + 1, 0);
        }
        self.due[slot] = phase(self.tick + ticks.clamp(1, TICKS_MAX));
    }

    pub(crate) fn clear(&mut self, slot: u32) {
        if let Some(due) = self.due.get_mut(slot as usize) {
            *due = 0;
        }
    }

    /// Goes on to the tick of `now`; the slots that became due since the last call are put into `due`, each once.
    /// After a long sleep what a timer is set to next counts from `now`, so that nobody is late for what could not be.
    pub(crate) fn advance(&mut self, now: Instant, due: &mut Vec<u32>) {
        let elapsed = now.saturating_duration_since(self.start).as_secs() / TICK.as_secs();
        let first = (self.tick + 1).max(elapsed.saturating_sub(TICKS_MAX));
        for tick in first..=elapsed {
            let due_now = memchr::memchr_iter(phase(tick), &self.due);
            due.extend(due_now.map(|slot| u32::try_from(slot).unwrap_or(u32::MAX)));
        }
        self.tick = self.tick.max(elapsed);
        for slot in due.iter() {
            self.due[*slot as usize] = 0;
        }
    }
}

fn phase(tick: u64) -> u8 {
    (tick % 255) as u8 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_fire_once_at_their_tick() {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start; the test moves time itself")]
        let start = Instant::now();
        let mut timers = Timers::new(start);
        timers.set(7, 3);
        timers.set(2, 3);
        timers.set(4, 1);
        timers.set(5, 1);
        timers.clear(5);
        timers.set(9, 10_000);
        let mut fired = Vec::new();
        for second in 0..=600u64 {
            let mut due = Vec::new();
            timers.advance(start + Duration::from_secs(second), &mut due);
            fired.extend(due.into_iter().map(|slot| (second, slot)));
        }
        assert_eq!(fired, [(1, 4), (3, 2), (3, 7), (254, 9)]);
    }

    #[test]
    fn a_long_sleep_fires_every_timer_once() {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start; the test moves time itself")]
        let start = Instant::now();
        let mut timers = Timers::new(start);
        (0..200).for_each(|slot| timers.set(slot, u64::from(slot) + 1));
        let mut due = Vec::new();
        timers.advance(start + Duration::from_secs(100_000), &mut due);
        due.sort_unstable();
        assert_eq!(due, (0..200).collect::<Vec<_>>());
        assert_eq!(timers.tick(), 100_000);
    }
}
