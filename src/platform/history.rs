//! The last messages of a channel, from the frames that recovery keeps.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::id::{ChannelId, MessageId};
use crate::platform::message::{Attachment, IncomingMessage};
use crate::proto::event::Timestamp;
use crate::proto::frame::{Frame, Kind};

/// What a frame says of a message; what its kind does not have is empty.
#[derive(Deserialize)]
struct Said {
    id: String,
    #[serde(default)]
    text: String,
    sender: Option<String>,
    reply_to: Option<String>,
    timestamp: f64,
    #[serde(default)]
    filename: String,
    #[serde(default)]
    mimetype: String,
    #[serde(default)]
    data: String,
    buttons: Option<Value>,
}

/// The messages that `frames` (oldest first) come to, each with its last text; the newest `limit` of them. A message
/// has the text of its last edit. What is no message, or is not understood, is left out.
pub(crate) fn messages(frames: &[Frame], channel: &ChannelId, bot: &str, limit: usize) -> Vec<IncomingMessage> {
    let mut messages: Vec<IncomingMessage> = Vec::new();
    for frame in frames {
        let Ok(said) = serde_json::from_slice::<Said>(frame.json()) else { continue };
        let Ok(id) = MessageId::parse(&said.id) else { continue };
        match frame.kind() {
            Kind::Edit => {
                let edited = messages.iter_mut().find(|message| message.message_id == id);
                edited.into_iter().for_each(|message| message.text.clone_from(&said.text));
            }
            Kind::Message | Kind::Buttons | Kind::File => messages.push(message(said, id, channel, bot)),
            _ => {}
        }
    }
    messages.split_off(messages.len().saturating_sub(limit))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a time that we wrote ourselves")]
fn message(said: Said, id: MessageId, channel: &ChannelId, bot: &str) -> IncomingMessage {
    let sender = said.sender.unwrap_or_else(|| bot.to_owned());
    let data = base64_simd::STANDARD.decode_to_vec(said.data.as_bytes()).unwrap_or_default();
    let attachment = Attachment { filename: said.filename, mimetype: said.mimetype, data: Bytes::from(data) };
    let buttons = said.buttons.map(|buttons| ("buttons".to_owned(), buttons));
    let timestamp = Timestamp::from_micros((said.timestamp * 1e6) as u64);
    IncomingMessage {
        is_addressed: matches!(channel, ChannelId::User(_)),
        attachments: if attachment.mimetype.is_empty() { Vec::new() } else { vec![attachment] },
        message_id: id,
        reply_to_id: said.reply_to.and_then(|id| MessageId::parse(&id).ok()),
        extra: Map::from_iter(buttons),
        ..IncomingMessage::new(channel.to_string(), &sender, said.text, timestamp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::event::{Button, Event};

    #[test]
    fn frames_come_to_messages_with_their_last_texts() {
        let timestamp = Timestamp::from_micros(1_500_000);
        let ids = [MessageId::random(), MessageId::random(), MessageId::random()];
        let buttons = [Button { label: "Yes".to_owned(), ..Button::default() }];
        let events = [
            Event::Message { id: ids[0], text: "a", sender: "u", reply_to: None, timestamp },
            Event::Edit { id: MessageId::random(), text: "of nothing", timestamp },
            Event::Buttons {
                id: ids[1],
                text: "b",
                sender: "star",
                reply_to: Some(ids[0]),
                buttons: &buttons,
                timestamp,
            },
            Event::Typing { active: true },
            Event::File { id: ids[2], filename: "f.txt", mimetype: "text/plain", data: b"ab", timestamp },
            Event::Edit { id: ids[0], text: "a, edited", timestamp },
        ];
        let frames: Vec<_> = events.iter().map(Frame::encode).collect();
        let channel = ChannelId::parse("u").unwrap();
        let all = messages(&frames, &channel, "star", 100);
        let texts: Vec<_> = all.iter().map(|m| (m.message_id, m.user_id.as_str(), m.text.as_str())).collect();
        assert_eq!(texts, [(ids[0], "u", "a, edited"), (ids[1], "star", "b"), (ids[2], "star", "")]);
        assert_eq!((all[1].reply_to_id, &all[1].extra["buttons"][0]["label"]), (Some(ids[0]), &Value::from("Yes")));
        assert_eq!(
            (&all[2].attachments[0].filename, &all[2].attachments[0].data[..]),
            (&"f.txt".to_owned(), &b"ab"[..])
        );
        assert_eq!((all[0].timestamp, all[0].channel_id.as_str()), (timestamp, "webchat:u"));
        assert_eq!(messages(&frames, &channel, "star", 1), all[2..]);
    }
}
