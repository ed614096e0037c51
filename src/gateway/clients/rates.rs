//! How often something may happen in a second: the generic cell rate algorithm, which keeps one time and no timer.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use foldhash::fast::RandomState;

use crate::driver::addresses::AddressKey;
use crate::id::UserId;

/// What a second allows may come at once.
const BURST_NANOS: u64 = 1_000_000_000;
/// Parts of the keys, so that shards' threads seldom wait for each other.
const PARTS: usize = 64;
/// Addresses, or users, of one part: what a map of 1,024 places holds, 17 KiB.
const KEYS_MAX: usize = 896;
/// How many seconds' worth a user may send at once.
const SAID_BURST_SECONDS: u64 = 10;

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

/// Until when all that each key did is worked off. A key is forgotten then, and there are up to 57,344 of them, in
/// 1.1 MiB: past that a new one is not limited.
#[derive(Debug)]
struct Dues<K> {
    state: RandomState,
    parts: Box<[Mutex<HashMap<K, u64, RandomState>>]>,
}

impl<K: Copy + Eq + Hash> Dues<K> {
    fn new() -> Self {
        Self { state: RandomState::default(), parts: (0..PARTS).map(|_| Mutex::default()).collect() }
    }

    /// Puts `next` of what is due for `key` in its place. False if there is none: nothing was counted.
    fn take(&self, key: K, now: u64, next: impl FnOnce(u64) -> Option<u64>) -> bool {
        // What a panic could have left half done is one number.
        let mut part = self.part(&key).lock().unwrap_or_else(PoisonError::into_inner);
        if part.len() >= KEYS_MAX && !part.contains_key(&key) {
            part.retain(|_, due| *due > now);
            if part.len() >= KEYS_MAX {
                return true;
            }
        }
        let due = part.entry(key).or_insert(0);
        match next(*due) {
            Some(next) => {
                *due = next;
                true
            }
            None => false,
        }
    }

    /// Until when all that `key` did is worked off.
    fn due(&self, key: K) -> u64 {
        let part = self.part(&key).lock().unwrap_or_else(PoisonError::into_inner);
        part.get(&key).copied().unwrap_or(0)
    }

    fn part(&self, key: &K) -> &Mutex<HashMap<K, u64, RandomState>> {
        &self.parts[usize::try_from(self.state.hash_one(key) % PARTS as u64).unwrap_or(0)]
    }

    #[cfg(test)]
    fn keys(&self) -> usize {
        self.parts.iter().map(|part| part.lock().unwrap().len()).sum()
    }
}

/// A rate for each address: past the bound of [`Dues`] a new one is limited by that for all together.
#[derive(Debug)]
pub(super) struct AddressRates {
    limit: Limit,
    dues: Dues<AddressKey>,
}

impl AddressRates {
    /// So many a second, and as many at once; 0: no limit.
    pub(super) fn new(per_second: usize) -> Self {
        Self { limit: Limit::new(per_second), dues: Dues::new() }
    }

    /// From now on so many.
    pub(super) fn limit(&self, per_second: usize) {
        self.limit.replace(per_second);
    }

    /// Counts one of `address` at `now`. False if it is one too many: nothing was counted.
    pub(super) fn take(&self, address: IpAddr, now: Duration) -> bool {
        let Some(rate) = self.limit.rate() else { return true };
        let now = nanos(now);
        self.dues.take(AddressKey::of(address), now, |due| rate.next(due, now))
    }

    /// Whether one more of `address` would be within the rate at `now`. Nothing is counted.
    pub(super) fn has_room(&self, address: IpAddr, now: Duration) -> bool {
        let Some(rate) = self.limit.rate() else { return true };
        rate.next(self.dues.due(AddressKey::of(address)), nanos(now)).is_some()
    }
}

/// How much each user may send by requests: as much as one session may, ten seconds' worth at once, and anything after a
/// silence.
#[derive(Debug)]
pub(super) struct SaidRates {
    /// Frames, and bytes.
    limits: [AtomicU64; 2],
    /// Users are told apart by a digest that nobody outside can predict.
    state: RandomState,
    dues: Dues<u64>,
}

impl SaidRates {
    /// So many frames and bytes a second; 0: no limit.
    pub(super) fn new(per_second: usize, bytes_per_second: usize) -> Self {
        let (state, dues) = (RandomState::default(), Dues::new());
        Self { limits: [per_second, bytes_per_second].map(|limit| AtomicU64::new(limit as u64)), state, dues }
    }

    /// From now on so many.
    ///
    /// # Ordering
    /// Relaxed: two numbers, which say nothing about any other memory, nor about each other.
    pub(super) fn limit(&self, per_second: usize, bytes_per_second: usize) {
        for (limit, new) in self.limits.iter().zip([per_second, bytes_per_second]) {
            limit.store(new as u64, Ordering::Relaxed);
        }
    }

    /// Counts one frame of `user` at `now`. False if it is too much: nothing was counted.
    pub(super) fn take(&self, user: &UserId, bytes: usize, now: Duration) -> bool {
        let cost = |count: u64, per_second| match per_second {
            0 => 0,
            per_second => count.saturating_mul(BURST_NANOS) / per_second,
        };
        let [per_second, bytes_per_second] = [0, 1].map(|at: usize| self.limits[at].load(Ordering::Relaxed));
        let cost = cost(1, per_second).max(cost(bytes as u64, bytes_per_second));
        if cost == 0 {
            return true;
        }
        let now = nanos(now);
        self.dues.take(self.state.hash_one(user), now, |due| {
            let next = due.max(now).saturating_add(cost);
            (due <= now || next - now <= SAID_BURST_SECONDS * BURST_NANOS).then_some(next)
        })
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
        assert!(rates.dues.keys() <= PARTS * KEYS_MAX);
        // All that they did is worked off.
        assert!((200_000..200_000 + 57_344).all(|n| rates.take(address(n), at(2_000))));
        assert!((200_000..200_100).all(|n| !rates.take(address(n), at(2_000))));
        assert!(rates.dues.keys() <= PARTS * KEYS_MAX);
    }

    #[test]
    fn a_user_sends_as_much_as_one_session_may() {
        let (one, other) = (UserId::parse("one").unwrap(), UserId::parse("other").unwrap());
        let taken =
            |rates: &SaidRates, millis, bytes| (0..1_000).filter(|_| rates.take(&one, bytes, at(millis))).count();
        let rates = SaidRates::new(20, 1_000);
        assert_eq!([0, 0, 50, 60_000].map(|millis| taken(&rates, millis, 10)), [200, 0, 1, 200]);
        assert!(rates.take(&other, 10, at(60_000)));
        // By their bytes; and one of any length after a silence.
        let rates = SaidRates::new(20, 1_000);
        assert_eq!([0, 9_000, 10_000].map(|millis| taken(&rates, millis, 500)), [20, 18, 2]);
        assert_eq!([60_000, 100_000].map(|millis| taken(&rates, millis, 50_000)), [1, 0]);
        let unlimited = SaidRates::new(0, 0);
        assert_eq!(taken(&unlimited, 0, 1 << 20), 1_000);
    }

    #[test]
    fn there_is_room_for_what_would_be_counted() {
        let (rates, one) = (AddressRates::new(2), IpAddr::from([192, 0, 2, 1]));
        for (millis, taken) in
            [(0, true), (0, true), (0, false), (499, false), (500, true), (500, false), (9_000, true)]
        {
            assert_eq!(rates.has_room(one, at(millis)), taken, "{millis}");
            assert_eq!(rates.has_room(one, at(millis)), taken, "nothing is counted by asking");
            assert_eq!(rates.take(one, at(millis)), taken, "{millis}");
        }
        assert!((0..9).all(|_| AddressRates::new(0).has_room(one, at(0))));
    }

    #[test]
    fn one_address_is_not_charged_for_another() {
        let rates = AddressRates::new(2);
        let [one, other] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
        assert!(rates.take(one, at(0)) && rates.take(one, at(0)) && !rates.take(one, at(0)));
        assert!(rates.take(other, at(0)));
    }
}
