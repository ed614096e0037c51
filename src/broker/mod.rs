//! Between nodes: who else holds a channel's sessions, and how a frame gets there.

pub mod memory;
#[cfg(feature = "redis")]
pub mod redis;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use atomic_waker::AtomicWaker;

use crate::id::{ChannelId, MessageId, RequestId, UserId};
use crate::metrics::BrokerMetrics;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Frame, Kind};
use crate::proto::limits::RecoveryLimits;

/// A boxed future of a broker.
pub type BrokerFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What became of a frame from another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    /// It was posted to a session or more.
    Taken,
    /// There was nobody.
    Nobody,
    /// The inboxes have no room: nothing was posted, and it may be tried again. Who does not calls
    /// [`Peer::count_refused`].
    Full,
}

/// Whether who misses a frame of that kind has to be told. A sign of typing may be dropped: the next one says as much.
pub(crate) fn leaves_gap(kind: Kind) -> bool {
    kind != Kind::Typing
}

/// What a node offers to the others.
pub trait Peer: Send + Sync + 'static {
    /// Gives a frame that has just come from another node the form that sessions of this node want beside the plain one,
    /// while nobody else holds it. By default there is none.
    fn prepare(&self, _channel: &ChannelId, _frame: &mut Frame) {}
    /// Posts a frame from another node to this node's sessions.
    fn deliver(&self, channel: &ChannelId, frame: &Frame) -> Delivered;
    /// Counts a frame that was not delivered for want of room.
    fn count_refused(&self);
    /// What another node said to rooms never came here. What came before and waits is posted before this is called.
    fn rooms_missed(&self);
    /// What another node said to this one never came here: frames to users, nobody knows to whom. As above.
    fn users_missed(&self);
    /// A frame to a user or a room was dropped here for want of room. As above, and counted by [`Self::count_refused`].
    fn channel_missed(&self, channel: &ChannelId);
    /// How many sessions the user has on this node.
    fn tabs(&self, user: &UserId) -> usize;
    /// The users who have a session on this node.
    fn users(&self) -> Vec<UserId>;
    /// Ends the user's sessions on this node. False if there was no room for that now.
    fn end_sessions(&self, user: &UserId, ending: Disconnect) -> bool;
    /// Whether this node holds the stream.
    fn has_stream(&self, request: &RequestId) -> bool;
    /// Nothing more comes for a user without sessions: what recovery keeps here has holes from now on.
    fn forget_backlog(&self, user: &UserId);
}

/// A node's number on its broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub(crate) u64);

impl NodeId {
    /// The node with that number: for a broker that counts its own.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }
}

/// What became of a frame that was offered to the other nodes.
#[derive(Debug)]
pub enum Forwarded {
    /// So many nodes took it.
    Now(usize),
    /// It is on its way, in order; the receipt tells.
    Later(Receipt),
}

/// Tells how many nodes took a frame, once that is known: 0 also when it will never be.
///
/// # Cancel safety
/// Dropping it changes nothing.
#[derive(Debug)]
pub struct Receipt(Arc<Progress>);

/// The end that writes a receipt. Dropped, all is known.
#[derive(Debug)]
pub struct ReceiptWriter(Arc<Progress>);

#[derive(Debug, Default)]
struct Progress {
    /// Nodes that took it.
    ///
    /// # Ordering
    /// Relaxed: who reads it before the end gets some of them; the end is ordered by `is_over`.
    nodes: AtomicUsize,
    /// # Ordering
    /// Release by the writer, Acquire by the reader: all of `nodes` is there with it.
    is_over: AtomicBool,
    reader: AtomicWaker,
}

impl Receipt {
    /// A receipt, and the end that writes it.
    #[must_use]
    pub fn new() -> (ReceiptWriter, Self) {
        let progress = Arc::new(Progress::default());
        (ReceiptWriter(Arc::clone(&progress)), Self(progress))
    }

    /// Nodes that have taken it by now.
    #[must_use]
    pub fn so_far(&self) -> usize {
        self.0.nodes.load(Ordering::Relaxed)
    }
}

impl ReceiptWriter {
    /// So many nodes have taken it.
    pub fn add(&self, nodes: usize) {
        self.0.nodes.fetch_add(nodes, Ordering::Relaxed);
    }
}

impl Drop for ReceiptWriter {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Release);
        self.0.reader.wake();
    }
}

impl Future for Receipt {
    type Output = usize;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<usize> {
        let progress = &self.0;
        if !progress.is_over.load(Ordering::Acquire) {
            progress.reader.register(context.waker());
            // It may have been over just before.
            if !progress.is_over.load(Ordering::Acquire) {
                return Poll::Pending;
            }
        }
        Poll::Ready(progress.nodes.load(Ordering::Relaxed))
    }
}

/// What waits for other nodes is as much as may wait: this frame was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too much waits for the other nodes")]
pub struct SpoolFull;

/// Why a node should get no new connections for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unhealthy {
    /// A message to oneself has been on its way for longer than it may.
    #[error("a message to this node through Redis has not come home for {}ms", .0.as_millis())]
    Canary(Duration),
}

/// A user as all nodes see them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OnlineUser {
    /// Who.
    pub user: UserId,
    /// Tabs, on all nodes.
    pub tabs: usize,
}

/// What a user's tabs may have missed, whichever node they were on: oldest first. None: it is not known.
pub type Kept = Option<Vec<KeptFrame>>;

/// One frame of what is kept.
#[derive(Debug, Clone)]
pub enum KeptFrame {
    /// It is here.
    Frame {
        /// The frame.
        frame: Frame,
        /// How long ago it was kept.
        age: Duration,
    },
    /// It was too large to be kept: nothing that spans it is whole.
    Hole {
        /// The message, if it was one and not an edit.
        id: Option<MessageId>,
    },
}

impl KeptFrame {
    /// The message that it is, or is about.
    #[must_use]
    pub fn id(&self) -> Option<MessageId> {
        match self {
            Self::Frame { frame, .. } => frame.message_id(),
            Self::Hole { id } => *id,
        }
    }
}

/// Carries frames between nodes.
///
/// # Delivery guarantee
/// At most once, in the order of each publishing node's calls for one channel. What a node could not take is counted
/// there and not sent again.
pub trait Broker: Send + Sync + 'static {
    /// Adds a node. It is gone once its peer is dropped.
    fn attach(&self, peer: &Arc<dyn Peer>) -> NodeId;

    /// Whether a frame has to be offered: with no other node nothing has to be kept in order for it.
    fn wants(&self, node: NodeId, channel: &ChannelId, kind: Kind) -> bool;

    /// Offers a frame to the other nodes. Calls for one channel come one after the other. Never waits.
    ///
    /// # Errors
    /// [`SpoolFull`]: no node gets it.
    fn forward(&self, from: NodeId, channel: &ChannelId, frame: &Frame) -> Result<Forwarded, SpoolFull>;

    /// Whether every node that takes a frame of the channel is counted.
    fn counts_all(&self, channel: &ChannelId) -> bool {
        let _ = channel;
        true
    }

    /// Ready once what others publish from then on to `channel` reaches this node, or once that takes too long: a session
    /// of the channel is about to be opened.
    fn expect<'a>(&'a self, node: NodeId, channel: &'a ChannelId) -> BrokerFuture<'a, ()> {
        let _ = (node, channel);
        Box::pin(std::future::ready(()))
    }

    /// The number of a user's sessions on the node has changed.
    fn presence_changed(&self, node: NodeId, user: &UserId) {
        let _ = (node, user);
    }

    /// Whether the user has a session on another node.
    fn is_online_elsewhere<'a>(&'a self, from: NodeId, user: &'a UserId) -> BrokerFuture<'a, bool>;

    /// Ends the user's sessions on the other nodes. Returns how many nodes were told.
    fn end_elsewhere<'a>(&'a self, from: NodeId, user: &'a UserId, ending: Disconnect) -> BrokerFuture<'a, usize>;

    /// The users of the other nodes, at most `limit`; None if they cannot be had now.
    fn users_elsewhere(&self, from: NodeId, limit: usize) -> BrokerFuture<'_, Option<Vec<OnlineUser>>>;

    /// How much is kept here of each user's frames, for tabs that come back; None: nothing.
    fn recovery(&self) -> Option<&RecoveryLimits> {
        None
    }

    /// What is kept of a user's frames. It has all that was forwarded before this call.
    fn kept<'a>(&'a self, node: NodeId, user: &'a UserId) -> BrokerFuture<'a, Kept> {
        let _ = (node, user);
        Box::pin(std::future::ready(None))
    }

    /// Whether the node may get new connections.
    ///
    /// # Errors
    /// [`Unhealthy`]: why not.
    fn health(&self) -> Result<(), Unhealthy> {
        Ok(())
    }

    /// What is counted, if anything is.
    fn metrics(&self) -> Option<&Arc<BrokerMetrics>> {
        None
    }

    /// A mark of this node for the ids of what only it has; 0 if there is no need for one.
    fn tag(&self) -> u32 {
        0
    }

    /// Where the node with that mark is found, such as `http://10.0.0.7:8080`.
    fn address_of(&self, tag: u32) -> BrokerFuture<'_, Option<String>> {
        let _ = tag;
        Box::pin(std::future::ready(None))
    }

    /// Takes the node out and sends what waits, as long as the caller waits for it.
    fn leave(&self, node: NodeId) -> BrokerFuture<'_, ()> {
        let _ = node;
        Box::pin(std::future::ready(()))
    }
}
