//! The questions that are being delivered: so that a cancel, which has a lane of its own, does not overtake its question
//! and ends the attempts for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::platform::message::IncomingMessage;

/// How far a message is.
#[derive(Debug, Default)]
struct Progress {
    /// The receiver may have seen it.
    has_gone_out: bool,
    is_cancelled: bool,
    /// Nothing more goes out.
    is_settled: bool,
}

type Shared = Arc<watch::Sender<Progress>>;

/// The questions that are being delivered, by channel id: at most one for each lane.
#[derive(Default)]
pub(super) struct UnderWay {
    by_channel: Mutex<HashMap<String, Shared>>,
}

/// What a worker knows of a question that was cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// It may have the question, and is to be told.
    Perhaps,
    /// It never gets the question.
    Nothing,
}

impl UnderWay {
    /// Begins the delivery of a message. If that is a question, [`Self::cancel`] finds it until the delivery is dropped.
    pub(super) fn begin(self: &Arc<Self>, message: &IncomingMessage) -> Delivery {
        let progress = Shared::default();
        let question = message.extra.contains_key("openai").then(|| message.channel_id.clone());
        if let Some(channel) = &question {
            self.by_channel().insert(channel.clone(), Arc::clone(&progress));
        }
        Delivery { progress, question, under_way: Arc::clone(self) }
    }

    /// Ends the attempts for a channel's question: none begins from here on. Waits for the one that is on its way.
    ///
    /// # Cancel safety
    /// Dropped, the question stays cancelled.
    pub(super) async fn cancel(&self, channel: &str) -> Heard {
        let Some(progress) = self.by_channel().get(channel).cloned() else { return Heard::Perhaps };
        progress.send_modify(|progress| progress.is_cancelled = true);
        let mut changes = progress.subscribe();
        // Its sender is held here, so this ends with the question.
        match changes.wait_for(|progress| progress.is_settled).await {
            Ok(progress) if !progress.has_gone_out => Heard::Nothing,
            _ => Heard::Perhaps,
        }
    }

    fn by_channel(&self) -> MutexGuard<'_, HashMap<String, Shared>> {
        self.by_channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn questions(&self) -> usize {
        self.by_channel().len()
    }
}

/// A message that is being delivered. Dropped when that is done, also if it is given up or its lane is dropped.
pub(super) struct Delivery {
    progress: Shared,
    /// Its channel id, if it is a question.
    question: Option<String>,
    under_way: Arc<UnderWay>,
}

impl Delivery {
    /// Takes note of an attempt that is to be made. False if it was cancelled before: then there is to be none.
    #[must_use]
    pub(super) fn goes_out(&self) -> bool {
        // Under the lock of the progress, so that either the cancel sees the attempt or the attempt sees the cancel.
        self.progress.send_if_modified(|progress| {
            progress.has_gone_out |= !progress.is_cancelled;
            !progress.is_cancelled
        })
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.progress.borrow().is_cancelled
    }

    /// Waits for its cancel.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing.
    pub(super) async fn cancelled(&self) {
        let mut changes = self.progress.subscribe();
        // Its sender is this delivery's, so this cannot end without a cancel.
        let _ = changes.wait_for(|progress| progress.is_cancelled).await;
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if let Some(channel) = self.question.take() {
            let mut by_channel = self.under_way.by_channel();
            // Another inlet's question may have the same channel.
            if by_channel.get(&channel).is_some_and(|progress| Arc::ptr_eq(progress, &self.progress)) {
                by_channel.remove(&channel);
            }
        }
        self.progress.send_modify(|progress| progress.is_settled = true);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use serde_json::json;

    use super::*;
    use crate::id::{RequestId, UserId};
    use crate::proto::event::Timestamp;

    fn question() -> IncomingMessage {
        let (request, user) = (RequestId::parse("r").unwrap(), UserId::parse("u").unwrap());
        let cancel = IncomingMessage::cancel(&request, &user, Timestamp::from_micros(0));
        IncomingMessage { extra: serde_json::Map::from_iter([("openai".to_owned(), json!({}))]), ..cancel }
    }

    /// What a cancel comes to after `attempts`, and whether it had to wait for the end of the delivery.
    fn check(attempts: usize, expected: Heard) {
        let (under_way, question) = (Arc::new(UnderWay::default()), question());
        let delivery = under_way.begin(&question);
        for _ in 0..attempts {
            assert!(delivery.goes_out());
        }
        let mut cancel = Box::pin(under_way.cancel(&question.channel_id));
        assert_eq!(cancel.as_mut().now_or_never(), None, "it waits for what is on its way");
        assert!(!delivery.goes_out() && delivery.is_cancelled());
        assert_eq!(delivery.cancelled().now_or_never(), Some(()));
        drop(delivery);
        assert_eq!(cancel.now_or_never(), Some(expected));
        assert_eq!(under_way.questions(), 0);
    }

    #[test]
    fn a_cancel_ends_the_attempts_and_waits_for_the_last() {
        check(0, Heard::Nothing);
        check(1, Heard::Perhaps);
        check(2, Heard::Perhaps);
    }

    #[test]
    fn only_a_question_of_that_channel_is_cancelled() {
        let (under_way, question) = (Arc::new(UnderWay::default()), question());
        assert_eq!(under_way.cancel(&question.channel_id).now_or_never(), Some(Heard::Perhaps), "nothing is under way");
        let other = IncomingMessage { extra: serde_json::Map::new(), ..question.clone() };
        let delivery = under_way.begin(&other);
        assert_eq!(under_way.cancel(&question.channel_id).now_or_never(), Some(Heard::Perhaps), "not a question");
        assert!(delivery.goes_out());
    }

    #[test]
    fn a_delivery_takes_only_its_own_question_away() {
        let (under_way, question) = (Arc::new(UnderWay::default()), question());
        let [first, second] = [(); 2].map(|()| under_way.begin(&question));
        drop(first);
        assert_eq!(under_way.questions(), 1);
        drop(second);
        assert_eq!(under_way.questions(), 0);
    }
}
