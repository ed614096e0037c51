//! What is remembered of answers beside their streams: what is the same in all chunks of one that may be found again,
//! and which request an `Idempotency-Key` stands for.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::fanout::hub::Hub;
use crate::gateway::openai::failed::Failed;
use crate::id::{RequestId, UserId};
use crate::platform::dispatch::Inlet;
use crate::proto::completion::CompletionHead;

/// Answers are looked through for those that are gone once there are so many, and then at twice as many as were left.
const LOOK_THROUGH_MIN: usize = 1024;
/// The longest `Idempotency-Key`; what is longer is none.
const KEY_BYTES_MAX: usize = 256;

/// What is remembered of an answer.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) head: CompletionHead,
    /// It may be left and found again.
    pub(super) is_detachable: bool,
}

type Key = (UserId, Box<str>);

#[derive(Default)]
struct State {
    heads: HashMap<RequestId, CompletionHead>,
    by_key: HashMap<Key, RequestId>,
    /// Those whose streams are about to be opened: they are there, though the hub does not know them.
    claimed: HashSet<RequestId>,
    look_through_at: usize,
}

/// The answers that are under way, and those that have ended and can be found: as many as there are streams.
pub(crate) struct Answers {
    inlet: Inlet,
    started: u64,
    state: Mutex<State>,
}

impl Answers {
    /// For questions that go into `inlet`; `started` is what models are said to be as old as, in Unix seconds.
    pub(crate) fn new(inlet: Inlet, started: u64) -> Self {
        Self { inlet, started, state: Mutex::default() }
    }

    pub(super) fn inlet(&self) -> &Inlet {
        &self.inlet
    }

    pub(super) fn started(&self) -> u64 {
        self.started
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers an answer before its stream is opened: until the claim is dropped, or the stream is gone.
    ///
    /// # Errors
    /// The user's key stands for another one, which is claimed or whose stream is still there.
    pub(super) fn claim(&self, hub: &Hub, user: &UserId, key: Option<&str>, kept: &Kept) -> Result<Claim<'_>, Failed> {
        let id = &kept.head.id;
        let key = key.filter(|key| key.len() <= KEY_BYTES_MAX).map(|key| (user.clone(), Box::from(key)));
        let mut state = self.state();
        state.look_through(hub);
        if let Some(key) = &key {
            if let Some(other) = state.by_key.get(key).filter(|other| state.is_there(hub, other)) {
                return Err(Failed::conflict(other));
            }
            state.by_key.insert(key.clone(), id.clone());
        }
        if kept.is_detachable {
            state.heads.insert(id.clone(), kept.head.clone());
        }
        state.claimed.insert(id.clone());
        drop(state);
        Ok(Claim { answers: self, key, id: id.clone() })
    }

    /// What is the same in all chunks of an answer that may be found again.
    pub(super) fn head(&self, id: &RequestId) -> Option<CompletionHead> {
        self.state().heads.get(id).cloned()
    }
}

impl State {
    fn is_there(&self, hub: &Hub, id: &RequestId) -> bool {
        self.claimed.contains(id) || hub.has_stream(id)
    }

    fn look_through(&mut self, hub: &Hub) {
        if self.heads.len() + self.by_key.len() < self.look_through_at.max(LOOK_THROUGH_MIN) {
            return;
        }
        let Self { heads, by_key, claimed, .. } = self;
        heads.retain(|id, _| claimed.contains(id) || hub.has_stream(id));
        by_key.retain(|_, id| claimed.contains(id) || hub.has_stream(id));
        self.look_through_at = 2 * (self.heads.len() + self.by_key.len());
    }
}

/// An answer whose stream is about to be opened. Dropped before that, as when its client goes away, it is forgotten.
#[must_use]
pub(super) struct Claim<'a> {
    answers: &'a Answers,
    key: Option<Key>,
    id: RequestId,
}

impl Claim<'_> {
    /// The stream is open: from here on the answer is remembered for as long as that is there.
    pub(super) fn opened(self) {
        self.answers.state().claimed.remove(&self.id);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.answers.state();
        if !state.claimed.remove(&self.id) {
            return;
        }
        state.heads.remove(&self.id);
        if let Some(key) = &self.key {
            // It is this answer's: a claimed key is given to no other.
            state.by_key.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::fanout::mailbox::Mailbox;
    use crate::fanout::streams::StreamOptions;
    use crate::platform::adapter::{BotIdentity, BoxFuture, MessageHandler, PlatformAdapter};
    use crate::platform::dispatch::{DispatchLimits, dispatch};
    use crate::platform::message::IncomingMessage;
    use crate::platform::recording::Recorder;
    use crate::platform::webchat::WebChat;
    use crate::proto::limits::{HubLimits, SessionLimits};

    struct Bench {
        hub: Arc<Hub>,
        answers: Answers,
    }

    impl Bench {
        fn new() -> Self {
            let hub = Hub::new(1, &HubLimits::default(), &SessionLimits::default());
            let chat = Arc::new(WebChat::new(Arc::new(Recorder::default()), BotIdentity::default()));
            let (inlet, _) = dispatch(Arc::new(Nobody), chat, DispatchLimits::default());
            Self { hub, answers: Answers::new(inlet, 0) }
        }

        fn claim(&self, user: &str, key: &str, id: &str) -> Result<Claim<'_>, Failed> {
            let user = UserId::parse(user).unwrap();
            let kept = Kept { head: head(id), is_detachable: true };
            self.answers.claim(&self.hub, &user, Some(key), &kept)
        }

        fn open(&self, id: &str) -> Mailbox {
            self.hub.open_stream(&request(id), StreamOptions::default()).unwrap()
        }

        /// Looks through at once, however few there are.
        fn look_through(&self) {
            let mut state = self.answers.state();
            let missing = LOOK_THROUGH_MIN.saturating_sub(state.heads.len() + state.by_key.len());
            let gone = |number: usize| request(&format!("gone-{number}"));
            state.heads.extend((0..missing).map(|number| (gone(number), head("gone"))));
            state.look_through_at = 0;
            state.look_through(&self.hub);
        }

        /// Heads, keys and claims.
        fn counts(&self) -> [usize; 3] {
            let state = self.answers.state();
            [state.heads.len(), state.by_key.len(), state.claimed.len()]
        }
    }

    struct Nobody;

    impl MessageHandler for Nobody {
        fn handle(&self, _message: IncomingMessage, _adapter: Arc<dyn PlatformAdapter>) -> BoxFuture<'static, ()> {
            Box::pin(std::future::ready(()))
        }
    }

    fn request(id: &str) -> RequestId {
        RequestId::parse(id).unwrap()
    }

    fn head(id: &str) -> CompletionHead {
        CompletionHead {
            id: request(id),
            created: 0,
            model: "m".into(),
            files_url: "".into(),
            wants_usage: false,
            prompt_tokens: 0,
        }
    }

    #[test]
    fn a_key_is_taken_from_its_claim_to_the_end_of_its_stream() {
        let bench = Bench::new();
        let claim = bench.claim("u", "k", "first").unwrap();
        assert!(bench.claim("u", "k", "second").is_err(), "claimed, not yet open");
        assert!(bench.claim("v", "k", "third").is_ok(), "another user's key is another");
        let mailbox = bench.open("first");
        claim.opened();
        assert!(bench.claim("u", "k", "second").is_err(), "open");
        drop(mailbox);
        let again = bench.claim("u", "k", "second").unwrap();
        assert_eq!(bench.answers.state().by_key.values().collect::<Vec<_>>(), [&request("second")]);
        drop(again);
    }

    #[test]
    fn a_claim_that_is_dropped_is_released() {
        let bench = Bench::new();
        drop(bench.claim("u", "k", "first").unwrap());
        assert_eq!(bench.counts(), [0, 0, 0]);
        let second = bench.claim("u", "k", "second").unwrap();
        let mailbox = bench.open("second");
        second.opened();
        assert_eq!(bench.counts(), [1, 1, 0], "what is open is kept");
        drop(mailbox);
    }

    #[test]
    fn a_look_through_keeps_what_is_claimed_or_open() {
        let bench = Bench::new();
        let claimed = bench.claim("u", "claimed", "claimed").unwrap();
        let open = bench.claim("u", "open", "open").unwrap();
        let mailbox = bench.open("open");
        open.opened();
        bench.look_through();
        assert_eq!(bench.counts(), [2, 2, 1]);
        assert!(bench.answers.head(&request("claimed")).is_some());
        drop((claimed, mailbox));
        bench.look_through();
        assert_eq!(bench.counts(), [0, 0, 0]);
    }

    #[test]
    fn a_key_that_is_too_long_is_none() {
        let bench = Bench::new();
        let key = "k".repeat(KEY_BYTES_MAX + 1);
        let claims = [bench.claim("u", &key, "first").unwrap(), bench.claim("u", &key, "second").unwrap()];
        assert_eq!(bench.counts(), [2, 0, 2]);
        drop(claims);
        assert_eq!(bench.counts(), [0, 0, 0]);
    }
}
