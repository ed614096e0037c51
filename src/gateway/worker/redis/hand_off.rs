//! Where entries of workers go: an engine, or what a test puts in its place.

use std::future::ready;

use crate::gateway::api::op::Call;
use crate::gateway::worker::redis::envelope::Outbound;
use crate::platform::adapter::{BoxFuture, Outlet, SendError};
use crate::platform::webchat::{SendOptions, WebChat};
use crate::proto::delivery::PublishError;

/// Ready once an entry may be acknowledged. Dropped early, the entry comes again.
pub(crate) type Settled = BoxFuture<'static, ()>;

/// Why an entry was not posted: nothing of it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HandOffError {
    /// There is no room now: the same entry is to be tried again, before any later one.
    #[error("there is no room for it now")]
    Overloaded,
    /// This node is going away; another one is to take it.
    #[error("this node is shut down")]
    Closed,
    /// More than may be published, in words.
    #[error("{0}")]
    TooLarge(String),
    /// Not to be published at all, in words.
    #[error("{0}")]
    Bad(String),
}

impl From<SendError> for HandOffError {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Publish(PublishError::Overloaded | PublishError::SpoolFull) => Self::Overloaded,
            SendError::Publish(PublishError::Closed) => Self::Closed,
            SendError::Publish(PublishError::TooLarge { .. }) => Self::TooLarge(error.to_string()),
            _ => Self::Bad(error.to_string()),
        }
    }
}

/// Takes what workers ask for, in their order.
pub(crate) trait HandOff: Send + Sync + 'static {
    /// Posts `outbound`, whose message has an id already. What it gives is ready once whatever had to be forwarded was
    /// accepted elsewhere: then the entry may be acknowledged. The next entry is handed over without waiting for that.
    ///
    /// # Cancel safety
    /// Dropped early, it may or may not have been posted.
    fn hand_off<'a>(&'a self, outbound: &'a Outbound<'a>) -> BoxFuture<'a, Result<Settled, HandOffError>>;
}

impl<O: Outlet> HandOff for WebChat<O> {
    fn hand_off<'a>(&'a self, outbound: &'a Outbound<'a>) -> BoxFuture<'a, Result<Settled, HandOffError>> {
        Box::pin(async move {
            let (channel, id) = (&outbound.channel, outbound.id);
            let submitted = match &outbound.call {
                Call::Send { text, reply_to } => {
                    self.submit_text(channel, text, SendOptions { reply_to: *reply_to, id }).await?
                }
                Call::Buttons { text, buttons, reply_to } => {
                    let options = SendOptions { reply_to: *reply_to, id };
                    self.submit_buttons(channel, text, buttons, options).await?
                }
                Call::File { filename, mimetype, data } => {
                    self.submit_file(channel, data.clone(), filename, mimetype.as_deref()).await?.0
                }
                Call::Edit { id, text } => self.submit_edit(channel, *id, text).await?,
                Call::Typing { active } => self.submit_typing(channel, *active).await?,
                Call::End { reason } => self.submit_end(channel, *reason).await?,
            };
            Ok(submitted.posted.map_or_else(|| Box::pin(ready(())) as Settled, O::forwarded))
        })
    }
}
