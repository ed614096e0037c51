//! Runs shards on threads: sockets, clocks and readiness around the pure core. Embedders use it too.
//!
//! One thread per shard: a single-threaded tokio runtime, a listener of its own (`SO_REUSEPORT`), hyper for HTTP, and
//! one mio poll for all session sockets. A request that becomes a session leaves hyper with its socket; from then on
//! it costs its slot and nothing else; over TLS (feature `tls`) also its keys, but no buffer. [`embed`] does the same with
//! the sockets of another's HTTP server.
//!
//! # Where a delivery's time goes
//! A room of 1,000 tabs, 128 bytes of text, gateway with one shard on one processor and client on the other, over
//! loopback; `perf record -e cpu-clock -g` for four seconds of steady state (a virtual machine, without counters of
//! instructions). Shares of the gateway's CPU, and nanoseconds a delivery:
//!
//! | step | one message at a time: 6.1 µs | 16 in flight: 0.40 µs |
//! |---|---|---|
//! | ours: inbox, offer, layout of the write, what was written, and HTTP | 2.8 %: 170 ns | 7.8 %: 31 ns |
//! | libc's `send`, the way into the kernel and out, descriptor to socket | 12 %: 700 ns | 11 %: 44 ns |
//! | kernel: TCP's sending half, with the copy (0.9 % and 9 %) | 29 %: 1,800 ns | 34 %: 136 ns |
//! | kernel: IP and the loopback device | 12 %: 710 ns | 10 %: 39 ns |
//! | kernel: TCP's receiving half, which loopback runs on the sender's time | 35 %: 2,140 ns | 28 %: 111 ns |
//! | kernel: waking the reader | 9 %: 560 ns | 10 %: 38 ns |
//!
//! So a delivery is a system call and little else, and fewer calls are all that can be won: `system_calls_do_not_grow`
//! counts one `send` a flushed session, whatever waits for it.
//!
//! What did not pay, on this machine:
//! - **io_uring** for the sends: in batches of 256 submissions, a C program spends 4.43 µs a delivery one at a
//!   time where `send()` spends 4.06, and 3.9 where it spends 5.1 with 16 in flight, each frame written by itself.
//!   Gathered into one write a tab, the same 16 cost 0.4.
//! - **Transparent huge pages** under the slab: half as much memory again for an idle tab.
//! - **One cache line of each session fetched ahead**, and no more: one message at a time takes a third less within the
//!   shard, and 16 in flight 6 % more. Where queues are longer than the two places that a session has in itself, the
//!   second line is fetched too, and they take what they took before.
//! - **Larger bursts of TLS**: 1 MiB frames cost 1,250 µs in bursts of one record, 1,073 in bursts of two (what is
//!   taken), 1,053 in four and 1,012 in eight, each of which a tab that does not read may keep.
//! - **A higher level of deflate**: 6 takes twice the time of 2 for a twentieth fewer bytes; `miniz_oxide` takes 1.5 to
//!   1.9 times as long as `zlib-rs` for the same.
//! - **Shares of 256 KiB a write, counted as one**: a file of 16 MiB held a turn for up to 10 ms. A write now counts by
//!   its bytes as well.

pub mod addresses;
pub mod clock;
mod connections;
pub mod embed;
mod exit;
mod group;
pub(crate) mod handshake;
mod head;
pub mod listener;
pub mod loan;
mod pace;
pub mod proxies;
pub(crate) mod response;
pub mod shard_thread;
pub mod socket;
pub mod start;
mod stream;
#[cfg(feature = "tls")]
pub mod tls;
#[cfg(not(feature = "tls"))]
#[path = "no_tls.rs"]
pub mod tls;
