//! What comes in from a session's connection: RFC 6455 by the resumable reader, text to whoever understands it.

use std::ops::ControlFlow;

use crate::fanout::session::SessionRef;
use crate::fanout::shard::Shard;
use crate::fanout::shard::frames::Wire;
use crate::fanout::shard::slab::State;
use crate::id::RoomName;
use crate::proto::disconnect::Disconnect;
use crate::proto::event::{ErrorCode, Notice};
use crate::proto::frame::Frame;
use crate::proto::websocket::{self, Incoming, Partial, ReadLimits};

/// A compressed message counts as a bad frame if it inflates to more than this many bytes, and to more than
/// [`INFLATED_RATIO_MAX`] times its own: no text and no picture does, but a blank file may.
pub(super) const INFLATED_BYTES_MIN: usize = 4 << 10;
const INFLATED_RATIO_MAX: usize = 100;

/// Understands what clients say. It may neither block nor wait: it runs on the shard's thread.
pub trait Inbound {
    /// One text message of one session, valid UTF-8, to be parsed in place.
    fn text(&mut self, session: &SessionRef, text: &mut [u8]) -> Reaction;

    /// One binary message of one session. Whoever does not take any leaves this as it is: the session is ended with
    /// 1003 (RFC 6455 §7.4.1).
    fn binary(&mut self, _session: &SessionRef, _bytes: &mut [u8]) -> Reaction {
        Reaction::End(Disconnect::UnsupportedData)
    }

    /// The answer to a text that came too soon after others. It is not to be understood, but for who asked.
    fn limited(&mut self, text: &mut [u8]) -> Frame {
        let _ = text;
        limited_frame(None)
    }
}

/// What a tab is told that sends too much: the answer to what carried `client_id`.
#[must_use]
pub fn limited_frame(client_id: Option<&str>) -> Frame {
    let message = "more than one tab may send in the time; nothing was accepted, try again more slowly";
    Frame::notice(&Notice::Error { code: ErrorCode::RateLimited, message, client_id })
}

/// What the shard is to do about a message.
#[derive(Debug, Clone)]
pub enum Reaction {
    /// Nothing here: it was handed on, or needs no answer.
    Nothing,
    /// Answer the tab.
    Reply(Frame),
    /// Answer the tab; if it negotiated permessage-deflate, by a compressed frame, even if that is no smaller. It is
    /// compressed on the shard's thread: 100 µs for 16 KiB.
    ReplyDeflated(Frame),
    /// Answer the tab, and count it as a bad frame: too many of them end the session with 1008.
    Bad(Frame),
    /// End the session, after what was answered before; what else it sends is not read.
    End(Disconnect),
    /// Join a room, then answer with `ack`; with `full` if the session is in as many rooms as it may be.
    Join {
        /// Which.
        room: RoomName,
        /// The answer once broadcasts reach the tab.
        ack: Option<Frame>,
        /// The answer if there is one room too many.
        full: Frame,
    },
    /// Leave a room, then answer with `ack`.
    Leave {
        /// Which.
        room: RoomName,
        /// The answer once broadcasts do not reach the tab any more.
        ack: Option<Frame>,
    },
}

/// What kind of message was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Text,
    Binary,
}

fn incomplete_bytes(partial: Option<&Partial>) -> usize {
    partial.map_or(0, Partial::bytes)
}

impl Shard {
    /// Bytes that were read from the connection of `slot`; they are unmasked in place. Any of them is a sign of life.
    pub fn handle_readable(&mut self, slot: u32, input: &mut [u8], inbound: &mut dyn Inbound) {
        self.metrics.read_bytes.add(input.len() as u64);
        let session = self.slab.get_mut(slot);
        session.awaiting = false;
        // After a violation nobody listens.
        if session.deaf || matches!(session.state, State::Vacant | State::Ended) {
            return;
        }
        if !session.wire.is_websocket() {
            return self.ignore(slot, input.len());
        }
        let mut partial = session.partial.take();
        let before = incomplete_bytes(partial.as_deref());
        let deflates = session.wire.window().is_some();
        let limits = ReadLimits { message_bytes_max: self.limits.message_bytes_max, deflates };
        let mut sink = |incoming: Incoming<'_>| self.handle_incoming(slot, incoming, inbound);
        let result = websocket::read(&mut partial, input, &limits, &mut sink);
        let session = self.slab.get_mut(slot);
        match result {
            Ok(()) if session.deaf || session.state == State::Ended => self.hub.inbound().release(before),
            Ok(()) if self.hub.inbound().resize(before, incomplete_bytes(partial.as_deref())) => {
                session.partial = partial;
            }
            Ok(()) => self.cut_deaf(slot),
            Err(error) => {
                self.hub.inbound().release(before);
                self.end_deaf(slot, error.disconnect());
            }
        }
    }

    /// A whole text of the client of `slot` that came over no connection of ours, and is no longer than it may be: as if
    /// it had, and a sign of life.
    pub(crate) fn handle_text(&mut self, slot: u32, text: &mut [u8], inbound: &mut dyn Inbound) {
        self.metrics.read_bytes.add(text.len() as u64);
        let session = self.slab.get_mut(slot);
        session.awaiting = false;
        if session.deaf || session.state != State::Open {
            return;
        }
        self.hear(slot, Heard::Text, text, inbound);
    }

    /// The driver keeps `now` bytes of what came over the connection of `slot` and is not whole yet, after `before`. They
    /// count as an incomplete message. False if there is no room for more of them: nothing is kept, and the session is
    /// told and ended.
    #[must_use]
    pub fn handle_incomplete(&mut self, slot: u32, before: usize, now: usize) -> bool {
        let has_room = self.hub.inbound().resize(before, now);
        if !has_room {
            self.cut_deaf(slot);
        }
        has_room
    }

    /// Drops what is incomplete of a session's messages.
    pub(super) fn drop_incomplete(&mut self, slot: u32) {
        let partial = self.slab.get_mut(slot).partial.take();
        self.hub.inbound().release(incomplete_bytes(partial.as_deref()));
    }

    /// The peer sends nothing more.
    pub fn handle_end_of_input(&mut self, slot: u32) {
        let ending = match self.slab.get(slot).wire {
            // Readers of streams leave without a word.
            Wire::EventStream | Wire::Completion | Wire::Frames => Disconnect::Normal,
            _ => Disconnect::ConnectionLost,
        };
        self.handle_lost(slot, ending);
    }

    fn handle_incoming(&mut self, slot: u32, incoming: Incoming<'_>, inbound: &mut dyn Inbound) -> ControlFlow<()> {
        if let Incoming::Close(_) = incoming {
            self.handle_close(slot);
            return ControlFlow::Break(());
        }
        if self.slab.get(slot).state != State::Open {
            return ControlFlow::Continue(());
        }
        match incoming {
            Incoming::Text(text) => self.hear(slot, Heard::Text, text, inbound),
            Incoming::Binary(bytes) => self.hear(slot, Heard::Binary, bytes, inbound),
            Incoming::Deflated(payload) => self.inflate(slot, Heard::Text, payload, inbound),
            Incoming::DeflatedBinary(payload) => self.inflate(slot, Heard::Binary, payload, inbound),
            Incoming::Ping(payload) if self.tolerate(slot, payload.len()) => self.send(slot, Frame::pong(payload)),
            Incoming::Ping(_) | Incoming::Close(_) => {}
            Incoming::Pong(payload) => drop(self.tolerate(slot, payload.len())),
            Incoming::EmptyFragment => drop(self.tolerate(slot, 0)),
        }
        if self.slab.get(slot).deaf { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// What the client of a stream sends after its request means nothing, but it costs the reading.
    fn ignore(&mut self, slot: u32, bytes: usize) {
        if self.slab.get(slot).state == State::Open && !self.allows(slot, 0, bytes) {
            self.metrics.limited_frames.increment();
            self.end_deaf(slot, Disconnect::PolicyViolation);
        }
    }

    /// Whether the session may send so much now, after what it has sent lately.
    fn allows(&mut self, slot: u32, frames: u32, bytes: usize) -> bool {
        let tick = self.timers.tick();
        self.slab.get_mut(slot).allowance.take(tick, frames, bytes, &self.limits)
    }

    /// Whether a frame that is no text is within the limits; too many that are not end the session.
    fn tolerate(&mut self, slot: u32, bytes: usize) -> bool {
        let is_allowed = self.allows(slot, 1, bytes);
        if !is_allowed {
            self.metrics.limited_frames.increment();
            if !self.tolerate_bad_frame(slot) {
                self.end_deaf(slot, Disconnect::PolicyViolation);
            }
        }
        is_allowed
    }

    fn inflate(&mut self, slot: u32, heard: Heard, payload: &[u8], inbound: &mut dyn Inbound) {
        let mut inflater = std::mem::take(&mut self.inflater);
        let bytes_max = self.limits.message_bytes_max;
        let sink = |message: &mut [u8]| {
            // It costs what it inflates to, and hardly anything to send: a few of those are borne.
            let is_bloated = message.len() > INFLATED_BYTES_MIN && message.len() / INFLATED_RATIO_MAX > payload.len();
            if is_bloated && !self.tolerate_bad_frame(slot) {
                return self.end_deaf(slot, Disconnect::PolicyViolation);
            }
            self.hear(slot, heard, message, inbound);
        };
        let result = match heard {
            Heard::Text => inflater.inflate(payload, bytes_max, sink),
            Heard::Binary => inflater.inflate_binary(payload, bytes_max, sink),
        };
        self.inflater = inflater;
        if let Err(error) = result {
            self.end_deaf(slot, error.disconnect());
        }
    }

    fn hear(&mut self, slot: u32, heard: Heard, message: &mut [u8], inbound: &mut dyn Inbound) {
        let Some(session) = self.session(slot) else { return };
        let is_allowed = self.allows(slot, 1, message.len());
        let reaction = match heard {
            Heard::Text if is_allowed => inbound.text(&session, message),
            Heard::Binary if is_allowed => inbound.binary(&session, message),
            Heard::Text => Reaction::Bad(inbound.limited(message)),
            Heard::Binary => Reaction::Bad(limited_frame(None)),
        };
        if !is_allowed {
            self.metrics.limited_frames.increment();
        }
        self.react(slot, reaction);
    }

    fn react(&mut self, slot: u32, reaction: Reaction) {
        match reaction {
            Reaction::Nothing => {}
            Reaction::Reply(frame) => self.send(slot, frame),
            Reaction::ReplyDeflated(frame) => self.send_deflated(slot, frame),
            Reaction::Bad(frame) if self.tolerate_bad_frame(slot) => self.send(slot, frame),
            Reaction::Bad(_) => self.end_deaf(slot, Disconnect::PolicyViolation),
            Reaction::End(ending) => self.end_deaf(slot, ending),
            Reaction::Join { room, ack, full } if self.join(slot, &room) => {
                ack.into_iter().for_each(|frame| self.send(slot, frame));
                self.tell_returned_of_gap(slot);
                drop(full);
            }
            Reaction::Join { full, .. } => self.send(slot, full),
            Reaction::Leave { room, ack } => {
                self.leave(slot, &room);
                ack.into_iter().for_each(|frame| self.send(slot, frame));
            }
        }
    }

    fn send_deflated(&mut self, slot: u32, mut frame: Frame) {
        if let Some(window) = self.slab.get(slot).wire.window() {
            self.hub.deflate_for(window, &mut frame);
        }
        self.send(slot, frame);
    }

    /// The peer broke a rule, or one too many: it is told which (RFC 6455 §7.1.7). What it was answered before goes out
    /// first; what else it sends is not read.
    fn end_deaf(&mut self, slot: u32, ending: Disconnect) {
        self.slab.get_mut(slot).deaf = true;
        self.end(slot, ending);
    }

    /// The peer closes: what is queued is not wanted any more, but for our own close (RFC 6455 §5.5.1).
    fn handle_close(&mut self, slot: u32) {
        let session = self.slab.get_mut(slot);
        session.peer_closed = true;
        session.deaf = true;
        match session.state {
            State::Open => self.cut(slot, Disconnect::Normal),
            // Our close went out before: the handshake is complete.
            State::Closing if session.queue.is_empty() => self.finish(slot),
            State::Closing | State::Vacant | State::Ended => {}
        }
    }

    /// There is no memory for what the peer has begun to send: nor for what waits for it.
    fn cut_deaf(&mut self, slot: u32) {
        self.slab.get_mut(slot).deaf = true;
        if self.slab.get(slot).state == State::Open {
            self.cut(slot, Disconnect::OverBudget);
        }
    }
}
