//! WebChat: the browser's dialect. Calls become events, and events go to the outlet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use percent_encoding::{percent_decode_str, utf8_percent_encode};

use crate::id::{ChannelId, MessageId, RequestId};
use crate::platform::adapter::{BotIdentity, BoxFuture, OutgoingFile, Outlet, PlatformAdapter, SendError, StreamError};
use crate::platform::history;
use crate::platform::message::IncomingMessage;
use crate::platform::view::check_buttons;
use crate::proto::delivery::{Delivery, Nobody};
use crate::proto::event::{Button, EndReason, Event, FILENAME_SEGMENT};

/// The media type of a file whose sender named none.
pub const DEFAULT_MIMETYPE: &str = "application/octet-stream";

/// How the URLs of files begin.
const FILE_URL: &str = "webchat://file/";

/// What came of an outbound call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The message's id, where the call was about a message. It is there even if nobody was.
    pub id: Option<MessageId>,
    /// Who was addressed, and why it was nobody.
    pub delivery: Delivery,
}

/// An outbound call that was posted, and whose report may not be complete.
#[derive(Debug)]
pub(crate) struct Submitted<P> {
    /// The message's id, where the call was about a message.
    pub(crate) id: Option<MessageId>,
    /// None: there was nothing to post.
    pub(crate) posted: Option<P>,
}

/// What may be said beside a text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SendOptions {
    /// The message that this one answers.
    pub reply_to: Option<MessageId>,
    /// The message's id, if whoever sends it has chosen one. Default none: a fresh one.
    pub id: Option<MessageId>,
}

impl SendOptions {
    fn id(&self) -> MessageId {
        self.id.unwrap_or_else(MessageId::random)
    }
}

/// The adapter of browser chat.
///
/// The methods of [`PlatformAdapter`] are thin over the `…_report` forms here, which tell who was addressed.
///
/// # Cancel safety
/// Dropping a future before it is ready means that the call may or may not have taken effect; never in part.
#[derive(Debug)]
pub struct WebChat<O: Outlet> {
    outlet: Arc<O>,
    identity: BotIdentity,
    /// # Ordering
    /// Relaxed: a flag that publishes nothing else; whoever reads it only asks what it says.
    running: AtomicBool,
    history: History,
}

/// What [`PlatformAdapter::fetch_history`] gives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum History {
    /// Nothing, as the old adapter did.
    #[default]
    Empty,
    /// What recovery keeps: the last frames of a user's channel, within its bounds. Rooms and streams have none.
    Recovery,
}

impl<O: Outlet> WebChat<O> {
    /// An adapter that is running from the start and publishes to `outlet`. [`BotIdentity::default`] is the old
    /// adapter's: `webchat`, `star`, `Star`, `@Star`.
    #[must_use]
    pub fn new(outlet: Arc<O>, identity: BotIdentity) -> Self {
        Self { outlet, identity, running: AtomicBool::new(true), history: History::Empty }
    }

    /// The same with another history.
    #[must_use]
    pub fn with_history(self, history: History) -> Self {
        Self { history, ..self }
    }

    /// What it publishes to.
    #[must_use]
    pub fn outlet(&self) -> &Arc<O> {
        &self.outlet
    }

    /// Sends a text.
    ///
    /// # Errors
    /// The engine refused it: nothing was sent to anybody.
    pub async fn send_report(
        &self,
        channel: &ChannelId,
        text: &str,
        options: SendOptions,
    ) -> Result<Report, SendError> {
        Ok(self.settle(self.submit_text(channel, text, options).await?).await)
    }

    /// Sends a text with buttons.
    ///
    /// # Errors
    /// A limit of [`check_buttons`] is passed, or the engine refused it: nothing was sent to anybody.
    pub async fn send_with_buttons_report(
        &self,
        channel: &ChannelId,
        text: &str,
        buttons: &[Button],
        options: SendOptions,
    ) -> Result<Report, SendError> {
        Ok(self.settle(self.submit_buttons(channel, text, buttons, options).await?).await)
    }

    /// Sends a file, and returns its URL beside the report: see [`file_url`].
    ///
    /// # Errors
    /// The engine refused it: nothing was sent to anybody.
    pub async fn send_file_report(
        &self,
        channel: &ChannelId,
        data: Bytes,
        filename: &str,
        mimetype: Option<&str>,
    ) -> Result<(Report, String), SendError> {
        let (submitted, url) = self.submit_file(channel, data, filename, mimetype).await?;
        Ok((self.settle(submitted).await, url))
    }

    /// Replaces the text of message `id`.
    ///
    /// # Errors
    /// The engine refused it: nobody got it.
    pub async fn edit_report(&self, channel: &ChannelId, id: MessageId, text: &str) -> Result<Report, SendError> {
        Ok(self.settle(self.submit_edit(channel, id, text).await?).await)
    }

    /// Shows or takes away the sign that the bot is typing.
    ///
    /// # Errors
    /// The engine refused it: nobody got it.
    pub async fn typing_report(&self, channel: &ChannelId, active: bool) -> Result<Report, SendError> {
        Ok(self.settle(self.submit_typing(channel, active).await?).await)
    }

    /// Ends a stream: the `end` frame is its last. A user or a room has no end, so that a worker may end whatever it
    /// answers to: nothing is published there, and the report says [`Nobody::NoSuchStream`].
    ///
    /// # Errors
    /// The engine refused it: the stream goes on.
    pub async fn end_report(&self, channel: &ChannelId, reason: EndReason) -> Result<Report, SendError> {
        Ok(self.settle(self.submit_end(channel, reason).await?).await)
    }

    /// Waits until it is known who was addressed.
    pub(crate) async fn settle(&self, submitted: Submitted<O::Posted>) -> Report {
        let Submitted { id, posted } = submitted;
        let delivery = match posted {
            Some(posted) => self.outlet.settle(posted).await,
            None => Delivery::to_nobody(Nobody::NoSuchStream),
        };
        Report { id, delivery }
    }

    pub(crate) async fn submit_text(
        &self,
        channel: &ChannelId,
        text: &str,
        options: SendOptions,
    ) -> Result<Submitted<O::Posted>, SendError> {
        let (id, timestamp) = (options.id(), self.outlet.now());
        let event = Event::Message { id, text, sender: &self.identity.user_id, reply_to: options.reply_to, timestamp };
        self.submit(channel, Some(id), event).await
    }

    pub(crate) async fn submit_buttons(
        &self,
        channel: &ChannelId,
        text: &str,
        buttons: &[Button],
        options: SendOptions,
    ) -> Result<Submitted<O::Posted>, SendError> {
        check_buttons(buttons)?;
        let (id, timestamp) = (options.id(), self.outlet.now());
        let (sender, reply_to) = (self.identity.user_id.as_str(), options.reply_to);
        let event = Event::Buttons { id, text, sender, reply_to, buttons, timestamp };
        self.submit(channel, Some(id), event).await
    }

    pub(crate) async fn submit_file(
        &self,
        channel: &ChannelId,
        data: Bytes,
        filename: &str,
        mimetype: Option<&str>,
    ) -> Result<(Submitted<O::Posted>, String), SendError> {
        let id = self.outlet.file_id();
        let file = OutgoingFile {
            id,
            filename: filename.to_owned(),
            mimetype: mimetype.unwrap_or(DEFAULT_MIMETYPE).to_owned(),
            data,
            timestamp: self.outlet.now(),
        };
        let posted = Some(self.outlet.submit_file(channel, file).await?);
        Ok((Submitted { id: Some(id), posted }, file_url(id, filename)))
    }

    pub(crate) async fn submit_edit(
        &self,
        channel: &ChannelId,
        id: MessageId,
        text: &str,
    ) -> Result<Submitted<O::Posted>, SendError> {
        let event = Event::Edit { id, text, timestamp: self.outlet.now() };
        self.submit(channel, Some(id), event).await
    }

    pub(crate) async fn submit_typing(
        &self,
        channel: &ChannelId,
        active: bool,
    ) -> Result<Submitted<O::Posted>, SendError> {
        self.submit(channel, None, Event::Typing { active }).await
    }

    pub(crate) async fn submit_end(
        &self,
        channel: &ChannelId,
        reason: EndReason,
    ) -> Result<Submitted<O::Posted>, SendError> {
        match channel {
            ChannelId::Stream(_) => self.submit(channel, None, Event::End { reason }).await,
            ChannelId::User(_) | ChannelId::Room(_) => Ok(Submitted { id: None, posted: None }),
        }
    }

    async fn submit(
        &self,
        channel: &ChannelId,
        id: Option<MessageId>,
        event: Event<'_>,
    ) -> Result<Submitted<O::Posted>, SendError> {
        Ok(Submitted { id, posted: Some(self.outlet.submit(channel, event).await?) })
    }

    /// Registers the stream of `request`: a bounded queue of frames.
    ///
    /// # Errors
    /// There is one with this id already; it is not replaced.
    pub fn create_sse_queue(&self, request: &RequestId) -> Result<O::Stream, StreamError> {
        self.outlet.open_stream(request)
    }

    /// Takes the stream of `request` away: its reader is woken and sees the end. An absent id is a no-op.
    pub fn remove_sse_queue(&self, request: &RequestId) {
        self.outlet.close_stream(request);
    }
}

/// The URL of a file, `webchat://file/{id}/{filename}`, the filename percent-encoded but for letters, digits and `-._~`.
#[must_use]
pub fn file_url(id: MessageId, filename: &str) -> String {
    format!("{FILE_URL}{id}/{}", utf8_percent_encode(filename, FILENAME_SEGMENT))
}

/// The same file's path on a gateway, `/files/{id}/{filename}`: below `public_url` it is a link for people.
#[must_use]
pub fn file_path(id: MessageId, filename: &str) -> String {
    format!("/files/{id}/{}", utf8_percent_encode(filename, FILENAME_SEGMENT))
}

/// Reads what [`file_url`] writes: the file's id and its name, decoded. A name is only ever compared: it may be `..`,
/// or have slashes that were encoded.
///
/// `None`: another scheme, no message id, or a name that is not UTF-8 or not one segment.
///
/// ```
/// use tabcast::id::MessageId;
/// use tabcast::platform::webchat::{file_url, parse_file_url};
///
/// let id = MessageId::random();
/// assert_eq!(parse_file_url(&file_url(id, "100 %.png")), Some((id, "100 %.png".to_owned())));
/// ```
#[must_use]
pub fn parse_file_url(url: &str) -> Option<(MessageId, String)> {
    parse_file_segments(url.strip_prefix(FILE_URL)?)
}

/// Reads `{id}/{filename}`, which a file's URL and its path on a gateway both end with.
pub(crate) fn parse_file_segments(segments: &str) -> Option<(MessageId, String)> {
    let (id, filename) = segments.split_once('/')?;
    if filename.contains(['/', '?', '#']) {
        return None;
    }
    let filename = percent_decode_str(filename).decode_utf8().ok()?;
    Some((MessageId::parse(id).ok()?, filename.into_owned()))
}

/// The id of a message that was just given one.
fn id_of<P>(submitted: Submitted<P>) -> MessageId {
    submitted.id.unwrap_or_else(MessageId::random)
}

impl<O: Outlet> PlatformAdapter for WebChat<O> {
    fn name(&self) -> &'static str {
        "webchat"
    }

    fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    fn start(&self) {
        self.running.store(true, Ordering::Relaxed);
    }

    fn stop(&self) {
        self.running.store(false, Ordering::Relaxed);
    }

    fn bot_identity(&self) -> &BotIdentity {
        &self.identity
    }

    fn send<'a>(&'a self, channel: &'a ChannelId, text: &'a str) -> BoxFuture<'a, Result<MessageId, SendError>> {
        Box::pin(async move { self.submit_text(channel, text, SendOptions::default()).await.map(id_of) })
    }

    fn send_file<'a>(
        &'a self,
        channel: &'a ChannelId,
        data: Bytes,
        filename: &'a str,
        mimetype: Option<&'a str>,
    ) -> BoxFuture<'a, Result<String, SendError>> {
        Box::pin(async move { Ok(self.submit_file(channel, data, filename, mimetype).await?.1) })
    }

    fn send_with_buttons<'a>(
        &'a self,
        channel: &'a ChannelId,
        text: &'a str,
        buttons: &'a [Button],
    ) -> BoxFuture<'a, Result<MessageId, SendError>> {
        Box::pin(async move { self.submit_buttons(channel, text, buttons, SendOptions::default()).await.map(id_of) })
    }

    fn edit_message<'a>(
        &'a self,
        channel: &'a ChannelId,
        id: MessageId,
        text: &'a str,
    ) -> BoxFuture<'a, Result<bool, SendError>> {
        Box::pin(async move { Ok(self.edit_report(channel, id, text).await?.delivery.is_delivered()) })
    }

    fn start_typing<'a>(&'a self, channel: &'a ChannelId) -> BoxFuture<'a, ()> {
        Box::pin(async move { drop(self.submit_typing(channel, true).await) })
    }

    fn stop_typing<'a>(&'a self, channel: &'a ChannelId) -> BoxFuture<'a, ()> {
        Box::pin(async move { drop(self.submit_typing(channel, false).await) })
    }

    fn end<'a>(&'a self, channel: &'a ChannelId, reason: EndReason) -> BoxFuture<'a, ()> {
        Box::pin(async move { drop(self.submit_end(channel, reason).await) })
    }

    fn fetch_history<'a>(&'a self, channel: &'a ChannelId, limit: usize) -> BoxFuture<'a, Vec<IncomingMessage>> {
        let messages = match self.history {
            History::Empty => Vec::new(),
            History::Recovery => {
                history::messages(&self.outlet.history(channel), channel, &self.identity.user_id, limit)
            }
        };
        Box::pin(std::future::ready(messages))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt};

    use super::*;
    use crate::platform::adapter::prompt_context;
    use crate::platform::recording::{Recorder, published_id};
    use crate::proto::delivery::PublishError;

    fn chat() -> (Arc<Recorder>, WebChat<Recorder>) {
        let outlet = Arc::new(Recorder::default());
        (Arc::clone(&outlet), WebChat::new(outlet, BotIdentity::default()))
    }

    fn channel(text: &str) -> ChannelId {
        ChannelId::parse(text).unwrap()
    }

    /// The recorder never waits.
    fn now<T>(future: impl Future<Output = T>) -> T {
        future.now_or_never().unwrap()
    }

    #[test]
    fn name_is_webchat() {
        assert_eq!(chat().1.name(), "webchat");
    }

    #[test]
    fn it_runs_from_construction_and_start_and_stop_are_idempotent() {
        let (_, chat) = chat();
        assert!(chat.is_running());
        for (stop, expected) in [(true, false), (true, false), (false, true), (false, true)] {
            if stop {
                chat.stop()
            } else {
                chat.start()
            }
            assert_eq!(chat.is_running(), expected);
        }
    }

    #[test]
    fn the_bot_identity_is_star_unless_configured() {
        let expected = ["webchat", "star", "Star", "@Star"];
        let (_, chat) = chat();
        let bot = chat.bot_identity();
        assert_eq!([&*bot.platform, &*bot.user_id, &*bot.display_name, &*bot.mention], expected);
        let own = BotIdentity { user_id: "luna".to_owned(), ..BotIdentity::default() };
        let outlet = Arc::new(Recorder::default());
        let chat = WebChat::new(Arc::clone(&outlet), own);
        now(chat.send(&channel("u"), "hi")).unwrap();
        assert!(outlet.take()[0].contains("sender=luna"));
    }

    #[test]
    fn send_returns_the_id_that_was_published_even_if_nobody_was_there() {
        let (outlet, chat) = chat();
        outlet.set_delivery(Delivery::to_nobody(Nobody::Offline));
        let id = now(chat.send(&channel("alice"), " <b> ")).unwrap();
        assert_eq!(outlet.take(), [format!("webchat:alice message {id} sender=star text=' <b> ' at=7.5")]);
    }

    #[test]
    fn send_report_tells_who_was_addressed_and_carries_reply_to() {
        let (outlet, chat) = chat();
        let parent = MessageId::random();
        outlet.set_delivery(Delivery { nodes: 1, ..Delivery::here(2) });
        let report = {
            let options = SendOptions { reply_to: Some(parent), ..SendOptions::default() };
            now(chat.send_report(&channel("room:r"), "", options)).unwrap()
        };
        assert_eq!(report.delivery, Delivery { nodes: 1, ..Delivery::here(2) });
        let id = report.id.unwrap();
        assert_eq!(outlet.take(), [format!("room:r message {id} sender=star reply_to={parent} text='' at=7.5")]);
    }

    #[test]
    fn send_file_returns_a_url_with_the_filename_encoded_and_publishes_it_verbatim() {
        let (outlet, chat) = chat();
        let check = |filename: &str, encoded: &str| {
            let url = now(chat.send_file(&channel("u"), Bytes::from_static(b"x"), filename, None)).unwrap();
            let line = outlet.take().remove(0);
            let id = published_id(&line);
            assert_eq!(url, format!("webchat://file/{id}/{encoded}"));
            assert_eq!(
                line,
                format!("webchat:u file {id} name='{filename}' application/octet-stream data=[120] at=7.5")
            );
        };
        check("a.txt", "a.txt");
        check("my file #1?.png", "my%20file%20%231%3F.png");
        check("../../etc/passwd", "..%2F..%2Fetc%2Fpasswd");
        check("日.png", "%E6%97%A5.png");
        check("100%", "100%25");
        let (report, url) = now(chat.send_file_report(&channel("u"), Bytes::new(), "e", Some("text/plain"))).unwrap();
        assert_eq!(url, file_url(report.id.unwrap(), "e"));
        assert!(outlet.take()[0].contains("text/plain data=[]"));
    }

    #[test]
    fn send_with_buttons_publishes_them_and_refuses_too_many() {
        let (outlet, chat) = chat();
        let button = Button { label: "A".to_owned(), custom_id: "a".to_owned(), ..Button::default() };
        let id = now(chat.send_with_buttons(&channel("u"), "?", std::slice::from_ref(&button))).unwrap();
        let none = now(chat.send_with_buttons(&channel("u"), "?", &[])).unwrap();
        let expected = [
            format!("webchat:u buttons {id} sender=star text='?' [A=a] at=7.5"),
            format!("webchat:u buttons {none} sender=star text='?' [] at=7.5"),
        ];
        assert_eq!(outlet.take(), expected);
        let many = vec![button; 26];
        let refused = now(chat.send_with_buttons(&channel("u"), "?", &many));
        assert_eq!(refused, Err(SendError::TooManyButtons { count: 26 }));
        assert!(outlet.take().is_empty());
    }

    #[test]
    fn edit_message_says_whether_it_was_delivered() {
        let (outlet, chat) = chat();
        let id = MessageId::random();
        assert_eq!(now(chat.edit_message(&channel("u"), id, "new")), Ok(true));
        outlet.set_delivery(Delivery::default());
        assert_eq!(now(chat.edit_message(&channel("u"), id, "new")), Ok(false));
        outlet.set_delivery(Delivery { nodes: 1, ..Delivery::here(0) });
        assert_eq!(now(chat.edit_message(&channel("u"), id, "new")), Ok(true));
        assert_eq!(outlet.take()[0], format!("webchat:u edit {id} text='new' at=7.5"));
    }

    #[test]
    fn typing_never_fails() {
        let (outlet, chat) = chat();
        now(chat.start_typing(&channel("u")));
        now(chat.stop_typing(&channel("u")));
        assert_eq!(outlet.take(), ["webchat:u typing true", "webchat:u typing false"]);
        outlet.refuse(PublishError::Overloaded);
        now(chat.start_typing(&channel("u")));
        now(chat.stop_typing(&channel("u")));
        assert_eq!(now(chat.typing_report(&channel("u"), true)), Err(PublishError::Overloaded.into()));
    }

    #[test]
    fn a_refusal_of_the_engine_comes_back_typed() {
        let (outlet, chat) = chat();
        outlet.refuse(PublishError::Overloaded);
        let expected = SendError::Publish(PublishError::Overloaded);
        let u = channel("u");
        assert_eq!(now(chat.send(&u, "x")), Err(expected.clone()));
        assert_eq!(now(chat.send_with_buttons(&u, "x", &[])), Err(expected.clone()));
        assert_eq!(now(chat.edit_message(&u, MessageId::random(), "x")), Err(expected.clone()));
        assert_eq!(now(chat.send_file(&u, Bytes::new(), "x", None)), Err(expected));
    }

    #[test]
    fn the_url_of_a_file_can_be_read_again() {
        let id = MessageId::parse("6c84fb90-12c4-41e1-840d-7b25c5ee7750").unwrap();
        for name in ["a.png", "", "..", "../../etc/passwd", "a\0\r\n\"b", "日本 100%?#.txt", "%2e%2E"] {
            assert_eq!(parse_file_url(&file_url(id, name)), Some((id, name.to_owned())), "{name:?}");
            assert_eq!(file_path(id, name), file_url(id, name).replace("webchat://file/", "/files/"));
        }
        let check = |url: &str, expected: Option<&str>| {
            let url = url.replace("$ID", "6C84FB90-12C4-41E1-840D-7B25C5EE7750");
            assert_eq!(parse_file_url(&url), expected.map(|name| (id, name.to_owned())), "{url}");
        };
        check("webchat://file/$ID/a%2fb", Some("a/b"));
        check("webchat://file/$ID/a b", Some("a b"));
        for bad in
            ["", "a%ff", "webchat://file/$ID", "webchat://file//a", "webchat://file/x/a", "webchat://files/$ID/a"]
        {
            check(bad, None);
        }
        for name in ["a/b", "a/", "/a", "a?b", "a#b", "%ff", "../a"] {
            check(&format!("webchat://file/$ID/{name}"), None);
        }
        for scheme in ["http", "WEBCHAT", " webchat"] {
            check(&format!("{scheme}://file/$ID/a"), None);
        }
    }

    #[test]
    fn a_second_sse_queue_with_the_same_id_is_a_typed_error() {
        let (_, chat) = chat();
        let request = RequestId::parse("r").unwrap();
        let _first = chat.create_sse_queue(&request).unwrap();
        assert_eq!(chat.create_sse_queue(&request).err(), Some(StreamError::Exists(request.clone())));
        chat.remove_sse_queue(&request);
        assert!(chat.create_sse_queue(&request).is_ok());
    }

    #[test]
    fn remove_sse_queue_ends_the_reader_and_an_absent_id_is_a_no_op() {
        let (_, chat) = chat();
        let request = RequestId::parse("r").unwrap();
        chat.remove_sse_queue(&request);
        let mut stream = chat.create_sse_queue(&request).unwrap();
        assert!(stream.next().now_or_never().is_none(), "open");
        chat.remove_sse_queue(&request);
        assert!(now(stream.next()).is_none(), "ended");
    }

    #[test]
    fn fetch_history_is_empty_unless_recovery_is_asked_for() {
        let (_, chat) = chat();
        assert_eq!(now(chat.fetch_history(&channel("u"), 100)), []);
        let chat = chat.with_history(History::Recovery);
        assert_eq!(now(chat.fetch_history(&channel("u"), 100))[0].text, "u");
        assert_eq!(now(chat.fetch_history(&channel("u"), 0)), []);
    }

    #[test]
    fn prompt_context_names_the_running_adapters() {
        let (one, two) = (chat().1, chat().1);
        let both: [&dyn PlatformAdapter; 2] = [&one, &two];
        assert_eq!(prompt_context(both).len(), 2);
        two.stop();
        assert_eq!(prompt_context(both), [BotIdentity::default()]);
    }

    #[test]
    fn sends_still_work_after_stop() {
        let (outlet, chat) = chat();
        chat.stop();
        assert!(now(chat.send(&channel("u"), "x")).is_ok());
        assert_eq!(outlet.take().len(), 1);
    }

    #[test]
    fn an_end_goes_to_streams_only() {
        let (outlet, chat) = chat();
        let report = now(chat.end_report(&channel("sse:r"), EndReason::Stop)).unwrap();
        assert_eq!(report, Report { id: None, delivery: Delivery::here(1) });
        for id in ["u", "room:r"] {
            let report = now(chat.end_report(&channel(id), EndReason::Stop)).unwrap();
            assert_eq!(report.delivery.nobody, Some(Nobody::NoSuchStream));
        }
        assert_eq!(outlet.take(), ["sse:r end stop"]);
    }
}
