//! The publisher: everything that this node says to the others, on one connection, in one order.
//!
//! It works in batches: whatever waits goes out together. One pipeline writes what is kept and asks where users are;
//! the next carries the frames: those of streams one PUBLISH each, those for a node packed into one. No batch begins
//! before the one ahead of it is answered, so that order is that of the spool, whatever is lost and said again.
//!
//! A batch whose answer never came is said again: a node knows a packed message by its number, and a stream's frame
//! by its message's id. A node that does not listen at the moment gets its messages when it does, or is gone.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use foldhash::fast::RandomState;
use futures_util::future::try_join_all;
use redis::{Cmd, Pipeline, Value};
use tokio::time::Instant;

use crate::broker::redis::Shared;
use crate::broker::redis::keys::NodeName;
use crate::broker::redis::link::Link;
use crate::broker::redis::packed::{self, Number, Record};
use crate::broker::redis::recovery;
use crate::broker::redis::spool::{Destination, Item, Parcel};
use crate::broker::redis::stream_frame::put_trace;
use crate::id::{ChannelId, RequestId, UserId};
use crate::proto::json;
use crate::proto::trace::TraceContext;

/// Items of one batch.
const BATCH_ITEMS: usize = 1_024;
/// Bytes of one batch, after which it takes no more.
const BATCH_BYTES: usize = 1 << 20;
/// Bytes of one packed message, after which it takes no more.
const PACKED_BYTES: usize = 256 << 10;
/// How often a message to oneself goes out.
const CANARY_INTERVAL: Duration = Duration::from_millis(500);
/// How long streams' frames wait after Redis was away: a node that reads one subscribes again within that time.
const STREAM_PAUSE: Duration = Duration::from_millis(1_200);
/// How long a node that did not listen is left alone.
const NODE_PAUSE: Duration = Duration::from_millis(50);

/// Which nodes the users of a batch are on.
type Found = HashMap<UserId, Vec<NodeName>, RandomState>;

/// What waits for one destination.
#[derive(Default)]
struct Outbox {
    waiting: VecDeque<Out>,
    /// A packed message that was not answered, with what is in it.
    under_way: Option<(Vec<u8>, Vec<Out>)>,
    number: Number,
    not_before: Option<Instant>,
}

enum Out {
    Parcel(Arc<Parcel>),
    Record(Record),
}

impl Out {
    /// What traces it.
    fn trace(&self) -> Option<&TraceContext> {
        if let Self::Parcel(parcel) = self { parcel.origin.context() } else { None }
    }
}

/// Says which of the frames that are packed are traced.
fn put_traces(bytes: &mut Vec<u8>, inside: &[Out]) {
    let frames = inside.iter().filter(|out| matches!(out, Out::Parcel(_)));
    // A message has far fewer frames than there are places.
    let traces = (0u16..).zip(frames).filter_map(|(place, out)| Some((place, out.trace()?)));
    packed::put_traces(bytes, &traces.collect::<Vec<_>>());
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.under_way.is_none()
    }

    /// The message that is next, packed now if it was not before.
    fn message(&mut self, publisher: NodeName) -> Option<&[u8]> {
        if self.under_way.is_none() && !self.waiting.is_empty() {
            self.number.1 += 1;
            let (mut bytes, mut inside) = (Vec::with_capacity(512), Vec::new());
            packed::begin(&mut bytes, publisher, self.number);
            let mut traced_bytes = 0;
            while bytes.len() + traced_bytes < PACKED_BYTES
                && let Some(out) = self.waiting.pop_front()
            {
                let is_put = match &out {
                    Out::Parcel(parcel) => packed::put_frame(&mut bytes, &parcel.channel, &parcel.frame),
                    Out::Record(record) => packed::put(&mut bytes, record),
                };
                if is_put {
                    traced_bytes += out.trace().map_or(0, TraceContext::bytes);
                    inside.push(out);
                }
            }
            if traced_bytes > 0 {
                put_traces(&mut bytes, &inside);
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
    outboxes: HashMap<Destination, Outbox, RandomState>,
    streams: VecDeque<(RequestId, Arc<Parcel>)>,
    /// Streams' frames wait until then for their readers to be subscribed again.
    streams_from: Instant,
    canary_at: Instant,
    /// Outboxes that there have been.
    epochs: u32,
}

impl Publisher {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let endpoint = shared.endpoint.clone();
        let pinned = endpoint.is_cluster().then(|| Link::pinned(endpoint.clone(), "publish-pinned"));
        let link = Link::new(endpoint, "publish");
        let (outboxes, streams, now) = (HashMap::default(), VecDeque::new(), Instant::now());
        Self { shared, link, pinned, outboxes, streams, streams_from: now, canary_at: now, epochs: 0 }
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
            // In a box, so that what a task holds is small.
            Box::pin(self.flush()).await;
        }
    }

    /// When there is something to do without an item.
    fn due(&self) -> Instant {
        let pauses = self.outboxes.values().filter(|outbox| !outbox.is_empty()).filter_map(|outbox| outbox.not_before);
        let streams = (!self.streams.is_empty()).then_some(self.streams_from);
        pauses.chain(streams).fold(self.canary_at, Instant::min)
    }

    /// A message to oneself, unless one waits already.
    fn send_canary(&mut self) {
        let now = Instant::now();
        if now < self.canary_at {
            return;
        }
        self.canary_at = now + CANARY_INTERVAL;
        let micros = self.shared.micros().max(1);
        let outbox = self.outbox(Destination::Node(self.shared.me));
        if outbox.is_empty() {
            outbox.waiting.push_back(Out::Record(Record::Canary { micros }));
        }
    }

    /// Writes what is kept of the batch, reads what was asked for, and finds out which nodes have its users.
    async fn look_up(&mut self, batch: &mut [Item]) -> Found {
        let (asks, counts, answers) = loop {
            let mut asks = Ask::of(&self.shared, batch);
            let counts: Vec<_> = asks.iter().map(|ask| ask.commands.len()).collect();
            let pipelines = Ask::pipelines(&mut asks, self.pinned.is_some());
            if pipelines.is_empty() {
                return Found::default();
            }
            match try_join_all(pipelines.iter().map(|pipeline| self.link.run_in_slot(pipeline))).await {
                Ok(answers) => break (asks, counts, answers.into_iter().flatten().collect::<Vec<Value>>()),
                // It is asked anew, without what nobody waits for any more.
                Err(_) => self.failed().await,
            }
        };
        let mut rest = answers.as_slice();
        let found = asks.into_iter().zip(counts).map(|(ask, count)| {
            let (own, after) = rest.split_at_checked(count).unwrap_or((rest, &[]));
            rest = after;
            let nodes = ask.read(&self.shared, batch, own);
            (ask.user, nodes)
        });
        found.collect()
    }

    fn route(&mut self, item: Item, found: &Found) {
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
        self.outbox(to).waiting.push_back(out);
    }

    /// A new one has an epoch of its own: whoever it is for may have been given up before.
    fn outbox(&mut self, to: Destination) -> &mut Outbox {
        let epochs = &mut self.epochs;
        self.outboxes.entry(to).or_insert_with(|| {
            *epochs += 1;
            Outbox { number: (*epochs, 0), ..Outbox::default() }
        })
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
                Err(_) => self.failed().await,
            }
        }
    }

    /// Redis may have lost everything, and every subscription.
    async fn failed(&mut self) {
        self.shared.metrics.failures.increment();
        self.shared.members.doubt();
        self.streams_from = Instant::now() + STREAM_PAUSE;
        self.link.pause().await;
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
        let now = Instant::now();
        let streams = self.streams.iter().filter(|_| self.streams_from <= now);
        for (request, parcel) in streams {
            if sent.streams >= BATCH_ITEMS || bytes >= BATCH_BYTES {
                break;
            }
            text.clear();
            json::escape_non_ascii(parcel.frame.json(), &mut text);
            if let Some(context) = parcel.origin.context() {
                put_trace(&mut text, context);
            }
            bytes += text.len();
            sent.plain.cmd("PUBLISH").arg(keys.stream(request)).arg(&text[..]);
            sent.streams += 1;
        }
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

/// What a batch has to write and to know of one user: in this order, so that whoever is not among the nodes that it
/// answers finds what was written.
struct Ask {
    user: UserId,
    commands: Vec<Cmd>,
    /// Reads of what is kept: which item, and where its answers begin.
    kept: Vec<(usize, usize)>,
    is_written: bool,
    wants_nodes: bool,
    /// What is kept of the user had a hole, and begins anew.
    forgets: bool,
}

impl Ask {
    fn new(user: &UserId) -> Self {
        Self {
            user: user.clone(),
            commands: Vec::new(),
            kept: Vec::new(),
            is_written: false,
            wants_nodes: false,
            forgets: false,
        }
    }

    fn of(shared: &Shared, batch: &[Item]) -> Vec<Self> {
        let mut asks: Vec<Self> = Vec::new();
        let mut places: HashMap<&UserId, usize, RandomState> = HashMap::default();
        let has_others = shared.members.has_others();
        let holes = shared.some_holes();
        for user in &holes {
            // Nobody may believe to have everything that is read from it.
            let mut forget = redis::cmd("DEL");
            forget.arg(shared.keys.recovery(user));
            places.insert(user, asks.len());
            asks.push(Self { commands: vec![forget], forgets: true, ..Self::new(user) });
        }
        for (at, item) in batch.iter().enumerate() {
            let user = match item {
                Item::Frame(parcel) => match &parcel.channel {
                    ChannelId::User(user) => user,
                    ChannelId::Room(_) | ChannelId::Stream(_) => continue,
                },
                Item::Kept { answer: Some(answer), .. } if answer.is_closed() => continue,
                Item::End { user, .. } | Item::Kept { user, .. } => user,
                Item::Tell { .. } => continue,
            };
            let place = *places.entry(user).or_insert_with(|| {
                asks.push(Self::new(user));
                asks.len() - 1
            });
            let ask = &mut asks[place];
            match (item, &shared.recovery) {
                (Item::Frame(parcel), Some(limits)) if recovery::wants(parcel.frame.kind()) => {
                    ask.commands.push(recovery::write(&shared.keys.recovery(user), &parcel.frame, limits));
                    ask.is_written = true;
                }
                (Item::Kept { .. }, Some(limits)) => {
                    ask.kept.push((at, ask.commands.len()));
                    ask.commands.extend(recovery::read(&shared.keys.recovery(user), limits));
                }
                _ => {}
            }
            ask.wants_nodes |= has_others && !matches!(item, Item::Kept { .. });
        }
        asks.iter_mut().for_each(|ask| ask.finish(shared));
        asks
    }

    fn finish(&mut self, shared: &Shared) {
        if let Some(limits) = shared.recovery.as_ref().filter(|_| self.is_written) {
            let mut expire = redis::cmd("PEXPIRE");
            expire.arg(shared.keys.recovery(&self.user)).arg(recovery::key_millis(limits));
            self.commands.push(expire);
        }
        if self.wants_nodes {
            let mut members = redis::cmd("SMEMBERS");
            members.arg(shared.keys.online(&self.user));
            self.commands.push(members);
        }
    }

    /// One pipeline; in a cluster one for each user, whose keys are all in one slot.
    fn pipelines(asks: &mut [Self], is_cluster: bool) -> Vec<Pipeline> {
        let mut pipelines = vec![Pipeline::new()];
        for ask in asks {
            if is_cluster {
                pipelines.push(Pipeline::new());
            }
            if let Some(pipeline) = pipelines.last_mut() {
                for command in ask.commands.drain(..) {
                    pipeline.add_command(command);
                }
            }
        }
        pipelines.retain(|pipeline| !pipeline.is_empty());
        pipelines
    }

    /// Takes its answers from the front of all answers.
    fn read(&self, shared: &Shared, batch: &mut [Item], answers: &[Value]) -> Vec<NodeName> {
        let refusals = answers.iter().filter(|answer| shared.note_refusal(answer)).count();
        if self.forgets || (refusals > 0 && self.is_written) {
            shared.note_hole(&self.user, refusals > 0 && self.is_written);
        }
        for (item, at) in &self.kept {
            if let Some(Item::Kept { answer, .. }) = batch.get_mut(*item)
                && let Some(answer) = answer.take()
            {
                let frames = answers.get(*at..*at + recovery::READ_COMMANDS).and_then(recovery::frames);
                // Whoever asked may have given up.
                let _ = answer.send(frames);
            }
        }
        match answers.last() {
            Some(set) if self.wants_nodes => shared.members.at_least_among(set),
            _ => Vec::new(),
        }
    }
}
