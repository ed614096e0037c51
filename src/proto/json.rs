//! The JSON of what is published: a writer for exactly our shapes, keys in their documented order, compact, raw UTF-8.
//!
//! It escapes a quote, a backslash and what is below U+0020, and nothing else. What an event stream needs escaped on
//! top ([`escape_separators`]) is counted while writing, so that a text without it never pays for it.

mod escape;

use base64_simd::{AsOut, STANDARD};

pub use self::escape::plain as escape_plain;
use self::escape::{GROWTH_MAX, SLACK_BYTES};
use crate::id::MessageId;
use crate::proto::event::{Button, Event, Notice, Timestamp};

/// Text is escaped in pieces of this many bytes, so that the room for the worst case stays small.
const PIECE_BYTES: usize = 4096;

/// Bytes that grow at their end: room that is ready to be written, and how much of it is used.
///
/// The room is initialised once and used again, which lets the writer run ahead of what it keeps.
#[derive(Debug, Default)]
pub struct Buffer {
    room: Vec<u8>,
    used: usize,
}

impl Buffer {
    /// An empty one without room: it holds no memory.
    #[must_use]
    pub const fn new() -> Self {
        Self { room: Vec::new(), used: 0 }
    }

    /// An empty one with room for `bytes`.
    #[must_use]
    pub fn with_room(bytes: usize) -> Self {
        Self { room: vec![0; bytes], used: 0 }
    }

    /// What was written.
    #[must_use]
    pub fn written(&self) -> &[u8] {
        &self.room[..self.used]
    }

    /// What was written, to be changed in place.
    pub(crate) fn written_mut(&mut self) -> &mut [u8] {
        &mut self.room[..self.used]
    }

    /// How many bytes were written.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.used
    }

    /// Whether nothing was written.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// The memory that it holds, in bytes.
    #[must_use]
    pub const fn room_bytes(&self) -> usize {
        self.room.capacity()
    }

    /// Forgets what was written and keeps the room.
    pub const fn clear(&mut self) {
        self.used = 0;
    }

    /// Appends `bytes` as they are.
    #[inline]
    pub fn put(&mut self, bytes: &[u8]) {
        self.ahead(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }

    #[inline]
    fn put_array<const N: usize>(&mut self, bytes: &[u8; N]) {
        if let Some(place) = self.ahead(N).first_chunk_mut() {
            *place = *bytes;
            self.used += N;
        }
    }

    /// At least `bytes` of room behind what was written.
    #[inline]
    fn ahead(&mut self, bytes: usize) -> &mut [u8] {
        if self.room.len() - self.used < bytes {
            self.grow(bytes);
        }
        &mut self.room[self.used..]
    }

    #[cold]
    fn grow(&mut self, bytes: usize) {
        let needed = self.used + bytes;
        self.room.resize(needed.max(self.room.len() * 2), 0);
    }

    fn put_decimal(&mut self, number: u64) {
        let mut digits = [0; 20];
        self.put(decimal(number, &mut digits));
    }
}

/// Writes `number` to the end of `digits` and returns it.
fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut at = digits.len();
    while number >= 100 {
        at -= 2;
        [digits[at], digits[at + 1]] = pair(number % 100);
        number /= 100;
    }
    at -= 2;
    [digits[at], digits[at + 1]] = pair(number);
    // A number has no leading zero, but zero has one digit.
    at += usize::from(number < 10);
    &digits[at..]
}

/// The two digits of a number below 100.
#[expect(clippy::cast_possible_truncation, reason = "quotient and remainder are below ten")]
const fn pair(number: u64) -> [u8; 2] {
    [b'0' + (number / 10) as u8, b'0' + (number % 10) as u8]
}

/// Appends the JSON of `event` and returns by how many bytes [`escape_separators`] would make it longer.
///
/// ```
/// use tabcast::proto::event::Event;
/// use tabcast::proto::json::{Buffer, write_event};
/// let mut out = Buffer::default();
/// write_event(&mut out, &Event::Typing { active: true });
/// assert_eq!(out.written(), br#"{"type":"typing","active":true}"#);
/// ```
pub fn write_event(out: &mut Buffer, event: &Event<'_>) -> usize {
    let mut writer = Writer { out, separator_growth: 0 };
    writer.event(event);
    writer.separator_growth
}

/// Appends the JSON of `notice` and returns by how many bytes [`escape_separators`] would make it longer.
pub fn write_notice(out: &mut Buffer, notice: &Notice<'_>) -> usize {
    let mut writer = Writer { out, separator_growth: 0 };
    writer.notice(notice);
    writer.separator_growth
}

/// Appends `text`, escaped and without quotes around it, and returns by how many bytes [`escape_separators`] would
/// make it longer.
pub fn escape(out: &mut Buffer, text: &str) -> usize {
    let mut is_ascii = true;
    for piece in text.as_bytes().chunks(PIECE_BYTES) {
        let escaped = escape::fastest(piece, out.ahead(GROWTH_MAX * piece.len() + SLACK_BYTES));
        out.used += escaped.written;
        is_ascii &= escaped.is_ascii;
    }
    if is_ascii { 0 } else { separator_growth(text.as_bytes()) }
}

/// The separators that some clients split lines at: their UTF-8 and their escape.
const SEPARATORS: [(&[u8], &[u8]); 3] =
    [(b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029")];

/// The separators of `text`: where, how long, and the escape.
fn separators(text: &[u8]) -> impl Iterator<Item = (usize, usize, &'static [u8])> {
    memchr::memchr2_iter(0xc2, 0xe2, text).filter_map(|at| {
        let found = SEPARATORS.iter().find(|(raw, _)| text[at..].starts_with(raw))?;
        Some((at, found.0.len(), found.1))
    })
}

/// By how many bytes [`escape_separators`] makes `json` longer.
#[must_use]
pub fn separator_growth(json: &[u8]) -> usize {
    separators(json).map(|(_, length, escape)| escape.len() - length).sum()
}

/// Appends a JSON text with everything outside U+0020 to U+007E as `\uXXXX`, pairs of surrogates where it takes two.
pub fn escape_non_ascii(json: &[u8], out: &mut Vec<u8>) {
    out.reserve(json.len());
    // What is no UTF-8 is none of ours.
    for chunk in json.utf8_chunks() {
        for character in chunk.valid().chars() {
            if matches!(character, ' '..='~') {
                out.push(character as u8);
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    out.extend_from_slice(format!("\\u{unit:04x}").as_bytes());
                }
            }
        }
    }
}

/// Appends `json` with U+0085, U+2028 and U+2029 as `\u0085`, `\u2028` and `\u2029`: the same JSON value, in a form that
/// no client of an event stream splits into lines.
pub fn escape_separators(json: &[u8], out: &mut Vec<u8>) {
    let mut from = 0;
    for (at, length, escape) in separators(json) {
        out.extend_from_slice(&json[from..at]);
        out.extend_from_slice(escape);
        from = at + length;
    }
    out.extend_from_slice(&json[from..]);
}

struct Writer<'b> {
    out: &'b mut Buffer,
    separator_growth: usize,
}

impl Writer<'_> {
    /// Of known length, which makes it a few stores.
    #[inline]
    fn raw<const N: usize>(&mut self, bytes: &[u8; N]) {
        self.out.put_array(bytes);
    }

    /// `before` is what stands before the text, its opening quote included; the closing one is written by what follows.
    #[inline]
    fn text<const N: usize>(&mut self, before: &[u8; N], text: &str) {
        self.raw(before);
        self.separator_growth += escape(self.out, text);
    }

    /// Text that is known to need no escape.
    #[inline]
    fn word<const N: usize>(&mut self, before: &[u8; N], word: &str) {
        self.raw(before);
        self.out.put(word.as_bytes());
    }

    #[inline]
    fn id<const N: usize>(&mut self, before: &[u8; N], id: MessageId) {
        self.raw(before);
        let mut text = [0; 36];
        id.encode(&mut text);
        self.raw(&text);
    }

    fn number<const N: usize>(&mut self, key: &[u8; N], number: u64) {
        self.raw(key);
        self.out.put_decimal(number);
    }

    fn boolean<const N: usize>(&mut self, key: &[u8; N], value: bool) {
        self.raw(key);
        self.out.put(if value { b"true" } else { b"false" });
    }

    /// Seconds with one to six decimals.
    fn timestamp<const N: usize>(&mut self, key: &[u8; N], timestamp: Timestamp) {
        let micros = timestamp.as_micros();
        self.number(key, micros / 1_000_000);
        let fraction = micros % 1_000_000;
        let (high, middle, low) = (pair(fraction / 10_000), pair(fraction / 100 % 100), pair(fraction % 100));
        let decimals = [b'.', high[0], high[1], middle[0], middle[1], low[0], low[1]];
        let zeros = decimals[2..].iter().rev().take_while(|&&digit| digit == b'0').count();
        self.out.put(&decimals[..decimals.len() - zeros]);
    }

    fn event(&mut self, event: &Event<'_>) {
        match *event {
            Event::Message { id, text, sender, reply_to, timestamp } => {
                self.message(id, text, sender, reply_to);
                self.timestamp(b"\",\"timestamp\":", timestamp);
            }
            Event::Buttons { id, text, sender, reply_to, buttons, timestamp } => {
                self.message(id, text, sender, reply_to);
                self.raw(b"\",\"buttons\":[");
                for (index, button) in buttons.iter().enumerate() {
                    if index > 0 {
                        self.raw(b",");
                    }
                    self.button(button);
                }
                self.timestamp(b"],\"timestamp\":", timestamp);
            }
            Event::File { id, filename, mimetype, data, timestamp } => {
                self.id(b"{\"type\":\"file\",\"id\":\"", id);
                self.text(b"\",\"filename\":\"", filename);
                self.text(b"\",\"mimetype\":\"", mimetype);
                self.raw(b"\",\"data\":\"");
                self.base64(data);
                self.number(b"\",\"size\":", data.len() as u64);
                self.timestamp(b",\"timestamp\":", timestamp);
            }
            Event::Edit { id, text, timestamp } => {
                self.id(b"{\"type\":\"edit\",\"id\":\"", id);
                self.text(b"\",\"text\":\"", text);
                self.timestamp(b"\",\"timestamp\":", timestamp);
            }
            Event::Typing { active } => self.boolean(b"{\"type\":\"typing\",\"active\":", active),
            Event::End { reason } => {
                self.word(b"{\"type\":\"end\",\"reason\":\"", reason.as_str());
                self.raw(b"\"");
            }
        }
        self.raw(b"}");
    }

    /// All but the closing quote of the sender, or of the id that it replies to.
    fn message(&mut self, id: MessageId, text: &str, sender: &str, reply_to: Option<MessageId>) {
        self.id(b"{\"type\":\"message\",\"id\":\"", id);
        self.text(b"\",\"text\":\"", text);
        self.text(b"\",\"sender\":\"", sender);
        if let Some(reply_to) = reply_to {
            self.id(b"\",\"reply_to\":\"", reply_to);
        }
    }

    fn button(&mut self, button: &Button) {
        self.text(b"{\"label\":\"", &button.label);
        self.text(b"\",\"custom_id\":\"", &button.custom_id);
        if let Some(emoji) = &button.emoji {
            self.text(b"\",\"emoji\":\"", emoji);
        }
        if let Some(style) = button.style {
            self.word(b"\",\"style\":\"", style.as_str());
        }
        if let Some(url) = &button.url {
            self.text(b"\",\"url\":\"", url);
        }
        self.raw(b"\"");
        if let Some(disabled) = button.disabled {
            self.boolean(b",\"disabled\":", disabled);
        }
        self.raw(b"}");
    }

    /// Encoded straight into its place. The alphabet needs no escape.
    fn base64(&mut self, data: &[u8]) {
        let length = STANDARD.encoded_length(data.len());
        let room = &mut self.out.ahead(length)[..length];
        let _ = STANDARD.encode(data, room.as_out());
        self.out.used += length;
    }

    fn notice(&mut self, notice: &Notice<'_>) {
        match *notice {
            Notice::Hello { session, server_time, message_bytes_max, attachment_bytes_max } => {
                // As a string: a number over 2⁵³ would change in a browser.
                self.number(b"{\"type\":\"hello\",\"session\":\"", session);
                self.timestamp(b"\",\"server_time\":", server_time);
                self.number(b",\"limits\":{\"message_bytes_max\":", message_bytes_max as u64);
                self.number(b",\"attachment_bytes_max\":", attachment_bytes_max as u64);
                self.raw(b"}");
            }
            Notice::Ack { client_id, id } => {
                self.text(b"{\"type\":\"ack\",\"client_id\":\"", client_id);
                if let Some(id) = id {
                    self.id(b"\",\"id\":\"", id);
                }
                self.raw(b"\"");
            }
            Notice::Error { code, message, client_id } => {
                self.word(b"{\"type\":\"error\",\"code\":\"", code.as_str());
                self.text(b"\",\"message\":\"", message);
                if let Some(client_id) = client_id {
                    self.text(b"\",\"client_id\":\"", client_id);
                }
                self.raw(b"\"");
            }
            Notice::Pong { client_id } => {
                self.raw(b"{\"type\":\"pong\"");
                if let Some(client_id) = client_id {
                    self.text(b",\"client_id\":\"", client_id);
                    self.raw(b"\"");
                }
            }
            Notice::Gap { reason, count } => {
                self.word(b"{\"type\":\"gap\",\"reason\":\"", reason.as_str());
                self.raw(b"\"");
                if let Some(count) = count {
                    self.number(b",\"count\":", count);
                }
            }
            Notice::Draining { retry_after_ms } => {
                self.number(b"{\"type\":\"draining\",\"retry_after_ms\":", retry_after_ms);
            }
        }
        self.raw(b"}");
    }
}

#[cfg(test)]
mod tests;
