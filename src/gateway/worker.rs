//! Where replies come from: what runs a [`MessageHandler`](crate::platform::adapter::MessageHandler) for each message.
//!
//! All workers stand behind one queue, [`Inlet`](crate::platform::dispatch::Inlet): the built-in [`demo`], the
//! [`webhook`], workers on streams of Redis, or an embedder's own handler.

pub mod demo;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "otel")]
pub(crate) mod traced;
pub mod webhook;

pub use crate::engine::worker::run;

pub(crate) use crate::engine::worker::look_after;
