//! The shard's own table of frames: inside a shard a frame is a number, so that a delivery touches no shared counter.

use crate::proto::deflate::Window;
use crate::proto::frame::{Class, Frame, Kind, Moment};

/// How a session's bytes are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// RFC 6455 frames.
    WebSocket,
    /// The same with permessage-deflate: what has a compressed form is written in that, what has none as it is.
    DeflatedWebSocket,
    /// The same for a client that reads with a smaller window: what has a form that fits in is written in that.
    NarrowWebSocket(Window),
    /// An event stream in HTTP/1.1 chunks.
    EventStream,
    /// The chunks of an OpenAI answer, in HTTP/1.1 chunks: frames become bytes when they are written.
    Completion,
    /// Whole frames, to a reader in this process.
    Frames,
}

impl Wire {
    /// Whether both sides speak RFC 6455.
    #[must_use]
    #[inline]
    pub const fn is_websocket(self) -> bool {
        matches!(self, Self::WebSocket | Self::DeflatedWebSocket | Self::NarrowWebSocket(_))
    }

    /// RFC 6455, with permessage-deflate if a window was negotiated.
    #[must_use]
    pub fn websocket(window: Option<Window>) -> Self {
        match window {
            None => Self::WebSocket,
            Some(Window::FULL) => Self::DeflatedWebSocket,
            Some(window) => Self::NarrowWebSocket(window),
        }
    }

    /// The window that was negotiated; None without permessage-deflate.
    #[must_use]
    pub const fn window(self) -> Option<Window> {
        match self {
            Self::DeflatedWebSocket => Some(Window::FULL),
            Self::NarrowWebSocket(window) => Some(window),
            Self::WebSocket | Self::EventStream | Self::Completion | Self::Frames => None,
        }
    }
}

/// A frame of this shard's table. It is counted: who keeps one holds it, who drops one releases it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Handle(u32);

const _: () = assert!(size_of::<Handle>() == 4, "half of what a frame costs in a queue");

/// What the table holds: a frame that other shards may hold as well, or bytes of this shard's own (parts of an
/// event stream that are no event).
pub(crate) enum Local {
    Frame(Frame),
    Bytes(Box<[u8]>),
}

impl Local {
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Frame(frame) => frame.class(),
            Self::Bytes(_) => Class::Control,
        }
    }

    pub(crate) fn key(&self) -> u128 {
        match self {
            Self::Frame(frame) => frame.key(),
            Self::Bytes(_) => 0,
        }
    }

    /// Whether it says what `newer` says anew: the same kind of frame about the same thing.
    pub(crate) fn is_older(&self, newer: &Self) -> bool {
        match (self, newer) {
            (Self::Frame(frame), Self::Frame(newer)) => frame.kind() == newer.kind() && frame.key() == newer.key(),
            _ => false,
        }
    }

    /// Whether it is the message that `edit` is about.
    pub(crate) fn is_message_of(&self, edit: &Self) -> bool {
        match (self, edit) {
            (Self::Frame(frame), Self::Frame(edit)) => frame.is_message_of(edit),
            _ => false,
        }
    }

    /// Whether it is of this wire's own bytes already.
    pub(crate) fn is_bytes(&self) -> bool {
        matches!(self, Self::Bytes(_))
    }

    /// Memory that is held here and is no frame's.
    fn own_bytes(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Frame(_) => 0,
        }
    }

    pub(crate) fn is_typing(&self) -> bool {
        matches!(self, Self::Frame(frame) if frame.kind() == Kind::Typing)
    }

    /// The slices to write after each other, empty ones left out; nothing but empty ones if it has no form on that wire.
    #[inline]
    pub(crate) fn parts(&self, wire: Wire) -> [&[u8]; 2] {
        match (self, wire) {
            // What a whole frame weighs; it is never written so.
            (Self::Frame(frame), Wire::WebSocket | Wire::Frames) => [frame.websocket(), &[]],
            (Self::Frame(frame), Wire::DeflatedWebSocket) => [frame.deflated().unwrap_or(frame.websocket()), &[]],
            (Self::Frame(frame), Wire::NarrowWebSocket(window)) => {
                [frame.deflated_within(window).unwrap_or(frame.websocket()), &[]]
            }
            (Self::Frame(frame), Wire::EventStream) => match frame.event_stream() {
                Some(form) => [form.prefix, form.body],
                None => [&[], &[]],
            },
            // What it weighs until it is translated; it is never written so.
            (Self::Frame(frame), Wire::Completion) => [frame.json(), &[]],
            (Self::Bytes(bytes), Wire::EventStream | Wire::Completion | Wire::Frames) => [bytes, &[]],
            (Self::Bytes(_), Wire::WebSocket | Wire::DeflatedWebSocket | Wire::NarrowWebSocket(_)) => [&[], &[]],
        }
    }

    /// Bytes on that wire; 0 if it has no form there.
    #[inline]
    pub(crate) fn wire_bytes(&self, wire: Wire) -> usize {
        let [first, second] = self.parts(wire);
        first.len() + second.len()
    }
}

struct Entry {
    local: Option<Local>,
    holders: u32,
    accepted: Option<Moment>,
}

const _: () = assert!(size_of::<Entry>() <= 32, "what a frame costs a shard, whatever the number of queues");

/// Frames by number, with a plain count each.
#[derive(Default)]
pub(crate) struct Frames {
    entries: Vec<Entry>,
    free: Vec<u32>,
    inserted: u64,
    /// Bytes of the shard's own that are held: no other count sees them.
    own_bytes: usize,
}

impl Frames {
    /// Puts one in, held once by the caller. Nobody waits for it: it is not timed.
    pub(crate) fn insert(&mut self, local: Local) -> Handle {
        self.insert_accepted(local, None)
    }

    /// Puts in a frame that was posted, to be timed from when it was accepted.
    pub(crate) fn insert_posted(&mut self, frame: Frame) -> Handle {
        let accepted = frame.accepted();
        self.insert_accepted(Local::Frame(frame), accepted)
    }

    /// Puts in what carries something that was accepted then.
    pub(crate) fn insert_accepted(&mut self, local: Local, accepted: Option<Moment>) -> Handle {
        self.inserted += 1;
        self.own_bytes += local.own_bytes();
        let entry = Entry { local: Some(local), holders: 1, accepted };
        if let Some(number) = self.free.pop() {
            self.entries[number as usize] = entry;
            return Handle(number);
        }
        self.entries.push(entry);
        Handle(u32::try_from(self.entries.len() - 1).unwrap_or(u32::MAX))
    }

    /// How many were ever inserted: as long as it stays, a handle means the same frame.
    pub(crate) fn inserted(&self) -> u64 {
        self.inserted
    }

    /// Bytes of the shard's own that are held.
    pub(crate) fn own_bytes(&self) -> usize {
        self.own_bytes
    }

    #[inline]
    pub(crate) fn hold(&mut self, handle: Handle) {
        self.hold_for(handle, 1);
    }

    /// Holds it for that many holders more.
    #[inline]
    pub(crate) fn hold_for(&mut self, handle: Handle, holders: u32) {
        self.entries[handle.0 as usize].holders += holders;
    }

    #[inline]
    pub(crate) fn release(&mut self, handle: Handle) {
        let entry = &mut self.entries[handle.0 as usize];
        entry.holders -= 1;
        if entry.holders == 0 {
            self.own_bytes -= entry.local.take().map_or(0, |local| local.own_bytes());
            self.free.push(handle.0);
        }
    }

    /// # Panics
    /// If the handle is not held: a fault of the shard.
    #[inline]
    pub(crate) fn get(&self, handle: Handle) -> &Local {
        self.entries[handle.0 as usize].local.as_ref().expect("a held frame is there")
    }

    /// When it was accepted, if it is timed.
    #[inline]
    pub(crate) fn accepted(&self, handle: Handle) -> Option<Moment> {
        self.entries[handle.0 as usize].accepted
    }

    #[cfg(test)]
    pub(crate) fn holders(&self, handle: Handle) -> u32 {
        self.entries[handle.0 as usize].holders
    }

    /// How many are held.
    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}
