//! The embedded broker: nodes of one process, which call each other. With one node it costs one load.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;

use crate::broker::{Broker, BrokerFuture, Delivered, Forwarded, NodeId, OnlineUser, Peer, SpoolFull, leaves_gap};
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
                if leaves_gap(frame.kind()) {
                    peer.channel_missed(channel);
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

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;
    use crate::id::{MessageId, RequestId};
    use crate::proto::event::{Event, Timestamp};

    /// Has no room, and writes down what it is told.
    #[derive(Default)]
    struct Crowded(Mutex<Vec<String>>);

    impl Crowded {
        fn note(&self, what: &str) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(what.to_owned());
        }
    }

    impl Peer for Crowded {
        fn deliver(&self, _channel: &ChannelId, _frame: &Frame) -> Delivered {
            Delivered::Full
        }
        fn count_refused(&self) {
            self.note("refused");
        }
        fn rooms_missed(&self) {
            self.note("rooms missed");
        }
        fn users_missed(&self) {
            self.note("users missed");
        }
        fn channel_missed(&self, channel: &ChannelId) {
            self.note(&format!("{} missed", channel.key()));
        }
        fn tabs(&self, _user: &UserId) -> usize {
            0
        }
        fn users(&self) -> Vec<UserId> {
            Vec::new()
        }
        fn end_sessions(&self, _user: &UserId, _ending: Disconnect) -> bool {
            true
        }
        fn has_stream(&self, _request: &RequestId) -> bool {
            false
        }
        fn forget_backlog(&self, _user: &UserId) {}
    }

    /// What a node without room is told of one frame.
    fn check(channel: &str, event: &Event<'_>, expected: &[&str]) {
        let broker = MemoryBroker::default();
        let crowded = Arc::new(Crowded::default());
        let (here, there): (Arc<dyn Peer>, Arc<dyn Peer>) = (Arc::new(Crowded::default()), crowded.clone());
        let from = broker.attach(&here);
        broker.attach(&there);
        let channel = ChannelId::parse(channel).unwrap();
        let forwarded = broker.forward(from, &channel, &Frame::encode_for(event, &channel));
        assert!(matches!(forwarded, Ok(Forwarded::Now(0))));
        assert_eq!(*crowded.0.lock().unwrap(), expected, "{channel:?}");
    }

    #[test]
    fn only_those_are_told_of_a_frame_that_finds_no_room_whose_it_was() {
        let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(1));
        let said = Event::Message { id, text: "text", sender: "star", reply_to: None, timestamp };
        check("ann", &said, &["refused", "ann missed"]);
        check("room:den", &said, &["refused", "den missed"]);
        check("ann", &Event::Typing { active: true }, &["refused"]);
        check("room:den", &Event::Typing { active: true }, &["refused"]);
    }
}
