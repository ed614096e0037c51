//! Runs shards on threads: sockets, clocks and readiness around the pure core. Embedders use it too.
//!
//! One thread per shard: a single-threaded tokio runtime, a listener of its own (`SO_REUSEPORT`), hyper for HTTP, and
//! one mio poll for all session sockets. A request that becomes a session leaves hyper with its socket; from then on
//! it costs its slot and nothing else.

pub mod clock;
pub mod listener;
pub mod shard_thread;
pub mod socket;
pub mod start;
