//! `/metrics`: what is counted, as the text that Prometheus scrapes (OpenMetrics 1.0).

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::EncodeMetric;
use prometheus_client::encoding::NoLabelSet;
use prometheus_client::encoding::text;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::metrics::BrokerMetrics;
use crate::metrics::Histogram;
use crate::metrics::Label;
use crate::metrics::Metrics;
use crate::metrics::PerLabel;
use crate::metrics::Reading;
use crate::metrics::ShardMetrics;

/// The `Content-Type` of [`MetricsText::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Renders an engine's metrics, all shards summed.
#[derive(Debug)]
pub struct MetricsText {
    registry: Registry,
}

impl MetricsText {
    /// Over the metrics of one engine, and of its broker if that counts.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>, broker: Option<Arc<BrokerMetrics>>) -> Self {
        let mut registry = Registry::with_prefix("tabcast");
        registry.register_collector(Box::new(Summed(metrics, broker)));
        Self { registry }
    }

    /// The text now. It reads every counter once, and costs a few dozen microseconds for each ten shards.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use tabcast::gateway::metrics_text::MetricsText;
    /// use tabcast::metrics::Metrics;
    ///
    /// let metrics = Arc::new(Metrics::new(2));
    /// metrics.shard(0).sessions.store(3);
    /// assert!(MetricsText::new(metrics, None).render().contains("\ntabcast_sessions 3\n"));
    /// ```
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::with_capacity(8 << 10);
        match text::encode(&mut text, &self.registry) {
            Ok(()) => text,
            // Writing into a string cannot fail; an empty scrape is better than a panic if it ever does.
            Err(fmt::Error) => String::new(),
        }
    }
}

#[derive(Debug)]
struct Summed(Arc<Metrics>, Option<Arc<BrokerMetrics>>);

impl Collector for Summed {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page { encoder, metrics: &self.0 };
        page.sessions()?;
        page.frames()?;
        page.inbound()?;
        page.engine()?;
        self.1.as_deref().map_or(Ok(()), |broker| page.broker(broker))
    }
}

struct Page<'e, 'm> {
    encoder: DescriptorEncoder<'e>,
    metrics: &'m Metrics,
}

impl Page<'_, '_> {
    fn sessions(&mut self) -> fmt::Result {
        let shards = self.metrics.shards().count() as u64;
        self.gauge("shards", "Shards of this node", shards)?;
        self.summed_gauge("sessions", "Sessions held now", |s| &s.sessions)?;
        let ended = "Sessions ended, by reason";
        self.by_label("ended_sessions", ended, "reason", |metrics, reason| {
            metrics.sum(|s| s.ended_sessions.of(reason))
        })?;
        let discarded = "Frames that waited for a session when it was cut or lost, by why it ended";
        self.by_label("discarded_frames", discarded, "reason", |metrics, reason| {
            metrics.sum(|s| s.discarded_frames.of(reason))
        })?;
        self.summed_gauge("queue_frames", "Frames that wait in sessions' queues now", |s| &s.queue_frames)?;
        let bytes = "Bytes that wait in sessions' queues now, shared frames counted in each";
        self.summed_gauge("queue_bytes", bytes, |s| &s.queue_bytes)?;
        let entries = "Bytes that queues hold beside their frames now";
        self.summed_gauge("queue_entry_bytes", entries, |s| &s.queue_entry_bytes)?;
        let sealed = "Bytes encrypted for connections which do not take them yet";
        self.summed_gauge("tls_sealed_bytes", sealed, |s| &s.sealed_bytes)?;
        self.by_label("tls_handshakes", "TLS handshakes, by outcome", "outcome", |metrics, outcome| {
            metrics.sum(|s| s.tls_handshakes.of(outcome))
        })?;
        self.summed_gauge("inbox_posts", "Posts that wait in shards' inboxes now", |s| &s.inbox_posts)?;
        self.summed_gauge("inbox_bytes", "Bytes that wait in shards' inboxes now", |s| &s.inbox_bytes)?;
        self.histogram("turn_micros", "How long shards' turns took, in microseconds", |s| &s.turn_micros)?;
        let posted = "From when a frame was accepted until a shard took it from its inbox, in microseconds";
        self.histogram("accepted_to_posted_micros", posted, |s| &s.posted_micros)?;
        let written = "From when the oldest frame of a write was accepted until the kernel had it, in microseconds";
        self.histogram("accepted_to_written_micros", written, |s| &s.written_micros)?;
        self.summed("unfinished_turns", "Turns that ended with work left over", |s| &s.unfinished_turns)
    }

    fn broker(&mut self, broker: &BrokerMetrics) -> fmt::Result {
        let counters = [
            ("broker_stream_frames", "Frames of streams published for whoever holds them", &broker.stream_frames),
            ("broker_packed_frames", "Frames that went to other nodes", &broker.packed_frames),
            ("broker_packed_messages", "Messages that they were packed into", &broker.packed_messages),
            ("broker_received_frames", "Frames that came from other nodes", &broker.received_frames),
            ("broker_lost_messages", "Messages of other nodes that never came", &broker.lost_messages),
            ("broker_doubled_messages", "Messages that came twice and were dropped", &broker.doubled_messages),
            ("broker_unreadable_messages", "Messages that could not be read", &broker.unreadable_messages),
            ("broker_dropped_frames", "Frames of other nodes that found no room here", &broker.dropped_frames),
            ("broker_refused_frames", "Frames that found no room in the spool", &broker.refused_frames),
            ("broker_undeliverable_frames", "Frames for nodes that were gone", &broker.undeliverable_frames),
            ("broker_refused_commands", "Commands that Redis refused", &broker.refused_commands),
            ("broker_failures", "Times that Redis was not reached", &broker.failures),
            ("broker_resubscriptions", "Times that everything was subscribed anew", &broker.resubscriptions),
        ];
        counters.iter().try_for_each(|(name, help, counter)| self.counter(name, help, counter.value()))?;
        self.gauge("broker_spool_bytes", "Bytes that wait for Redis now", broker.spool_bytes.value())?;
        self.gauge("broker_nodes", "Nodes that are alive", broker.nodes.value())?;
        let canary = "How long the last message to oneself took, in microseconds";
        self.gauge("broker_canary_micros", canary, broker.canary_micros.value())
    }

    fn frames(&mut self) -> fmt::Result {
        self.summed("offered_frames", "Frames offered to sessions' queues", |s| &s.offered_frames)?;
        self.summed("delivered_writes", "Writes that the kernel took", |s| &s.writes)?;
        self.summed("written_bytes", "Bytes that the kernel took", |s| &s.written_bytes)?;
        self.summed("partial_writes", "Writes of which the kernel took only a part", |s| &s.partial_writes)?;
        self.histogram("write_frames", "Frames that went out in one write", |s| &s.write_frames)?;
        let coalesced = "Frames that replaced a queued one of the same key";
        self.summed("coalesced_frames", coalesced, |s| &s.coalesced_frames)?;
        let dropped = "Typing frames that a full queue had no room for";
        self.summed("dropped_typing_frames", dropped, |s| &s.dropped_typing_frames)
    }

    fn inbound(&mut self) -> fmt::Result {
        self.summed("read_bytes", "Bytes read from sessions' sockets", |s| &s.read_bytes)?;
        self.by_label(
            "inbound_messages",
            "Frames from browsers that were understood, by kind",
            "kind",
            |metrics, kind| metrics.sum(|s| s.inbound_messages.of(kind)),
        )?;
        let limited = "Frames from browsers that were refused because too many came in the time, or too much";
        self.summed("limited_frames", limited, |s| &s.limited_frames)?;
        self.summed("bad_frames", "Frames from browsers that were refused", |s| &s.bad_frames)
    }

    fn engine(&mut self) -> fmt::Result {
        let engine = &self.metrics.engine;
        self.family("encodes_events", "Events serialised, by kind", "kind", &engine.encodes)?;
        let deflates = &engine.deflates;
        let compressed = [
            ("deflated_frames", "Frames that got a compressed form, once for all tabs", &deflates.frames),
            ("deflated_json_bytes", "Bytes of their JSON", &deflates.json_bytes),
            ("deflated_form_bytes", "Bytes of their compressed forms", &deflates.form_bytes),
        ];
        compressed.iter().try_for_each(|(name, help, counter)| self.counter(name, help, counter.value()))?;
        self.family("publishes_events", "Publishes, by outcome", "outcome", &engine.publishes)?;
        let waited = "Publishes that had to wait for room in an inbox";
        self.counter("waited_publishes", waited, engine.waited_publishes.value())?;
        let refused = "Frames from other nodes for which there was no room here";
        self.counter("refused_forwards", refused, engine.refused_forwards.value())?;
        self.gauge("streams", "Streams that have not ended", engine.streams.value())?;
        let kept = "Memory of what is kept of users and streams";
        self.gauge("recovery_bytes", kept, engine.recovery_bytes.value())?;
        self.family("ended_streams", "Streams that have ended, by why", "reason", &engine.ended_streams)?;
        let typing = "Typing frames that a full mailbox had no room for";
        self.counter("dropped_mailbox_typing_frames", typing, engine.dropped_mailbox_typing_frames.value())?;
        self.family("handshakes_requests", "Requests for a session, by outcome", "outcome", &engine.handshakes)?;
        self.family("refusals", "What was refused at the edge, by reason", "reason", &engine.refusals)?;
        let evicted = "Connections that were closed while they waited for a request, to make room";
        self.counter("evicted_connections", evicted, engine.evicted_connections.value())?;
        self.family(
            "http_responses",
            "HTTP responses, by the class of their status",
            "status",
            &engine.http_responses,
        )?;
        let worker = "Messages for the worker, by outcome";
        self.family("worker_messages", worker, "outcome", &engine.worker_messages)?;
        let streams = &engine.streams_of_workers;
        let counters = [
            ("worker_stream_appended_messages", "Messages appended to workers' stream", &streams.appended),
            ("worker_stream_failed_messages", "Messages that were not", &streams.append_failures),
            ("worker_stream_read_entries", "Entries of workers that were read", &streams.read),
            ("worker_stream_handed_off_entries", "Entries handed to the engine", &streams.handed_off),
            ("worker_stream_doubled_entries", "Entries with the key of an earlier one", &streams.doubled),
            ("worker_stream_dead_entries", "Entries that were set aside", &streams.dead),
            ("worker_stream_acked_entries", "Entries that were acknowledged", &streams.acked),
            ("worker_stream_takeovers", "How often this node began to read", &streams.takeovers),
        ];
        counters.iter().try_for_each(|(name, help, counter)| self.counter(name, help, counter.value()))
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let encoder = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(value).encode(encoder)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let encoder = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(encoder)
    }

    fn summed<R: Reading>(&mut self, name: &str, help: &str, pick: impl Fn(&ShardMetrics) -> &R) -> fmt::Result {
        self.counter(name, help, self.metrics.sum(pick))
    }

    fn summed_gauge<R: Reading>(&mut self, name: &str, help: &str, pick: impl Fn(&ShardMetrics) -> &R) -> fmt::Result {
        self.gauge(name, help, self.metrics.sum(pick))
    }

    fn by_label<L: Label>(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        value: impl Fn(&Metrics, L) -> u64,
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for of in L::VALUES {
            let labels = [(label, of.name().replace(' ', "_"))];
            ConstCounter::new(value(self.metrics, *of)).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn family<L: Label, C: Reading, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        counters: &PerLabel<L, C, N>,
    ) -> fmt::Result {
        self.by_label(name, help, label, |_, of| counters.of(of).reading())
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus counts in floats")]
    fn histogram<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        pick: impl Fn(&ShardMetrics) -> &Histogram<N>,
    ) -> fmt::Result {
        let total = self.metrics.histogram(pick);
        let mut buckets: Vec<(f64, u64)> =
            total.bounds.iter().zip(total.counts).map(|(b, count)| (*b as f64, count)).collect();
        buckets.push((f64::INFINITY, total.over));
        let count = total.count();
        let mut encoder = self.encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        encoder.encode_histogram::<NoLabelSet>(total.sum as f64, count, &buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use crate::metrics::EncodeKind;
    use crate::metrics::InboundKind;
    use crate::metrics::PublishOutcome;
    use crate::proto::disconnect::Disconnect;

    use super::*;

    /// Reads the text as a scraper does: names and labels to values. Panics where it is not well formed.
    fn parse(text: &str) -> HashMap<String, f64> {
        assert!(text.ends_with("# EOF\n"), "{text}");
        let mut series = HashMap::new();
        let mut described = Vec::new();
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                described.extend(comment.strip_prefix("TYPE ").map(|rest| rest.split(' ').next().unwrap().to_owned()));
                continue;
            }
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(described.iter().any(|family| name.starts_with(family.as_str())), "{line}");
            assert!(series.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{line} is there twice");
        }
        series
    }

    #[test]
    fn the_text_has_every_sum_under_its_name() {
        let metrics = Arc::new(Metrics::new(2));
        for at in 0..2u64 {
            let shard = metrics.shard(usize::from(at == 1));
            shard.sessions.store(at + 1);
            shard.offered_frames.add(10);
            shard.ended_sessions.of(Disconnect::SlowConsumer).add(2);
            shard.inbound_messages.of(InboundKind::Button).increment();
            shard.write_frames.record(3);
            shard.write_frames.record(1000);
        }
        metrics.engine.encodes.of(EncodeKind::Edit).add(5);
        metrics.engine.publishes.of(PublishOutcome::Overloaded).increment();
        let series = parse(&MetricsText::new(Arc::clone(&metrics), None).render());
        let check = |name: &str, expected: f64| assert_eq!(series.get(name), Some(&expected), "{name}: {series:#?}");
        check("tabcast_shards", 2.0);
        check("tabcast_sessions", 3.0);
        check("tabcast_offered_frames_total", 20.0);
        check("tabcast_ended_sessions_total{reason=\"slow_consumer\"}", 4.0);
        check("tabcast_ended_sessions_total{reason=\"kicked\"}", 0.0);
        check("tabcast_inbound_messages_total{kind=\"button\"}", 2.0);
        check("tabcast_encodes_events_total{kind=\"edit\"}", 5.0);
        check("tabcast_publishes_events_total{outcome=\"overloaded\"}", 1.0);
        check("tabcast_write_frames_bucket{le=\"2.0\"}", 0.0);
        check("tabcast_write_frames_bucket{le=\"4.0\"}", 2.0);
        check("tabcast_write_frames_bucket{le=\"256.0\"}", 2.0);
        check("tabcast_write_frames_bucket{le=\"+Inf\"}", 4.0);
        check("tabcast_write_frames_sum", 2006.0);
        check("tabcast_write_frames_count", 4.0);
    }

    #[test]
    fn names_and_labels_are_what_prometheus_takes() {
        let series = parse(&MetricsText::new(Arc::new(Metrics::new(1)), Some(Arc::default())).render());
        for name in series.keys() {
            let (bare, labels) = name.split_once('{').unwrap_or((name, ""));
            assert!(bare.starts_with("tabcast_"), "{name}");
            assert!(bare.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
            assert!(!labels.contains(' '), "{name}");
        }
        assert!(series.len() > 60, "{}", series.len());
    }
}
