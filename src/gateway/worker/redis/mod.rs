//! Workers on streams of Redis: what people write is appended to one stream, and what workers answer is read from
//! another.
//!
//! Both ways an entry has one field `e`, an [`envelope`]. Inbound an entry is appended at least once: a worker tells a
//! repeat by `message_id`. Outbound it is handled at least once, by one node at a time, in the order of the stream; a
//! repeat by a worker is told by `message_key`, and one after a crash has the same message id, but for files: their ids
//! are nobody's to guess.

mod acks;
mod entries;
pub mod envelope;
pub(crate) mod hand_off;
pub(crate) mod inbound;
mod lease;
mod outbound;
mod reader;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tokio::sync::watch;

use crate::broker::redis::link::Endpoint;
use crate::config::EnvelopeForm;
use crate::gateway::worker::redis::hand_off::HandOff;
use crate::gateway::worker::redis::inbound::Appender;
use crate::gateway::worker::redis::outbound::Consumer;
use crate::metrics::Metrics;
use crate::platform::adapter::BoxFuture;

/// Which streams, and how much of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StreamSettings {
    /// The stream that workers read.
    pub(crate) inbound_stream: String,
    /// Their group, which is made if it is not there.
    pub(crate) inbound_group: String,
    /// The stream that workers write. With a brace in it that is part of no hash tag it has no place in a cluster.
    pub(crate) outbound_stream: String,
    /// The gateways' group.
    pub(crate) outbound_group: String,
    /// About how many entries a stream keeps (MAXLEN ~); of the outbound one, those that are not acknowledged stay.
    pub(crate) entries_max: usize,
    /// How inbound envelopes are written.
    pub(crate) form: EnvelopeForm,
    /// Bytes of an outbound envelope; a larger one is set aside. It is held several times over while it is handled.
    pub(crate) entry_bytes_max: usize,
    /// This process: no other has the same.
    pub(crate) node: String,
}

/// What [`start`] gives. The futures are to be spawned; each ends some time after the shutdown was announced.
pub(crate) struct Streams {
    /// Where messages for workers go in.
    pub(crate) appender: Arc<Appender>,
    /// Sends them to Redis. At shutdown what waits is still sent, each message within its time.
    pub(crate) appending: BoxFuture<'static, ()>,
    /// Reads what workers answer, whenever it is this node's turn. At shutdown it gives its turn back at once.
    pub(crate) consuming: BoxFuture<'static, ()>,
}

/// When each way ends: announced by `true`, or by dropping its sender.
#[derive(Debug, Clone)]
pub(crate) struct Shutdown {
    /// From then on another node reads what workers answer.
    pub(crate) consuming: watch::Receiver<bool>,
    /// From then on nothing is taken for workers any more.
    pub(crate) appending: watch::Receiver<bool>,
}

/// Makes both ways. Nothing is connected before the futures run.
pub(crate) fn start(
    endpoint: &Endpoint,
    settings: StreamSettings,
    hand_off: Arc<dyn HandOff>,
    metrics: &Arc<Metrics>,
    shutdown: Shutdown,
) -> Streams {
    let Shutdown { consuming, appending } = shutdown;
    let (appender, appending) = inbound::appender(endpoint, &settings, Arc::clone(metrics), appending);
    let consumer = Consumer::new(endpoint, settings, hand_off, Arc::clone(metrics), consuming);
    Streams { appender: Arc::new(appender), appending: Box::pin(appending.run()), consuming: Box::pin(consumer.run()) }
}

/// A key in the same slot of a cluster as the stream.
fn beside(stream: &str, what: &str) -> String {
    let has_tag =
        stream.split_once('{').and_then(|(_, rest)| rest.split_once('}')).is_some_and(|(tag, _)| !tag.is_empty());
    if has_tag { format!("{stream}:{what}") } else { format!("{{{stream}}}:{what}") }
}

/// Waits for the shutdown.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // An error is a dropped sender: nobody could announce it any more.
    drop(shutdown.wait_for(|is_stopping| *is_stopping).await);
}

/// Whether the shutdown was announced.
fn is_stopping(shutdown: &watch::Receiver<bool>) -> bool {
    *shutdown.borrow() || shutdown.has_changed().is_err()
}
