//! What every broker keeps: one suite, run in memory, through a real Redis, and through a cluster.

#![expect(clippy::large_futures, reason = "a test holds whole nodes")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use tokio::runtime::Handle;

use super::*;
use crate::broker::redis::testing::RedisServer;
use crate::broker::redis::{RedisBroker, RedisSettings, link};
use crate::fanout::session::Identity;
use crate::fanout::shard::{Opening, Outcome, Shard, Wire};
use crate::id::RoomName;
use crate::proto::delivery::Nobody;
use crate::proto::event::EndReason;
use crate::proto::limits::RecoveryLimits;

/// How long anything may take that has to happen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes the broker of another node, and what to wait for once it has an engine.
type Make<'m> = Box<dyn Fn() -> (Arc<dyn Broker>, BoxFuture<'static, ()>) + 'm>;

/// One node, with a shard that a test turns by hand.
struct Node {
    engine: Engine,
    shard: Shard,
    heard: Vec<(u32, String)>,
}

#[expect(clippy::disallowed_methods, reason = "a test of what really happens")]
fn now() -> Instant {
    Instant::now()
}

fn channel(text: &str) -> ChannelId {
    ChannelId::parse(text).unwrap()
}

fn user(text: &str) -> UserId {
    UserId::parse(text).unwrap()
}

impl Node {
    async fn start(make: &Make<'_>) -> Self {
        let settings = EngineSettings { shards: 1, ..EngineSettings::default() };
        let (broker, joined) = make();
        let engine = Engine::with_broker(settings, broker);
        joined.await;
        let shard = Shard::new(Arc::clone(engine.hub()), 0, SessionLimits::default(), usize::MAX, now());
        Self { engine, shard, heard: Vec::new() }
    }

    /// A tab, as the gateway opens it.
    async fn tab(&mut self, name: &str, resume: Resume) -> u32 {
        self.engine.expect(&channel(name)).await;
        let resume = self.engine.resume(&user(name), resume).await;
        let opening = Opening { resume, ..Opening::new(Identity::new(user(name), self.engine.now()), Wire::WebSocket) };
        let slot = self.shard.open(opening, |_| None).unwrap().slot();
        self.shard.handle_writable(slot);
        slot
    }

    /// Ends a node as a gateway does: the others know it at once.
    async fn leave(self) {
        tokio::time::timeout(PATIENCE, self.engine.leave()).await.expect("what waits goes out");
    }

    async fn send(&self, to: &str, text: &str) -> Delivery {
        let event = message(text);
        self.engine.publish(&channel(to), event).await.unwrap()
    }

    /// Collects what the tabs have got by now: of a message its text, of anything else its JSON.
    fn turn(&mut self) {
        while self.shard.handle_inbox(now()) {}
        loop {
            let Some(transmit) = self.shard.poll_transmit() else { break };
            let (slot, bytes): (_, Vec<u8>) =
                (transmit.slot, transmit.slices.iter().flat_map(|slice| slice.iter().copied()).collect());
            drop(transmit);
            self.shard.handle_written(slot, Outcome::Taken(bytes.len()));
            let text = String::from_utf8_lossy(&bytes).into_owned();
            for part in text.split("{\"type\":").skip(1) {
                let said = part.split("\"text\":\"").nth(1).and_then(|text| text.split('"').next());
                self.heard.push((slot, said.unwrap_or(part).to_owned()));
            }
        }
    }

    fn heard_by(&self, slot: u32) -> Vec<&str> {
        self.heard.iter().filter(|(tab, _)| *tab == slot).map(|(_, text)| text.as_str()).collect()
    }

    /// Waits until a tab has heard so many.
    async fn hears(&mut self, slot: u32, count: usize) -> Vec<&str> {
        let deadline = now() + PATIENCE;
        loop {
            self.turn();
            if self.heard_by(slot).len() >= count {
                return self.heard_by(slot);
            }
            assert!(now() < deadline, "{count} wanted, heard {:?}", self.heard_by(slot));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

async fn leave<const N: usize>(nodes: [Node; N]) {
    for node in nodes {
        node.leave().await;
    }
}

async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let deadline = now() + PATIENCE;
    while !holds().await {
        assert!(now() < deadline, "it never came true");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn message(text: &str) -> Event<'_> {
    Event::Message {
        id: MessageId::random(),
        text,
        sender: "star",
        reply_to: None,
        timestamp: Timestamp::from_micros(1),
    }
}

/// Every part of it, on nodes of their own.
async fn keeps_the_contract(make: Make<'_>) {
    sends_reach_every_node(&make).await;
    order_is_that_of_the_publisher(&make).await;
    what_is_expected_is_not_missed(&make).await;
    rooms_are_on_every_node(&make).await;
    presence_is_that_of_all_nodes(&make).await;
    streams_are_read_on_one_node(&make).await;
    sessions_end_on_every_node(&make).await;
    nobody_is_told_as_it_is(&make).await;
}

async fn sends_reach_every_node(make: &Make<'_>) {
    let (mut a, mut b, mut c) = (Node::start(make).await, Node::start(make).await, Node::start(make).await);
    let (on_a, on_b) = (a.tab("ann", Resume::Fresh).await, b.tab("ann", Resume::Fresh).await);
    let other = c.tab("bob", Resume::Fresh).await;
    for (node, expected) in [(&a, (1, 1)), (&b, (1, 1)), (&c, (0, 2))] {
        let delivery = node.send("ann", "hi").await;
        assert_eq!((delivery.tabs, delivery.nodes, delivery.nobody), (expected.0, expected.1, None));
    }
    assert_eq!(a.hears(on_a, 3).await, ["hi"; 3]);
    assert_eq!(b.hears(on_b, 3).await, ["hi"; 3]);
    c.turn();
    assert!(c.heard_by(other).is_empty());
    leave([a, b, c]).await;
}

async fn order_is_that_of_the_publisher(make: &Make<'_>) {
    const COUNT: usize = 2_000;
    let (a, mut b) = (Node::start(make).await, Node::start(make).await);
    let tab = b.tab("ann", Resume::Fresh).await;
    let mut posted = Vec::new();
    for n in 0..COUNT {
        posted.push(a.engine.submit(&channel("ann"), message(&n.to_string())).await.unwrap());
        if n % 100 == 99 {
            for posted in posted.drain(..) {
                b.turn();
                assert_eq!(a.engine.settle(posted).await.nodes, 1);
            }
        }
    }
    let heard = b.hears(tab, COUNT).await;
    assert!(heard.iter().enumerate().all(|(n, text)| *text == n.to_string()), "{heard:?}");
    leave([a, b]).await;
}

async fn what_is_expected_is_not_missed(make: &Make<'_>) {
    let (a, mut b) = (Node::start(make).await, Node::start(make).await);
    for n in 0..50 {
        let name = format!("u{n}");
        let tab = b.tab(&name, Resume::Fresh).await;
        assert_eq!(a.send(&name, "first").await.nodes, 1, "{name}");
        assert_eq!(b.hears(tab, 1).await, ["first"]);
        let slot = b.shard.session(tab).unwrap().address().slot();
        b.shard.handle_lost(slot, Disconnect::ConnectionLost);
        while b.shard.poll_disconnect().is_some() {}
        b.heard.clear();
    }
    leave([a, b]).await;
}

async fn rooms_are_on_every_node(make: &Make<'_>) {
    struct Joins;
    impl crate::fanout::shard::Inbound for Joins {
        fn text(&mut self, _: &crate::fanout::session::SessionRef, _: &mut [u8]) -> crate::fanout::shard::Reaction {
            let room = RoomName::parse("r").unwrap();
            crate::fanout::shard::Reaction::Join { room, ack: None, full: Frame::ping() }
        }
    }
    let (a, mut b) = (Node::start(make).await, Node::start(make).await);
    let tab = b.tab("ann", Resume::Fresh).await;
    // A client's text frame of one byte, masked with zeros.
    b.shard.handle_readable(tab, &mut [0x81, 0x81, 0, 0, 0, 0, b'j'], &mut Joins);
    let delivery = a.send("room:r", "all").await;
    assert_eq!((delivery.tabs, delivery.nodes > 0), (0, true));
    assert_eq!(b.hears(tab, 1).await, ["all"]);
    leave([a, b]).await;
}

async fn presence_is_that_of_all_nodes(make: &Make<'_>) {
    let (a, mut b) = (Node::start(make).await, Node::start(make).await);
    assert!(!a.engine.is_online(&user("ann")).await);
    let tabs = [b.tab("ann", Resume::Fresh).await, b.tab("ann", Resume::Fresh).await];
    assert!(a.engine.is_online(&user("ann")).await && b.engine.is_online(&user("ann")).await);
    let listed = vec![OnlineUser { user: user("ann"), tabs: 2 }];
    until(async || a.engine.users_elsewhere(10).await.as_ref() == Some(&listed)).await;
    assert_eq!(b.engine.users_elsewhere(10).await, Some(Vec::new()));
    for tab in tabs {
        b.shard.handle_lost(tab, Disconnect::ConnectionLost);
    }
    while b.shard.poll_disconnect().is_some() {}
    until(async || !a.engine.is_online(&user("ann")).await).await;
    until(async || a.engine.users_elsewhere(10).await == Some(Vec::new())).await;
    leave([a, b]).await;
}

async fn streams_are_read_on_one_node(make: &Make<'_>) {
    let (a, b) = (Node::start(make).await, Node::start(make).await);
    let request = RequestId::random();
    let stream = ChannelId::Stream(request.clone());
    b.engine.expect(&stream).await;
    let mut reader = b.engine.open_stream(&request).unwrap();
    let text = "日本 \u{1f980}\u{7f}\u{2028}";
    let delivery = a.engine.publish(&stream, message(text)).await.unwrap();
    assert_eq!((delivery.tabs, delivery.nodes), (0, 1));
    assert_eq!(b.engine.publish(&stream, message("here")).await.unwrap().tabs, 1);
    a.engine.publish(&stream, Event::End { reason: EndReason::Stop }).await.unwrap();
    let mut texts = Vec::new();
    while let Some(frame) = tokio::time::timeout(PATIENCE, reader.next()).await.expect("the end comes") {
        let json: serde_json::Value = serde_json::from_slice(frame.json()).unwrap();
        texts.push(json.get("text").or(json.get("reason")).unwrap().as_str().unwrap().to_owned());
    }
    texts.sort();
    let mut expected = vec![text.to_owned(), "here".to_owned(), "stop".to_owned()];
    expected.sort();
    assert_eq!(texts, expected);
    leave([a, b]).await;
}

async fn sessions_end_on_every_node(make: &Make<'_>) {
    let (a, mut b) = (Node::start(make).await, Node::start(make).await);
    let tab = b.tab("ann", Resume::Fresh).await;
    assert_eq!(a.engine.end_sessions_elsewhere(&user("ann"), Disconnect::Kicked).await, 1);
    let deadline = now() + PATIENCE;
    loop {
        while b.shard.handle_inbox(now()) {}
        if let Some(transmit) = b.shard.poll_transmit() {
            let bytes: Vec<u8> = transmit.slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            assert_eq!((transmit.slot, bytes), (tab, Frame::close(Disconnect::Kicked).websocket().to_vec()));
            break;
        }
        assert!(now() < deadline, "it never ended");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    leave([a, b]).await;
}

async fn nobody_is_told_as_it_is(make: &Make<'_>) {
    let (a, b) = (Node::start(make).await, Node::start(make).await);
    for (to, reason) in [("nobody", Nobody::Offline), ("sse:none", Nobody::NoSuchStream)] {
        let delivery = a.send(to, "hi").await;
        assert_eq!((delivery.tabs, delivery.nodes, delivery.nobody), (0, 0, Some(reason)), "{to}");
    }
    leave([a, b]).await;
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    let broker: Arc<dyn Broker> = Arc::new(MemoryBroker::default());
    keeps_the_contract(Box::new(move || (Arc::clone(&broker), Box::pin(std::future::ready(()))))).await;
}

fn through(server: &RedisServer, is_cluster: bool, recovery: Option<RecoveryLimits>) -> Make<'_> {
    Box::new(move || {
        let server = link::RedisServer { urls: vec![server.url.clone()], is_cluster, ..link::RedisServer::default() };
        let settings = RedisSettings { server, recovery: recovery.clone(), ..RedisSettings::default() };
        let broker = RedisBroker::new(settings, Handle::current()).unwrap();
        let joining = Arc::clone(&broker);
        (broker, Box::pin(async move { assert!(joining.joined(PATIENCE).await, "{joining:?}") }))
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_keeps_the_contract() {
    let server = RedisServer::start();
    keeps_the_contract(through(&server, false, None)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_cluster_keeps_the_contract() {
    let server = RedisServer::start_cluster();
    keeps_the_contract(through(&server, true, None)).await;
}

/// A tab goes from node to node while another node publishes without a pause.
async fn nothing_is_missed_or_doubled_on_the_way(make: Make<'_>) {
    const ROUNDS: usize = 30;
    let (publisher, mut nodes) = (Node::start(&make).await, [Node::start(&make).await, Node::start(&make).await]);
    let mut position = MessageId::random();
    let begin =
        |id| Event::Message { id, text: "0", sender: "s", reply_to: None, timestamp: Timestamp::from_micros(1) };
    publisher.engine.publish(&channel("ann"), begin(position)).await.unwrap();
    let mut sent = 1;
    for round in 0..ROUNDS {
        let node = &mut nodes[round % 2];
        let (engine, first) = (publisher.engine.clone(), sent);
        let ids: Vec<_> = (0..20).map(|_| MessageId::random()).collect();
        sent += ids.len();
        let last = ids[ids.len() - 1];
        let publishing = async {
            for (n, id) in ids.into_iter().enumerate() {
                let text = (first + n).to_string();
                let (sender, timestamp) = ("star", Timestamp::from_micros(1));
                let event = Event::Message { id, text: &text, sender, reply_to: None, timestamp };
                drop(engine.submit(&channel("ann"), event).await.unwrap());
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        };
        let (tab, ()) = tokio::join!(node.tab("ann", Resume::After(vec![position])), publishing);
        let expected: Vec<_> = (first..sent).map(|n| n.to_string()).collect();
        let heard = node.hears(tab, expected.len()).await;
        assert_eq!(heard, expected, "round {round}");
        // Nothing follows: not even what was kept, and came on its other way.
        tokio::time::sleep(Duration::from_millis(20)).await;
        node.turn();
        assert_eq!(node.heard_by(tab).len(), expected.len(), "round {round}");
        position = last;
        node.shard.handle_lost(tab, Disconnect::ConnectionLost);
        while node.shard.poll_disconnect().is_some() {}
        node.heard.clear();
    }
    let unknown = nodes[0].tab("ann", Resume::After(vec![MessageId::random()])).await;
    assert!(nodes[0].hears(unknown, 1).await[0].contains("unknown_position"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tab_that_goes_from_node_to_node_misses_nothing_and_gets_nothing_twice() {
    let server = RedisServer::start();
    nothing_is_missed_or_doubled_on_the_way(through(&server, false, Some(RecoveryLimits::default()))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_through_a_cluster() {
    let server = RedisServer::start_cluster();
    nothing_is_missed_or_doubled_on_the_way(through(&server, true, Some(RecoveryLimits::default()))).await;
}
