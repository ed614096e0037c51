//! The engine in a program of one's own, without HTTP: a bot answers a request by a bounded stream of frames.
//!
//! Needs no default feature: `cargo run --example embed --no-default-features`.

use std::error::Error;
use std::io::Write;
use std::sync::Arc;

use futures_util::StreamExt;
use tabcast::engine::{Engine, EngineSettings};
use tabcast::id::{ChannelId, RequestId};
use tabcast::platform::adapter::{BotIdentity, PlatformAdapter, SendError};
use tabcast::platform::webchat::WebChat;
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::event::EndReason;

/// A bot: it knows the adapter, and not what is on the other side.
async fn answer(bot: &WebChat<Engine>, channel: &ChannelId, question: &str) -> Result<(), SendError> {
    bot.start_typing(channel).await;
    let id = bot.send(channel, "…").await?;
    for text in ["You asked:", &format!("You asked: {question}")] {
        // Whoever reads slowly gets the newest text, not every step on the way to it.
        bot.edit_message(channel, id, text).await?;
    }
    bot.stop_typing(channel).await;
    bot.end_report(channel, EndReason::Stop).await?;
    Ok(())
}

/// Asks the bot, and returns what came back, a frame's JSON a line.
async fn ask(question: &str) -> Result<Vec<String>, Box<dyn Error>> {
    let engine = Engine::new(EngineSettings::default());
    let bot = WebChat::new(Arc::new(engine), BotIdentity::default());

    // The stream is there before anybody can answer: nothing is missed.
    let request = RequestId::random();
    let mut frames = bot.create_sse_queue(&request)?;
    let channel = ChannelId::Stream(request);

    let read = async {
        let mut lines = Vec::new();
        while let Some(frame) = frames.next().await {
            lines.push(String::from_utf8_lossy(frame.json()).into_owned());
        }
        lines
    };
    let (answered, lines) = tokio::join!(answer(&bot, &channel, question), read);
    answered?;
    // A reader that fell behind by more than its queue was cut, and knows it.
    if frames.ending() == Some(Disconnect::SlowConsumer) {
        return Err("the answer was cut".into());
    }
    Ok(lines)
}

fn run() -> Result<Vec<String>, Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(ask("how are you?"))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut out = std::io::stdout().lock();
    for line in run()? {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::run;

    #[test]
    fn a_reader_gets_the_answer_and_its_end() {
        let lines = run().unwrap();
        let last_edit = lines.iter().rfind(|line| line.contains(r#""type":"edit""#)).unwrap();
        assert!(last_edit.contains(r#""text":"You asked: how are you?""#), "{lines:#?}");
        assert_eq!(lines.last().unwrap(), r#"{"type":"end","reason":"stop"}"#);
    }
}
