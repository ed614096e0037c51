//! From a hand-off to its acknowledgement: out of order, many at a time, and only while the lease is ours.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use redis::{Cmd, Pipeline, Value};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::broker::redis::link::{Link, refused};
use crate::gateway::worker::redis::entries::EntryId;
use crate::gateway::worker::redis::hand_off::Settled;
use crate::gateway::worker::redis::lease::Tenure;
use crate::gateway::worker::redis::outbound::{End, Names};
use crate::metrics::Metrics;

/// For how long a `message_key` is remembered.
const REMEMBERED_SECONDS: u32 = 600;
/// The most entries of one script, which holds Redis up for as long as it runs.
const ACKS_MAX: usize = 512;

/// Only while the lease is ours, and the keys together with the entries. The ids of entries with a key come first.
const ACK: &str = "
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return -1 end
for i = 3, #KEYS do redis.call('SET', KEYS[i], ARGV[i + 1], 'EX', ARGV[3]) end
return redis.call('XACK', KEYS[1], ARGV[2], unpack(ARGV, 4))";

/// An entry that was dealt with, and may be acknowledged once it is settled.
pub(super) struct Flown {
    pub(super) id: EntryId,
    /// What a repeat of it would come with. None also for what was not sent.
    pub(super) key: Option<Box<str>>,
    pub(super) settled: Settled,
    /// Its place among those that are not acknowledged yet.
    pub(super) place: OwnedSemaphorePermit,
}

/// What was dealt with and is not acknowledged yet. Redis gives it out again to whoever asks.
#[derive(Default)]
pub(super) struct Flight {
    unacked: Mutex<Unacked>,
}

#[derive(Default)]
struct Unacked {
    ids: HashSet<EntryId>,
    keys: HashSet<Box<str>>,
}

impl Flight {
    /// No code that can panic runs under the lock, so a poisoned state is still whole.
    fn unacked(&self) -> MutexGuard<'_, Unacked> {
        self.unacked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, id: EntryId, key: Option<&str>) {
        let mut unacked = self.unacked();
        unacked.ids.insert(id);
        if let Some(key) = key {
            unacked.keys.insert(Box::from(key));
        }
    }

    pub(super) fn has(&self, id: EntryId) -> bool {
        self.unacked().ids.contains(&id)
    }

    /// All of them now.
    pub(super) fn ids(&self) -> HashSet<EntryId> {
        self.unacked().ids.clone()
    }

    pub(super) fn has_key(&self, key: &str) -> bool {
        self.unacked().keys.contains(key)
    }

    fn remove(&self, acked: &[Acked]) {
        let mut unacked = self.unacked();
        for Acked { id, key, .. } in acked {
            unacked.ids.remove(id);
            if let Some(key) = key {
                unacked.keys.remove(key);
            }
        }
    }
}

struct Acked {
    id: EntryId,
    key: Option<Box<str>>,
    _place: OwnedSemaphorePermit,
}

async fn settle(flown: Flown) -> Acked {
    let Flown { id, key, settled, place } = flown;
    settled.await;
    Acked { id, key, _place: place }
}

/// Acknowledges what has settled.
pub(super) struct Acker<'t> {
    pub(super) link: &'t Link,
    pub(super) names: &'t Names,
    pub(super) tenure: &'t Tenure,
    pub(super) flight: &'t Flight,
    pub(super) metrics: &'t Arc<Metrics>,
}

impl Acker<'_> {
    /// Runs until nothing more comes and all is acknowledged, or until the lease is lost.
    ///
    /// # Cancel safety
    /// What is not acknowledged comes again, to whoever has the lease then.
    pub(super) async fn run(&self, mut flown: mpsc::Receiver<Flown>) -> End {
        let (mut flying, mut settled, mut is_open) = (FuturesUnordered::new(), Vec::new(), true);
        while is_open || !flying.is_empty() {
            tokio::select! {
                one = flown.recv(), if is_open => match one {
                    Some(one) => flying.push(settle(one)),
                    None => is_open = false,
                },
                Some(one) = flying.next(), if !flying.is_empty() => settled.push(one),
            }
            // And all others of which nothing has to be waited for.
            while let Ok(one) = flown.try_recv() {
                flying.push(settle(one));
            }
            while settled.len() < ACKS_MAX
                && let Some(Some(one)) = flying.next().now_or_never()
            {
                settled.push(one);
            }
            if !settled.is_empty()
                && let Err(end) = self.ack(std::mem::take(&mut settled)).await
            {
                return end;
            }
        }
        End::Stopped
    }

    /// Says so until Redis has heard it.
    async fn ack(&self, mut settled: Vec<Acked>) -> Result<(), End> {
        settled.sort_by_key(|one| one.key.is_none());
        let mut pipeline = Pipeline::with_capacity(1);
        pipeline.add_command(self.command(&settled));
        let mut is_refused = false;
        loop {
            match self.link.run(&pipeline).await.as_deref() {
                Ok([Value::Int(-1)]) => return Err(End::Lost),
                Ok([Value::Int(count)]) => {
                    self.metrics.engine.streams_of_workers.acked.add(u64::try_from(*count).unwrap_or_default());
                    self.flight.remove(&settled);
                    return Ok(());
                }
                Ok(answers) => {
                    let reason = answers.first().and_then(refused).unwrap_or_default();
                    if !std::mem::replace(&mut is_refused, true) {
                        tracing::warn!(reason, "Redis refuses acknowledgements; trying again");
                    }
                }
                Err(_) => {}
            }
            self.link.pause().await;
        }
    }

    fn command(&self, settled: &[Acked]) -> Cmd {
        let keys = || settled.iter().filter_map(|one| one.key.as_deref());
        let mut ack = redis::cmd("EVAL");
        ack.arg(ACK).arg(2 + keys().count()).arg(&self.names.stream).arg(&self.names.lease);
        ack.arg(keys().map(|key| self.names.message_key(key)).collect::<Vec<_>>());
        ack.arg(&self.tenure.value).arg(&self.names.group).arg(REMEMBERED_SECONDS);
        ack.arg(settled.iter().map(|one| one.id.to_string()).collect::<Vec<_>>());
        ack
    }
}
