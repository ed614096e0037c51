//! The registry: which sessions a user has, in connection order.
//!
//! A user's sessions are one immutable list behind an `Arc`: a look-up clones it under the map's read lock, and
//! whoever iterates it holds no lock. Every change happens inside `entry()`, so that "the last tab goes" and
//! "the first tab comes" are decided under the same lock; displaced lists are dropped after it.
//!
//! loom looks at it through a map of its own, whose entries are locked as the real one's are; the real one is under the
//! thread sanitizer (`threads_come_and_go_and_nobody_is_lost_or_left_behind`), and an oracle checks what it does.

use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::fanout::session::SessionRef;
use crate::fanout::sync::{AtomicUsize, Entry, Map, Ordering};
use crate::id::UserId;

/// The map's shards: a fixed, generous number, so that one insert never rehashes much (256 × 128 bytes).
const MAP_SHARDS: usize = 256;

/// A snapshot of a user's sessions, in connection order.
pub type Sessions = Arc<[SessionRef]>;

/// The user has as many sessions as one user may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the user has {tabs_max} sessions, which is as many as one user may have")]
pub struct TooManyTabs {
    /// The limit.
    pub tabs_max: usize,
}

/// Which sessions a user has. What a user costs is in the crate's documentation.
pub struct Registry {
    users: Map<UserId, Sessions, RandomState>,
    sessions: AtomicUsize,
    /// # Ordering
    /// Relaxed: it says nothing about any other memory; who sees a new one late goes by the one before.
    tabs_per_user_max: AtomicUsize,
}

impl Registry {
    /// An empty one.
    #[must_use]
    pub fn new(tabs_per_user_max: usize) -> Self {
        let users = Map::with_capacity_and_hasher_and_shard_amount(0, RandomState::default(), MAP_SHARDS);
        Self { users, sessions: AtomicUsize::new(0), tabs_per_user_max: AtomicUsize::new(tabs_per_user_max) }
    }

    /// From now on a user may have so many sessions. Those who have more keep them.
    pub fn limit_tabs_per_user(&self, tabs_max: usize) {
        self.tabs_per_user_max.store(tabs_max, Ordering::Relaxed);
    }

    /// How many sessions a user may have.
    #[must_use]
    pub fn tabs_per_user_max(&self) -> usize {
        self.tabs_per_user_max.load(Ordering::Relaxed)
    }

    /// Adds a session behind the user's others.
    ///
    /// # Errors
    /// [`TooManyTabs`]: nothing was added.
    pub fn connect(&self, session: SessionRef) -> Result<(), TooManyTabs> {
        let tabs_max = self.tabs_per_user_max();
        let displaced = match self.users.entry(session.user().clone()) {
            Entry::Vacant(entry) => {
                drop(entry.insert(Arc::from([session])));
                None
            }
            Entry::Occupied(entry) if entry.get().len() >= tabs_max => return Err(TooManyTabs { tabs_max }),
            Entry::Occupied(mut entry) => {
                let list = entry.get().iter().cloned().chain([session]).collect();
                Some(entry.insert(list))
            }
        };
        drop(displaced);
        // Relaxed: a statistic, publishes nothing.
        self.sessions.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Removes a session, by identity; the last one out removes the user. False if it was not there.
    pub fn disconnect(&self, session: &SessionRef) -> bool {
        let displaced = match self.users.entry(session.user().clone()) {
            Entry::Vacant(_) => return false,
            Entry::Occupied(mut entry) => {
                if !entry.get().contains(session) {
                    return false;
                }
                if entry.get().len() == 1 {
                    entry.remove()
                } else {
                    let list = entry.get().iter().filter(|s| *s != session).cloned().collect();
                    entry.insert(list)
                }
            }
        };
        drop(displaced);
        // Relaxed: a statistic, publishes nothing.
        self.sessions.fetch_sub(1, Ordering::Relaxed);
        true
    }

    /// The user's sessions now. Iterating them takes no lock.
    #[must_use]
    pub fn get_sessions(&self, user: &UserId) -> Option<Sessions> {
        self.users.get(user).map(|list| Arc::clone(list.value()))
    }

    /// Whether the user has a session on this node.
    #[must_use]
    pub fn is_online(&self, user: &UserId) -> bool {
        self.users.contains_key(user)
    }

    /// All sessions of this node. O(1).
    #[must_use]
    pub fn total_connections(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    /// How many users have a session here. Locks each of the map's parts in turn.
    #[must_use]
    pub fn user_count(&self) -> usize {
        self.users.len()
    }

    /// Those with the most sessions among `users_max` users of this node, at most `count` of them: the first with the
    /// most, and of those with as many by their ids. It takes the time of a look at each, and locks each of the map's
    /// parts in turn.
    #[must_use]
    pub fn with_most_tabs(&self, count: usize, users_max: usize) -> Vec<(UserId, usize)> {
        let mut most: Vec<(UserId, usize)> = Vec::with_capacity(count + 1);
        for entry in self.users.iter().take(users_max) {
            let (user, tabs) = (entry.key(), entry.value().len());
            let place = most.partition_point(|(other, others)| (tabs, other) < (*others, user));
            if place < count {
                most.insert(place, (user.clone(), tabs));
                most.truncate(count);
            }
        }
        most
    }

    /// The users who have a session here and how many, in no order, at most `limit` of them.
    #[must_use]
    pub fn active_users(&self, limit: usize) -> Vec<(UserId, usize)> {
        self.users.iter().take(limit).map(|entry| (entry.key().clone(), entry.value().len())).collect()
    }
}

#[cfg(test)]
#[cfg(not(tabcast_loom))]
mod tests {
    use super::*;
    use crate::fanout::session::{Address, Identity};
    use crate::proto::event::Timestamp;
    use proptest::prelude::*;

    fn session(user: &str, slot: u32) -> SessionRef {
        let identity = Identity::new(UserId::parse(user).unwrap(), Timestamp::from_micros(0));
        SessionRef::new(Address::new(0, slot, 0), Arc::new(identity))
    }

    fn user(name: &str) -> UserId {
        UserId::parse(name).unwrap()
    }

    #[test]
    fn the_last_one_out_removes_the_user_and_leaving_twice_is_nothing() {
        let registry = Registry::new(8);
        let (a, b) = (session("u", 1), session("u", 2));
        registry.connect(a.clone()).unwrap();
        registry.connect(b.clone()).unwrap();
        assert_eq!(&registry.get_sessions(&user("u")).unwrap()[..], &[a.clone(), b.clone()]);
        assert_eq!((registry.total_connections(), registry.user_count()), (2, 1));
        assert!(registry.disconnect(&a));
        assert!(!registry.disconnect(&a));
        assert!(registry.is_online(&user("u")));
        assert!(registry.disconnect(&b));
        assert!(!registry.is_online(&user("u")));
        assert_eq!((registry.total_connections(), registry.user_count()), (0, 0));
        assert!(registry.get_sessions(&user("u")).is_none());
    }

    #[test]
    fn one_tab_too_many_is_refused_and_changes_nothing() {
        let registry = Registry::new(2);
        registry.connect(session("u", 1)).unwrap();
        registry.connect(session("u", 2)).unwrap();
        assert_eq!(registry.connect(session("u", 3)), Err(TooManyTabs { tabs_max: 2 }));
        assert_eq!(registry.get_sessions(&user("u")).unwrap().len(), 2);
        assert_eq!(registry.total_connections(), 2);
    }

    #[test]
    fn those_with_the_most_tabs_are_named_first() {
        let registry = Registry::new(8);
        for (name, tabs) in [("b", 2), ("c", 1), ("a", 2), ("d", 3)] {
            for slot in 0..tabs {
                registry.connect(session(name, u32::from(name.as_bytes()[0]) * 10 + slot)).unwrap();
            }
        }
        let named = |count, users_max| {
            let most = registry.with_most_tabs(count, users_max);
            most.into_iter().map(|(user, tabs)| (user.as_str().to_owned(), tabs)).collect::<Vec<_>>()
        };
        let expected: Vec<(String, usize)> =
            [("d", 3), ("a", 2), ("b", 2), ("c", 1)].map(|(name, tabs)| (name.to_owned(), tabs)).into();
        assert_eq!(named(9, 9), expected);
        assert_eq!(named(3, 9), expected[..3]);
        assert_eq!((named(0, 9).len(), named(9, 2).len()), (0, 2));
    }

    proptest! {
        #[test]
        fn the_registry_is_a_map_of_vectors(steps in proptest::collection::vec((any::<bool>(), 0u32..3, 0u32..6), 0..120)) {
            let registry = Registry::new(4);
            let mut oracle: std::collections::BTreeMap<String, Vec<u32>> = Default::default();
            for (connect, who, slot) in steps {
                let name = format!("u{who}");
                let (slot, session) = (who * 10 + slot, session(&name, who * 10 + slot));
                let list = oracle.entry(name.clone()).or_default();
                if connect {
                    if list.contains(&slot) { continue; }
                    prop_assert_eq!(registry.connect(session).is_ok(), list.len() < 4);
                    if list.len() < 4 { list.push(slot); }
                } else {
                    prop_assert_eq!(registry.disconnect(&session), list.contains(&slot));
                    list.retain(|s| *s != slot);
                }
                if list.is_empty() { oracle.remove(&name); }
                prop_assert_eq!(registry.total_connections(), oracle.values().map(Vec::len).sum::<usize>());
                prop_assert_eq!(registry.user_count(), oracle.len());
                for (name, list) in &oracle {
                    let found: Vec<u32> = registry.get_sessions(&user(name)).unwrap().iter().map(|s| s.address().slot()).collect();
                    prop_assert_eq!(&found, list);
                }
            }
        }
    }

    #[test]
    fn threads_come_and_go_and_nobody_is_lost_or_left_behind() {
        let registry = Arc::new(Registry::new(64));
        let threads: Vec<_> = (0..4u32)
            .map(|thread| {
                let registry = registry.clone();
                std::thread::spawn(move || {
                    for round in 0..5_000u32 {
                        let session = session(&format!("u{}", round % 8), thread);
                        registry.connect(session.clone()).unwrap();
                        let seen = registry.get_sessions(session.user()).unwrap();
                        assert_eq!(seen.iter().filter(|s| **s == session).count(), 1);
                        assert!(registry.disconnect(&session));
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!((registry.total_connections(), registry.user_count()), (0, 0));
    }
}

#[cfg(all(test, tabcast_loom))]
mod loom_tests {
    use loom::thread;

    use super::*;
    use crate::fanout::session::{Address, Identity};
    use crate::proto::event::Timestamp;

    fn session(slot: u32) -> SessionRef {
        let identity = Identity::new(UserId::parse("u").unwrap(), Timestamp::from_micros(0));
        SessionRef::new(Address::new(0, slot, 0), Arc::new(identity))
    }

    /// "The last tab goes" and "the first tab comes" are decided under one lock: neither undoes the other.
    #[test]
    fn loom_who_comes_while_the_last_one_goes_is_there() {
        loom::model(|| {
            let registry = Arc::new(Registry::new(8));
            let (old, new) = (session(1), session(2));
            registry.connect(old.clone()).unwrap();
            let leaving = {
                let registry = registry.clone();
                thread::spawn(move || assert!(registry.disconnect(&old)))
            };
            registry.connect(new.clone()).unwrap();
            assert!(registry.get_sessions(new.user()).unwrap().contains(&new));
            leaving.join().unwrap();
            assert_eq!(&registry.get_sessions(new.user()).unwrap()[..], std::slice::from_ref(&new));
            assert_eq!((registry.total_connections(), registry.user_count()), (1, 1));
        });
    }

    /// A session that two threads end is ended once, and leaves no user without a session behind.
    #[test]
    fn loom_who_is_taken_out_twice_is_counted_once() {
        loom::model(|| {
            let registry = Arc::new(Registry::new(8));
            let one = session(1);
            registry.connect(one.clone()).unwrap();
            let other = {
                let (registry, one) = (registry.clone(), one.clone());
                thread::spawn(move || usize::from(registry.disconnect(&one)))
            };
            let count = usize::from(registry.disconnect(&one));
            assert_eq!(count + other.join().unwrap(), 1);
            assert_eq!((registry.total_connections(), registry.user_count()), (0, 0));
        });
    }

    /// Each puts itself behind what the other has put there: neither is lost.
    #[test]
    fn loom_two_that_come_at_once_are_both_there() {
        loom::model(|| {
            let registry = Arc::new(Registry::new(8));
            let (one, two) = (session(1), session(2));
            let other = {
                let (registry, one) = (registry.clone(), one.clone());
                thread::spawn(move || registry.connect(one).unwrap())
            };
            registry.connect(two.clone()).unwrap();
            other.join().unwrap();
            let sessions = registry.get_sessions(one.user()).unwrap();
            assert!(sessions.len() == 2 && sessions.contains(&one) && sessions.contains(&two));
        });
    }

    /// As many tabs as a user may have are never passed, also by tabs that come at once.
    #[test]
    fn loom_no_more_tabs_than_a_user_may_have() {
        loom::model(|| {
            let registry = Arc::new(Registry::new(1));
            let other = {
                let registry = registry.clone();
                thread::spawn(move || usize::from(registry.connect(session(1)).is_ok()))
            };
            let count = usize::from(registry.connect(session(2)).is_ok());
            assert_eq!(count + other.join().unwrap(), 1);
            assert_eq!(registry.total_connections(), 1);
        });
    }
}
