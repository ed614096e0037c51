//! What tabs, streams, rooms and frames cost in memory: the table of the crate's documentation, measured.
#![cfg(all(feature = "gateway", target_os = "linux"))]
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/allocations.rs"]
mod counted;
#[path = "support/memory_contract.rs"]
mod documented;
#[path = "support/in_process.rs"]
mod in_process;

use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};

use counted::{held_bytes, live_bytes};
use documented::most;
use in_process::{answer, events, handshake, now, open, settle, start};
use tabcast::driver::addresses::{AddressCounts, Place};
use tabcast::fanout::hub::Hub;
use tabcast::fanout::session::{Identity, SessionRef};
use tabcast::fanout::shard::{Inbound, Opening, Reaction, Shard, Wire};
use tabcast::id::{ChannelId, MessageId, RoomName, UserId};
use tabcast::proto::event::{Event, Timestamp};
use tabcast::proto::frame::Frame;
use tabcast::proto::limits::{HubLimits, SessionLimits};

/// The process's memory is measured: one gateway at a time.
fn alone() -> impl Drop {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fails if `count` of a row's things cost more than the row says, or so much less that the row is worth nothing.
#[track_caller]
fn check(row: &str, count: usize, bytes: usize) {
    let most = most(row);
    let each = bytes.div_ceil(count);
    println!("{row}: {each} bytes each of {count}, at most {most}");
    assert!(each <= most, "{row}: {each} bytes each of {count}, and at most {most} are documented");
    assert!(most <= 16 || each >= most / 2, "{row}: {each} bytes each of {count}, while {most} are documented");
}

/// Idle connections of a gateway, each of a user of its own: with real sockets, hyper and all that it leaves behind.
fn check_idle([row, left_row]: [&str; 2], status: u16, request: fn(usize) -> Vec<u8>) {
    let _alone = alone();
    // The first number is just past a doubling of what grows by doubling.
    for count in [1_100, 4_000] {
        let address = start(&[("worker", "none"), ("answers_per_user_max", "10000"), ("shards", "1")]);
        let mut clients: Vec<TcpStream> = Vec::with_capacity(count + 1);
        open(address, &mut clients, 1, status, request);
        let before = settle(usize::MAX, live_bytes);
        open(address, &mut clients, count, status, request);
        // Connections become sessions a moment after their heads are written.
        let after = settle(before + count * most(row), live_bytes);
        check(row, count, after - before);
        drop(clients);
        let left = settle(before + count * most(left_row), live_bytes);
        check(left_row, count, left - before);
    }
}

#[test]
fn of_a_websocket_tab() {
    check_idle(["an idle tab", "a tab that has left"], 101, handshake);
}

#[test]
fn of_an_event_stream() {
    check_idle(["an idle event stream", "a tab that has left"], 200, events);
}

#[test]
fn of_an_answer() {
    check_idle(["an answer of `/v1` that has said nothing", "an answer of `/v1` that is over"], 200, answer);
}

/// Joins the room that a text names.
struct Joins;

impl Inbound for Joins {
    fn text(&mut self, _: &SessionRef, text: &mut [u8]) -> Reaction {
        let room = RoomName::parse(std::str::from_utf8(text).unwrap()).unwrap();
        Reaction::Join { room, ack: None, full: Frame::ping() }
    }
}

/// One shard without sockets.
struct Rig {
    hub: Arc<Hub>,
    shard: Shard,
    slots: Vec<u32>,
}

impl Rig {
    fn new(tabs: usize, user: impl Fn(usize) -> usize) -> Self {
        let (limits, hub_limits) =
            (SessionLimits::default(), HubLimits { tabs_per_user_max: usize::MAX, ..HubLimits::default() });
        let hub = Hub::new(1, &hub_limits, &limits);
        let mut shard = Shard::new(Arc::clone(&hub), 0, limits, usize::MAX, now());
        let open = |tab| {
            let user = UserId::parse(&format!("user-{:04}", user(tab))).unwrap();
            let identity = Identity::new(user, Timestamp::from_micros(1));
            shard.open(Opening::new(identity, Wire::WebSocket), |_| None).unwrap().slot()
        };
        let slots = (0..tabs).map(open).collect();
        Self { hub, shard, slots }
    }

    fn join(&mut self, tab: usize, room: usize) {
        let name = format!("room-{room:05}");
        let mut frame = [&[0x81, 0x80 | 10, 0, 0, 0, 0], name.as_bytes()].concat();
        self.shard.handle_readable(self.slots[tab], &mut frame, &mut Joins);
        assert_eq!(self.shard.rooms_of(self.slots[tab]).last().unwrap().as_str(), name);
    }
}

fn message() -> Frame {
    let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(1));
    Frame::encode(&Event::Message { id, text: "a text", sender: "star", reply_to: None, timestamp })
}

#[test]
fn of_a_user() {
    const TABS: usize = 4_000;
    let measure = |tabs_each: usize| {
        let (bytes, rig) = held_bytes(|| Rig::new(TABS, |tab| tab / tabs_each));
        assert_eq!(rig.hub.registry().user_count(), TABS / tabs_each);
        bytes
    };
    let (alone, shared) = (measure(1), measure(20));
    check("a user, beside the tabs", TABS - TABS / 20, alone - shared);
}

#[test]
fn of_rooms() {
    const TABS: usize = 1_100;
    let mut rig = Rig::new(TABS, |tab| tab);
    let (first, ()) = held_bytes(|| (0..TABS).for_each(|tab| rig.join(tab, 0)));
    check("the first room of a tab", TABS, first);
    // The rooms are there, and what is counted is who joins them.
    (1..16).for_each(|room| rig.join(0, room));
    let (further, ()) = held_bytes(|| (1..TABS).for_each(|tab| (1..16).for_each(|room| rig.join(tab, room))));
    check("each further one", (TABS - 1) * 15, further);
    let mut rig = Rig::new(TABS, |tab| tab);
    let own = |(tab, room): (usize, usize)| 100 + tab * 10 + room;
    let (rooms, ()) = held_bytes(|| (0..TABS).for_each(|tab| (0..10).for_each(|room| rig.join(tab, own((tab, room))))));
    check("a room with one member", TABS * 10, rooms);
}

#[test]
fn of_queued_frames() {
    const TABS: usize = 1_100;
    let mut rig = Rig::new(TABS, |_| 0);
    let user = ChannelId::parse("user-0000").unwrap();
    let frames: Vec<_> = (0..300).map(|_| message()).collect();
    // Nobody is written to before the connection is there. Each frame is one, in all queues.
    let mut queue = |count: usize| {
        let (bytes, ()) = held_bytes(|| {
            for frame in &frames[rig.shard.queued().0 / TABS..count] {
                rig.hub.post(&user, frame).unwrap();
                rig.shard.handle_inbox(now());
            }
        });
        assert_eq!(rig.shard.queued().0, count * TABS);
        bytes
    };
    queue(1);
    let second = queue(2);
    assert!(second < TABS / 4, "the second frame costs nothing, and not {second} bytes");
    check("a queue of 3 to 33 frames", TABS, queue(3));
    let more = queue(33);
    assert!(more < 4 * TABS, "frames 4 to 33 cost what 30 frames cost, and not {more} bytes");
    check("each frame beyond 33 in a queue", TABS * (290 - 33), queue(290));
}

#[test]
fn of_a_frame() {
    for text in ["", "a text", &"long ".repeat(50)] {
        let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(1));
        let event = Event::Message { id, text, sender: "star", reply_to: None, timestamp };
        drop(Frame::encode(&event));
        let (bytes, frame) = held_bytes(|| Frame::encode(&event));
        let counted = frame.bytes().next_multiple_of(align_of::<usize>());
        assert!(bytes <= counted, "{bytes} bytes, and {counted} are counted");
        check("a frame, beside its JSON", 1, bytes - frame.json().len());
    }
}

#[test]
fn of_an_address() {
    let _alone = alone();
    for count in [1_100_u32, 4_000] {
        let counts = AddressCounts::new(10).unwrap();
        let (bytes, places) = held_bytes(|| {
            let take = |n: u32| counts.take(std::net::IpAddr::from((0x0a00_0000 | n).to_be_bytes())).unwrap();
            (0..count).map(take).collect::<Vec<_>>()
        });
        let count = count as usize;
        check("an address whose sessions are counted", count, bytes - size_of::<Place>() * count);
        assert_eq!((size_of::<Place>(), counts.addresses()), (16, count));
        drop(places);
        assert_eq!(counts.addresses(), 0);
    }
}
