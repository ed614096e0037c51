//! Streams: the answers to requests, each read by one reader that may go away before its end.
//!
//! A stream's frames go to one reader: a [`Mailbox`], or a session of a shard. One that is detachable goes on when its
//! reader leaves, and whoever owns it attaches again: what was said so far is replayed, then it is live. One that is
//! not is over when its reader is gone. Whoever produces a stream with an owner is told when nobody wants it any more.

mod owners;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use event_listener::Event as Bell;
use foldhash::fast::RandomState;

use crate::fanout::backlog::{Backlog, Bounds, Displaced, Edits};
use crate::fanout::hub::{Full, Hub};
use crate::fanout::mailbox::{Mailbox, Offer, Shared};
use crate::fanout::session::Address;
use crate::fanout::streams::owners::Owners;
use crate::fanout::stripes::Stripes;
use crate::id::{RequestId, UserId};
use crate::metrics::{Metrics, StreamEnd};
use crate::proto::completion::without_data;
use crate::proto::delivery::{Delivery, Nobody};
use crate::proto::disconnect::Disconnect;
use crate::proto::event::{EndReason, Event};
use crate::proto::frame::{self, Frame, Kind};
use crate::proto::limits::{HubLimits, SessionLimits};

/// Why a stream could not be registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is one with that request id: nothing is replaced.
    #[error("a stream for that request exists already")]
    Exists,
    /// As many streams as the limit allows.
    #[error("{streams_max} streams are open, which is as many as allowed")]
    TooMany {
        /// The limit.
        streams_max: usize,
    },
    /// As many streams as one owner may have.
    #[error("the user has {streams_max} streams open, which is as many as one user may have")]
    TooManyOfOwner {
        /// The limit.
        streams_max: usize,
    },
}

/// Why nobody was attached to a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// There is none with that id that this user owns and that can be found again.
    #[error("there is no such answer")]
    NoSuchStream,
    /// It is there, but not all of what it said is kept any more.
    #[error("the answer has outgrown what is kept of it")]
    Lost,
}

/// What a stream is opened with. The default is an embedder's mailbox: nobody's, and over when its reader is gone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// Who may attach to it and cancel it. With an owner, [`Hub::next_cancelled`] tells when nobody wants it any more.
    pub owner: Option<UserId>,
    /// It goes on without a reader, and can be found again.
    pub is_detachable: bool,
    /// Its frames also go to the tabs of its owner.
    pub is_mirrored: bool,
    /// Without a frame for so long it ends with [`EndReason::Timeout`]. None: never.
    pub idle_timeout: Option<Duration>,
}

/// A stream that nobody wants any more, before its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cancelled {
    /// Which.
    pub request: RequestId,
    /// Whose it was.
    pub owner: UserId,
}

/// Where a stream's frames go.
enum Reader {
    Mailbox(Arc<Shared>),
    Session(Address),
    /// It was left; only what is detachable goes on so.
    Nobody,
}

struct State {
    reader: Reader,
    /// What was said, if it can be left and found again.
    backlog: Option<Box<Backlog>>,
    /// When it ended, in seconds of the coarse clock.
    ended: Option<u64>,
    /// Something was said since `heard`.
    is_heard: bool,
    heard: u64,
}

struct Stream {
    options: StreamOptions,
    state: Mutex<State>,
}

impl Stream {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The streams of an engine, by request.
pub(crate) struct Streams {
    all: DashMap<RequestId, Arc<Stream>, RandomState>,
    /// Those that have not ended, and those that have and can still be found.
    ///
    /// # Ordering
    /// Relaxed: bounds, they publish nothing.
    running: AtomicUsize,
    ended: AtomicUsize,
    owners: Owners,
    /// Memory of all backlogs.
    ///
    /// # Ordering
    /// Relaxed: a bound, publishes nothing.
    bytes: AtomicUsize,
    cancelled: Mutex<VecDeque<Cancelled>>,
    bell: Bell,
    stripes: Arc<Stripes>,
    metrics: Arc<Metrics>,
    limits: Limits,
}

struct Limits {
    streams_max: usize,
    streams_per_owner_max: usize,
    queue_frames_max: usize,
    queue_bytes_max: usize,
    bytes_budget: usize,
    backlog: Bounds,
    backlogs_bytes_max: usize,
}

/// What became of a frame.
struct Given {
    delivery: Delivery,
    /// The shard that is to be woken for it.
    parked: Option<u16>,
    /// The stream is over with it.
    end: Option<StreamEnd>,
}

/// Bytes that a mailbox may hold while the process is over its budget.
const MAILBOX_BYTES_OVER_BUDGET: usize = 64 << 10;

const MISSING: Delivery = Delivery::to_nobody(Nobody::NoSuchStream);
const TAKEN: Delivery = Delivery::here(1);

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} streams", self.all.len())
    }
}

impl Streams {
    pub(crate) fn new(sessions: &SessionLimits, hub: &HubLimits, stripes: Arc<Stripes>, metrics: Arc<Metrics>) -> Self {
        let limits = Limits {
            streams_max: hub.streams_max,
            streams_per_owner_max: hub.streams_per_owner_max,
            queue_frames_max: sessions.queue_frames_max,
            queue_bytes_max: sessions.queue_bytes_max,
            bytes_budget: hub.bytes_budget,
            // Its frames are few, as edits replace each other: what counts is their bytes.
            backlog: Bounds {
                frames_max: sessions.queue_frames_max,
                bytes_max: hub.stream_bytes_max,
                edits: Edits::InPlace,
            },
            backlogs_bytes_max: hub.streams_bytes_max,
        };
        Self {
            all: DashMap::with_hasher(RandomState::default()),
            running: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
            owners: Owners::new(hub.streams_per_owner_max),
            bytes: AtomicUsize::new(0),
            cancelled: Mutex::default(),
            bell: Bell::new(),
            stripes,
            metrics,
            limits,
        }
    }

    pub(crate) fn open_mailbox(
        this: &Arc<Self>,
        request: &RequestId,
        options: StreamOptions,
    ) -> Result<Mailbox, OpenError> {
        let shared = Arc::new(Shared::default());
        this.open(request, options, Reader::Mailbox(Arc::clone(&shared)))?;
        Ok(Mailbox::new(shared, Arc::clone(this), request.clone()))
    }

    pub(crate) fn open_session(
        &self,
        request: &RequestId,
        options: StreamOptions,
        address: Address,
    ) -> Result<(), OpenError> {
        self.open(request, options, Reader::Session(address))
    }

    fn open(&self, request: &RequestId, options: StreamOptions, reader: Reader) -> Result<(), OpenError> {
        let Limits { streams_max, streams_per_owner_max, .. } = self.limits;
        let heard = self.stripes.now();
        let backlog = options.is_detachable.then(Box::default);
        let state = State { reader, backlog, ended: None, is_heard: false, heard };
        match self.all.entry(request.clone()) {
            Entry::Occupied(_) => Err(OpenError::Exists),
            Entry::Vacant(_) if self.running() >= streams_max => Err(OpenError::TooMany { streams_max }),
            Entry::Vacant(entry) => {
                if options.owner.as_ref().is_some_and(|owner| !self.owners.begin(owner, request)) {
                    return Err(OpenError::TooManyOfOwner { streams_max: streams_per_owner_max });
                }
                drop(entry.insert(Arc::new(Stream { options, state: Mutex::new(state) })));
                self.running.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    /// Streams that have not ended.
    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    pub(crate) fn has(&self, request: &RequestId) -> bool {
        self.all.contains_key(request)
    }

    /// Whose stream it is, if it is somebody's.
    pub(crate) fn owner(&self, request: &RequestId) -> Option<UserId> {
        self.find(request)?.options.owner.clone()
    }

    fn find(&self, request: &RequestId) -> Option<Arc<Stream>> {
        self.all.get(request).map(|entry| Arc::clone(entry.value()))
    }

    /// The shard whose room a publisher to this stream waits for.
    pub(crate) fn shard_of(&self, request: &RequestId) -> Option<u16> {
        match self.find(request)?.state().reader {
            Reader::Session(address) => Some(address.shard()),
            Reader::Mailbox(_) | Reader::Nobody => None,
        }
    }

    /// Whose tabs see the stream's frames too.
    fn mirror(stream: &Stream, frame: &Frame) -> Option<UserId> {
        let options = &stream.options;
        if options.is_mirrored && frame.kind() != Kind::End { options.owner.clone() } else { None }
    }

    /// Gives a frame to the stream's reader; an `end` is its last. The second part is who is to see it as well.
    pub(crate) fn offer(
        &self,
        hub: &Hub,
        request: &RequestId,
        frame: &Frame,
    ) -> Result<(Delivery, Option<UserId>), Full> {
        let Some(stream) = self.find(request) else { return Ok((MISSING, None)) };
        // An answer has links to files, and need not hold their bytes.
        let link = if stream.options.owner.is_some() { without_data(frame) } else { None };
        let mut displaced = Displaced::new();
        let mut state = stream.state();
        let given = self.give(hub, &stream, &mut state, link.as_ref().unwrap_or(frame), &mut displaced)?;
        drop(state);
        hub.ring_one(given.parked);
        if let Some(end) = given.end {
            self.note_end(request, &stream, end);
            if end == StreamEnd::SlowReader {
                self.tell(request, &stream);
            }
        }
        let mirror = if given.delivery == MISSING { None } else { Self::mirror(&stream, frame) };
        Ok((given.delivery, mirror))
    }

    fn give(
        &self,
        hub: &Hub,
        stream: &Stream,
        state: &mut State,
        frame: &Frame,
        displaced: &mut Displaced,
    ) -> Result<Given, Full> {
        if state.ended.is_some() {
            return Ok(Given { delivery: MISSING, parked: None, end: None });
        }
        let (is_taken, parked) = match &state.reader {
            Reader::Session(address) => (true, hub.push_to_session(*address, frame)?),
            Reader::Nobody => (true, None),
            Reader::Mailbox(shared) => (self.put(shared, frame), None),
        };
        state.is_heard = true;
        if let Some(backlog) = &mut state.backlog {
            self.keep(backlog, frame, displaced);
        }
        if !is_taken {
            state.reader = Reader::Nobody;
        }
        let goes_on = is_taken || stream.options.is_detachable;
        let end = match frame.kind() {
            _ if !goes_on => Some(StreamEnd::SlowReader),
            Kind::End => Some(StreamEnd::Complete),
            _ => None,
        };
        if end.is_some() {
            self.set_ended(state);
        }
        Ok(Given { delivery: if goes_on { TAKEN } else { MISSING }, parked, end })
    }

    /// False if the mailbox was cut: it was full, or fat while the process is over its budget.
    fn put(&self, mailbox: &Shared, frame: &Frame) -> bool {
        let Limits { queue_frames_max, queue_bytes_max, bytes_budget, .. } = self.limits;
        let is_over_budget = frame::live_bytes() > bytes_budget;
        let bytes_max = if is_over_budget { MAILBOX_BYTES_OVER_BUDGET.min(queue_bytes_max) } else { queue_bytes_max };
        match mailbox.offer(frame.clone(), queue_frames_max, bytes_max) {
            Offer::Queued | Offer::Last => true,
            Offer::Dropped => {
                self.metrics.engine.dropped_mailbox_typing_frames.increment();
                true
            }
            Offer::Overflow | Offer::Closed => false,
        }
    }

    /// Keeps a frame for whoever finds the stream again. What is not whole is of no use: then nothing is kept any more.
    fn keep(&self, backlog: &mut Backlog, frame: &Frame, displaced: &mut Displaced) {
        if !Backlog::wants(frame.kind()) || !backlog.is_whole() {
            return;
        }
        let before = backlog.bytes();
        backlog.keep(frame, self.stripes.now(), self.limits.backlog, displaced);
        let others = self.bytes.load(Ordering::Relaxed).saturating_sub(before);
        if !backlog.is_whole() || others + backlog.bytes() > self.limits.backlogs_bytes_max {
            backlog.lose(displaced);
        }
        self.count(before, backlog.bytes());
    }

    fn count(&self, before: usize, after: usize) {
        self.bytes.fetch_add(after, Ordering::Relaxed);
        self.bytes.fetch_sub(before, Ordering::Relaxed);
    }

    /// Memory of what is kept of streams.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// From here on the stream takes nothing more. Under its lock, so that nobody can forget it before it is counted.
    fn set_ended(&self, state: &mut State) {
        state.ended = Some(self.stripes.now());
        self.running.fetch_sub(1, Ordering::Relaxed);
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    /// An ended stream is no more than its backlog; without one it is gone.
    fn note_end(&self, request: &RequestId, stream: &Arc<Stream>, end: StreamEnd) {
        self.metrics.engine.ended_streams.of(end).increment();
        let is_found = stream.options.is_detachable && self.ended.load(Ordering::Relaxed) <= self.limits.streams_max;
        if let Some(owner) = &stream.options.owner
            && let Some(oldest) = self.owners.end(owner, request, is_found)
            && let Some(oldest_stream) = self.find(&oldest)
        {
            self.remove(&oldest, &oldest_stream);
        }
        if !is_found {
            self.remove(request, stream);
        }
    }

    fn remove(&self, request: &RequestId, stream: &Arc<Stream>) {
        if self.all.remove_if(request, |_, held| Arc::ptr_eq(held, stream)).is_none() {
            return;
        }
        self.ended.fetch_sub(1, Ordering::Relaxed);
        let backlog = stream.state().backlog.take();
        self.count(backlog.map_or(0, |backlog| backlog.bytes()), 0);
        if let Some(owner) = &stream.options.owner {
            self.owners.forget(owner, request);
        }
    }

    /// Ends a stream from outside: its reader gets `last`, if there is one, and then the end.
    fn end(&self, hub: &Hub, request: &RequestId, stream: &Arc<Stream>, end: StreamEnd) -> bool {
        let reason = if end == StreamEnd::Timeout { EndReason::Timeout } else { EndReason::Cancelled };
        let last = &end_frame(reason);
        let mut displaced = Displaced::new();
        let mut state = stream.state();
        if state.ended.is_some() {
            return false;
        }
        let parked = match &state.reader {
            // It takes no room worth asking for, and must not be lost.
            Reader::Session(address) => hub.force_to_session(*address, last),
            Reader::Mailbox(shared) => {
                // Whatever became of it: the stream is over.
                let _ = shared.offer(last.clone(), usize::MAX, usize::MAX);
                None
            }
            Reader::Nobody => None,
        };
        if let Some(backlog) = &mut state.backlog {
            self.keep(backlog, last, &mut displaced);
        }
        self.set_ended(&mut state);
        drop(state);
        hub.ring_one(parked);
        self.note_end(request, stream, end);
        true
    }

    /// Takes a stream away: its reader is woken and sees the end. An absent one is a no-op.
    pub(crate) fn close(&self, hub: &Hub, request: &RequestId) {
        let Some(stream) = self.find(request) else { return };
        if let Reader::Mailbox(shared) = &stream.state().reader {
            shared.end(Disconnect::Normal);
        }
        self.end(hub, request, &stream, StreamEnd::Complete);
        self.remove(request, &stream);
    }

    /// Ends a stream that `user` owns, and tells whoever produces it. False if it has ended already.
    pub(crate) fn cancel(&self, hub: &Hub, request: &RequestId, user: &UserId) -> Result<bool, AttachError> {
        let stream = self.find(request).filter(|stream| stream.options.owner.as_ref() == Some(user));
        let stream = stream.ok_or(AttachError::NoSuchStream)?;
        let is_ended = self.end(hub, request, &stream, StreamEnd::Cancelled);
        if is_ended {
            self.tell(request, &stream);
        }
        self.remove(request, &stream);
        Ok(is_ended)
    }

    /// Makes a session the stream's reader; whoever was it sees the end. Returns what was said so far.
    pub(crate) fn attach(
        &self,
        hub: &Hub,
        request: &RequestId,
        user: &UserId,
        address: Address,
    ) -> Result<Vec<Frame>, AttachError> {
        let is_theirs = |stream: &Arc<Stream>| {
            stream.options.is_detachable && stream.options.owner.as_ref().is_some_and(|owner| owner == user)
        };
        let stream = self.find(request).filter(is_theirs).ok_or(AttachError::NoSuchStream)?;
        let mut state = stream.state();
        let said = state.backlog.as_ref().and_then(|backlog| backlog.whole()).ok_or(AttachError::Lost)?;
        let before = std::mem::replace(&mut state.reader, Reader::Session(address));
        drop(state);
        match before {
            Reader::Session(before) => {
                let parked = hub.force_to_session(before, &end_frame(EndReason::Cancelled));
                hub.ring_one(parked);
            }
            Reader::Mailbox(shared) => shared.end(Disconnect::Normal),
            Reader::Nobody => {}
        }
        Ok(said)
    }

    /// The session that read it is gone.
    pub(crate) fn left_by_session(&self, request: &RequestId, address: Address, ending: Disconnect) {
        self.left(request, ending, |reader| matches!(reader, Reader::Session(held) if *held == address));
    }

    /// The mailbox was dropped.
    pub(crate) fn left_by_mailbox(&self, request: &RequestId, shared: &Arc<Shared>) {
        let is_it = |reader: &Reader| matches!(reader, Reader::Mailbox(held) if Arc::ptr_eq(held, shared));
        self.left(request, Disconnect::ConnectionLost, is_it);
    }

    fn left(&self, request: &RequestId, ending: Disconnect, is_reader: impl Fn(&Reader) -> bool) {
        let Some(stream) = self.find(request) else { return };
        let mut state = stream.state();
        if !is_reader(&state.reader) {
            return;
        }
        let before = std::mem::replace(&mut state.reader, Reader::Nobody);
        if state.ended.is_none() && !stream.options.is_detachable {
            self.set_ended(&mut state);
            drop(state);
            let is_slow = ending == Disconnect::SlowConsumer;
            self.note_end(request, &stream, if is_slow { StreamEnd::SlowReader } else { StreamEnd::Cancelled });
            self.tell(request, &stream);
        } else {
            drop(state);
        }
        drop(before);
    }

    /// Says that nobody wants a stream any more. Each is said once, so that this is bounded by the streams there are;
    /// if nobody listens the oldest go.
    fn tell(&self, request: &RequestId, stream: &Stream) {
        let Some(owner) = stream.options.owner.clone() else { return };
        let mut cancelled = self.cancelled.lock().unwrap_or_else(PoisonError::into_inner);
        if cancelled.len() >= self.limits.streams_max {
            cancelled.pop_front();
        }
        cancelled.push_back(Cancelled { request: request.clone(), owner });
        drop(cancelled);
        self.bell.notify(1);
    }

    pub(crate) fn waiting_cancels(&self) -> usize {
        self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(crate) async fn next_cancelled(&self) -> Cancelled {
        loop {
            let listener = self.bell.listen();
            let next = self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            if let Some(cancelled) = next {
                return cancelled;
            }
            listener.await;
        }
    }

    /// Ends those that were silent for too long, and forgets those that ended long ago.
    pub(crate) fn sweep(&self, hub: &Hub) {
        let now = self.stripes.now();
        let lifetime = self.stripes.limits().lifetime.as_secs();
        let mut due = Vec::new();
        for entry in &self.all {
            let stream = entry.value();
            let mut state = stream.state();
            if std::mem::take(&mut state.is_heard) {
                state.heard = now;
            }
            let is_due = match (state.ended, stream.options.idle_timeout) {
                (Some(ended), _) => ended.saturating_add(lifetime) <= now,
                (None, Some(timeout)) => state.heard.saturating_add(timeout.as_secs()) <= now,
                (None, None) => false,
            };
            if is_due {
                due.push((entry.key().clone(), Arc::clone(stream), state.ended.is_some()));
            }
        }
        for (request, stream, is_over) in due {
            if is_over {
                self.remove(&request, &stream);
            } else if self.end(hub, &request, &stream, StreamEnd::Timeout) {
                self.tell(&request, &stream);
            }
        }
    }

    /// Ends all of a user's streams, and tells whoever produces them. Returns how many.
    pub(crate) fn cancel_all(&self, hub: &Hub, user: &UserId) -> usize {
        self.owners.running(user).iter().filter(|request| self.cancel(hub, request, user) == Ok(true)).count()
    }

    /// Ends every stream with an `end` frame of reason `cancelled`: the node shuts down.
    pub(crate) fn end_all(&self, hub: &Hub) {
        let all: Vec<_> = self.all.iter().map(|entry| (entry.key().clone(), Arc::clone(entry.value()))).collect();
        for (request, stream) in all {
            if self.end(hub, &request, &stream, StreamEnd::Cancelled) {
                self.tell(&request, &stream);
            }
        }
    }
}

fn end_frame(reason: EndReason) -> Frame {
    Frame::encode(&Event::End { reason })
}
