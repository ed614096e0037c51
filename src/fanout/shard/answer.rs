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
use crate::proto::frame::{Frame, Kind};
use crate::proto::sse;

/// What the reader of an answer is sent, and of which stream it is.
#[derive(Debug)]
pub struct Answer {
    /// Its stream.
    pub request: RequestId,
    /// What makes its records.
    pub completion: Completion,
}

impl Shard {
    /// Turns the frames that wait for an answer's reader into bytes. False if nothing waits then.
    pub(super) fn translate(&mut self, slot: u32) -> bool {
        let session = self.slab.get_mut(slot);
        let Some(mut answer) = session.answer.take() else { return !session.queue.is_empty() };
        let is_translated = session.queue.iter().all(|entry| self.frames.get(entry.handle).is_bytes());
        if !is_translated {
            let mut entries = Vec::with_capacity(session.queue.len());
            session.queue.drain(&mut self.pool, |entry| entries.push(entry));
            self.queued.frames -= entries.len();
            self.queued.bytes -= session.queue_bytes;
            let mut text = Vec::new();
            let mut handles: Vec<Handle> = Vec::with_capacity(4);
            for entry in entries {
                match self.frames.get(entry.handle) {
                    Local::Frame(frame) => {
                        answer.completion.handle(frame, &mut text);
                        self.frames.release(entry.handle);
                    }
                    Local::Bytes(_) => {
                        handles.extend(self.chunk(&mut text));
                        handles.push(entry.handle);
                    }
                }
            }
            handles.extend(self.chunk(&mut text));
            let mut bytes = 0;
            let session = self.slab.get_mut(slot);
            for handle in &handles {
                bytes += self.frames.get(*handle).wire_bytes(Wire::Completion);
                session.queue.push(Entry { handle: *handle, tag: 0 }, &mut self.pool);
            }
            session.queue_bytes = bytes - session.written;
            self.queued.frames += handles.len();
            self.queued.bytes += session.queue_bytes;
        }
        let session = self.slab.get_mut(slot);
        session.answer = Some(answer);
        !session.queue.is_empty()
    }

    /// Takes what was written into a frame table's entry of its own, as one HTTP chunk.
    fn chunk(&mut self, text: &mut Vec<u8>) -> Option<Handle> {
        let chunk = sse::chunk(text);
        text.clear();
        (!chunk.is_empty()).then(|| self.frames.insert(Local::Bytes(chunk.into_boxed_slice())))
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
