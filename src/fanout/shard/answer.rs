//! Answers: sessions whose frames become the records of an OpenAI stream at the moment that they are written.
//!
//! Until then they wait as frames, by the rules of their class: a reader that is behind gets one long delta instead of
//! many short ones. All that waits becomes one HTTP chunk.

use crate::fanout::shard::Shard;
use crate::fanout::shard::frames::{Handle, Local, Wire};
use crate::fanout::shard::queue::Entry;
use crate::id::RequestId;
use crate::proto::completion::{Completion, Failure};
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Frame, Kind, Moment};
use crate::proto::sse;

/// Room that the scratch keeps from one translation to the next.
const SCRATCH_BYTES_MAX: usize = 64 << 10;

/// What the reader of an answer is sent, and of which stream it is.
#[derive(Debug)]
pub struct Answer {
    /// Its stream.
    pub request: RequestId,
    /// What makes its records.
    pub completion: Completion,
}

/// What a translation works with; kept from one to the next.
#[derive(Default)]
pub(super) struct Translation {
    entries: Vec<Entry>,
    handles: Vec<Handle>,
    text: Vec<u8>,
}

impl Shard {
    /// Turns the frames that wait for an answer's reader into bytes. False if nothing waits then.
    pub(super) fn translate(&mut self, slot: u32) -> bool {
        let session = self.slab.get_mut(slot);
        let is_translated = session.queue.iter().all(|entry| self.frames.get(entry.handle).is_bytes());
        let answer = if is_translated { None } else { session.answer.take() };
        if let Some(mut answer) = answer {
            let mut work = std::mem::take(&mut self.translation);
            session.queue.drain(&mut self.pool, |entry| work.entries.push(entry));
            self.queued.frames -= work.entries.len();
            self.queued.bytes -= session.queue_bytes;
            let mut accepted = None;
            for entry in work.entries.drain(..) {
                if let Local::Frame(frame) = self.frames.get(entry.handle) {
                    accepted = accepted.or(self.frames.accepted(entry.handle));
                    answer.completion.handle(frame, &mut work.text);
                    self.frames.release(entry.handle);
                } else {
                    work.handles.extend(self.chunk(&mut work.text, accepted.take()));
                    work.handles.push(entry.handle);
                }
            }
            work.handles.extend(self.chunk(&mut work.text, accepted));
            self.requeue(slot, &work.handles);
            work.handles.clear();
            work.text.shrink_to(SCRATCH_BYTES_MAX);
            self.translation = work;
            self.slab.get_mut(slot).answer = Some(answer);
        }
        !self.slab.get(slot).queue.is_empty()
    }

    /// Fills an empty queue with bytes of the wire, each held once already.
    fn requeue(&mut self, slot: u32, handles: &[Handle]) {
        let session = self.slab.get_mut(slot);
        let mut bytes = 0;
        for handle in handles {
            bytes += self.frames.get(*handle).wire_bytes(Wire::Completion);
            session.queue.push(Entry { handle: *handle, tag: 0 }, &mut self.pool);
        }
        session.queue_bytes = bytes - session.written;
        self.queued.frames += handles.len();
        self.queued.bytes += session.queue_bytes;
    }

    /// Takes what was written into a frame table's entry of its own, as one HTTP chunk: as old as the oldest frame in it.
    fn chunk(&mut self, text: &mut Vec<u8>, accepted: Option<Moment>) -> Option<Handle> {
        let chunk = sse::chunk(text);
        text.clear();
        let chunk = (!chunk.is_empty()).then(|| Local::Bytes(chunk.into_boxed_slice()));
        chunk.map(|chunk| self.frames.insert_accepted(chunk, accepted))
    }

    /// Memory that a session is the reason for, beside its place in the slab.
    pub(super) fn weight(&self, slot: u32) -> usize {
        let session = self.slab.get(slot);
        session.queue_bytes + session.answer.as_ref().map_or(0, |answer| answer.completion.held_bytes())
    }

    /// What an answer's reader gets last: the end of the response, and before it why, if it is not the answer's own end.
    pub(super) fn last_words(&mut self, slot: u32, ending: Disconnect) -> Box<[u8]> {
        let mut text = Vec::new();
        let failure = match ending {
            Disconnect::Normal => None,
            Disconnect::SlowConsumer | Disconnect::OverBudget => Some(Failure::SlowConsumer),
            Disconnect::ServiceRestart => Some(Failure::Draining),
            _ => Some(Failure::Internal),
        };
        if let (Some(answer), Some(failure)) = (&mut self.slab.get_mut(slot).answer, failure) {
            answer.completion.fail(failure, &mut text);
        }
        let mut last = sse::chunk(&text);
        last.extend_from_slice(sse::LAST_CHUNK);
        last.into_boxed_slice()
    }

    /// Whether nothing follows this frame for the session in `slot`.
    pub(super) fn is_last_of_answer(&self, slot: u32, frame: &Frame) -> bool {
        frame.kind() == Kind::End && self.slab.get(slot).wire == Wire::Completion
    }
}
