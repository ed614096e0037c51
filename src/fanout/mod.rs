//! Who is connected and where, and frames into their sessions. Pure: no socket, no runtime, time is an argument.
//!
//! A frame goes five steps, each in a place of its own:
//!
//! | step | what | where |
//! |---|---|---|
//! | publish | the application's call; the event is encoded, once | [`crate::engine`] |
//! | fan out | the channel is looked up, and the frame posted to each shard that holds a part of it | [`hub`], [`registry`], [`rooms`], `inbox` |
//! | offer | a shard gives it to each session's queue, by the rules of the frame's class | [`shard`] |
//! | collect | what waits for a session is gathered into one write | [`shard`] |
//! | write | the bytes leave | `driver`, or a reader of a [`mailbox`] |

pub(crate) mod backlog;
pub mod hub;
pub(crate) mod inbox;
pub mod mailbox;
pub mod registry;
pub(crate) mod returning;
pub mod rooms;
pub mod session;
pub mod shard;
pub mod streams;
pub(crate) mod stripes;
mod sync;
