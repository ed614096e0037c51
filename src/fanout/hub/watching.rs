//! Who watches: sessions of nobody, to which is shown what goes by on a channel, or how the node is.
//!
//! A watch changes nothing for anybody else: it is no tab, it counts for no delivery, and no other node hears of it.
//! What is shown is the very frame that is posted, once to each shard that has somebody who watches. While nobody does,
//! a post costs one look at a number.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::fanout::hub::{Full, Hub, Post, Shards, shard_number};
use crate::fanout::inbox::Pushed;
use crate::fanout::rooms::{Room, Rooms};
use crate::fanout::shard::Report;
use crate::id::{ChannelId, RoomName};
use crate::proto::event::{GapReason, Notice};
use crate::proto::frame::Frame;

/// The name that stands for the node itself: no channel id is written so, as each has its prefix.
const STATUS: &str = "status";

/// What is watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Watched {
    /// How the node is, once a second.
    Status,
    /// The frames of a channel that are posted on this node, also while nobody is there to get them.
    Channel(ChannelId),
}

impl Watched {
    fn name(&self) -> RoomName {
        match self {
            Self::Status => RoomName::of_watchers(STATUS),
            Self::Channel(channel) => name_of(channel),
        }
    }
}

fn name_of(channel: &ChannelId) -> RoomName {
    RoomName::of_watchers(&channel.to_string())
}

/// As many watch as may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{watchers_max} watch this node already, which is as many as may")]
pub struct TooManyWatchers {
    /// How many may.
    pub watchers_max: usize,
}

/// Who watches what, on all shards.
pub(super) struct Watching {
    rooms: Rooms,
    /// Those who watch.
    ///
    /// # Ordering
    /// Relaxed: a bound, and a hint. Who has just begun to watch may miss what is posted at the same time.
    watchers: AtomicUsize,
    watchers_max: usize,
    /// What could not be shown for want of room, by its rooms: they hear of it before anything else is shown.
    missed: Mutex<Vec<RoomName>>,
    /// Whether there is any.
    ///
    /// # Ordering
    /// Relaxed: a hint to look under the lock.
    has_missed: AtomicBool,
}

impl Watching {
    pub(super) fn new(shards: usize, watchers_max: usize) -> Self {
        Self {
            rooms: Rooms::apart(shards),
            watchers: AtomicUsize::new(0),
            watchers_max,
            missed: Mutex::default(),
            has_missed: AtomicBool::new(false),
        }
    }

    fn missed(&self) -> MutexGuard<'_, Vec<RoomName>> {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There was no room to show something. What nobody watches any more is forgotten, so that there is a bound.
    fn miss(&self, name: &RoomName) {
        let mut missed = self.missed();
        missed.retain(|other| other != name && self.rooms.find(other).is_some());
        missed.push(name.clone());
        self.has_missed.store(true, Ordering::Relaxed);
    }

    /// Whether something could not be shown there; only the first who asks hears of it.
    fn takes_missed(&self, name: &RoomName) -> bool {
        if !self.has_missed.load(Ordering::Relaxed) {
            return false;
        }
        let mut missed = self.missed();
        let before = missed.len();
        missed.retain(|other| other != name);
        self.has_missed.store(!missed.is_empty(), Ordering::Relaxed);
        missed.len() < before
    }
}

impl Hub {
    /// How many watch now.
    #[must_use]
    pub fn watcher_count(&self) -> usize {
        self.watching.watchers.load(Ordering::Relaxed)
    }

    /// Whether anybody watches the node itself.
    #[must_use]
    pub fn is_status_watched(&self) -> bool {
        self.watcher_count() > 0 && self.watching.rooms.find(&Watched::Status.name()).is_some()
    }

    /// Shows `frame` to whoever watches the node itself.
    pub fn show_status(&self, frame: &Frame) {
        self.show_to(&Watched::Status.name(), frame);
    }

    /// Shows a frame that is posted to `channel` to whoever watches it.
    #[inline]
    pub(super) fn show(&self, channel: &ChannelId, frame: &Frame) {
        if self.watcher_count() > 0 {
            self.show_to(&name_of(channel), frame);
        }
    }

    /// What was said to `channel` never came here: whoever watches it hears of that before anything else is shown.
    pub(super) fn miss_for_watchers(&self, channel: &ChannelId) {
        let name = name_of(channel);
        if self.watcher_count() > 0 && self.watching.rooms.find(&name).is_some() {
            self.watching.miss(&name);
        }
    }

    fn show_to(&self, name: &RoomName, frame: &Frame) {
        let Some(room) = self.watching.rooms.find(name) else { return };
        let shown = if self.watching.takes_missed(name) {
            let gap = Frame::notice(&Notice::Gap { reason: GapReason::RoomNotKept, count: None });
            self.post_to_watchers(name, &room, &gap).and_then(|()| self.post_to_watchers(name, &room, frame))
        } else {
            self.post_to_watchers(name, &room, frame)
        };
        // Who publishes does not wait for those who only watch.
        if shown.is_err() {
            self.watching.miss(name);
        }
    }

    fn post_to_watchers(&self, name: &RoomName, room: &Arc<Room>, frame: &Frame) -> Result<(), Full> {
        let shards: Shards = room.shards().map(|(shard, _)| shard_number(shard)).collect();
        let post = || Post::Room { room: Arc::clone(room), frame: frame.clone() };
        self.post_to(&ChannelId::Room(name.clone()), &shards, frame.bytes(), post)
    }

    /// Counts one more who watches, on `shard`.
    pub(crate) fn starts_watching(&self, watched: &Watched, shard: u16) -> Result<Arc<Room>, TooManyWatchers> {
        let watchers_max = self.watching.watchers_max;
        if self.watching.watchers.fetch_add(1, Ordering::Relaxed) >= watchers_max {
            self.stops_watching();
            return Err(TooManyWatchers { watchers_max });
        }
        Ok(self.watching.rooms.join(&watched.name(), usize::from(shard)))
    }

    /// One less. Its room it leaves as it leaves any.
    pub(crate) fn stops_watching(&self) {
        self.watching.watchers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Where a room is to be left.
    pub(crate) fn rooms_of(&self, room: &Room) -> &Rooms {
        if room.is_apart() { &self.watching.rooms } else { &self.rooms }
    }

    /// Ends everybody who watches, as a token that has expired ends a tab: whoever still may comes back. Room is not asked
    /// for: it is done when the keys of operators change.
    pub fn end_watchers(&self) {
        for (shard, inbox) in self.inboxes.iter().enumerate() {
            inbox.room.take(1, 0);
            self.push(&[shard_number(shard)], || Post::EndWatchers);
        }
    }

    /// Asks a shard how it is. `answer` is called on the shard's thread once it comes to it, and must be quick; it is
    /// dropped with a shard that never does. Room is not asked for: ask again only when this was answered.
    pub fn ask_report(&self, shard: u16, answer: Box<dyn FnOnce(Report) + Send>) {
        let Some(inbox) = self.inboxes.get(usize::from(shard)) else { return };
        inbox.room.take(1, 0);
        if inbox.queue.push(Post::Report(answer)) == Pushed::Ring {
            inbox.bell.wake();
        }
    }
}
