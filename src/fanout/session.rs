//! One client as the engine sees it: who it is, and where its session lives.

use std::fmt;
use std::sync::Arc;

use crate::id::{RoomName, UserId};
use crate::proto::event::Timestamp;

/// Slots that one shard can have: 2²².
pub const SLOTS_MAX: usize = 1 << 22;
/// Shards that one engine can have: 2¹⁰.
pub const SHARDS_MAX: usize = 1 << 10;

/// Where a session lives: its shard, its slot there, and which of the slot's successive owners it is.
///
/// A slot's generation goes up each time it is left, so that an address that outlived its session reaches nobody.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(u64);

impl Address {
    pub(crate) fn new(shard: u16, slot: u32, generation: u32) -> Self {
        debug_assert!((shard as usize) < SHARDS_MAX && (slot as usize) < SLOTS_MAX);
        Self(u64::from(shard) << 54 | u64::from(slot) << 32 | u64::from(generation))
    }

    /// Which shard.
    #[must_use]
    pub const fn shard(self) -> u16 {
        (self.0 >> 54) as u16
    }

    /// Which slot of the shard.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "masked to 22 bits")]
    pub const fn slot(self) -> u32 {
        (self.0 >> 32) as u32 & (SLOTS_MAX as u32 - 1)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
    pub(crate) const fn generation(self) -> u32 {
        self.0 as u32
    }

    /// The address as one number: a session's id, unique in this process for a slot's first 2³² owners.
    #[must_use]
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}.{}", self.shard(), self.slot(), self.generation())
    }
}

/// Which rooms a session may join.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum RoomGrant {
    /// None.
    #[default]
    None,
    /// Any: development mode, or an embedder that decides elsewhere.
    Any,
    /// Those that match one of these: exact names, or `prefix*`.
    Matching(Box<[Box<str>]>),
}

impl RoomGrant {
    /// Reads a list of names and of prefixes with a `*` behind.
    #[must_use]
    pub fn from_patterns(patterns: &[String]) -> Self {
        Self::Matching(patterns.iter().map(|pattern| pattern.as_str().into()).collect())
    }

    /// Whether `room` may be joined.
    #[must_use]
    pub fn allows(&self, room: &RoomName) -> bool {
        match self {
            Self::None => false,
            Self::Any => true,
            Self::Matching(patterns) => patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => room.as_str().starts_with(prefix),
                None => **pattern == *room.as_str(),
            }),
        }
    }
}

/// Who a session belongs to: set at connect by the authenticated edge, never from a frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Identity {
    /// The user.
    pub user: UserId,
    /// What that user is called.
    pub name: Arc<str>,
    /// A picture's URL, or empty.
    pub avatar: Box<str>,
    /// When the session began.
    pub connected_at: Timestamp,
    /// When its token expires, if it does: the session is then ended with 4001.
    pub expires_at: Option<Timestamp>,
    /// Which rooms it may join.
    pub rooms: RoomGrant,
}

impl Identity {
    /// Whoever reads an answer: no tab of anybody's.
    pub(crate) fn nobody() -> Self {
        let (name, avatar) = (Arc::from(""), Box::from(""));
        let connected_at = Timestamp::from_micros(0);
        Self { user: UserId::nobody(), name, avatar, connected_at, expires_at: None, rooms: RoomGrant::None }
    }

    /// Whether it is whoever reads an answer, or watches.
    pub(crate) fn is_nobody(&self) -> bool {
        self.user.as_str().is_empty()
    }

    /// A user of that id, with the id as the name, no avatar, no expiry and no rooms.
    #[must_use]
    pub fn new(user: UserId, connected_at: Timestamp) -> Self {
        let name = user.shared();
        Self { user, name, avatar: Box::from(""), connected_at, expires_at: None, rooms: RoomGrant::None }
    }
}

/// A handle of one session: where it lives and whose it is. Clones share the identity.
#[derive(Clone)]
pub struct SessionRef {
    address: Address,
    identity: Arc<Identity>,
}

const _: () = assert!(size_of::<SessionRef>() == 16, "what a tab costs in its user's list");

impl SessionRef {
    pub(crate) fn new(address: Address, identity: Arc<Identity>) -> Self {
        Self { address, identity }
    }

    /// Where it lives.
    #[must_use]
    pub const fn address(&self) -> Address {
        self.address
    }

    /// Whose it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The user it belongs to.
    #[must_use]
    pub fn user(&self) -> &UserId {
        &self.identity.user
    }
}

impl PartialEq for SessionRef {
    fn eq(&self, other: &Self) -> bool {
        self.address == other.address
    }
}

impl Eq for SessionRef {}

impl fmt::Debug for SessionRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}@{:?}", self.identity.user, self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_its_three_parts() {
        let address = Address::new(1023, (1 << 22) - 1, u32::MAX);
        assert_eq!((address.shard(), address.slot(), address.generation()), (1023, (1 << 22) - 1, u32::MAX));
        let address = Address::new(3, 70_000, 9);
        assert_eq!((address.shard(), address.slot(), address.generation()), (3, 70_000, 9));
        assert_eq!(format!("{address:?}"), "3/70000.9");
    }

    #[test]
    fn room_grants_are_exact_or_by_prefix() {
        let grant = RoomGrant::Matching(Box::from([Box::from("lobby"), Box::from("game-*")]));
        let check =
            |room: &str, expected: bool| assert_eq!(grant.allows(&RoomName::parse(room).unwrap()), expected, "{room}");
        check("lobby", true);
        check("lobby2", false);
        check("game-7", true);
        check("game", false);
        assert!(RoomGrant::Any.allows(&RoomName::parse("x").unwrap()));
        assert!(!RoomGrant::None.allows(&RoomName::parse("x").unwrap()));
    }
}
