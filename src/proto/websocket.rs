//! The server's reader of RFC 6455: strict, resumable at every byte, and without memory while nothing is incomplete.
//!
//! What is complete in the caller's bytes is delivered from there. Only what is incomplete is kept, in a [`Partial`]
//! that grows with what was received and not with what a header claims.

mod partial;

use std::ops::ControlFlow;

pub use self::partial::Partial;
use self::partial::{Message, MessageKind};
use crate::proto::disconnect::Disconnect;

/// The most bytes of a control frame's payload (RFC 6455 §5.5).
const CONTROL_BYTES_MAX: usize = 125;

/// The longest header of a client: two bytes, eight of length, four of mask (RFC 6455 §5.2).
const HEAD_BYTES_MAX: usize = 14;

/// The first reserved bit: on a message's first frame, that the message is compressed (RFC 7692 §6).
const RSV1: u8 = 0x40;

/// What a client may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadLimits {
    /// Bytes of one message, all fragments together. What an unfinished message may hold in memory at most.
    pub message_bytes_max: usize,
    /// Whether permessage-deflate was negotiated: the first frame of a message may then have RSV1, which says that the
    /// message is compressed (RFC 7692 §6.1). The limit above is then for the compressed bytes.
    pub deflates: bool,
}

/// One message of a client, one control frame, or a part of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// Unmasked and valid UTF-8. The bytes may be changed, for example parsed in place.
    Text(&'a mut [u8]),
    /// Unmasked. The bytes may be changed.
    Binary(&'a mut [u8]),
    /// A compressed text, unmasked and unchecked: see [`Inflater`](crate::proto::deflate::Inflater).
    Deflated(&'a [u8]),
    /// The same of a binary message.
    DeflatedBinary(&'a [u8]),
    /// An empty fragment of a message that goes on. No limit of bytes ends a flood of them: it is told, so that they can be
    /// counted.
    EmptyFragment,
    /// To be answered with a pong of the same payload.
    Ping(&'a [u8]),
    /// The answer to a ping, or unasked for.
    Pong(&'a [u8]),
    /// The last that is read: code and reason, if the client gave any.
    Close(Option<(u16, &'a str)>),
}

/// How a client broke the protocol, or a limit. The connection must be failed (RFC 6455 §7.1.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A reserved bit that no extension allows (§5.2).
    #[error("a reserved bit is set")]
    ReservedBit,
    /// An opcode without a meaning (§5.2).
    #[error("opcode {0:#x} has no meaning")]
    Opcode(u8),
    /// A client must mask (§5.1).
    #[error("the frame is not masked")]
    NotMasked,
    /// The shortest form of a length must be used (§5.2).
    #[error("the length is not in its shortest form")]
    LengthNotMinimal,
    /// A length has 63 bits (§5.2).
    #[error("the length has its top bit set")]
    LengthTopBit,
    /// A control frame has at most 125 bytes (§5.5).
    #[error("a control frame is longer than 125 bytes")]
    ControlTooLong,
    /// A control frame may not be fragmented (§5.5).
    #[error("a control frame is fragmented")]
    ControlFragmented,
    /// A continuation without anything to continue (§5.4).
    #[error("a continuation continues nothing")]
    NothingToContinue,
    /// A new message before the last fragment of another (§5.4).
    #[error("a message begins before another has ended")]
    NotContinued,
    /// A close frame's payload of one byte (§5.5.1).
    #[error("a close frame has half a code")]
    CloseTooShort,
    /// A close code that may not be sent (§7.4).
    #[error("close code {0} may not be sent")]
    CloseCode(u16),
    /// Text, or a close reason, that is not UTF-8 (§8.1).
    #[error("the text is not UTF-8")]
    NotUtf8,
    /// A compressed message that does not inflate, or ends too early (RFC 7692 §7.2.2).
    #[error("the message is not compressed as it says")]
    NotDeflate,
    /// A message over [`ReadLimits::message_bytes_max`], as it comes or inflated.
    #[error("the message is too big")]
    MessageTooBig,
}

impl ReadError {
    /// What the session ends with: 1007, 1009 or 1002.
    #[must_use]
    pub const fn disconnect(&self) -> Disconnect {
        match self {
            Self::NotUtf8 | Self::NotDeflate => Disconnect::InvalidPayload,
            Self::MessageTooBig => Disconnect::MessageTooBig,
            _ => Disconnect::ProtocolError,
        }
    }
}

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opcode {
    Continuation,
    Text,
    Binary,
    Close,
    Ping,
    Pong,
}

impl Opcode {
    const fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy)]
struct Head {
    opcode: Opcode,
    is_last: bool,
    is_deflated: bool,
    mask: [u8; 4],
    payload_bytes: usize,
    /// Of the header itself.
    bytes: usize,
}

/// Consumes all of `input`, unmasking it in place, and calls `sink` for each message.
///
/// What is incomplete is kept in `partial`, which is `None` again as soon as nothing is. When `sink` breaks, and after
/// a close frame, the rest of `input` is dropped.
///
/// ```
/// use std::ops::ControlFlow;
/// use tabcast::proto::websocket::{Incoming, ReadLimits, read};
/// let limits = ReadLimits { message_bytes_max: 1 << 16, deflates: false };
/// let (mut partial, mut texts) = (None, Vec::new());
/// let mut sink = |message: Incoming<'_>| {
///     if let Incoming::Text(text) = message {
///         texts.push(String::from_utf8_lossy(text).into_owned());
///     }
///     ControlFlow::Continue(())
/// };
/// // Masked with zeros, and cut in the middle.
/// read(&mut partial, &mut *b"\x81\x85\0\0\0\0he".to_vec(), &limits, &mut sink)?;
/// read(&mut partial, &mut *b"llo".to_vec(), &limits, &mut sink)?;
/// assert_eq!(texts, ["hello"]);
/// assert!(partial.is_none());
/// # Ok::<(), tabcast::proto::websocket::ReadError>(())
/// ```
///
/// # Errors
/// The first breach of the protocol or of a limit, as soon as it is certain: an invalid sequence in the middle of a
/// text that is not yet complete, and a message that a header makes too big, count at once. Messages before it were
/// delivered. `partial` is `None` then, and the connection must not be read any further.
pub fn read(
    partial: &mut Option<Box<Partial>>,
    input: &mut [u8],
    limits: &ReadLimits,
    sink: &mut dyn FnMut(Incoming<'_>) -> ControlFlow<()>,
) -> Result<(), ReadError> {
    let result = Reader { limits, sink }.read(partial, input);
    if result.is_err() || partial.as_ref().is_some_and(|partial| partial.is_idle()) {
        *partial = None;
    }
    result.map(drop)
}

struct Reader<'a> {
    limits: &'a ReadLimits,
    sink: &'a mut dyn FnMut(Incoming<'_>) -> ControlFlow<()>,
}

impl Reader<'_> {
    fn read(&mut self, partial: &mut Option<Box<Partial>>, mut input: &mut [u8]) -> Result<ControlFlow<()>, ReadError> {
        while !input.is_empty() {
            let consumed;
            let flow = match partial {
                Some(unfinished) if unfinished.frame.is_some() => {
                    consumed = unfinished.missing_bytes().min(input.len());
                    self.go_on(unfinished, &mut input[..consumed])?
                }
                Some(unfinished) if unfinished.head_bytes > 0 => {
                    consumed = unfinished.fill_head(input);
                    self.begin(unfinished)?
                }
                _ => {
                    let Some(head) = self.head(input, partial.as_deref())? else {
                        partial.get_or_insert_default().fill_head(input);
                        return Ok(ControlFlow::Continue(()));
                    };
                    let (_, rest) = input.split_at_mut(head.bytes);
                    let payload_bytes = head.payload_bytes.min(rest.len());
                    consumed = head.bytes + payload_bytes;
                    self.frame(&head, partial, &mut rest[..payload_bytes])?
                }
            };
            if flow.is_break() {
                // What is left of a message must not meet bytes that follow the dropped ones.
                *partial = None;
                return Ok(flow);
            }
            input = &mut input[consumed..];
        }
        Ok(ControlFlow::Continue(()))
    }

    /// A frame whose header stands in the input; `payload` is what is there of its payload.
    fn frame(
        &mut self,
        head: &Head,
        partial: &mut Option<Box<Partial>>,
        payload: &mut [u8],
    ) -> Result<ControlFlow<()>, ReadError> {
        let is_message = head.opcode != Opcode::Continuation && head.is_last;
        if payload.len() == head.payload_bytes && is_message {
            unmask(payload, head.mask);
            return if head.opcode.is_control() {
                self.control(head.opcode, payload)
            } else {
                let kind = MessageKind::of(head);
                if kind == MessageKind::Text && simdutf8::basic::from_utf8(payload).is_err() {
                    return Err(ReadError::NotUtf8);
                }
                Ok(self.deliver(kind, payload))
            };
        }
        let partial = partial.get_or_insert_default();
        partial.begin(head);
        self.go_on(partial, payload)
    }

    /// Takes more of the payload of the unfinished frame, and delivers what is complete now.
    fn go_on(&mut self, partial: &mut Partial, payload: &mut [u8]) -> Result<ControlFlow<()>, ReadError> {
        let Some(frame) = &mut partial.frame else { return Ok(ControlFlow::Continue(())) };
        frame.unmask(payload);
        let frame = *frame;
        if frame.opcode.is_control() {
            partial.control.extend_from_slice(payload);
        } else {
            let message = partial.message.get_or_insert_with(|| Message::new(frame.kind));
            message.append(payload, self.limits.message_bytes_max)?;
        }
        if frame.missing_bytes > 0 {
            return Ok(ControlFlow::Continue(()));
        }
        partial.frame = None;
        if frame.opcode.is_control() {
            let payload = std::mem::take(&mut partial.control);
            return self.control(frame.opcode, &payload);
        }
        if !frame.is_last {
            // One with a payload is complete with its last bytes.
            return Ok(if payload.is_empty() {
                (self.sink)(Incoming::EmptyFragment)
            } else {
                ControlFlow::Continue(())
            });
        }
        let Some(mut message) = partial.message.take() else { return Ok(ControlFlow::Continue(())) };
        message.finish()?;
        Ok(self.deliver(message.kind, &mut message.bytes))
    }

    /// Begins the frame whose header was kept, if it is complete now.
    fn begin(&mut self, partial: &mut Partial) -> Result<ControlFlow<()>, ReadError> {
        let Some(head) = self.head(partial.head(), Some(partial))? else { return Ok(ControlFlow::Continue(())) };
        partial.begin(&head);
        // A frame without payload is complete with its header.
        if head.payload_bytes == 0 { self.go_on(partial, &mut []) } else { Ok(ControlFlow::Continue(())) }
    }

    fn deliver(&mut self, kind: MessageKind, payload: &mut [u8]) -> ControlFlow<()> {
        match kind {
            MessageKind::Text => (self.sink)(Incoming::Text(payload)),
            MessageKind::Binary => (self.sink)(Incoming::Binary(payload)),
            MessageKind::Deflated => (self.sink)(Incoming::Deflated(payload)),
            MessageKind::DeflatedBinary => (self.sink)(Incoming::DeflatedBinary(payload)),
        }
    }

    fn control(&mut self, opcode: Opcode, payload: &[u8]) -> Result<ControlFlow<()>, ReadError> {
        match opcode {
            Opcode::Ping => Ok((self.sink)(Incoming::Ping(payload))),
            Opcode::Pong => Ok((self.sink)(Incoming::Pong(payload))),
            _ => {
                let _ = (self.sink)(Incoming::Close(close_payload(payload)?));
                Ok(ControlFlow::Break(()))
            }
        }
    }

    /// Reads a header, or as much of it as is there: `None` if it is incomplete, an error as soon as it is certain.
    fn head(&self, bytes: &[u8], partial: Option<&Partial>) -> Result<Option<Head>, ReadError> {
        let message = partial.and_then(|partial| partial.message.as_ref());
        let Some(&first) = bytes.first() else { return Ok(None) };
        let is_last = first & 0x80 != 0;
        let opcode = match (first & 0x0f, message.is_some()) {
            (0, false) => return Err(ReadError::NothingToContinue),
            (1 | 2, true) => return Err(ReadError::NotContinued),
            (0, true) => Opcode::Continuation,
            (1, false) => Opcode::Text,
            (2, false) => Opcode::Binary,
            (8, _) => Opcode::Close,
            (9, _) => Opcode::Ping,
            (10, _) => Opcode::Pong,
            (other, _) => return Err(ReadError::Opcode(other)),
        };
        let begins_message = matches!(opcode, Opcode::Text | Opcode::Binary);
        let allowed = if begins_message && self.limits.deflates { RSV1 } else { 0 };
        if first & 0x70 & !allowed != 0 {
            return Err(ReadError::ReservedBit);
        }
        if opcode.is_control() && !is_last {
            return Err(ReadError::ControlFragmented);
        }
        let Some(&second) = bytes.get(1) else { return Ok(None) };
        if second & 0x80 == 0 {
            return Err(ReadError::NotMasked);
        }
        let short = usize::from(second & 0x7f);
        if opcode.is_control() && short > CONTROL_BYTES_MAX {
            return Err(ReadError::ControlTooLong);
        }
        let Some((payload_bytes, length_bytes)) = payload_length(short, &bytes[2..])? else { return Ok(None) };
        let before = message.map_or(0, |message| message.bytes.len());
        let room = self.limits.message_bytes_max - before.min(self.limits.message_bytes_max);
        let payload_bytes = usize::try_from(payload_bytes).map_err(|_| ReadError::MessageTooBig)?;
        if !opcode.is_control() && payload_bytes > room {
            return Err(ReadError::MessageTooBig);
        }
        let Some(&mask) = bytes[2 + length_bytes..].first_chunk() else { return Ok(None) };
        let is_deflated = first & RSV1 != 0;
        Ok(Some(Head { opcode, is_last, is_deflated, mask, payload_bytes, bytes: 2 + length_bytes + 4 }))
    }
}

/// The payload's length and how many bytes said so, beside the seven bits `short`; `None` if they are incomplete.
fn payload_length(short: usize, bytes: &[u8]) -> Result<Option<(u64, usize)>, ReadError> {
    match short {
        126 => {
            let Some(&length) = bytes.first_chunk() else { return Ok(None) };
            let length = u16::from_be_bytes(length);
            if length < 126 { Err(ReadError::LengthNotMinimal) } else { Ok(Some((u64::from(length), 2))) }
        }
        127 => {
            if bytes.first().is_some_and(|top| top & 0x80 != 0) {
                return Err(ReadError::LengthTopBit);
            }
            let Some(&length) = bytes.first_chunk() else { return Ok(None) };
            let length = u64::from_be_bytes(length);
            if length <= 0xffff { Err(ReadError::LengthNotMinimal) } else { Ok(Some((length, 8))) }
        }
        _ => Ok(Some((short as u64, 0))),
    }
}

/// Code and reason of a close frame (RFC 6455 §5.5.1, §7.4).
fn close_payload(payload: &[u8]) -> Result<Option<(u16, &str)>, ReadError> {
    let Some((&code, reason)) = payload.split_first_chunk() else {
        return if payload.is_empty() { Ok(None) } else { Err(ReadError::CloseTooShort) };
    };
    let code = u16::from_be_bytes(code);
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return Err(ReadError::CloseCode(code));
    }
    let reason = simdutf8::basic::from_utf8(reason).map_err(|_| ReadError::NotUtf8)?;
    Ok(Some((code, reason)))
}

/// Takes the mask off, or puts it on (RFC 6455 §5.3).
pub fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let word = u64::from_ne_bytes([mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3]]);
    let (words, rest) = payload.as_chunks_mut::<8>();
    for bytes in words {
        *bytes = (u64::from_ne_bytes(*bytes) ^ word).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests;
