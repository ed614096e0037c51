//! Tabs without a socket of ours: each is an async `Stream` of frames, for a transport of the embedder's own.
//!
//! Such a tab is a session like any other, under the rules of [`fanout::shard`](crate::fanout::shard): it counts among
//! its user's, hears frames in the one order, is cut if it falls behind, may resume and be in rooms. Its shard runs on a
//! thread of its own, which [`Mailboxes::start`] starts, and hands whole frames over to whoever reads: a few at a time,
//! so that what waits does so in the session's bounded queue.
//!
//! ```
//! use futures_util::StreamExt;
//! use tabcast::engine::mailboxes::Mailboxes;
//! use tabcast::engine::{Engine, EngineSettings};
//! use tabcast::fanout::session::Identity;
//! use tabcast::id::{ChannelId, UserId};
//! use tabcast::platform::adapter::{BotIdentity, Outlet, PlatformAdapter, Unanswered};
//! use tabcast::platform::webchat::WebChat;
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(async {
//! let engine = Engine::new(EngineSettings::default());
//! let mailboxes = Mailboxes::start(&engine, Unanswered)?;
//! let mut tab = mailboxes.connect(Identity::new(UserId::parse("ann")?, engine.now())).await?;
//!
//! WebChat::new(engine.into(), BotIdentity::default()).send(&ChannelId::parse("ann")?, "hi").await?;
//! let frame = tab.next().await.ok_or("it has ended")?;
//! assert!(String::from_utf8_lossy(frame.json()).contains(r#""text":"hi""#));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod hand;
mod thread;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_core::Stream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::engine::Engine;
use crate::engine::client::ClientTexts;
pub(crate) use crate::engine::mailboxes::hand::Piece;
use crate::engine::mailboxes::hand::{Chunks, Hand, Stirred};
use crate::engine::mailboxes::thread::{Command, MailboxThread};
use crate::engine::worker::{NoRuntime, Worker};
use crate::fanout::hub::Drain;
use crate::fanout::session::{Address, Identity};
use crate::fanout::shard::{OpenError, Opening, Resume, Wire};
use crate::id::{ChannelId, RoomName};
use crate::platform::adapter::{MessageHandler, Outlet};
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;
use crate::proto::limits::SessionLimits;

/// What tabs may ask of their shard's thread before it has done it.
const COMMANDS_MAX: usize = 256;

/// Why there are no mailboxes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is nothing to run the handler.
    #[error(transparent)]
    NoRuntime(#[from] NoRuntime),
    /// [`EngineSettings::has_mailboxes`](crate::engine::EngineSettings::has_mailboxes) is false.
    #[error("the engine was made without mailboxes")]
    NoShard,
    /// They were started before, and are not started twice: it takes a new engine.
    #[error("the engine's mailboxes were started before, and are not started twice")]
    Started,
    /// The kernel has no threads left.
    #[error("cannot start the mailboxes' thread: {0}")]
    Io(#[from] io::Error),
}

/// Why a tab was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Its shard refuses it: the user has all the tabs that one may have, or no tab is opened any more.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The mailboxes' thread has ended.
    #[error("the mailboxes have ended")]
    Ended,
}

/// Why a tab's own words were not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SayError {
    /// A text over [`message_bytes_max`](crate::proto::limits::SessionLimits::message_bytes_max).
    #[error("the text has {bytes} bytes, over the limit of {bytes_max}")]
    TooLarge {
        /// How many it has.
        bytes: usize,
        /// How many it may have.
        bytes_max: usize,
    },
    /// The room is not among those that the tab's identity may join.
    #[error("the tab may not join that room")]
    NotGranted,
    /// The tab is in as many rooms as it may be.
    #[error("the tab is in as many rooms as it may be")]
    TooManyRooms,
    /// The tab has ended, or is about to.
    #[error("the tab has ended")]
    Ended,
}

/// The tabs of an engine that are mailboxes. Clones are the same ones; dropping the last one ends them, as
/// [`Mailboxes::shutdown`] does, and their thread.
#[derive(Debug, Clone)]
pub struct Mailboxes {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    engine: Engine,
    shard: u16,
    commands: mpsc::Sender<Command>,
    stirred: Arc<Stirred>,
    running: watch::Receiver<bool>,
    worker: Option<Worker>,
}

impl Mailboxes {
    /// Starts the thread of the mailboxes of `engine`. What their people say goes to `handler`: to
    /// [`Unanswered`](crate::platform::adapter::Unanswered) if it is nobody's.
    ///
    /// # Errors
    /// [`StartError`]: nothing runs.
    pub fn start(engine: &Engine, handler: impl MessageHandler) -> Result<Self, StartError> {
        if engine.hub().mailbox_shard().is_none() {
            return Err(StartError::NoShard);
        }
        let worker = Worker::start(engine, handler)?;
        let texts = worker.texts().clone();
        Self::start_thread(engine, &texts, Some(worker))
    }

    /// The same for a worker that was started before.
    ///
    /// # Errors
    /// [`StartError`]: nothing runs.
    pub fn start_with(engine: &Engine, texts: &ClientTexts) -> Result<Self, StartError> {
        Self::start_thread(engine, texts, None)
    }

    fn start_thread(engine: &Engine, texts: &ClientTexts, worker: Option<Worker>) -> Result<Self, StartError> {
        let shard = engine.hub().mailbox_shard().ok_or(StartError::NoShard)?;
        let (commands, asked) = mpsc::channel(COMMANDS_MAX);
        let stirred = Arc::<Stirred>::default();
        let reach = (asked, Arc::clone(&stirred));
        let running = start_once(engine, || MailboxThread::start(engine, shard, texts.for_shard(shard), reach))?;
        Ok(Self { shared: Arc::new(Shared { engine: engine.clone(), shard, commands, stirred, running, worker }) })
    }

    /// Opens a tab of `identity` that begins now.
    ///
    /// # Errors
    /// [`ConnectError`]: nothing was opened.
    ///
    /// # Cancel safety
    /// Dropped, it leaves no tab behind.
    pub async fn connect(&self, identity: Identity) -> Result<TabMailbox, ConnectError> {
        self.open(identity, Resume::Fresh, (Chunks::Ignored, None)).await
    }

    /// Opens a tab that goes on behind what it had: what it missed comes before anything live.
    ///
    /// # Errors
    /// [`ConnectError`]: nothing was opened.
    ///
    /// # Cancel safety
    /// Dropped, it leaves no tab behind.
    pub async fn reconnect(&self, identity: Identity, resume: Resume) -> Result<TabMailbox, ConnectError> {
        self.open(identity, resume, (Chunks::Ignored, None)).await
    }

    /// Opens a tab that is read as an event stream, and hears a `hello` first if it wants to.
    #[cfg(feature = "driver")]
    pub(crate) async fn open_events(
        &self,
        identity: Identity,
        resume: Resume,
        wants_hello: bool,
    ) -> Result<TabMailbox, ConnectError> {
        let greeter = wants_hello.then(|| self.shared.engine.clone());
        self.open(identity, resume, (Chunks::Wanted, greeter)).await
    }

    async fn open(
        &self,
        identity: Identity,
        resume: Resume,
        (chunks, greeter): (Chunks, Option<Engine>),
    ) -> Result<TabMailbox, ConnectError> {
        let Shared { engine, commands, stirred, .. } = &*self.shared;
        // What other nodes publish has to reach this one before the tab hears anything.
        engine.expect(&ChannelId::User(identity.user.clone())).await;
        let resume = engine.resume(&identity.user, resume).await;
        let opening = Opening { resume, ..Opening::at(engine.now(), identity, Wire::Frames) };
        let (reply, replied) = oneshot::channel();
        let limits = Arc::clone(engine.session_limits());
        let (hand, stirred) = (Arc::new(Hand::new(chunks)), Arc::clone(stirred));
        let tab = TabMailbox { hand, stirred, commands: commands.clone(), limits };
        // The tab goes there and comes back: whoever does not wait for it leaves none behind.
        let open = Command::Open { opening: Box::new(opening), greeter, tab, reply };
        commands.send(open).await.map_err(|_| ConnectError::Ended)?;
        Ok(replied.await.map_err(|_| ConnectError::Ended)??)
    }

    /// Lets the handler finish what it was given, for as long as [`Drain::latest`] at most; then opens no tab any more and
    /// tells all of them to come back later. Each ends once what it had waiting is read, or a
    /// [`close_timeout`](crate::proto::limits::SessionLimits::close_timeout) later. Waits until the thread has ended, which
    /// takes `latest` twice and that timeout at the most. To be awaited in a runtime with timers.
    ///
    /// # Cancel safety
    /// Dropped once it has begun, it goes on at once, also if the handler has yet to finish, and nobody waits for it.
    pub async fn shutdown(&self, drain: Drain) {
        let begins = BeginsWhenDropped { shared: &self.shared, drain };
        if let Some(worker) = &self.shared.worker {
            // Whoever waits for an answer still gets it, if it comes in time.
            let _ = tokio::time::timeout(drain.latest, worker.finish()).await;
        }
        drop(begins);
        self.ended().await;
    }

    /// Whether the thread has not ended.
    #[cfg(feature = "driver")]
    pub(crate) fn is_running(&self) -> bool {
        let running = &self.shared.running;
        *running.borrow() && running.has_changed().is_ok()
    }

    /// Waits until the thread has ended.
    pub(crate) async fn ended(&self) {
        // An error is a thread that is gone.
        let _ = self.shared.running.clone().wait_for(|running| !running).await;
    }
}

/// Starts what an engine has once. What could not be started may be tried again.
fn start_once<T>(engine: &Engine, start: impl FnOnce() -> io::Result<T>) -> Result<T, StartError> {
    let has_started = &engine.inner.has_started_mailboxes;
    // Ordering: Relaxed: who comes first starts them, and publishes nothing by it.
    if has_started.swap(true, Ordering::Relaxed) {
        return Err(StartError::Started);
    }
    start().map_err(|error| {
        has_started.store(false, Ordering::Relaxed);
        error.into()
    })
}

/// A drain that begins in any case.
struct BeginsWhenDropped<'a> {
    shared: &'a Shared,
    drain: Drain,
}

impl Drop for BeginsWhenDropped<'_> {
    fn drop(&mut self) {
        self.shared.engine.hub().drain_shard(self.shared.shard, self.drain);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let at_once = Drain { spread: Duration::ZERO, closes_per_second_max: u32::MAX, latest: Duration::ZERO };
        self.engine.hub().drain_shard(self.shard, at_once);
    }
}

/// One tab: its frames in order, then the end. Dropping it ends the tab. Of one that is cut, because it is behind or dead,
/// what was not read is gone: it gets that by coming back.
///
/// # Cancel safety
/// A frame is taken out only when `poll_next` returns it.
#[derive(Debug)]
pub struct TabMailbox {
    hand: Arc<Hand>,
    stirred: Arc<Stirred>,
    commands: mpsc::Sender<Command>,
    limits: Arc<ArcSwap<SessionLimits>>,
}

impl TabMailbox {
    /// Which session it is.
    ///
    /// # Panics
    /// Never: whoever has it got it from the shard, which gave it its place.
    #[must_use]
    pub fn address(&self) -> Address {
        self.hand.address().expect("an opened tab has its place")
    }

    /// Why the tab ended, once it has and everything before that was read or lost.
    #[must_use]
    pub fn ending(&self) -> Option<Disconnect> {
        self.hand.ending()
    }

    /// What speaks for the tab, while it is read.
    #[must_use]
    pub fn voice(&self) -> Voice {
        let (hand, limits) = (Arc::clone(&self.hand), Arc::clone(&self.limits));
        Voice { address: self.address(), hand, commands: self.commands.clone(), limits }
    }

    /// The next piece, of those that are no frames as well if it was opened for them.
    pub(crate) fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Piece>> {
        self.hand.poll(context, &self.stirred)
    }
}

impl Stream for TabMailbox {
    type Item = Frame;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Frame>> {
        loop {
            match std::task::ready!(self.poll_piece(context)) {
                Some(Piece::Frame(frame)) => return Poll::Ready(Some(frame)),
                Some(Piece::Chunk(_)) => {}
                None => return Poll::Ready(None),
            }
        }
    }
}

impl Drop for TabMailbox {
    fn drop(&mut self) {
        self.hand.leave();
        self.stirred.stir(&self.hand);
    }
}

/// What speaks for one tab. Clones speak for the same one; none keeps it open.
///
/// ```
/// # use futures_util::StreamExt;
/// # use tabcast::engine::mailboxes::Mailboxes;
/// # use tabcast::engine::{Engine, EngineSettings};
/// # use tabcast::fanout::session::{Identity, RoomGrant};
/// # use tabcast::id::{RoomName, UserId};
/// # use tabcast::platform::adapter::{Outlet, Unanswered};
/// # tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(async {
/// # let engine = Engine::new(EngineSettings::default());
/// # let mailboxes = Mailboxes::start(&engine, Unanswered)?;
/// let ann = Identity { rooms: RoomGrant::Any, ..Identity::new(UserId::parse("ann")?, engine.now()) };
/// let mut tab = mailboxes.connect(ann).await?;
/// let voice = tab.voice();
/// voice.join(&RoomName::parse("lobby")?).await?;
/// voice.say(r#"{"type":"ping","client_id":"1"}"#.to_owned()).await?;
/// let pong = tab.next().await.ok_or("it has ended")?;
/// assert_eq!(pong.json(), br#"{"type":"pong","client_id":"1"}"#);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Voice {
    address: Address,
    hand: Arc<Hand>,
    commands: mpsc::Sender<Command>,
    limits: Arc<ArcSwap<SessionLimits>>,
}

impl Voice {
    /// Says what the client of one's own transport has said: one text of the protocol that a WebSocket's client speaks
    /// (`message`, `button`, `typing`, `join`, `leave`, `ping`), within its limits. Answers come as frames.
    ///
    /// # Errors
    /// [`SayError::TooLarge`], [`SayError::Ended`]: it was not heard.
    ///
    /// # Cancel safety
    /// Dropped, it was said or not.
    pub async fn say(&self, text: String) -> Result<(), SayError> {
        let (bytes, bytes_max) = (text.len(), self.limits.load().message_bytes_max);
        if bytes > bytes_max {
            return Err(SayError::TooLarge { bytes, bytes_max });
        }
        self.ask(Command::Text { address: self.address, text }).await
    }

    /// Puts the tab into a room that its identity may join. Ready once what is published there reaches it. One that came
    /// back just now is told of a gap, as rooms are not kept.
    ///
    /// # Errors
    /// [`SayError`], but for the first: it is not in the room.
    ///
    /// # Cancel safety
    /// Dropped, it may be in the room or not.
    pub async fn join(&self, room: &RoomName) -> Result<(), SayError> {
        let (reply, replied) = oneshot::channel();
        self.ask(Command::Join { address: self.address, room: room.clone(), reply }).await?;
        replied.await.map_err(|_| SayError::Ended)?
    }

    /// Takes the tab out of a room.
    ///
    /// # Errors
    /// [`SayError::Ended`].
    ///
    /// # Cancel safety
    /// Dropped, it may be in the room or not.
    pub async fn leave(&self, room: &RoomName) -> Result<(), SayError> {
        self.ask(Command::Leave { address: self.address, room: room.clone() }).await
    }

    async fn ask(&self, command: Command) -> Result<(), SayError> {
        if self.hand.is_over() {
            return Err(SayError::Ended);
        }
        self.commands.send(command).await.map_err(|_| SayError::Ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineSettings;

    #[test]
    fn what_could_not_be_started_is_started_later_and_then_never_again() {
        let engine = Engine::new(EngineSettings::default());
        let fails = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
        assert!(matches!(start_once(&engine, fails), Err(StartError::Io(_))));
        assert!(matches!(start_once(&engine, fails), Err(StartError::Io(_))));
        assert!(start_once(&engine, || Ok(())).is_ok());
        assert!(matches!(start_once(&engine, || Ok(())), Err(StartError::Started)));
    }
}
