//! The subscriber: what the other nodes say, on connections that do nothing else.
//!
//! One connection has the plain pub/sub channels: what is for every node, and the streams that this node holds. In a
//! cluster this node's own channel is sharded, and has a second connection, to the node of the cluster that has its
//! slot. After every connect all of it is subscribed anew, each answer is waited for, and what Redis believes is read
//! back on another connection. A connection is given up when it breaks, when Redis takes a subscription away, when a
//! publish to oneself finds nobody, and when the canary does not come home.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{
    ConnectionAddr, ConnectionInfo, ErrorKind, ProtocolVersion, PushInfo, PushKind, RedisError, RedisResult, Value,
};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::broker::redis::Shared;
use crate::broker::redis::link::backoff;
use crate::id::RequestId;

/// Pub/sub channels of one SUBSCRIBE.
const CHUNK: usize = 512;
/// How often it is looked for streams that have ended, and for the canary.
const TICK: Duration = Duration::from_millis(500);
/// A stream that nobody holds so long after it was announced is not subscribed any more.
const STREAM_GRACE: Duration = Duration::from_secs(15);
/// A canary that is out for so much longer than an answer may take makes a connection that seems well suspect.
const CANARY_PATIENCE: Duration = Duration::from_millis(1_500);

/// What is to be subscribed, and who waits for that.
#[derive(Default)]
pub(crate) struct Subscriptions {
    streams: Mutex<HashMap<RequestId, Wanted>>,
    changed: Notify,
    /// A publish to this node's own channel has found nobody.
    pub(crate) lost_here: Notify,
}

struct Wanted {
    since: Instant,
    is_subscribed: bool,
    waiting: Vec<oneshot::Sender<()>>,
}

impl Subscriptions {
    fn streams(&self) -> std::sync::MutexGuard<'_, HashMap<RequestId, Wanted>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream that this node is about to hold. None: it is subscribed already.
    pub(crate) fn want(&self, request: &RequestId) -> Option<oneshot::Receiver<()>> {
        let mut streams = self.streams();
        let wanted = streams.entry(request.clone()).or_insert_with(|| Wanted {
            since: Instant::now(),
            is_subscribed: false,
            waiting: Vec::new(),
        });
        wanted.since = Instant::now();
        wanted.waiting.retain(|waiting| !waiting.is_closed());
        if wanted.is_subscribed {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        wanted.waiting.push(sender);
        drop(streams);
        self.changed.notify_one();
        Some(receiver)
    }

    fn unsubscribed(&self) -> Vec<RequestId> {
        let streams = self.streams();
        streams.iter().filter(|(_, wanted)| !wanted.is_subscribed).map(|(request, _)| request.clone()).collect()
    }

    fn set_subscribed(&self, requests: &[RequestId]) {
        let mut streams = self.streams();
        for request in requests {
            if let Some(wanted) = streams.get_mut(request) {
                wanted.is_subscribed = true;
                // Who has given up does not hear it.
                for waiting in wanted.waiting.drain(..) {
                    let _ = waiting.send(());
                }
            }
        }
    }

    /// Nothing is subscribed any more.
    fn reset(&self) {
        self.streams().values_mut().for_each(|wanted| wanted.is_subscribed = false);
    }

    /// Takes out the streams that have ended.
    fn take_ended(&self, is_held: impl Fn(&RequestId) -> bool) -> Vec<RequestId> {
        let mut ended = Vec::new();
        self.streams().retain(|request, wanted| {
            let stays = wanted.since.elapsed() < STREAM_GRACE || is_held(request);
            if !stays {
                ended.push(request.clone());
            }
            stays
        });
        ended
    }
}

/// Which of the two connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// Plain pub/sub channels.
    Plain,
    /// This node's own channel, in a cluster.
    Sharded,
}

/// Runs until the broker is dropped.
pub(crate) struct Subscriber {
    shared: Arc<Shared>,
    side: Side,
    failures: u32,
    /// Where the slot of this node's channel was last.
    owner: Option<ConnectionInfo>,
}

impl Subscriber {
    pub(crate) fn new(shared: Arc<Shared>, side: Side) -> Self {
        Self { shared, side, failures: 0, owner: None }
    }

    /// # Cancel safety
    /// Dropping it ends the subscriptions.
    pub(crate) async fn run(mut self) {
        loop {
            let Err(error) = self.session().await;
            self.shared.metrics.failures.increment();
            if self.failures == 0 {
                tracing::warn!(side = ?self.side, %error, "the subscription to Redis is lost; trying again");
            }
            tokio::time::sleep(backoff(self.failures)).await;
            self.failures = self.failures.saturating_add(1);
            if self.side == Side::Plain
                && let Some(peer) = self.shared.peer()
            {
                // What ended over an outage is not subscribed after it.
                drop(self.shared.subscription.take_ended(|request| peer.has_stream(request)));
            }
        }
    }

    /// One connection, from its making to its loss.
    async fn session(&mut self) -> RedisResult<std::convert::Infallible> {
        let lost = Arc::new(Lost::default());
        let (mut connection, node) = match self.side {
            Side::Plain => self.subscribe_plain(&lost).await?,
            Side::Sharded => self.subscribe_own(&lost).await?,
        };
        self.verify(&node).await?;
        // What was said of an earlier connection says nothing of this one.
        let _ = tokio::time::timeout(Duration::ZERO, self.shared.subscription.lost_here.notified()).await;
        self.shared.metrics.resubscriptions.increment();
        if std::mem::take(&mut self.failures) > 0 {
            tracing::info!(side = ?self.side, "subscribed at Redis again");
        }
        let begun = Instant::now();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let shared = Arc::clone(&self.shared);
        let has_own_channel = self.side == Side::Sharded || !shared.endpoint.is_cluster();
        loop {
            tokio::select! {
                () = lost.bell.notified() => return Err(closed(lost.reason())),
                () = shared.subscription.lost_here.notified(), if has_own_channel => {
                    return Err(closed("Redis knows of no subscription of this node"));
                }
                () = shared.subscription.changed.notified(), if self.side == Side::Plain => {
                    self.subscribe_streams(&mut connection).await?;
                }
                _ = tick.tick() => {
                    let patience = shared.endpoint.timeout() + CANARY_PATIENCE;
                    let is_suspect = begun.elapsed() > patience && shared.canary_age() > patience;
                    if is_suspect && has_own_channel {
                        return Err(closed("a message to this node does not come home"));
                    }
                    if self.side == Side::Plain {
                        self.unsubscribe_ended(&mut connection).await?;
                    }
                }
            }
        }
    }

    async fn connect(&self, node: &ConnectionInfo, lost: &Arc<Lost>) -> RedisResult<MultiplexedConnection> {
        let (shared, lost) = (Arc::clone(&self.shared), Arc::clone(lost));
        let push = move |push: PushInfo| -> Result<(), ()> {
            on_push(&shared, &lost, push);
            Ok(())
        };
        let config = self.shared.endpoint.config().set_push_sender(push);
        let role = if self.side == Side::Plain { "subscribe" } else { "subscribe-own" };
        self.shared.endpoint.connect_to(node, role, config, ProtocolVersion::RESP3).await
    }

    async fn subscribe_plain(&self, lost: &Arc<Lost>) -> RedisResult<(MultiplexedConnection, ConnectionInfo)> {
        let shared = &self.shared;
        let seeds = shared.endpoint.seeds();
        let node = &seeds[self.failures as usize % seeds.len().max(1)];
        let mut connection = self.connect(node, lost).await?;
        shared.subscription.reset();
        connection.subscribe(&fixed(shared)).await?;
        self.subscribe_streams(&mut connection).await?;
        Ok((connection, node.clone()))
    }

    async fn subscribe_streams(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let (subscription, keys) = (&self.shared.subscription, &self.shared.keys);
        for requests in subscription.unsubscribed().chunks(CHUNK) {
            let channels: Vec<_> = requests.iter().map(|request| keys.stream(request)).collect();
            connection.subscribe(&channels).await?;
            subscription.set_subscribed(requests);
        }
        Ok(())
    }

    async fn unsubscribe_ended(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let Some(peer) = self.shared.peer() else { return Ok(()) };
        let ended = self.shared.subscription.take_ended(|request| peer.has_stream(request));
        drop(peer);
        for requests in ended.chunks(CHUNK) {
            let channels: Vec<_> = requests.iter().map(|request| self.shared.keys.stream(request)).collect();
            connection.unsubscribe(&channels).await?;
        }
        Ok(())
    }

    /// In a cluster: at whichever node has the slot, which another node may tell.
    async fn subscribe_own(&mut self, lost: &Arc<Lost>) -> RedisResult<(MultiplexedConnection, ConnectionInfo)> {
        let seeds = self.shared.endpoint.seeds();
        let mut node = match self.owner.take() {
            Some(owner) if self.failures < 2 => owner,
            _ => seeds[self.failures as usize % seeds.len().max(1)].clone(),
        };
        for _ in 0..4 {
            let mut connection = self.connect(&node, lost).await?;
            let own = self.shared.keys.node(self.shared.me);
            match redis::cmd("SSUBSCRIBE").arg(own).exec_async(&mut connection).await {
                Ok(()) => {
                    self.owner = Some(node.clone());
                    return Ok((connection, node));
                }
                Err(error) => node = moved_to(&node, &error).ok_or(error)?,
            }
        }
        Err(closed("the slot of this node's channel is nowhere to be found"))
    }

    /// Reads back, on a connection of its own, what Redis believes.
    async fn verify(&self, node: &ConnectionInfo) -> RedisResult<()> {
        let shared = &self.shared;
        let config = shared.endpoint.config();
        let mut connection = shared.endpoint.connect_to(node, "verify", config, ProtocolVersion::RESP2).await?;
        let (command, channels) = match self.side {
            Side::Plain => {
                let streams = shared.subscription.streams();
                let subscribed = streams.iter().filter(|(_, wanted)| wanted.is_subscribed);
                let streams = subscribed.map(|(request, _)| shared.keys.stream(request));
                ("NUMSUB", fixed(shared).into_iter().chain(streams).collect::<Vec<_>>())
            }
            Side::Sharded => ("SHARDNUMSUB", vec![shared.keys.node(shared.me)]),
        };
        for channels in channels.chunks(CHUNK) {
            let answer: Value = redis::cmd("PUBSUB").arg(command).arg(channels).query_async(&mut connection).await?;
            let Value::Array(counts) = answer else { return Err(closed("PUBSUB answers strangely")) };
            let is_heard = |count: &[Value]| matches!(count, [_, Value::Int(count)] if *count > 0);
            if counts.len() != 2 * channels.len() || !counts.chunks(2).all(is_heard) {
                return Err(closed("Redis does not have all subscriptions"));
            }
        }
        Ok(())
    }
}

/// The plain channels that do not come and go.
fn fixed(shared: &Shared) -> Vec<String> {
    let mut channels = vec![shared.keys.every_node()];
    if !shared.endpoint.is_cluster() {
        channels.push(shared.keys.node(shared.me));
    }
    channels
}

fn closed(reason: &'static str) -> RedisError {
    RedisError::from((ErrorKind::Io, reason))
}

/// Where a `MOVED` points to: the host and port with what else is known of the node that said it.
fn moved_to(node: &ConnectionInfo, error: &RedisError) -> Option<ConnectionInfo> {
    let (address, _slot) = error.redirect_node()?;
    let (host, port) = address.rsplit_once(':')?;
    let port = port.parse().ok()?;
    // Some clusters name no host: it is the one that was asked.
    let host = |asked: &str| if host.is_empty() { asked.to_owned() } else { host.to_owned() };
    let address = match node.addr() {
        ConnectionAddr::Tcp(asked, _) => ConnectionAddr::Tcp(host(asked), port),
        ConnectionAddr::TcpTls { host: asked, insecure, tls_params, .. } => {
            ConnectionAddr::TcpTls { host: host(asked), port, insecure: *insecure, tls_params: tls_params.clone() }
        }
        _ => return None,
    };
    Some(node.clone().set_addr(address))
}

/// Why a connection is of no use any more, told by whoever reads from it.
#[derive(Default)]
struct Lost {
    bell: Notify,
    reason: Mutex<&'static str>,
}

impl Lost {
    fn tell(&self, reason: &'static str) {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = reason;
        self.bell.notify_one();
    }

    fn reason(&self) -> &'static str {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Called by the connection for everything that Redis says by itself. Must not wait.
fn on_push(shared: &Shared, lost: &Lost, push: PushInfo) {
    match push.kind {
        PushKind::Message | PushKind::SMessage => {
            let mut data = push.data.into_iter();
            if let (Some(Value::BulkString(channel)), Some(Value::BulkString(payload))) = (data.next(), data.next()) {
                shared.on_message(&channel, &payload);
            }
        }
        PushKind::Disconnection => lost.tell("the connection broke"),
        // This side never asks for one: the slot has moved.
        PushKind::SUnsubscribe => lost.tell("the slot of this node's channel has moved"),
        _ => {}
    }
}
