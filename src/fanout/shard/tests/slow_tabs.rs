//! What a tab gets that is behind.

use super::rig::{CLOSE, Got, PING, Rig, client_frame, close, edit, message, typing};
use crate::fanout::hub::NOBODY;
use crate::fanout::shard::Wire;
use crate::id::MessageId;
use crate::proto::disconnect::Disconnect;
use crate::proto::event::Notice;
use crate::proto::frame::Frame;
use crate::proto::limits::SessionLimits;

const FRAMES: usize = 4;

fn small() -> Rig {
    Rig::with_queues(1, FRAMES, 100_000)
}

#[test]
fn an_ordered_frame_too_many_cuts_the_tab_with_4008_and_drops_what_was_queued() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    rig.stall(tab, 0);
    for n in 0..FRAMES {
        rig.publish("u", &message(&n.to_string()));
        assert!(rig.is_open(tab));
    }
    rig.publish("u", &message("one too many"));
    assert!(!rig.is_open(tab));
    assert_eq!(rig.ended(Disconnect::SlowConsumer), 1);
    assert_eq!(rig.hub.registry().total_connections(), 0, "it is not addressed any more");
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.got(tab), [close(Disconnect::SlowConsumer)]);
    assert!(rig.tabs[tab].fin && !rig.tabs[tab].gone);
    rig.receive(tab, &client_frame(CLOSE, &[]));
    assert!(rig.tabs[tab].gone);
}

#[test]
fn a_partly_written_frame_is_finished_before_the_close() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    rig.stall(tab, 20);
    for n in 0..=FRAMES {
        rig.publish("u", &message(&n.to_string()));
    }
    assert_eq!((rig.is_open(tab), rig.tabs[tab].received.len()), (false, 20));
    rig.check_gauges();
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.got(tab)[0].text(), Some("0"));
    assert_eq!(rig.got(tab)[1..], [close(Disconnect::SlowConsumer)]);
}

#[test]
fn a_cut_tab_has_its_close_timeout_and_not_more() {
    let mut rig = small();
    let (silent, deaf) = (rig.tab(0, "u"), rig.tab(0, "u"));
    rig.stall(silent, 0);
    rig.stall(deaf, 0);
    for n in 0..=FRAMES {
        rig.publish("u", &message(&n.to_string()));
    }
    rig.writable(silent, usize::MAX);
    rig.wait(4);
    assert!(!rig.tabs[silent].gone && !rig.tabs[deaf].gone);
    rig.wait(2);
    assert!(rig.tabs[silent].gone && rig.tabs[deaf].gone);
    assert_eq!(rig.got(deaf), []);
}

#[test]
fn bytes_have_a_bound_of_their_own() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    rig.stall(tab, 0);
    for _ in 0..2 {
        rig.publish("u", &message(&"x".repeat(60_000)));
        assert!(rig.is_open(tab));
    }
    rig.publish("u", &message(&"x".repeat(60_000)));
    assert!(!rig.is_open(tab), "120,000 bytes behind the first are more than the queue's 100,000");
}

#[test]
fn a_frame_that_is_larger_than_the_queue_takes_no_room_from_those_behind_it() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    rig.stall(tab, 50_000);
    rig.publish("u", &message(&"x".repeat(1 << 20)));
    for text in ["a", "b"] {
        rig.publish("u", &message(text));
    }
    rig.publish("u", &edit(MessageId::random(), "c"));
    assert!(rig.is_open(tab), "a tab that is busy with a large file is not cut by the next word");
    rig.publish("u", &message(&"x".repeat(100_000)));
    assert!(!rig.is_open(tab));
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.texts(tab).len(), 1);
    assert_eq!(rig.last(tab), close(Disconnect::SlowConsumer));
}

#[test]
fn an_empty_queue_admits_any_legal_frame() {
    let mut rig = Rig::with_queues(1, 0, 0);
    let tab = rig.tab(0, "u");
    rig.publish("u", &message(&"x".repeat(1 << 20)));
    rig.publish("u", &message("and the next"));
    assert_eq!(rig.texts(tab).len(), 2);
    rig.stall(tab, 100_000);
    rig.publish("u", &message(&"x".repeat(1 << 20)));
    assert!(rig.is_open(tab));
}

#[test]
fn the_newest_edit_replaces_the_queued_one_in_its_place_also_when_the_queue_is_not_full() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    let (one, two) = (MessageId::random(), MessageId::random());
    rig.post("u", &edit(one, "a"));
    rig.post("u", &message("between"));
    rig.post("u", &edit(two, "x"));
    rig.post("u", &edit(one, "a, and more"));
    rig.turn();
    assert_eq!(rig.texts(tab), ["a, and more", "between", "x"]);
    assert_eq!(rig.hub.metrics().sum(|shard| &shard.coalesced_frames), 1);
}

#[test]
fn an_edit_never_gets_in_front_of_its_message_by_one_that_came_early() {
    for between in [0, 3] {
        let mut rig = Rig::new(1);
        let tab = rig.tab(0, "u");
        let said = message("said");
        let id = said.message_id().unwrap();
        // Another node's edit overtook the message on its way here.
        rig.post("u", &edit(id, "early"));
        for _ in 0..between {
            rig.post("u", &message("between"));
        }
        rig.post("u", &said);
        rig.post("u", &edit(id, "late"));
        rig.post("u", &edit(id, "last"));
        rig.turn();
        let texts = rig.texts(tab);
        assert_eq!(
            (texts[0].as_str(), &texts[texts.len() - 2..]),
            ("early", &["said".to_owned(), "last".to_owned()][..])
        );
    }
}

#[test]
fn coalescing_is_each_tabs_own_matter() {
    let mut rig = small();
    let (fast, slow) = (rig.tab(0, "u"), rig.tab(0, "u"));
    let id = MessageId::random();
    rig.stall(slow, 0);
    for text in ["a", "ab", "abc"] {
        rig.publish("u", &edit(id, text));
    }
    rig.writable(slow, usize::MAX);
    assert_eq!(rig.texts(fast), ["a", "ab", "abc"]);
    assert_eq!(rig.texts(slow), ["abc"]);
}

#[test]
fn a_partly_written_edit_is_never_replaced() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    let id = MessageId::random();
    rig.stall(tab, 1);
    for text in ["a", "ab", "abc"] {
        rig.publish("u", &edit(id, text));
    }
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.texts(tab), ["a", "abc"]);
}

#[test]
fn a_full_queue_replaces_an_edit_and_is_cut_by_one_that_replaces_nothing() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    let id = MessageId::random();
    rig.stall(tab, 0);
    rig.publish("u", &edit(id, "a"));
    for n in 1..FRAMES {
        rig.publish("u", &message(&n.to_string()));
    }
    rig.publish("u", &edit(id, "ab"));
    assert!(rig.is_open(tab));
    rig.publish("u", &edit(MessageId::random(), "x"));
    assert!(!rig.is_open(tab));
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.got(tab), [close(Disconnect::SlowConsumer)]);
}

#[test]
fn edits_that_grow_in_their_place_stay_within_the_queues_bytes() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    let ids = [MessageId::random(), MessageId::random(), MessageId::random()];
    rig.stall(tab, 0);
    for id in ids {
        rig.publish("u", &edit(id, "short"));
    }
    for id in &ids[..2] {
        rig.publish("u", &edit(*id, &"x".repeat(60_000)));
        assert!(rig.is_open(tab));
    }
    rig.publish("u", &edit(ids[2], &"x".repeat(60_000)));
    assert!(!rig.is_open(tab), "an edit that finds no room acts as ordered");
    rig.check_gauges();
}

#[test]
fn a_lone_edit_may_be_replaced_by_any_legal_one() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    let id = MessageId::random();
    rig.stall(tab, 0);
    rig.publish("u", &edit(id, "short"));
    rig.publish("u", &edit(id, &"x".repeat(1 << 20)));
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.texts(tab)[0].len(), 1 << 20);
}

#[test]
fn typing_is_replaced_by_channel_and_never_by_an_edit() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    rig.stall(tab, 0);
    rig.say(tab, "join r");
    rig.publish("u", &typing(true, "u"));
    rig.publish("u", &typing(true, "room:r"));
    rig.publish("u", &typing(false, "u"));
    rig.writable(tab, usize::MAX);
    let signs = rig.got(tab).into_iter().filter(|got| got.kind() == "typing");
    let active = signs.map(|got| if let Got::Json(json) = got { json["active"] == true } else { false });
    assert_eq!(active.collect::<Vec<_>>(), [false, true]);
}

#[test]
fn typing_that_finds_no_room_is_dropped_and_counted() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    rig.stall(tab, 0);
    for n in 0..FRAMES {
        rig.publish("u", &message(&n.to_string()));
    }
    rig.publish("u", &typing(true, "u"));
    assert!(rig.is_open(tab));
    assert_eq!(rig.hub.metrics().sum(|shard| &shard.dropped_typing_frames), 1);
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.texts(tab), ["0", "1", "2", "3"]);
}

#[test]
fn the_end_of_typing_replaces_its_beginning_also_when_bytes_are_full() {
    let sign = typing(true, "u").websocket().len();
    let text = message("x").websocket().len();
    let mut rig = Rig::with_queues(1, FRAMES, sign + text);
    let tab = rig.tab(0, "u");
    rig.stall(tab, 0);
    rig.publish("u", &message("x"));
    rig.publish("u", &typing(true, "u"));
    rig.publish("u", &typing(false, "u"));
    rig.writable(tab, usize::MAX);
    let Got::Json(json) = rig.last(tab) else { panic!("typing") };
    assert_eq!(json["active"], false);
}

#[test]
fn control_frames_fit_beyond_a_full_queue() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    rig.stall(tab, 0);
    for n in 0..FRAMES {
        rig.publish("u", &message(&n.to_string()));
    }
    let gap = Notice::Gap { reason: crate::proto::event::GapReason::RoomNotKept, count: Some(1) };
    rig.hub.post_to_session(rig.tabs[tab].address, &Frame::notice(&gap)).unwrap();
    rig.turn();
    rig.receive(tab, &client_frame(PING, b"are you there"));
    rig.wait(26);
    assert!(rig.is_open(tab));
    rig.writable(tab, usize::MAX);
    let got = rig.got(tab);
    assert_eq!(got.len(), FRAMES + 3);
    assert_eq!(got[FRAMES].kind(), "gap");
    assert_eq!(got[FRAMES + 1..], [Got::Pong(b"are you there".to_vec()), Got::Ping]);
}

#[test]
fn a_tab_that_makes_us_queue_control_frames_without_end_is_cut() {
    let mut rig = small();
    let tab = rig.tab(0, "u");
    rig.stall(tab, 3);
    let mut pings = 0;
    while rig.is_open(tab) {
        rig.receive(tab, &client_frame(PING, b"x"));
        pings += 1;
        assert!(pings < 100, "the queue has a bound");
    }
    assert_eq!(rig.ended(Disconnect::SlowConsumer), 1);
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.last(tab), close(Disconnect::SlowConsumer));
}

#[test]
fn a_stalled_tab_gets_no_write_and_holds_nobody_up() {
    let mut rig = Rig::new(1);
    let (stalled, other) = (rig.tab(0, "u"), rig.tab(0, "u"));
    let reader = rig.reader(0, "u");
    rig.stall(stalled, 50);
    for n in 0..100 {
        rig.publish("u", &message(&n.to_string()));
    }
    assert_eq!(rig.tabs[stalled].writes, 1, "one that was cut short, and none after it");
    for tab in [other, reader] {
        assert_eq!((rig.texts(tab).len(), rig.tabs[tab].writes), (100, 100));
    }
    rig.writable(stalled, 7);
    assert_eq!(rig.tabs[stalled].writes, 2);
    rig.writable(stalled, usize::MAX);
    assert_eq!(rig.texts(stalled).len(), 100);
    assert_eq!(rig.tabs[stalled].writes, 3, "all that waited left in one write");
}

#[test]
fn bytes_taken_one_at_a_time_make_the_same_stream() {
    let mut rig = Rig::new(1);
    let (tab, reader) = (rig.tab(0, "u"), rig.reader(0, "u"));
    for tab in [tab, reader] {
        rig.stall(tab, 0);
    }
    for text in ["a".to_owned(), "b".repeat(3000), "c\u{2028}".to_owned()] {
        rig.publish("u", &message(&text));
    }
    for tab in [tab, reader] {
        for step in (1..8).cycle() {
            rig.writable(tab, step);
            rig.check_gauges();
            if !rig.tabs[tab].blocked {
                break;
            }
        }
        assert_eq!(rig.texts(tab), ["a".to_owned(), "b".repeat(3000), "c\u{2028}".to_owned()]);
        assert_eq!(rig.torn_bytes(tab), 0);
    }
}

#[test]
fn a_reader_of_events_that_is_too_slow_gets_the_end_of_its_response() {
    let mut rig = small();
    let reader = rig.reader(0, "u");
    rig.stall(reader, 40);
    for n in 0..=FRAMES {
        rig.publish("u", &message(&n.to_string()));
    }
    assert_eq!(rig.ended(Disconnect::SlowConsumer), 1);
    rig.writable(reader, usize::MAX);
    assert_eq!(rig.got(reader).len(), 2);
    assert_eq!(rig.last(reader), Got::LastChunk);
    assert!(rig.tabs[reader].gone, "there is nothing to wait for");
}

#[test]
fn a_burst_does_not_make_a_slow_tab_of_one_that_reads() {
    let mut rig = Rig::with_queues(2, 8, 4_096);
    let tabs = [rig.tab(0, "u"), rig.tab(1, "u"), rig.tab(0, "u")];
    let reader = rig.reader(0, "u");
    tabs.iter().for_each(|tab| rig.say(*tab, "join r"));
    for number in 0..1_500 {
        rig.post("u", &message(&format!("{number}")));
        rig.post("room:r", &message(&format!("room {number} {}", "x".repeat(number % 700))));
    }
    rig.turn();
    for tab in tabs {
        assert!(rig.is_open(tab));
        assert_eq!(rig.texts(tab).len(), 3_000);
    }
    assert_eq!(rig.texts(reader).len(), 1_500);
    assert_eq!(rig.ended(Disconnect::SlowConsumer), 0);
}

#[test]
fn a_flood_of_pings_has_a_bound_also_before_anything_is_written() {
    let mut rig = Rig::with_queues(1, 8, 4_096);
    let tab = rig.tab(0, "u");
    let flood = client_frame(PING, &[]).repeat(300);
    rig.receive(tab, &flood);
    assert!(!rig.is_open(tab));
    assert_eq!(rig.ended(Disconnect::SlowConsumer), 1);
}

#[test]
fn past_the_byte_budget_the_fattest_queues_are_cut_first_a_few_a_turn() {
    // No budget at all, so that what other tests hold makes no difference.
    let mut rig = Rig::with(1, SessionLimits::default(), 0);
    let stalled: Vec<_> = (0..12).map(|n| rig.tab(0, &format!("u{n}"))).collect();
    let quick = rig.tab(0, "quick");
    stalled.iter().for_each(|tab| rig.stall(*tab, 0));
    for (n, tab) in stalled.iter().enumerate() {
        // Queues of 4,000 to 7,850 bytes: one size class. They are filled without a turn of the shard's budget.
        let (shard, slot) = rig.shard_of(*tab);
        shard.send(slot, message(&"x".repeat(4_000 + 350 * n)));
    }
    rig.flush();
    while stalled.iter().any(|tab| rig.is_open(*tab)) {
        let before = stalled.iter().filter(|tab| rig.is_open(**tab)).count();
        rig.wait(1);
        let left = stalled.iter().filter(|tab| rig.is_open(**tab)).count();
        assert!((1..=8).contains(&(before - left)), "{before} before, {left} left");
        assert!(stalled[..left].iter().all(|tab| rig.is_open(*tab)), "the fattest went first");
    }
    assert!(rig.is_open(quick), "a tab that keeps up is not to blame");
    assert_eq!(rig.ended(Disconnect::OverBudget), 12);
    rig.writable(stalled[11], usize::MAX);
    assert_eq!(rig.got(stalled[11]), [close(Disconnect::OverBudget)]);
}

/// A tab on each of two shards: both do not read, and for the first far more waits.
fn fat_and_thin() -> (Rig, usize, usize) {
    // No budget at all, as above.
    let mut rig = Rig::with(2, SessionLimits::default(), 0);
    let (fat, thin) = (rig.tab(0, "fat"), rig.tab(1, "thin"));
    for (tab, bytes) in [(fat, 100_000), (thin, 10)] {
        rig.stall(tab, 0);
        let (shard, slot) = rig.shard_of(tab);
        shard.send(slot, message(&"x".repeat(bytes)));
    }
    rig.flush();
    (rig, fat, thin)
}

#[test]
fn past_the_byte_budget_the_fattest_queues_are_cut_first_whichever_shard_they_are_on() {
    let (mut rig, fat, thin) = fat_and_thin();
    // It is the shard of the thin one that has something to do, and sees first how much is held.
    rig.post("thin", &message("one more"));
    let now = rig.now();
    for (turn, (tab, is_fat_open)) in [(thin, true), (fat, true), (thin, true), (fat, false)].iter().enumerate() {
        assert!(rig.shard_of(*tab).0.handle_inbox(now), "turn {turn}: nobody waits for a tick");
        assert_eq!((rig.is_open(fat), rig.is_open(thin)), (*is_fat_open, true), "turn {turn}");
    }
    // There is no budget to come back to: now it is the fattest.
    rig.turn();
    rig.wait(3);
    assert_eq!((rig.is_open(thin), rig.ended(Disconnect::OverBudget)), (false, 2));
}

#[test]
fn a_shard_that_says_nothing_is_not_waited_for_long() {
    let (mut rig, fat, thin) = fat_and_thin();
    let start = rig.now();
    // It asks at the first, and looks again before and after a second.
    for millis in [1_000, 1_999, 2_000] {
        let shard = &mut rig.shards[1];
        shard.handle_tick(start + std::time::Duration::from_millis(millis));
        assert_eq!(rig.is_open(thin), millis < 2_000, "after {millis} ms");
    }
    assert!(rig.is_open(fat), "its shard has not been called");
}

/// What it told before counts until it tells anew.
#[test]
fn a_fat_shard_that_a_third_one_asks_again_is_not_forgotten() {
    let mut rig = Rig::with(3, SessionLimits::default(), 0);
    let tabs: Vec<_> = (0..3).map(|shard| rig.tab(shard, &format!("u{shard}"))).collect();
    for tab in &tabs {
        rig.stall(*tab, 0);
        let (shard, slot) = rig.shard_of(*tab);
        shard.send(slot, message("x"));
    }
    rig.flush();
    let start = rig.now();
    let tick = |rig: &mut Rig, shard: usize, millis: u64| {
        rig.shards[shard].handle_tick(start + std::time::Duration::from_millis(millis));
    };
    rig.shards[1].handle_tick(start);
    rig.hub.note_class(0, 17);
    rig.hub.note_class(2, NOBODY);
    tick(&mut rig, 1, 1_000);
    assert!(rig.is_open(tabs[1]), "the others have told, and one of them of a fatter one");
    tick(&mut rig, 2, 1_200);
    tick(&mut rig, 1, 1_300);
    assert!(rig.is_open(tabs[1]), "another one has asked the fat shard just now");
    assert!(rig.is_open(tabs[2]));
}

/// The class that a shard has told shows whether it has looked at its sessions again.
#[test]
fn a_shard_that_may_not_cut_does_not_look_at_all_its_sessions_in_every_turn() {
    let (mut rig, fat, thin) = fat_and_thin();
    let told = |rig: &Rig| rig.hub.classes_elsewhere(0, rig.now()).top;
    rig.post("thin", &message("one more"));
    let now = rig.now();
    rig.shard_of(thin).0.handle_inbox(now);
    let first = told(&rig);
    assert_ne!(first, NOBODY, "it has told how fat its own are, and asked the other");
    let (shard, slot) = rig.shard_of(thin);
    shard.send(slot, message(&"x".repeat(10_000)));
    rig.post("thin", &message("one more"));
    rig.shard_of(thin).0.handle_inbox(now);
    assert_eq!(told(&rig), first, "the other has not answered");
    // It answers, and asks in its turn.
    rig.shard_of(fat).0.handle_inbox(now);
    rig.shard_of(thin).0.handle_inbox(now);
    let second = told(&rig);
    assert!(second > first, "it was asked");
    let (shard, slot) = rig.shard_of(thin);
    shard.send(slot, message(&"x".repeat(30_000)));
    rig.post("thin", &message("one more"));
    rig.shard_of(thin).0.handle_inbox(now);
    assert_eq!(told(&rig), second, "the other has fatter ones");
    assert!(rig.is_open(thin));
    rig.wait(1);
    assert!(told(&rig) > second, "in the next tick it looks again");
}

#[test]
fn within_the_budget_nobody_is_cut() {
    let mut rig = Rig::with(1, SessionLimits::default(), 1 << 40);
    let tab = rig.try_open(0, "u", Wire::WebSocket).unwrap();
    for n in 0..200 {
        rig.publish("u", &message(&n.to_string()));
    }
    assert!(rig.is_open(tab));
}
