//! What crosses threads, or loom's models of it in unit tests under `--cfg tabcast_loom`: atomics, the map whose
//! entries are locked, and the bell of a consumer that sleeps.

#[cfg(all(test, tabcast_loom))]
mod modelled_bell;
#[cfg(all(test, tabcast_loom))]
mod modelled_map;

#[cfg(not(all(test, tabcast_loom)))]
pub(crate) use atomic_waker::AtomicWaker as Bell;
#[cfg(not(all(test, tabcast_loom)))]
pub(crate) use dashmap::DashMap as Map;
#[cfg(not(all(test, tabcast_loom)))]
pub(crate) use dashmap::mapref::entry::Entry;
#[cfg(all(test, tabcast_loom))]
pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
#[cfg(all(test, tabcast_loom))]
pub(crate) use modelled_bell::Bell;
#[cfg(all(test, tabcast_loom))]
pub(crate) use modelled_map::{Entry, Map};
#[cfg(not(all(test, tabcast_loom)))]
pub(crate) use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
