//! Clients that come, and that come back.

use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt;
use tabcast::fanout::session::{Address, Identity, RoomGrant};
use tabcast::fanout::shard::{OpenError, Opening, Resume, Wire};
use tabcast::id::MessageId;
use tabcast::proto::event::Timestamp;

use super::client::{Client, Pace};
use super::oracle::USERS;
use super::world::{Absent, Between, Node, Returning, World, channel_id, user_id};
use super::{Violation, stepping};

/// Connections of one world at once.
const CLIENTS_MAX: usize = 18;

impl World {
    pub(super) fn open(&mut self) -> Result<(), Violation> {
        if self.live_clients().len() >= CLIENTS_MAX {
            return Ok(());
        }
        let (node, user) = (self.pick_node(), self.dice.below(USERS));
        let wire = [Wire::WebSocket, Wire::WebSocket, Wire::DeflatedWebSocket, Wire::EventStream][self.dice.below(4)];
        self.open_on(node, user, wire, None)
    }

    pub(super) fn open_on(
        &mut self,
        node: usize,
        user: usize,
        wire: Wire,
        positions: Option<Vec<MessageId>>,
    ) -> Result<(), Violation> {
        let engine = self.node(node).engine.clone();
        let channel = channel_id(user);
        assert!(engine.expect(&channel).now_or_never().is_some(), "the network does not wait");
        let mut identity = Identity::new(user_id(user), Timestamp::from_micros(1));
        identity.rooms = RoomGrant::Any;
        let expires_in =
            if self.dice.one_in(12) { Some(Duration::from_secs(self.dice.between(2, 12) as u64)) } else { None };
        // Newest first, as clients name them.
        let resume = positions.clone().map_or(Resume::Fresh, Resume::After);
        let shard = self.dice.below(self.settings.shards);
        let opening = Opening { identity, wire, expires_in, resume };
        let there = self.oracle.listed(node, user).count();
        let is_full = there >= self.settings.hub.tabs_per_user_max;
        let result = self.node(node).shards[shard].open(opening, |_| None);
        match result {
            Ok(address) if !is_full => {
                let tab = self.oracle.opened(node, user, wire, positions.as_deref());
                self.trace.counts.resumed += u64::from(positions.is_some());
                self.add(node, tab, address)
            }
            Err(OpenError::TooManyTabs(_)) if is_full => Ok(()),
            Err(OpenError::Draining) if self.node(node).is_draining => Ok(()),
            other => Err(Violation::new(
                "the_registry_has_who_is_there",
                format!("user {user} has {there} tabs on node {node}, and one more: {other:?}"),
            )),
        }
    }

    /// The client of a tab that has just opened.
    pub(super) fn add(&mut self, node: usize, tab: usize, address: Address) -> Result<(), Violation> {
        let (user, wire) = (self.oracle.tabs[tab].user, self.oracle.tabs[tab].wire);
        let paces = [Pace::Fast, Pace::Fast, Pace::Slow(self.dice.between(20, 600)), Pace::Stalled];
        let pace = if self.is_hostile { paces[self.dice.below(4)] } else { Pace::Fast };
        self.trace.note(format!("tab {tab} of user {user} opens at {address:?} of node {node}: {wire:?}, {pace:?}"));
        self.trace.counts.opened += 1;
        let is_same = |client: &Client| {
            client.node == node && client.address.shard() == address.shard() && client.address.slot() == address.slot()
        };
        self.trace.counts.reused_slots += u64::from(self.clients.iter().any(is_same));
        let mut client = Client::new(node, address, wire, pace);
        client.is_silent = self.dice.one_in(10);
        let breaks = self.is_hostile && self.dice.one_in(10);
        client.breaks_after = breaks.then(|| self.dice.between(1, 3_000));
        self.clients.push(client);
        let queued = self.node(node).shards[usize::from(address.shard())].queued_for(address.slot());
        self.clients[tab].blocked_with = queued;
        if !self.dice.one_in(5) {
            stepping::make_writable(self, tab)?;
        }
        stepping::settle(self, node, usize::from(address.shard()))
    }

    pub(super) fn come_back(&mut self) -> Result<(), Violation> {
        if self.absent.is_empty() || self.live_clients().len() >= CLIENTS_MAX {
            return Ok(());
        }
        let place = self.dice.below(self.absent.len());
        let absent = self.absent.swap_remove(place);
        if self.live_nodes().iter().any(|node| self.nodes[*node].as_ref().is_some_and(Node::keeps_between_nodes)) {
            return self.begin_return(absent);
        }
        let Absent { node, user, wire, positions, .. } = absent;
        // What recovery has in memory is on the node that the tab was on; on another one it begins anew.
        let is_there = self.nodes[node].is_some();
        let node = if is_there { node } else { self.pick_node() };
        let mut newest_first: Vec<_> = positions.into_iter().rev().collect();
        if wire == Wire::EventStream || self.dice.one_in(2) {
            newest_first.truncate(1);
        }
        let positions = (is_there && !newest_first.is_empty()).then_some(newest_first);
        self.open_on(node, user, wire, positions)
    }

    pub(super) fn begin_return(&mut self, absent: Absent) -> Result<(), Violation> {
        let node = self.pick_node();
        let mut positions: Vec<_> = absent.positions.iter().rev().copied().collect();
        if absent.wire == Wire::EventStream {
            positions.truncate(1);
        }
        if positions.is_empty() {
            return Ok(());
        }
        let (engine, user) = (self.node(node).engine.clone(), user_id(absent.user));
        assert!(engine.expect(&channel_id(absent.user)).now_or_never().is_some(), "the network does not wait");
        self.trace.note(format!("a tab of {user:?} comes back to node {node}"));
        let after = Resume::After(positions.clone());
        let resume = Box::pin(async move { engine.resume(&user, after).await });
        let until = self.elapsed + Duration::from_secs(8);
        let Between::Network(network) = &self.between else { return Ok(()) };
        let kept = network.kept_of(&user_id(absent.user));
        let since = self.oracle.next_place(node);
        self.returning.push(Returning { absent, node, positions, kept, since, until, resume });
        // Its first step is to ask what is kept.
        self.go_on_returning().map(drop)
    }

    /// Polls who is on the way back, so that each asks for what it needs. True if nobody is.
    pub(crate) fn go_on_returning(&mut self) -> Result<bool, Violation> {
        for mut returning in std::mem::take(&mut self.returning) {
            if self.nodes[returning.node].is_none() || self.elapsed > returning.until {
                continue;
            }
            let poll = std::future::poll_fn(|context| Poll::Ready(returning.resume.as_mut().poll(context)));
            match self.timers.block_on(poll) {
                Poll::Pending => self.returning.push(returning),
                Poll::Ready(resume) => {
                    self.end_return(returning, resume)?;
                }
            }
        }
        Ok(self.returning.is_empty())
    }

    fn end_return(&mut self, returning: Returning, resume: Resume) -> Result<(), Violation> {
        let Returning { absent, node, positions, kept, since, .. } = returning;
        let mut identity = Identity::new(user_id(absent.user), Timestamp::from_micros(1));
        identity.rooms = RoomGrant::Any;
        let opening = Opening { resume, ..Opening::new(identity, absent.wire) };
        let shard = self.dice.below(self.settings.shards);
        // Its user may have too many tabs by now, and the node may drain.
        let Ok(address) = self.node(node).shards[shard].open(opening, |_| None) else { return Ok(()) };
        let Between::Network(network) = &self.between else { return Ok(()) };
        let kept = [kept, network.kept_of(&user_id(absent.user))];
        let mut had = absent.had;
        // What is not kept any more is not known to have been there, should it come to the node only now.
        let forgotten = kept[1].len().saturating_sub(network.kept_frames_max());
        had.retain(|number| !kept[1][..forgotten].contains(number));
        let book = (node, absent.user, absent.wire, since);
        let tab = self.oracle.returned(book, &positions, had, kept.each_ref().map(Vec::as_slice));
        self.trace.counts.resumed += 1;
        self.add(node, tab, address)
    }

    /// The clock of pauses goes on.
    pub(crate) fn advance_timers(&mut self, time: Duration) {
        self.timers.block_on(tokio::time::advance(time));
    }
}
