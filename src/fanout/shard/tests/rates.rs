//! Limits per second of what a session sends: refused, answered, and in the end cut.

use super::rig::{Got, PING, PONG, Rig, TEXT, client_frame, close, deflated_client_frame};
use crate::proto::disconnect::Disconnect;
use crate::proto::limits::SessionLimits;

/// Two frames and 1,000 bytes a second, ten times as much at once.
fn limited() -> Rig {
    let limits = SessionLimits {
        inbound_messages_per_second_max: 2,
        inbound_bytes_per_second_max: 1_000,
        ..SessionLimits::default()
    };
    Rig::with(1, limits, usize::MAX)
}

fn limited_frames(rig: &Rig) -> u64 {
    rig.hub.metrics().sum(|shard| &shard.limited_frames)
}

#[test]
fn texts_past_the_rate_are_refused_one_by_one_and_then_the_tab_is_cut() {
    let mut rig = limited();
    let tab = rig.tab(0, "u");
    (0..20).for_each(|_| rig.say(tab, "hello"));
    assert_eq!((rig.ear.heard.len(), rig.got(tab).len()), (20, 0));
    (0..10).for_each(|_| rig.say(tab, "hello"));
    assert_eq!(rig.ear.heard.len(), 20, "what is refused is not handed on");
    let got = rig.got(tab);
    assert_eq!(got.len(), 10);
    assert!(got.iter().all(|got| matches!(got, Got::Json(json) if json["code"] == "rate_limited")), "{got:?}");
    assert!(rig.is_open(tab));
    rig.say(tab, "hello");
    assert_eq!(rig.last(tab), close(Disconnect::PolicyViolation));
    assert_eq!((rig.ended(Disconnect::PolicyViolation), limited_frames(&rig)), (1, 11));
}

#[test]
fn who_waits_is_heard_again_and_who_keeps_to_the_rate_always() {
    let mut rig = limited();
    let (hasty, steady) = (rig.tab(0, "u"), rig.tab(0, "u"));
    (0..25).for_each(|_| rig.say(hasty, "x"));
    assert_eq!(rig.ear.heard.len(), 20);
    rig.wait(3);
    (0..7).for_each(|_| rig.say(hasty, "x"));
    assert_eq!(rig.ear.heard.len(), 26);
    for _ in 0..100 {
        (0..2).for_each(|_| rig.say(steady, "x"));
        rig.wait(1);
    }
    assert_eq!((rig.ear.heard.len(), limited_frames(&rig)), (226, 6));
    assert!(rig.is_open(steady));
}

#[test]
fn other_limits_hold_for_open_tabs_from_the_next_turn_on() {
    let mut rig = limited();
    let tab = rig.tab(0, "u");
    (0..20).for_each(|_| rig.say(tab, "x"));
    let more = SessionLimits { inbound_messages_per_second_max: 3, ..SessionLimits::default() };
    rig.hub.limit_sessions(&std::sync::Arc::new(more));
    rig.turn();
    (0..11).for_each(|_| rig.say(tab, "x"));
    assert_eq!((rig.ear.heard.len(), limited_frames(&rig)), (30, 1));
    rig.hub.limit_sessions(&std::sync::Arc::new(SessionLimits { message_bytes_max: 8, ..SessionLimits::default() }));
    rig.turn();
    rig.say(tab, "longer than eight");
    assert_eq!(rig.last(tab), close(Disconnect::MessageTooBig));
}

#[test]
fn floods_of_pings_pongs_and_empty_fragments_end_with_1008() {
    let check = |frames: &[u8], answers: usize| {
        let mut rig = limited();
        let tab = rig.tab(0, "u");
        rig.receive(tab, frames);
        assert_eq!(rig.last(tab), close(Disconnect::PolicyViolation));
        assert_eq!((rig.got(tab).len(), limited_frames(&rig)), (answers + 1, 11));
        assert_eq!(rig.ear.heard, []);
        rig.wait(10);
        assert!(rig.tabs[tab].gone);
    };
    check(&client_frame(PING, b"").repeat(1_000), 20);
    check(&client_frame(PONG, b"").repeat(1_000), 0);
    check(&[client_frame(0x01, b""), client_frame(0x00, b"").repeat(1_000)].concat(), 0);
}

#[test]
fn bytes_are_limited_as_they_are_inflated_and_a_silent_tab_may_send_any_legal_message() {
    let mut rig = limited();
    let tab = rig.deflated_tab(0, "u");
    let text = "x".repeat(30_000);
    rig.say(tab, &text);
    assert_eq!(rig.ear.heard.len(), 1);
    rig.say(tab, "x");
    assert_eq!((rig.ear.heard.len(), limited_frames(&rig)), (1, 1));
    // 30,000 bytes leak away in 30 s; there is room from when less than 10,000 are left.
    rig.wait(19);
    rig.say(tab, "x");
    assert_eq!(rig.ear.heard.len(), 1);
    rig.wait(2);
    rig.receive(tab, &deflated_client_frame("abcdefgh".repeat(300).as_bytes()));
    rig.receive(tab, &deflated_client_frame("abcdefgh".repeat(300).as_bytes()));
    assert_eq!(rig.ear.heard.len(), 2);
    assert!(rig.is_open(tab));
}

#[test]
fn a_reader_of_events_that_sends_without_end_is_ended() {
    let mut rig = limited();
    let reader = rig.reader(0, "u");
    (0..10).for_each(|_| rig.receive(reader, &[b'x'; 1_000]));
    assert!(rig.is_open(reader));
    rig.receive(reader, b"x");
    assert!(!rig.is_open(reader));
    assert_eq!(rig.ended(Disconnect::PolicyViolation), 1);
}

#[test]
fn without_limits_nobody_is_refused() {
    let limits = SessionLimits {
        inbound_messages_per_second_max: 0,
        inbound_bytes_per_second_max: 0,
        ..SessionLimits::default()
    };
    let mut rig = Rig::with(1, limits, usize::MAX);
    let (tab, reader) = (rig.tab(0, "u"), rig.reader(0, "u"));
    rig.receive(tab, &client_frame(TEXT, b"x").repeat(10_000));
    (0..1_000).for_each(|_| rig.receive(reader, &[0; 10_000]));
    assert_eq!(rig.ear.heard.len(), 10_000);
    assert!(rig.is_open(tab) && rig.is_open(reader));
}
