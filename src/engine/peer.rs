//! This node as the others see it, and the others as its presence reaches them.

use std::sync::Arc;

use crate::broker::{Broker, Delivered, NodeId, Peer};
use crate::engine::deflate::deflate_small;
use crate::fanout::hub::{Edges, Hub};
use crate::id::{ChannelId, RequestId, UserId};
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;

/// A node as the others see it.
pub(super) struct LocalPeer(pub(super) Arc<Hub>);

impl Peer for LocalPeer {
    fn prepare(&self, channel: &ChannelId, frame: &mut Frame) {
        deflate_small(&self.0, channel, frame);
    }

    fn deliver(&self, channel: &ChannelId, frame: &Frame) -> Delivered {
        match self.0.post(channel, frame) {
            Ok(delivery) if delivery.tabs > 0 => Delivered::Taken,
            Ok(_) => Delivered::Nobody,
            Err(_) => Delivered::Full,
        }
    }

    fn count_refused(&self) {
        self.0.metrics().engine.refused_forwards.increment();
    }

    fn rooms_missed(&self) {
        self.0.tell_rooms_of_gap();
    }

    fn users_missed(&self) {
        self.0.tell_users_of_gap();
    }

    fn channel_missed(&self, channel: &ChannelId) {
        self.0.tell_channel_of_gap(channel);
    }

    fn tabs(&self, user: &UserId) -> usize {
        self.0.registry().get_sessions(user).map_or(0, |sessions| sessions.len())
    }

    fn users(&self) -> Vec<UserId> {
        self.0.registry().active_users(usize::MAX).into_iter().map(|(user, _)| user).collect()
    }

    fn end_sessions(&self, user: &UserId, ending: Disconnect) -> bool {
        let is_ended = self.0.end_sessions(&ChannelId::User(user.clone()), ending).is_ok();
        if is_ended {
            self.0.cancel_streams(user);
        }
        is_ended
    }

    fn has_stream(&self, request: &RequestId) -> bool {
        self.0.has_stream(request)
    }

    fn forget_backlog(&self, user: &UserId) {
        self.0.forget_backlog(user);
    }
}

/// Tells the broker of those who come and go.
pub(super) struct PresenceEdges {
    pub(super) broker: Arc<dyn Broker>,
    pub(super) node: NodeId,
}

impl Edges for PresenceEdges {
    fn changed(&self, user: &UserId) {
        self.broker.presence_changed(self.node, user);
    }
}
