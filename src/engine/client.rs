//! Text from tabs, on the shard's thread: parsed, answered at once where that is possible, and handed on where not.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::fanout::session::SessionRef;
use crate::fanout::shard::{Inbound, Reaction, limited_frame};
use crate::metrics::{InboundKind, Metrics, ShardMetrics};
use crate::platform::inbound::{Command, InboundLimits, Scratch, parse};
use crate::proto::event::{ErrorCode, Notice};
use crate::proto::frame::Frame;
use crate::proto::limits::SessionLimits;

/// A message or a press on its way from a tab to the worker.
#[derive(Debug)]
pub(crate) struct Handed {
    pub(crate) session: SessionRef,
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
        match parse(text, &mut self.scratch, &self.shared.limits()) {
            Ok(command) => limited_frame(command.client_id()),
            Err(error) => limited_frame(error.client_id.as_deref()),
        }
    }
}

impl ClientText {
    fn react(&self, session: &SessionRef, command: Command, bytes: usize) -> Reaction {
        self.metrics.inbound_messages.of(kind(&command)).increment();
        if let Some(room) = command.room()
            && !session.identity().rooms.allows(room)
        {
            let message = format!("the token does not allow the room {room}");
            return Reaction::Reply(error_frame(ErrorCode::Forbidden, &message, command.client_id()));
        }
        let ack = |client_id: Option<Box<str>>| {
            client_id.map(|client_id| Frame::notice(&Notice::Ack { client_id: &client_id, id: None }))
        };
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
            Command::Message { .. } | Command::Button { .. } => self.hand_on(session, command, bytes),
        }
    }

    fn hand_on(&self, session: &SessionRef, command: Command, bytes: usize) -> Reaction {
        let refuse = |code, client_id: Option<&str>| {
            let message = match code {
                ErrorCode::Draining => "the gateway is shutting down; nothing was accepted",
                _ => "too much waits for the worker; nothing was accepted, try again later",
            };
            Reaction::Reply(error_frame(code, message, client_id))
        };
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(room) = Arc::clone(&self.shared.room).try_acquire_many_owned(bytes) else {
            return refuse(ErrorCode::Overloaded, command.client_id());
        };
        match self.shared.handed.try_send(Handed { session: session.clone(), command, _room: room }) {
            Ok(()) => Reaction::Nothing,
            Err(TrySendError::Full(handed)) => refuse(ErrorCode::Overloaded, handed.command.client_id()),
            Err(TrySendError::Closed(handed)) => refuse(ErrorCode::Draining, handed.command.client_id()),
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
