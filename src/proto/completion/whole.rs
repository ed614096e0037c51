//! The answer to a request without `stream`: final texts, collected.

use std::collections::VecDeque;
use std::sync::Arc;

use super::render::{BLANK_LINE, LINE_BREAK, button_lines, file_link};
use super::text::{count, text};
use super::{CompletionHead, REMEMBERED_MESSAGES_MAX, end_reason, usage};
use crate::proto::event::EndReason;
use crate::proto::frame::{Frame, Kind};

/// Room for what stands around an answer's content, with the longest numbers.
const AROUND_BYTES: usize = 256;

/// A message and what follows it up to the next one.
#[derive(Debug)]
struct Part {
    /// Whose text counts: the message, or its last edit.
    text: Frame,
    /// Its buttons, a line each, escaped.
    list: Vec<u8>,
    /// The links of the files behind it, joined, escaped.
    links: Vec<u8>,
}

impl Part {
    /// Appends itself to a content that begins at `start`.
    fn append_to(&self, content: &mut Vec<u8>, start: usize) {
        let text = text(&self.text).unwrap_or_default();
        let line_break = if text.is_empty() || self.list.is_empty() { &[][..] } else { LINE_BREAK };
        join(content, start, &[text, line_break, &self.list]);
        join(content, start, &[&self.links]);
    }

    /// The most bytes that [`append_to`](Self::append_to) appends.
    fn content_bytes(&self) -> usize {
        let text = text(&self.text).unwrap_or_default();
        text.len() + self.list.len() + self.links.len() + LINE_BREAK.len() + 2 * BLANK_LINE.len()
    }
}

/// Appends the pieces of one part to a content that begins at `start`, behind an empty line if it is not the first; a
/// part without bytes is none.
fn join(content: &mut Vec<u8>, start: usize, pieces: &[&[u8]]) {
    if pieces.iter().all(|piece| piece.is_empty()) {
        return;
    }
    if content.len() > start {
        content.extend_from_slice(BLANK_LINE);
    }
    for piece in pieces {
        content.extend_from_slice(piece);
    }
}

/// One answer in one piece: frames in, a body out.
///
/// Its content is the final texts of the messages, files and lists of buttons, in order, with an empty line between
/// them. Of one answer the newest [`REMEMBERED_MESSAGES_MAX`] messages can be edited, as in a stream. How much it may
/// hold is the caller's to bound, by [`bytes`](Self::bytes).
#[derive(Debug)]
pub struct WholeCompletion {
    files_url: Arc<str>,
    /// What can change no more, joined and escaped.
    settled: Vec<u8>,
    parts: VecDeque<Part>,
    has_forgotten: bool,
    ending: Option<EndReason>,
}

impl WholeCompletion {
    /// An answer of which nothing has come yet. `files_url` is that of its [`CompletionHead`].
    #[must_use]
    pub const fn new(files_url: Arc<str>) -> Self {
        Self { files_url, settled: Vec::new(), parts: VecDeque::new(), has_forgotten: false, ending: None }
    }

    /// Takes what `frame` says. After its end nothing is taken any more.
    pub fn handle(&mut self, frame: &Frame) {
        if self.ending.is_some() {
            return;
        }
        match frame.kind() {
            Kind::Message | Kind::Buttons => self.message(frame),
            Kind::Edit => self.edit(frame),
            Kind::File => {
                let Some(link) = file_link(frame, &self.files_url) else { return };
                join(self.parts.back_mut().map_or(&mut self.settled, |part| &mut part.links), 0, &[&link]);
            }
            Kind::End => self.ending = Some(end_reason(frame)),
            _ => {}
        }
    }

    /// Why it has ended, once it has.
    #[must_use]
    pub const fn ending(&self) -> Option<EndReason> {
        self.ending
    }

    /// The memory that it holds, in bytes, with the frames that it keeps.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let parts = self.parts.iter().map(|part| part.text.bytes() + part.list.capacity() + part.links.capacity());
        self.settled.capacity() + self.parts.capacity() * size_of::<Part>() + parts.sum::<usize>()
    }

    /// The body of the answer; usage counts are estimates. It is no longer than [`bytes`](Self::bytes) and what is around
    /// the texts.
    #[must_use]
    pub fn to_json(&self, head: &CompletionHead) -> Vec<u8> {
        let mut body = head.front("chat.completion");
        let content_bytes = self.settled.len() + self.parts.iter().map(Part::content_bytes).sum::<usize>();
        body.reserve_exact(content_bytes + AROUND_BYTES);
        body.extend_from_slice(b"{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"");
        let start = body.len();
        body.extend_from_slice(&self.settled);
        for part in &self.parts {
            part.append_to(&mut body, start);
        }
        let usage = usage(head.prompt_tokens, count(&body[start..]));
        body.extend_from_slice(b"\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],");
        body.extend_from_slice(usage.as_bytes());
        body.push(b'}');
        body
    }

    fn message(&mut self, frame: &Frame) {
        if frame.message_id().is_none() || text(frame).is_none() {
            return;
        }
        if self.parts.len() == REMEMBERED_MESSAGES_MAX
            && let Some(oldest) = self.parts.pop_front()
        {
            oldest.append_to(&mut self.settled, 0);
            self.has_forgotten = true;
        }
        let list = if frame.kind() == Kind::Buttons { button_lines(frame.json()) } else { Vec::new() };
        self.parts.push_back(Part { text: frame.clone(), list, links: Vec::new() });
    }

    fn edit(&mut self, frame: &Frame) {
        let (Some(id), Some(_)) = (frame.message_id(), text(frame)) else { return };
        match self.parts.iter_mut().rev().find(|part| part.text.message_id() == Some(id)) {
            Some(part) => part.text = frame.clone(),
            None if !self.has_forgotten => self.message(frame),
            None => {}
        }
    }
}
