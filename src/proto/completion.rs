//! Answers as OpenAI's clients read them: frames into the chunks of one chat completion, or into a whole one.
//!
//! [`Completion`] makes a stream's records, [`WholeCompletion`] collects what a request without `stream` is answered
//! with. Both are pure: a frame goes in, bytes come out.
//!
//! - A *message* is a delta. A later message, file or list of buttons begins behind an empty line.
//! - An *edit* of the newest message that extends what was sent of it is a delta: what is new. Any other edit is held.
//!   A later one that is an extension again releases it; at the end of the stream, what stands behind the longest
//!   common beginning of what was sent and of the last held text is sent. So an edit that takes something back leaves
//!   in a stream what was sent, and adds what differs.
//! - A *file* is a link, *buttons* are lines, *typing* is a keep-alive.
//! - An edit of an unknown message is a new message. Of one answer the newest 64 messages are remembered; once one
//!   was forgotten (what was held of it is sent then), edits of messages that are not remembered are ignored.
//!
//! What was sent is remembered by the frame that said it, and deltas are copied from its escaped text: a delta costs
//! one comparison with what was sent, and its own length. A frame whose JSON has not the shape of our writer, or that
//! came from another node without its id, has no text.

mod render;
mod text;
mod whole;

use std::sync::Arc;

use smallvec::SmallVec;

use self::render::{BLANK_LINE, LINE_BREAK, button_lines, file_link, put_escaped};
pub use self::render::{ErrorKind, error_body, without_data};
use self::text::{count, open_text, rest_after, text};
pub use self::whole::WholeCompletion;
use crate::id::RequestId;
use crate::proto::event::EndReason;
use crate::proto::frame::{Frame, Kind};
use crate::proto::json::escape_separators;

/// The most messages of one answer that edits can be about. Each costs at most two frames: the one whose text was
/// sent, and the last edit that is held.
pub const REMEMBERED_MESSAGES_MAX: usize = 64;

/// A comment that readers ignore: for typing, and at the heartbeat's interval. Without the framing of an HTTP chunk.
pub const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

const DONE: &[u8] = b"data: [DONE]\n\n";

/// About how many tokens a text of `chars` characters (Unicode scalar values) has: a quarter, rounded up.
///
/// It is an estimate: nobody here knows the model's tokens.
///
/// ```
/// use tabcast::proto::completion::estimated_tokens;
/// assert_eq!([0, 1, 4, 5].map(estimated_tokens), [0, 1, 1, 2]);
/// ```
#[must_use]
pub const fn estimated_tokens(chars: u64) -> u64 {
    chars.div_ceil(4)
}

/// What is the same in all of one answer.
#[derive(Debug, Clone)]
pub struct CompletionHead {
    /// The answer's id, `chatcmpl-…`.
    pub id: RequestId,
    /// When it began, in Unix seconds.
    pub created: u64,
    /// The model that the client named.
    pub model: Box<str>,
    /// Where files are fetched from, without a slash at its end: a file is at `{files_url}/files/{id}/{filename}`.
    pub files_url: Arc<str>,
    /// Whether the client asked for a chunk with the usage.
    pub wants_usage: bool,
    /// See [`estimated_tokens`].
    pub prompt_tokens: u64,
}

impl CompletionHead {
    /// `{"id":…,"object":…,"created":…,"model":…,"choices":[`
    fn front(&self, object: &str) -> Vec<u8> {
        let mut front = Vec::with_capacity(128 + self.model.len());
        front.extend_from_slice(b"{\"id\":\"");
        put_escaped(self.id.as_str(), &mut front);
        front.extend_from_slice(
            format!("\",\"object\":\"{object}\",\"created\":{},\"model\":\"", self.created).as_bytes(),
        );
        put_escaped(&self.model, &mut front);
        front.extend_from_slice(b"\",\"choices\":[");
        front
    }
}

/// `"usage":{…}` for a content of `chars` characters.
fn usage(prompt_tokens: u64, chars: u64) -> String {
    let completion_tokens = estimated_tokens(chars);
    let total_tokens = prompt_tokens.saturating_add(completion_tokens);
    format!(
        "\"usage\":{{\"prompt_tokens\":{prompt_tokens},\"completion_tokens\":{completion_tokens},\"total_tokens\":{total_tokens}}}"
    )
}

/// Why an answer ends before it is complete: a closed list, each with the code of its error record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Failure {
    /// The worker failed.
    Worker,
    /// The worker took too long.
    Timeout,
    /// Somebody gave up.
    Cancelled,
    /// The reader was too slow for what it was sent.
    SlowConsumer,
    /// This node shuts down.
    Draining,
    /// A fault of ours.
    Internal,
}

impl Failure {
    /// What an end stands for; `None` if the answer is complete.
    #[must_use]
    pub const fn of_end(reason: EndReason) -> Option<Self> {
        match reason {
            EndReason::Stop => None,
            EndReason::Error => Some(Self::Worker),
            EndReason::Timeout => Some(Self::Timeout),
            EndReason::Cancelled => Some(Self::Cancelled),
        }
    }

    /// The `code` of its error.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Worker => "worker_error",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::SlowConsumer => "slow_consumer",
            Self::Draining => "draining",
            Self::Internal => "internal_error",
        }
    }

    /// The `message` of its error, for a person.
    #[must_use]
    pub const fn message(self) -> &'static str {
        match self {
            Self::Worker => "the worker failed; the answer is not complete",
            Self::Timeout => "the worker took too long; the answer is not complete",
            Self::Cancelled => "the answer was cancelled",
            Self::SlowConsumer => "the answer was read too slowly; it is not complete",
            Self::Draining => "the gateway is shutting down; the answer is not complete",
            Self::Internal => "the gateway failed; the answer is not complete",
        }
    }

    /// The body of its error: see [`error_body`].
    #[must_use]
    pub fn body(self) -> Vec<u8> {
        error_body(self.message(), ErrorKind::Server, None, Some(self.code()))
    }
}

/// Why the stream of an `end` frame ends. One that cannot be read is an end all the same, and no good one.
fn end_reason(frame: &Frame) -> EndReason {
    let json = frame.json().strip_prefix(b"{\"type\":\"end\",\"reason\":\"").and_then(|json| json.strip_suffix(b"\"}"));
    let reason = json.and_then(|reason| std::str::from_utf8(reason).ok()).and_then(EndReason::parse);
    reason.unwrap_or(EndReason::Error)
}

/// What the content that was sent ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tail {
    /// Nothing was sent.
    Nothing,
    /// The text of one of the remembered messages, which can go on there.
    Message(u8),
    /// What does not go on: a file, a list of buttons, a forgotten message.
    Other,
}

impl Tail {
    fn message(index: usize) -> Self {
        u8::try_from(index).map_or(Self::Other, Self::Message)
    }
}

/// Writes records, and knows what was sent.
#[derive(Debug)]
struct Chunks {
    /// All of a record up to its choices.
    front: Box<[u8]>,
    prompt_tokens: u64,
    /// Counted only if the usage is wanted.
    sent_chars: u64,
    wants_usage: bool,
    tail: Tail,
}

impl Chunks {
    fn end(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(if self.wants_usage { b",\"usage\":null}\n\n" } else { b"}\n\n" });
    }

    fn choice(&self, delta: &[u8], finish_reason: &[u8], out: &mut Vec<u8>) {
        for part in [
            &self.front,
            &b"{\"index\":0,\"delta\":"[..],
            delta,
            b",\"logprobs\":null,\"finish_reason\":",
            finish_reason,
            b"}]",
        ] {
            out.extend_from_slice(part);
        }
        self.end(out);
    }

    /// A delta with `content`, which belongs to `owner`, behind an empty line if something else was sent before it.
    fn content(&mut self, owner: Tail, content: &[u8], out: &mut Vec<u8>) {
        const BEFORE: &[u8] = b"{\"index\":0,\"delta\":{\"content\":\"";
        const AFTER: &[u8] = b"\"},\"logprobs\":null,\"finish_reason\":null}]";
        if content.is_empty() {
            return;
        }
        let goes_on = self.tail == Tail::Nothing || (self.tail == owner && owner != Tail::Other);
        let separator = if goes_on { &[][..] } else { BLANK_LINE };
        if self.wants_usage {
            self.sent_chars += count(separator) + count(content);
        }
        self.tail = owner;
        out.reserve(self.front.len() + BEFORE.len() + separator.len() + content.len() + AFTER.len() + 32);
        for part in [&self.front, BEFORE, separator] {
            out.extend_from_slice(part);
        }
        escape_separators(content, out);
        out.extend_from_slice(AFTER);
        self.end(out);
    }

    fn finish(&self, out: &mut Vec<u8>) {
        self.choice(b"{}", b"\"stop\"", out);
        if self.wants_usage {
            out.extend_from_slice(&self.front);
            let usage = usage(self.prompt_tokens, self.sent_chars);
            for part in ["],", &usage, "}\n\n"] {
                out.extend_from_slice(part.as_bytes());
            }
        }
        out.extend_from_slice(DONE);
    }
}

/// A message of the answer.
#[derive(Debug)]
struct Remembered {
    /// The frame whose text was sent, all of it.
    sent: Frame,
    /// How long that text is, escaped.
    sent_bytes: usize,
    /// The last edit, if its text was not sent.
    held: Option<Frame>,
}

impl Remembered {
    fn sent_text(&self) -> &[u8] {
        open_text(&self.sent).and_then(|open| open.get(..self.sent_bytes)).unwrap_or_default()
    }
}

/// One answer as a stream of chunks: frames in, records out.
///
/// Records are appended to a buffer of the caller, each `data: …\n\n` or [`KEEP_ALIVE`], without the framing of HTTP.
/// After [`is_over`](Self::is_over) nothing is appended any more.
///
/// While it waits it holds about 250 bytes, and the frame of each message: with one message nothing else is allocated.
/// At most it holds two frames for each of [`REMEMBERED_MESSAGES_MAX`] messages; never one of a file.
///
/// ```
/// use tabcast::id::{MessageId, RequestId};
/// use tabcast::proto::completion::{Completion, CompletionHead};
/// use tabcast::proto::event::{Event, Timestamp};
/// use tabcast::proto::frame::Frame;
/// let mut answer = Completion::new(CompletionHead {
///     id: RequestId::parse("chatcmpl-1")?,
///     created: 1_700_000_000,
///     model: "tabcast".into(),
///     files_url: "https://chat.example".into(),
///     wants_usage: false,
///     prompt_tokens: 0,
/// });
/// let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(0));
/// let first = Event::Message { id, text: "Hel", sender: "star", reply_to: None, timestamp };
/// answer.handle(&Frame::encode(&first), &mut Vec::new());
/// let mut out = Vec::new();
/// answer.handle(&Frame::encode(&Event::Edit { id, text: "Hello", timestamp }), &mut out);
/// assert!(String::from_utf8(out)?.contains(r#""delta":{"content":"lo"}"#));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Completion {
    chunks: Chunks,
    files_url: Arc<str>,
    messages: SmallVec<[Remembered; 1]>,
    /// Whether the newest message is the last of the remembered ones, and nothing stands behind its text.
    newest_is_open: bool,
    has_forgotten: bool,
    is_over: bool,
}

impl Completion {
    /// Memory of the frames that it keeps, in bytes.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        let held = |message: &Remembered| message.sent.bytes() + message.held.as_ref().map_or(0, Frame::bytes);
        self.messages.iter().map(held).sum()
    }

    /// An answer of which nothing was sent yet.
    #[must_use]
    pub fn new(head: CompletionHead) -> Self {
        let front = [b"data: ", &head.front("chat.completion.chunk")[..]].concat();
        Self {
            chunks: Chunks {
                front: front.into_boxed_slice(),
                prompt_tokens: head.prompt_tokens,
                sent_chars: 0,
                wants_usage: head.wants_usage,
                tail: Tail::Nothing,
            },
            files_url: head.files_url,
            messages: SmallVec::new(),
            newest_is_open: false,
            has_forgotten: false,
            is_over: false,
        }
    }

    /// Appends the record that says whose turn it is: the first of every answer.
    pub fn start(&mut self, out: &mut Vec<u8>) {
        if !self.is_over {
            self.chunks.choice(b"{\"role\":\"assistant\",\"content\":\"\"}", b"null", out);
        }
    }

    /// Appends what `frame` comes to: no record, one, or (at the end, or when a held edit is released) more.
    pub fn handle(&mut self, frame: &Frame, out: &mut Vec<u8>) {
        if self.is_over {
            return;
        }
        match frame.kind() {
            Kind::Message | Kind::Buttons => self.message(frame, out),
            Kind::Edit => self.edit(frame, out),
            Kind::File => self.file(frame, out),
            Kind::Typing if frame.json() == b"{\"type\":\"typing\",\"active\":true}" => {
                out.extend_from_slice(KEEP_ALIVE)
            }
            Kind::End => match Failure::of_end(end_reason(frame)) {
                None => self.stop(out),
                Some(failure) => self.fail(failure, out),
            },
            _ => {}
        }
    }

    /// Ends the answer before it is complete: appends one error record. What is held is not sent.
    pub fn fail(&mut self, failure: Failure, out: &mut Vec<u8>) {
        if self.is_over {
            return;
        }
        for part in [b"data: ", &failure.body()[..], b"\n\n"] {
            out.extend_from_slice(part);
        }
        self.end();
    }

    /// Whether the answer has ended.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.is_over
    }

    fn message(&mut self, frame: &Frame, out: &mut Vec<u8>) {
        let (Some(_), Some(text)) = (frame.message_id(), text(frame)) else { return };
        let list = if frame.kind() == Kind::Buttons { button_lines(frame.json()) } else { Vec::new() };
        if self.messages.len() == REMEMBERED_MESSAGES_MAX {
            self.forget_oldest(out);
        }
        let owner = Tail::message(self.messages.len());
        self.messages.push(Remembered { sent: frame.clone(), sent_bytes: text.len(), held: None });
        self.newest_is_open = list.is_empty();
        if list.is_empty() {
            self.chunks.content(owner, text, out);
        } else {
            let line_break = if text.is_empty() { &[][..] } else { LINE_BREAK };
            self.chunks.content(Tail::Other, &[text, line_break, &list].concat(), out);
        }
    }

    fn edit(&mut self, frame: &Frame, out: &mut Vec<u8>) {
        let (Some(id), Some(open)) = (frame.message_id(), open_text(frame)) else { return };
        let Some(index) = self.messages.iter().rposition(|message| message.sent.message_id() == Some(id)) else {
            if !self.has_forgotten {
                self.message(frame, out);
            }
            return;
        };
        let is_open = self.newest_is_open && index + 1 == self.messages.len();
        let message = &mut self.messages[index];
        let Some(new) = rest_after(message.sent_text(), open) else { return };
        if is_open && new.is_extension {
            self.chunks.content(Tail::message(index), new.rest, out);
            *message = Remembered { sent: frame.clone(), sent_bytes: new.text_bytes, held: None };
        } else {
            message.held = Some(frame.clone());
        }
    }

    fn file(&mut self, frame: &Frame, out: &mut Vec<u8>) {
        let Some(link) = file_link(frame, &self.files_url) else { return };
        self.newest_is_open = false;
        self.chunks.content(Tail::Other, &link, out);
    }

    /// Sends what is held of a message.
    fn release(&mut self, index: usize, out: &mut Vec<u8>) {
        let message = &mut self.messages[index];
        let Some(held) = message.held.take() else { return };
        let new = open_text(&held).and_then(|open| rest_after(message.sent_text(), open));
        self.chunks.content(Tail::message(index), new.map_or(&[], |new| new.rest), out);
    }

    fn forget_oldest(&mut self, out: &mut Vec<u8>) {
        self.release(0, out);
        self.messages.remove(0);
        self.has_forgotten = true;
        if let Tail::Message(index) = self.chunks.tail {
            self.chunks.tail = index.checked_sub(1).map_or(Tail::Other, Tail::Message);
        }
    }

    fn stop(&mut self, out: &mut Vec<u8>) {
        for index in 0..self.messages.len() {
            self.release(index, out);
        }
        self.chunks.finish(out);
        self.end();
    }

    fn end(&mut self) {
        self.is_over = true;
        self.messages = SmallVec::new();
    }
}

#[cfg(test)]
mod tests;
