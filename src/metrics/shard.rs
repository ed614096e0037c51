//! What one shard counts, in a block that its thread alone writes.

use crate::metrics::label::label;
use crate::metrics::{Counter, Gauge, Histogram, Label, PerLabel, TlsHandshake};
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Kind;

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

/// Bounds of [`ShardMetrics::write_frames`].
pub const WRITE_FRAMES_BOUNDS: [u64; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// Bounds of [`ShardMetrics::turn_micros`].
pub const TURN_MICROS_BOUNDS: [u64; 9] = [10, 50, 100, 250, 500, 1_000, 2_500, 10_000, 100_000];
/// Bounds of [`ShardMetrics::session_queue_frames`].
pub const QUEUE_FRAMES_BOUNDS: [u64; 9] = [0, 1, 2, 4, 8, 16, 33, 64, 256];
/// Bounds of [`ShardMetrics::session_queue_bytes`].
pub const QUEUE_BYTES_BOUNDS: [u64; 9] = [0, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];
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
    /// Connections of the shard's thread that are no sessions (yet).
    pub http_connections: Gauge,
    /// Frames offered to sessions' queues, by kind.
    pub offered_frames: PerLabel<Kind, Counter, { Kind::ALL.len() }>,
    /// Comments offered to event streams that had nothing else to hear: their heartbeat.
    pub keep_alives: Counter,
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
    /// Frames that waited for a session when its heartbeat was due: a sample of each, every `heartbeat_interval`.
    pub session_queue_frames: Histogram<{ QUEUE_FRAMES_BOUNDS.len() }>,
    /// Bytes that waited for it then.
    pub session_queue_bytes: Histogram<{ QUEUE_BYTES_BOUNDS.len() }>,
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
            http_connections: Gauge::default(),
            offered_frames: PerLabel::default(),
            keep_alives: Counter::default(),
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
            session_queue_frames: Histogram::new(&QUEUE_FRAMES_BOUNDS),
            session_queue_bytes: Histogram::new(&QUEUE_BYTES_BOUNDS),
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
