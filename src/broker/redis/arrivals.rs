//! From Redis into the shards: at once where there is room, and otherwise in order behind what waits.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::broker::{Delivered, Peer};
use crate::id::{ChannelId, UserId};
use crate::metrics::BrokerMetrics;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;
use crate::traces::Span;

/// How long inboxes that are full are left alone.
const PAUSE: Duration = Duration::from_millis(1);
/// The ids of the last frames of streams, so that one that is said again is known.
const RECENT_MAX: usize = 16_384;

/// What came.
pub(crate) enum Arrival {
    Frame { channel: ChannelId, frame: Frame, span: Span },
    End { user: UserId, ending: Disconnect },
}

impl Arrival {
    fn bytes(&self) -> usize {
        let held = if let Self::Frame { frame, span, .. } = self { frame.bytes() + span.bytes() } else { 0 };
        size_of::<Self>() + held
    }
}

#[derive(Default)]
struct Waiting {
    arrivals: VecDeque<Arrival>,
    bytes: usize,
    /// Its first is being handed on: whoever comes now has to wait behind it.
    is_busy: bool,
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

    /// Hands on what came, or keeps it in its place. Never waits. Past the bound it is dropped, and counted.
    pub(crate) fn take(&self, peer: &dyn Peer, arrival: Arrival) {
        if matches!(arrival, Arrival::Frame { .. }) {
            self.metrics.received_frames.increment();
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.arrivals.is_empty() && !waiting.is_busy && hand_on(peer, &arrival) {
            return;
        }
        let bytes = arrival.bytes();
        if waiting.bytes > 0 && waiting.bytes + bytes > self.bytes_max {
            self.metrics.dropped_frames.increment();
            if let Arrival::Frame { span, .. } = &arrival {
                span.done("dropped");
            }
            peer.count_refused();
            return;
        }
        waiting.bytes += bytes;
        waiting.arrivals.push_back(arrival);
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
