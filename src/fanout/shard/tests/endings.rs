//! How sessions end: the close handshake, broken rules, and the drain.

use std::time::Duration;

use super::rig::{CLOSE, Got, PING, Rig, TEXT, client_frame, close, message};
use crate::fanout::hub::Drain;
use crate::fanout::shard::{OpenError, Wire};
use crate::id::ChannelId;
use crate::proto::disconnect::Disconnect;

/// A drain that nothing but its spread holds back.
pub(super) fn drain(spread_seconds: u64) -> Drain {
    Drain { spread: Duration::from_secs(spread_seconds), closes_per_second_max: u32::MAX, latest: Duration::MAX }
}

#[test]
fn a_tab_that_closes_gets_a_close_back_and_is_over() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.receive(tab, &client_frame(CLOSE, b"\x03\xe8bye"));
    assert_eq!(rig.got(tab), [close(Disconnect::Normal)]);
    assert!(rig.tabs[tab].gone);
    assert_eq!(rig.ended(Disconnect::Normal), 1);
}

#[test]
fn a_tab_that_closes_while_it_is_behind_gets_the_close_instead_of_what_was_queued() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.stall(tab, 10);
    for n in 0..3 {
        rig.publish("u", &message(&n.to_string()));
    }
    rig.receive(tab, &client_frame(CLOSE, &[]));
    assert!(!rig.tabs[tab].gone);
    rig.writable(tab, usize::MAX);
    assert_eq!((rig.texts(tab), rig.last(tab)), (vec!["0".to_owned()], close(Disconnect::Normal)));
    assert!(rig.tabs[tab].gone);
}

#[test]
fn a_reader_of_events_is_told_where_coming_back_makes_no_sense() {
    for (ending, is_told) in
        [(Disconnect::Kicked, true), (Disconnect::TokenExpired, true), (Disconnect::OverBudget, false)]
    {
        let mut rig = Rig::new(1);
        let reader = rig.reader(0, "u");
        rig.post("u", &message("first"));
        assert_eq!(rig.hub.end_sessions(&ChannelId::parse("u").unwrap(), ending), Ok(1));
        rig.turn();
        let got = rig.got(reader);
        assert_eq!((got[0].text(), got.last()), (Some("first"), Some(&Got::LastChunk)));
        let close = serde_json::json!({ "code": ending.close_code(), "reason": ending.reason() });
        assert_eq!(got[1] == Got::CloseEvent(close), is_told, "{ending:?} {got:?}");
        assert_eq!(got.len(), 2 + usize::from(is_told));
    }
}

#[test]
fn our_close_waits_for_the_peers() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.post("u", &message("first"));
    assert_eq!(rig.hub.end_sessions(&ChannelId::parse("u").unwrap(), Disconnect::Kicked), Ok(1));
    rig.turn();
    assert_eq!(rig.texts(tab), ["first"]);
    assert_eq!(rig.last(tab), close(Disconnect::Kicked));
    assert!(rig.tabs[tab].fin && !rig.tabs[tab].gone);
    rig.say(tab, "still talking");
    rig.receive(tab, &client_frame(PING, b"?"));
    assert!(rig.ear.heard.is_empty(), "nobody listens any more");
    assert_eq!(rig.got(tab).len(), 2);
    rig.receive(tab, &client_frame(CLOSE, b"\x0f\xaa"));
    assert!(rig.tabs[tab].gone);
    assert_eq!(rig.ended(Disconnect::Kicked), 1);
}

#[test]
fn closes_that_cross_each_other_complete_the_handshake() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.stall(tab, 0);
    rig.publish("u", &message("queued"));
    let (shard, slot) = rig.shard_of(tab);
    shard.end(slot, Disconnect::Kicked);
    shard.end(slot, Disconnect::TokenExpired);
    rig.receive(tab, &client_frame(CLOSE, &[]));
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.last(tab), close(Disconnect::Kicked));
    assert!(rig.tabs[tab].gone);
    assert_eq!((rig.ended(Disconnect::Kicked), rig.ended(Disconnect::TokenExpired)), (1, 0));
}

#[test]
fn a_peer_that_sends_nothing_more_is_gone_at_once() {
    let mut rig = Rig::new(1);
    let (tab, reader, closing) = (rig.tab(0, "u"), rig.reader(0, "u"), rig.tab(0, "v"));
    let (shard, slot) = rig.shard_of(closing);
    shard.end(slot, Disconnect::Kicked);
    rig.flush();
    for tab in [tab, reader, closing] {
        let (shard, slot) = rig.shard_of(tab);
        shard.handle_end_of_input(slot);
        shard.handle_end_of_input(slot);
    }
    rig.flush();
    assert!([tab, reader, closing].iter().all(|tab| rig.tabs[*tab].gone));
    let ended = [Disconnect::ConnectionLost, Disconnect::Normal, Disconnect::Kicked].map(|ending| rig.ended(ending));
    assert_eq!(ended, [1, 1, 1]);
}

#[test]
fn a_broken_rule_is_answered_with_its_code_and_nothing_else_is_heard() {
    let check = |bytes: &[u8], ending: Disconnect| {
        let mut rig = Rig::new(1);
        let tab = rig.tab(0, "u");
        rig.stall(tab, 0);
        rig.publish("u", &message("queued"));
        rig.say(tab, "before");
        rig.receive(tab, &[bytes, &client_frame(TEXT, b"after")].concat());
        rig.say(tab, "long after");
        rig.receive(tab, &client_frame(CLOSE, &[]));
        assert_eq!(rig.ear.heard.len(), 1, "{ending:?}");
        rig.writable(tab, usize::MAX);
        // What waited for it before comes first.
        assert_eq!(rig.texts(tab), ["queued"]);
        assert_eq!((rig.got(tab).len(), rig.last(tab)), (2, close(ending)));
        assert!(rig.tabs[tab].fin, "the driver may say that nothing more comes");
        assert_eq!(rig.ended(ending), 1);
        let (shard, slot) = rig.shard_of(tab);
        shard.handle_end_of_input(slot);
        rig.flush();
        assert!(rig.tabs[tab].gone);
    };
    check(&[0x81, 0x01, b'x'], Disconnect::ProtocolError);
    check(&client_frame(0x83, b""), Disconnect::ProtocolError);
    check(&client_frame(CLOSE, b"\x03"), Disconnect::ProtocolError);
    check(&client_frame(0x82, b"binary"), Disconnect::UnsupportedData);
    check(&client_frame(TEXT, b"\xff"), Disconnect::InvalidPayload);
    check(&[0x81, 0xff, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0], Disconnect::MessageTooBig);
}

#[test]
fn bad_frames_are_answered_until_there_are_too_many_within_ten_seconds() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    for _ in 0..5 {
        (0..10).for_each(|_| rig.say(tab, "bad"));
        rig.wait(11);
        rig.receive(tab, &client_frame(super::rig::PONG, &[]));
    }
    assert!(rig.is_open(tab));
    (0..11).for_each(|_| rig.say(tab, "bad"));
    assert!(!rig.is_open(tab));
    assert_eq!(rig.last(tab), close(Disconnect::PolicyViolation));
    assert_eq!(rig.got(tab).iter().filter(|got| matches!(got, Got::Json(_))).count(), 60);
    assert_eq!(rig.hub.metrics().sum(|shard| &shard.bad_frames), 61);
}

#[test]
fn text_arrives_however_it_is_cut() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    let bytes = [client_frame(0x01, b"hel"), client_frame(PING, b"!"), client_frame(0x80, "lö".as_bytes())].concat();
    for byte in &bytes {
        rig.receive(tab, &[*byte]);
    }
    assert_eq!(rig.ear.heard, [(rig.tabs[tab].address, "hellö".to_owned())]);
    assert_eq!(rig.got(tab), [Got::Pong(b"!".to_vec())]);
    let (shard, slot) = rig.shard_of(tab);
    assert!(shard.slab.get(slot).partial.is_none(), "an idle tab has no read buffer");
}

#[test]
fn a_reply_goes_to_the_tab_that_asked_only() {
    let mut rig = Rig::new(1);
    let (tab, other) = (rig.tab(0, "u"), rig.tab(0, "u"));
    rig.say(tab, "say hi");
    assert_eq!((rig.texts(tab), rig.got(other)), (vec!["hi".to_owned()], vec![]));
}

#[test]
fn what_a_reader_of_events_sends_means_nothing() {
    let mut rig = Rig::new(1);
    let reader = rig.reader(0, "u");
    rig.receive(reader, b"GET / HTTP/1.1\r\n\r\n");
    assert!(rig.is_open(reader));
    assert_eq!(rig.got(reader), []);
}

#[test]
fn a_session_that_never_got_its_connection_goes_away() {
    let mut rig = Rig::new(1);
    let tab = rig.try_open(0, "u", Wire::WebSocket).unwrap();
    rig.publish("u", &message("waits"));
    rig.wait(25 + 20 + 6);
    assert!(rig.tabs[tab].gone);
    assert!(rig.tabs[tab].received.is_empty());
}

#[test]
fn a_drain_is_paced_and_tells_each_tab_its_own_time_to_come_back() {
    let mut rig = Rig::new(2);
    let tabs: Vec<_> = (0..100).map(|n| rig.tab(n % 2, &format!("u{}", n / 5))).collect();
    let reader = rig.reader(1, "reader");
    tabs.iter().for_each(|tab| rig.say(*tab, "join r"));
    rig.post("room:r", &message("before"));
    rig.hub.drain(drain(10));
    rig.turn();
    assert!(matches!(rig.try_open(0, "late", Wire::WebSocket), Err(OpenError::Draining)));
    for tenth in 1..=10 {
        let (open, due) = (tabs.iter().filter(|tab| rig.is_open(**tab)).count(), 110 - 10 * tenth);
        assert!((due - 4..=due).contains(&open), "{open} open before second {tenth}");
        for _ in 0..20 {
            rig.turn();
            rig.jump(Duration::from_millis(50));
        }
    }
    let mut times = std::collections::HashSet::new();
    for tab in tabs {
        let got = rig.got(tab);
        assert_eq!(got[1].text(), Some("before"), "everything queued is written");
        let Got::Json(draining) = &got[2] else { panic!("draining") };
        assert_eq!(got[2].kind(), "draining");
        let wait = draining["retry_after_ms"].as_u64().unwrap();
        assert!((500..500 + 15_000).contains(&wait));
        times.insert(wait);
        assert_eq!(got[3], close(Disconnect::ServiceRestart));
        rig.receive(tab, &client_frame(CLOSE, &[]));
    }
    assert!(times.len() > 90, "{} different times", times.len());
    let got = rig.got(reader);
    assert_eq!(got[0].kind(), "draining");
    assert!(matches!(got[1], Got::Retry(_)) && got[2] == Got::LastChunk && rig.tabs[reader].gone);
    rig.jump(Duration::from_millis(50));
    assert!(rig.shards.iter().all(super::super::Shard::is_drained));
    assert_eq!(rig.ended(Disconnect::ServiceRestart), 101);
}

/// How many of 400 tabs, most of them on one of two shards, a drain tells to come back in each of its seconds. `held_up`
/// is a second in which nothing runs.
fn told_each_second(drain: Drain, held_up: Option<usize>) -> Vec<usize> {
    let mut rig = Rig::new(2);
    let tabs: Vec<_> = (0..400).map(|n| rig.tab(u16::from(n % 4 == 0), &format!("u{}", n / 5))).collect();
    rig.hub.drain(drain);
    rig.turn();
    // Who is told was chosen a step before.
    rig.jump(Duration::from_millis(50));
    let (mut open, mut told) = (tabs.len(), Vec::new());
    while open > 0 {
        if held_up == Some(told.len()) {
            rig.jump(Duration::from_secs(1));
        } else {
            for _ in 0..20 {
                rig.turn();
                rig.jump(Duration::from_millis(50));
            }
        }
        rig.turn();
        let left = tabs.iter().filter(|tab| rig.is_open(**tab)).count();
        told.push(open - left);
        open = left;
    }
    told
}

#[test]
fn all_shards_together_close_no_more_tabs_in_a_second_than_they_may() {
    let limits = Drain { closes_per_second_max: 40, ..drain(1) };
    let told = told_each_second(limits, None);
    assert_eq!((told.len(), told.iter().sum::<usize>()), (10, 400), "{told:?}");
    // A step of 50 ms is 2 tabs, and each shard begins with one.
    assert!(told.iter().all(|told| (36..=44).contains(told)), "{told:?}");
}

#[test]
fn the_spread_is_kept_by_those_who_are_few_enough() {
    let told = told_each_second(Drain { closes_per_second_max: 4_000, ..drain(5) }, None);
    assert!(told.len() == 5 && told.iter().all(|told| (75..=85).contains(told)), "{told:?}");
}

#[test]
fn the_time_that_is_left_wins_over_the_rate_and_over_the_spread() {
    let latest = Duration::from_secs(4);
    for drain in [Drain { closes_per_second_max: 10, latest, ..drain(1) }, Drain { latest, ..drain(60) }] {
        let told = told_each_second(drain, None);
        assert!(told.len() == 4 && told.iter().all(|told| (90..=110).contains(told)), "{told:?}");
    }
}

#[test]
fn a_shard_that_was_held_up_does_not_make_up_for_it_at_once() {
    let limits = Drain { closes_per_second_max: 40, ..drain(1) };
    let told = told_each_second(limits, Some(3));
    assert!(told[3] < 10 && told.iter().all(|told| *told <= 44), "{told:?}");
    assert_eq!((told.len(), told.iter().sum::<usize>()), (11, 400), "{told:?}");
    // Unless there is no time left.
    let told = told_each_second(Drain { latest: Duration::from_secs(10), ..limits }, Some(8));
    assert_eq!((told.len(), told[8] < 10, told[9] > 60), (10, true, true), "{told:?}");
}

#[test]
fn a_drain_without_a_spread_ends_all_at_once_and_waits_for_nobody_longer_than_the_close_timeout() {
    let mut rig = Rig::new(1);
    let tabs: Vec<_> = (0..300).map(|n| rig.tab(0, &format!("u{n}"))).collect();
    rig.stall(tabs[0], 0);
    rig.hub.drain(drain(0));
    rig.turn();
    rig.hub.drain(drain(0));
    rig.turn();
    rig.jump(Duration::from_millis(50));
    assert!(!tabs.iter().any(|tab| rig.is_open(*tab)));
    assert!(!rig.shards[0].is_drained());
    rig.wait(6);
    assert!(rig.shards[0].is_drained());
}

#[test]
fn what_was_on_its_way_to_a_tab_when_its_drain_began_gets_there() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.say(tab, "join r");
    rig.hub.drain(drain(0));
    // Behind the drain, but counted while the tab was there.
    assert_eq!(rig.post("u", &message("one")).tabs, 1);
    assert_eq!(rig.post("room:r", &message("two")).tabs, 1);
    rig.turn();
    assert_eq!(rig.post("u", &message("late")).tabs, 0);
    assert_eq!(rig.post("room:r", &message("late")).tabs, 0);
    rig.jump(Duration::from_millis(50));
    assert_eq!(rig.texts(tab), ["one", "two"]);
    assert_eq!(rig.last(tab), close(Disconnect::ServiceRestart));
}

#[test]
fn a_drain_tells_nobody_before_the_inbox_was_emptied_once_more() {
    let mut rig = Rig::new(1);
    let tab = rig.tab(0, "u");
    rig.hub.drain(drain(0));
    let now = rig.now();
    assert!(rig.shards[0].handle_inbox(now));
    // The clock is due in the same round: what was posted meanwhile is still in the inbox.
    rig.jump(Duration::from_millis(50));
    assert!(rig.is_open(tab) && rig.got(tab).is_empty());
    rig.turn();
    rig.jump(Duration::from_millis(50));
    assert_eq!(rig.last(tab), close(Disconnect::ServiceRestart));
}

#[test]
fn a_shard_that_is_dropped_takes_its_sessions_out_of_the_registry_and_the_rooms() {
    let mut rig = Rig::new(2);
    let (here, there) = (rig.tab(0, "u"), rig.tab(1, "u"));
    rig.say(here, "join r");
    rig.say(there, "join r");
    drop(rig.shards.remove(0));
    assert_eq!(rig.hub.registry().total_connections(), 1);
    assert_eq!(rig.post("room:r", &message("x")).tabs, 1);
    rig.tabs[here].gone = true;
    // The rig finds the shard that is left by its place.
    let now = rig.now();
    rig.shards[0].handle_inbox(now);
    rig.flush();
    assert_eq!(rig.texts(there), ["x"]);
    let last = rig.tabs[there].address.slot();
    rig.shards[0].handle_lost(last, Disconnect::ConnectionLost);
    rig.flush();
}
