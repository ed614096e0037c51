//! What cutting is about to bring, so that a shard over the budget does not cut twice for the same bytes.

/// The cuts of one tick.
///
/// A cut may bring less than its queue holds, as others hold the same frames. So it counts half as much in each further
/// tick over the budget: among however many sessions, those that have to go are gone within some ticks.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Relief {
    tick: u64,
    /// Bytes that are expected of the cuts so far.
    bytes: usize,
    /// Nobody was left to cut.
    is_exhausted: bool,
    /// How many ticks in a row before this one have not brought enough.
    doubts: u32,
}

impl Relief {
    /// It is `tick`, and the process is over its budget.
    pub(super) fn begin(&mut self, tick: u64) {
        if self.tick != tick {
            let doubts = if self.tick + 1 == tick { self.doubts.saturating_add(1) } else { 0 };
            *self = Self { tick, doubts, ..Self::default() };
        }
    }

    /// Whether more has to be cut for so many bytes over the budget.
    pub(super) fn is_wanted(&self, bytes_over: usize) -> bool {
        !self.is_exhausted && bytes_over > self.bytes
    }

    /// A session was cut with so many bytes in its queue.
    pub(super) fn count(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_add(bytes.checked_shr(self.doubts).unwrap_or(0));
    }

    /// Nobody is left in this tick.
    pub(super) fn exhaust(&mut self) {
        self.is_exhausted = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many sessions of 1,000 bytes are cut in a tick for 2,500 bytes over the budget.
    fn cuts(relief: &mut Relief, tick: u64) -> usize {
        relief.begin(tick);
        (0..100)
            .take_while(|_| {
                relief.is_wanted(2_500) && {
                    relief.count(1_000);
                    true
                }
            })
            .count()
    }

    #[test]
    fn what_is_not_enough_is_doubled_from_tick_to_tick() {
        let mut relief = Relief::default();
        assert_eq!([5, 6, 7, 8, 20].map(|tick| cuts(&mut relief, tick)), [3, 5, 10, 20, 3]);
        assert_eq!([20, 21].map(|tick| cuts(&mut relief, tick)), [0, 5], "once a tick");
        relief.begin(22);
        relief.exhaust();
        assert!(!relief.is_wanted(usize::MAX));
        (23..200).for_each(|tick| relief.begin(tick));
        assert_eq!(cuts(&mut relief, 200), 100, "and no shift is too long");
    }
}
