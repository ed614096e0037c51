//! The engine: what an embedder holds. It encodes an event once, posts it to the shards that need it, and offers it
//! to the other nodes. It keeps files for a while, so that their links resolve.

pub mod client;
#[cfg(test)]
#[cfg(feature = "redis")]
mod contract;
mod deflate;
pub mod files;
pub mod intake;
mod limits;
pub mod mailboxes;
mod peer;
mod posted;
mod resume;
pub mod worker;

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use event_listener::EventListener;
use smallvec::SmallVec;

use crate::broker::memory::MemoryBroker;
use crate::broker::{Broker, Forwarded, NodeId, OnlineUser, Peer, SpoolFull};
use crate::engine::deflate::deflate_small;
use crate::engine::files::{FileStore, StoredFile};
use crate::engine::peer::{LocalPeer, PresenceEdges};
pub use crate::engine::posted::Posted;
use crate::fanout::hub::{Full, Hub};
use crate::fanout::mailbox::Mailbox;
use crate::fanout::session::Address;
use crate::fanout::shard::Resume;
use crate::fanout::streams::{OpenError, StreamOptions};
use crate::id::{ChannelId, MessageId, RequestId, UserId};
use crate::metrics::{EncodeKind, Label, Metrics, PublishOutcome};
use crate::platform::adapter::{BoxFuture, OutgoingFile, Outlet, StreamError};
use crate::platform::webchat::parse_file_url;
use crate::proto::delivery::{Delivery, PublishError};
use crate::proto::disconnect::Disconnect;
use crate::proto::event::{Event, Timestamp};
use crate::proto::frame::{Frame, Kind, Moment};
use crate::proto::limits::{FileLimits, HubLimits, SessionLimits};
use crate::traces::PublishSpan;

/// Files from this many bytes on are encoded on a thread of their own.
const ENCODE_APART_BYTES: usize = 128 << 10;

/// Channels that are forwarded to other nodes at once.
const SEQUENCES: usize = 64;

/// A publish that waits for room looks again after this long even if no bell rang.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What an engine is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineSettings {
    /// Shards. Default: the number of processors.
    pub shards: usize,
    /// Limits of sessions.
    pub sessions: SessionLimits,
    /// Limits of everything else.
    pub hub: HubLimits,
    /// Limits of the files that are kept.
    pub files: FileLimits,
    /// How long a publish waits for room before it is refused as overloaded. Default 1 s.
    pub publish_deadline: Duration,
    /// Whether tabs may be [mailboxes]: one shard more, which costs an inbox and 4 bytes a room. Default true.
    pub has_mailboxes: bool,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            shards: std::thread::available_parallelism().map_or(1, usize::from),
            sessions: SessionLimits::default(),
            hub: HubLimits::default(),
            files: FileLimits::default(),
            publish_deadline: Duration::from_secs(1),
            has_mailboxes: true,
        }
    }
}

/// One node's fan-out: registry, rooms, streams and the shards' inboxes. Clones are the same engine.
///
/// ```
/// use futures_util::StreamExt;
/// use tabcast::engine::{Engine, EngineSettings};
/// use tabcast::id::{ChannelId, MessageId, RequestId};
/// use tabcast::platform::adapter::Outlet;
/// use tabcast::proto::event::Event;
///
/// # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
/// let engine = Engine::new(EngineSettings::default());
/// let mut answer = engine.open_stream(&RequestId::parse("42")?)?;
/// let event = Event::Message { id: MessageId::random(), text: "hi", sender: "star", reply_to: None, timestamp: engine.now() };
/// assert!(engine.publish(&ChannelId::parse("sse:42")?, event).await?.is_delivered());
/// let frame = answer.next().await.ok_or("no frame")?;
/// assert!(frame.json().starts_with(br#"{"type":"message","id":""#));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    hub: Arc<Hub>,
    broker: Arc<dyn Broker>,
    node: NodeId,
    files: Arc<FileStore>,
    settings: EngineSettings,
    sessions: Arc<ArcSwap<SessionLimits>>,
    /// Held while these change, here and on the shards.
    limiting: Mutex<()>,
    /// Held while a frame is posted here and offered to the other nodes: one of them for a channel.
    sequences: [Mutex<()>; SEQUENCES],
    /// Its mailboxes were started, or are being.
    has_started_mailboxes: AtomicBool,
    // Keeps the node on its broker for as long as the engine lives.
    _peer: Arc<dyn Peer>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("shards", &self.inner.hub.shard_count())
            .field("sessions", &self.inner.hub.registry().total_connections())
            .finish_non_exhaustive()
    }
}

/// Pauses between attempts to read what a tab has missed: whoever kept its position last may be a moment late.
const READ_AGAIN: [Duration; 2] = [Duration::from_millis(30), Duration::from_millis(150)];

impl Engine {
    /// An engine on its own.
    ///
    /// # Panics
    /// If `shards` is 0, or over [`SHARDS_MAX`](crate::fanout::session::SHARDS_MAX) together with that of the mailboxes.
    #[must_use]
    pub fn new(settings: EngineSettings) -> Self {
        Self::with_broker(settings, Arc::new(MemoryBroker::default()))
    }

    /// An engine that is one node of several.
    ///
    /// # Panics
    /// As [`Engine::new`].
    #[must_use]
    pub fn with_broker(settings: EngineSettings, broker: Arc<dyn Broker>) -> Self {
        let make = if settings.has_mailboxes { Hub::with_mailbox_shard } else { Hub::new };
        let hub = make(settings.shards, &settings.hub, &settings.sessions);
        let peer: Arc<dyn Peer> = Arc::new(LocalPeer(Arc::clone(&hub)));
        let node = broker.attach(&peer);
        hub.set_edges(Box::new(PresenceEdges { broker: Arc::clone(&broker), node }));
        let files = Arc::new(FileStore::new(settings.files.clone()));
        let sequences = std::array::from_fn(|_| Mutex::default());
        let (sessions, started) = (Arc::new(ArcSwap::from_pointee(settings.sessions.clone())), AtomicBool::new(false));
        let inner = Inner {
            hub,
            broker,
            node,
            files,
            settings,
            sessions,
            limiting: Mutex::default(),
            sequences,
            has_started_mailboxes: started,
            _peer: peer,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Where frames go in: the registry and the shards' inboxes.
    #[must_use]
    pub fn hub(&self) -> &Arc<Hub> {
        &self.inner.hub
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        self.inner.hub.metrics()
    }

    /// What it was made with.
    #[must_use]
    pub fn settings(&self) -> &EngineSettings {
        &self.inner.settings
    }

    /// What joins this node to the others.
    #[must_use]
    pub fn broker(&self) -> &Arc<dyn Broker> {
        &self.inner.broker
    }

    /// Whether the user has a session on any node.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing.
    pub async fn is_online(&self, user: &UserId) -> bool {
        let Inner { hub, broker, node, .. } = &*self.inner;
        hub.registry().is_online(user) || broker.is_online_elsewhere(*node, user).await
    }

    /// The users of the other nodes, at most `limit`; None if they cannot be had now.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing.
    pub async fn users_elsewhere(&self, limit: usize) -> Option<Vec<OnlineUser>> {
        self.inner.broker.users_elsewhere(self.inner.node, limit).await
    }

    /// Ready once what other nodes publish to `channel` reaches this node, or once that takes too long: call it before a
    /// tab of a user is opened, and before the request of a stream is handed on.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing.
    pub async fn expect(&self, channel: &ChannelId) {
        self.inner.broker.expect(self.inner.node, channel).await;
    }

    /// Where a tab of the user goes on, with what it missed if that is kept between nodes. For others it is `resume` again.
    /// Call it after [`expect`](Self::expect), and open the tab with the result.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing.
    pub async fn resume(&self, user: &UserId, resume: Resume) -> Resume {
        let Inner { hub, broker, node, .. } = &*self.inner;
        let Resume::After(positions) = &resume else { return resume };
        let Some(limits) = broker.recovery() else { return resume };
        let channel = ChannelId::User(user.clone());
        // What was posted before is forwarded before: whatever is not collected from here on is in what is kept.
        let (missed, mut reading) = {
            let _sequence = self.sequence(&channel);
            (hub.begin_return(user, positions), broker.kept(*node, user))
        };
        let mut pauses = READ_AGAIN.iter();
        while let Some(kept) = reading.await {
            let has_newest = kept.iter().any(|kept| kept.id() == positions.first().copied());
            if resume::find(&missed, kept, positions, limits) && has_newest {
                break;
            }
            // A publisher that is slow may be about to keep the very frame.
            let Some(pause) = pauses.next() else { break };
            tokio::time::sleep(*pause).await;
            reading = broker.kept(*node, user);
        }
        Resume::Missed(Arc::new(missed))
    }

    /// Takes this node out of those that others publish to, and waits until what waits for them is sent: put it under a
    /// deadline. Sessions stay.
    ///
    /// # Cancel safety
    /// Dropping it leaves what waits to be sent later, or to be lost with the process.
    pub async fn leave(&self) {
        self.inner.broker.leave(self.inner.node).await;
    }

    /// A file that was published on this node by [`Outlet::publish_file`], for as long as it is kept.
    #[must_use]
    pub fn file(&self, id: MessageId) -> Option<Arc<StoredFile>> {
        self.inner.files.find(id, self.now())
    }

    /// The same by the URL that the adapter returned: its name must be the file's too.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use tabcast::engine::{Engine, EngineSettings};
    /// use tabcast::id::ChannelId;
    /// use tabcast::platform::adapter::{BotIdentity, PlatformAdapter};
    /// use tabcast::platform::webchat::WebChat;
    ///
    /// # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
    /// let bot = WebChat::new(Arc::new(Engine::new(EngineSettings::default())), BotIdentity::default());
    /// let url = bot.send_file(&ChannelId::parse("ann")?, "Hi!".into(), "a b.txt", Some("text/plain")).await?;
    /// assert_eq!(bot.outlet().open_file(&url).ok_or("no file")?.data, "Hi!");
    /// assert!(bot.outlet().open_file(&url.replace("a%20b.txt", "c.txt")).is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn open_file(&self, url: &str) -> Option<Arc<StoredFile>> {
        let (id, filename) = parse_file_url(url)?;
        self.file(id).filter(|file| *file.filename == *filename)
    }

    /// Ends a user's sessions on the other nodes. Returns how many nodes were told.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing: they are told.
    pub async fn end_sessions_elsewhere(&self, user: &UserId, ending: Disconnect) -> usize {
        self.inner.broker.end_elsewhere(self.inner.node, user, ending).await
    }

    /// Ends all of a user's sessions on this node with `ending`, after what they have queued. Returns how many.
    ///
    /// # Errors
    /// [`PublishError::Overloaded`]: none was ended.
    pub async fn end_sessions(&self, user: &UserId, ending: Disconnect) -> Result<usize, PublishError> {
        let channel = ChannelId::User(user.clone());
        let hub = &self.inner.hub;
        self.with_room(|| hub.room_listener(&channel), || hub.end_sessions(&channel, ending)).await
    }

    /// Publishes without waiting: for callers outside of any runtime. Other nodes may have yet to answer. A frame of
    /// 16 KiB of JSON or more is not compressed.
    ///
    /// # Errors
    /// [`PublishError::Overloaded`] if a shard that it is for has no room: nothing was posted.
    /// [`PublishError::SpoolFull`]: there was nobody here, and too much waits for the other nodes.
    pub fn try_publish(&self, channel: &ChannelId, event: Event<'_>) -> Result<Delivery, PublishError> {
        let span = self.span(channel);
        let posted = self.encode(channel, &event).and_then(|mut frame| {
            deflate_small(&self.inner.hub, channel, &mut frame);
            span.encoded(&frame);
            let posted = span.within(|| self.post_and_forward(channel, &frame));
            self.count(posted.map_err(|Full| PublishError::Overloaded).flatten())
        });
        traced(span, posted).map(|posted| posted.delivery())
    }

    /// Answers one session. Waits for room on its shard up to the publish deadline.
    ///
    /// # Errors
    /// [`PublishError::Overloaded`]: it was not posted.
    pub async fn send_to_session(&self, address: Address, frame: Frame) -> Result<(), PublishError> {
        let hub = &self.inner.hub;
        self.with_room(|| hub.shard_listener(address.shard()), || hub.post_to_session(address, &frame)).await
    }

    fn encode(&self, channel: &ChannelId, event: &Event<'_>) -> Result<Frame, PublishError> {
        let accepted = Moment::at(tokio::time::Instant::now().into_std());
        let mut frame = Frame::encode_for(event, channel);
        frame.accept(accepted);
        self.metrics().engine.encodes.of(encode_kind(frame.kind())).increment();
        let (bytes, bytes_max) = (frame.json().len(), self.inner.settings.hub.frame_bytes_max());
        if bytes > bytes_max { self.count(Err(PublishError::TooLarge { bytes, bytes_max })) } else { Ok(frame) }
    }

    async fn post(&self, span: PublishSpan, channel: &ChannelId, frame: Frame) -> Result<Posted, PublishError> {
        span.encoded(&frame);
        let hub = &self.inner.hub;
        let attempt = || span.within(|| self.post_and_forward(channel, &frame));
        let posted = self.with_room(|| hub.room_listener(channel), attempt).await;
        traced(span, self.count(posted.flatten()))
    }

    /// Of a publish that begins.
    fn span(&self, channel: &ChannelId) -> PublishSpan {
        PublishSpan::begin(channel, self.inner.node.number())
    }

    /// Held while a frame is posted here and offered to the others: one order for all.
    fn sequence(&self, channel: &ChannelId) -> MutexGuard<'_, ()> {
        let place = channel.key().bytes().map(usize::from).sum::<usize>() % SEQUENCES;
        self.inner.sequences[place].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Posts the frame here, then offers it to the other nodes, in one order for all of them.
    fn post_and_forward(&self, channel: &ChannelId, frame: &Frame) -> Result<Result<Posted, PublishError>, Full> {
        let Inner { hub, broker, node, settings, .. } = &*self.inner;
        let here = |delivery| Ok(Ok(Posted::here(delivery)));
        // A stream has one reader: if that is here, nobody else gets it.
        let is_ours = || matches!(channel, ChannelId::Stream(request) if hub.has_stream(request));
        if !broker.wants(*node, channel, frame.kind()) || is_ours() {
            return here(hub.post(channel, frame)?);
        }
        let sequence = self.sequence(channel);
        let forward = || broker.forward(*node, channel, frame);
        let (mut delivery, forwarded) = match channel {
            // What the others refuse is refused: it may not be kept here for whoever comes back.
            ChannelId::User(user) if !hub.registry().is_online(user) => match forward() {
                Ok(forwarded) => (hub.post_or_keep(user, frame), Ok(forwarded)),
                Err(SpoolFull) => return Ok(Err(PublishError::SpoolFull)),
            },
            _ => (hub.post(channel, frame)?, forward()),
        };
        drop(sequence);
        match forwarded {
            Ok(Forwarded::Now(nodes)) => {
                delivery.nodes = nodes;
                delivery.nobody = delivery.nobody.filter(|_| nodes == 0);
                here(delivery)
            }
            Ok(Forwarded::Later(receipt)) => {
                // While nobody answers, nobody is waited for.
                let patience = broker.health().map_or(Duration::ZERO, |()| settings.publish_deadline);
                let deadline = tokio::time::Instant::now() + patience;
                delivery.at_least = !broker.counts_all(channel);
                Ok(Ok(Posted::elsewhere(delivery, receipt, deadline)))
            }
            // Whoever is here has it; a repeat would double it.
            Err(SpoolFull) if delivery.tabs > 0 => here(delivery),
            Err(SpoolFull) => Ok(Err(PublishError::SpoolFull)),
        }
    }

    /// Tries until there is room or the deadline has passed. The listener is made before each attempt.
    async fn with_room<T>(
        &self,
        listen: impl Fn() -> SmallVec<[EventListener; 2]>,
        attempt: impl Fn() -> Result<T, Full>,
    ) -> Result<T, PublishError> {
        if let Ok(done) = attempt() {
            return Ok(done);
        }
        self.metrics().engine.waited_publishes.increment();
        let wait = async {
            loop {
                let mut listeners = listen();
                if let Ok(done) = attempt() {
                    return done;
                }
                let any = |listener: &mut EventListener, context: &mut std::task::Context<'_>| {
                    Pin::new(listener).poll(context).is_ready()
                };
                let room = poll_fn(|context| {
                    if listeners.iter_mut().any(|listener| any(listener, context)) {
                        Poll::Ready(())
                    } else {
                        Poll::Pending
                    }
                });
                // A tab may have come to another shard meanwhile, whose bell nobody listens to: look again soon.
                let _ = tokio::time::timeout(LOOK_AGAIN, room).await;
            }
        };
        tokio::time::timeout(self.inner.settings.publish_deadline, wait).await.map_err(|_| PublishError::Overloaded)
    }

    fn count<T: Counted>(&self, result: Result<T, PublishError>) -> Result<T, PublishError> {
        self.metrics().engine.publishes.of(outcome_of(&result)).increment();
        result
    }
}

fn outcome_of<T: Counted>(result: &Result<T, PublishError>) -> PublishOutcome {
    result.as_ref().map_or_else(refusal, Counted::outcome)
}

fn refusal(error: &PublishError) -> PublishOutcome {
    match error {
        PublishError::Overloaded => PublishOutcome::Overloaded,
        PublishError::TooLarge { .. } => PublishOutcome::TooLarge,
        PublishError::Closed => PublishOutcome::Closed,
        PublishError::SpoolFull => PublishOutcome::SpoolFull,
    }
}

/// Says in its span what became of a publish, and leaves it to what was posted.
fn traced(mut span: PublishSpan, posted: Result<Posted, PublishError>) -> Result<Posted, PublishError> {
    match posted {
        Ok(posted) => {
            span.posted(posted.outcome().name(), posted.delivery());
            Ok(posted.of(span))
        }
        Err(error) => {
            refused(&span, &error);
            Err(error)
        }
    }
}

fn refused(span: &PublishSpan, error: &PublishError) {
    span.refused(refusal(error).name());
}

/// What a publish ended in, for the counters.
trait Counted {
    fn outcome(&self) -> PublishOutcome;
}

impl Counted for Posted {
    fn outcome(&self) -> PublishOutcome {
        match self.delivery() {
            delivery if delivery.is_delivered() => PublishOutcome::Delivered,
            _ if self.is_waiting() => PublishOutcome::Forwarded,
            _ => PublishOutcome::Nobody,
        }
    }
}

impl Counted for Frame {
    fn outcome(&self) -> PublishOutcome {
        PublishOutcome::Delivered
    }
}

const fn encode_kind(kind: Kind) -> EncodeKind {
    match kind {
        Kind::Message => EncodeKind::Message,
        Kind::Buttons => EncodeKind::Buttons,
        Kind::File => EncodeKind::File,
        Kind::Edit => EncodeKind::Edit,
        Kind::Typing => EncodeKind::Typing,
        Kind::End => EncodeKind::End,
        _ => EncodeKind::Notice,
    }
}

impl Outlet for Engine {
    type Stream = Mailbox;

    type Posted = Posted;

    async fn submit(&self, channel: &ChannelId, event: Event<'_>) -> Result<Posted, PublishError> {
        let span = self.span(channel);
        let frame = self.encode(channel, &event).inspect_err(|error| refused(&span, error))?;
        let frame = self.deflated(channel, frame).await.inspect_err(|error| refused(&span, error))?;
        self.post(span, channel, frame).await
    }

    async fn settle(&self, posted: Posted) -> Delivery {
        posted.settled().await
    }

    fn forwarded(posted: Posted) -> BoxFuture<'static, ()> {
        Box::pin(posted.forwarded())
    }

    async fn submit_file(&self, channel: &ChannelId, file: OutgoingFile) -> Result<Posted, PublishError> {
        let span = self.span(channel);
        let (bytes, bytes_max) = (file.data.len(), self.inner.settings.hub.file_bytes_max);
        if bytes > bytes_max {
            return traced(span, self.count(Err(PublishError::TooLarge { bytes, bytes_max })));
        }
        let prepare = {
            let (engine, channel) = (self.clone(), channel.clone());
            move || {
                let OutgoingFile { id, filename, mimetype, data, timestamp } = &file;
                let event = Event::File { id: *id, filename, mimetype, data, timestamp: *timestamp };
                let frame = engine.encode(&channel, &event)?;
                Ok((frame, engine.inner.files.keep(&file, engine.now())))
            }
        };
        let prepared = if bytes < ENCODE_APART_BYTES {
            prepare()
        } else {
            // It ends only by its own return, or with the process.
            tokio::task::spawn_blocking(prepare).await.map_err(|_| PublishError::Closed).flatten()
        };
        let (frame, keeping) = prepared.inspect_err(|error| refused(&span, error))?;
        let posted = self.post(span, channel, frame).await?;
        if let Some(keeping) = keeping {
            keeping.published();
        }
        Ok(posted)
    }

    fn file_id(&self) -> MessageId {
        match self.inner.broker.tag() {
            0 => MessageId::random(),
            tag => MessageId::random_with_tag(tag),
        }
    }

    fn open_stream(&self, request: &RequestId) -> Result<Mailbox, StreamError> {
        // Asked for now, there when Redis says so: whoever cannot miss a frame waits for `expect` first.
        let channel = ChannelId::Stream(request.clone());
        let mut expected = self.inner.broker.expect(self.inner.node, &channel);
        let _ = expected.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
        drop(expected);
        self.inner.hub.open_stream(request, StreamOptions::default()).map_err(|error| match error {
            OpenError::Exists => StreamError::Exists(request.clone()),
            OpenError::TooMany { streams_max } | OpenError::TooManyOfOwner { streams_max } => {
                StreamError::TooMany { streams_max }
            }
        })
    }

    fn close_stream(&self, request: &RequestId) {
        self.inner.hub.close_stream(request);
    }

    fn history(&self, channel: &ChannelId) -> Vec<Frame> {
        self.inner.hub.history(channel)
    }

    fn now(&self) -> Timestamp {
        SystemTime::now().into()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use futures_util::FutureExt;

    use super::*;
    use crate::broker::BrokerFuture;
    use crate::fanout::session::Identity;
    use crate::fanout::shard::{Opening, Shard, Wire};
    use crate::id::MessageId;

    fn message(text: &str) -> Event<'_> {
        let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(1));
        Event::Message { id, text, sender: "star", reply_to: None, timestamp }
    }

    fn ann() -> ChannelId {
        ChannelId::parse("ann").unwrap()
    }

    /// An engine whose one inbox holds two posts, and its shard with a tab of ann's.
    fn engine() -> (Engine, Shard, Instant) {
        let hub = HubLimits { inbox_posts_max: 2, file_bytes_max: 1_000, ..HubLimits::default() };
        let deadline = Duration::from_millis(200);
        let settings = EngineSettings { shards: 1, hub, publish_deadline: deadline, ..EngineSettings::default() };
        let engine = Engine::new(settings);
        let now = tokio::time::Instant::now().into_std();
        let mut shard = Shard::new(Arc::clone(engine.hub()), 0, SessionLimits::default(), usize::MAX, now);
        let identity = Identity::new(UserId::parse("ann").unwrap(), engine.now());
        shard.open(Opening::new(identity, Wire::WebSocket), |_| None).unwrap();
        (engine, shard, now)
    }

    #[tokio::test(start_paused = true)]
    async fn a_publish_waits_for_room_and_is_refused_at_its_deadline() {
        let (engine, mut shard, now) = engine();
        for _ in 0..2 {
            assert_eq!(engine.publish(&ann(), message("x")).await.unwrap().tabs, 1);
        }
        assert_eq!(engine.try_publish(&ann(), message("x")), Err(PublishError::Overloaded));
        let before = tokio::time::Instant::now();
        assert_eq!(engine.publish(&ann(), message("x")).await, Err(PublishError::Overloaded));
        assert!(before.elapsed() >= Duration::from_millis(200));
        let counts = &engine.metrics().engine;
        assert_eq!((counts.waited_publishes.value(), counts.publishes.of(PublishOutcome::Overloaded).value()), (1, 2));
        let address = shard.session(0).unwrap().address();
        assert_eq!(engine.send_to_session(address, Frame::ping()).await, Err(PublishError::Overloaded));
        let user = UserId::parse("ann").unwrap();
        assert_eq!(engine.end_sessions(&user, Disconnect::Kicked).await, Err(PublishError::Overloaded));
        // Nothing was posted by any of these, and with room the next one gets through.
        let channel = ann();
        let waiting = engine.publish(&channel, message("last"));
        tokio::pin!(waiting);
        assert!((&mut waiting).now_or_never().is_none());
        assert_eq!(shard.queued().0, 0);
        assert!(shard.handle_inbox(now));
        assert_eq!(waiting.await.unwrap().tabs, 1);
        assert!(shard.handle_inbox(now));
        assert_eq!(shard.queued().0, 3);
        assert_eq!(engine.metrics().histogram(|shard| &shard.posted_micros).count(), 3, "each is timed");
    }

    #[test]
    fn nodes_of_one_broker_see_a_nodes_frames_in_one_order() {
        let broker = Arc::new(MemoryBroker::default());
        let settings = EngineSettings { shards: 1, ..EngineSettings::default() };
        let engines = [0, 1].map(|_| Engine::with_broker(settings.clone(), Arc::clone(&broker) as Arc<dyn Broker>));
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start")]
        let now = Instant::now();
        let mut shards = engines
            .each_ref()
            .map(|engine| Shard::new(Arc::clone(engine.hub()), 0, SessionLimits::default(), usize::MAX, now));
        let user = UserId::parse("ann").unwrap();
        assert_eq!(engines[0].is_online(&user).now_or_never(), Some(false));
        for (shard, engine) in shards.iter_mut().zip(&engines) {
            let identity = Identity::new(user.clone(), engine.now());
            let address = shard.open(Opening::new(identity, Wire::WebSocket), |_| None).unwrap();
            shard.handle_writable(address.slot());
            let is_online = |engine: &Engine| engine.is_online(&user).now_or_never() == Some(true);
            assert!(engines.iter().all(is_online), "on whatever node");
        }
        std::thread::scope(|threads| {
            for publisher in 0..3 {
                let engine = &engines[0];
                threads.spawn(move || {
                    for n in 0..300 {
                        let delivery = engine.try_publish(&ann(), message(&format!("{publisher}:{n};"))).unwrap();
                        assert_eq!((delivery.tabs, delivery.nodes), (1, 1));
                    }
                });
            }
        });
        let read = |shard: &mut Shard| {
            while shard.handle_inbox(now) {}
            let transmit = shard.poll_transmit().unwrap();
            let bytes: Vec<u8> = transmit.slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            String::from_utf8_lossy(&bytes)
                .split("\"text\":\"")
                .skip(1)
                .map(|s| s.split(';').next().unwrap().to_owned())
                .collect()
        };
        let [here, there]: [Vec<String>; 2] = shards.each_mut().map(read);
        assert_eq!((here.len(), &here), (900, &there));
        drop(shards);
        assert_eq!(engines[1].try_publish(&ann(), message("x")).unwrap().nodes, 0);
        assert_eq!(engines[0].metrics().engine.refused_forwards.value(), 0);
    }

    /// A broker that takes nothing.
    struct FullBroker;

    impl Broker for FullBroker {
        fn attach(&self, _peer: &Arc<dyn Peer>) -> NodeId {
            NodeId::new(0)
        }

        fn wants(&self, _node: NodeId, _channel: &ChannelId, _kind: Kind) -> bool {
            true
        }

        fn forward(&self, _from: NodeId, _channel: &ChannelId, _frame: &Frame) -> Result<Forwarded, SpoolFull> {
            Err(SpoolFull)
        }

        fn is_online_elsewhere<'a>(&'a self, _from: NodeId, _user: &'a UserId) -> BrokerFuture<'a, bool> {
            Box::pin(std::future::ready(false))
        }

        fn end_elsewhere<'a>(&'a self, _: NodeId, _: &'a UserId, _: Disconnect) -> BrokerFuture<'a, usize> {
            Box::pin(std::future::ready(0))
        }

        fn users_elsewhere(&self, _from: NodeId, _limit: usize) -> BrokerFuture<'_, Option<Vec<OnlineUser>>> {
            Box::pin(std::future::ready(None))
        }
    }

    #[test]
    fn what_the_other_nodes_have_no_room_for_is_kept_for_nobody() {
        let settings = EngineSettings { shards: 1, ..EngineSettings::default() };
        let engine = Engine::with_broker(settings, Arc::new(FullBroker));
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start")]
        let now = Instant::now();
        let mut shard = Shard::new(Arc::clone(engine.hub()), 0, SessionLimits::default(), usize::MAX, now);
        let identity = Identity::new(UserId::parse("ann").unwrap(), engine.now());
        let address = shard.open(Opening::new(identity, Wire::WebSocket), |_| None).unwrap();
        assert_eq!(engine.try_publish(&ann(), message("posted here")).unwrap().tabs, 1);
        shard.handle_lost(address.slot(), Disconnect::ConnectionLost);
        assert_eq!(engine.try_publish(&ann(), message("refused")), Err(PublishError::SpoolFull));
        let kept = engine.hub().history(&ann());
        let texts: Vec<_> = kept.iter().map(|frame| String::from_utf8_lossy(frame.json()).into_owned()).collect();
        assert!(texts.len() == 1 && texts[0].contains("posted here"), "nothing was posted: {texts:?}");
    }

    #[tokio::test]
    async fn what_is_too_large_is_refused_with_the_limit() {
        let (engine, _shard, _) = engine();
        let data = bytes::Bytes::from(vec![0; 1_001]);
        let file = OutgoingFile {
            id: MessageId::random(),
            filename: "f".to_owned(),
            mimetype: "text/plain".to_owned(),
            data,
            timestamp: engine.now(),
        };
        let error = engine.publish_file(&ann(), file).await.unwrap_err();
        assert_eq!(error, PublishError::TooLarge { bytes: 1_001, bytes_max: 1_000 });
        let text = "x".repeat(engine.settings().hub.frame_bytes_max());
        assert!(matches!(engine.publish(&ann(), message(&text)).await, Err(PublishError::TooLarge { .. })));
        assert_eq!(engine.metrics().engine.publishes.of(PublishOutcome::TooLarge).value(), 2);
        assert_eq!(engine.hub().waiting_posts(), 0);
    }
}
