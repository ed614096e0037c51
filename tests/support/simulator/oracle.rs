//! What must hold, whatever happens. The oracle is told what was published where and when, who came and went, and what each
//! client read; it knows nothing of how the code under test does it. Each invariant is one function.
//!
//! Every node posts in one order of its own: a publication's *place* on a node is the number of its post there. All that
//! was posted before `handled` has been through the shards.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tabcast::fanout::shard::Wire;
use tabcast::id::MessageId;
use tabcast::proto::disconnect::Disconnect;

use super::Violation;
pub(crate) use super::book::{Left, POSITIONS_MAX, ROOMS, Tab, USERS, What};
use super::book::{Log, Publication, Reading, Replay, Stay, Told};
use super::reader::{Got, Json};

/// Why a session may end although all that was queued for it before is still written.
const GRACEFUL: [Disconnect; 4] =
    [Disconnect::ServiceRestart, Disconnect::Kicked, Disconnect::TokenExpired, Disconnect::PolicyViolation];

/// How long a node knows what it has replayed from what is kept between nodes, and a second for its ticks.
const LATE: Duration = Duration::from_secs(16);

#[derive(Default)]
pub(crate) struct Oracle {
    pub(crate) now: Duration,
    pub(crate) publications: Vec<Publication>,
    pub(crate) tabs: Vec<Tab>,
    logs: Vec<Log>,
    /// Nodes that drain, or did.
    pub(crate) drains: BTreeSet<usize>,
    /// Who is owed a publication that another node forwarded.
    owed: BTreeSet<(usize, usize)>,
    /// Ordered frames that tabs got again, or late, as they came back.
    pub(crate) replayed: u64,
}

type Checked = Result<(), Violation>;

fn violation<T>(invariant: &'static str, text: String) -> Result<T, Violation> {
    Err(Violation::new(invariant, text))
}

impl Oracle {
    pub(crate) fn add_node(&mut self) {
        self.logs.push(Log::default());
    }

    /// A number for what is about to be published.
    pub(crate) fn publish(
        &mut self,
        origin: usize,
        channel: usize,
        what: What,
        (id, bytes_max): (MessageId, usize),
    ) -> usize {
        self.publications.push(Publication { channel, what, id, bytes_max, origin, places: BTreeMap::new() });
        self.publications.len() - 1
    }

    /// It was posted on a node: nobody may have posted it there before, and nothing of its publisher behind it.
    pub(crate) fn posted(&mut self, node: usize, number: usize) -> Checked {
        self.owed.remove(&(number, node));
        let publication = &mut self.publications[number];
        let log = &mut self.logs[node];
        let place = log.next;
        if publication.places.insert(node, place).is_some() {
            return violation("none_doubled_between_nodes", format!("#{number} came to node {node} twice"));
        }
        let newest = log.newest.entry((publication.origin, publication.channel)).or_insert(number);
        if *newest > number {
            let text = format!("#{number} came to node {node} behind #{newest} of the same publisher");
            return violation("order_holds_in_each_channel", text);
        }
        *newest = number;
        log.next += 1;
        log.channels.entry(publication.channel).or_default().push((place, number));
        Ok(())
    }

    /// Other nodes are to get it: those that have the user, and all for a room.
    pub(crate) fn forwarded(&mut self, number: usize, nodes: impl Iterator<Item = usize>) {
        let Publication { channel, origin, what, .. } = self.publications[number];
        let tabs = &self.tabs;
        let has_user = |node: &usize| tabs.iter().any(|tab| tab.node == *node && tab.user == channel && tab.is_listed);
        // A typing sign has no number that could be read on the other side.
        let is_owed = |node: &usize| *node != origin && what != What::Typing && (channel >= USERS || has_user(node));
        self.owed.extend(nodes.filter(is_owed).map(|node| (number, node)));
    }

    pub(crate) fn forget_node(&mut self, node: usize) {
        self.owed.retain(|(_, owed)| *owed != node);
    }

    pub(crate) fn forget_from(&mut self, node: usize) {
        let publications = &self.publications;
        self.owed.retain(|(number, _)| publications[*number].origin != node);
    }

    /// All that is owed between nodes has come, but for what the server lost.
    pub(crate) fn nothing_is_owed_between_nodes(&self, has_lost: impl Fn(usize, usize) -> bool) -> Checked {
        match self.owed.iter().find(|(number, node)| !has_lost(*number, *node)) {
            Some((number, node)) => violation(
                "frames_between_nodes_are_lost_by_the_server_only",
                format!("#{number} never came to node {node}"),
            ),
            None => Ok(()),
        }
    }

    /// A node found that something was lost that another had said to it alone, which is to users, or to all.
    pub(crate) fn found_loss(&mut self, node: usize, (from, is_own): (usize, bool), is_lost: impl Fn(usize) -> bool) {
        let log = &mut self.logs[node];
        for (number, publication) in self.publications.iter().enumerate() {
            let is_one = publication.origin == from && (publication.channel < USERS) == is_own;
            if is_one && publication.what.is_ordered() && is_lost(number) {
                let holes = log.holes.entry(publication.channel).or_default();
                if !holes.iter().any(|(_, hole)| *hole == number) {
                    holes.push((log.next, number));
                }
            }
        }
        // What was posted before it is not what comes behind it.
        log.next += 1;
    }

    /// What was lost to the tab on this channel, was found before that place, and the tab was not told of.
    fn untold(&self, number: usize, channel: usize, until: u64) -> Option<usize> {
        let tab = &self.tabs[number];
        let (reading, holes) = (tab.channels.get(&channel)?, self.logs[tab.node].holes.get(&channel)?);
        let told = if channel < USERS { tab.told.users } else { tab.told.rooms };
        // Who came back may have got it from where it is kept.
        let is_untold = |(place, publication): &&(u64, usize)| {
            (told..until).contains(place) && reading.must(*place) && !tab.had.contains(publication)
        };
        holes.iter().find(is_untold).map(|(_, publication)| *publication)
    }

    fn what_is_lost_between_nodes_is_told(&self, number: usize, channel: usize, until: u64) -> Checked {
        match self.untold(number, channel, until) {
            Some(lost) => {
                let text = format!("tab {number} goes on past #{lost}, which was lost, and was not told of a gap");
                violation("what_is_lost_between_nodes_is_told", text)
            }
            None => Ok(()),
        }
    }

    /// All that was posted on a node so far has been through its shards.
    pub(crate) fn handled(&mut self, node: usize) {
        self.logs[node].handled = self.logs[node].next;
    }

    pub(crate) fn kicked(&mut self, node: usize, user: usize) {
        let log = &mut self.logs[node];
        log.kicks.push((user, log.next));
        // The kick has a place of its own: what was posted before it is not what comes after it.
        log.next += 1;
    }

    /// Tabs that a post reaches now: what the publisher must be told.
    pub(crate) fn addressed(&self, node: usize, channel: usize) -> usize {
        let is_addressed =
            |tab: &&Tab| tab.node == node && tab.is_listed && (tab.user == channel || tab.rooms.contains(&channel));
        self.tabs.iter().filter(is_addressed).count()
    }

    /// Bytes by which the queue of a tab may have grown through what its node posted and its shard may not have handled.
    pub(crate) fn may_have_grown(&self, number: usize) -> usize {
        let (tab, log) = (&self.tabs[number], &self.logs[self.tabs[number].node]);
        let posts = tab.channels.keys().filter_map(|channel| log.channels.get(channel)).flatten();
        let posts = posts.filter(|(place, _)| *place >= log.handled);
        posts.map(|(_, publication)| self.publications[*publication].bytes_max).sum()
    }

    /// How many tabs publishers find on a node.
    pub(crate) fn listed_on(&self, node: usize) -> usize {
        self.tabs.iter().filter(|tab| tab.node == node && tab.is_listed).count()
    }

    pub(crate) fn listed(&self, node: usize, user: usize) -> impl Iterator<Item = usize> + '_ {
        let is_listed = move |tab: &Tab| tab.node == node && tab.user == user && tab.is_listed;
        self.tabs.iter().enumerate().filter(move |(_, tab)| is_listed(tab)).map(|(number, _)| number)
    }

    /// A tab opened. `positions` are what its client has, newest first; None if it names none.
    pub(crate) fn opened(&mut self, node: usize, user: usize, wire: Wire, positions: Option<&[MessageId]>) -> usize {
        let log = &self.logs[node];
        let kept = log.channels.get(&user);
        let place = |id: &MessageId| {
            let is_it = |(_, number): &&(u64, usize)| {
                self.publications[*number].id == *id && self.publications[*number].what.is_ordered()
            };
            kept.and_then(|posts| posts.iter().rfind(is_it)).map(|(place, _)| *place)
        };
        let position = positions.map(|positions| positions.iter().find_map(place));
        let (from, replay) = match position {
            None => (log.next, Replay::Fresh),
            Some(Some(place)) => (place + 1, Replay::Expected),
            // Nothing that the node knows: it has to say so.
            Some(None) => (log.next, Replay::Expected),
        };
        let reading = Reading { stays: vec![Stay::new(from, from)], ..Reading::default() };
        self.tabs.push(Tab {
            node,
            user,
            wire,
            opened_at: log.next,
            since: self.now,
            replay,
            told: Told::default(),
            channels: BTreeMap::from([(user, reading)]),
            rooms: BTreeSet::new(),
            is_listed: true,
            handled: 0,
            reasons: Vec::new(),
            positions: positions.map(|ids| ids.iter().rev().copied().collect()).unwrap_or_default(),
            asked: BTreeSet::new(),
            said: BTreeSet::new(),
            close_code: None,
            had: BTreeSet::new(),
            counts_as_had: BTreeSet::new(),
            required: None,
            required_edits: BTreeMap::new(),
            edits: BTreeSet::new(),
            newest: BTreeMap::new(),
            is_own_end: false,
        });
        self.tabs.len() - 1
    }

    /// The place of the next post on a node.
    pub(crate) fn next_place(&self, node: usize) -> u64 {
        self.logs[node].next
    }

    /// The same by what is kept between nodes, for a client that had `had` when it left: what was kept when it began to come
    /// back, and what is now, oldest first.
    ///
    /// A node knows of a client what it names, and takes what stands before that for what it has. Nodes do not have one
    /// order, so that this is not always so, and what is behind a position it may have had without naming it:
    /// `engine::resume` says what is done about that. So neither is required here: not that it comes, nor that it does not.
    pub(crate) fn returned(
        &mut self,
        (node, user, wire, since): (usize, usize, Wire, u64),
        positions: &[MessageId],
        had: BTreeSet<usize>,
        [then, now]: [&[usize]; 2],
    ) -> usize {
        let number = self.opened(node, user, wire, None);
        let is_ordered = |number: &usize| self.publications[*number].what.is_ordered();
        let is_named = |number: &usize| is_ordered(number) && positions.contains(&self.publications[*number].id);
        let behind = then.iter().rposition(is_named).map(|place| &then[place + 1..]).unwrap_or_default();
        let before = now.iter().rposition(is_named).map(|place| &now[..=place]).unwrap_or_default();
        let required = behind.iter().copied().filter(is_ordered).collect();
        let edit = |number: &usize| match self.publications[*number].what {
            What::Edit(message) => Some((message, *number)),
            _ => None,
        };
        // The newest of each message comes last.
        let required_edits = behind.iter().filter_map(edit).collect();
        // Of several positions the middle one counts: what is behind it, and is none of them, may come again.
        let middle = |kept: &[usize]| {
            let named: Vec<_> = kept.iter().copied().filter(|number| is_named(number)).collect();
            named.get(named.len() / 2).copied()
        };
        let middles = [then, now].into_iter().filter_map(middle);
        let places = middles.filter_map(|middle| now.iter().rposition(|number| *number == middle));
        let until = places.min().map(|place| &now[..=place]).unwrap_or_default();
        let had = had.into_iter().filter(|number| until.contains(number)).collect();
        let tab = &mut self.tabs[number];
        tab.channels.entry(user).or_default().stays = vec![Stay::new(since, since)];
        tab.replay = Replay::Expected;
        tab.positions = positions.iter().rev().copied().collect();
        (tab.had, tab.required, tab.required_edits) = (had, Some(required), required_edits);
        tab.counts_as_had.extend(before.iter().copied().chain((0..self.publications.len()).filter(is_named)));
        number
    }

    pub(crate) fn joined(&mut self, tab: usize, room: usize) {
        let tab = &mut self.tabs[tab];
        let log = &self.logs[tab.node];
        if tab.rooms.insert(room) {
            tab.channels.entry(room).or_default().stays.push(Stay::new(log.handled, log.next));
        }
    }

    pub(crate) fn left(&mut self, tab: usize, room: usize) {
        let tab = &mut self.tabs[tab];
        let log = &self.logs[tab.node];
        if tab.rooms.remove(&room)
            && let Some(stay) = tab.channels.entry(room).or_default().stays.last_mut()
        {
            stay.end(log.handled, log.next);
        }
    }

    /// Publishers find it no more. `reasons` are why sessions of its shard ended just now. A drain ends it later, and lets
    /// come before what is on its way.
    pub(crate) fn unlisted(&mut self, number: usize, reasons: &[Disconnect], is_draining: bool) {
        let tab = &mut self.tabs[number];
        let log = &self.logs[tab.node];
        tab.is_listed = false;
        let is_kick = |(user, place): &&(usize, u64)| *user == tab.user && *place >= tab.opened_at;
        let kick = log.kicks.iter().filter(is_kick).map(|(_, place)| *place).min();
        tab.handled = log.handled.max(kick.filter(|_| reasons == [Disconnect::Kicked]).unwrap_or_default());
        let must_until = if is_draining { log.next } else { tab.handled };
        for (channel, reading) in &mut tab.channels {
            // Who shares its shard may still be in the room: until it is told to go it hears what they hear.
            let may_until = if is_draining && *channel >= USERS { u64::MAX } else { log.next };
            reading.stays.iter_mut().for_each(|stay| stay.end(must_until, may_until));
        }
        self.ended_for(number, reasons);
    }

    /// Sessions of its shard ended for these reasons, and it may be one of them.
    pub(crate) fn ended_for(&mut self, tab: usize, reasons: &[Disconnect]) {
        let tab = &mut self.tabs[tab];
        tab.reasons.extend(reasons);
        if tab.reasons.iter().any(|reason| *reason != Disconnect::ServiceRestart) {
            // It did not end as a drain ends it: what was on its way may have come too late.
            for reading in tab.channels.values_mut() {
                reading.stays.iter_mut().for_each(|stay| stay.end(tab.handled, u64::MAX));
            }
        }
    }

    /// What a client got, one by one.
    pub(crate) fn read(&mut self, number: usize, got: &Got) -> Checked {
        match got {
            Got::Json(json, position) => match json.kind.as_str() {
                "message" | "file" | "edit" => self.read_frame(number, json, position.as_deref()),
                "gap" => self.read_gap(number, json),
                "typing" => self.read_typing(number, json),
                "draining" if self.drains.contains(&self.tabs[number].node) => Ok(()),
                "ack" | "error" | "pong" => {
                    let Some(id) = &json.client_id else { return Ok(()) };
                    let tab = &mut self.tabs[number];
                    tab.asked.remove(id);
                    if !tab.said.contains(id) {
                        return violation("no_frame_to_a_wrong_user", format!("tab {number} got the answer to {id}"));
                    }
                    Ok(())
                }
                kind => violation("no_frame_to_a_wrong_user", format!("tab {number} got a frame of type {kind}")),
            },
            Got::Pong(payload) => {
                let payload = String::from_utf8_lossy(payload).into_owned();
                let tab = &self.tabs[number];
                // Garbage may be a ping as well.
                if !tab.said.contains(&payload) && !tab.is_own_end {
                    return violation("no_frame_to_a_wrong_user", format!("tab {number} got the pong of {payload}"));
                }
                Ok(())
            }
            Got::Close(code) | Got::EventClose(code) => self.close_says_why(number, *code),
            Got::Ping(_) | Got::KeepAlive | Got::Retry | Got::LastChunk => Ok(()),
        }
    }

    /// Somebody has said so on a channel of the tab's. Another node's sign has no number, and so no place on this node.
    fn read_typing(&self, number: usize, json: &Json) -> Checked {
        let tab = &self.tabs[number];
        let is_it = |sign: usize| {
            let Publication { channel, what, ref places, .. } = self.publications[sign];
            let Some(reading) = tab.channels.get(&channel) else { return false };
            let may_come = match places.get(&tab.node) {
                Some(place) => reading.may(*place),
                None => !places.is_empty(),
            };
            what == What::Typing && json.active == Some(sign.is_multiple_of(2)) && may_come
        };
        if (0..self.publications.len()).any(is_it) {
            return Ok(());
        }
        violation("no_frame_to_a_wrong_user", format!("tab {number} reads that somebody types, and nobody did"))
    }

    fn read_gap(&mut self, number: usize, json: &Json) -> Checked {
        let tab = &mut self.tabs[number];
        match json.reason.as_deref() {
            Some("unknown_position") => {}
            Some("room_not_kept") => tab.told.rooms = self.logs[tab.node].next,
            Some("lost_between_nodes") => tab.told.users = self.logs[tab.node].next,
            reason => return violation("no_frame_is_torn", format!("tab {number} is told of a gap for {reason:?}")),
        }
        if json.reason.as_deref() == Some("unknown_position") {
            let reading = tab.channels.entry(tab.user).or_default();
            if tab.replay != Replay::Expected || reading.last.is_some() {
                return violation("a_replay_is_whole_or_there_is_a_gap", format!("tab {number} is told of a gap late"));
            }
            tab.replay = Replay::Gap;
            if tab.required.take().is_some() {
                // It begins anew: what it had may come again.
                tab.had.clear();
                tab.positions.clear();
                tab.required_edits.clear();
            }
            for stay in &mut reading.stays {
                (stay.may_from, stay.must_from) = (tab.opened_at, tab.opened_at);
            }
        }
        Ok(())
    }

    fn read_frame(&mut self, number: usize, json: &Json, position: Option<&str>) -> Checked {
        let text = json.text.as_deref().or(json.filename.as_deref()).unwrap_or_default();
        let named =
            text.strip_prefix('#').and_then(|text| text.split(' ').next()).and_then(|n| n.parse::<usize>().ok());
        let Some(publication) = named.filter(|named| *named < self.publications.len()) else {
            return violation("no_frame_to_a_wrong_user", format!("tab {number} got what nobody published: {text}"));
        };
        let Publication { channel, what, id, ref places, .. } = self.publications[publication];
        let tab = &self.tabs[number];
        let place = places.get(&tab.node).copied();
        // Who came back may have what is yet to come to its node.
        let Some(place) = place.or(tab.required.is_some().then_some(u64::MAX)) else {
            let text = format!("tab {number} got #{publication}, which was never posted on its node");
            return violation("what_was_refused_reaches_nobody", text);
        };
        if json.id.as_deref() != Some(id.to_string().as_str()) {
            return violation("no_frame_is_torn", format!("#{publication} has the id {:?}", json.id));
        }
        if let (Some(data), Some(size)) = (&json.data, json.size)
            && data.len() != size.div_ceil(3) * 4
        {
            return violation("no_frame_is_torn", format!("#{publication} has {} of {size} bytes", data.len()));
        }
        let is_position = what.is_ordered() && tab.wire == Wire::EventStream;
        if is_position != position.is_some() {
            return violation("positions_are_of_ordered_frames", format!("#{publication} came with {position:?}"));
        }
        // Rooms are not kept: to who joins one again on another node, what it had there may come again.
        let has_it = what.is_ordered() && (tab.positions.contains(&id) || tab.had.contains(&publication));
        // What comes live after that time is not compared any more with what was replayed.
        let is_late = tab.required.is_some() && self.now > tab.since + LATE;
        if has_it && channel == tab.user && is_late {
            return Ok(());
        }
        if has_it && channel == tab.user {
            return violation("none_doubled", format!("tab {number} got #{publication}, and its client had it"));
        }
        if tab.required.is_some() && channel == tab.user {
            return self.read_after_return(number, publication);
        }
        self.no_frame_to_a_wrong_user(number, publication, channel, place)?;
        if what.is_ordered() {
            self.none_doubled_and_order_holds(number, publication, channel, place)?;
            self.ordered_frames_are_lost_only_at_the_end(number, publication, channel, place)?;
            self.what_is_lost_between_nodes_is_told(number, channel, place)?;
            let tab = &mut self.tabs[number];
            self.replayed += u64::from(channel == tab.user && place < tab.opened_at);
            tab.channels.entry(channel).or_default().last = Some(place);
            tab.had.insert(publication);
            tab.positions.push(id);
            let from = tab.positions.len().saturating_sub(POSITIONS_MAX);
            tab.positions.drain(..from);
        } else if let What::Edit(message) = what {
            self.edits_go_forward_behind_their_message(number, publication, message, place)?;
            self.tabs[number].channels.entry(channel).or_default().edits.insert(message, place);
        }
        Ok(())
    }

    /// A tab that came back by what is kept between nodes reads of its user's channel: each publisher's frames in its order.
    fn read_after_return(&mut self, number: usize, publication: usize) -> Checked {
        let Publication { what, id, origin, .. } = self.publications[publication];
        let tab = &mut self.tabs[number];
        if !what.is_ordered() {
            tab.edits.insert(publication);
            return Ok(());
        }
        // What comes live is in its node's order; what a restart of the server took from what is kept may come behind it.
        if tab.required.as_ref().is_some_and(|required| required.contains(&publication)) {
            self.replayed += 1;
            let newest = tab.newest.entry(origin).or_insert(publication);
            if *newest > publication {
                let text = format!("tab {number} got #{publication} behind #{newest} of the same publisher");
                return violation("order_holds_in_each_channel", text);
            }
            *newest = publication;
        }
        tab.had.insert(publication);
        tab.positions.push(id);
        let from = tab.positions.len().saturating_sub(POSITIONS_MAX);
        tab.positions.drain(..from);
        Ok(())
    }

    /// What was kept behind its position, and what was posted on its node since, has come to a tab that came back.
    fn all_that_was_kept_has_come(&self, number: usize, required: &[usize]) -> Checked {
        let tab = &self.tabs[number];
        let reading = &tab.channels[&tab.user];
        let posted = self.logs[tab.node].channels.get(&tab.user).into_iter().flatten();
        let posted = posted.filter(|(place, _)| reading.must(*place)).map(|(_, publication)| publication);
        let is_missed = |publication: &&usize| {
            self.publications[**publication].what.is_ordered() && !tab.had.contains(*publication)
        };
        let posted = posted.filter(|publication| !tab.counts_as_had.contains(publication));
        match required.iter().chain(posted).find(is_missed) {
            Some(missed) => {
                let text = format!("tab {number} came back ({:?}) and never got #{missed}", tab.reasons);
                violation("a_replay_is_whole_or_there_is_a_gap", text)
            }
            None => self.the_last_edits_have_come(number),
        }
    }

    /// Of each message, a tab that came back has the newest edit that was kept behind its position, and the newest that its
    /// node has posted since; or one that was posted here behind it, and took its place.
    fn the_last_edits_have_come(&self, number: usize) -> Checked {
        let tab = &self.tabs[number];
        let (node, reading) = (tab.node, &tab.channels[&tab.user]);
        let place = |edit: usize| self.publications[edit].places.get(&node).copied();
        let posted = self.logs[node].channels.get(&tab.user).into_iter().flatten();
        let posted = posted.filter(|(place, _)| reading.must(*place)).filter_map(|(place, edit)| {
            let What::Edit(message) = self.publications[*edit].what else { return None };
            Some((message, *edit, *place))
        });
        let kept = tab.required_edits.iter().map(|(message, edit)| (*message, *edit, 0));
        let is_missed = |(message, edit, from): &(usize, usize, u64)| {
            let replaces = |had: &usize| {
                let is_posted = place(*had).is_some_and(|place| place >= *from && reading.may(place));
                self.publications[*had].what == What::Edit(*message) && is_posted
            };
            !tab.edits.contains(edit) && !tab.edits.iter().any(replaces)
        };
        match kept.chain(posted).find(is_missed) {
            Some((message, edit, _)) => {
                let text = format!("tab {number} came back and never got #{edit}, the last edit of #{message}");
                violation("the_last_edit_arrives", text)
            }
            None => Ok(()),
        }
    }

    fn no_frame_to_a_wrong_user(&self, number: usize, publication: usize, channel: usize, place: u64) -> Checked {
        let tab = &self.tabs[number];
        let may = tab.channels.get(&channel).is_some_and(|reading| reading.may(place));
        if !may {
            let text = format!(
                "tab {number} of user {} got #{publication}, which was for channel {channel} at {place} of node {}: {:?}",
                tab.user,
                tab.node,
                tab.channels.get(&channel)
            );
            return violation("no_frame_to_a_wrong_user", text);
        }
        Ok(())
    }

    fn none_doubled_and_order_holds(&self, number: usize, publication: usize, channel: usize, place: u64) -> Checked {
        match self.tabs[number].channels[&channel].last {
            Some(last) if last == place => violation("none_doubled", format!("tab {number} got #{publication} twice")),
            Some(last) if last > place => {
                let text = format!("tab {number} got #{publication} at {place} behind what was posted at {last}");
                violation("order_holds_in_each_channel", text)
            }
            _ => Ok(()),
        }
    }

    /// Nothing that had to reach the tab lies between what it read last and what it reads now.
    fn ordered_frames_are_lost_only_at_the_end(
        &self,
        number: usize,
        publication: usize,
        channel: usize,
        place: u64,
    ) -> Checked {
        match self.first_missed(number, channel, place) {
            Some(missed) => {
                let text = format!("tab {number} got #{publication} and not #{missed}, which came before it");
                violation("ordered_frames_are_lost_only_with_a_cut", text)
            }
            None => Ok(()),
        }
    }

    /// The first ordered publication before `until` that the tab had to read behind what it read last.
    fn first_missed(&self, number: usize, channel: usize, until: u64) -> Option<usize> {
        let tab = &self.tabs[number];
        let reading = tab.channels.get(&channel)?;
        let posts = self.logs[tab.node].channels.get(&channel)?;
        let is_missed = |(place, publication): &&(u64, usize)| {
            *place < until
                && reading.last.is_none_or(|last| *place > last)
                && self.publications[*publication].what.is_ordered()
                && reading.must(*place)
        };
        posts.iter().find(is_missed).map(|(_, publication)| *publication)
    }

    fn edits_go_forward_behind_their_message(
        &self,
        number: usize,
        publication: usize,
        message: usize,
        place: u64,
    ) -> Checked {
        let tab = &self.tabs[number];
        let reading = &tab.channels[&self.publications[publication].channel];
        if reading.edits.get(&message).is_some_and(|last| *last >= place) {
            let text = format!("tab {number} got the edit #{publication} of #{message} behind a newer one");
            return violation("edits_go_forward", text);
        }
        let posted = self.publications[message].places.get(&tab.node).copied();
        let is_early = posted.is_some_and(|posted| {
            posted < place && reading.must(posted) && reading.last.is_none_or(|last| last < posted)
        });
        if is_early {
            let text = format!("tab {number} got the edit #{publication} before its message #{message}");
            return violation("an_edit_never_comes_before_its_message", text);
        }
        Ok(())
    }

    fn close_says_why(&mut self, number: usize, code: u16) -> Checked {
        let tab = &mut self.tabs[number];
        tab.close_code = Some(code);
        if tab.is_listed || !tab.reasons.iter().any(|reason| reason.close_code() == code) {
            let text = format!("tab {number} was closed with {code}, and ended for {:?}", tab.reasons);
            return violation("whoever_is_gone_was_told_why", text);
        }
        Ok(())
    }

    /// The connection is over. `is_told` says that its client read an end of it.
    pub(crate) fn gone(&self, number: usize, left: Left, is_told: bool) -> Checked {
        let tab = &self.tabs[number];
        if tab.is_listed {
            return violation("whoever_is_gone_was_told_why", format!("tab {number} is gone and still registered"));
        }
        match left {
            _ if tab.is_own_end => Ok(()),
            Left::Slow => Ok(()),
            Left::Flushed if is_told && tab.reasons.iter().all(|reason| GRACEFUL.contains(reason)) => {
                self.all_that_had_to_come_has_come(number)
            }
            Left::Flushed if is_told => Ok(()),
            Left::Flushed | Left::Unwritten => {
                violation("whoever_is_gone_was_told_why", format!("tab {number} ended without an end: {left:?}"))
            }
        }
    }

    /// Nothing is on its way to the tab any more.
    pub(crate) fn all_that_had_to_come_has_come(&self, number: usize) -> Checked {
        let tab = &self.tabs[number];
        if let Some(required) = &tab.required {
            self.all_that_was_kept_has_come(number, required)?;
        }
        for (channel, reading) in &tab.channels {
            self.what_is_lost_between_nodes_is_told(number, *channel, u64::MAX)?;
            if tab.required.is_some() && *channel == tab.user {
                continue;
            }
            if let Some(missed) = self.first_missed(number, *channel, u64::MAX) {
                let text = format!("tab {number} ({:?}, {:?}) never got #{missed}", tab.reasons, tab.wire);
                return violation("ordered_frames_are_lost_only_with_a_cut", text);
            }
            for (place, publication) in self.logs[tab.node].channels.get(channel).into_iter().flatten() {
                if let What::Edit(message) = self.publications[*publication].what
                    && reading.must(*place)
                    && reading.edits.get(&message).is_none_or(|last| last < place)
                {
                    let text = format!("tab {number} never got #{publication}, the last edit of #{message}");
                    return violation("the_last_edit_arrives", text);
                }
            }
        }
        Ok(())
    }

    /// Every session that was kicked is over.
    pub(crate) fn whoever_was_kicked_is_gone(&self) -> Checked {
        for (number, tab) in self.tabs.iter().enumerate().filter(|(_, tab)| tab.is_listed) {
            let is_kick = |(user, place): &&(usize, u64)| *user == tab.user && *place >= tab.opened_at;
            if self.logs[tab.node].kicks.iter().find(is_kick).is_some() {
                return violation("whoever_was_kicked_is_gone", format!("tab {number} was kicked, and is there"));
            }
        }
        Ok(())
    }
}
