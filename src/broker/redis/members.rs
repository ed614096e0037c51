//! Which nodes are alive, as this one knows it.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};

use redis::Value;

use crate::broker::redis::keys::NodeName;

/// The nodes that are alive, and those that are known to know of this one.
#[derive(Debug)]
pub(crate) struct Members {
    me: NodeName,
    state: Mutex<State>,
    /// Whether `others` is not empty.
    ///
    /// # Ordering
    /// Relaxed: a node that has just come does not take sessions before it was seen here (see [`Self::unseen`]).
    has_others: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    others: HashSet<NodeName>,
    /// Those that have said that they know of this node.
    seen_by: HashSet<NodeName>,
}

impl Members {
    pub(crate) fn new(me: NodeName) -> Self {
        Self { me, state: Mutex::default(), has_others: AtomicBool::new(false) }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        self.has_others.store(!state.others.is_empty(), Ordering::Relaxed);
        result
    }

    /// Replaces the nodes that are alive.
    pub(crate) fn set(&self, live: impl IntoIterator<Item = NodeName>) {
        let others: HashSet<_> = live.into_iter().filter(|node| *node != self.me).collect();
        self.change(|state| {
            state.seen_by.retain(|node| others.contains(node));
            state.others = others;
        });
    }

    /// A node has told that it is there.
    pub(crate) fn add(&self, node: NodeName) {
        if node != self.me {
            self.change(|state| state.others.insert(node));
        }
    }

    /// A node has told that it knows of this one.
    pub(crate) fn seen_by(&self, node: NodeName) {
        self.change(|state| {
            state.others.insert(node);
            state.seen_by.insert(node)
        });
    }

    /// Nodes that are alive and may not know of this one.
    pub(crate) fn unseen(&self) -> usize {
        self.change(|state| state.others.difference(&state.seen_by).count())
    }

    pub(crate) fn has_others(&self) -> bool {
        self.has_others.load(Ordering::Relaxed)
    }

    /// All of them, this one included.
    pub(crate) fn count(&self) -> usize {
        self.change(|state| state.others.len() + 1)
    }

    pub(crate) fn others(&self) -> Vec<NodeName> {
        self.change(|state| state.others.iter().copied().collect())
    }

    pub(crate) fn is_live(&self, node: NodeName) -> bool {
        node == self.me || self.change(|state| state.others.contains(&node))
    }

    /// The other nodes that a set in Redis names and that are alive.
    pub(crate) fn among(&self, set: &Value) -> Vec<NodeName> {
        let (Value::Array(members) | Value::Set(members)) = set else { return Vec::new() };
        let named = members.iter().filter_map(node);
        self.change(|state| named.filter(|node| state.others.contains(node)).collect())
    }
}

/// A node's name as an answer has it.
pub(crate) fn node(value: &Value) -> Option<NodeName> {
    match value {
        Value::BulkString(name) => NodeName::parse(std::str::from_utf8(name).ok()?),
        _ => None,
    }
}
