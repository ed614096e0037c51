//! Both streams against a Redis of each test's own.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use redis::Value;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::broker::redis::link::Link;
use crate::broker::redis::testing::RedisServer;
use crate::gateway::api::op::Call;
use crate::gateway::worker::redis::entries::EntryId;
use crate::gateway::worker::redis::envelope::Outbound;
use crate::gateway::worker::redis::hand_off::{HandOffError, Settled};
use crate::gateway::worker::redis::inbound::{AppendError, MESSAGE_TIMEOUT, RedisWorker};
use crate::gateway::worker::redis::lease::Lease;
use crate::gateway::worker::redis::outbound;
use crate::platform::adapter::{BotIdentity, MessageHandler};
use crate::platform::message::IncomingMessage;
use crate::platform::recording::Recorder;
use crate::platform::webchat::WebChat;
use crate::proto::event::Timestamp;

mod inbound;

const IN: &str = "in";
const OUT: &str = "out";
const DEAD: &str = "out:dead";
const LEASE: &str = "{out}:lease";

/// What an engine would be: it writes down what it gets.
struct Desk {
    seen: Mutex<Vec<String>>,
    ids: Mutex<Vec<String>>,
    /// What it answers next in the place of taking something.
    errors: Mutex<VecDeque<HandOffError>>,
    /// How many more it takes before it never answers.
    room: Mutex<usize>,
    /// Whether what it took is settled.
    is_settled: watch::Sender<bool>,
}

impl Default for Desk {
    fn default() -> Self {
        let (seen, ids, errors) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { seen, ids, errors, room: Mutex::new(usize::MAX), is_settled: watch::channel(true).0 }
    }
}

impl Desk {
    fn seen(&self) -> String {
        self.seen.lock().unwrap().join(" ")
    }
}

impl HandOff for Desk {
    fn hand_off<'a>(&'a self, outbound: &'a Outbound<'a>) -> BoxFuture<'a, Result<Settled, HandOffError>> {
        Box::pin(async move {
            if let Some(error) = self.errors.lock().unwrap().pop_front() {
                return Err(error);
            }
            let has_room = {
                let mut room = self.room.lock().unwrap();
                *room = room.saturating_sub(1);
                *room > 0
            };
            if !has_room {
                std::future::pending::<()>().await;
            }
            let Call::Send { text, .. } = &outbound.call else { panic!("{outbound:?}") };
            self.seen.lock().unwrap().push(text.to_string());
            self.ids.lock().unwrap().push(outbound.id.unwrap().to_string());
            let mut settled = self.is_settled.subscribe();
            Ok(Box::pin(async move { drop(settled.wait_for(|is_settled| *is_settled).await) }) as Settled)
        })
    }
}

fn settings(node: &str) -> StreamSettings {
    StreamSettings {
        inbound_stream: IN.to_owned(),
        inbound_group: "workers".to_owned(),
        outbound_stream: OUT.to_owned(),
        outbound_group: "gateways".to_owned(),
        entries_max: 1000,
        form: EnvelopeForm::Json,
        entry_bytes_max: 4096,
        node: node.to_owned(),
    }
}

/// A node with both ways running.
struct Node {
    desk: Arc<Desk>,
    metrics: Arc<Metrics>,
    appender: Arc<Appender>,
    shutdown: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Node {
    fn start(server: &RedisServer, name: &str) -> Self {
        Self::with(server, settings(name), Desk::default())
    }

    fn with(server: &RedisServer, settings: StreamSettings, desk: Desk) -> Self {
        let (desk, metrics) = (Arc::new(desk), Arc::new(Metrics::new(1)));
        let (shutdown, stopping) = watch::channel(false);
        let endpoint = server.endpoint(&settings.node);
        let hand_off: Arc<dyn HandOff> = Arc::clone(&desk) as Arc<dyn HandOff>;
        let ends = Shutdown { consuming: stopping.clone(), appending: stopping };
        let Streams { appender, appending, consuming } = start(&endpoint, settings, hand_off, &metrics, ends);
        let mut tasks = JoinSet::new();
        tasks.spawn(appending);
        tasks.spawn(consuming);
        Self { desk, metrics, appender, shutdown, tasks }
    }

    /// The counts that are not zero.
    fn counts(&self) -> String {
        let streams = &self.metrics.engine.streams_of_workers;
        let all = [
            ("appended", &streams.appended),
            ("append_failures", &streams.append_failures),
            ("read", &streams.read),
            ("handed_off", &streams.handed_off),
            ("doubled", &streams.doubled),
            ("dead", &streams.dead),
            ("acked", &streams.acked),
            ("takeovers", &streams.takeovers),
        ];
        let counted = all.iter().filter(|(_, counter)| counter.value() > 0);
        counted.map(|(name, counter)| format!("{name}={}", counter.value())).collect::<Vec<_>>().join(" ")
    }

    async fn sees(&self, expected: &str) {
        until(expected, async || self.desk.seen()).await;
    }

    async fn shut_down(mut self) -> Arc<Desk> {
        self.shutdown.send(true).unwrap();
        let ended = timeout(Duration::from_secs(10), async { while self.tasks.join_next().await.is_some() {} });
        ended.await.expect("the shutdown ends");
        self.desk
    }
}

/// Waits until `read` gives what is expected.
async fn until<T: PartialEq + std::fmt::Debug + ?Sized, R: AsRef<T>>(expected: &T, read: impl AsyncFn() -> R) {
    let looking = async {
        while read().await.as_ref() != expected {
            sleep(Duration::from_millis(5)).await;
        }
    };
    if timeout(Duration::from_secs(20), looking).await.is_err() {
        assert_eq!(read().await.as_ref(), expected);
    }
}

/// What the test itself asks, and says as a worker.
struct Worker(Link);

impl Worker {
    async fn ask(&self, words: &[&str]) -> Value {
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        self.0.query(command).await.unwrap()
    }

    async fn ask_text(&self, words: &[&str]) -> String {
        text(&self.ask(words).await)
    }

    async fn add(&self, envelope: &str) -> String {
        self.ask_text(&["XADD", OUT, "*", "e", envelope]).await
    }

    async fn say(&self, text: &str) {
        self.add(&said(text, None)).await;
    }

    /// How many entries are given out and not acknowledged.
    async fn pending(&self) -> String {
        match self.ask(&["XPENDING", OUT, "gateways"]).await {
            Value::Array(parts) => text(&parts[0]),
            other => text(&other),
        }
    }

    /// Waits until everything that was written is acknowledged.
    async fn all_acked(&self) {
        until("0 true", async || {
            let groups = self.ask_text(&["XINFO", "GROUPS", OUT]).await;
            format!("{} {}", self.pending().await, groups.contains("lag 0"))
        })
        .await;
    }

    async fn kill(&self, name: &str) -> usize {
        let list = self.ask_text(&["CLIENT", "LIST"]).await;
        let mut killed = 0;
        for line in list.lines().filter(|line| line.contains(&format!("name={name} "))) {
            let id = line.split(' ').next().unwrap().trim_start_matches("id=");
            self.ask(&["CLIENT", "KILL", "ID", id]).await;
            killed += 1;
        }
        killed
    }
}

fn said(text: &str, key: Option<&str>) -> String {
    let key = key.map_or(String::new(), |key| format!(r#","message_key":"{key}""#));
    format!(r#"{{"channel_id":"u","type":"message","text":"{text}"{key}}}"#)
}

/// An answer in words, without brackets.
fn text(value: &Value) -> String {
    match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::VerbatimString { text, .. } => text.clone(),
        Value::SimpleString(text) => text.clone(),
        Value::Int(number) => number.to_string(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(" "),
        Value::Nil => "nil".to_owned(),
        other => format!("{other:?}"),
    }
}

fn numbers(range: std::ops::Range<u32>) -> String {
    range.map(|n| n.to_string()).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn entries_are_handed_on_in_order_and_acknowledged() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    let first = worker.add(&said("0", None)).await;
    let node = Node::start(&server, "a");
    for n in 1..700 {
        worker.say(&n.to_string()).await;
    }
    node.sees(&numbers(0..700)).await;
    worker.all_acked().await;
    until("read=700 handed_off=700 acked=700 takeovers=1", async || node.counts()).await;
    let id = EntryId::parse(&first).unwrap().message_id(OUT);
    assert_eq!(node.desk.ids.lock().unwrap()[0], id.to_string());
    node.shut_down().await;
    assert_eq!(worker.ask_text(&["EXISTS", LEASE]).await, "0", "the lease is given back");
}

#[tokio::test]
async fn a_stream_is_trimmed_of_what_every_group_is_done_with() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    for n in 0..1_500 {
        worker.say(&n.to_string()).await;
    }
    let link = server.link();
    let names = outbound::Names {
        stream: OUT.to_owned(),
        group: "gateways".to_owned(),
        lease: LEASE.to_owned(),
        dead: String::new(),
    };
    let trimmed = async |max| outbound::trim(&link, &names, max).await.unwrap();
    // Nobody reads yet.
    assert_eq!(trimmed(1_000).await, Value::Int(0));
    let node = Node::start(&server, "a");
    until("acked", async || {
        let acked = node.metrics.engine.streams_of_workers.acked.value();
        if acked == 1_500 { "acked".to_owned() } else { acked.to_string() }
    })
    .await;
    node.shut_down().await;
    // Nobody reads now: what comes is not yet done with.
    for n in 0..400 {
        worker.say(&n.to_string()).await;
    }
    assert_eq!(trimmed(2_000).await, Value::Int(0));
    assert_eq!(trimmed(1_000).await, Value::Int(900));
    // The last that was read stays too.
    assert_eq!(trimmed(300).await, Value::Int(599));
    assert_eq!(trimmed(300).await, Value::Int(0));
    assert_eq!(worker.ask_text(&["XLEN", OUT]).await, "401");
}

#[tokio::test]
async fn an_entry_with_a_known_key_is_not_sent_again() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    for (text, key) in [("1", "k"), ("2", "k"), ("3", "l")] {
        worker.add(&said(text, Some(key))).await;
    }
    let (is_settled, _) = watch::channel(false);
    let node = Node::with(&server, settings("a"), Desk { is_settled, ..Desk::default() });
    node.sees("1 3").await;
    // While the first is on its way, and once it is acknowledged.
    worker.add(&said("4", Some("k"))).await;
    until("read=4 handed_off=2 doubled=2 acked=2 takeovers=1", async || node.counts()).await;
    node.desk.is_settled.send_replace(true);
    worker.all_acked().await;
    worker.add(&said("5", Some("k"))).await;
    worker.say("6").await;
    node.sees("1 3 6").await;
    worker.all_acked().await;
    let seconds: u32 = worker.ask_text(&["TTL", "{out}:key:k"]).await.parse().unwrap();
    assert!((590..=600).contains(&seconds), "{seconds}");
    node.shut_down().await;
    let node = Node::start(&server, "b");
    worker.add(&said("7", Some("l"))).await;
    worker.add(&said("8", Some("m"))).await;
    node.sees("8").await;
    until("read=2 handed_off=1 doubled=1 acked=2 takeovers=1", async || node.counts()).await;
}

#[tokio::test]
async fn what_cannot_be_handled_is_set_aside_with_its_reason() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    let errors = [HandOffError::Bad("no".to_owned()), HandOffError::TooLarge("big".to_owned())];
    let node = Node::with(&server, settings("a"), Desk { errors: Mutex::new(errors.into()), ..Desk::default() });
    let bad = [
        worker.add("{").await,
        worker.ask_text(&["XADD", OUT, "*", "x", "y"]).await,
        worker.add(&said("1", Some("k"))).await,
        worker.add(&said("2", None)).await,
        worker.add(&"x".repeat(5000)).await,
    ];
    worker.add(&said("3", Some("k"))).await;
    node.sees("3").await;
    worker.all_acked().await;
    let dead = worker.ask(&["XRANGE", DEAD, "-", "+"]).await;
    let Value::Array(dead) = dead else { panic!("{dead:?}") };
    let dead: Vec<String> = dead.iter().map(|entry| text(entry).split_once(' ').unwrap().1.to_owned()).collect();
    let expected = [
        "e { reason the envelope is not a JSON object as expected: EOF while parsing an object at line 1 column 1 id $",
        "e  reason the entry has no field `e` id $",
        &format!("e {} reason no id $ key k", said("1", Some("k"))),
        &format!("e {} reason big id $", said("2", None)),
        &format!("e {} reason the envelope has 5000 bytes; at most 4096 are allowed id $", "x".repeat(4096)),
    ];
    let expected: Vec<String> = expected.iter().zip(&bad).map(|(text, id)| text.replace('$', id)).collect();
    assert_eq!(dead, expected);
    assert_eq!(node.counts(), "read=6 handed_off=1 dead=5 acked=6 takeovers=1");
}

#[tokio::test]
async fn what_there_is_no_room_for_is_tried_again_before_the_next() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    for n in 0..3 {
        worker.say(&n.to_string()).await;
    }
    let errors = vec![HandOffError::Overloaded; 3].into();
    let node = Node::with(&server, settings("a"), Desk { errors: Mutex::new(errors), ..Desk::default() });
    node.sees("0 1 2").await;
    worker.all_acked().await;
}

#[tokio::test]
async fn large_entries_are_read_a_few_at_a_time_and_all_of_them() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    let text = "x".repeat(1 << 20);
    for _ in 0..40 {
        worker.say(&text).await;
    }
    let node = Node::with(&server, StreamSettings { entry_bytes_max: 2 << 20, ..settings("a") }, Desk::default());
    until("40", async || node.desk.seen.lock().unwrap().len().to_string()).await;
    worker.all_acked().await;
}

#[tokio::test]
async fn a_takeover_claims_everything_in_order() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    for n in 0..600 {
        worker.say(&n.to_string()).await;
    }
    // It takes 99 and hangs; what it took is not settled.
    let (is_settled, _) = watch::channel(false);
    let first = Node::with(&server, settings("a"), Desk { room: Mutex::new(100), is_settled, ..Desk::default() });
    first.sees(&numbers(0..99)).await;
    let second = Node::start(&server, "b");
    let ids = first.desk.ids.lock().unwrap().clone();
    // It dies in the middle: nobody gives the lease back.
    drop(first);
    assert_eq!(second.desk.seen(), "");
    second.sees(&numbers(0..600)).await;
    assert_eq!(second.desk.ids.lock().unwrap()[..99], ids, "a repeat has the same ids");
    worker.all_acked().await;
    until("b:2:1", async || {
        worker.ask_text(&["XINFO", "CONSUMERS", OUT, "gateways"]).await.split(' ').nth(1).map(str::to_owned).unwrap()
    })
    .await;
    let consumers = worker.ask_text(&["XINFO", "CONSUMERS", OUT, "gateways"]).await;
    assert!(!consumers.contains("a:1"), "{consumers}");
}

#[tokio::test]
async fn a_shutdown_hands_the_turn_over_at_once() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    let (mut nodes, mut seen) = (VecDeque::new(), Vec::new());
    for name in ["a", "b", "c"] {
        nodes.push_back(Node::start(&server, name));
    }
    let begun = Instant::now();
    for n in 0..90_u32 {
        worker.say(&n.to_string()).await;
        if n % 30 != 29 {
            continue;
        }
        worker.all_acked().await;
        let holder = worker.ask_text(&["GET", LEASE]).await;
        let at = ["a", "b", "c"].iter().position(|name| holder.starts_with(name)).unwrap();
        let shut_down = std::mem::replace(&mut nodes[at], Node::start(&server, &holder[..1])).shut_down().await;
        seen.push(shut_down.seen());
    }
    assert!(begun.elapsed() < Duration::from_secs(14), "nobody waits for a lease to expire");
    assert_eq!(seen.join(" "), numbers(0..90), "one after the other, each once");
    assert_eq!(nodes.iter().map(|node| node.desk.seen()).collect::<String>(), "");
}

#[tokio::test]
async fn a_hand_off_that_hangs_keeps_the_turn_from_nobody() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    for n in 0..5 {
        worker.say(&n.to_string()).await;
    }
    let first = Node::with(&server, settings("a"), Desk { room: Mutex::new(3), ..Desk::default() });
    first.sees("0 1").await;
    let second = Node::start(&server, "b");
    let begun = Instant::now();
    first.shut_down().await;
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    second.sees("2 3 4").await;
    worker.all_acked().await;
}

#[tokio::test]
async fn two_never_have_the_lease() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    let lease = |node: &str| Lease::new(&server.endpoint(node), OUT, node);
    let (a, b) = (lease("a"), lease("b"));
    let first = a.acquire().await.unwrap().unwrap();
    assert!(b.acquire().await.unwrap().is_none() && a.acquire().await.unwrap().is_none());
    assert_eq!((first.value.as_str(), first.is_good()), ("a:1", true));
    assert!(a.renew(&first).await.unwrap());
    b.release(&first, Duration::from_secs(1)).await;
    assert!(a.renew(&first).await.is_ok_and(|is_ours| !is_ours), "whoever knows the value gives it back");
    let second = b.acquire().await.unwrap().unwrap();
    assert_eq!(second.value, "b:2");
    a.release(&first, Duration::from_secs(1)).await;
    assert!(b.renew(&second).await.unwrap(), "nobody gives back what is another's");
    // Without an answer it is over here before it is over there.
    server.pause();
    let begun = Instant::now();
    timeout(Duration::from_secs(10), b.keep(&second)).await.unwrap();
    assert!(!second.is_good() && begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    server.resume();
    assert_ne!(worker.ask_text(&["PTTL", LEASE]).await, "-2", "it is over here first");
}

#[tokio::test]
async fn whoever_lost_the_lease_acknowledges_nothing() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    worker.add(&said("0", Some("k"))).await;
    let (is_settled, _) = watch::channel(false);
    let node = Node::with(&server, settings("a"), Desk { is_settled, ..Desk::default() });
    node.sees("0").await;
    worker.ask(&["SET", LEASE, "z:99", "PX", "3000"]).await;
    node.desk.is_settled.send_replace(true);
    for _ in 0..20 {
        assert_eq!(
            (worker.pending().await, node.counts()),
            ("1".to_owned(), "read=1 handed_off=1 takeovers=1".to_owned())
        );
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(worker.ask_text(&["EXISTS", "{out}:key:k"]).await, "0");
    // Once it is its turn again the entry comes again.
    node.sees("0 0").await;
    worker.all_acked().await;
}

#[tokio::test]
async fn what_a_late_read_of_another_took_is_handled_in_its_place() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    let node = Node::start(&server, "a");
    worker.say("0").await;
    node.sees("0").await;
    // In one go, so that the node has no chance in between.
    let late = "redis.call('XADD', KEYS[1], '*', 'e', ARGV[1])
        redis.call('XREADGROUP', 'GROUP', 'gateways', 'ghost', 'STREAMS', KEYS[1], '>')
        return redis.call('XADD', KEYS[1], '*', 'e', ARGV[2])";
    for n in (1..9).step_by(2) {
        let (first, second) = (said(&n.to_string(), None), said(&(n + 1).to_string(), None));
        worker.ask(&["EVAL", late, "1", OUT, &first, &second]).await;
        node.sees(&numbers(0..n + 2)).await;
    }
    worker.all_acked().await;
    // Also with nothing after it.
    let alone = late.replace("return redis.call('XADD', KEYS[1], '*', 'e', ARGV[2])", "");
    worker.ask(&["EVAL", &alone, "1", OUT, &said("9", None)]).await;
    node.sees(&numbers(0..10)).await;
    worker.all_acked().await;
}

#[tokio::test]
async fn a_redis_that_comes_back_empty_is_gone_on_with() {
    let mut server = RedisServer::start();
    let worker = Worker(server.link());
    let node = Node::start(&server, "a");
    node.appender.append_within(&message("webchat:u", "0"), MESSAGE_TIMEOUT).await.unwrap();
    worker.say("0").await;
    node.sees("0").await;
    server.restart();
    node.appender.append_within(&message("webchat:u", "1"), MESSAGE_TIMEOUT).await.unwrap();
    assert!(worker.0.query(redis::cmd("PING")).await.is_err());
    worker.0.pause().await;
    assert_eq!(worker.ask_text(&["XINFO", "GROUPS", IN]).await.split(' ').nth(1), Some("workers"));
    worker.say("1").await;
    node.sees("0 1").await;
    // And without a connection that is lost.
    worker.ask(&["FLUSHALL"]).await;
    worker.say("2").await;
    node.sees("0 1 2").await;
    node.appender.append_within(&message("webchat:u", "2"), MESSAGE_TIMEOUT).await.unwrap();
    assert_eq!(worker.ask_text(&["XINFO", "GROUPS", IN]).await.split(' ').nth(1), Some("workers"));
    worker.all_acked().await;
}

#[tokio::test]
async fn a_connection_that_is_cut_costs_nothing() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    let node = Node::start(&server, "a");
    let mut said = 0..;
    for role in ["outbound", "acks", "lease", "inbound", "outbound", "acks"] {
        let mut killed = 0;
        for n in said.by_ref().take(200) {
            worker.say(&n.to_string()).await;
            node.appender.append_within(&message("webchat:u", &n.to_string()), MESSAGE_TIMEOUT).await.unwrap();
            if n % 50 == 25 {
                killed += worker.kill(&format!("a:{role}")).await;
            }
        }
        assert!(killed > 0, "{role}");
    }
    node.sees(&numbers(0..1200)).await;
    worker.all_acked().await;
    assert!(worker.ask_text(&["XLEN", IN]).await.parse::<u32>().unwrap() >= 1000);
    let taken = node.counts();
    // An ack whose answer was cut off is not counted, though it was one: nothing is left to be acked.
    assert!(taken.contains("handed_off=1200 ") && taken.contains("takeovers=1"), "{taken}");
}

fn message(channel: &str, text: &str) -> IncomingMessage {
    IncomingMessage::new(channel.to_owned(), "u", text.to_owned(), Timestamp::from_micros(0))
}
