//! From Redis into the shards: at once where there is room, and otherwise in order behind what waits.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::broker::{Delivered, Peer, leaves_gap};
use crate::id::{ChannelId, UserId};
use crate::metrics::BrokerMetrics;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;
use crate::traces::Span;

/// How long inboxes that are full are left alone.
const PAUSE: Duration = Duration::from_millis(1);
/// Users and rooms that are told of a loss one by one, between two that came.
const LOSSES_MAX: usize = 64;
/// The ids of the last frames of streams, so that one that is said again is known.
const RECENT_MAX: usize = 16_384;

/// What came.
pub(crate) enum Arrival {
    Frame {
        channel: ChannelId,
        frame: Frame,
        span: Span,
    },
    End {
        user: UserId,
        ending: Disconnect,
    },
    /// Something before what comes next is lost.
    Loss(Loss),
}

/// What is lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Loss {
    /// Nobody knows to which room it was said.
    ToRooms,
    /// Nobody knows to which user it was said.
    ToUsers,
    /// To this user, or to this room.
    To(ChannelId),
}

impl Loss {
    /// What is told instead when there are too many of them.
    fn to_all(&self) -> Self {
        match self {
            Self::ToRooms | Self::To(ChannelId::Room(_)) => Self::ToRooms,
            Self::ToUsers | Self::To(_) => Self::ToUsers,
        }
    }
}

impl Arrival {
    fn bytes(&self) -> usize {
        let held = match self {
            Self::Frame { frame, span, .. } => frame.bytes() + span.bytes(),
            Self::Loss(Loss::To(channel)) => channel.key().len(),
            Self::End { .. } | Self::Loss(_) => 0,
        };
        size_of::<Self>() + held
    }

    /// What is lost if it is dropped, and has to be told.
    fn loss(&self) -> Option<Loss> {
        match self {
            Self::Frame { channel: ChannelId::Stream(_), .. } | Self::End { .. } => None,
            Self::Frame { channel, frame, .. } => leaves_gap(frame.kind()).then(|| Loss::To(channel.clone())),
            Self::Loss(loss) => Some(loss.clone()),
        }
    }
}

#[derive(Default)]
struct Waiting {
    arrivals: VecDeque<Arrival>,
    bytes: usize,
    /// Its first is being handed on: whoever comes now has to wait behind it.
    is_busy: bool,
}

impl Waiting {
    fn push(&mut self, arrival: Arrival) {
        self.bytes += arrival.bytes();
        self.arrivals.push_back(arrival);
    }

    /// Keeps in mind that something is lost in this place, whatever the bound: once each between two that came, and past
    /// [`LOSSES_MAX`] of them it was to anybody.
    fn note_loss(&mut self, loss: Loss) {
        let losses = self.arrivals.iter().rev().map_while(|arrival| match arrival {
            Arrival::Loss(loss) => Some(loss),
            Arrival::Frame { .. } | Arrival::End { .. } => None,
        });
        let all = loss.to_all();
        let mut count = 0;
        for noted in losses {
            if *noted == loss || *noted == all {
                return;
            }
            count += 1;
        }
        self.push(Arrival::Loss(if count < LOSSES_MAX { loss } else { all }));
    }
}

/// The queue in front of the shards' inboxes. It is empty as long as they have room.
pub(crate) struct Arrivals {
    waiting: Mutex<Waiting>,
    bytes_max: usize,
    bell: Notify,
    metrics: Arc<BrokerMetrics>,
    recent: Mutex<Recent>,
}

impl Arrivals {
    pub(crate) fn new(bytes_max: usize, metrics: Arc<BrokerMetrics>) -> Self {
        Self { waiting: Mutex::default(), bytes_max, bell: Notify::new(), metrics, recent: Mutex::default() }
    }

    /// Hands on what came, or keeps it in its place. Never waits. Past the bound it is dropped, counted, and told of.
    pub(crate) fn take(&self, peer: &dyn Peer, arrival: Arrival) {
        if matches!(arrival, Arrival::Frame { .. }) {
            self.metrics.received_frames.increment();
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.arrivals.is_empty() && !waiting.is_busy && hand_on(peer, &arrival) {
            return;
        }
        if let Arrival::Loss(loss) = arrival {
            waiting.note_loss(loss);
        } else if waiting.bytes > 0 && waiting.bytes + arrival.bytes() > self.bytes_max {
            self.metrics.dropped_frames.increment();
            if let Arrival::Frame { span, .. } = &arrival {
                span.done("dropped");
            }
            peer.count_refused();
            arrival.loss().into_iter().for_each(|loss| waiting.note_loss(loss));
        } else {
            waiting.push(arrival);
        }
        drop(waiting);
        self.bell.notify_one();
    }

    /// Hands on what waits, for ever. `peer` is None once the node is gone.
    ///
    /// # Cancel safety
    /// Dropping it loses at most the one that is being handed on.
    pub(crate) async fn run(&self, peer: impl Fn() -> Option<Arc<dyn Peer>>) {
        loop {
            let next = {
                let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                let next = waiting.arrivals.pop_front();
                waiting.is_busy = next.is_some();
                waiting.bytes -= next.as_ref().map_or(0, Arrival::bytes);
                next
            };
            let Some(arrival) = next else {
                self.bell.notified().await;
                continue;
            };
            loop {
                let Some(peer) = peer() else { return };
                if hand_on(&*peer, &arrival) {
                    break;
                }
                drop(peer);
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    /// Whether a frame of a stream was here a moment ago: its publisher did not know that.
    pub(crate) fn is_double(&self, channel: &ChannelId, frame: &Frame) -> bool {
        let Some(id) = frame.message_id() else { return false };
        if frame.class() != crate::proto::frame::Class::Ordered {
            return false;
        }
        let is_new = self.recent.lock().unwrap_or_else(PoisonError::into_inner).note((channel.clone(), id.as_u128()));
        if !is_new {
            self.metrics.doubled_messages.increment();
        }
        !is_new
    }
}

/// False if there is no room now.
fn hand_on(peer: &dyn Peer, arrival: &Arrival) -> bool {
    match arrival {
        Arrival::Frame { channel, frame, span } => {
            let delivered = peer.deliver(channel, frame);
            match delivered {
                Delivered::Taken => span.done("taken"),
                Delivered::Nobody => span.done("nobody"),
                Delivered::Full => {}
            }
            delivered != Delivered::Full
        }
        Arrival::End { user, ending } => peer.end_sessions(user, *ending),
        Arrival::Loss(Loss::ToRooms) => {
            peer.rooms_missed();
            true
        }
        Arrival::Loss(Loss::ToUsers) => {
            peer.users_missed();
            true
        }
        Arrival::Loss(Loss::To(channel)) => {
            peer.channel_missed(channel);
            true
        }
    }
}

/// The last names, each once.
#[derive(Default)]
struct Recent {
    names: HashSet<(ChannelId, u128)>,
    by_age: VecDeque<(ChannelId, u128)>,
}

impl Recent {
    /// False if it was noted before.
    fn note(&mut self, name: (ChannelId, u128)) -> bool {
        if !self.names.insert(name.clone()) {
            return false;
        }
        self.by_age.push_back(name);
        if self.by_age.len() > RECENT_MAX
            && let Some(oldest) = self.by_age.pop_front()
        {
            self.names.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{MessageId, RequestId};
    use crate::proto::event::{Event, Timestamp};

    /// Writes down what it is told, while it has room for frames.
    #[derive(Default)]
    struct Told {
        said: Mutex<Vec<String>>,
        has_room: std::sync::atomic::AtomicBool,
    }

    impl Told {
        fn note(&self, what: &str) {
            self.said.lock().unwrap().push(what.to_owned());
        }
    }

    impl Peer for Told {
        fn deliver(&self, _channel: &ChannelId, _frame: &Frame) -> Delivered {
            if !self.has_room.load(std::sync::atomic::Ordering::Relaxed) {
                return Delivered::Full;
            }
            self.note("frame");
            Delivered::Taken
        }
        fn count_refused(&self) {
            self.note("refused");
        }
        fn rooms_missed(&self) {
            self.note("rooms missed");
        }
        fn users_missed(&self) {
            self.note("users missed");
        }
        fn channel_missed(&self, channel: &ChannelId) {
            self.note(&format!("{} missed", channel.key()));
        }
        fn tabs(&self, _user: &UserId) -> usize {
            0
        }
        fn users(&self) -> Vec<UserId> {
            Vec::new()
        }
        fn end_sessions(&self, _user: &UserId, _ending: Disconnect) -> bool {
            true
        }
        fn has_stream(&self, _request: &RequestId) -> bool {
            false
        }
        fn forget_backlog(&self, _user: &UserId) {}
    }

    fn frame(channel: &str) -> Arrival {
        let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(1));
        let event = Event::Message { id, text: "text", sender: "star", reply_to: None, timestamp };
        let channel = ChannelId::parse(channel).unwrap();
        let frame = Frame::encode(&event);
        let span = Span::receive(None, &channel, &frame, 1);
        Arrival::Frame { channel, frame, span }
    }

    fn typing(channel: &str) -> Arrival {
        let channel = ChannelId::parse(channel).unwrap();
        let frame = Frame::encode_for(&Event::Typing { active: true }, &channel);
        let span = Span::receive(None, &channel, &frame, 1);
        Arrival::Frame { channel, frame, span }
    }

    #[tokio::test]
    async fn a_loss_is_told_in_its_place_also_of_what_found_no_room_here() {
        let (told, metrics) = (Arc::new(Told::default()), Arc::new(BrokerMetrics::default()));
        // Room for one frame.
        let arrivals = Arrivals::new(1, metrics);
        arrivals.take(&*told, Arrival::Loss(Loss::ToRooms));
        assert_eq!(*told.said.lock().unwrap(), ["rooms missed"], "nothing waits before it");
        arrivals.take(&*told, frame("ann"));
        arrivals.take(&*told, Arrival::Loss(Loss::ToUsers));
        for channel in ["ann", "room:den", "ann", "room:den", "sse:r"] {
            arrivals.take(&*told, frame(channel));
        }
        let waiting = || arrivals.waiting.lock().unwrap().arrivals.len();
        assert_eq!(waiting(), 3, "all users are told anyway, and of each room once");
        told.has_room.store(true, std::sync::atomic::Ordering::Relaxed);
        let peer = Arc::clone(&told);
        let all =
            tokio::time::timeout(Duration::from_millis(200), arrivals.run(move || Some(peer.clone() as Arc<dyn Peer>)));
        assert!(all.await.is_err(), "it runs for ever");
        let said = told.said.lock().unwrap();
        assert_eq!(said[6..], ["frame", "users missed", "den missed"], "{said:?}");
    }

    #[tokio::test]
    async fn for_want_of_room_only_those_are_told_whose_frames_were_dropped_and_all_only_past_a_bound() {
        let (told, metrics) = (Arc::new(Told::default()), Arc::new(BrokerMetrics::default()));
        let arrivals = Arrivals::new(1, metrics);
        arrivals.take(&*told, frame("first"));
        for n in 0..LOSSES_MAX {
            arrivals.take(&*told, frame(&format!("u{n}")));
            arrivals.take(&*told, frame(&format!("u{n}")));
        }
        let waiting = || arrivals.waiting.lock().unwrap().arrivals.len();
        assert_eq!(waiting(), 1 + LOSSES_MAX);
        for n in 0..1_000 {
            arrivals.take(&*told, frame(&format!("v{n}")));
        }
        assert_eq!(waiting(), 2 + LOSSES_MAX, "there is a bound");
        arrivals.take(&*told, typing("room:den"));
        assert_eq!(waiting(), 2 + LOSSES_MAX, "nobody misses a sign of typing");
        told.has_room.store(true, std::sync::atomic::Ordering::Relaxed);
        told.said.lock().unwrap().clear();
        let peer = Arc::clone(&told);
        let all =
            tokio::time::timeout(Duration::from_millis(200), arrivals.run(move || Some(peer.clone() as Arc<dyn Peer>)));
        assert!(all.await.is_err(), "it runs for ever");
        let said = told.said.lock().unwrap();
        let expected = (0..LOSSES_MAX).map(|n| format!("u{n} missed"));
        let expected: Vec<_> =
            ["frame".to_owned()].into_iter().chain(expected).chain(["users missed".to_owned()]).collect();
        assert_eq!(*said, expected);
    }
}
