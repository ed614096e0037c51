//! tabcast puts one event from a worker (a language model, a bot, a game) in front of every browser tab and stream
//! that should see it, as one shared buffer.
//!
//! It is a library to embed in a gateway with very many connections, and a binary that is that gateway. A worker
//! calls the adapter, in Rust or over HTTP; the call becomes an event, the event is encoded once, and each tab's queue
//! gets a reference to the bytes.
//!
//! ```text
//!  worker ─ HTTP API ─┐                                        ┌─ shard 0: slab of sessions ─► WebSocket tabs, event streams
//!  worker ─ Redis    ─┼─► platform ─► proto ─► engine ─► hub ──┤  (one thread, one writer)     one write each
//!  embedder ─ call ───┘   Event      Frame      │  ▲            ├─ shard 1: …
//!                                               ▼  │            └─ mailbox: an embedder's own task (a Stream)
//!                                       broker (memory | Redis) ◄──► other nodes
//! ```
//!
//! # Where to start
//! - The [`guide`]: concepts, what is promised, how large a machine, what to turn, the way from a Python adapter.
//! - An embedder holds an [`Engine`](engine::Engine), and gives it to a [`WebChat`](platform::webchat::WebChat): the
//!   example is in both places, and in `tests/examples/embed.rs`.
//! - In a server of one's own, axum's or hyper's, [`driver::embed::Tabs`] answers handshakes and readers of events; for any
//!   other transport a tab is a `Stream`: [`engine::mailboxes`]. See [Embedding](#embedding).
//! - A gateway of one's own is `gateway::serve::run_with` and a
//!   [`MessageHandler`](platform::adapter::MessageHandler): `tests/examples/embedded_gateway.rs`.
//! - What crosses the wire is [`proto::event`]; why sessions end, and whether a client should come back, is
//!   [`Disconnect`](proto::disconnect::Disconnect); how much is allowed is [`proto::limits`].
//! - To see how a frame reaches a tab, read [`engine`], [`fanout::hub`], [`fanout::shard`] in this order.
//!
//! # The map
//! A module imports only modules above it in this table; `tests/architecture.rs` has the edges, and fails on a new one.
//!
//! | module | its one job | feature |
//! |---|---|---|
//! | [`id`] | channel, user, request and message ids: parsed once, then types | |
//! | [`proto`] | pure bytes: what is published, its JSON, its wire forms, RFC 6455 and 7692, event-stream lines, OpenAI chunks, why sessions end, every limit | |
//! | [`metrics`] | counters, gauges and histograms: a set a shard, summed when somebody asks | |
//! | [`traces`] | OpenTelemetry spans of a publish, from the request to the nodes that it reaches | `otel` for any |
//! | [`platform`] | the adapter trait and WebChat: calls into events, clients' text into commands; the worker's queue | |
//! | [`fanout`] | who is connected and where, frames into sessions, slow consumers, heartbeats | |
//! | [`broker`] | between nodes: one trait, its delivery guarantee in its documentation; in memory, and through Redis | `redis` for that |
//! | [`engine`] | joins these: what an embedder holds | |
//! | [`driver`] | runs shards on threads: runtimes, sockets, clocks; tabs in another's HTTP server | `driver` |
//! | [`config`] | file, environment and flags into typed settings, checked once | `gateway` |
//! | [`gateway`] | the HTTP edge: who may what, the routes, the page, where replies come from | `gateway` |
//! | [`logs`] | the binary's log lines: text or JSON, by rules that can be replaced, no more than can be read | `cli` |
//! | [`terminal`] | `tabcast top` and `tabcast tail`: a node as an operator sees it, over its event streams | `cli` |
//! | [`bench`](mod@bench) | `tabcast bench`: clients by the hundred thousand, every delivery checked, what the server spends on it | `cli` |
//! | [`guide`] | documentation: concepts, guarantees, sizing, tuning, from FastAPI | |
//!
//! # Invariants, as absences
//! - [`id`], [`proto`], [`metrics`], [`platform`] and [`fanout`] name no runtime, socket or clock: time is an argument,
//!   and a test can run a shard for a simulated year.
//! - No event is serialised twice, nor framed or compressed twice for one wire form, whatever the number of tabs. No
//!   frame changes once it is shared: what waits for a session is what it is written.
//! - No session is written by two threads: its shard's alone. No lock and no atomic guards a session's queue, and no
//!   delivery over a connection touches a counter that threads share. What crosses threads is a shard's inbox, and it is
//!   lock-free. A [mailbox](engine::mailboxes) is the exception, as its reader is on a thread of its own: each of its frames
//!   is counted once more, and handed over under that tab's own lock.
//! - No publisher does work per tab, only per shard; it waits for no peer, and no tab waits for another.
//! - No queue, map, buffer or string that a peer can grow is without a bound in bytes.
//! - No registry guard is held across an `.await`, nor while frames are offered; displaced values are dropped after it.
//! - No panic is reachable from the network or from Redis.
//! - No idle tab owns a task, a timer, a read buffer or queue memory.
//!
//! # Delivery
//! A frame is delivered **at most once** to each session, and a frame that was accepted for a session is lost to it
//! only together with the connection (which its client sees) or, if it is an edit or a typing sign, to a newer one.
//!
//! - *Delivered* in a [`Delivery`](proto::delivery::Delivery) report means: accepted for at least one live session. It
//!   does not mean read.
//! - All sessions of a channel on one node get its ordered frames (messages, buttons, files) in one and the same order,
//!   also when several publish at once; for one publisher it is the order of its calls.
//! - A session that is behind never delays another. Its typing signs are replaced or dropped; its edits are replaced by
//!   newer ones of the same message; an ordered frame is never dropped silently: the session is ended with
//!   [`SlowConsumer`](proto::disconnect::Disconnect::SlowConsumer).
//! - A file is also kept for a while on the node where it was published, in memory and within
//!   [`FileLimits`](proto::limits::FileLimits), so that its URL resolves: [`Engine::open_file`](engine::Engine::open_file),
//!   and `GET /files/{id}/{filename}` of the gateway. It is there before its frame is; a file that was refused has none.
//! - A tab that comes back names its position, the last ordered frame that it has. What it missed comes before anything
//!   live, whole and once, or it is told of a gap: see [`RecoveryLimits`](proto::limits::RecoveryLimits). Rooms are not
//!   kept. Kept in memory, it is there on the node that the tab was on; kept in Redis, on every node.
//! - An answer to a request is a stream with one reader. One that was opened as detachable goes on when its reader
//!   leaves, and is found again from its beginning; of any other, whoever produces it is told that nobody wants it any
//!   more: see [`fanout::streams`].
//! - A full inbox is an overloaded node, not a slow peer: the publish waits up to a deadline and is then refused with
//!   [`Overloaded`](proto::delivery::PublishError::Overloaded), nothing having been posted anywhere.
//! - A person's message is acked once the worker's queue has a place for it. In-process handlers get it at most once;
//!   the webhook repeats it until it is answered, so that its receiver may see it more than once, by the same id. On a
//!   stream of Redis it is acked once it is there, and read at least once.
//! - Between nodes a frame is delivered at most once, in the order of the node that published it; while Redis is away it
//!   waits, within a bound: see [`broker`] and `broker::redis`.
//!
//! # Memory
//! What is allocated for each, at the most, by the binary's gateway and with ids of about ten bytes;
//! `tests/memory_is_as_documented.rs` reads this table and measures. The kernel's part, about 4.4 KiB a connection, is
//! not in it.
//!
//! | of | bytes | as |
//! |---|---|---|
//! | an idle tab | 480 | its session's slot (192), who it is, its user's entry, its socket's place |
//! | an idle event stream | 480 | the same |
//! | an answer of `/v1` that has said nothing | 896 | the same, and what makes its records |
//! | a user, beside the tabs | 96 | its id, and its list of tabs, of which each takes 16 |
//! | the first room of a tab | 48 | places for four rooms in the session, and one in the room |
//! | each further one | 24 | a place in the session, and one in the room; both grow by doubling |
//! | a room with one member | 320 | its name, its member, and where it is found: once in the process, once in each shard |
//! | a frame, beside its JSON | 160 | its header, and the forms of all wires; once in the process |
//! | a queue of 3 to 33 frames | 256 | a block of the shard's pool; the first two wait in the session |
//! | an address whose sessions are counted | 40 | its place in a map, beside 16 in each of its sessions |
//! | each frame beyond 33 in a queue | 16 | its place in the block, which grows by doubling |
//! | a tab that has left | 320 | the slot that the next one takes, and its places in lists and tables |
//! | an answer of `/v1` that is over | 512 | the slot that the next one takes, and its places in more of them |
//!
//! What has left gives its memory back but for that: slots, lists and tables keep the size of the largest number that
//! there was at once, and cost the next ones nothing. A shard's pool keeps up to 4,096 blocks of queues (2 MB), so that
//! frames allocate nothing while they wait; its scratch for writes is 256 KiB, its buffer for reads 64 KiB. The process
//! keeps up to 64 MiB of buffers of large frames. `tests/a_storm_leaves_nothing_behind.rs` lets 15,000 tabs come and go.
//!
//! # Embedding
//! An engine owns no global, and starts no thread: `Tabs`, `Mailboxes` and `ShardThreads` do, and end them. What the
//! process has once, whatever the number of engines, is memory and processors: the count of live frames' bytes, which
//! [`bytes_budget`](proto::limits::HubLimits::bytes_budget) is compared to; the pool of large buffers; and how many large
//! frames are compressed at one time. Users, rooms, streams, files, drains and every other bound are an engine's own.
//!
//! | from outside | call | what it costs |
//! |---|---|---|
//! | an axum or hyper server's WebSocket | [`Tabs::websocket`](driver::embed::Tabs::websocket) | what a tab costs; a task and 20 KiB more where the server speaks TLS itself |
//! | its event streams, HTTP/2 included | [`Tabs::events`](driver::embed::Tabs::events) | a tab, a hand-over of up to 16 frames, and a response of that server's |
//! | another transport | [`Mailboxes::connect`](engine::mailboxes::Mailboxes::connect) | a tab, a hand-over of up to 16 frames, and whoever reads it |
//! | an answer that ends | [`Engine::open_stream`](platform::adapter::Outlet::open_stream) | its queue |
//! | a listener of its own, without HTTP's routes | [`ShardThreads`](driver::start::ShardThreads) | what a tab costs |
//! | the whole gateway | `gateway::serve::run_with` | what the binary costs |
//!
//! # Features
//! | feature | what it adds | default |
//! |---|---|---|
//! | (none) | engine, fan-out, adapter, wire forms; of tokio only its queues and timers | |
//! | `driver` | shards on threads with real sockets: tokio's net, mio, hyper | yes |
//! | `tls` | TLS on those sockets, by rustls | yes |
//! | `gateway` | the HTTP edge: routes, tokens and keys, the page, the webhook | yes |
//! | `redis` | many nodes as one through Redis; with `gateway`, workers on streams | yes |
//! | `cli` | what only the binary needs: arguments, logging, the allocator | yes |
//! | `otel` | OpenTelemetry traces; with `gateway`, their export to a collector by OTLP over HTTP | no |

#[cfg(feature = "cli")]
pub mod bench;
pub mod broker;
#[cfg(feature = "gateway")]
pub mod config;
#[cfg(feature = "driver")]
pub mod driver;
pub mod engine;
pub mod fanout;
#[cfg(feature = "gateway")]
pub mod gateway;
pub mod guide;
pub mod id;
#[cfg(feature = "cli")]
pub mod logs;
pub mod metrics;
pub mod platform;
pub mod proto;
#[cfg(feature = "cli")]
pub mod terminal;
pub mod traces;

/// The README's code is compiled and run with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct ReadmeDoctests;
