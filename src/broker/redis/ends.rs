//! The two ends of packed messages: who said what so far, and, for simulators, a node's ends without Redis between them.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

use crate::broker::redis::keys::NodeName;
use crate::broker::redis::packed::{self, Follows, Message, Number, Record, Sequences, Unreadable};
use crate::id::{ChannelId, UserId};
use crate::metrics::BrokerMetrics;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;

/// A message that was not here before.
pub(crate) struct Opened<'m> {
    pub(crate) message: Message<'m>,
    /// Whether others before it never came.
    pub(crate) follows_gap: bool,
}

/// What is known of who said what.
#[derive(Default)]
pub(crate) struct Heard {
    own: Sequences,
    every: Sequences,
}

impl Heard {
    /// Opens a message to `me`, which came to this node alone or to every node. None: it is this node's own, or was here
    /// before. What was lost before it is counted.
    pub(crate) fn open<'m>(
        &mut self,
        me: NodeName,
        is_own: bool,
        payload: &'m [u8],
        metrics: &BrokerMetrics,
    ) -> Result<Option<Opened<'m>>, Unreadable> {
        let message = Message::read(payload)?;
        if message.publisher == me && !is_own {
            return Ok(None);
        }
        let sequences = if is_own { &mut self.own } else { &mut self.every };
        let is_lost = match sequences.note(message.publisher, message.number) {
            Follows::Next => false,
            // On the way to every node others may have heard what came before this one began to listen.
            Follows::Late if !is_own => false,
            Follows::Late | Follows::Anew => {
                metrics.lost_beginnings.increment();
                true
            }
            Follows::Gap(lost) => {
                metrics.lost_messages.add(lost);
                true
            }
            Follows::Again => {
                metrics.doubled_messages.increment();
                return Ok(None);
            }
        };
        // What a node says to itself is for nobody else.
        let follows_gap = is_lost && message.publisher != me;
        Ok(Some(Opened { message, follows_gap }))
    }

    /// Forgets publishers that have been gone for a while.
    pub(crate) fn keep(&mut self, is_live: impl Fn(NodeName) -> bool, now: Instant) {
        self.own.keep(&is_live, now);
        self.every.keep(is_live, now);
    }
}

/// What one node says to another.
#[doc(hidden)]
#[derive(Debug, Clone)]
pub enum Said {
    /// A frame for a user's or a room's sessions.
    Frame(ChannelId, Frame),
    /// The user's sessions end.
    End(UserId, Disconnect),
    /// What was said before never came: read, and never said.
    Missed,
}

/// A node as simulators use it: it packs what it says as the publisher does, and reads as the subscriber does.
#[doc(hidden)]
pub struct Ends {
    me: NodeName,
    heard: Mutex<Heard>,
    metrics: Arc<BrokerMetrics>,
}

impl Ends {
    /// A node of that name.
    #[must_use]
    pub fn new(name: u64) -> Self {
        Self { me: NodeName(name), heard: Mutex::default(), metrics: Arc::default() }
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &Arc<BrokerMetrics> {
        &self.metrics
    }

    /// One message with that epoch and sequence. What has no packed form, a stream's frame, is left out.
    #[must_use]
    pub fn pack(&self, number: Number, said: &[Said]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(512);
        packed::begin(&mut bytes, self.me, number);
        for said in said {
            let _ = match said {
                Said::Frame(channel, frame) => packed::put_frame(&mut bytes, channel, frame),
                Said::End(user, ending) => {
                    packed::put(&mut bytes, &Record::End { user: user.clone(), ending: *ending })
                }
                Said::Missed => false,
            };
        }
        bytes
    }

    /// Reads a message that came to this node alone, or to every node. One that was here before says nothing.
    #[must_use]
    pub fn unpack(&self, is_own: bool, bytes: &[u8]) -> Vec<Said> {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let Opened { message, follows_gap } = match heard.open(self.me, is_own, bytes, &self.metrics) {
            Ok(Some(opened)) => opened,
            Ok(None) => return Vec::new(),
            Err(_) => {
                self.metrics.unreadable_messages.increment();
                return Vec::new();
            }
        };
        drop(heard);
        let mut said = Vec::from_iter(follows_gap.then_some(Said::Missed));
        self.read_records(message, &mut said);
        said
    }

    fn read_records(&self, mut message: Message<'_>, said: &mut Vec<Said>) {
        while let Some(record) = message.next() {
            match record {
                Ok(Record::Frame { channel, frame }) => said.push(Said::Frame(channel, frame)),
                Ok(Record::End { user, ending }) => said.push(Said::End(user, ending)),
                Ok(Record::Come | Record::Seen | Record::Canary { .. }) => {}
                Err(_) => self.metrics.unreadable_messages.increment(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ME: NodeName = NodeName(1);

    fn message(publisher: NodeName, number: Number) -> Vec<u8> {
        let mut bytes = Vec::new();
        packed::begin(&mut bytes, publisher, number);
        assert!(packed::put(&mut bytes, &Record::Canary { micros: 1 }));
        bytes
    }

    fn follows_gap(
        heard: &mut Heard,
        is_own: bool,
        (publisher, number): (NodeName, Number),
        to: &BrokerMetrics,
    ) -> bool {
        let bytes = message(publisher, number);
        heard.open(ME, is_own, &bytes, to).unwrap().unwrap().follows_gap
    }

    #[test]
    fn a_hole_is_told_of_where_others_may_have_said_something_and_is_counted() {
        let (mut heard, metrics) = (Heard::default(), BrokerMetrics::default());
        let (other, late) = (NodeName(2), NodeName(3));
        let mut check = |is_own, publisher, number, expected: (bool, u64, u64)| {
            let is_told = follows_gap(&mut heard, is_own, (publisher, number), &metrics);
            let counted = (metrics.lost_messages.value(), metrics.lost_beginnings.value());
            assert_eq!((is_told, counted.0, counted.1), expected, "{publisher} {number:?}");
        };
        check(true, other, (1, 1), (false, 0, 0));
        check(true, other, (1, 4), (true, 2, 0));
        check(true, other, (2, 1), (true, 2, 1));
        check(true, late, (1, 5), (true, 2, 2));
        check(false, late, (1, 5), (false, 2, 2));
        // Canaries are for nobody else.
        check(true, ME, (1, 1), (false, 2, 2));
        check(true, ME, (1, 5), (false, 5, 2));
        check(true, ME, (2, 1), (false, 5, 3));
    }

    #[test]
    fn whoever_was_thought_to_be_gone_and_never_was_has_lost_nothing() {
        let (mut heard, metrics) = (Heard::default(), BrokerMetrics::default());
        let (other, begun) = (NodeName(2), Instant::now());
        for (sequence, seconds) in [(1, 0), (2, 10), (3, 300)] {
            for is_own in [true, false] {
                assert!(!follows_gap(&mut heard, is_own, (other, (1, sequence)), &metrics), "{sequence}");
            }
            heard.keep(|_| false, begun + Duration::from_secs(seconds));
        }
        assert_eq!((metrics.lost_messages.value(), metrics.lost_beginnings.value()), (0, 0));
    }
}
