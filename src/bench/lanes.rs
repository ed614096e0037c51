//! Whether everything came: once, in order, and to those it was for.
//!
//! A lane is what one client gets from one publisher on one channel: numbers that follow each other. Where several
//! publishers send at once there is no order between them, only within each one's lane; the same goes for the room and
//! the user of one client. So a number that comes after a higher one of its lane is out of order whatever the number
//! of publishers, and nothing else is.

use std::collections::HashMap;

/// The lane has not begun: its first number may be any up to the one in the other bits.
const NOT_BEGUN: u32 = 1 << 31;
/// Numbers end here, so that the bit above tells lanes that have not begun.
pub(super) const NUMBER_MAX: u32 = NOT_BEGUN - 2;
const ANY: u32 = NOT_BEGUN | (NOT_BEGUN - 1);
/// Gaps that are remembered, of all lanes of a thread, 48 bytes each. Past it a gap is lost at once: what fills it late
/// then counts as doubled.
const GAPS_MAX: usize = 1 << 16;

/// How one arrival fits to those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    Next,
    /// After one with a higher number.
    Misordered,
    Doubled,
}

/// The lanes of a thread's clients.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    /// The next number of each lane: 4 bytes a lane, which is all that an idle client has here.
    next: Vec<u32>,
    /// Numbers that were passed over, from the first to the last, by lane.
    gaps: HashMap<usize, Vec<(u32, u32)>>,
    gap_count: usize,
    /// Numbers in all gaps.
    missing: u64,
    lost: u64,
}

impl Lanes {
    pub(super) fn new(count: usize) -> Self {
        Self { next: vec![ANY; count], ..Self::default() }
    }

    /// Takes note of a number.
    pub(super) fn arrive(&mut self, lane: usize, number: u32) -> Arrival {
        match self.next.get_mut(lane) {
            Some(next) if *next == number => {
                *next = number + 1;
                Arrival::Next
            }
            Some(next) => {
                let next = *next;
                self.arrive_oddly(lane, next, number)
            }
            None => Arrival::Doubled,
        }
    }

    fn arrive_oddly(&mut self, lane: usize, next: u32, number: u32) -> Arrival {
        let expected = next & !NOT_BEGUN;
        if number >= expected || next & NOT_BEGUN != 0 {
            self.next[lane] = number.min(NUMBER_MAX) + 1;
            if number > expected {
                self.pass_over(lane, expected, number - 1);
            }
            Arrival::Next
        } else if self.fill(lane, number) {
            Arrival::Misordered
        } else {
            Arrival::Doubled
        }
    }

    fn pass_over(&mut self, lane: usize, first: u32, last: u32) {
        if self.gap_count >= GAPS_MAX {
            self.lost += u64::from(last - first) + 1;
            return;
        }
        self.gap_count += 1;
        self.missing += u64::from(last - first) + 1;
        self.gaps.entry(lane).or_default().push((first, last));
    }

    /// Takes a number out of the gap that it was missing from.
    fn fill(&mut self, lane: usize, number: u32) -> bool {
        let Some(gaps) = self.gaps.get_mut(&lane) else { return false };
        let Some(at) = gaps.iter().position(|(first, last)| (*first..=*last).contains(&number)) else { return false };
        let (first, last) = gaps.swap_remove(at);
        self.gap_count -= 1;
        self.missing -= 1;
        if first < number {
            gaps.push((first, number - 1));
            self.gap_count += 1;
        }
        if number < last {
            gaps.push((number + 1, last));
            self.gap_count += 1;
        }
        if gaps.is_empty() {
            self.gaps.remove(&lane);
        }
        true
    }

    /// From now on the lane's client has to get every number from `first` on. It may have begun before.
    pub(super) fn require(&mut self, lane: usize, first: u32) {
        if let Some(next) = self.next.get_mut(lane)
            && *next & NOT_BEGUN != 0
        {
            *next = NOT_BEGUN | (*next & !NOT_BEGUN).min(first);
        }
    }

    /// True once every number below `end` has come, or has been passed over.
    pub(super) fn has_reached(&self, lane: usize, end: u32) -> bool {
        self.next.get(lane).is_none_or(|next| *next == ANY || next & !NOT_BEGUN >= end)
    }

    /// How many of the numbers below `end` the client had to get and did not. The lane begins anew.
    pub(super) fn settle(&mut self, lane: usize, end: u32) -> u64 {
        let Some(next) = self.next.get_mut(lane) else { return 0 };
        let tail = if *next == ANY { 0 } else { u64::from(end.saturating_sub(*next & !NOT_BEGUN)) };
        *next = ANY;
        let gaps = self.gaps.remove(&lane).unwrap_or_default();
        self.gap_count -= gaps.len();
        let missing: u64 = gaps.iter().map(|(first, last)| u64::from(last - first) + 1).sum();
        self.missing -= missing;
        tail + missing
    }

    /// What has been passed over and may still come, late.
    pub(super) fn missing(&self) -> u64 {
        self.missing
    }

    /// Losses of which nothing more is remembered.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::Arrival::{Doubled, Misordered, Next};
    use super::*;

    /// One lane that must get everything from `first` on gets `numbers`, of `end` that were sent.
    fn check(first: Option<u32>, numbers: &[u32], expected: &[Arrival], end: u32, lost: u64) {
        let mut lanes = Lanes::new(3);
        if let Some(first) = first {
            lanes.require(1, first);
        }
        let seen: Vec<Arrival> = numbers.iter().map(|number| lanes.arrive(1, *number)).collect();
        assert_eq!(seen, expected, "{first:?} {numbers:?}");
        assert_eq!(lanes.settle(1, end), lost, "{first:?} {numbers:?} of {end}");
        assert_eq!(
            (lanes.settle(1, end), lanes.gap_count, lanes.missing, lanes.next[1]),
            (0, 0, 0, ANY),
            "it began anew"
        );
        assert_eq!((lanes.next[0], lanes.next[2]), (ANY, ANY), "other lanes");
    }

    #[test]
    fn what_is_lost_doubled_or_misordered_is_found() {
        check(Some(0), &[0, 1, 2], &[Next; 3], 3, 0);
        check(Some(0), &[0, 2], &[Next; 2], 3, 1);
        check(Some(0), &[0, 1], &[Next; 2], 5, 3);
        check(Some(0), &[], &[], 4, 4);
        check(Some(0), &[3], &[Next], 4, 3);
        check(Some(0), &[0, 0, 1, 0], &[Next, Doubled, Next, Doubled], 2, 0);
        check(Some(0), &[0, 2, 1, 1], &[Next, Next, Misordered, Doubled], 3, 0);
        check(
            Some(0),
            &[0, 5, 3, 1, 4, 2, 2],
            &[Next, Next, Misordered, Misordered, Misordered, Misordered, Doubled],
            6,
            0,
        );
        check(Some(0), &[9, 4, 8], &[Next, Misordered, Misordered], 11, 8);
    }

    #[test]
    fn a_client_that_came_later_has_to_get_what_was_sent_after_it_had_come() {
        check(Some(5), &[5, 6], &[Next; 2], 7, 0);
        check(Some(5), &[3, 4, 5], &[Next; 3], 6, 0);
        check(Some(5), &[7], &[Next], 8, 2);
        check(Some(5), &[], &[], 5, 0);
        check(Some(5), &[], &[], 6, 1);
        // Nobody said when it was there: it is checked from its first number on.
        check(None, &[7, 9], &[Next; 2], 10, 1);
        check(None, &[], &[], 10, 0);
    }

    #[test]
    fn a_lane_knows_whether_it_may_end() {
        let mut lanes = Lanes::new(1);
        assert!(lanes.has_reached(0, 4), "nothing is asked of it yet");
        lanes.require(0, 2);
        assert!(lanes.has_reached(0, 2) && !lanes.has_reached(0, 3));
        lanes.arrive(0, 2);
        assert!(lanes.has_reached(0, 3) && !lanes.has_reached(0, 4));
    }

    #[test]
    fn more_gaps_than_are_remembered_are_still_lost() {
        let mut lanes = Lanes::new(1);
        lanes.require(0, 0);
        let count = u32::try_from(GAPS_MAX).unwrap() + 10;
        for number in 0..count {
            assert_eq!(lanes.arrive(0, 2 * number + 1), Next);
        }
        assert_eq!(lanes.settle(0, 2 * count) + lanes.lost(), u64::from(count));
    }
}
