//! Presence: which users this node has, and which nodes there are, written to Redis as they are now.
//!
//! That a user came or went is a hint, never an event: one worker looks at what is true and writes that, many users at a
//! time, so that edges cannot overtake each other. A user is written before the first tab hears `hello`, and is taken out
//! three seconds after the last one left. All of it has a lifetime in Redis and is written again before that is over, and
//! everything is written anew once Redis may have lost it.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::{Pipeline, RedisResult, Value};
use serde_json::json;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::broker::OnlineUser;
use crate::broker::redis::Shared;
use crate::broker::redis::book::{Book, Change};
use crate::broker::redis::keys::NodeName;
use crate::broker::redis::link::Link;
use crate::broker::redis::members;
use crate::broker::redis::packed::Record;
use crate::broker::redis::spool::{Destination, Item};
use crate::id::UserId;

/// How long what is written of a user is good for.
const USER_LIFETIME: Duration = Duration::from_secs(120);
/// How often a node says that it is alive.
const NODE_INTERVAL: Duration = Duration::from_secs(1);
/// A node that has not said so for this long is gone.
const NODE_LIFETIME: Duration = Duration::from_secs(6);
/// How long what a node wrote stays after it is gone, so that it can be cleaned up by the others.
const NODE_KEYS_LIFETIME: Duration = Duration::from_secs(60);
/// Users of one pipeline.
const BATCH: usize = 1_000;
/// Tabs that may wait for their user to be written.
const EXPECTED_MAX: usize = 65_536;
/// How long another node's address is believed, and for how long that it has none: files are asked for by anybody, and
/// Redis is not asked each time.
const ADDRESS_TIME: Duration = Duration::from_secs(5);
const NO_ADDRESS_TIME: Duration = Duration::from_secs(1);
/// How often it is looked for who is due.
const TICK: Duration = Duration::from_millis(250);

/// Says that a node is alive: `ARGV` are its name and for how long. Answers whether it was not there before, which nodes
/// are alive, and which are not any more.
const ALIVE: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local new = redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
local live = redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf')
local dead = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. now)
redis.call('PEXPIRE', KEYS[1], 600000)
return {new, live, dead}";

/// Takes a node out, if it is still not alive, or is this one itself.
const TAKE_OUT: &str = r"
local time = redis.call('TIME')
local until_then = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not until_then then return 0 end
if ARGV[2] == '0' and tonumber(until_then) >= time[1] * 1000 + math.floor(time[2] / 1000) then return 0 end
return redis.call('ZREM', KEYS[1], ARGV[1])";

/// What the parts of presence tell each other.
pub(crate) struct Presence {
    address: Mutex<Option<String>>,
    /// Those of other nodes that are alive, and until when they are believed.
    addresses: Mutex<HashMap<NodeName, (Instant, Option<String>)>>,
    asked: Mutex<Asked>,
    bell: Notify,
    /// This node is reached elsewhere.
    moved: Notify,
    /// Redis knows of this node.
    ///
    /// # Ordering
    /// Relaxed, all three: flags that publish nothing else.
    has_joined: AtomicBool,
    /// Redis may have lost what was written.
    is_stale: AtomicBool,
    has_left: AtomicBool,
}

#[derive(Default)]
struct Asked {
    /// Users whose tabs have changed.
    changed: HashSet<UserId>,
    /// Users whose tab is about to come, and who waits for their being written.
    expected: Vec<(UserId, oneshot::Sender<()>)>,
}

impl Presence {
    pub(crate) fn new(address: Option<String>) -> Self {
        Self {
            address: Mutex::new(address),
            addresses: Mutex::default(),
            asked: Mutex::default(),
            bell: Notify::new(),
            moved: Notify::new(),
            has_joined: AtomicBool::new(false),
            is_stale: AtomicBool::new(false),
            has_left: AtomicBool::new(false),
        }
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_address(&self, address: String) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
        self.moved.notify_one();
    }

    pub(crate) fn has_joined(&self) -> bool {
        self.has_joined.load(Ordering::Relaxed)
    }

    /// A tab of the user is about to come: told when others know of it.
    pub(crate) fn expect(&self, user: &UserId) -> Option<oneshot::Receiver<()>> {
        let (sender, receiver) = oneshot::channel();
        let mut asked = self.asked();
        if asked.expected.len() >= EXPECTED_MAX {
            // Redis is away: what is true is written when it is back.
            return None;
        }
        asked.expected.push((user.clone(), sender));
        drop(asked);
        self.bell.notify_one();
        Some(receiver)
    }

    /// Nobody waits for Redis while it is away: whose tabs come is written when it is back.
    fn let_go_on(&self) {
        let mut asked = self.asked();
        let expected = std::mem::take(&mut asked.expected);
        asked.changed.extend(expected.into_iter().map(|(user, _)| user));
    }

    /// The user's tabs on this node have changed.
    pub(crate) fn changed(&self, user: &UserId) {
        if self.asked().changed.insert(user.clone()) {
            self.bell.notify_one();
        }
    }
}

/// The worker: the only one who writes users.
struct Worker {
    shared: Arc<Shared>,
    link: Link,
    book: Book,
}

/// Writes users until the broker is dropped.
///
/// # Cancel safety
/// What was under way may or may not have reached Redis.
pub(crate) async fn run(shared: Arc<Shared>) {
    let link = Link::new(shared.endpoint.clone(), "presence");
    let mut worker = Worker { shared, link, book: Book::default() };
    loop {
        let _ = tokio::time::timeout(TICK, worker.shared.presence.bell.notified()).await;
        while worker.turn().await {}
    }
}

impl Worker {
    /// Writes one batch. False if there was nothing to write.
    async fn turn(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let Some(peer) = shared.peer() else { return false };
        if shared.presence.has_left.load(Ordering::Relaxed) {
            return false;
        }
        if shared.presence.is_stale.load(Ordering::Relaxed) {
            // Before everybody is looked at again, Redis has to be there: not once a pause of an outage.
            if self.link.query(redis::cmd("PING")).await.is_err() {
                shared.presence.let_go_on();
                drop(peer);
                self.link.pause().await;
                return false;
            }
            shared.presence.is_stale.store(false, Ordering::Relaxed);
            self.book.doubt();
            shared.presence.asked().changed.extend(peer.users());
        }
        let (users, waiting) = self.collect();
        let changes = self.book.changes(|user| peer.tabs(user), users, Instant::now());
        drop(peer);
        if changes.is_empty() {
            return !waiting.is_empty();
        }
        match self.write(&changes).await {
            Ok(()) => {
                self.note(changes);
                // Who has given up does not hear it.
                for waiting in waiting {
                    let _ = waiting.send(());
                }
            }
            Err(_) => {
                // Whoever waits is let go on; what is true is written once Redis is back.
                shared.metrics.failures.increment();
                let again = changes.into_iter().map(|change| match change {
                    Change::On { user, .. } | Change::Off { user } => user,
                });
                shared.presence.asked().changed.extend(again);
                shared.presence.is_stale.store(true, Ordering::Relaxed);
                drop(waiting);
                self.link.pause().await;
            }
        }
        true
    }

    /// Who is to be looked at now: the flag says whose tab is expected.
    fn collect(&mut self) -> (HashMap<UserId, bool>, Vec<oneshot::Sender<()>>) {
        let now = Instant::now();
        let (mut users, mut waiting) = (HashMap::new(), Vec::new());
        let mut asked = self.shared.presence.asked();
        let expected = asked.expected.len().min(BATCH);
        for (user, sender) in asked.expected.drain(..expected) {
            users.insert(user, true);
            waiting.push(sender);
        }
        let changed: Vec<_> = asked.changed.iter().take(BATCH).cloned().collect();
        for user in changed {
            asked.changed.remove(&user);
            users.entry(user).or_insert(false);
        }
        drop(asked);
        self.book.take_due(now, 2 * BATCH, &mut users);
        (users, waiting)
    }

    async fn write(&self, changes: &[Change]) -> RedisResult<()> {
        let (keys, me) = (&self.shared.keys, self.shared.me.to_string());
        let mut pipeline = Pipeline::with_capacity(4 * changes.len());
        for change in changes {
            match change {
                Change::On { user, tabs, is_new } => {
                    let online = keys.online(user);
                    pipeline.cmd("SADD").arg(&online).arg(&me);
                    pipeline.cmd("PEXPIRE").arg(&online).arg(millis(USER_LIFETIME));
                    if *tabs > 0 {
                        pipeline.cmd("HSET").arg(keys.node_users(self.shared.me)).arg(user.as_str()).arg(*tabs);
                    }
                    if *is_new {
                        tell(&mut pipeline, &self.shared, user, self.shared.me, true);
                    }
                }
                Change::Off { user } => {
                    pipeline.cmd("SREM").arg(keys.online(user)).arg(&me);
                    pipeline.cmd("HDEL").arg(keys.node_users(self.shared.me)).arg(user.as_str());
                    tell(&mut pipeline, &self.shared, user, self.shared.me, false);
                }
            }
        }
        let answers = self.link.run(&pipeline).await?;
        for answer in &answers {
            self.shared.note_refusal(answer);
        }
        Ok(())
    }

    fn note(&mut self, changes: Vec<Change>) {
        let peer = self.shared.peer();
        for user in self.book.note(changes, Instant::now()) {
            if let Some(peer) = &peer
                && peer.tabs(&user) == 0
            {
                peer.forget_backlog(&user);
            }
        }
    }
}

/// Tells whoever listens that a user came to a node or left it.
fn tell(pipeline: &mut Pipeline, shared: &Shared, user: &UserId, node: NodeName, online: bool) {
    let event = json!({ "user_id": user.as_str(), "node": node.to_string(), "online": online });
    pipeline.cmd("PUBLISH").arg(shared.keys.presence()).arg(event.to_string());
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Says once a second that this node is alive, learns who else is, and cleans up after those that are not.
///
/// # Cancel safety
/// Dropping it lets this node count as gone after [`NODE_LIFETIME`].
pub(crate) async fn keep_alive(shared: Arc<Shared>) {
    let link = Link::new(shared.endpoint.clone(), "alive");
    let mut tick = tokio::time::interval(NODE_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !shared.presence.has_left.load(Ordering::Relaxed) {
        match say_alive(&shared, &link).await {
            Ok(dead) => {
                if shared.members.unseen() > 0 {
                    shared.spool.push(Item::Tell { to: Destination::EveryNode, record: Record::Come });
                }
                // After an outage nodes look dead that are about to say that they are not.
                if !shared.members.is_doubtful() {
                    for node in dead {
                        // Whoever takes it out cleans up.
                        let _ = clean_up(&shared, &link, node).await;
                    }
                }
                if shared.presence.has_joined() {
                    tokio::select! {
                        _ = tick.tick() => {}
                        () = shared.presence.moved.notified() => {}
                    }
                } else {
                    shared.presence.has_joined.store(true, Ordering::Relaxed);
                }
            }
            Err(_) => {
                shared.metrics.failures.increment();
                shared.members.doubt();
                shared.presence.is_stale.store(true, Ordering::Relaxed);
                link.pause().await;
            }
        }
    }
}

/// The nodes that are gone and were not cleaned up after.
async fn say_alive(shared: &Shared, link: &Link) -> RedisResult<Vec<NodeName>> {
    let me = shared.me.to_string();
    let mut pipeline = Pipeline::new();
    pipeline.cmd("EVAL").arg(ALIVE).arg(1).arg(shared.keys.nodes()).arg(&me).arg(millis(NODE_LIFETIME));
    pipeline.cmd("PEXPIRE").arg(shared.keys.node_users(shared.me)).arg(millis(NODE_KEYS_LIFETIME));
    let address = shared.presence.address.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(address) = address {
        let key = shared.keys.node_address(shared.me);
        pipeline.cmd("SET").arg(key).arg(address).arg("PX").arg(millis(NODE_KEYS_LIFETIME));
    }
    let answers = link.run(&pipeline).await?;
    for answer in &answers {
        shared.note_refusal(answer);
    }
    let Some(Value::Array(alive)) = answers.first() else { return Ok(Vec::new()) };
    let [Value::Int(new), Value::Array(live), Value::Array(dead)] = &alive[..] else { return Ok(Vec::new()) };
    if *new == 1 && shared.presence.has_joined() {
        shared.members.doubt();
        shared.presence.is_stale.store(true, Ordering::Relaxed);
    }
    shared.members.set(live.iter().filter_map(members::node));
    shared.metrics.nodes.store(shared.members.count() as u64);
    shared.forget_the_gone();
    Ok(dead.iter().filter_map(members::node).collect())
}

/// Takes a node out, and its users with it, if nobody else has begun to.
async fn clean_up(shared: &Shared, link: &Link, node: NodeName) -> RedisResult<()> {
    let mut out = redis::cmd("EVAL");
    let is_own = node == shared.me;
    out.arg(TAKE_OUT).arg(1).arg(shared.keys.nodes()).arg(node.to_string()).arg(i32::from(is_own));
    if link.query(out).await? != Value::Int(1) {
        return Ok(());
    }
    if !is_own {
        tracing::warn!(%node, "a node is gone");
    }
    let users = node_users(shared, link, node, usize::MAX).await?;
    for users in users.chunks(BATCH) {
        let mut pipeline = Pipeline::with_capacity(2 * users.len());
        for OnlineUser { user, .. } in users {
            pipeline.cmd("SREM").arg(shared.keys.online(user)).arg(node.to_string());
            tell(&mut pipeline, shared, user, node, false);
        }
        link.run(&pipeline).await?;
    }
    let mut forget = Pipeline::new();
    forget.cmd("DEL").arg(shared.keys.node_users(node));
    forget.cmd("DEL").arg(shared.keys.node_address(node));
    link.run(&forget).await.map(drop)
}

/// The users of one node, at most `limit`.
async fn node_users(shared: &Shared, link: &Link, node: NodeName, limit: usize) -> RedisResult<Vec<OnlineUser>> {
    let mut found = HashMap::new();
    let mut cursor = "0".to_owned();
    loop {
        let mut scan = redis::cmd("HSCAN");
        scan.arg(shared.keys.node_users(node)).arg(&cursor).arg("COUNT").arg(BATCH);
        let (next, fields): (String, Vec<(String, usize)>) = redis::from_redis_value(link.query(scan).await?)?;
        found.extend(fields.into_iter().filter_map(|(user, tabs)| Some((UserId::parse(&user).ok()?, tabs))));
        if next == "0" || found.len() >= limit {
            break;
        }
        cursor = next;
    }
    Ok(found.into_iter().take(limit).map(|(user, tabs)| OnlineUser { user, tabs }).collect())
}

/// The users of all other nodes, at most `limit`.
pub(crate) async fn users(shared: &Shared, limit: usize) -> Option<Vec<OnlineUser>> {
    let mut sums: HashMap<UserId, usize> = HashMap::new();
    for node in shared.members.others() {
        for OnlineUser { user, tabs } in node_users(shared, &shared.commands, node, limit).await.ok()? {
            if sums.len() < limit || sums.contains_key(&user) {
                *sums.entry(user).or_default() += tabs;
            }
        }
    }
    Some(sums.into_iter().map(|(user, tabs)| OnlineUser { user, tabs }).collect())
}

/// Whether another node that is alive has the user. False if Redis does not say.
pub(crate) async fn is_online(shared: &Shared, user: &UserId) -> bool {
    if !shared.members.has_others() {
        return false;
    }
    let mut members = redis::cmd("SMEMBERS");
    members.arg(shared.keys.online(user));
    let set = shared.commands.query(members).await;
    set.is_ok_and(|set| !shared.members.among(&set).is_empty())
}

/// Where the other node with that tag is reached.
pub(crate) async fn address_of(shared: &Shared, tag: u32) -> Option<String> {
    let others = shared.members.others();
    let node = others.iter().copied().find(|node| node.tag() == tag)?;
    let known = || shared.presence.addresses.lock().unwrap_or_else(PoisonError::into_inner);
    let believed = known().get(&node).filter(|(until, _)| Instant::now() < *until).cloned();
    if let Some((_, address)) = believed {
        return address;
    }
    let mut get = redis::cmd("GET");
    get.arg(shared.keys.node_address(node));
    let answer = match shared.commands.query(get.clone()).await {
        Ok(answer) => answer,
        // A connection that broke while nobody asked is known to be broken by the first question only.
        Err(_) => {
            shared.commands.pause().await;
            shared.commands.query(get).await.ok()?
        }
    };
    let address: Option<String> = redis::from_redis_value(answer).ok()?;
    let time = if address.is_some() { ADDRESS_TIME } else { NO_ADDRESS_TIME };
    let mut known = known();
    known.retain(|node, _| others.contains(node));
    known.insert(node, (Instant::now() + time, address.clone()));
    address
}

/// Takes this node out, for good.
pub(crate) async fn leave(shared: &Shared) {
    shared.presence.has_left.store(true, Ordering::Relaxed);
    // A connection of its own: that of an earlier question may have gone with the thread that asked.
    let link = Link::new(shared.endpoint.clone(), "leave");
    if let Err(error) = clean_up(shared, &link, shared.me).await {
        tracing::warn!(%error, "the other nodes find out by themselves that this one is gone");
    }
}
