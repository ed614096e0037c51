//! Frames into queues: the rules for a tab that is behind, by the frame's class.

use std::sync::Arc;

use crate::fanout::registry::Sessions;
use crate::fanout::rooms::Room;
use crate::fanout::shard::Shard;
use crate::fanout::shard::frames::{Handle, Local, Wire};
use crate::fanout::shard::queue::Entry;
use crate::fanout::shard::slab::{Session, State};
use crate::fanout::shard::timers::Timers;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Class, Frame};
use crate::proto::sse;

/// Control frames that fit beyond a full queue, so that a slow tab is still told why it ends.
const CONTROL_ROOM: usize = 16;
/// A room with more members than this is broadcast work: direct frames go before the rest of it.
const DIRECT_MAX: usize = 64;

/// Frames that are offered together.
const RUN_FRAMES_MAX: usize = 64;

/// How many sessions ahead of a walk are fetched: a look at memory takes as long as a few of them.
pub(super) const FETCH_AHEAD: usize = 8;

/// Which list a session goes onto when it has something to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    Direct,
    Broadcast,
}

/// What became of a frame that may replace a queued one.
enum Replace {
    /// There is none that it may replace.
    Nothing,
    /// It took the place of an older one.
    Done,
    /// It is so much larger that the queue would pass its bound in bytes.
    NoRoom,
}

/// What is the same for every session that one frame is offered to.
#[derive(Clone, Copy)]
pub(super) struct Offered {
    handle: Handle,
    class: Class,
    tag: u32,
    websocket_bytes: usize,
    /// On a WebSocket with permessage-deflate.
    deflated_bytes: usize,
    urgency: Urgency,
}

/// Frames that were posted to one room behind each other, each held once.
#[derive(Default)]
pub(super) struct Run {
    room: Option<Arc<Room>>,
    offered: Vec<Offered>,
    entries: Vec<Entry>,
    /// On a WebSocket, and on one with permessage-deflate.
    websocket_bytes: usize,
    deflated_bytes: usize,
    /// None of them replaces another.
    is_simple: bool,
}

impl Run {
    fn add(&mut self, room: Arc<Room>, offered: Offered) {
        self.is_simple = offered.class != Class::Latest && (self.is_simple || self.offered.is_empty());
        self.room = Some(room);
        self.websocket_bytes += offered.websocket_bytes;
        self.deflated_bytes += offered.deflated_bytes;
        self.entries.push(Entry { handle: offered.handle, tag: offered.tag });
        self.offered.push(offered);
    }

    /// Bytes of all of them on that wire; None if they are not known for all of its sessions together.
    #[inline]
    const fn bytes(&self, wire: Wire) -> Option<usize> {
        match wire {
            Wire::WebSocket | Wire::Frames => Some(self.websocket_bytes),
            Wire::DeflatedWebSocket => Some(self.deflated_bytes),
            Wire::NarrowWebSocket(_) | Wire::EventStream | Wire::Completion => None,
        }
    }
}

impl Session {
    /// Whether it need not go onto that list: it is on it or on the one before, or may not be written to.
    #[inline]
    fn is_listed(&self, urgency: Urgency) -> bool {
        self.blocked || self.dirty_direct || (urgency == Urgency::Broadcast && self.dirty_broadcast)
    }
}

impl Shard {
    pub(super) fn offered(&self, handle: Handle, urgency: Urgency) -> Offered {
        let local = self.frames.get(handle);
        let class = local.class();
        let tag = if class == Class::Latest { tag_of(local.key()) } else { 0 };
        let websocket_bytes = local.wire_bytes(Wire::WebSocket);
        let deflated_bytes = local.wire_bytes(Wire::DeflatedWebSocket);
        Offered { handle, class, tag, websocket_bytes, deflated_bytes, urgency }
    }

    /// Offers a held frame to one session.
    pub(super) fn offer_one(&mut self, slot: u32, handle: Handle) {
        let offered = self.offered(handle, Urgency::Direct);
        self.offer(slot, &offered);
        self.count_offered(handle, 1);
    }

    /// Counts offers of one frame by its kind.
    #[inline]
    pub(super) fn count_offered(&self, handle: Handle, sessions: u64) {
        match self.frames.get(handle) {
            Local::Frame(frame) => self.metrics.offered_frames.of(frame.kind()).add(sessions),
            Local::Bytes(_) => self.metrics.keep_alives.add(sessions),
        }
    }

    /// Offers a frame to those of a user's sessions that live on this shard.
    pub(super) fn offer_sessions(&mut self, sessions: &Sessions, frame: Frame) {
        let handle = self.frames.insert_posted(frame);
        let offered = self.offered(handle, Urgency::Direct);
        let mut count = 0;
        for session in sessions.iter() {
            if let Some(slot) = self.own_slot(session) {
                self.offer(slot, &offered);
                count += 1;
            }
        }
        self.count_offered(handle, count);
        self.frames.release(handle);
    }

    /// Takes a frame for a room's members on this shard. Frames for one room that come behind each other are offered
    /// together by [`Self::offer_run`].
    pub(super) fn add_to_run(&mut self, room: Arc<Room>, frame: Frame) {
        let goes_on = self.run.room.as_ref().is_some_and(|run| Arc::ptr_eq(run, &room));
        if !goes_on || self.run.offered.len() >= RUN_FRAMES_MAX {
            self.offer_run();
        }
        let handle = self.frames.insert_posted(frame);
        let offered = self.offered(handle, Urgency::Broadcast);
        self.run.add(room, offered);
    }

    /// Offers what was taken for a room: all of it to one member, then to the next, so that a member's memory is
    /// touched once.
    pub(super) fn offer_run(&mut self) {
        let Some(room) = self.run.room.take() else { return };
        let mut run = std::mem::take(&mut self.run);
        if let Some(local) = self.rooms.find(&room) {
            self.offer_to_members(local, &mut run);
        }
        for entry in run.entries.drain(..) {
            self.frames.release(entry.handle);
        }
        run.offered.clear();
        (run.websocket_bytes, run.deflated_bytes) = (0, 0);
        self.run = run;
    }

    fn offer_to_members(&mut self, local: u32, run: &mut Run) {
        let count = self.rooms.members(local).len();
        let urgency = if count > DIRECT_MAX { Urgency::Broadcast } else { Urgency::Direct };
        run.offered.iter_mut().for_each(|offered| offered.urgency = urgency);
        let mut unheld = 0;
        // From the last to the first: a member that is cut on the way leaves, and only one that had its offers moves up.
        for place in (0..count).rev() {
            let members = self.rooms.members(local);
            let slot = members[place];
            if let Some(ahead) = place.checked_sub(FETCH_AHEAD) {
                self.slab.fetch_ahead(members[ahead], run.entries.len());
            }
            if self.take_whole(slot, run, urgency) {
                unheld += 1;
                continue;
            }
            run.offered.iter().for_each(|offered| self.offer(slot, offered));
        }
        run.entries.iter().for_each(|entry| self.count_offered(entry.handle, count as u64));
        run.entries.iter().for_each(|entry| self.frames.hold_for(entry.handle, unheld));
    }

    /// Queues a run of frames that find room all together and replace nothing: what almost every member does. They are
    /// yet to be held for it, once for all members.
    #[inline]
    fn take_whole(&mut self, slot: u32, run: &Run, urgency: Urgency) -> bool {
        let session = self.slab.get_mut(slot);
        let Some(bytes) = run.bytes(session.wire) else { return false };
        let is_simple = run.is_simple && session.state == State::Open;
        let fits = session.queue.len() + run.entries.len() <= self.limits.queue_frames_max
            && session.queue_bytes + bytes <= self.limits.queue_bytes_max;
        if !is_simple || (!fits && session.blocked) {
            return false;
        }
        self.is_pressed |= !fits;
        for entry in &run.entries {
            session.queue.push(*entry, &mut self.pool);
        }
        session.queue_bytes += bytes;
        self.queued.frames += run.entries.len();
        self.queued.bytes += bytes;
        if !session.is_listed(urgency) {
            self.list(slot, urgency);
        }
        true
    }

    /// The rules of a full queue, by class. An empty queue admits any legal frame.
    #[inline]
    fn offer(&mut self, slot: u32, offered: &Offered) {
        let session = self.slab.get_mut(slot);
        if session.state != State::Open {
            return;
        }
        let bytes = match session.wire {
            Wire::WebSocket => offered.websocket_bytes,
            Wire::DeflatedWebSocket => offered.deflated_bytes,
            wire => self.frames.get(offered.handle).wire_bytes(wire),
        };
        if bytes == 0 {
            return;
        }
        let frames = session.queue.len();
        let fits = frames < self.limits.queue_frames_max && session.queue_bytes + bytes <= self.limits.queue_bytes_max;
        if frames == 0 || (fits && offered.class != Class::Latest) {
            self.push(slot, offered, bytes);
        } else {
            self.offer_behind_others(slot, offered, bytes, fits);
        }
    }

    /// What may replace a queued frame, or finds no room.
    fn offer_behind_others(&mut self, slot: u32, offered: &Offered, bytes: usize, fits: bool) {
        if offered.class == Class::Latest {
            match self.replace(slot, offered, bytes) {
                Replace::Nothing => {}
                Replace::Done => return,
                Replace::NoRoom => return self.cut(slot, Disconnect::SlowConsumer),
            }
        }
        let fits = fits || self.fits_behind_first(slot, bytes);
        let frames_max = self.limits.queue_frames_max.saturating_add(CONTROL_ROOM);
        let is_told = offered.class == Class::Control && self.slab.get(slot).queue.len() < frames_max;
        // Nobody has tried yet to write what waits: that comes first, and until then the tab is not behind. Posts stop
        // for it within a run; answers to what the tab itself sends do not, and so have a bound here.
        let session = self.slab.get(slot);
        let untried_max = self.limits.queue_frames_max.saturating_add(2 * RUN_FRAMES_MAX);
        let is_untried = !session.blocked && session.queue.len() < untried_max;
        if fits || is_told || is_untried {
            self.is_pressed |= !fits && is_untried;
            self.push(slot, offered, bytes);
        } else if self.frames.get(offered.handle).is_typing() {
            self.metrics.dropped_typing_frames.increment();
        } else {
            self.cut(slot, Disconnect::SlowConsumer);
        }
    }

    /// Bytes that wait behind the first frame. An empty queue admits any legal frame: one that is larger than the queue
    /// must not be what the next frame finds no room for.
    fn bytes_behind_first(&self, slot: u32) -> usize {
        let session = self.slab.get(slot);
        let first = session.queue.front().map_or(0, |first| self.frames.get(first.handle).wire_bytes(session.wire));
        session.queue_bytes + session.written - first
    }

    fn fits_behind_first(&self, slot: u32, bytes: usize) -> bool {
        self.slab.get(slot).queue.len() < self.limits.queue_frames_max
            && self.bytes_behind_first(slot) + bytes <= self.limits.queue_bytes_max
    }

    /// The newest takes the place of the queued one of its kind with the same key, unless that one is partly written.
    /// The first in the queue may be replaced by any legal frame, as an empty queue admits any; typing hardly grows.
    /// An edit that came before its message, from another node, keeps its place: the newest may not get in front.
    fn replace(&mut self, slot: u32, offered: &Offered, bytes: usize) -> Replace {
        let behind = self.bytes_behind_first(slot);
        let session = self.slab.get_mut(slot);
        let (wire, skip) = (session.wire, usize::from(session.written > 0));
        let (frames, newest) = (&self.frames, self.frames.get(offered.handle));
        let first = session.queue.front();
        let is_older = |queued| frames.get(queued).is_older(newest);
        let is_message = |queued| frames.get(queued).is_message_of(newest);
        let Some(entry) = session.queue.find_mut(offered.tag, skip, is_older, is_message) else {
            return Replace::Nothing;
        };
        let before = frames.get(entry.handle).wire_bytes(wire);
        let queue_bytes = session.queue_bytes + bytes - before;
        let is_first = first == Some(*entry);
        let is_over = !is_first && behind + bytes - before > self.limits.queue_bytes_max;
        if bytes > before && is_over && !newest.is_typing() {
            if session.blocked {
                return Replace::NoRoom;
            }
            self.is_pressed = true;
        }
        let displaced = std::mem::replace(&mut entry.handle, offered.handle);
        session.queue_bytes = queue_bytes;
        self.queued.bytes = self.queued.bytes + bytes - before;
        self.frames.hold(offered.handle);
        self.frames.release(displaced);
        self.metrics.coalesced_frames.increment();
        Replace::Done
    }

    #[inline]
    pub(super) fn push(&mut self, slot: u32, offered: &Offered, bytes: usize) {
        let session = self.slab.get_mut(slot);
        session.queue.push(Entry { handle: offered.handle, tag: offered.tag }, &mut self.pool);
        session.queue_bytes += bytes;
        self.queued.frames += 1;
        self.queued.bytes += bytes;
        self.frames.hold(offered.handle);
        if !session.is_listed(offered.urgency) {
            self.list(slot, offered.urgency);
        }
    }

    #[inline]
    fn list(&mut self, slot: u32, urgency: Urgency) {
        let session = self.slab.get_mut(slot);
        match urgency {
            Urgency::Direct => {
                session.dirty_direct = true;
                self.direct.push_back(slot);
            }
            Urgency::Broadcast => {
                session.dirty_broadcast = true;
                self.broadcast.push_back(slot);
            }
        }
    }

    fn mark(&mut self, slot: u32, urgency: Urgency) {
        if !self.slab.get(slot).is_listed(urgency) {
            self.list(slot, urgency);
        }
    }

    /// The session has something to write and nothing in the way.
    pub(super) fn mark_direct(&mut self, slot: u32) {
        self.mark(slot, Urgency::Direct);
    }

    /// Goes on with the rest of a long queue after everybody else had a turn.
    pub(super) fn mark_unfinished(&mut self, slot: u32) {
        self.mark(slot, Urgency::Broadcast);
    }

    /// Drops what is queued but for the partly written frame, and queues the close. A reader in this process, which may
    /// never make room for it, is told in another way, and at once.
    pub(super) fn cut(&mut self, slot: u32, ending: Disconnect) {
        let session = self.slab.get(slot);
        let discarded = session.queue.len() - usize::from(session.written > 0);
        self.metrics.discarded_frames.of(ending).add(discarded as u64);
        self.depart(slot, ending);
        if self.slab.get(slot).wire == Wire::Frames {
            return self.finish(slot);
        }
        self.drop_queue(slot, true);
        self.queue_close(slot, ending);
    }

    /// Queues what ends the stream of bytes: a close frame, or an event stream's last chunk.
    pub(super) fn queue_close(&mut self, slot: u32, ending: Disconnect) {
        let local = match self.slab.get(slot).wire {
            Wire::EventStream => Local::Bytes(sse::end(ending).into()),
            Wire::Completion => Local::Bytes(self.last_words(slot, ending)),
            _ => Local::Frame(Frame::close(ending)),
        };
        let bytes = local.wire_bytes(self.slab.get(slot).wire);
        let handle = self.frames.insert(local);
        let offered = self.offered(handle, Urgency::Direct);
        self.push(slot, &offered, bytes);
        self.frames.release(handle);
    }

    /// Releases what is queued, but for a partly written first frame if that is to be kept.
    pub(super) fn drop_queue(&mut self, slot: u32, keep_partly_written: bool) {
        let session = self.slab.get_mut(slot);
        self.queued.frames -= session.queue.len();
        self.queued.bytes -= session.queue_bytes;
        let is_kept = keep_partly_written && session.written > 0;
        let kept = if is_kept { session.queue.pop(&mut self.pool) } else { None };
        session.queue.drain(&mut self.pool, |entry| self.frames.release(entry.handle));
        session.queue_bytes = 0;
        if let Some(entry) = kept {
            let bytes = self.frames.get(entry.handle).wire_bytes(session.wire) - session.written;
            session.queue.push(entry, &mut self.pool);
            session.queue_bytes = bytes;
            self.queued.frames += 1;
            self.queued.bytes += bytes;
        } else {
            session.written = 0;
        }
    }

    /// Counts a bad frame; false if there were too many within ten seconds.
    pub(super) fn tolerate_bad_frame(&mut self, slot: u32) -> bool {
        const WINDOW: std::time::Duration = std::time::Duration::from_secs(10);
        self.metrics.bad_frames.increment();
        let (tick, window) = (self.timers.tick(), Timers::ticks(WINDOW));
        let session = self.slab.get_mut(slot);
        if tick - session.bad_since > window {
            (session.bad_since, session.bad) = (tick, 0);
        }
        session.bad = session.bad.saturating_add(1);
        session.bad <= self.limits.bad_frames_max
    }
}

/// A short form of a key that is never 0: equal keys have equal tags.
#[expect(clippy::cast_possible_truncation, reason = "folded to 32 bits on purpose")]
fn tag_of(key: u128) -> u32 {
    let folded = (key >> 64) as u64 ^ key as u64;
    ((folded >> 32) as u32 ^ folded as u32) | 1
}
