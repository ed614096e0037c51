//! What is counted between nodes.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::metrics::{Histogram, LATENCY_MICROS_BOUNDS, SharedCounter, SharedGauge};

/// What a broker between processes counts.
#[derive(Debug)]
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
    /// Times that what another node said to this one before its first message here never came, or before it began anew,
    /// having given this one up: how much that was is not known.
    pub lost_beginnings: SharedCounter,
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
    /// Bytes that wait for the server. The spool counts here what its bound is for, so that it is told also while nothing
    /// leaves it.
    pub spool_bytes: Arc<SharedGauge>,
    /// Nodes that are alive, this one included.
    pub nodes: SharedGauge,
    /// How long the last message to oneself took, in microseconds.
    pub canary_micros: SharedGauge,
    /// How long messages to oneself took, in microseconds: through the spool, to the server and back.
    pub round_trip_micros: Histogram<{ LATENCY_MICROS_BOUNDS.len() }, SharedCounter>,
    /// When the broker began, and from then on in microseconds when the message to oneself was sent that came last.
    begun: OnceLock<Instant>,
    canary_sent_micros: SharedGauge,
}

impl Default for BrokerMetrics {
    fn default() -> Self {
        Self {
            stream_frames: SharedCounter::default(),
            packed_frames: SharedCounter::default(),
            packed_messages: SharedCounter::default(),
            received_frames: SharedCounter::default(),
            lost_messages: SharedCounter::default(),
            lost_beginnings: SharedCounter::default(),
            doubled_messages: SharedCounter::default(),
            unreadable_messages: SharedCounter::default(),
            dropped_frames: SharedCounter::default(),
            refused_frames: SharedCounter::default(),
            undeliverable_frames: SharedCounter::default(),
            refused_commands: SharedCounter::default(),
            failures: SharedCounter::default(),
            resubscriptions: SharedCounter::default(),
            spool_bytes: Arc::default(),
            nodes: SharedGauge::default(),
            canary_micros: SharedGauge::default(),
            round_trip_micros: Histogram::new(&LATENCY_MICROS_BOUNDS),
            begun: OnceLock::new(),
            canary_sent_micros: SharedGauge::default(),
        }
    }
}

impl BrokerMetrics {
    /// Those of a broker that begins now.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { begun: OnceLock::from(now), ..Self::default() }
    }

    /// A message to oneself came home: it was sent `sent` after the beginning, and took `time`.
    pub fn canary_came(&self, sent: Duration, time: Duration) {
        self.canary_sent_micros.store(micros(sent));
        self.canary_micros.store(micros(time));
        self.round_trip_micros.record(micros(time));
    }

    /// How long ago that message to oneself was sent which came home last, or the broker began if none ever did: it grows
    /// for as long as the server does not answer.
    #[must_use]
    pub fn canary_age(&self, now: Instant) -> Duration {
        let since = self.begun.get().map_or(Duration::ZERO, |begun| now.saturating_duration_since(*begun));
        since.saturating_sub(Duration::from_micros(self.canary_sent_micros.value()))
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canary_is_the_older_the_longer_none_comes_home() {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start")]
        let start = Instant::now();
        let (metrics, second) = (BrokerMetrics::new(start), Duration::from_secs(1));
        assert_eq!(metrics.canary_age(start + 3 * second), 3 * second, "none ever came");
        metrics.canary_came(4 * second, second / 1_000);
        assert_eq!(metrics.canary_age(start + 5 * second), second);
        assert_eq!(metrics.canary_age(start + 64 * second), 60 * second);
        assert_eq!((metrics.canary_micros.value(), metrics.round_trip_micros.sum().count()), (1_000, 1));
        assert_eq!(BrokerMetrics::default().canary_age(start), Duration::ZERO, "it has not begun");
    }
}
