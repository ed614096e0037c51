//! One thread with its share of the clients: it opens them, reads what comes, checks it, and lets some of them come
//! and go. The first thread publishes as well, so that with one thread nothing has to be woken.

mod check;
mod churn;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mio::event::Event;
use mio::{Events, Poll, Token};

use super::client::{Client, Ending, State};
use super::clock;
use super::load::Load;
use super::plan::Plan;
use super::publisher::FIRST_PUBLISHER;
use super::shared::{Count, Phase, Shared, Tally};
use super::socket::{Dial, Transport, is_not_now, source};
use super::template::Values;
use super::tls::Tls;
use super::websocket::Opcode;
use check::{Check, Seeing};
use churn::Churn;

/// The token of what wakes a thread.
pub(super) const WAKER: Token = Token(usize::MAX);
/// What is read at once: one buffer a thread.
const READ_BYTES: usize = 256 << 10;
const EVENTS: usize = 1024;
/// A thread that has nothing to do looks around so often.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Latencies are handed over so often, in nanoseconds.
const INTERVAL_NANOS: u64 = 1_000_000_000;
/// What a client that never reads has room for, in bytes; the kernel doubles it.
const SILENT_BUFFER: usize = 4096;
/// At the end everything is over once nothing has come for so long, in nanoseconds.
const QUIET_NANOS: u64 = 200_000_000;
/// With clients that begin to read at the end, the server has to be given the time to go on writing.
const SILENT_QUIET_NANOS: u64 = 1_500_000_000;
/// A handshake that has not ended by then has failed, in nanoseconds.
const HANDSHAKE_NANOS: u64 = 30_000_000_000;

/// See the module.
pub(super) struct Reader {
    plan: Arc<Plan>,
    shared: Arc<Shared>,
    thread: usize,
    /// The index of its first client among all.
    first: usize,
    poll: Poll,
    clients: Vec<Client>,
    /// The next one to open, and how many are between connecting and open.
    next: usize,
    under_way: usize,
    buffer: Vec<u8>,
    scratch: Vec<u8>,
    check: Check,
    load: Option<Load>,
    churn: Churn,
    began: u64,
    last_arrival: u64,
    next_hand_over: u64,
    finishing_since: Option<u64>,
}

impl Reader {
    /// A thread's own, before it has a socket. Called while all threads still share one file table.
    pub(super) fn new(plan: Arc<Plan>, shared: Arc<Shared>, thread: usize, poll: Poll) -> Self {
        let share = plan.clients_of(thread);
        let check = Check::new(Arc::clone(&plan), Arc::clone(&shared), share.len());
        let load = (thread == 0).then(|| Load::new(Arc::clone(&plan), Arc::clone(&shared)));
        Self {
            first: share.start,
            clients: share.map(|index| Client::new(plan.mix.is_stream(index))).collect(),
            plan,
            shared,
            thread,
            poll,
            next: 0,
            under_way: 0,
            buffer: vec![0; READ_BYTES],
            scratch: Vec::new(),
            check,
            load,
            churn: Churn::default(),
            began: 0,
            last_arrival: 0,
            next_hand_over: 0,
            finishing_since: None,
        }
    }

    /// Runs to the end of the run and returns what it counted.
    pub(super) fn run(mut self) -> io::Result<Tally> {
        let mut events = Events::with_capacity(EVENTS);
        self.began = clock::nanos();
        let mut seen = Phase::Opening;
        loop {
            let phase = self.shared.phase();
            if phase != seen {
                self.entered(phase)?;
                self.shared.has_entered(phase);
                seen = phase;
            }
            let now = clock::nanos();
            let wait = self.step(phase, now)?;
            if phase == Phase::Finishing && self.is_quiet(now) {
                break;
            }
            match self.poll.poll(&mut events, Some(wait)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for event in &events {
                match event.token() {
                    WAKER => {}
                    Token(token) if token >= FIRST_PUBLISHER => {
                        if let Some(load) = &mut self.load {
                            load.handle(token - FIRST_PUBLISHER, &mut self.check.tally);
                        }
                    }
                    Token(local) => self.handle(local, event),
                }
            }
            self.shared.show(self.thread, self.check.shown());
            self.wake_publisher(&events);
        }
        self.finish();
        Ok(self.check.tally)
    }

    /// Everything that is not an event. Returns how long the thread may sleep.
    fn step(&mut self, phase: Phase, now: u64) -> io::Result<Duration> {
        self.open_more(now);
        if (Phase::Holding..Phase::Finishing).contains(&phase) {
            self.come_and_go(now);
        }
        if now >= self.next_hand_over {
            self.next_hand_over = now + INTERVAL_NANOS;
            self.shared.hand_over(self.thread, &mut self.check.latencies);
        }
        self.shared.show(self.thread, self.check.shown());
        let Some(load) = &mut self.load else { return Ok(LOOK_AGAIN) };
        let due = load.step(phase, now, self.poll.registry(), &mut self.check.tally)?;
        // The poll's time is in whole milliseconds: what is due sooner is waited for without sleeping.
        let wait = due.map_or(LOOK_AGAIN, |due| Duration::from_millis(due.saturating_sub(now) / 1_000_000));
        Ok(wait.min(LOOK_AGAIN))
    }

    /// The publisher waits for what came here, if it is on another thread and waits at all.
    fn wake_publisher(&self, events: &Events) {
        let phase = self.shared.phase();
        if self.thread > 0 && !events.is_empty() && matches!(phase, Phase::WarmUp | Phase::Measuring) {
            // It looks by itself within 10 ms.
            let _ = self.shared.wakers[0].wake();
        }
    }

    fn entered(&mut self, phase: Phase) -> io::Result<()> {
        match phase {
            Phase::Ready => {
                self.check.measured_from = self.shared.measured_from();
                for local in 0..self.clients.len() {
                    if self.clients[local].is_subscribed && !self.plan.mix.is_churner(self.first + local) {
                        self.check.require(local, self.first + local);
                    }
                }
            }
            Phase::Finishing => {
                self.finishing_since = Some(clock::nanos());
                for local in 0..self.clients.len() {
                    let client = &mut self.clients[local];
                    if std::mem::take(&mut client.is_deaf) {
                        client.transport.listen(self.poll.registry(), Token(local))?;
                        self.read(local);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn is_quiet(&self, now: u64) -> bool {
        let quiet = if self.plan.mix.silent > 0 { SILENT_QUIET_NANOS } else { QUIET_NANOS };
        let since = self.finishing_since.unwrap_or(now).max(self.last_arrival);
        let (waited, stall) = (now.saturating_sub(since), clock::nanos_of(self.plan.stall));
        // A machine that has no time for the server now is not the end of what it has to say.
        (waited > quiet && (waited > stall || self.has_everything()))
            || self.finishing_since.is_some_and(|since| now - since > stall * 4)
    }

    /// Whether every client that reads has got what it had to.
    fn has_everything(&self) -> bool {
        (0..self.clients.len()).all(|local| {
            let index = self.first + local;
            self.plan.mix.is_silent(index) || self.check.has_reached(local, &self.check.ends(local, index))
        })
    }

    // ---- opening ----

    fn open_more(&mut self, now: u64) {
        let most = (self.plan.connecting / self.plan.threads).max(1);
        while self.next < self.clients.len() && self.under_way < most {
            let local = self.next;
            self.next += 1;
            self.connect(local);
        }
        if self.under_way > 0 && self.shared.phase() == Phase::Opening && now - self.began > HANDSHAKE_NANOS {
            self.give_up(now);
        }
    }

    /// Handshakes that have been under way for too long have failed. Only looked at while nothing moves any more.
    fn give_up(&mut self, now: u64) {
        if now.saturating_sub(self.last_arrival) < HANDSHAKE_NANOS {
            return;
        }
        for local in 0..self.next {
            let client = &self.clients[local];
            if client.state != State::Closed && !client.is_subscribed {
                self.end(local, "it takes too long");
            }
        }
    }

    fn connect(&mut self, local: usize) {
        self.under_way += 1;
        let index = self.first + local;
        let dial = Dial {
            address: self.plan.address,
            source: source(index, self.plan.sources),
            receive_buffer: self.plan.mix.is_silent(index).then_some(SILENT_BUFFER),
        };
        let made = dial.connect().and_then(|socket| match &self.plan.tls {
            None => Ok(Transport::Plain(socket)),
            Some(trust) => Tls::new(socket, trust).map(|tls| Transport::Tls(Box::new(tls))),
        });
        let client = &mut self.clients[local];
        client.state = State::Connecting;
        let registered = made.and_then(|transport| {
            client.transport = transport;
            client.transport.register(self.poll.registry(), Token(local))
        });
        if let Err(error) = registered {
            self.end(local, &error.to_string());
        }
    }

    fn shake(&mut self, local: usize) -> io::Result<()> {
        let index = self.first + local;
        let joining = &self.plan.joining;
        let values = Values { index, user: self.plan.mix.user(index), ..Values::default() };
        let client = &mut self.clients[local];
        let out = &mut self.scratch;
        out.clear();
        out.extend_from_slice(b"GET ");
        let path = if client.is_stream { &joining.stream_path } else { &joining.path };
        path.write(out, &values);
        out.extend_from_slice(b" HTTP/1.1\r\nHost: ");
        out.extend_from_slice(joining.host.as_bytes());
        out.extend_from_slice(if client.is_stream {
            b"\r\nAccept: text/event-stream\r\n".as_slice()
        } else {
            b"\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
              Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        });
        if joining.deflates && !client.is_stream {
            out.extend_from_slice(
                b"Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; client_no_context_takeover\r\n",
            );
        }
        if let Some(token) = index.checked_rem(joining.tokens.len()).and_then(|at| joining.tokens.get(at)) {
            out.extend_from_slice(b"Authorization: Bearer ");
            out.extend_from_slice(token.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
        joining.headers.write(out, &values);
        out.extend_from_slice(b"\r\n");
        match client.write(out) {
            Ok(()) => client.state = State::Shaking,
            Err(error) if is_not_now(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    // ---- events ----

    fn handle(&mut self, local: usize, event: &Event) {
        let Some(client) = self.clients.get_mut(local) else { return };
        match client.state {
            State::Closed => return,
            State::Connecting if event.is_writable() || event.is_error() => {
                if let Err(error) = self.shake(local) {
                    return self.end(local, &error.to_string());
                }
            }
            _ => client.flush(),
        }
        let client = &self.clients[local];
        if client.state != State::Connecting && !client.is_deaf && (event.is_readable() || event.is_error()) {
            // What the peer has to say may be followed by its end without another event.
            while self.read(local) && event.is_read_closed() {}
        }
    }

    /// Reads what there is. True if the connection goes on, and there may be more.
    fn read(&mut self, local: usize) -> bool {
        loop {
            let client = &mut self.clients[local];
            let carried = client.carried(&mut self.buffer);
            let room = self.buffer.len() - carried;
            let count = match client.transport.read(&mut self.buffer[carried..]) {
                Ok(0) => {
                    self.end(local, "the server closed the connection");
                    return false;
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if is_not_now(&error) => return false,
                Err(error) => {
                    self.end(local, &error.to_string());
                    return false;
                }
            };
            if !self.take(local, carried, count) {
                return false;
            }
            let client = &self.clients[local];
            if count < room && client.transport.is_drained_by_short_read() {
                return client.state != State::Closed;
            }
        }
    }

    /// Goes through what was read. False if the client is to be left alone.
    fn take(&mut self, local: usize, carried: usize, count: usize) -> bool {
        let index = self.first + local;
        let now = clock::nanos();
        self.last_arrival = now;
        self.check.tally.add(Count::BytesIn, count as u64);
        let client = &mut self.clients[local];
        let was_subscribed = client.is_subscribed;
        let mut seeing = Seeing::new(&mut self.check, local, index, now);
        seeing.is_subscribed = was_subscribed;
        let result = client.take(&mut self.buffer[..carried + count], carried, &mut seeing);
        let Seeing { was_opened, is_subscribed, .. } = seeing;
        client.is_subscribed = is_subscribed;
        if was_opened {
            self.greet(local);
        }
        if is_subscribed && !was_subscribed {
            self.subscribed(local);
        }
        match result {
            Ok(()) => {}
            Err(Ending::Closed(code)) => {
                self.end(local, &format!("the server closed it with {code}"));
                return false;
            }
            Err(Ending::Refused(_, text)) => {
                self.end(local, &text);
                return false;
            }
            Err(Ending::Fault(fault)) => {
                self.end(local, &fault.to_string());
                return false;
            }
        }
        if self.clients[local].is_leaving {
            self.leave_if_it_may(local, now);
        }
        let client = &self.clients[local];
        client.state != State::Closed && !client.is_deaf
    }

    /// The handshake is over: the first message.
    fn greet(&mut self, local: usize) {
        let client = &mut self.clients[local];
        let Some(subscribe) = self.plan.joining.subscribe.as_ref().filter(|_| !client.is_stream) else { return };
        let index = self.first + local;
        let opcode = if self.plan.joining.subscribe_binary { Opcode::Binary } else { Opcode::Text };
        self.scratch.clear();
        subscribe.write(&mut self.scratch, &Values { index, user: self.plan.mix.user(index), ..Values::default() });
        client.write_frame(opcode, &self.scratch);
    }

    /// The client hears everything from now on.
    fn subscribed(&mut self, local: usize) {
        let index = self.first + local;
        self.under_way = self.under_way.saturating_sub(1);
        self.check.tally.add(Count::Opened, 1);
        if self.plan.mix.is_silent(index) {
            self.check.tally.add(Count::SilentOpen, 1);
            let client = &mut self.clients[local];
            client.is_deaf = client.transport.deafen(self.poll.registry(), Token(local)).is_ok();
        } else {
            self.check.tally.add(Count::Open, 1);
        }
        if self.plan.mix.is_steady(index) {
            for (channel, _) in self.check.channels(local, index) {
                self.shared.reaches(channel);
            }
        }
    }

    /// The connection is over, and not because its client wanted that.
    fn end(&mut self, local: usize, why: &str) {
        let index = self.first + local;
        let client = &mut self.clients[local];
        let was_subscribed = client.is_subscribed;
        let was_leaving = client.is_leaving;
        client.close();
        if !was_subscribed {
            self.under_way = self.under_way.saturating_sub(1);
            self.check.tally.add(Count::Failed, 1);
            self.shared.note(|| format!("client {index}: {why}"));
        } else if self.plan.mix.is_silent(index) {
            self.check.tally.add(Count::SilentCut, 1);
            let lost = self.check.settle(local, &self.check.ends(local, index));
            self.check.tally.add(Count::SilentLost, lost);
        } else {
            self.check.tally.subtract(Count::Open, 1);
            self.check.tally.add(Count::Cut, 1);
            self.shared.note(|| format!("client {index} was cut: {why}"));
        }
        if was_leaving {
            self.churn.forget(local);
        }
    }

    // ---- the end ----

    /// Settles what every client should have got.
    fn finish(&mut self) {
        for local in 0..self.clients.len() {
            let index = self.first + local;
            // One that was about to leave, or had not come back, is asked for what it was to wait for.
            let ends = self.churn.forget(local).unwrap_or_else(|| self.check.ends(local, index));
            let lost = self.check.settle(local, &ends);
            self.check.tally.add(Count::Lost, lost);
        }
        let forgotten = self.check.lost_for_good();
        self.check.tally.add(Count::Lost, forgotten);
        self.shared.hand_over(self.thread, &mut self.check.latencies);
        self.shared.show(self.thread, self.check.shown());
    }
}
