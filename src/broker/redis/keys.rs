//! The names of everything in Redis.
//!
//! An id that somebody chose is only ever a part of one name: it is never parsed there, and the braces that choose a
//! cluster's slot are escaped in it.

use std::fmt;
use std::sync::Arc;

use crate::id::{RequestId, UserId};

/// A node of this deployment: random, new with each start, so that it also tells one life of a process from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeName(pub(crate) u64);

impl NodeName {
    #[expect(clippy::cast_possible_truncation, reason = "half of the bits are enough")]
    pub(crate) fn random() -> Self {
        let bits = uuid::Uuid::new_v4().as_u128();
        // The version and the variant, which are not random, fall onto random bits.
        Self((bits ^ (bits >> 64)) as u64)
    }

    /// Reads what [`fmt::Display`] writes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let is_name = text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if is_name { u64::from_str_radix(text, 16).ok().map(Self) } else { None }
    }

    /// What the ids of its files begin with.
    #[must_use]
    pub const fn tag(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Makes the names, all behind one prefix.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    prefix: Arc<str>,
}

impl Keys {
    pub(crate) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.into() }
    }

    /// A pub/sub channel: the frames of one stream, one message each, JSON in ASCII.
    pub(crate) fn stream(&self, request: &RequestId) -> String {
        format!("{}sse:{}", self.prefix, request.as_str())
    }

    /// Which stream a pub/sub channel is of.
    pub(crate) fn stream_of<'c>(&self, channel: &'c str) -> Option<&'c str> {
        channel.strip_prefix(&*self.prefix)?.strip_prefix("sse:")
    }

    /// A pub/sub channel: packed frames for every node.
    pub(crate) fn every_node(&self) -> String {
        format!("{}nodes:all", self.prefix)
    }

    /// A pub/sub channel, sharded in a cluster: packed frames for one node.
    pub(crate) fn node(&self, node: NodeName) -> String {
        format!("{}node:{{{node}}}", self.prefix)
    }

    /// A pub/sub channel: who comes and goes, for whoever wants to know.
    pub(crate) fn presence(&self) -> String {
        format!("{}presence", self.prefix)
    }

    /// A sorted set: the nodes, by when they count as gone (milliseconds of Redis's clock).
    pub(crate) fn nodes(&self) -> String {
        format!("{}nodes", self.prefix)
    }

    /// A hash: where a node is reached.
    pub(crate) fn node_address(&self, node: NodeName) -> String {
        format!("{}node:{{{node}}}:address", self.prefix)
    }

    /// A hash: the users that a node has, and how many tabs of each.
    pub(crate) fn node_users(&self, node: NodeName) -> String {
        format!("{}node:{{{node}}}:users", self.prefix)
    }

    /// A set: the nodes that have a user's tabs.
    pub(crate) fn online(&self, user: &UserId) -> String {
        format!("{}online:{{{}}}", self.prefix, in_braces(user.as_str()))
    }

    /// A stream: the frames that a user's tabs may want again.
    pub(crate) fn recovery(&self, user: &UserId) -> String {
        format!("{}recovery:{{{}}}", self.prefix, in_braces(user.as_str()))
    }
}

/// An id between braces, so that all of it, and nothing else, chooses the slot.
fn in_braces(id: &str) -> std::borrow::Cow<'_, str> {
    if id.contains(['{', '}', '%']) {
        id.replace('%', "%25").replace('{', "%7B").replace('}', "%7D").into()
    } else {
        id.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_one_part_of_a_name_whatever_is_in_them() {
        let keys = Keys::new("sg:");
        let user = |text: &str| UserId::parse(text).unwrap();
        for (id, expected) in [
            ("alice", "sg:online:{alice}"),
            ("}x{", "sg:online:{%7Dx%7B}"),
            ("100%", "sg:online:{100%25}"),
            ("a b * ?", "sg:online:{a b * ?}"),
        ] {
            assert_eq!(keys.online(&user(id)), expected);
        }
        let request = RequestId::parse("a:b{c}").unwrap();
        assert_eq!(keys.stream(&request), "sg:sse:a:b{c}");
        assert_eq!(keys.stream_of("sg:sse:a:b{c}"), Some("a:b{c}"));
        assert_eq!((keys.stream_of("sg:presence"), keys.stream_of("sse:x")), (None, None));
    }

    #[test]
    fn names_of_nodes_are_read_as_they_are_written() {
        let name = NodeName::random();
        assert_eq!(NodeName::parse(&name.to_string()), Some(name));
        assert_ne!(NodeName::random(), name);
        for bad in ["", "0", "+123456789abcdef", "00000000000000000", "0123456789ABCDEF"] {
            assert_eq!(NodeName::parse(bad), None, "{bad}");
        }
    }
}
