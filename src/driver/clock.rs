//! The one place that reads clocks for the core.

use std::time::{Instant, SystemTime};

use crate::proto::event::Timestamp;

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
