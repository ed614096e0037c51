//! Publishes: as many requests as may be under way, or as many as are due. It lives on the first thread, between the
//! events of its clients.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use mio::Registry;

use super::clock;
use super::plan::{Plan, Publishing, Shape, Target};
use super::publisher::{Answer, Publisher};
use super::record::Record;
use super::shared::{Count, Phase, Shared, Tally};
use super::template::Values;

/// A server that closes a publisher's connection is given a while before the next, in nanoseconds.
const RECONNECT_NANOS: u64 = 1_000_000;
const ANSWER_BUFFER: usize = 64 << 10;

/// Which message goes out next when a run is only probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probing {
    Broadcast,
    Direct,
    Over,
}

/// See the module.
pub(super) struct Load {
    plan: Arc<Plan>,
    shared: Arc<Shared>,
    publishers: Vec<Option<Publisher>>,
    /// Whose turn it is.
    turn: usize,
    /// Deliveries that each request under way waits for, all earlier ones included.
    under_way: VecDeque<u64>,
    /// Deliveries that everything so far waits for.
    expected: u64,
    /// Deliveries when the phase began that is counted.
    base: u64,
    messages: u64,
    warmed: usize,
    /// When the phase, or the message that is waited for, began; and when something arrived last.
    began: u64,
    last: u64,
    last_seen: u64,
    phase: Phase,
    probing: Probing,
    random: u64,
    parity: bool,
    body: Vec<u8>,
    request: Vec<u8>,
    text: Vec<u8>,
    channel: String,
    buffer: Vec<u8>,
    reconnect_at: u64,
}

impl Load {
    pub(super) fn new(plan: Arc<Plan>, shared: Arc<Shared>) -> Self {
        Self {
            publishers: Vec::new(),
            turn: 0,
            under_way: VecDeque::new(),
            expected: 0,
            base: 0,
            messages: 0,
            warmed: 0,
            began: 0,
            last: 0,
            last_seen: 0,
            phase: Phase::Opening,
            probing: Probing::Broadcast,
            random: plan.seed,
            parity: false,
            body: Vec::new(),
            request: Vec::new(),
            text: Vec::new(),
            channel: String::new(),
            buffer: vec![0; ANSWER_BUFFER],
            reconnect_at: 0,
            plan,
            shared,
        }
    }

    /// What a connection that publishes has to say.
    pub(super) fn handle(&mut self, at: usize, tally: &mut Tally) {
        let Some(publisher) = self.publishers.get_mut(at).and_then(Option::as_mut) else { return };
        match publisher.handle(&mut self.buffer) {
            Ok(Some(answer)) => self.answered(&answer, tally),
            Ok(None) => {}
            Err(error) => {
                if publisher.is_busy {
                    self.answered(&Answer::None, tally);
                    self.shared.note(|| format!("publisher {at}: {error}"));
                }
                self.publishers[at] = None;
                self.reconnect_at = clock::nanos() + RECONNECT_NANOS;
            }
        }
    }

    fn answered(&mut self, answer: &Answer, tally: &mut Tally) {
        match answer {
            Answer::Accepted => {}
            Answer::Refused(count, said) => {
                tally.add(Count::Refused, *count);
                self.shared.note(|| format!("publishing was refused: {said}"));
            }
            Answer::None => tally.add(Count::Unanswered, 1),
        }
    }

    /// Does what is due. Returns when something will be, if that does not depend on what arrives.
    ///
    /// # Errors
    /// If no connection can be opened.
    pub(super) fn step(
        &mut self,
        phase: Phase,
        now: u64,
        registry: &Registry,
        tally: &mut Tally,
    ) -> io::Result<Option<u64>> {
        let plan = Arc::clone(&self.plan);
        let Some(publishing) = &plan.publishing else {
            if phase == Phase::Measuring {
                self.shared.enter(Phase::Measured);
            }
            return Ok(None);
        };
        if !matches!(phase, Phase::WarmUp | Phase::Measuring) {
            return Ok(None);
        }
        self.connect(publishing, now, registry)?;
        let delivered = self.shared.sum(Count::Awaited);
        if phase != self.phase {
            self.phase = phase;
            (self.began, self.last) = (now, now);
            self.under_way.clear();
            (self.base, self.last_seen) = (delivered, delivered);
            (self.expected, self.messages) = (0, 0);
        }
        if delivered != self.last_seen {
            (self.last_seen, self.last) = (delivered, now);
        }
        let done = delivered - self.base;
        while self.under_way.front().is_some_and(|target| *target <= done) {
            self.under_way.pop_front();
        }
        let mut turn = Turn { publishing, now, tally };
        match plan.shape {
            _ if phase == Phase::WarmUp => self.warm_up(&mut turn),
            Shape::Idle { .. } => self.probe(&mut turn),
            Shape::Closed { in_flight, messages } => self.closed(&mut turn, in_flight, messages),
            Shape::Open { rate, duration } => {
                return self.open(&mut turn, rate, clock::nanos_of(duration));
            }
        }?;
        Ok(None)
    }

    fn connect(&mut self, publishing: &Publishing, now: u64, registry: &Registry) -> io::Result<()> {
        if self.publishers.is_empty() {
            self.publishers.resize_with(publishing.publishers, || None);
        }
        if now < self.reconnect_at {
            return Ok(());
        }
        for at in 0..self.publishers.len() {
            if self.publishers[at].is_none() {
                self.publishers[at] = Some(Publisher::new(&self.plan, publishing, registry, at)?);
            }
        }
        Ok(())
    }

    /// True if nothing is waited for any more: neither deliveries nor answers.
    fn is_through(&self) -> bool {
        self.under_way.is_empty() && self.publishers.iter().flatten().all(|publisher| !publisher.is_busy)
    }

    /// True if what is waited for will never come.
    fn is_stalled(&self, now: u64) -> bool {
        now.saturating_sub(self.last) > clock::nanos_of(self.plan.stall)
    }

    fn warm_up(&mut self, turn: &mut Turn<'_>) -> io::Result<()> {
        let waited = turn.now.saturating_sub(self.began) > clock::nanos_of(self.plan.stall);
        if !self.is_through() && !waited {
            return Ok(());
        }
        // What does not come now is missing later too, where it is counted.
        self.under_way.clear();
        let is_enough = self.warmed >= self.plan.warm_up;
        if !is_enough && self.publish(turn, turn.publishing.batch, turn.now, 0)? {
            self.warmed += 1;
            self.began = turn.now;
        } else if is_enough || waited {
            self.shared.enter(Phase::Warm);
        }
        Ok(())
    }

    fn closed(&mut self, turn: &mut Turn<'_>, in_flight: usize, messages: usize) -> io::Result<()> {
        while self.under_way.len() < in_flight && self.messages < messages as u64 {
            let left = usize::try_from(messages as u64 - self.messages).unwrap_or(usize::MAX);
            if !self.publish(turn, turn.publishing.batch.min(left), turn.now, 0)? {
                break;
            }
            self.last = turn.now;
        }
        let is_over = self.messages >= messages as u64 && self.is_through();
        if is_over || self.is_stalled(turn.now) {
            self.end(is_over);
        }
        Ok(())
    }

    #[expect(clippy::cast_possible_truncation, reason = "positive, and far below 2^52")]
    fn open(&mut self, turn: &mut Turn<'_>, rate: f64, duration: u64) -> io::Result<Option<u64>> {
        let step = 1e9 / rate;
        let at = |began: u64, message: u64| began + (message as f64 * step) as u64;
        let total = (duration as f64 / step).ceil() as u64;
        loop {
            let next = at(self.began, self.messages);
            if self.messages >= total || next > turn.now {
                break;
            }
            let due = ((turn.now - self.began) as f64 / step) as u64 + 1;
            let count = due.min(total).saturating_sub(self.messages).max(1);
            let count = usize::try_from(count).unwrap_or(usize::MAX).min(turn.publishing.batch);
            if !self.publish(turn, count, next, step as u64)? {
                break;
            }
        }
        if self.messages < total {
            let is_behind = at(self.began, self.messages) <= turn.now;
            if is_behind && self.is_stalled(turn.now) {
                self.end(false);
            }
            // Where nothing is due, silence is nobody's fault; what is late leaves when an answer makes room.
            if !is_behind {
                self.last = turn.now;
            }
            return Ok((!is_behind).then(|| at(self.began, self.messages)));
        }
        let is_over = self.is_through();
        if is_over || self.is_stalled(turn.now) {
            self.end(is_over);
        }
        Ok(None)
    }

    /// One message to everybody, then one to a single user.
    fn probe(&mut self, turn: &mut Turn<'_>) -> io::Result<()> {
        let is_waiting = self.messages > 0 && !self.under_way.is_empty();
        if is_waiting && !self.is_stalled(turn.now) {
            return Ok(());
        }
        if self.messages > 0 && self.probing != Probing::Over {
            let nanos = (!is_waiting).then(|| turn.now - self.began);
            self.shared.probed(self.probing == Probing::Broadcast, nanos);
            self.under_way.clear();
            let has_direct = self.probing == Probing::Broadcast && self.plan.target != Target::Room;
            self.probing = if has_direct { Probing::Direct } else { Probing::Over };
            self.messages = 0;
        }
        if self.probing == Probing::Over {
            self.end(!is_waiting);
            return Ok(());
        }
        let channel = match self.probing {
            Probing::Broadcast => 0,
            // One that is steady, wherever those are.
            _ => 1 + self.plan.mix.user((self.plan.mix.churners + self.plan.mix.tabs) / 2),
        };
        let Some(at) = self.free_publisher() else {
            if self.is_stalled(turn.now) {
                self.end(false);
            }
            return Ok(());
        };
        self.began = turn.now;
        self.last = turn.now;
        self.compose(turn.publishing, at, &[(channel, turn.now)]);
        self.send(turn, at, 1)?;
        Ok(())
    }

    fn end(&mut self, is_over: bool) {
        if !is_over {
            self.shared.note(|| "stalled: what was published has not come".to_owned());
        }
        self.shared.has_measured(self.last.max(self.began) - self.began, is_over);
        self.phase = Phase::Measured;
        self.shared.enter(Phase::Measured);
    }

    fn free_publisher(&mut self) -> Option<usize> {
        let count = self.publishers.len();
        let is_free = |at: &usize| self.publishers[*at].as_ref().is_some_and(Publisher::is_free);
        let at = (0..count).map(|step| (self.turn + step) % count).find(is_free)?;
        self.turn = at + 1;
        Some(at)
    }

    /// Publishes `count` messages in one request, intended at `sent_at` and `step` nanoseconds after each other. False
    /// if no publisher is free.
    fn publish(&mut self, turn: &mut Turn<'_>, count: usize, sent_at: u64, step: u64) -> io::Result<bool> {
        let Some(at) = self.free_publisher() else { return Ok(false) };
        let messages: Vec<(usize, u64)> =
            (0..count as u64).map(|message| (self.channel(), sent_at + message * step)).collect();
        self.compose(turn.publishing, at, &messages);
        self.send(turn, at, count)?;
        Ok(true)
    }

    /// Where the next message goes.
    fn channel(&mut self) -> usize {
        self.parity = !self.parity;
        match self.plan.target {
            Target::Room => 0,
            Target::Mixed if self.parity => 0,
            _ => {
                let users = self.plan.mix.users().max(1) as u64;
                1 + usize::try_from(self.random() % users).unwrap_or(0)
            }
        }
    }

    /// SplitMix64: small, the same everywhere, and random enough to choose users.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.random;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// Writes a request of a publisher with a message for each of `messages`: its channel, and its intended time.
    fn compose(&mut self, publishing: &Publishing, publisher: usize, messages: &[(usize, u64)]) {
        use std::fmt::Write;
        self.body.clear();
        for (channel, sent_at) in messages {
            let number = self.shared.issue(*channel, publisher);
            let publishers = u32::try_from(self.plan.publishers()).unwrap_or(1);
            let number = number * publishers + u32::try_from(publisher).unwrap_or(0);
            let user = channel.checked_sub(1);
            self.channel.clear();
            // Writing to a string does not fail.
            let _ = match user {
                None => write!(self.channel, "room:all"),
                Some(user) => write!(self.channel, "webchat:u{user}"),
            };
            let user = user.and_then(|user| u32::try_from(user).ok());
            self.text.clear();
            Record { sent_at: *sent_at, number, user }.write(&mut self.text, self.plan.size);
            let values = Values {
                channel: &self.channel,
                text: &self.text,
                length: self.text.len(),
                user: user.unwrap_or(0) as usize,
                ..Values::default()
            };
            publishing.line.write(&mut self.body, &values);
            self.expected += self.shared.reach(*channel);
        }
        self.request.clear();
        publishing.request.write(&mut self.request, &Values { length: self.body.len(), ..Values::default() });
        self.request.extend_from_slice(&self.body);
    }

    fn send(&mut self, turn: &mut Turn<'_>, at: usize, count: usize) -> io::Result<()> {
        self.under_way.push_back(self.expected);
        self.messages += count as u64;
        turn.tally.add(Count::Requests, 1);
        turn.tally.add(Count::Published, count as u64);
        let Some(publisher) = &mut self.publishers[at] else { return Ok(()) };
        if let Err(error) = publisher.send(&self.request) {
            self.shared.note(|| format!("publisher {at}: {error}"));
            turn.tally.add(Count::Unanswered, 1);
            self.publishers[at] = None;
            self.reconnect_at = turn.now + RECONNECT_NANOS;
        }
        Ok(())
    }
}

/// What a step has at hand.
struct Turn<'a> {
    publishing: &'a Publishing,
    now: u64,
    tally: &'a mut Tally,
}
