//! What a browser says: JSON text into commands, with limits, and a command into what a worker gets.

use std::ops::Range;

use bytes::Bytes;
use serde_json::{Map, json};
use simd_json::prelude::{ValueAsScalar, ValueIntoString};
use simd_json::{Buffers, Tape, tape};

use crate::id::{ChannelId, IdError, MessageId, RoomName, UserId};
use crate::platform::adapter::BotIdentity;
use crate::platform::message::{Attachment, IncomingMessage};
use crate::platform::webchat::DEFAULT_MIMETYPE;
use crate::proto::event::{CUSTOM_ID_CHARS_MAX, ErrorCode, Timestamp};
use crate::proto::limits::SessionLimits;

/// The most bytes of a `client_id`, a client's own id for what it sent.
pub const CLIENT_ID_BYTES_MAX: usize = 64;
/// The most bytes of an attachment's filename, and of its media type.
pub const FILENAME_BYTES_MAX: usize = 255;
/// The most levels of objects and arrays within each other.
const DEPTH_MAX: usize = 32;
/// A text longer than this gives its buffers back: one large message does not stay in memory.
const SCRATCH_BYTES_MAX: usize = 64 << 10;

/// How much one frame may bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InboundLimits {
    /// Characters of a text.
    pub text_chars_max: usize,
    /// Bytes of one attachment, decoded.
    pub attachment_bytes_max: usize,
    /// Attachments of one message. Default 8; each may cost `attachment_bytes_max` until the worker has it.
    pub attachments_max: usize,
}

impl From<&SessionLimits> for InboundLimits {
    fn from(limits: &SessionLimits) -> Self {
        Self {
            text_chars_max: limits.text_chars_max,
            attachment_bytes_max: limits.attachment_bytes_max,
            attachments_max: 8,
        }
    }
}

impl Default for InboundLimits {
    fn default() -> Self {
        Self::from(&SessionLimits::default())
    }
}

/// What parsing reuses from frame to frame: one a thread. Holds at most about 2 MiB, whatever was parsed.
pub struct Scratch {
    buffers: Buffers,
    tape: Tape<'static>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { buffers: Buffers::with_max_depth(4096, DEPTH_MAX), tape: Tape(Vec::new()) }
    }
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scratch").finish_non_exhaustive()
    }
}

/// What a browser asked for. It owns what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `{"type":"message","text","reply_to"?,"room"?,"client_id"?,"attachments"?}`
    Message {
        /// As it was typed.
        text: String,
        /// The message that it answers.
        reply_to: Option<MessageId>,
        /// Where it goes, if not to the bot alone.
        room: Option<RoomName>,
        /// The client's own id for it.
        client_id: Option<Box<str>>,
        /// Files, decoded.
        attachments: Vec<Attachment>,
    },
    /// `{"type":"button","message_id","custom_id","room"?,"client_id"?}`
    Button {
        /// The message that the button stands on.
        message_id: MessageId,
        /// Which button.
        custom_id: String,
        /// The room that the message stands in, so that the answer goes there.
        room: Option<RoomName>,
        /// The client's own id for the press.
        client_id: Option<Box<str>>,
    },
    /// `{"type":"typing","active","room"?,"client_id"?}`
    Typing {
        /// Whether the person is typing now.
        active: bool,
        /// Where.
        room: Option<RoomName>,
        /// The client's own id for it.
        client_id: Option<Box<str>>,
    },
    /// `{"type":"join","room","client_id"?}`
    Join {
        /// The room.
        room: RoomName,
        /// The client's own id for it.
        client_id: Option<Box<str>>,
    },
    /// `{"type":"leave","room","client_id"?}`
    Leave {
        /// The room.
        room: RoomName,
        /// The client's own id for it.
        client_id: Option<Box<str>>,
    },
    /// `{"type":"ping","client_id"?}`
    Ping {
        /// The client's own id for it.
        client_id: Option<Box<str>>,
    },
}

/// Why a frame was refused: what an `error` frame says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct InboundError {
    /// One of a closed list.
    pub code: ErrorCode,
    /// What is wrong, and how much is allowed.
    pub message: String,
    /// The client's own id for what was refused, if that could be read.
    pub client_id: Option<Box<str>>,
}

/// Reads one frame. `text` is rewritten: strings are unescaped in place.
///
/// Unknown keys are ignored, `null` stands for an absent optional field, and a field that is there twice is refused.
///
/// ```
/// use tabcast::platform::inbound::{Command, InboundLimits, Scratch, parse};
/// let mut frame = br#"{"type":"ping","client_id":"7"}"#.to_vec();
/// let command = parse(&mut frame, &mut Scratch::default(), &InboundLimits::default());
/// assert_eq!(command, Ok(Command::Ping { client_id: Some("7".into()) }));
/// ```
///
/// # Errors
/// `bad_frame`: not UTF-8, not JSON, deeper than 32 levels, not an object, or no known `type`. `bad_field`: a field is
/// missing, has the wrong type or a value that is not allowed. `too_large`, `limit_reached`: a limit is passed.
pub fn parse(text: &mut [u8], scratch: &mut Scratch, limits: &InboundLimits) -> Result<Command, InboundError> {
    let large = text.len() > SCRATCH_BYTES_MAX;
    let mut tape = std::mem::replace(&mut scratch.tape, Tape(Vec::new())).reset();
    let result = match simd_json::fill_tape(text, &mut scratch.buffers, &mut tape) {
        Ok(()) => read(&tape, limits),
        Err(error) => Err(Refusal::new(ErrorCode::BadFrame, format!("the frame is not JSON: {error}")).without_id()),
    };
    if large {
        *scratch = Scratch::default();
    } else {
        scratch.tape = tape.reset();
    }
    result
}

type Json<'t, 'i> = tape::Value<'t, 'i>;

/// A refusal before it is known who asked.
struct Refusal {
    code: ErrorCode,
    message: String,
}

impl Refusal {
    fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    fn field(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::BadField, message)
    }

    fn without_id(self) -> InboundError {
        self.with_id(None)
    }

    fn with_id(self, client_id: Option<Box<str>>) -> InboundError {
        InboundError { code: self.code, message: self.message, client_id }
    }
}

const TYPE: usize = 0;
const CLIENT_ID: usize = 1;
const TEXT: usize = 2;
const REPLY_TO: usize = 3;
const ROOM: usize = 4;
const ATTACHMENTS: usize = 5;
const MESSAGE_ID: usize = 6;
const CUSTOM_ID: usize = 7;
const ACTIVE: usize = 8;
const FILENAME: usize = 9;
const MIMETYPE: usize = 10;
const DATA: usize = 11;
const FIELDS: [&str; 12] = [
    "type",
    "client_id",
    "text",
    "reply_to",
    "room",
    "attachments",
    "message_id",
    "custom_id",
    "active",
    "filename",
    "mimetype",
    "data",
];
/// What a frame may have, and what an attachment may have, in [`FIELDS`].
const FRAME_FIELDS: Range<usize> = 0..9;
const ATTACHMENT_FIELDS: Range<usize> = 9..12;

/// The known fields of one object, each at most once.
struct Fields<'t, 'i> {
    values: [Option<Json<'t, 'i>>; FIELDS.len()],
    /// The first field that was there twice; told only after the `client_id` is known.
    doubled: Option<&'static str>,
}

impl<'t, 'i> Fields<'t, 'i> {
    fn of(object: &tape::Object<'t, 'i>, known: Range<usize>) -> Self {
        let mut fields = Self { values: [None; FIELDS.len()], doubled: None };
        for (key, value) in object {
            let Some(index) = FIELDS[known.clone()].iter().position(|name| *name == key) else { continue };
            let index = known.start + index;
            if fields.values[index].replace(value).is_some() {
                fields.doubled.get_or_insert(FIELDS[index]);
            }
        }
        fields
    }

    fn refuse_doubled(&self) -> Result<(), Refusal> {
        match self.doubled {
            Some(field) => Err(Refusal::field(format!("`{field}` is there twice"))),
            None => Ok(()),
        }
    }

    /// The value, if it is there and not `null`.
    fn value(&self, index: usize) -> Option<Json<'t, 'i>> {
        self.values[index].filter(|value| value.as_null().is_none())
    }

    fn text(&self, index: usize) -> Result<Option<&'i str>, Refusal> {
        match self.value(index) {
            None => Ok(None),
            Some(value) => match value.into_string() {
                Some(text) => Ok(Some(text)),
                None => Err(Refusal::field(format!("`{}` must be a string", FIELDS[index]))),
            },
        }
    }

    fn required_text(&self, index: usize) -> Result<&'i str, Refusal> {
        self.text(index)?.ok_or_else(|| Refusal::field(format!("`{}` is missing: it must be a string", FIELDS[index])))
    }

    fn message_id(&self, index: usize) -> Result<Option<MessageId>, Refusal> {
        let parse =
            |text| MessageId::parse(text).map_err(|error| Refusal::field(format!("`{}`: {error}", FIELDS[index])));
        self.text(index)?.map(parse).transpose()
    }

    fn room(&self) -> Result<Option<RoomName>, Refusal> {
        let parse = |text| {
            RoomName::parse(text).map_err(|error| match error {
                IdError::TooLong { .. } => Refusal::new(ErrorCode::TooLarge, format!("`room`: {error}")),
                _ => Refusal::field(format!("`room`: {error}")),
            })
        };
        self.text(ROOM)?.map(parse).transpose()
    }

    fn required_room(&self) -> Result<RoomName, Refusal> {
        self.room()?.ok_or_else(|| Refusal::field("`room` is missing: it must be a string"))
    }

    fn client_id(&self) -> Result<Option<Box<str>>, Refusal> {
        let Some(text) = self.text(CLIENT_ID)? else { return Ok(None) };
        if text.len() > CLIENT_ID_BYTES_MAX {
            return Err(too_many("client_id", text.len(), "bytes", CLIENT_ID_BYTES_MAX));
        }
        if text.chars().any(char::is_control) {
            return Err(Refusal::field("`client_id` has a control character"));
        }
        Ok(Some(text.into()))
    }
}

fn too_many(field: &str, count: usize, unit: &str, max: usize) -> Refusal {
    Refusal::new(ErrorCode::TooLarge, format!("`{field}` has {count} {unit}; at most {max} are allowed"))
}

fn read(tape: &Tape<'_>, limits: &InboundLimits) -> Result<Command, InboundError> {
    let Some(object) = tape.0.first().and_then(|_| tape.as_value().as_object()) else {
        return Err(Refusal::new(ErrorCode::BadFrame, "the frame is not a JSON object").without_id());
    };
    let fields = Fields::of(&object, FRAME_FIELDS);
    let client_id = if fields.doubled == Some(FIELDS[CLIENT_ID]) { Ok(None) } else { fields.client_id() };
    let client_id = client_id.map_err(Refusal::without_id)?;
    command(&fields, limits, &client_id).map_err(|refusal| refusal.with_id(client_id))
}

fn command(fields: &Fields<'_, '_>, limits: &InboundLimits, client_id: &Option<Box<str>>) -> Result<Command, Refusal> {
    fields.refuse_doubled()?;
    let client_id = client_id.clone();
    match fields.text(TYPE).ok().flatten() {
        Some("message") => {
            let text = fields.required_text(TEXT)?;
            let chars = text.chars().count();
            if chars > limits.text_chars_max {
                return Err(too_many("text", chars, "characters", limits.text_chars_max));
            }
            let (reply_to, room) = (fields.message_id(REPLY_TO)?, fields.room()?);
            let attachments = attachments(fields, limits)?;
            Ok(Command::Message { text: text.to_owned(), reply_to, room, client_id, attachments })
        }
        Some("button") => {
            let message_id = fields.message_id(MESSAGE_ID)?;
            let message_id = message_id.ok_or_else(|| Refusal::field("`message_id` is missing: it must be a UUID"))?;
            let custom_id = fields.required_text(CUSTOM_ID)?;
            let chars = custom_id.chars().count();
            if chars > CUSTOM_ID_CHARS_MAX {
                return Err(too_many("custom_id", chars, "characters", CUSTOM_ID_CHARS_MAX));
            }
            Ok(Command::Button { message_id, custom_id: custom_id.to_owned(), room: fields.room()?, client_id })
        }
        Some("typing") => {
            let active = fields.value(ACTIVE).and_then(|value| value.as_bool());
            let active = active.ok_or_else(|| Refusal::field("`active` must be true or false"))?;
            Ok(Command::Typing { active, room: fields.room()?, client_id })
        }
        Some("join") => Ok(Command::Join { room: fields.required_room()?, client_id }),
        Some("leave") => Ok(Command::Leave { room: fields.required_room()?, client_id }),
        Some("ping") => Ok(Command::Ping { client_id }),
        _ => Err(Refusal::new(ErrorCode::BadFrame, "`type` must be one of message, button, typing, join, leave, ping")),
    }
}

fn attachments(fields: &Fields<'_, '_>, limits: &InboundLimits) -> Result<Vec<Attachment>, Refusal> {
    let Some(value) = fields.value(ATTACHMENTS) else { return Ok(Vec::new()) };
    let list = value.as_array().ok_or_else(|| Refusal::field("`attachments` must be an array"))?;
    if list.len() > limits.attachments_max {
        let (count, max) = (list.len(), limits.attachments_max);
        let message = format!("{count} attachments; at most {max} are allowed");
        return Err(Refusal::new(ErrorCode::LimitReached, message));
    }
    list.iter().map(|value| attachment(value, limits)).collect()
}

fn attachment(value: Json<'_, '_>, limits: &InboundLimits) -> Result<Attachment, Refusal> {
    let object = value.as_object().ok_or_else(|| Refusal::field("an attachment must be an object"))?;
    let fields = Fields::of(&object, ATTACHMENT_FIELDS);
    fields.refuse_doubled()?;
    let filename = fields.required_text(FILENAME)?;
    if filename.is_empty() {
        return Err(Refusal::field("`filename` is empty"));
    }
    let mimetype = fields.text(MIMETYPE)?.filter(|text| !text.is_empty()).unwrap_or(DEFAULT_MIMETYPE);
    for (field, text) in [("filename", filename), ("mimetype", mimetype)] {
        if text.len() > FILENAME_BYTES_MAX {
            return Err(too_many(field, text.len(), "bytes", FILENAME_BYTES_MAX));
        }
        if text.chars().any(char::is_control) {
            return Err(Refusal::field(format!("`{field}` has a control character")));
        }
    }
    let data = decode(fields.required_text(DATA)?, limits.attachment_bytes_max)?;
    Ok(Attachment { filename: filename.to_owned(), mimetype: mimetype.to_owned(), data })
}

/// Decoded data. Its length is known, and checked, before anything is decoded.
fn decode(text: &str, bytes_max: usize) -> Result<Bytes, Refusal> {
    let digits = text.trim_end_matches('=').len();
    let bytes = digits / 4 * 3 + [0, 0, 1, 2][digits % 4];
    if bytes > bytes_max {
        return Err(too_many("data", bytes, "bytes, decoded", bytes_max));
    }
    base64_bytes(text).ok_or_else(|| Refusal::field("`data` is not standard base64"))
}

/// Standard base64, padded or not. Nothing if it is not that.
pub(crate) fn base64_bytes(text: &str) -> Option<Bytes> {
    let alphabet = if text.ends_with('=') { base64_simd::STANDARD } else { base64_simd::STANDARD_NO_PAD };
    alphabet.decode_to_vec(text).ok().map(Bytes::from)
}

/// Who sent a command: the authenticated session, never the frame.
#[derive(Debug, Clone, Copy)]
pub struct Author<'a> {
    /// Who.
    pub user_id: &'a UserId,
    /// What that user is called.
    pub user_name: &'a str,
}

impl Command {
    /// The client's own id for it: what its `ack`, `error` or `pong` carries.
    #[must_use]
    pub fn client_id(&self) -> Option<&str> {
        let (Self::Message { client_id, .. }
        | Self::Button { client_id, .. }
        | Self::Typing { client_id, .. }
        | Self::Join { client_id, .. }
        | Self::Leave { client_id, .. }
        | Self::Ping { client_id }) = self;
        client_id.as_deref()
    }

    /// The room that it names: the session must be in it, or be allowed to join it.
    #[must_use]
    pub fn room(&self) -> Option<&RoomName> {
        match self {
            Self::Message { room, .. } | Self::Button { room, .. } | Self::Typing { room, .. } => room.as_ref(),
            Self::Join { room, .. } | Self::Leave { room, .. } => Some(room),
            Self::Ping { .. } => None,
        }
    }

    /// What a worker gets for a message or a button press; nothing for the others. `id` is what the sender is acked
    /// and what the echo carries, `now` when it was accepted.
    ///
    /// A button press has its `custom_id` for a text, and `extra.button = {message_id, custom_id}`. The bot is always
    /// addressed in a private channel and by a press; in a room if its mention is in the text as a word of its own.
    #[must_use]
    pub fn into_incoming(
        self,
        author: Author<'_>,
        bot: &BotIdentity,
        id: MessageId,
        now: Timestamp,
    ) -> Option<IncomingMessage> {
        let mut extra = Map::new();
        let (text, reply_to_id, room, attachments) = match self {
            Self::Message { text, reply_to, room, attachments, .. } => (text, reply_to, room, attachments),
            Self::Button { message_id, custom_id, room, .. } => {
                let press = json!({ "message_id": message_id.to_string(), "custom_id": custom_id });
                extra.insert("button".to_owned(), press);
                (custom_id, None, room, Vec::new())
            }
            Self::Typing { .. } | Self::Join { .. } | Self::Leave { .. } | Self::Ping { .. } => return None,
        };
        let mentioned = has_mention(&text, &bot.mention);
        let is_addressed = room.is_none() || mentioned || extra.contains_key("button");
        let channel_name = room.as_ref().map_or_else(String::new, |room| room.as_str().to_owned());
        let channel = match room {
            Some(room) => ChannelId::Room(room),
            None => ChannelId::User(author.user_id.clone()),
        };
        Some(IncomingMessage {
            platform: bot.platform.clone(),
            user_name: author.user_name.to_owned(),
            is_addressed,
            attachments,
            channel_name,
            message_id: id,
            reply_to_id,
            extra,
            ..IncomingMessage::new(channel.to_string(), author.user_id.as_str(), text, now)
        })
    }
}

/// Whether `mention` stands in `text` and is not a part of a longer word. Only letters that have cases, digits and `_`
/// make a word longer: scripts without cases are also written without spaces.
fn has_mention(text: &str, mention: &str) -> bool {
    let in_word = |letter: char| letter.is_lowercase() || letter.is_uppercase() || letter.is_numeric() || letter == '_';
    !mention.is_empty()
        && text.match_indices(mention).any(|(at, found)| {
            let (before, after) = (text[..at].chars().next_back(), text[at + found.len()..].chars().next());
            !before.is_some_and(in_word) && !after.is_some_and(in_word)
        })
}

#[cfg(test)]
mod tests {
    use proptest::strategy::Strategy;
    use serde_json::Value;

    use super::*;

    const ID: &str = "00000000-0000-4000-8000-000000000001";

    fn limits() -> InboundLimits {
        InboundLimits { text_chars_max: 10, attachment_bytes_max: 6, attachments_max: 2 }
    }

    fn run(text: &str) -> Result<Command, InboundError> {
        parse(&mut text.replace("$ID", ID).into_bytes(), &mut Scratch::default(), &limits())
    }

    fn room(name: &str) -> RoomName {
        RoomName::parse(name).unwrap()
    }

    fn message(text: &str) -> Command {
        let text = text.to_owned();
        Command::Message { text, reply_to: None, room: None, client_id: None, attachments: Vec::new() }
    }

    #[test]
    fn every_command_is_read() {
        let check = |text: &str, expected: Command| assert_eq!(run(text), Ok(expected), "{text}");
        let id = MessageId::parse(ID).unwrap();
        let c = || Some(Box::from("c"));
        check(r#"{"type":"message","text":"hi"}"#, message("hi"));
        check(r#"{"type":"message","text":""}"#, message(""));
        check(r#" { "text" : " a\n\u00e9\ud83d\ude00 " , "type" : "message" } "#, message(" a\né😀 "));
        check(
            r#"{"type":"message","text":"hi","reply_to":null,"room":null,"client_id":null,"attachments":null}"#,
            message("hi"),
        );
        check(r#"{"type":"message","text":"hi","new":{"text":[1,{"text":2}]},"new":1,"z":[[]]}"#, message("hi"));
        let attachment = |filename: &str, mimetype: &str, data: &'static [u8]| Attachment {
            filename: filename.to_owned(),
            mimetype: mimetype.to_owned(),
            data: Bytes::from_static(data),
        };
        check(
            r#"{"type":"message","text":"hi","reply_to":"$ID","room":"r","client_id":"c","attachments":[
                {"filename":"a","mimetype":"text/plain","data":"YWJjZGVm"},{"filename":"b","mimetype":"","data":"YQ"}]}"#,
            Command::Message {
                text: "hi".to_owned(),
                reply_to: Some(id),
                room: Some(room("r")),
                client_id: c(),
                attachments: vec![
                    attachment("a", "text/plain", b"abcdef"),
                    attachment("b", "application/octet-stream", b"a"),
                ],
            },
        );
        check(
            r#"{"type":"button","message_id":"$ID","custom_id":"x","client_id":"c"}"#,
            Command::Button { message_id: id, custom_id: "x".to_owned(), room: None, client_id: c() },
        );
        check(
            r#"{"type":"button","message_id":"$ID","custom_id":"","room":"r"}"#,
            Command::Button { message_id: id, custom_id: String::new(), room: Some(room("r")), client_id: None },
        );
        check(r#"{"type":"typing","active":true}"#, Command::Typing { active: true, room: None, client_id: None });
        check(
            r#"{"type":"typing","active":false,"room":"r","client_id":"c"}"#,
            Command::Typing { active: false, room: Some(room("r")), client_id: c() },
        );
        check(r#"{"type":"join","room":"r"}"#, Command::Join { room: room("r"), client_id: None });
        check(r#"{"type":"leave","room":"r","client_id":"c"}"#, Command::Leave { room: room("r"), client_id: c() });
        check(r#"{"type":"ping"}"#, Command::Ping { client_id: None });
    }

    #[test]
    fn a_bad_frame_says_what_is_wrong_and_how_much_is_allowed() {
        use ErrorCode::{BadField, BadFrame, LimitReached, TooLarge};
        let check = |text: &str, code: ErrorCode, part: &str| {
            let error = run(text).expect_err(text);
            assert_eq!((error.code, error.message.contains(part)), (code, true), "{text}: {error}");
        };
        for text in ["", " ", "{", "nope", "{\"type\":\"ping\"", "{\"type\":\"ping\"}x", "{'type':'ping'}", "\u{0}"] {
            check(text, BadFrame, "not JSON");
        }
        for text in ["1", "null", "\"ping\"", "[]", "[{\"type\":\"ping\"}]", "true"] {
            check(text, BadFrame, "not a JSON object");
        }
        for text in ["{}", r#"{"type":null}"#, r#"{"type":1}"#, r#"{"type":"hello"}"#, r#"{"type":"PING"}"#] {
            check(text, BadFrame, "one of message, button");
        }
        let deep = |levels: usize| format!(r#"{{"type":"ping","x":{}{}}}"#, "[".repeat(levels), "]".repeat(levels));
        assert!(run(&deep(20)).is_ok());
        check(&deep(40), BadFrame, "not JSON");
        check(&"[".repeat(100_000), BadFrame, "not JSON");
        check(r#"{"type":"message"}"#, BadField, "`text` is missing");
        check(r#"{"type":"message","text":1}"#, BadField, "`text` must be a string");
        check(r#"{"type":"message","text":"a","text":"b"}"#, BadField, "`text` is there twice");
        check(r#"{"type":"ping","type":"ping"}"#, BadField, "`type` is there twice");
        check(r#"{"type":"message","text":"12345678901"}"#, TooLarge, "11 characters; at most 10");
        assert!(run(r#"{"type":"message","text":"日日日日日日日日日日"}"#).is_ok(), "characters, not bytes");
        check(r#"{"type":"message","text":"a","reply_to":"x"}"#, BadField, "UUID");
        check(r#"{"type":"message","text":"a","reply_to":7}"#, BadField, "`reply_to` must be a string");
        check(r#"{"type":"message","text":"a","room":""}"#, BadField, "`room`: the id is empty");
        check(&format!(r#"{{"type":"join","room":"{}"}}"#, "r".repeat(257)), TooLarge, "257 bytes; at most 256");
        check(r#"{"type":"join","room":"a\nb"}"#, BadField, "control");
        check(r#"{"type":"join"}"#, BadField, "`room` is missing");
        check(r#"{"type":"typing"}"#, BadField, "`active`");
        check(r#"{"type":"typing","active":"yes"}"#, BadField, "`active`");
        check(r#"{"type":"button","custom_id":"x"}"#, BadField, "`message_id` is missing");
        check(r#"{"type":"button","message_id":"$ID"}"#, BadField, "`custom_id` is missing");
        let long = "x".repeat(101);
        check(&format!(r#"{{"type":"button","message_id":"$ID","custom_id":"{long}"}}"#), TooLarge, "at most 100");
        let with = |list: &str| format!(r#"{{"type":"message","text":"a","attachments":{list}}}"#);
        let file = |data: &str| with(&format!(r#"[{{"filename":"f","data":"{data}"}}]"#));
        check(&with("{}"), BadField, "must be an array");
        check(&with("[1]"), BadField, "must be an object");
        check(&with("[{},{},{}]"), LimitReached, "3 attachments; at most 2");
        check(&with("[{}]"), BadField, "`filename` is missing");
        check(&with(r#"[{"filename":"f"}]"#), BadField, "`data` is missing");
        check(&with(r#"[{"filename":"f","data":"","data":""}]"#), BadField, "`data` is there twice");
        check(&with(r#"[{"filename":"","data":""}]"#), BadField, "`filename` is empty");
        check(&with(r#"[{"filename":"a\u0000","data":""}]"#), BadField, "control");
        let name = "f".repeat(256);
        check(&with(&format!(r#"[{{"filename":"{name}","data":""}}]"#)), TooLarge, "256 bytes; at most 255");
        check(&with(&format!(r#"[{{"filename":"f","mimetype":"{name}","data":""}}]"#)), TooLarge, "`mimetype`");
        assert!(run(&file("")).is_ok() && run(&file("YWJjZGVm")).is_ok() && run(&file("YWJjZA==")).is_ok());
        check(&file("YWJjZGVmZw=="), TooLarge, "7 bytes, decoded; at most 6");
        for bad in ["Y", "YQ=", "Y===", "YW==Jj", "Y Q=", "_-8=", "é", "====", "YR"] {
            check(&file(bad), BadField, "not standard base64");
        }
    }

    #[test]
    fn invalid_utf8_and_lone_surrogates_are_refused() {
        for text in [&b"{\"type\":\"message\",\"text\":\"\xff\"}"[..], b"{\"type\":\"message\",\"text\":\"\\ud800\"}"] {
            let error = parse(&mut text.to_vec(), &mut Scratch::default(), &limits()).unwrap_err();
            assert_eq!(error.code, ErrorCode::BadFrame);
        }
    }

    #[test]
    fn the_client_id_comes_back_with_the_refusal() {
        let check = |text: &str, expected: Option<&str>| {
            assert_eq!(run(text).expect_err(text).client_id.as_deref(), expected, "{text}");
        };
        check(r#"{"type":"nope","client_id":"c"}"#, Some("c"));
        check(r#"{"client_id":"c"}"#, Some("c"));
        check(r#"{"type":"message","text":1,"client_id":"c"}"#, Some("c"));
        check(r#"{"type":"message","text":"a","text":"b","client_id":"c"}"#, Some("c"));
        check(r#"{"type":"ping","client_id":"c","client_id":"c"}"#, None);
        check(r#"{"type":"ping","client_id":7}"#, None);
        check(r#"{"type":"ping","client_id":"a\u0007"}"#, None);
        let long = |bytes: usize| format!(r#"{{"type":"ping","client_id":"{}"}}"#, "c".repeat(bytes));
        assert!(run(&long(64)).is_ok());
        let error = run(&long(65)).unwrap_err();
        assert_eq!((error.code, error.message.contains("at most 64")), (ErrorCode::TooLarge, true));
    }

    #[test]
    fn a_scratch_is_reused_and_gives_large_buffers_back() {
        let mut scratch = Scratch::default();
        let wide = InboundLimits { text_chars_max: 1 << 20, ..limits() };
        for round in 0..3 {
            let mut small = br#"{"type":"ping"}"#.to_vec();
            assert!(parse(&mut small, &mut scratch, &wide).is_ok(), "{round}");
            assert!(scratch.tape.0.capacity() > 0);
            let mut large = format!(r#"{{"type":"message","text":"{}"}}"#, "x".repeat(100_000)).into_bytes();
            assert!(parse(&mut large, &mut scratch, &wide).is_ok(), "{round}");
            assert_eq!(scratch.tape.0.capacity(), 0);
            assert!(parse(&mut b"[[[".to_vec(), &mut scratch, &wide).is_err(), "{round}");
        }
    }

    fn incoming(command: Command) -> Option<IncomingMessage> {
        let user = UserId::parse("u:1").unwrap();
        let author = Author { user_id: &user, user_name: "Ann" };
        let (id, now) = (MessageId::parse(ID).unwrap(), Timestamp::from_micros(5));
        command.into_incoming(author, &BotIdentity::default(), id, now)
    }

    #[test]
    fn a_message_becomes_what_a_worker_gets() {
        let got = incoming(message("hi")).unwrap();
        assert_eq!((got.platform.as_str(), got.channel_id.as_str()), ("webchat", "webchat:u:1"));
        assert_eq!((got.user_id.as_str(), got.user_name.as_str(), got.text.as_str()), ("u:1", "Ann", "hi"));
        assert_eq!((got.message_id.to_string().as_str(), got.timestamp.as_micros()), (ID, 5));
        assert_eq!((got.is_addressed, got.channel_name.as_str(), got.extra.len()), (true, "", 0));
    }

    #[test]
    fn in_a_room_the_bot_is_addressed_by_its_mention() {
        for (text, expected) in [
            ("hi", false),
            ("hi @Star!", true),
            ("@Star", true),
            ("@Star你好", true),
            ("@star", false),
            ("", false),
            ("@Starling", false),
            ("@Star_2 @Star2 @Starś", false),
            ("mail@Star.example", false),
            ("@Starling, @Star?", true),
        ] {
            let id = MessageId::random();
            let (room, reply_to) = (Some(room("r")), Some(id));
            let command =
                Command::Message { text: text.to_owned(), reply_to, room, client_id: None, attachments: Vec::new() };
            let got = incoming(command).unwrap();
            assert_eq!((got.is_addressed, got.channel_id.as_str()), (expected, "room:r"), "{text}");
            assert_eq!((got.channel_name.as_str(), got.reply_to_id), ("r", Some(id)));
        }
    }

    #[test]
    fn a_button_press_has_its_custom_id_for_a_text_and_says_which_message() {
        let message_id = MessageId::parse(ID).unwrap();
        for (room, channel) in [(None, "webchat:u:1"), (Some(room("r")), "room:r")] {
            let press = Command::Button { message_id, custom_id: "yes".to_owned(), room, client_id: None };
            let got = incoming(press).unwrap();
            assert_eq!((got.text.as_str(), got.channel_id.as_str(), got.is_addressed), ("yes", channel, true));
            assert_eq!(Value::Object(got.extra), json!({ "button": { "message_id": ID, "custom_id": "yes" } }));
        }
        assert_eq!(incoming(Command::Ping { client_id: None }), None);
    }

    proptest::proptest! {
        #[test]
        fn a_text_is_read_as_it_was_written(text in ".*", client_id in proptest::option::of("[a-z]{0,64}")) {
            let wide = InboundLimits { text_chars_max: usize::MAX, ..limits() };
            let mut frame = serde_json::to_vec(&json!({"type": "message", "text": text, "client_id": client_id})).unwrap();
            let got = parse(&mut frame, &mut Scratch::default(), &wide).unwrap();
            assert_eq!(got.client_id(), client_id.as_deref());
            assert!(matches!(got, Command::Message { text: read, .. } if read == text));
        }

        #[test]
        fn whatever_comes_is_no_panic_and_only_json_is_accepted(
            mut frame in proptest::sample::select(vec![
                r#"{"type":"message","text":"a\u00e9","attachments":[{"filename":"a","data":"YQ=="}]}"#,
                r#"{"type":"button","message_id":"00000000-0000-4000-8000-000000000001","custom_id":"x"}"#,
                r#"{"type":"typing","active":true,"room":"r","x":[1.5e3,null,{"a":"\\"}]}"#,
            ]).prop_map(|text| text.as_bytes().to_vec()),
            changes in proptest::collection::vec((proptest::arbitrary::any::<usize>(), proptest::arbitrary::any::<u8>()), 0..6),
            cut in proptest::arbitrary::any::<usize>(),
        ) {
            for (at, byte) in changes {
                let at = at % frame.len();
                frame[at] = byte;
            }
            frame.truncate(cut % 400);
            let is_json = serde_json::from_slice::<Value>(&frame).is_ok();
            let mut scratch = Scratch::default();
            let accepted = parse(&mut frame, &mut scratch, &limits()).is_ok();
            assert!(is_json || !accepted);
        }
    }
}
