//! The hub: from a channel to the inboxes of the shards that hold its sessions.
//!
//! A publisher does work per shard, never per tab, and waits for no peer. A post reserves room on all its target
//! shards or on none, then pushes, which cannot fail. Posts to several shards are sequenced by a stripe of the channel
//! that is held only for those pushes, so that all tabs of a channel see its frames in one order; a post to one shard
//! needs no sequence beyond its inbox.

mod consumer;
mod deflating;
mod draining;
mod incomplete;
mod missed;
mod post;
mod sessions;
mod watching;
mod weighing;

pub(crate) use crate::fanout::hub::deflating::Deflating;
pub use crate::fanout::hub::draining::Drain;
pub(crate) use crate::fanout::hub::draining::Pace;
pub(crate) use crate::fanout::hub::incomplete::Incomplete;
pub(crate) use crate::fanout::hub::missed::Untold;
pub(crate) use crate::fanout::hub::post::Post;
pub(crate) use crate::fanout::hub::sessions::Edges;
use crate::fanout::hub::watching::Watching;
pub use crate::fanout::hub::watching::{TooManyWatchers, Watched};
use crate::fanout::hub::weighing::HAS_TOLD;
pub(crate) use crate::fanout::hub::weighing::{Classes, NOBODY};

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use event_listener::{Event, EventListener};
use smallvec::SmallVec;

use crate::fanout::backlog::{Backlog, Displaced};
use crate::fanout::inbox::{Pushed, Queue, Room as InboxRoom};
use crate::fanout::mailbox::Mailbox;
use crate::fanout::registry::{Registry, Sessions};
use crate::fanout::returning::Returning;
use crate::fanout::rooms::{Room, Rooms};
use crate::fanout::session::{Address, SHARDS_MAX};
use crate::fanout::streams::{AttachError, Cancelled, OpenError, StreamOptions, Streams};
use crate::fanout::stripes::{Presence, Stripes};
use crate::fanout::sync::Bell;
use crate::id::{ChannelId, RequestId, RoomName, UserId};
use crate::metrics::Metrics;
use crate::proto::delivery::{Delivery, Nobody};
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;
use crate::proto::limits::{HubLimits, SessionLimits};

type Shards = SmallVec<[u16; 16]>;

/// The inboxes have no room: the node is given more than it fans out. Nothing was posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// On lines of its own: what one shard's publishers write must not slow another's.
#[repr(align(128))]
struct Inbox {
    queue: Queue<Post>,
    room: InboxRoom,
    bell: Bell,
    freed: Event,
    claimed: AtomicBool,
    /// What was lost and is not told yet: if there is anything, [`Post::Missed`] is on its way.
    untold: Mutex<Untold>,
    /// The size class of the shard's fattest session that may be cut, as it told it last: see [`weighing`].
    top_class: AtomicU32,
    /// Since when another shard wants to know that, if it was not told since: microseconds since the hub began.
    asked_at: AtomicU64,
    /// The shard wants to know when another has told its class.
    waits_for_classes: AtomicBool,
}

/// Where frames go in: the registry, the rooms, the streams, and an inbox per shard.
pub struct Hub {
    registry: Registry,
    rooms: Rooms,
    watching: Watching,
    streams: Arc<Streams>,
    inboxes: Box<[Inbox]>,
    stripes: Arc<Stripes>,
    inbound: Incomplete,
    deflating: Deflating,
    returning: Arc<Returning>,
    edges: OnceLock<Box<dyn Edges>>,
    /// When its time began.
    started: OnceLock<Instant>,
    /// The last shard has mailboxes instead of sockets.
    has_mailbox_shard: bool,
    metrics: Arc<Metrics>,
}

impl Hub {
    /// A hub for `shards` shards. Worst-case memory of the inboxes: `shards × inbox_bytes_max`.
    ///
    /// # Panics
    /// If `shards` is 0 or over [`SHARDS_MAX`].
    #[must_use]
    pub fn new(shards: usize, limits: &HubLimits, sessions: &SessionLimits) -> Arc<Self> {
        Self::build(shards, false, limits, sessions)
    }

    /// The same with one shard more, whose sessions are mailboxes.
    ///
    /// # Panics
    /// If `shards` is 0, or over [`SHARDS_MAX`] with that one.
    #[must_use]
    pub(crate) fn with_mailbox_shard(shards: usize, limits: &HubLimits, sessions: &SessionLimits) -> Arc<Self> {
        Self::build(shards, true, limits, sessions)
    }

    fn build(shards: usize, has_mailbox_shard: bool, limits: &HubLimits, sessions: &SessionLimits) -> Arc<Self> {
        let mailbox_shards = usize::from(has_mailbox_shard);
        assert!(
            (1..=SHARDS_MAX - mailbox_shards).contains(&shards),
            "1 to {SHARDS_MAX} shards, one of mailboxes included"
        );
        let shards = shards + mailbox_shards;
        let inbox = || Inbox {
            queue: Queue::new(),
            room: InboxRoom::new(limits.inbox_posts_max, limits.inbox_bytes_max),
            bell: Bell::new(),
            freed: Event::new(),
            claimed: AtomicBool::new(false),
            untold: Mutex::default(),
            top_class: AtomicU32::new(NOBODY),
            asked_at: AtomicU64::new(HAS_TOLD),
            waits_for_classes: AtomicBool::new(false),
        };
        let stripes = Arc::new(Stripes::new(limits.recovery.clone()));
        let metrics = Arc::new(Metrics::new(shards));
        Arc::new(Self {
            registry: Registry::new(limits.tabs_per_user_max),
            rooms: Rooms::new(shards),
            watching: Watching::new(shards, limits.watchers_max),
            streams: Arc::new(Streams::new(sessions, limits, Arc::clone(&stripes), Arc::clone(&metrics))),
            inboxes: (0..shards).map(|_| inbox()).collect(),
            stripes,
            inbound: Incomplete::new(limits.inbound_bytes_max),
            deflating: Deflating::new(limits.deflate_bytes_min),
            returning: Arc::default(),
            edges: OnceLock::new(),
            started: OnceLock::new(),
            has_mailbox_shard,
            metrics,
        })
    }

    /// Which sessions a user has.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// How many shards there are for sockets.
    #[must_use]
    pub fn shard_count(&self) -> usize {
        self.inboxes.len() - usize::from(self.has_mailbox_shard)
    }

    /// The shard whose sessions are mailboxes, if there is one.
    pub(crate) fn mailbox_shard(&self) -> Option<u16> {
        self.has_mailbox_shard.then(|| shard_number(self.inboxes.len() - 1))
    }

    /// How many rooms have a member on this node.
    #[must_use]
    pub fn room_count(&self) -> usize {
        self.rooms.count()
    }

    /// Bytes of messages from clients that are not complete yet.
    #[must_use]
    pub fn incomplete_bytes(&self) -> usize {
        self.inbound.bytes()
    }

    pub(crate) fn inbound(&self) -> &Incomplete {
        &self.inbound
    }

    pub(crate) fn rooms(&self) -> &Rooms {
        &self.rooms
    }

    /// Posts `frame` to whoever `channel` names on this node, and shows it to whoever watches the channel.
    ///
    /// # Errors
    /// [`Full`] if one of the shards has no room: nothing was posted to any.
    pub fn post(&self, channel: &ChannelId, frame: &Frame) -> Result<Delivery, Full> {
        let delivery = self.post_to_channel(channel, frame)?;
        self.show(channel, frame);
        Ok(delivery)
    }

    fn post_to_channel(&self, channel: &ChannelId, frame: &Frame) -> Result<Delivery, Full> {
        match channel {
            ChannelId::User(user) => self.post_to_user(channel, user, frame),
            ChannelId::Room(name) => match self.rooms.find(name) {
                None => Ok(nobody(Nobody::EmptyRoom)),
                Some(room) => {
                    let (mut tabs, mut shards) = (0, Shards::new());
                    for (shard, members) in room.shards() {
                        tabs += members as usize;
                        shards.push(shard_number(shard));
                    }
                    if tabs == 0 {
                        return Ok(nobody(Nobody::EmptyRoom));
                    }
                    let post = || Post::Room { room: Arc::clone(&room), frame: frame.clone() };
                    self.post_to(channel, &shards, frame.bytes(), post)?;
                    Ok(Delivery::here(tabs))
                }
            },
            ChannelId::Stream(request) => {
                let (delivery, mirror) = self.streams.offer(self, request, frame)?;
                if let Some(user) = mirror {
                    // Its reader has it: what comes of this is not asked.
                    let _ = self.post_or_keep(&user, frame);
                }
                Ok(delivery)
            }
        }
    }

    /// Posts a frame to a user although it cannot be refused any more, as others have it: where there is no room for it,
    /// tabs miss it, are told so, and get it when they come back, if that is kept here.
    pub(crate) fn post_or_keep(&self, user: &UserId, frame: &Frame) -> Delivery {
        let channel = ChannelId::User(user.clone());
        self.show(&channel, frame);
        self.post_to_user(&channel, user, frame).unwrap_or_else(|Full| {
            if Backlog::wants(frame.kind()) {
                let mut displaced = Displaced::new();
                let mut stripe = self.stripes.hold(&channel);
                self.returning.pass(user, frame, None);
                if self.stripes.keeps(frame) {
                    self.stripes.keep(&mut stripe, user, frame, Presence::Present, &mut displaced);
                }
                let parked = self.note_lost_to(user, &channel);
                drop(stripe);
                self.ring(parked);
            }
            nobody(Nobody::Offline)
        })
    }

    /// With recovery, the look-up, the pushes and the keeping are one step: see [`Stripes`].
    fn post_to_user(&self, channel: &ChannelId, user: &UserId, frame: &Frame) -> Result<Delivery, Full> {
        let post = |sessions: &Sessions| Post::Sessions { sessions: Arc::clone(sessions), frame: frame.clone() };
        let is_kept = self.stripes.keeps(frame);
        let is_missed = self.returning.is_busy() && Backlog::wants(frame.kind());
        if !is_kept && !is_missed {
            let Some(sessions) = self.registry.get_sessions(user) else { return Ok(nobody(Nobody::Offline)) };
            self.post_to(channel, &shards_of(&sessions), frame.bytes(), || post(&sessions))?;
            return Ok(Delivery::here(sessions.len()));
        }
        let mut displaced = Displaced::new();
        let mut stripe = self.stripes.hold(channel);
        let mut keep = |presence| {
            if is_kept {
                self.stripes.keep(&mut stripe, user, frame, presence, &mut displaced);
            }
        };
        let Some(sessions) = self.registry.get_sessions(user) else {
            keep(Presence::Absent);
            if is_missed {
                self.returning.pass(user, frame, None);
            }
            drop(stripe);
            return Ok(nobody(Nobody::Offline));
        };
        let tabs = sessions.len();
        // Room on all shards first: what is not posted is not noted either.
        let shards = shards_of(&sessions);
        self.reserve(&shards, frame.bytes())?;
        let addressed = if is_missed { self.returning.pass(user, frame, Some(Arc::clone(&sessions))) } else { None };
        let parked = self.push_all(&shards, || post(addressed.as_ref().unwrap_or(&sessions)));
        keep(Presence::Present);
        drop(stripe);
        self.ring(parked);
        Ok(Delivery::here(tabs))
    }

    /// What recovery holds of a channel, oldest first.
    #[must_use]
    pub fn history(&self, channel: &ChannelId) -> Vec<Frame> {
        self.stripes.history(channel)
    }

    /// Memory of what is kept of users and of streams.
    #[must_use]
    pub fn recovery_bytes(&self) -> usize {
        self.stripes.bytes() + self.streams.bytes()
    }

    /// Ends streams that were silent for too long, and forgets those that ended long ago: to be called about once a
    /// second, where it is allowed to take a while. Without it streams have no timeout.
    pub fn sweep_streams(&self) {
        self.streams.sweep(self);
        self.metrics.engine.recovery_bytes.store(self.recovery_bytes() as u64);
        self.metrics.engine.streams.store(self.stream_count() as u64);
    }

    /// Posts `frame` to one session, whoever holds it: answers to what it sent.
    ///
    /// # Errors
    /// [`Full`] if its shard has no room.
    pub fn post_to_session(&self, address: Address, frame: &Frame) -> Result<(), Full> {
        self.push_to_session(address, frame).map(|parked| self.ring_one(parked))
    }

    /// Ends all sessions of a user with `ending`, after what they have queued. Returns how many there are.
    ///
    /// # Errors
    /// [`Full`] if one of the shards has no room: none was ended.
    pub fn end_sessions(&self, channel: &ChannelId, ending: Disconnect) -> Result<usize, Full> {
        let ChannelId::User(user) = channel else { return Ok(0) };
        let Some(sessions) = self.registry.get_sessions(user) else { return Ok(0) };
        self.post_to(channel, &shards_of(&sessions), 0, || Post::End { sessions: Arc::clone(&sessions), ending })?;
        Ok(sessions.len())
    }

    /// Ends every stream with reason `cancelled`.
    pub fn end_streams(&self) {
        self.streams.end_all(self);
    }

    /// Whether a stream is there, running or ended.
    #[must_use]
    pub fn has_stream(&self, request: &RequestId) -> bool {
        self.streams.has(request)
    }

    /// Streams that have not ended.
    #[must_use]
    pub fn stream_count(&self) -> usize {
        self.streams.running()
    }

    /// Posts that wait in inboxes now.
    #[must_use]
    pub fn waiting_posts(&self) -> usize {
        self.inboxes.iter().map(|inbox| inbox.room.posts()).sum()
    }

    /// Registers a stream that a task reads.
    ///
    /// # Errors
    /// There is one with this id already, or there are too many: see [`OpenError`].
    pub fn open_stream(&self, request: &RequestId, options: StreamOptions) -> Result<Mailbox, OpenError> {
        Streams::open_mailbox(&self.streams, request, options)
    }

    /// Registers a stream that a session reads.
    ///
    /// # Errors
    /// As [`Self::open_stream`].
    pub(crate) fn open_stream_for(
        &self,
        request: &RequestId,
        options: StreamOptions,
        address: Address,
    ) -> Result<(), OpenError> {
        self.streams.open_session(request, options, address)
    }

    pub(crate) fn attach_to_stream(
        &self,
        request: &RequestId,
        user: &UserId,
        address: Address,
    ) -> Result<Vec<Frame>, AttachError> {
        self.streams.attach(self, request, user, address)
    }

    pub(crate) fn leave_stream(&self, request: &RequestId, address: Address, ending: Disconnect) {
        self.streams.left_by_session(request, address, ending);
    }

    /// Whose stream it is, if it is somebody's.
    pub(crate) fn owner_of_stream(&self, request: &RequestId) -> Option<UserId> {
        self.streams.owner(request)
    }

    /// Streams that [`Self::next_cancelled`] is yet to give out.
    #[must_use]
    pub fn waiting_cancels(&self) -> usize {
        self.streams.waiting_cancels()
    }

    /// Ends all streams that `user` owns; their producers are told by [`Self::next_cancelled`]. Returns how many.
    pub fn cancel_streams(&self, user: &UserId) -> usize {
        self.streams.cancel_all(self, user)
    }

    /// Takes a stream away: its reader is woken and sees the end. An absent one is a no-op.
    pub fn close_stream(&self, request: &RequestId) {
        self.streams.close(self, request);
    }

    /// Ends a stream that `user` owns; its producer is told by [`Self::next_cancelled`]. False if it has ended already.
    ///
    /// # Errors
    /// [`AttachError::NoSuchStream`]: there is none, or it is another's.
    pub fn cancel_stream(&self, request: &RequestId, user: &UserId) -> Result<bool, AttachError> {
        self.streams.cancel(self, request, user)
    }

    /// Waits for a stream that nobody wants any more: its reader is gone, or it was silent for too long. Each is given
    /// out once.
    ///
    /// # Cancel safety
    /// Dropping the future loses none.
    pub async fn next_cancelled(&self) -> Cancelled {
        self.streams.next_cancelled().await
    }

    /// A listener that is told when room comes free on any shard that `channel` could need.
    /// Made before the attempt whose failure it waits for, so that no release is missed.
    pub(crate) fn room_listener(&self, channel: &ChannelId) -> SmallVec<[EventListener; 2]> {
        let listen = |shards: &[u16]| shards.iter().map(|s| self.inboxes[usize::from(*s)].freed.listen()).collect();
        match channel {
            ChannelId::User(user) => {
                self.registry.get_sessions(user).map(|s| listen(&shards_of(&s))).unwrap_or_default()
            }
            ChannelId::Room(name) => self.listen_room(name, listen),
            ChannelId::Stream(request) => self.streams.shard_of(request).map(|s| listen(&[s])).unwrap_or_default(),
        }
    }

    /// The same for one shard.
    pub(crate) fn shard_listener(&self, shard: u16) -> SmallVec<[EventListener; 2]> {
        SmallVec::from_iter([self.inboxes[usize::from(shard)].freed.listen()])
    }

    fn listen_room<L: Default>(&self, name: &RoomName, listen: impl Fn(&[u16]) -> L) -> L {
        let shards = |room: Arc<Room>| room.shards().map(|(shard, _)| shard_number(shard)).collect::<Shards>();
        self.rooms.find(name).map(|room| listen(&shards(room))).unwrap_or_default()
    }

    /// `bytes`: what [`Post::bytes`] says of what `post` makes.
    fn post_to(&self, channel: &ChannelId, shards: &[u16], bytes: usize, post: impl Fn() -> Post) -> Result<(), Full> {
        self.reserve(shards, bytes)?;
        if let [_] = shards {
            self.push(shards, post);
        } else {
            let sequence = self.stripes.hold(channel);
            let parked = self.push_all(shards, post);
            drop(sequence);
            self.ring(parked);
        }
        Ok(())
    }

    /// Takes room for one post on all of these shards, or on none.
    fn reserve(&self, shards: &[u16], bytes: usize) -> Result<(), Full> {
        for (place, shard) in shards.iter().enumerate() {
            if !self.inboxes[usize::from(*shard)].room.reserve(bytes) {
                for shard in &shards[..place] {
                    // Who found it full meanwhile waits for this.
                    self.release(*shard, 1, bytes);
                }
                return Err(Full);
            }
        }
        Ok(())
    }

    /// Pushes a frame for one session, under a lock of the caller's: the shard that is returned is to be rung after it.
    pub(crate) fn push_to_session(&self, address: Address, frame: &Frame) -> Result<Option<u16>, Full> {
        let shard = address.shard();
        self.reserve(&[shard], frame.bytes())?;
        Ok(self.push_one(address, frame))
    }

    /// The same without asking for room: for a last frame, which is small and must not be lost.
    pub(crate) fn force_to_session(&self, address: Address, frame: &Frame) -> Option<u16> {
        self.inboxes[usize::from(address.shard())].room.take(1, frame.bytes());
        self.push_one(address, frame)
    }

    fn push_one(&self, address: Address, frame: &Frame) -> Option<u16> {
        let parked = self.push_all(&[address.shard()], || Post::Session { address, frame: frame.clone() });
        parked.first().copied()
    }

    pub(crate) fn ring_one(&self, shard: Option<u16>) {
        self.ring(shard.into_iter().collect());
    }

    fn push(&self, shards: &[u16], post: impl Fn() -> Post) {
        let parked = self.push_all(shards, post);
        self.ring(parked);
    }

    fn push_all(&self, shards: &[u16], post: impl Fn() -> Post) -> Shards {
        let parked = |shard: &&u16| self.inboxes[usize::from(**shard)].queue.push(post()) == Pushed::Ring;
        shards.iter().filter(parked).copied().collect()
    }

    /// A ring of a parked thread is a system call: the publisher pays for one, the woken shards for the rest.
    fn ring(&self, parked: Shards) {
        match *parked {
            [] => {}
            [shard] => self.inboxes[usize::from(shard)].bell.wake(),
            _ => self.ring_at(&Arc::from(&parked[..]), 0),
        }
    }

    fn ring_at(&self, parked: &Arc<[u16]>, place: usize) {
        if let Some(shard) = parked.get(place) {
            let inbox = &self.inboxes[usize::from(*shard)];
            // Already claimed for this bell by the push that found the shard parked.
            let _ = inbox.queue.push(Post::Ring { parked: Arc::clone(parked), place });
            inbox.bell.wake();
        }
    }

    /// Passes a [`Post::Ring`] on: the shard at `place` is awake and wakes the next two.
    pub(crate) fn pass_ring(&self, parked: &Arc<[u16]>, place: usize) {
        self.ring_at(parked, 2 * place + 1);
        self.ring_at(parked, 2 * place + 2);
    }
}

const fn nobody(reason: Nobody) -> Delivery {
    Delivery::to_nobody(reason)
}

fn shards_of(sessions: &Sessions) -> Shards {
    let mut shards = Shards::new();
    for session in sessions.iter() {
        let shard = session.address().shard();
        if !shards.contains(&shard) {
            shards.push(shard);
        }
    }
    shards
}

#[expect(clippy::cast_possible_truncation, reason = "there are at most SHARDS_MAX shards")]
fn shard_number(index: usize) -> u16 {
    index as u16
}
