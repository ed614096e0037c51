//! What the shards tell each other of their fattest sessions while the process is over its byte budget.
//!
//! # Ordering
//! Sequentially consistent, as a shard that waits and one that tells each write one place and read the other's: either the
//! one that waits sees what was told, or the one that tells sees that somebody waits, and wakes it.

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
            if is_there && inbox.top_class.swap(ASKED, Ordering::SeqCst) != ASKED {
                inbox.room.take(1, 0);
                self.push(&[shard], || Post::Weigh);
            }
        }
    }

    /// A shard tells the class of its fattest sessions. Whoever waits for that is woken.
    pub(crate) fn note_class(&self, shard: u16, class: u32) {
        if self.inboxes[usize::from(shard)].top_class.swap(class, Ordering::SeqCst) != ASKED {
            return;
        }
        for (other, inbox) in self.inboxes.iter().enumerate() {
            if inbox.waits_for_classes.load(Ordering::SeqCst) && inbox.waits_for_classes.swap(false, Ordering::SeqCst) {
                self.push(&[shard_number(other)], || Post::Weighed);
            }
        }
    }

    /// What the other shards have told. As long as one of them has not, this one is woken when one has.
    pub(crate) fn classes_elsewhere(&self, shard: u16) -> Classes {
        let classes = self.look_elsewhere(shard);
        if classes.are_known {
            return classes;
        }
        self.inboxes[usize::from(shard)].waits_for_classes.store(true, Ordering::SeqCst);
        self.look_elsewhere(shard)
    }

    fn look_elsewhere(&self, shard: u16) -> Classes {
        let mut classes = Classes { top: NOBODY, are_known: true };
        let others = self.inboxes.iter().enumerate().filter(|(other, _)| *other != usize::from(shard));
        for (_, inbox) in others {
            match inbox.top_class.load(Ordering::SeqCst) {
                ASKED => classes.are_known = false,
                class => classes.top = classes.top.max(class),
            }
        }
        classes
    }
}
