//! The embedded broker: nodes of one process, which call each other. With one node it costs one load.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;

use crate::broker::{Broker, NodeId, Peer};
use crate::id::{ChannelId, UserId};
use crate::proto::frame::Frame;

type Nodes = Vec<(NodeId, Weak<dyn Peer>)>;

/// Connects the engines of one process. Clones of its `Arc` are the same broker.
#[derive(Default)]
pub struct MemoryBroker {
    nodes: ArcSwap<Nodes>,
    next: AtomicU64,
}

impl std::fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryBroker").field("nodes", &self.nodes.load().len()).finish_non_exhaustive()
    }
}

impl MemoryBroker {
    fn others(&self, from: NodeId) -> impl Iterator<Item = Arc<dyn Peer>> {
        let nodes = self.nodes.load_full();
        let live = nodes.iter().filter(|(id, _)| *id != from).filter_map(|(_, peer)| peer.upgrade());
        live.collect::<Vec<_>>().into_iter()
    }
}

impl Broker for MemoryBroker {
    fn attach(&self, peer: &Arc<dyn Peer>) -> NodeId {
        // Relaxed: only has to differ from call to call.
        let id = NodeId(self.next.fetch_add(1, Ordering::Relaxed));
        self.nodes.rcu(|nodes| {
            let live = nodes.iter().filter(|(_, peer)| peer.strong_count() > 0).cloned();
            live.chain([(id, Arc::downgrade(peer))]).collect::<Nodes>()
        });
        id
    }

    fn has_others(&self, node: NodeId) -> bool {
        self.nodes.load().iter().any(|(id, peer)| *id != node && peer.strong_count() > 0)
    }

    fn forward(&self, from: NodeId, channel: &ChannelId, frame: &Frame) -> usize {
        if self.nodes.load().len() < 2 {
            return 0;
        }
        self.others(from).filter(|peer| peer.deliver(channel, frame)).count()
    }

    fn is_online_elsewhere(&self, from: NodeId, user: &UserId) -> bool {
        self.others(from).any(|peer| peer.is_online(user))
    }
}
