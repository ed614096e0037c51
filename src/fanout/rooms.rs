//! Rooms: who is in one is known only inside each shard; what all threads share is one member count per shard.

use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::fanout::sync::{AtomicU32, AtomicU64, Entry, Map, Ordering};
use crate::id::RoomName;

/// One room: its members per shard. It exists while it has a member.
pub(crate) struct Room {
    number: u64,
    name: RoomName,
    members: Box<[AtomicU32]>,
}

/// From here on rooms are numbered that are apart from the others.
const APART: u64 = 1 << 63;

impl Room {
    /// Whether it is one of [`Rooms::apart`].
    pub(crate) fn is_apart(&self) -> bool {
        self.number >= APART
    }

    /// The room's number, unique in this process: what shards look it up by.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn name(&self) -> &RoomName {
        &self.name
    }

    /// The shards that have members, with how many.
    ///
    /// # Ordering
    /// Relaxed: a join is acked by the shard itself after the count went up, and whoever was told of the ack
    /// was told through a socket or an inbox, which order it.
    pub(crate) fn shards(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.members.iter().map(|count| count.load(Ordering::Relaxed)).enumerate().filter(|(_, count)| *count > 0)
    }
}

/// All rooms of an engine. What a room costs is in the crate's documentation; and 4 bytes a shard.
pub(crate) struct Rooms {
    rooms: Map<RoomName, Arc<Room>, RandomState>,
    next: AtomicU64,
    shards: usize,
}

impl Rooms {
    pub(crate) fn new(shards: usize) -> Self {
        Self { rooms: Map::with_hasher(RandomState::default()), next: AtomicU64::new(0), shards }
    }

    /// Rooms that nobody finds among the others, whatever their names: their numbers are their own too.
    pub(crate) fn apart(shards: usize) -> Self {
        Self { next: AtomicU64::new(APART), ..Self::new(shards) }
    }

    pub(crate) fn find(&self, name: &RoomName) -> Option<Arc<Room>> {
        self.rooms.get(name).map(|room| Arc::clone(room.value()))
    }

    pub(crate) fn count(&self) -> usize {
        self.rooms.len()
    }

    /// Counts one more member on `shard`. The count goes up under the entry's lock, so that the last one
    /// out of a room and the first one in cannot miss each other.
    pub(crate) fn join(&self, name: &RoomName, shard: usize) -> Arc<Room> {
        let room = match self.rooms.entry(name.clone()) {
            Entry::Occupied(entry) => entry.into_ref(),
            Entry::Vacant(entry) => {
                let number = self.next.fetch_add(1, Ordering::Relaxed);
                let members = (0..self.shards).map(|_| AtomicU32::new(0)).collect();
                entry.insert(Arc::new(Room { number, name: name.clone(), members }))
            }
        };
        room.members[shard].fetch_add(1, Ordering::Relaxed);
        Arc::clone(room.value())
    }

    /// Counts one member less on `shard`; the last one out removes the room.
    ///
    /// # Ordering
    /// Relaxed: of two that leave different shards at once, whoever has the entry's lock second sees the other's count,
    /// which went down before that one had the lock. Decided without it, `loom_two_that_leave_at_once_take_the_room_along`
    /// and `loom_who_joins_while_the_last_one_leaves_is_in_the_room` fail.
    pub(crate) fn leave(&self, room: &Room, shard: usize) {
        if room.members[shard].fetch_sub(1, Ordering::Relaxed) == 1
            && let Entry::Occupied(entry) = self.rooms.entry(room.name.clone())
            && entry.get().number == room.number
            && entry.get().shards().next().is_none()
        {
            let (_, displaced) = entry.remove_entry();
            drop(displaced);
        }
    }
}

#[cfg(test)]
#[cfg(not(tabcast_loom))]
mod tests {
    use super::*;

    #[test]
    fn a_room_is_there_while_somebody_is_in_it() {
        let rooms = Rooms::new(2);
        let name = RoomName::parse("r").unwrap();
        let room = rooms.join(&name, 0);
        assert_eq!(rooms.join(&name, 1).number(), room.number());
        rooms.join(&name, 1);
        assert_eq!(room.shards().collect::<Vec<_>>(), [(0, 1), (1, 2)]);
        rooms.leave(&room, 0);
        rooms.leave(&room, 1);
        assert_eq!(rooms.find(&name).unwrap().shards().collect::<Vec<_>>(), [(1, 1)]);
        rooms.leave(&room, 1);
        assert!(rooms.find(&name).is_none());
        assert_ne!(rooms.join(&name, 0).number(), room.number());
    }

    #[test]
    fn threads_join_and_leave_and_no_room_is_left_behind() {
        let rooms = Arc::new(Rooms::new(4));
        let threads: Vec<_> = (0..4)
            .map(|shard| {
                let rooms = rooms.clone();
                std::thread::spawn(move || {
                    let name = RoomName::parse("r").unwrap();
                    for _ in 0..5_000 {
                        let room = rooms.join(&name, shard);
                        assert_eq!(rooms.find(&name).unwrap().number(), room.number());
                        rooms.leave(&room, shard);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(rooms.count(), 0);
    }
}

#[cfg(all(test, tabcast_loom))]
mod loom_tests {
    use loom::thread;

    use super::*;

    fn leaving(rooms: &Arc<Rooms>, room: Arc<Room>, shard: usize) -> thread::JoinHandle<()> {
        let rooms = rooms.clone();
        thread::spawn(move || rooms.leave(&room, shard))
    }

    #[test]
    fn loom_who_joins_while_the_last_one_leaves_is_in_the_room() {
        loom::model(|| {
            let (rooms, name) = (Arc::new(Rooms::new(2)), RoomName::parse("r").unwrap());
            let left = leaving(&rooms, rooms.join(&name, 0), 0);
            let room = rooms.join(&name, 1);
            assert_eq!(rooms.find(&name).unwrap().number(), room.number(), "a broadcast finds it");
            left.join().unwrap();
            let found = rooms.find(&name).unwrap();
            assert_eq!((found.number(), found.shards().collect::<Vec<_>>()), (room.number(), vec![(1, 1)]));
            rooms.leave(&room, 1);
            assert_eq!(rooms.count(), 0);
        });
    }

    #[test]
    fn loom_two_that_leave_at_once_take_the_room_along() {
        loom::model(|| {
            let (rooms, name) = (Arc::new(Rooms::new(2)), RoomName::parse("r").unwrap());
            let (first, second) = (rooms.join(&name, 0), rooms.join(&name, 1));
            let left = leaving(&rooms, first, 0);
            rooms.leave(&second, 1);
            left.join().unwrap();
            assert_eq!(rooms.count(), 0);
        });
    }
}
