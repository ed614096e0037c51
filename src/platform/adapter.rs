//! What a chat platform offers to a bot, and what a platform needs from the engine below it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_core::Stream;

use crate::id::{ChannelId, MessageId, RequestId};
use crate::platform::message::IncomingMessage;
use crate::proto::delivery::{Delivery, PublishError};
use crate::proto::event::{Button, EndReason, Event, Timestamp};
use crate::proto::frame::Frame;

/// A boxed future, so that adapters and handlers can be held as `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Who the bot is on a platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BotIdentity {
    /// The platform's name, for example `webchat`.
    pub platform: String,
    /// The bot's user id: the `sender` of its messages. Default `star`.
    pub user_id: String,
    /// What people read. Default `Star`.
    pub display_name: String,
    /// How people address it. Default `@Star`.
    pub mention: String,
}

impl Default for BotIdentity {
    fn default() -> Self {
        Self {
            platform: "webchat".to_owned(),
            user_id: "star".to_owned(),
            display_name: "Star".to_owned(),
            mention: "@Star".to_owned(),
        }
    }
}

/// Why an outbound call did nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The engine refused it.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// More buttons than [`crate::proto::event::BUTTONS_MAX`].
    #[error("{count} buttons; at most {max} are allowed", max = crate::proto::event::BUTTONS_MAX)]
    TooManyButtons {
        /// How many there were.
        count: usize,
    },
    /// A label over [`crate::proto::event::LABEL_CHARS_MAX`] characters.
    #[error("the label of button {index} has {chars} characters; at most {max} are allowed", max = crate::proto::event::LABEL_CHARS_MAX)]
    LabelTooLong {
        /// Which button, from 0.
        index: usize,
        /// Its length.
        chars: usize,
    },
    /// A custom id over [`crate::proto::event::CUSTOM_ID_CHARS_MAX`] characters.
    #[error("the custom_id of button {index} has {chars} characters; at most {max} are allowed", max = crate::proto::event::CUSTOM_ID_CHARS_MAX)]
    CustomIdTooLong {
        /// Which button, from 0.
        index: usize,
        /// Its length.
        chars: usize,
    },
    /// The platform does not have this.
    #[error("{platform} does not support {what}")]
    Unsupported {
        /// The platform's name.
        platform: &'static str,
        /// What was asked for.
        what: &'static str,
    },
}

/// What every chat platform offers to a bot. `WebChat` implements it; other platforms would too.
///
/// # Cancel safety
/// Dropping a returned future before it is ready means that the call may or may not have taken effect; it never
/// takes effect in part.
pub trait PlatformAdapter: Send + Sync + 'static {
    /// The platform's name, for example `webchat`.
    fn name(&self) -> &str;
    /// True from construction; [`start`](Self::start) and [`stop`](Self::stop) set it.
    fn is_running(&self) -> bool;
    /// Idempotent.
    fn start(&self);
    /// Idempotent. Closes no socket, and sends still work after it.
    fn stop(&self);
    /// Who the bot is here.
    fn bot_identity(&self) -> &BotIdentity;
    /// Sends a text. The id comes back even if nobody was there.
    fn send<'a>(&'a self, channel: &'a ChannelId, text: &'a str) -> BoxFuture<'a, Result<MessageId, SendError>>;
    /// Sends a file and returns its URL, `webchat://file/{id}/{filename}` with the filename percent-encoded.
    /// `mimetype` defaults to `application/octet-stream`.
    fn send_file<'a>(
        &'a self,
        channel: &'a ChannelId,
        data: Bytes,
        filename: &'a str,
        mimetype: Option<&'a str>,
    ) -> BoxFuture<'a, Result<String, SendError>>;
    /// Sends a text with buttons. The id comes back even if nobody was there.
    fn send_with_buttons<'a>(
        &'a self,
        channel: &'a ChannelId,
        text: &'a str,
        buttons: &'a [Button],
    ) -> BoxFuture<'a, Result<MessageId, SendError>>;
    /// Replaces a message's text. True if the edit was delivered to anybody.
    fn edit_message<'a>(
        &'a self,
        channel: &'a ChannelId,
        id: MessageId,
        text: &'a str,
    ) -> BoxFuture<'a, Result<bool, SendError>>;
    /// Shows that the bot is typing. Never fails.
    fn start_typing<'a>(&'a self, channel: &'a ChannelId) -> BoxFuture<'a, ()>;
    /// Takes the typing sign away. Never fails.
    fn stop_typing<'a>(&'a self, channel: &'a ChannelId) -> BoxFuture<'a, ()>;
    /// Says that an answer is complete, or why it is not: the last word of a stream (`sse:…`). Elsewhere it says nothing,
    /// so that a bot may end whatever it answers to. Never fails.
    fn end<'a>(&'a self, channel: &'a ChannelId, reason: EndReason) -> BoxFuture<'a, ()>;
    /// The last messages of a channel, oldest first, at most `limit` (the old adapter's default was 100).
    fn fetch_history<'a>(&'a self, channel: &'a ChannelId, limit: usize) -> BoxFuture<'a, Vec<IncomingMessage>>;
}

/// The default `limit` of [`PlatformAdapter::fetch_history`].
pub const HISTORY_LIMIT: usize = 100;

/// The identities of the adapters that are running, for a bot's prompt.
pub fn prompt_context<'a>(adapters: impl IntoIterator<Item = &'a dyn PlatformAdapter>) -> Vec<BotIdentity> {
    adapters.into_iter().filter(|a| a.is_running()).map(|a| a.bot_identity().clone()).collect()
}

/// What a bot does with a message: an async callback of message and adapter.
///
/// Any `Fn(IncomingMessage, Arc<dyn PlatformAdapter>) -> impl Future<Output = ()>` is one.
pub trait MessageHandler: Send + Sync + 'static {
    /// Handles one message. Messages of one user arrive in order; the next one is handed on when this future is ready.
    fn handle(&self, message: IncomingMessage, adapter: Arc<dyn PlatformAdapter>) -> BoxFuture<'static, ()>;
}

impl<F, R> MessageHandler for F
where
    F: Fn(IncomingMessage, Arc<dyn PlatformAdapter>) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    fn handle(&self, message: IncomingMessage, adapter: Arc<dyn PlatformAdapter>) -> BoxFuture<'static, ()> {
        Box::pin(self(message, adapter))
    }
}

/// The handler of whoever has none: people write to each other, and workers only send.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unanswered;

impl MessageHandler for Unanswered {
    fn handle(&self, _message: IncomingMessage, _adapter: Arc<dyn PlatformAdapter>) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// What a platform needs from below: somewhere to publish to. The engine implements it.
pub trait Outlet: Send + Sync + 'static {
    /// The reading end of a stream: frames in order, then the end.
    type Stream: Stream<Item = Frame> + Send + Unpin + 'static;

    /// A publish that was posted, and whose report may not be complete.
    type Posted: Send + 'static;

    /// Encodes `event` once and posts it to whoever `channel` names, here and on other nodes. Waits for room up to the
    /// engine's deadline, and for no other node.
    fn submit(
        &self,
        channel: &ChannelId,
        event: Event<'_>,
    ) -> impl Future<Output = Result<Self::Posted, PublishError>> + Send;

    /// The same for a file, whose encoding leaves the calling thread if it is large.
    fn submit_file(
        &self,
        channel: &ChannelId,
        file: OutgoingFile,
    ) -> impl Future<Output = Result<Self::Posted, PublishError>> + Send;

    /// Waits for the other nodes' answers up to the engine's deadline.
    fn settle(&self, posted: Self::Posted) -> impl Future<Output = Delivery> + Send;

    /// Ready once every other node has taken it or is gone, however long that takes.
    fn forwarded(posted: Self::Posted) -> BoxFuture<'static, ()>;

    /// [`submit`](Self::submit) and [`settle`](Self::settle).
    fn publish(
        &self,
        channel: &ChannelId,
        event: Event<'_>,
    ) -> impl Future<Output = Result<Delivery, PublishError>> + Send {
        async move { Ok(self.settle(self.submit(channel, event).await?).await) }
    }

    /// [`submit_file`](Self::submit_file) and [`settle`](Self::settle).
    fn publish_file(
        &self,
        channel: &ChannelId,
        file: OutgoingFile,
    ) -> impl Future<Output = Result<Delivery, PublishError>> + Send {
        async move { Ok(self.settle(self.submit_file(channel, file).await?).await) }
    }

    /// A fresh id for a file, by which its link is known.
    fn file_id(&self) -> MessageId {
        MessageId::random()
    }

    /// Registers the stream of `request`.
    ///
    /// # Errors
    /// [`StreamError`]: there is one already, which is not replaced, or there are too many.
    fn open_stream(&self, request: &RequestId) -> Result<Self::Stream, StreamError>;

    /// Ends the stream of `request`: its reader is woken and sees the end. An absent id is a no-op.
    fn close_stream(&self, request: &RequestId);

    /// What is kept of a channel's frames, oldest first.
    fn history(&self, channel: &ChannelId) -> Vec<Frame>;

    /// The clock that frames are stamped with.
    fn now(&self) -> Timestamp;
}

/// A file on its way out.
#[derive(Debug, Clone)]
pub struct OutgoingFile {
    /// The file's id.
    pub id: MessageId,
    /// Verbatim.
    pub filename: String,
    /// Its media type.
    pub mimetype: String,
    /// The raw bytes.
    pub data: Bytes,
    /// When it was sent.
    pub timestamp: Timestamp,
}

/// Why a stream was not registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// There is one with this request id: it is not replaced.
    #[error("a stream for request {0} exists already")]
    Exists(RequestId),
    /// As many are open as the limit allows.
    #[error("{streams_max} streams are open, which is as many as allowed")]
    TooMany {
        /// The limit.
        streams_max: usize,
    },
}
