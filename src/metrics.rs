//! Counters, gauges and histograms: plain atomics, written where things happen and summed when somebody asks.
//!
//! What a shard counts lies in its own block ([`ShardMetrics`]), written by its thread only, so that a delivery touches
//! no line that another thread writes. What many threads count ([`EngineMetrics`]) is counted once an event or once a
//! request, never once a tab. Labels are closed enums: no name that a peer chose ever becomes a series.

mod broker;
mod histogram;
pub mod streams;

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use crate::metrics::broker::{BrokerMetrics, SharedGauge};
pub use crate::metrics::histogram::{Histogram, HistogramSum};
use crate::metrics::streams::StreamMetrics;
use crate::proto::disconnect::Disconnect;

/// A sum that one thread writes and any thread reads.
///
/// An increment is a load and a store, not a read-modify-write: a tenth of its cost, and exact as long as only one
/// thread writes. Two writers would lose counts, and nothing else.
///
/// # Ordering
/// Relaxed: a statistic, publishes nothing.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. Only from the one thread that writes this counter.
    #[inline]
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    /// Adds one. Only from the one thread that writes this counter.
    #[inline]
    pub fn increment(&self) {
        self.add(1);
    }

    /// The sum so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A level that one thread writes and any thread reads.
///
/// # Ordering
/// Relaxed: a statistic, publishes nothing.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Replaces the level.
    #[inline]
    pub fn store(&self, level: u64) {
        self.0.store(level, Ordering::Relaxed);
    }

    /// Raises the level. Only from the one thread that writes this gauge.
    #[inline]
    pub fn raise(&self, by: u64) {
        self.store(self.value().wrapping_add(by));
    }

    /// Lowers the level, to nothing at the least. Only from the one thread that writes this gauge.
    #[inline]
    pub fn lower(&self, by: u64) {
        self.store(self.value().saturating_sub(by));
    }

    /// The level now.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A sum that any thread writes: for what happens once an event or once a request, never once a tab.
///
/// # Ordering
/// Relaxed: a statistic, publishes nothing.
#[derive(Debug, Default)]
pub struct SharedCounter(AtomicU64);

impl SharedCounter {
    /// Adds `count`.
    #[inline]
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds one.
    #[inline]
    pub fn increment(&self) {
        self.add(1);
    }

    /// The sum so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What can be summed over shards.
pub trait Reading {
    /// The value now.
    fn reading(&self) -> u64;
}

macro_rules! reading {
    ($($kind:ty),*) => {
        $(impl Reading for $kind {
            fn reading(&self) -> u64 {
                self.value()
            }
        })*
    };
}

reading!(Counter, Gauge, SharedCounter);

/// A label's values: a closed list.
pub trait Label: Copy + 'static {
    /// Every value, in the order of [`Label::index`].
    const VALUES: &'static [Self];
    /// Its place in [`Label::VALUES`].
    fn index(self) -> usize;
    /// Its name; spaces become underscores in the exposition.
    fn name(self) -> &'static str;
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$value_doc])* $value,)+
        }

        impl $name {
            /// How many values there are.
            pub const COUNT: usize = [$(Self::$value),+].len();
        }

        impl Label for $name {
            const VALUES: &'static [Self] = &[$(Self::$value),+];

            fn index(self) -> usize {
                self as usize
            }

            fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $text,)+
                }
            }
        }
    };
}

label! {
    /// What came from a browser.
    InboundKind {
        /// A text, with or without attachments.
        Message = "message",
        /// A button was pressed.
        Button = "button",
        /// The person types, or stopped.
        Typing = "typing",
        /// The tab joins a room.
        Join = "join",
        /// The tab leaves a room.
        Leave = "leave",
        /// A ping in JSON.
        Ping = "ping",
    }
}

label! {
    /// What was serialised.
    EncodeKind {
        /// A message without buttons.
        Message = "message",
        /// A message with buttons.
        Buttons = "buttons",
        /// A file.
        File = "file",
        /// An edit.
        Edit = "edit",
        /// Typing, on or off.
        Typing = "typing",
        /// The end of a stream.
        End = "end",
        /// What tabcast itself tells a client.
        Notice = "notice",
    }
}

label! {
    /// What became of a publish.
    PublishOutcome {
        /// Posted to a live session, or taken by another node.
        Delivered = "delivered",
        /// There was nobody to post it to.
        Nobody = "nobody",
        /// Nobody here; it is on its way to the other nodes.
        Forwarded = "forwarded",
        /// The inboxes had no room for it.
        Overloaded = "overloaded",
        /// Nobody here, and too much waits for the other nodes.
        SpoolFull = "spool_full",
        /// Larger than a session's queue could take.
        TooLarge = "too_large",
        /// The engine was shut down.
        Closed = "closed",
    }
}

label! {
    /// How a stream ended.
    StreamEnd {
        /// With `end`, or by whoever opened it.
        Complete = "complete",
        /// Nothing came for too long.
        Timeout = "timeout",
        /// Somebody gave up: its owner, its reader by going away, or this node by shutting down.
        Cancelled = "cancelled",
        /// Its reader's mailbox was full.
        SlowReader = "slow_reader",
    }
}

label! {
    /// What became of a request for a session.
    HandshakeOutcome {
        /// A WebSocket was opened.
        WebSocket = "websocket",
        /// An event stream was opened.
        Events = "events",
        /// The stream of an answer was opened.
        Answer = "answer",
        /// Not a valid handshake (400, 405 or 426).
        BadRequest = "bad_request",
        /// No token, or one that does not verify (401).
        Unauthorized = "unauthorized",
        /// A foreign origin, or not allowed (403).
        Forbidden = "forbidden",
        /// The user, the address or the node has all the tabs that it may have, or asks for them too fast (429 or 503).
        LimitReached = "limit_reached",
        /// The node is shutting down (503).
        Draining = "draining",
    }
}

label! {
    /// What became of a message for the worker.
    WorkerOutcome {
        /// Taken into the worker's queue.
        Accepted = "accepted",
        /// The worker has it.
        Delivered = "delivered",
        /// An attempt failed, another follows.
        Retried = "retried",
        /// Every attempt failed.
        Failed = "failed",
        /// The queue was full: the sender was told.
        Refused = "refused",
    }
}

mod edge;

pub use crate::metrics::edge::{Refusal, StatusClass, TlsHandshake};

impl Label for Disconnect {
    const VALUES: &'static [Self] = &Self::ALL;

    fn index(self) -> usize {
        self as usize
    }

    fn name(self) -> &'static str {
        self.reason()
    }
}

/// One counter for each value of a label.
#[derive(Debug)]
pub struct PerLabel<L, C, const N: usize> {
    counters: [C; N],
    label: PhantomData<fn(L)>,
}

impl<L: Label, C: Default, const N: usize> Default for PerLabel<L, C, N> {
    fn default() -> Self {
        const { assert!(L::VALUES.len() == N, "one counter for each value of the label") };
        Self { counters: std::array::from_fn(|_| C::default()), label: PhantomData }
    }
}

impl<L: Label, C, const N: usize> PerLabel<L, C, N> {
    /// The counter of `label`.
    #[inline]
    pub fn of(&self, label: L) -> &C {
        &self.counters[label.index()]
    }
}

impl<L: Label, C: Reading, const N: usize> PerLabel<L, C, N> {
    /// The sum over all labels.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counters.iter().map(Reading::reading).sum()
    }
}

/// Bounds of [`ShardMetrics::write_frames`].
pub const WRITE_FRAMES_BOUNDS: [u64; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// Bounds of [`ShardMetrics::turn_micros`].
pub const TURN_MICROS_BOUNDS: [u64; 9] = [10, 50, 100, 250, 500, 1_000, 2_500, 10_000, 100_000];
/// Bounds of [`ShardMetrics::posted_micros`] and [`ShardMetrics::written_micros`].
pub const LATENCY_MICROS_BOUNDS: [u64; 15] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 10_000_000];
/// How long something took, in microseconds.
pub type LatencyHistogram = Histogram<{ LATENCY_MICROS_BOUNDS.len() }>;

/// What one shard counts. Written by the shard's thread only; read by whoever scrapes.
///
/// A block starts on lines of its own (128 bytes: the prefetcher takes lines in pairs), so that no shard's count
/// disturbs another's.
#[derive(Debug)]
#[repr(align(128))]
pub struct ShardMetrics {
    /// Sessions that the shard holds now.
    pub sessions: Gauge,
    /// Frames offered to sessions' queues.
    pub offered_frames: Counter,
    /// Writes that the kernel took (one may carry many frames).
    pub writes: Counter,
    /// Bytes that the kernel took.
    pub written_bytes: Counter,
    /// Writes of which the kernel took only a part.
    pub partial_writes: Counter,
    /// Frames that replaced a queued one of the same key.
    pub coalesced_frames: Counter,
    /// Frames that waited for a session when it was cut or lost, by why it ended.
    pub discarded_frames: PerLabel<Disconnect, Counter, { Disconnect::ALL.len() }>,
    /// Typing frames that a full queue had no room for.
    pub dropped_typing_frames: Counter,
    /// Sessions ended, by reason.
    pub ended_sessions: PerLabel<Disconnect, Counter, { Disconnect::ALL.len() }>,
    /// Frames from browsers that were refused.
    pub bad_frames: Counter,
    /// Frames from browsers that were refused because too many came in the time, or too much.
    pub limited_frames: Counter,
    /// Frames from browsers that were understood, by kind.
    pub inbound_messages: PerLabel<InboundKind, Counter, { InboundKind::COUNT }>,
    /// Bytes read from sessions' sockets.
    pub read_bytes: Counter,
    /// Frames that wait in sessions' queues now.
    pub queue_frames: Gauge,
    /// Bytes that wait in sessions' queues now, shared frames counted in each.
    pub queue_bytes: Gauge,
    /// Bytes that queues hold beside their frames now: the room of their rings, and what was encrypted of them.
    pub queue_entry_bytes: Gauge,
    /// Bytes that were encrypted for connections which do not take them yet.
    pub sealed_bytes: Gauge,
    /// TLS handshakes, by outcome.
    pub tls_handshakes: PerLabel<TlsHandshake, Counter, { TlsHandshake::COUNT }>,
    /// Posts that wait in the shard's inbox now, as the shard last saw it.
    pub inbox_posts: Gauge,
    /// Bytes that wait in the shard's inbox now, as the shard last saw it.
    pub inbox_bytes: Gauge,
    /// Turns that ended with work left over.
    pub unfinished_turns: Counter,
    /// Frames that went out in one write.
    pub write_frames: Histogram<{ WRITE_FRAMES_BOUNDS.len() }>,
    /// How long turns took, in microseconds.
    pub turn_micros: Histogram<{ TURN_MICROS_BOUNDS.len() }>,
    /// From when a frame was accepted on this node until a shard took it from its inbox: once a post.
    pub posted_micros: LatencyHistogram,
    /// From when a frame was accepted on this node until the kernel had it: once a write that took the last byte of its
    /// first frame, with the age of that one, the oldest. The clock is read after up to 64 writes, for all of them. What
    /// was not published (answers to a client, heartbeats) and what is said again to a tab that comes back is not timed.
    pub written_micros: LatencyHistogram,
}

impl Default for ShardMetrics {
    fn default() -> Self {
        Self {
            sessions: Gauge::default(),
            offered_frames: Counter::default(),
            writes: Counter::default(),
            written_bytes: Counter::default(),
            partial_writes: Counter::default(),
            coalesced_frames: Counter::default(),
            discarded_frames: PerLabel::default(),
            dropped_typing_frames: Counter::default(),
            ended_sessions: PerLabel::default(),
            bad_frames: Counter::default(),
            limited_frames: Counter::default(),
            inbound_messages: PerLabel::default(),
            read_bytes: Counter::default(),
            queue_frames: Gauge::default(),
            queue_bytes: Gauge::default(),
            queue_entry_bytes: Gauge::default(),
            sealed_bytes: Gauge::default(),
            tls_handshakes: PerLabel::default(),
            inbox_posts: Gauge::default(),
            inbox_bytes: Gauge::default(),
            unfinished_turns: Counter::default(),
            write_frames: Histogram::new(&WRITE_FRAMES_BOUNDS),
            turn_micros: Histogram::new(&TURN_MICROS_BOUNDS),
            posted_micros: Histogram::new(&LATENCY_MICROS_BOUNDS),
            written_micros: Histogram::new(&LATENCY_MICROS_BOUNDS),
        }
    }
}

/// What compressing has made of frames: each counts once, not once a tab.
#[derive(Debug, Default)]
pub struct DeflateMetrics {
    /// Frames whose compressed form is kept, as it is smaller.
    pub frames: SharedCounter,
    /// Bytes of their JSON.
    pub json_bytes: SharedCounter,
    /// Bytes of their compressed forms.
    pub form_bytes: SharedCounter,
}

/// What the whole process counts: once an event or once a request, from any thread.
#[derive(Debug, Default)]
pub struct EngineMetrics {
    /// Events serialised, by kind. One a publish, whatever the number of tabs.
    pub encodes: PerLabel<EncodeKind, SharedCounter, { EncodeKind::COUNT }>,
    /// Frames that got a compressed form. At most one a publish, whatever the number of tabs.
    pub deflates: DeflateMetrics,
    /// Publishes, by outcome.
    pub publishes: PerLabel<PublishOutcome, SharedCounter, { PublishOutcome::COUNT }>,
    /// Publishes that had to wait for room in an inbox.
    pub waited_publishes: SharedCounter,
    /// Frames from other nodes for which there was no room here.
    pub refused_forwards: SharedCounter,
    /// Streams that have not ended, as they were last swept.
    pub streams: Gauge,
    /// Memory of what is kept of users and streams, as it was last swept.
    pub recovery_bytes: Gauge,
    /// Streams that have ended, by why: `end` frames, and readers that were cut.
    pub ended_streams: PerLabel<StreamEnd, SharedCounter, { StreamEnd::COUNT }>,
    /// Typing frames that a full mailbox had no room for.
    pub dropped_mailbox_typing_frames: SharedCounter,
    /// Requests for a session, by outcome.
    pub handshakes: PerLabel<HandshakeOutcome, SharedCounter, { HandshakeOutcome::COUNT }>,
    /// What was refused at the edge because there was too much of it, or of the wrong kind, by reason.
    pub refusals: PerLabel<Refusal, SharedCounter, { Refusal::COUNT }>,
    /// Connections that were closed while they waited for a request, to make room for others.
    pub evicted_connections: SharedCounter,
    /// HTTP responses, by the class of their status.
    pub http_responses: PerLabel<StatusClass, SharedCounter, { StatusClass::COUNT }>,
    /// Messages for the worker, by outcome.
    pub worker_messages: PerLabel<WorkerOutcome, SharedCounter, { WorkerOutcome::COUNT }>,
    /// The streams of workers.
    pub streams_of_workers: StreamMetrics,
}

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
        let mut total = HistogramSum::new(pick(&ShardMetrics::default()).bounds());
        self.shards().for_each(|shard| pick(shard).add_to(&mut total));
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        check::<InboundKind>();
        check::<EncodeKind>();
        check::<PublishOutcome>();
        check::<StreamEnd>();
        check::<HandshakeOutcome>();
        check::<Refusal>();
        check::<StatusClass>();
        check::<WorkerOutcome>();
    }

    #[test]
    fn counts_are_summed_over_shards() {
        let metrics = Metrics::new(3);
        for (index, shard) in metrics.shards().enumerate() {
            shard.offered_frames.add(index as u64 + 1);
            shard.ended_sessions.of(Disconnect::SlowConsumer).increment();
        }
        assert_eq!(metrics.sum(|s| &s.offered_frames), 6);
        assert_eq!(metrics.sum(|s| s.ended_sessions.of(Disconnect::SlowConsumer)), 3);
        assert_eq!(metrics.sum(|s| s.ended_sessions.of(Disconnect::Kicked)), 0);
        assert_eq!(metrics.shard(0).ended_sessions.total(), 1);
    }

    #[test]
    fn a_gauge_goes_up_and_down_but_never_below_nothing() {
        let gauge = Gauge::default();
        gauge.raise(3);
        gauge.lower(1);
        assert_eq!(gauge.value(), 2);
        gauge.lower(5);
        assert_eq!(gauge.value(), 0);
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
