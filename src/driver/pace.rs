//! How fast a client takes what is written to it, and when it has been too slow for too long.

use std::time::{Duration, Instant};

use crate::driver::clock;

/// A client's patience account: time is taken from it while bytes wait to be written, and every byte that the client
/// takes adds to it, up to what it began with. A client to which nothing is to be written is never slow.
///
/// So one that takes nothing has `patience`, one that is faster than the least rate has it for ever, and one that is
/// slower runs out of it, however cleverly it spreads its bytes over time, responses and requests.
#[derive(Debug)]
pub(super) struct Pace {
    patience: Duration,
    /// 0: any byte is worth the whole patience.
    bytes_per_second_min: usize,
    /// What is left of the patience, as of `since` while bytes wait.
    left: Duration,
    /// Bytes wait, and none was taken since then.
    since: Option<Instant>,
    /// Bytes that have been counted.
    written: u64,
}

impl Pace {
    /// A client with all its patience, [`clock::TIME_MAX`] at most.
    pub(super) fn new(patience: Duration, bytes_per_second_min: usize) -> Self {
        let patience = patience.min(clock::TIME_MAX);
        Self { patience, bytes_per_second_min, left: patience, since: None, written: 0 }
    }

    /// Bytes wait for the client, which has taken `written` in all. Since when it has taken none of them, and when it
    /// will have run out of patience.
    pub(super) fn waits(&mut self, written: u64, now: Instant) -> (Instant, Instant) {
        let is_progress = written > self.written;
        if is_progress {
            self.settle(written, now);
        }
        let since = match self.since {
            Some(since) if !is_progress => since,
            _ => *self.since.insert(now),
        };
        (since, since + self.left)
    }

    /// No byte waits for the client any more.
    pub(super) fn flows(&mut self, written: u64, now: Instant) {
        self.settle(written, now);
        self.since = None;
    }

    fn settle(&mut self, written: u64, now: Instant) {
        let spent = self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let earned = self.worth(written - self.written);
        self.written = written;
        self.left = self.left.saturating_add(earned).saturating_sub(spent).min(self.patience);
    }

    fn worth(&self, bytes: u64) -> Duration {
        match self.bytes_per_second_min as u64 {
            _ if bytes == 0 => Duration::ZERO,
            0 => self.patience,
            rate => Duration::from_secs(bytes / rate) + Duration::from_nanos(bytes % rate * 1_000_000_000 / rate),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client with ten seconds and 1,000 bytes a second. At each second some bytes have been taken, and some still
    /// wait or none do: how many milliseconds it then has left.
    fn check(rate: usize, steps: &[(u64, u64, bool, u64)]) {
        let start = clock::now();
        let mut pace = Pace::new(Duration::from_secs(10), rate);
        for (at, written, waits, expected) in steps {
            let now = start + Duration::from_secs(*at);
            if !waits {
                pace.flows(*written, now);
            }
            let left = if *waits { pace.waits(*written, now).1 - now } else { pace.left };
            assert_eq!(left, Duration::from_millis(*expected), "{steps:?}: at {at}");
        }
    }

    #[test]
    fn who_takes_nothing_has_its_patience_and_no_more() {
        check(1_000, &[(0, 0, true, 10_000), (4, 0, true, 6_000), (10, 0, true, 0)]);
        check(0, &[(0, 5, true, 10_000), (9, 6, true, 10_000), (19, 6, true, 0)]);
    }

    #[test]
    fn who_is_slower_than_the_least_rate_runs_out_of_it() {
        // Half as fast, and a byte at a time.
        let half = [(0, 0, true, 10_000), (8, 4_000, true, 6_000), (16, 8_000, true, 2_000), (18, 8_000, true, 0)];
        check(1_000, &half);
        check(1_000, &[(0, 0, true, 10_000), (5, 1, true, 5_001), (10, 2, true, 2)]);
        // As fast, in bursts, and faster: for ever, and with no more than the whole patience afterwards.
        check(1_000, &[(0, 0, true, 10_000), (9, 9_000, true, 10_000), (18, 18_000, true, 10_000)]);
        check(1_000, &[(0, 0, true, 10_000), (9, 900_000, true, 10_000), (18, 900_000, true, 1_000)]);
    }

    #[test]
    fn only_time_in_which_bytes_wait_counts_and_no_pause_gives_it_back() {
        let pauses = [
            (0, 0, true, 10_000),
            (6, 0, false, 4_000),
            (900, 0, true, 4_000),
            (903, 0, false, 1_000),
            (950, 500, true, 1_500),
        ];
        check(1_000, &pauses);
        check(1_000, &[(0, 0, false, 10_000), (3_600, 0, true, 10_000)]);
    }

    #[test]
    fn patience_without_an_end_is_a_year() {
        let start = clock::now();
        let mut pace = Pace::new(Duration::MAX, 0);
        assert_eq!(pace.waits(0, start), (start, start + clock::TIME_MAX));
        assert_eq!(pace.waits(1, start + clock::TIME_MAX).1, start + clock::TIME_MAX * 2);
    }

    #[test]
    fn since_when_nothing_was_taken_is_known() {
        let start = clock::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(Duration::from_secs(10), 1);
        assert_eq!(pace.waits(7, at(1)).0, at(1));
        assert_eq!(pace.waits(7, at(2)).0, at(1));
        assert_eq!(pace.waits(8, at(3)).0, at(3));
        pace.flows(9, at(4));
        assert_eq!(pace.waits(9, at(5)).0, at(5));
    }
}
