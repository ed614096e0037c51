//! Redis and the way to it: late, lossy, repeating, gone for a while. Nodes' messages are really packed and really read;
//! between the two ends is a server that passes on, or loses, what a real one would.
//!
//! A node's outbox has one message under way, which is said again until it is answered: if only the answer was lost, the
//! other nodes hear it twice. What a subscriber was to get may be lost on its way. A restart loses all that subscribers
//! have not got yet. Users' frames go to the nodes that have the user, rooms' to all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Poll, Waker};
use std::time::Duration;

use tabcast::broker::redis::ends::{Ends, Said};
use tabcast::broker::{
    Broker, BrokerFuture, Delivered, Forwarded, Kept, KeptFrame, NodeId, OnlineUser, Peer, Receipt, SpoolFull,
};
use tabcast::id::{ChannelId, MessageId, UserId};
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::frame::{Frame, Kind};
use tabcast::proto::limits::RecoveryLimits;

use super::Violation;
use super::dice::Dice;

/// A user is taken out so long after the last tab left, and one whose tab is expected not before this long.
const OFF_AFTER: Duration = Duration::from_secs(3);
const HOLD: Duration = Duration::from_secs(10);

/// Who said something, and whether it was to one node alone.
#[derive(Debug, Clone, Copy)]
struct Hearing {
    from: usize,
    is_own: bool,
}

/// What came to a node and was posted there, in order.
pub(crate) enum Arrived {
    Frame {
        channel: ChannelId,
        publication: Option<usize>,
    },
    End {
        user: UserId,
    },
    /// It was found that something that `from` had said never came: to this node, or to all.
    Loss {
        from: usize,
        is_own: bool,
    },
}

/// To whom an outbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum To {
    Node(usize),
    Every,
}

#[derive(Default)]
struct Outbox {
    number: (u32, u64),
    waiting: VecDeque<Said>,
    under_way: Option<Message>,
}

#[derive(Clone)]
struct Message {
    from: usize,
    number: (u32, u64),
    is_own: bool,
    bytes: Vec<u8>,
    publications: Vec<usize>,
}

struct Node {
    ends: Ends,
    peer: Weak<dyn Peer>,
    is_alive: bool,
    outboxes: BTreeMap<To, Outbox>,
    epochs: u32,
    /// What Redis is yet to pass on to it.
    coming: VecDeque<Message>,
    /// What found no room in its inboxes, and what came behind it.
    arrivals: VecDeque<(Said, Hearing)>,
    /// Of each publisher, by where it speaks: the last number that came.
    last: BTreeMap<(usize, bool), (u32, u64)>,
    lost: u64,
    doubled: u64,
}

#[derive(Default)]
struct State {
    nodes: Vec<Node>,
    online: BTreeMap<UserId, BTreeSet<usize>>,
    /// Users whose tabs on a node have changed, and when that was.
    changed: BTreeMap<(usize, UserId), Duration>,
    /// Until when those whose tab is expected are held.
    held: BTreeMap<(usize, UserId), Duration>,
    now: Duration,
    is_away: bool,
    spool_max: usize,
    /// It took what was offered last.
    took_last: bool,
    /// What is kept of users' frames there, and what is yet to be written.
    recovery: Option<RecoveryLimits>,
    kept: BTreeMap<UserId, VecDeque<Entry>>,
    ever_kept: BTreeMap<UserId, Vec<usize>>,
    unwritten: Vec<(UserId, Entry)>,
    /// What was there when somebody asked, and who is yet to hear it.
    asked: Vec<(Vec<KeptFrame>, Arc<Answer>)>,
    /// Publications that a node will never get, for the server's fault.
    lost: BTreeSet<(usize, usize)>,
}

/// One frame as it is kept.
struct Entry {
    kind: Kind,
    id: Option<MessageId>,
    json: String,
    at: Duration,
    publication: usize,
}

/// What is kept of a user, for whoever asked: known once the server says so.
#[derive(Default)]
struct Answer(Mutex<(Option<Kept>, Option<Waker>)>);

impl Answer {
    fn give(&self, kept: Kept) {
        let mut answer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        answer.0 = Some(kept);
        answer.1.take().into_iter().for_each(Waker::wake);
    }
}

/// The server, and every node's way to it.
pub(crate) struct Network(Mutex<State>, Option<RecoveryLimits>);

fn kept_frames_max(recovery: Option<&RecoveryLimits>) -> usize {
    recovery.map_or(0, |limits| limits.frames_max)
}

/// What a frame says that it is: its text or its filename begins with the number.
pub(crate) fn publication_of(frame: &Frame) -> Option<usize> {
    let json = std::str::from_utf8(frame.json()).ok()?;
    let at = json.find("\"#")? + 2;
    json[at..].split(' ').next()?.parse().ok()
}

impl Network {
    pub(crate) fn new(spool_max: usize, recovery: Option<RecoveryLimits>) -> Arc<Self> {
        // What is not kept there has no limits there.
        Arc::new(Self(Mutex::new(State { spool_max, recovery: recovery.clone(), ..State::default() }), recovery))
    }

    /// Says what is kept to whoever has asked.
    pub(crate) fn answer(&self) {
        let mut state = self.state();
        for (kept, answer) in std::mem::take(&mut state.asked) {
            answer.give(Some(kept));
        }
    }

    /// The publications that were ever kept of a user, in their order.
    pub(crate) fn kept_of(&self, user: &UserId) -> Vec<usize> {
        self.state().ever_kept.get(user).cloned().unwrap_or_default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_now(&self, now: Duration) {
        self.state().now = now;
    }

    /// Whether a publication was lost on its way to a node.
    pub(crate) fn has_lost(&self, publication: usize, node: usize) -> bool {
        self.state().lost.contains(&(publication, node))
    }

    /// Frames of one user that are kept.
    pub(crate) fn kept_frames_max(&self) -> usize {
        kept_frames_max(self.1.as_ref())
    }

    /// Whether what was offered last was taken, if anybody had to be asked.
    pub(crate) fn took_last(&self) -> bool {
        self.state().took_last
    }

    /// Messages that were lost, and that came twice, in all.
    pub(crate) fn counted(&self) -> (u64, u64) {
        let state = self.state();
        (state.nodes.iter().map(|node| node.lost).sum(), state.nodes.iter().map(|node| node.doubled).sum())
    }

    /// The server is not reached from now on.
    pub(crate) fn go_away(&self) {
        let mut state = self.state();
        state.is_away = true;
        // Nobody waits for it any longer than it may take.
        std::mem::take(&mut state.asked).into_iter().for_each(|(_, answer)| answer.give(None));
    }

    /// It is back, and empty.
    pub(crate) fn come_back(&self) {
        let mut state = self.state();
        state.is_away = false;
        state.kept.clear();
        for (user, entry) in std::mem::take(&mut state.unwritten) {
            state.keep(user, entry);
        }
        for node in 0..state.nodes.len() {
            let coming = std::mem::take(&mut state.nodes[node].coming);
            coming.into_iter().for_each(|message| state.lose(node, &message));
        }
        state.write_anew();
    }

    /// A node is gone: what was for it is for nobody.
    pub(crate) fn bury(&self, node: usize) {
        let mut state = self.state();
        state.nodes[node].is_alive = false;
        state.nodes[node].coming.clear();
        state.nodes[node].arrivals.clear();
        state.nodes[node].outboxes.clear();
        for other in &mut state.nodes {
            other.outboxes.remove(&To::Node(node));
        }
        for nodes in state.online.values_mut() {
            nodes.remove(&node);
        }
        state.changed.retain(|(changed, _), _| *changed != node);
        state.held.retain(|(held, _), _| *held != node);
    }

    /// A node takes another for dead, and finds it alive: what was for it is lost, and it begins anew with it.
    pub(crate) fn give_up(&self, from: usize, to: usize) {
        let mut state = self.state();
        let Some(outbox) = state.nodes[from].outboxes.remove(&To::Node(to)) else { return };
        let publication = |said: &Said| if let Said::Frame(_, frame) = said { publication_of(frame) } else { None };
        let waiting: Vec<usize> = outbox.waiting.iter().filter_map(publication).collect();
        state.lost.extend(waiting.into_iter().map(|publication| (publication, to)));
        if let Some(message) = &outbox.under_way {
            state.lose(to, message);
        }
    }

    /// Whether nothing is on its way and nothing waits.
    pub(crate) fn is_quiet(&self) -> bool {
        let state = self.state();
        let is_quiet = |node: &Node| {
            let is_empty = |outbox: &Outbox| outbox.waiting.is_empty() && outbox.under_way.is_none();
            node.coming.is_empty() && node.arrivals.is_empty() && node.outboxes.values().all(is_empty)
        };
        state.nodes.iter().filter(|node| node.is_alive).all(is_quiet)
    }

    /// Lets a node say something: what it says may not arrive, and what arrived may not be answered.
    pub(crate) fn send(&self, node: usize, dice: &mut Dice, is_hostile: bool) {
        let mut state = self.state();
        if state.is_away || !state.nodes[node].is_alive {
            return;
        }
        let outboxes: Vec<To> = state.nodes[node].outboxes.keys().copied().collect();
        for to in outboxes {
            let Some(message) = state.nodes[node].message(node, to, dice) else { continue };
            if is_hostile && dice.one_in(12) {
                continue;
            }
            let all: Vec<usize> = (0..state.nodes.len()).collect();
            let hearers = match &to {
                To::Node(hearer) => std::slice::from_ref(hearer),
                // Whoever says it hears it too.
                To::Every => &all[..],
            };
            for hearer in hearers.iter().copied().filter(|hearer| state.nodes[*hearer].is_alive).collect::<Vec<_>>() {
                state.nodes[hearer].coming.push_back(message.clone());
            }
            let is_answered = !is_hostile || !dice.one_in(8);
            if is_answered && let Some(outbox) = state.nodes[node].outboxes.get_mut(&to) {
                outbox.under_way = None;
            }
        }
    }

    /// Lets a node hear what came for it, and posts it there for as long as there is room.
    pub(crate) fn hear(&self, node: usize, dice: &mut Dice, is_hostile: bool) -> Result<Vec<Arrived>, Violation> {
        let mut state = self.state();
        if !state.nodes[node].is_alive {
            return Ok(Vec::new());
        }
        let Some(peer) = state.nodes[node].peer.upgrade() else { return Ok(Vec::new()) };
        if let Some(message) = state.nodes[node].coming.pop_front() {
            if is_hostile && dice.one_in(15) {
                state.lose(node, &message);
            } else {
                state.nodes[node].open(node, &message, &*peer)?;
            }
        }
        let waiting = std::mem::take(&mut state.nodes[node].arrivals);
        drop(state);
        let (mut posted, mut left) = (Vec::new(), VecDeque::new());
        for (said, hearing) in waiting {
            if !left.is_empty() {
                left.push_back((said, hearing));
                continue;
            }
            match &said {
                Said::Frame(channel, frame) if peer.deliver(channel, frame) != Delivered::Full => {
                    posted.push(Arrived::Frame { channel: channel.clone(), publication: publication_of(frame) });
                }
                Said::End(user, ending) if peer.end_sessions(user, *ending) => {
                    posted.push(Arrived::End { user: user.clone() });
                }
                Said::Missed => {
                    if hearing.is_own {
                        peer.users_missed()
                    } else {
                        peer.rooms_missed()
                    }
                    posted.push(Arrived::Loss { from: hearing.from, is_own: hearing.is_own });
                }
                _ => left.push_back((said, hearing)),
            }
        }
        self.state().nodes[node].arrivals = left;
        Ok(posted)
    }

    /// Writes who is online as it is now, for those who changed.
    pub(crate) fn write_presence(&self) {
        let mut state = self.state();
        if state.is_away {
            return;
        }
        let now = state.now;
        for ((node, user), at) in std::mem::take(&mut state.changed) {
            let Some(peer) = state.nodes[node].peer.upgrade() else { continue };
            if peer.tabs(&user) > 0 {
                state.online.entry(user).or_default().insert(node);
            } else if now < at + OFF_AFTER || state.is_held(node, &user) {
                state.changed.insert((node, user), at);
            } else {
                state.online.entry(user.clone()).or_default().remove(&node);
                peer.forget_backlog(&user);
            }
        }
    }
}

impl State {
    /// A message's newest edit takes the place of the one before it; past the bound the oldest go.
    fn keep(&mut self, user: UserId, entry: Entry) {
        let frames_max = kept_frames_max(self.recovery.as_ref());
        self.ever_kept.entry(user.clone()).or_default().push(entry.publication);
        let entries = self.kept.entry(user).or_default();
        if entry.kind == Kind::Edit {
            entries.retain(|older| older.kind != Kind::Edit || older.id != entry.id);
        }
        entries.push_back(entry);
        while entries.len() > frames_max {
            entries.pop_front();
        }
    }

    fn lose(&mut self, node: usize, message: &Message) {
        if message.from != node {
            // What was said again arrived before, or will.
            let is_known =
                self.nodes[node].last.get(&(message.from, message.is_own)).is_some_and(|l| message.number <= *l);
            let is_repeated = self.nodes[message.from]
                .outboxes
                .values()
                .any(|outbox| outbox.under_way.as_ref().is_some_and(|way| way.number == message.number))
                || self.nodes[node].coming.iter().any(|other| {
                    other.number == message.number && other.from == message.from && other.is_own == message.is_own
                });
            if !is_known && !is_repeated {
                self.lost.extend(message.publications.iter().map(|publication| (*publication, node)));
            }
        }
    }

    fn write_anew(&mut self) {
        for (user, nodes) in &self.online {
            let gone = nodes.iter().filter(|node| !self.is_held(**node, user));
            let peers = gone.filter_map(|node| self.nodes[*node].peer.upgrade());
            peers.filter(|peer| peer.tabs(user) == 0).for_each(|peer| peer.forget_backlog(user));
        }
        self.online.clear();
        let held = self.held.iter().filter(|(_, until)| self.now < **until).map(|(held, _)| held.clone());
        self.changed = held.map(|held| (held, self.now)).collect();
        for (node, user) in self.changed.keys() {
            self.online.entry(user.clone()).or_default().insert(*node);
        }
        for (node, peer) in self.nodes.iter().enumerate().filter(|(_, node)| node.is_alive) {
            for user in peer.peer.upgrade().map(|peer| peer.users()).unwrap_or_default() {
                self.online.entry(user).or_default().insert(node);
            }
        }
    }

    fn is_held(&self, node: usize, user: &UserId) -> bool {
        self.held.get(&(node, user.clone())).is_some_and(|until| self.now < *until)
    }

    fn put(&mut self, from: usize, to: To, said: Said) {
        let node = &mut self.nodes[from];
        let epochs = &mut node.epochs;
        let outbox = node.outboxes.entry(to).or_insert_with(|| {
            *epochs += 1;
            Outbox { number: (*epochs, 0), ..Outbox::default() }
        });
        outbox.waiting.push_back(said);
    }

    fn others_with(&self, from: usize, user: &UserId) -> Vec<usize> {
        self.online.get(user).into_iter().flatten().copied().filter(|node| *node != from).collect()
    }
}

impl Node {
    /// The message that is next for somebody, packed now if it was not before.
    fn message(&mut self, from: usize, to: To, dice: &mut Dice) -> Option<Message> {
        let outbox = self.outboxes.get_mut(&to)?;
        if outbox.under_way.is_none() && !outbox.waiting.is_empty() {
            outbox.number.1 += 1;
            let count = dice.between(1, 6).min(outbox.waiting.len());
            let said: Vec<Said> = outbox.waiting.drain(..count).collect();
            let bytes = self.ends.pack(outbox.number, &said);
            let publication = |said: &Said| if let Said::Frame(_, frame) = said { publication_of(frame) } else { None };
            let publications = said.iter().filter_map(publication).collect();
            let is_own = to != To::Every;
            outbox.under_way = Some(Message { from, number: outbox.number, is_own, bytes, publications });
        }
        outbox.under_way.clone()
    }

    /// Reads a message by the real reader, and counts beside it what was lost and what came twice.
    fn open(&mut self, me: usize, message: &Message, peer: &dyn Peer) -> Result<(), Violation> {
        if message.from != me || message.is_own {
            let last = self.last.entry((message.from, message.is_own)).or_default();
            if message.number <= *last {
                self.doubled += 1;
            } else {
                let is_gap = message.number.0 == last.0;
                self.lost += if is_gap { message.number.1 - last.1 - 1 } else { 0 };
                *last = message.number;
            }
        }
        for mut said in self.ends.unpack(message.is_own, &message.bytes) {
            if let Said::Frame(channel, frame) = &mut said {
                peer.prepare(channel, frame);
            }
            self.arrivals.push_back((said, Hearing { from: message.from, is_own: message.is_own }));
        }
        let counts = self.ends.metrics();
        let counted = (counts.lost_messages.value(), counts.doubled_messages.value());
        if counted != (self.lost, self.doubled) || counts.unreadable_messages.value() > 0 {
            let expected = (self.lost, self.doubled);
            return Err(Violation::new(
                "none_doubled_between_nodes",
                format!("node {me} counts {counted:?} messages lost and doubled, not {expected:?}"),
            ));
        }
        Ok(())
    }
}

impl Broker for Network {
    fn attach(&self, peer: &Arc<dyn Peer>) -> NodeId {
        let mut state = self.state();
        let number = state.nodes.len() as u64;
        state.nodes.push(Node {
            ends: Ends::new(number + 1),
            peer: Arc::downgrade(peer),
            is_alive: true,
            outboxes: BTreeMap::new(),
            epochs: 0,
            coming: VecDeque::new(),
            arrivals: VecDeque::new(),
            last: BTreeMap::new(),
            lost: 0,
            doubled: 0,
        });
        NodeId::new(number)
    }

    fn wants(&self, node: NodeId, channel: &ChannelId, _kind: Kind) -> bool {
        let others = |(other, state): (usize, &Node)| other as u64 != node.number() && state.is_alive;
        match channel {
            ChannelId::Stream(_) => false,
            ChannelId::User(_) if self.1.is_some() => true,
            _ => self.state().nodes.iter().enumerate().any(others),
        }
    }

    fn forward(&self, from: NodeId, channel: &ChannelId, frame: &Frame) -> Result<Forwarded, SpoolFull> {
        let from = usize::try_from(from.number()).unwrap();
        let mut state = self.state();
        let waiting: usize = state.nodes[from].outboxes.values().map(|outbox| outbox.waiting.len()).sum();
        state.took_last = waiting < state.spool_max;
        if !state.took_last {
            return Err(SpoolFull);
        }
        let to: Vec<To> = match channel {
            ChannelId::User(user) => state.others_with(from, user).into_iter().map(To::Node).collect(),
            _ => vec![To::Every],
        };
        if let (ChannelId::User(user), Some(publication)) = (channel, publication_of(frame))
            && state.recovery.is_some()
        {
            let json = String::from_utf8(frame.json().to_vec()).unwrap();
            let entry = Entry { kind: frame.kind(), id: frame.message_id(), json, at: state.now, publication };
            if state.is_away { state.unwritten.push((user.clone(), entry)) } else { state.keep(user.clone(), entry) }
        }
        for to in to {
            state.put(from, to, Said::Frame(channel.clone(), frame.clone()));
        }
        // Nobody asks it: the simulator's publishes do not wait.
        let (_, receipt) = Receipt::new();
        Ok(Forwarded::Later(receipt))
    }

    fn expect<'a>(&'a self, node: NodeId, channel: &'a ChannelId) -> BrokerFuture<'a, ()> {
        if let ChannelId::User(user) = channel {
            let node = usize::try_from(node.number()).unwrap();
            let mut state = self.state();
            let now = state.now;
            state.online.entry(user.clone()).or_default().insert(node);
            state.held.insert((node, user.clone()), now + HOLD);
            state.changed.insert((node, user.clone()), now);
        }
        Box::pin(std::future::ready(()))
    }

    fn recovery(&self) -> Option<&RecoveryLimits> {
        self.1.as_ref()
    }

    fn kept<'a>(&'a self, _node: NodeId, user: &'a UserId) -> BrokerFuture<'a, Kept> {
        let mut state = self.state();
        let answer = Arc::new(Answer::default());
        if state.is_away {
            answer.give(None);
        } else {
            let now = state.now;
            let entries = state.kept.get(user).into_iter().flatten();
            let frames = entries.map(|entry| KeptFrame::Frame {
                frame: Frame::relay(entry.kind, entry.id, None, &entry.json),
                age: now.saturating_sub(entry.at),
            });
            let frames = frames.collect();
            state.asked.push((frames, Arc::clone(&answer)));
        }
        Box::pin(std::future::poll_fn(move |context| {
            let mut answer = answer.0.lock().unwrap_or_else(PoisonError::into_inner);
            answer.1 = Some(context.waker().clone());
            answer.0.take().map_or(Poll::Pending, Poll::Ready)
        }))
    }

    fn presence_changed(&self, node: NodeId, user: &UserId) {
        let node = usize::try_from(node.number()).unwrap();
        let mut state = self.state();
        let now = state.now;
        state.changed.insert((node, user.clone()), now);
    }

    fn is_online_elsewhere<'a>(&'a self, from: NodeId, user: &'a UserId) -> BrokerFuture<'a, bool> {
        let from = usize::try_from(from.number()).unwrap();
        Box::pin(std::future::ready(!self.state().others_with(from, user).is_empty()))
    }

    fn end_elsewhere<'a>(&'a self, from: NodeId, user: &'a UserId, ending: Disconnect) -> BrokerFuture<'a, usize> {
        let from = usize::try_from(from.number()).unwrap();
        let mut state = self.state();
        let nodes = state.others_with(from, user);
        for node in &nodes {
            state.put(from, To::Node(*node), Said::End(user.clone(), ending));
        }
        Box::pin(std::future::ready(nodes.len()))
    }

    fn users_elsewhere(&self, from: NodeId, limit: usize) -> BrokerFuture<'_, Option<Vec<OnlineUser>>> {
        let from = usize::try_from(from.number()).unwrap();
        let state = self.state();
        let is_elsewhere = |(_, nodes): &(&UserId, &BTreeSet<usize>)| nodes.iter().any(|node| *node != from);
        let users = state.online.iter().filter(is_elsewhere);
        let users = users.take(limit).map(|(user, nodes)| OnlineUser { user: user.clone(), tabs: nodes.len() });
        Box::pin(std::future::ready(Some(users.collect())))
    }
}
