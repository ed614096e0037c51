//! Queues onto the wire: everything that waits for a session leaves in one write.

use std::io::IoSlice;
use std::ops::{Deref, Range};
use std::time::Instant;

use smallvec::SmallVec;

use crate::fanout::shard::Shard;
use crate::fanout::shard::frames::{Frames, Handle, Wire};
use crate::fanout::shard::offer::FETCH_AHEAD;
use crate::fanout::shard::queue::Entry;
use crate::fanout::shard::slab::{Session, State};
use crate::metrics::LatencyHistogram;
use crate::proto::frame::Moment;

/// Parts up to this many bytes are gathered by copy; larger ones go out as slices of their own.
const COPY_MAX: usize = 2048;
/// Bytes of one write, whatever waits.
const WRITE_BYTES_MAX: usize = 256 << 10;
/// Of so many writes one is not direct work, if there is other.
const DIRECT_PICKS: u32 = 8;
/// Of a closing answer, the least that counts as progress: a byte now and then does not.
const PROGRESS_BYTES_MIN: usize = 1024;
/// Moments that are noted between two looks at the clock: what is written beyond that is not timed.
const WRITTEN_MAX: usize = 64;
/// Slices of one write.
const SLICES_MAX: usize = 64;

/// Where a part of a write lies.
enum Piece {
    Scratch(Range<usize>),
    Part { handle: Handle, part: usize, from: usize, to: usize },
}

/// A write as it was laid out last. The members of a room often wait for the same frames: what was laid out for one is
/// good for the next.
#[derive(Default)]
pub(super) struct Gathered {
    scratch: Vec<u8>,
    pieces: SmallVec<[Piece; 4]>,
    frames: usize,
    /// When the first of them was accepted, if it is timed.
    accepted: Option<Moment>,
    wire: Option<Wire>,
    /// The whole queue that it was made of, if it was a whole one and nothing of it was written before.
    entries: Vec<Entry>,
    /// [`Frames::inserted`] at that time.
    inserted: u64,
}

impl Gathered {
    #[inline]
    fn is_of(&self, session: &Session, frames: &Frames) -> bool {
        self.inserted == frames.inserted()
            && self.wire == Some(session.wire)
            && session.written == 0
            && session.queue.is(&self.entries)
    }

    #[inline]
    fn prepare(&mut self, session: &Session, frames: &Frames) {
        if !self.is_of(session, frames) {
            self.lay_out(session, frames);
        }
    }

    /// Lays out the front of a queue: small parts side by side in the scratch, large ones apart.
    #[inline(never)]
    fn lay_out(&mut self, session: &Session, frames: &Frames) {
        self.pieces.clear();
        self.scratch.clear();
        self.entries.clear();
        (self.frames, self.wire, self.inserted) = (0, Some(session.wire), frames.inserted());
        self.accepted = session.queue.front().and_then(|first| frames.accepted(first.handle));
        let (mut skip, mut bytes) = (session.written, 0);
        for entry in session.queue.iter() {
            for (part, whole) in frames.get(entry.handle).parts(session.wire).into_iter().enumerate() {
                let from = skip.min(whole.len());
                skip -= from;
                // The rest of a large one waits for its next turn.
                let to = whole.len().min(from + WRITE_BYTES_MAX - bytes);
                bytes += to - from;
                self.add(entry.handle, part, from, &whole[from..to]);
            }
            self.frames += 1;
            self.entries.push(entry);
            if bytes >= WRITE_BYTES_MAX || self.pieces.len() + 2 >= SLICES_MAX {
                break;
            }
        }
        if session.written > 0 || self.frames < session.queue.len() {
            self.entries.clear();
        }
    }

    fn add(&mut self, handle: Handle, part: usize, from: usize, rest: &[u8]) {
        if rest.is_empty() {
            return;
        }
        if rest.len() > COPY_MAX {
            let to = from + rest.len();
            return self.pieces.push(Piece::Part { handle, part, from, to });
        }
        let start = self.scratch.len();
        self.scratch.extend_from_slice(rest);
        match self.pieces.last_mut() {
            Some(Piece::Scratch(range)) => range.end = self.scratch.len(),
            _ => self.pieces.push(Piece::Scratch(start..self.scratch.len())),
        }
    }
}

/// When what was written since the last look at the clock had been accepted: one entry for writes of one moment, as those
/// of a room are.
pub(super) struct Written(Vec<(Moment, u64)>);

impl Default for Written {
    fn default() -> Self {
        Self(Vec::with_capacity(WRITTEN_MAX))
    }
}

impl Written {
    #[inline]
    fn note(&mut self, accepted: Moment) {
        let has_room = self.0.len() < WRITTEN_MAX;
        match self.0.last_mut() {
            Some((moment, writes)) if *moment == accepted => *writes += 1,
            _ if has_room => self.0.push((accepted, 1)),
            _ => {}
        }
    }

    fn record(&mut self, now: Moment, micros: &LatencyHistogram) {
        for (accepted, writes) in self.0.drain(..) {
            micros.record_many(now.micros_since(accepted), writes);
        }
    }
}

/// One write for one session: hand `slices` to its socket, then say what became of it by [`Shard::handle_written`].
#[derive(Debug)]
pub struct Transmit<'a> {
    /// Whose it is.
    pub slot: u32,
    /// What to write, in order. Never empty.
    pub slices: Slices<'a>,
}

/// The slices of a write: almost always one, which then stays out of memory.
#[derive(Debug)]
pub enum Slices<'a> {
    /// One.
    One(IoSlice<'a>),
    /// Several.
    Many(SmallVec<[IoSlice<'a>; 4]>),
}

impl<'a> Deref for Slices<'a> {
    type Target = [IoSlice<'a>];

    #[inline]
    fn deref(&self) -> &[IoSlice<'a>] {
        match self {
            Self::One(slice) => std::slice::from_ref(slice),
            Self::Many(slices) => slices,
        }
    }
}

/// What the kernel said to a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It took that many bytes, and might take more.
    Taken(usize),
    /// It took that many bytes (perhaps 0) and takes no more until it says so.
    Blocked(usize),
}

impl Outcome {
    /// How many bytes it took.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Taken(bytes) | Self::Blocked(bytes) => bytes,
        }
    }
}

impl Shard {
    /// The next session that has something to write and may be written to, direct work first.
    #[inline]
    pub(super) fn next_to_write(&mut self) -> Option<u32> {
        loop {
            // Direct work goes first, but does not keep the rest waiting for ever.
            self.picks = self.picks.wrapping_add(1);
            let turn_of_the_rest = self.picks.is_multiple_of(DIRECT_PICKS) && !self.broadcast.is_empty();
            let direct = if turn_of_the_rest { None } else { self.direct.pop_front() };
            let slot = match direct {
                Some(slot) => {
                    self.slab.get_mut(slot).dirty_direct = false;
                    slot
                }
                None => {
                    let slot = self.broadcast.pop_front()?;
                    if let Some(ahead) = self.broadcast.get(FETCH_AHEAD) {
                        // As many as the last one had: they are often in one room.
                        self.slab.fetch_ahead(*ahead, self.gathered.frames);
                    }
                    self.slab.get_mut(slot).dirty_broadcast = false;
                    slot
                }
            };
            let session = self.slab.get(slot);
            if session.blocked || session.queue.is_empty() {
                continue;
            }
            if session.wire != Wire::Completion || self.translate(slot) {
                return Some(slot);
            }
        }
    }

    /// The next session that has something to write, direct work first, and what to write.
    #[inline]
    pub fn poll_transmit(&mut self) -> Option<Transmit<'_>> {
        let slot = self.next_to_write()?;
        let (session, frames) = (self.slab.get(slot), &self.frames);
        self.gathered.prepare(session, frames);
        let Gathered { scratch, pieces, .. } = &self.gathered;
        self.metrics.write_frames.record(self.gathered.frames as u64);
        let wire = session.wire;
        let slice = |piece: &Piece| {
            IoSlice::new(match piece {
                Piece::Scratch(range) => &scratch[range.clone()],
                Piece::Part { handle, part, from, to } => &frames.get(*handle).parts(wire)[*part][*from..*to],
            })
        };
        let slices = match &pieces[..] {
            [piece] => Slices::One(slice(piece)),
            pieces => Slices::Many(pieces.iter().map(slice).collect()),
        };
        Some(Transmit { slot, slices })
    }

    /// Says what became of the last transmit of `slot`.
    #[inline]
    pub fn handle_written(&mut self, slot: u32, outcome: Outcome) {
        let (taken, blocked) = (outcome.bytes(), matches!(outcome, Outcome::Blocked(_)));
        let session = self.slab.get_mut(slot);
        if taken > 0 {
            // A pong proves a WebSocket alive, and room that comes free; an event stream has only its writes.
            session.awaiting &= session.wire.is_websocket();
            let waiting = session.queue.len();
            self.queued.bytes -= taken;
            session.queue_bytes -= taken;
            session.written += taken;
            if session.queue_bytes == 0 {
                self.queued.frames -= session.queue.len();
                session.written = 0;
                session.queue.drain(&mut self.pool, |entry| self.frames.release(entry.handle));
            }
            while let Some(entry) = session.queue.front() {
                let bytes = self.frames.get(entry.handle).wire_bytes(session.wire);
                if session.written < bytes {
                    break;
                }
                session.written -= bytes;
                session.queue.pop(&mut self.pool);
                self.queued.frames -= 1;
                self.frames.release(entry.handle);
            }
            if session.queue.len() < waiting
                && let Some(accepted) = self.gathered.accepted
            {
                self.written.note(accepted);
            }
            self.metrics.writes.increment();
            self.metrics.written_bytes.add(taken as u64);
        }
        let (state, wire, peer_closed) = (session.state, session.wire, session.peer_closed);
        // An answer ends with all that was said: its reader may take as long as it goes on reading.
        if state == State::Closing && wire == Wire::Completion && taken >= PROGRESS_BYTES_MIN {
            self.allow_time_to_close(slot);
        }
        let session = self.slab.get_mut(slot);
        if session.queue.is_empty() {
            if state == State::Closing && (peer_closed || !wire.is_websocket()) {
                self.finish(slot);
            }
        } else if blocked {
            session.blocked = true;
            self.metrics.partial_writes.increment();
        } else {
            self.mark_unfinished(slot);
        }
    }

    /// What was written since the last call is in the kernel's hands by `now`: times it. A write counts once, with the
    /// oldest frame of which it took the last byte.
    pub fn handle_flushed(&mut self, now: Instant) {
        if !self.written.0.is_empty() {
            self.written.record(Moment::at(now), &self.metrics.written_micros);
        }
    }

    /// The kernel takes bytes for `slot` again, or for the first time. That room came free is a sign of life.
    pub fn handle_writable(&mut self, slot: u32) {
        let session = self.slab.get_mut(slot);
        if std::mem::replace(&mut session.blocked, false) {
            session.awaiting = false;
            if !session.queue.is_empty() {
                self.mark_direct(slot);
            }
        }
    }

    /// Whether everything that was queued for a closing session has been written: the driver may shut down its
    /// sending side.
    #[must_use]
    pub fn is_flushed(&self, slot: u32) -> bool {
        let session = self.slab.get(slot);
        session.state == State::Closing && session.queue.is_empty()
    }
}
