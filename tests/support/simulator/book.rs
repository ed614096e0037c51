//! What the oracle writes down: what was published and where it stands in each node's order, and what each tab is to get.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tabcast::fanout::shard::Wire;
use tabcast::id::MessageId;
use tabcast::proto::disconnect::Disconnect;

/// Users come first among the channels, then rooms.
pub(crate) const USERS: usize = 4;
pub(crate) const ROOMS: usize = 3;

/// Ids that a client remembers as its position.
pub(crate) const POSITIONS_MAX: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Message,
    File,
    /// Of that publication.
    Edit(usize),
    Typing,
}

impl What {
    pub(super) fn is_ordered(self) -> bool {
        matches!(self, Self::Message | Self::File)
    }
}

pub(crate) struct Publication {
    pub(crate) channel: usize,
    pub(crate) what: What,
    pub(crate) id: MessageId,
    /// No form of it has more bytes.
    pub(super) bytes_max: usize,
    pub(super) origin: usize,
    /// Its place on each node that posted it.
    pub(super) places: BTreeMap<usize, u64>,
}

/// A stretch of one node's order that reaches a tab.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stay {
    /// From here on a post may reach it, and from there on it must.
    pub(super) may_from: u64,
    pub(super) must_from: u64,
    /// Before here a post must reach it, and before there it may; none while it lasts.
    pub(super) must_until: u64,
    pub(super) may_until: u64,
}

impl Stay {
    pub(super) fn new(may_from: u64, must_from: u64) -> Self {
        Self { may_from, must_from, must_until: u64::MAX, may_until: u64::MAX }
    }

    pub(super) fn may(&self, place: u64) -> bool {
        (self.may_from..self.may_until).contains(&place)
    }

    pub(super) fn must(&self, place: u64) -> bool {
        self.may(place) && (self.must_from..self.must_until).contains(&place)
    }

    pub(super) fn end(&mut self, must_until: u64, may_until: u64) {
        self.must_until = self.must_until.min(must_until);
        self.may_until = self.may_until.min(may_until);
    }
}

/// What a tab knows of one channel.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub(super) stays: Vec<Stay>,
    /// The place of the last ordered frame that it read.
    pub(super) last: Option<u64>,
    /// Of each message, the place of the edit that it read last.
    pub(super) edits: BTreeMap<usize, u64>,
}

impl Reading {
    pub(super) fn may(&self, place: u64) -> bool {
        self.stays.iter().any(|stay| stay.may(place))
    }

    pub(super) fn must(&self, place: u64) -> bool {
        self.stays.iter().any(|stay| stay.must(place))
    }
}

/// Where a tab that came back goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Replay {
    /// It did not come back.
    Fresh,
    /// Behind the place of the position that it named; a gap may still be told.
    Expected,
    Gap,
}

/// How far a tab was told of what was lost.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Told {
    pub(super) users: u64,
    pub(super) rooms: u64,
}

/// What was left for a client when its connection was over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// Nothing.
    Flushed,
    /// Something that it was too slow to take.
    Slow,
    /// Something that it would have taken.
    Unwritten,
}

/// One session, from its opening to the end of its connection.
pub(crate) struct Tab {
    pub(crate) node: usize,
    pub(crate) user: usize,
    pub(crate) wire: Wire,
    pub(super) opened_at: u64,
    /// When that was.
    pub(super) since: Duration,
    pub(super) replay: Replay,
    /// Before these places it was told of all that was found to be lost to users, and to rooms.
    pub(super) told: Told,
    pub(super) channels: BTreeMap<usize, Reading>,
    /// Rooms that it is in, by what it asked for.
    pub(crate) rooms: BTreeSet<usize>,
    /// Publishers find it.
    pub(crate) is_listed: bool,
    /// What had been through its shard for certain when they no longer did.
    pub(super) handled: u64,
    /// Why it may have ended. Empty while it has not, or while a drain is yet to end it.
    pub(crate) reasons: Vec<Disconnect>,
    /// What it read last, oldest first.
    pub(crate) positions: Vec<MessageId>,
    /// What it sent and was not answered yet.
    pub(crate) asked: BTreeSet<String>,
    /// All that it ever sent: nobody else's answers may reach it.
    pub(crate) said: BTreeSet<String>,
    pub(crate) close_code: Option<u16>,
    /// Ordered publications that its client has read, here and before it came back.
    pub(crate) had: BTreeSet<usize>,
    /// What stands before its position, where it is kept between nodes.
    pub(super) counts_as_had: BTreeSet<usize>,
    /// It came back by what is kept between nodes: what it has to have, whatever the order of its node.
    pub(super) required: Option<Vec<usize>>,
    /// The same of edits: of each message, the newest that was kept behind its position.
    pub(super) required_edits: BTreeMap<usize, usize>,
    /// Edits that it has read since it came back.
    pub(super) edits: BTreeSet<usize>,
    /// Of each publisher, what it read last of the user's channel.
    pub(super) newest: BTreeMap<usize, usize>,
    /// Its client reset the connection, closed it or broke the protocol: what it misses is its own doing.
    pub(crate) is_own_end: bool,
}

/// One node's order.
#[derive(Default)]
pub(super) struct Log {
    pub(super) next: u64,
    pub(super) handled: u64,
    pub(super) channels: BTreeMap<usize, Vec<(u64, usize)>>,
    pub(super) kicks: Vec<(usize, u64)>,
    /// By channel, what never came here, and the place where that was found.
    pub(super) holes: BTreeMap<usize, Vec<(u64, usize)>>,
    /// Of what came from each node for each channel, the newest publication.
    pub(super) newest: BTreeMap<(usize, usize), usize>,
}
