//! The whole gateway with a worker of one's own in the same process: pages, tokens and `/api` as in the binary,
//! settings from `TABCAST_…` variables, and every message from a browser to the function below.

use std::error::Error;
use std::sync::Arc;

use tabcast::config::{Machine, Sources};
use tabcast::gateway::serve;
use tabcast::id::ChannelId;
use tabcast::platform::adapter::{PlatformAdapter, SendError};
use tabcast::platform::message::IncomingMessage;
use tabcast::proto::event::Button;

/// Messages of one channel come one after the other: the next when this one's future is ready.
async fn handle(message: IncomingMessage, adapter: Arc<dyn PlatformAdapter>) {
    if let Err(error) = reply(&message, &*adapter).await {
        tracing::warn!(%error, "a reply was refused");
    }
}

async fn reply(message: &IncomingMessage, adapter: &dyn PlatformAdapter) -> Result<(), SendError> {
    let Ok(channel) = ChannelId::parse(&message.channel_id) else { return Ok(()) };
    if message.extra.contains_key("button") {
        adapter.send(&channel, &format!("{} chose {}.", message.user_name, message.text)).await?;
    } else if message.is_addressed {
        let button = |label: &str, custom_id: &str| Button {
            label: label.to_owned(),
            custom_id: custom_id.to_owned(),
            ..Button::default()
        };
        let buttons = [button("Tea", "tea"), button("Coffee", "coffee")];
        adapter.send_with_buttons(&channel, "What may it be?", &buttons).await?;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let settings = Sources::new().with_variables(std::env::vars_os()).load(Machine::here())?;
    println!("http://{}/", settings.listen);
    // Runs until SIGTERM, and drains. It makes its own threads and runtimes, so nothing here is async.
    Ok(serve::run_with(settings, Some(Arc::new(handle)))?)
}
