//! What crosses threads: one bounded lock-free queue per shard, any number of producers, one consumer.
//!
//! The queue is a stack that the consumer takes whole and turns round, so that a batch costs it one atomic exchange.
//! Whether the consumer sleeps is part of the same word: it parks by exchanging "empty" for "parked", and the producer
//! whose push replaces "parked" rings. There is no second flag, and so no order between two of them to get wrong.
//! Room is reserved before anything is pushed: a push cannot fail.

use std::ptr;
use std::task::Waker;

use crate::fanout::sync::{AtomicPtr, AtomicUsize, Bell, Ordering};

struct Node<T> {
    next: *mut Node<T>,
    item: T,
}

/// What a push found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(crate) enum Pushed {
    /// The consumer is awake and will come by.
    Awake,
    /// The consumer was parked: whoever got this rings, once.
    Ring,
}

/// The unbounded queue under an [`Inbox`]; the bound is the reservation.
///
/// # Ordering
/// `push` publishes its node with `Release`; `take` acquires all of them with one exchange, and each node's
/// release sequence is kept by the exchanges of the nodes above it. Either weakened, `loom_every_item_arrives` and
/// `loom_what_was_never_taken_is_dropped` fail. `park` needs nothing beyond the exchange itself, and is Relaxed: a
/// producer either replaces the parked mark and rings, or the park fails. That a waker which was registered before the
/// park is seen by the ring is the bell's own order (both its sides are acquire and release: a ring that came before
/// the registration would make the push come before the park that it replaced); turned round,
/// `loom_who_sleeps_is_woken` fails.
pub(crate) struct Queue<T> {
    head: AtomicPtr<Node<T>>,
}

#[expect(
    unsafe_code,
    reason = "an intrusive list of boxes; the invariants are named at each use and modelled with loom"
)]
mod queue {
    use super::{AtomicPtr, Node, Ordering, Pushed, Queue, ptr};

    /// The mark of a parked consumer: an address that no box has.
    fn parked<T>() -> *mut Node<T> {
        ptr::without_provenance_mut(1)
    }

    // SAFETY: items are moved through, never shared.
    unsafe impl<T: Send> Send for Queue<T> {}
    // SAFETY: as above; `push` takes items by value, and `take` hands each of them to one caller only.
    unsafe impl<T: Send> Sync for Queue<T> {}

    impl<T> Queue<T> {
        pub(crate) fn new() -> Self {
            Self { head: AtomicPtr::new(ptr::null_mut()) }
        }

        /// Puts `item` behind all that was pushed before.
        pub(crate) fn push(&self, item: T) -> Pushed {
            let node = Box::into_raw(Box::new(Node { next: ptr::null_mut(), item }));
            let mut head = self.head.load(Ordering::Relaxed);
            loop {
                // SAFETY: `node` came from a box just now and is reachable by nobody else until the exchange succeeds.
                unsafe { (*node).next = if head == parked() { ptr::null_mut() } else { head } };
                match self.head.compare_exchange_weak(head, node, Ordering::Release, Ordering::Relaxed) {
                    Ok(_) if head == parked() => return Pushed::Ring,
                    Ok(_) => return Pushed::Awake,
                    Err(found) => head = found,
                }
            }
        }

        /// Takes all items, oldest first. Wakes up a parked consumer's mark as a side effect: it is taken as empty.
        pub(crate) fn take(&self) -> Batch<T> {
            let mut node = self.head.swap(ptr::null_mut(), Ordering::Acquire);
            let mut oldest = ptr::null_mut();
            if node != parked() {
                while !node.is_null() {
                    // SAFETY: the exchange gave this list to us alone; every node in it came from `Box::into_raw`.
                    let next = unsafe { std::mem::replace(&mut (*node).next, oldest) };
                    oldest = node;
                    node = next;
                }
            }
            Batch { next: oldest }
        }

        /// Marks the consumer as asleep. False if there is something to take first.
        pub(super) fn park(&self) -> bool {
            self.head.compare_exchange(ptr::null_mut(), parked(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
        }
    }

    impl<T> Drop for Queue<T> {
        fn drop(&mut self) {
            drop(self.take());
        }
    }

    /// What one `take` took, oldest first. What is not iterated is dropped with it.
    pub(crate) struct Batch<T> {
        next: *mut Node<T>,
    }

    impl<T> Batch<T> {
        pub(crate) const fn empty() -> Self {
            Self { next: ptr::null_mut() }
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.next.is_null()
        }
    }

    impl<T> Iterator for Batch<T> {
        type Item = T;

        fn next(&mut self) -> Option<T> {
            if self.next.is_null() {
                return None;
            }
            // SAFETY: a batch owns the nodes of its list, and each is turned back into its box once.
            let node = unsafe { Box::from_raw(self.next) };
            self.next = node.next;
            Some(node.item)
        }
    }

    impl<T> Drop for Batch<T> {
        fn drop(&mut self) {
            self.by_ref().for_each(drop);
        }
    }
}
pub(crate) use queue::Batch;

impl<T> Queue<T> {
    /// Puts the consumer to sleep: the push that finds it so rings `bell`, which wakes `waker`. False if there is
    /// something to take first.
    pub(crate) fn sleep(&self, bell: &Bell, waker: &Waker) -> bool {
        bell.register(waker);
        self.park()
    }
}

/// Room in an inbox: posts and bytes, reserved before a push and given back when the consumer took the item.
///
/// # Ordering
/// Relaxed: a bound, publishes nothing. Two counters may be seen apart; each is kept on its own.
pub(crate) struct Room {
    posts: AtomicUsize,
    bytes: AtomicUsize,
    posts_max: usize,
    bytes_max: usize,
}

impl Room {
    pub(crate) fn new(posts_max: usize, bytes_max: usize) -> Self {
        Self { posts: AtomicUsize::new(0), bytes: AtomicUsize::new(0), posts_max, bytes_max }
    }

    /// Takes room for one post of `bytes`, or nothing. An empty inbox has room for anything.
    pub(crate) fn reserve(&self, bytes: usize) -> bool {
        let posts = self.posts.fetch_add(1, Ordering::Relaxed);
        let held = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if posts < self.posts_max && (held == 0 || held + bytes <= self.bytes_max) {
            return true;
        }
        self.release(1, bytes);
        false
    }

    /// Takes room without asking: for the few posts that must get through.
    pub(crate) fn take(&self, posts: usize, bytes: usize) {
        self.posts.fetch_add(posts, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Gives room back.
    pub(crate) fn release(&self, posts: usize, bytes: usize) {
        self.posts.fetch_sub(posts, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Posts that are reserved now.
    pub(crate) fn posts(&self) -> usize {
        self.posts.load(Ordering::Relaxed)
    }

    /// Bytes that are reserved now.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[cfg(not(tabcast_loom))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    #[derive(Debug, Clone)]
    enum Step {
        Push(u16),
        Take,
        Park,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        proptest::collection::vec(
            prop_oneof![4 => any::<u16>().prop_map(Step::Push), 1 => Just(Step::Take), 1 => Just(Step::Park)],
            0..200,
        )
    }

    proptest! {
        #[test]
        fn the_queue_is_a_vec_deque_with_a_bell(steps in steps()) {
            let queue = Queue::new();
            let (mut oracle, mut parked) = (VecDeque::new(), false);
            for step in steps {
                match step {
                    Step::Push(item) => {
                        let expected = if parked { Pushed::Ring } else { Pushed::Awake };
                        prop_assert_eq!(queue.push(item), expected);
                        parked = false;
                        oracle.push_back(item);
                    }
                    Step::Take => {
                        prop_assert_eq!(queue.take().collect::<VecDeque<_>>(), std::mem::take(&mut oracle));
                        parked = false;
                    }
                    Step::Park => {
                        let free = oracle.is_empty() && !parked;
                        prop_assert_eq!(queue.park(), free);
                        parked |= free;
                    }
                }
            }
        }
    }

    #[test]
    fn what_was_never_taken_is_dropped() {
        let item = std::sync::Arc::new(());
        let queue = Queue::new();
        for _ in 0..5 {
            let _ = queue.push(std::sync::Arc::clone(&item));
        }
        let mut batch = queue.take();
        drop(batch.next());
        let _ = queue.push(std::sync::Arc::clone(&item));
        drop(batch);
        drop(queue);
        assert_eq!(std::sync::Arc::strong_count(&item), 1);
    }

    #[test]
    fn room_is_taken_whole_or_not_at_all() {
        let room = Room::new(2, 100);
        assert!(room.reserve(1000), "an empty inbox admits any legal frame");
        assert!(!room.reserve(1));
        assert_eq!(room.posts(), 1);
        room.release(1, 1000);
        assert!(room.reserve(60) && room.reserve(40) && !room.reserve(0));
        room.release(1, 60);
        assert!(!room.reserve(61) && room.reserve(60));
    }

    #[test]
    fn threads_push_and_every_item_arrives_in_its_producers_order() {
        const PER_PRODUCER: usize = 20_000;
        let queue = std::sync::Arc::new(Queue::new());
        let rung = std::sync::Arc::new(tokio::sync::Notify::new());
        let producers: Vec<_> = (0..3)
            .map(|producer| {
                let (queue, rung) = (queue.clone(), rung.clone());
                std::thread::spawn(move || {
                    for sequence in 0..PER_PRODUCER {
                        if queue.push((producer, sequence)) == Pushed::Ring {
                            rung.notify_one();
                        }
                    }
                })
            })
            .collect();
        let mut next = [0; 3];
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            while next.iter().sum::<usize>() < 3 * PER_PRODUCER {
                for (producer, sequence) in queue.take() {
                    assert_eq!(next[producer], sequence);
                    next[producer] += 1;
                }
                if next.iter().sum::<usize>() < 3 * PER_PRODUCER && queue.park() {
                    rung.notified().await;
                }
            }
        });
        producers.into_iter().for_each(|p| p.join().unwrap());
        assert!(queue.take().is_empty());
    }
}

#[cfg(all(test, tabcast_loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::Notify;
    use loom::thread;
    use std::task::Wake;

    /// An item whose making and reading loom watches: reading it is an error unless its making happened before.
    struct Item(UnsafeCell<(usize, u32)>);

    #[expect(unsafe_code, reason = "loom's cell is how loom sees a race")]
    mod item {
        use super::{Item, UnsafeCell};

        // SAFETY: an item is moved through the queue, never shared.
        unsafe impl Send for Item {}

        impl Item {
            pub(super) fn new(producer: usize, sequence: u32) -> Self {
                Self(UnsafeCell::new((producer, sequence)))
            }

            pub(super) fn read(&self) -> (usize, u32) {
                // SAFETY: the consumer owns the item; loom fails the test if that is not so.
                self.0.with(|value| unsafe { *value })
            }
        }
    }

    /// Two producers, one consumer that parks: nothing is lost, nothing is doubled, no bell is missed.
    fn every_item_arrives(per_producer: u32) {
        let queue = Arc::new(Queue::new());
        let bell = Arc::new(Notify::new());
        let producers: Vec<_> = (0..2)
            .map(|producer| {
                let (queue, bell) = (queue.clone(), bell.clone());
                thread::spawn(move || {
                    for sequence in 0..per_producer {
                        if queue.push(Item::new(producer, sequence)) == Pushed::Ring {
                            bell.notify();
                        }
                    }
                })
            })
            .collect();
        let mut next = [0; 2];
        while next != [per_producer; 2] {
            let mut any = false;
            for item in queue.take() {
                let (producer, sequence) = item.read();
                assert_eq!(next[producer], sequence);
                next[producer] += 1;
                any = true;
            }
            if !any && queue.park() {
                bell.wait();
            }
        }
        producers.into_iter().for_each(|producer| producer.join().unwrap());
    }

    /// Wakes a consumer that waits on what loom can look into.
    struct Alarm(&'static Notify);

    impl Wake for Alarm {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.notify();
        }
    }

    /// One producer, and a consumer that sleeps as the shards do: the bell finds the waker of whoever is parked. What they
    /// share is never dropped: a deadlock would be reported by a panic out of which loom cannot drop anything of its own.
    #[test]
    fn loom_who_sleeps_is_woken() {
        check(3, || {
            let queue: &Queue<u32> = Box::leak(Box::new(Queue::new()));
            let bell: &Bell = Box::leak(Box::new(Bell::new()));
            let alarm: &Notify = Box::leak(Box::new(Notify::new()));
            thread::spawn(|| {
                for sequence in 0..2 {
                    if queue.push(sequence) == Pushed::Ring {
                        bell.wake();
                    }
                }
            });
            let (waker, mut next) = (Waker::from(std::sync::Arc::new(Alarm(alarm))), 0);
            while next < 2 {
                for sequence in queue.take() {
                    assert_eq!(sequence, next);
                    next += 1;
                }
                if next < 2 && queue.sleep(bell, &waker) {
                    alarm.wait();
                }
            }
        });
    }

    /// With a bound on preemptions: without one each of these takes minutes and more.
    fn check(preemptions: usize, run: impl Fn() + Send + Sync + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(run);
    }

    #[test]
    fn loom_every_item_arrives() {
        check(3, || every_item_arrives(1));
    }

    #[test]
    fn loom_every_item_arrives_in_its_producers_order() {
        check(2, || every_item_arrives(2));
    }

    /// What is dropped with the queue was made before: nothing is read too early there either.
    #[test]
    fn loom_what_was_never_taken_is_dropped() {
        loom::model(|| {
            let queue = Arc::new(Queue::new());
            let producer = {
                let queue = queue.clone();
                thread::spawn(move || queue.push(Item::new(0, 7)) == Pushed::Awake)
            };
            let early: Vec<_> = queue.take().map(|item| item.read()).collect();
            assert!(producer.join().unwrap());
            let late = queue.take().map(|item| item.read());
            assert_eq!(early.into_iter().chain(late).collect::<Vec<_>>(), [(0, 7)]);
        });
    }

    /// Room is never given out twice, and what a refused reservation took for a moment comes back.
    #[test]
    fn loom_room_has_a_bound() {
        loom::model(|| {
            let room = Arc::new(Room::new(1, 100));
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let room = room.clone();
                    thread::spawn(move || usize::from(room.reserve(10)))
                })
                .collect();
            assert_eq!(threads.into_iter().map(|t| t.join().unwrap()).sum::<usize>(), 1);
            assert_eq!(room.posts(), 1);
        });
    }
}
