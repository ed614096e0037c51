//! How often something may happen in a second: the generic cell rate algorithm, which keeps one time and no timer.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use foldhash::fast::RandomState;

use crate::driver::addresses::AddressKey;

/// What a second allows may come at once.
const BURST_NANOS: u64 = 1_000_000_000;
/// Parts of the addresses, so that shards' threads seldom wait for each other.
const PARTS: usize = 64;
/// Addresses of one part: what a map of 1,024 places holds, 17 KiB.
const ADDRESSES_MAX: usize = 896;

/// So many a second.
#[derive(Debug, Clone, Copy)]
struct Rate {
    interval_nanos: u64,
}

/// A rate that may become another.
///
/// # Ordering
/// Relaxed: one number, which says nothing about any other memory.
#[derive(Debug)]
struct Limit(AtomicU64);

impl Limit {
    /// So many a second; 0: no limit.
    fn new(per_second: usize) -> Self {
        Self(AtomicU64::new(per_second as u64))
    }

    fn replace(&self, per_second: usize) {
        self.0.store(per_second as u64, Ordering::Relaxed);
    }

    /// None: no limit.
    fn rate(&self) -> Option<Rate> {
        let per_second = self.0.load(Ordering::Relaxed);
        (per_second > 0).then(|| Rate { interval_nanos: (BURST_NANOS / per_second).max(1) })
    }
}

impl Rate {
    /// One more at `now`, when all before it are worked off at `due`: until when it is. None if that is too far ahead.
    fn next(self, due: u64, now: u64) -> Option<u64> {
        let next = due.max(now) + self.interval_nanos;
        (next - now <= BURST_NANOS).then_some(next)
    }
}

fn nanos(now: Duration) -> u64 {
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX / 2)
}

/// A rate for all together.
#[derive(Debug)]
pub(super) struct TotalRate {
    limit: Limit,
    due: AtomicU64,
}

impl TotalRate {
    /// So many a second, and as many at once; 0: no limit.
    pub(super) fn new(per_second: usize) -> Self {
        Self { limit: Limit::new(per_second), due: AtomicU64::new(0) }
    }

    /// From now on so many.
    pub(super) fn limit(&self, per_second: usize) {
        self.limit.replace(per_second);
    }

    /// Counts one at `now`. False if it is one too many: nothing was counted.
    ///
    /// # Ordering
    /// Relaxed: one number, which says nothing about any other memory.
    pub(super) fn take(&self, now: Duration) -> bool {
        let Some(rate) = self.limit.rate() else { return true };
        let now = nanos(now);
        self.due.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |due| rate.next(due, now)).is_ok()
    }
}

/// A rate for each address. An address is forgotten when all that it did is worked off, a second later at the most, and
/// there are up to 57,344 of them, in 1.1 MiB: past that a new one is not limited, but for all together.
#[derive(Debug)]
pub(super) struct AddressRates {
    limit: Limit,
    state: RandomState,
    parts: Box<[Mutex<HashMap<AddressKey, u64, RandomState>>]>,
}

impl AddressRates {
    /// So many a second, and as many at once; 0: no limit.
    pub(super) fn new(per_second: usize) -> Self {
        let parts = (0..PARTS).map(|_| Mutex::default()).collect();
        Self { limit: Limit::new(per_second), state: RandomState::default(), parts }
    }

    /// From now on so many.
    pub(super) fn limit(&self, per_second: usize) {
        self.limit.replace(per_second);
    }

    /// Counts one of `address` at `now`. False if it is one too many: nothing was counted.
    pub(super) fn take(&self, address: IpAddr, now: Duration) -> bool {
        let Some(rate) = self.limit.rate() else { return true };
        let now = nanos(now);
        let key = AddressKey::of(address);
        let part = usize::try_from(self.state.hash_one(key) % PARTS as u64).unwrap_or(0);
        // What a panic could have left half done is one number.
        let mut part = self.parts[part].lock().unwrap_or_else(PoisonError::into_inner);
        if part.len() >= ADDRESSES_MAX && !part.contains_key(&key) {
            part.retain(|_, due| *due > now);
            if part.len() >= ADDRESSES_MAX {
                return true;
            }
        }
        let due = part.entry(key).or_insert(0);
        match rate.next(*due, now) {
            Some(next) => {
                *due = next;
                true
            }
            None => false,
        }
    }

    #[cfg(test)]
    fn addresses(&self) -> usize {
        self.parts.iter().map(|part| part.lock().unwrap().len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_seconds_worth_at_once_and_then_one_by_one() {
        let check = |per_second: usize, asked_at: &[(u64, usize)], expected: &[usize]| {
            let (total, addresses) = (TotalRate::new(per_second), AddressRates::new(per_second));
            let one = IpAddr::from([192, 0, 2, 1]);
            let taken = |take: &dyn Fn(Duration) -> bool| -> Vec<usize> {
                asked_at.iter().map(|(millis, asks)| (0..*asks).filter(|_| take(at(*millis))).count()).collect()
            };
            assert_eq!(taken(&|now| total.take(now)), expected, "{per_second}");
            assert_eq!(taken(&|now| addresses.take(one, now)), expected, "{per_second}");
        };
        check(10, &[(0, 50), (100, 50), (150, 50), (200, 50), (10_000, 50)], &[10, 1, 0, 1, 10]);
        check(1, &[(0, 2), (999, 2), (1_000, 2)], &[1, 0, 1]);
        check(3, &[(5_000, 9), (5_334, 9)], &[3, 1]);
        check(usize::MAX, &[(0, 1_000)], &[1_000]);
        check(0, &[(0, 1_000)], &[1_000]);
    }

    #[test]
    fn addresses_are_forgotten_and_have_a_bound() {
        let rates = AddressRates::new(1);
        let address = |n: u32| IpAddr::from((n | 0x0a00_0000).to_be_bytes());
        assert!((0..200_000).all(|n| rates.take(address(n), at(0))));
        assert!(rates.addresses() <= PARTS * ADDRESSES_MAX);
        // All that they did is worked off.
        assert!((200_000..200_000 + 57_344).all(|n| rates.take(address(n), at(2_000))));
        assert!((200_000..200_100).all(|n| !rates.take(address(n), at(2_000))));
        assert!(rates.addresses() <= PARTS * ADDRESSES_MAX);
    }

    #[test]
    fn one_address_is_not_charged_for_another() {
        let rates = AddressRates::new(2);
        let [one, other] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
        assert!(rates.take(one, at(0)) && rates.take(one, at(0)) && !rates.take(one, at(0)));
        assert!(rates.take(other, at(0)));
    }
}
