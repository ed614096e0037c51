//! How sessions begin: tabs, tabs that come back, and the readers of answers.

use std::sync::Arc;
use std::time::Duration;

use crate::fanout::hub::{TooManyWatchers, Watched};
use crate::fanout::registry::TooManyTabs;
use crate::fanout::returning::Missed;
use crate::fanout::session::{Address, Identity};
use crate::fanout::shard::Shard;
use crate::fanout::shard::answer::Answer;
use crate::fanout::shard::frames::{Local, Wire};
use crate::fanout::shard::offer::Urgency;
use crate::fanout::shard::slab::State;
use crate::fanout::shard::timers::Timers;
use crate::fanout::streams::{self, AttachError, StreamOptions};
use crate::id::{MessageId, UserId};
use crate::proto::disconnect::Disconnect;
use crate::proto::event::{GapReason, Notice, Timestamp};
use crate::proto::frame::Frame;

/// The most ids that one position has.
const POSITIONS_MAX: usize = 16;

/// How long after it came back a tab joins the rooms that it was in before.
const REJOIN_TIME: Duration = Duration::from_secs(10);

/// Why a session was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The user has as many as one user may have.
    #[error(transparent)]
    TooManyTabs(#[from] TooManyTabs),
    /// The shard has no slot left.
    #[error("the shard has no slot left")]
    NoSlot,
    /// As many watch as may.
    #[error(transparent)]
    TooManyWatchers(#[from] TooManyWatchers),
    /// The shard is draining.
    #[error("the node is shutting down")]
    Draining,
    /// The stream that it was to read could not be registered.
    #[error(transparent)]
    Stream(#[from] streams::OpenError),
    /// The stream that it was to read again is not there.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// Where a tab goes on.
#[derive(Debug, Clone, Default)]
pub enum Resume {
    /// It begins: nothing is replayed.
    #[default]
    Fresh,
    /// These are the last ordered frames that it has, the newest first: what it missed behind the first of them that
    /// is known comes before anything live. One is enough for a tab without rooms, whose frames are not kept.
    After(Vec<MessageId>),
    /// It names a position that is none: it is told that there is a gap.
    Unknown,
    /// What it missed is kept elsewhere, and was read: `Engine::resume`.
    Missed(Arc<Missed>),
}

/// Two are the same only if they are one.
impl PartialEq for Resume {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Fresh, Self::Fresh) | (Self::Unknown, Self::Unknown) => true,
            (Self::After(positions), Self::After(others)) => positions == others,
            (Self::Missed(missed), Self::Missed(other)) => Arc::ptr_eq(missed, other),
            _ => false,
        }
    }
}

impl Eq for Resume {}

impl Resume {
    /// From a position as a client wrote it: an id, or up to sixteen of them with commas between. None is
    /// [`Resume::Fresh`].
    #[must_use]
    pub fn from_position(position: Option<&str>) -> Self {
        let Some(text) = position else { return Self::Fresh };
        let ids: Result<Vec<_>, _> =
            text.split(',').take(POSITIONS_MAX + 1).map(|id| MessageId::parse(id.trim_ascii())).collect();
        match ids {
            Ok(ids) if ids.len() <= POSITIONS_MAX => Self::After(ids),
            _ => Self::Unknown,
        }
    }
}

/// What a session is opened with.
#[derive(Debug, Clone)]
pub struct Opening {
    /// Who it belongs to.
    pub identity: Identity,
    /// How its bytes are written.
    pub wire: Wire,
    /// How long its token is good for; None for ever.
    pub expires_in: Option<Duration>,
    /// Where it goes on.
    pub resume: Resume,
}

impl Opening {
    /// A session that begins, and does not expire.
    #[must_use]
    pub fn new(identity: Identity, wire: Wire) -> Self {
        Self { identity, wire, expires_in: None, resume: Resume::Fresh }
    }

    /// A session that begins at `now`, and expires when its identity says.
    #[must_use]
    pub fn at(now: Timestamp, identity: Identity, wire: Wire) -> Self {
        let good_for = |at: Timestamp| Duration::from_micros(at.as_micros().saturating_sub(now.as_micros()));
        let expires_in = identity.expires_at.map(good_for);
        Self { expires_in, ..Self::new(identity, wire) }
    }
}

impl Shard {
    /// Opens a session: from here on frames reach its queue. Nothing is written before [`Self::handle_writable`]
    /// is called for it, so that whoever holds the connection can write the response's head first.
    ///
    /// `greet` makes what the session hears first, if anything; then follows what it missed.
    ///
    /// # Errors
    /// [`OpenError`]: nothing was opened.
    pub fn open(
        &mut self,
        opening: Opening,
        greet: impl FnOnce(Address) -> Option<Frame>,
    ) -> Result<Address, OpenError> {
        let (slot, address) = self.take_slot(opening.wire, Arc::new(opening.identity), opening.expires_in)?;
        let Some(handle) = self.slab.session_ref(self.index, slot) else { return Err(OpenError::NoSlot) };
        let missed = match self.hub.connect(handle, &opening.resume) {
            Ok(missed) => missed,
            Err(error) => {
                self.give_slot(slot);
                return Err(error.into());
            }
        };
        if opening.wire == Wire::DeflatedWebSocket {
            self.hub.deflating().joined();
        }
        self.metrics.sessions.store(self.slab.len() as u64);
        greet(address).into_iter().for_each(|frame| self.send(slot, frame));
        if opening.resume != Resume::Fresh {
            self.slab.get_mut(slot).resumed_until = self.timers.tick() + Timers::ticks(REJOIN_TIME);
        }
        match missed {
            Some(missed) => missed.into_iter().for_each(|frame| self.replay(slot, frame)),
            None => {
                let gap = Notice::Gap { reason: GapReason::UnknownPosition, count: None };
                self.send(slot, Frame::notice(&gap));
            }
        }
        Ok(address)
    }

    /// Opens an event stream that shows what goes by: a session like any, but nobody's. It is in no listing, counts as
    /// no tab, and is in no room but that of those who watch the same.
    ///
    /// # Errors
    /// [`OpenError`]: nothing was opened.
    pub fn open_watcher(&mut self, watched: &Watched) -> Result<Address, OpenError> {
        let (slot, address) = self.take_slot(Wire::EventStream, Arc::clone(&self.reader), None)?;
        let room = match self.hub.starts_watching(watched, self.index) {
            Ok(room) => room,
            Err(error) => {
                self.give_slot(slot);
                return Err(error.into());
            }
        };
        let membership = self.rooms.join(room, slot);
        self.slab.get_mut(slot).rooms.push(membership);
        self.metrics.sessions.store(self.slab.len() as u64);
        Ok(address)
    }

    /// Ends all of these.
    pub(super) fn end_watchers(&mut self) {
        let watchers: Vec<u32> = self.rooms.apart().collect();
        for slot in watchers {
            self.end(slot, Disconnect::TokenExpired);
        }
    }

    /// Opens a session that reads a new answer, and the answer's stream with it.
    ///
    /// # Errors
    /// [`OpenError`]: nothing was opened.
    pub fn open_answer(&mut self, answer: Answer, options: StreamOptions) -> Result<Address, OpenError> {
        let (slot, address) = self.take_slot(Wire::Completion, Arc::clone(&self.reader), None)?;
        if let Err(error) = self.hub.open_stream_for(&answer.request, options, address) {
            self.give_slot(slot);
            return Err(error.into());
        }
        self.begin_answer(slot, answer);
        Ok(address)
    }

    /// Opens a session that reads an answer which `user` left: what was said so far comes before anything live.
    ///
    /// # Errors
    /// [`OpenError`]: nothing was opened.
    pub fn reopen_answer(&mut self, user: &UserId, answer: Answer) -> Result<Address, OpenError> {
        let (slot, address) = self.take_slot(Wire::Completion, Arc::clone(&self.reader), None)?;
        let said = match self.hub.attach_to_stream(&answer.request, user, address) {
            Ok(said) => said,
            Err(error) => {
                self.give_slot(slot);
                return Err(error.into());
            }
        };
        self.begin_answer(slot, answer);
        said.into_iter().for_each(|frame| self.replay(slot, frame));
        Ok(address)
    }

    fn begin_answer(&mut self, slot: u32, answer: Answer) {
        self.slab.get_mut(slot).answer = Some(Box::new(answer));
        self.metrics.sessions.store(self.slab.len() as u64);
    }

    fn take_slot(
        &mut self,
        wire: Wire,
        identity: Arc<Identity>,
        expires_in: Option<Duration>,
    ) -> Result<(u32, Address), OpenError> {
        if self.draining.is_some() {
            return Err(OpenError::Draining);
        }
        let slot = self.slab.take().ok_or(OpenError::NoSlot)?;
        let tick = self.timers.tick();
        let interval = Timers::ticks(self.limits.heartbeat_interval);
        // The first ping comes early for some, so that tabs that came together are not pinged together.
        let first_ping = interval - u64::from(slot) % (interval / 2 + 1);
        let session = self.slab.get_mut(slot);
        session.state = State::Open;
        session.wire = wire;
        session.blocked = true;
        // One tick more: the current one may be almost over, and no token is cut before its time.
        session.expires = expires_in.map_or(u64::MAX, |good_for| tick + Timers::ticks(good_for) + 1);
        session.ping_due = tick + first_ping;
        session.identity = Some(identity);
        let (wait, generation) = (first_ping.min(session.expires - tick), session.generation);
        self.timers.set(slot, wait);
        Ok((slot, Address::new(self.index, slot, generation)))
    }

    fn give_slot(&mut self, slot: u32) {
        self.timers.clear(slot);
        self.slab.give(slot);
    }

    /// Queues what is said again. What is kept has bounds of its own, well below those of a queue.
    fn replay(&mut self, slot: u32, frame: Frame) {
        let is_last = self.is_last_of_answer(slot, &frame);
        let handle = self.frames.insert(Local::Frame(frame));
        let offered = self.offered(handle, Urgency::Direct);
        let bytes = self.frames.get(handle).wire_bytes(self.slab.get(slot).wire);
        self.push(slot, &offered, bytes);
        self.count_offered(handle, 1);
        self.frames.release(handle);
        if is_last {
            self.end(slot, Disconnect::Normal);
        }
    }
}
