//! Whole worlds in one thread, thousands of them: nodes, shards, a lossy network, slow, stalled, resetting and malicious
//! clients, and time, all decided by a seed. After every step the books are compared with what happened: see
//! `support/simulator/oracle.rs` for what must hold.
//!
//! `SIMULATOR_SEEDS=20000` runs more of them, from `SIMULATOR_FIRST` on; `SIMULATOR_SEED=7` runs that one.
#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/simulator/mod.rs"]
mod simulator;

use simulator::{Counts, run};

/// Seeds of one run, if nothing else is said.
const SEEDS: u64 = 2_000;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, and not {text:?}")))
}

/// Runs a seed, or shows how it failed and how to see that again.
fn try_seed(seed: u64) -> (u64, Counts) {
    match run(seed) {
        Ok(outcome) => (outcome.digest, outcome.counts),
        Err(failure) => panic!(
            "seed {seed} breaks `{}`: {}\n\nwhat happened last:\n  {}\n\nto see it again:\n  SIMULATOR_SEED={seed} cargo test \
             --no-default-features --features redis --test frames_survive_a_hostile_world",
            failure.violation.invariant,
            failure.violation.text,
            failure.last.join("\n  "),
        ),
    }
}

#[test]
fn whatever_the_world_does_frames_arrive_once_and_in_order_or_the_tab_is_told() {
    if let Some(seed) = number("SIMULATOR_SEED") {
        try_seed(seed);
        return;
    }
    let first = number("SIMULATOR_FIRST").unwrap_or(1);
    for seed in first..first + number("SIMULATOR_SEEDS").unwrap_or(SEEDS) {
        try_seed(seed);
    }
}

#[test]
fn a_seed_is_one_history() {
    for seed in 1..=40 {
        assert_eq!(try_seed(seed), try_seed(seed), "seed {seed}");
    }
    assert_ne!(try_seed(1).0, try_seed(2).0);
}

/// A world in which nothing goes wrong finds nothing: all of this has to happen to somebody.
#[test]
fn the_worlds_are_hostile() {
    let mut sum = Counts::default();
    (1..=150).for_each(|seed| sum.add(&try_seed(seed).1));
    assert_eq!(sum.missing(), Vec::<&str>::new(), "{sum:?}");
}
