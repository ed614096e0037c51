//! What is counted between nodes.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::metrics::SharedCounter;

/// A level that any thread writes.
///
/// # Ordering
/// Relaxed: a statistic, publishes nothing.
#[derive(Debug, Default)]
pub struct SharedGauge(AtomicU64);

impl SharedGauge {
    /// Replaces the level.
    pub fn store(&self, level: u64) {
        self.0.store(level, Ordering::Relaxed);
    }

    /// The level now.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a broker between processes counts.
#[derive(Debug, Default)]
pub struct BrokerMetrics {
    /// Frames of streams that were published for whoever holds them.
    pub stream_frames: SharedCounter,
    /// Frames that went to other nodes, packed.
    pub packed_frames: SharedCounter,
    /// Messages that they were packed into.
    pub packed_messages: SharedCounter,
    /// Frames that came from other nodes.
    pub received_frames: SharedCounter,
    /// Messages from other nodes that never came, known by their numbers.
    pub lost_messages: SharedCounter,
    /// Messages, or frames of streams, that came twice and were dropped.
    pub doubled_messages: SharedCounter,
    /// Messages that could not be read.
    pub unreadable_messages: SharedCounter,
    /// Frames from other nodes that found no room here, also after waiting.
    pub dropped_frames: SharedCounter,
    /// Frames that found no room in the spool.
    pub refused_frames: SharedCounter,
    /// Frames for a node that was gone before it took them.
    pub undeliverable_frames: SharedCounter,
    /// Commands that the server refused.
    pub refused_commands: SharedCounter,
    /// Times that a connection was lost or could not be made.
    pub failures: SharedCounter,
    /// Times that everything was subscribed anew.
    pub resubscriptions: SharedCounter,
    /// Bytes that wait for the server.
    pub spool_bytes: SharedGauge,
    /// Nodes that are alive, this one included.
    pub nodes: SharedGauge,
    /// How long the last message to oneself took, in microseconds.
    pub canary_micros: SharedGauge,
}
