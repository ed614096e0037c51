//! Which nodes are alive, as this one knows it.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use redis::Value;
use tokio::time::Instant;

use crate::broker::redis::keys::NodeName;

/// How long after a connection was lost what is in Redis may not be complete: until every node has noticed, has connected
/// again and has written what it has.
const DOUBT: Duration = Duration::from_secs(5);

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
    /// Until then Redis may not know all that it knew: it may have come back empty.
    doubtful: Option<Instant>,
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

    /// Replaces the nodes that are alive; while that is doubtful, those that were are too.
    pub(crate) fn set(&self, live: impl IntoIterator<Item = NodeName>) {
        let mut others: HashSet<_> = live.into_iter().filter(|node| *node != self.me).collect();
        self.change(|state| {
            if state.is_doubtful() {
                others.extend(&state.others);
            }
            state.seen_by.retain(|node| others.contains(node));
            state.others = others;
        });
    }

    /// A connection was lost: Redis may come back empty, and the other nodes write what they have only then.
    pub(crate) fn doubt(&self) {
        self.change(|state| state.doubtful = Some(Instant::now() + DOUBT));
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

    /// Those that may have what a set in Redis is about: all that are alive, while it may not be complete.
    pub(crate) fn at_least_among(&self, set: &Value) -> Vec<NodeName> {
        if self.is_doubtful() { self.others() } else { self.among(set) }
    }

    /// Whether what is in Redis may not be complete.
    pub(crate) fn is_doubtful(&self) -> bool {
        self.change(|state| state.is_doubtful())
    }
}

impl State {
    fn is_doubtful(&self) -> bool {
        self.doubtful.is_some_and(|until| Instant::now() < until)
    }
}

/// A node's name as an answer has it.
pub(crate) fn node(value: &Value) -> Option<NodeName> {
    match value {
        Value::BulkString(name) => NodeName::parse(std::str::from_utf8(name).ok()?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn nodes_are_not_given_up_while_redis_may_have_come_back_empty() {
        let [me, a, b] = [NodeName(1), NodeName(2), NodeName(3)];
        let members = Members::new(me);
        members.set([me, a, b]);
        let set = Value::Array(vec![Value::BulkString(a.to_string().into_bytes())]);
        assert_eq!((members.count(), members.at_least_among(&set)), (3, vec![a]));
        members.doubt();
        members.set([me]);
        assert_eq!(members.count(), 3);
        assert_eq!(members.at_least_among(&Value::Array(Vec::new())).len(), 2, "whoever may have it");
        assert!(members.among(&Value::Array(Vec::new())).is_empty());
        tokio::time::advance(DOUBT).await;
        assert_eq!(members.at_least_among(&set), [a]);
        members.set([me, b]);
        assert_eq!((members.count(), members.is_live(a), members.has_others()), (2, false, true));
        assert_eq!(members.unseen(), 1);
        members.seen_by(b);
        assert_eq!(members.unseen(), 0);
    }
}
