//! An outlet for tests: it writes down what it was given, one line an event.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::sync::mpsc;

use crate::id::{ChannelId, MessageId, RequestId};
use crate::platform::adapter::{BoxFuture, OutgoingFile, Outlet, StreamError};
use crate::proto::delivery::{Delivery, PublishError};
use crate::proto::event::{Button, Event, Timestamp};
use crate::proto::frame::Frame;

/// Records; answers with the delivery that it was told to, one tab by default.
pub(crate) struct Recorder {
    state: Mutex<State>,
}

struct State {
    lines: Vec<String>,
    answer: Result<Delivery, PublishError>,
    streams: HashMap<RequestId, mpsc::Sender<Frame>>,
}

impl Default for Recorder {
    fn default() -> Self {
        let answer = Ok(Delivery::here(1));
        Self { state: Mutex::new(State { lines: Vec::new(), answer, streams: HashMap::new() }) }
    }
}

impl Recorder {
    /// What was published since the last call.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().lines)
    }

    pub(crate) fn set_delivery(&self, delivery: Delivery) {
        self.state.lock().unwrap().answer = Ok(delivery);
    }

    pub(crate) fn refuse(&self, error: PublishError) {
        self.state.lock().unwrap().answer = Err(error);
    }

    fn record(&self, line: String) -> Result<Delivery, PublishError> {
        let mut state = self.state.lock().unwrap();
        if state.answer.is_ok() {
            state.lines.push(line);
        }
        state.answer
    }
}

/// The id in a recorded line: its third word.
pub(crate) fn published_id(line: &str) -> &str {
    line.split(' ').nth(2).unwrap()
}

fn describe(event: &Event<'_>) -> String {
    let reply = |id: &Option<_>| id.as_ref().map_or(String::new(), |id| format!(" reply_to={id}"));
    match event {
        Event::Message { id, text, sender, reply_to, timestamp } => {
            format!("message {id} sender={sender}{} text='{text}' at={}", reply(reply_to), timestamp.as_seconds())
        }
        Event::Buttons { id, text, sender, reply_to, buttons, timestamp } => {
            let one = |b: &Button| format!("{}={}", b.label, b.custom_id);
            let all = buttons.iter().map(one).collect::<Vec<_>>().join(" ");
            let (reply, at) = (reply(reply_to), timestamp.as_seconds());
            format!("buttons {id} sender={sender}{reply} text='{text}' [{all}] at={at}")
        }
        Event::File { id, filename, mimetype, data, timestamp } => {
            format!("file {id} name='{filename}' {mimetype} data={data:?} at={}", timestamp.as_seconds())
        }
        Event::Edit { id, text, timestamp } => format!("edit {id} text='{text}' at={}", timestamp.as_seconds()),
        Event::Typing { active } => format!("typing {active}"),
        Event::End { reason } => format!("end {}", reason.as_str()),
    }
}

impl Outlet for Recorder {
    type Stream = Reader;

    type Posted = Delivery;

    async fn settle(&self, posted: Delivery) -> Delivery {
        posted
    }

    fn forwarded(_posted: Delivery) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }

    async fn submit(&self, channel: &ChannelId, event: Event<'_>) -> Result<Delivery, PublishError> {
        self.record(format!("{channel} {}", describe(&event)))
    }

    async fn submit_file(&self, channel: &ChannelId, file: OutgoingFile) -> Result<Delivery, PublishError> {
        let OutgoingFile { id, filename, mimetype, data, timestamp } = &file;
        let event = Event::File { id: *id, filename, mimetype, data, timestamp: *timestamp };
        self.record(format!("{channel} {}", describe(&event)))
    }

    fn open_stream(&self, request: &RequestId) -> Result<Reader, StreamError> {
        let mut state = self.state.lock().unwrap();
        if state.streams.contains_key(request) {
            return Err(StreamError::Exists(request.clone()));
        }
        let (sender, receiver) = mpsc::channel(1);
        state.streams.insert(request.clone(), sender);
        Ok(Reader(receiver))
    }

    fn close_stream(&self, request: &RequestId) {
        self.state.lock().unwrap().streams.remove(request);
    }

    fn history(&self, channel: &ChannelId) -> Vec<Frame> {
        let timestamp = self.now();
        let text = channel.key();
        vec![Frame::encode(&Event::Message { id: MessageId::random(), text, sender: "u", reply_to: None, timestamp })]
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_micros(7_500_000)
    }
}

/// The reading end of a recorded stream.
#[derive(Debug)]
pub(crate) struct Reader(mpsc::Receiver<Frame>);

impl Stream for Reader {
    type Item = Frame;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Frame>> {
        self.0.poll_recv(context)
    }
}
