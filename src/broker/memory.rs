//! The embedded broker: nodes of one process, which call each other. With one node it costs one load.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;

use crate::broker::{Broker, BrokerFuture, Delivered, Forwarded, NodeId, OnlineUser, Peer, SpoolFull};
use crate::id::{ChannelId, UserId};
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Frame, Kind};

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

    fn wants(&self, node: NodeId, _channel: &ChannelId, _kind: Kind) -> bool {
        self.nodes.load().iter().any(|(id, peer)| *id != node && peer.strong_count() > 0)
    }

    fn forward(&self, from: NodeId, channel: &ChannelId, frame: &Frame) -> Result<Forwarded, SpoolFull> {
        if self.nodes.load().len() < 2 {
            return Ok(Forwarded::Now(0));
        }
        let taken = self.others(from).filter(|peer| {
            let delivered = peer.deliver(channel, frame);
            if delivered == Delivered::Full {
                peer.count_refused();
                match channel {
                    ChannelId::User(_) => peer.users_missed(),
                    ChannelId::Room(_) => peer.rooms_missed(),
                    ChannelId::Stream(_) => {}
                }
            }
            delivered == Delivered::Taken
        });
        Ok(Forwarded::Now(taken.count()))
    }

    fn is_online_elsewhere<'a>(&'a self, from: NodeId, user: &'a UserId) -> BrokerFuture<'a, bool> {
        Box::pin(std::future::ready(self.others(from).any(|peer| peer.tabs(user) > 0)))
    }

    fn end_elsewhere<'a>(&'a self, from: NodeId, user: &'a UserId, ending: Disconnect) -> BrokerFuture<'a, usize> {
        let told = self.others(from).filter(|peer| peer.tabs(user) > 0 && peer.end_sessions(user, ending));
        Box::pin(std::future::ready(told.count()))
    }

    fn users_elsewhere(&self, from: NodeId, limit: usize) -> BrokerFuture<'_, Option<Vec<OnlineUser>>> {
        let mut users: HashMap<UserId, usize> = HashMap::new();
        for peer in self.others(from) {
            for user in peer.users() {
                let tabs = peer.tabs(&user);
                *users.entry(user).or_default() += tabs;
            }
        }
        let users = users.into_iter().take(limit).map(|(user, tabs)| OnlineUser { user, tabs });
        Box::pin(std::future::ready(Some(users.collect())))
    }
}
