//! When a frame was accepted, in four bytes of its header.

use std::num::NonZeroU32;
use std::sync::OnceLock;
use std::time::Instant;

use triomphe::Arc;

use super::Frame;

/// Where the count of microseconds begins: at the first moment that this process asked for.
static BEGINNING: OnceLock<Instant> = OnceLock::new();

/// A moment in microseconds, of which 32 bits are kept: two of them tell the time between them as long as that is under
/// 35 minutes. All moments of a process have one beginning, so that a frame may pass from one engine to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment(NonZeroU32);

const _: () = assert!(size_of::<Option<Moment>>() == 4, "what a frame pays for it");

impl Moment {
    /// The moment of `now`.
    #[must_use]
    pub fn at(now: Instant) -> Self {
        let beginning = *BEGINNING.get_or_init(|| now);
        let since = |later: Instant, earlier| kept(later.saturating_duration_since(earlier).as_micros());
        // One of the two is nothing. A count of 0 would say that there is no moment, and becomes 1.
        let micros = since(now, beginning).wrapping_sub(since(beginning, now));
        Self(NonZeroU32::new(micros).unwrap_or(NonZeroU32::MIN))
    }

    /// Microseconds from `earlier` until now; none if that is later.
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    /// use tabcast::proto::frame::Moment;
    /// # #[expect(clippy::disallowed_methods, reason = "an arbitrary start")]
    /// let accepted = Instant::now();
    /// let written = Moment::at(accepted + Duration::from_millis(3));
    /// assert!((2_999..=3_001).contains(&written.micros_since(Moment::at(accepted))));
    /// assert_eq!(Moment::at(accepted).micros_since(written), 0);
    /// ```
    #[must_use]
    #[inline]
    pub const fn micros_since(self, earlier: Self) -> u64 {
        let micros = self.0.get().wrapping_sub(earlier.0.get());
        // The upper half of the circle is what lies before.
        if micros > u32::MAX / 2 { 0 } else { micros as u64 }
    }
}

/// The 32 bits that are kept.
#[expect(clippy::cast_possible_truncation, reason = "the count goes round on purpose")]
const fn kept(micros: u128) -> u32 {
    micros as u32
}

impl Frame {
    /// Notes when it was accepted for publishing, unless somebody else holds it already: from then on it is timed.
    pub fn accept(&mut self, at: Moment) {
        self.0.with_arc_mut(|frame| {
            if let Some(frame) = Arc::get_mut(frame) {
                frame.header_mut().accepted = Some(at);
            }
        });
    }

    /// When it was accepted by this node; None for what nobody published: answers, notices, control frames.
    #[must_use]
    #[inline]
    pub fn accepted(&self) -> Option<Moment> {
        self.header().accepted
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn time_goes_on_where_the_count_begins_anew() {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start")]
        let start = Instant::now();
        let check = |from: Duration, until: Duration, expected: u64| {
            let (from, until) = (Moment::at(start + from), Moment::at(start + until));
            let micros = until.micros_since(from);
            assert!(micros.abs_diff(expected) <= 1, "{from:?} to {until:?}: {micros}");
        };
        check(Duration::ZERO, Duration::from_micros(7), 7);
        check(Duration::from_secs(4_000), Duration::from_secs(4_001), 1_000_000);
        let last = Duration::from_micros(u64::from(u32::MAX));
        check(last, last + Duration::from_millis(5), 5_000);
        check(Duration::from_secs(2), Duration::from_secs(1), 0);
        if let Some(before) = start.checked_sub(Duration::from_millis(20)) {
            assert!(Moment::at(start).micros_since(Moment::at(before)).abs_diff(20_000) <= 1);
        }
    }

    #[test]
    fn a_frame_that_others_hold_is_not_changed() {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start")]
        let (first, second) = (Moment::at(Instant::now()), Moment::at(Instant::now() + Duration::from_secs(1)));
        let mut frame = Frame::text("x");
        assert_eq!(frame.accepted(), None);
        frame.accept(first);
        let mut clone = frame.clone();
        clone.accept(second);
        assert_eq!((frame.accepted(), clone.accepted()), (Some(first), Some(first)));
    }
}
