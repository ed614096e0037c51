//! Frames from node to node: many in one message, each with its finished bytes.
//!
//! ```text
//! message  = version u8 · publisher u64 · epoch u32 · sequence u64 · record* · traces?
//! record   = 1 · kind u8 · id [u8; 16] · channel · length u32 · JSON     a frame
//!          | 2 · reason u8 · user                                        the user's sessions end
//!          | 3                                                           the publisher has come: answer it
//!          | 4                                                           the answer
//!          | 5 · micros u64                                              the canary
//! traces   = 6 · (place u16 · trace u128 · span u64 · text)+ · length u32 · [0xff; 8]
//! channel  = 1 user | 2 room, then a text
//! text     = length u16 · UTF-8
//! ```
//! Numbers are big-endian. The sequence counts a publisher's messages on one pub/sub channel from 1: one that is not
//! the next tells that something was lost, or comes twice. A publisher that gave its reader up, and finds it alive after
//! all, begins anew with a higher epoch.
//!
//! What is traced is told behind all records: for the frame at a place among those of the message, counted from 0, its
//! publish's span and `tracestate`; the places grow. The length is that of all of it, so that a reader finds it from the
//! end before it reads a record: no record and no head ends in those eight bytes. A node of a version that does not know
//! traces has by then taken every record, and counts the message as unreadable. Without a traced frame there is none.

use std::collections::HashMap;
use std::num::{NonZeroU64, NonZeroU128};
use std::time::Duration;

use tokio::time::Instant;

use crate::broker::redis::keys::NodeName;
use crate::id::{ChannelId, MessageId, RoomName, UserId};
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Frame, Kind};
use crate::proto::trace::{TraceContext, is_state};

const VERSION: u8 = 1;

const FRAME: u8 = 1;
const END: u8 = 2;
const COME: u8 = 3;
const SEEN: u8 = 4;
const CANARY: u8 = 5;
const TRACES: u8 = 6;

/// What traces end with. No text has such a byte, and no number is so large.
const TRACES_END: [u8; 8] = [0xff; 8];

/// The kinds that cross nodes, by their numbers on the wire.
const KINDS: [(u8, Kind); 6] =
    [(1, Kind::Message), (2, Kind::Buttons), (3, Kind::File), (4, Kind::Edit), (5, Kind::Typing), (6, Kind::End)];

/// What one node tells another.
#[derive(Debug, Clone)]
pub(crate) enum Record {
    /// For the sessions of a user or of a room.
    Frame { channel: ChannelId, frame: Frame },
    /// The user's sessions end.
    End { user: UserId, ending: Disconnect },
    /// The publisher is new here.
    Come,
    /// The publisher knows whom it is written to.
    Seen,
    /// For the publisher itself: when it was sent.
    Canary { micros: u64 },
}

/// A message that is not ours, or of a version that is not known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("the message is of version {0}")]
    Version(u8),
    #[error("the message ends in the middle")]
    Short,
    #[error("a record is of an unknown kind")]
    Kind,
    #[error("an id or a text in it is not one")]
    Text,
}

/// Which message of its publisher it is: the epoch, and its place in it.
pub(crate) type Number = (u32, u64);

/// Begins a message.
pub(crate) fn begin(out: &mut Vec<u8>, publisher: NodeName, (epoch, sequence): Number) {
    out.push(VERSION);
    out.extend_from_slice(&publisher.0.to_be_bytes());
    out.extend_from_slice(&epoch.to_be_bytes());
    out.extend_from_slice(&sequence.to_be_bytes());
}

/// Appends a record. False if it cannot be said: a stream's frame, which has its own pub/sub channel.
pub(crate) fn put(out: &mut Vec<u8>, record: &Record) -> bool {
    match record {
        Record::Frame { channel, frame } => return put_frame(out, channel, frame),
        Record::End { user, ending } => {
            out.extend_from_slice(&[END, ending_number(*ending)]);
            put_text(out, user.as_str());
        }
        Record::Come => out.push(COME),
        Record::Seen => out.push(SEEN),
        Record::Canary { micros } => {
            out.push(CANARY);
            out.extend_from_slice(&micros.to_be_bytes());
        }
    }
    true
}

pub(crate) fn put_frame(out: &mut Vec<u8>, channel: &ChannelId, frame: &Frame) -> bool {
    let (number, name) = match channel {
        ChannelId::User(user) => (1, user.as_str()),
        ChannelId::Room(room) => (2, room.as_str()),
        ChannelId::Stream(_) => return false,
    };
    let Some((kind, _)) = KINDS.iter().find(|(_, kind)| *kind == frame.kind()) else { return false };
    let json = frame.json();
    let Ok(length) = u32::try_from(json.len()) else { return false };
    out.extend_from_slice(&[FRAME, *kind]);
    out.extend_from_slice(&frame.message_id().map_or(0, |id| id.as_u128()).to_be_bytes());
    out.push(number);
    put_text(out, name);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(json);
    true
}

/// Ends a message in which frames are traced: each by its place, and in their order. They are sampled, all of them.
pub(crate) fn put_traces(out: &mut Vec<u8>, traces: &[(u16, &TraceContext)]) {
    if traces.is_empty() {
        return;
    }
    let begin = out.len();
    out.push(TRACES);
    for (place, context) in traces {
        out.extend_from_slice(&place.to_be_bytes());
        out.extend_from_slice(&context.trace().get().to_be_bytes());
        out.extend_from_slice(&context.span().get().to_be_bytes());
        put_text(out, context.state());
    }
    // At most 65,536 of about 540 bytes.
    let length = u32::try_from(out.len() - begin + 4 + TRACES_END.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&TRACES_END);
}

/// Splits the traces off what follows a message's head. What is none stays: it is a record that nobody knows.
fn split_traces(rest: &[u8]) -> (&[u8], Vec<(u16, TraceContext)>) {
    let split = || {
        let before = rest.strip_suffix(&TRACES_END)?;
        let (before, length) = before.split_last_chunk()?;
        let begin = rest.len().checked_sub(u32::from_be_bytes(*length) as usize)?;
        let traces = traces(before.get(begin..)?).ok()?;
        Some((&rest[..begin], traces))
    };
    split().unwrap_or((rest, Vec::new()))
}

fn traces(mut rest: &[u8]) -> Result<Vec<(u16, TraceContext)>, Unreadable> {
    if number::<1>(&mut rest)? != [TRACES] || rest.is_empty() {
        return Err(Unreadable::Kind);
    }
    let mut traces: Vec<(u16, TraceContext)> = Vec::new();
    while !rest.is_empty() {
        let place = u16::from_be_bytes(number(&mut rest)?);
        let trace = NonZeroU128::new(u128::from_be_bytes(number(&mut rest)?)).ok_or(Unreadable::Text)?;
        let span = NonZeroU64::new(u64::from_be_bytes(number(&mut rest)?)).ok_or(Unreadable::Text)?;
        let state = text(&mut rest)?;
        if !is_state(state) || traces.last().is_some_and(|(last, _)| place <= *last) {
            return Err(Unreadable::Text);
        }
        traces.push((place, TraceContext::new(trace, span, true, state)));
    }
    Ok(traces)
}

/// Ids are at most 256 bytes.
fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn ending_number(ending: Disconnect) -> u8 {
    let place = Disconnect::ALL.iter().position(|other| *other == ending);
    place.and_then(|place| u8::try_from(place).ok()).unwrap_or_default()
}

/// A message as it came: its head, and its records one by one.
#[derive(Debug)]
pub(crate) struct Message<'m> {
    pub(crate) publisher: NodeName,
    pub(crate) number: Number,
    rest: &'m [u8],
    /// Of frames that were not read yet, in their order.
    traces: std::vec::IntoIter<(u16, TraceContext)>,
    /// Frames that were read.
    frames: usize,
}

impl<'m> Message<'m> {
    /// Reads the head.
    pub(crate) fn read(bytes: &'m [u8]) -> Result<Self, Unreadable> {
        let mut rest = bytes;
        let version = number::<1>(&mut rest)?[0];
        if version != VERSION {
            return Err(Unreadable::Version(version));
        }
        let publisher = NodeName(u64::from_be_bytes(number(&mut rest)?));
        let epoch = u32::from_be_bytes(number(&mut rest)?);
        let sequence = u64::from_be_bytes(number(&mut rest)?);
        let (rest, traces) = split_traces(rest);
        Ok(Self { publisher, number: (epoch, sequence), rest, traces: traces.into_iter(), frames: 0 })
    }

    /// The next record; None at the end. After an error there is nothing more to be had.
    pub(crate) fn next(&mut self) -> Option<Result<Record, Unreadable>> {
        if self.rest.is_empty() {
            return None;
        }
        let record = self.record();
        match &record {
            Ok(Record::Frame { .. }) => self.frames += 1,
            Ok(_) => {}
            Err(_) => self.rest = &[],
        }
        Some(record)
    }

    /// What traces the frame that was read last, once.
    pub(crate) fn take_trace(&mut self) -> Option<TraceContext> {
        let is_its = |(place, _): &(u16, TraceContext)| usize::from(*place) + 1 == self.frames;
        let is_next = self.traces.as_slice().first().is_some_and(is_its);
        if is_next { self.traces.next().map(|(_, context)| context) } else { None }
    }

    fn record(&mut self) -> Result<Record, Unreadable> {
        let rest = &mut self.rest;
        match number::<1>(rest)?[0] {
            FRAME => frame(rest),
            END => {
                let ending = usize::from(number::<1>(rest)?[0]);
                let ending = Disconnect::ALL.get(ending).copied().ok_or(Unreadable::Kind)?;
                let user = UserId::parse(text(rest)?).map_err(|_| Unreadable::Text)?;
                Ok(Record::End { user, ending })
            }
            COME => Ok(Record::Come),
            SEEN => Ok(Record::Seen),
            CANARY => Ok(Record::Canary { micros: u64::from_be_bytes(number(rest)?) }),
            _ => Err(Unreadable::Kind),
        }
    }
}

fn frame(rest: &mut &[u8]) -> Result<Record, Unreadable> {
    let kind = number::<1>(rest)?[0];
    let (_, kind) = KINDS.iter().find(|(number, _)| *number == kind).ok_or(Unreadable::Kind)?;
    let id = u128::from_be_bytes(number(rest)?);
    if id != 0 && *kind == Kind::Typing {
        return Err(Unreadable::Kind);
    }
    let id = (id != 0).then(|| MessageId::from_u128(id));
    let space = number::<1>(rest)?[0];
    let name = text(rest)?;
    let channel = match space {
        1 => UserId::parse(name).map(ChannelId::User),
        2 => RoomName::parse(name).map(ChannelId::Room),
        _ => return Err(Unreadable::Kind),
    };
    let channel = channel.map_err(|_| Unreadable::Text)?;
    let length = u32::from_be_bytes(number(rest)?);
    let json = simdutf8::basic::from_utf8(bytes(rest, length as usize)?).map_err(|_| Unreadable::Text)?;
    // A line feed would end an event stream's line; our own writer escapes it.
    if json.bytes().any(|byte| byte < b' ') || json.is_empty() {
        return Err(Unreadable::Text);
    }
    let frame = Frame::relay(*kind, id, Some(&channel), json);
    Ok(Record::Frame { channel, frame })
}

fn bytes<'m>(rest: &mut &'m [u8], count: usize) -> Result<&'m [u8], Unreadable> {
    let (taken, after) = rest.split_at_checked(count).ok_or(Unreadable::Short)?;
    *rest = after;
    Ok(taken)
}

fn number<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Unreadable> {
    bytes(rest, N)?.try_into().map_err(|_| Unreadable::Short)
}

fn text<'m>(rest: &mut &'m [u8]) -> Result<&'m str, Unreadable> {
    let length = u16::from_be_bytes(number(rest)?);
    std::str::from_utf8(bytes(rest, usize::from(length))?).map_err(|_| Unreadable::Text)
}

/// How long it is remembered what a publisher said last that is gone.
const GONE_TIME: Duration = Duration::from_secs(600);
/// Of so many at most, those that went last.
const GONE_MAX: usize = 1_024;

/// What is known of the messages of other publishers on one pub/sub channel.
#[derive(Debug, Default)]
pub(crate) struct Sequences {
    last: HashMap<NodeName, Number>,
    /// Since when publishers are gone of which it is remembered what they said last.
    gone: HashMap<NodeName, Instant>,
}

/// How a message follows the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Follows {
    /// It is the next, or the first of its publisher.
    Next,
    /// So many before it were lost.
    Gap(u64),
    /// It is the first that is heard of its publisher, and not the first that was said there.
    Late,
    /// Its publisher had given this side up, with what was on its way here, and begins anew.
    Anew,
    /// It was here before.
    Again,
}

impl Sequences {
    pub(crate) fn note(&mut self, publisher: NodeName, number: Number) -> Follows {
        let last = self.last.entry(publisher).or_insert((0, 0));
        if number <= *last {
            return Follows::Again;
        }
        let (epoch, sequence) = std::mem::replace(last, number);
        match number.1.saturating_sub(sequence) {
            late if epoch == 0 && late > 1 => Follows::Late,
            _ if epoch == 0 => Follows::Next,
            _ if number.0 != epoch => Follows::Anew,
            lost if lost > 1 => Follows::Gap(lost - 1),
            _ => Follows::Next,
        }
    }

    /// Forgets publishers that are gone, but not at once: one that was only thought to be goes on counting, and must not
    /// look as if all that it ever said before had been lost. Names are random: nobody else gets one that is remembered.
    pub(crate) fn keep(&mut self, is_live: impl Fn(NodeName) -> bool, now: Instant) {
        for publisher in self.last.keys() {
            if is_live(*publisher) {
                self.gone.remove(publisher);
            } else {
                self.gone.entry(*publisher).or_insert(now);
            }
        }
        self.gone.retain(|_, since| now.saturating_duration_since(*since) < GONE_TIME);
        while self.gone.len() > GONE_MAX {
            let Some(oldest) = self.gone.iter().min_by_key(|(_, since)| **since).map(|(name, _)| *name) else { break };
            self.gone.remove(&oldest);
        }
        let gone = &self.gone;
        self.last.retain(|publisher, _| is_live(*publisher) || gone.contains_key(publisher));
    }
}

/// For tests and fuzzers: whatever comes, a message is read to an end or refused; what was read is written as the same
/// again.
///
/// # Panics
/// If it is not.
#[doc(hidden)]
pub fn check(data: &[u8]) {
    let Ok(mut message) = Message::read(data) else { return };
    let mut again = Vec::new();
    begin(&mut again, message.publisher, message.number);
    let mut is_whole = true;
    let traces = message.traces.as_slice().to_vec();
    while let Some(record) = message.next() {
        match record {
            Ok(record) => assert!(put(&mut again, &record)),
            Err(_) => is_whole = false,
        }
    }
    if is_whole {
        put_traces(&mut again, &traces.iter().map(|(place, context)| (*place, context)).collect::<Vec<_>>());
    }
    assert_eq!(again, data[..again.len()]);
    assert_eq!(is_whole, again.len() == data.len());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::event::{EndReason, Event, Timestamp};

    fn records() -> Vec<Record> {
        let timestamp = Timestamp::from_micros(1_500_000);
        let user = ChannelId::parse("ünï").unwrap();
        let room = ChannelId::parse("room:r").unwrap();
        let id = MessageId::random();
        let events = [
            Event::Message { id, text: "a\n日\u{2028}", sender: "star", reply_to: None, timestamp },
            Event::Buttons { id, text: "b", sender: "star", reply_to: Some(id), buttons: &[], timestamp },
            Event::File { id, filename: "f", mimetype: "m/m", data: b"abc", timestamp },
            Event::Edit { id, text: "", timestamp },
            Event::Typing { active: true },
            Event::End { reason: EndReason::Stop },
        ];
        let mut records = Vec::new();
        for event in &events {
            for channel in [&user, &room] {
                records.push(Record::Frame { channel: channel.clone(), frame: Frame::encode_for(event, channel) });
            }
        }
        let user = UserId::parse("u").unwrap();
        records.push(Record::End { user, ending: Disconnect::Kicked });
        records.extend([Record::Come, Record::Seen, Record::Canary { micros: 7 }]);
        records
    }

    fn packed(records: &[Record]) -> Vec<u8> {
        let mut out = Vec::new();
        begin(&mut out, NodeName(5), (3, 9));
        assert!(records.iter().all(|record| put(&mut out, record)));
        out
    }

    #[test]
    fn what_was_packed_comes_out_again_with_every_form() {
        let records = records();
        let bytes = packed(&records);
        let mut message = Message::read(&bytes).unwrap();
        assert_eq!((message.publisher, message.number), (NodeName(5), (3, 9)));
        for record in &records {
            let read = message.next().unwrap().unwrap();
            match (record, &read) {
                (Record::Frame { channel, frame }, Record::Frame { channel: read_channel, frame: read_frame }) => {
                    assert_eq!((channel, frame.kind()), (read_channel, read_frame.kind()));
                    assert_eq!(frame.websocket(), read_frame.websocket());
                    assert_eq!(frame.event_stream(), read_frame.event_stream());
                    assert_eq!((frame.key(), frame.message_id()), (read_frame.key(), read_frame.message_id()));
                }
                (other, read) => assert_eq!(format!("{other:?}"), format!("{read:?}")),
            }
        }
        assert!(message.next().is_none());
        check(&bytes);
    }

    fn traced(state: &str) -> TraceContext {
        TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", state).unwrap()
    }

    #[test]
    fn traces_follow_their_frames_and_who_does_not_know_them_has_every_record_first() {
        let records = records();
        let plain = packed(&records);
        let mut bytes = plain.clone();
        let (first, last) = (traced(""), traced("a=1,b=\"2\\"));
        put_traces(&mut bytes, &[(0, &first), (11, &last)]);
        assert_eq!(bytes[..plain.len()], plain, "it is behind them");
        let mut message = Message::read(&bytes).unwrap();
        let mut found = Vec::new();
        while let Some(record) = message.next() {
            let is_frame = matches!(record.unwrap(), Record::Frame { .. });
            let trace = message.take_trace();
            assert!(is_frame || trace.is_none());
            found.push(trace);
        }
        let expected: Vec<_> = (0..records.len())
            .map(|place| match place {
                0 => Some(first.clone()),
                11 => Some(last.clone()),
                _ => None,
            })
            .collect();
        assert_eq!(found, expected);
        check(&bytes);
        // The same without what looks for it at the end.
        let mut old = Message { traces: Vec::new().into_iter(), rest: &bytes[21..], ..Message::read(&plain).unwrap() };
        let read: Vec<_> = std::iter::from_fn(|| old.next()).collect();
        assert_eq!(read.iter().filter(|record| record.is_ok()).count(), records.len());
        assert_eq!(read.last().unwrap().as_ref().unwrap_err(), &Unreadable::Kind);
    }

    #[test]
    fn traces_that_are_none_are_an_unknown_record() {
        let plain = packed(&records());
        let check_bad = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = plain.clone();
            put_traces(&mut bytes, &[(0, &traced("a=1")), (1, &traced(""))]);
            change(&mut bytes);
            let mut message = Message::read(&bytes).unwrap();
            let last = std::iter::from_fn(|| message.next()).last().unwrap();
            assert_eq!((last.unwrap_err(), message.take_trace()), (Unreadable::Kind, None));
            check(&bytes);
        };
        let begin = plain.len();
        // The second place is the first again; no trace; no span; a state with a control character; another length.
        check_bad(&|bytes| bytes[begin + 1 + 26 + 2 + 3 + 1] = 0);
        check_bad(&|bytes| bytes[begin + 3..begin + 19].fill(0));
        check_bad(&|bytes| bytes[begin + 19..begin + 27].fill(0));
        check_bad(&|bytes| bytes[begin + 29] = b'\n');
        check_bad(&|bytes| *bytes.iter_mut().rev().nth(8).unwrap() -= 1);
        check_bad(&|bytes| *bytes.last_mut().unwrap() = 0);
    }

    #[test]
    fn what_is_cut_or_changed_anywhere_is_refused_or_read_and_never_panics() {
        let mut bytes = packed(&records());
        put_traces(&mut bytes, &[(0, &traced("a=1")), (3, &traced(""))]);
        for end in 0..bytes.len() {
            check(&bytes[..end]);
        }
        for at in 0..bytes.len() {
            for change in [1, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] ^= change;
                check(&changed);
            }
        }
        assert_eq!(Message::read(&[2; 20]).unwrap_err(), Unreadable::Version(2));
        assert_eq!(Message::read(&[1; 20]).unwrap_err(), Unreadable::Short);
        let stream = ChannelId::parse("sse:r").unwrap();
        let record = Record::Frame { channel: stream, frame: Frame::ping() };
        assert!(!put(&mut Vec::new(), &record));
    }

    #[test]
    fn gaps_are_counted_and_doubles_are_known() {
        let mut sequences = Sequences::default();
        let (a, b) = (NodeName(1), NodeName(2));
        let steps = [
            (a, (1, 7), Follows::Late),
            (a, (1, 8), Follows::Next),
            (b, (1, 1), Follows::Next),
            (a, (1, 8), Follows::Again),
            (a, (1, 3), Follows::Again),
            (a, (1, 12), Follows::Gap(3)),
            (a, (1, 13), Follows::Next),
            (b, (1, 2), Follows::Next),
            (a, (4, 1), Follows::Anew),
            (a, (4, 3), Follows::Gap(1)),
            (a, (1, 14), Follows::Again),
        ];
        for (publisher, number, expected) in steps {
            assert_eq!(sequences.note(publisher, number), expected, "{publisher} {number:?}");
        }
    }

    #[test]
    fn a_publisher_that_was_thought_to_be_gone_goes_on_where_it_was_and_one_that_is_gone_is_forgotten() {
        let mut sequences = Sequences::default();
        let (a, b, begun) = (NodeName(1), NodeName(2), Instant::now());
        let after = |seconds| begun + Duration::from_secs(seconds);
        let only_b = |publisher| publisher == b;
        for publisher in [a, b] {
            assert_eq!(sequences.note(publisher, (1, 1)), Follows::Next);
        }
        sequences.keep(only_b, after(0));
        assert_eq!(sequences.note(a, (1, 2)), Follows::Next, "it never was");
        sequences.keep(|_| true, after(1));
        sequences.keep(only_b, after(599));
        sequences.keep(only_b, after(601));
        assert_eq!(sequences.note(a, (1, 4)), Follows::Gap(1), "its time began when it went again");
        sequences.keep(only_b, after(599 + 600));
        assert_eq!(sequences.note(a, (1, 1)), Follows::Next, "it is forgotten");
        assert_eq!(sequences.note(b, (1, 2)), Follows::Next);
        // However many come and go, those that went last are remembered, and no more.
        sequences.keep(only_b, after(1_200));
        for n in 0..GONE_MAX as u64 {
            let publisher = NodeName(10 + n);
            assert_eq!(sequences.note(publisher, (1, 1)), Follows::Next);
            sequences.keep(only_b, after(1_201));
        }
        assert_eq!((sequences.last.len(), sequences.gone.len()), (GONE_MAX + 1, GONE_MAX));
        assert_eq!(sequences.note(a, (1, 1)), Follows::Next, "the first that went is forgotten");
        assert_eq!(sequences.note(NodeName(10), (1, 2)), Follows::Next);
    }
}
