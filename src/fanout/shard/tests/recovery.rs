//! Tabs that come back: what they missed comes before anything live, whole, and once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::rig::{Got, Rig, edit, frames_of, message, typing};
use crate::fanout::hub::Hub;
use crate::fanout::session::Identity;
use crate::fanout::shard::{Opening, Outcome, Resume, Shard, Wire};
use crate::id::{ChannelId, MessageId, UserId};
use crate::proto::disconnect::Disconnect;
use crate::proto::event::{Event, Timestamp};
use crate::proto::frame::Frame;
use crate::proto::limits::{HubLimits, RecoveryLimits, SessionLimits};

fn said(text: &str) -> (MessageId, Frame) {
    let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(1));
    (id, Frame::encode(&Event::Message { id, text, sender: "star", reply_to: None, timestamp }))
}

/// A rig of two shards with a user who keeps one tab open, so that frames are kept.
fn rig() -> Rig {
    let mut rig = Rig::new(2);
    rig.tab(1, "u");
    rig
}

#[test]
fn what_was_missed_comes_before_anything_live_and_once() {
    let mut rig = rig();
    let (first, frame) = said("1");
    rig.publish("u", &frame);
    let lost = rig.tab(0, "u");
    rig.lose(lost);
    let (second, frame) = said("2");
    rig.publish("u", &frame);
    rig.publish("u", &edit(first, "1 edited"));
    rig.publish("u", &edit(second, "2 ed"));
    rig.publish("u", &typing(true, "u"));
    rig.publish("u", &edit(second, "2 edited"));
    // Posted before it comes back, fanned out after: this one is in what is replayed, and nowhere else.
    rig.post("u", &message("3"));
    let tab = rig.resumed(0, "u", Resume::After(vec![first]));
    rig.post("u", &message("4"));
    rig.turn();
    assert_eq!(rig.texts(tab), ["2", "1 edited", "2 edited", "3", "4"]);
}

#[test]
fn an_unknown_position_is_a_gap_and_nothing_else() {
    let mut rig = rig();
    rig.publish("u", &message("1"));
    for resume in [Resume::After(vec![MessageId::random()]), Resume::Unknown] {
        let tab = rig.resumed(0, "u", resume.clone());
        let kinds: Vec<_> = rig.got(tab).iter().map(|got| got.kind().to_owned()).collect();
        assert_eq!(kinds, ["gap"], "{resume:?}");
        rig.lose(tab);
    }
    let fresh = rig.resumed(0, "u", Resume::Fresh);
    assert!(rig.got(fresh).is_empty());
}

#[test]
fn of_several_ids_the_newest_that_is_known_is_the_position() {
    let mut rig = rig();
    let (first, frame) = said("1");
    rig.publish("u", &frame);
    rig.publish("u", &message("2"));
    let in_a_room = MessageId::random();
    let tab = rig.resumed(0, "u", Resume::After(vec![in_a_room, first]));
    assert_eq!(rig.texts(tab), ["2"]);
    let text = format!("{in_a_room},{first}");
    assert_eq!(Resume::from_position(Some(&text)), Resume::After(vec![in_a_room, first]));
    assert_eq!(Resume::from_position(Some(&[&*text; 9].join(","))), Resume::Unknown, "more than sixteen");
    assert_eq!(Resume::from_position(Some("")), Resume::Unknown);
    assert_eq!(Resume::from_position(None), Resume::Fresh);
}

#[test]
fn frames_that_nobody_was_there_for_are_kept_for_who_was() {
    let mut rig = Rig::new(1);
    rig.publish("stranger", &message("lost"));
    assert_eq!(rig.hub.recovery_bytes(), 0, "a stranger has no position");
    let tab = rig.tab(0, "u");
    let (first, frame) = said("1");
    rig.publish("u", &frame);
    rig.lose(tab);
    assert!(!rig.publish("u", &message("2")).is_delivered());
    let tab = rig.resumed(0, "u", Resume::After(vec![first]));
    assert_eq!(rig.texts(tab), ["2"]);
}

#[test]
fn age_lets_all_go_but_what_the_newest_position_needs() {
    let mut rig = rig();
    let (first, frame) = said("1");
    rig.publish("u", &frame);
    let (second, frame) = said("2");
    rig.publish("u", &frame);
    rig.wait(250);
    let old = rig.resumed(0, "u", Resume::After(vec![first]));
    assert_eq!(rig.texts(old), ["2"], "nothing behind the first was let go");
    let recent = rig.resumed(0, "u", Resume::After(vec![second]));
    assert!(rig.got(recent).is_empty(), "it has missed nothing");
    rig.wait(2 * 3_600);
    assert_eq!(rig.hub.recovery_bytes(), 0, "in the end everything goes");
}

#[test]
fn rooms_are_not_kept_and_a_tab_that_came_back_is_told_so() {
    let mut rig = rig();
    let (first, frame) = said("1");
    rig.publish("u", &frame);
    let tab = rig.resumed(0, "u", Resume::After(vec![first]));
    rig.say(tab, "join den");
    assert_eq!(rig.last(tab).kind(), "gap");
    rig.wait(11);
    rig.say(tab, "join other");
    let gaps = rig.got(tab).iter().filter(|got| got.kind() == "gap").count();
    assert_eq!(gaps, 1, "a room that it joins later is a new one");
}

/// One tab that comes and goes on a shard of its own: the texts that it has read behind `position`, in order.
fn come_and_go(hub: &Arc<Hub>, index: u16, mut position: MessageId, messages: usize) -> Vec<String> {
    let now = start();
    let mut shard = Shard::new(Arc::clone(hub), index, SessionLimits::default(), usize::MAX, now);
    let (mut texts, mut turns) = (Vec::new(), 0);
    while texts.len() < messages {
        assert!(now.elapsed() < Duration::from_secs(60), "it waits for what it will never get");
        let opening = Opening { resume: Resume::After(vec![position]), ..opening() };
        let slot = shard.open(opening, |_| None).unwrap().slot();
        shard.handle_writable(slot);
        // Another number of turns each time, so that it leaves at every point of what the others do.
        turns = turns % 17 + 1;
        for _ in 0..turns {
            while shard.handle_inbox(now) {}
            loop {
                let Some(transmit) = shard.poll_transmit() else { break };
                let bytes: Vec<u8> = transmit.slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                drop(transmit);
                shard.handle_written(slot, Outcome::Taken(bytes.len()));
                for got in frames_of(&bytes) {
                    let Got::Json(json) = &got else { panic!("{got:?}") };
                    assert_eq!(got.kind(), "message", "a gap, though nothing was let go");
                    position = MessageId::parse(json["id"].as_str().unwrap()).unwrap();
                    texts.extend(got.text().map(str::to_owned));
                }
            }
            std::thread::yield_now();
        }
        shard.handle_lost(slot, Disconnect::ConnectionLost);
        while shard.poll_disconnect().is_some() {}
    }
    texts
}

#[expect(clippy::disallowed_methods, reason = "an arbitrary start")]
fn start() -> Instant {
    Instant::now()
}

fn opening() -> Opening {
    Opening::new(Identity::new(UserId::parse("u").unwrap(), Timestamp::from_micros(1)), Wire::WebSocket)
}

#[test]
fn tabs_come_and_go_while_others_publish_and_nothing_is_missed_or_doubled() {
    const EACH: usize = 200;
    let recovery = RecoveryLimits { frames_max: 3 * EACH, bytes_max: 1 << 30, ..RecoveryLimits::default() };
    let hub = Hub::new(3, &HubLimits { recovery, ..HubLimits::default() }, &SessionLimits::default());
    let user = ChannelId::parse("u").unwrap();
    // Somebody is always there, and the tabs begin behind a first message.
    let mut home = Shard::new(Arc::clone(&hub), 2, SessionLimits::default(), usize::MAX, start());
    home.open(opening(), |_| None).unwrap();
    let (position, first) = said("first");
    hub.post(&user, &first).unwrap();
    let publish = |publisher: usize| {
        for n in 0..EACH {
            hub.post(&user, &message(&format!("{publisher}:{n}"))).unwrap();
            std::thread::yield_now();
        }
    };
    let tabs: Vec<Vec<String>> = std::thread::scope(|threads| {
        let tabs = [0, 1].map(|index| {
            let hub = &hub;
            threads.spawn(move || come_and_go(hub, index, position, 2 * EACH))
        });
        for publisher in 0..2 {
            let publish = &publish;
            threads.spawn(move || publish(publisher));
        }
        tabs.into_iter().map(|tab| tab.join().unwrap()).collect()
    });
    let kept = hub.history(&user);
    let kept = kept.iter().skip(1).map(|frame| serde_json::from_slice::<Value>(frame.json()).unwrap()["text"].clone());
    assert_eq!(kept.collect::<Vec<_>>(), tabs[0], "in the order in which they were posted");
    assert_eq!(tabs[0], tabs[1]);
}
