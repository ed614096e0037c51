//! A shard: a pure state machine that owns sessions and decides what each of them is sent, and when one ends.
//!
//! Methods come in four kinds: getters, `handle_*` (input), commands, `poll_*` (output). No method touches a socket or
//! reads a clock. A session is written by its shard only, so nothing in here is locked or counted atomically.
//!
//! The driver's round: [`Shard::handle_inbox`], [`Shard::handle_readable`] and [`Shard::handle_writable`] as the world
//! calls, [`Shard::handle_tick`] now and then; after each, [`Shard::poll_transmit`] until it is done or its turn is
//! over, [`Shard::handle_flushed`], and [`Shard::poll_disconnect`] until it is empty.

mod allowance;
mod answer;
mod budget;
mod drain;
mod frames;
mod handing;
mod members;
mod missed;
mod offer;
mod opening;
mod queue;
mod reading;
mod relief;
mod report;
mod slab;
mod timers;
mod transmit;

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::fanout::hub::{Hub, Post};
use crate::fanout::inbox::Batch;
use crate::fanout::session::{Identity, SessionRef};
pub use crate::fanout::shard::answer::Answer;
use crate::fanout::shard::drain::Draining;
pub use crate::fanout::shard::frames::Wire;
use crate::fanout::shard::frames::{Frames, Handle, Local};
pub(crate) use crate::fanout::shard::handing::{Given, Join};
use crate::fanout::shard::members::LocalRooms;
pub use crate::fanout::shard::opening::{OpenError, Opening, Resume};
use crate::fanout::shard::queue::Pool;
pub use crate::fanout::shard::reading::{Inbound, Reaction, limited_frame};
use crate::fanout::shard::relief::Relief;
use crate::fanout::shard::report::Reporting;
pub use crate::fanout::shard::report::{Ended, Report, Waiting};
use crate::fanout::shard::slab::{Slab, State};
use crate::fanout::shard::timers::{TICK, Timers};
pub use crate::fanout::shard::transmit::{Outcome, Slices, Transmit};
use crate::id::RoomName;
use crate::metrics::ShardMetrics;
use crate::proto::deflate::Inflater;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Frame, Moment};
use crate::proto::limits::SessionLimits;
use crate::proto::sse;

/// The state machine of one shard. `!Send`: it lives and dies on its thread.
pub struct Shard {
    index: u16,
    hub: Arc<Hub>,
    metrics: Arc<ShardMetrics>,
    limits: SessionLimits,
    bytes_budget: usize,
    slab: Slab,
    frames: Frames,
    rooms: LocalRooms,
    timers: Timers,
    pool: Pool,
    direct: VecDeque<u32>,
    broadcast: VecDeque<u32>,
    ended: VecDeque<u32>,
    due: Vec<u32>,
    gathered: transmit::Gathered,
    written: transmit::Written,
    run: offer::Run,
    translation: answer::Translation,
    /// Whose identity the readers of answers have: nobody's.
    reader: Arc<Identity>,
    queued: Queued,
    /// Posts that were taken and are yet to be handled.
    waiting: Batch<Post>,
    /// A tab that may be written to has more than its queue holds: writes come before posts.
    is_pressed: bool,
    relief: Relief,
    /// When the other shards were asked how fat theirs are, while the process is over its budget.
    asked: Option<Instant>,
    /// The class of its fattest as it was told last, and the tick of that.
    told: Option<(u64, u32)>,
    /// What the other shards' queues cost beside their frames, as it was last looked up.
    entries_elsewhere: usize,
    /// For clients' messages that are compressed.
    inflater: Inflater,
    picks: u32,
    reporting: Reporting,
    draining: Option<Draining>,
    ping: Handle,
    keep_alive: Handle,
    on_one_thread: PhantomData<*const ()>,
}

/// Posts that are handled in one go.
const POSTS_MAX: usize = 64;

/// What waits in all queues of the shard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Queued {
    frames: usize,
    bytes: usize,
}

impl Shard {
    /// Shard `index` of `hub`; `now` is where its time begins.
    ///
    /// # Panics
    /// If the hub has no such shard or somebody runs it already.
    #[must_use]
    pub fn new(hub: Arc<Hub>, index: u16, limits: SessionLimits, bytes_budget: usize, now: Instant) -> Self {
        hub.claim(index, now);
        let mut frames = Frames::default();
        let ping = frames.insert(Local::Frame(Frame::ping()));
        let keep_alive = frames.insert(Local::Bytes(Box::from(sse::KEEP_ALIVE)));
        Self {
            index,
            metrics: hub.metrics().shard(usize::from(index)),
            hub,
            limits,
            bytes_budget,
            slab: Slab::default(),
            frames,
            rooms: LocalRooms::default(),
            timers: Timers::new(now),
            pool: Pool::default(),
            direct: VecDeque::new(),
            broadcast: VecDeque::new(),
            ended: VecDeque::new(),
            due: Vec::new(),
            gathered: transmit::Gathered::default(),
            written: transmit::Written::default(),
            run: offer::Run::default(),
            translation: answer::Translation::default(),
            reader: Arc::new(Identity::nobody()),
            queued: Queued::default(),
            waiting: Batch::empty(),
            is_pressed: false,
            relief: Relief::default(),
            asked: None,
            told: None,
            entries_elsewhere: 0,
            inflater: Inflater::default(),
            picks: 0,
            reporting: Reporting::default(),
            draining: None,
            ping,
            keep_alive,
            on_one_thread: PhantomData,
        }
    }

    /// Its number.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Sessions that it holds, those that are closing included.
    #[must_use]
    pub fn session_count(&self) -> usize {
        self.slab.len()
    }

    /// Frames that are held by queues of this shard, each once.
    #[must_use]
    pub fn held_frames(&self) -> usize {
        self.frames.len() - 2
    }

    /// Frames and bytes that wait in all queues, shared frames counted in each.
    #[must_use]
    pub fn queued(&self) -> (usize, usize) {
        (self.queued.frames, self.queued.bytes)
    }

    /// Frames and bytes that wait for the session in `slot`.
    #[must_use]
    pub fn queued_for(&self, slot: u32) -> (usize, usize) {
        let session = self.slab.get(slot);
        (session.queue.len(), session.queue_bytes)
    }

    /// What the shard counts.
    #[must_use]
    pub fn metrics(&self) -> &ShardMetrics {
        &self.metrics
    }

    /// The handle of the session in `slot`, if there is one.
    #[must_use]
    pub fn session(&self, slot: u32) -> Option<SessionRef> {
        self.slab.session_ref(self.index, slot)
    }

    /// Queues `frame` for one session of this shard, by the rules of its class.
    pub fn send(&mut self, slot: u32, frame: Frame) {
        if self.slab.get(slot).state == State::Open {
            let is_last = self.is_last_of_answer(slot, &frame);
            let handle = self.frames.insert_posted(frame);
            self.offer_one(slot, handle);
            self.frames.release(handle);
            if is_last {
                self.end(slot, Disconnect::Normal);
            }
        }
    }

    /// Ends a session: what it has queued and a close are written first, within the close timeout.
    pub fn end(&mut self, slot: u32, ending: Disconnect) {
        if self.slab.get(slot).state == State::Open {
            self.depart(slot, ending);
            self.queue_close(slot, ending);
        }
    }

    /// The connection is gone: the session is evicted at once, with all that it had queued.
    pub fn handle_lost(&mut self, slot: u32, ending: Disconnect) {
        match self.slab.get(slot).state {
            State::Open => {
                let lost = self.slab.get(slot).queue.len();
                self.metrics.discarded_frames.of(ending).add(lost as u64);
                self.depart(slot, ending);
                self.finish(slot);
            }
            State::Closing => self.finish(slot),
            State::Vacant | State::Ended => {}
        }
    }

    /// Takes a part of what other threads posted. Returns false if there was nothing.
    ///
    /// No more is taken while a tab has more than its queue holds that nobody has tried to write: a burst does not
    /// make a slow tab of it.
    pub fn handle_inbox(&mut self, now: Instant) -> bool {
        if self.is_pressed && self.has_writes() {
            return false;
        }
        self.is_pressed = false;
        if self.waiting.is_empty() {
            self.waiting = self.hub.take(self.index);
            self.note_taken();
            if self.waiting.is_empty() {
                self.note_handled();
            }
        }
        if self.waiting.is_empty() {
            return false;
        }
        self.note_inbox();
        let moment = Moment::at(now);
        let (mut posts, mut bytes) = (0, 0);
        while posts < POSTS_MAX && !self.is_pressed {
            let Some(post) = self.waiting.next() else { break };
            if post.is_counted() {
                posts += 1;
                bytes += post.bytes();
            }
            if let Some(accepted) = post.accepted() {
                self.metrics.posted_micros.record(moment.micros_since(accepted));
            }
            self.handle_post(post, now);
        }
        self.offer_run();
        if self.waiting.is_empty() {
            self.note_handled();
        }
        self.hub.release(self.index, posts, bytes);
        self.keep_to_budget(now);
        true
    }

    fn note_inbox(&self) {
        let (posts, bytes) = self.hub.waiting(self.index);
        self.metrics.inbox_posts.store(posts as u64);
        self.metrics.inbox_bytes.store(bytes as u64);
    }

    fn handle_post(&mut self, post: Post, now: Instant) {
        if !matches!(post, Post::Room { .. }) {
            self.offer_run();
        }
        match post {
            Post::Room { room, frame } => self.add_to_run(room, frame),
            Post::Session { address, frame } => {
                if let Some(slot) = self.slab.find(address) {
                    self.send(slot, frame);
                }
            }
            Post::Sessions { sessions, frame } => self.offer_sessions(&sessions, frame),
            Post::End { sessions, ending } => {
                for session in sessions.iter() {
                    if let Some(slot) = self.own_slot(session) {
                        self.end(slot, ending);
                    }
                }
            }
            Post::Missed => self.tell_of_missed(),
            Post::Weigh => drop(self.weigh()),
            // The budget is looked at after every turn.
            Post::Weighed => {}
            Post::EndWatchers => self.end_watchers(),
            Post::Drain(pace) => self.start_drain(*pace, now),
            Post::Limits(limits) => self.limits = SessionLimits::clone(&limits),
            Post::Report(answer) => answer(self.report()),
            Post::Ring { parked, place } => self.hub.pass_ring(&parked, place),
        }
    }

    /// The slot of a session, if it lives on this shard and still does.
    #[inline]
    fn own_slot(&self, session: &SessionRef) -> Option<u32> {
        let address = session.address();
        if address.shard() == self.index { self.slab.find(address) } else { None }
    }

    /// Goes to sleep until the next post, which then wakes `waker`. False if there is a post to take first.
    ///
    /// # Ordering
    /// See [`crate::fanout::hub`]: parking is an exchange on the inbox itself.
    pub fn park(&mut self, waker: &Waker) -> bool {
        self.note_levels();
        self.hub.park(self.index, waker)
    }

    fn note_levels(&self) {
        self.metrics.queue_frames.store(self.queued.frames as u64);
        self.metrics.queue_bytes.store(self.queued.bytes as u64);
        self.note_inbox();
    }

    /// Whether there is something to do at once: posts that were taken, or writes.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || self.has_writes()
    }

    /// Whether [`Self::poll_transmit`] may have something.
    fn has_writes(&self) -> bool {
        !self.direct.is_empty() || !self.broadcast.is_empty()
    }

    /// How often [`Self::handle_tick`] wants to be called: a second, or less while draining.
    #[must_use]
    pub fn tick_interval(&self) -> Duration {
        if self.draining.is_some() { drain::STEP } else { TICK }
    }

    /// Heartbeats, expiries, close timeouts and the pace of a drain.
    pub fn handle_tick(&mut self, now: Instant) {
        let mut due = std::mem::take(&mut self.due);
        self.timers.advance(now, &mut due);
        for slot in due.drain(..) {
            self.handle_timer(slot);
        }
        self.due = due;
        self.hub.handle_second(self.index, now);
        // Under load a shard does not park for long.
        self.note_levels();
        self.go_on_draining(now);
        self.look_elsewhere();
        self.keep_to_budget(now);
    }

    fn handle_timer(&mut self, slot: u32) {
        let tick = self.timers.tick();
        let session = self.slab.get_mut(slot);
        match session.state {
            State::Vacant | State::Ended => return,
            State::Closing => return self.finish(slot),
            State::Open => {}
        }
        if session.expires <= tick {
            return self.end(slot, Disconnect::TokenExpired);
        }
        let timeout = Timers::ticks(self.limits.heartbeat_timeout);
        let interval = Timers::ticks(self.limits.heartbeat_interval).max(timeout);
        // A timer may come early (the longest is 254 ticks): what is due is told by the ticks themselves.
        let answer_due = session.ping_due.saturating_sub(interval - timeout);
        if session.awaiting && answer_due <= tick {
            return self.cut(slot, Disconnect::HeartbeatTimeout);
        }
        let is_due = session.ping_due <= tick;
        let next = if is_due {
            self.metrics.session_queue_frames.record(session.queue.len() as u64);
            self.metrics.session_queue_bytes.record(session.queue_bytes as u64);
            session.awaiting = true;
            session.ping_due = tick + interval;
            tick + timeout
        } else if session.awaiting {
            answer_due
        } else {
            session.ping_due
        };
        let wait = next.min(session.expires) - tick;
        let ping = if session.wire.is_websocket() { self.ping } else { self.keep_alive };
        self.timers.set(slot, wait);
        if is_due {
            self.offer_one(slot, ping);
        }
    }

    /// The next connection that is over: the driver drops it. The slot may be another's from then on.
    pub fn poll_disconnect(&mut self) -> Option<u32> {
        let slot = self.ended.pop_front()?;
        self.slab.give(slot);
        self.metrics.sessions.store(self.slab.len() as u64);
        Some(slot)
    }

    /// The rooms that a session is in.
    #[must_use]
    pub fn rooms_of(&self, slot: u32) -> Vec<RoomName> {
        let places = self.slab.get(slot).rooms.iter();
        places.filter_map(|(local, _)| self.rooms.room(*local).map(|room| room.name().clone())).collect()
    }

    /// Takes a session out of the registry and its rooms: it gets no more frames. Counted once, with the reason.
    fn depart(&mut self, slot: u32, ending: Disconnect) {
        self.metrics.ended_sessions.of(ending).increment();
        self.note_ended(slot, ending);
        if self.slab.get(slot).wire == Wire::DeflatedWebSocket {
            self.hub.deflating().left();
        }
        if let Some(handle) = self.slab.session_ref(self.index, slot) {
            match &self.slab.get(slot).answer {
                Some(answer) => self.hub.leave_stream(&answer.request, handle.address(), ending),
                None if handle.identity().is_nobody() => self.hub.stops_watching(),
                None => self.hub.disconnect(&handle),
            }
        }
        while let Some(&membership) = self.slab.get(slot).rooms.last() {
            self.leave_place(slot, membership);
        }
        let session = self.slab.get_mut(slot);
        session.rooms = Vec::new();
        session.state = State::Closing;
        session.ending = Some(ending);
        self.allow_time_to_close(slot);
    }

    fn allow_time_to_close(&mut self, slot: u32) {
        let wait = Timers::ticks(self.limits.close_timeout);
        // One tick more: the current one may be almost over.
        self.timers.set(slot, wait + 1);
    }

    /// The connection is to be dropped; nothing is written any more.
    fn finish(&mut self, slot: u32) {
        self.drop_queue(slot, false);
        let session = self.slab.get_mut(slot);
        if session.state != State::Ended {
            session.state = State::Ended;
            session.identity = None;
            session.answer = None;
            self.drop_incomplete(slot);
            self.timers.clear(slot);
            self.ended.push_back(slot);
        }
    }

    fn leave_place(&mut self, slot: u32, membership: (u32, u32)) {
        let (moved, room) = self.rooms.leave(membership);
        let session = self.slab.get_mut(slot);
        session.rooms.retain(|place| *place != membership);
        if let Some(moved) = moved {
            let last = self.rooms.members(membership.0).len();
            let was = (membership.0, u32::try_from(last).unwrap_or(u32::MAX));
            for place in &mut self.slab.get_mut(moved).rooms {
                if *place == was {
                    *place = membership;
                }
            }
        }
        if let Some(room) = room
            && !self.slab.get(slot).unlisted
        {
            self.hub.rooms_of(&room).leave(&room, usize::from(self.index));
        }
    }

    /// Publishers find the session no more, but what is on its way to it still gets there.
    fn unlist(&mut self, slot: u32) {
        if let Some(handle) = self.slab.session_ref(self.index, slot)
            && !handle.identity().is_nobody()
        {
            self.hub.unlist(&handle);
        }
        for (local, _) in &self.slab.get(slot).rooms {
            if let Some(room) = self.rooms.room(*local) {
                self.hub.rooms_of(room).leave(room, usize::from(self.index));
            }
        }
        self.slab.get_mut(slot).unlisted = true;
    }

    /// Leaves a room; nothing if the session is not in it.
    fn leave(&mut self, slot: u32, name: &RoomName) {
        if let Some(membership) = self.membership(slot, name) {
            self.leave_place(slot, membership);
        }
    }

    /// Joins a room; false if the session is in as many as it may be. Being in it already is success.
    fn join(&mut self, slot: u32, name: &RoomName) -> bool {
        if self.membership(slot, name).is_some() {
            return true;
        }
        if self.slab.get(slot).rooms.len() >= self.limits.rooms_max || self.slab.get(slot).unlisted {
            return false;
        }
        let room = self.hub.rooms().join(name, usize::from(self.index));
        let membership = self.rooms.join(room, slot);
        self.slab.get_mut(slot).rooms.push(membership);
        true
    }

    fn membership(&self, slot: u32, name: &RoomName) -> Option<(u32, u32)> {
        let room = self.hub.rooms().find(name)?;
        let local = self.rooms.find(&room)?;
        self.slab.get(slot).rooms.iter().copied().find(|(number, _)| *number == local)
    }
}

impl Drop for Shard {
    /// Whoever is still registered is taken out: the registry outlives the shard.
    fn drop(&mut self) {
        for slot in 0..self.slab.slots() {
            self.handle_lost(slot, Disconnect::ServiceRestart);
        }
    }
}

#[cfg(test)]
mod tests;
