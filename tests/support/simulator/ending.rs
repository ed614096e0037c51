//! The end of a world: nobody is hostile any more, everything that had to come has come, everybody leaves, and nothing is left.

use std::time::Duration;

use tabcast::proto::sse;

use super::Violation;
use super::client::Pace;
use super::stepping::{
    self, end_of_input, handle_inbox, lose, make_writable, presence_is_right, say, settle, transmit,
};
use super::world::{Between, World};

type Checked = Result<(), Violation>;

/// Turns in which everything that is on its way arrives.
const TURNS_MAX: usize = 400;

pub(crate) fn finish(world: &mut World) -> Checked {
    world.trace.note("the hostility is over".to_owned());
    make_peace(world);
    come_to_rest(world)?;
    world.hand_on()?;
    come_to_rest(world)?;
    everybody_has_everything(world)?;
    let_presence_be_written(world)?;
    presence_is_right(world)?;
    everybody_leaves(world)?;
    everything_is_given_back(world)
}

fn make_peace(world: &mut World) {
    world.is_hostile = false;
    for client in &mut world.clients {
        (client.pace, client.room, client.breaks_after) = (Pace::Fast, usize::MAX, None);
    }
    if let Between::Network(network) = &world.between {
        network.come_back();
    }
}

/// Until nothing waits anywhere.
fn come_to_rest(world: &mut World) -> Checked {
    for _ in 0..TURNS_MAX {
        let mut is_quiet = true;
        for node in world.live_nodes() {
            if let Between::Network(network) = &world.between {
                network.send(node, &mut world.dice, false);
                let arrived = network.hear(node, &mut world.dice, false)?;
                world.note_arrived(node, arrived)?;
            }
            for shard in 0..world.settings.shards {
                while handle_inbox(world, node, shard)? {
                    transmit(world, node, shard, usize::MAX)?;
                }
                transmit(world, node, shard, usize::MAX)?;
            }
            let there = world.node(node);
            is_quiet &= there.engine.hub().waiting_posts() == 0 && !there.shards.iter().any(|shard| shard.has_work());
        }
        for tab in world.live_clients() {
            if world.clients[tab].is_blocked && !world.clients[tab].is_gone {
                make_writable(world, tab)?;
                is_quiet = false;
            }
            let count = world.clients[tab].outgoing.len();
            if count > 0 && !world.clients[tab].is_gone {
                say(world, tab, count)?;
                is_quiet = false;
            }
        }
        if let Between::Network(network) = &world.between {
            is_quiet &= network.is_quiet();
            network.answer();
        }
        world.advance_timers(Duration::from_millis(100));
        is_quiet &= world.go_on_returning()?;
        if is_quiet {
            return Ok(());
        }
    }
    Err(Violation::new("everything_comes_to_rest", "something goes on for ever".to_owned()))
}

/// Who is still there has all that was for them, in full.
fn everybody_has_everything(world: &mut World) -> Checked {
    for tab in 0..world.oracle.tabs.len() {
        let (book, client) = (&world.oracle.tabs[tab], &world.clients[tab]);
        if !book.is_listed {
            continue;
        }
        world.oracle.all_that_had_to_come_has_come(tab)?;
        let torn = client.reader.torn_bytes();
        if torn > 0 {
            return Err(Violation::new("no_frame_is_torn", format!("tab {tab} has {torn} bytes of a frame")));
        }
        if !book.asked.is_empty() && !client.is_malicious {
            let text = format!("tab {tab} was never answered {:?}", book.asked);
            return Err(Violation::new("whoever_asks_is_answered", text));
        }
    }
    world.oracle.whoever_was_kicked_is_gone()?;
    match &world.between {
        Between::Network(network) => world.oracle.nothing_is_owed_between_nodes(|what, to| network.has_lost(what, to)),
        Between::Memory(_) => Ok(()),
    }
}

/// Whoever left is taken out after three seconds, and whoever was expected and did not come after ten.
fn let_presence_be_written(world: &mut World) -> Checked {
    stepping::pass_time(world, Duration::from_secs(11))?;
    if let Between::Network(network) = &world.between {
        network.set_now(world.elapsed);
        network.write_presence();
    }
    Ok(())
}

fn everybody_leaves(world: &mut World) -> Checked {
    for node in world.live_nodes() {
        if world.dice.one_in(2) && !world.node(node).is_draining {
            let spread = Duration::from_millis(world.dice.between(0, 2_000) as u64);
            world.drain(node, spread);
        }
    }
    for tab in world.live_clients() {
        if world.node(world.clients[tab].node).is_draining || world.clients[tab].is_gone {
            continue;
        }
        match world.dice.below(3) {
            0 => lose(world, tab)?,
            1 if world.oracle.tabs[tab].wire.is_websocket() && !world.clients[tab].is_mute => {
                world.clients[tab].close(&mut world.dice);
                world.clients[tab].is_mute = true;
                world.oracle.tabs[tab].is_own_end = true;
            }
            _ => end_of_input(world, tab)?,
        }
    }
    for _ in 0..12 {
        come_to_rest(world)?;
        stepping::pass_time(world, Duration::from_secs(1))?;
    }
    come_to_rest(world)?;
    match world.live_clients().first() {
        Some(tab) => {
            let text = format!("tab {tab} is still there: {:?}", world.oracle.tabs[*tab].reasons);
            Err(Violation::new("everybody_leaves_in_the_end", text))
        }
        None => Ok(()),
    }
}

fn everything_is_given_back(world: &mut World) -> Checked {
    for node in world.live_nodes() {
        for shard in 0..world.settings.shards {
            handle_inbox(world, node, shard)?;
            settle(world, node, shard)?;
        }
        let opened = world.oracle.tabs.iter().filter(|tab| tab.node == node).count();
        let there = world.node(node);
        let ended: u64 = there.ended.iter().flatten().sum();
        let mut left = vec![("sessions that never ended", opened.abs_diff(usize::try_from(ended).unwrap()))];
        for shard in &mut there.shards {
            let _ = shard.park(std::task::Waker::noop());
            let (frames, bytes) = shard.queued();
            let metrics = shard.metrics();
            let gauges = [("posts in an inbox", &metrics.inbox_posts), ("bytes in an inbox", &metrics.inbox_bytes)];
            // A shard's own keep-alive stays.
            let rings = usize::try_from(metrics.queue_entry_bytes.value()).unwrap();
            left.push(("bytes of queues' rings", rings.saturating_sub(sse::KEEP_ALIVE.len())));
            left.extend(gauges.map(|(what, gauge)| (what, usize::try_from(gauge.value()).unwrap())));
            left.extend([("sessions", shard.session_count()), ("held frames", shard.held_frames())]);
            left.extend([("queued frames", frames), ("queued bytes", bytes)]);
        }
        let hub = there.engine.hub();
        left.extend([
            ("connections", hub.registry().total_connections()),
            ("users", hub.registry().user_count()),
            ("rooms", hub.room_count()),
            ("posts", hub.waiting_posts()),
            ("bytes of unfinished messages", hub.incomplete_bytes()),
        ]);
        if let Some((what, count)) = left.into_iter().find(|(_, count)| *count > 0) {
            let text = format!("node {node} has {count} {what} when everybody is gone");
            return Err(Violation::new("everything_is_given_back", text));
        }
    }
    let_presence_be_written(world)?;
    presence_is_right(world)
}
