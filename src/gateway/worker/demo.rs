//! The built-in worker: it shows every kind of frame, and echoes what it is told as a streamed answer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;

use crate::id::{ChannelId, MessageId};
use crate::platform::adapter::{BoxFuture, MessageHandler, PlatformAdapter, SendError};
use crate::platform::message::IncomingMessage;
use crate::proto::event::{Button, ButtonStyle, EndReason};

/// Between two edits of a streamed answer.
const EDIT_INTERVAL: Duration = Duration::from_millis(40);
/// The most edits of one answer: a longer text grows in larger steps.
const EDITS_MAX: usize = 60;
/// Pixels on a side of the generated picture.
const PICTURE_SIDE: u8 = 128;

const HELP: &str = "I am the built-in demo. Whatever you write comes back as a streamed answer.\n\
    /buttons – a message with a button of every style\n\
    /file – a small picture, made on the spot\n\
    /help – this text";

/// The demo worker. It answers in the channel that a message came from; in a room when it is mentioned, or by command.
#[derive(Debug, Clone, Copy, Default)]
pub struct Demo;

impl MessageHandler for Demo {
    fn handle(&self, message: IncomingMessage, adapter: Arc<dyn PlatformAdapter>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            // Nobody waits for it any more: the demo notices that by itself, at its next edit.
            if message.extra.contains_key("cancel") {
                return;
            }
            let answered = answer(&message, &*adapter).await;
            if let Err(error) = &answered {
                tracing::debug!(%error, "the demo's answer was refused");
            }
            if let Ok(channel @ ChannelId::Stream(_)) = ChannelId::parse(&message.channel_id) {
                let reason = if answered.is_ok() { EndReason::Stop } else { EndReason::Error };
                adapter.end(&channel, reason).await;
            }
        })
    }
}

async fn answer(message: &IncomingMessage, adapter: &dyn PlatformAdapter) -> Result<(), SendError> {
    let Ok(channel) = ChannelId::parse(&message.channel_id) else { return Ok(()) };
    if message.extra.contains_key("button") {
        adapter.send(&channel, &format!("You pressed “{}”.", message.text)).await?;
        return Ok(());
    }
    let text = message.text.trim();
    let text = text.strip_prefix(adapter.bot_identity().mention.as_str()).unwrap_or(text).trim();
    match text {
        "/buttons" => {
            adapter.send_with_buttons(&channel, "One button of every style:", &all_styles()).await?;
        }
        "/file" => {
            let picture = Bytes::from(picture(Uuid::new_v4().into_bytes()));
            adapter.send_file(&channel, picture, "gradient.png", Some("image/png")).await?;
        }
        "/help" => {
            adapter.send(&channel, HELP).await?;
        }
        _ if message.is_addressed => stream(&echo(text, message), &channel, adapter).await?,
        _ => {}
    }
    Ok(())
}

fn echo(text: &str, message: &IncomingMessage) -> String {
    let mut echo = if text.is_empty() { "You said nothing.".to_owned() } else { format!("You said: {text}") };
    for file in &message.attachments {
        echo.push_str(&format!("\nYou sent {} ({} bytes).", file.filename, file.data.len()));
    }
    echo
}

/// Typing, a placeholder, edits that grow, and no typing any more, also when something was refused on the way.
async fn stream(text: &str, channel: &ChannelId, adapter: &dyn PlatformAdapter) -> Result<(), SendError> {
    adapter.start_typing(channel).await;
    let result = grow(text, channel, adapter).await;
    adapter.stop_typing(channel).await;
    result
}

async fn grow(text: &str, channel: &ChannelId, adapter: &dyn PlatformAdapter) -> Result<(), SendError> {
    // What a stream was sent cannot be taken back: there the placeholder is empty.
    let placeholder = if matches!(channel, ChannelId::Stream(_)) { "" } else { "…" };
    let id = adapter.send(channel, placeholder).await?;
    for end in steps(text) {
        tokio::time::sleep(EDIT_INTERVAL).await;
        if end == text.len() {
            return finish(text, id, channel, adapter).await;
        }
        match adapter.edit_message(channel, id, &text[..end]).await {
            Ok(false) if matches!(channel, ChannelId::Stream(_)) => return Ok(()),
            // A step that was refused is made good by the next one.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}

/// The last edit holds the whole text, so it is worth another try.
async fn finish(
    text: &str,
    id: MessageId,
    channel: &ChannelId,
    adapter: &dyn PlatformAdapter,
) -> Result<(), SendError> {
    for _ in 0..3 {
        if adapter.edit_message(channel, id, text).await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(EDIT_INTERVAL * 5).await;
    }
    adapter.edit_message(channel, id, text).await.map(drop)
}

/// Where each edit ends: after a word, after a few characters where there are hardly any spaces; the last one at the
/// end of the text. At most [`EDITS_MAX`].
fn steps(text: &str) -> Vec<usize> {
    let words: Vec<usize> = text.split_inclusive(' ').map(str::len).collect();
    let pieces = if words.iter().any(|bytes| *bytes > 40) {
        text.chars().map(char::len_utf8).collect::<Vec<_>>()
    } else {
        words
    };
    let per_step = pieces.len().div_ceil(EDITS_MAX).max(1);
    let mut end = 0;
    let sum = |step: &[usize]| {
        end += step.iter().sum::<usize>();
        end
    };
    pieces.chunks(per_step).map(sum).collect()
}

fn all_styles() -> Vec<Button> {
    let button = |label: &str, style: ButtonStyle| Button {
        label: label.to_owned(),
        custom_id: format!("demo:{}", style.as_str()),
        style: Some(style),
        ..Button::default()
    };
    let mut buttons = vec![
        button("Primary", ButtonStyle::Primary),
        button("Secondary", ButtonStyle::Secondary),
        button("Success", ButtonStyle::Success),
        button("Danger", ButtonStyle::Danger),
        button("Link", ButtonStyle::Link),
        button("Premium", ButtonStyle::Premium),
        button("Disabled", ButtonStyle::Secondary),
    ];
    buttons[0].emoji = Some("⭐".to_owned());
    buttons[4].url = Some("https://www.rust-lang.org/".to_owned());
    buttons[6].custom_id = "demo:disabled".to_owned();
    buttons[6].disabled = Some(true);
    buttons
}

/// A PNG: two random colours across a diagonal, and a disc of a third.
fn picture(random: [u8; 16]) -> Vec<u8> {
    let [r1, g1, b1, r2, g2, b2, r3, g3, b3, x, y, ..] = random;
    let (from, to, disc) = ([r1, g1, b1], [r2, g2, b2], [r3, g3, b3]);
    let side = u32::from(PICTURE_SIDE);
    let (centre_x, centre_y) = (32 + u32::from(x % 64), 32 + u32::from(y % 64));
    let mut pixels = Vec::with_capacity(usize::from(PICTURE_SIDE).pow(2) * 3);
    for (y, x) in (0..side).flat_map(|y| (0..side).map(move |x| (y, x))) {
        let is_disc = x.abs_diff(centre_x).pow(2) + y.abs_diff(centre_y).pow(2) < 24 * 24;
        for channel in 0..3 {
            let mixed = (u32::from(from[channel]) * (2 * side - x - y) + u32::from(to[channel]) * (x + y)) / (2 * side);
            let value = if is_disc { (mixed + 3 * u32::from(disc[channel])) / 4 } else { mixed };
            // A weighted mean of bytes is a byte.
            pixels.push(u8::try_from(value).unwrap_or(u8::MAX));
        }
    }
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, side, side);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // Writing to memory cannot fail, and the pixels fit the header.
    let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels));
    debug_assert!(written.is_ok(), "{written:?}");
    bytes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::platform::adapter::BotIdentity;
    use crate::platform::recording::{Recorder, published_id};
    use crate::platform::webchat::WebChat;
    use crate::proto::event::Timestamp;

    fn message(channel: &str, text: &str, is_addressed: bool) -> IncomingMessage {
        let message = IncomingMessage::new(channel.to_owned(), "u", text.to_owned(), Timestamp::from_micros(0));
        IncomingMessage { is_addressed, ..message }
    }

    async fn run(message: IncomingMessage) -> Vec<String> {
        let outlet = Arc::new(Recorder::default());
        let chat: Arc<dyn PlatformAdapter> = Arc::new(WebChat::new(Arc::clone(&outlet), BotIdentity::default()));
        Demo.handle(message, chat).await;
        outlet.take()
    }

    #[tokio::test(start_paused = true)]
    async fn a_text_comes_back_as_a_streamed_answer() {
        for channel in ["webchat:u", "room:r"] {
            let lines = run(message(channel, "hello there", true)).await;
            let id = published_id(&lines[1]).to_owned();
            let edit = |text: &str| format!("{channel} edit {id} text='{text}' at=7.5");
            let expected = [
                format!("{channel} typing true"),
                format!("{channel} message {id} sender=star text='…' at=7.5"),
                edit("You "),
                edit("You said: "),
                edit("You said: hello "),
                edit("You said: hello there"),
                format!("{channel} typing false"),
            ];
            assert_eq!(lines, expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn in_a_room_it_answers_when_it_is_meant() {
        assert!(run(message("room:r", "hello", false)).await.is_empty());
        assert_eq!(run(message("room:r", "/help", false)).await.len(), 1);
        assert!(run(message("room:r", "@Star /help", true)).await[0].contains("built-in demo"));
    }

    #[tokio::test(start_paused = true)]
    async fn commands_show_the_other_kinds_of_frame() {
        let lines = run(message("webchat:u", " /buttons ", true)).await;
        for style in ["primary", "secondary", "success", "danger", "link", "premium"] {
            assert!(lines[0].contains(&format!("demo:{style}")), "{style}");
        }
        let lines = run(message("webchat:u", "/file", true)).await;
        assert!(lines[0].contains("name='gradient.png' image/png data=[137, 80, 78, 71,"));
        let extra = json!({"button": {"message_id": "x", "custom_id": "demo:danger"}});
        let press =
            IncomingMessage { extra: extra.as_object().unwrap().clone(), ..message("webchat:u", "demo:danger", true) };
        assert!(run(press).await[0].contains("You pressed “demo:danger”."));
    }

    #[test]
    fn the_edits_of_a_long_text_are_bounded_and_end_at_its_end() {
        let check = |text: &str, expected: usize| {
            let steps = steps(text);
            assert_eq!((steps.len(), steps.last().copied().unwrap_or(0)), (expected, text.len()));
            assert!(steps.iter().all(|end| text.is_char_boundary(*end)));
        };
        check("", 0);
        check("a b c", 3);
        check(&"word ".repeat(60), 60);
        check(&"word ".repeat(61), 31);
        check(&"word ".repeat(10_000), 60);
        check(&"日".repeat(60), 60);
        check(&"日".repeat(16_384), 60);
    }

    #[test]
    fn the_picture_is_a_png_of_the_size_it_says() {
        let bytes = picture([200; 16]);
        let mut reader = png::Decoder::new(std::io::Cursor::new(&bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height, pixels.len()), (128, 128, 128 * 128 * 3));
    }
}
