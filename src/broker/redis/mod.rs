//! Many nodes as one, through Redis.

pub(crate) mod link;
#[cfg(test)]
pub(crate) mod testing;

pub use crate::broker::redis::link::RedisServer;
