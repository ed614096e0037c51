//! What the shards tell each other of their fattest sessions while the process is over its byte budget.

use std::sync::atomic::Ordering;

use crate::fanout::hub::{Hub, Post, shard_number};

/// The size class of a shard that has nobody who could be cut.
pub(crate) const NOBODY: u32 = 0;
/// The shard was asked, and has not said yet.
const ASKED: u32 = u32::MAX;

/// What is known of the other shards' fattest sessions.
pub(crate) struct Classes {
    /// The highest of the classes that were told.
    pub(crate) top: u32,
    /// All of those that were asked have told theirs.
    pub(crate) are_known: bool,
}

impl Hub {
    /// Has the other shards tell the class of their fattest sessions. Room is not asked for: until a shard has told its
    /// class it is not asked again.
    pub(crate) fn ask_for_classes(&self, asker: u16) {
        for (shard, inbox) in self.inboxes.iter().enumerate() {
            let shard = shard_number(shard);
            // Where nobody takes posts there is nobody to cut.
            let is_there = shard != asker && inbox.claimed.load(Ordering::Acquire);
            if is_there && inbox.top_class.swap(ASKED, Ordering::Relaxed) != ASKED {
                inbox.room.take(1, 0);
                self.push(&[shard], || Post::Weigh);
            }
        }
    }

    /// A shard tells the class of its fattest sessions.
    pub(crate) fn note_class(&self, shard: u16, class: u32) {
        self.inboxes[usize::from(shard)].top_class.store(class, Ordering::Relaxed);
    }

    /// What the other shards have told.
    pub(crate) fn classes_elsewhere(&self, shard: u16) -> Classes {
        let mut classes = Classes { top: NOBODY, are_known: true };
        let others = self.inboxes.iter().enumerate().filter(|(other, _)| *other != usize::from(shard));
        for (_, inbox) in others {
            match inbox.top_class.load(Ordering::Relaxed) {
                ASKED => classes.are_known = false,
                class => classes.top = classes.top.max(class),
            }
        }
        classes
    }
}
