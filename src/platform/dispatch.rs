//! Between the tabs and a worker: one bounded queue, order kept within a channel, channels side by side.
//!
//! [`dispatch`] gives two ends. Messages go in at the [`Inlet`], which never waits. The [`Runner`] gives out
//! [`Lane`]s: futures that each handle the messages of one channel, one after the other. Whoever holds the runner
//! decides what runs them; nothing here names a runtime.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use event_listener::Event;

use crate::platform::adapter::{MessageHandler, PlatformAdapter};
use crate::platform::message::IncomingMessage;
use crate::proto::event::ErrorCode;

/// How much may wait for a worker. All counts are of messages that were accepted and are not yet handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DispatchLimits {
    /// Messages. Default 1,024.
    pub messages_max: usize,
    /// Bytes of them all. Default 64 MiB, and that is what it may cost. An empty queue admits any message.
    pub bytes_max: usize,
    /// Messages of one channel, so that one flood does not take everybody's room. Default 128.
    pub channel_messages_max: usize,
    /// Channels that are handled at once. Default 1,024; each costs the future of one handler.
    pub lanes_max: usize,
}

impl Default for DispatchLimits {
    fn default() -> Self {
        Self { messages_max: 1024, bytes_max: 64 << 20, channel_messages_max: 128, lanes_max: 1024 }
    }
}

/// Why a message was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// The worker has too much to do: nothing was accepted, try again later.
    #[error("the worker's queue is full; nothing was accepted, try again later")]
    Full,
    /// This channel has too much to do, others have not.
    #[error("too many messages of this channel wait for the worker; nothing was accepted, try again later")]
    ChannelFull,
    /// [`Inlet::close`] was called.
    #[error("the gateway is shutting down; nothing was accepted")]
    Closed,
}

impl Refused {
    /// What the client is told.
    #[must_use]
    pub const fn code(self) -> ErrorCode {
        match self {
            Self::Full | Self::ChannelFull => ErrorCode::Overloaded,
            Self::Closed => ErrorCode::Draining,
        }
    }
}

/// How many messages there were and are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DispatchCounts {
    /// Accepted since the start.
    pub accepted: u64,
    /// Refused since the start.
    pub refused: u64,
    /// Accepted and not yet handled.
    pub pending: usize,
    /// Their bytes.
    pub pending_bytes: usize,
}

/// Makes the two ends of a worker's queue.
///
/// ```
/// # use std::sync::Arc;
/// # use tabcast::platform::adapter::{MessageHandler, PlatformAdapter};
/// use tabcast::platform::dispatch::{DispatchLimits, Inlet, dispatch};
///
/// /// The queue, and what runs every lane on a task of its own.
/// fn start(handler: Arc<dyn MessageHandler>, bot: Arc<dyn PlatformAdapter>) -> (Inlet, impl Future<Output = ()>) {
///     let (inlet, mut runner) = dispatch(handler, bot, DispatchLimits::default());
///     let running = async move {
///         let mut lanes = tokio::task::JoinSet::new();
///         while let Some(lane) = runner.next().await {
///             while lanes.try_join_next().is_some() {}
///             lanes.spawn(lane.run());
///         }
///     };
///     (inlet, running)
/// }
/// ```
pub fn dispatch(
    handler: Arc<dyn MessageHandler>,
    adapter: Arc<dyn PlatformAdapter>,
    limits: DispatchLimits,
) -> (Inlet, Runner) {
    let state = State {
        channels: HashMap::new(),
        ready: VecDeque::new(),
        counts: DispatchCounts::default(),
        lanes: 0,
        is_closed: false,
        is_ended: false,
        runner: None,
    };
    let shared = Arc::new(Shared { handler, adapter, limits, state: Mutex::new(state), drained: Event::new() });
    (Inlet { shared: Arc::clone(&shared) }, Runner { shared })
}

struct Shared {
    handler: Arc<dyn MessageHandler>,
    adapter: Arc<dyn PlatformAdapter>,
    limits: DispatchLimits,
    state: Mutex<State>,
    /// Rung when nothing is pending.
    drained: Event,
}

struct State {
    /// Messages that wait. A channel is here while it is in `ready` or has a lane.
    channels: HashMap<String, VecDeque<IncomingMessage>>,
    /// Channels that wait for a lane.
    ready: VecDeque<String>,
    counts: DispatchCounts,
    lanes: usize,
    is_closed: bool,
    /// No cancel follows either.
    is_ended: bool,
    runner: Option<Waker>,
}

impl Shared {
    /// No code that can panic runs under the lock, so a poisoned state is still whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a message's time in the queue, and tells those who wait for the last one.
    fn settle(&self, bytes: usize) {
        let mut state = self.state();
        state.counts.pending -= 1;
        state.counts.pending_bytes -= bytes;
        if state.counts.pending == 0 {
            let waker = state.runner.take();
            drop(state);
            waker.inspect(Waker::wake_by_ref);
            self.drained.notify(usize::MAX);
        }
    }
}

/// Where messages go in. Clones are the same queue.
#[derive(Clone)]
pub struct Inlet {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Inlet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inlet").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

impl Inlet {
    /// Accepts a message, or says at once why not. An accepted one is handed to the handler after all that its
    /// channel had before it.
    ///
    /// # Errors
    /// A bound of [`DispatchLimits`] is reached, or the inlet was closed. The message is dropped.
    pub fn try_accept(&self, message: IncomingMessage) -> Result<(), Refused> {
        self.reserve(&message).map(|place| place.hand_on(message))
    }

    /// Takes a place for a message, which is then accepted for certain: so that its sender can be told, and its echo
    /// sent, before the worker sees it.
    ///
    /// # Errors
    /// A bound of [`DispatchLimits`] is reached, or the inlet was closed.
    pub fn reserve(&self, message: &IncomingMessage) -> Result<Place, Refused> {
        let (limits, bytes) = (&self.shared.limits, message.bytes());
        let mut state = self.shared.state();
        let waiting = state.channels.get(&*message.lane()).map_or(0, VecDeque::len);
        let is_over = state.counts.pending > 0 && state.counts.pending_bytes + bytes > limits.bytes_max;
        let refused = if state.is_closed {
            Some(Refused::Closed)
        } else if state.counts.pending >= limits.messages_max || is_over {
            Some(Refused::Full)
        } else if waiting >= limits.channel_messages_max {
            Some(Refused::ChannelFull)
        } else {
            None
        };
        if let Some(refused) = refused {
            state.counts.refused += 1;
            return Err(refused);
        }
        Ok(self.take_place(&mut state, bytes))
    }

    fn take_place(&self, state: &mut State, bytes: usize) -> Place {
        state.counts.accepted += 1;
        state.counts.pending += 1;
        state.counts.pending_bytes += bytes;
        Place { shared: Some(Arc::clone(&self.shared)), bytes }
    }

    /// Tells the worker that nobody waits for a request any more: what it was not given yet it never gets, and of what
    /// it has it is told by `cancel`, also when the queue is full or closed. There is one cancel for a request, so that
    /// requests bound them.
    pub fn cancel(&self, cancel: IncomingMessage) {
        let mut state = self.shared.state();
        let waiting = state.channels.get_mut(&cancel.channel_id).map(std::mem::take).unwrap_or_default();
        if waiting.is_empty() {
            if state.is_ended {
                return;
            }
            let place = self.take_place(&mut state, cancel.bytes());
            drop(state);
            return place.hand_on(cancel);
        }
        drop(state);
        for message in waiting {
            self.shared.settle(message.bytes());
        }
    }

    /// Accepts nothing more. What was accepted is still handled. Idempotent.
    pub fn close(&self) {
        let mut state = self.shared.state();
        state.is_closed = true;
        let waker = state.runner.take();
        drop(state);
        waker.inspect(Waker::wake_by_ref);
    }

    /// Accepts no cancels either: the runner leaves once all is handled. Idempotent.
    pub fn end(&self) {
        self.close();
        let mut state = self.shared.state();
        state.is_ended = true;
        let waker = state.runner.take();
        drop(state);
        waker.inspect(Waker::wake_by_ref);
    }

    /// Waits until everything that was accepted has been handled. Put it under a deadline: a handler may hang.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing.
    pub async fn drained(&self) {
        loop {
            let listener = self.shared.drained.listen();
            if self.counts().pending == 0 {
                return;
            }
            listener.await;
        }
    }

    /// How many messages there were and are.
    #[must_use]
    pub fn counts(&self) -> DispatchCounts {
        self.shared.state().counts
    }
}

/// A place in the worker's queue. Dropped unused, it is free again.
#[must_use]
pub struct Place {
    shared: Option<Arc<Shared>>,
    bytes: usize,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Place {
    /// Hands the message on that the place was taken for.
    pub fn hand_on(mut self, message: IncomingMessage) {
        // From here on it is the lane that ends the message's time in the queue.
        let Some(shared) = self.shared.take() else { return };
        let mut state = shared.state();
        let lane = message.lane().into_owned();
        if let Some(queue) = state.channels.get_mut(&lane) {
            queue.push_back(message);
            return;
        }
        state.ready.push_back(lane.clone());
        state.channels.insert(lane, VecDeque::from([message]));
        let waker = state.runner.take();
        drop(state);
        waker.inspect(Waker::wake_by_ref);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            shared.settle(self.bytes);
        }
    }
}

/// Gives out the lanes. Dropping it leaves what waits unhandled.
pub struct Runner {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").finish_non_exhaustive()
    }
}

impl Runner {
    /// Waits for a channel that has messages and no lane. `None` once the inlet has ended and all is handled.
    ///
    /// # Cancel safety
    /// Dropping the future loses no lane.
    pub async fn next(&mut self) -> Option<Lane> {
        poll_fn(|context| {
            let mut state = self.shared.state();
            if state.is_ended && state.counts.pending == 0 {
                return Poll::Ready(None);
            }
            if state.lanes < self.shared.limits.lanes_max
                && let Some(channel) = state.ready.pop_front()
            {
                state.lanes += 1;
                return Poll::Ready(Some(Lane { shared: Arc::clone(&self.shared), channel, is_empty: false }));
            }
            state.runner = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// The messages of one channel, from the first that waits until none does. Dropped early, it loses the one that it was
/// handling; the others wait for the next lane.
pub struct Lane {
    shared: Arc<Shared>,
    channel: String,
    is_empty: bool,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("channel", &self.channel).finish_non_exhaustive()
    }
}

impl Lane {
    /// Handles the messages in order, each after the one before it is done.
    pub async fn run(mut self) {
        while let Some(message) = self.pop() {
            let pending = Pending { shared: Arc::clone(&self.shared), bytes: message.bytes() };
            self.shared.handler.handle(message, Arc::clone(&self.shared.adapter)).await;
            drop(pending);
        }
    }

    /// The next message; with the last one the channel's entry goes, under the same lock.
    fn pop(&mut self) -> Option<IncomingMessage> {
        let mut state = self.shared.state();
        let message = state.channels.get_mut(&self.channel).and_then(VecDeque::pop_front);
        if message.is_none() {
            state.channels.remove(&self.channel);
            self.is_empty = true;
        }
        message
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.lanes -= 1;
        if !self.is_empty {
            if state.channels.get(&self.channel).is_some_and(|queue| !queue.is_empty()) {
                state.ready.push_back(std::mem::take(&mut self.channel));
            } else {
                state.channels.remove(&self.channel);
            }
        }
        let waker = state.runner.take();
        drop(state);
        waker.inspect(Waker::wake_by_ref);
    }
}

/// A message that is being handled. Dropped when that is done, also if the handler panics.
struct Pending {
    shared: Arc<Shared>,
    bytes: usize,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.shared.settle(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::platform::adapter::BotIdentity;
    use crate::platform::message::Attachment;
    use crate::platform::recording::Recorder;
    use crate::platform::webchat::WebChat;
    use crate::proto::event::Timestamp;

    fn message(channel: &str, text: &str) -> IncomingMessage {
        IncomingMessage::new(channel.to_owned(), "u", text.to_owned(), Timestamp::from_micros(0))
    }

    /// A handler that finishes a message for each permit, and what it has begun.
    struct Bench {
        inlet: Inlet,
        runner: Runner,
        permits: Arc<Semaphore>,
        begun: Arc<Mutex<Vec<String>>>,
        lanes: Vec<BoxFuture<'static, ()>>,
    }

    fn bench(limits: DispatchLimits) -> Bench {
        let (permits, begun) = (Arc::new(Semaphore::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (gate, log) = (Arc::clone(&permits), Arc::clone(&begun));
        let handler = move |message: IncomingMessage, _adapter: Arc<dyn PlatformAdapter>| {
            let (gate, log) = (Arc::clone(&gate), Arc::clone(&log));
            async move {
                log.lock().unwrap().push(message.text);
                gate.acquire().await.unwrap().forget();
            }
        };
        let chat = Arc::new(WebChat::new(Arc::new(Recorder::default()), BotIdentity::default()));
        let (inlet, runner) = dispatch(Arc::new(handler), chat, limits);
        Bench { inlet, runner, permits, begun, lanes: Vec::new() }
    }

    impl Bench {
        /// Takes all lanes there are and polls everything once; says what was begun.
        fn turn(&mut self) -> String {
            while let Some(Some(lane)) = self.runner.next().now_or_never() {
                self.lanes.push(lane.run().boxed());
            }
            self.lanes.retain_mut(|lane| lane.now_or_never().is_none());
            std::mem::take(&mut *self.begun.lock().unwrap()).join(" ")
        }

        fn accept(&self, channel: &str, text: &str) -> Result<(), Refused> {
            self.inlet.try_accept(message(channel, text))
        }
    }

    #[test]
    fn order_is_kept_within_a_channel_and_channels_run_side_by_side() {
        let mut bench = bench(DispatchLimits::default());
        for (channel, text) in [("a", "a1"), ("a", "a2"), ("b", "b1"), ("a", "a3")] {
            assert_eq!(bench.accept(channel, text), Ok(()));
        }
        assert_eq!(bench.turn(), "a1 b1");
        assert_eq!(bench.turn(), "", "the next one waits for the one before it");
        bench.permits.add_permits(1);
        assert_eq!(bench.turn(), "a2");
        bench.permits.add_permits(9);
        assert_eq!(bench.turn(), "a3");
        assert_eq!(bench.inlet.counts(), DispatchCounts { accepted: 4, ..DispatchCounts::default() });
        assert!(bench.lanes.is_empty() && bench.inlet.shared.state().channels.is_empty());
        assert_eq!(bench.accept("a", "a4"), Ok(()));
        assert_eq!(bench.turn(), "a4");
    }

    #[test]
    fn a_cancel_takes_back_what_waits_and_overtakes_what_is_being_handled() {
        let mut bench = bench(DispatchLimits { messages_max: 2, ..DispatchLimits::default() });
        let user = crate::id::UserId::parse("u").unwrap();
        let cancel = |name: &str| {
            let request = crate::id::RequestId::parse(name).unwrap();
            let cancel = IncomingMessage::cancel(&request, &user, Timestamp::from_micros(0));
            IncomingMessage { text: format!("cancel {name}"), ..cancel }
        };
        assert_eq!(bench.accept("sse:1", "one"), Ok(()));
        assert_eq!(bench.turn(), "one");
        assert_eq!(bench.accept("sse:2", "two"), Ok(()));
        bench.inlet.cancel(cancel("2"));
        assert_eq!(bench.turn(), "", "the worker never heard of it");
        assert_eq!(bench.inlet.counts().pending, 1);
        assert_eq!(bench.accept("a", "full"), Ok(()));
        assert_eq!(bench.accept("a", "full"), Err(Refused::Full));
        bench.inlet.cancel(cancel("1"));
        assert_eq!(bench.turn(), "full cancel 1");
        bench.permits.add_permits(9);
        bench.turn();
        bench.inlet.close();
        bench.inlet.cancel(cancel("1"));
        assert_eq!(bench.turn(), "cancel 1", "also after the close: answers are ended last");
        bench.turn();
        bench.inlet.end();
        bench.inlet.cancel(cancel("1"));
        assert_eq!((bench.inlet.counts().pending, bench.lanes.len()), (0, 0));
        assert!(bench.inlet.shared.state().channels.is_empty());
    }

    #[test]
    fn every_bound_refuses_with_its_reason() {
        let limits = DispatchLimits { messages_max: 3, channel_messages_max: 2, ..DispatchLimits::default() };
        let bench = bench(limits);
        assert_eq!(bench.accept("a", "1"), Ok(()));
        assert_eq!(bench.accept("a", "2"), Ok(()));
        assert_eq!(bench.accept("a", "3"), Err(Refused::ChannelFull));
        assert_eq!(bench.accept("b", "1"), Ok(()));
        assert_eq!(bench.accept("b", "2"), Err(Refused::Full));
        assert_eq!(bench.inlet.counts().refused, 2);
        bench.inlet.close();
        assert_eq!(bench.accept("c", "1"), Err(Refused::Closed));
    }

    #[test]
    fn bytes_are_bounded_and_an_empty_queue_admits_any_message() {
        let mut bench = bench(DispatchLimits { bytes_max: 10_000, ..DispatchLimits::default() });
        let data = Bytes::from(vec![0; 20_000]);
        let file = Attachment { filename: String::new(), mimetype: String::new(), data };
        let large = IncomingMessage { attachments: vec![file], ..message("a", "large") };
        assert_eq!(bench.inlet.try_accept(large), Ok(()));
        assert_eq!(bench.accept("b", "x"), Err(Refused::Full));
        bench.permits.add_permits(1);
        assert_eq!(bench.turn(), "large");
        assert_eq!(bench.accept("b", "x"), Ok(()));
    }

    #[test]
    fn no_more_lanes_than_allowed_are_given_out_at_once() {
        let mut bench = bench(DispatchLimits { lanes_max: 2, ..DispatchLimits::default() });
        for channel in ["a", "b", "c"] {
            assert_eq!(bench.accept(channel, channel), Ok(()));
        }
        assert_eq!(bench.turn(), "a b");
        bench.permits.add_permits(1);
        assert_eq!(bench.turn(), "");
        assert_eq!(bench.turn(), "c");
    }

    #[test]
    fn a_dropped_lane_loses_only_what_it_was_handling() {
        let mut bench = bench(DispatchLimits::default());
        for text in ["1", "2"] {
            assert_eq!(bench.accept("a", text), Ok(()));
        }
        assert_eq!(bench.turn(), "1");
        bench.lanes.clear();
        assert_eq!(bench.inlet.counts().pending, 1);
        assert_eq!(bench.turn(), "2");
        bench.lanes.clear();
        assert_eq!(bench.inlet.counts().pending, 0);
        assert!(bench.inlet.shared.state().channels.is_empty());
    }

    #[test]
    fn after_close_the_rest_is_handled_and_after_the_end_the_runner_leaves() {
        let mut bench = bench(DispatchLimits::default());
        assert_eq!(bench.accept("a", "1"), Ok(()));
        assert_eq!(bench.accept("a", "2"), Ok(()));
        bench.inlet.close();
        let inlet = bench.inlet.clone();
        let mut drained = inlet.drained().boxed();
        assert!((&mut drained).now_or_never().is_none());
        assert_eq!(bench.turn(), "1");
        assert!(bench.runner.next().now_or_never().is_none(), "still handling");
        bench.permits.add_permits(2);
        assert_eq!(bench.turn(), "2");
        assert!(drained.now_or_never().is_some());
        assert!(bench.runner.next().now_or_never().is_none(), "a cancel may follow");
        inlet.end();
        assert!(matches!(bench.runner.next().now_or_never(), Some(None)));
    }

    #[tokio::test]
    async fn a_waiting_runner_is_woken_by_a_message_a_free_lane_and_the_end() {
        let Bench { inlet, mut runner, permits, .. } =
            bench(DispatchLimits { lanes_max: 1, ..DispatchLimits::default() });
        permits.add_permits(2);
        let mut running = tokio::task::JoinSet::new();
        running.spawn(async move {
            let mut lanes = tokio::task::JoinSet::new();
            while let Some(lane) = runner.next().await {
                lanes.spawn(lane.run());
            }
        });
        tokio::task::yield_now().await;
        inlet.try_accept(message("a", "1")).unwrap();
        inlet.try_accept(message("b", "2")).unwrap();
        inlet.drained().await;
        inlet.end();
        running.join_next().await.unwrap().unwrap();
    }
}
