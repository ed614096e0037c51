//! Whatever a browser says is a command that says what `serde_json` reads in it, within its limits, or a typed refusal; and
//! no frame changes how the next is read.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use tabcast::id::{ID_BYTES_MAX, RoomName};
use tabcast::platform::inbound::{CLIENT_ID_BYTES_MAX, Command, FILENAME_BYTES_MAX, InboundLimits, Scratch, parse};
use tabcast::proto::event::{CUSTOM_ID_CHARS_MAX, ErrorCode};

const LIMITS: InboundLimits = InboundLimits { text_chars_max: 64, attachment_bytes_max: 48, attachments_max: 2 };

/// The bytes are one frame, as it came off the wire.
pub(crate) fn run(bytes: &[u8]) {
    let mut scratch = Scratch::default();
    let first = parse(&mut bytes.to_vec(), &mut scratch, &LIMITS);
    let again = parse(&mut bytes.to_vec(), &mut scratch, &LIMITS);
    assert_eq!(first, again);
    let mut ping = *br#"{"type":"ping"}"#;
    assert_eq!(parse(&mut ping, &mut scratch, &LIMITS), Ok(Command::Ping { client_id: None }));
    match first {
        Ok(command) => {
            check(&command);
            assert!(serde_json::from_slice::<HashMap<String, Any>>(bytes).is_ok());
            compare(&command, &serde_json::from_slice(bytes).expect("what is a command is an object"));
        }
        Err(error) => {
            assert!(!error.message.is_empty());
            assert!(!matches!(error.code, ErrorCode::Forbidden | ErrorCode::Overloaded | ErrorCode::Draining));
            assert!(error.client_id.is_none_or(|id| id.len() <= CLIENT_ID_BYTES_MAX));
        }
    }
}

fn check(command: &Command) {
    if let Command::Message { text, attachments, .. } = command {
        assert!(text.chars().count() <= LIMITS.text_chars_max);
        assert!(attachments.len() <= LIMITS.attachments_max);
        for attachment in attachments {
            assert!(attachment.data.len() <= LIMITS.attachment_bytes_max);
            assert!(attachment.filename.len() <= FILENAME_BYTES_MAX);
            assert!(attachment.mimetype.len() <= FILENAME_BYTES_MAX);
        }
    }
    if let Command::Button { custom_id, .. } = command {
        assert!(custom_id.chars().count() <= CUSTOM_ID_CHARS_MAX);
    }
    assert!(command.client_id().is_none_or(|id| id.len() <= CLIENT_ID_BYTES_MAX));
    assert!(command.room().is_none_or(|room: &RoomName| (1..=ID_BYTES_MAX).contains(&room.as_str().len())));
}

/// Any JSON, with every text and number read. `serde_json::Value` would give one name of a key a meaning of its own.
#[derive(Deserialize)]
#[serde(untagged)]
#[expect(dead_code, reason = "that it can be read is what counts")]
enum Any {
    Null(()),
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Any>),
    Object(HashMap<String, Any>),
}

/// What `serde_json` reads: each known field as it is written, and at most once.
#[derive(Deserialize)]
struct Reference<'a> {
    #[serde(borrow, rename = "type")]
    kind: &'a RawValue,
    client_id: Option<&'a RawValue>,
    text: Option<&'a RawValue>,
    reply_to: Option<&'a RawValue>,
    room: Option<&'a RawValue>,
    attachments: Option<&'a RawValue>,
    message_id: Option<&'a RawValue>,
    custom_id: Option<&'a RawValue>,
    active: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct File {
    filename: String,
    mimetype: Option<String>,
    data: String,
}

/// The value of a field that this kind of command has: of its type, `null` or not there.
fn value<T: DeserializeOwned>(field: Option<&RawValue>) -> Option<T> {
    field.and_then(|text| serde_json::from_str::<Option<T>>(text.get()).expect("a field of its type"))
}

fn compare(command: &Command, reference: &Reference<'_>) {
    let text = value::<String>;
    let kind = match command {
        Command::Message { text: said, reply_to, attachments, .. } => {
            assert_eq!(text(reference.text).as_ref(), Some(said));
            let reply_to = reply_to.map(|id| id.to_string());
            assert_eq!(text(reference.reply_to).map(|id| id.to_lowercase()), reply_to);
            let files = value::<Vec<File>>(reference.attachments).unwrap_or_default();
            assert_eq!(files.len(), attachments.len());
            // Padded or not, and nothing else is left to choice.
            let padding = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
            let base64 = GeneralPurpose::new(&base64::alphabet::STANDARD, padding);
            for (file, attachment) in files.iter().zip(attachments) {
                assert_eq!(file.filename, attachment.filename);
                let mimetype = file.mimetype.as_deref().filter(|mimetype| !mimetype.is_empty());
                assert_eq!(mimetype.unwrap_or("application/octet-stream"), attachment.mimetype);
                assert_eq!(base64.decode(&file.data).as_deref(), Ok(&*attachment.data));
            }
            "message"
        }
        Command::Button { message_id, custom_id, .. } => {
            assert_eq!(text(reference.message_id).map(|id| id.to_lowercase()), Some(message_id.to_string()));
            assert_eq!(text(reference.custom_id).as_ref(), Some(custom_id));
            "button"
        }
        Command::Typing { active, .. } => {
            assert_eq!(value::<bool>(reference.active), Some(*active));
            "typing"
        }
        Command::Join { .. } => "join",
        Command::Leave { .. } => "leave",
        Command::Ping { .. } => "ping",
    };
    assert_eq!(text(Some(reference.kind)).as_deref(), Some(kind));
    assert_eq!(text(reference.client_id).as_deref(), command.client_id());
    if kind != "ping" {
        assert_eq!(text(reference.room).as_deref(), command.room().map(RoomName::as_str));
    }
}
