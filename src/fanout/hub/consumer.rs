//! The consumer's side of an inbox: called by the shard's own thread only.

use std::sync::atomic::Ordering;
use std::task::Waker;
use std::time::Instant;

use crate::fanout::hub::{Hub, Post};
use crate::fanout::inbox::Batch;

impl Hub {
    /// Makes the caller the one consumer of a shard's inbox, at `now`.
    ///
    /// # Panics
    /// If there is no such shard or it has a consumer.
    pub(crate) fn claim(&self, shard: u16, now: Instant) {
        let claimed = self.inboxes[usize::from(shard)].claimed.swap(true, Ordering::AcqRel);
        assert!(!claimed, "shard {shard} has a consumer already");
        self.started.get_or_init(|| now);
    }

    /// Whether any shard for sockets has, or had, its consumer.
    #[must_use]
    pub fn is_claimed(&self) -> bool {
        self.inboxes[..self.shard_count()].iter().any(|inbox| inbox.claimed.load(Ordering::Acquire))
    }

    /// What has to be done about once a second, by whichever shard it is that looks after it: the first, or that of the
    /// mailboxes while there are no others.
    pub(crate) fn handle_second(&self, shard: u16, now: Instant) {
        if shard == 0 || !self.is_claimed() {
            let second = now.saturating_duration_since(*self.started.get_or_init(|| now)).as_secs();
            self.stripes.sweep(second);
            self.returning.sweep(second);
        }
    }

    pub(crate) fn take(&self, shard: u16) -> Batch<Post> {
        self.inboxes[usize::from(shard)].queue.take()
    }

    /// Posts and bytes that wait in a shard's inbox, those included that it has taken and not released.
    pub(crate) fn waiting(&self, shard: u16) -> (usize, usize) {
        let room = &self.inboxes[usize::from(shard)].room;
        (room.posts(), room.bytes())
    }

    pub(crate) fn release(&self, shard: u16, posts: usize, bytes: usize) {
        let inbox = &self.inboxes[usize::from(shard)];
        inbox.room.release(posts, bytes);
        inbox.freed.notify(usize::MAX);
    }

    pub(crate) fn park(&self, shard: u16, waker: &Waker) -> bool {
        let inbox = &self.inboxes[usize::from(shard)];
        inbox.queue.sleep(&inbox.bell, waker)
    }
}
