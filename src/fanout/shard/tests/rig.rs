//! A hub, its shards on one thread, and a client at the other end of every session.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fanout::hub::Hub;
use crate::fanout::session::{Address, Identity, RoomGrant, SessionRef};
use crate::fanout::shard::slab::State;
use crate::fanout::shard::{Answer, Inbound, OpenError, Opening, Outcome, Reaction, Resume, Shard, Wire};
use crate::fanout::streams::StreamOptions;
use crate::id::{ChannelId, MessageId, RequestId, RoomName, UserId};
use crate::proto::completion::{Completion, CompletionHead};
use crate::proto::deflate::Inflater;
use crate::proto::delivery::Delivery;
use crate::proto::disconnect::Disconnect;
use crate::proto::event::{ErrorCode, Event, Notice, Timestamp};
use crate::proto::frame::Frame;
use crate::proto::limits::{HubLimits, SessionLimits};
use crate::proto::websocket::unmask;

/// What a client got, decoded.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Got {
    Json(Value),
    Ping,
    Pong(Vec<u8>),
    Close(u16, String),
    KeepAlive,
    Retry(u64),
    /// An event stream's own word for why it ends.
    CloseEvent(Value),
    LastChunk,
    /// Records of an answer, as they came in one chunk.
    Records(String),
}

impl Got {
    pub(super) fn kind(&self) -> &str {
        match self {
            Self::Json(json) => json["type"].as_str().unwrap(),
            _ => "",
        }
    }

    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Json(json) => json["text"].as_str(),
            _ => None,
        }
    }
}

pub(super) fn close(ending: Disconnect) -> Got {
    Got::Close(ending.close_code(), ending.reason().to_owned())
}

/// A client and its connection.
pub(super) struct Tab {
    pub(super) address: Address,
    pub(super) wire: Wire,
    /// Bytes that the connection takes before it blocks.
    pub(super) room: usize,
    pub(super) blocked: bool,
    pub(super) received: Vec<u8>,
    pub(super) writes: usize,
    /// The shard said that its sending side may be shut down.
    pub(super) fin: bool,
    /// The shard is done with the connection.
    pub(super) gone: bool,
}

/// Understands `join R`, `leave R`, `say X` and `bad`; the rest is remembered.
#[derive(Default)]
pub(super) struct Ear {
    pub(super) heard: Vec<(Address, String)>,
    pub(super) answered: Vec<(Address, String)>,
}

impl Inbound for Ear {
    fn text(&mut self, session: &SessionRef, text: &mut [u8]) -> Reaction {
        let text = std::str::from_utf8(text).expect("text is valid UTF-8");
        let ack = |id| Frame::notice(&Notice::Ack { client_id: id, id: None });
        let error = |code| Frame::notice(&Notice::Error { code, message: "no", client_id: None });
        let room = |name| RoomName::parse(name).unwrap();
        match text.split_once(' ') {
            Some(("join", name)) => {
                Reaction::Join { room: room(name), ack: Some(ack(name)), full: error(ErrorCode::LimitReached) }
            }
            Some(("leave", name)) => Reaction::Leave { room: room(name), ack: Some(ack(name)) },
            Some(("say", said)) => {
                self.answered.push((session.address(), said.to_owned()));
                Reaction::Reply(message(said))
            }
            None if text == "bad" => Reaction::Bad(error(ErrorCode::BadFrame)),
            _ => {
                self.heard.push((session.address(), text.to_owned()));
                Reaction::Nothing
            }
        }
    }
}

pub(super) fn message(text: &str) -> Frame {
    let timestamp = Timestamp::from_micros(1);
    Frame::encode(&Event::Message { id: MessageId::random(), text, sender: "star", reply_to: None, timestamp })
}

pub(super) fn edit(id: MessageId, text: &str) -> Frame {
    Frame::encode(&Event::Edit { id, text, timestamp: Timestamp::from_micros(1) })
}

pub(super) fn typing(active: bool, channel: &str) -> Frame {
    Frame::encode_for(&Event::Typing { active }, &ChannelId::parse(channel).unwrap())
}

pub(super) const TEXT: u8 = 0x81;
pub(super) const RSV1: u8 = 0x40;
pub(super) const CLOSE: u8 = 0x88;
pub(super) const PING: u8 = 0x89;
pub(super) const PONG: u8 = 0x8a;

/// A masked frame of at most 65,535 bytes, as a client sends it.
pub(super) fn client_frame(first: u8, payload: &[u8]) -> Vec<u8> {
    const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
    let mut bytes = vec![first];
    match u8::try_from(payload.len()) {
        Ok(length @ 0..=125) => bytes.push(0x80 | length),
        _ => {
            bytes.push(0x80 | 126);
            bytes.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        }
    }
    bytes.extend_from_slice(&MASK);
    let mut payload = payload.to_vec();
    unmask(&mut payload, MASK);
    bytes.extend_from_slice(&payload);
    bytes
}

/// A compressed text, as a client sends it that begins anew with each message.
pub(super) fn deflated_client_frame(text: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(text.len() + 100);
    let mut state = flate2::Compress::new(flate2::Compression::best(), false);
    state.compress_vec(text, &mut payload, flate2::FlushCompress::Sync).unwrap();
    assert_eq!(payload.split_off(payload.len() - 4), [0, 0, 0xff, 0xff]);
    client_frame(TEXT | RSV1, &payload)
}

pub(super) struct Rig {
    pub(super) hub: Arc<Hub>,
    pub(super) shards: Vec<Shard>,
    pub(super) tabs: Vec<Tab>,
    pub(super) ear: Ear,
    by_slot: HashMap<(u16, u32), usize>,
    start: Instant,
    pub(super) elapsed: Duration,
}

impl Rig {
    pub(super) fn new(shards: usize) -> Self {
        Self::with(shards, SessionLimits::default(), usize::MAX)
    }

    /// Queues of `frames` frames and `bytes` bytes.
    pub(super) fn with_queues(shards: usize, frames: usize, bytes: usize) -> Self {
        let limits = SessionLimits { queue_frames_max: frames, queue_bytes_max: bytes, ..SessionLimits::default() };
        Self::with(shards, limits, usize::MAX)
    }

    pub(super) fn with(shards: usize, limits: SessionLimits, bytes_budget: usize) -> Self {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start; the test moves time itself")]
        let start = Instant::now();
        let hub = Hub::new(shards, &HubLimits::default(), &limits);
        let shard = |index| Shard::new(Arc::clone(&hub), index, limits.clone(), bytes_budget, start);
        let shards = (0..u16::try_from(shards).unwrap()).map(shard).collect();
        let (tabs, ear, by_slot) = (Vec::new(), Ear::default(), HashMap::new());
        Self { hub, shards, tabs, ear, by_slot, start, elapsed: Duration::ZERO }
    }

    pub(super) fn try_open(&mut self, shard: u16, user: &str, wire: Wire) -> Result<usize, OpenError> {
        self.open_for(shard, user, wire, None)
    }

    pub(super) fn open_for(
        &mut self,
        shard: u16,
        user: &str,
        wire: Wire,
        expires_in: Option<Duration>,
    ) -> Result<usize, OpenError> {
        let mut identity = Identity::new(UserId::parse(user).unwrap(), Timestamp::from_micros(1));
        identity.rooms = RoomGrant::Any;
        let opening = Opening { expires_in, ..Opening::new(identity, wire) };
        let address = self.shards[usize::from(shard)].open(opening, |_| None)?;
        Ok(self.add(address, wire))
    }

    /// A WebSocket tab that comes back.
    pub(super) fn resumed(&mut self, shard: u16, user: &str, resume: Resume) -> usize {
        let mut identity = Identity::new(UserId::parse(user).unwrap(), Timestamp::from_micros(1));
        identity.rooms = RoomGrant::Any;
        let opening = Opening { resume, ..Opening::new(identity, Wire::WebSocket) };
        let address = self.shards[usize::from(shard)].open(opening, |_| None).unwrap();
        let tab = self.add(address, Wire::WebSocket);
        self.writable(tab, usize::MAX);
        tab
    }

    /// The reader of an answer: of a new one with `options`, of one that was left without.
    pub(super) fn answer(
        &mut self,
        shard: u16,
        (user, request): (&str, &str),
        options: Option<StreamOptions>,
    ) -> Result<usize, OpenError> {
        let request = RequestId::parse(request).unwrap();
        let completion = Completion::new(head(&request));
        let (answer, shard) = (Answer { request, completion }, &mut self.shards[usize::from(shard)]);
        let address = match options {
            Some(options) => shard.open_answer(answer, options),
            None => shard.reopen_answer(&UserId::parse(user).unwrap(), answer),
        }?;
        let tab = self.add(address, Wire::Completion);
        self.writable(tab, usize::MAX);
        Ok(tab)
    }

    /// The text that an answer's reader has so far: all deltas behind each other.
    pub(super) fn content(&self, tab: usize) -> String {
        let text = |line: &str| {
            let json: Value = serde_json::from_str(line.strip_prefix("data: ")?).ok()?;
            json["choices"][0]["delta"]["content"].as_str().map(str::to_owned)
        };
        self.records(tab).lines().filter_map(text).collect()
    }

    /// All records of an answer's reader, without the framing of chunks.
    pub(super) fn records(&self, tab: usize) -> String {
        let records = |got: &Got| match got {
            Got::Records(records) => Some(records.clone()),
            _ => None,
        };
        self.got(tab).iter().filter_map(records).collect()
    }

    pub(super) fn add(&mut self, address: Address, wire: Wire) -> usize {
        self.tabs.push(Tab {
            address,
            wire,
            room: usize::MAX,
            blocked: true,
            received: Vec::new(),
            writes: 0,
            fin: false,
            gone: false,
        });
        self.by_slot.insert((address.shard(), address.slot()), self.tabs.len() - 1);
        self.tabs.len() - 1
    }

    /// A WebSocket tab that reads all it gets.
    pub(super) fn tab(&mut self, shard: u16, user: &str) -> usize {
        let tab = self.try_open(shard, user, Wire::WebSocket).unwrap();
        self.writable(tab, usize::MAX);
        tab
    }

    /// The same with permessage-deflate.
    pub(super) fn deflated_tab(&mut self, shard: u16, user: &str) -> usize {
        let tab = self.try_open(shard, user, Wire::DeflatedWebSocket).unwrap();
        self.writable(tab, usize::MAX);
        tab
    }

    /// A reader of an event stream.
    pub(super) fn reader(&mut self, shard: u16, user: &str) -> usize {
        let tab = self.try_open(shard, user, Wire::EventStream).unwrap();
        self.writable(tab, usize::MAX);
        tab
    }

    pub(super) fn shard_of(&mut self, tab: usize) -> (&mut Shard, u32) {
        let address = self.tabs[tab].address;
        (&mut self.shards[usize::from(address.shard())], address.slot())
    }

    /// Whether frames still go to it.
    pub(super) fn is_open(&self, tab: usize) -> bool {
        let address = self.tabs[tab].address;
        let shard = &self.shards[usize::from(address.shard())];
        shard.session(address.slot()).is_some_and(|session| session.address() == address)
            && shard.slab.get(address.slot()).state == State::Open
    }

    pub(super) fn post(&self, channel: &str, frame: &Frame) -> Delivery {
        self.hub.post(&ChannelId::parse(channel).unwrap(), frame).expect("there is room")
    }

    /// Posts, and lets every shard fan out and write.
    pub(super) fn publish(&mut self, channel: &str, frame: &Frame) -> Delivery {
        let delivery = self.post(channel, frame);
        self.turn();
        delivery
    }

    pub(super) fn now(&self) -> Instant {
        self.start + self.elapsed
    }

    pub(super) fn fan_out(&mut self) {
        let now = self.now();
        for shard in &mut self.shards {
            while shard.handle_inbox(now) {}
        }
    }

    pub(super) fn turn(&mut self) {
        self.fan_out();
        self.flush();
        while self.shards.iter().any(Shard::has_work) {
            self.fan_out();
            self.flush();
        }
    }

    /// Writes until no shard has anything to write.
    pub(super) fn flush(&mut self) {
        let now = self.now();
        for shard in &mut self.shards {
            loop {
                let Some(transmit) = shard.poll_transmit() else { break };
                let slot = transmit.slot;
                let bytes: Vec<u8> = transmit.slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                drop(transmit);
                assert!(!bytes.is_empty(), "a write is never empty");
                let tab = &mut self.tabs[self.by_slot[&(shard.index(), slot)]];
                assert!(!tab.blocked, "a write between blocked and writable");
                assert!(!tab.gone && !tab.fin, "a write after the end");
                let taken = bytes.len().min(tab.room);
                tab.received.extend_from_slice(&bytes[..taken]);
                tab.writes += 1;
                if tab.room != usize::MAX {
                    tab.room -= taken;
                }
                tab.blocked = taken < bytes.len();
                let outcome = if tab.blocked { Outcome::Blocked(taken) } else { Outcome::Taken(taken) };
                shard.handle_written(slot, outcome);
                tab.fin |= shard.is_flushed(slot);
            }
            shard.handle_flushed(now);
            while let Some(slot) = shard.poll_disconnect() {
                let tab = &mut self.tabs[self.by_slot[&(shard.index(), slot)]];
                assert!(!std::mem::replace(&mut tab.gone, true), "a connection ends once");
            }
        }
    }

    /// Its connection takes no more than `room` bytes from now on.
    pub(super) fn stall(&mut self, tab: usize, room: usize) {
        self.tabs[tab].room = room;
    }

    /// Its connection takes `room` bytes again.
    pub(super) fn writable(&mut self, tab: usize, room: usize) {
        let tab_mut = &mut self.tabs[tab];
        if tab_mut.gone {
            return;
        }
        (tab_mut.room, tab_mut.blocked) = (room, false);
        let (shard, slot) = self.shard_of(tab);
        shard.handle_writable(slot);
        self.flush();
    }

    /// Its client sends bytes.
    pub(super) fn receive(&mut self, tab: usize, bytes: &[u8]) {
        if self.tabs[tab].gone {
            return;
        }
        let mut ear = std::mem::take(&mut self.ear);
        let (shard, slot) = self.shard_of(tab);
        shard.handle_readable(slot, &mut bytes.to_vec(), &mut ear);
        self.ear = ear;
        self.flush();
    }

    pub(super) fn say(&mut self, tab: usize, text: &str) {
        self.receive(tab, &client_frame(TEXT, text.as_bytes()));
    }

    pub(super) fn lose(&mut self, tab: usize) {
        if !self.tabs[tab].gone {
            let (shard, slot) = self.shard_of(tab);
            shard.handle_lost(slot, Disconnect::ConnectionLost);
            self.flush();
        }
    }

    /// Lets time pass, a second at a time.
    pub(super) fn wait(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.jump(Duration::from_secs(1));
        }
    }

    /// Lets time pass at once.
    pub(super) fn jump(&mut self, time: Duration) {
        self.elapsed += time;
        let now = self.now();
        for shard in &mut self.shards {
            shard.handle_tick(now);
        }
        self.hub.sweep_streams();
        self.flush();
    }

    /// All that a tab got so far: whole frames only, unless it is cut off in the middle of one.
    pub(super) fn got(&self, tab: usize) -> Vec<Got> {
        let tab = &self.tabs[tab];
        let (mut rest, mut got) = (&tab.received[..], Vec::new());
        let next = match tab.wire {
            Wire::WebSocket | Wire::Frames => next_frame,
            Wire::DeflatedWebSocket | Wire::NarrowWebSocket(_) => next_deflated,
            Wire::EventStream => next_chunk,
            Wire::Completion => next_records,
        };
        while let Some((item, after)) = next(rest) {
            got.push(item);
            rest = after;
        }
        got
    }

    pub(super) fn texts(&self, tab: usize) -> Vec<String> {
        self.got(tab).iter().filter_map(|got| got.text().map(str::to_owned)).collect()
    }

    pub(super) fn last(&self, tab: usize) -> Got {
        self.got(tab).pop().expect("it got something")
    }

    /// Bytes behind the last whole frame.
    pub(super) fn torn_bytes(&self, tab: usize) -> usize {
        let (wire, mut rest) = (self.tabs[tab].wire, &self.tabs[tab].received[..]);
        let next = match wire {
            Wire::WebSocket | Wire::Frames => next_frame,
            Wire::DeflatedWebSocket | Wire::NarrowWebSocket(_) => next_deflated,
            Wire::EventStream | Wire::Completion => next_records,
        };
        while let Some((_, after)) = next(rest) {
            rest = after;
        }
        rest.len()
    }

    pub(super) fn ended(&self, ending: Disconnect) -> u64 {
        self.hub.metrics().sum(|shard| shard.ended_sessions.of(ending))
    }

    /// The shards' own sums against a walk through all queues.
    pub(super) fn check_gauges(&self) {
        for shard in &self.shards {
            let (mut frames, mut bytes) = (0, 0);
            for slot in 0..shard.slab.slots() {
                let session = shard.slab.get(slot);
                let queued: usize =
                    session.queue.iter().map(|e| shard.frames.get(e.handle).wire_bytes(session.wire)).sum();
                assert_eq!(session.queue_bytes, queued - session.written);
                frames += session.queue.len();
                bytes += session.queue_bytes;
            }
            assert_eq!(shard.queued(), (frames, bytes));
            assert!(shard.held_frames() <= frames);
        }
    }

    fn finish(&mut self) {
        self.turn();
        for tab in 0..self.tabs.len() {
            self.lose(tab);
        }
        for shard in &self.shards {
            assert_eq!((shard.session_count(), shard.metrics().sessions.value()), (0, 0));
            assert_eq!((shard.held_frames(), shard.queued()), (0, (0, 0)));
            assert_eq!(shard.frames.holders(shard.ping), 1, "the ping is held by its shard only");
            assert_eq!(shard.frames.holders(shard.keep_alive), 1, "the keep-alive is held by its shard only");
            assert!(!shard.has_work());
        }
        let hub = &self.hub;
        assert_eq!((hub.registry().total_connections(), hub.registry().user_count()), (0, 0));
        assert_eq!((hub.room_count(), hub.waiting_posts()), (0, 0));
        let ended: u64 = hub.metrics().shards().map(|shard| shard.ended_sessions.total()).sum();
        assert_eq!(ended, self.tabs.len() as u64, "each session ends once, for one reason");
    }
}

/// Whatever a test did: at its end nobody and nothing is left.
impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.finish();
        }
    }
}

/// What is the same in all chunks of a test's answer.
pub(super) fn head(request: &RequestId) -> CompletionHead {
    CompletionHead {
        id: request.clone(),
        created: 1,
        model: "m".into(),
        files_url: "http://here".into(),
        wants_usage: false,
        prompt_tokens: 0,
    }
}

/// The frames of a server's bytes.
pub(super) fn frames_of(mut bytes: &[u8]) -> Vec<Got> {
    let mut got = Vec::new();
    while let Some((item, rest)) = next_frame(bytes) {
        got.push(item);
        bytes = rest;
    }
    assert!(bytes.is_empty(), "a frame was torn");
    got
}

/// The same as [`next_frame`], of a session that negotiated permessage-deflate.
fn next_deflated(bytes: &[u8]) -> Option<(Got, &[u8])> {
    let (first, payload, rest) = split_frame(bytes)?;
    if first != TEXT | RSV1 {
        return next_frame(bytes);
    }
    let read = |json: &mut [u8]| Got::Json(serde_json::from_slice(json).expect("JSON"));
    Some((Inflater::default().inflate(payload, 1 << 20, read).expect("compressed"), rest))
}

fn next_frame(bytes: &[u8]) -> Option<(Got, &[u8])> {
    let (first, payload, rest) = split_frame(bytes)?;
    let got = match first {
        TEXT => Got::Json(serde_json::from_slice(payload).expect("JSON")),
        PING => Got::Ping,
        PONG => Got::Pong(payload.to_vec()),
        CLOSE => {
            let (code, reason) = payload.split_first_chunk().expect("a code");
            Got::Close(u16::from_be_bytes(*code), String::from_utf8(reason.to_vec()).unwrap())
        }
        other => panic!("first byte {other:#x}"),
    };
    Some((got, rest))
}

fn split_frame(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[first, second], rest) = bytes.split_first_chunk()?;
    assert_eq!(second & 0x80, 0, "a server does not mask");
    let (length, rest) = match second {
        126 => rest.split_first_chunk().map(|(l, rest)| (usize::from(u16::from_be_bytes(*l)), rest))?,
        127 => rest
            .split_first_chunk()
            .map(|(l, rest)| (usize::try_from(u64::from_be_bytes(*l)).unwrap_or(usize::MAX), rest))?,
        short => (usize::from(short), rest),
    };
    let (payload, rest) = rest.split_at_checked(length)?;
    Some((first, payload, rest))
}

fn next_chunk(bytes: &[u8]) -> Option<(Got, &[u8])> {
    let (record, rest) = split_chunk(bytes)?;
    let got = if record.is_empty() {
        Got::LastChunk
    } else if record == ": keep-alive\n\n" {
        Got::KeepAlive
    } else if let Some(millis) = record.strip_prefix("retry: ") {
        Got::Retry(millis.trim_end().parse().unwrap())
    } else {
        let data = record.lines().find_map(|line| line.strip_prefix("data: ")).expect("data");
        let json = serde_json::from_str(data).expect("JSON");
        if record.starts_with("event: close\n") { Got::CloseEvent(json) } else { Got::Json(json) }
    };
    Some((got, rest))
}

fn next_records(bytes: &[u8]) -> Option<(Got, &[u8])> {
    let (records, rest) = split_chunk(bytes)?;
    let got = if records.is_empty() { Got::LastChunk } else { Got::Records(records.to_owned()) };
    Some((got, rest))
}

fn split_chunk(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let line = bytes.windows(2).position(|two| two == b"\r\n")?;
    let length = usize::from_str_radix(std::str::from_utf8(&bytes[..line]).unwrap(), 16).expect("a chunk's size");
    let (chunk, rest) = bytes[line + 2..].split_at_checked(length)?;
    let (end, rest) = rest.split_first_chunk()?;
    assert_eq!(end, b"\r\n", "a chunk ends where its size says");
    Some((std::str::from_utf8(chunk).unwrap(), rest))
}
