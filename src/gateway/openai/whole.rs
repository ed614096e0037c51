//! Answers in one piece: collected within a budget for all of them, and written as one body.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;

use futures_core::Stream;
use http::StatusCode;
use http::header::HeaderValue;
use tokio::sync::OwnedSemaphorePermit;

use crate::driver::addresses::Place;
use crate::driver::loan::Loan;
use crate::fanout::mailbox::Mailbox;
use crate::gateway::apart::apart_if_large;
use crate::gateway::body::kept_with;
use crate::gateway::edge::ShardEdge;
use crate::gateway::lent::LentRoom;
use crate::gateway::openai::failed::Failed;
use crate::gateway::openai::kept::{Claim, Kept};
use crate::gateway::openai::{REQUEST_ID, Wanted};
use crate::gateway::response::{self, Answered};
use crate::id::ChannelId;
use crate::metrics::Refusal;
use crate::proto::completion::{Failure, WholeCompletion};
use crate::proto::event::EndReason;
use crate::proto::frame::Frame;

/// What an answer takes of the budget before it has said anything.
const FIRST_BYTES: usize = 1 << 10;

/// The bytes of all answers in one piece, of which each takes what it holds.
#[derive(Debug)]
pub(crate) struct WholeBudget(LentRoom);

impl WholeBudget {
    /// So many bytes for all of them.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self(LentRoom::new(bytes_max))
    }

    /// So many bytes, perhaps of clients that take nothing, or too little, of theirs: these have a while to give them back.
    async fn take(&self, bytes: usize) -> Option<Room> {
        let place = self.0.take(u32::try_from(bytes).ok()?).await?;
        Some(Room { place, budget: self.0.clone() })
    }
}

/// What one answer has of the budget, until it is dropped.
#[derive(Debug)]
struct Room {
    place: OwnedSemaphorePermit,
    budget: LentRoom,
}

impl Room {
    /// Takes what is missing to `bytes`, as [`WholeBudget::take`] does. False if there is not so much: nothing was taken.
    async fn grow(&mut self, bytes: usize) -> bool {
        let missing = bytes.saturating_sub(self.place.num_permits());
        let Ok(missing) = u32::try_from(missing) else { return false };
        let more = self.budget.take(missing).await;
        more.map(|more| self.place.merge(more)).is_some()
    }

    /// Gives back what is over `bytes`, and says that the rest is a client's to take.
    fn lend(&mut self, bytes: usize) -> Loan {
        drop(self.place.split(self.place.num_permits().saturating_sub(bytes)));
        self.budget.lend(bytes)
    }
}

impl ShardEdge {
    /// An answer in one piece. Dropped, as when the client goes away, it cancels the answer, or leaves it if the client
    /// said so.
    pub(super) async fn whole(
        &self,
        wanted: Wanted,
        claim: Claim<'_>,
        of_address: Option<Place>,
    ) -> Result<Answered, Failed> {
        let Wanted { question, kept: Kept { head, .. }, options, .. } = wanted;
        let Some(mut room) = self.gateway.whole_answers.take(FIRST_BYTES).await else {
            self.count_refusal(Refusal::WholeAnswers);
            return Err(Failed::overloaded("as many answers in one piece are held as may be; try again later"));
        };
        let place = self.gateway.answers.inlet().reserve(&question).map_err(Failed::from)?;
        self.gateway.engine.expect(&ChannelId::Stream(head.id.clone())).await;
        let opened = self.gateway.engine.hub().open_stream(&head.id, options);
        let mut mailbox = opened.map_err(|error| self.not_opened(error.into()))?;
        claim.opened();
        self.mirror(&question);
        place.hand_on(question);
        let mut whole = WholeCompletion::new(Arc::clone(&head.files_url));
        while whole.ending().is_none() {
            let Some(frame) = next(&mut mailbox).await else { break };
            whole.handle(&frame);
            let bytes_max = self.gateway.settings.load().whole_answer_bytes_max;
            if whole.bytes() > bytes_max {
                return Err(Failed::answer_too_large(bytes_max, &head.id));
            }
            if !room.grow(whole.bytes()).await {
                self.count_refusal(Refusal::WholeAnswers);
                return Err(Failed::no_room_for_answer(&head.id));
            }
        }
        let failure = match whole.ending() {
            Some(EndReason::Stop) => None,
            Some(reason) => Failure::of_end(reason),
            None => Some(Failure::SlowConsumer),
        };
        if let Some(failure) = failure {
            return Err(Failed::of_answer(failure, head.id));
        }
        // The room goes with what it is for, which is there for as long as it is worked on.
        let json = apart_if_large(&self.gateway.control, whole.bytes(), async move {
            let bytes = whole.to_json(&head);
            (bytes, head, room)
        });
        let (bytes, head, mut room) = json.await.ok_or_else(Failed::internal)?;
        let loan = room.lend(bytes.len());
        let body = kept_with(bytes, (room, of_address));
        let mut response = response::typed(StatusCode::OK, HeaderValue::from_static("application/json"), body);
        response.extensions_mut().insert(loan);
        if let Ok(id) = HeaderValue::from_str(head.id.as_str()) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        Ok(response)
    }
}

async fn next(mailbox: &mut Mailbox) -> Option<Frame> {
    poll_fn(|context| Pin::new(&mut *mailbox).poll_next(context)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_answer_has_what_it_holds_of_the_budget_until_its_body_is_gone() {
        let budget = WholeBudget::new(10_000);
        let left = || budget.0.bytes_left();
        let mut room = budget.take(FIRST_BYTES).await.unwrap();
        assert!(room.grow(9_000).await && room.grow(100).await, "it keeps what it has");
        assert_eq!(left(), 1_000);
        assert!(budget.take(FIRST_BYTES).await.is_none(), "nobody gets a part");
        assert!(!room.grow(10_001).await && !room.grow(usize::MAX).await);
        assert_eq!(left(), 1_000, "what was refused is not taken");
        let _loan = room.lend(4_000);
        let _loan = room.lend(5_000);
        assert_eq!(left(), 6_000);
        let body = kept_with(vec![b'x'; 4_000], room);
        let rest = body.slice(3_999..);
        drop(body);
        assert_eq!(left(), 6_000, "the last byte is not written yet");
        drop(rest);
        assert_eq!(left(), 10_000);
    }
}
