//! Gaps: tabs are told that something which was meant for them never came.

use crate::fanout::hub::Untold;
use crate::fanout::shard::Shard;
use crate::fanout::shard::frames::{Handle, Local};
use crate::fanout::shard::slab::{Session, State};
use crate::id::ChannelId;
use crate::proto::event::{GapReason, Notice};
use crate::proto::frame::Frame;

fn gap(reason: GapReason) -> Frame {
    Frame::notice(&Notice::Gap { reason, count: None })
}

impl Shard {
    /// Says that what was said in a room is not kept, to a tab that has joined it and came back just now.
    pub(super) fn tell_returned_of_gap(&mut self, slot: u32) {
        if self.timers.tick() < self.slab.get(slot).resumed_until {
            self.send(slot, gap(GapReason::RoomNotKept));
        }
    }

    /// Tells of all that was lost until now.
    pub(super) fn tell_of_missed(&mut self) {
        let Untold { rooms, users, channels } = self.hub.take_untold(self.index);
        if rooms {
            // Nobody knows which room it was.
            self.tell_all_of_gap(GapReason::RoomNotKept, |session| !session.rooms.is_empty());
        }
        if users {
            // Nobody knows whose it was.
            let is_tab = |session: &Session| session.identity.as_ref().is_some_and(|identity| !identity.is_nobody());
            self.tell_all_of_gap(GapReason::LostBetweenNodes, is_tab);
        }
        for channel in channels {
            let reason = match channel {
                ChannelId::Room(_) => GapReason::RoomNotKept,
                ChannelId::User(_) | ChannelId::Stream(_) => GapReason::LostBetweenNodes,
            };
            let handle = self.frames.insert(Local::Frame(gap(reason)));
            for slot in self.slots_of(&channel) {
                self.offer_gap(slot, handle);
            }
            self.frames.release(handle);
        }
    }

    /// Who of this shard hears what is said to a user or in a room.
    fn slots_of(&self, channel: &ChannelId) -> Vec<u32> {
        if self.draining.is_some() {
            // Who is about to leave is found nowhere else, and hears what was posted before.
            return (0..self.slab.slots()).filter(|slot| self.hears(*slot, channel)).collect();
        }
        match channel {
            ChannelId::User(user) => {
                let sessions = self.hub.registry().get_sessions(user);
                let sessions = sessions.iter().flat_map(|sessions| sessions.iter());
                sessions.filter_map(|session| self.own_slot(session)).collect()
            }
            ChannelId::Room(name) => {
                let local = self.hub.rooms().find(name).and_then(|room| self.rooms.find(&room));
                local.map(|local| self.rooms.members(local).to_vec()).unwrap_or_default()
            }
            ChannelId::Stream(_) => Vec::new(),
        }
    }

    fn hears(&self, slot: u32, channel: &ChannelId) -> bool {
        let session = self.slab.get(slot);
        match channel {
            ChannelId::User(user) => session.identity.as_ref().is_some_and(|identity| identity.user == *user),
            ChannelId::Room(name) => session
                .rooms
                .iter()
                .any(|(local, _)| self.rooms.room(*local).is_some_and(|room| !room.is_apart() && room.name() == name)),
            ChannelId::Stream(_) => false,
        }
    }

    fn tell_all_of_gap(&mut self, reason: GapReason, is_meant: impl Fn(&Session) -> bool) {
        let handle = self.frames.insert(Local::Frame(gap(reason)));
        for slot in 0..self.slab.slots() {
            if is_meant(self.slab.get(slot)) {
                self.offer_gap(slot, handle);
            }
        }
        self.frames.release(handle);
    }

    /// A tab that has the same gap as the newest of what waits for it is about to hear it, before anything else: however
    /// many losses there are, they fill no queue.
    fn offer_gap(&mut self, slot: u32, handle: Handle) {
        let session = self.slab.get(slot);
        if session.state != State::Open {
            return;
        }
        // The first of a queue may be written in part.
        let last = if session.queue.len() > 1 { session.queue.iter().next_back() } else { None };
        let is_same = |last: Handle| match (self.frames.get(last), self.frames.get(handle)) {
            (Local::Frame(last), Local::Frame(gap)) => last.json() == gap.json(),
            _ => false,
        };
        if !last.is_some_and(|last| is_same(last.handle)) {
            self.offer_one(slot, handle);
        }
    }
}
