//! From the shards to the worker: what a person sent gets an id, a place in the worker's queue, its ack and its echo,
//! in this order, and only then the worker sees it.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use foldhash::quality::RandomState;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::engine::Engine;
use crate::engine::client::{ClientTexts, Handed, HandoverLimits, Said, Sender};
use crate::id::{ChannelId, MessageId, UserId};
use crate::metrics::WorkerOutcome;
use crate::platform::adapter::{BotIdentity, BoxFuture, Outlet};
use crate::platform::dispatch::Inlet;
use crate::platform::inbound::{Author, Command};
use crate::platform::message::IncomingMessage;
use crate::proto::event::{ErrorCode, Event, Notice, Timestamp};
use crate::proto::frame::Frame;

/// Messages that are kept at one time, where that takes a while.
const BATCH: usize = 256;

/// How long a client's own id is remembered: a repeat within that time gets the same message id.
const REMEMBERED: Duration = Duration::from_secs(5 * 60);

/// Where a person's message is kept until a worker has it, whatever happens to this process.
pub trait Durable: Send + Sync + 'static {
    /// Ready once it is kept. Calls whose futures are first polled in order are kept in order.
    fn keep<'a>(&'a self, message: &'a IncomingMessage) -> BoxFuture<'a, Result<(), NotKept>>;
}

/// Why a message is not kept, in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotKept {
    /// For certain.
    #[error("{0}")]
    Refused(String),
    /// It may be all the same: a repeat has the same message id.
    #[error("{0}")]
    Unknown(String),
}

/// How people's messages reach a worker.
#[derive(Clone)]
pub struct IntakeSettings {
    /// Who the bot is: who is addressed in a room.
    pub bot: BotIdentity,
    /// Whether a person's own message goes to all tabs of that person. Default true. In a room it always goes to all.
    pub echo_to_tabs: bool,
    /// How much may be on its way to the intake.
    pub handover: HandoverLimits,
    /// Ids of clients that are remembered for 5 minutes, the newest. Each costs about 640 bytes at most.
    pub client_ids_max: usize,
    /// Where messages are kept before they are acked. None: in this process's queue, from which the worker gets them.
    pub durable: Option<Arc<dyn Durable>>,
}

impl std::fmt::Debug for IntakeSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IntakeSettings").field("is_durable", &self.durable.is_some()).finish_non_exhaustive()
    }
}

/// Takes what the shards hand on. One a worker.
#[derive(Debug)]
pub struct Intake {
    engine: Engine,
    settings: IntakeSettings,
    inlet: Inlet,
    handed: mpsc::Receiver<Handed>,
    seen: Seen,
}

impl Intake {
    /// An intake that feeds `inlet`, and what the shards need to feed it.
    #[must_use]
    pub fn new(engine: Engine, inlet: Inlet, settings: IntakeSettings) -> (Self, ClientTexts) {
        let limits = Arc::clone(engine.session_limits());
        let (texts, handed) = ClientTexts::new(engine.metrics().clone(), limits, settings.handover);
        let seen = Seen::new(settings.client_ids_max);
        (Self { engine, settings, inlet, handed, seen }, texts)
    }

    /// Runs until every shard is gone.
    ///
    /// # Cancel safety
    /// Dropping it loses what was handed on and not yet acked: their senders are told that the gateway is draining.
    pub async fn run(mut self) {
        let mut batch = Vec::new();
        while self.handed.recv_many(&mut batch, BATCH).await > 0 {
            let mut admitted = Vec::new();
            for handed in batch.drain(..) {
                // What a client says twice waits for what became of the first.
                if admitted.iter().any(|other: &Admitted| other.is_repeated_by(&handed)) {
                    self.accept(&mut admitted).await;
                }
                admitted.extend(self.admit(handed).await);
                if self.settings.durable.is_none() {
                    self.accept(&mut admitted).await;
                }
            }
            self.accept(&mut admitted).await;
        }
    }

    /// Answers what was accepted before, or cannot be; the rest is for the worker.
    async fn admit(&mut self, handed: Handed) -> Option<Admitted> {
        let Handed { sender, command, _room } = handed;
        let (user, now) = (sender.identity().user.clone(), self.engine.now());
        let client_id: Option<Box<str>> = command.client_id().map(Box::from);
        let content = self.seen.content(&command);
        let earlier = client_id.as_deref().and_then(|client_id| self.seen.find(&user, client_id, now));
        if earlier.is_some_and(|earlier| earlier.content != content) {
            let reason = "this `client_id` came with something else before: use a new one for something new";
            self.answer(sender, Said::refused(ErrorCode::BadField, reason, client_id.as_deref())).await;
            return None;
        }
        let id = earlier.map_or_else(MessageId::random, |earlier| earlier.id);
        if earlier.is_some_and(|earlier| earlier.is_accepted) {
            self.answer(sender, ack(client_id.as_deref(), id)).await;
            return None;
        }
        let is_press = matches!(command, Command::Button { .. });
        let author = Author { user_id: &user, user_name: &sender.identity().name };
        let message = command.into_incoming(author, &self.settings.bot, id, now)?;
        Some(Admitted { sender, client_id, content, is_press, message, _room })
    }

    /// Gives messages to the worker's queue, in their order, and tells their senders.
    async fn accept(&mut self, admitted: &mut Vec<Admitted>) {
        match self.settings.durable.clone() {
            Some(durable) => {
                // The queue's bounds hold here too, and once it is closed nothing is kept any more.
                let mut placed = Vec::with_capacity(admitted.len());
                for admitted in admitted.drain(..) {
                    match self.inlet.reserve(&admitted.message) {
                        Ok(place) => placed.push((admitted, place)),
                        Err(refused) => self.refuse(admitted, refused.code(), &refused.to_string()).await,
                    }
                }
                let keeping = placed.iter().map(|(admitted, _)| durable.keep(&admitted.message)).collect();
                let kept = all_in_order(keeping).await;
                for ((admitted, _place), kept) in placed.into_iter().zip(kept) {
                    match kept {
                        Ok(()) => {
                            self.count(WorkerOutcome::Delivered);
                            drop(self.accepted(admitted).await);
                        }
                        Err(error) => {
                            if matches!(error, NotKept::Unknown(_)) {
                                self.remember(&admitted, false);
                            }
                            self.refuse(admitted, ErrorCode::Overloaded, &error.to_string()).await;
                        }
                    }
                }
            }
            None => {
                for admitted in admitted.drain(..) {
                    match self.inlet.reserve(&admitted.message) {
                        Ok(place) => {
                            let message = self.accepted(admitted).await;
                            place.hand_on(message);
                        }
                        Err(refused) => self.refuse(admitted, refused.code(), &refused.to_string()).await,
                    }
                }
            }
        }
    }

    /// The ack, then the echo; the message is what the worker is to have.
    async fn accepted(&mut self, admitted: Admitted) -> IncomingMessage {
        self.count(WorkerOutcome::Accepted);
        self.remember(&admitted, true);
        let Admitted { sender, client_id, is_press, message, .. } = admitted;
        self.answer(sender, ack(client_id.as_deref(), message.message_id)).await;
        if !is_press {
            self.echo(&message).await;
        }
        message
    }

    async fn refuse(&self, admitted: Admitted, code: ErrorCode, reason: &str) {
        self.count(WorkerOutcome::Refused);
        let Admitted { sender, client_id, .. } = admitted;
        self.answer(sender, Said::refused(code, reason, client_id.as_deref())).await;
    }

    fn remember(&mut self, admitted: &Admitted, is_accepted: bool) {
        if let Some(client_id) = &admitted.client_id {
            let earlier = Earlier { id: admitted.message.message_id, content: admitted.content, is_accepted };
            self.seen.remember(admitted.sender.identity().user.clone(), client_id.clone(), earlier, self.engine.now());
        }
    }

    fn count(&self, outcome: WorkerOutcome) {
        self.engine.metrics().engine.worker_messages.of(outcome).increment();
    }

    async fn answer(&self, sender: Sender, said: Said) {
        match sender {
            Sender::Tab(session) => {
                if let Some(frame) = said.into_frame()
                    && let Err(error) = self.engine.send_to_session(session.address(), frame).await
                {
                    tracing::warn!(%error, "an answer did not reach its tab");
                }
            }
            // A client that has gone away does not hear it, and asks again under the same id.
            Sender::Request(_, answer) => drop(answer.send(said)),
        }
    }

    /// The person's own message, to all tabs of that person, or to the room.
    async fn echo(&self, message: &IncomingMessage) {
        let Ok(channel) = ChannelId::parse(&message.channel_id) else { return };
        if matches!(channel, ChannelId::User(_)) && !self.settings.echo_to_tabs {
            return;
        }
        let event = Event::Message {
            id: message.message_id,
            text: &message.text,
            sender: &message.user_id,
            reply_to: message.reply_to_id,
            timestamp: message.timestamp,
        };
        if let Err(error) = self.engine.submit(&channel, event).await {
            tracing::warn!(%error, "an echo was not published");
        }
    }
}

/// A message or a press on its way to the worker's queue.
struct Admitted {
    sender: Sender,
    client_id: Option<Box<str>>,
    content: u64,
    is_press: bool,
    message: IncomingMessage,
    _room: OwnedSemaphorePermit,
}

impl Admitted {
    fn is_repeated_by(&self, handed: &Handed) -> bool {
        let client_id = handed.command.client_id();
        client_id.is_some()
            && client_id == self.client_id.as_deref()
            && self.sender.identity().user == handed.sender.identity().user
    }
}

fn ack(client_id: Option<&str>, id: MessageId) -> Said {
    Said::Accepted(client_id.map(|client_id| Frame::notice(&Notice::Ack { client_id, id: Some(id) })))
}

/// Polls all of them, each time in their order, until all are ready.
async fn all_in_order<T>(mut futures: Vec<BoxFuture<'_, T>>) -> Vec<T> {
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    poll_fn(|context| {
        let mut is_ready = true;
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none() {
                match future.as_mut().poll(context) {
                    Poll::Ready(done) => *result = Some(done),
                    Poll::Pending => is_ready = false,
                }
            }
        }
        if is_ready { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    results.into_iter().flatten().collect()
}

/// What a client's own id stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Earlier {
    id: MessageId,
    /// See [`Seen::content`].
    content: u64,
    /// It was acked. If not, it may have reached a worker all the same.
    is_accepted: bool,
}

/// The ids that clients gave to what they sent, for a while.
#[derive(Debug)]
struct Seen {
    ids_max: usize,
    /// Of content: nobody can choose two that have one digest.
    digests: RandomState,
    ids: HashMap<(UserId, Box<str>), Earlier>,
    by_age: VecDeque<(Timestamp, UserId, Box<str>)>,
}

impl Seen {
    fn new(ids_max: usize) -> Self {
        Self { ids_max, digests: RandomState::default(), ids: HashMap::new(), by_age: VecDeque::new() }
    }

    /// A digest of what a worker would get: whether it is a message or a press, and all of it but the client's id.
    fn content(&self, command: &Command) -> u64 {
        let mut digest = self.digests.build_hasher();
        match command {
            Command::Message { text, reply_to, room, attachments, .. } => {
                let files = attachments.iter().map(|file| (&file.filename, &file.mimetype, &file.data));
                (0, text, reply_to, room, files.collect::<Vec<_>>()).hash(&mut digest);
            }
            Command::Button { message_id, custom_id, room, .. } => (1, message_id, custom_id, room).hash(&mut digest),
            Command::Typing { .. } | Command::Join { .. } | Command::Leave { .. } | Command::Ping { .. } => {}
        }
        digest.finish()
    }

    fn find(&mut self, user: &UserId, client_id: &str, now: Timestamp) -> Option<Earlier> {
        self.forget(now, self.ids_max);
        self.ids.get(&(user.clone(), Box::from(client_id))).copied()
    }

    fn remember(&mut self, user: UserId, client_id: Box<str>, earlier: Earlier, now: Timestamp) {
        let Some(others_max) = self.ids_max.checked_sub(1) else { return };
        self.forget(now, others_max);
        if self.ids.insert((user.clone(), client_id.clone()), earlier).is_none() {
            self.by_age.push_back((now, user, client_id));
        }
    }

    fn forget(&mut self, now: Timestamp, keep: usize) {
        let lifetime = u64::try_from(REMEMBERED.as_micros()).unwrap_or(u64::MAX);
        let is_old = |at: &Timestamp| now.as_micros().saturating_sub(at.as_micros()) > lifetime;
        while self.by_age.len() > keep || self.by_age.front().is_some_and(|(at, ..)| is_old(at)) {
            if let Some((_, user, client_id)) = self.by_age.pop_front() {
                self.ids.remove(&(user, client_id));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::RoomName;
    use crate::platform::message::Attachment;

    #[test]
    fn a_client_id_is_remembered_for_five_minutes_and_never_more_than_so_many() {
        let mut seen = Seen::new(100);
        let user = UserId::parse("u").unwrap();
        let (id, second) = (Earlier { id: MessageId::random(), content: 7, is_accepted: true }, 1_000_000);
        seen.remember(user.clone(), "a".into(), id, Timestamp::from_micros(second));
        assert_eq!(seen.find(&user, "a", Timestamp::from_micros(301 * second)), Some(id));
        assert_eq!(seen.find(&UserId::parse("v").unwrap(), "a", Timestamp::from_micros(second)), None);
        assert_eq!(seen.find(&user, "a", Timestamp::from_micros(302 * second)), None);
        for n in 0..110 {
            seen.remember(user.clone(), n.to_string().into(), id, Timestamp::from_micros(400 * second));
        }
        assert_eq!((seen.ids.len(), seen.by_age.len()), (100, 100));
        assert_eq!(seen.find(&user, "9", Timestamp::from_micros(400 * second)), None);
    }

    #[test]
    fn a_client_id_stands_for_all_of_what_was_sent() {
        let seen = Seen::new(1);
        let id = MessageId::random();
        let room = RoomName::parse("r").unwrap();
        let file = |data: &'static [u8]| Attachment { filename: "f".into(), mimetype: "m".into(), data: data.into() };
        let message = |text: &str, reply_to, room, attachments| {
            let (text, client_id) = (text.to_owned(), Some("c".into()));
            Command::Message { text, reply_to, room, client_id, attachments }
        };
        let press = |custom_id: &str, room| {
            let custom_id = custom_id.to_owned();
            Command::Button { message_id: id, custom_id, room, client_id: None }
        };
        let all = [
            message("a", None, None, vec![]),
            message("b", None, None, vec![]),
            message("a", Some(id), None, vec![]),
            message("a", None, Some(room.clone()), vec![]),
            message("a", None, None, vec![file(b"1")]),
            message("a", None, None, vec![file(b"2")]),
            press("a", None),
            press("b", None),
            press("a", Some(room)),
        ];
        for (at, one) in all.iter().enumerate() {
            for (other_at, other) in all.iter().enumerate() {
                assert_eq!(seen.content(one) == seen.content(other), at == other_at, "{one:?} {other:?}");
            }
        }
    }
}
