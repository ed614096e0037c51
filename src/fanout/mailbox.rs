//! Mailboxes: a stream's queue for an embedder's own task, behind a small mutex and a waker.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use atomic_waker::AtomicWaker;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use foldhash::fast::RandomState;
use futures_core::Stream;

use crate::id::RequestId;
use crate::proto::delivery::{Delivery, Nobody};
use crate::proto::disconnect::Disconnect;
use crate::proto::event::{EndReason, Event};
use crate::proto::frame::{Class, Frame, Kind};
use crate::proto::limits::SessionLimits;

/// Why a stream could not be registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is one with that request id: nothing is replaced.
    #[error("a stream for that request exists already")]
    Exists,
    /// As many streams as the limit allows.
    #[error("{streams_max} streams are open, which is as many as allowed")]
    TooMany {
        /// The limit.
        streams_max: usize,
    },
}

/// The streams of an engine, by request.
pub(crate) struct Streams {
    open: DashMap<RequestId, Arc<Shared>, RandomState>,
    count: AtomicUsize,
    streams_max: usize,
    queue_frames_max: usize,
    queue_bytes_max: usize,
}

impl Streams {
    pub(crate) fn new(limits: &SessionLimits, streams_max: usize) -> Self {
        Self {
            open: DashMap::with_hasher(RandomState::default()),
            count: AtomicUsize::new(0),
            streams_max,
            queue_frames_max: limits.queue_frames_max,
            queue_bytes_max: limits.queue_bytes_max,
        }
    }

    pub(crate) fn open(this: &Arc<Self>, request: &RequestId) -> Result<Mailbox, OpenError> {
        let shared = Arc::new(Shared::default());
        match this.open.entry(request.clone()) {
            Entry::Occupied(_) => Err(OpenError::Exists),
            // Relaxed: a bound, publishes nothing.
            Entry::Vacant(_) if this.count.load(Ordering::Relaxed) >= this.streams_max => {
                Err(OpenError::TooMany { streams_max: this.streams_max })
            }
            Entry::Vacant(entry) => {
                drop(entry.insert(Arc::clone(&shared)));
                this.count.fetch_add(1, Ordering::Relaxed);
                Ok(Mailbox { shared, streams: Arc::clone(this), request: request.clone() })
            }
        }
    }

    /// Puts a frame into the stream's queue; `end` closes it behind that frame.
    pub(crate) fn offer(&self, request: &RequestId, frame: Frame) -> Delivery {
        let missing = Delivery { tabs: 0, nodes: 0, nobody: Some(Nobody::NoSuchStream) };
        let Some(shared) = self.open.get(request).map(|entry| Arc::clone(entry.value())) else { return missing };
        let offer = shared.offer(frame, self.queue_frames_max, self.queue_bytes_max);
        if matches!(offer, Offer::Last | Offer::Overflow | Offer::Closed) {
            self.remove(request, &shared);
        }
        match offer {
            Offer::Queued | Offer::Last | Offer::Dropped => Delivery { tabs: 1, nodes: 0, nobody: None },
            Offer::Overflow | Offer::Closed => missing,
        }
    }

    pub(crate) fn close(&self, request: &RequestId) {
        if let Some(shared) = self.open.get(request).map(|entry| Arc::clone(entry.value())) {
            shared.end(Disconnect::Normal);
            self.remove(request, &shared);
        }
    }

    /// Ends every stream with an `end` frame of reason `cancelled`: the node shuts down.
    pub(crate) fn end_all(&self) {
        let all: Vec<_> = self.open.iter().map(|e| (e.key().clone(), Arc::clone(e.value()))).collect();
        let last = Frame::encode(&Event::End { reason: EndReason::Cancelled });
        for (request, shared) in all {
            // Whatever became of it: the stream is over.
            let _ = shared.offer(last.clone(), usize::MAX, usize::MAX);
            self.remove(&request, &shared);
        }
    }

    fn remove(&self, request: &RequestId, shared: &Arc<Shared>) {
        let displaced = self.open.remove_if(request, |_, held| Arc::ptr_eq(held, shared));
        if displaced.is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[derive(Default)]
struct Shared {
    lane: Mutex<Lane>,
    reader: AtomicWaker,
}

#[derive(Default)]
struct Lane {
    queue: VecDeque<Frame>,
    bytes: usize,
    ending: Option<Disconnect>,
}

/// What became of a frame that was offered to a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
enum Offer {
    /// It waits, or replaced one that waited.
    Queued,
    /// It waits, and is the stream's last.
    Last,
    /// A typing sign for which there was no room.
    Dropped,
    /// There was no room: the stream was cut.
    Overflow,
    /// The stream had ended.
    Closed,
}

impl Shared {
    fn lane(&self) -> MutexGuard<'_, Lane> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offer(&self, frame: Frame, frames_max: usize, bytes_max: usize) -> Offer {
        let mut displaced = VecDeque::new();
        let offer = self.lane().admit(frame, frames_max, bytes_max, &mut displaced);
        self.reader.wake();
        offer
    }

    fn end(&self, ending: Disconnect) {
        self.lane().ending.get_or_insert(ending);
        self.reader.wake();
    }
}

impl Lane {
    /// The rules of a full queue, by class. What is not kept goes into `displaced`, to be dropped after the lock.
    fn admit(&mut self, frame: Frame, frames_max: usize, bytes_max: usize, displaced: &mut VecDeque<Frame>) -> Offer {
        if self.ending.is_some() {
            displaced.push_back(frame);
            return Offer::Closed;
        }
        let (class, key, bytes) = (frame.class(), frame.key(), frame.bytes());
        let kind = frame.kind();
        let mut fits = self.queue.is_empty() || (self.queue.len() < frames_max && self.bytes + bytes <= bytes_max);
        let is_lone = self.queue.len() == 1;
        if class == Class::Latest
            && let Some(queued) = self.queue.iter_mut().rev().find(|f| f.kind() == kind && f.key() == key)
        {
            let after = self.bytes - queued.bytes() + bytes;
            if after <= self.bytes.max(bytes_max) || is_lone || kind == Kind::Typing {
                self.bytes = after;
                displaced.push_back(std::mem::replace(queued, frame));
                return Offer::Queued;
            }
            fits = false;
        }
        if !fits && kind == Kind::Typing {
            displaced.push_back(frame);
            return Offer::Dropped;
        }
        // The last frame always gets in: it takes no more than its own few bytes.
        if !fits && kind != Kind::End {
            displaced.push_back(frame);
            displaced.append(&mut self.queue);
            self.bytes = 0;
            self.ending = Some(Disconnect::SlowConsumer);
            return Offer::Overflow;
        }
        self.bytes += bytes;
        self.queue.push_back(frame);
        if kind == Kind::End {
            self.ending = Some(Disconnect::Normal);
            return Offer::Last;
        }
        Offer::Queued
    }
}

/// The reading end of a stream: frames in order, then the end. One reader; dropping it ends the stream.
///
/// # Cancel safety
/// A frame is taken out only when `poll_next` returns it.
#[derive(Debug)]
pub struct Mailbox {
    shared: Arc<Shared>,
    streams: Arc<Streams>,
    request: RequestId,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lane = self.lane();
        write!(f, "{} frames, {} bytes, {:?}", lane.queue.len(), lane.bytes, lane.ending)
    }
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} streams", self.open.len())
    }
}

impl Mailbox {
    /// Whose answer this is.
    #[must_use]
    pub fn request(&self) -> &RequestId {
        &self.request
    }

    /// Why the stream ended, once it has: [`Disconnect::SlowConsumer`] if its queue was full and what was in it is lost.
    #[must_use]
    pub fn ending(&self) -> Option<Disconnect> {
        self.shared.lane().ending
    }
}

impl Stream for Mailbox {
    type Item = Frame;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Frame>> {
        self.shared.reader.register(context.waker());
        let mut lane = self.shared.lane();
        match lane.queue.pop_front() {
            Some(frame) => {
                lane.bytes -= frame.bytes();
                Poll::Ready(Some(frame))
            }
            None if lane.ending.is_some() => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        self.shared.end(Disconnect::ConnectionLost);
        self.streams.remove(&self.request, &self.shared);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::MessageId;
    use crate::proto::event::Timestamp;
    use futures_util::{FutureExt, StreamExt};

    fn streams(frames: usize) -> Arc<Streams> {
        Arc::new(Streams::new(&SessionLimits { queue_frames_max: frames, ..SessionLimits::default() }, 2))
    }

    fn request(name: &str) -> RequestId {
        RequestId::parse(name).unwrap()
    }

    fn message(text: &str) -> Frame {
        let timestamp = Timestamp::from_micros(1);
        Frame::encode(&Event::Message { id: MessageId::random(), text, sender: "star", reply_to: None, timestamp })
    }

    #[test]
    fn a_second_stream_with_the_same_id_is_refused_and_the_first_goes_on() {
        let streams = streams(8);
        let first = Streams::open(&streams, &request("r")).unwrap();
        assert_eq!(Streams::open(&streams, &request("r")).unwrap_err(), OpenError::Exists);
        assert_eq!(streams.offer(&request("r"), message("x")).tabs, 1);
        let _second = Streams::open(&streams, &request("s")).unwrap();
        assert_eq!(Streams::open(&streams, &request("t")).unwrap_err(), OpenError::TooMany { streams_max: 2 });
        drop(first);
        assert_eq!(streams.offer(&request("r"), message("x")).nobody, Some(Nobody::NoSuchStream));
        assert!(Streams::open(&streams, &request("r")).is_ok());
    }

    #[test]
    fn closing_wakes_the_reader_who_reads_what_is_left_and_then_the_end() {
        let streams = streams(8);
        let mut mailbox = Streams::open(&streams, &request("r")).unwrap();
        assert!(mailbox.next().now_or_never().is_none());
        let _ = streams.offer(&request("r"), message("x"));
        streams.close(&request("r"));
        streams.close(&request("r"));
        assert!(mailbox.next().now_or_never().unwrap().is_some());
        assert!(mailbox.next().now_or_never().unwrap().is_none());
        assert_eq!(mailbox.ending(), Some(Disconnect::Normal));
    }

    #[test]
    fn a_full_stream_is_cut_by_an_ordered_frame_and_not_by_typing() {
        let streams = streams(2);
        let mut mailbox = Streams::open(&streams, &request("r")).unwrap();
        for _ in 0..2 {
            assert_eq!(streams.offer(&request("r"), message("x")).tabs, 1);
        }
        let _ = streams.offer(&request("r"), Frame::encode(&Event::Typing { active: true }));
        assert_eq!(mailbox.ending(), None);
        assert_eq!(streams.offer(&request("r"), message("x")).tabs, 0);
        assert_eq!(mailbox.ending(), Some(Disconnect::SlowConsumer));
        assert!(mailbox.next().now_or_never().unwrap().is_none());
    }

    #[test]
    fn edits_that_grow_in_their_place_stay_within_the_queues_bytes() {
        let limits = SessionLimits { queue_bytes_max: 100_000, ..SessionLimits::default() };
        let streams = Arc::new(Streams::new(&limits, 2));
        let mailbox = Streams::open(&streams, &request("r")).unwrap();
        let ids = [MessageId::random(), MessageId::random()];
        let edit = |id, text: &str| Frame::encode(&Event::Edit { id, text, timestamp: Timestamp::from_micros(1) });
        let long = "x".repeat(60_000);
        assert_eq!(streams.offer(&request("r"), edit(ids[0], "a")).tabs, 1);
        assert_eq!(streams.offer(&request("r"), edit(ids[0], &long.repeat(2))).tabs, 1, "a lone one may be any");
        assert_eq!(streams.offer(&request("r"), edit(ids[0], &long)).tabs, 1);
        assert_eq!(streams.offer(&request("r"), edit(ids[1], "b")).tabs, 1);
        assert_eq!(streams.offer(&request("r"), edit(ids[1], &long)).tabs, 0);
        assert_eq!(mailbox.ending(), Some(Disconnect::SlowConsumer));
    }

    #[test]
    fn an_edit_replaces_the_queued_one_and_the_end_always_gets_in() {
        let streams = streams(2);
        let mut mailbox = Streams::open(&streams, &request("r")).unwrap();
        let id = MessageId::random();
        let edit = |text| Frame::encode(&Event::Edit { id, text, timestamp: Timestamp::from_micros(1) });
        let _ = streams.offer(&request("r"), edit("a"));
        let _ = streams.offer(&request("r"), message("x"));
        assert_eq!(streams.offer(&request("r"), edit("ab")).tabs, 1);
        assert_eq!(streams.offer(&request("r"), Frame::encode(&Event::End { reason: EndReason::Stop })).tabs, 1);
        assert_eq!(streams.offer(&request("r"), message("late")).tabs, 0);
        let first = mailbox.next().now_or_never().unwrap().unwrap();
        assert!(String::from_utf8_lossy(first.json()).contains(r#""text":"ab""#));
        assert_eq!(std::iter::from_fn(|| mailbox.next().now_or_never().flatten()).count(), 2);
    }
}
