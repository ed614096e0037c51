//! One entry of a stream as bytes: what workers are given, and what they answer with.
//!
//! An envelope is JSON or MessagePack; of what workers write the first byte tells which. Inbound it is
//! [`IncomingMessage::to_json`], or a MessagePack map of the same keys in the same order with the bytes of attachments as
//! they are. Outbound it has `channel_id`, `type` and what the same call of the HTTP API has in its body:
//!
//! | `type` | more |
//! |---|---|
//! | `message` | `text`, `reply_to`?, `message_id`? |
//! | `buttons` | `text`, `buttons` or `view`, `reply_to`?, `message_id`? |
//! | `file` | `filename`, `mimetype`?, `data`: base64, in MessagePack also bytes |
//! | `edit` | `message_id`, `text` |
//! | `typing` | `active` |
//! | `end` | `reason`? |
//!
//! and with any of them `platform` (`webchat`), `message_key` (at most 256 bytes: what comes with one that was seen in
//! the last 10 minutes is not sent again), `trace_id`, and `traceparent` with `tracestate` as they came inbound (W3C Trace
//! Context; what is none is ignored). Unknown keys are ignored.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use rmp_serde::decode::Error as PackedError;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, IgnoredAny, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::config::EnvelopeForm;
use crate::gateway::api::error::ApiError;
use crate::gateway::api::op::{Body, Call, Described, Op, OpKind, Scalar, message_id, required, text};
use crate::id::{ChannelId, MessageId};
use crate::platform::message::IncomingMessage;
use crate::platform::view::{View, ViewError};
use crate::proto::event::{Button, Timestamp};
use crate::proto::trace::TraceContext;
use crate::traces;

/// The longest `message_key`.
pub const MESSAGE_KEY_BYTES_MAX: usize = 256;
/// The most levels of a MessagePack value, as in `serde_json`.
const DEPTH_MAX: usize = 128;

/// Why an envelope of a worker cannot be handled. It is set aside with this reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The entry has no field `e`.
    #[error("the entry has no field `e`")]
    NoEnvelope,
    /// More bytes than are read.
    #[error("the envelope has {bytes} bytes; at most {bytes_max} are allowed")]
    TooLarge {
        /// How many it has.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// It begins like JSON and is none, or has a key twice.
    #[error("the envelope is not a JSON object as expected: {reason}")]
    NotJson {
        /// What is wrong with it.
        reason: String,
    },
    /// Neither JSON nor a MessagePack map, or a key is there twice.
    #[error("the envelope is not a MessagePack map as expected: {reason}")]
    NotMessagePack {
        /// What is wrong with it.
        reason: String,
    },
    /// A field is missing, has the wrong type or a value that is not allowed.
    #[error("{reason}")]
    BadField {
        /// Which field, and what it must be.
        reason: String,
    },
}

impl Malformed {
    fn field(reason: impl ToString) -> Self {
        Self::BadField { reason: reason.to_string() }
    }
}

impl From<ApiError> for Malformed {
    fn from(error: ApiError) -> Self {
        Self::field(error)
    }
}

/// What a worker asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Outbound<'a> {
    pub(crate) channel: ChannelId,
    pub(crate) call: Call<'a>,
    /// The id that the worker chose for its message.
    pub(crate) id: Option<MessageId>,
    pub(crate) message_key: Option<Cow<'a, str>>,
    pub(crate) trace_id: Option<Cow<'a, str>>,
    /// The span that it is of, where something is traced.
    pub(crate) trace: Option<Box<TraceContext>>,
}

impl Outbound<'_> {
    /// Where it goes.
    #[must_use]
    pub const fn channel(&self) -> &ChannelId {
        &self.channel
    }

    /// What makes a repeat of it the same, if the worker gave that.
    #[must_use]
    pub fn message_key(&self) -> Option<&str> {
        self.message_key.as_deref()
    }

    /// What follows it through logs, if the worker gave that.
    #[must_use]
    pub fn trace_id(&self) -> Option<&str> {
        self.trace_id.as_deref()
    }
}

/// What an envelope has beside the body of a call. The types are checked where they are read.
#[derive(serde::Deserialize)]
struct Head<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    platform: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    message_id: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    message_key: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    trace_id: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    traceparent: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    tracestate: Option<Scalar<'a>>,
}

impl Described for View {
    fn read(self) -> Result<Vec<Button>, ViewError> {
        self.0
    }
}

/// Reads an envelope of a worker. Texts without escapes are borrowed from it.
///
/// ```
/// use tabcast::gateway::worker::redis::envelope::decode;
///
/// let outbound = decode(br#"{"channel_id":"webchat:alice","type":"message","text":"hi"}"#, 1024)?;
/// assert_eq!(outbound.channel().to_string(), "webchat:alice");
/// let missing = decode(br#"{"channel_id":"webchat:alice","type":"message"}"#, 1024).unwrap_err();
/// assert_eq!(missing.to_string(), "`text` is missing: it must be a string");
/// # Ok::<(), tabcast::gateway::worker::redis::envelope::Malformed>(())
/// ```
///
/// # Errors
/// [`Malformed`], whatever the bytes.
pub fn decode(bytes: &[u8], bytes_max: usize) -> Result<Outbound<'_>, Malformed> {
    if bytes.len() > bytes_max {
        return Err(Malformed::TooLarge { bytes: bytes.len(), bytes_max });
    }
    if bytes.trim_ascii_start().first() == Some(&b'{') {
        let head = serde_json::from_slice(bytes).map_err(|error| Malformed::NotJson { reason: error.to_string() })?;
        with_head(head, |kind| Ok(Op::parse(Some(kind), bytes)?))
    } else {
        with_head(packed(bytes)?, |kind| Ok(Op::read(Some(kind), packed::<Body<'_, View>>(bytes)?)?))
    }
}

fn with_head<'a>(
    head: Head<'a>,
    body: impl FnOnce(OpKind) -> Result<Op<'a>, Malformed>,
) -> Result<Outbound<'a>, Malformed> {
    if let Some(platform) = text(head.platform, "platform")?
        && platform != "webchat"
    {
        return Err(Malformed::field("`platform` must be webchat, or absent"));
    }
    let message_key = text(head.message_key, "message_key")?;
    if let Some(key) = &message_key
        && !(1..=MESSAGE_KEY_BYTES_MAX).contains(&key.len())
    {
        let bytes = key.len();
        let reason = format!("`message_key` has {bytes} bytes; 1 to {MESSAGE_KEY_BYTES_MAX} are allowed");
        return Err(Malformed::BadField { reason });
    }
    let kind = kind(&required(head.kind, "type")?)?;
    let id = match kind {
        OpKind::Send | OpKind::Buttons => message_id(head.message_id, "message_id")?,
        OpKind::File | OpKind::Edit | OpKind::Typing | OpKind::End => None,
    };
    let trace_id = text(head.trace_id, "trace_id")?;
    let trace = if traces::is_on() { trace(head.traceparent, head.tracestate).map(Box::new) } else { None };
    let Op { channel, call } = body(kind)?;
    Ok(Outbound { channel, call, id, message_key, trace_id, trace })
}

/// What is no text is no trace (W3C Trace Context, 3.2): it is as if it were not there.
fn trace(parent: Option<Scalar<'_>>, state: Option<Scalar<'_>>) -> Option<TraceContext> {
    let state = text(state, "tracestate").ok().flatten();
    TraceContext::parse(&text(parent, "traceparent").ok()??, state.as_deref().unwrap_or_default())
}

/// The calls have the names of the frames here, and not those of the API.
fn kind(name: &str) -> Result<OpKind, Malformed> {
    match name {
        "message" => Some(OpKind::Send),
        "send" => None,
        name => OpKind::parse(name),
    }
    .ok_or_else(|| Malformed::field("`type` must be one of message, file, buttons, edit, typing, end"))
}

/// Reads a map, all of the bytes, and no deeper than [`DEPTH_MAX`].
fn packed<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Malformed> {
    let bad = |reason: String| Malformed::NotMessagePack { reason };
    if !matches!(bytes.first(), Some(0x80..=0x8f | 0xde | 0xdf)) {
        return Err(bad("it does not begin with a map".to_owned()));
    }
    let mut deserializer = rmp_serde::Deserializer::from_read_ref(bytes);
    deserializer.set_max_depth(DEPTH_MAX);
    let value = deserializer.deserialize_map(Named(PhantomData)).map_err(|error| bad(error.to_string()))?;
    match u8::deserialize(&mut deserializer) {
        // There is no marker left to be read.
        Err(PackedError::InvalidMarkerRead(_)) => Ok(value),
        _ => Err(bad("more bytes follow it".to_owned())),
    }
}

/// Reads a map as a `T`, by the keys that are texts. Derived structs also read arrays, field by field, and take a number
/// for the field of that place.
struct Named<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Named<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(NamedEntries(entries)))
    }
}

struct NamedEntries<A>(A);

impl<'de, A: MapAccess<'de>> MapAccess<'de> for NamedEntries<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        while let Some(key) = self.0.next_key::<Scalar<'de>>()? {
            if let Scalar::Text(name) = key {
                return seed.deserialize(name.into_deserializer()).map(Some);
            }
            self.0.next_value::<IgnoredAny>()?;
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.0.next_value_seed(seed)
    }
}

/// Writes what a worker is given. `enqueued_at` is when that was.
pub(crate) fn encode(message: &IncomingMessage, form: EnvelopeForm, enqueued_at: Timestamp) -> Vec<u8> {
    let trace_id = message.message_id.to_string().replace('-', "");
    match form {
        EnvelopeForm::Json => message.to_json(&trace_id, enqueued_at),
        // Every length is known and every key a string, so this cannot fail.
        EnvelopeForm::MessagePack => {
            rmp_serde::to_vec_named(&message.envelope(&trace_id, enqueued_at)).unwrap_or_default()
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::{Value, json};

    use super::*;
    use crate::id::{RequestId, UserId};
    use crate::platform::message::Attachment;

    const ID: &str = "00000000-0000-4000-8000-000000000001";

    /// A description that may have bytes, which JSON has not: a string that begins with `bytes:`.
    struct Packed<'v>(&'v Value);

    impl serde::Serialize for Packed<'_> {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            match self.0 {
                Value::String(text) => match text.strip_prefix("bytes:") {
                    Some(text) => serializer.serialize_bytes(text.as_bytes()),
                    None => serializer.serialize_str(text),
                },
                Value::Array(items) => serializer.collect_seq(items.iter().map(Packed)),
                Value::Object(object) => serializer.collect_map(object.iter().map(|(key, value)| (key, Packed(value)))),
                value => value.serialize(serializer),
            }
        }
    }

    fn packed_of(value: &Value) -> Vec<u8> {
        rmp_serde::to_vec_named(&Packed(value)).unwrap()
    }

    fn short(outbound: &Outbound<'_>) -> String {
        let call = match &outbound.call {
            Call::Send { text, reply_to } => format!("message '{text}' reply_to={reply_to:?}"),
            Call::Buttons { text, buttons, .. } => format!("buttons '{text}' {}", buttons.len()),
            Call::File { filename, mimetype, data } => format!("file {filename} {mimetype:?} {data:?}"),
            Call::Edit { id, text } => format!("edit {id} '{text}'"),
            Call::Typing { active } => format!("typing {active}"),
            Call::End { reason } => format!("end {}", reason.as_str()),
        };
        let more = [&outbound.message_key, &outbound.trace_id].map(|text| text.as_deref().unwrap_or("-").to_owned());
        let id = outbound.id.map_or("-".to_owned(), |id| id.to_string());
        format!("{} {call} id={id} key={} trace={}", outbound.channel, more[0], more[1]).replace(ID, "ID")
    }

    #[test]
    fn every_type_is_read_in_both_forms() {
        let check = |envelope: Value, expected: &str| {
            let json = format!(" \n{envelope}");
            assert_eq!(decode(json.as_bytes(), 1 << 20).map(|one| short(&one)), Ok(expected.to_owned()), "{envelope}");
            let packed = packed_of(&envelope);
            assert_eq!(decode(&packed, 1 << 20).map(|one| short(&one)), Ok(expected.to_owned()), "{envelope}");
        };
        check(
            json!({"channel_id": "alice", "platform": "webchat", "type": "message", "text": "日\n", "reply_to": ID,
                "message_id": ID, "message_key": "k", "trace_id": "t", "other": [{"deep": [1.5, null, true]}]}),
            "webchat:alice message '日\n' reply_to=Some(ID) id=ID key=k trace=t",
        );
        check(
            json!({"channel_id": "room:r", "type": "message", "text": "", "message_id": null, "platform": null}),
            "room:r message '' reply_to=None id=- key=- trace=-",
        );
        check(
            json!({"channel_id": "u", "type": "buttons", "text": "?", "message_id": ID,
                "buttons": [{"label": "A", "style": 1, "emoji": {"name": "e", "id": 7}}]}),
            "webchat:u buttons '?' 1 id=ID key=- trace=-",
        );
        check(
            json!({"channel_id": "u", "type": "buttons", "text": "?", "view": {"children": [{"label": "A"}, {"x": 1}]}}),
            "webchat:u buttons '?' 1 id=- key=- trace=-",
        );
        check(
            json!({"channel_id": "u", "type": "file", "filename": "a b", "data": "YWI=", "message_id": 5}),
            "webchat:u file a b None b\"ab\" id=- key=- trace=-",
        );
        check(
            json!({"channel_id": "u", "type": "edit", "text": "x", "message_id": ID}),
            "webchat:u edit ID 'x' id=- key=- trace=-",
        );
        check(json!({"channel_id": "u", "type": "typing", "active": true}), "webchat:u typing true id=- key=- trace=-");
        check(json!({"channel_id": "sse:r", "type": "end"}), "sse:r end stop id=- key=- trace=-");
        check(json!({"channel_id": "sse:r", "type": "end", "reason": "error"}), "sse:r end error id=- key=- trace=-");
    }

    #[test]
    fn a_file_in_messagepack_may_be_its_bytes() {
        let envelope =
            json!({"channel_id": "u", "type": "file", "filename": "f", "mimetype": "m/m", "data": "bytes:\u{0}\n="});
        let packed = packed_of(&envelope);
        let expected = Call::File { filename: "f".into(), mimetype: Some("m/m".into()), data: Bytes::from("\0\n=") };
        assert_eq!(decode(&packed, 1 << 20).unwrap().call, expected);
    }

    #[test]
    fn what_is_malformed_is_named_in_both_forms() {
        let check = |envelope: Value, expected: &str| {
            let expected = Err(Malformed::field(expected));
            assert_eq!(decode(envelope.to_string().as_bytes(), 1 << 20), expected, "{envelope}");
            assert_eq!(decode(&packed_of(&envelope), 1 << 20), expected, "{envelope}");
        };
        let with = |field: &str, value: Value| {
            let mut envelope = json!({"channel_id": "u", "type": "message", "text": "x"});
            envelope[field] = value;
            envelope
        };
        let types = "`type` must be one of message, file, buttons, edit, typing, end";
        check(json!({}), "`type` is missing: it must be a string");
        check(with("type", json!("send")), types);
        check(with("type", json!("Message")), types);
        check(with("type", json!(1)), "`type` must be a string");
        check(with("platform", json!("discord")), "`platform` must be webchat, or absent");
        check(with("platform", json!([])), "`platform` must be a string");
        check(with("channel_id", json!({})), "`channel_id` must be a string");
        check(with("channel_id", json!("sse:")), "`channel_id`: the id is empty");
        check(with("text", Value::Null), "`text` is missing: it must be a string");
        check(with("text", json!(false)), "`text` must be a string");
        check(with("reply_to", json!("x")), "`reply_to`: a message id is a UUID of 36 characters");
        check(with("message_id", json!("x")), "`message_id`: a message id is a UUID of 36 characters");
        check(with("trace_id", json!(1.5)), "`trace_id` must be a string");
        check(with("message_key", json!(-1)), "`message_key` must be a string");
        check(with("message_key", json!("")), "`message_key` has 0 bytes; 1 to 256 are allowed");
        check(with("message_key", json!("k".repeat(257))), "`message_key` has 257 bytes; 1 to 256 are allowed");
        let of = |kind: &str, more: Value| {
            let mut envelope = with("type", json!(kind));
            envelope.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            envelope
        };
        check(of("edit", json!({})), "`message_id` is missing: it must be a string");
        check(of("typing", json!({"active": 1})), "`active` must be true or false");
        check(of("typing", json!({})), "`active` must be true or false");
        check(of("end", json!({"reason": "bored"})), "`reason` must be one of stop, error, timeout, cancelled");
        check(of("file", json!({"data": ""})), "`filename` is missing: it must be a string");
        check(of("file", json!({"filename": "f", "data": "a b"})), "`data` is not standard base64");
        check(of("file", json!({"filename": "f", "data": [1]})), "`data` must be a string");
        check(of("file", json!({"filename": "a\nb", "data": ""})), "`filename` has a control character");
        check(of("buttons", json!({})), "`buttons` or `view` is missing");
        check(of("buttons", json!({"buttons": [], "view": []})), "only one of `buttons` and `view` may be given");
        check(of("buttons", json!({"buttons": [1]})), "button 0 is not an object");
        let label = "the label of button 0 has 81 characters; at most 80 are allowed";
        check(of("buttons", json!({"view": {"children": [{"label": "l".repeat(81)}]}})), label);
        // A description that nobody asked for is not read.
        assert!(decode(&packed_of(&with("buttons", json!([1]))), 1 << 20).is_ok());
    }

    #[test]
    fn bytes_that_are_neither_form_are_refused() {
        let check = |bytes: &[u8], expected: &str| {
            let error = decode(bytes, 1 << 10).unwrap_err().to_string();
            assert!(error.contains(expected), "{bytes:?}: {error}");
        };
        check(b"", "does not begin with a map");
        check(b" \n ", "does not begin with a map");
        check(b"[1]", "does not begin with a map");
        check(&[0x93, 0xc0, 0xc0, 0xc0], "does not begin with a map");
        check(b"{", "not a JSON object");
        check(b"{\"type\":\"a\",\"type\":\"b\"}", "duplicate field `type`");
        check(b"{\"type\":\"end\",\"text\":1,\"text\":2}", "duplicate field `text`");
        check(b"{} x", "trailing characters");
        check(b"{\"type\":\"\xff\"}", "not a JSON object");
        check(&[0x81, 0xa4], "not a MessagePack map");
        // A map of four thousand million entries that are not there.
        check(&[0xdf, 0xff, 0xff, 0xff, 0xff], "not a MessagePack map");
        check(&[0x81, 0xa4, b't', b'e', b'x', b't', 0xdb, 0xff, 0xff, 0xff, 0xff], "not a MessagePack map");
        check(&[&packed_of(&json!({"type": "end"}))[..], &[0x91]].concat(), "more bytes follow it");
        check(&vec![b'{'; 1025], "has 1025 bytes; at most 1024 are allowed");
        let deep = [&[0x81, 0xa1, b'x'][..], &[0x91; 900][..], &[0xc0]].concat();
        check(&deep, "not a MessagePack map");
        // What JSON has in unknown keys is skipped, however deep.
        check(format!("{{\"x\":{}{}}}", "[".repeat(500), "]".repeat(500)).as_bytes(), "`type` is missing");
        // Extensions and bytes are values like others; text that is no UTF-8 is no text.
        let odd = [&[0x83, 0xa1, b'x', 0xd6, 5, 1, 2, 3, 4, 0xa4, b't', b'y', b'p', b'e', 0xa1, 0xff][..], &[1, 2]];
        check(&odd.concat(), "`type` must be a string");
        let odd = [0x81, 0xa4, b't', b'y', b'p', b'e', 0xd4, 1, 2];
        check(&odd, "`type` must be a string");
        let many = json!({"channel_id": "u", "type": "buttons", "text": "", "view": vec![vec![0; 100]; 1]});
        assert_eq!(decode(&packed_of(&many), 1 << 10).unwrap_err().to_string(), "button 0 is not an object");
    }

    #[test]
    fn no_prefix_and_no_flipped_bit_panics() {
        let envelope = json!({"channel_id": "u", "type": "buttons", "text": "?", "message_key": "k", "view":
            {"children": [{"label": "A", "style": 1}]}, "data": "bytes:ab", "x": [1.5, -7, 70000, {"y": null}]});
        for bytes in [envelope.to_string().into_bytes(), packed_of(&envelope)] {
            for end in 0..bytes.len() {
                assert!(decode(&bytes[..end], 1 << 20).is_err());
            }
            for at in 0..bytes.len() {
                for bit in 0..8 {
                    let mut bytes = bytes.clone();
                    bytes[at] ^= 1 << bit;
                    drop(decode(&bytes, 1 << 20));
                }
            }
        }
    }

    #[test]
    fn what_workers_are_given_has_the_same_keys_in_both_forms() {
        let file = Attachment { filename: "f".into(), mimetype: "m".into(), data: Bytes::from_static(b"\xff\0") };
        let extra = json!({"button": {"message_id": ID, "custom_id": "c"}, "n": [1.5, -3, 70000]});
        let message =
            IncomingMessage::new("webchat:u".to_owned(), "u", "hi".to_owned(), Timestamp::from_micros(1_500_000));
        let message = IncomingMessage { attachments: vec![file], extra: extra.as_object().unwrap().clone(), ..message };
        let now = Timestamp::from_micros(2_500_000);
        let json = String::from_utf8(encode(&message, EnvelopeForm::Json, now)).unwrap();
        let packed = encode(&message, EnvelopeForm::MessagePack, now);
        let keys = ["channel_key", "platform", "username", "message_id", "attachments", "enqueued_at", "extra"];
        let at = |text: &[u8], key: &str| text.windows(key.len()).position(|bytes| bytes == key.as_bytes()).unwrap();
        assert!(keys.map(|key| at(json.as_bytes(), key)).is_sorted());
        assert!(keys.map(|key| at(&packed, key)).is_sorted());
        // The bytes as they are: the marker of two bytes, and they.
        assert!(packed.windows(4).any(|bytes| bytes == [0xc4, 2, 0xff, 0]));
        let mut value: Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&value["attachments"][0]["data"], &value["enqueued_at"]), (&json!("/wA="), &json!(2.5)));
        assert_eq!(value["trace_id"], message.message_id.to_string().replace('-', ""));
        value["attachments"] = json!([]);
        let bare = IncomingMessage { attachments: Vec::new(), ..message };
        let packed: Value = rmp_serde::from_slice(&encode(&bare, EnvelopeForm::MessagePack, now)).unwrap();
        assert_eq!(packed, value);
        let (request, user) = (RequestId::parse("r").unwrap(), UserId::parse("u").unwrap());
        let cancel = IncomingMessage::cancel(&request, &user, now);
        let packed: Value = rmp_serde::from_slice(&encode(&cancel, EnvelopeForm::MessagePack, now)).unwrap();
        assert_eq!(packed["extra"], json!({"cancel": {"request_id": "r"}}));
    }
}
