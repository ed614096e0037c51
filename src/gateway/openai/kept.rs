//! What is remembered of answers beside their streams: what is the same in all chunks of one that may be found again,
//! and which request an `Idempotency-Key` stands for.

use std::collections::HashMap;
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

    /// Remembers an answer before its stream is opened.
    ///
    /// # Errors
    /// The user's key stands for another one, whose stream is still there.
    pub(super) fn claim(&self, hub: &Hub, user: &UserId, key: Option<&str>, kept: &Kept) -> Result<(), Failed> {
        let id = &kept.head.id;
        let mut state = self.state();
        state.look_through(hub);
        if let Some(key) = key.filter(|key| key.len() <= KEY_BYTES_MAX) {
            let key = (user.clone(), Box::from(key));
            if let Some(other) = state.by_key.get(&key).filter(|other| hub.has_stream(other)) {
                return Err(Failed::conflict(other));
            }
            state.by_key.insert(key, id.clone());
        }
        if kept.is_detachable {
            state.heads.insert(id.clone(), kept.head.clone());
        }
        Ok(())
    }

    /// Forgets an answer whose stream was not opened.
    pub(super) fn release(&self, user: &UserId, key: Option<&str>, id: &RequestId) {
        let mut state = self.state();
        state.heads.remove(id);
        if let Some(key) = key {
            let key = (user.clone(), Box::from(key));
            if state.by_key.get(&key) == Some(id) {
                state.by_key.remove(&key);
            }
        }
    }

    /// What is the same in all chunks of an answer that may be found again.
    pub(super) fn head(&self, id: &RequestId) -> Option<CompletionHead> {
        self.state().heads.get(id).cloned()
    }
}

impl State {
    fn look_through(&mut self, hub: &Hub) {
        if self.heads.len() + self.by_key.len() < self.look_through_at.max(LOOK_THROUGH_MIN) {
            return;
        }
        self.heads.retain(|id, _| hub.has_stream(id));
        self.by_key.retain(|_, id| hub.has_stream(id));
        self.look_through_at = 2 * (self.heads.len() + self.by_key.len());
    }
}
