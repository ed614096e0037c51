//! A shard's own index of rooms: joining and leaving cost the same in a room of ten and of a million.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::fanout::rooms::Room;

struct Members {
    room: Option<Arc<Room>>,
    slots: Vec<u32>,
}

/// The rooms that have members on this shard. What a room and a membership cost
/// is in the crate's documentation.
#[derive(Default)]
pub(crate) struct LocalRooms {
    by_number: HashMap<u64, u32, RandomState>,
    rooms: Vec<Members>,
    free: Vec<u32>,
}

impl LocalRooms {
    /// The shard's number for a room, if it has members here.
    pub(crate) fn find(&self, room: &Room) -> Option<u32> {
        self.by_number.get(&room.number()).copied()
    }

    pub(crate) fn members(&self, local: u32) -> &[u32] {
        &self.rooms[local as usize].slots
    }

    /// Those who are in rooms that are apart from the others.
    pub(crate) fn apart(&self) -> impl Iterator<Item = u32> + '_ {
        let is_apart = |members: &&Members| members.room.as_ref().is_some_and(|room| room.is_apart());
        self.rooms.iter().filter(is_apart).flat_map(|members| members.slots.iter().copied())
    }

    pub(crate) fn room(&self, local: u32) -> Option<&Arc<Room>> {
        self.rooms[local as usize].room.as_ref()
    }

    /// Adds a member and returns its membership: the shard's number of the room and the place in it.
    pub(crate) fn join(&mut self, room: Arc<Room>, slot: u32) -> (u32, u32) {
        let local = *self.by_number.entry(room.number()).or_insert_with(|| {
            let members = Members { room: Some(room), slots: Vec::new() };
            if let Some(local) = self.free.pop() {
                self.rooms[local as usize] = members;
                return local;
            }
            self.rooms.push(members);
            u32::try_from(self.rooms.len() - 1).unwrap_or(u32::MAX)
        });
        let slots = &mut self.rooms[local as usize].slots;
        slots.push(slot);
        (local, u32::try_from(slots.len() - 1).unwrap_or(u32::MAX))
    }

    /// Takes a member out. The last member moves into its place: returns that member's slot, if it is another one,
    /// and the room.
    pub(crate) fn leave(&mut self, (local, place): (u32, u32)) -> (Option<u32>, Option<Arc<Room>>) {
        let members = &mut self.rooms[local as usize];
        members.slots.swap_remove(place as usize);
        let moved = members.slots.get(place as usize).copied();
        let room = members.room.clone();
        if members.slots.is_empty() {
            if let Some(room) = members.room.take() {
                self.by_number.remove(&room.number());
            }
            members.slots = Vec::new();
            self.free.push(local);
        } else if members.slots.capacity() > 64 && members.slots.len() < members.slots.capacity() / 4 {
            members.slots.shrink_to(members.slots.len() * 2);
        }
        (moved, room)
    }
}
