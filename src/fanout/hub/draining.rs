//! The end of all sessions at shutdown: how fast they may be closed, and the word that goes to the shards.

use std::time::Duration;

use crate::fanout::hub::{Hub, Post, shard_number};

/// How sessions are ended at shutdown.
///
/// They are closed evenly over `spread`, or over as much longer as `closes_per_second_max` asks for. `latest` wins over
/// both: with more sessions than may be closed by then, they are closed faster. A shard that is held up goes on at its
/// pace and does not make up for it, so that on a busy machine it takes longer, up to `latest`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// Closes are spread evenly over this time at least.
    pub spread: Duration,
    /// Closes of all shards together in a second at most, in steps of 50 ms; 0 counts as 1. It bounds what comes upon
    /// the nodes that the clients go to.
    pub closes_per_second_max: u32,
    /// By then the last one is closed, whatever the rate is.
    pub latest: Duration,
}

impl Drain {
    /// How long it takes to close so many sessions.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tabcast::fanout::hub::Drain;
    ///
    /// let drain = Drain {
    ///     spread: Duration::from_secs(10),
    ///     closes_per_second_max: 2_000,
    ///     latest: Duration::from_secs(25),
    /// };
    /// assert_eq!(drain.time_for(19_000), Duration::from_secs(10));
    /// assert_eq!(drain.time_for(30_000), Duration::from_secs(15));
    /// assert_eq!(drain.time_for(300_000), Duration::from_secs(25));
    /// ```
    #[must_use]
    pub fn time_for(&self, sessions: usize) -> Duration {
        let rate = u64::from(self.closes_per_second_max.max(1));
        let sessions = u64::try_from(sessions).unwrap_or(u64::MAX);
        let at_rate = Duration::from_micros(sessions.saturating_mul(1_000_000) / rate);
        self.spread.max(at_rate).min(self.latest)
    }
}

/// What a shard is told of a drain: each closes its own sessions evenly over the same time, so that all together keep
/// to the rate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) time: Duration,
    pub(crate) latest: Duration,
}

impl Hub {
    /// Tells every shard to end its sessions. What is queued is written first; room is not asked for. Streams go on
    /// until they end or [`Self::end_streams`] ends them.
    pub fn drain(&self, drain: Drain) {
        let pace = Pace { time: drain.time_for(self.registry.total_connections()), latest: drain.latest };
        for shard in 0..self.inboxes.len() {
            self.post_drain(shard_number(shard), pace);
        }
    }

    /// The same for one shard.
    pub(crate) fn drain_shard(&self, shard: u16, drain: Drain) {
        let sessions = usize::try_from(self.metrics.shard(usize::from(shard)).sessions.value()).unwrap_or(usize::MAX);
        self.post_drain(shard, Pace { time: drain.time_for(sessions), latest: drain.latest });
    }

    fn post_drain(&self, shard: u16, pace: Pace) {
        self.inboxes[usize::from(shard)].room.take(1, 0);
        self.push(&[shard], || Post::Drain(Box::new(pace)));
    }
}
