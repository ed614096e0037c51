//! The atomics that cross threads, or loom's models of them in unit tests under `--cfg tabcast_loom`.

#[cfg(all(test, tabcast_loom))]
pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
#[cfg(not(all(test, tabcast_loom)))]
pub(crate) use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
