//! What a body asks for, borrowed from the body where its text has no escapes.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::gateway::api::error::{ApiCode, ApiError};
use crate::id::{ChannelId, MessageId};
use crate::platform::inbound::{FILENAME_BYTES_MAX, base64_bytes};
use crate::platform::view::read_view;
use crate::proto::event::{Button, EndReason};

/// Which method of the adapter is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpKind {
    Send,
    Buttons,
    File,
    Edit,
    Typing,
    End,
}

impl OpKind {
    pub(super) fn parse(name: &str) -> Option<Self> {
        match name {
            "send" => Some(Self::Send),
            "buttons" => Some(Self::Buttons),
            "file" => Some(Self::File),
            "edit" => Some(Self::Edit),
            "typing" => Some(Self::Typing),
            "end" => Some(Self::End),
            _ => None,
        }
    }
}

/// One call of the adapter.
#[derive(Debug, PartialEq)]
pub(super) struct Op<'a> {
    pub(super) channel: ChannelId,
    pub(super) call: Call<'a>,
}

/// The call without its channel.
#[derive(Debug, PartialEq)]
pub(super) enum Call<'a> {
    Send { text: Cow<'a, str>, reply_to: Option<MessageId> },
    Buttons { text: Cow<'a, str>, buttons: Vec<Button>, reply_to: Option<MessageId> },
    File { filename: Cow<'a, str>, mimetype: Option<Cow<'a, str>>, data: Bytes },
    Edit { id: MessageId, text: Cow<'a, str> },
    Typing { active: bool },
    End { reason: EndReason },
}

/// Every field of every body. What is absent or `null` is nothing; unknown keys are ignored; a key that is there twice
/// is an error. What is no text stays as it came, and is read only by the call that wants it.
#[derive(serde::Deserialize)]
struct Body<'a> {
    #[serde(borrow, default)]
    op: Option<Text<'a>>,
    #[serde(borrow, default)]
    channel_id: Option<Text<'a>>,
    #[serde(borrow, default)]
    text: Option<Text<'a>>,
    #[serde(borrow, default)]
    reply_to: Option<Text<'a>>,
    #[serde(borrow, default)]
    message_id: Option<Text<'a>>,
    #[serde(borrow, default)]
    filename: Option<Text<'a>>,
    #[serde(borrow, default)]
    mimetype: Option<Text<'a>>,
    #[serde(borrow, default)]
    data: Option<Text<'a>>,
    #[serde(borrow, default)]
    reason: Option<Text<'a>>,
    #[serde(borrow, default)]
    active: Option<&'a RawValue>,
    #[serde(borrow, default)]
    buttons: Option<&'a RawValue>,
    #[serde(borrow, default)]
    view: Option<&'a RawValue>,
}

impl<'a> Op<'a> {
    /// Reads a body. Without a kind (a line of a batch) it is named by `op`.
    pub(super) fn parse(kind: Option<OpKind>, body: &'a [u8]) -> Result<Self, ApiError> {
        // Derived structs also read arrays, field by field.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err(ApiError::new(ApiCode::BadJson, "this is not a JSON object"));
        }
        let body: Body<'a> = serde_json::from_slice(body).map_err(|error| {
            ApiError::new(ApiCode::BadJson, format!("this is not a JSON object as expected: {error}"))
        })?;
        let kind = match kind {
            Some(kind) => kind,
            None => OpKind::parse(&required(body.op, "op")?)
                .ok_or_else(|| ApiError::field("`op` must be one of send, buttons, file, edit, typing, end"))?,
        };
        let channel_id = required(body.channel_id, "channel_id")?;
        let call = match kind {
            OpKind::Send => {
                Call::Send { text: required(body.text, "text")?, reply_to: message_id(body.reply_to, "reply_to")? }
            }
            OpKind::Buttons => Call::Buttons {
                text: required(body.text, "text")?,
                buttons: buttons(body.buttons, body.view)?,
                reply_to: message_id(body.reply_to, "reply_to")?,
            },
            OpKind::File => {
                let data = required(body.data, "data")?;
                let data = base64_bytes(&data).ok_or_else(|| ApiError::field("`data` is not standard base64"))?;
                return file(&channel_id, required(body.filename, "filename")?, text(body.mimetype, "mimetype")?, data);
            }
            OpKind::Edit => {
                let id = message_id(body.message_id, "message_id")?;
                let id = id.ok_or_else(|| ApiError::field("`message_id` is missing: it must be a string"))?;
                Call::Edit { id, text: required(body.text, "text")? }
            }
            OpKind::Typing => {
                let active = match body.active.map(RawValue::get) {
                    Some("true") => true,
                    Some("false") => false,
                    _ => return Err(ApiError::field("`active` must be true or false")),
                };
                Call::Typing { active }
            }
            OpKind::End => {
                let reason = text(body.reason, "reason")?;
                let reason = EndReason::parse(reason.as_deref().unwrap_or("stop"));
                let bad = || ApiError::field("`reason` must be one of stop, error, timeout, cancelled");
                Call::End { reason: reason.ok_or_else(bad)? }
            }
        };
        Ok(Self { channel: channel(&channel_id)?, call })
    }
}

/// A file from a JSON or a raw body.
pub(super) fn file<'a>(
    channel_id: &str,
    filename: Cow<'a, str>,
    mimetype: Option<Cow<'a, str>>,
    data: Bytes,
) -> Result<Op<'a>, ApiError> {
    let mimetype = mimetype.filter(|text| !text.is_empty());
    if filename.is_empty() {
        return Err(ApiError::field("`filename` is empty"));
    }
    for (name, text) in [("filename", &*filename), ("mimetype", mimetype.as_deref().unwrap_or_default())] {
        if text.len() > FILENAME_BYTES_MAX {
            let bytes = text.len();
            return Err(ApiError::field(format!(
                "`{name}` has {bytes} bytes; at most {FILENAME_BYTES_MAX} are allowed"
            )));
        }
        if text.chars().any(char::is_control) {
            return Err(ApiError::field(format!("`{name}` has a control character")));
        }
    }
    Ok(Op { channel: channel(channel_id)?, call: Call::File { filename, mimetype, data } })
}

fn channel(text: &str) -> Result<ChannelId, ApiError> {
    ChannelId::parse(text).map_err(|error| ApiError::field(format!("`channel_id`: {error}")))
}

fn buttons(buttons: Option<&RawValue>, view: Option<&RawValue>) -> Result<Vec<Button>, ApiError> {
    match (buttons, view) {
        (Some(described), None) | (None, Some(described)) => {
            read_view(described.get()).map_err(|error| ApiError::field(error.to_string()))
        }
        (None, None) => Err(ApiError::field("`buttons` or `view` is missing")),
        (Some(_), Some(_)) => Err(ApiError::field("only one of `buttons` and `view` may be given")),
    }
}

fn text<'a>(field: Option<Text<'a>>, name: &str) -> Result<Option<Cow<'a, str>>, ApiError> {
    match field {
        None => Ok(None),
        Some(Text(Some(text))) => Ok(Some(text)),
        Some(Text(None)) => Err(ApiError::field(format!("`{name}` must be a string"))),
    }
}

fn required<'a>(field: Option<Text<'a>>, name: &str) -> Result<Cow<'a, str>, ApiError> {
    text(field, name)?.ok_or_else(|| ApiError::field(format!("`{name}` is missing: it must be a string")))
}

fn message_id(field: Option<Text<'_>>, name: &str) -> Result<Option<MessageId>, ApiError> {
    let parse =
        |text: Cow<'_, str>| MessageId::parse(&text).map_err(|error| ApiError::field(format!("`{name}`: {error}")));
    text(field, name)?.map(parse).transpose()
}

/// A string, borrowed if it has no escapes; or nothing, for what is no string: so that the error can name the field.
struct Text<'a>(Option<Cow<'a, str>>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextVisitor).map(Text)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Option<Cow<'de, str>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Some(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Some(Cow::Owned(text.to_owned())))
    }

    fn visit_string<E>(self, text: String) -> Result<Self::Value, E> {
        Ok(Some(Cow::Owned(text)))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_without_escapes_is_borrowed_from_the_body() {
        let check = |body: &str, borrowed: bool| {
            let Call::Send { text, .. } = Op::parse(None, body.as_bytes()).unwrap().call else { panic!("{body}") };
            assert_eq!(matches!(text, Cow::Borrowed(_)), borrowed, "{body}");
        };
        check(r#"{"op":"send","channel_id":"u","text":"日本"}"#, true);
        check(r#"{"op":"send","channel_id":"u","text":"a\nb"}"#, false);
    }
}
