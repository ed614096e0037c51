//! Between nodes: who else holds a channel's sessions, and how a frame gets there.

pub mod memory;
#[cfg(feature = "redis")]
pub mod redis;

use std::sync::Arc;

use crate::id::{ChannelId, UserId};
use crate::proto::frame::Frame;

/// What a node offers to the others.
pub trait Peer: Send + Sync + 'static {
    /// Posts a frame from another node to this node's sessions. False if there was nobody, or no room.
    fn deliver(&self, channel: &ChannelId, frame: &Frame) -> bool;
    /// Whether the user has a session on this node.
    fn is_online(&self, user: &UserId) -> bool;
}

/// A node's number on its broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub(crate) u64);

/// Carries frames between nodes.
///
/// # Delivery guarantee
/// At most once, in the order of each publishing node's calls for one channel. What a node could not take is counted
/// there and not sent again.
pub trait Broker: Send + Sync + 'static {
    /// Adds a node. It is gone once its peer is dropped.
    fn attach(&self, peer: &Arc<dyn Peer>) -> NodeId;
    /// Whether there is any other node: with none, nothing has to be kept in order for it.
    fn has_others(&self, node: NodeId) -> bool;
    /// Offers a frame to the other nodes; returns how many took it. Calls for one channel come one after the other.
    fn forward(&self, from: NodeId, channel: &ChannelId, frame: &Frame) -> usize;
    /// Whether the user has a session on another node.
    fn is_online_elsewhere(&self, from: NodeId, user: &UserId) -> bool;
}
