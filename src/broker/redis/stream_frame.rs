//! A stream's frame as somebody published it: a node, or a worker in any language. What is inside is written anew, in
//! the one form that everything behind here knows. With `traceparent`, and perhaps `tracestate`, it names the span that it
//! is of: so does a node whose publish is traced, and a worker may.

use std::borrow::Cow;
use std::time::SystemTime;

use crate::id::MessageId;
use crate::proto::event::{ButtonStyle, EndReason, Timestamp};
use crate::proto::frame::{Frame, Kind};
use crate::proto::trace::TraceContext;

/// Whose messages they are if nobody says so.
const SENDER: &str = "star";

/// All that a frame may have, in the order of our own frames.
#[derive(Default, serde::Deserialize, serde::Serialize)]
#[serde(default)]
struct Published<'f> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'f, str>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    id: Option<Cow<'f, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    filename: Option<Cow<'f, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    mimetype: Option<Cow<'f, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    data: Option<Cow<'f, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    text: Option<Cow<'f, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    sender: Option<Cow<'f, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    reply_to: Option<Cow<'f, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    buttons: Option<Vec<Button<'f>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    active: Option<bool>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    reason: Option<Cow<'f, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp: Option<f64>,
    #[serde(borrow, skip_serializing)]
    traceparent: Header<'f>,
    #[serde(borrow, skip_serializing)]
    tracestate: Header<'f>,
}

/// What traces are named by. What is no text names none, and spoils no frame.
#[derive(Default, serde::Deserialize)]
#[serde(untagged)]
enum Header<'f> {
    Text(#[serde(borrow)] Cow<'f, str>),
    Other(serde::de::IgnoredAny),
    #[default]
    Absent,
}

impl Header<'_> {
    fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Other(_) | Self::Absent => None,
        }
    }
}

/// A button, with its keys in the order of our own.
#[derive(serde::Deserialize, serde::Serialize)]
struct Button<'f> {
    #[serde(borrow, default)]
    label: Cow<'f, str>,
    #[serde(borrow, default)]
    custom_id: Cow<'f, str>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    emoji: Option<Cow<'f, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    style: Option<ButtonStyle>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    url: Option<Cow<'f, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    disabled: Option<bool>,
}

impl Published<'_> {
    /// What belongs to its kind, and nothing else. None: something is missing that its kind cannot be without.
    fn in_our_form(self, kind: Kind, id: Option<MessageId>) -> Option<Self> {
        let now = || Timestamp::from(SystemTime::now()).as_seconds();
        let (id, timestamp) = (id.map(|id| id.to_string().into()), Some(self.timestamp.unwrap_or_else(now)));
        let bare = Self { kind: self.kind, ..Self::default() };
        Some(match kind {
            Kind::Message | Kind::Buttons => {
                let (text, sender) = (Some(self.text?), Some(self.sender.unwrap_or(SENDER.into())));
                Self { id, text, sender, reply_to: self.reply_to, buttons: self.buttons, timestamp, ..bare }
            }
            Kind::File => {
                let (filename, data) = (Some(self.filename?), self.data?);
                let mimetype = Some(self.mimetype.unwrap_or("application/octet-stream".into()));
                let size = Some(self.size.unwrap_or_else(|| decoded_bytes(&data)));
                Self { id, filename, mimetype, data: Some(data), size, timestamp, ..bare }
            }
            Kind::Edit => Self { id, text: Some(self.text?), timestamp, ..bare },
            Kind::Typing => Self { active: Some(self.active?), ..bare },
            _ => {
                let reason = self.reason.unwrap_or("stop".into());
                EndReason::parse(&reason)?;
                Self { reason: Some(reason), ..bare }
            }
        })
    }
}

/// Bytes that padded base64 stands for.
fn decoded_bytes(base64: &str) -> u64 {
    let digits = base64.trim_end_matches('=').len() as u64;
    digits * 3 / 4
}

/// Says in a frame's JSON, which is an object with something in it, which span it is of.
pub(crate) fn put_trace(json: &mut Vec<u8>, context: &TraceContext) {
    if json.pop_if(|last| *last == b'}').is_none() {
        return;
    }
    json.extend_from_slice(format!(",\"traceparent\":\"{context}\"").as_bytes());
    // A state is text, which serializes.
    if let Ok(state) = serde_json::to_vec(context.state())
        && !context.state().is_empty()
    {
        json.extend_from_slice(b",\"tracestate\":");
        json.extend_from_slice(&state);
    }
    json.push(b'}');
}

/// Reads a frame, and the sampled span that it is of; None if it is none of the table of frames.
pub(crate) fn stream_frame(payload: &[u8]) -> Option<(Frame, Option<TraceContext>)> {
    let published: Published<'_> = serde_json::from_str(std::str::from_utf8(payload).ok()?).ok()?;
    let kind = match &*published.kind {
        "message" if published.buttons.is_some() => Kind::Buttons,
        "message" => Kind::Message,
        "file" => Kind::File,
        "edit" => Kind::Edit,
        "typing" => Kind::Typing,
        "end" => Kind::End,
        _ => return None,
    };
    let given = published.id.as_deref().and_then(|id| MessageId::parse(id).ok());
    let id = match kind {
        Kind::Typing | Kind::End => None,
        // There is no edit of nothing.
        Kind::Edit => Some(given?),
        _ => Some(given.unwrap_or_else(MessageId::random)),
    };
    let state = published.tracestate.text().unwrap_or_default();
    let trace = published.traceparent.text().and_then(|parent| TraceContext::parse(parent, state));
    // Every key is a string, and a float that JSON has is finite.
    let json = serde_json::to_string(&published.in_our_form(kind, id)?).ok()?;
    Some((Frame::relay(kind, id, None, &json), trace.filter(TraceContext::is_sampled)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::event;
    use crate::proto::event::Event;
    use crate::proto::json;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn our_own_frames_come_out_as_they_went_in() {
        let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(1_763_836_800_123_456));
        let buttons = [event::Button {
            label: "A".to_owned(),
            custom_id: "a".to_owned(),
            style: Some(ButtonStyle::Danger),
            ..event::Button::default()
        }];
        let text = "a\n\"日\u{2028}\u{7f}\u{1f980}";
        let events = [
            Event::Message { id, text, sender: "star", reply_to: Some(id), timestamp },
            Event::Buttons { id, text, sender: "star", reply_to: None, buttons: &buttons, timestamp },
            Event::File { id, filename: "f \"", mimetype: "m/m", data: b"abcd", timestamp },
            Event::Edit { id, text, timestamp },
            Event::Typing { active: true },
            Event::End { reason: EndReason::Cancelled },
        ];
        for event in &events {
            let frame = Frame::encode(event);
            let mut ascii = Vec::new();
            json::escape_non_ascii(frame.json(), &mut ascii);
            for context in [None, TraceContext::parse(PARENT, ""), TraceContext::parse(PARENT, r#"a="\"#)] {
                let mut traced = ascii.clone();
                context.iter().for_each(|context| put_trace(&mut traced, context));
                assert_eq!(stream_frame(&traced).unwrap().1, context);
                assert_eq!(stream_frame(&traced).unwrap().0.json(), stream_frame(&ascii).unwrap().0.json());
            }
            let (read, _) = stream_frame(&ascii).unwrap();
            assert_eq!(
                (read.kind(), read.message_id(), String::from_utf8_lossy(read.json())),
                (frame.kind(), frame.message_id(), String::from_utf8_lossy(frame.json()))
            );
        }
    }

    #[test]
    fn what_others_write_is_understood_or_refused() {
        const ID: &str = "00000000-0000-4000-8000-000000000001";
        let check = |json: &str, expected: Option<&str>| {
            let read = stream_frame(json.replace("$ID", ID).as_bytes());
            let json_read = read.map(|(frame, _)| String::from_utf8(frame.json().to_vec()).unwrap());
            assert_eq!(json_read, expected.map(|expected| expected.replace("$ID", ID)), "{json}");
        };
        check(
            "{\n \"timestamp\": 1.5, \"text\": \"hi\", \"type\": \"message\", \"id\": \"$ID\", \"x\": [1]}",
            Some(r#"{"type":"message","id":"$ID","text":"hi","sender":"star","timestamp":1.5}"#),
        );
        check(r#"{ "reason": "stop", "type": "end" }"#, Some(r#"{"type":"end","reason":"stop"}"#));
        check(r#"{"type":"end"}"#, Some(r#"{"type":"end","reason":"stop"}"#));
        check(r#"{"active":false,"type":"typing"}"#, Some(r#"{"type":"typing","active":false}"#));
        let file = r#"{"type":"file","id":"$ID","filename":"f","data":"YWI=","timestamp":1}"#;
        let written = concat!(
            r#"{"type":"file","id":"$ID","filename":"f","mimetype":"application/octet-stream","#,
            r#""data":"YWI=","size":2,"timestamp":1.0}"#
        );
        check(file, Some(written));
        assert!(stream_frame(br#"{"type":"message","text":"without an id"}"#).unwrap().0.message_id().is_some());
        for bad in [
            "",
            "{}",
            "[]",
            r#"{"type":"hello"}"#,
            r#"{"type":1}"#,
            r#"{"type":"message"}"#,
            r#"{"type":"message","text":1}"#,
            r#"{"type":"edit","text":"of nothing"}"#,
            r#"{"type":"end","reason":"because"}"#,
            r#"{"type":"typing"}"#,
            r#"{"type":"end"} x"#,
        ] {
            check(bad, None);
        }
        // A trace that is none, or is not recorded, is not there.
        for parent in ["", "x", &PARENT.replace("-01", "-00")] {
            assert_eq!(
                stream_frame(format!(r#"{{"type":"end","traceparent":"{parent}"}}"#).as_bytes()).unwrap().1,
                None
            );
        }
        let (frame, trace) = stream_frame(br#"{"type":"end","traceparent":{"a":1},"tracestate":7}"#).unwrap();
        assert_eq!((frame.json(), trace), (&br#"{"type":"end","reason":"stop"}"#[..], None));
        assert!(stream_frame(b"{\"type\":\"end\",\"a\":\"\xff\"}").is_none());
    }
}
