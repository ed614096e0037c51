//! A map with the face of `DashMap` that loom can look into: one lock, held for as long as an entry is.
//!
//! It is coarser than the original, where two users may be in different parts of the map, and so has fewer
//! interleavings of them; of one user, or one room, it has all.

use std::collections::HashMap;
use std::hash::Hash;
use std::marker::PhantomData;
use std::ops::Deref;

use loom::sync::{Mutex, MutexGuard};

pub(crate) struct Map<K, V, S> {
    entries: Mutex<HashMap<K, V>>,
    hasher: PhantomData<fn() -> S>,
}

impl<K: Eq + Hash + Clone, V, S> Map<K, V, S> {
    pub(crate) fn with_hasher(_: S) -> Self {
        Self { entries: Mutex::new(HashMap::new()), hasher: PhantomData }
    }

    pub(crate) fn with_capacity_and_hasher_and_shard_amount(_: usize, hasher: S, _: usize) -> Self {
        Self::with_hasher(hasher)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, V>> {
        self.entries.lock().unwrap()
    }

    pub(crate) fn entry(&self, key: K) -> Entry<'_, K, V> {
        let entry = Held { entries: self.lock(), key };
        if entry.entries.contains_key(&entry.key) { Entry::Occupied(entry) } else { Entry::Vacant(Absent(entry)) }
    }

    pub(crate) fn get(&self, key: &K) -> Option<Held<'_, K, V>> {
        match self.entry(key.clone()) {
            Entry::Occupied(entry) => Some(entry),
            Entry::Vacant(_) => None,
        }
    }

    pub(crate) fn contains_key(&self, key: &K) -> bool {
        self.lock().contains_key(key)
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// A copy, one at a time: nobody iterates it in a model.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Held<'_, K, V>> {
        let keys: Vec<K> = self.lock().keys().cloned().collect();
        keys.into_iter().filter_map(|key| self.get(&key))
    }
}

pub(crate) enum Entry<'m, K, V> {
    Occupied(Held<'m, K, V>),
    Vacant(Absent<'m, K, V>),
}

/// An entry that is there. The map is locked until it is dropped.
pub(crate) struct Held<'m, K, V> {
    entries: MutexGuard<'m, HashMap<K, V>>,
    key: K,
}

impl<'m, K: Eq + Hash + Clone, V> Held<'m, K, V> {
    pub(crate) fn get(&self) -> &V {
        &self.entries[&self.key]
    }

    pub(crate) fn key(&self) -> &K {
        &self.key
    }

    pub(crate) fn value(&self) -> &V {
        self.get()
    }

    pub(crate) fn insert(&mut self, value: V) -> V {
        self.entries.insert(self.key.clone(), value).unwrap()
    }

    pub(crate) fn remove(self) -> V {
        self.remove_entry().1
    }

    pub(crate) fn remove_entry(mut self) -> (K, V) {
        self.entries.remove_entry(&self.key).unwrap()
    }

    pub(crate) fn into_ref(self) -> Self {
        self
    }
}

impl<K: Eq + Hash + Clone, V> Deref for Held<'_, K, V> {
    type Target = V;

    fn deref(&self) -> &V {
        self.get()
    }
}

/// The place of an entry that is not there.
pub(crate) struct Absent<'m, K, V>(Held<'m, K, V>);

impl<'m, K: Eq + Hash + Clone, V> Absent<'m, K, V> {
    pub(crate) fn insert(mut self, value: V) -> Held<'m, K, V> {
        self.0.entries.insert(self.0.key.clone(), value);
        self.0
    }
}
