//! Connections of one thread that are no sessions (yet): how many there are, and which of them wait for a request.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;

use tokio::sync::Notify;

use crate::metrics::ShardMetrics;

/// Connections of this thread that hyper holds.
#[derive(Default)]
pub(crate) struct Connections {
    open: Cell<usize>,
    /// Those of them that were told to make room.
    leaving: Cell<usize>,
    /// Those that wait for a request, by when that began: the longest first.
    idle: RefCell<BTreeMap<u64, Rc<Seat>>>,
    /// How often one has begun to wait.
    waits: Cell<u64>,
    /// One is over, or waits for a request.
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

    /// Waits until there are fewer than `count`; those that wait for a request make room, the longest first. `told` is
    /// called for each.
    ///
    /// # Cancel safety
    /// Dropped, it is as if nobody had waited any longer.
    pub(crate) async fn make_room(&self, count: usize, mut told: impl FnMut()) {
        while self.open.get() >= count {
            let changed = self.changed.notified();
            if self.open.get() - self.leaving.get() >= count && self.tell_longest_idle() {
                told();
            }
            changed.await;
        }
    }

    fn tell_longest_idle(&self) -> bool {
        let Some((_, seat)) = self.idle.borrow_mut().pop_first() else { return false };
        seat.waits_since.set(None);
        seat.is_wanted.set(true);
        self.leaving.set(self.leaving.get() + 1);
        seat.waker.take().into_iter().for_each(Waker::wake);
        true
    }
}

/// A place among [`Connections`].
pub(crate) struct Counted {
    connections: Rc<Connections>,
    seat: Rc<Seat>,
}

impl Counted {
    /// Where its connection says whether it waits for a request.
    pub(crate) fn seat(&self) -> SeatRef {
        SeatRef { connections: Rc::clone(&self.connections), seat: Rc::clone(&self.seat) }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let Self { connections, seat } = self;
        connections.count(connections.open.get() - 1);
        connections.leaving.set(connections.leaving.get() - usize::from(seat.is_wanted.get()));
        connections.changed.notify_waiters();
    }
}

/// What is known of one connection.
#[derive(Default)]
struct Seat {
    /// Its place in the order of those that wait for a request.
    waits_since: Cell<Option<u64>>,
    /// Somebody else needs the place.
    is_wanted: Cell<bool>,
    waker: Cell<Option<Waker>>,
}

/// One connection's seat. Dropped, it waits for nothing any more.
pub(crate) struct SeatRef {
    connections: Rc<Connections>,
    seat: Rc<Seat>,
}

impl SeatRef {
    /// Whether the connection is to end as soon as it has no request.
    pub(crate) fn is_wanted(&self) -> bool {
        self.seat.is_wanted.get()
    }

    /// Waits for its place to be wanted, as one that waits for a request.
    ///
    /// # Cancel safety
    /// Dropped, it goes on waiting for a request.
    pub(crate) async fn wanted(&self) {
        std::future::poll_fn(|context| {
            self.note(true, context.waker());
            if self.is_wanted() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }

    /// The connection waits for a request, or is busy with one; `waker` is woken when its place is wanted.
    pub(crate) fn note(&self, is_idle: bool, waker: &Waker) {
        match self.seat.waits_since.get() {
            None if is_idle && !self.is_wanted() => {
                let number = self.connections.waits.get() + 1;
                self.connections.waits.set(number);
                self.seat.waits_since.set(Some(number));
                self.seat.waker.set(Some(waker.clone()));
                self.connections.idle.borrow_mut().insert(number, Rc::clone(&self.seat));
                self.connections.changed.notify_waiters();
            }
            Some(_) if !is_idle => self.leave(),
            _ => {}
        }
    }

    fn leave(&self) {
        if let Some(number) = self.seat.waits_since.take() {
            self.connections.idle.borrow_mut().remove(&number);
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

    #[test]
    fn who_has_waited_longest_for_a_request_makes_room() {
        let connections: Rc<Connections> = Rc::default();
        let mut context = Context::from_waker(Waker::noop());
        let places: Vec<_> = (0..3).map(|_| connections.enter()).collect();
        let seats: Vec<_> = places.iter().map(Counted::seat).collect();
        seats.iter().for_each(|seat| seat.note(true, Waker::noop()));
        // The first asks something, is answered, and waits from then on.
        seats[0].note(false, Waker::noop());
        seats[0].note(true, Waker::noop());
        let mut told = 0;
        let mut room = Box::pin(connections.make_room(3, || told += 1));
        assert!(room.as_mut().poll(&mut context).is_pending());
        assert_eq!(seats.iter().map(SeatRef::is_wanted).collect::<Vec<_>>(), [false, true, false]);
        // As long as it takes its leave, nobody else has to.
        seats[0].note(false, Waker::noop());
        seats[0].note(true, Waker::noop());
        assert!(room.as_mut().poll(&mut context).is_pending());
        let mut places = places.into_iter();
        let (first, second) = (places.next(), places.next());
        drop(second);
        assert!(room.as_mut().poll(&mut context).is_ready());
        drop(room);
        assert_eq!((told, connections.open()), (1, 2));
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
        seat.note(false, Waker::noop());
        let mut room = Box::pin(connections.make_room(1, || {}));
        assert!(room.as_mut().poll(&mut context).is_pending());
        assert!(!seat.is_wanted());
        seat.note(true, Waker::noop());
        assert!(room.as_mut().poll(&mut context).is_pending());
        assert!(seat.is_wanted());
        drop(seat);
        assert!(connections.idle.borrow().is_empty());
        drop(place);
        assert!(room.as_mut().poll(&mut context).is_ready());
    }
}
