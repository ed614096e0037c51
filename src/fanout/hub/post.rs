//! What publishers put into the inboxes of shards.

use std::sync::Arc;

use crate::fanout::hub::Pace;
use crate::fanout::registry::Sessions;
use crate::fanout::rooms::Room;
use crate::fanout::session::Address;
use crate::fanout::shard::Report;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Frame, Moment};
use crate::proto::limits::SessionLimits;

/// What crosses threads.
pub(crate) enum Post {
    /// A frame for one session.
    Session { address: Address, frame: Frame },
    /// A frame for the sessions of a snapshot; each shard picks its own.
    Sessions { sessions: Sessions, frame: Frame },
    /// A frame for a room's members on this shard.
    Room { room: Arc<Room>, frame: Frame },
    /// These sessions end, after what they have queued.
    End { sessions: Sessions, ending: Disconnect },
    /// Tabs may have missed something: the hub has noted who.
    Missed,
    /// Every session of the shard ends, paced; see [`Drain`](crate::fanout::hub::Drain).
    Drain(Box<Pace>),
    /// From now on these are the limits of the shard's sessions.
    Limits(Arc<SessionLimits>),
    /// Whoever watches has to show its key again.
    EndWatchers,
    /// Another shard asks how fat the fattest sessions of this one are.
    Weigh,
    /// A shard that was asked so has told: who waits for it looks again.
    Weighed,
    /// Somebody asks how the shard is.
    Report(Box<dyn FnOnce(Report) + Send>),
    /// Shards to wake: the one at `place` and, through it, those behind it.
    Ring { parked: Arc<[u16]>, place: usize },
}

impl Post {
    fn frame(&self) -> Option<&Frame> {
        match self {
            Self::Session { frame, .. } | Self::Sessions { frame, .. } | Self::Room { frame, .. } => Some(frame),
            _ => None,
        }
    }

    /// Bytes that the inbox counts for it.
    pub(crate) fn bytes(&self) -> usize {
        self.frame().map_or(0, Frame::bytes)
    }

    /// When what it brings was accepted, if that is timed.
    pub(crate) fn accepted(&self) -> Option<Moment> {
        self.frame().and_then(Frame::accepted)
    }

    /// Whether room was reserved for it.
    pub(crate) const fn is_counted(&self) -> bool {
        !matches!(self, Self::Ring { .. } | Self::Weighed)
    }
}
