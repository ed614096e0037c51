//! What was said to rooms and never came here: everybody who is in one is told.

use std::sync::atomic::Ordering;

use crate::fanout::hub::{Hub, Post, shard_number};

impl Hub {
    /// Tells everybody who is in a room that something may be missing, once for all that is noted before a shard says so.
    /// Room is not asked for: one such post at a time is on its way.
    pub(crate) fn tell_rooms_of_gap(&self) {
        for (shard, inbox) in self.inboxes.iter().enumerate() {
            if !inbox.rooms_missed.swap(true, Ordering::AcqRel) {
                inbox.room.take(1, 0);
                self.push(&[shard_number(shard)], || Post::RoomsMissed);
            }
        }
    }

    /// The shard tells of it now: what is lost from here on has to be told anew.
    pub(crate) fn takes_rooms_missed(&self, shard: u16) {
        self.inboxes[usize::from(shard)].rooms_missed.swap(false, Ordering::AcqRel);
    }
}
