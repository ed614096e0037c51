//! What the shards tell each other of their fattest sessions while the process is over its byte budget.
//!
//! # Ordering
//! Sequentially consistent, as a shard that waits and one that tells each write one place and read the other's: either the
//! one that waits sees what was told, or the one that tells sees that somebody waits, and wakes it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::fanout::hub::{Hub, Inbox, Post, shard_number};

/// The size class of a shard that has nobody who could be cut.
pub(crate) const NOBODY: u32 = 0;
/// A shard that was asked, and has said nothing for so long, is not waited for.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// The shard has told since it was asked last.
pub(super) const HAS_TOLD: u64 = 0;

/// What is known of the other shards' fattest sessions.
pub(crate) struct Classes {
    /// The highest of the classes that were told, without those that are not waited for any more.
    pub(crate) top: u32,
    /// Nobody is waited for.
    pub(crate) are_known: bool,
}

impl Hub {
    /// Has the other shards tell the class of their fattest sessions. Room is not asked for: until a shard has told its
    /// class it is not asked again.
    pub(crate) fn ask_for_classes(&self, asker: u16, now: Instant) {
        let stamp = self.stamp(now);
        for (shard, inbox) in self.inboxes.iter().enumerate() {
            let shard = shard_number(shard);
            // Where nobody takes posts there is nobody to cut.
            let is_there = shard != asker && inbox.claimed.load(Ordering::Acquire);
            let asked = || inbox.asked_at.compare_exchange(HAS_TOLD, stamp, Ordering::SeqCst, Ordering::SeqCst);
            if is_there && asked().is_ok() {
                inbox.room.take(1, 0);
                self.push(&[shard], || Post::Weigh);
            }
        }
    }

    /// A shard tells the class of its fattest sessions. Whoever waits for that is woken.
    pub(crate) fn note_class(&self, shard: u16, class: u32) {
        let inbox = &self.inboxes[usize::from(shard)];
        inbox.top_class.store(class, Ordering::SeqCst);
        if inbox.asked_at.swap(HAS_TOLD, Ordering::SeqCst) == HAS_TOLD {
            return;
        }
        for (other, inbox) in self.inboxes.iter().enumerate() {
            if inbox.waits_for_classes.load(Ordering::SeqCst) && inbox.waits_for_classes.swap(false, Ordering::SeqCst) {
                self.push(&[shard_number(other)], || Post::Weighed);
            }
        }
    }

    /// What the other shards have told. As long as one of them has not, this one is woken when one has.
    pub(crate) fn classes_elsewhere(&self, shard: u16, now: Instant) -> Classes {
        let classes = self.look_elsewhere(shard, now);
        if classes.are_known {
            return classes;
        }
        self.inboxes[usize::from(shard)].waits_for_classes.store(true, Ordering::SeqCst);
        self.look_elsewhere(shard, now)
    }

    fn look_elsewhere(&self, shard: u16, now: Instant) -> Classes {
        let too_late = self.stamp(now).saturating_sub(micros(ANSWER_TIME));
        let mut classes = Classes { top: NOBODY, are_known: true };
        let others = self.inboxes.iter().enumerate().filter(|(other, _)| *other != usize::from(shard));
        for (_, Inbox { asked_at, top_class, .. }) in others {
            let asked = asked_at.load(Ordering::SeqCst);
            // What it told before counts until it tells anew, or is not waited for.
            if asked == HAS_TOLD || asked > too_late {
                classes.top = classes.top.max(top_class.load(Ordering::SeqCst));
                classes.are_known &= asked == HAS_TOLD;
            }
        }
        classes
    }

    /// Never [`HAS_TOLD`].
    fn stamp(&self, now: Instant) -> u64 {
        micros(now.saturating_duration_since(*self.started.get_or_init(|| now))) + 1
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX - 1)
}
