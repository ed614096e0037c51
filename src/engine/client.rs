//! Text from tabs, on the shard's thread: parsed, answered at once where that is possible, and handed on where not. And
//! the same from users who have no connection that could carry it: their requests are answered with the frame.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::fanout::session::Identity;
use crate::fanout::session::SessionRef;
use crate::fanout::shard::{Inbound, Reaction, limited_frame};
use crate::metrics::{InboundKind, Metrics, ShardMetrics};
use crate::platform::inbound::{Command, InboundLimits, Scratch, parse};
use crate::proto::event::{ErrorCode, Notice};
use crate::proto::frame::Frame;
use crate::proto::limits::SessionLimits;

/// Who sent something, and so where its answer goes.
#[derive(Debug)]
pub(crate) enum Sender {
    /// A tab: the answer goes onto its connection.
    Tab(SessionRef),
    /// A request of a user, which waits for the answer.
    Request(Arc<Identity>, oneshot::Sender<Said>),
}

impl Sender {
    pub(crate) fn identity(&self) -> &Identity {
        match self {
            Self::Tab(session) => session.identity(),
            Self::Request(identity, _) => identity,
        }
    }
}

/// What became of a frame that came by a request.
#[derive(Debug, Clone)]
pub enum Said {
    /// It was carried out. The answer is what a tab would get: none if it asked for none.
    Accepted(Option<Frame>),
    /// It was not, and the frame says why.
    Refused(ErrorCode, Frame),
}

impl Said {
    pub(crate) fn refused(code: ErrorCode, message: &str, client_id: Option<&str>) -> Self {
        Self::Refused(code, error_frame(code, message, client_id))
    }

    /// The frame for a tab.
    pub(crate) fn into_frame(self) -> Option<Frame> {
        match self {
            Self::Accepted(frame) => frame,
            Self::Refused(_, frame) => Some(frame),
        }
    }
}

/// A message or a press on its way to the worker.
#[derive(Debug)]
pub(crate) struct Handed {
    pub(crate) sender: Sender,
    pub(crate) command: Command,
    /// Room for its bytes, until the worker's queue has taken it over.
    pub(crate) _room: OwnedSemaphorePermit,
}

/// How much may be on its way between the shards and the worker's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandoverLimits {
    /// Messages. Default 1,024.
    pub messages_max: usize,
    /// Bytes of their frames. Default 32 MiB.
    pub bytes_max: usize,
}

impl Default for HandoverLimits {
    fn default() -> Self {
        Self { messages_max: 1_024, bytes_max: 32 << 20 }
    }
}

/// Makes [`ClientText`]s: one for each shard, all handing on to the same intake.
#[derive(Debug, Clone)]
pub struct ClientTexts {
    metrics: Arc<Metrics>,
    limits: Arc<ArcSwap<SessionLimits>>,
    handed: mpsc::Sender<Handed>,
    room: Arc<Semaphore>,
}

impl ClientTexts {
    pub(crate) fn new(
        metrics: Arc<Metrics>,
        limits: Arc<ArcSwap<SessionLimits>>,
        handover: HandoverLimits,
    ) -> (Self, mpsc::Receiver<Handed>) {
        let (handed, intake) = mpsc::channel(handover.messages_max);
        let room = Arc::new(Semaphore::new(handover.bytes_max.min(Semaphore::MAX_PERMITS)));
        (Self { metrics, limits, handed, room }, intake)
    }

    fn limits(&self) -> InboundLimits {
        InboundLimits::from(&**self.limits.load())
    }

    /// The one for shard `index`.
    ///
    /// # Panics
    /// If there is no such shard.
    #[must_use]
    pub fn for_shard(&self, index: u16) -> ClientText {
        ClientText {
            shared: self.clone(),
            metrics: self.metrics.shard(usize::from(index)),
            scratch: Scratch::default(),
        }
    }

    /// Carries out one frame of a user, as if a tab of that user had sent it, and waits for what a tab would be
    /// answered: for a message, until the worker's queue has it.
    ///
    /// Rooms are joined and left by sessions, and this is none: both are refused with `bad_field`.
    ///
    /// # Cancel safety
    /// Dropping it takes nothing back: the frame may still be carried out.
    pub async fn say(&self, identity: Arc<Identity>, text: &mut [u8]) -> Said {
        let bytes = text.len();
        let command = match parse(text, &mut Scratch::default(), &self.limits()) {
            Ok(command) => command,
            Err(error) => return Said::refused(error.code, &error.message, error.client_id.as_deref()),
        };
        if let Some(message) = forbidden(&identity, &command) {
            return Said::refused(ErrorCode::Forbidden, &message, command.client_id());
        }
        let client_id: Option<Box<str>> = command.client_id().map(Box::from);
        match command {
            Command::Ping { .. } => {
                Said::Accepted(Some(Frame::notice(&Notice::Pong { client_id: client_id.as_deref() })))
            }
            Command::Typing { .. } => Said::Accepted(acked(client_id.as_deref())),
            Command::Join { .. } | Command::Leave { .. } => {
                let message = "rooms are those that the event stream was opened with: open it with other ones";
                Said::refused(ErrorCode::BadField, message, client_id.as_deref())
            }
            Command::Message { .. } | Command::Button { .. } => {
                let (answer, said) = oneshot::channel();
                match self.hand_on(Sender::Request(identity, answer), command, bytes) {
                    Ok(()) => said.await.unwrap_or_else(|_| not_taken(ErrorCode::Draining, client_id.as_deref())),
                    Err(refused) => refused,
                }
            }
        }
    }

    /// What a user is told who says too much in the time: nothing of `text` is carried out.
    #[must_use]
    pub fn limited(&self, text: &mut [u8]) -> Said {
        Said::Refused(ErrorCode::RateLimited, self.limited_frame(text, &mut Scratch::default()))
    }

    /// The same of a text that is too long to be read for its client id.
    #[must_use]
    pub fn limited_unread() -> Said {
        Said::Refused(ErrorCode::RateLimited, limited_frame(None))
    }

    fn limited_frame(&self, text: &mut [u8], scratch: &mut Scratch) -> Frame {
        match parse(text, scratch, &self.limits()) {
            Ok(command) => limited_frame(command.client_id()),
            Err(error) => limited_frame(error.client_id.as_deref()),
        }
    }

    fn hand_on(&self, sender: Sender, command: Command, bytes: usize) -> Result<(), Said> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(room) = Arc::clone(&self.room).try_acquire_many_owned(bytes) else {
            return Err(not_taken(ErrorCode::Overloaded, command.client_id()));
        };
        self.handed.try_send(Handed { sender, command, _room: room }).map_err(|refused| match refused {
            TrySendError::Full(handed) => not_taken(ErrorCode::Overloaded, handed.command.client_id()),
            TrySendError::Closed(handed) => not_taken(ErrorCode::Draining, handed.command.client_id()),
        })
    }
}

/// Why a command may not be carried out, if it names a room that its sender may not join.
fn forbidden(identity: &Identity, command: &Command) -> Option<String> {
    let room = command.room().filter(|room| !identity.rooms.allows(room))?;
    Some(format!("the token does not allow the room {room}"))
}

fn acked(client_id: Option<&str>) -> Option<Frame> {
    client_id.map(|client_id| Frame::notice(&Notice::Ack { client_id, id: None }))
}

fn not_taken(code: ErrorCode, client_id: Option<&str>) -> Said {
    let message = match code {
        ErrorCode::Draining => "the gateway is shutting down; nothing was accepted",
        _ => "too much waits for the worker; nothing was accepted, try again later",
    };
    Said::refused(code, message, client_id)
}

/// Understands the text of one shard's tabs.
#[derive(Debug)]
pub struct ClientText {
    shared: ClientTexts,
    metrics: Arc<ShardMetrics>,
    scratch: Scratch,
}

impl Inbound for ClientText {
    fn text(&mut self, session: &SessionRef, text: &mut [u8]) -> Reaction {
        let bytes = text.len();
        match parse(text, &mut self.scratch, &self.shared.limits()) {
            Ok(command) => self.react(session, command, bytes),
            Err(error) => Reaction::Bad(error_frame(error.code, &error.message, error.client_id.as_deref())),
        }
    }

    fn limited(&mut self, text: &mut [u8]) -> Frame {
        self.shared.limited_frame(text, &mut self.scratch)
    }
}

impl ClientText {
    fn react(&self, session: &SessionRef, command: Command, bytes: usize) -> Reaction {
        self.metrics.inbound_messages.of(kind(&command)).increment();
        if let Some(message) = forbidden(session.identity(), &command) {
            return Reaction::Reply(error_frame(ErrorCode::Forbidden, &message, command.client_id()));
        }
        let ack = |client_id: Option<Box<str>>| acked(client_id.as_deref());
        match command {
            Command::Ping { client_id } => {
                Reaction::Reply(Frame::notice(&Notice::Pong { client_id: client_id.as_deref() }))
            }
            // A person's typing is for the worker at most, and none has asked for it: it is acked and goes no further.
            Command::Typing { client_id, .. } => ack(client_id).map_or(Reaction::Nothing, Reaction::Reply),
            Command::Join { room, client_id } => {
                let full = error_frame(
                    ErrorCode::LimitReached,
                    "the tab is in as many rooms as it may be",
                    client_id.as_deref(),
                );
                Reaction::Join { room, ack: ack(client_id), full }
            }
            Command::Leave { room, client_id } => Reaction::Leave { room, ack: ack(client_id) },
            Command::Message { .. } | Command::Button { .. } => {
                let sender = Sender::Tab(session.clone());
                match self.shared.hand_on(sender, command, bytes).map_err(Said::into_frame) {
                    Ok(()) | Err(None) => Reaction::Nothing,
                    Err(Some(error)) => Reaction::Reply(error),
                }
            }
        }
    }
}

pub(crate) fn error_frame(code: ErrorCode, message: &str, client_id: Option<&str>) -> Frame {
    Frame::notice(&Notice::Error { code, message, client_id })
}

const fn kind(command: &Command) -> InboundKind {
    match command {
        Command::Message { .. } => InboundKind::Message,
        Command::Button { .. } => InboundKind::Button,
        Command::Typing { .. } => InboundKind::Typing,
        Command::Join { .. } => InboundKind::Join,
        Command::Leave { .. } => InboundKind::Leave,
        Command::Ping { .. } => InboundKind::Ping,
    }
}
