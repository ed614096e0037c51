//! What the whole process counts: once an event or once a request, from any thread.

use crate::metrics::label::label;
use crate::metrics::streams::StreamMetrics;
use crate::metrics::{Gauge, Label, PerLabel, Refusal, SharedCounter, StatusClass};

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
    /// Connections that were closed to make room for others: they waited for a request, or their clients took nothing.
    pub evicted_connections: SharedCounter,
    /// HTTP responses, by the class of their status.
    pub http_responses: PerLabel<StatusClass, SharedCounter, { StatusClass::COUNT }>,
    /// Messages for the worker, by outcome.
    pub worker_messages: PerLabel<WorkerOutcome, SharedCounter, { WorkerOutcome::COUNT }>,
    /// The streams of workers.
    pub streams_of_workers: StreamMetrics,
}
