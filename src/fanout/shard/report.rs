//! What a shard tells of itself when somebody asks: who has left it and why, and for whom most waits.
//!
//! Nothing here is kept in step with every frame: an ending is noted as it happens, for the price of a copied handle,
//! and queues are looked at when somebody asks, a bounded number of them each time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::fanout::session::Address;
use crate::fanout::shard::Shard;
use crate::fanout::shard::frames::Wire;
use crate::fanout::shard::slab::State;
use crate::fanout::shard::timers::TICK;
use crate::id::UserId;
use crate::proto::disconnect::Disconnect;
use crate::proto::event::Timestamp;

/// Endings of each kind that a shard remembers, the newest. Costs about 100 bytes each, once they have happened.
const ENDED_MAX: usize = 32;
/// Sessions that one report looks at: some 50 µs of the shard's thread.
const LOOKED_AT_MAX: u32 = 4_096;
/// Sessions that one report names.
const WAITING_MAX: usize = 16;

/// A session that has ended, and what it was like then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Where it lived.
    pub address: Address,
    /// Whose it was; None for the reader of an answer that is nobody's.
    pub user: Option<UserId>,
    /// When it began; None for the reader of an answer.
    pub connected_at: Option<Timestamp>,
    /// How its bytes were written.
    pub wire: Wire,
    /// Why it ended.
    pub ending: Disconnect,
    /// It was not listened to any more: what it sent is why it ended.
    pub is_deaf: bool,
    /// Frames that waited for it.
    pub queue_frames: usize,
    /// Bytes that waited for it, shared frames counted in full.
    pub queue_bytes: usize,
    /// How long ago that was, to the second.
    pub age: Duration,
}

impl Ended {
    /// Whether this node cut it, and it did not just go or run out: seldom, and what somebody asks for.
    #[must_use]
    pub const fn is_cut(&self) -> bool {
        !matches!(
            self.ending,
            Disconnect::Normal
                | Disconnect::ConnectionLost
                | Disconnect::HeartbeatTimeout
                | Disconnect::TokenExpired
                | Disconnect::ServiceRestart
        )
    }
}

/// A session for which something waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Whose it is.
    pub user: UserId,
    /// Frames that wait.
    pub queue_frames: usize,
    /// Their bytes, shared frames counted in full.
    pub queue_bytes: usize,
}

/// How a shard is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The last sessions that ended for another reason than that their client wanted to: those that were cut and those
    /// that were not, each oldest first. However many go, who was cut before them is still there.
    pub ended: Vec<Ended>,
    /// Those for whom most waits, the fattest first. A shard with more than a few thousand sessions finds them within
    /// some reports, as each looks at a part of them.
    pub waiting: Vec<Waiting>,
}

/// What is kept from one report to the next.
#[derive(Default)]
pub(super) struct Reporting {
    /// Those that were cut, with the tick of each.
    cut: VecDeque<(u64, Ended)>,
    /// The others.
    left: VecDeque<(u64, Ended)>,
    /// Where the next look begins.
    cursor: u32,
    /// Who was named last.
    fattest: Vec<u32>,
}

impl Shard {
    /// Remembers why a session ends. What its client wanted itself is no news; nor is it when somebody stops to watch.
    pub(super) fn note_ended(&mut self, slot: u32, ending: Disconnect) {
        let session = self.slab.get(slot);
        let Some(identity) = &session.identity else { return };
        if ending == Disconnect::Normal || (identity.is_nobody() && session.answer.is_none()) {
            return;
        }
        let user = match &session.answer {
            Some(answer) => self.hub.owner_of_stream(&answer.request),
            None => Some(identity.user.clone()),
        };
        let ended = Ended {
            address: Address::new(self.index, slot, session.generation),
            user,
            connected_at: session.answer.is_none().then_some(identity.connected_at),
            wire: session.wire,
            ending,
            is_deaf: session.deaf,
            queue_frames: session.queue.len(),
            queue_bytes: session.queue_bytes,
            age: Duration::ZERO,
        };
        let reporting = &mut self.reporting;
        let others = if ended.is_cut() { &mut reporting.cut } else { &mut reporting.left };
        if others.len() >= ENDED_MAX {
            others.pop_front();
        }
        others.push_back((self.timers.tick(), ended));
    }

    /// What the shard tells of itself now.
    pub fn report(&mut self) -> Report {
        let now = self.timers.tick();
        let age = |tick: u64| TICK * u32::try_from(now.saturating_sub(tick)).unwrap_or(u32::MAX);
        let all = self.reporting.cut.iter().chain(&self.reporting.left);
        let ended = all.map(|(tick, ended)| Ended { age: age(*tick), ..ended.clone() }).collect();
        Report { ended, waiting: self.find_waiting() }
    }

    /// The fattest of those that were it last time and of the next part of all sessions.
    fn find_waiting(&mut self) -> Vec<Waiting> {
        let mut fattest = std::mem::take(&mut self.reporting.fattest);
        if self.queued.frames == 0 {
            return Vec::new();
        }
        let slots = self.slab.slots();
        let begin = self.reporting.cursor;
        let count = slots.min(LOOKED_AT_MAX);
        self.reporting.cursor = (begin + count) % slots.max(1);
        fattest.extend((0..count).map(|step| (begin + step) % slots));
        fattest.retain(|slot| self.is_waiting(*slot));
        fattest.sort_unstable();
        fattest.dedup();
        fattest.sort_by_key(|slot| std::cmp::Reverse(self.slab.get(*slot).queue_bytes));
        fattest.truncate(WAITING_MAX);
        let waiting = fattest.iter().filter_map(|slot| self.waiting_in(*slot)).collect();
        self.reporting.fattest = fattest;
        waiting
    }

    fn is_waiting(&self, slot: u32) -> bool {
        let session = self.slab.get(slot);
        session.state == State::Open && !session.queue.is_empty()
    }

    fn waiting_in(&self, slot: u32) -> Option<Waiting> {
        let session = self.slab.get(slot);
        let user = match (&session.answer, &session.identity) {
            (Some(answer), _) => self.hub.owner_of_stream(&answer.request),
            (None, Some(identity)) if !Arc::ptr_eq(identity, &self.reader) => Some(identity.user.clone()),
            _ => None,
        };
        let (queue_frames, queue_bytes) = (session.queue.len(), session.queue_bytes);
        user.map(|user| Waiting { user, queue_frames, queue_bytes })
    }
}
