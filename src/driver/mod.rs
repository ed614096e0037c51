//! Runs shards on threads: sockets, clocks and readiness around the pure core. Embedders use it too.
//!
//! One thread per shard: a single-threaded tokio runtime, a listener of its own (`SO_REUSEPORT`), hyper for HTTP, and
//! one mio poll for all session sockets. A request that becomes a session leaves hyper with its socket; from then on
//! it costs its slot and nothing else; over TLS (feature `tls`) also its keys, but no buffer.

pub mod clock;
pub mod listener;
pub mod shard_thread;
pub mod socket;
pub mod start;
mod stream;
#[cfg(feature = "tls")]
pub mod tls;
#[cfg(not(feature = "tls"))]
#[path = "no_tls.rs"]
pub mod tls;
