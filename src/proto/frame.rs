//! A frame: one event, encoded once, in the form of each wire.
//!
//! One allocation holds the WebSocket header, the JSON and what an event stream needs around it:
//!
//! ```text
//! [room ≤ 10: WebSocket header][JSON]["\n\n\r\n"][size "\r\n" ("id: " id "\n")? "data: "]
//!              └────── websocket() ─┘
//!                               └── body ────────┘└────────────── prefix ──────────────┘
//! ```
//!
//! A session writes `prefix`, then `body`: an HTTP/1.1 chunk with one record of an event stream (WHATWG HTML §9.2.6).
//! What tabs with permessage-deflate are written stands apart: see [`Frame::deflate`].

mod deflated;
mod kind;
mod moment;
mod pool;

use std::fmt;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{LazyLock, OnceLock};

use foldhash::quality::RandomState;
use triomphe::ThinArc;

pub use self::deflated::deflates;
pub use self::kind::{Class, Kind};
pub use self::moment::Moment;
pub use self::pool::{POOLED_BYTES_MAX, pooled_bytes};
use self::pool::{Pooled, with_scratch};
use crate::id::{ChannelId, MessageId};
use crate::proto::deflate::Window;
use crate::proto::disconnect::Disconnect;
use crate::proto::event::{Event, Notice};
use crate::proto::json::{self, Buffer};

/// Room for the longest WebSocket header of a server (RFC 6455 §5.2: no mask).
const ROOM: usize = 10;

/// What ends a record of an event stream, and its chunk.
const RECORD_END: &[u8] = b"\n\n\r\n";

/// Chunk size, `id:` line and `data: `, at their longest.
const RECORD_PREFIX_BYTES_MAX: usize = 16 + 2 + 41 + 6;

/// Frames from this size on are encoded in place, in a buffer of the pool; smaller ones are copied once.
const LARGE_BYTES_MIN: usize = 64 << 10;

/// Room in a large buffer for everything but the text or the data: keys, ids, escapes of an ordinary text.
const LARGE_SLACK_BYTES: usize = 2 << 10;

/// The most bytes of a control frame's payload (RFC 6455 §5.5).
const CONTROL_PAYLOAD_BYTES_MAX: usize = 125;

/// What a frame is called by.
#[derive(Clone, Copy)]
enum Name {
    None,
    Message(MessageId),
    /// Hash of a channel, as bytes so that it does not align the header to 16.
    Channel([u8; 16]),
}

/// What stands before the bytes of a frame, in the same allocation: 48 bytes, which with the reference count and the
/// length are one cache line.
struct Header {
    /// Where the JSON, or a control frame's payload, ends; it begins at [`ROOM`].
    payload_end: usize,
    /// What [`live_bytes`] was raised by.
    bytes: usize,
    rare: Option<Box<Rare>>,
    accepted: Option<Moment>,
    name: Name,
    kind: Kind,
    websocket_start: u8,
}

/// What few frames have.
#[derive(Default)]
struct Rare {
    /// The bytes of a large frame; the slice behind the header is empty then.
    large: Option<Pooled>,
    /// The form for event streams of a JSON text with U+0085, U+2028 or U+2029, and where its body begins.
    escaped: OnceLock<(Box<[u8]>, usize)>,
    has_separators: bool,
    /// The compressed WebSocket form, and the smallest window that it may be read with.
    deflated: Option<(Box<[u8]>, Window)>,
}

// Ordering: Relaxed: a statistic, publishes nothing.
static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Bytes of all live frames of this process: a fact of the process, like an allocator's statistic.
///
/// Each frame counts once, whatever the number of its clones, with what [`Frame::bytes`] says.
#[must_use]
pub fn live_bytes() -> usize {
    LIVE_BYTES.load(Ordering::Relaxed)
}

// Ordering: Relaxed: a statistic, publishes nothing.
static ENCODES: AtomicU64 = AtomicU64::new(0);

/// How often bytes of a frame were made in this process: once for each frame, and once more for each that had to
/// escape its form for event streams. Clones and readers do not raise it.
#[must_use]
pub fn encodes() -> u64 {
    ENCODES.load(Ordering::Relaxed)
}

impl Drop for Header {
    fn drop(&mut self) {
        LIVE_BYTES.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A record of an event stream as one HTTP/1.1 chunk: `prefix`, then `body`, nothing between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventStream<'a> {
    /// The chunk's size, the `id:` line if the frame has a position, and `data: `.
    pub prefix: &'a [u8],
    /// The JSON and the ends of the record and of the chunk.
    pub body: &'a [u8],
}

impl<'a> EventStream<'a> {
    /// The record without the chunk around it: two slices, nothing between.
    ///
    /// ```
    /// use tabcast::proto::event::Event;
    /// use tabcast::proto::frame::Frame;
    /// let frame = Frame::encode(&Event::Typing { active: true });
    /// let record = frame.event_stream().map(|form| form.record().concat());
    /// assert_eq!(record.as_deref(), Some(&b"data: {\"type\":\"typing\",\"active\":true}\n\n"[..]));
    /// ```
    #[must_use]
    pub fn record(&self) -> [&'a [u8]; 2] {
        let size = memchr::memchr(b'\n', self.prefix).map_or(0, |end| end + 1);
        [&self.prefix[size..], self.body.strip_suffix(b"\r\n").unwrap_or(self.body)]
    }
}

/// One event, encoded once: one allocation behind a thin pointer. A clone is one count.
///
/// ```
/// use tabcast::proto::event::Event;
/// use tabcast::proto::frame::{Class, Frame};
/// let frame = Frame::encode(&Event::Typing { active: true });
/// assert_eq!(frame.websocket(), b"\x81\x1f{\"type\":\"typing\",\"active\":true}");
/// assert_eq!(frame.class(), Class::Latest);
/// ```
#[derive(Clone)]
pub struct Frame(ThinArc<Header, u8>);

impl Frame {
    /// Encodes `event` for a channel that only one kind of typing goes to (a stream, a test): see
    /// [`encode_for`](Self::encode_for).
    #[must_use]
    pub fn encode(event: &Event<'_>) -> Self {
        Self::encode_named(event, [0xff; 16])
    }

    /// Encodes `event` for `channel`: typing in one channel does not replace typing in another.
    #[must_use]
    pub fn encode_for(event: &Event<'_>, channel: &ChannelId) -> Self {
        let key = if matches!(event, Event::Typing { .. }) { channel_key(channel) } else { [0; 16] };
        Self::encode_named(event, key)
    }

    fn encode_named(event: &Event<'_>, channel: [u8; 16]) -> Self {
        let (kind, name, content_bytes) = match *event {
            Event::Message { id, text, .. } => (Kind::Message, Name::Message(id), text.len()),
            Event::Buttons { id, text, .. } => (Kind::Buttons, Name::Message(id), text.len()),
            Event::File { id, data, .. } => {
                (Kind::File, Name::Message(id), base64_simd::STANDARD.encoded_length(data.len()))
            }
            Event::Edit { id, text, .. } => (Kind::Edit, Name::Message(id), text.len()),
            Event::Typing { .. } => (Kind::Typing, Name::Channel(channel), 0),
            Event::End { .. } => (Kind::End, Name::None, 0),
        };
        Self::build(kind, name, content_bytes, |out| json::write_event(out, event))
    }

    /// Encodes what tabcast itself tells a client.
    #[must_use]
    pub fn notice(notice: &Notice<'_>) -> Self {
        let kind = match notice {
            Notice::Hello { .. } => Kind::Hello,
            Notice::Ack { .. } => Kind::Ack,
            Notice::Error { .. } => Kind::Error,
            Notice::Pong { .. } => Kind::Pong,
            Notice::Gap { .. } => Kind::Gap,
            Notice::Draining { .. } => Kind::Draining,
        };
        Self::build(kind, Name::None, 0, |out| json::write_notice(out, notice))
    }

    /// Frames JSON that another node encoded, without looking into it: `kind` and `id` come with it.
    ///
    /// `json` is one JSON text without line feeds, as [`json`](Self::json) of the other node's frame gave it.
    /// For typing, `channel` is where it goes, as in [`encode_for`](Self::encode_for).
    #[must_use]
    pub fn relay(kind: Kind, id: Option<MessageId>, channel: Option<&ChannelId>, json: &str) -> Self {
        let name = match (kind, id) {
            (Kind::Typing, _) => Name::Channel(channel.map_or([0xff; 16], channel_key)),
            (_, Some(id)) => Name::Message(id),
            (_, None) => Name::None,
        };
        Self::build(kind, name, json.len(), |out| {
            out.put(json.as_bytes());
            json::separator_growth(json.as_bytes())
        })
    }

    /// A WebSocket text of an embedder's own protocol, as it is. It has no form for event streams.
    ///
    /// ```
    /// use tabcast::proto::frame::Frame;
    /// assert_eq!(Frame::text("hi").websocket(), b"\x81\x02hi");
    /// ```
    #[must_use]
    pub fn text(text: &str) -> Self {
        Self::own(Kind::Text, text.as_bytes())
    }

    /// A WebSocket binary message of an embedder's own protocol. It has no form for event streams.
    #[must_use]
    pub fn binary(bytes: &[u8]) -> Self {
        Self::own(Kind::Binary, bytes)
    }

    fn own(kind: Kind, payload: &[u8]) -> Self {
        Self::build(kind, Name::None, payload.len(), |out| {
            out.put(payload);
            0
        })
    }

    /// A WebSocket ping without payload.
    #[must_use]
    pub fn ping() -> Self {
        Self::control(Kind::PingFrame, &[])
    }

    /// The answer to a WebSocket ping: its payload, of which a control frame takes at most 125 bytes.
    #[must_use]
    pub fn pong(payload: &[u8]) -> Self {
        Self::control(Kind::PongFrame, &payload[..payload.len().min(CONTROL_PAYLOAD_BYTES_MAX)])
    }

    /// A WebSocket close with the ending's code and reason; without either if it has no close frame (1006 never goes
    /// onto the wire).
    #[must_use]
    pub fn close(ending: Disconnect) -> Self {
        if !ending.has_close_frame() {
            return Self::control(Kind::CloseFrame, &[]);
        }
        let reason = ending.reason().as_bytes();
        let mut payload = [0; CONTROL_PAYLOAD_BYTES_MAX];
        payload[..2].copy_from_slice(&ending.close_code().to_be_bytes());
        payload[2..2 + reason.len()].copy_from_slice(reason);
        Self::control(Kind::CloseFrame, &payload[..2 + reason.len()])
    }

    fn control(kind: Kind, payload: &[u8]) -> Self {
        Self::build(kind, Name::None, 0, |out| {
            out.put(payload);
            0
        })
    }

    /// Builds the whole layout around what `write` appends; it returns the growth of [`json::escape_separators`].
    fn build(kind: Kind, name: Name, content_bytes: usize, write: impl FnOnce(&mut Buffer) -> usize) -> Self {
        ENCODES.fetch_add(1, Ordering::Relaxed);
        if content_bytes < LARGE_BYTES_MIN {
            return with_scratch(|out| {
                let layout = Layout::write(out, kind, name, write);
                let rare = (layout.growth > 0).then(|| Box::new(Rare::new(None, &layout)));
                Self(ThinArc::from_header_and_slice(layout.header(kind, name, out.len(), rare), out.written()))
            });
        }
        let mut large = Pooled::take(content_bytes + LARGE_SLACK_BYTES);
        let layout = Layout::write(large.buffer_mut(), kind, name, write);
        let bytes = large.buffer().room_bytes();
        let rare = Some(Box::new(Rare::new(Some(large), &layout)));
        Self(ThinArc::from_header_and_slice(layout.header(kind, name, bytes, rare), &[]))
    }

    fn header(&self) -> &Header {
        &self.0.header.header
    }

    /// All of the layout.
    fn whole(&self) -> &[u8] {
        match self.header().rare.as_ref().and_then(|rare| rare.large.as_ref()) {
            Some(large) => large.buffer().written(),
            None => &self.0.slice,
        }
    }

    /// What it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.header().kind
    }

    /// What happens to it when a queue is full.
    #[must_use]
    pub fn class(&self) -> Class {
        self.kind().class()
    }

    /// For [`Class::Latest`], what it replaces by, among frames of its kind: an edit's message, typing's channel.
    /// 0 for the others.
    #[must_use]
    pub fn key(&self) -> u128 {
        match (self.kind(), self.header().name) {
            (Kind::Edit, Name::Message(id)) => id.as_u128(),
            (Kind::Typing, Name::Channel(hash)) => u128::from_ne_bytes(hash),
            _ => 0,
        }
    }

    /// The message that a message, buttons, file or edit frame is about.
    #[must_use]
    pub fn message_id(&self) -> Option<MessageId> {
        match self.header().name {
            Name::Message(id) => Some(id),
            Name::None | Name::Channel(_) => None,
        }
    }

    /// Whether it is the message that `edit` changes. No edit may come before it.
    #[must_use]
    pub fn is_message_of(&self, edit: &Self) -> bool {
        edit.kind() == Kind::Edit && self.class() == Class::Ordered && self.message_id() == edit.message_id()
    }

    /// The JSON text; empty for what has none.
    #[must_use]
    pub fn json(&self) -> &[u8] {
        if self.kind().has_json() { self.payload() } else { &[] }
    }

    /// What it carries as a WebSocket message: its JSON, or an embedder's own text or bytes; empty for control frames.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        if self.kind().is_message() { &self.whole()[ROOM..self.header().payload_end] } else { &[] }
    }

    /// The WebSocket form: header and payload, unmasked.
    #[must_use]
    pub fn websocket(&self) -> &[u8] {
        let header = self.header();
        &self.whole()[usize::from(header.websocket_start)..header.payload_end]
    }

    /// The form for event streams; none for what has no JSON.
    ///
    /// U+0085, U+2028 and U+2029 are escaped in it. A frame that has any builds that form at its first use, once.
    #[must_use]
    pub fn event_stream(&self) -> Option<EventStream<'_>> {
        let header = self.header();
        if !header.kind.has_json() {
            return None;
        }
        if let Some(rare) = header.rare.as_ref().filter(|rare| rare.has_separators) {
            let (record, body) = rare.escaped.get_or_init(|| self.escaped_record());
            let (prefix, body) = record.split_at(*body);
            return Some(EventStream { prefix, body });
        }
        let whole = self.whole();
        let (front, prefix) = whole.split_at(header.payload_end + RECORD_END.len());
        Some(EventStream { prefix, body: &front[ROOM..] })
    }

    #[cold]
    fn escaped_record(&self) -> (Box<[u8]>, usize) {
        ENCODES.fetch_add(1, Ordering::Relaxed);
        let json = self.json();
        let json_bytes = json.len() + json::separator_growth(json);
        let mut prefix = Buffer::new();
        write_record_prefix(&mut prefix, self.kind(), self.header().name, json_bytes);
        let mut record = Vec::with_capacity(prefix.len() + json_bytes + RECORD_END.len());
        record.extend_from_slice(prefix.written());
        json::escape_separators(json, &mut record);
        record.extend_from_slice(RECORD_END);
        (record.into_boxed_slice(), prefix.len())
    }

    /// The memory that it holds, in bytes. It does not change once the frame is shared: an event stream's own form counts
    /// from the beginning, and a compressed one is made before.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.header().bytes
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame").field("kind", &self.kind()).field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

/// What is known once a frame's bytes are written.
struct Layout {
    payload_end: usize,
    websocket_start: usize,
    growth: usize,
}

impl Layout {
    fn write(out: &mut Buffer, kind: Kind, name: Name, write: impl FnOnce(&mut Buffer) -> usize) -> Self {
        out.put(&[0; ROOM]);
        let growth = write(out);
        let payload_end = out.len();
        if kind.has_json() {
            out.put(RECORD_END);
            write_record_prefix(out, kind, name, payload_end - ROOM);
        }
        let mut header = [0; ROOM];
        let header = websocket_header(&mut header, kind.first_byte(), payload_end - ROOM);
        let websocket_start = ROOM - header.len();
        out.written_mut()[websocket_start..ROOM].copy_from_slice(header);
        Self { payload_end, websocket_start, growth }
    }

    /// `bytes`: of the buffer that the frame will hold.
    fn header(&self, kind: Kind, name: Name, bytes: usize, rare: Option<Box<Rare>>) -> Header {
        // The reference count and the length stand before the header.
        let mut bytes = bytes + size_of::<Header>() + 2 * size_of::<usize>();
        if rare.is_some() {
            bytes += size_of::<Rare>();
        }
        if self.growth > 0 {
            bytes += self.payload_end + self.growth + RECORD_PREFIX_BYTES_MAX;
        }
        LIVE_BYTES.fetch_add(bytes, Ordering::Relaxed);
        let websocket_start = u8::try_from(self.websocket_start).unwrap_or_default();
        Header { payload_end: self.payload_end, bytes, rare, accepted: None, name, kind, websocket_start }
    }
}

impl Rare {
    const fn new(large: Option<Pooled>, layout: &Layout) -> Self {
        Self { large, escaped: OnceLock::new(), has_separators: layout.growth > 0, deflated: None }
    }
}

/// Writes the header of an unmasked frame to the end of `room` and returns it (RFC 6455 §5.2).
#[expect(clippy::cast_possible_truncation, reason = "each arm has checked that the length fits")]
fn websocket_header(room: &mut [u8; ROOM], first: u8, length: usize) -> &[u8] {
    let start = match length {
        0..=125 => {
            room[9] = length as u8;
            8
        }
        126..=0xffff => {
            room[8..].copy_from_slice(&(length as u16).to_be_bytes());
            room[7] = 126;
            6
        }
        _ => {
            room[2..].copy_from_slice(&(length as u64).to_be_bytes());
            room[1] = 127;
            0
        }
    };
    room[start] = first;
    &room[start..]
}

/// Appends the chunk's size and the start of the record. An event is never without data: `json_bytes` is over 0.
fn write_record_prefix(out: &mut Buffer, kind: Kind, name: Name, json_bytes: usize) {
    let mut id = *b"id: ------------------------------------\n";
    let position: &[u8] = match name {
        Name::Message(message) if kind.has_position() => {
            let mut text = [0; 36];
            id[4..40].copy_from_slice(message.encode(&mut text).as_bytes());
            &id
        }
        _ => &[],
    };
    const DATA: &[u8] = b"data: ";
    const RECORD_END_BYTES: usize = 2;
    let size = position.len() + DATA.len() + json_bytes + RECORD_END_BYTES;
    put_hexadecimal(out, size);
    out.put(b"\r\n");
    out.put(position);
    out.put(DATA);
}

fn put_hexadecimal(out: &mut Buffer, number: usize) {
    let mut digits = [0; 16];
    let mut at = digits.len();
    let mut rest = number;
    loop {
        at -= 1;
        digits[at] = b"0123456789abcdef"[rest & 15];
        rest >>= 4;
        if rest == 0 {
            break;
        }
    }
    out.put(&digits[at..]);
}

/// 128 bits of a channel id, the same within the process and nobody's to choose.
fn channel_key(channel: &ChannelId) -> [u8; 16] {
    static HALVES: LazyLock<[RandomState; 2]> = LazyLock::new(|| [RandomState::default(), RandomState::default()]);
    let halves = HALVES.each_ref().map(|half| half.hash_one(channel));
    let mut key = [0; 16];
    key[..8].copy_from_slice(&halves[0].to_ne_bytes());
    key[8..].copy_from_slice(&halves[1].to_ne_bytes());
    key
}

#[cfg(test)]
mod tests;
