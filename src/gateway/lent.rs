//! Bytes of answers that are held until their clients have taken them, and what all of them may hold: past it, whoever
//! has had theirs for longest gives them back.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::driver::loan::{Lender, Loan, lend};

/// How long an answer waits for the room of those who take nothing of theirs: they have a second.
const RECALL_TIME: Duration = Duration::from_secs(2);

/// So many bytes.
#[derive(Debug, Clone)]
pub(super) struct LentRoom {
    /// Bytes that may still be held.
    places: Arc<Semaphore>,
    /// Of what is held to be taken: how many bytes, and who may want them back, the oldest first. An entry a response that
    /// waits, so no more than there are connections, and those that are over.
    lent: Arc<Mutex<VecDeque<(usize, Lender)>>>,
}

impl LentRoom {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(bytes_max.min(Semaphore::MAX_PERMITS))), lent: Arc::default() }
    }

    /// Room for so many bytes. If there is none, those who have had theirs for longest are asked for it. None: there is not
    /// so much within [`RECALL_TIME`].
    ///
    /// # Cancel safety
    /// Dropped, it has taken nothing. Who was asked gives their bytes back all the same.
    pub(super) async fn take(&self, bytes: u32) -> Option<OwnedSemaphorePermit> {
        let places = || Arc::clone(&self.places);
        if let Ok(place) = places().try_acquire_many_owned(bytes) {
            return Some(place);
        }
        self.recall((bytes as usize).saturating_sub(self.places.available_permits()));
        tokio::time::timeout(RECALL_TIME, places().acquire_many_owned(bytes)).await.ok()?.ok()
    }

    /// What a response is given whose client has so many bytes of it to take: they are among those that are wanted back.
    pub(super) fn lend(&self, bytes: usize) -> Loan {
        let (lender, loan) = lend();
        let mut lent = self.lent();
        lent.retain(|(_, lender)| !lender.is_over());
        lent.push_back((bytes, lender));
        loan
    }

    fn recall(&self, mut wanted: usize) {
        let mut lent = self.lent();
        while wanted > 0
            && let Some((bytes, lender)) = lent.pop_front()
        {
            if !lender.is_over() {
                wanted = wanted.saturating_sub(bytes);
                lender.recall();
            }
        }
    }

    fn lent(&self) -> MutexGuard<'_, VecDeque<(usize, Lender)>> {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn bytes_left(&self) -> usize {
        self.places.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn whoever_has_had_theirs_for_longest_is_asked_for_no_more_than_is_wanted() {
        let room = LentRoom::new(100);
        let is_recalled = |loan: &Loan| loan.poll_recalled(&mut Context::from_waker(Waker::noop())).is_some();
        let held = [40, 40, 20]
            .map(|bytes| (room.places.clone().try_acquire_many_owned(bytes).unwrap(), room.lend(bytes as usize)));
        let [(oldest, first), (_other, second), (_newest, third)] = held;
        let mut waiting = Box::pin(room.take(50));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        assert_eq!([&first, &second, &third].map(is_recalled), [true, true, false]);
        assert!(waiting.await.is_none(), "neither gave anything back");
        let mut waiting = Box::pin(room.take(30));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        assert!(is_recalled(&third), "who was asked is not asked again");
        drop((oldest, first));
        let place = waiting.await.unwrap();
        assert_eq!((place.num_permits(), room.bytes_left()), (30, 10));
    }
}
