//! One world: its nodes, its clients, and what a seed lets them do.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tabcast::broker::Broker;
use tabcast::broker::memory::MemoryBroker;
use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::hub::Drain;
use tabcast::fanout::session::Address;
use tabcast::fanout::shard::{Resume, Shard, Wire};
use tabcast::id::{ChannelId, MessageId, RoomName, UserId};
use tabcast::platform::inbound::InboundLimits;
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::frame;
use tabcast::proto::limits::{FileLimits, HubLimits, RecoveryLimits, SessionLimits};
use tokio::runtime::{Builder, Runtime};

use super::client::{Client, Ear, Pace};
use super::dice::Dice;
use super::network::{Arrived, Network};
use super::oracle::{Oracle, ROOMS, USERS};
use super::reader::Parsed;
use super::trace::{Counts, Trace};
use super::{Violation, ending, stepping};

/// One node: its engine, and its shards with what understands their tabs.
pub(crate) struct Node {
    pub(crate) engine: Engine,
    pub(crate) shards: Vec<Shard>,
    pub(crate) ears: Vec<Ear>,
    /// Sessions that each shard has ended so far, by reason.
    pub(crate) ended: Vec<[u64; Disconnect::ALL.len()]>,
    /// When each shard was last through with its inbox.
    pub(crate) heard_at: Vec<Duration>,
    pub(crate) refused_forwards: u64,
    pub(crate) is_draining: bool,
}

/// A client that went away and may come back.
pub(crate) struct Absent {
    pub(crate) node: usize,
    pub(crate) user: usize,
    pub(crate) wire: Wire,
    pub(crate) positions: Vec<MessageId>,
    pub(crate) had: BTreeSet<usize>,
}

/// A client on its way back, while what it missed is read from where it is kept.
pub(super) struct Returning {
    pub(super) absent: Absent,
    pub(super) node: usize,
    pub(super) positions: Vec<MessageId>,
    /// What was kept of its user when it began to come back.
    pub(super) kept: Vec<usize>,
    /// The place on its node from which on all that is posted is collected for it.
    pub(super) since: u64,
    /// After which its client gives up.
    pub(super) until: Duration,
    pub(super) resume: Pin<Box<dyn Future<Output = Resume>>>,
}

/// What a person said, on its way to the worker.
pub(super) struct Handed {
    pub(super) node: usize,
    pub(super) address: Address,
    pub(super) user: usize,
    pub(super) client_id: Option<Box<str>>,
}

pub(crate) enum Between {
    Memory(Arc<MemoryBroker>),
    Network(Arc<Network>),
}

pub(crate) struct World {
    pub(crate) dice: Dice,
    pub(crate) oracle: Oracle,
    pub(crate) trace: Trace,
    pub(crate) parsed: Parsed,
    /// None: it is gone.
    pub(crate) nodes: Vec<Option<Node>>,
    pub(crate) clients: Vec<Client>,
    pub(crate) absent: Vec<Absent>,
    pub(super) handed: Vec<Handed>,
    pub(super) returning: Vec<Returning>,
    /// The engine's pauses while it reads what is kept: on a clock that is moved with the world's.
    pub(super) timers: Runtime,
    pub(crate) between: Between,
    pub(crate) settings: EngineSettings,
    pub(crate) bytes_budget: usize,
    /// Of the largest frame so far, on any wire.
    pub(crate) largest_frame: usize,
    start: Instant,
    pub(crate) elapsed: Duration,
    pub(crate) is_hostile: bool,
}

pub(crate) fn channel_id(channel: usize) -> ChannelId {
    match channel.checked_sub(USERS) {
        None => ChannelId::User(user_id(channel)),
        Some(room) => ChannelId::Room(RoomName::parse(&format!("r{room}")).unwrap()),
    }
}

pub(crate) fn user_id(user: usize) -> UserId {
    UserId::parse(&format!("u{user}")).unwrap()
}

/// The number of a channel, from its id.
pub(crate) fn channel_of(channel: &ChannelId) -> usize {
    let number: usize = channel.key()[1..].parse().unwrap();
    if matches!(channel, ChannelId::Room(_)) { USERS + number } else { number }
}

impl Node {
    /// What its tabs miss is kept elsewhere.
    pub(super) fn keeps_between_nodes(&self) -> bool {
        self.engine.broker().recovery().is_some()
    }
}

fn settings(dice: &mut Dice) -> EngineSettings {
    let sessions = SessionLimits {
        queue_frames_max: dice.between(3, 24),
        queue_bytes_max: dice.between(600, 8_000),
        message_bytes_max: 1_500,
        text_chars_max: 500,
        rooms_max: dice.between(1, ROOMS),
        heartbeat_interval: Duration::from_secs(6),
        heartbeat_timeout: Duration::from_secs(4),
        close_timeout: Duration::from_secs(3),
        bad_frames_max: 4,
        ..SessionLimits::default()
    };
    let recovery = RecoveryLimits {
        frames_max: [0, 4, 16, 16][dice.below(4)],
        bytes_max: dice.between(1_000, 8_000),
        lifetime: Duration::from_secs(20),
        ..RecoveryLimits::default()
    };
    let hub = HubLimits {
        inbox_posts_max: if dice.one_in(3) { dice.between(4, 16) } else { 256 },
        inbox_bytes_max: if dice.one_in(3) { dice.between(2_000, 8_000) } else { 1 << 20 },
        tabs_per_user_max: dice.between(3, 8),
        recovery,
        file_bytes_max: 20_000,
        inbound_bytes_max: dice.between(2_000, 6_000),
        deflate_bytes_min: if dice.one_in(3) { 150 } else { 1_000 },
        ..HubLimits::default()
    };
    let (shards, files) = (dice.between(1, 3), FileLimits::default());
    let publish_deadline = Duration::from_secs(1);
    EngineSettings { shards, sessions, hub, files, publish_deadline, has_mailboxes: false }
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        #[expect(clippy::disallowed_methods, reason = "an arbitrary start; the world moves time itself")]
        let start = Instant::now();
        let mut settings = settings(&mut dice);
        let budget = if dice.one_in(3) { frame::live_bytes() + dice.between(6_000, 40_000) } else { usize::MAX };
        let between = if dice.one_in(4) {
            Between::Memory(Arc::new(MemoryBroker::default()))
        } else {
            // What is kept between nodes is not kept on each.
            let limits = RecoveryLimits { frames_max: dice.between(4, 40), ..RecoveryLimits::default() };
            let kept = dice.one_in(3).then_some(limits);
            if kept.is_some() {
                settings.hub.recovery = RecoveryLimits::off();
            }
            let spool_max = if dice.one_in(2) { dice.between(2, 12) } else { 200 };
            Between::Network(Network::new(spool_max, kept))
        };
        let mut world = Self {
            dice,
            oracle: Oracle::default(),
            trace: Trace::default(),
            parsed: Parsed::default(),
            nodes: Vec::new(),
            clients: Vec::new(),
            absent: Vec::new(),
            handed: Vec::new(),
            returning: Vec::new(),
            timers: Builder::new_current_thread().enable_time().start_paused(true).build().unwrap(),
            between,
            settings,
            bytes_budget: budget,
            largest_frame: 0,
            start,
            elapsed: Duration::ZERO,
            is_hostile: true,
        };
        for _ in 0..world.dice.between(1, 3) {
            world.start_node();
        }
        world
    }

    pub(crate) fn now(&self) -> Instant {
        self.start + self.elapsed
    }

    fn start_node(&mut self) {
        let broker: Arc<dyn Broker> = match &self.between {
            Between::Memory(broker) => Arc::clone(broker) as Arc<dyn Broker>,
            Between::Network(network) => Arc::clone(network) as Arc<dyn Broker>,
        };
        let settings = self.settings.clone();
        let engine = Engine::with_broker(settings.clone(), broker);
        let indexes = 0..u16::try_from(settings.shards).unwrap();
        let shard = |index| {
            Shard::new(Arc::clone(engine.hub()), index, settings.sessions.clone(), self.bytes_budget, self.now())
        };
        let shards: Vec<Shard> = indexes.map(shard).collect();
        let ears = shards.iter().map(|_| Ear::new(InboundLimits::from(&settings.sessions))).collect();
        let ended = vec![[0; Disconnect::ALL.len()]; shards.len()];
        let heard_at = vec![self.elapsed; shards.len()];
        let node = Node { engine, shards, ears, ended, heard_at, refused_forwards: 0, is_draining: false };
        self.nodes.push(Some(node));
        self.oracle.add_node();
    }

    pub(crate) fn live_nodes(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|node| self.nodes[*node].is_some()).collect()
    }

    pub(crate) fn node(&mut self, node: usize) -> &mut Node {
        self.nodes[node].as_mut().expect("only a live node does anything")
    }

    pub(crate) fn live_clients(&self) -> Vec<usize> {
        (0..self.clients.len()).filter(|client| !self.clients[*client].is_gone).collect()
    }

    /// The whole life of the world.
    pub(crate) fn live(&mut self) -> Result<(), Violation> {
        for _ in 0..3 {
            self.open()?;
        }
        for _ in 0..self.dice.between(60, 160) {
            self.act()?;
            stepping::pump(self)?;
        }
        ending::finish(self)
    }

    fn act(&mut self) -> Result<(), Violation> {
        match self.dice.weighted(&[10, 28, 7, 24, 2, 6, 4, 12, 1, 4, 3, 2, 1, 5]) {
            0 => self.open()?,
            1 => drop(self.publish_something()?),
            2 => self.burst()?,
            3 => self.let_client_speak(),
            4 => self.attack(),
            5 => self.change_pace(),
            6 => self.end_a_connection()?,
            7 => self.come_back()?,
            8 => self.kick()?,
            9 => self.hand_on()?,
            10 => self.disturb_the_network(),
            11 => self.drain_or_replace()?,
            12 => self.crash()?,
            _ => self.rewrite()?,
        }
        if self.dice.one_in(3) {
            let millis = if self.dice.one_in(12) { 8_000 } else { self.dice.between(50, 1_500) as u64 };
            stepping::pass_time(self, Duration::from_millis(millis))?;
        }
        Ok(())
    }

    pub(super) fn pick_node(&mut self) -> usize {
        let nodes = self.live_nodes();
        self.dice.pick(&nodes).expect("there is always a node")
    }

    /// Any channel, and more often one that somebody reads.
    pub(super) fn pick_channel(&mut self) -> usize {
        let live = self.live_clients();
        let any = self.dice.below(USERS + ROOMS);
        let Some(tab) = self.dice.pick(&live).filter(|_| any.is_multiple_of(2)) else { return any };
        let book = &self.oracle.tabs[tab];
        book.rooms.first().copied().filter(|_| any.is_multiple_of(4)).unwrap_or(book.user)
    }

    fn let_client_speak(&mut self) {
        let live = self.live_clients();
        let Some(tab) = self.dice.pick(&live) else { return };
        let (client, room) = (&mut self.clients[tab], self.dice.below(ROOMS));
        if client.is_mute || !self.oracle.tabs[tab].wire.is_websocket() {
            return;
        }
        let what = match self.dice.below(12) {
            0..5 => format!("\"type\":\"join\",\"room\":\"r{room}\""),
            5..7 => format!("\"type\":\"leave\",\"room\":\"r{room}\""),
            7 => "\"type\":\"ping\"".to_owned(),
            8 => "\"type\":\"typing\",\"active\":true".to_owned(),
            9 => "ping frame".to_owned(),
            _ => "\"type\":\"message\",\"text\":\"hello\"".to_owned(),
        };
        let id = client.ask(tab, &what, &mut self.dice);
        self.trace.note(format!("tab {tab} says {what} as {id}"));
        let book = &mut self.oracle.tabs[tab];
        if what != "ping frame" {
            book.asked.insert(id.clone());
        }
        book.said.insert(id);
    }

    fn attack(&mut self) {
        let live = self.live_clients();
        let Some(tab) = self.dice.pick(&live) else { return };
        let client = &mut self.clients[tab];
        if !client.is_mute {
            let may_be_close = client.attack(&mut self.dice);
            let book = &mut self.oracle.tabs[tab];
            book.is_own_end |= may_be_close;
            book.said.insert("flood".to_owned());
            self.trace.note(format!("tab {tab} attacks"));
        }
    }

    fn change_pace(&mut self) {
        let live = self.live_clients();
        let Some(tab) = self.dice.pick(&live) else { return };
        let paces = [Pace::Fast, Pace::Slow(self.dice.between(1, 400)), Pace::Stalled];
        let client = &mut self.clients[tab];
        client.pace = paces[self.dice.below(3)];
        client.room = match client.pace {
            Pace::Fast => usize::MAX,
            _ => self.dice.below(200),
        };
        self.trace.note(format!("tab {tab} is {:?} from now on", client.pace));
    }

    fn end_a_connection(&mut self) -> Result<(), Violation> {
        let live = self.live_clients();
        let Some(tab) = self.dice.pick(&live) else { return Ok(()) };
        match self.dice.below(3) {
            0 if self.oracle.tabs[tab].wire.is_websocket() => {
                let client = &mut self.clients[tab];
                if !client.is_mute {
                    client.close(&mut self.dice);
                    client.is_mute = true;
                    self.oracle.tabs[tab].is_own_end = true;
                    self.trace.note(format!("tab {tab} closes"));
                }
                Ok(())
            }
            1 => stepping::end_of_input(self, tab),
            _ => stepping::lose(self, tab),
        }
    }

    fn kick(&mut self) -> Result<(), Violation> {
        let (node, user) = (self.pick_node(), self.dice.below(USERS));
        let engine = self.node(node).engine.clone();
        if engine.hub().end_sessions(&channel_id(user), Disconnect::Kicked).is_ok() {
            self.trace.note(format!("user {user} is kicked from node {node}"));
            self.oracle.kicked(node, user);
        }
        if matches!(self.between, Between::Network(_)) {
            let told = engine.end_sessions_elsewhere(&user_id(user), Disconnect::Kicked).now_or_never();
            assert!(told.is_some(), "the network does not wait");
        }
        Ok(())
    }

    fn disturb_the_network(&mut self) {
        let (from, to) = (self.pick_node(), self.pick_node());
        let Between::Network(network) = &self.between else { return };
        match self.dice.below(5) {
            0 | 1 => {
                network.go_away();
                self.trace.note("the server is gone".to_owned());
            }
            2 | 3 => {
                network.come_back();
                self.trace.counts.server_restarts += 1;
                self.trace.note("the server is back, and empty".to_owned());
            }
            _ => {
                network.give_up(from, to);
                self.trace.note(format!("node {from} took node {to} for dead"));
            }
        }
    }

    fn drain_or_replace(&mut self) -> Result<(), Violation> {
        let node = self.pick_node();
        let spread = Duration::from_millis(self.dice.between(0, 1_500) as u64);
        let there = self.node(node);
        if !there.is_draining {
            self.trace.note(format!("node {node} drains"));
            self.drain(node, spread);
        } else if there.shards.iter().all(Shard::is_drained) {
            self.trace.note(format!("node {node} is drained, and replaced"));
            self.trace.counts.drained += 1;
            self.remove(node);
            self.start_node();
        }
        Ok(())
    }

    pub(crate) fn drain(&mut self, node: usize, spread: Duration) {
        let closes_per_second_max = if self.dice.one_in(2) { 4 } else { u32::MAX };
        self.oracle.drains.insert(node);
        let there = self.node(node);
        there.is_draining = true;
        let latest = spread + Duration::from_secs(2);
        there.engine.hub().drain(Drain { spread, closes_per_second_max, latest });
    }

    fn crash(&mut self) -> Result<(), Violation> {
        if self.live_nodes().len() < 2 || !self.dice.one_in(2) {
            return Ok(());
        }
        let node = self.pick_node();
        self.trace.note(format!("node {node} crashes"));
        self.trace.counts.crashed += 1;
        for tab in self.live_clients() {
            if self.clients[tab].node == node {
                self.clients[tab].is_gone = true;
                self.oracle.tabs[tab].is_listed = false;
                self.oracle.tabs[tab].is_own_end = true;
            }
        }
        self.remove(node);
        self.start_node();
        Ok(())
    }

    fn remove(&mut self, node: usize) {
        if let Some(there) = self.nodes[node].take() {
            stepping::count(&mut self.trace.counts, &there);
        }
        self.oracle.forget_node(node);
        self.oracle.forget_from(node);
        if let Between::Network(network) = &self.between {
            network.bury(node);
        }
    }

    /// What came to a node from the others.
    pub(crate) fn note_arrived(&mut self, node: usize, arrived: Vec<Arrived>) -> Result<(), Violation> {
        for arrived in arrived {
            match arrived {
                Arrived::Frame { publication: Some(number), channel } => {
                    self.trace.note(format!("#{number} comes to node {node}"));
                    if channel_of(&channel) != self.oracle.publications[number].channel {
                        let text = format!("#{number} came to node {node} for {channel:?}");
                        return Err(Violation::new("no_frame_to_a_wrong_user", text));
                    }
                    self.oracle.posted(node, number)?;
                }
                Arrived::Frame { .. } => {}
                Arrived::Loss { from, is_own } => {
                    self.trace.note(format!("node {node} finds that something of node {from} was lost"));
                    self.trace.counts.losses += 1;
                    let Between::Network(network) = &self.between else { continue };
                    self.oracle.found_loss(node, (from, is_own), |number| network.has_lost(number, node));
                }
                Arrived::End { user } => self.oracle.kicked(node, channel_of(&ChannelId::User(user))),
            }
        }
        Ok(())
    }

    /// How hostile it was.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = self.trace.counts.clone();
        counts.replayed = self.oracle.replayed;
        for node in self.nodes.iter().flatten() {
            stepping::count(&mut counts, node);
        }
        if let Between::Network(network) = &self.between {
            (counts.lost_messages, counts.doubled_messages) = network.counted();
        }
        counts
    }
}
