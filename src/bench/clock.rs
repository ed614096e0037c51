//! The one place that reads a clock.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Nanoseconds since the first call, plus one: never 0.
#[expect(clippy::disallowed_methods, reason = "this is an edge of the process")]
pub(super) fn nanos() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = START.get_or_init(Instant::now);
    nanos_of(start.elapsed()) + 1
}

/// Whole nanoseconds, for 584 years.
pub(super) fn nanos_of(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
