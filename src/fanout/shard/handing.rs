//! Whole frames to readers in this process, in the place of writes.

use crate::fanout::session::Address;
use crate::fanout::shard::Shard;
use crate::fanout::shard::frames::Local;
use crate::fanout::shard::slab::State;
use crate::fanout::shard::transmit::Outcome;
use crate::id::RoomName;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;

/// What a session is given.
pub(crate) enum Given<'a> {
    /// A frame.
    Frame(&'a Frame),
    /// A part of an event stream that is no event, as one chunk.
    Chunk(&'a [u8]),
}

/// What became of a session that was to join a room.
#[must_use]
pub(crate) enum Join {
    /// It is in it.
    Member,
    /// It is in as many as it may be.
    Full,
    /// It has ended, or is about to.
    Ends,
}

impl Shard {
    /// Gives the next session of [`Wire::Frames`](super::Wire::Frames) what waits for it, until `take` has no room for the
    /// next: then it gets more once [`Self::handle_writable`] is called for it. False if nobody waits for anything.
    ///
    /// For a shard of such sessions only, in the place of [`Self::poll_transmit`].
    pub(crate) fn poll_frames(&mut self, mut take: impl FnMut(u32, Given<'_>) -> bool) -> bool {
        let Some(slot) = self.next_to_write() else { return false };
        let session = self.slab.get(slot);
        let (mut bytes, mut count, mut is_blocked) = (0, 0_u64, false);
        for entry in session.queue.iter() {
            let local = self.frames.get(entry.handle);
            let is_taken = match local {
                // WebSocket's own: the end is told in another way, and so is life.
                Local::Frame(frame) if !frame.kind().is_message() => true,
                Local::Frame(frame) => take(slot, Given::Frame(frame)),
                Local::Bytes(chunk) => take(slot, Given::Chunk(chunk)),
            };
            if !is_taken {
                is_blocked = true;
                break;
            }
            bytes += local.wire_bytes(session.wire);
            count += 1;
        }
        self.metrics.write_frames.record(count);
        self.handle_written(slot, if is_blocked { Outcome::Blocked(bytes) } else { Outcome::Taken(bytes) });
        true
    }

    /// The next session that is over, and why. The slot may be another's from then on.
    pub(crate) fn poll_ended(&mut self) -> Option<(u32, Disconnect)> {
        let ending = self.slab.get(*self.ended.front()?).ending;
        self.poll_disconnect().map(|slot| (slot, ending.unwrap_or(Disconnect::ConnectionLost)))
    }

    /// The slot of a session that is not over.
    pub(crate) fn slot_of(&self, address: Address) -> Option<u32> {
        self.slab.find(address).filter(|slot| self.slab.get(*slot).state != State::Ended)
    }

    /// Puts a session into a room, as if its client had said so: what it may have missed there, it is told.
    pub(crate) fn handle_join(&mut self, slot: u32, room: &RoomName) -> Join {
        let session = self.slab.get(slot);
        if session.state != State::Open || session.unlisted {
            return Join::Ends;
        }
        if !self.join(slot, room) {
            return Join::Full;
        }
        self.tell_returned_of_gap(slot);
        Join::Member
    }

    /// Takes a session out of a room.
    pub(crate) fn handle_leave(&mut self, slot: u32, room: &RoomName) {
        self.leave(slot, room);
    }
}
