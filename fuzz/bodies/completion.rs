//! Whatever frames come, an answer is a stream of records that every client can read, and it ends once.

use serde_json::Value;
use tabcast::id::{MessageId, RequestId};
use tabcast::proto::completion::{Completion, CompletionHead, WholeCompletion};
use tabcast::proto::event::{Button, EndReason, Event, Timestamp};
use tabcast::proto::frame::{Frame, Kind};

/// The bytes are lines, a frame each: which kind, which message, whether the rest is its text or all of its JSON, and
/// the rest.
pub(crate) fn run(bytes: &[u8]) {
    let frames: Vec<Frame> = bytes.split(|byte| *byte == b'\n').filter_map(frame).collect();
    for wants_usage in [false, true] {
        let head = head(wants_usage);
        let (mut answer, mut whole) = (Completion::new(head.clone()), WholeCompletion::new(head.files_url.clone()));
        let mut out = Vec::new();
        answer.start(&mut out);
        for frame in &frames {
            let (before, was_over) = (out.len(), answer.is_over());
            answer.handle(frame, &mut out);
            assert!(!was_over || out.len() == before);
            whole.handle(frame);
            assert_eq!(answer.is_over(), whole.ending().is_some());
        }
        records(&out, answer.is_over());
        let body: Value = serde_json::from_slice(&whole.to_json(&head)).expect("JSON");
        assert!(body["choices"][0]["message"]["content"].is_string());
    }
}

fn head(wants_usage: bool) -> CompletionHead {
    CompletionHead {
        id: RequestId::parse("chatcmpl-1").expect("an id"),
        created: 1_700_000_000,
        model: "m".into(),
        files_url: "https://chat.example".into(),
        wants_usage,
        prompt_tokens: 1,
    }
}

fn frame(line: &[u8]) -> Option<Frame> {
    let ([kind, message, form], rest) = line.split_first_chunk()?;
    let kind = Kind::ALL[usize::from(*kind) % Kind::ALL.len()];
    let id = MessageId::parse(&format!("00000000-0000-4000-8000-{:012}", message % 4)).expect("an id");
    let text = String::from_utf8_lossy(rest);
    if form % 2 == 1 {
        return Some(Frame::relay(kind, Some(id), None, &text));
    }
    let timestamp = Timestamp::from_micros(1);
    let event = match kind {
        Kind::Message => Event::Message { id, text: &text, sender: "s", reply_to: None, timestamp },
        Kind::Buttons => {
            let button = Button { label: text.to_string(), emoji: Some(text.to_string()), ..Button::default() };
            let event = Event::Buttons { id, text: &text, sender: "s", reply_to: None, buttons: &[button], timestamp };
            return Some(Frame::encode(&event));
        }
        Kind::File => Event::File { id, filename: &text, mimetype: "m", data: rest, timestamp },
        Kind::Edit => Event::Edit { id, text: &text, timestamp },
        Kind::Typing => Event::Typing { active: rest.is_empty() },
        Kind::End => Event::End { reason: EndReason::parse(&text).unwrap_or(EndReason::Stop) },
        _ => return Some(Frame::ping()),
    };
    Some(Frame::encode(&event))
}

fn records(out: &[u8], is_over: bool) {
    let out = std::str::from_utf8(out).expect("UTF-8");
    assert!(!out.contains(['\r', '\u{85}', '\u{2028}', '\u{2029}']));
    let records: Vec<&str> = out.strip_suffix("\n\n").expect("whole records").split("\n\n").collect();
    let mut ended = false;
    for record in &records {
        assert!(!ended, "{record} behind the end");
        if *record == ": keep-alive" {
            continue;
        }
        let data = record.strip_prefix("data: ").expect("a record");
        if data == "[DONE]" {
            ended = true;
            continue;
        }
        let value: Value = serde_json::from_str(data).expect("JSON");
        ended = value.get("error").is_some();
        assert!(ended || value["object"] == "chat.completion.chunk");
    }
    assert_eq!(ended, is_over);
}
