//! The one place that reads clocks for the core.

use std::time::{Duration, Instant, SystemTime};

use crate::proto::event::Timestamp;

/// What is added to a moment is no more than this, whatever an embedder's setting says: a moment behind the end of the
/// clock's numbers would be a panic. A year.
pub(crate) const TIME_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// The monotonic clock.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the edge")]
pub fn now() -> Instant {
    Instant::now()
}

/// The wall clock, as frames carry it.
#[must_use]
pub fn wall() -> Timestamp {
    SystemTime::now().into()
}
