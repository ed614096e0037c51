//! OpenTelemetry spans of a publish, from the request that asks for it to the nodes that it reaches.
//!
//! They are there with the feature `otel`, once [`begin`] was called: the gateway does so if a collector is set, an
//! embedder with a tracer provider of its own whenever it likes. Without the feature everything here is empty, and costs
//! nothing; with it and nothing begun, a publish reads one flag.
//!
//! | span | kind | from | to | parent |
//! |---|---|---|---|---|
//! | `tabcast publish` | producer | its event is to be encoded | other nodes have answered, as far as somebody waits for that | the OpenTelemetry context that it is called in |
//! | `tabcast receive` | consumer | the frame came from Redis | the shards' inboxes have it | the other node's `tabcast publish` |
//! | `tabcast completion` | server | the head of `POST /v1/chat/completions` is there | the worker's queue has the question, and the answer is open; one in one piece is complete | the request's `traceparent` |
//!
//! A publish of `/api/*` is called in the context of the request's `traceparent`; one of an entry on a worker's stream in
//! that of the entry's; one of an in-process handler in that of the message. What a tab writes has no context: a tab lives
//! for longer than a trace should. Contexts go on in the webhook's headers, in the envelope on a worker's stream, between
//! nodes, and with a stream's frame as the key `traceparent`.
//!
//! | attribute | of | value |
//! |---|---|---|
//! | `tabcast.channel.kind` | publish, receive | `user`, `room`, `stream` |
//! | `tabcast.frame.kind`, `tabcast.frame.bytes` | publish, receive | `message`, `buttons`, `file`, `edit`, `typing`, `end`; its JSON's bytes |
//! | `tabcast.outcome` | publish | as `tabcast_publishes_total` has it, with what the other nodes have answered by then |
//! | `tabcast.outcome` | receive | `taken`, `nobody`, `dropped` |
//! | `tabcast.outcome` | completion | `answered`, `refused` |
//! | `tabcast.tabs`, `tabcast.nodes` | publish | whom it was posted to here, and the other nodes that took it |
//! | `tabcast.node` | publish, receive | the node's number in Redis, hexadecimal |
//!
//! A publish has two events: `encoded`, and `posted`, when the shards' inboxes have it.
//!
//! **Never recorded**: texts, files and their names, ids of users (hashed neither), names of rooms, ids of streams and
//! messages, addresses, tokens and keys. **Not traced**: what a shard does with a frame, its queues and its writes, as
//! nothing may be done there for each tab; presence; what is kept for tabs that come back.

#![cfg_attr(
    not(all(feature = "gateway", feature = "redis")),
    allow(dead_code, unused_imports, reason = "the engine alone needs less of it")
)]

#[cfg(not(feature = "otel"))]
#[path = "traces/off.rs"]
mod spans;
#[cfg(feature = "otel")]
mod spans;

#[cfg(feature = "otel")]
pub use crate::traces::spans::begin;
pub(crate) use crate::traces::spans::{Origin, PublishSpan, Span, is_on, over, within};
