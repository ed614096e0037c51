//! What a body asks for, borrowed from the body where its text has no escapes.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::gateway::api::error::{ApiCode, ApiError};
use crate::id::{ChannelId, MessageId};
use crate::platform::inbound::{FILENAME_BYTES_MAX, base64_bytes};
use crate::platform::view::{ViewError, read_view};
use crate::proto::event::{Button, EndReason};

/// Which method of the adapter is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OpKind {
    Send,
    Buttons,
    File,
    Edit,
    Typing,
    End,
}

impl OpKind {
    pub(crate) fn parse(name: &str) -> Option<Self> {
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
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Op<'a> {
    pub(crate) channel: ChannelId,
    pub(crate) call: Call<'a>,
}

/// The call without its channel.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Call<'a> {
    Send { text: Cow<'a, str>, reply_to: Option<MessageId> },
    Buttons { text: Cow<'a, str>, buttons: Vec<Button>, reply_to: Option<MessageId> },
    File { filename: Cow<'a, str>, mimetype: Option<Cow<'a, str>>, data: Bytes },
    Edit { id: MessageId, text: Cow<'a, str> },
    Typing { active: bool },
    End { reason: EndReason },
}

/// Every field of every body. What is absent or `null` is nothing; unknown keys are ignored; a key that is there twice
/// is an error. What has the wrong type is read all the same, so that the error can name the field. `V` is how buttons
/// are described in the form that is read.
#[derive(serde::Deserialize)]
#[serde(bound(deserialize = "V: Deserialize<'de>"))]
pub(crate) struct Body<'a, V> {
    #[serde(borrow, default)]
    op: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    channel_id: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    text: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    reply_to: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    message_id: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    filename: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    mimetype: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    data: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    reason: Option<Scalar<'a>>,
    #[serde(borrow, default)]
    active: Option<Scalar<'a>>,
    buttons: Option<V>,
    view: Option<V>,
}

/// Buttons as a body describes them.
pub(crate) trait Described {
    /// Reads them.
    fn read(self) -> Result<Vec<Button>, ViewError>;
}

impl Described for &RawValue {
    fn read(self) -> Result<Vec<Button>, ViewError> {
        read_view(self.get())
    }
}

impl<'a> Op<'a> {
    /// Reads a body. Without a kind (a line of a batch) it is named by `op`.
    pub(crate) fn parse(kind: Option<OpKind>, body: &'a [u8]) -> Result<Self, ApiError> {
        // Derived structs also read arrays, field by field.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err(ApiError::new(ApiCode::BadJson, "this is not a JSON object"));
        }
        let body: Body<'a, &'a RawValue> = serde_json::from_slice(body).map_err(|error| {
            ApiError::new(ApiCode::BadJson, format!("this is not a JSON object as expected: {error}"))
        })?;
        Self::read(kind, body)
    }

    /// Checks the fields of a body, in whatever form they came.
    pub(crate) fn read<V: Described>(kind: Option<OpKind>, body: Body<'a, V>) -> Result<Self, ApiError> {
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
                let data = data(body.data)?;
                return file(&channel_id, required(body.filename, "filename")?, text(body.mimetype, "mimetype")?, data);
            }
            OpKind::Edit => {
                let id = message_id(body.message_id, "message_id")?;
                let id = id.ok_or_else(|| ApiError::field("`message_id` is missing: it must be a string"))?;
                Call::Edit { id, text: required(body.text, "text")? }
            }
            OpKind::Typing => {
                let Some(Scalar::Bool(active)) = body.active else {
                    return Err(ApiError::field("`active` must be true or false"));
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
pub(crate) fn file<'a>(
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

fn buttons<V: Described>(buttons: Option<V>, view: Option<V>) -> Result<Vec<Button>, ApiError> {
    match (buttons, view) {
        (Some(described), None) | (None, Some(described)) => {
            described.read().map_err(|error| ApiError::field(error.to_string()))
        }
        (None, None) => Err(ApiError::field("`buttons` or `view` is missing")),
        (Some(_), Some(_)) => Err(ApiError::field("only one of `buttons` and `view` may be given")),
    }
}

/// A file's bytes: as they are where the form has bytes, else in base64.
fn data(field: Option<Scalar<'_>>) -> Result<Bytes, ApiError> {
    match field {
        Some(Scalar::Bytes(bytes)) => Ok(Bytes::from(bytes.into_owned())),
        field => {
            let text = required(field, "data")?;
            base64_bytes(&text).ok_or_else(|| ApiError::field("`data` is not standard base64"))
        }
    }
}

pub(crate) fn text<'a>(field: Option<Scalar<'a>>, name: &str) -> Result<Option<Cow<'a, str>>, ApiError> {
    match field {
        None => Ok(None),
        Some(Scalar::Text(text)) => Ok(Some(text)),
        Some(_) => Err(ApiError::field(format!("`{name}` must be a string"))),
    }
}

pub(crate) fn required<'a>(field: Option<Scalar<'a>>, name: &str) -> Result<Cow<'a, str>, ApiError> {
    text(field, name)?.ok_or_else(|| ApiError::field(format!("`{name}` is missing: it must be a string")))
}

pub(crate) fn message_id(field: Option<Scalar<'_>>, name: &str) -> Result<Option<MessageId>, ApiError> {
    let parse =
        |text: Cow<'_, str>| MessageId::parse(&text).map_err(|error| ApiError::field(format!("`{name}`: {error}")));
    text(field, name)?.map(parse).transpose()
}

/// A value that is whole in itself, borrowed from the body if it has no escapes; or something else, for what is none of
/// these.
#[derive(Debug, PartialEq)]
pub(crate) enum Scalar<'a> {
    Text(Cow<'a, str>),
    /// JSON has none.
    Bytes(Cow<'a, [u8]>),
    Bool(bool),
    Other,
}

impl<'de: 'a, 'a> Deserialize<'de> for Scalar<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScalarVisitor)
    }
}

struct ScalarVisitor;

impl<'de> Visitor<'de> for ScalarVisitor {
    type Value = Scalar<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Scalar::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Scalar::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_string<E>(self, text: String) -> Result<Self::Value, E> {
        Ok(Scalar::Text(Cow::Owned(text)))
    }

    fn visit_borrowed_bytes<E>(self, bytes: &'de [u8]) -> Result<Self::Value, E> {
        Ok(Scalar::Bytes(Cow::Borrowed(bytes)))
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Self::Value, E> {
        Ok(Scalar::Bytes(Cow::Owned(bytes.to_owned())))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Scalar::Bool(value))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Scalar::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(Scalar::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Scalar::Other)
    }

    /// What MessagePack calls an extension.
    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<Self::Value, D::Error> {
        IgnoredAny::deserialize(inner).map(|_| Scalar::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Scalar::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Scalar::Other)
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
