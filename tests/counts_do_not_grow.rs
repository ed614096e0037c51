//! What must not grow with the number of tabs: allocations, encodes, compressions and posts.

#![expect(clippy::unwrap_used, reason = "a test's rig fails by panicking")]

#[path = "support/allocations.rs"]
mod counted;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use counted::allocations;
use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::session::{Identity, SessionRef};
use tabcast::fanout::shard::{Inbound, Opening, Outcome, Reaction, Shard, Wire};
use tabcast::id::{ChannelId, MessageId, RoomName, UserId};
use tabcast::platform::adapter::Outlet;
use tabcast::proto::event::{Button, Event, Timestamp};
use tabcast::proto::frame::{Frame, deflates, encodes};
use tabcast::proto::limits::SessionLimits;

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
    /// Nobody yet.
    fn new(shards: usize) -> Self {
        let mut settings = EngineSettings { shards, ..EngineSettings::default() };
        settings.hub.tabs_per_user_max = usize::MAX;
        let engine = Engine::new(settings);
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start; the test moves no time")]
        let start = Instant::now();
        let shard = |index| {
            let limits = SessionLimits::default();
            Shard::new(Arc::clone(engine.hub()), u16::try_from(index).unwrap(), limits, usize::MAX, start)
        };
        let shards = (0..shards).map(shard).collect();
        Self { engine, shards, start }
    }

    /// `count` tabs over the first `used` shards, all of one user and in one room.
    fn with_tabs(self, used: usize, count: usize) -> Self {
        self.with_wires(used, count, |_| Wire::WebSocket)
    }

    fn with_wires(mut self, used: usize, count: usize, wire: impl Fn(usize) -> Wire) -> Self {
        for tab in 0..count {
            let slot = self.open(tab % used, wire(tab));
            self.shards[tab % used].handle_readable(slot, &mut [0x81, 0x81, 0, 0, 0, 0, b'j'], &mut Joins);
        }
        self
    }

    /// `count` event streams over all shards: they are the user's, and in no room.
    fn with_streams(mut self, count: usize) -> Self {
        for stream in 0..count {
            self.open(stream % self.shards.len(), Wire::EventStream);
        }
        self
    }

    fn open(&mut self, shard: usize, wire: Wire) -> u32 {
        let identity = Identity::new(UserId::parse("u").unwrap(), AT);
        let slot = self.shards[shard].open(Opening::new(identity, wire), |_| None).unwrap().slot();
        self.shards[shard].handle_writable(slot);
        slot
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
            shard.handle_flushed(self.start);
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

fn buttons() -> [Button; 2] {
    let button = |label: &str| Button { label: label.to_owned(), custom_id: label.to_owned(), ..Button::default() };
    ["yes", "no"].map(button)
}

fn message(text: &str) -> Event<'_> {
    Event::Message { id: MessageId::random(), text, sender: "star", reply_to: None, timestamp: AT }
}

fn file(data: &[u8]) -> Event<'_> {
    Event::File { id: MessageId::random(), filename: "a.png", mimetype: "image/png", data, timestamp: AT }
}

/// One of each kind that many tabs get.
fn events(buttons: &[Button]) -> [Event<'_>; 5] {
    let id = MessageId::random();
    [
        message("a text"),
        Event::Buttons { id, text: "a choice", sender: "star", reply_to: None, buttons, timestamp: AT },
        Event::Edit { id, text: "another text", timestamp: AT },
        Event::Typing { active: true },
        file(b"a few bytes"),
    ]
}

/// What one publish costs in allocations: the frame, and a post for each shard. A large frame is its bytes, from a pool,
/// and two small parts.
const FRAME: usize = 1;
const LARGE_FRAME: usize = 2;
const POST: usize = 1;

/// Publishes and collects until nothing is left to warm up, then once more and counted. `kinds`: of [`events`], so many;
/// an edit or a typing sign takes the place of the one before it, and all others wait in a row.
fn check_allocations(world: &mut World, channel: &ChannelId, readers: usize, (in_flight, kinds): (usize, usize)) {
    let buttons = buttons();
    let shards = world.shards.len();
    // By then what recovery keeps of the user has its full size.
    let warm = 2 + 160 / in_flight;
    for round in 0..warm + 2 {
        let events: Vec<_> = events(&buttons).into_iter().take(kinds).cycle().take(in_flight).collect();
        let publish = || {
            events.into_iter().for_each(|event| {
                world.engine.try_publish(channel, event).unwrap();
            })
        };
        let (published, ()) = allocations(publish);
        let (collected, writes) = allocations(|| world.collect());
        assert_eq!(writes, readers, "one write for each reader, whatever waits for it");
        if round >= warm {
            let most = in_flight * (FRAME + shards * POST);
            assert!(published <= most, "{published} for {in_flight} to {channel}, more than {most}");
            assert_eq!(collected, 0, "{in_flight} of {kinds} kinds in flight to {channel} of {readers}");
        }
    }
}

#[test]
fn a_delivery_allocates_nothing() {
    let _alone = alone();
    let [user, room] = channels();
    for count in [10, 500] {
        // Two wait in the session itself, up to 64 in a block of the shard's pool.
        for load in [(1, 5), (2, 2), (3, 2), (16, 5), (33, 2), (64, 2)] {
            let mut tabs = World::new(2).with_tabs(2, count);
            check_allocations(&mut tabs, &room, count, load);
            check_allocations(&mut tabs, &user, count, load);
            check_allocations(&mut tabs.with_streams(10), &user, count + 10, load);
            check_allocations(&mut World::new(2).with_streams(count), &user, count, load);
        }
    }
}

#[test]
fn a_frame_is_one_allocation_of_any_kind_and_size() {
    let _alone = alone();
    let buttons = buttons();
    let (long, code) = ("a long text, ".repeat(10_000), "{\n\t\"a\": \"\\\\\"\n}".repeat(1_000));
    let large = vec![0x5a; 1 << 20];
    let check = |event: Event<'_>, most: usize| {
        // The thread's buffer, and for a large one the pool's, are there from then on.
        drop(Frame::encode(&event));
        let (count, frame) = allocations(|| Frame::encode(&event));
        assert!(count <= most, "{count} for {:?} of {} bytes", frame.kind(), frame.bytes());
        let (dropped, ()) = allocations(|| drop(frame));
        assert_eq!(dropped, 0);
    };
    events(&buttons).into_iter().chain([message(&code)]).for_each(|event| check(event, FRAME));
    [message(&long), file(&large)].into_iter().for_each(|event| check(event, LARGE_FRAME));
}

/// A text with a line separator has a form of its own on event streams: one for all of them.
#[test]
fn a_form_that_only_streams_need_is_one_allocation_for_all_of_them() {
    let _alone = alone();
    let [user, _] = channels();
    let mut made = Vec::new();
    for count in [2, 1_000] {
        let mut world = World::new(2).with_tabs(2, 10).with_streams(count);
        for _ in 0..20 {
            world.engine.try_publish(&user, message("two\u{2028}lines")).unwrap();
            let (collected, writes) = allocations(|| world.collect());
            assert_eq!(writes, 10 + count);
            made.push(collected);
        }
    }
    let last = made[made.len() - 1];
    assert!((1..=4).contains(&last), "{last}");
    assert_eq!(made[19], last, "as many for 2 streams as for 1,000");
}

#[test]
fn a_publish_encodes_once_whatever_the_number_of_tabs() {
    let _alone = alone();
    let mut world = World::new(4).with_tabs(4, 1_000).with_streams(4);
    let buttons = buttons();
    let [user, room] = channels();
    for (channel, readers, separator_forms) in [(user, 1_004, 2), (room, 1_000, 1)] {
        let separator = message("two\u{2028}lines");
        for (event, forms) in events(&buttons).map(|event| (event, 1)).into_iter().chain([(separator, separator_forms)])
        {
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
    let third = |tab: usize| if tab.is_multiple_of(3) { Wire::DeflatedWebSocket } else { Wire::WebSocket };
    let [short, long] = long_texts();
    for (tabs, expected) in [(1, 1), (1_000, 1)] {
        let mut world = World::new(4).with_wires(4, tabs, third).with_streams(4);
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
    let world = World::new(4).with_tabs(4, 1_000);
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
        let mut world = World::new(4).with_tabs(used, tabs);
        for channel in channels() {
            world.engine.try_publish(&channel, Event::Typing { active: true }).unwrap();
            assert_eq!(world.engine.hub().waiting_posts(), used, "{tabs} tabs on {used} shards, to {channel}");
            assert_eq!(world.collect(), tabs);
            assert_eq!(world.engine.hub().waiting_posts(), 0);
        }
    }
}
