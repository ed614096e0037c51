//! Rooms: joining, leaving, and what is left of a membership when its session ends.

use std::time::Duration;

use super::endings::drain;
use super::rig::{CLOSE, Got, Rig, client_frame, close, edit, message};
use crate::id::{ChannelId, MessageId};
use crate::proto::delivery::Nobody;
use crate::proto::disconnect::Disconnect;
use crate::proto::limits::SessionLimits;

#[test]
fn a_room_reaches_who_joined_it_and_nobody_else() {
    let mut rig = Rig::new(2);
    let (a, b, c) = (rig.tab(0, "a"), rig.tab(1, "b"), rig.tab(1, "c"));
    rig.say(a, "join r");
    rig.say(b, "join r");
    rig.say(b, "join r");
    rig.say(c, "join other");
    assert_eq!(rig.publish("room:r", &message("to r")).tabs, 2);
    assert_eq!(rig.publish("room:other", &message("to other")).tabs, 1);
    assert_eq!(rig.texts(a), ["to r"]);
    assert_eq!(rig.texts(b), ["to r"], "joining twice is joining once");
    assert_eq!(rig.texts(c), ["to other"]);
    rig.say(b, "leave r");
    rig.say(b, "leave r");
    rig.say(c, "leave r");
    assert_eq!(rig.publish("room:r", &message("again")).tabs, 1);
    assert_eq!(rig.texts(b), ["to r"]);
    rig.say(a, "leave r");
    assert_eq!(rig.publish("room:r", &message("nobody")).nobody, Some(Nobody::EmptyRoom));
    assert_eq!(rig.hub.room_count(), 1);
}

#[test]
fn whoever_is_in_a_room_is_told_once_that_something_may_be_missing() {
    let mut rig = Rig::new(2);
    let (a, b, c) = (rig.tab(0, "a"), rig.tab(1, "b"), rig.tab(1, "c"));
    for room in ["r", "s"] {
        rig.say(a, &format!("join {room}"));
        rig.say(b, &format!("join {room}"));
    }
    rig.say(b, "leave s");
    // Two nodes were not heard at once.
    rig.hub.tell_rooms_of_gap();
    rig.hub.tell_rooms_of_gap();
    rig.publish("room:r", &message("after"));
    for tab in [a, b] {
        let got = rig.got(tab);
        let [.., Got::Json(gap), after] = &got[..] else { panic!("{got:?}") };
        assert_eq!((gap["type"].as_str(), gap["reason"].as_str()), (Some("gap"), Some("room_not_kept")));
        assert_eq!(after.text(), Some("after"));
        assert_eq!(got.iter().filter(|got| got.kind() == "gap").count(), 1);
    }
    assert_eq!(rig.got(c), []);
    rig.hub.tell_rooms_of_gap();
    rig.turn();
    assert_eq!(rig.got(a).iter().filter(|got| got.kind() == "gap").count(), 2, "what is lost later is told anew");
}

#[test]
fn a_join_is_acked_when_broadcasts_reach_the_tab() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.say(tab, "join r");
    assert_eq!(rig.last(tab).kind(), "ack");
    assert_eq!(rig.publish("room:r", &message("x")).tabs, 1);
    assert_eq!(rig.texts(tab), ["x"]);
}

#[test]
fn a_tab_is_in_at_most_as_many_rooms_as_allowed() {
    let limits = SessionLimits { rooms_max: 2, ..SessionLimits::default() };
    let mut rig = Rig::with(1, limits, usize::MAX);
    let tab = rig.tab(0, "u");
    for room in ["a", "b", "c", "a"] {
        rig.say(tab, &format!("join {room}"));
    }
    let kinds: Vec<_> = rig.got(tab).iter().map(|got| got.kind().to_owned()).collect();
    assert_eq!(kinds, ["ack", "ack", "error", "ack"]);
    assert_eq!(rig.publish("room:c", &message("x")).tabs, 0);
    rig.say(tab, "leave a");
    rig.say(tab, "join c");
    let (shard, slot) = rig.shard_of(tab);
    let rooms: Vec<_> = shard.rooms_of(slot).iter().map(ToString::to_string).collect();
    assert_eq!(rooms, ["b", "c"]);
}

#[test]
fn whoever_is_moved_by_anothers_leaving_stays_a_member() {
    let mut rig = Rig::new(1);
    let tabs: Vec<_> = (0..5).map(|n| rig.tab(0, &format!("u{n}"))).collect();
    for room in ["r", "s"] {
        tabs.iter().for_each(|tab| rig.say(*tab, &format!("join {room}")));
    }
    // The first leaves, so the last moves into its place; then the moved one, then one by its end, then the rest.
    rig.say(tabs[0], "leave r");
    assert_eq!(rig.publish("room:r", &message("four")).tabs, 4);
    rig.say(tabs[4], "leave r");
    assert_eq!(rig.publish("room:r", &message("three")).tabs, 3);
    rig.lose(tabs[1]);
    assert_eq!(rig.publish("room:r", &message("two")).tabs, 2);
    assert_eq!(rig.publish("room:s", &message("four in s")).tabs, 4);
    assert_eq!(rig.texts(tabs[0]), ["four in s"]);
    assert_eq!(rig.texts(tabs[4]), ["four", "four in s"]);
    assert_eq!(rig.texts(tabs[3]), ["four", "three", "two", "four in s"]);
}

#[test]
fn members_that_are_cut_by_a_broadcast_do_not_disturb_it() {
    let mut rig = Rig::with_queues(1, 1, usize::MAX);
    let tabs: Vec<_> = (0..9).map(|n| rig.tab(0, &format!("u{n}"))).collect();
    tabs.iter().for_each(|tab| rig.say(*tab, "join r"));
    let slow = [0, 1, 4, 7, 8].map(|n| tabs[n]);
    slow.iter().for_each(|tab| rig.stall(*tab, 0));
    rig.publish("room:r", &message("one"));
    rig.publish("room:r", &message("two"));
    assert_eq!(rig.ended(Disconnect::SlowConsumer), 5);
    assert_eq!(rig.publish("room:r", &message("three")).tabs, 4);
    for tab in tabs {
        let expected: &[&str] = if slow.contains(&tab) { &[] } else { &["one", "two", "three"] };
        assert_eq!(rig.texts(tab), expected);
    }
}

#[test]
fn a_session_that_ends_leaves_its_rooms_however_it_ends() {
    let mut rig = Rig::new(1);
    let tabs: Vec<_> = (0..4).map(|n| rig.tab(0, &format!("u{n}"))).collect();
    for room in ["r", "s", "t"] {
        tabs.iter().for_each(|tab| rig.say(*tab, &format!("join {room}")));
    }
    rig.post("room:r", &message("under way"));
    rig.lose(tabs[0]);
    rig.receive(tabs[1], &client_frame(CLOSE, &[]));
    let (shard, slot) = rig.shard_of(tabs[2]);
    shard.end(slot, Disconnect::Kicked);
    rig.receive(tabs[3], &[0xff, 0xff]);
    assert_eq!(rig.hub.room_count(), 0);
    rig.turn();
    assert!(tabs.iter().all(|tab| rig.texts(*tab).is_empty()), "who left gets nothing");
}

#[test]
fn a_post_to_a_room_that_was_emptied_and_joined_again_reaches_nobody_new() {
    let mut rig = Rig::new(1);
    let (old, new) = (rig.tab(0, "old"), rig.tab(0, "new"));
    rig.say(old, "join r");
    rig.post("room:r", &message("for the old room"));
    rig.say(old, "leave r");
    rig.say(new, "join r");
    rig.turn();
    assert_eq!((rig.texts(old).len(), rig.texts(new).len()), (0, 0));
    rig.publish("room:r", &message("for the new room"));
    assert_eq!(rig.texts(new), ["for the new room"]);
}

#[test]
fn frames_that_are_posted_behind_each_other_reach_each_member_by_its_own_rules() {
    let mut rig = Rig::with_queues(1, 100, usize::MAX);
    let (fast, slow, other) = (rig.tab(0, "fast"), rig.tab(0, "slow"), rig.tab(0, "other"));
    [fast, slow, other].iter().for_each(|tab| rig.say(*tab, "join r"));
    let id = MessageId::random();
    rig.stall(slow, 30);
    rig.post("room:r", &message("0"));
    rig.turn();
    for n in 1..=70 {
        rig.post("room:r", &message(&n.to_string()));
    }
    rig.post("room:r", &edit(id, "first"));
    rig.post("other", &message("in between"));
    rig.post("room:r", &edit(id, "second"));
    rig.turn();
    let numbers: Vec<_> = (0..=70).map(|n| n.to_string()).collect();
    let expected = |rest: &[&str]| [&numbers[..], &rest.iter().map(ToString::to_string).collect::<Vec<_>>()].concat();
    assert_eq!(rig.texts(fast), expected(&["second"]), "edits are coalesced, and nothing else");
    assert_eq!(rig.texts(other), expected(&["second", "in between"]));
    for n in 0..30 {
        rig.post("room:r", &message(&n.to_string()));
    }
    rig.turn();
    assert_eq!(rig.ended(Disconnect::SlowConsumer), 1, "the one that is behind is cut in the middle of a run");
    rig.check_gauges();
    rig.writable(slow, usize::MAX);
    assert_eq!(rig.texts(slow), ["0"]);
    assert_eq!(rig.texts(fast).len(), 72 + 30);
}

#[test]
fn every_tab_is_told_once_that_frames_to_users_were_lost_and_nothing_is_replayed_past_them() {
    let mut rig = Rig::new(2);
    let (a, b, stalled) = (rig.tab(0, "a"), rig.tab(1, "b"), rig.tab(1, "b"));
    let first = message("before");
    rig.publish("a", &first);
    rig.stall(stalled, 0);
    rig.hub.tell_users_of_gap();
    rig.hub.tell_users_of_gap();
    rig.post("a", &message("after"));
    rig.post("b", &message("after"));
    rig.turn();
    rig.writable(stalled, usize::MAX);
    for tab in [a, b, stalled] {
        let got = rig.got(tab);
        let [.., Got::Json(gap), after] = &got[..] else { panic!("{got:?}") };
        assert_eq!((gap["type"].as_str(), gap["reason"].as_str()), (Some("gap"), Some("lost_between_nodes")));
        assert_eq!(after.text(), Some("after"));
        assert_eq!(got.iter().filter(|got| got.kind() == "gap").count(), 1);
    }
    assert!(rig.hub.history(&ChannelId::parse("a").unwrap()).iter().all(|frame| frame.json() != first.json()));
    rig.hub.tell_users_of_gap();
    rig.turn();
    assert_eq!(rig.got(a).iter().filter(|got| got.kind() == "gap").count(), 2, "what is lost later is told anew");
}

fn gaps(rig: &Rig, tab: usize) -> usize {
    rig.got(tab).iter().filter(|got| got.kind() == "gap").count()
}

#[test]
fn only_the_tabs_of_the_channel_are_told_what_found_no_room_here_and_only_its_past_is_let_go() {
    let mut rig = Rig::new(2);
    let (a, b, c, d) = (rig.tab(0, "a"), rig.tab(1, "a"), rig.tab(1, "b"), rig.tab(0, "b"));
    let channel = |name| ChannelId::parse(name).unwrap();
    rig.say(c, "join r");
    rig.say(a, "join s");
    for user in ["a", "b"] {
        rig.publish(user, &message("before"));
    }
    for _ in 0..2 {
        rig.hub.tell_channel_of_gap(&channel("a"));
    }
    rig.post("a", &message("after"));
    rig.turn();
    assert_eq!([a, b, c, d].map(|tab| gaps(&rig, tab)), [1, 1, 0, 0]);
    for tab in [a, b] {
        let got = rig.got(tab);
        let [.., Got::Json(gap), after] = &got[..] else { panic!("{got:?}") };
        assert_eq!((gap["reason"].as_str(), after.text()), (Some("lost_between_nodes"), Some("after")));
    }
    assert_eq!(["a", "b"].map(|user| rig.hub.history(&channel(user)).len()), [1, 1], "what came after, and all");
    rig.hub.tell_channel_of_gap(&channel("room:r"));
    rig.hub.tell_channel_of_gap(&channel("nobody"));
    rig.hub.tell_channel_of_gap(&channel("room:nowhere"));
    rig.turn();
    assert_eq!([a, b, c, d].map(|tab| gaps(&rig, tab)), [1, 1, 1, 0]);
    let last = rig.last(c);
    let Got::Json(gap) = &last else { panic!("{last:?}") };
    assert_eq!(gap["reason"].as_str(), Some("room_not_kept"));
    assert_eq!(rig.hub.history(&channel("b")).len(), 1);
}

#[test]
fn whoever_a_drain_is_about_to_close_is_told_what_was_lost_before_as_well() {
    let mut rig = Rig::new(1);
    let (a, b) = (rig.tab(0, "a"), rig.tab(0, "b"));
    rig.say(a, "join r");
    rig.hub.drain(drain(0));
    for lost in ["a", "room:r", "room:nowhere"] {
        rig.hub.tell_channel_of_gap(&ChannelId::parse(lost).unwrap());
    }
    // With the first of these posts nobody finds them any more.
    rig.turn();
    rig.jump(Duration::from_millis(50));
    rig.turn();
    let reasons = |tab| {
        let got = rig.got(tab);
        let reasons =
            got.iter().filter_map(|got| if let Got::Json(json) = got { json["reason"].as_str() } else { None });
        reasons.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        (reasons(a), reasons(b)),
        (vec!["lost_between_nodes".to_owned(), "room_not_kept".to_owned()], Vec::new())
    );
    assert_eq!([a, b].map(|tab| rig.last(tab)), [(); 2].map(|()| close(Disconnect::ServiceRestart)));
}

#[test]
fn past_a_bound_of_users_every_tab_of_the_shard_is_told_once() {
    let mut rig = Rig::new(2);
    let tabs: Vec<_> = (0..100).map(|n| rig.tab(0, &format!("u{n}"))).collect();
    let (other, elsewhere) = (rig.tab(0, "other"), rig.tab(1, "elsewhere"));
    for n in 0..100 {
        rig.hub.tell_channel_of_gap(&ChannelId::parse(&format!("u{n}")).unwrap());
    }
    rig.turn();
    assert!(tabs.iter().all(|tab| gaps(&rig, *tab) == 1));
    assert_eq!((gaps(&rig, other), gaps(&rig, elsewhere)), (1, 0));
}

#[test]
fn a_storm_of_losses_fills_no_queue() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "a");
    rig.stall(tab, 0);
    rig.publish("a", &message("before"));
    for _ in 0..1_000 {
        rig.hub.tell_users_of_gap();
        rig.turn();
    }
    assert!(rig.is_open(tab), "it is told once of what it has not heard");
    rig.publish("a", &message("between"));
    rig.hub.tell_users_of_gap();
    rig.publish("a", &message("after"));
    rig.writable(tab, usize::MAX);
    let got = rig.got(tab);
    let shape: Vec<_> = got.iter().map(|got| got.text().unwrap_or(got.kind())).collect();
    assert_eq!(shape, ["before", "gap", "between", "gap", "after"]);
}
