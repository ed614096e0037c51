//! How much a session has sent lately: a bucket for frames and one for bytes, which leak by the limits per second.

use crate::proto::limits::{INBOUND_BURST_SECONDS, SessionLimits};

/// The levels of both buckets at a tick, of a second each.
///
/// It holds at most what is allowed in [`INBOUND_BURST_SECONDS`], and the message that came last: whatever is not full
/// takes any.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Allowance {
    tick: u32,
    frames: u32,
    bytes: u32,
}

const _: () = assert!(size_of::<Allowance>() == 12, "what a session costs more for its limits per second");

impl Allowance {
    /// Takes so many frames and bytes at `tick`. False if there was no room: nothing was taken.
    pub(crate) fn take(&mut self, tick: u64, frames: u32, bytes: usize, limits: &SessionLimits) -> bool {
        let (frames_rate, bytes_rate) =
            (rate(limits.inbound_messages_per_second_max), rate(limits.inbound_bytes_per_second_max));
        if frames_rate == 0 && bytes_rate == 0 {
            return true;
        }
        let tick = u32::try_from(tick).unwrap_or(u32::MAX);
        let passed = tick - self.tick.min(tick);
        self.tick = tick;
        self.frames = self.frames.saturating_sub(passed.saturating_mul(frames_rate));
        self.bytes = self.bytes.saturating_sub(passed.saturating_mul(bytes_rate));
        let is_full = |level: u32, rate: u32| rate > 0 && level >= rate * INBOUND_BURST_SECONDS;
        if is_full(self.frames, frames_rate) || is_full(self.bytes, bytes_rate) {
            return false;
        }
        self.frames = self.frames.saturating_add(frames);
        self.bytes = self.bytes.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        true
    }
}

/// A limit per second, so that what is allowed at once fits as well.
fn rate(limit: usize) -> u32 {
    u32::try_from(limit).unwrap_or(u32::MAX).min(u32::MAX >> 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of frames of `bytes` each at the given ticks, so many are taken.
    #[track_caller]
    fn check(
        (frames_max, bytes_max): (usize, usize),
        bytes: usize,
        at: impl IntoIterator<Item = u64>,
        expected: usize,
    ) {
        let limits = SessionLimits {
            inbound_messages_per_second_max: frames_max,
            inbound_bytes_per_second_max: bytes_max,
            ..SessionLimits::default()
        };
        let mut allowance = Allowance::default();
        let taken = at.into_iter().filter(|tick| allowance.take(*tick, 1, bytes, &limits)).count();
        assert_eq!(taken, expected, "{frames_max} {bytes_max} {bytes}");
    }

    #[test]
    fn ten_seconds_worth_at_once_and_then_the_rate() {
        check((20, 0), 1, vec![0; 1_000], 200);
        check((20, 0), 1, (0..100).flat_map(|tick| [tick; 50]), 200 + 99 * 20);
        check((20, 0), 1, (0..100).flat_map(|tick| [tick; 20]), 2_000);
        // Silence is saved up, and no longer than that.
        check((20, 0), 1, [vec![0; 1_000], vec![5; 1_000], vec![1_000_000; 1_000]].concat(), 200 + 100 + 200);
    }

    #[test]
    fn bytes_have_a_limit_of_their_own_and_an_empty_bucket_takes_any_message() {
        check((0, 1_000), 2_500, vec![0; 100], 4);
        check((0, 1_000), 1 << 30, [0, 0, 1, 9_999], 1);
        check((0, 1_000), 1 << 30, [0, 2_000_000], 2);
        check((1_000, 1_000), 5_000, vec![0; 100], 2);
        check((2, 1 << 20), 1, vec![0; 100], 20);
    }

    #[test]
    fn without_limits_and_with_endless_ones_everything_is_taken() {
        check((0, 0), usize::MAX, vec![0; 100], 100);
        check((usize::MAX, usize::MAX), 1 << 20, vec![0; 100], 100);
        check((1, 1), 0, (u64::from(u32::MAX) - 1..).step_by(1 << 33).take(3), 3);
    }
}
