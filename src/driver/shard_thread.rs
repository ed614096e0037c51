//! One shard on one thread: its sockets, its readiness, its turns.
//!
//! A turn takes posts from the inbox, reads what came, and writes until it has written 256 times or run for a
//! millisecond; what is left then stays on the shard's lists while hyper's tasks have their turn. A send costs
//! microseconds and everything else well under one, so the way to be fast is to send once for all that waits.

use std::cell::{RefCell, RefMut};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Token};
use tokio::io::unix::AsyncFd;
use tokio::time::Sleep;

use crate::driver::addresses::Place;
use crate::driver::clock;
use crate::driver::socket::{Rest, Socket};
use crate::fanout::hub::Watched;
use crate::fanout::session::Address;
use crate::fanout::shard::{Answer, Inbound, OpenError, Opening, Outcome, Shard, Transmit};
use crate::fanout::streams::StreamOptions;
use crate::id::UserId;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;

/// Writes of one turn, a large one counted as several.
const TURN_WRITES_MAX: usize = 256;
/// Bytes that cost about as much as the system call that writes them: every so many count as one write more.
const WRITE_COST_BYTES: usize = 16 << 10;
/// How long a turn may take.
const TURN_TIME_MAX: Duration = Duration::from_millis(1);
/// Bytes read from one session in one turn, and the size of the buffer that all sessions of a shard share.
const READ_BYTES_MAX: usize = 64 << 10;
/// Readiness events taken at once.
const EVENTS_MAX: usize = 1024;

/// mio's poll, watched by tokio's.
struct Readiness(mio::Poll);

impl AsRawFd for Readiness {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The sockets of a shard, by slot.
#[derive(Default)]
struct Sockets {
    by_slot: Vec<Option<Connection>>,
    /// What sessions' addresses have one more of each; empty as long as nobody counts that.
    places: Vec<Option<Place>>,
}

struct Connection {
    socket: Socket,
    /// It is on the list of those with more to read.
    is_unread: bool,
}

const _: () = assert!(size_of::<Option<Connection>>() <= 24, "what a slot costs beside its session");

impl Sockets {
    fn get(&mut self, slot: u32) -> Option<&mut Socket> {
        self.connection(slot).map(|connection| &mut connection.socket)
    }

    fn connection(&mut self, slot: u32) -> Option<&mut Connection> {
        self.by_slot.get_mut(slot as usize).and_then(Option::as_mut)
    }

    fn put(&mut self, slot: u32, socket: Socket, place: Option<Place>) {
        let slot = slot as usize;
        if place.is_some() && slot >= self.places.len() {
            self.places.resize_with(slot + 1, || None);
        }
        if let Some(of_slot) = self.places.get_mut(slot) {
            *of_slot = place;
        }
        if slot >= self.by_slot.len() {
            self.by_slot.resize_with(slot + 1, || None);
        }
        self.by_slot[slot] = Some(Connection { socket, is_unread: false });
    }

    fn take(&mut self, slot: u32) -> Option<Socket> {
        drop(self.places.get_mut(slot as usize).and_then(Option::take));
        self.by_slot.get_mut(slot as usize).and_then(Option::take).map(|connection| connection.socket)
    }
}

/// What the thread's tasks share: the shard, its sockets, and where they are registered. Never held across an await.
pub struct LocalShard {
    state: RefCell<State>,
    registry: mio::Registry,
}

struct State {
    shard: Shard,
    sockets: Sockets,
    inbound: Box<dyn Inbound>,
    buffer: Box<[u8]>,
    /// Slots with more to read than their turn allowed.
    unread: VecDeque<u32>,
}

impl LocalShard {
    /// Puts a shard and whoever understands its clients' text onto this thread. The driver is to be awaited for as
    /// long as the shard lives.
    ///
    /// # Errors
    /// If the kernel gives no readiness queue.
    pub fn new(shard: Shard, inbound: Box<dyn Inbound>) -> io::Result<(Rc<Self>, ShardDriver)> {
        let poll = mio::Poll::new()?;
        let registry = poll.registry().try_clone()?;
        let buffer = vec![0; READ_BYTES_MAX].into_boxed_slice();
        let state = State { shard, sockets: Sockets::default(), inbound, buffer, unread: VecDeque::new() };
        let local = Rc::new(Self { state: RefCell::new(state), registry });
        let driver = ShardDriver { local: Rc::clone(&local), poll: Some(poll) };
        Ok((local, driver))
    }

    fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// Opens a session whose connection follows by [`Self::attach`], or never does: then call [`Self::abandon`].
    /// `greet` makes what it hears first.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub fn open(&self, opening: Opening, greet: impl FnOnce(Address) -> Option<Frame>) -> Result<Address, OpenError> {
        self.state().shard.open(opening, greet)
    }

    /// The same for an event stream that shows what goes by.
    ///
    /// # Errors
    /// As [`Shard::open_watcher`].
    pub fn open_watcher(&self, watched: &Watched) -> Result<Address, OpenError> {
        self.state().shard.open_watcher(watched)
    }

    /// The same for the reader of a new answer.
    ///
    /// # Errors
    /// As [`Shard::open_answer`].
    pub fn open_answer(&self, answer: Answer, options: StreamOptions) -> Result<Address, OpenError> {
        self.state().shard.open_answer(answer, options)
    }

    /// The same for the reader of an answer that was left.
    ///
    /// # Errors
    /// As [`Shard::reopen_answer`].
    pub fn reopen_answer(&self, user: &UserId, answer: Answer) -> Result<Address, OpenError> {
        self.state().shard.reopen_answer(user, answer)
    }

    /// Takes `text` as one that the client of a session has sent: for what a request says beside opening it.
    pub fn hear(&self, address: Address, text: &mut [u8]) {
        let mut state = self.state();
        if state.shard.session(address.slot()).is_some_and(|session| session.address() == address) {
            let State { shard, inbound, .. } = &mut *state;
            shard.handle_text(address.slot(), text, &mut **inbound);
        }
    }

    /// Reads from the shard, for whoever answers questions about it.
    pub fn with_shard<R>(&self, read: impl FnOnce(&Shard) -> R) -> R {
        read(&self.state().shard)
    }

    /// The connection of a session that was opened will not come.
    pub fn abandon(&self, address: Address) {
        let mut state = self.state();
        if state.shard.session(address.slot()).is_some_and(|s| s.address() == address) {
            state.shard.handle_lost(address.slot(), Disconnect::ConnectionLost);
            state.drop_ended();
        }
    }

    /// Gives a session its socket: writes `head` (the response that makes it one), takes over what the client sent
    /// already, and watches it from here on. It keeps `place` for as long as the session lives.
    pub fn attach(
        &self,
        address: Address,
        mut socket: Socket,
        (head, received): (&[u8], &mut [u8]),
        place: Option<Place>,
    ) {
        let mut state = self.state();
        let slot = address.slot();
        if state.shard.session(slot).is_none_or(|session| session.address() != address) {
            return;
        }
        let written = socket.write(&[io::IoSlice::new(head)]);
        // The head is a few hundred bytes on an empty socket: if they do not fit, the peer is not a reader.
        let is_written = matches!(written, Ok(bytes) if bytes == head.len());
        let token = Token(slot as usize);
        let interest = Interest::READABLE | Interest::WRITABLE;
        if !is_written || self.registry.register(&mut SourceFd(&socket.as_raw_fd()), token, interest).is_err() {
            state.shard.handle_lost(slot, Disconnect::ConnectionLost);
            state.drop_ended();
            return;
        }
        let has_unread = socket.has_unread();
        state.sockets.put(slot, socket, place);
        if has_unread {
            state.read_later(slot);
        }
        state.count_incomplete(slot, 0);
        let State { shard, inbound, .. } = &mut *state;
        shard.handle_writable(slot);
        if !received.is_empty() {
            shard.handle_readable(slot, received, &mut **inbound);
        }
        // The registration's first event makes the driver look at the socket, and so at what is queued.
    }
}

/// The shard's own task.
pub struct ShardDriver {
    local: Rc<LocalShard>,
    poll: Option<mio::Poll>,
}

impl ShardDriver {
    /// Runs the shard until it has drained.
    ///
    /// # Errors
    /// If the runtime cannot watch the readiness queue.
    pub async fn run(mut self) -> io::Result<()> {
        let Some(poll) = self.poll.take() else { return Ok(()) };
        let readiness = watch(poll)?;
        let tick = tokio::time::sleep(Duration::ZERO);
        let mut turns = Turns {
            local: self.local,
            readiness,
            events: Events::with_capacity(EVENTS_MAX),
            tick: Box::pin(tick),
            tick_interval: Duration::ZERO,
        };
        poll_fn(|context| turns.poll(context)).await
    }
}

#[expect(unsafe_code, reason = "the runtime has no safe way to watch a descriptor that is not its own")]
fn watch(poll: mio::Poll) -> io::Result<AsyncFd<Readiness>> {
    // SAFETY: a poll's descriptor is its own from construction to drop, and the `AsyncFd` owns the poll.
    let watched = unsafe { AsyncFd::register_with_interest(Readiness(poll), tokio::io::Interest::READABLE) };
    watched.map_err(io::Error::other)
}

struct Turns {
    local: Rc<LocalShard>,
    readiness: AsyncFd<Readiness>,
    events: Events,
    tick: Pin<Box<Sleep>>,
    tick_interval: Duration,
}

impl Turns {
    /// One turn. Pending means parked, or that the rest of the work waits for the next turn.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let local = Rc::clone(&self.local);
        let mut state = local.state();
        let start = clock::now();
        let (mut now, mut writes) = (start, 0);
        loop {
            state.shard.handle_inbox(now);
            self.poll_tick(&mut state, now, context);
            let is_quiet = self.poll_sockets(&mut state, start, context)?;
            writes += state.write(TURN_WRITES_MAX / 4);
            // One look for all of these writes: each counts as done when the last of them is.
            now = clock::now();
            state.shard.handle_flushed(now);
            state.drop_ended();
            if state.shard.is_drained() {
                return Poll::Ready(Ok(()));
            }
            let has_work = state.shard.has_work() || !state.unread.is_empty() || !is_quiet;
            if !has_work && state.shard.park(context.waker()) {
                break;
            }
            if writes >= TURN_WRITES_MAX || now - start >= TURN_TIME_MAX {
                state.shard.metrics().unfinished_turns.increment();
                context.waker().wake_by_ref();
                break;
            }
        }
        let micros = (now - start).as_micros();
        state.shard.metrics().turn_micros.record(u64::try_from(micros).unwrap_or(u64::MAX));
        Poll::Pending
    }

    fn poll_tick(&mut self, state: &mut State, now: Instant, context: &mut Context<'_>) {
        loop {
            let is_due = self.tick.as_mut().poll(context).is_ready();
            if is_due {
                state.shard.handle_tick(now);
            } else if state.shard.tick_interval() == self.tick_interval {
                return;
            }
            // The next one, or an earlier one: a drain has begun.
            self.tick_interval = state.shard.tick_interval();
            self.tick.as_mut().reset(tokio::time::Instant::from_std(now) + self.tick_interval);
        }
    }

    /// Reads and unblocks whoever is ready. True if nobody is any more. Who is not read before the turn is over waits
    /// for the next.
    fn poll_sockets(&mut self, state: &mut State, start: Instant, context: &mut Context<'_>) -> io::Result<bool> {
        let mut watch = Watch::new(start);
        for _ in 0..state.unread.len() {
            if watch.is_over() {
                return Ok(false);
            }
            if let Some(slot) = state.unread.pop_front() {
                state.sockets.connection(slot).into_iter().for_each(|connection| connection.is_unread = false);
                state.read(slot, true);
            }
        }
        // The guard is taken before the look, so that what comes in between is not forgotten with it.
        let Poll::Ready(guard) = self.readiness.poll_read_ready_mut(context) else { return Ok(true) };
        let mut guard = guard?;
        let poll = &mut guard.get_inner_mut().0;
        match poll.poll(&mut self.events, Some(Duration::ZERO)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(false),
            result => result?,
        }
        let mut count = 0;
        for event in &self.events {
            count += 1;
            let Ok(slot) = u32::try_from(event.token().0) else { continue };
            let Some(connection) = state.sockets.connection(slot) else { continue };
            // It is read in the next round, when it had its share of this one.
            let is_unread = connection.is_unread;
            if event.is_writable() {
                state.write_on(slot);
            }
            if is_unread || !(event.is_readable() || event.is_read_closed() || event.is_error()) {
                continue;
            }
            if watch.is_over() {
                state.read_later(slot);
            } else {
                state.read(slot, event.is_read_closed());
            }
        }
        if count < EVENTS_MAX {
            guard.clear_ready();
            // Registers for the next event, or finds that it has come.
            drop(guard);
            return Ok(self.readiness.poll_read_ready(context).is_pending());
        }
        Ok(false)
    }
}

/// Looks at the clock now and then, as a look costs as much as a small read.
struct Watch {
    start: Instant,
    looks: u32,
    is_over: bool,
}

impl Watch {
    /// Reads between two looks.
    const READS: u32 = 16;

    fn new(start: Instant) -> Self {
        Self { start, looks: 0, is_over: false }
    }

    fn is_over(&mut self) -> bool {
        self.looks += 1;
        if self.looks.is_multiple_of(Self::READS) {
            self.is_over |= clock::now() - self.start >= TURN_TIME_MAX;
        }
        self.is_over
    }
}

impl State {
    fn read_later(&mut self, slot: u32) {
        if let Some(connection) = self.sockets.connection(slot) {
            connection.is_unread = true;
            self.unread.push_back(slot);
        }
    }

    /// Reads one session's share, and later what is left, or the end of input that is known to follow.
    fn read(&mut self, slot: u32, is_closed: bool) {
        let Some(socket) = self.sockets.get(slot) else { return };
        let kept = socket.incomplete_bytes();
        let share = match socket.read(&mut self.buffer) {
            Ok(share) => share,
            Err(_) => return self.shard.handle_lost(slot, Disconnect::ConnectionLost),
        };
        self.count_incomplete(slot, kept);
        if share.bytes > 0 {
            self.shard.handle_readable(slot, &mut self.buffer[..share.bytes], &mut *self.inbound);
        }
        match share.rest {
            Rest::Ended => self.shard.handle_end_of_input(slot),
            Rest::Drained if !is_closed || share.bytes == 0 => {}
            Rest::Drained | Rest::More => self.read_later(slot),
        }
    }

    /// What a socket keeps of a record that is not whole yet counts as an incomplete message.
    fn count_incomplete(&mut self, slot: u32, before: usize) {
        let Some(socket) = self.sockets.get(slot) else { return };
        let now = socket.incomplete_bytes();
        if now != before && !self.shard.handle_incomplete(slot, before, now) {
            socket.turn_deaf();
        }
    }

    /// The kernel takes bytes again: first those that the socket kept.
    fn write_on(&mut self, slot: u32) {
        match self.sockets.get(slot).map(Socket::flush) {
            Some(Ok(true)) => self.shard.handle_writable(slot),
            Some(Ok(false)) | None => {}
            Some(Err(_)) => self.shard.handle_lost(slot, Disconnect::ConnectionLost),
        }
    }

    /// Writes sessions until that has cost about as much as `writes_max` small writes; returns what it has cost. A
    /// session with much to write gets its next share after the others had theirs.
    fn write(&mut self, writes_max: usize) -> usize {
        let mut cost = 0;
        while cost < writes_max {
            let Some(transmit) = self.shard.poll_transmit() else { break };
            let slot = transmit.slot;
            let result = self.sockets.get(slot).map(|socket| write(socket, &transmit));
            drop(transmit);
            cost += 1;
            match result {
                Some(Ok(outcome)) => {
                    cost += outcome.bytes() / WRITE_COST_BYTES;
                    self.shard.handle_written(slot, outcome);
                    if self.shard.is_flushed(slot) {
                        self.sockets.get(slot).into_iter().for_each(Socket::finish_writing);
                    }
                }
                Some(Err(_)) | None => self.shard.handle_lost(slot, Disconnect::ConnectionLost),
            }
        }
        cost
    }

    fn drop_ended(&mut self) {
        while let Some(slot) = self.shard.poll_disconnect() {
            let Some(socket) = self.sockets.take(slot) else { continue };
            // Less can always be kept.
            let _ = self.shard.handle_incomplete(slot, socket.incomplete_bytes(), 0);
            socket.close();
        }
    }
}

fn write(socket: &mut Socket, transmit: &Transmit<'_>) -> io::Result<Outcome> {
    let bytes: usize = transmit.slices.iter().map(|slice| slice.len()).sum();
    match socket.write(&transmit.slices) {
        Ok(taken) if taken == bytes => Ok(Outcome::Taken(taken)),
        Ok(taken) => Ok(Outcome::Blocked(taken)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Outcome::Blocked(0)),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Outcome::Taken(0)),
        Err(error) => Err(error),
    }
}
