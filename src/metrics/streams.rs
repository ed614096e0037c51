//! What goes through the streams of workers.

use crate::metrics::SharedCounter;

/// Messages for workers, and what workers answered, where both go through streams.
#[derive(Debug, Default)]
pub struct StreamMetrics {
    /// Messages that were appended for workers.
    pub appended: SharedCounter,
    /// Messages that were not: refused, or given up after their time.
    pub append_failures: SharedCounter,
    /// Entries of workers that were read, those included that were read before by another node.
    pub read: SharedCounter,
    /// Entries that were handed to the engine.
    pub handed_off: SharedCounter,
    /// Entries that came with the key of an earlier one, and were not sent again.
    pub doubled: SharedCounter,
    /// Entries that were set aside, because they could not be read or sent.
    pub dead: SharedCounter,
    /// Entries that were acknowledged.
    pub acked: SharedCounter,
    /// How often this node began to read.
    pub takeovers: SharedCounter,
}
