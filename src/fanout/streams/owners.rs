//! Whose streams there are: so many that run, and so many that have ended and can be found again.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::id::{RequestId, UserId};

/// Streams of one owner that have ended and can be found again; the oldest go.
const ENDED_MAX: usize = 16;

/// The streams of one owner.
#[derive(Default)]
struct Owned {
    running: Vec<RequestId>,
    /// Those that can be found again, the oldest first.
    ended: VecDeque<RequestId>,
}

/// The streams of all owners.
pub(super) struct Owners {
    owned: Mutex<HashMap<UserId, Owned>>,
    running_max: usize,
}

impl Owners {
    pub(super) fn new(running_max: usize) -> Self {
        Self { owned: Mutex::default(), running_max }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<UserId, Owned>> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream of `owner` begins; false if there are as many as allowed.
    pub(super) fn begin(&self, owner: &UserId, request: &RequestId) -> bool {
        let mut all = self.lock();
        let owned = all.entry(owner.clone()).or_default();
        let is_free = owned.running.len() < self.running_max;
        if is_free {
            owned.running.push(request.clone());
        }
        is_free
    }

    /// A stream runs no more. If it can be found again it is one of the ended ones; returns which of those is one too
    /// many.
    pub(super) fn end(&self, owner: &UserId, request: &RequestId, can_be_found: bool) -> Option<RequestId> {
        let mut all = self.lock();
        let owned = all.get_mut(owner)?;
        owned.running.retain(|running| running != request);
        if can_be_found {
            owned.ended.push_back(request.clone());
        }
        let oldest = if owned.ended.len() > ENDED_MAX { owned.ended.pop_front() } else { None };
        if owned.running.is_empty() && owned.ended.is_empty() {
            all.remove(owner);
        }
        oldest
    }

    /// An ended stream cannot be found any more.
    pub(super) fn forget(&self, owner: &UserId, request: &RequestId) {
        let mut all = self.lock();
        if let Some(owned) = all.get_mut(owner) {
            owned.ended.retain(|ended| ended != request);
            if owned.running.is_empty() && owned.ended.is_empty() {
                all.remove(owner);
            }
        }
    }

    /// What runs of an owner's.
    pub(super) fn running(&self, owner: &UserId) -> Vec<RequestId> {
        self.lock().get(owner).map(|owned| owned.running.clone()).unwrap_or_default()
    }
}
