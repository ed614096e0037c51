//! What a worker gets when a person writes.

use std::borrow::Cow;

use bytes::Bytes;
use serde_json::{Map, Value};

use crate::id::{ChannelId, MessageId, RequestId, UserId};
use crate::proto::event::Timestamp;
use crate::proto::trace::TraceContext;

/// A file that came with a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// As the browser named it. Untrusted: never a path.
    pub filename: String,
    /// As the browser named it. Untrusted.
    pub mimetype: String,
    /// The decoded bytes.
    pub data: Bytes,
}

/// One message from a person. Identity comes from the authenticated session, never from the frame.
#[derive(Debug, Clone, PartialEq)]
pub struct IncomingMessage {
    /// The platform it came through, for example `webchat`.
    pub platform: String,
    /// Where to answer: `webchat:{user}`, `room:{name}` or `sse:{id}`.
    pub channel_id: String,
    /// Who wrote it.
    pub user_id: String,
    /// What that user is called.
    pub user_name: String,
    /// What was written; for a button press its `custom_id`.
    pub text: String,
    /// Whether the bot is meant: always in a private channel; in a room if its mention is in the text.
    pub is_addressed: bool,
    /// Files.
    pub attachments: Vec<Attachment>,
    /// The channel's name for people: the room's name, or empty.
    pub channel_name: String,
    /// When it was accepted (UTC).
    pub timestamp: Timestamp,
    /// Its id: what the sender's tab got acked and what the echo carries.
    pub message_id: MessageId,
    /// The message that it answers.
    pub reply_to_id: Option<MessageId>,
    /// More. A button press: `button: {message_id, custom_id}`. A request of an OpenAI client: `request_id`, and
    /// `openai: {model, messages, params}`. A request that nobody waits for any more: `cancel: {request_id}`.
    pub extra: Map<String, Value>,
    /// Reactions, where a platform has them.
    pub reactions: Vec<Value>,
    /// One id for a person over several platforms, where known.
    pub unified_user_id: Option<String>,
    /// Other names of that person.
    pub user_aliases: Vec<String>,
    /// The span that it was asked in, where something is traced: what a worker does for it is a child of that.
    pub trace: Option<Box<TraceContext>>,
}

impl IncomingMessage {
    /// A text of a user of WebChat, with a fresh id and nothing else: addressed, without files, named as the user's id.
    #[must_use]
    pub fn new(channel_id: String, user_id: &str, text: String, timestamp: Timestamp) -> Self {
        Self {
            platform: "webchat".to_owned(),
            channel_id,
            user_id: user_id.to_owned(),
            user_name: user_id.to_owned(),
            text,
            is_addressed: true,
            attachments: Vec::new(),
            channel_name: String::new(),
            timestamp,
            message_id: MessageId::random(),
            reply_to_id: None,
            extra: Map::new(),
            reactions: Vec::new(),
            unified_user_id: None,
            user_aliases: Vec::new(),
            trace: None,
        }
    }

    /// What its order is kept by: its channel. A cancel does not wait for what it is to cancel.
    #[must_use]
    pub fn lane(&self) -> Cow<'_, str> {
        // No channel id has a control character.
        if self.extra.contains_key("cancel") {
            Cow::Owned(format!("{}\0cancel", self.channel_id))
        } else {
            Cow::Borrowed(&self.channel_id)
        }
    }

    /// Bytes that it holds: its texts, attachments and `extra`. What a queue of messages is bounded by.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let files = self.attachments.iter().map(|file| file.filename.len() + file.mimetype.len() + file.data.len());
        let texts = [&self.platform, &self.channel_id, &self.user_id, &self.user_name, &self.text, &self.channel_name];
        let trace = self.trace.as_ref().map_or(0, |trace| trace.bytes());
        let extra = object_bytes(&self.extra) + trace;
        size_of::<Self>() + files.sum::<usize>() + texts.into_iter().map(String::len).sum::<usize>() + extra
    }

    /// Tells a worker that nobody waits for the answer to `request` any more.
    #[must_use]
    pub fn cancel(request: &RequestId, user: &UserId, now: Timestamp) -> Self {
        let cancel = serde_json::json!({ "request_id": request.as_str() });
        let extra = Map::from_iter([("cancel".to_owned(), cancel)]);
        let channel_id = ChannelId::Stream(request.clone()).to_string();
        Self { extra, ..Self::new(channel_id, user.as_str(), String::new(), now) }
    }

    /// The envelope that workers outside this process read: one JSON object with the names of the inbound stream.
    ///
    /// `channel_key` is what the order of messages is kept by, the channel id. `username` and `display_name` are both
    /// the user's name; attachments are `{filename, mimetype, data}` with padded standard base64; times are Unix
    /// seconds as a float; what is unknown is `null`. `trace_id` follows the message through logs, `enqueued_at` is
    /// when it was handed to the worker's queue. With a [`trace`](Self::trace) there are `traceparent` and, unless it is
    /// empty, `tracestate` (W3C Trace Context): whoever hands them back has its answers in the same trace.
    #[must_use]
    pub fn to_json(&self, trace_id: &str, enqueued_at: Timestamp) -> Vec<u8> {
        // Every key is a string and every float finite, so this cannot fail.
        serde_json::to_vec(&self.envelope(trace_id, enqueued_at)).unwrap_or_default()
    }

    /// The same for any form. One that is not for people has the bytes of attachments as they are.
    pub(crate) fn envelope<'m>(&'m self, trace_id: &'m str, enqueued_at: Timestamp) -> Envelope<'m> {
        let attachments = self.attachments.iter().map(|file| EnvelopeFile {
            filename: &file.filename,
            mimetype: &file.mimetype,
            data: FileBytes(&file.data),
        });
        let room = self.channel_id.strip_prefix("room:");
        Envelope {
            channel_key: &self.channel_id,
            platform: &self.platform,
            channel_id: &self.channel_id,
            user_id: &self.user_id,
            username: &self.user_name,
            display_name: &self.user_name,
            content: &self.text,
            message_id: self.message_id.to_string(),
            timestamp: self.timestamp.as_seconds(),
            attachments: attachments.collect(),
            reply_to: self.reply_to_id.map(|id| id.to_string()),
            room_name: room.map(|_| self.channel_name.as_str()),
            is_dm: room.is_none(),
            trace_id,
            enqueued_at: enqueued_at.as_seconds(),
            is_addressed: self.is_addressed,
            user_aliases: &self.user_aliases,
            unified_user_id: self.unified_user_id.as_deref(),
            reactions: &self.reactions,
            extra: &self.extra,
            traceparent: self.trace.as_ref().map(|trace| trace.to_string()),
            tracestate: self.trace.as_ref().map(|trace| trace.state()).filter(|state| !state.is_empty()),
        }
    }
}

/// A node of the tree that an object is: room for eleven entries, whatever it has.
const OBJECT_NODE_BYTES: usize = 11 * (size_of::<String>() + size_of::<Value>());

/// What an object holds beside its own value; of many entries about half the room may be empty.
fn object_bytes(object: &Map<String, Value>) -> usize {
    let entries = object.iter().map(|(key, value)| key.len() + value_bytes(value));
    let nodes = object.len().div_ceil(6);
    nodes * OBJECT_NODE_BYTES + entries.sum::<usize>()
}

/// What a value holds beside itself. As deep as the parser that made it allowed.
fn value_bytes(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.capacity(),
        Value::Array(items) => items.capacity() * size_of::<Value>() + items.iter().map(value_bytes).sum::<usize>(),
        Value::Object(object) => object_bytes(object),
    }
}

/// What [`IncomingMessage::to_json`] describes.
#[derive(serde::Serialize)]
pub(crate) struct Envelope<'m> {
    channel_key: &'m str,
    platform: &'m str,
    channel_id: &'m str,
    user_id: &'m str,
    username: &'m str,
    display_name: &'m str,
    content: &'m str,
    message_id: String,
    timestamp: f64,
    attachments: Vec<EnvelopeFile<'m>>,
    reply_to: Option<String>,
    room_name: Option<&'m str>,
    is_dm: bool,
    trace_id: &'m str,
    enqueued_at: f64,
    is_addressed: bool,
    user_aliases: &'m [String],
    unified_user_id: Option<&'m str>,
    reactions: &'m [Value],
    extra: &'m Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tracestate: Option<&'m str>,
}

#[derive(serde::Serialize)]
struct EnvelopeFile<'m> {
    filename: &'m str,
    mimetype: &'m str,
    data: FileBytes<'m>,
}

/// Padded standard base64 where the form is for people, else the bytes.
struct FileBytes<'m>(&'m [u8]);

impl serde::Serialize for FileBytes<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.serialize_str(&base64_simd::STANDARD.encode_to_string(self.0))
        } else {
            serializer.serialize_bytes(self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> IncomingMessage {
        let id = MessageId::parse("00000000-0000-4000-8000-000000000001").unwrap();
        IncomingMessage {
            platform: "webchat".to_owned(),
            channel_id: "room:lobby".to_owned(),
            user_id: "u".to_owned(),
            user_name: "Ü \"q\"".to_owned(),
            text: "hi\n".to_owned(),
            is_addressed: false,
            attachments: vec![Attachment {
                filename: "a.txt".to_owned(),
                mimetype: "text/plain".to_owned(),
                data: Bytes::from_static(b"ab"),
            }],
            channel_name: "lobby".to_owned(),
            timestamp: Timestamp::from_micros(1_500_000),
            message_id: id,
            reply_to_id: Some(id),
            extra: Map::new(),
            reactions: Vec::new(),
            unified_user_id: None,
            user_aliases: vec!["x".to_owned()],
            trace: None,
        }
    }

    #[test]
    fn the_envelope_has_the_names_of_the_inbound_stream() {
        let message = message();
        let json = String::from_utf8(message.to_json("t", Timestamp::from_micros(2_000_000))).unwrap();
        let expected = concat!(
            r#"{"channel_key":"room:lobby","platform":"webchat","channel_id":"room:lobby","user_id":"u","#,
            r#""username":"Ü \"q\"","display_name":"Ü \"q\"","content":"hi\n","#,
            r#""message_id":"00000000-0000-4000-8000-000000000001","timestamp":1.5,"#,
            r#""attachments":[{"filename":"a.txt","mimetype":"text/plain","data":"YWI="}],"#,
            r#""reply_to":"00000000-0000-4000-8000-000000000001","room_name":"lobby","is_dm":false,"trace_id":"t","#,
            r#""enqueued_at":2.0,"is_addressed":false,"user_aliases":["x"],"unified_user_id":null,"reactions":[],"extra":{}}"#,
        );
        assert_eq!(json, expected);
        let private = IncomingMessage { channel_id: "webchat:u".to_owned(), reply_to_id: None, ..message };
        let json: Value = serde_json::from_slice(&private.to_json("t", Timestamp::from_micros(0))).unwrap();
        assert_eq!((&json["is_dm"], &json["room_name"], &json["reply_to"]), (&true.into(), &Value::Null, &Value::Null));
    }

    #[test]
    fn a_trace_is_told_and_counted_where_there_is_one() {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let with_trace = |state: &str| {
            let trace = TraceContext::parse(parent, state).map(Box::new);
            let message = IncomingMessage { trace, ..message() };
            let json: Value = serde_json::from_slice(&message.to_json("t", Timestamp::from_micros(0))).unwrap();
            (json, message.bytes())
        };
        let (bare, state) = (with_trace(""), with_trace("a=1"));
        assert_eq!((&bare.0["traceparent"], bare.0.get("tracestate")), (&parent.into(), None));
        assert_eq!((&state.0["traceparent"], &state.0["tracestate"]), (&parent.into(), &"a=1".into()));
        assert_eq!(state.1, bare.1 + 3);
        assert!(bare.1 > message().bytes());
    }

    #[test]
    fn what_extra_holds_is_counted() {
        let bare = message().bytes();
        let with_extra = |extra: Value| {
            let extra = extra.as_object().unwrap().clone();
            IncomingMessage { extra, ..message() }.bytes() - bare
        };
        // One node for each small object, however little is in it; a long text by its length.
        assert!(with_extra(serde_json::json!({"a": [{}, {"b": 1}]})) > 2 * 500);
        assert!((100_000..110_000).contains(&with_extra(serde_json::json!({"a": "x".repeat(100_000)}))));
    }
}
