//! Many nodes as one, through Redis.

pub(crate) mod link;

pub use crate::broker::redis::link::RedisServer;
