//! A session's queue: two entries in place, a ring from the shard's pool beyond that.

use std::collections::VecDeque;

use crate::fanout::shard::frames::Handle;

/// Rings that a pool keeps, and the most entries a kept ring may have room for: at most 4,096 × 496 bytes a shard. More
/// tabs than that with three frames and more each, all at once, cost an allocation each.
const POOL_RINGS_MAX: usize = 4_096;
const POOL_ENTRIES_MAX: usize = 2 * RING_ENTRIES;
/// Entries of a fresh ring. It grows by doubling, so that a queue of 64, two in place and 62 in the ring, is of the pool.
const RING_ENTRIES: usize = 31;

const _: () = assert!(size_of::<Entry>() == 8, "what a frame costs in each queue that it waits in");
const _: () = assert!(size_of::<Queue>() == 56, "what every session pays for its queue");

/// One queued frame. `tag` is 0, or says by what a newer frame may replace it (never the whole truth: compare the key).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) handle: Handle,
    pub(crate) tag: u32,
}

/// A first-in first-out queue. While anything is in `ring`, both places in front of it are taken, and there is a ring only
/// while anything is in it: so a queue of up to two is told by what stands before the ring.
#[derive(Default)]
#[repr(C)]
pub(crate) struct Queue {
    length: u32,
    front: [Entry; 2],
    ring: VecDeque<Entry>,
}

impl Queue {
    /// Bytes of a queue that are touched while no more than two wait.
    pub(crate) const FRONT_BYTES: usize = std::mem::offset_of!(Self, ring);

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.length as usize
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub(crate) fn front(&self) -> Option<Entry> {
        self.places().first().copied()
    }

    /// The entries that are not in the ring.
    #[inline]
    fn places(&self) -> &[Entry] {
        &self.front[..self.len().min(2)]
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = Entry> + '_ {
        self.places().iter().chain(&self.ring).copied()
    }

    /// Whether exactly these wait.
    #[inline]
    pub(crate) fn is(&self, entries: &[Entry]) -> bool {
        if self.len() != entries.len() {
            return false;
        }
        let (places, rest) = entries.split_at(self.places().len());
        if rest.is_empty() {
            return places == self.places();
        }
        let (first, second) = self.ring.as_slices();
        let (front, back) = rest.split_at(first.len());
        places == self.places() && front == first && back == second
    }

    #[inline]
    pub(crate) fn push(&mut self, entry: Entry, pool: &mut Pool) {
        let length = self.len();
        self.length += 1;
        if let Some(place) = self.front.get_mut(length) {
            *place = entry;
            return;
        }
        if self.ring.capacity() == 0 {
            self.ring = pool.take();
        }
        let room = self.ring.capacity();
        self.ring.push_back(entry);
        pool.lent += self.ring.capacity() - room;
    }

    pub(crate) fn pop(&mut self, pool: &mut Pool) -> Option<Entry> {
        let entry = self.front()?;
        self.length -= 1;
        self.front[0] = self.front[1];
        if self.length >= 2
            && let Some(next) = self.ring.pop_front()
        {
            self.front[1] = next;
            self.give_back(pool);
        }
        Some(entry)
    }

    /// Takes all of them out, the first first.
    #[inline]
    pub(crate) fn drain(&mut self, pool: &mut Pool, mut each: impl FnMut(Entry)) {
        self.places().iter().copied().for_each(&mut each);
        let length = std::mem::take(&mut self.length);
        if length > 2 {
            self.ring.drain(..).for_each(each);
            self.give_back(pool);
        }
    }

    fn give_back(&mut self, pool: &mut Pool) {
        if self.ring.is_empty() {
            pool.give(std::mem::take(&mut self.ring));
        }
    }

    /// The newest entry with this tag behind the first `skip` ones for which `same` holds. None if one without a tag is
    /// behind it that `bars` the way forward.
    pub(crate) fn find_mut(
        &mut self,
        tag: u32,
        skip: usize,
        same: impl Fn(Handle) -> bool,
        bars: impl Fn(Handle) -> bool,
    ) -> Option<&mut Entry> {
        let hit = |(place, entry): (usize, &Entry)| {
            (place >= skip && entry.tag == tag && same(entry.handle)).then_some(place)
        };
        let place = self.places().iter().chain(&self.ring).enumerate().filter_map(hit).last()?;
        if self.iter().skip(place + 1).any(|entry| entry.tag == 0 && bars(entry.handle)) {
            return None;
        }
        match place {
            0 | 1 => self.front.get_mut(place),
            _ => self.ring.get_mut(place - 2),
        }
    }
}

/// Rings that wait for their next queue, so that a burst allocates nothing after warm-up.
#[derive(Default)]
pub(crate) struct Pool {
    rings: Vec<VecDeque<Entry>>,
    /// Entries that the rings in use have room for.
    lent: usize,
}

impl Pool {
    /// Bytes of the rings that queues hold now.
    pub(crate) fn lent_bytes(&self) -> usize {
        self.lent * size_of::<Entry>()
    }

    fn take(&mut self) -> VecDeque<Entry> {
        let ring = self.rings.pop().unwrap_or_else(|| VecDeque::with_capacity(RING_ENTRIES));
        self.lent += ring.capacity();
        ring
    }

    fn give(&mut self, ring: VecDeque<Entry>) {
        self.lent -= ring.capacity();
        if self.rings.len() < POOL_RINGS_MAX && ring.capacity() <= POOL_ENTRIES_MAX {
            self.rings.push(ring);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fanout::shard::frames::{Frames, Local};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_queue_is_a_vec_deque(steps in proptest::collection::vec(0u8..10, 0..400)) {
            let (mut queue, mut oracle) = (Queue::default(), VecDeque::new());
            let (mut pool, mut frames) = (Pool::default(), Frames::default());
            for (at, step) in steps.into_iter().enumerate() {
                if step < 6 {
                    let entry = Entry { handle: frames.insert(Local::Bytes(Box::from([]))), tag: u32::from(step) };
                    queue.push(entry, &mut pool);
                    oracle.push_back(entry);
                } else if step < 9 && at % 50 == 49 {
                    let mut drained = VecDeque::new();
                    queue.drain(&mut pool, |entry| drained.push_back(entry));
                    prop_assert_eq!(drained, std::mem::take(&mut oracle));
                } else if step < 9 {
                    prop_assert_eq!(queue.pop(&mut pool), oracle.pop_front());
                } else {
                    let (tag, skip) = (u32::try_from(at % 6).unwrap(), at % 3);
                    let expected = oracle.iter_mut().enumerate().filter(|(i, e)| *i >= skip && e.tag == tag).last().map(|(_, e)| *e);
                    prop_assert_eq!(queue.find_mut(tag, skip, |_| true, |_| false).copied(), expected);
                }
                prop_assert_eq!(queue.len(), oracle.len());
                prop_assert_eq!(queue.is_empty(), oracle.is_empty());
                prop_assert_eq!(queue.front(), oracle.front().copied());
                prop_assert!(queue.iter().eq(oracle.iter().copied()));
                let all: Vec<_> = oracle.iter().copied().collect();
                prop_assert!(queue.is(&all));
                prop_assert!(all.is_empty() || !queue.is(&all[1..]));
            }
        }
    }

    #[test]
    fn nothing_is_found_in_front_of_what_bars_the_way() {
        for length in 2..6 {
            let (mut queue, mut pool, mut frames) = (Queue::default(), Pool::default(), Frames::default());
            let mut entry = |tag| Entry { handle: frames.insert(Local::Bytes(Box::from([]))), tag };
            let (edit, message) = (entry(7), entry(0));
            queue.push(edit, &mut pool);
            (2..length).for_each(|_| queue.push(entry(0), &mut pool));
            queue.push(message, &mut pool);
            let bars = |handle| handle == message.handle;
            assert_eq!(queue.find_mut(7, 0, |_| true, |_| false).copied(), Some(edit));
            assert_eq!(queue.find_mut(7, 0, |_| true, bars), None);
            let newer = entry(7);
            queue.push(newer, &mut pool);
            assert_eq!(queue.find_mut(7, 0, |_| true, bars).copied(), Some(newer));
        }
    }

    #[test]
    fn a_drained_queue_holds_no_memory() {
        let (mut queue, mut pool, mut frames) = (Queue::default(), Pool::default(), Frames::default());
        for _ in 0..20 {
            queue.push(Entry { handle: frames.insert(Local::Bytes(Box::from([]))), tag: 0 }, &mut pool);
        }
        assert_eq!(pool.lent_bytes(), RING_ENTRIES * size_of::<Entry>());
        while queue.pop(&mut pool).is_some() {}
        assert_eq!(queue.ring.capacity(), 0);
        assert_eq!((pool.rings.len(), pool.lent_bytes()), (1, 0));
    }
}
