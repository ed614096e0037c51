//! What is kept of a connection's bytes while something is incomplete.

use super::{HEAD_BYTES_MAX, Head, Opcode, ReadError, unmask};

/// What is incomplete: a header, a frame, a fragmented message, or a message with a control frame inside.
///
/// It holds at most the limit of a message, 14 bytes of a header and 125 of a control frame, beside its own size.
/// Empty fragments add nothing.
#[derive(Debug, Default)]
pub struct Partial {
    head: [u8; HEAD_BYTES_MAX],
    /// How much of `head` was received; 0 once it has become `frame`.
    pub(super) head_bytes: u8,
    pub(super) frame: Option<Unfinished>,
    /// The payload so far of an unfinished control frame.
    pub(super) control: Vec<u8>,
    /// The fragments so far.
    pub(super) message: Option<Message>,
}

impl Partial {
    /// The memory that it holds, in bytes, itself included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let message = self.message.as_ref().map_or(0, |message| message.bytes.capacity());
        size_of::<Self>() + self.control.capacity() + message
    }

    pub(super) const fn is_idle(&self) -> bool {
        self.head_bytes == 0 && self.frame.is_none() && self.message.is_none()
    }

    /// The header so far.
    pub(super) fn head(&self) -> &[u8] {
        &self.head[..usize::from(self.head_bytes)]
    }

    /// Takes from `input` what may belong to the header, as few bytes as make its length known, and says how many.
    pub(super) fn fill_head(&mut self, input: &[u8]) -> usize {
        let mut consumed = 0;
        while usize::from(self.head_bytes) < self.head_bytes_wanted() {
            let Some(&byte) = input.get(consumed) else { break };
            self.head[usize::from(self.head_bytes)] = byte;
            self.head_bytes += 1;
            consumed += 1;
        }
        consumed
    }

    const fn head_bytes_wanted(&self) -> usize {
        if self.head_bytes < 2 {
            return 2;
        }
        match self.head[1] & 0x7f {
            126 => 8,
            127 => 14,
            _ => 6,
        }
    }

    /// The header is complete; what comes next is payload.
    pub(super) fn begin(&mut self, head: &Head) {
        self.head_bytes = 0;
        self.frame = Some(Unfinished::new(head));
        if head.opcode.is_control() {
            // At most 125 bytes: the header was checked.
            self.control = Vec::with_capacity(head.payload_bytes);
        }
    }

    pub(super) fn missing_bytes(&self) -> usize {
        self.frame.map_or(0, |frame| frame.missing_bytes)
    }
}

/// A frame whose header is known and whose payload is incomplete.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unfinished {
    pub(super) opcode: Opcode,
    pub(super) kind: MessageKind,
    pub(super) is_last: bool,
    /// The mask, turned so that its first byte is for the next byte of the payload.
    mask: [u8; 4],
    pub(super) missing_bytes: usize,
}

impl Unfinished {
    const fn new(head: &Head) -> Self {
        let (opcode, is_last, kind) = (head.opcode, head.is_last, MessageKind::of(head));
        Self { opcode, kind, is_last, mask: head.mask, missing_bytes: head.payload_bytes }
    }

    /// Takes the mask off the next `payload`.
    pub(super) fn unmask(&mut self, payload: &mut [u8]) {
        unmask(payload, self.mask);
        self.mask.rotate_left(payload.len() % 4);
        self.missing_bytes -= payload.len();
    }
}

/// How a message is delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MessageKind {
    /// Must be UTF-8.
    Text,
    /// Anything.
    Binary,
    /// A text that is compressed.
    Deflated,
    /// A binary message that is compressed.
    DeflatedBinary,
}

impl MessageKind {
    pub(super) const fn of(head: &Head) -> Self {
        match head.opcode {
            Opcode::Text if head.is_deflated => Self::Deflated,
            Opcode::Text => Self::Text,
            _ if head.is_deflated => Self::DeflatedBinary,
            _ => Self::Binary,
        }
    }
}

/// The unfinished message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: MessageKind,
    pub(super) bytes: Vec<u8>,
    /// How much of `bytes` is known to be UTF-8: all but the start of a character.
    checked_bytes: usize,
}

impl Message {
    pub(super) const fn new(kind: MessageKind) -> Self {
        Self { kind, bytes: Vec::new(), checked_bytes: 0 }
    }

    /// Takes more. The header has made sure that all of it is at most `bytes_max`.
    pub(super) fn append(&mut self, payload: &[u8], bytes_max: usize) -> Result<(), ReadError> {
        let needed = self.bytes.len() + payload.len();
        if needed > self.bytes.capacity() {
            // Twice what was received, but never past the limit.
            let room = needed.max(self.bytes.capacity() * 2).min(bytes_max.max(needed));
            self.bytes.reserve_exact(room - self.bytes.len());
        }
        self.bytes.extend_from_slice(payload);
        if self.kind == MessageKind::Text { self.check() } else { Ok(()) }
    }

    /// Fails as soon as the bytes so far cannot become UTF-8, whatever follows.
    fn check(&mut self) -> Result<(), ReadError> {
        match simdutf8::compat::from_utf8(&self.bytes[self.checked_bytes..]) {
            Ok(_) => self.checked_bytes = self.bytes.len(),
            Err(error) if error.error_len().is_none() => self.checked_bytes += error.valid_up_to(),
            Err(_) => return Err(ReadError::NotUtf8),
        }
        Ok(())
    }

    /// A text must not end inside a character.
    pub(super) const fn finish(&self) -> Result<(), ReadError> {
        match self.kind {
            MessageKind::Text if self.checked_bytes < self.bytes.len() => Err(ReadError::NotUtf8),
            _ => Ok(()),
        }
    }
}
