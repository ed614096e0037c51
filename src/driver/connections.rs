//! Connections of one thread that are no sessions (yet): how many there are, and which of them wait for their client.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::metrics::ShardMetrics;

/// How long a client may take nothing of a response while others wait for its place. Slower readers than one that takes
/// 32 KiB a second, about what the kernel takes at one time, may so have to make room.
pub(super) const STALL_TIME: Duration = Duration::from_secs(1);

/// Connections of this thread that hyper holds.
#[derive(Default)]
pub(crate) struct Connections {
    open: Cell<usize>,
    /// Those of them that were told to make room, and have done nothing since that keeps them.
    leaving: Cell<usize>,
    /// Those that wait for a request, by when that began: the longest first.
    idle: RefCell<BTreeMap<u64, Rc<Seat>>>,
    /// Those whose clients have a response to take, by when they took some of it: the longest ago first.
    stalled: RefCell<BTreeMap<u64, Rc<Seat>>>,
    /// How often one has begun to wait.
    waits: Cell<u64>,
    /// One is over, or waits for its client.
    changed: Notify,
    metrics: Arc<ShardMetrics>,
}

impl Connections {
    /// None yet; their number is told to `metrics`, which are this thread's.
    pub(crate) fn counted_in(metrics: Arc<ShardMetrics>) -> Self {
        Self { metrics, ..Self::default() }
    }

    fn count(&self, open: usize) {
        self.open.set(open);
        self.metrics.http_connections.store(open as u64);
    }

    /// One more, until it is dropped.
    pub(crate) fn enter(self: &Rc<Self>) -> Counted {
        self.count(self.open.get() + 1);
        Counted { connections: Rc::clone(self), seat: Rc::default() }
    }

    /// How many there are.
    pub(crate) fn open(&self) -> usize {
        self.open.get()
    }

    /// Waits until all are over.
    ///
    /// # Cancel safety
    /// Dropped, nothing has happened.
    pub(crate) async fn wait_for_none(&self) {
        while self.open.get() > 0 {
            self.changed.notified().await;
        }
    }

    /// Waits until there are fewer than `count`. Those that wait for a request make room, the longest first; if none does,
    /// those whose clients have taken nothing of a response for [`STALL_TIME`], again the longest first. Who was told and
    /// goes on all the same (a request comes, or some of the response is taken) stays, and the next one is told. `now` is
    /// the clock.
    ///
    /// # Cancel safety
    /// Dropped, it is as if nobody had waited any longer.
    pub(crate) async fn make_room(&self, count: usize, now: impl Fn() -> Instant) {
        while self.open.get() >= count {
            let changed = self.changed.notified();
            let mut look_again = None;
            if self.open.get() - self.leaving.get() >= count {
                look_again = self.tell_longest(now());
            }
            match look_again {
                None => changed.await,
                // Either way it is looked at again.
                Some(at) => drop(tokio::time::timeout_at(at.into(), changed).await),
            }
        }
    }

    /// Tells one to make room. If only time is missing for that, when there may be one.
    fn tell_longest(&self, now: Instant) -> Option<Instant> {
        let idle = self.idle.borrow_mut().pop_first();
        let seat = match idle {
            Some((_, seat)) => seat,
            None => {
                let mut stalled = self.stalled.borrow_mut();
                let longest = stalled.first_entry()?;
                match longest.get().waits.get() {
                    Some((Waits::Reader(since), _)) if since + STALL_TIME > now => return Some(since + STALL_TIME),
                    _ => longest.remove(),
                }
            }
        };
        seat.told.set(seat.waits.take().map(|(waits, _)| waits));
        self.leaving.set(self.leaving.get() + 1);
        seat.waker.take().into_iter().for_each(Waker::wake);
        None
    }

    /// How many are on their way out.
    #[cfg(test)]
    pub(super) fn leaving(&self) -> usize {
        self.leaving.get()
    }

    fn queue(&self, waits: Waits) -> &RefCell<BTreeMap<u64, Rc<Seat>>> {
        match waits {
            Waits::Request => &self.idle,
            Waits::Reader(_) => &self.stalled,
        }
    }
}

/// What a connection waits for that its client has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waits {
    /// To ask something.
    Request,
    /// To take what is written, of which it has taken nothing since then.
    Reader(Instant),
}

/// A place among [`Connections`].
pub(crate) struct Counted {
    connections: Rc<Connections>,
    seat: Rc<Seat>,
}

impl Counted {
    /// Where its connection says what it waits for.
    pub(crate) fn seat(&self) -> SeatRef {
        SeatRef { connections: Rc::clone(&self.connections), seat: Rc::clone(&self.seat) }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let Self { connections, seat } = self;
        connections.count(connections.open.get() - 1);
        connections.leaving.set(connections.leaving.get() - usize::from(seat.is_wanted()));
        connections.changed.notify_waiters();
    }
}

/// What is known of one connection.
#[derive(Default)]
struct Seat {
    /// What it waits for, and its place in the order of those that do.
    waits: Cell<Option<(Waits, u64)>>,
    /// What it waited for when it was told that somebody else needs the place, as long as it does.
    told: Cell<Option<Waits>>,
    waker: Cell<Option<Waker>>,
}

impl Seat {
    fn is_wanted(&self) -> bool {
        self.told.get().is_some()
    }
}

/// One connection's seat. Dropped, it waits for nothing any more.
pub(crate) struct SeatRef {
    connections: Rc<Connections>,
    seat: Rc<Seat>,
}

impl SeatRef {
    /// Whether the connection is to end, unless it goes on.
    pub(crate) fn is_wanted(&self) -> bool {
        self.seat.is_wanted()
    }

    /// Waits for its place to be wanted, as one that waits for a request.
    ///
    /// # Cancel safety
    /// Dropped, it goes on waiting for a request.
    pub(crate) async fn wanted(&self) {
        std::future::poll_fn(|context| {
            self.note(Some(Waits::Request), context.waker());
            if self.is_wanted() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }

    /// What the connection waits for; with nothing it is busy. `waker` is woken when its place is wanted. A place that is
    /// wanted already is so no longer if this is something else: another one has to make room.
    pub(super) fn note(&self, waits: Option<Waits>, waker: &Waker) {
        let connections = &self.connections;
        if let Some(told) = self.seat.told.get() {
            if waits == Some(told) {
                return;
            }
            self.seat.told.set(None);
            connections.leaving.set(connections.leaving.get() - 1);
            connections.changed.notify_waiters();
        }
        let before = self.seat.waits.get().map(|(waits, _)| waits);
        if before == waits {
            return;
        }
        self.leave();
        let Some(waits) = waits else { return };
        let number = connections.waits.get() + 1;
        connections.waits.set(number);
        self.seat.waits.set(Some((waits, number)));
        self.seat.waker.set(Some(waker.clone()));
        connections.queue(waits).borrow_mut().insert(number, Rc::clone(&self.seat));
        // Who took some of a response and waits again is known already.
        if before.is_none() || waits == Waits::Request {
            connections.changed.notify_waiters();
        }
    }

    fn leave(&self) {
        if let Some((waits, number)) = self.seat.waits.take() {
            self.connections.queue(waits).borrow_mut().remove(&number);
        }
    }
}

impl Drop for SeatRef {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::task::Context;

    use super::*;
    use crate::driver::clock;

    const REQUEST: Option<Waits> = Some(Waits::Request);

    #[test]
    fn who_has_waited_longest_for_a_request_makes_room() {
        let connections: Rc<Connections> = Rc::default();
        let mut context = Context::from_waker(Waker::noop());
        let places: Vec<_> = (0..3).map(|_| connections.enter()).collect();
        let seats: Vec<_> = places.iter().map(Counted::seat).collect();
        seats.iter().for_each(|seat| seat.note(REQUEST, Waker::noop()));
        // The first asks something, is answered, and waits from then on.
        seats[0].note(None, Waker::noop());
        seats[0].note(REQUEST, Waker::noop());
        let mut room = Box::pin(connections.make_room(3, clock::now));
        assert!(room.as_mut().poll(&mut context).is_pending());
        assert_eq!(seats.iter().map(SeatRef::is_wanted).collect::<Vec<_>>(), [false, true, false]);
        // As long as it takes its leave, nobody else has to.
        seats[0].note(None, Waker::noop());
        seats[0].note(REQUEST, Waker::noop());
        assert!(room.as_mut().poll(&mut context).is_pending());
        let mut places = places.into_iter();
        let (first, second) = (places.next(), places.next());
        drop(second);
        assert!(room.as_mut().poll(&mut context).is_ready());
        drop(room);
        assert_eq!((connections.leaving(), connections.open()), (0, 2));
        assert_eq!(connections.metrics.http_connections.value(), 2);
        drop((first, places));
        assert_eq!(connections.open(), 0);
    }

    #[test]
    fn who_is_busy_stays_and_makes_room_when_it_is_not() {
        let connections: Rc<Connections> = Rc::default();
        let mut context = Context::from_waker(Waker::noop());
        let place = connections.enter();
        let seat = place.seat();
        seat.note(None, Waker::noop());
        let mut room = Box::pin(connections.make_room(1, clock::now));
        assert!(room.as_mut().poll(&mut context).is_pending());
        assert!(!seat.is_wanted());
        seat.note(REQUEST, Waker::noop());
        assert!(room.as_mut().poll(&mut context).is_pending());
        assert!(seat.is_wanted());
        drop(seat);
        assert!(connections.idle.borrow().is_empty());
        drop(place);
        assert!(room.as_mut().poll(&mut context).is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_of_its_response_makes_room_after_those_that_wait_for_a_request() {
        let connections: Rc<Connections> = Rc::default();
        let start = clock::now();
        let places: Vec<_> = (0..4).map(|_| connections.enter()).collect();
        let seats: Vec<_> = places.iter().map(Counted::seat).collect();
        let reader = |since| Some(Waits::Reader(start + Duration::from_millis(since)));
        seats[0].note(reader(0), Waker::noop());
        seats[1].note(reader(0), Waker::noop());
        seats[2].note(REQUEST, Waker::noop());
        // It has taken some since, and the last one is busy.
        seats[0].note(reader(10), Waker::noop());
        let wanted = || seats.iter().map(SeatRef::is_wanted).collect::<Vec<_>>();
        let now = Cell::new(Duration::from_millis(1_001));
        let mut room = Box::pin(connections.make_room(2, || start + now.get()));
        let mut context = Context::from_waker(Waker::noop());
        assert!(room.as_mut().poll(&mut context).is_pending());
        assert_eq!(wanted(), [false, false, true, false]);
        drop(room);
        let mut places = places.into_iter();
        let first = places.next();
        let second = places.next();
        drop(places.next());
        let mut room = Box::pin(connections.make_room(2, || start + now.get()));
        assert!(room.as_mut().poll(&mut context).is_pending());
        assert_eq!(wanted(), [false, true, true, false]);
        drop(second);
        // The last reader has taken some within the last second, and is looked at again when that is over.
        assert!(room.as_mut().poll(&mut context).is_pending());
        assert_eq!(wanted(), [false, true, true, false]);
        now.set(Duration::from_millis(1_010));
        assert!(tokio::time::timeout(STALL_TIME * 2, room.as_mut()).await.is_err());
        assert_eq!(wanted(), [true, true, true, false]);
        drop(first);
        room.await;
        assert_eq!((connections.leaving(), connections.open()), (0, 1));
    }

    #[test]
    fn who_was_told_and_goes_on_stays_and_another_one_makes_room() {
        let start = clock::now();
        let later = start + STALL_TIME;
        let reader = |since| Some(Waits::Reader(since));
        // What the first waits for when it is told, and what it does then.
        let check = |told: Option<Waits>, goes_on: Option<Waits>| {
            let connections: Rc<Connections> = Rc::default();
            let places: Vec<_> = (0..3).map(|_| connections.enter()).collect();
            let seats: Vec<_> = places.iter().map(Counted::seat).collect();
            let wanted = || seats.iter().map(SeatRef::is_wanted).collect::<Vec<_>>();
            let mut room = Box::pin(connections.make_room(3, || later));
            let mut context = Context::from_waker(Waker::noop());
            seats[0].note(told, Waker::noop());
            seats[1].note(reader(start), Waker::noop());
            assert!(room.as_mut().poll(&mut context).is_pending());
            seats[0].note(told, Waker::noop());
            assert!(room.as_mut().poll(&mut context).is_pending());
            assert_eq!(wanted(), [true, false, false], "{told:?} {goes_on:?}");
            seats[0].note(goes_on, Waker::noop());
            assert!(room.as_mut().poll(&mut context).is_pending());
            assert_eq!((wanted(), connections.leaving()), (vec![false, true, false], 1), "{told:?} {goes_on:?}");
            // And it may be told again.
            seats[1].note(None, Waker::noop());
            seats[0].note(REQUEST, Waker::noop());
            assert!(room.as_mut().poll(&mut context).is_pending());
            assert_eq!((wanted(), connections.leaving()), (vec![true, false, false], 1), "{told:?} {goes_on:?}");
            let mut places = places.into_iter();
            drop(places.next());
            assert!(room.as_mut().poll(&mut context).is_ready());
            assert_eq!(connections.leaving(), 0);
        };
        check(reader(start), None);
        check(reader(start), reader(later));
        check(REQUEST, None);
        check(REQUEST, reader(later));
    }
}
