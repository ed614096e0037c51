//! What the driver does, one call at a time; and what is looked at after each.

use std::time::Duration;

use tabcast::fanout::shard::{Outcome, Shard};
use tabcast::platform::inbound::Command;
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::frame;

use super::Violation;
use super::client::Pace;
use super::oracle::{Left, ROOMS, USERS};
use super::reader::Got;
use super::scales::Scales;
use super::trace::Counts;
use super::world::{Absent, Between, Node, World, channel_id, channel_of, user_id};

type Checked = Result<(), Violation>;

/// Control frames that a full queue may hold beyond its bound, and the close.
const CONTROL_FRAMES: usize = 17;
/// Frames beyond its bound that wait for a first attempt to write them.
const UNTRIED_FRAMES: usize = 3 * 64;
/// Bytes of one control frame, its reason included.
const CONTROL_BYTES: usize = 400;

/// Lets shards, the network and clients do some of what they have to do.
pub(crate) fn pump(world: &mut World) -> Checked {
    for node in world.live_nodes() {
        if let Between::Network(network) = &world.between {
            network.send(node, &mut world.dice, true);
            if world.dice.one_in(2) {
                let arrived = network.hear(node, &mut world.dice, true)?;
                world.note_arrived(node, arrived)?;
            }
        }
        for shard in 0..world.settings.shards {
            match world.dice.below(6) {
                0 => {}
                1 => transmit(world, node, shard, 2)?,
                2 => drop(handle_inbox(world, node, shard)?),
                _ => {
                    handle_inbox(world, node, shard)?;
                    transmit(world, node, shard, 40)?;
                }
            }
        }
    }
    for tab in world.live_clients() {
        if world.dice.one_in(2) {
            be_client(world, tab)?;
        }
    }
    if let Between::Network(network) = &world.between {
        network.set_now(world.elapsed);
        if world.dice.one_in(10) {
            network.write_presence();
        }
        if world.dice.one_in(3) {
            network.answer();
        }
    }
    world.go_on_returning()?;
    Ok(())
}

/// Time goes on, and every shard is told as often as it asks for, or half of that: whoever can be written to is written to
/// meanwhile, and whoever is well answers.
pub(crate) fn pass_time(world: &mut World, time: Duration) -> Checked {
    let end = world.elapsed + time;
    while world.elapsed < end {
        let before = world.elapsed;
        let undrained = |node: &&Node| node.is_draining && !node.shards.iter().all(Shard::is_drained);
        let step = match world.nodes.iter().flatten().find(undrained) {
            Some(node) => 2 * node.shards.iter().map(Shard::tick_interval).min().unwrap_or_default(),
            None => Duration::from_secs(1),
        };
        world.elapsed = end.min(before + step.clamp(Duration::from_millis(100), Duration::from_secs(1)));
        world.advance_timers(world.elapsed - before);
        tick(world)?;
        for tab in world.live_clients() {
            be_client(world, tab)?;
        }
    }
    the_budget_is_kept(world)
}

fn tick(world: &mut World) -> Checked {
    world.trace.note(format!("it is {:?}", world.elapsed));
    world.oracle.now = world.elapsed;
    let now = world.now();
    for node in world.live_nodes() {
        for shard in 0..world.settings.shards {
            let scales = Scales::weigh(world, node);
            world.node(node).shards[shard].handle_tick(now);
            settle(world, node, shard)?;
            scales.the_fattest_are_cut_first(world, shard)?;
            transmit(world, node, shard, usize::MAX)?;
        }
        let kept_max = world.settings.hub.recovery.total_bytes_max;
        let hub = world.node(node).engine.hub();
        hub.sweep_streams();
        holds_at_most(node, &[("bytes for recovery", hub.recovery_bytes(), kept_max)])?;
    }
    Ok(())
}

/// One turn of a shard's inbox. False if there was nothing to take.
pub(crate) fn handle_inbox(world: &mut World, node: usize, shard: usize) -> Result<bool, Violation> {
    let (now, elapsed, scales) = (world.now(), world.elapsed, Scales::weigh(world, node));
    let there = world.node(node);
    let is_done = !there.shards[shard].handle_inbox(now);
    if is_done && !there.shards[shard].has_work() {
        there.heard_at[shard] = elapsed;
        // It may say no: a post came, or the word of one.
        let _ = there.shards[shard].park(std::task::Waker::noop());
    }
    let is_handled = there.engine.hub().waiting_posts() == 0;
    // Who ended in this turn ended before the posts behind it: what was handled is noted after that.
    settle(world, node, shard)?;
    scales.the_fattest_are_cut_first(world, shard)?;
    if is_handled {
        world.oracle.handled(node);
    }
    Ok(!is_done)
}

/// Hands what waits on a shard to its sockets, at most so many writes.
pub(crate) fn transmit(world: &mut World, node: usize, shard: usize, writes_max: usize) -> Checked {
    for _ in 0..writes_max {
        let Some(transmit) = world.node(node).shards[shard].poll_transmit() else { break };
        let slot = transmit.slot;
        let bytes: Vec<u8> = transmit.slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        drop(transmit);
        let Some(tab) = client_at(world, node, shard, slot) else {
            let text = format!("{} bytes for slot {slot}, which nobody has", bytes.len());
            return Err(Violation::new("no_frame_to_a_wrong_user", text));
        };
        let client = &mut world.clients[tab];
        if bytes.is_empty() || client.is_blocked || client.is_finished {
            let text = format!("{} bytes for tab {tab}, which is blocked or over", bytes.len());
            return Err(Violation::new("no_write_without_a_reason", text));
        }
        let room = client.room.min(client.breaks_after.unwrap_or(usize::MAX));
        let mut taken = bytes.len().min(room);
        let is_blocked = taken < bytes.len();
        if !is_blocked && taken > 1 && world.dice.one_in(12) {
            // The kernel takes a part, and would take more.
            taken = world.dice.between(1, taken - 1);
        }
        if client.room != usize::MAX {
            client.room -= taken;
        }
        client.is_blocked = is_blocked;
        client.blocked_at = if is_blocked { world.elapsed } else { client.blocked_at };
        let outcome = if is_blocked { Outcome::Blocked(taken) } else { Outcome::Taken(taken) };
        let shard_mut = &mut world.nodes[node].as_mut().expect("a live node").shards[shard];
        client.unwritten_bytes = shard_mut.queued_for(slot).1.saturating_sub(taken);
        shard_mut.handle_written(slot, outcome);
        client.blocked_with = shard_mut.queued_for(slot);
        client.is_finished = shard_mut.is_flushed(slot);
        let breaks = client.breaks_after.as_mut().is_some_and(|left| {
            *left -= taken;
            *left == 0
        });
        read(world, tab, &bytes[..taken])?;
        settle(world, node, shard)?;
        if breaks {
            lose(world, tab)?;
        }
    }
    Ok(())
}

fn client_at(world: &World, node: usize, shard: usize, slot: u32) -> Option<usize> {
    let is_it = |tab: &usize| {
        let client = &world.clients[*tab];
        !client.is_gone
            && client.node == node
            && usize::from(client.address.shard()) == shard
            && client.address.slot() == slot
    };
    (0..world.clients.len()).rev().find(is_it)
}

/// A client reads bytes, and does what a client does about them.
fn read(world: &mut World, tab: usize, bytes: &[u8]) -> Checked {
    world.trace.note_bytes(bytes);
    let torn = |text| Violation::new("no_frame_is_torn", format!("tab {tab} reads {text}"));
    let all = world.clients[tab].reader.feed(bytes, &mut world.parsed).map_err(torn)?;
    for got in all {
        world.trace.counts.read += 1;
        world.oracle.read(tab, &got)?;
        let client = &mut world.clients[tab];
        match &got {
            Got::Ping(payload) if !client.is_silent && !client.is_mute => client.pong(payload, &mut world.dice),
            Got::Close(code) => {
                world.trace.note(format!("tab {tab} reads close {code}"));
                if !client.is_silent && !client.is_mute {
                    client.close(&mut world.dice);
                    client.is_mute = true;
                }
            }
            Got::Json(json, _) if json.kind == "gap" => {
                world.trace.counts.gaps += 1;
                world.trace.note(format!("tab {tab} is told of a gap"));
            }
            Got::Json(json, _) => {
                let text = json.text.as_deref().or(json.filename.as_deref()).unwrap_or_default();
                let name = text.split(' ').next().unwrap_or_default();
                world.trace.note(format!("tab {tab} reads {} {name}", json.kind));
            }
            _ => {}
        }
    }
    Ok(())
}

/// One client's socket takes some bytes more, and some of what it says arrives.
pub(crate) fn be_client(world: &mut World, tab: usize) -> Checked {
    let client = &mut world.clients[tab];
    if let Pace::Slow(bytes) = client.pace {
        client.room = client.room.saturating_add(bytes).min(4_000);
    }
    if client.is_blocked && client.room > 0 {
        make_writable(world, tab)?;
    }
    let waiting = world.clients[tab].outgoing.len();
    if waiting > 0 && !world.clients[tab].is_gone {
        let count = if world.dice.one_in(3) { world.dice.between(1, waiting) } else { waiting };
        say(world, tab, count)?;
    }
    Ok(())
}

/// So many bytes of what a client says arrive.
pub(crate) fn say(world: &mut World, tab: usize, count: usize) -> Checked {
    let client = &mut world.clients[tab];
    let mut bytes: Vec<u8> = client.outgoing.drain(..count).collect();
    let (node, address) = (client.node, client.address);
    let shard = usize::from(address.shard());
    let there = world.node(node);
    there.shards[shard].handle_readable(address.slot(), &mut bytes, &mut there.ears[shard]);
    let heard = std::mem::take(&mut there.ears[shard].heard);
    for (from, command) in heard {
        if from != address {
            return Err(Violation::new("nobody_speaks_for_another", format!("tab {tab} spoke as {from:?}")));
        }
        let room = command.room().map(|room| channel_of(&tabcast::id::ChannelId::Room(room.clone())));
        match (command, room) {
            (Command::Join { .. }, Some(room)) => {
                let book = &world.oracle.tabs[tab];
                if book.is_listed && book.rooms.len() < world.settings.sessions.rooms_max {
                    world.oracle.joined(tab, room);
                }
            }
            (Command::Leave { .. }, Some(room)) => world.oracle.left(tab, room),
            (Command::Message { client_id, .. }, _) => world.hand(tab, client_id),
            _ => {}
        }
    }
    settle(world, node, shard)?;
    rooms_are_as_asked(world, tab)
}

fn rooms_are_as_asked(world: &mut World, tab: usize) -> Checked {
    let client = &world.clients[tab];
    if client.is_gone || !world.oracle.tabs[tab].is_listed {
        return Ok(());
    }
    let (node, address) = (client.node, client.address);
    let rooms = world.node(node).shards[usize::from(address.shard())].rooms_of(address.slot());
    let mut rooms: Vec<usize> = rooms.into_iter().map(|room| channel_of(&tabcast::id::ChannelId::Room(room))).collect();
    rooms.sort_unstable();
    if !rooms.iter().eq(&world.oracle.tabs[tab].rooms) {
        let text = format!("tab {tab} is in {rooms:?}, and asked for {:?}", world.oracle.tabs[tab].rooms);
        return Err(Violation::new("rooms_are_as_asked", text));
    }
    Ok(())
}

pub(crate) fn make_writable(world: &mut World, tab: usize) -> Checked {
    let client = &mut world.clients[tab];
    client.is_blocked = false;
    client.blocked_at = world.elapsed;
    let (node, address) = (client.node, client.address);
    let shard = usize::from(address.shard());
    world.node(node).shards[shard].handle_writable(address.slot());
    settle(world, node, shard)
}

/// The connection of a client breaks.
pub(crate) fn lose(world: &mut World, tab: usize) -> Checked {
    leave(world, tab, "resets", |shard, slot| shard.handle_lost(slot, Disconnect::ConnectionLost))
}

/// A client goes without a word.
pub(crate) fn end_of_input(world: &mut World, tab: usize) -> Checked {
    leave(world, tab, "goes", Shard::handle_end_of_input)
}

fn leave(world: &mut World, tab: usize, how: &str, leave: impl FnOnce(&mut Shard, u32)) -> Checked {
    if world.clients[tab].is_gone {
        return Ok(());
    }
    world.trace.note(format!("tab {tab} {how}"));
    world.oracle.tabs[tab].is_own_end = true;
    let (node, address) = (world.clients[tab].node, world.clients[tab].address);
    let shard = usize::from(address.shard());
    leave(&mut world.node(node).shards[shard], address.slot());
    settle(world, node, shard)
}

/// What a shard did is compared with the books: who is over, who is found, what waits.
pub(crate) fn settle(world: &mut World, node: usize, shard: usize) -> Checked {
    note_who_ended(world, node, shard)?;
    while let Some(slot) = world.node(node).shards[shard].poll_disconnect() {
        let Some(tab) = client_at(world, node, shard, slot) else {
            let text = format!("slot {slot} of node {node} was over before");
            return Err(Violation::new("whoever_is_gone_was_told_why", text));
        };
        world.trace.note(format!("tab {tab} is gone: {:?}", world.oracle.tabs[tab].reasons));
        let client = &mut world.clients[tab];
        client.is_gone = true;
        let close_timeout = world.settings.sessions.close_timeout + Duration::from_secs(1);
        let is_slow = client.is_blocked || world.elapsed < client.blocked_at + close_timeout;
        let left = match client.unwritten_bytes {
            0 => Left::Flushed,
            _ if is_slow => Left::Slow,
            _ => Left::Unwritten,
        };
        let is_told = client.reader.is_ended();
        world.oracle.gone(tab, left, is_told)?;
        let book = &world.oracle.tabs[tab];
        let (user, wire, positions, had) = (book.user, book.wire, book.positions.clone(), book.had.clone());
        world.absent.push(Absent { node, user, wire, positions, had });
    }
    every_queue_is_within_its_limit(world, node, shard)?;
    memory_is_bounded(world, node)
}

/// Whoever is not registered any more ended for a reason that the shard counts, or is about to in a drain.
fn note_who_ended(world: &mut World, node: usize, shard: usize) -> Checked {
    let there = world.nodes[node].as_mut().expect("a live node");
    let mut reasons = Vec::new();
    for (reason, counted) in Disconnect::ALL.into_iter().zip(&mut there.ended[shard]) {
        let now = there.shards[shard].metrics().ended_sessions.of(reason).value();
        reasons.extend((*counted..now).map(|_| reason));
        *counted = now;
    }
    let (is_draining, registry) = (there.is_draining, there.engine.hub().registry());
    // The whole registry is looked through now and then, and whenever there is a reason.
    let is_as_before = reasons.is_empty() && registry.total_connections() == world.oracle.listed_on(node);
    if is_as_before && !world.dice.one_in(16) {
        return Ok(());
    }
    let mut missing = Vec::new();
    for user in 0..USERS {
        let found = registry.get_sessions(&user_id(user));
        let mut found = found.iter().flat_map(|sessions| sessions.iter()).map(|session| session.address()).peekable();
        for tab in world.oracle.listed(node, user) {
            let address = world.clients[tab].address;
            // In the order in which they came: whoever is not next is not there.
            if found.next_if_eq(&address).is_none() {
                missing.push((tab, usize::from(address.shard())));
            }
        }
        if let Some(stranger) = found.next() {
            let text = format!("{stranger:?} of node {node} is found for user {user}, or out of order");
            return Err(Violation::new("the_registry_has_who_is_there", text));
        }
    }
    let is_explained = missing.len() == reasons.len() || is_draining;
    if !is_explained || missing.iter().any(|(_, of)| *of != shard) {
        let text = format!("tabs {missing:?} of node {node} are not found, and {reasons:?} is why");
        return Err(Violation::new("whoever_is_gone_was_told_why", text));
    }
    if is_draining && !reasons.is_empty() {
        // One of those that were unlisted before may have ended.
        for tab in 0..world.oracle.tabs.len() {
            let client = &world.clients[tab];
            let is_of = client.node == node && usize::from(client.address.shard()) == shard;
            if is_of && !client.is_gone && !world.oracle.tabs[tab].is_listed {
                world.oracle.ended_for(tab, &reasons);
            }
        }
    }
    for (tab, _) in missing {
        world.trace.note(format!("tab {tab} is not found any more: {reasons:?}"));
        world.oracle.unlisted(tab, &reasons, is_draining);
    }
    Ok(())
}

fn every_queue_is_within_its_limit(world: &mut World, node: usize, shard: usize) -> Checked {
    let Some(there) = &world.nodes[node] else { return Ok(()) };
    let limits = &world.settings.sessions;
    let (mut frames_sum, mut bytes_sum) = (0, 0);
    for (tab, client) in world.clients.iter_mut().enumerate() {
        if client.is_gone || client.node != node || usize::from(client.address.shard()) != shard {
            continue;
        }
        let (frames, bytes) = there.shards[shard].queued_for(client.address.slot());
        client.unwritten_bytes = bytes;
        frames_sum += frames;
        bytes_sum += bytes;
        let (frames_max, bytes_max) = if client.is_blocked {
            (limits.queue_frames_max.max(client.blocked_with.0), limits.queue_bytes_max.max(client.blocked_with.1))
        } else {
            let replayed = world.settings.hub.recovery.frames_max;
            let untried = UNTRIED_FRAMES + replayed;
            (limits.queue_frames_max + untried, limits.queue_bytes_max + untried * world.largest_frame)
        };
        let bytes_max = bytes_max + world.largest_frame + CONTROL_FRAMES * CONTROL_BYTES;
        if frames > frames_max + CONTROL_FRAMES || bytes > bytes_max {
            let text = format!("{frames} frames and {bytes} bytes wait for tab {tab}: {frames_max}, {bytes_max}");
            return Err(Violation::new("every_queue_is_within_its_limit", text));
        }
    }
    let sums = there.shards[shard].queued();
    if sums != (frames_sum, bytes_sum) || there.shards[shard].held_frames() > frames_sum {
        let text = format!("shard {shard} counts {sums:?}, and {:?} wait", (frames_sum, bytes_sum));
        return Err(Violation::new("every_queue_is_within_its_limit", text));
    }
    Ok(())
}

fn memory_is_bounded(world: &mut World, node: usize) -> Checked {
    let limits = &world.settings.hub;
    let (inbound_bytes_max, posts_max) = (limits.inbound_bytes_max, limits.inbox_posts_max + 2);
    let shards = world.settings.shards;
    let hub = world.node(node).engine.hub();
    let bounds = [
        ("bytes of unfinished messages", hub.incomplete_bytes(), inbound_bytes_max),
        // A drain asks for no room, nor does the question what is fattest.
        ("posts", hub.waiting_posts(), posts_max * shards),
        ("rooms", hub.room_count(), ROOMS),
    ];
    holds_at_most(node, &bounds)
}

fn holds_at_most(node: usize, bounds: &[(&str, usize, usize)]) -> Checked {
    match bounds.iter().find(|(_, held, most)| held > most) {
        Some((what, held, most)) => {
            Err(Violation::new("memory_is_bounded", format!("node {node} holds {held} {what}; at most {most}")))
        }
        None => Ok(()),
    }
}

/// Past the budget somebody is cut every few ticks for as long as there is anybody who could be: a few of the fattest. No
/// shard handles what it is asked meanwhile, so that none of them gets an answer.
fn the_budget_is_kept(world: &mut World) -> Checked {
    if world.bytes_budget == usize::MAX || !world.dice.one_in(4) {
        return Ok(());
    }
    // A cut counts until the next tick, and who says nothing is waited for; none of these brings much that is new.
    let (mut stalled, mut cuts) = (Vec::new(), 0);
    for step in 0..8 {
        if step == 4 {
            (stalled, cuts) = (stalled_tabs(world), cut_for_the_budget(world));
        }
        world.elapsed += Duration::from_secs(1);
        tick(world)?;
    }
    let held = frame::live_bytes();
    let still = stalled_tabs(world);
    match stalled.into_iter().find(|tab| still.contains(tab)) {
        Some(tab) if held > world.bytes_budget && cut_for_the_budget(world) == cuts => {
            let text = format!("{held} of {} bytes are held, and tab {tab} is stalled", world.bytes_budget);
            Err(Violation::new("memory_is_bounded", text))
        }
        _ => Ok(()),
    }
}

fn cut_for_the_budget(world: &World) -> u64 {
    let shards = world.nodes.iter().flatten().flat_map(|node| &node.shards);
    shards.map(|shard| shard.metrics().ended_sessions.of(Disconnect::OverBudget).value()).sum()
}

/// Whoever could be cut for the memory that waits for it.
fn stalled_tabs(world: &World) -> Vec<usize> {
    let is_stalled = |tab: &usize| {
        let client = &world.clients[*tab];
        let Some(there) = world.nodes[client.node].as_ref().filter(|_| client.is_blocked && !client.is_gone) else {
            return false;
        };
        let address = client.address;
        world.oracle.tabs[*tab].is_listed && there.shards[usize::from(address.shard())].queued_for(address.slot()).0 > 0
    };
    (0..world.clients.len()).filter(is_stalled).collect()
}

/// Who is online is known on every node.
pub(crate) fn presence_is_right(world: &mut World) -> Checked {
    use futures_util::FutureExt;
    for node in world.live_nodes() {
        let engine = world.node(node).engine.clone();
        for user in 0..USERS {
            let is_there = world.oracle.tabs.iter().any(|tab| tab.user == user && tab.is_listed);
            let is_online = engine.is_online(&user_id(user)).now_or_never();
            if is_online != Some(is_there) {
                let text = format!("{:?} is online is {is_online:?} on node {node}", channel_id(user));
                return Err(Violation::new("presence_is_right_in_the_end", text));
            }
        }
    }
    Ok(())
}

/// Adds what a node counts.
pub(crate) fn count(counts: &mut Counts, node: &Node) {
    let metrics = node.engine.metrics();
    for (reason, sum) in Disconnect::ALL.into_iter().zip(&mut counts.ended) {
        *sum += metrics.shards().map(|shard| shard.ended_sessions.of(reason).value()).sum::<u64>();
    }
    counts.coalesced += metrics.sum(|shard| &shard.coalesced_frames);
    counts.dropped_typing += metrics.sum(|shard| &shard.dropped_typing_frames);
    counts.partial_writes += metrics.sum(|shard| &shard.partial_writes);
    counts.refused_forwards += metrics.engine.refused_forwards.value();
    counts.deflated += metrics.engine.deflates.frames.value();
}
