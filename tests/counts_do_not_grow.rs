//! What must not grow with the number of tabs: allocations, encodes and posts.

#![expect(clippy::unwrap_used, reason = "a test's rig fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::session::{Identity, SessionRef};
use tabcast::fanout::shard::{Inbound, Opening, Outcome, Reaction, Shard, Wire};
use tabcast::id::{ChannelId, MessageId, RoomName, UserId};
use tabcast::proto::event::{Event, Timestamp};
use tabcast::proto::frame::{Frame, encodes};
use tabcast::proto::limits::SessionLimits;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, counting each thread's allocations.
struct Counting;

#[expect(unsafe_code, reason = "an allocator is unsafe to write; this one only counts and passes on")]
// SAFETY: every call is passed on to `System` unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

fn count() {
    // A thread that is ending counts no more.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations<T>(run: impl FnOnce() -> T) -> (usize, T) {
    let before = ALLOCATIONS.with(Cell::get);
    let result = run();
    (ALLOCATIONS.with(Cell::get) - before, result)
}

/// Whoever says anything joins the room `r`.
struct Joins;

impl Inbound for Joins {
    fn text(&mut self, _: &SessionRef, _: &mut [u8]) -> Reaction {
        Reaction::Join { room: RoomName::parse("r").unwrap(), ack: None, full: Frame::ping() }
    }
}

const AT: Timestamp = Timestamp::from_micros(1);

struct World {
    engine: Engine,
    shards: Vec<Shard>,
    start: Instant,
}

impl World {
    /// With one event stream more on each of its shards: they are the user's, and in no room.
    fn with_streams(mut self) -> Self {
        for shard in &mut self.shards {
            let identity = Identity::new(UserId::parse("u").unwrap(), AT);
            let slot = shard.open(Opening::new(identity, Wire::EventStream), |_| None).unwrap().slot();
            shard.handle_writable(slot);
        }
        self
    }

    /// `tabs` tabs over `used` of `shards` shards, all of one user and in one room.
    fn new(shards: usize, used: usize, tabs: usize) -> Self {
        let mut settings = EngineSettings { shards, ..EngineSettings::default() };
        settings.hub.tabs_per_user_max = tabs + shards;
        let engine = Engine::new(settings);
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start; the test moves no time")]
        let start = Instant::now();
        let shard = |index| {
            let limits = SessionLimits::default();
            Shard::new(Arc::clone(engine.hub()), u16::try_from(index).unwrap(), limits, usize::MAX, start)
        };
        let mut shards: Vec<_> = (0..shards).map(shard).collect();
        for tab in 0..tabs {
            let identity = Identity::new(UserId::parse("u").unwrap(), AT);
            let opening = Opening::new(identity, Wire::WebSocket);
            let shard = &mut shards[tab % used];
            let slot = shard.open(opening, |_| None).unwrap().slot();
            shard.handle_writable(slot);
            shard.handle_readable(slot, &mut [0x81, 0x81, 0, 0, 0, 0, b'j'], &mut Joins);
        }
        Self { engine, shards, start }
    }

    /// Lets every shard fan out and write; returns how many frames' worth of writes there were.
    fn collect(&mut self) -> usize {
        let mut writes = 0;
        for shard in &mut self.shards {
            shard.handle_inbox(self.start);
            loop {
                let Some(transmit) = shard.poll_transmit() else { break };
                let (slot, bytes) = (transmit.slot, transmit.slices.iter().map(|slice| slice.len()).sum());
                drop(transmit);
                shard.handle_written(slot, Outcome::Taken(bytes));
                writes += 1;
            }
        }
        writes
    }
}

/// Frames are counted for the whole process: one test at a time.
fn alone() -> impl Drop {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn channels() -> [ChannelId; 2] {
    ["webchat:u", "room:r"].map(|text| ChannelId::parse(text).unwrap())
}

fn events() -> [Event<'static>; 3] {
    let id = MessageId::random();
    [
        Event::Message { id, text: "a text", sender: "star", reply_to: None, timestamp: AT },
        Event::Edit { id, text: "another text", timestamp: AT },
        Event::Typing { active: true },
    ]
}

#[test]
fn a_delivery_allocates_nothing() {
    const TABS: usize = 1_000;
    let _alone = alone();
    let mut world = World::new(2, 2, TABS);
    for round in 0..12 {
        for channel in channels() {
            for in_flight in [1, 3, 16] {
                let publish = |world: &World| {
                    for event in events().into_iter().cycle().take(in_flight) {
                        world.engine.try_publish(&channel, event).unwrap();
                    }
                };
                let (published, ()) = allocations(|| publish(&world));
                let (collected, writes) = allocations(|| world.collect());
                assert_eq!(writes, TABS);
                // By then what recovery keeps of the user has its full size.
                if round >= 8 {
                    assert_eq!(collected, 0, "{in_flight} in flight to {channel}");
                    // A frame, and a post for each of two shards.
                    assert!(published <= in_flight * 3, "{published} for {in_flight} to {channel}");
                }
            }
        }
    }
}

#[test]
fn a_publish_encodes_once_whatever_the_number_of_tabs() {
    let _alone = alone();
    let mut world = World::new(4, 4, 1_000).with_streams();
    let id = MessageId::random();
    // An event stream has a form of its own for this text, made when the first reader needs it.
    let separator = Event::Message { id, text: "two\u{2028}lines", sender: "star", reply_to: None, timestamp: AT };
    let [user, room] = channels();
    for (channel, readers, separator_forms) in [(user, 1_004, 2), (room, 1_000, 1)] {
        for (event, forms) in events().map(|event| (event, 1)).into_iter().chain([(separator, separator_forms)]) {
            let before = encodes();
            let delivery = world.engine.try_publish(&channel, event).unwrap();
            assert_eq!(delivery.tabs, readers);
            assert_eq!(world.collect(), readers);
            assert_eq!(encodes() - before, forms, "to {channel}: {event:?}");
        }
    }
}

#[test]
fn a_publish_posts_once_to_each_shard_that_has_a_tab_of_the_channel() {
    let _alone = alone();
    for (used, tabs) in [(1, 1), (1, 1_000), (3, 1_000), (4, 1_000)] {
        let mut world = World::new(4, used, tabs);
        for channel in channels() {
            world.engine.try_publish(&channel, Event::Typing { active: true }).unwrap();
            assert_eq!(world.engine.hub().waiting_posts(), used, "{tabs} tabs on {used} shards, to {channel}");
            assert_eq!(world.collect(), tabs);
            assert_eq!(world.engine.hub().waiting_posts(), 0);
        }
    }
}
