//! Where frames change threads: from the mailboxes' shard to whoever reads, a few at a time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};

use atomic_waker::AtomicWaker;

use crate::fanout::session::Address;
use crate::fanout::shard::Given;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;

/// What is handed over ahead of the reader: the rest waits in the session's queue, by whose rules it may be replaced. A
/// frame with more bytes than these is handed over alone, and stays in the queue as well until it is read: there the
/// process's budget finds it.
const PIECES_MAX: usize = 16;
const BYTES_MAX: usize = 64 << 10;

/// What a reader gets.
#[derive(Debug)]
pub(crate) enum Piece {
    Frame(Frame),
    /// A part of an event stream that is no event, as one chunk.
    Chunk(Box<[u8]>),
}

/// Whether a reader wants what is no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chunks {
    #[cfg_attr(not(feature = "driver"), expect(dead_code, reason = "event streams are the driver's"))]
    Wanted,
    Ignored,
}

/// One tab's hand-over.
#[derive(Debug)]
pub(super) struct Hand {
    address: OnceLock<Address>,
    chunks: Chunks,
    lane: Mutex<Lane>,
    reader: AtomicWaker,
}

#[derive(Debug, Default)]
struct Lane {
    pieces: VecDeque<Piece>,
    bytes: usize,
    /// A large frame that was handed over, and that the queue has as well.
    large: Option<Frame>,
    /// The shard has more, for which there was no room.
    is_short: bool,
    /// It is on the list of those that the shard is to look at.
    is_stirred: bool,
    /// The reader is gone.
    is_left: bool,
    ending: Option<Disconnect>,
}

impl Hand {
    pub(super) fn new(chunks: Chunks) -> Self {
        Self { address: OnceLock::new(), chunks, lane: Mutex::default(), reader: AtomicWaker::new() }
    }

    /// No code that can panic runs under the lock, so a poisoned lane is still whole.
    fn lane(&self) -> MutexGuard<'_, Lane> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the tab lives, once it is opened.
    pub(super) fn address(&self) -> Option<Address> {
        self.address.get().copied()
    }

    pub(super) fn opened(&self, address: Address) {
        let _ = self.address.set(address);
    }

    /// Takes one more piece, if there is room for it: an empty lane has room for any. Of a large one it says so only once
    /// that was read.
    pub(super) fn take(&self, given: &Given<'_>) -> bool {
        let bytes = match given {
            Given::Chunk(_) if self.chunks == Chunks::Ignored => return true,
            Given::Chunk(chunk) => chunk.len(),
            Given::Frame(frame) => frame.bytes(),
        };
        let mut lane = self.lane();
        if !lane.pieces.is_empty() && (lane.pieces.len() >= PIECES_MAX || lane.bytes + bytes > BYTES_MAX) {
            lane.is_short = true;
            return false;
        }
        // A newer one may have taken its place in the queue.
        let large = lane.large.take();
        if let (Given::Frame(frame), Some(large)) = (given, large)
            && std::ptr::eq(frame.websocket(), large.websocket())
        {
            return true;
        }
        lane.bytes += bytes;
        let (piece, large) = match given {
            Given::Frame(frame) => {
                (Piece::Frame(Frame::clone(frame)), (bytes > BYTES_MAX).then(|| Frame::clone(frame)))
            }
            Given::Chunk(chunk) => (Piece::Chunk(Box::from(*chunk)), None),
        };
        let is_taken = large.is_none();
        lane.pieces.push_back(piece);
        lane.is_short |= !is_taken;
        lane.large = large;
        drop(lane);
        self.reader.wake();
        is_taken
    }

    /// The tab is over. If it was cut, what was handed over and not read goes with its queue: a reader that stalls, and
    /// may never see the end, would keep it while the user's next tab is opened.
    pub(super) fn end(&self, ending: Disconnect) {
        let mut lane = self.lane();
        let first = *lane.ending.get_or_insert(ending);
        let pieces = if is_cut(first) { std::mem::take(&mut lane.pieces) } else { VecDeque::new() };
        let displaced = (pieces, lane.large.take());
        drop(lane);
        drop(displaced);
        self.reader.wake();
    }

    pub(super) fn ending(&self) -> Option<Disconnect> {
        let lane = self.lane();
        lane.ending.filter(|_| lane.pieces.is_empty())
    }

    /// Whether the tab has ended, or nobody reads it any more.
    pub(super) fn is_over(&self) -> bool {
        let lane = self.lane();
        lane.is_left || lane.ending.is_some()
    }

    /// The reader is gone: what it did not read goes with it.
    pub(super) fn leave(&self) {
        let mut lane = self.lane();
        lane.is_left = true;
        let displaced = (std::mem::take(&mut lane.pieces), lane.large.take());
        drop(lane);
        drop(displaced);
    }

    /// Whether the reader is gone, asked by the shard that was told to look.
    pub(super) fn look(&self) -> bool {
        let mut lane = self.lane();
        lane.is_stirred = false;
        lane.is_left
    }

    pub(super) fn poll(self: &Arc<Self>, context: &mut Context<'_>, stirred: &Stirred) -> Poll<Option<Piece>> {
        self.reader.register(context.waker());
        let mut lane = self.lane();
        let Some(piece) = lane.pieces.pop_front() else {
            return if lane.ending.is_some() { Poll::Ready(None) } else { Poll::Pending };
        };
        lane.bytes -= match &piece {
            Piece::Frame(frame) => frame.bytes(),
            Piece::Chunk(chunk) => chunk.len(),
        };
        let wants_more = lane.pieces.is_empty() && std::mem::take(&mut lane.is_short);
        drop(lane);
        if wants_more {
            stirred.stir(self);
        }
        Poll::Ready(Some(piece))
    }
}

/// Whether what waits for a tab that ends so is dropped, and not written.
fn is_cut(ending: Disconnect) -> bool {
    matches!(ending, Disconnect::SlowConsumer | Disconnect::OverBudget | Disconnect::HeartbeatTimeout)
}

/// Hands that the shard is to look at: a reader wants more, or is gone. Each is there once, so that tabs bound it, and
/// only if the shard has a session of it: when the thread has ended, nobody takes them out.
#[derive(Debug, Default)]
pub(super) struct Stirred {
    hands: Mutex<Vec<Arc<Hand>>>,
    thread: AtomicWaker,
}

impl Stirred {
    pub(super) fn stir(&self, hand: &Arc<Hand>) {
        let mut lane = hand.lane();
        if hand.address().is_none() || lane.ending.is_some() || std::mem::replace(&mut lane.is_stirred, true) {
            return;
        }
        drop(lane);
        self.hands.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(hand));
        self.thread.wake();
    }

    /// Takes all of them; from then on the thread is woken for the next.
    pub(super) fn take(&self, context: &mut Context<'_>) -> Vec<Arc<Hand>> {
        self.thread.register(context.waker());
        std::mem::take(&mut *self.hands.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn opened() -> Arc<Hand> {
        let hand = Hand::new(Chunks::Ignored);
        hand.opened(Address::new(0, 0, 0));
        Arc::new(hand)
    }

    #[test]
    fn a_hand_that_the_shard_does_not_know_or_has_let_go_is_not_left_for_it() {
        let (never_opened, ended) = (Arc::new(Hand::new(Chunks::Ignored)), opened());
        ended.end(Disconnect::InternalError);
        let stirred = Stirred::default();
        for hand in [never_opened, ended] {
            hand.leave();
            stirred.stir(&hand);
            assert_eq!(Arc::strong_count(&hand), 1);
        }
    }

    #[test]
    fn a_reader_that_was_short_asks_once_for_more_and_an_empty_lane_takes_anything() {
        let (hand, stirred) = (opened(), Stirred::default());
        let mut context = Context::from_waker(Waker::noop());
        let take = |frame: &Frame| hand.take(&Given::Frame(frame));
        let half = Frame::text(&"x".repeat(BYTES_MAX / 2));
        assert!(take(&half), "an empty lane");
        assert!(!take(&half), "no room in bytes");
        assert!(hand.take(&Given::Chunk(b"1\r\nx\r\n")), "nobody wants it");
        assert!(stirred.take(&mut context).is_empty());
        assert!(matches!(hand.poll(&mut context, &stirred), Poll::Ready(Some(Piece::Frame(_)))));
        assert_eq!(stirred.take(&mut context).len(), 1);
        assert!(!hand.look());
        for _ in 0..PIECES_MAX {
            assert!(take(&Frame::text("x")));
        }
        assert!(!take(&Frame::text("x")), "no room in pieces");
        for left in (0..PIECES_MAX).rev() {
            assert!(stirred.take(&mut context).is_empty(), "{left} were left to read");
            assert!(hand.poll(&mut context, &stirred).is_ready());
        }
        hand.leave();
        stirred.stir(&hand);
        stirred.stir(&hand);
        assert_eq!(stirred.take(&mut context).len(), 1, "it is there once");
        assert!(hand.look());
        hand.end(Disconnect::Kicked);
        assert!(matches!(hand.poll(&mut context, &stirred), Poll::Ready(None)));
        assert_eq!(hand.ending(), Some(Disconnect::Kicked));
    }

    #[test]
    fn a_large_frame_is_handed_over_once_and_taken_when_it_was_read_unless_it_was_replaced() {
        let mut context = Context::from_waker(Waker::noop());
        let [large, newer] = ["x", "y"].map(|text| Frame::text(&text.repeat(2 * BYTES_MAX)));
        for (is_replaced, then) in [(false, &large), (true, &newer)] {
            let (hand, stirred) = (opened(), Stirred::default());
            let mut read = || match hand.poll(&mut context, &stirred) {
                Poll::Ready(Some(Piece::Frame(frame))) => Some(frame.json().to_vec()),
                _ => None,
            };
            assert!(!hand.take(&Given::Frame(&large)), "an empty lane has room, but it is to be read first");
            assert!(!hand.take(&Given::Frame(&large)), "and once");
            assert_eq!(read().as_deref(), Some(large.json()));
            assert_eq!(hand.take(&Given::Frame(then)), !is_replaced);
            assert_eq!(read().as_deref(), is_replaced.then_some(newer.json()));
            assert!(is_replaced || hand.take(&Given::Frame(&Frame::text("behind"))));
            assert_eq!(stirred.hands.lock().unwrap().len(), 1, "it asks for more");
        }
    }

    #[test]
    fn what_was_handed_over_goes_with_a_tab_that_is_cut_and_is_read_of_one_that_ends() {
        let check = |ending: Disconnect, left: usize| {
            let (hand, stirred) = (Arc::new(Hand::new(Chunks::Ignored)), Stirred::default());
            let mut context = Context::from_waker(Waker::noop());
            assert!(hand.take(&Given::Frame(&Frame::text("x"))));
            hand.end(ending);
            for _ in 0..left {
                assert!(matches!(hand.poll(&mut context, &stirred), Poll::Ready(Some(_))), "{ending:?}");
            }
            assert_eq!(hand.ending(), Some(ending));
            assert!(matches!(hand.poll(&mut context, &stirred), Poll::Ready(None)), "{ending:?}");
        };
        for cut in [Disconnect::SlowConsumer, Disconnect::OverBudget, Disconnect::HeartbeatTimeout] {
            check(cut, 0);
        }
        for ending in [Disconnect::Kicked, Disconnect::ServiceRestart, Disconnect::TokenExpired] {
            check(ending, 1);
        }
    }
}
