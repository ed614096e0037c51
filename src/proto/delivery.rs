//! What became of a publish.

/// Who was addressed. Counts are taken when the frame is posted; what a tab's own queue does with it afterwards
/// (coalesced, cut) is counted by class and reason in the metrics, and told to the client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Delivery {
    /// Sessions (tabs and streams) of this node that the frame was posted to.
    pub tabs: usize,
    /// Other nodes that took it.
    pub nodes: usize,
    /// Whether there may be more of them: a Redis Cluster does not count all subscribers of a room or a stream.
    pub at_least: bool,
    /// Why it was nobody, if it was nobody.
    pub nobody: Option<Nobody>,
}

impl Delivery {
    /// Posted to so many sessions of this node.
    #[must_use]
    pub const fn here(tabs: usize) -> Self {
        Self { tabs, nodes: 0, at_least: false, nobody: None }
    }

    /// There was nobody.
    #[must_use]
    pub const fn to_nobody(reason: Nobody) -> Self {
        Self { tabs: 0, nodes: 0, at_least: false, nobody: Some(reason) }
    }

    /// Accepted for at least one live session here, or by at least one other node.
    #[must_use]
    pub const fn is_delivered(&self) -> bool {
        self.tabs > 0 || self.nodes > 0
    }
}

/// Why a frame was addressed to nobody. Not an error: the publisher did nothing wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Nobody {
    /// The user has no session on any node that was reached.
    Offline,
    /// No reader holds that stream, or it has ended.
    NoSuchStream,
    /// The room has no member on any node that was reached.
    EmptyRoom,
    /// Nobody here, and the other nodes have not answered yet: it goes to them, in its order, when they can be reached.
    Waiting,
}

/// Why nothing was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// This node's inboxes are full: it is given more than it can fan out. Nothing was posted anywhere; try again.
    #[error("the node is overloaded; nothing was posted, try again later")]
    Overloaded,
    /// More than may be published.
    #[error("it has {bytes} bytes; at most {bytes_max} are allowed")]
    TooLarge {
        /// Bytes of the file, or of the frame of anything else.
        bytes: usize,
        /// The most that are allowed.
        bytes_max: usize,
    },
    /// There is nobody here, and as much waits for the other nodes as may wait: nothing was posted anywhere; try again.
    #[error("too much waits for the other nodes; nothing was posted, try again later")]
    SpoolFull,
    /// The engine was shut down.
    #[error("the engine is shut down")]
    Closed,
}
