//! Counters, gauges and histograms: plain atomics, written where things happen and summed when somebody asks.
//!
//! What a shard counts lies in its own block ([`ShardMetrics`]), written by its thread only, so that a delivery touches
//! no line that another thread writes. What many threads count ([`EngineMetrics`]) is counted once an event or once a
//! request, never once a tab. Labels are closed enums: no name that a peer chose ever becomes a series.

mod broker;
mod edge;
mod engine;
mod histogram;
mod label;
mod shard;
pub mod streams;
mod value;

use std::sync::Arc;

pub use crate::metrics::broker::BrokerMetrics;
pub use crate::metrics::edge::{Refusal, StatusClass, TlsHandshake};
pub use crate::metrics::engine::{DeflateMetrics, EncodeKind, EngineMetrics, HandshakeOutcome};
pub use crate::metrics::engine::{PublishOutcome, StreamEnd, WorkerOutcome};
pub use crate::metrics::histogram::{Histogram, HistogramSum};
pub use crate::metrics::label::{Label, PerLabel};
pub use crate::metrics::shard::{InboundKind, LATENCY_MICROS_BOUNDS, LatencyHistogram, QUEUE_BYTES_BOUNDS};
pub use crate::metrics::shard::{QUEUE_FRAMES_BOUNDS, ShardMetrics, TURN_MICROS_BOUNDS, WRITE_FRAMES_BOUNDS};
pub use crate::metrics::value::{Add, Counter, Gauge, Reading, SharedCounter, SharedGauge};

/// All metrics of an engine: the process-wide block and one block a shard.
#[derive(Debug)]
pub struct Metrics {
    /// What any thread counts.
    pub engine: EngineMetrics,
    shards: Box<[Arc<ShardMetrics>]>,
}

impl Metrics {
    /// Zeroed metrics for `shards` shards.
    #[must_use]
    pub fn new(shards: usize) -> Self {
        Self { engine: EngineMetrics::default(), shards: (0..shards).map(|_| Arc::default()).collect() }
    }

    /// The block of shard `index`, to be kept by its thread.
    ///
    /// # Panics
    /// If there is no such shard.
    #[must_use]
    pub fn shard(&self, index: usize) -> Arc<ShardMetrics> {
        Arc::clone(&self.shards[index])
    }

    /// Every shard's block.
    pub fn shards(&self) -> impl Iterator<Item = &ShardMetrics> {
        self.shards.iter().map(AsRef::as_ref)
    }

    /// One reading, summed over all shards.
    ///
    /// ```
    /// let metrics = tabcast::metrics::Metrics::new(2);
    /// metrics.shard(0).sessions.store(3);
    /// metrics.shard(1).sessions.store(4);
    /// assert_eq!(metrics.sum(|shard| &shard.sessions), 7);
    /// ```
    pub fn sum<R: Reading>(&self, pick: impl Fn(&ShardMetrics) -> &R) -> u64 {
        self.shards().map(|shard| pick(shard).reading()).sum()
    }

    /// One histogram, summed over all shards.
    ///
    /// ```
    /// let metrics = tabcast::metrics::Metrics::new(2);
    /// metrics.shard(0).written_micros.record(80);
    /// metrics.shard(1).written_micros.record(90);
    /// let written = metrics.histogram(|shard| &shard.written_micros);
    /// assert_eq!((written.count(), written.quantile(1.0)), (2, Some(100)));
    /// ```
    pub fn histogram<const N: usize>(&self, pick: impl Fn(&ShardMetrics) -> &Histogram<N>) -> HistogramSum<N> {
        let mut total = pick(&ShardMetrics::default()).sum();
        self.shards().for_each(|shard| pick(shard).add_to(&mut total));
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::disconnect::Disconnect;
    use crate::proto::frame::{Class, Kind};

    #[test]
    fn every_label_has_its_own_place_and_name() {
        fn check<L: Label>() {
            let names: std::collections::HashSet<&str> = L::VALUES.iter().map(|l| l.name()).collect();
            assert_eq!(names.len(), L::VALUES.len());
            for (place, label) in L::VALUES.iter().enumerate() {
                assert_eq!(label.index(), place, "{}", label.name());
            }
        }
        check::<Disconnect>();
        check::<Kind>();
        check::<Class>();
        check::<InboundKind>();
        check::<EncodeKind>();
        check::<PublishOutcome>();
        check::<StreamEnd>();
        check::<HandshakeOutcome>();
        check::<Refusal>();
        check::<StatusClass>();
        check::<WorkerOutcome>();
        check::<TlsHandshake>();
    }

    #[test]
    fn counts_are_summed_over_shards() {
        let metrics = Metrics::new(3);
        for (index, shard) in metrics.shards().enumerate() {
            shard.writes.add(index as u64 + 1);
            shard.ended_sessions.of(Disconnect::SlowConsumer).increment();
        }
        assert_eq!(metrics.sum(|s| &s.writes), 6);
        assert_eq!(metrics.sum(|s| s.ended_sessions.of(Disconnect::SlowConsumer)), 3);
        assert_eq!(metrics.sum(|s| s.ended_sessions.of(Disconnect::Kicked)), 0);
        assert_eq!(metrics.shard(0).ended_sessions.total(), 1);
    }

    #[test]
    fn blocks_of_two_shards_share_no_line() {
        assert_eq!(align_of::<ShardMetrics>(), 128);
        assert_eq!(size_of::<ShardMetrics>() % 128, 0);
    }

    #[test]
    fn status_codes_have_a_class() {
        for (status, class) in [(101, "1xx"), (200, "2xx"), (304, "3xx"), (429, "4xx"), (503, "5xx"), (0, "5xx")] {
            assert_eq!(StatusClass::of(status).name(), class);
        }
    }
}
