//! Many nodes as one, through Redis: standalone or Cluster.
//!
//! ```text
//!  sg:nodes                 sorted set   the nodes that are alive, by when they count as gone
//!  sg:node:{N}:users        hash         the users of node N, and how many tabs of each
//!  sg:node:{N}:address      string       where node N is reached, for its files
//!  sg:online:{U}            set          the nodes that have a tab of user U
//!  sg:recovery:{U}          stream       the frames that U's tabs may want again (recovery = "redis")
//!  sg:recovery:{U}:edits    hash         where the newest edit of each message is in it
//!
//!  sg:node:{N}              pub/sub      packed frames for node N (sharded in a cluster)
//!  sg:nodes:all             pub/sub      packed frames for every node: rooms
//!  sg:sse:R                 pub/sub      the frames of stream R, one message each, JSON in ASCII; a traced one has
//!                                        `traceparent`, and perhaps `tracestate`, as its last keys
//!  sg:presence              pub/sub      who comes and goes: {"user_id","node","online"}
//! ```
//! (`{…}` are braces that choose a cluster's slot; a brace or a percent sign in a user's id is percent-encoded there.)
//!
//! # Delivery guarantee
//! Between nodes a frame is delivered **at most once**, in the order of each publishing node's calls for one channel.
//!
//! - While Redis is away, what is for other nodes waits in a spool that is bounded in bytes, and goes out in order when it
//!   is back. Past the bound a frame that has nobody here is refused; one that has is delivered here only, and counted.
//! - What was under way when a connection broke is said again, and known again by its number: it is not doubled. (Others who
//!   listen to `sg:sse:R` can see a frame twice: its message id tells.)
//! - A node that is not subscribed for a moment gets its own messages when it is again; what is for a room it misses. What
//!   Redis took and could not pass on (it died, or cut the subscriber for its output buffer) is lost, and known by the numbers: `lost_messages`.
//!   So it is what a publisher had for a node that it took for dead. As the next message shows the loss, every tab that it may
//!   have been for is told of a gap: those in rooms, or all tabs of users; what recovery keeps here of users is let go.
//!   A stream's frame that finds nobody subscribed is lost, and reported as not delivered.
//! - With `recovery = "redis"`, what a tab has missed by any of this it gets when it comes back, whole, or it is told of a gap.

pub(crate) mod arrivals;
mod book;
#[doc(hidden)]
pub mod ends;
pub(crate) mod keys;
pub(crate) mod link;
pub(crate) mod members;
pub mod packed;
pub(crate) mod presence;
pub(crate) mod publisher;
pub(crate) mod recovery;
pub(crate) mod spool;
mod stream_frame;
pub(crate) mod subscriber;
#[cfg(test)]
pub(crate) mod testing;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use redis::Value;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Instant;

pub use crate::broker::redis::keys::NodeName;
pub use crate::broker::redis::link::RedisServer;

use crate::broker::redis::arrivals::{Arrival, Arrivals, Loss};
use crate::broker::redis::ends::{Heard, Opened};
use crate::broker::redis::keys::Keys;
use crate::broker::redis::link::{Endpoint, Link, refused};
use crate::broker::redis::members::Members;
use crate::broker::redis::packed::Record;
use crate::broker::redis::presence::Presence;
use crate::broker::redis::publisher::Publisher;
use crate::broker::redis::spool::{Destination, Item, Spool};
use crate::broker::redis::stream_frame::stream_frame;
use crate::broker::redis::subscriber::{Side, Subscriber, Subscriptions};
use crate::broker::{Broker, BrokerFuture, Forwarded, Kept, NodeId, OnlineUser, Peer, Receipt, SpoolFull, Unhealthy};
use crate::id::{ChannelId, RequestId, UserId};
use crate::metrics::BrokerMetrics;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Frame, Kind, Moment};
use crate::proto::limits::RecoveryLimits;
use crate::proto::trace::TraceContext;
use crate::traces::Span;

/// A log line of one sort at most so often.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Users whose kept frames are forgotten at one time.
const HOLES: usize = 1_024;
/// How often it is looked again for what others do.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// How long a node waits for those that do not say that they know of it.
const SEEN_TIME: Duration = Duration::from_secs(1);

/// What a broker is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisSettings {
    /// Where Redis is.
    pub server: RedisServer,
    /// What all names begin with. Default `sg:`.
    pub prefix: String,
    /// How much is kept of users' frames for tabs that come back; None: nothing.
    pub recovery: Option<RecoveryLimits>,
    /// Bytes of frames that may wait for Redis, and as much again of what came and waits for the shards. Default 64 MiB.
    pub spool_bytes_max: usize,
    /// How long a message to oneself may take. Default 3 s.
    pub canary_deadline: Duration,
    /// Where other nodes reach this one over HTTP.
    pub address: Option<String>,
}

impl Default for RedisSettings {
    fn default() -> Self {
        Self {
            server: RedisServer::default(),
            prefix: "sg:".to_owned(),
            recovery: None,
            spool_bytes_max: 64 << 20,
            canary_deadline: Duration::from_secs(3),
            address: None,
        }
    }
}

/// What all parts of a broker share.
pub(crate) struct Shared {
    pub(crate) endpoint: Endpoint,
    pub(crate) keys: Keys,
    pub(crate) me: NodeName,
    /// This node's own pub/sub channel.
    own_channel: String,
    pub(crate) spool: Arc<Spool>,
    pub(crate) members: Members,
    pub(crate) metrics: Arc<BrokerMetrics>,
    pub(crate) recovery: Option<RecoveryLimits>,
    pub(crate) subscription: Subscriptions,
    pub(crate) presence: Presence,
    pub(crate) commands: Link,
    arrivals: Arrivals,
    heard: Mutex<Heard>,
    peer: OnceLock<Weak<dyn Peer>>,
    begun: Instant,
    canary_deadline: Duration,
    /// When the canary that came home last was sent, in microseconds since the beginning.
    ///
    /// # Ordering
    /// Relaxed: a clock's reading, publishes nothing.
    canary: AtomicU64,
    refusal_logged: Mutex<Option<Instant>>,
    /// Users of whose frames not all are kept: what is kept of them is of no use any more.
    holes: Mutex<HashSet<UserId>>,
}

impl Shared {
    pub(crate) fn peer(&self) -> Option<Arc<dyn Peer>> {
        self.peer.get().and_then(Weak::upgrade)
    }

    /// Microseconds since the beginning.
    pub(crate) fn micros(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// How long ago the canary was sent that came home last.
    pub(crate) fn canary_age(&self) -> Duration {
        Duration::from_micros(self.micros().saturating_sub(self.canary.load(Ordering::Relaxed)))
    }

    /// Counts what the server refused, and tells of it now and then. True if it did refuse.
    pub(crate) fn note_refusal(&self, answer: &Value) -> bool {
        let Some(reason) = refused(answer) else { return false };
        self.metrics.refused_commands.increment();
        let mut logged = self.refusal_logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
            *logged = Some(Instant::now());
            tracing::warn!(%reason, "Redis refuses a command");
        }
        true
    }

    /// Whether what is kept of a user has a hole.
    pub(crate) fn note_hole(&self, user: &UserId, has_hole: bool) {
        let mut holes = self.holes.lock().unwrap_or_else(PoisonError::into_inner);
        if has_hole {
            holes.insert(user.clone());
        } else {
            holes.remove(user);
        }
    }

    /// Some of the users of whose frames not all are kept: as many as one batch forgets.
    pub(crate) fn some_holes(&self) -> Vec<UserId> {
        self.holes.lock().unwrap_or_else(PoisonError::into_inner).iter().take(HOLES).cloned().collect()
    }

    /// A message on one of the subscribed channels. Must not wait.
    fn on_message(&self, channel: &[u8], payload: &[u8]) {
        let Some(peer) = self.peer() else { return };
        let Ok(channel) = std::str::from_utf8(channel) else { return };
        let received = Moment::at(Instant::now().into_std());
        if let Some(request) = self.keys.stream_of(channel) {
            return self.on_stream_frame(&*peer, request, payload, received);
        }
        let is_own = channel == self.own_channel;
        if self.on_packed(&*peer, is_own, payload, received).is_err() {
            self.metrics.unreadable_messages.increment();
        }
    }

    fn on_packed(
        &self,
        peer: &dyn Peer,
        is_own: bool,
        payload: &[u8],
        received: Moment,
    ) -> Result<(), packed::Unreadable> {
        let opened = {
            let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.open(self.me, is_own, payload, &self.metrics)?
        };
        let Some(Opened { mut message, follows_gap }) = opened else { return Ok(()) };
        if follows_gap {
            self.arrivals.take(peer, if is_own { Arrival::Loss(Loss::ToUsers) } else { Arrival::Loss(Loss::ToRooms) });
        }
        while let Some(record) = message.next() {
            let record = record?;
            let trace = message.take_trace();
            self.on_record(peer, message.publisher, (record, trace), received);
        }
        Ok(())
    }

    fn on_record(
        &self,
        peer: &dyn Peer,
        publisher: NodeName,
        (record, trace): (Record, Option<TraceContext>),
        received: Moment,
    ) {
        match record {
            Record::Frame { channel, mut frame } => {
                frame.accept(received);
                let span = Span::receive(trace, &channel, &frame, self.me.0);
                peer.prepare(&channel, &mut frame);
                self.arrivals.take(peer, Arrival::Frame { channel, frame, span });
            }
            Record::End { user, ending } => self.arrivals.take(peer, Arrival::End { user, ending }),
            Record::Come => {
                self.members.add(publisher);
                self.spool.push(Item::Tell { to: Destination::Node(publisher), record: Record::Seen });
            }
            Record::Seen => self.members.seen_by(publisher),
            Record::Canary { micros } => {
                self.canary.store(micros, Ordering::Relaxed);
                let (sent, now) = (Duration::from_micros(micros), self.begun.elapsed());
                self.metrics.canary_came(sent, now.saturating_sub(sent));
            }
        }
    }

    fn on_stream_frame(&self, peer: &dyn Peer, request: &str, payload: &[u8], received: Moment) {
        let frame = RequestId::parse(request).ok().map(ChannelId::Stream).zip(stream_frame(payload));
        let Some((channel, (mut frame, trace))) = frame else {
            return self.metrics.unreadable_messages.increment();
        };
        frame.accept(received);
        if !self.arrivals.is_double(&channel, &frame) {
            let span = Span::receive(trace, &channel, &frame, self.me.0);
            self.arrivals.take(peer, Arrival::Frame { channel, frame, span });
        }
    }

    /// Forgets what is known of nodes that have been gone for a while. To be called about once a second.
    pub(crate) fn forget_the_gone(&self) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.keep(|node| self.members.is_live(node), Instant::now());
    }
}

/// A node of a deployment on one Redis. One engine holds it.
pub struct RedisBroker {
    shared: Arc<Shared>,
    runtime: Handle,
    tasks: Mutex<JoinSet<()>>,
}

impl std::fmt::Debug for RedisBroker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shared = &self.shared;
        f.debug_struct("RedisBroker")
            .field("node", &shared.me)
            .field("has_joined", &shared.presence.has_joined())
            .field("nodes", &shared.members.count())
            .field("unseen", &shared.members.unseen())
            .field("canary_age", &shared.canary_age())
            .finish_non_exhaustive()
    }
}

impl RedisBroker {
    /// A broker whose tasks run on `runtime`, once an engine is made with it. It connects by itself, and goes on trying.
    ///
    /// # Errors
    /// A URL that is none, or certificates that cannot be read.
    pub fn new(settings: RedisSettings, runtime: Handle) -> Result<Arc<Self>, redis::RedisError> {
        let me = NodeName::random();
        let endpoint = Endpoint::new(&settings.server, &format!("tabcast-{me}"))?;
        let begun = Instant::now();
        let metrics = Arc::new(BrokerMetrics::new(begun.into_std()));
        let keys = Keys::new(&settings.prefix);
        let shared = Shared {
            commands: Link::new(endpoint.clone(), "commands"),
            own_channel: keys.node(me),
            keys,
            me,
            spool: Spool::new(settings.spool_bytes_max, Arc::clone(&metrics)),
            members: Members::new(me),
            recovery: settings.recovery.filter(RecoveryLimits::is_on),
            subscription: Subscriptions::default(),
            presence: Presence::new(settings.address),
            arrivals: Arrivals::new(settings.spool_bytes_max, Arc::clone(&metrics)),
            heard: Mutex::default(),
            peer: OnceLock::new(),
            begun,
            canary_deadline: settings.canary_deadline,
            canary: AtomicU64::new(0),
            refusal_logged: Mutex::new(None),
            holes: Mutex::default(),
            endpoint,
            metrics,
        };
        Ok(Arc::new(Self { shared: Arc::new(shared), runtime, tasks: Mutex::new(JoinSet::new()) }))
    }

    /// This node's name in Redis.
    #[must_use]
    pub fn node(&self) -> NodeName {
        self.shared.me
    }

    #[cfg(feature = "gateway")]
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.shared.endpoint
    }

    /// Where other nodes reach this one over HTTP from now on: for whoever knows its port only once it listens.
    pub fn set_address(&self, address: String) {
        self.shared.presence.set_address(address);
    }

    /// Waits until Redis knows of this node, a message to oneself has come home, and the other nodes have said that they
    /// know of it; at most until `deadline` has passed. One that does not say so within a second may have died just now,
    /// and is not waited for. False if Redis does not answer: the node works, alone, until it does.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing.
    pub async fn joined(&self, deadline: Duration) -> bool {
        let shared = &self.shared;
        let joined = async {
            while shared.canary.load(Ordering::Relaxed) == 0 || !shared.presence.has_joined() {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let has_joined = tokio::time::timeout(deadline, joined).await.is_ok();
        let seen = async {
            while shared.members.unseen() > 0 {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let _ = tokio::time::timeout(if has_joined { SEEN_TIME } else { Duration::ZERO }, seen).await;
        has_joined
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).spawn_on(task, &self.runtime);
    }

    /// Waits for an answer for as long as Redis may take.
    async fn within<T>(&self, answer: oneshot::Receiver<T>) -> Option<T> {
        tokio::time::timeout(self.shared.endpoint.timeout(), answer).await.ok()?.ok()
    }
}

impl Broker for RedisBroker {
    fn attach(&self, peer: &Arc<dyn Peer>) -> NodeId {
        let shared = &self.shared;
        if shared.peer.set(Arc::downgrade(peer)).is_ok() {
            self.spawn(Publisher::new(Arc::clone(shared)).run());
            self.spawn(Subscriber::new(Arc::clone(shared), Side::Plain).run());
            if shared.endpoint.is_cluster() {
                self.spawn(Subscriber::new(Arc::clone(shared), Side::Sharded).run());
            }
            self.spawn(presence::run(Arc::clone(shared)));
            self.spawn(presence::keep_alive(Arc::clone(shared)));
            let arrivals = Arc::clone(shared);
            self.spawn(async move { arrivals.arrivals.run(|| arrivals.peer()).await });
        }
        NodeId(shared.me.0)
    }

    fn wants(&self, _node: NodeId, channel: &ChannelId, kind: Kind) -> bool {
        match channel {
            // Others than nodes may listen.
            ChannelId::Stream(_) => true,
            ChannelId::Room(_) => self.shared.members.has_others(),
            ChannelId::User(_) => {
                self.shared.members.has_others() || (self.shared.recovery.is_some() && recovery::wants(kind))
            }
        }
    }

    fn forward(&self, _from: NodeId, channel: &ChannelId, frame: &Frame) -> Result<Forwarded, SpoolFull> {
        let (sender, receipt) = Receipt::new();
        self.shared.spool.push_frame(channel, frame, sender)?;
        Ok(Forwarded::Later(receipt))
    }

    /// A cluster's node counts the subscribers that it has itself.
    fn counts_all(&self, channel: &ChannelId) -> bool {
        matches!(channel, ChannelId::User(_)) || !self.shared.endpoint.is_cluster()
    }

    fn expect<'a>(&'a self, _node: NodeId, channel: &'a ChannelId) -> BrokerFuture<'a, ()> {
        Box::pin(async move {
            let confirmed = match channel {
                ChannelId::User(user) => self.shared.presence.expect(user),
                ChannelId::Stream(request) => self.shared.subscription.want(request),
                ChannelId::Room(_) => None,
            };
            // With Redis away there is nothing to be missed but what waits for it too.
            if let Some(confirmed) = confirmed
                && self.health().is_ok()
            {
                self.within(confirmed).await;
            }
        })
    }

    fn presence_changed(&self, _node: NodeId, user: &UserId) {
        self.shared.presence.changed(user);
    }

    fn is_online_elsewhere<'a>(&'a self, _from: NodeId, user: &'a UserId) -> BrokerFuture<'a, bool> {
        Box::pin(presence::is_online(&self.shared, user))
    }

    fn end_elsewhere<'a>(&'a self, _from: NodeId, user: &'a UserId, ending: Disconnect) -> BrokerFuture<'a, usize> {
        Box::pin(async move {
            if self.health().is_err() {
                return 0;
            }
            let (told, answer) = oneshot::channel();
            self.shared.spool.push(Item::End { user: user.clone(), ending, told });
            self.within(answer).await.unwrap_or_default()
        })
    }

    fn users_elsewhere(&self, _from: NodeId, limit: usize) -> BrokerFuture<'_, Option<Vec<OnlineUser>>> {
        Box::pin(presence::users(&self.shared, limit))
    }

    fn recovery(&self) -> Option<&RecoveryLimits> {
        self.shared.recovery.as_ref()
    }

    fn kept<'a>(&'a self, _node: NodeId, user: &'a UserId) -> BrokerFuture<'a, Kept> {
        // It has its place in the order now, not when it is waited for.
        let answer = self.health().is_ok().then(|| {
            let (sender, answer) = oneshot::channel();
            self.shared.spool.push(Item::Kept { user: user.clone(), answer: Some(sender) });
            answer
        });
        Box::pin(async move { self.within(answer?).await.flatten() })
    }

    fn health(&self) -> Result<(), Unhealthy> {
        let (age, deadline) = (self.shared.canary_age(), self.shared.canary_deadline);
        let has_come = self.shared.canary.load(Ordering::Relaxed) > 0;
        if !has_come || age > deadline { Err(Unhealthy::Canary(age)) } else { Ok(()) }
    }

    fn metrics(&self) -> Option<&Arc<BrokerMetrics>> {
        Some(&self.shared.metrics)
    }

    fn tag(&self) -> u32 {
        self.shared.me.tag()
    }

    fn address_of(&self, tag: u32) -> BrokerFuture<'_, Option<String>> {
        Box::pin(presence::address_of(&self.shared, tag))
    }

    fn leave(&self, _node: NodeId) -> BrokerFuture<'_, ()> {
        Box::pin(async move {
            presence::leave(&self.shared).await;
            while !self.shared.spool.is_empty() || self.shared.spool.bytes() > 0 {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        })
    }
}
