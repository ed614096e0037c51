//! Clients: what they send, well-behaved and not, and how fast they read.

use std::time::Duration;

use tabcast::fanout::session::{Address, SessionRef};
use tabcast::fanout::shard::{Inbound, Reaction, Wire};
use tabcast::platform::inbound::{Command, InboundLimits, Scratch, parse};
use tabcast::proto::event::{ErrorCode, Notice};
use tabcast::proto::frame::Frame;

use super::dice::Dice;
use super::reader::Reader;

const TEXT: u8 = 0x81;
const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;
const PONG: u8 = 0x8a;

/// How a client reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    Fast,
    /// So many bytes a step.
    Slow(usize),
    Stalled,
}

/// One connection and who is at its other end. Its number is that of its tab.
pub(crate) struct Client {
    pub(crate) node: usize,
    pub(crate) address: Address,
    pub(crate) reader: Reader,
    pub(crate) pace: Pace,
    /// Bytes that the socket takes before it blocks.
    pub(crate) room: usize,
    pub(crate) is_blocked: bool,
    /// When it was so last.
    pub(crate) blocked_at: Duration,
    /// From when on so much waited for it, as a power of two: the last that is as old as a word of it may be, and what came then.
    pub(crate) classes: Vec<(Duration, u32)>,
    /// What waited when it blocked: it must not grow much from there.
    pub(crate) blocked_with: (usize, usize),
    /// Bytes that waited for it when somebody looked last.
    pub(crate) unwritten_bytes: usize,
    /// The connection breaks after so many bytes more.
    pub(crate) breaks_after: Option<usize>,
    pub(crate) is_gone: bool,
    /// The server sends nothing more.
    pub(crate) is_finished: bool,
    /// What it is yet to send.
    pub(crate) outgoing: Vec<u8>,
    /// It sends nothing more.
    pub(crate) is_mute: bool,
    /// It never answers a ping or a close.
    pub(crate) is_silent: bool,
    pub(crate) is_malicious: bool,
    sent: usize,
}

impl Client {
    pub(crate) fn new(node: usize, address: Address, wire: Wire, pace: Pace) -> Self {
        let room = if pace == Pace::Fast { usize::MAX } else { 0 };
        Self {
            node,
            address,
            reader: Reader::new(wire),
            pace,
            room,
            is_blocked: true,
            blocked_at: Duration::ZERO,
            classes: Vec::new(),
            blocked_with: (0, 0),
            unwritten_bytes: 0,
            breaks_after: None,
            is_gone: false,
            is_finished: false,
            outgoing: Vec::new(),
            is_mute: false,
            is_silent: false,
            is_malicious: false,
            sent: 0,
        }
    }

    /// Says something that wants an answer, and returns the id that the answer has to carry.
    pub(crate) fn ask(&mut self, tab: usize, what: &str, dice: &mut Dice) -> String {
        self.sent += 1;
        let id = format!("c{tab}-{}", self.sent);
        if what == "ping frame" {
            self.send(PING, id.as_bytes(), dice);
        } else {
            let text = format!("{{{what},\"client_id\":\"{id}\"}}");
            self.send(TEXT, text.as_bytes(), dice);
        }
        id
    }

    pub(crate) fn pong(&mut self, payload: &[u8], dice: &mut Dice) {
        self.send(PONG, payload, dice);
    }

    pub(crate) fn close(&mut self, dice: &mut Dice) {
        self.send(CLOSE, &1000u16.to_be_bytes(), dice);
    }

    fn send(&mut self, first: u8, payload: &[u8], dice: &mut Dice) {
        let mut bytes = vec![first];
        match u8::try_from(payload.len()) {
            Ok(length @ 0..=125) => bytes.push(0x80 | length),
            _ => {
                bytes.push(0x80 | 126);
                bytes.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
            }
        }
        let mask = u32::try_from(dice.next() >> 32).unwrap().to_be_bytes();
        bytes.extend_from_slice(&mask);
        bytes.extend(payload.iter().enumerate().map(|(at, byte)| byte ^ mask[at % 4]));
        self.outgoing.extend_from_slice(&bytes);
    }

    /// Sends what no client should. Returns whether it may be taken for a close.
    pub(crate) fn attack(&mut self, dice: &mut Dice) -> bool {
        self.is_malicious = true;
        match dice.below(10) {
            0 => {
                let count = dice.between(1, 40);
                self.outgoing.extend(dice.bytes(count));
                return true;
            }
            // Not masked.
            1 => self.outgoing.extend_from_slice(&[TEXT, 2, b'{', b'}']),
            // A header that claims 2⁶² bytes, and one that claims 64 KiB and brings some.
            2 => self.outgoing.extend_from_slice(&[TEXT, 0xff, 0x40, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]),
            3 => {
                self.outgoing.extend_from_slice(&[TEXT, 0xfe, 0xff, 0xff, 0, 0, 0, 0]);
                let count = dice.between(100, 4_000);
                self.outgoing.extend(std::iter::repeat_n(b'x', count));
            }
            // Fragments without end.
            4 => (0..dice.between(1, 30)).for_each(|n| self.send(if n == 0 { 0x01 } else { 0x00 }, &[b'x'; 100], dice)),
            5 => (0..dice.between(5, 40)).for_each(|_| self.send(PING, b"flood", dice)),
            6 => self.send(BINARY, b"binary", dice),
            7 => self.send(TEXT, &[0xc3, 0x28], dice),
            8 => (0..dice.between(1, 14)).for_each(|_| self.send(TEXT, b"no JSON", dice)),
            // A reserved bit; or, where it was negotiated, something that does not inflate.
            _ => self.send(TEXT | 0x40, &[0xff, 0xff, 0xff], dice),
        }
        false
    }
}

/// Understands the text of one shard's tabs by the real parser, and remembers what it was told.
pub(crate) struct Ear {
    limits: InboundLimits,
    scratch: Scratch,
    pub(crate) heard: Vec<(Address, Command)>,
}

impl Ear {
    pub(crate) fn new(limits: InboundLimits) -> Self {
        Self { limits, scratch: Scratch::default(), heard: Vec::new() }
    }
}

impl Inbound for Ear {
    fn text(&mut self, session: &SessionRef, text: &mut [u8]) -> Reaction {
        let error =
            |code, message: &str, client_id: Option<&str>| Frame::notice(&Notice::Error { code, message, client_id });
        let command = match parse(text, &mut self.scratch, &self.limits) {
            Ok(command) => command,
            Err(refused) => {
                return Reaction::Bad(error(refused.code, &refused.message, refused.client_id.as_deref()));
            }
        };
        self.heard.push((session.address(), command.clone()));
        let client_id = command.client_id();
        let ack = client_id.map(|client_id| Frame::notice(&Notice::Ack { client_id, id: None }));
        match &command {
            Command::Ping { .. } => Reaction::Reply(Frame::notice(&Notice::Pong { client_id })),
            Command::Typing { .. } => ack.map_or(Reaction::Nothing, Reaction::Reply),
            Command::Join { room, .. } => {
                let full = error(ErrorCode::LimitReached, "too many rooms", client_id);
                Reaction::Join { room: room.clone(), ack, full }
            }
            Command::Leave { room, .. } => Reaction::Leave { room: room.clone(), ack },
            Command::Message { .. } | Command::Button { .. } => Reaction::Nothing,
        }
    }
}
