//! The spool: what waits for Redis, bounded in bytes, in the order of its publishers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Notify, oneshot};

use crate::broker::redis::keys::NodeName;
use crate::broker::redis::packed::Record;
use crate::broker::{Kept, ReceiptWriter, SpoolFull};
use crate::id::{ChannelId, UserId};
use crate::metrics::{BrokerMetrics, SharedGauge};
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::Frame;
use crate::traces::Origin;

/// What an item costs beside its frame.
const ITEM_BYTES: usize = 192;

/// About what the answer to a question for what is kept has.
const KEPT_BYTES: usize = 64 << 10;

/// What the publisher has to do.
pub(crate) enum Item {
    /// A frame for whoever else has the channel's sessions.
    Frame(Arc<Parcel>),
    /// The user's sessions end on every other node that has some.
    End { user: UserId, ending: Disconnect, told: oneshot::Sender<usize> },
    /// A record for one node, or for all.
    Tell { to: Destination, record: Record },
    /// Reads what is kept of a user's frames, behind all that is before it here.
    Kept { user: UserId, answer: Option<oneshot::Sender<Kept>> },
}

/// Where packed messages go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Destination {
    EveryNode,
    Node(NodeName),
}

/// A frame on its way, until the last node that it is for has taken it or is gone. Dropped, it frees its room and
/// tells how many did.
pub(crate) struct Parcel {
    pub(crate) channel: ChannelId,
    pub(crate) frame: Frame,
    /// The publish that it is of.
    pub(crate) origin: Origin,
    receipt: ReceiptWriter,
    /// The spool's, shared by itself: a parcel that held the spool which it waits in would keep both for ever.
    waiting_bytes: Arc<SharedGauge>,
}

impl Parcel {
    /// So many nodes have taken it.
    pub(crate) fn reach(&self, nodes: usize) {
        self.receipt.add(nodes);
    }

    fn bytes(&self) -> usize {
        self.frame.bytes() + self.origin.bytes() + ITEM_BYTES
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        self.waiting_bytes.lower(self.bytes() as u64);
    }
}

/// Takes items from any thread, for the one publisher.
pub(crate) struct Spool {
    items: Mutex<VecDeque<Item>>,
    bytes_max: usize,
    bell: Notify,
    metrics: Arc<BrokerMetrics>,
}

impl Spool {
    pub(crate) fn new(bytes_max: usize, metrics: Arc<BrokerMetrics>) -> Arc<Self> {
        Arc::new(Self { items: Mutex::default(), bytes_max, bell: Notify::new(), metrics })
    }

    /// Takes a frame in, of the publish that this thread is in. An empty spool takes any.
    pub(crate) fn push_frame(
        &self,
        channel: &ChannelId,
        frame: &Frame,
        receipt: ReceiptWriter,
    ) -> Result<(), SpoolFull> {
        let origin = Origin::current();
        let bytes = (frame.bytes() + origin.bytes() + ITEM_BYTES) as u64;
        let waiting_bytes = Arc::clone(&self.metrics.spool_bytes);
        let before = waiting_bytes.raise(bytes);
        if before > 0 && before + bytes > self.bytes_max as u64 {
            waiting_bytes.lower(bytes);
            self.metrics.refused_frames.increment();
            return Err(SpoolFull);
        }
        let parcel = Parcel { channel: channel.clone(), frame: frame.clone(), origin, receipt, waiting_bytes };
        self.push(Item::Frame(Arc::new(parcel)));
        Ok(())
    }

    /// Takes in what is bounded otherwise: by requests, nodes or seconds.
    pub(crate) fn push(&self, item: Item) {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = items.is_empty();
        items.push_back(item);
        drop(items);
        if was_empty {
            self.bell.notify_one();
        }
    }

    /// Bytes of all frames that are not done.
    pub(crate) fn bytes(&self) -> u64 {
        self.metrics.spool_bytes.value()
    }

    /// Moves up to `items_max` items behind those of `out`, and no more once they have `bytes_max` bytes.
    pub(crate) fn take(&self, out: &mut Vec<Item>, items_max: usize, bytes_max: usize) {
        let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = 0;
        while out.len() < items_max && bytes < bytes_max {
            let Some(item) = items.pop_front() else { return };
            bytes += match &item {
                Item::Frame(parcel) => parcel.bytes(),
                // Its answer is as large as all that is kept of a user.
                Item::Kept { .. } => KEPT_BYTES,
                Item::End { .. } | Item::Tell { .. } => ITEM_BYTES,
            };
            out.push(item);
        }
    }

    /// Whether nothing waits to be taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.items.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Waits for an item.
    ///
    /// # Cancel safety
    /// Dropping it loses none.
    pub(crate) async fn wait(&self) {
        while self.is_empty() {
            self.bell.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::broker::Receipt;

    #[test]
    fn a_spool_is_bounded_and_a_receipt_tells_when_the_last_handle_goes() {
        let metrics = Arc::new(BrokerMetrics::default());
        let frame = Frame::ping();
        let spool = Spool::new(2 * (frame.bytes() + ITEM_BYTES), Arc::clone(&metrics));
        let channel = ChannelId::parse("u").unwrap();
        let (sender, mut receipt) = Receipt::new();
        assert_eq!(spool.push_frame(&channel, &frame, sender), Ok(()));
        assert_eq!(spool.push_frame(&channel, &frame, Receipt::new().0), Ok(()));
        assert_eq!(spool.push_frame(&channel, &frame, Receipt::new().0), Err(SpoolFull));
        assert_eq!(metrics.refused_frames.value(), 1);
        // Told although nobody has taken any of it, and no more than may wait.
        assert_eq!(metrics.spool_bytes.value(), 2 * (frame.bytes() + ITEM_BYTES) as u64);
        let mut out = Vec::new();
        spool.take(&mut out, 1, usize::MAX);
        let Some(Item::Frame(parcel)) = out.pop() else { panic!() };
        assert_eq!(spool.push_frame(&channel, &frame, Receipt::new().0), Err(SpoolFull), "it is not done yet");
        let other = Arc::clone(&parcel);
        parcel.reach(1);
        other.reach(2);
        drop(parcel);
        assert!((&mut receipt).now_or_never().is_none());
        assert_eq!(receipt.so_far(), 3);
        drop(other);
        assert_eq!(receipt.now_or_never(), Some(3));
        assert_eq!(spool.push_frame(&channel, &frame, Receipt::new().0), Ok(()));
        spool.take(&mut out, 9, usize::MAX);
        out.clear();
        assert_eq!((spool.bytes(), metrics.spool_bytes.value(), spool.is_empty()), (0, 0, true));
        // A frame that is larger than all that may wait still has to go.
        let spool = Spool::new(1, metrics);
        assert_eq!(spool.push_frame(&channel, &frame, Receipt::new().0), Ok(()));
    }

    #[test]
    fn a_spool_that_is_dropped_takes_what_waits_in_it_along() {
        let metrics = Arc::new(BrokerMetrics::default());
        let spool = Spool::new(1 << 20, Arc::clone(&metrics));
        let channel = ChannelId::parse("u").unwrap();
        let (sender, receipt) = Receipt::new();
        assert_eq!(spool.push_frame(&channel, &Frame::ping(), sender), Ok(()));
        drop(spool);
        assert_eq!(receipt.now_or_never(), Some(0), "its receipt is told");
        assert_eq!(Arc::strong_count(&metrics), 1);
    }
}
