//! What clients have begun to send: one byte budget for all of it.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The byte budget of messages from clients that are not complete yet, of all shards together.
///
/// # Ordering
/// Relaxed: a bound, publishes nothing.
#[derive(Debug)]
pub(crate) struct Incomplete {
    bytes: AtomicUsize,
    bytes_max: usize,
}

impl Incomplete {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { bytes: AtomicUsize::new(0), bytes_max }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// A session's share becomes `after`. False if that is more than there is: then it has none any more.
    #[must_use]
    pub(crate) fn resize(&self, before: usize, after: usize) -> bool {
        let Some(more) = after.checked_sub(before) else {
            self.release(before - after);
            return true;
        };
        // A message that came whole holds nothing, and touches nothing that shards share.
        let is_within = more == 0 || self.bytes.fetch_add(more, Ordering::Relaxed) + more <= self.bytes_max;
        if !is_within {
            self.release(after);
        }
        is_within
    }

    pub(crate) fn release(&self, bytes: usize) {
        if bytes > 0 {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}
