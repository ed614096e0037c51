//! Clients' addresses: which of them count as one, and how many of something each has.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::Entry;
use foldhash::fast::RandomState;

/// Parts of the map, so that shards' threads seldom meet at one.
const MAP_SHARDS: usize = 64;

/// Addresses that count as one: an IPv4 address, or the /64 of an IPv6 address, which is what one subscriber gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressKey(NonZeroU64);

impl AddressKey {
    /// The key of an address; an IPv4 address in an IPv6 one is the IPv4 address.
    ///
    /// ```
    /// use tabcast::driver::addresses::AddressKey;
    ///
    /// let of = |text: &str| AddressKey::of(text.parse().expect("an address"));
    /// assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
    /// assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
    /// assert_eq!(of("192.0.2.1"), of("::ffff:192.0.2.1"));
    /// assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    /// ```
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        let number = match address.to_canonical() {
            // In 0:1::/32, which nobody has.
            IpAddr::V4(address) => 1 << 32 | u64::from(address.to_bits()),
            IpAddr::V6(address) => (address.to_bits() >> 64) as u64,
        };
        // `::/64` is where `::1` is; the place that it takes is one of multicast.
        Self(NonZeroU64::new(number).unwrap_or(NonZeroU64::MAX))
    }
}

/// The address has as many as it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this address has all {max} that it may have (behind a proxy of yours: see trusted_proxies)")]
pub struct TooManyOfAddress {
    /// How many that is.
    pub max: usize,
}

/// How many of something each address has, in the whole process.
///
/// An address takes 17 bytes of a map that is between seven sixteenths and seven eighths full, up to 40, and is forgotten
/// with its last place: so there are no more of them than of what is counted. The map keeps the size of the largest number
/// that there was at once.
#[derive(Debug)]
pub struct AddressCounts {
    /// 0: no limit.
    ///
    /// # Ordering
    /// Relaxed: it says nothing about any other memory.
    max: AtomicUsize,
    counts: DashMap<AddressKey, u32, RandomState>,
}

impl AddressCounts {
    /// At most `max` for each address. None if that is 0: then nothing is counted.
    #[must_use]
    pub fn new(max: usize) -> Option<Arc<Self>> {
        (max > 0).then(|| Self::counting(max))
    }

    /// At most `max` for each address; with 0 they are counted and not limited.
    #[must_use]
    pub fn counting(max: usize) -> Arc<Self> {
        let counts = DashMap::with_capacity_and_hasher_and_shard_amount(0, RandomState::default(), MAP_SHARDS);
        Arc::new(Self { max: AtomicUsize::new(max), counts })
    }

    /// From now on at most `max`, 0: no limit. Who has more keeps them.
    pub fn limit(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Takes a place for `address`, until it is dropped.
    ///
    /// # Errors
    /// [`TooManyOfAddress`]: nothing was taken.
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Result<Place, TooManyOfAddress> {
        let key = AddressKey::of(address);
        let max = self.max.load(Ordering::Relaxed);
        let mut count = self.counts.entry(key).or_insert(0);
        if max > 0 && *count as usize >= max {
            return Err(TooManyOfAddress { max });
        }
        *count += 1;
        drop(count);
        Ok(Place { counts: Arc::clone(self), key })
    }

    /// Addresses that have any.
    #[must_use]
    pub fn addresses(&self) -> usize {
        self.counts.len()
    }
}

/// One of what an address may have. Dropped, it is free again.
#[derive(Debug)]
pub struct Place {
    counts: Arc<AddressCounts>,
    key: AddressKey,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = self.counts.counts.entry(self.key) {
            match entry.get() {
                0 | 1 => drop(entry.remove()),
                _ => *entry.get_mut() -= 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_limit_may_come_later_and_counts_who_was_there() {
        assert!(AddressCounts::new(0).is_none());
        let counts = AddressCounts::counting(0);
        let one = address("192.0.2.1");
        let held: Vec<_> = (0..5).map(|_| counts.take(one).unwrap()).collect();
        counts.limit(3);
        assert_eq!(counts.take(one).unwrap_err(), TooManyOfAddress { max: 3 });
        counts.limit(6);
        let sixth = counts.take(one).unwrap();
        assert!(counts.take(one).is_err());
        drop((held, sixth));
        assert_eq!(counts.addresses(), 0);
    }

    #[test]
    fn an_address_has_as_many_as_it_may_and_is_forgotten_with_the_last() {
        let counts = AddressCounts::new(2).unwrap();
        let first = counts.take(address("192.0.2.1")).unwrap();
        let second = counts.take(address("::ffff:192.0.2.1")).unwrap();
        assert_eq!(counts.take(address("192.0.2.1")).unwrap_err(), TooManyOfAddress { max: 2 });
        let other = counts.take(address("192.0.2.2")).unwrap();
        assert_eq!(counts.addresses(), 2);
        drop(first);
        let third = counts.take(address("192.0.2.1")).unwrap();
        assert!(counts.take(address("192.0.2.1")).is_err());
        drop((second, third, other));
        assert_eq!(counts.addresses(), 0);
        assert!(AddressCounts::new(0).is_none());
    }

    #[test]
    fn an_ipv6_address_counts_by_its_64() {
        let counts = AddressCounts::new(1).unwrap();
        let _first = counts.take(address("2001:db8:1:2::1")).unwrap();
        assert!(counts.take(address("2001:db8:1:2:ffff::9")).is_err());
        assert!(counts.take(address("2001:db8:1:3::1")).is_ok());
        // Those that could be mistaken for each other.
        let keys: std::collections::HashSet<_> =
            ["::1", "0.0.0.0", "127.0.0.1", "0.0.0.1", "255.255.255.255", "::1:0:0:0:0", "fe80::1", "0:0:0:1::"]
                .map(|text| AddressKey::of(address(text)))
                .into();
        // `::1:0:0:0:0` is in 0:0:0:1::/64.
        assert_eq!(keys.len(), 7);
    }

    #[test]
    fn places_taken_and_given_back_by_many_threads_leave_nothing() {
        let counts = AddressCounts::new(50).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4_u8 {
                let counts = &counts;
                scope.spawn(move || {
                    for turn in 0..2_000_u16 {
                        let places = (0..20).map(|n| counts.take(IpAddr::from([10, 0, (turn % 3) as u8, n % 2])));
                        let places: Vec<_> = places.filter_map(Result::ok).collect();
                        assert!(!places.is_empty(), "{thread}");
                    }
                });
            }
        });
        assert_eq!(counts.addresses(), 0);
    }
}
