//! A world in one thread: real engines, hubs and shards stepped by hand, on a simulated network, in simulated time.
//!
//! | real | simulated |
//! |---|---|
//! | [`Engine`](tabcast::engine::Engine), hub, registry, rooms, inboxes, recovery in memory | threads: a seed decides which shard does what next |
//! | [`Shard`](tabcast::fanout::shard::Shard): queues, cuts, heartbeats, drain, the reader of RFC 6455 | sockets: budgets of bytes, which block, stall and break |
//! | the parser of what clients say | clients, and their reader of every byte |
//! | the memory broker; of the Redis broker packed messages, and who said what | Redis: its pub/sub, who is online, what is kept of users' frames, restarts |
//! | how a tab that came to another node gets what is kept elsewhere | – |
//! | – | time |
//!
//! Not simulated: TLS, HTTP, answers of `/v1`, the worker's queue, the Redis broker's connections and commands, and mailboxes
//! (`Wire::Frames`): their shard hands frames to a thread of the engine's own, which nobody steps by hand. A seed is
//! one history: the same numbers decide everything, and nothing in it depends on a clock or on the order of a map. What
//! must hold is [`oracle`]'s.

mod arriving;
mod book;
mod client;
mod dice;
mod ending;
mod network;
mod oracle;
mod publishing;
mod reader;
mod scales;
mod stepping;
mod trace;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use tabcast::proto::frame;

pub(crate) use trace::Counts;
use world::World;

/// An invariant that does not hold.
#[derive(Debug)]
pub(crate) struct Violation {
    pub(crate) invariant: &'static str,
    pub(crate) text: String,
}

impl Violation {
    fn new(invariant: &'static str, text: String) -> Self {
        Self { invariant, text }
    }
}

/// What became of a seed.
pub(crate) struct Outcome {
    /// A digest of all that happened.
    pub(crate) digest: u64,
    pub(crate) counts: Counts,
}

/// What is wrong, and what happened last.
pub(crate) struct Failure {
    pub(crate) violation: Violation,
    pub(crate) last: Vec<String>,
}

/// The byte budget is the process's: one world at a time.
static ONE_WORLD: Mutex<()> = Mutex::new(());

/// Runs one seed to its end.
pub(crate) fn run(seed: u64) -> Result<Outcome, Failure> {
    let _turn = ONE_WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    let before = frame::live_bytes();
    let mut world = World::new(seed);
    let result = catch_unwind(AssertUnwindSafe(|| world.live()));
    let result = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(Violation::new("nothing_panics", text.unwrap_or_default()))
    });
    if let Err(violation) = result {
        let last = world.trace.last();
        // What panicked may do so again when it is dropped.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(world)));
        return Err(Failure { violation, last });
    }
    let (digest, counts, last) = (world.trace.digest(), world.counts(), world.trace.last());
    drop(world);
    let after = frame::live_bytes();
    if after != before {
        let text = format!("{} bytes of frames are left", after.wrapping_sub(before));
        return Err(Failure { violation: Violation::new("everything_is_given_back", text), last });
    }
    Ok(Outcome { digest, counts })
}
