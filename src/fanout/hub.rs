//! The hub: from a channel to the inboxes of the shards that hold its sessions.
//!
//! A publisher does work per shard, never per tab, and waits for no peer. A post reserves room on all its target
//! shards or on none, then pushes, which cannot fail. Posts to several shards are sequenced by a stripe of the channel
//! that is held only for those pushes, so that all tabs of a channel see its frames in one order; a post to one shard
//! needs no sequence beyond its inbox.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;

use atomic_waker::AtomicWaker;
use event_listener::{Event, EventListener};
use foldhash::fast::FixedState;
use smallvec::SmallVec;

use crate::fanout::inbox::{Batch, Pushed, Queue, Room as InboxRoom};
use crate::fanout::mailbox::{Mailbox, Streams};
use crate::fanout::registry::{Registry, Sessions};
use crate::fanout::rooms::{Room, Rooms};
use crate::fanout::session::{Address, SHARDS_MAX};
use crate::id::{ChannelId, RequestId, RoomName};
use crate::metrics::Metrics;
use crate::proto::delivery::{Delivery, Nobody};
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;
use crate::proto::limits::{HubLimits, SessionLimits};

/// Stripes that sequence posts to several shards.
const STRIPES: usize = 64;

type Shards = SmallVec<[u16; 16]>;

/// What crosses threads.
pub(crate) enum Post {
    /// A frame for one session.
    Session { address: Address, frame: Frame },
    /// A frame for the sessions of a snapshot; each shard picks its own.
    Sessions { sessions: Sessions, frame: Frame },
    /// A frame for a room's members on this shard.
    Room { room: Arc<Room>, frame: Frame },
    /// These sessions end, after what they have queued.
    End { sessions: Sessions, ending: Disconnect },
    /// Every session of the shard ends, paced; see [`Drain`].
    Drain(Drain),
    /// Shards to wake: the one at `place` and, through it, those behind it.
    Ring { parked: Arc<[u16]>, place: usize },
}

impl Post {
    /// Bytes that the inbox counts for it.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Session { frame, .. } | Self::Sessions { frame, .. } | Self::Room { frame, .. } => frame.bytes(),
            Self::End { .. } | Self::Drain(_) | Self::Ring { .. } => 0,
        }
    }

    /// Whether room was reserved for it.
    pub(crate) const fn is_counted(&self) -> bool {
        !matches!(self, Self::Ring { .. })
    }
}

/// How a shard's sessions are ended at shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// Closes are spread evenly over this time.
    pub spread: std::time::Duration,
}

/// The inboxes have no room: the node is given more than it fans out. Nothing was posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

struct Inbox {
    queue: Queue<Post>,
    room: InboxRoom,
    bell: AtomicWaker,
    freed: Event,
    claimed: AtomicBool,
}

/// The byte budget of messages from clients that are not complete yet, of all shards together.
///
/// # Ordering
/// Relaxed: a bound, publishes nothing.
#[derive(Debug)]
pub(crate) struct Incomplete {
    bytes: AtomicUsize,
    bytes_max: usize,
}

impl Incomplete {
    /// A session's share becomes `after`. False if that is more than there is: then it has none any more.
    #[must_use]
    pub(crate) fn resize(&self, before: usize, after: usize) -> bool {
        let Some(more) = after.checked_sub(before) else {
            self.release(before - after);
            return true;
        };
        // A message that came whole holds nothing, and touches nothing that shards share.
        let is_within = more == 0 || self.bytes.fetch_add(more, Ordering::Relaxed) + more <= self.bytes_max;
        if !is_within {
            self.release(after);
        }
        is_within
    }

    pub(crate) fn release(&self, bytes: usize) {
        if bytes > 0 {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

/// Where frames go in: the registry, the rooms, the streams, and an inbox per shard.
pub struct Hub {
    registry: Registry,
    rooms: Rooms,
    streams: Arc<Streams>,
    inboxes: Box<[Inbox]>,
    stripes: Box<[Mutex<()>]>,
    inbound: Incomplete,
    metrics: Arc<Metrics>,
}

impl Hub {
    /// A hub for `shards` shards. Worst-case memory of the inboxes: `shards × inbox_bytes_max`.
    ///
    /// # Panics
    /// If `shards` is 0 or over [`SHARDS_MAX`].
    #[must_use]
    pub fn new(shards: usize, limits: &HubLimits, sessions: &SessionLimits) -> Arc<Self> {
        assert!((1..=SHARDS_MAX).contains(&shards), "1 to {SHARDS_MAX} shards");
        let inbox = || Inbox {
            queue: Queue::new(),
            room: InboxRoom::new(limits.inbox_posts_max, limits.inbox_bytes_max),
            bell: AtomicWaker::new(),
            freed: Event::new(),
            claimed: AtomicBool::new(false),
        };
        Arc::new(Self {
            registry: Registry::new(limits.tabs_per_user_max),
            rooms: Rooms::new(shards),
            streams: Arc::new(Streams::new(sessions, limits.streams_max)),
            inboxes: (0..shards).map(|_| inbox()).collect(),
            stripes: (0..STRIPES).map(|_| Mutex::new(())).collect(),
            inbound: Incomplete { bytes: AtomicUsize::new(0), bytes_max: limits.inbound_bytes_max },
            metrics: Arc::new(Metrics::new(shards)),
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

    /// How many shards there are.
    #[must_use]
    pub fn shard_count(&self) -> usize {
        self.inboxes.len()
    }

    /// How many rooms have a member on this node.
    #[must_use]
    pub fn room_count(&self) -> usize {
        self.rooms.count()
    }

    /// Bytes of messages from clients that are not complete yet.
    #[must_use]
    pub fn incomplete_bytes(&self) -> usize {
        self.inbound.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn inbound(&self) -> &Incomplete {
        &self.inbound
    }

    pub(crate) fn rooms(&self) -> &Rooms {
        &self.rooms
    }

    /// Posts `frame` to whoever `channel` names on this node.
    ///
    /// # Errors
    /// [`Full`] if one of the shards has no room: nothing was posted to any.
    pub fn post(&self, channel: &ChannelId, frame: &Frame) -> Result<Delivery, Full> {
        match channel {
            ChannelId::User(user) => match self.registry.get_sessions(user) {
                None => Ok(nobody(Nobody::Offline)),
                Some(sessions) => {
                    let tabs = sessions.len();
                    let shards = shards_of(&sessions);
                    self.post_to(channel, &shards, frame.bytes(), || Post::Sessions {
                        sessions: Arc::clone(&sessions),
                        frame: frame.clone(),
                    })?;
                    Ok(Delivery { tabs, nodes: 0, nobody: None })
                }
            },
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
                    Ok(Delivery { tabs, nodes: 0, nobody: None })
                }
            },
            ChannelId::Stream(request) => Ok(self.streams.offer(request, frame.clone())),
        }
    }

    /// Posts `frame` to one session, whoever holds it: answers to what it sent.
    ///
    /// # Errors
    /// [`Full`] if its shard has no room.
    pub fn post_to_session(&self, address: Address, frame: Frame) -> Result<(), Full> {
        let shard = address.shard();
        let inbox = &self.inboxes[usize::from(shard)];
        if !inbox.room.reserve(frame.bytes()) {
            return Err(Full);
        }
        self.push(&[shard], || Post::Session { address, frame: frame.clone() });
        Ok(())
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

    /// Tells every shard to end its sessions. What is queued is written first; room is not asked for.
    pub fn drain(&self, drain: Drain) {
        for (shard, inbox) in self.inboxes.iter().enumerate() {
            inbox.room.take(1, 0);
            self.push(&[shard_number(shard)], || Post::Drain(drain));
        }
        self.streams.end_all();
    }

    /// Posts that wait in inboxes now.
    #[must_use]
    pub fn waiting_posts(&self) -> usize {
        self.inboxes.iter().map(|inbox| inbox.room.posts()).sum()
    }

    /// Registers a stream; see [`Streams::open`].
    pub(crate) fn open_stream(&self, request: &RequestId) -> Result<Mailbox, crate::fanout::mailbox::OpenError> {
        Streams::open(&self.streams, request)
    }

    pub(crate) fn close_stream(&self, request: &RequestId) {
        self.streams.close(request);
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
            ChannelId::Stream(_) => SmallVec::new(),
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
        for (place, shard) in shards.iter().enumerate() {
            if !self.inboxes[usize::from(*shard)].room.reserve(bytes) {
                for shard in &shards[..place] {
                    // Who found it full meanwhile waits for this.
                    self.release(*shard, 1, bytes);
                }
                return Err(Full);
            }
        }
        if let [_] = shards {
            self.push(shards, post);
        } else {
            let sequence = self.stripes[stripe_of(channel)].lock().unwrap_or_else(PoisonError::into_inner);
            let parked = self.push_all(shards, post);
            drop(sequence);
            self.ring(parked);
        }
        Ok(())
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

    // What follows is the consumer's side, called by the shard's own thread only.

    /// Makes the caller the one consumer of a shard's inbox.
    ///
    /// # Panics
    /// If there is no such shard or it has a consumer.
    pub(crate) fn claim(&self, shard: u16) {
        let claimed = self.inboxes[usize::from(shard)].claimed.swap(true, Ordering::AcqRel);
        assert!(!claimed, "shard {shard} has a consumer already");
    }

    pub(crate) fn take(&self, shard: u16) -> Batch<Post> {
        self.inboxes[usize::from(shard)].queue.take()
    }

    /// Posts and bytes that wait in a shard's inbox, those included that it has taken and not released.
    pub(crate) fn waiting(&self, shard: u16) -> (usize, usize) {
        let room = &self.inboxes[usize::from(shard)].room;
        (room.posts(), room.bytes())
    }

    pub(crate) fn release(&self, shard: u16, posts: usize, bytes: usize) {
        let inbox = &self.inboxes[usize::from(shard)];
        inbox.room.release(posts, bytes);
        inbox.freed.notify(usize::MAX);
    }

    pub(crate) fn park(&self, shard: u16, waker: &Waker) -> bool {
        let inbox = &self.inboxes[usize::from(shard)];
        inbox.bell.register(waker);
        inbox.queue.park()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a remainder of a few dozen")]
fn stripe_of(channel: &ChannelId) -> usize {
    (FixedState::default().hash_one(channel) % STRIPES as u64) as usize
}

const fn nobody(reason: Nobody) -> Delivery {
    Delivery { tabs: 0, nodes: 0, nobody: Some(reason) }
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
