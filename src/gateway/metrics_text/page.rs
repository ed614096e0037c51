//! The page: which counter stands under which name, and how each kind of them is written.

use std::fmt;
use std::time::Instant;

use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::EncodeMetric;
use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::gateway::metrics_text::Ceilings;
use crate::gateway::metrics_text::Scrape;
use crate::metrics::BrokerMetrics;
use crate::metrics::Histogram;
use crate::metrics::HistogramSum;
use crate::metrics::Label;
use crate::metrics::Metrics;
use crate::metrics::PerLabel;
use crate::metrics::Reading;
use crate::metrics::ShardMetrics;
use crate::proto::frame;
use crate::proto::frame::Kind;

/// What is written, and from what.
pub(super) struct Page<'e, 'm> {
    pub(super) encoder: DescriptorEncoder<'e>,
    pub(super) metrics: &'m Metrics,
}

impl Page<'_, '_> {
    /// Every family, in the order of the page.
    pub(super) fn write(&mut self, scrape: &Scrape) -> fmt::Result {
        self.node(scrape)?;
        self.sessions()?;
        self.shards()?;
        self.frames()?;
        self.latencies()?;
        self.inbound()?;
        self.engine()?;
        self.edge()?;
        self.worker()?;
        let broker = scrape.broker.as_deref();
        broker.map_or(Ok(()), |broker| self.broker(broker, scrape.now, scrape.ceilings.as_ref()))
    }

    fn node(&mut self, scrape: &Scrape) -> fmt::Result {
        let mut build = self.encoder.encode_descriptor("build_info", "Always 1", None, MetricType::Gauge)?;
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        ConstGauge::new(1u64).encode(build.encode_family(&version)?)?;
        let ready = "Whether the node takes traffic: 1, or 0 while it drains or Redis does not answer";
        self.gauge("ready", ready, u64::from(scrape.is_ready))?;
        let held = "Bytes of frames, and of queues beside them: what the byte budget bounds";
        let queues = self.metrics.sum(|shard| &shard.queue_entry_bytes);
        self.gauge("held_bytes", held, frame::live_bytes() as u64 + queues)?;
        let Some(ceilings) = scrape.ceilings else { return Ok(()) };
        let maxima = [
            ("sessions_max", "Sessions that the node may hold", ceilings.sessions_max),
            ("held_bytes_max", "The byte budget", ceilings.held_bytes_max),
            ("inbox_posts_max", "Posts that may wait in one shard's inbox", ceilings.inbox_posts_max),
            ("inbox_bytes_max", "Bytes that may wait in one shard's inbox", ceilings.inbox_bytes_max),
        ];
        maxima.iter().try_for_each(|(name, help, maximum)| self.gauge(name, help, *maximum as u64))
    }

    fn sessions(&mut self) -> fmt::Result {
        self.summed_gauge("sessions", "Sessions held now", |s| &s.sessions)?;
        let connections = "Connections that are no sessions (yet)";
        self.summed_gauge("http_connections", connections, |s| &s.http_connections)?;
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
        let frames = "Frames that waited for a session, sampled at its heartbeat";
        self.summed_histogram("session_queue_frames", frames, |s| &s.session_queue_frames)?;
        let bytes = "Bytes that waited for a session, sampled at its heartbeat";
        self.summed_histogram("session_queue_bytes", bytes, |s| &s.session_queue_bytes)?;
        let sealed = "Bytes encrypted for connections which do not take them yet";
        self.summed_gauge("tls_sealed_bytes", sealed, |s| &s.sealed_bytes)
    }

    /// The load of each: a label that the setting bounds.
    fn shards(&mut self) -> fmt::Result {
        self.gauge("shards", "Shards of this node", self.metrics.shards().count() as u64)?;
        self.by_shard("shard_sessions", "Sessions of the shard", MetricType::Gauge, |s| s.sessions.value())?;
        let connections = "Connections of the shard's thread that are no sessions (yet)";
        self.by_shard("shard_http_connections", connections, MetricType::Gauge, |s| s.http_connections.value())?;
        let busy = "Microseconds that the shard has spent in turns: a million a second is all of its thread";
        self.by_shard("shard_busy_micros", busy, MetricType::Counter, |s| s.turn_micros.sum().sum)?;
        let offered = "Frames offered to queues of the shard";
        self.by_shard("shard_offered_frames", offered, MetricType::Counter, |s| s.offered_frames.total())?;
        let bytes = "Bytes that wait in queues of the shard";
        self.by_shard("shard_queue_bytes", bytes, MetricType::Gauge, |s| s.queue_bytes.value())?;
        let posts = "Posts that wait in the shard's inbox";
        self.by_shard("shard_inbox_posts", posts, MetricType::Gauge, |s| s.inbox_posts.value())?;
        let bytes = "Bytes that wait in the shard's inbox";
        self.by_shard("shard_inbox_bytes", bytes, MetricType::Gauge, |s| s.inbox_bytes.value())?;
        self.summed_gauge("inbox_posts", "Posts that wait in shards' inboxes now", |s| &s.inbox_posts)?;
        self.summed_gauge("inbox_bytes", "Bytes that wait in shards' inboxes now", |s| &s.inbox_bytes)?;
        self.summed_histogram("turn_micros", "How long shards' turns took, in microseconds", |s| &s.turn_micros)?;
        self.summed("unfinished_turns", "Turns that ended with work left over", |s| &s.unfinished_turns)
    }

    fn frames(&mut self) -> fmt::Result {
        let offered = "Frames offered to sessions' queues, by kind and by what happens to it when a queue is full";
        let mut family = self.encoder.encode_descriptor("offered_frames", offered, None, MetricType::Counter)?;
        for kind in Kind::ALL {
            let labels = [("kind", kind.name()), ("class", kind.class().name())];
            let frames = self.metrics.sum(|s| s.offered_frames.of(kind));
            ConstCounter::new(frames).encode(family.encode_family(&labels)?)?;
        }
        let keep_alives = "Comments offered to silent event streams: their heartbeat";
        self.summed("keep_alives", keep_alives, |s| &s.keep_alives)?;
        self.summed("delivered_writes", "Writes that the kernel took", |s| &s.writes)?;
        self.summed("written_bytes", "Bytes that the kernel took", |s| &s.written_bytes)?;
        self.summed("partial_writes", "Writes of which the kernel took only a part", |s| &s.partial_writes)?;
        self.summed_histogram("write_frames", "Frames that went out in one write", |s| &s.write_frames)?;
        let coalesced = "Frames that replaced a queued one of the same key";
        self.summed("coalesced_frames", coalesced, |s| &s.coalesced_frames)?;
        let dropped = "Typing frames that a full queue had no room for";
        self.summed("dropped_typing_frames", dropped, |s| &s.dropped_typing_frames)
    }

    fn latencies(&mut self) -> fmt::Result {
        let posted = "From when a frame was accepted until a shard took it from its inbox, in microseconds";
        self.summed_histogram("accepted_to_posted_micros", posted, |s| &s.posted_micros)?;
        let written = "From when the oldest frame of a write was accepted until the kernel had it, in microseconds";
        self.summed_histogram("accepted_to_written_micros", written, |s| &s.written_micros)
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
            ("deflated_json_bytes", "Bytes of JSON of the frames that got one", &deflates.json_bytes),
            ("deflated_form_bytes", "Bytes of the compressed forms", &deflates.form_bytes),
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
        self.counter("dropped_mailbox_typing_frames", typing, engine.dropped_mailbox_typing_frames.value())
    }

    fn edge(&mut self) -> fmt::Result {
        let engine = &self.metrics.engine;
        self.by_label("tls_handshakes", "TLS handshakes, by outcome", "outcome", |metrics, outcome| {
            metrics.sum(|s| s.tls_handshakes.of(outcome))
        })?;
        self.family("handshakes_requests", "Requests for a session, by outcome", "outcome", &engine.handshakes)?;
        self.family("refusals", "What was refused at the edge, by reason", "reason", &engine.refusals)?;
        let evicted =
            "Connections that were closed to make room: they waited for a request, or their clients took nothing";
        self.counter("evicted_connections", evicted, engine.evicted_connections.value())?;
        self.family("http_responses", "HTTP responses, by the class of their status", "status", &engine.http_responses)
    }

    fn worker(&mut self) -> fmt::Result {
        let engine = &self.metrics.engine;
        let worker = "Messages for the worker, by outcome";
        self.family("worker_messages", worker, "outcome", &engine.worker_messages)?;
        let streams = &engine.streams_of_workers;
        let counters = [
            ("worker_stream_appended_messages", "Messages appended to workers' stream", &streams.appended),
            (
                "worker_stream_failed_messages",
                "Messages for workers' stream that were not appended",
                &streams.append_failures,
            ),
            ("worker_stream_read_entries", "Entries of workers that were read", &streams.read),
            ("worker_stream_handed_off_entries", "Entries of workers handed to the engine", &streams.handed_off),
            ("worker_stream_doubled_entries", "Entries of workers with the key of an earlier one", &streams.doubled),
            (
                "worker_stream_dead_entries",
                "Entries of workers that were set aside, as they could not be read or sent",
                &streams.dead,
            ),
            ("worker_stream_acked_entries", "Entries of workers that were acknowledged", &streams.acked),
            ("worker_stream_takeovers", "How often this node began to read what workers answer", &streams.takeovers),
        ];
        counters.iter().try_for_each(|(name, help, counter)| self.counter(name, help, counter.value()))
    }

    fn broker(&mut self, broker: &BrokerMetrics, now: Instant, ceilings: Option<&Ceilings>) -> fmt::Result {
        let counters = [
            ("broker_stream_frames", "Frames of streams published for whoever holds them", &broker.stream_frames),
            ("broker_packed_frames", "Frames that went to other nodes", &broker.packed_frames),
            (
                "broker_packed_messages",
                "Messages that frames for other nodes were packed into",
                &broker.packed_messages,
            ),
            ("broker_received_frames", "Frames that came from other nodes", &broker.received_frames),
            ("broker_lost_messages", "Messages of other nodes that never came", &broker.lost_messages),
            (
                "broker_lost_beginnings",
                "Times that it is not known how much another node said before what was heard of it first",
                &broker.lost_beginnings,
            ),
            (
                "broker_doubled_messages",
                "Messages of other nodes that came twice and were dropped",
                &broker.doubled_messages,
            ),
            (
                "broker_unreadable_messages",
                "Messages of other nodes that could not be read",
                &broker.unreadable_messages,
            ),
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
        self.gauge("broker_canary_micros", canary, broker.canary_micros.value())?;
        let trip = "How long messages to oneself took through Redis, in microseconds";
        self.histogram("broker_round_trip_micros", trip, &broker.round_trip_micros.sum())?;
        let age =
            "How long ago the message to oneself was sent that came home last: it grows while Redis does not answer";
        let encoder = self.encoder.encode_descriptor("broker_canary_age_seconds", age, None, MetricType::Gauge)?;
        ConstGauge::new(broker.canary_age(now).as_secs_f64()).encode(encoder)?;
        let Some(ceilings) = ceilings else { return Ok(()) };
        self.gauge("broker_spool_bytes_max", "Bytes that may wait for Redis", ceilings.spool_bytes_max as u64)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let encoder = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(value).encode(encoder)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let encoder = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value).encode(encoder)
    }

    fn summed<R: Reading>(&mut self, name: &str, help: &str, pick: impl Fn(&ShardMetrics) -> &R) -> fmt::Result {
        self.counter(name, help, self.metrics.sum(pick))
    }

    fn summed_gauge<R: Reading>(&mut self, name: &str, help: &str, pick: impl Fn(&ShardMetrics) -> &R) -> fmt::Result {
        self.gauge(name, help, self.metrics.sum(pick))
    }

    /// `kind`: a counter or a gauge.
    fn by_shard(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        value: impl Fn(&ShardMetrics) -> u64,
    ) -> fmt::Result {
        let is_counter = matches!(kind, MetricType::Counter);
        let mut family = self.encoder.encode_descriptor(name, help, None, kind)?;
        for (index, shard) in self.metrics.shards().enumerate() {
            let (labels, value) = ([("shard", index.to_string())], value(shard));
            let encoder = family.encode_family(&labels)?;
            if is_counter {
                ConstCounter::new(value).encode(encoder)?;
            } else {
                ConstGauge::new(value).encode(encoder)?;
            }
        }
        Ok(())
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

    fn summed_histogram<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        pick: impl Fn(&ShardMetrics) -> &Histogram<N>,
    ) -> fmt::Result {
        self.histogram(name, help, &self.metrics.histogram(pick))
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus counts in floats")]
    fn histogram<const N: usize>(&mut self, name: &str, help: &str, total: &HistogramSum<N>) -> fmt::Result {
        let bounds = total.bounds.iter().map(|bound| *bound as f64);
        let mut buckets: Vec<(f64, u64)> = bounds.zip(total.counts).collect();
        buckets.push((f64::INFINITY, total.over));
        let mut encoder = self.encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        encoder.encode_histogram::<NoLabelSet>(total.sum as f64, total.count(), &buckets, None)
    }
}
