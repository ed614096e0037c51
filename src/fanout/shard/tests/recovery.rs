//! Tabs that come back: what they missed comes before anything live, whole, and once.

use super::rig::{Rig, edit, message, typing};
use crate::fanout::shard::Resume;
use crate::id::MessageId;
use crate::proto::event::{Event, Timestamp};
use crate::proto::frame::Frame;

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
