//! One number each: counters and gauges, written by one thread or by any.

use std::sync::atomic::{AtomicU64, Ordering};

/// A sum that one thread writes and any thread reads.
///
/// An increment is a load and a store, not a read-modify-write: a tenth of its cost, and exact as long as only one
/// thread writes. Two writers would lose counts, and nothing else.
///
/// # Ordering
/// Relaxed: a statistic, publishes nothing.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. Only from the one thread that writes this counter.
    #[inline]
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    /// Adds one. Only from the one thread that writes this counter.
    #[inline]
    pub fn increment(&self) {
        self.add(1);
    }

    /// The sum so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A level that one thread writes and any thread reads.
///
/// # Ordering
/// Relaxed: a statistic, publishes nothing.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Replaces the level.
    #[inline]
    pub fn store(&self, level: u64) {
        self.0.store(level, Ordering::Relaxed);
    }

    /// Raises the level. Only from the one thread that writes this gauge.
    #[inline]
    pub fn raise(&self, by: u64) {
        self.store(self.value().wrapping_add(by));
    }

    /// Lowers the level, to nothing at the least. Only from the one thread that writes this gauge.
    #[inline]
    pub fn lower(&self, by: u64) {
        self.store(self.value().saturating_sub(by));
    }

    /// The level now.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A sum that any thread writes: for what happens once an event or once a request, never once a tab.
///
/// # Ordering
/// Relaxed: a statistic, publishes nothing.
#[derive(Debug, Default)]
pub struct SharedCounter(AtomicU64);

impl SharedCounter {
    /// Adds `count`.
    #[inline]
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds one.
    #[inline]
    pub fn increment(&self) {
        self.add(1);
    }

    /// The sum so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A level that any thread writes.
///
/// # Ordering
/// Relaxed: a statistic, or a bound on bytes; it publishes nothing.
#[derive(Debug, Default)]
pub struct SharedGauge(AtomicU64);

impl SharedGauge {
    /// Raises the level, and gives what it was before.
    pub fn raise(&self, by: u64) -> u64 {
        self.0.fetch_add(by, Ordering::Relaxed)
    }

    /// Lowers the level.
    pub fn lower(&self, by: u64) {
        self.0.fetch_sub(by, Ordering::Relaxed);
    }

    /// Replaces the level.
    pub fn store(&self, level: u64) {
        self.0.store(level, Ordering::Relaxed);
    }

    /// The level now.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What only grows.
pub trait Add: Reading + Default {
    /// Adds `count`.
    fn add(&self, count: u64);
}

impl Add for Counter {
    #[inline]
    fn add(&self, count: u64) {
        Self::add(self, count);
    }
}

impl Add for SharedCounter {
    #[inline]
    fn add(&self, count: u64) {
        Self::add(self, count);
    }
}

/// What can be summed over shards.
pub trait Reading {
    /// The value now.
    fn reading(&self) -> u64;
}

macro_rules! reading {
    ($($kind:ty),*) => {
        $(impl Reading for $kind {
            fn reading(&self) -> u64 {
                self.value()
            }
        })*
    };
}

reading!(Counter, Gauge, SharedCounter, SharedGauge);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_goes_up_and_down_but_never_below_nothing() {
        let gauge = Gauge::default();
        gauge.raise(3);
        gauge.lower(1);
        assert_eq!(gauge.value(), 2);
        gauge.lower(5);
        assert_eq!(gauge.value(), 0);
    }
}
