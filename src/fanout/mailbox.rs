//! Mailboxes: a stream's queue for an embedder's own task, behind a small mutex and a waker.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use atomic_waker::AtomicWaker;
use futures_core::Stream;

use crate::fanout::streams::Streams;
use crate::id::RequestId;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Class, Frame, Kind};

/// A mailbox as its stream sees it.
#[derive(Default)]
pub(crate) struct Shared {
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
pub(crate) enum Offer {
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

    pub(crate) fn offer(&self, frame: Frame, frames_max: usize, bytes_max: usize) -> Offer {
        let mut displaced = VecDeque::new();
        let offer = self.lane().admit(frame, frames_max, bytes_max, &mut displaced);
        self.reader.wake();
        offer
    }

    pub(crate) fn end(&self, ending: Disconnect) {
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
        // An empty queue admits any frame: what it admitted so must not be what the next finds no room for.
        let first = self.queue.front().map_or(0, Frame::bytes);
        let mut fits =
            self.queue.is_empty() || (self.queue.len() < frames_max && self.bytes - first + bytes <= bytes_max);
        if class == Class::Latest
            && let Some(place) = self.queue.iter().rposition(|f| f.kind() == kind && f.key() == key)
            && !self.queue.range(place + 1..).any(|behind| behind.is_message_of(&frame))
        {
            let before = self.queue[place].bytes();
            let grows = bytes > before && self.bytes - first + bytes - before > bytes_max;
            if !grows || place == 0 || kind == Kind::Typing {
                self.bytes = self.bytes - before + bytes;
                displaced.push_back(std::mem::replace(&mut self.queue[place], frame));
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

impl Mailbox {
    pub(crate) fn new(shared: Arc<Shared>, streams: Arc<Streams>, request: RequestId) -> Self {
        Self { shared, streams, request }
    }

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
        self.streams.left_by_mailbox(&self.request, &self.shared);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fanout::hub::Hub;
    use crate::fanout::streams::{OpenError, StreamOptions};
    use crate::id::{ChannelId, MessageId};
    use crate::metrics::StreamEnd;
    use crate::proto::delivery::{Delivery, Nobody};
    use crate::proto::event::{EndReason, Event, Timestamp};
    use crate::proto::limits::{HubLimits, SessionLimits};
    use futures_util::{FutureExt, StreamExt};

    struct Bench(Arc<Hub>);

    impl Bench {
        fn open(&self, request: &RequestId) -> Result<Mailbox, OpenError> {
            self.0.open_stream(request, StreamOptions::default())
        }

        fn offer(&self, request: &RequestId, frame: Frame) -> Delivery {
            self.0.post(&ChannelId::Stream(request.clone()), &frame).unwrap()
        }

        fn close(&self, request: &RequestId) {
            self.0.close_stream(request);
        }
    }

    fn streams(frames: usize) -> Bench {
        streams_of(SessionLimits { queue_frames_max: frames, ..SessionLimits::default() })
    }

    fn streams_of(sessions: SessionLimits) -> Bench {
        Bench(Hub::new(1, &HubLimits { streams_max: 2, ..HubLimits::default() }, &sessions))
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
        let first = streams.open(&request("r")).unwrap();
        assert_eq!(streams.open(&request("r")).unwrap_err(), OpenError::Exists);
        assert_eq!(streams.offer(&request("r"), message("x")).tabs, 1);
        let _second = streams.open(&request("s")).unwrap();
        assert_eq!(streams.open(&request("t")).unwrap_err(), OpenError::TooMany { streams_max: 2 });
        drop(first);
        assert_eq!(streams.offer(&request("r"), message("x")).nobody, Some(Nobody::NoSuchStream));
        assert!(streams.open(&request("r")).is_ok());
    }

    #[test]
    fn closing_wakes_the_reader_who_reads_what_is_left_and_then_the_end() {
        let streams = streams(8);
        let mut mailbox = streams.open(&request("r")).unwrap();
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
        let mut mailbox = streams.open(&request("r")).unwrap();
        for _ in 0..2 {
            assert_eq!(streams.offer(&request("r"), message("x")).tabs, 1);
        }
        let _ = streams.offer(&request("r"), Frame::encode(&Event::Typing { active: true }));
        assert_eq!(mailbox.ending(), None);
        assert_eq!(streams.offer(&request("r"), message("x")).tabs, 0);
        assert_eq!(mailbox.ending(), Some(Disconnect::SlowConsumer));
        assert!(mailbox.next().now_or_never().unwrap().is_none());
        let engine = &streams.0.metrics().engine;
        assert_eq!(engine.ended_streams.of(StreamEnd::SlowReader).value(), 1);
        assert_eq!(engine.dropped_mailbox_typing_frames.value(), 1);
        assert_eq!(streams.0.stream_count(), 0);
        assert!(streams.open(&request("r")).is_ok(), "its name is free again");
    }

    #[test]
    fn edits_that_grow_in_their_place_stay_within_the_queues_bytes() {
        let limits = SessionLimits { queue_bytes_max: 100_000, ..SessionLimits::default() };
        let streams = streams_of(limits);
        let mailbox = streams.open(&request("r")).unwrap();
        let ids = [MessageId::random(), MessageId::random(), MessageId::random()];
        let edit = |id, text: &str| Frame::encode(&Event::Edit { id, text, timestamp: Timestamp::from_micros(1) });
        let long = "x".repeat(60_000);
        assert_eq!(streams.offer(&request("r"), edit(ids[0], "a")).tabs, 1);
        assert_eq!(streams.offer(&request("r"), edit(ids[0], &long.repeat(2))).tabs, 1, "a lone one may be any");
        assert_eq!(streams.offer(&request("r"), edit(ids[0], &long)).tabs, 1);
        assert_eq!(streams.offer(&request("r"), edit(ids[1], "b")).tabs, 1);
        assert_eq!(streams.offer(&request("r"), edit(ids[1], &long)).tabs, 1, "the first counts against nobody");
        assert_eq!(streams.offer(&request("r"), edit(ids[2], "c")).tabs, 1);
        assert_eq!(streams.offer(&request("r"), edit(ids[2], &long)).tabs, 0);
        assert_eq!(mailbox.ending(), Some(Disconnect::SlowConsumer));
    }

    #[test]
    fn an_edit_never_gets_in_front_of_its_message() {
        let streams = streams(8);
        let mut mailbox = streams.open(&request("r")).unwrap();
        let said = message("said");
        let id = said.message_id().unwrap();
        let edit = |text| Frame::encode(&Event::Edit { id, text, timestamp: Timestamp::from_micros(1) });
        for frame in [edit("early"), said, edit("late"), edit("last")] {
            assert_eq!(streams.offer(&request("r"), frame).tabs, 1);
        }
        let text = |frame: Frame| serde_json::from_slice::<serde_json::Value>(frame.json()).unwrap()["text"].clone();
        let read = std::iter::from_fn(|| mailbox.next().now_or_never().flatten().map(text));
        assert_eq!(read.collect::<Vec<_>>(), ["early", "said", "last"]);
    }

    #[test]
    fn an_edit_replaces_the_queued_one_and_the_end_always_gets_in() {
        let streams = streams(2);
        let mut mailbox = streams.open(&request("r")).unwrap();
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
