//! One node at a time reads what workers write: whose turn it is, and what a turn consists of.

use std::sync::Arc;
use std::time::Duration;

use redis::{RedisResult, Value};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::broker::redis::link::{Endpoint, Link};
use crate::gateway::worker::redis::acks::{Acker, Flight};
use crate::gateway::worker::redis::hand_off::HandOff;
use crate::gateway::worker::redis::lease::{Lease, Tenure};
use crate::gateway::worker::redis::reader::{BLOCK, Reader, UNACKED_MAX};
use crate::gateway::worker::redis::{StreamSettings, beside, is_stopping, stopped};
use crate::metrics::Metrics;

/// How often a node that does not read asks whether it may, spread by half of it.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long a turn that ended by itself is left to others.
const REST: Duration = Duration::from_millis(100);
/// How long the end of a turn waits for what was handed on, and then for the lease to be given back.
const GRACE: Duration = Duration::from_secs(2);

/// How often it is looked whether the stream is too long.
const TRIM_EVERY: Duration = Duration::from_secs(30);
/// From one part of what is to go to the next.
const TRIM_PAUSE: Duration = Duration::from_millis(20);

/// Takes the oldest entries of a stream that is too long, a thousand at most, as far as all its groups are done with them.
/// Answers how many went.
const TRIM: &str = "
local max = tonumber(ARGV[1])
local length = redis.call('XLEN', KEYS[1])
if length <= max then return 0 end
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', math.min(length - max + 1, 1000))
local last = first[#first][1]
local function key(id)
  local time, sequence = string.match(id, '(%d+)-(%d+)')
  return string.rep('0', 20 - #time) .. time .. string.rep('0', 20 - #sequence) .. sequence
end
local is_read = false
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local of = {}
  for at = 1, #group, 2 do of[group[at]] = group[at + 1] end
  is_read = is_read or of.name == ARGV[2]
  if key(of['last-delivered-id']) < key(last) then last = of['last-delivered-id'] end
  local pending = redis.call('XPENDING', KEYS[1], of.name, '-', '+', 1)[1]
  if pending and key(pending[1]) < key(last) then last = pending[1] end
end
if not is_read then return 0 end
return redis.call('XTRIM', KEYS[1], 'MINID', last)";

/// Why a turn ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// This node shuts down.
    Stopped,
    /// The lease is not ours any more, or may not be.
    Lost,
    /// The engine takes nothing any more.
    Closed,
    /// Redis does not do what it is asked: the group is gone, for example.
    Refused(String),
}

/// What things are called in Redis.
pub(super) struct Names {
    pub(super) stream: String,
    pub(super) group: String,
    pub(super) lease: String,
    /// Where entries go that cannot be handled. In a cluster it may be on another node.
    pub(super) dead: String,
}

impl Names {
    /// Where it is remembered that a `message_key` came.
    pub(super) fn message_key(&self, key: &str) -> String {
        beside(&self.stream, &format!("key:{key}"))
    }
}

/// Reads the outbound stream whenever it is this node's turn.
pub(super) struct Consumer {
    lease: Lease,
    pub(super) names: Names,
    pub(super) reading: Link,
    pub(super) commands: Link,
    pub(super) entry_bytes_max: usize,
    entries_max: usize,
    pub(super) hand_off: Arc<dyn HandOff>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) shutdown: watch::Receiver<bool>,
    /// Why the last turn ended, so that the log does not tell the same twice.
    last_end: Option<End>,
}

impl Consumer {
    pub(super) fn new(
        endpoint: &Endpoint,
        settings: StreamSettings,
        hand_off: Arc<dyn HandOff>,
        metrics: Arc<Metrics>,
        shutdown: watch::Receiver<bool>,
    ) -> Self {
        let StreamSettings { outbound_stream: stream, outbound_group: group, node, .. } = settings;
        let lease = Lease::new(endpoint, &stream, &node);
        let names = Names { lease: lease.key().to_owned(), dead: format!("{stream}:dead"), group, stream };
        Self {
            lease,
            names,
            reading: Link::blocking(endpoint.clone(), "outbound", BLOCK),
            commands: Link::new(endpoint.clone(), "acks"),
            entry_bytes_max: settings.entry_bytes_max,
            entries_max: settings.entries_max,
            hand_off,
            metrics,
            shutdown,
            last_end: None,
        }
    }

    /// Runs until the shutdown was announced, and gives the lease back.
    pub(super) async fn run(mut self) {
        while !is_stopping(&self.shutdown) {
            match self.lease.acquire().await {
                Ok(Some(tenure)) => {
                    let rest = Box::pin(self.hold(tenure)).await;
                    self.rest(sleep(rest)).await;
                }
                Ok(None) => self.rest(sleep(spread(ASK_EVERY))).await,
                Err(_) => self.rest(self.lease.pause()).await,
            }
        }
    }

    async fn rest(&self, pause: impl Future<Output = ()>) {
        let mut shutdown = self.shutdown.clone();
        tokio::select! {
            () = pause => {}
            () = stopped(&mut shutdown) => {}
        }
    }

    /// One turn, from the lease that was just taken until it is given back or lost. Gives for how long it is then left
    /// to others: what ends in the same way again and again is not tried at once.
    async fn hold(&mut self, tenure: Tenure) -> Duration {
        self.metrics.engine.streams_of_workers.takeovers.increment();
        tracing::debug!(lease = tenure.value, stream = self.names.stream, "reading what workers write");
        let end = Box::pin(self.turn(&tenure)).await;
        // A read that still waits there would take an entry that nobody handles.
        self.reading.give_up().await;
        self.lease.release(&tenure, GRACE).await;
        let is_known = self.last_end.as_ref() == Some(&end);
        match &end {
            End::Refused(reason) if !is_known => {
                tracing::warn!(reason, stream = self.names.stream, "workers cannot be read; trying again");
            }
            End::Lost if !is_known => tracing::info!(lease = tenure.value, "another node may read what workers write"),
            end => tracing::debug!(?end, lease = tenure.value, "no longer reading what workers write"),
        }
        self.last_end = Some(end);
        if is_known { spread(ASK_EVERY) } else { REST }
    }

    /// Workers may not trim what they write: for as long as the turn lasts it is done here.
    async fn keep_short(&self) {
        let mut pause = TRIM_EVERY;
        loop {
            sleep(pause).await;
            pause = match trim(&self.commands, &self.names, self.entries_max).await {
                // There may be more.
                Ok(Value::Int(1_000..)) => TRIM_PAUSE,
                Ok(_) => TRIM_EVERY,
                Err(error) => {
                    tracing::debug!(%error, stream = self.names.stream, "the stream could not be trimmed");
                    TRIM_EVERY
                }
            };
        }
    }

    async fn turn(&self, tenure: &Tenure) -> End {
        let flight = Flight::default();
        // Every place among those that are not acknowledged has one here, so that it is never full.
        let (sender, receiver) = mpsc::channel(UNACKED_MAX);
        let (link, names, metrics) = (&self.commands, &self.names, &self.metrics);
        let acker = Acker { link, names, tenure, flight: &flight, metrics };
        let mut reader = Reader::new(self, &self.lease, tenure, &flight, sender);
        let mut shutdown = self.shutdown.clone();
        let work = async {
            let acking = acker.run(receiver);
            tokio::pin!(acking);
            let end = tokio::select! {
                end = &mut acking => return end,
                end = reader.run() => end,
            };
            drop(reader);
            // What was handed on and is not acknowledged in time comes again.
            drop(timeout(GRACE, acking).await);
            end
        };
        tokio::select! {
            end = Box::pin(work) => end,
            () = self.lease.keep(tenure) => End::Lost,
            () = self.keep_short() => End::Lost,
            // What hangs does not keep the turn from others.
            () = async { stopped(&mut shutdown).await; sleep(2 * GRACE).await } => End::Stopped,
        }
    }
}

/// Trims a stream to about so many entries; of those that are not acknowledged none goes.
///
/// # Errors
/// Redis did not answer, or refused.
pub(super) async fn trim(link: &Link, names: &Names, entries_max: usize) -> RedisResult<Value> {
    let mut trim = redis::cmd("EVAL");
    trim.arg(TRIM).arg(1).arg(&names.stream).arg(entries_max).arg(&names.group);
    link.query(trim).await
}

/// Between three and five quarters of `time`, so that nodes do not ask at once.
fn spread(time: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() % 1_000;
    let spread = u32::try_from(random).unwrap_or_default();
    time * 3 / 4 + time / 2 * spread / 1_000
}
