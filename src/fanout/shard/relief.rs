//! What cutting is about to bring, so that a shard over the budget does not cut twice for the same bytes.

/// From then on a cut does not count less: it is not for want of cuts that the process is over its budget.
const DOUBTS_MAX: u32 = 8;

/// The cuts of one tick.
///
/// A cut may bring less than its queue holds, as others hold the same frames. So it counts half as much in each further
/// tick in which there were cuts and the process is still over its budget: among however many sessions, those that have to
/// go are gone within some ticks.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Relief {
    tick: u64,
    /// Bytes that are expected of the cuts so far.
    bytes: usize,
    /// Nobody was left to cut.
    is_exhausted: bool,
    has_cut: bool,
    /// In how many ticks in a row before this one cuts were not enough.
    doubts: u32,
}

impl Relief {
    /// It is `tick`, and the process is over its budget.
    pub(super) fn begin(&mut self, tick: u64) {
        if self.tick != tick {
            let was_in_vain = self.tick + 1 == tick && self.has_cut;
            let doubts = if was_in_vain { (self.doubts + 1).min(DOUBTS_MAX) } else { 0 };
            *self = Self { tick, doubts, ..Self::default() };
        }
    }

    /// Whether more has to be cut for so many bytes over the budget.
    pub(super) fn is_wanted(&self, bytes_over: usize) -> bool {
        !self.is_exhausted && bytes_over > self.bytes
    }

    /// A session was cut with so many bytes in its queue.
    pub(super) fn count(&mut self, bytes: usize) {
        self.has_cut = true;
        self.bytes = self.bytes.saturating_add(bytes >> self.doubts);
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
        assert_eq!(cuts(&mut relief, 23), 3, "a tick without a cut says nothing of cuts");
        assert_eq!((24..40).map(|tick| cuts(&mut relief, tick)).max(), Some(100));
        relief.begin(40);
        (0..700).for_each(|_| relief.count(1_000));
        assert!(!relief.is_wanted(2_000), "some bytes are always expected of a cut");
    }
}
