//! Whatever a browser says is a command within its limits or a typed refusal, and no frame changes how the next is read.

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
    // The parser is stricter than the reference, never looser: what is a command is an object.
    let reference = serde_json::from_slice::<serde_json::Value>(bytes);
    match first {
        Ok(command) => {
            if let Ok(value) = reference {
                assert!(value.is_object());
            }
            check(&command);
        }
        Err(error) => {
            assert!(!error.message.is_empty());
            assert!(!matches!(error.code, ErrorCode::Forbidden | ErrorCode::Overloaded | ErrorCode::Draining));
            assert!(error.client_id.is_none_or(|id| id.len() <= CLIENT_ID_BYTES_MAX));
        }
    }
}

fn check(command: &Command) {
    let (room, client_id) = match command {
        Command::Message { text, room, client_id, attachments, .. } => {
            assert!(text.chars().count() <= LIMITS.text_chars_max);
            assert!(attachments.len() <= LIMITS.attachments_max);
            for attachment in attachments {
                assert!(attachment.data.len() <= LIMITS.attachment_bytes_max);
                assert!(attachment.filename.len() <= FILENAME_BYTES_MAX);
            }
            (room.as_ref(), client_id)
        }
        Command::Button { custom_id, room, client_id, .. } => {
            assert!(custom_id.chars().count() <= CUSTOM_ID_CHARS_MAX);
            (room.as_ref(), client_id)
        }
        Command::Typing { room, client_id, .. } => (room.as_ref(), client_id),
        Command::Join { room, client_id } | Command::Leave { room, client_id } => (Some(room), client_id),
        Command::Ping { client_id } => (None, client_id),
    };
    assert!(client_id.as_ref().is_none_or(|id| id.len() <= CLIENT_ID_BYTES_MAX));
    assert!(room.is_none_or(|room: &RoomName| (1..=ID_BYTES_MAX).contains(&room.as_str().len())));
}
