//! Where replies come from: what runs a [`MessageHandler`](crate::platform::adapter::MessageHandler) for each message.
//!
//! All workers stand behind one queue, [`Inlet`](crate::platform::dispatch::Inlet): the built-in [`demo`], the
//! [`webhook`], workers on streams of Redis, or an embedder's own handler.

pub mod demo;
#[cfg(feature = "redis")]
pub mod redis;
pub mod webhook;

use tokio::task::{JoinError, JoinSet};

use crate::platform::dispatch::Runner;

/// Runs the lanes of a worker's queue, each on a task of its own, until the inlet is closed and all is handled.
///
/// # Cancel safety
/// Dropping it ends the lanes where they are: what they were handling is lost, and what waits is not handled.
pub async fn run(mut runner: Runner) {
    let mut lanes = JoinSet::new();
    loop {
        tokio::select! {
            lane = runner.next() => match lane {
                Some(lane) => {
                    lanes.spawn(lane.run());
                }
                None => break,
            },
            Some(ended) = lanes.join_next(), if !lanes.is_empty() => report(ended),
        }
    }
    while let Some(ended) = lanes.join_next().await {
        report(ended);
    }
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a message handler panicked; its message is lost");
    }
}
