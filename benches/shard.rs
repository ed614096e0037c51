//! What does a delivery cost a shard? Nanoseconds of CPU a tab and frame. What it costs to encode is `frame`'s question.

mod cpu;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpu::{CpuTime, spent};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tabcast::fanout::hub::Hub;
use tabcast::fanout::session::{Identity, SessionRef};
use tabcast::fanout::shard::{Inbound, Opening, Outcome, Reaction, Shard, Wire};
use tabcast::id::{ChannelId, MessageId, RoomName, UserId};
use tabcast::proto::event::{Event, Timestamp};
use tabcast::proto::frame::{Frame, Moment};
use tabcast::proto::limits::{HubLimits, SessionLimits};

const AT: Timestamp = Timestamp::from_micros(1_763_836_800_123_456);
/// A client's text frame of one byte, masked with zeros: the room is known.
const JOIN: [u8; 7] = [0x81, 0x81, 0, 0, 0, 0, b'j'];

/// Whoever says anything joins the room.
struct Joins;

impl Inbound for Joins {
    fn text(&mut self, _: &SessionRef, _: &mut [u8]) -> Reaction {
        let room = RoomName::parse("r").expect("a legal name");
        Reaction::Join { room, ack: None, full: Frame::ping() }
    }
}

fn now() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "a bench is an edge")]
    Instant::now()
}

fn limits() -> SessionLimits {
    SessionLimits { queue_frames_max: 64, ..SessionLimits::default() }
}

/// `users` with `tabs` each over `shards`, all of them in one room.
fn world(shards: u16, users: usize, tabs: usize) -> (Arc<Hub>, Vec<Shard>) {
    world_on(Wire::WebSocket, shards, users, tabs)
}

fn world_on(wire: Wire, shards: u16, users: usize, tabs: usize) -> (Arc<Hub>, Vec<Shard>) {
    let hub_limits = HubLimits {
        tabs_per_user_max: tabs,
        inbox_posts_max: usize::MAX,
        inbox_bytes_max: usize::MAX,
        ..HubLimits::default()
    };
    let hub = Hub::new(usize::from(shards), &hub_limits, &limits());
    let start = now();
    let mut shards: Vec<_> =
        (0..shards).map(|index| Shard::new(Arc::clone(&hub), index, limits(), usize::MAX, start)).collect();
    let count = shards.len();
    for tab in 0..users * tabs {
        let user = UserId::parse(&format!("u{}", tab / tabs)).expect("a legal id");
        let opening = Opening::new(Identity::new(user, AT), wire);
        let shard = &mut shards[tab % count];
        let slot = shard.open(opening, |_| None).expect("there is room").slot();
        shard.handle_writable(slot);
        shard.handle_readable(slot, &mut JOIN.to_vec(), &mut Joins);
    }
    (hub, shards)
}

fn message() -> Frame {
    let text = "The quick brown fox jumps over the lazy dog.";
    let event = Event::Message { id: MessageId::random(), text, sender: "star", reply_to: None, timestamp: AT };
    let mut frame = Frame::encode(&event);
    // As an engine's is: what it costs to time it is part of the question.
    frame.accept(Moment::at(now()));
    frame
}

fn user(number: usize) -> ChannelId {
    ChannelId::parse(&format!("u{number}")).expect("a legal id")
}

/// The driver's part, with a sink that takes everything. Returns how many writes there were.
fn collect(shard: &mut Shard, start: Instant) -> usize {
    shard.handle_inbox(start);
    let mut writes = 0;
    loop {
        let Some(transmit) = shard.poll_transmit() else { break };
        let (slot, bytes) = (transmit.slot, transmit.slices.iter().map(|slice| black_box(slice).len()).sum());
        drop(transmit);
        shard.handle_written(slot, Outcome::Taken(bytes));
        writes += 1;
    }
    shard.handle_flushed(start);
    writes
}

fn users(c: &mut Criterion<CpuTime>) {
    const USERS: usize = 1_000;
    const IN_FLIGHT: usize = 16;
    let mut group = c.benchmark_group("how many ns does a tab cost from the post to the sink");
    for tabs in [1, 10] {
        let frame = message();
        let mut made = None;
        let (channels, start) = ((0..USERS).map(user).collect::<Vec<_>>(), now());
        let mut next = (0..USERS).cycle();
        group.throughput(Throughput::Elements((IN_FLIGHT * tabs) as u64));
        // Each frame for another user, so that a write is for one frame; or all for one, so that it is for all of them.
        for (name, users_in_flight) in [("each for another user", IN_FLIGHT), ("all for one user", 1)] {
            group.bench_function(format!("of {tabs}, 16 in flight, {name}"), |b| {
                let (hub, shards) = made.get_or_insert_with(|| world(1, USERS, tabs));
                b.iter(|| {
                    for user in next.by_ref().take(users_in_flight) {
                        for _ in 0..IN_FLIGHT / users_in_flight {
                            hub.post(&channels[user], &frame).expect("there is room");
                        }
                    }
                    assert_eq!(collect(&mut shards[0], start), users_in_flight * tabs);
                });
            });
        }
    }
    group.finish();
}

fn rooms(c: &mut Criterion<CpuTime>) {
    let room = ChannelId::parse("room:r").expect("a legal id");
    let mut group = c.benchmark_group("how many ns does a delivery in a room cost from the event to the sink");
    for tabs in [10, 1_000, 100_000, 1_000_000] {
        if tabs > 1_000 {
            group.sample_size(10);
        }
        let (mut made, start) = (None, now());
        for in_flight in [1, 16] {
            group.throughput(Throughput::Elements((in_flight * tabs) as u64));
            group.bench_function(format!("of {tabs}, {in_flight} in flight"), |b| {
                let (hub, shards) = made.get_or_insert_with(|| world(1, tabs, 1));
                b.iter(|| {
                    for _ in 0..in_flight {
                        hub.post(&room, &message()).expect("there is room");
                    }
                    assert_eq!(collect(&mut shards[0], start), tabs);
                });
            });
        }
    }
    group.finish();
}

/// The driver's part once more, with what a write costs a sink: its bytes are copied.
fn collect_into(sink: &mut Vec<u8>, shard: &mut Shard, start: Instant) -> usize {
    shard.handle_inbox(start);
    let mut bytes = 0;
    loop {
        let Some(transmit) = shard.poll_transmit() else { break };
        sink.clear();
        transmit.slices.iter().for_each(|slice| sink.extend_from_slice(slice));
        let slot = transmit.slot;
        drop(transmit);
        shard.handle_written(slot, Outcome::Taken(sink.len()));
        bytes += sink.len();
    }
    shard.handle_flushed(start);
    bytes
}

fn compressed_rooms(c: &mut Criterion<CpuTime>) {
    const TABS: usize = 1_000;
    let room = ChannelId::parse("room:r").expect("a legal id");
    let text = &include_str!("../README.md")[2_000..6_000];
    let id = MessageId::random();
    let long = || Frame::encode(&Event::Message { id, text, sender: "star", reply_to: None, timestamp: AT });
    let mut group =
        c.benchmark_group("how many ns does a delivery of 4 KB of text in a room of 1,000 cost, copied out");
    group.throughput(Throughput::Elements(TABS as u64));
    for (name, wire) in [("plain", Wire::WebSocket), ("compressed once, on all tabs", Wire::DeflatedWebSocket)] {
        let (mut made, mut sink, start) = (None, Vec::new(), now());
        group.bench_function(name, |b| {
            let (hub, shards) = made.get_or_insert_with(|| world_on(wire, 1, TABS, 1));
            b.iter(|| {
                let mut frame = long();
                if hub.wants_deflated(&room, &frame) {
                    hub.deflate(&mut frame);
                }
                let expected = frame.deflated().unwrap_or(frame.websocket()).len() * TABS;
                hub.post(&room, &frame).expect("there is room");
                assert_eq!(collect_into(&mut sink, &mut shards[0], start), expected);
            });
        });
    }
    group.finish();
    let mut group = c.benchmark_group("how many ns does a publisher spend on asking whether to compress");
    for (name, wire) in [("where nobody reads it", Wire::WebSocket), ("where somebody does", Wire::DeflatedWebSocket)] {
        let (hub, _shards) = world_on(wire, 1, 1, 1);
        let frame = long();
        group.bench_function(name, |b| b.iter(|| black_box(&hub).wants_deflated(&room, black_box(&frame))));
    }
    group.finish();
}

/// The same number of receivers of a channel of tokio's, each of which takes what is sent. Nothing is written.
fn channels(c: &mut Criterion<CpuTime>) {
    let mut group = c.benchmark_group("how many ns does a delivery in a room cost through a channel of tokio's");
    for tabs in [10, 1_000, 100_000] {
        if tabs > 1_000 {
            group.sample_size(10);
        }
        group.throughput(Throughput::Elements(tabs as u64));
        group.bench_function(format!("of {tabs}, broadcast"), |b| {
            let (sender, receiver) = tokio::sync::broadcast::channel(64);
            let mut receivers: Vec<_> = (0..tabs).map(|_| receiver.resubscribe()).collect();
            drop(receiver);
            b.iter(|| {
                sender.send(message()).expect("there are receivers");
                receivers.iter_mut().for_each(|tab| drop(black_box(tab.try_recv().expect("it was sent"))));
            });
        });
        group.bench_function(format!("of {tabs}, mpsc, one for each"), |b| {
            let mut ends: Vec<_> = (0..tabs).map(|_| tokio::sync::mpsc::channel(64)).collect();
            b.iter(|| {
                let frame = message();
                ends.iter().for_each(|(sender, _)| sender.try_send(frame.clone()).expect("there is room"));
                ends.iter_mut().for_each(|(_, tab)| drop(black_box(tab.try_recv().expect("it was sent"))));
            });
        });
    }
    group.finish();
}

/// Shards are awake and never get to it: what they do is measured above, and does not slow the publisher.
fn publisher(c: &mut Criterion<CpuTime>) {
    let room = ChannelId::parse("room:r").expect("a legal id");
    let mut group = c.benchmark_group("how many ns does a publisher spend on a room of 1,000,000");
    group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(200));
    let mut made = None;
    group.bench_function("over 4 awake shards, encoding included", |b| {
        let (hub, _) = made.get_or_insert_with(|| world(4, 1_000_000, 1));
        b.iter(|| hub.post(&room, &message()).expect("there is room"));
    });
    group.finish();
}

fn slow_tabs(c: &mut Criterion<CpuTime>) {
    const TABS: usize = 1_000;
    let room = ChannelId::parse("room:r").expect("a legal id");
    let start = now();
    let mut group = c.benchmark_group("how many ns does a tab cost that is behind");
    group.throughput(Throughput::Elements(TABS as u64));
    group.bench_function("and whose edit is replaced", |b| {
        let (hub, mut shards) = world(1, TABS, 1);
        let id = MessageId::random();
        b.iter(|| {
            let edit = Frame::encode(&Event::Edit { id, text: "a longer and longer text", timestamp: AT });
            hub.post(&room, &edit).expect("there is room");
            shards[0].handle_inbox(start)
        });
    });
    group.bench_function("and is cut", |b| {
        b.iter_custom(|rounds| {
            let mut total = Duration::ZERO;
            for _ in 0..rounds {
                let (hub, mut shards) = world(1, TABS, 1);
                for _ in 0..limits().queue_frames_max {
                    hub.post(&room, &message()).expect("there is room");
                }
                shards[0].handle_inbox(start);
                hub.post(&room, &message()).expect("there is room");
                let before = spent();
                shards[0].handle_inbox(start);
                total += spent() - before;
            }
            total
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .with_measurement(CpuTime)
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    targets = users, rooms, compressed_rooms, channels, publisher, slow_tabs
}
criterion_main!(benches);
