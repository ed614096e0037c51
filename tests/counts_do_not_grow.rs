//! What must not grow with the number of tabs: allocations, encodes, compressions and posts.

#![expect(clippy::unwrap_used, reason = "a test's rig fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::session::{Identity, SessionRef};
use tabcast::fanout::shard::{Inbound, Opening, Outcome, Reaction, Shard, Wire};
use tabcast::id::{ChannelId, MessageId, RoomName, UserId};
use tabcast::platform::adapter::Outlet;
use tabcast::proto::event::{Event, Timestamp};
use tabcast::proto::frame::{Frame, deflates, encodes};
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
        Self::with_wires(shards, used, tabs, |_| Wire::WebSocket)
    }

    fn with_wires(shards: usize, used: usize, tabs: usize, wire: impl Fn(usize) -> Wire) -> Self {
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
            let opening = Opening::new(identity, wire(tab));
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

/// A message that is worth compressing, as short and as long as one may be.
fn long_texts() -> [String; 2] {
    [50, 60_000].map(|times| "again and again ".repeat(times))
}

#[test]
fn a_publish_compresses_once_whatever_the_number_of_tabs_and_only_for_those_that_read_it() {
    let _alone = alone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let message =
        |text| Event::Message { id: MessageId::random(), text, sender: "star", reply_to: None, timestamp: AT };
    let third = |tab: usize| if tab.is_multiple_of(3) { Wire::DeflatedWebSocket } else { Wire::WebSocket };
    let [short, long] = long_texts();
    for (tabs, expected) in [(1, 1), (1_000, 1)] {
        let mut world = World::with_wires(4, 4, tabs, third).with_streams();
        for (channel, readers) in channels().into_iter().zip([tabs + 4, tabs]) {
            let before = deflates();
            assert_eq!(world.engine.try_publish(&channel, message(&short)).unwrap().tabs, readers);
            assert_eq!((world.collect(), deflates() - before), (readers, expected), "to {channel}, {tabs} tabs");
            // Too long for the thread that publishes: compressed on another, or not at all where nothing is waited for.
            assert_eq!(world.engine.try_publish(&channel, message(&long)).unwrap().tabs, readers);
            assert!(world.collect() >= readers, "large frames are written in parts");
            assert_eq!(deflates() - before, expected);
            let publish = world.engine.publish(&channel, message(&long));
            assert_eq!(runtime.block_on(publish).unwrap().tabs, readers);
            assert!(world.collect() >= readers);
            assert_eq!(deflates() - before, 2 * expected);
        }
        // What is small, or for nobody here, is not compressed.
        let before = deflates();
        for channel in ["webchat:u", "webchat:nobody", "room:nobody", "sse:nothing"] {
            let text = if channel == "webchat:u" { "hi" } else { &short };
            world.engine.try_publish(&ChannelId::parse(channel).unwrap(), message(text)).unwrap();
        }
        world.collect();
        assert_eq!(deflates(), before);
    }
    let world = World::new(4, 4, 1_000);
    let before = deflates();
    for channel in channels() {
        world.engine.try_publish(&channel, message(&short)).unwrap();
        runtime.block_on(world.engine.publish(&channel, message(&long))).unwrap();
    }
    assert_eq!(deflates(), before, "nobody has negotiated it");
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
