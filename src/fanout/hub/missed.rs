//! What other nodes said and never came here: everybody whom it may have been for is told.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::fanout::hub::{Hub, Inbox, Post, shard_number};

impl Hub {
    /// Tells everybody who is in a room that something may be missing.
    pub(crate) fn tell_rooms_of_gap(&self) {
        self.tell_of_gap(|inbox| &inbox.rooms_missed, || Post::RoomsMissed);
    }

    /// Tells every tab that something to its user may be missing. What is kept here of users is not whole any more.
    pub(crate) fn tell_users_of_gap(&self) {
        self.stripes.forget_all();
        self.tell_of_gap(|inbox| &inbox.users_missed, || Post::UsersMissed);
    }

    /// Once for all that is noted before a shard says so: room is not asked for, as one such post at a time is on its way.
    /// There is no pause between two of them: a tab has to be told before it reads what came behind the loss, as its
    /// position is past it then.
    fn tell_of_gap(&self, is_noted: impl Fn(&Inbox) -> &AtomicBool, post: impl Fn() -> Post) {
        for (shard, inbox) in self.inboxes.iter().enumerate() {
            if !is_noted(inbox).swap(true, Ordering::AcqRel) {
                inbox.room.take(1, 0);
                self.push(&[shard_number(shard)], &post);
            }
        }
    }

    /// The shard tells of it now: what is lost from here on has to be told anew.
    pub(crate) fn takes_rooms_missed(&self, shard: u16) {
        self.inboxes[usize::from(shard)].rooms_missed.swap(false, Ordering::AcqRel);
    }

    /// As [`Self::takes_rooms_missed`].
    pub(crate) fn takes_users_missed(&self, shard: u16) {
        self.inboxes[usize::from(shard)].users_missed.swap(false, Ordering::AcqRel);
    }
}
