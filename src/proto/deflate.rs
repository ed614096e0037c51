//! permessage-deflate (RFC 7692), without context takeover on either side: a message's compressed form depends on the
//! message alone, so that it is the same for every tab and no session keeps a compressor.
//!
//! [`accept`] is the handshake's part. A frame's form is made once, by [`Frame::deflate`](crate::proto::frame::Frame::deflate);
//! a client that asked for a smaller [`Window`] is written it as far as it fits in. An [`Inflater`] reads what clients send.

mod negotiation;

use std::cell::Cell;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

pub use self::negotiation::{Accepted, accept};
use crate::proto::websocket::ReadError;

/// Frames from this many bytes of JSON on take over 100 µs to compress: not what a thread does that others wait for.
pub const LARGE_BYTES_MIN: usize = 16 << 10;

/// Large frames that are compressed at one time; others go out as they are.
pub const LARGE_DEFLATES_MAX: usize = 4;

/// Frames of more bytes of JSON than this are not compressed: it would take 10 ms and more, and as much memory again.
pub const JSON_BYTES_MAX: usize = 1 << 20;

/// What a compressor holds beside its output: 380,032 bytes with a window of 32 KiB.
pub const DEFLATER_BYTES: usize = 384 << 10;

/// What an [`Inflater`] keeps between two messages: 47,552 bytes of state and window, and a buffer.
pub const INFLATER_BYTES: usize = (48 << 10) + KEPT_BYTES_MAX;

/// Of what is inflated, an [`Inflater`] keeps a buffer of up to this size for the next.
const KEPT_BYTES_MAX: usize = 64 << 10;

/// zlib's level. On chat, 2 takes half of what 6 does, and its form is a twentieth larger; 1 saves hardly anything.
const LEVEL: u32 = 2;

/// What a flush ends with, and what a message's payload is without (RFC 7692 §7.2.1).
const FLUSH_END: [u8; 4] = [0, 0, 0xff, 0xff];

/// What stands behind a client's payload before it is inflated: the end of the flush that it is without (RFC 7692
/// §7.2.2), and an empty last block. Whoever stopped in the middle of something does not get past that.
const MESSAGE_END: [u8; 9] = [0, 0, 0xff, 0xff, 1, 0, 0, 0xff, 0xff];

/// Last blocks in one message. Each begins a stream of its own (RFC 7692 §7.2.3.4); a message of nothing else would
/// cost far more time than its bytes.
const STREAMS_MAX: usize = 16;

/// How far back a compressed message may refer: 2 to the power of `bits` bytes (RFC 7692 §7.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Window(u8);

impl Window {
    /// 32 KiB: as far as the format goes, and what frames are compressed with.
    pub const FULL: Self = Self(15);
    /// 512 bytes. One of 256 is not granted: the compressor has none.
    pub const SMALLEST: Self = Self(9);

    /// The window of so many bits, if there is one.
    #[must_use]
    pub const fn of_bits(bits: u8) -> Option<Self> {
        if Self::SMALLEST.0 <= bits && bits <= Self::FULL.0 { Some(Self(bits)) } else { None }
    }

    /// The smallest that a message of so many bytes stays within, however it is compressed: it refers to nothing before
    /// its own beginning.
    #[must_use]
    pub fn around(message_bytes: usize) -> Self {
        let bits = message_bytes.max(1).next_power_of_two().trailing_zeros();
        Self(u8::try_from(bits).unwrap_or(u8::MAX).clamp(Self::SMALLEST.0, Self::FULL.0))
    }

    /// Its size as a power of two.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }
}

/// A compressor, and where its output goes.
pub(crate) struct Deflater {
    state: Compress,
    output: Vec<u8>,
}

thread_local! {
    static DEFLATER: Cell<Option<Box<Deflater>>> = const { Cell::new(None) };
}

impl Deflater {
    fn new(window: Window) -> Self {
        let state = Compress::new_with_window_bits(Compression::new(LEVEL), false, window.bits());
        Self { state, output: Vec::new() }
    }

    /// The payload of `message` in a compressed frame (RFC 7692 §7.2.1); None if it would not be smaller.
    pub(crate) fn deflate(&mut self, message: &[u8]) -> Option<&[u8]> {
        // Where there is no room left the flush may be incomplete; then it is no smaller either.
        let room = message.len() + FLUSH_END.len();
        self.deflate_into(message, room).filter(|payload| payload.len() < message.len())
    }

    /// The same, whatever its size.
    pub(crate) fn deflate_anyway(&mut self, message: &[u8]) -> Option<&[u8]> {
        // More than zlib says that the worst case takes, for any window (`deflateBound`).
        self.deflate_into(message, message.len() + message.len() / 4 + 64)
    }

    fn deflate_into(&mut self, message: &[u8], room: usize) -> Option<&[u8]> {
        self.state.reset();
        self.output.clear();
        self.output.reserve(room);
        let status = self.state.compress_vec(message, &mut self.output, FlushCompress::Sync);
        let is_whole = matches!(status, Ok(Status::Ok)) && self.output.len() < self.output.capacity();
        self.output.strip_suffix(&FLUSH_END).filter(|_| is_whole)
    }
}

/// Runs `use_it` on this thread's compressor, which is made at its first use: [`DEFLATER_BYTES`], and an output of as
/// many bytes as the largest message below [`LARGE_BYTES_MIN`]. A large message gets one of its own, and so does one with
/// a smaller window.
pub(crate) fn with_deflater<T>(message_bytes: usize, window: Window, use_it: impl FnOnce(&mut Deflater) -> T) -> T {
    if message_bytes >= LARGE_BYTES_MIN || window != Window::FULL {
        return use_it(&mut Deflater::new(window));
    }
    // A thread that is ending has none any more, and gets a fresh one.
    let taken = DEFLATER.try_with(Cell::take).ok().flatten();
    let mut deflater = taken.unwrap_or_else(|| Box::new(Deflater::new(Window::FULL)));
    let result = use_it(&mut deflater);
    let _ = DEFLATER.try_with(|place| place.set(Some(deflater)));
    result
}

/// Inflates clients' messages, one at a time. It is one for all sessions of a shard, and holds nothing before its first
/// message.
#[derive(Debug, Default)]
pub struct Inflater {
    state: Option<Decompress>,
    output: Vec<u8>,
}

impl Inflater {
    /// Inflates the payload of a text message, all fragments together, and calls `sink` with the text, which is valid
    /// UTF-8 and may be changed.
    ///
    /// Whatever the payload claims, it is not inflated any further once it is over `bytes_max`, and no more memory is
    /// taken than for that. Between messages a buffer of up to 64 KiB is kept.
    ///
    /// ```
    /// use tabcast::proto::deflate::Inflater;
    /// // RFC 7692 §7.2.3.1.
    /// let hello = [0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00];
    /// Inflater::default().inflate(&hello, 5, |text| assert_eq!(text, b"Hello"))?;
    /// assert!(Inflater::default().inflate(&hello, 4, |_| ()).is_err());
    /// # Ok::<(), tabcast::proto::websocket::ReadError>(())
    /// ```
    ///
    /// # Errors
    /// [`ReadError::MessageTooBig`]: it is more than `bytes_max`. [`ReadError::NotDeflate`]: it is not compressed data,
    /// or ends in the middle of it. [`ReadError::NotUtf8`].
    pub fn inflate<T>(
        &mut self,
        payload: &[u8],
        bytes_max: usize,
        sink: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, ReadError> {
        self.inflate_checked(payload, bytes_max, |text| match simdutf8::basic::from_utf8(text) {
            Ok(_) => Ok(sink(text)),
            Err(_) => Err(ReadError::NotUtf8),
        })
    }

    /// The same of a binary message, whose bytes mean nothing here.
    ///
    /// # Errors
    /// [`ReadError::MessageTooBig`] and [`ReadError::NotDeflate`], as of a text.
    pub fn inflate_binary<T>(
        &mut self,
        payload: &[u8],
        bytes_max: usize,
        sink: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, ReadError> {
        self.inflate_checked(payload, bytes_max, |bytes| Ok(sink(bytes)))
    }

    fn inflate_checked<T>(
        &mut self,
        payload: &[u8],
        bytes_max: usize,
        sink: impl FnOnce(&mut [u8]) -> Result<T, ReadError>,
    ) -> Result<T, ReadError> {
        let result = self.read(payload, bytes_max).and_then(|()| sink(&mut self.output));
        self.output.clear();
        if self.output.capacity() > KEPT_BYTES_MAX {
            self.output = Vec::new();
        }
        result
    }

    fn read(&mut self, payload: &[u8], bytes_max: usize) -> Result<(), ReadError> {
        let state = self.state.get_or_insert_with(|| Decompress::new(false));
        state.reset(false);
        let mut reading = Reading { state, output: &mut self.output, bytes_max, streams: 1, is_ended: false };
        reading.feed(payload)?;
        // Some compressors say nothing at all for an empty message, and some nothing behind their last block.
        if !payload.is_empty() && !reading.is_ended {
            reading.feed(&MESSAGE_END)?;
            if !reading.is_ended {
                return Err(ReadError::NotDeflate);
            }
        }
        Ok(())
    }
}

/// One message on its way.
struct Reading<'a> {
    state: &'a mut Decompress,
    output: &'a mut Vec<u8>,
    bytes_max: usize,
    /// Streams so far: what ends with a last block, and what follows it.
    streams: usize,
    /// The last that was read was a last block.
    is_ended: bool,
}

impl Reading<'_> {
    fn feed(&mut self, mut rest: &[u8]) -> Result<(), ReadError> {
        while !rest.is_empty() {
            if self.is_ended {
                self.streams += 1;
                self.state.reset(false);
            }
            let before = (self.state.total_in(), self.output.len());
            self.grow();
            let status = self.state.decompress_vec(rest, self.output, FlushDecompress::None);
            let consumed = usize::try_from(self.state.total_in() - before.0).unwrap_or(rest.len());
            rest = &rest[consumed..];
            if self.output.len() > self.bytes_max {
                return Err(ReadError::MessageTooBig);
            }
            self.is_ended = matches!(status, Ok(Status::StreamEnd));
            let is_stuck = consumed == 0 && self.output.len() == before.1 && !self.is_ended;
            if status.is_err() || is_stuck || self.streams > STREAMS_MAX {
                return Err(ReadError::NotDeflate);
            }
        }
        Ok(())
    }

    /// Makes room for more output: twice as much as there is, and never for more than a byte past the limit.
    fn grow(&mut self) {
        const ROOM: usize = 4 << 10;
        let length = self.output.len();
        if length == self.output.capacity() {
            let room = length.max(ROOM).min(self.bytes_max.saturating_add(1).saturating_sub(length));
            self.output.reserve_exact(room);
        }
    }
}

#[cfg(test)]
mod tests;
