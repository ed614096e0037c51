//! The publisher: everything that this node says to the others, on one connection, in one order.
//!
//! It works in batches: whatever waits goes out together. One pipeline writes what is kept and asks where users are;
//! the next carries the frames: those of streams one PUBLISH each, those for a node packed into one. No batch begins
//! before the one ahead of it is answered, so that order is that of the spool, whatever is lost and said again.
//!
//! A batch whose answer never came is said again: a node knows a packed message by its number, and a stream's frame
//! by its message's id. A node that does not listen at the moment gets its messages when it does, or is gone.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use redis::{Pipeline, Value};
use tokio::time::Instant;

use crate::broker::redis::Shared;
use crate::broker::redis::keys::NodeName;
use crate::broker::redis::link::Link;
use crate::broker::redis::packed::{self, Record};
use crate::broker::redis::recovery;
use crate::broker::redis::spool::{Destination, Item, Parcel};
use crate::id::{ChannelId, RequestId, UserId};
use crate::proto::json;

/// Items of one batch.
const BATCH_ITEMS: usize = 1_024;
/// Bytes of one batch, after which it takes no more.
const BATCH_BYTES: usize = 1 << 20;
/// Bytes of one packed message, after which it takes no more.
const PACKED_BYTES: usize = 256 << 10;
/// How often a message to oneself goes out.
const CANARY_INTERVAL: Duration = Duration::from_millis(500);
/// How long a node that did not listen is left alone.
const NODE_PAUSE: Duration = Duration::from_millis(50);

/// What waits for one destination.
#[derive(Default)]
struct Outbox {
    waiting: VecDeque<Out>,
    /// A packed message that was not answered, with what is in it.
    under_way: Option<(Vec<u8>, Vec<Out>)>,
    sequence: u64,
    not_before: Option<Instant>,
}

enum Out {
    Parcel(Arc<Parcel>),
    Record(Record),
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.under_way.is_none()
    }

    /// The message that is next, packed now if it was not before.
    fn message(&mut self, publisher: NodeName) -> Option<&[u8]> {
        if self.under_way.is_none() && !self.waiting.is_empty() {
            self.sequence += 1;
            let (mut bytes, mut inside) = (Vec::with_capacity(512), Vec::new());
            packed::begin(&mut bytes, publisher, self.sequence);
            while bytes.len() < PACKED_BYTES
                && let Some(out) = self.waiting.pop_front()
            {
                let is_put = match &out {
                    Out::Parcel(parcel) => packed::put_frame(&mut bytes, &parcel.channel, &parcel.frame),
                    Out::Record(record) => packed::put(&mut bytes, record),
                };
                if is_put {
                    inside.push(out);
                }
            }
            self.under_way = Some((bytes, inside));
        }
        self.under_way.as_ref().map(|(bytes, _)| bytes.as_slice())
    }

    fn frames(inside: &[Out]) -> u64 {
        inside.iter().filter(|out| matches!(out, Out::Parcel(_))).count() as u64
    }
}

/// Runs until the broker is dropped.
pub(crate) struct Publisher {
    shared: Arc<Shared>,
    link: Link,
    /// In a cluster, the one node that plain publishes go through.
    pinned: Option<Link>,
    outboxes: HashMap<Destination, Outbox>,
    streams: VecDeque<(RequestId, Arc<Parcel>)>,
    canary_at: Instant,
}

impl Publisher {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let endpoint = shared.endpoint.clone();
        let pinned = endpoint.is_cluster().then(|| Link::pinned(endpoint.clone(), "publish-pinned"));
        let link = Link::new(endpoint, "publish");
        Self { shared, link, pinned, outboxes: HashMap::new(), streams: VecDeque::new(), canary_at: Instant::now() }
    }

    /// # Cancel safety
    /// What was under way may or may not have reached Redis.
    pub(crate) async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH_ITEMS);
        loop {
            let due = self.due();
            let shared = Arc::clone(&self.shared);
            let _ = tokio::time::timeout_at(due, shared.spool.wait()).await;
            self.send_canary();
            shared.spool.take(&mut batch, BATCH_ITEMS, BATCH_BYTES);
            let found = self.look_up(&mut batch).await;
            for item in batch.drain(..) {
                self.route(item, &found);
            }
            self.flush().await;
            shared.metrics.spool_bytes.store(shared.spool.bytes() as u64);
        }
    }

    /// When there is something to do without an item.
    fn due(&self) -> Instant {
        let pauses = self.outboxes.values().filter(|outbox| !outbox.is_empty()).filter_map(|outbox| outbox.not_before);
        pauses.chain([self.canary_at]).min().unwrap_or(self.canary_at)
    }

    /// A message to oneself, unless one waits already.
    fn send_canary(&mut self) {
        let now = Instant::now();
        if now < self.canary_at {
            return;
        }
        self.canary_at = now + CANARY_INTERVAL;
        let outbox = self.outboxes.entry(Destination::Node(self.shared.me)).or_default();
        if outbox.is_empty() {
            let micros = self.shared.micros().max(1);
            outbox.waiting.push_back(Out::Record(Record::Canary { micros }));
        }
    }

    /// Writes what is kept of the batch, reads what was asked for, and finds out which nodes have its users.
    async fn look_up(&self, batch: &mut [Item]) -> HashMap<UserId, Vec<NodeName>> {
        let asked = Asked::of(&self.shared, batch);
        if asked.pipeline.is_empty() {
            return HashMap::new();
        }
        loop {
            match self.link.run(&asked.pipeline).await {
                Ok(answers) => return asked.read(&self.shared, batch, &answers),
                Err(_) => {
                    self.shared.metrics.failures.increment();
                    self.link.pause().await;
                }
            }
        }
    }

    fn route(&mut self, item: Item, found: &HashMap<UserId, Vec<NodeName>>) {
        match item {
            Item::Frame(parcel) => match &parcel.channel {
                ChannelId::User(user) => {
                    for node in found.get(user).into_iter().flatten() {
                        self.put(Destination::Node(*node), Out::Parcel(Arc::clone(&parcel)));
                    }
                }
                ChannelId::Room(_) => self.put(Destination::EveryNode, Out::Parcel(parcel)),
                ChannelId::Stream(request) => {
                    let request = request.clone();
                    self.streams.push_back((request, parcel));
                }
            },
            Item::End { user, ending, told } => {
                let nodes = found.get(&user).map_or(&[][..], Vec::as_slice);
                for node in nodes {
                    let record = Record::End { user: user.clone(), ending };
                    self.put(Destination::Node(*node), Out::Record(record));
                }
                let _ = told.send(nodes.len());
            }
            Item::Tell { to, record } => self.put(to, Out::Record(record)),
            // It was answered when it was looked up.
            Item::Kept { .. } => {}
        }
    }

    fn put(&mut self, to: Destination, out: Out) {
        self.outboxes.entry(to).or_default().waiting.push_back(out);
    }

    /// Sends what waits, until nothing is left but what is for nodes that do not listen now.
    async fn flush(&mut self) {
        loop {
            self.bury();
            let sent = self.next_round();
            if sent.is_empty() {
                return;
            }
            let result = match &self.pinned {
                None => self.link.run(&sent.plain).await.map(|answers| (answers, Vec::new())),
                Some(pinned) => tokio::try_join!(run_some(pinned, &sent.plain), run_some(&self.link, &sent.sharded)),
            };
            match result {
                Ok((plain, sharded)) => self.settle(sent, plain, sharded),
                Err(_) => {
                    self.shared.metrics.failures.increment();
                    self.link.pause().await;
                }
            }
        }
    }

    /// What was for nodes that are gone is for nobody.
    fn bury(&mut self) {
        let shared = &self.shared;
        self.outboxes.retain(|to, outbox| match to {
            Destination::Node(node) if *node != shared.me && !shared.members.is_live(*node) => {
                let lost = outbox.under_way.iter().flat_map(|(_, inside)| inside).chain(&outbox.waiting);
                let frames = lost.filter(|out| matches!(out, Out::Parcel(_))).count();
                shared.metrics.undeliverable_frames.add(frames as u64);
                false
            }
            _ => true,
        });
    }

    fn next_round(&mut self) -> Sent {
        let (keys, me) = (&self.shared.keys, self.shared.me);
        let mut sent = Sent::default();
        let mut bytes = 0;
        let mut text = Vec::new();
        for (request, parcel) in &self.streams {
            if sent.streams >= BATCH_ITEMS || bytes >= BATCH_BYTES {
                break;
            }
            text.clear();
            json::escape_non_ascii(parcel.frame.json(), &mut text);
            bytes += text.len();
            sent.plain.cmd("PUBLISH").arg(keys.stream(request)).arg(&text[..]);
            sent.streams += 1;
        }
        let now = Instant::now();
        for (to, outbox) in &mut self.outboxes {
            if outbox.not_before.is_some_and(|then| now < then) {
                continue;
            }
            let Some(message) = outbox.message(me) else { continue };
            let sharded = self.pinned.is_some() && matches!(to, Destination::Node(_));
            let (pipeline, command) =
                if sharded { (&mut sent.sharded, "SPUBLISH") } else { (&mut sent.plain, "PUBLISH") };
            let channel = match to {
                Destination::EveryNode => keys.every_node(),
                Destination::Node(node) => keys.node(*node),
            };
            pipeline.cmd(command).arg(channel).arg(message);
            if sharded { &mut sent.sharded_to } else { &mut sent.plain_to }.push(*to);
        }
        sent
    }

    fn settle(&mut self, sent: Sent, plain: Vec<Value>, sharded: Vec<Value>) {
        let (streams, nodes) = plain.split_at_checked(sent.streams).unwrap_or((&plain, &[]));
        self.shared.metrics.stream_frames.add(streams.len() as u64);
        for answer in streams {
            if let Some((_, parcel)) = self.streams.pop_front() {
                parcel.reach(self.receivers(answer));
            }
        }
        let all = sent.plain_to.into_iter().zip(nodes).chain(sent.sharded_to.into_iter().zip(&sharded));
        for (to, answer) in all {
            let receivers = self.receivers(answer);
            self.settle_one(to, receivers);
        }
    }

    fn settle_one(&mut self, to: Destination, receivers: usize) {
        let Some(outbox) = self.outboxes.get_mut(&to) else { return };
        if receivers == 0 && to != Destination::EveryNode {
            // It is subscribing again: until it does, or is gone, its messages wait.
            outbox.not_before = Some(Instant::now() + NODE_PAUSE);
            if to == Destination::Node(self.shared.me) {
                self.shared.subscription.lost_here.notify_one();
            }
            return;
        }
        outbox.not_before = None;
        // Every node hears what is for all, also the one that says it.
        let nodes = if to == Destination::EveryNode { receivers.saturating_sub(1) } else { 1 };
        if let Some((_, inside)) = outbox.under_way.take() {
            self.shared.metrics.packed_messages.increment();
            self.shared.metrics.packed_frames.add(Outbox::frames(&inside));
            for out in inside {
                if let Out::Parcel(parcel) = out {
                    parcel.reach(nodes);
                }
            }
        }
    }

    fn receivers(&self, answer: &Value) -> usize {
        self.shared.note_refusal(answer);
        match answer {
            Value::Int(count) => usize::try_from(*count).unwrap_or_default(),
            _ => 0,
        }
    }
}

async fn run_some(link: &Link, pipeline: &Pipeline) -> redis::RedisResult<Vec<Value>> {
    if pipeline.is_empty() { Ok(Vec::new()) } else { link.run(pipeline).await }
}

/// What one round of publishes is made of.
#[derive(Default)]
struct Sent {
    plain: Pipeline,
    /// Streams' frames, which come first in it.
    streams: usize,
    plain_to: Vec<Destination>,
    sharded: Pipeline,
    sharded_to: Vec<Destination>,
}

impl Sent {
    fn is_empty(&self) -> bool {
        self.plain.is_empty() && self.sharded.is_empty()
    }
}

/// What a batch needs to know, and the commands that ask for it.
struct Asked {
    pipeline: Pipeline,
    /// Commands that only write.
    writes: usize,
    /// Reads of what is kept: which item, and where its answers begin.
    kept: Vec<(usize, usize)>,
    users: Vec<UserId>,
}

impl Asked {
    fn of(shared: &Shared, batch: &[Item]) -> Self {
        let mut asked = Self { pipeline: Pipeline::new(), writes: 0, kept: Vec::new(), users: Vec::new() };
        let mut seen: HashSet<&UserId> = HashSet::new();
        let mut written: HashSet<&UserId> = HashSet::new();
        let has_others = shared.members.has_others();
        for (at, item) in batch.iter().enumerate() {
            match item {
                Item::Frame(parcel) => {
                    let ChannelId::User(user) = &parcel.channel else { continue };
                    if let Some(limits) = &shared.recovery
                        && recovery::wants(parcel.frame.kind())
                    {
                        recovery::write(&mut asked.pipeline, &shared.keys.recovery(user), &parcel.frame, limits);
                        written.insert(user);
                    }
                    if has_others && seen.insert(user) {
                        asked.users.push(user.clone());
                    }
                }
                Item::End { user, .. } => {
                    if has_others && seen.insert(user) {
                        asked.users.push(user.clone());
                    }
                }
                Item::Kept { user, .. } => {
                    if let Some(limits) = &shared.recovery {
                        asked.kept.push((at, asked.pipeline.len()));
                        recovery::read(&mut asked.pipeline, &shared.keys.recovery(user), limits);
                    }
                }
                Item::Tell { .. } => {}
            }
        }
        if let Some(limits) = &shared.recovery {
            for user in written {
                asked.pipeline.cmd("PEXPIRE").arg(shared.keys.recovery(user)).arg(recovery::key_millis(limits));
            }
        }
        asked.writes = asked.pipeline.len();
        for user in &asked.users {
            asked.pipeline.cmd("SMEMBERS").arg(shared.keys.online(user));
        }
        asked
    }

    fn read(self, shared: &Shared, batch: &mut [Item], answers: &[Value]) -> HashMap<UserId, Vec<NodeName>> {
        for answer in answers {
            shared.note_refusal(answer);
        }
        for (item, at) in self.kept {
            if let Some(Item::Kept { answer, .. }) = batch.get_mut(item)
                && let Some(answer) = answer.take()
            {
                let frames = answers.get(at..at + recovery::READ_COMMANDS).and_then(recovery::frames);
                // Whoever asked may have given up.
                let _ = answer.send(frames);
            }
        }
        let sets = answers.get(self.writes..).unwrap_or_default();
        self.users.into_iter().zip(sets).map(|(user, set)| (user, shared.members.among(set))).collect()
    }
}

