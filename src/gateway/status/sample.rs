//! What is counted, at one moment; two of them are rates.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::metrics::{Counter, HandshakeOutcome, HistogramSum, LATENCY_MICROS_BOUNDS, Metrics, ShardMetrics};

/// Requests for a session that were refused and are counted nowhere else.
pub(super) const REFUSED: [HandshakeOutcome; 4] = [
    HandshakeOutcome::BadRequest,
    HandshakeOutcome::Unauthorized,
    HandshakeOutcome::Forbidden,
    HandshakeOutcome::Draining,
];

/// What is counted at one moment.
pub(super) struct Sample {
    at: Instant,
    cpu: Duration,
    counts: [(&'static str, u64); 9],
    /// Microseconds that each shard's turns took.
    turns: Vec<u64>,
    /// From accepted to written.
    written: HistogramSum<{ LATENCY_MICROS_BOUNDS.len() }>,
}

impl Sample {
    /// Reads every counter once: about a microsecond a shard.
    pub(super) fn take(metrics: &Metrics, at: Instant) -> Self {
        let engine = &metrics.engine;
        let sum = |pick: fn(&ShardMetrics) -> &Counter| metrics.sum(pick);
        let refused: u64 = REFUSED.iter().map(|outcome| engine.handshakes.of(*outcome).value()).sum();
        let counts = [
            ("publishes", engine.publishes.total()),
            ("deliveries", metrics.histogram(|shard| &shard.write_frames).sum),
            ("writes", sum(|shard| &shard.writes)),
            ("written_bytes", sum(|shard| &shard.written_bytes)),
            ("read_bytes", sum(|shard| &shard.read_bytes)),
            ("inbound_messages", metrics.shards().map(|shard| shard.inbound_messages.total()).sum()),
            ("handshakes", engine.handshakes.total()),
            ("ended", metrics.shards().map(|shard| shard.ended_sessions.total()).sum()),
            ("refused", engine.refusals.total() + refused),
        ];
        let turns = metrics.shards().map(|shard| shard.turn_micros.sum().sum).collect();
        let written = metrics.histogram(|shard| &shard.written_micros);
        Self { at, cpu: cpu_time(), counts, turns, written }
    }

    /// Seconds from `before` to this one.
    pub(super) fn seconds_since(&self, before: &Self) -> f64 {
        (self.at - before.at).as_secs_f64()
    }

    /// How much of each there was in a second.
    pub(super) fn rates(&self, before: &Self) -> Value {
        let seconds = self.seconds_since(before);
        let rate = |((name, now), (_, then)): (&(&str, u64), &(&str, u64))| {
            ((*name).to_owned(), rounded(share(now.wrapping_sub(*then), seconds)).into())
        };
        Value::Object(self.counts.iter().zip(&before.counts).map(rate).collect())
    }

    /// How long frames took from accepted to written; null where nothing was.
    pub(super) fn latency(&self, before: &Self) -> Value {
        let interval = self.written.since(&before.written);
        json!({ "p50": interval.quantile(0.5), "p99": interval.quantile(0.99), "count": interval.count() })
    }

    /// How many processors the whole process kept busy.
    pub(super) fn cpu_share(&self, before: &Self) -> f64 {
        let seconds = self.seconds_since(before);
        let spent = self.cpu.saturating_sub(before.cpu).as_secs_f64();
        if seconds > 0.0 { rounded(spent / seconds) } else { 0.0 }
    }

    /// Every shard: how much of its time it was in turns, and what it holds.
    pub(super) fn shards(&self, metrics: &Metrics, before: &Self) -> Value {
        let micros = self.seconds_since(before) * 1e6;
        let turns = self.turns.iter().zip(&before.turns).map(|(now, then)| now.wrapping_sub(*then));
        let row = |(shard, turns): (&ShardMetrics, u64)| {
            json!({
                "sessions": shard.sessions.value(),
                "busy_share": rounded(share(turns, micros).min(1.0)),
                "queue_bytes": shard.queue_bytes.value(),
                "inbox_posts": shard.inbox_posts.value(),
            })
        };
        metrics.shards().zip(turns).map(row).collect()
    }
}

/// CPU time of all threads of the process.
fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

#[expect(clippy::cast_precision_loss, reason = "for people, who see three digits of it")]
fn share(count: u64, of: f64) -> f64 {
    if of > 0.0 { count as f64 / of } else { 0.0 }
}

/// To three places.
pub(super) fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{InboundKind, PublishOutcome, Refusal};

    #[test]
    fn two_samples_are_rates_a_second() {
        let metrics = Metrics::new(2);
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start")]
        let start = Instant::now();
        let before = Sample::take(&metrics, start);
        metrics.engine.publishes.of(PublishOutcome::Delivered).add(10);
        metrics.engine.publishes.of(PublishOutcome::Overloaded).add(2);
        metrics.engine.refusals.of(Refusal::Tabs).add(4);
        metrics.engine.handshakes.of(HandshakeOutcome::LimitReached).add(4);
        metrics.engine.handshakes.of(HandshakeOutcome::Unauthorized).add(2);
        metrics.shard(0).write_frames.record(16);
        metrics.shard(1).write_frames.record(4);
        metrics.shard(1).writes.add(2);
        metrics.shard(1).written_micros.record(50);
        metrics.shard(1).inbound_messages.of(InboundKind::Message).add(3);
        metrics.shard(1).turn_micros.record(500_000);
        metrics.shard(1).sessions.store(7);
        let after = Sample::take(&metrics, start + Duration::from_secs(2));
        let rates = after.rates(&before);
        assert_eq!(rates["publishes"], 6.0);
        assert_eq!(rates["deliveries"], 10.0);
        assert_eq!(rates["writes"], 1.0);
        assert_eq!(rates["inbound_messages"], 1.5);
        assert_eq!(rates["handshakes"], 3.0);
        assert_eq!(rates["refused"], 3.0, "a limit counts once");
        let shards = after.shards(&metrics, &before);
        assert_eq!((&shards[0]["busy_share"], &shards[1]["busy_share"]), (&json!(0.0), &json!(0.25)));
        assert_eq!(shards[1]["sessions"], 7);
        assert_eq!(after.latency(&before), json!({ "p50": 25, "p99": 49, "count": 1 }));
        assert_eq!(after.latency(&after), json!({ "p50": null, "p99": null, "count": 0 }));
        let share = after.cpu_share(&before);
        assert!((0.0..10.0).contains(&share), "{share}");
        // Two at one moment are no rate.
        assert_eq!(after.rates(&after)["publishes"], 0.0);
        assert_eq!(after.cpu_share(&after), 0.0);
    }
}
