//! The shard's sessions: a slab in pieces that never move, and what one session is.

use std::sync::Arc;

use crate::fanout::session::{Address, Identity, SLOTS_MAX, SessionRef};
use crate::fanout::shard::allowance::Allowance;
use crate::fanout::shard::answer::Answer;
use crate::fanout::shard::frames::Wire;
use crate::fanout::shard::queue::Queue;
use crate::proto::disconnect::Disconnect;
use crate::proto::websocket::Partial;

/// Sessions of one piece.
const PIECE: usize = 256;

/// Where a session is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The slot is free.
    Vacant,
    /// Frames go in and out.
    Open,
    /// Evicted: what is queued goes out, the last of it is the close; then the peer's close is waited for.
    Closing,
    /// Over: the driver has yet to drop the connection.
    Ended,
}

/// One session. The fields that a delivery touches come first: for a queue of up to two they are one cache line.
#[repr(C, align(64))]
pub(crate) struct Session {
    pub(crate) generation: u32,
    pub(crate) state: State,
    pub(crate) wire: Wire,
    /// The kernel takes no more until it says so.
    pub(crate) blocked: bool,
    /// It is on the list of direct or of broadcast work.
    pub(crate) dirty_direct: bool,
    pub(crate) dirty_broadcast: bool,
    /// No sign of life since the last ping.
    pub(crate) awaiting: bool,
    /// The peer has sent its close, or has nothing more to send.
    pub(crate) peer_closed: bool,
    /// It was taken out of the registry and its rooms' counts ahead of its end.
    pub(crate) unlisted: bool,
    /// Nothing that it sends is read any more.
    pub(crate) deaf: bool,
    /// Bad frames since `bad_since`.
    pub(crate) bad: u8,
    /// Why it ends, once it does.
    pub(crate) ending: Option<Disconnect>,
    /// Bytes that wait, each shared frame counted in full.
    pub(crate) queue_bytes: usize,
    /// Bytes of the first queued frame that the kernel has taken.
    pub(crate) written: usize,
    pub(crate) queue: Queue,
    pub(crate) identity: Option<Arc<Identity>>,
    /// The answer that it reads, if it is no tab.
    pub(crate) answer: Option<Box<Answer>>,
    pub(crate) partial: Option<Box<Partial>>,
    /// Places in rooms: (the shard's number of the room, the place among its members).
    pub(crate) rooms: Vec<(u32, u32)>,
    /// The tick at which the token expires, or `u64::MAX`.
    pub(crate) expires: u64,
    /// The tick at which the next ping is due.
    pub(crate) ping_due: u64,
    pub(crate) bad_since: u64,
    /// What it has sent lately.
    pub(crate) allowance: Allowance,
    /// The tick until which a room that it joins is one that it was in before it came back.
    pub(crate) resumed_until: u64,
}

const _: () = assert!(size_of::<Session>() <= 256, "a session's slot has 256 bytes at most");
const _: () = assert!(
    std::mem::offset_of!(Session, queue) + Queue::FRONT_BYTES <= 64,
    "a delivery to an empty queue touches one cache line of its session"
);

impl Session {
    fn vacant() -> Self {
        Self {
            generation: 0,
            state: State::Vacant,
            wire: Wire::WebSocket,
            blocked: false,
            dirty_direct: false,
            dirty_broadcast: false,
            awaiting: false,
            peer_closed: false,
            unlisted: false,
            deaf: false,
            bad: 0,
            ending: None,
            queue_bytes: 0,
            written: 0,
            queue: Queue::default(),
            identity: None,
            answer: None,
            partial: None,
            rooms: Vec::new(),
            expires: u64::MAX,
            ping_due: 0,
            bad_since: 0,
            allowance: Allowance::default(),
            resumed_until: 0,
        }
    }
}

/// Has the cache line of `place` fetched. Where the language has no name for it, nothing is done.
#[inline]
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "the processor's hint has no safe name"))]
fn prefetch<T>(place: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86_64 has SSE, and a prefetch neither faults nor changes anything.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(place).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Sessions by slot.
#[derive(Default)]
pub(crate) struct Slab {
    pieces: Vec<Box<[Session]>>,
    free: Vec<u32>,
    taken: usize,
}

impl Slab {
    /// Slots that have ever been in use: what a walk goes through.
    pub(crate) fn slots(&self) -> u32 {
        u32::try_from(self.pieces.len() * PIECE).unwrap_or(u32::MAX)
    }

    pub(crate) fn len(&self) -> usize {
        self.taken
    }

    /// A free slot, made if need be; None at [`SLOTS_MAX`].
    pub(crate) fn take(&mut self) -> Option<u32> {
        if self.free.is_empty() {
            let first = self.slots();
            if first as usize >= SLOTS_MAX {
                return None;
            }
            self.pieces.push((0..PIECE).map(|_| Session::vacant()).collect());
            self.free.extend((first..self.slots()).rev());
        }
        self.taken += 1;
        self.free.pop()
    }

    /// Gives a slot back: its next owner has another generation.
    pub(crate) fn give(&mut self, slot: u32) {
        let session = self.get_mut(slot);
        *session = Session { generation: session.generation.wrapping_add(1), ..Session::vacant() };
        self.free.push(slot);
        self.taken -= 1;
    }

    #[inline]
    pub(crate) fn get(&self, slot: u32) -> &Session {
        &self.pieces[slot as usize / PIECE][slot as usize % PIECE]
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, slot: u32) -> &mut Session {
        &mut self.pieces[slot as usize / PIECE][slot as usize % PIECE]
    }

    /// Has a session fetched into the cache, for whoever will look at it a few sessions later and whose queue is about
    /// to have so many frames. A hint: a slot that does not exist is nothing.
    #[inline]
    pub(crate) fn fetch_ahead(&self, slot: u32, frames: usize) {
        let piece = self.pieces.get(slot as usize / PIECE);
        if let Some(session) = piece.and_then(|piece| piece.get(slot as usize % PIECE)) {
            prefetch(session);
            // The rest of the queue begins at the end of the first line.
            if frames > 2 {
                prefetch(&session.identity);
            }
        }
    }

    /// The slot of an address, if its session is still the one that is meant.
    pub(crate) fn find(&self, address: Address) -> Option<u32> {
        let slot = address.slot();
        (slot < self.slots()
            && self.get(slot).generation == address.generation()
            && self.get(slot).state != State::Vacant)
            .then_some(slot)
    }

    /// The handle of the session in `slot`.
    pub(crate) fn session_ref(&self, shard: u16, slot: u32) -> Option<SessionRef> {
        let session = self.get(slot);
        let address = Address::new(shard, slot, session.generation);
        session.identity.as_ref().map(|identity| SessionRef::new(address, Arc::clone(identity)))
    }
}
