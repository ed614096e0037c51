//! The end of a shard's sessions at shutdown, at an even pace.

use std::time::{Duration, Instant};

use crate::fanout::hub::Pace;
use crate::fanout::session::Address;
use crate::fanout::shard::Shard;
use crate::fanout::shard::frames::{Local, Wire};
use crate::fanout::shard::slab::State;
use crate::proto::disconnect::Disconnect;
use crate::proto::event::Notice;
use crate::proto::frame::Frame;
use crate::proto::sse;

/// How often a draining shard ends its next few sessions.
pub(super) const STEP: Duration = Duration::from_millis(50);
/// A shard that was held up for longer goes on at its pace, instead of making up for it at once.
const STEP_MAX: Duration = Duration::from_millis(100);
/// The least that a client is asked to wait before it comes back.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(500);
/// Clients come back spread over this time and the drain's own spread.
const RETRY_SPREAD: Duration = Duration::from_secs(5);

pub(super) struct Draining {
    pace: Pace,
    started: Instant,
    stepped: Instant,
    /// How much of the pace's time has been gone through.
    gone: Duration,
    total: usize,
    told: usize,
    cursor: u32,
    /// Unlisted at the last step; told once what was on its way to them has come.
    leaving: Vec<u32>,
    /// What of the inbox they may yet be meant by.
    inbox: Inbox,
}

/// How far the inbox has come since the last sessions were unlisted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inbox {
    /// It holds what was posted before.
    Full,
    /// That was taken out of it.
    Taken,
    /// And handled.
    Handled,
}

impl Draining {
    /// How many sessions should have been told by now.
    fn due(&mut self, now: Instant) -> usize {
        let Pace { time, latest } = self.pace;
        self.gone += now.saturating_duration_since(self.stepped).min(STEP_MAX);
        self.stepped = now;
        if self.gone >= time || now.saturating_duration_since(self.started) >= latest {
            return usize::MAX;
        }
        let due = self.total as u128 * self.gone.as_nanos() / time.as_nanos();
        usize::try_from(due).unwrap_or(usize::MAX).saturating_add(1)
    }
}

impl Shard {
    /// Whether the shard is draining and has no session left.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.draining.is_some() && self.slab.len() == 0
    }

    pub(super) fn start_drain(&mut self, pace: Pace, now: Instant) {
        if self.draining.is_none() {
            let total = (0..self.slab.slots()).filter(|slot| self.is_paced(*slot)).count();
            self.draining = Some(Draining {
                pace,
                started: now,
                stepped: now,
                gone: Duration::ZERO,
                total,
                told: 0,
                cursor: 0,
                leaving: Vec::new(),
                inbox: Inbox::Full,
            });
            self.go_on_draining(now);
        }
    }

    /// Everything that was in the inbox was taken out of it.
    pub(super) fn note_taken(&mut self) {
        if let Some(draining) = &mut self.draining
            && draining.inbox == Inbox::Full
        {
            draining.inbox = Inbox::Taken;
        }
    }

    /// Everything that was taken was handled.
    pub(super) fn note_handled(&mut self) {
        if let Some(draining) = &mut self.draining
            && draining.inbox == Inbox::Taken
        {
            draining.inbox = Inbox::Handled;
        }
    }

    /// Ends as many sessions as should have been told by now.
    pub(super) fn go_on_draining(&mut self, now: Instant) {
        let Some(mut draining) = self.draining.take() else { return };
        if draining.inbox == Inbox::Handled {
            for slot in std::mem::take(&mut draining.leaving) {
                self.tell_to_come_back(slot, draining.pace.time);
            }
        }
        let due = draining.due(now);
        while draining.told < due && draining.cursor < self.slab.slots() {
            if self.is_paced(draining.cursor) {
                self.unlist(draining.cursor);
                draining.leaving.push(draining.cursor);
                draining.inbox = Inbox::Full;
                draining.told += 1;
            }
            draining.cursor += 1;
        }
        self.draining = Some(draining);
    }

    /// An answer ends with its stream, not at the drain's pace.
    fn is_paced(&self, slot: u32) -> bool {
        let session = self.slab.get(slot);
        session.state == State::Open && session.answer.is_none()
    }

    fn tell_to_come_back(&mut self, slot: u32, spread: Duration) {
        let session = self.slab.get(slot);
        let address = Address::new(self.index, slot, session.generation);
        let retry_after_ms = retry_after(address, spread);
        let wire = session.wire;
        self.send(slot, Frame::notice(&Notice::Draining { retry_after_ms }));
        if matches!(wire, Wire::EventStream | Wire::Frames) {
            let handle = self.frames.insert(Local::Bytes(sse::retry(Duration::from_millis(retry_after_ms)).into()));
            self.offer_one(slot, handle);
            self.frames.release(handle);
        }
        self.end(slot, Disconnect::ServiceRestart);
    }
}

/// A wait in milliseconds that differs from session to session: a hash of the address spread over the whole time.
fn retry_after(address: Address, spread: Duration) -> u64 {
    // The finaliser of splitmix64.
    let mut hash = address.as_u64().wrapping_add(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let range = millis(spread.saturating_add(RETRY_SPREAD)).max(1);
    millis(RETRY_AFTER_MIN) + (hash ^ (hash >> 31)) % range
}
