//! A backlog: what the readers of one channel can get again.
//!
//! It holds the last ordered frames and each message's latest edit, in the order of their posts. A position is the id
//! of the last ordered frame that a reader has. What stands behind a position is known only as long as nothing behind
//! it was let go: a replay is whole, or there is none.

use std::collections::VecDeque;
use std::time::Duration;

use smallvec::SmallVec;

use crate::id::MessageId;
use crate::proto::frame::{Class, Frame, Kind};

/// Frames that are to be dropped once no lock is held.
pub(crate) type Displaced = SmallVec<[Frame; 4]>;

/// How much one backlog holds, and in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) frames_max: usize,
    /// Of JSON.
    pub(crate) bytes_max: usize,
    pub(crate) edits: Edits,
}

/// Where a message's newest edit stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Edits {
    /// Where it was posted, so that whoever has a position before it gets it.
    Posted,
    /// Where the one before it stood, if its message does not come behind that: for what is only ever replayed whole.
    InPlace,
}

/// What stood right before the first frame that is held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Base {
    /// Nothing: all that was ever posted is here.
    #[default]
    Beginning,
    /// This ordered frame, and nothing behind it was let go.
    After(MessageId),
    /// A frame that no position names.
    Lost,
}

struct Kept {
    frame: Frame,
    /// The second at which it was posted.
    at: u64,
}

/// The last frames of one channel.
#[derive(Default)]
pub(crate) struct Backlog {
    kept: VecDeque<Kept>,
    /// Memory of the frames: each is held once here, however many sessions have it.
    bytes: usize,
    json_bytes: usize,
    base: Base,
}

fn memory(frame: &Frame) -> usize {
    frame.bytes() + size_of::<Kept>()
}

fn is_ordered(frame: &Frame) -> bool {
    frame.class() == Class::Ordered
}

impl Backlog {
    /// Whether a frame is one that a reader may want again.
    pub(crate) fn wants(kind: Kind) -> bool {
        matches!(kind, Kind::Message | Kind::Buttons | Kind::File | Kind::Edit | Kind::End)
    }

    /// Memory of the frames that it holds, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The second of the newest frame.
    pub(crate) fn newest(&self) -> Option<u64> {
        self.kept.back().map(|kept| kept.at)
    }

    /// Takes a frame in behind the others; of a message's edits only the newest is kept. Past a bound the oldest go.
    pub(crate) fn keep(&mut self, frame: &Frame, now: u64, bounds: Bounds, displaced: &mut Displaced) {
        if frame.kind() == Kind::Edit && self.replace_edit(frame, now, bounds.edits, displaced) {
            return self.keep_to(bounds.bytes_max, displaced);
        }
        // Room is made first, so that a full ring does not grow.
        while self.kept.len() >= bounds.frames_max.max(1) {
            self.let_go(displaced);
        }
        self.count_in(frame);
        self.kept.push_back(Kept { frame: frame.clone(), at: now });
        self.keep_to(bounds.bytes_max, displaced);
    }

    fn keep_to(&mut self, bytes_max: usize, displaced: &mut Displaced) {
        while self.json_bytes > bytes_max {
            self.let_go(displaced);
        }
    }

    fn count_in(&mut self, frame: &Frame) {
        self.bytes += memory(frame);
        self.json_bytes += frame.json().len();
    }

    fn count_out(&mut self, frame: &Frame) {
        self.bytes -= memory(frame);
        self.json_bytes -= frame.json().len();
    }

    /// True if the newer edit stands in the place of the older one; false if it is yet to be put behind the others.
    fn replace_edit(&mut self, newer: &Frame, now: u64, edits: Edits, displaced: &mut Displaced) -> bool {
        let is_older = |kept: &Kept| kept.frame.kind() == Kind::Edit && kept.frame.key() == newer.key();
        let Some(place) = self.kept.iter().rposition(is_older) else { return false };
        let is_early = self.kept.range(place + 1..).any(|behind| behind.frame.is_message_of(newer));
        let is_in_place = edits == Edits::InPlace && !is_early;
        let older = if is_in_place {
            Some(std::mem::replace(&mut self.kept[place], Kept { frame: newer.clone(), at: now }))
        } else {
            self.kept.remove(place)
        };
        if let Some(older) = older {
            self.count_out(&older.frame);
            displaced.push(older.frame);
        }
        if is_in_place {
            self.count_in(newer);
        }
        is_in_place
    }

    fn let_go(&mut self, displaced: &mut Displaced) {
        let Some(oldest) = self.kept.pop_front() else { return };
        self.count_out(&oldest.frame);
        let id = oldest.frame.message_id().filter(|_| is_ordered(&oldest.frame));
        self.base = id.map_or(Base::Lost, Base::After);
        displaced.push(oldest.frame);
    }

    /// Lets go what is older than `lifetime`, but for the newest ordered frame and what is behind it: whoever has that
    /// one has missed nothing, and should not be told otherwise because nothing was said for a while.
    pub(crate) fn expire(&mut self, now: u64, lifetime: Duration, displaced: &mut Displaced) {
        let tail = self.kept.iter().rposition(|kept| is_ordered(&kept.frame)).unwrap_or(0);
        for _ in 0..tail {
            if self.kept.front().is_some_and(|kept| kept.at.saturating_add(lifetime.as_secs()) > now) {
                return;
            }
            self.let_go(displaced);
        }
    }

    /// Lets everything go: nothing of it can be had again.
    pub(crate) fn lose(&mut self, displaced: &mut Displaced) {
        while !self.kept.is_empty() {
            self.let_go(displaced);
        }
        self.base = Base::Lost;
    }

    /// A frame that is too large to be held: nothing before it is of use, and what comes is behind it.
    pub(crate) fn keep_hole(&mut self, id: Option<MessageId>, displaced: &mut Displaced) {
        self.lose(displaced);
        self.base = id.map_or(Base::Lost, Base::After);
    }

    /// Everything behind a position; None if it is not known what that is.
    pub(crate) fn since(&self, position: MessageId) -> Option<Vec<Frame>> {
        let is_it = |kept: &Kept| is_ordered(&kept.frame) && kept.frame.message_id() == Some(position);
        let from = match self.kept.iter().rposition(is_it) {
            Some(place) => place + 1,
            None if self.base == Base::After(position) => 0,
            None => return None,
        };
        Some(self.kept.range(from..).map(|kept| kept.frame.clone()).collect())
    }

    /// Whether nothing was ever let go.
    pub(crate) fn is_whole(&self) -> bool {
        self.base == Base::Beginning
    }

    /// Everything from the beginning; None if some of it was let go.
    pub(crate) fn whole(&self) -> Option<Vec<Frame>> {
        self.is_whole().then(|| self.frames().cloned().collect())
    }

    /// What it holds, oldest first.
    pub(crate) fn frames(&self) -> impl Iterator<Item = &Frame> {
        self.kept.iter().map(|kept| &kept.frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::event::{Event, Timestamp};

    const BOUNDS: Bounds = Bounds { frames_max: 4, bytes_max: 1 << 20, edits: Edits::Posted };
    const TIME: Timestamp = Timestamp::from_micros(1);

    fn id(number: u8) -> MessageId {
        MessageId::parse(&format!("00000000-0000-4000-8000-0000000000{number:02x}")).unwrap()
    }

    fn message(number: u8) -> Frame {
        let text = "text";
        Frame::encode(&Event::Message { id: id(number), text, sender: "star", reply_to: None, timestamp: TIME })
    }

    fn edit(number: u8, text: &str) -> Frame {
        Frame::encode(&Event::Edit { id: id(number), text, timestamp: TIME })
    }

    /// A frame as the tests write it: `m1` is message 1, `e1` an edit of it.
    fn shown(frame: &Frame) -> String {
        let kind = if frame.kind() == Kind::Edit { 'e' } else { 'm' };
        let id = frame.message_id().unwrap().to_string();
        format!("{kind}{}", u8::from_str_radix(&id[34..], 16).unwrap())
    }

    fn backlog(steps: &str, bounds: Bounds) -> Backlog {
        let mut backlog = Backlog::default();
        for (at, step) in steps.split_whitespace().enumerate() {
            let number = step[1..].parse().unwrap();
            let frame = if step.starts_with('m') { message(number) } else { edit(number, "edited") };
            backlog.keep(&frame, at as u64, bounds, &mut Displaced::new());
        }
        backlog
    }

    fn since(backlog: &Backlog, position: u8) -> Option<String> {
        let frames = backlog.since(id(position))?;
        Some(frames.iter().map(shown).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn a_replay_is_whole_or_there_is_none() {
        let check = |steps: &str, position: u8, expected: Option<&str>| {
            assert_eq!(since(&backlog(steps, BOUNDS), position).as_deref(), expected, "{steps} after {position}");
        };
        check("m1 m2 m3", 1, Some("m2 m3"));
        check("m1 m2 m3", 3, Some(""));
        check("m1 m2 m3", 9, None);
        check("", 1, None);
        // Each message's latest edit, where it was posted, also of one that the reader had before its position.
        check("m1 e1 m2 e1 e2", 1, Some("m2 e1 e2"));
        check("m1 e1 m2 e1 e2", 2, Some("e1 e2"));
        check("m1 e1 e1 e1", 1, Some("e1"));
        // The one right before what is held is still known, one further back is not.
        check("m1 m2 m3 m4 m5", 1, Some("m2 m3 m4 m5"));
        check("m1 m2 m3 m4 m5 m6", 1, None);
        // An edit behind the position was let go: nobody may believe to have it.
        check("m1 e1 m2 m3 m4 m5", 1, None);
        check("m1 e1 m2 m3 m4 m5", 2, Some("m3 m4 m5"));
    }

    #[test]
    fn bytes_are_bounded_and_a_frame_that_is_too_large_leaves_its_position() {
        let bytes = message(1).json().len();
        let backlog = backlog("m1 m2 m3", Bounds { frames_max: 64, bytes_max: 2 * bytes, ..BOUNDS });
        let expected = (2 * bytes, 2 * memory(&message(1)));
        assert_eq!((backlog.json_bytes, backlog.bytes()), expected);
        assert_eq!(since(&backlog, 1).as_deref(), Some("m2 m3"));
        let mut small = Backlog::default();
        let bounds = Bounds { frames_max: 64, bytes_max: bytes - 1, ..BOUNDS };
        small.keep(&message(1), 0, bounds, &mut Displaced::new());
        assert_eq!((small.bytes(), since(&small, 1).as_deref()), (0, Some("")));
        assert!(small.whole().is_none());
    }

    #[test]
    fn age_takes_all_but_the_newest_message_and_its_edits() {
        let mut backlog = backlog("m1 e1 m2 e2", BOUNDS);
        backlog.expire(10, Duration::from_secs(10), &mut Displaced::new());
        assert_eq!(since(&backlog, 1).as_deref(), Some("e1 m2 e2"), "only the first was ten seconds old");
        backlog.expire(1_000, Duration::from_secs(10), &mut Displaced::new());
        assert_eq!(since(&backlog, 1), None);
        assert_eq!(since(&backlog, 2).as_deref(), Some("e2"));
        assert_eq!(backlog.newest(), Some(3));
    }

    #[test]
    fn a_whole_backlog_has_lost_nothing() {
        let all = |backlog: &Backlog| Some(backlog.whole()?.iter().map(shown).collect::<Vec<_>>().join(" "));
        assert_eq!(all(&backlog("", BOUNDS)).as_deref(), Some(""));
        assert_eq!(all(&backlog("m1 e1 e1 m2", BOUNDS)).as_deref(), Some("m1 e1 m2"));
        assert_eq!(all(&backlog("m1 m2 m3 m4 m5", BOUNDS)), None);
        // What is only replayed whole keeps each message's edit where the first one was.
        let in_place = Bounds { edits: Edits::InPlace, ..BOUNDS };
        assert_eq!(all(&backlog("m1 e1 m2 e1", in_place)).as_deref(), Some("m1 e1 m2"));
        assert_eq!(all(&backlog("m1 e1 m2 e1", BOUNDS)).as_deref(), Some("m1 m2 e1"));
        // One that came before its message gives its place up: no edit may be replayed in front of its message.
        assert_eq!(all(&backlog("e1 m1 e1 e1", in_place)).as_deref(), Some("m1 e1"));
        let bytes = backlog("m1 e1 m2 e1", in_place).bytes();
        assert_eq!(bytes, backlog("m1 e1 m2", in_place).bytes());
    }
}
