//! Tabs with permessage-deflate beside tabs without.

use std::ops::RangeInclusive;

use super::rig::{CLOSE, Got, PING, RSV1, Rig, TEXT, client_frame, close, deflated_client_frame, edit, message};
use crate::fanout::shard::Wire;
use crate::fanout::shard::reading::INFLATED_BYTES_MIN;
use crate::id::{ChannelId, MessageId};
use crate::proto::disconnect::Disconnect;
use crate::proto::event::{Event, Timestamp};
use crate::proto::frame::Frame;
use crate::proto::limits::SessionLimits;

/// A text that shrinks, and whose bytes differ from another's.
fn text(number: usize) -> String {
    format!("{number}: {}", "again and again, ".repeat(60))
}

fn deflated(number: usize) -> Frame {
    let mut frame = message(&text(number));
    assert!(frame.deflate());
    frame
}

fn texts(numbers: RangeInclusive<usize>) -> Vec<String> {
    numbers.map(text).collect()
}

#[test]
fn each_tab_is_written_its_own_form_and_all_see_the_same() {
    let mut rig = Rig::new(1);
    let tabs = [rig.deflated_tab(0, "ann"), rig.tab(0, "ann"), rig.deflated_tab(0, "ann"), rig.reader(0, "ann")];
    for tab in tabs {
        rig.receive(tab, &client_frame(TEXT, b"join r"));
    }
    // What is laid out for one tab is not for its neighbour in the room.
    for number in 1..=3 {
        rig.publish("ann", &deflated(number));
    }
    rig.post("room:r", &deflated(4));
    rig.post("room:r", &message(&text(5)));
    rig.publish("room:r", &deflated(6));
    for tab in [tabs[0], tabs[1], tabs[2]] {
        assert_eq!(rig.texts(tab), texts(1..=6));
    }
    assert_eq!(rig.texts(tabs[3]), texts(1..=3), "an event stream is in no room");
    let bytes = |tab: usize| rig.tabs[tab].received.len();
    assert_eq!(bytes(tabs[0]), bytes(tabs[2]));
    assert!(bytes(tabs[0]) < bytes(tabs[1]) / 2, "{} and {}", bytes(tabs[0]), bytes(tabs[1]));
}

#[test]
fn a_queue_counts_the_form_that_its_tab_is_written() {
    let frame = deflated(1);
    let form = frame.deflated().unwrap().len();
    // Ten forms fit behind the first, and less than three plain ones (forms differ a little, as ids do).
    let mut rig = Rig::with_queues(1, 100, form * 12);
    assert!(form * 12 < 3 * frame.websocket().len());
    let (tab, other) = (rig.deflated_tab(0, "ann"), rig.tab(0, "bob"));
    for tab in [tab, other] {
        rig.stall(tab, 0);
    }
    for number in 1..=11 {
        rig.publish("ann", &deflated(number));
    }
    rig.check_gauges();
    assert!(rig.is_open(tab), "what waits behind the first fits");
    // Cut in the middle of a form, it goes on at the exact byte.
    for _ in 0..form {
        rig.writable(tab, 7);
        rig.check_gauges();
    }
    rig.writable(tab, usize::MAX);
    assert_eq!((rig.texts(tab), rig.torn_bytes(tab)), (texts(1..=11), 0));
    for number in 1..=5 {
        rig.publish("bob", &deflated(number));
    }
    assert!(!rig.is_open(other), "as many plain forms do not fit");
    rig.stall(tab, 0);
    for number in 1..=30 {
        rig.publish("ann", &deflated(number));
    }
    assert!(!rig.is_open(tab), "there is a bound for forms as well");
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.last(tab), close(Disconnect::SlowConsumer));
}

#[test]
fn an_edit_takes_the_place_of_one_in_the_other_form() {
    let mut rig = Rig::new(1);
    let tab = rig.deflated_tab(0, "ann");
    rig.stall(tab, 0);
    let id = MessageId::random();
    rig.publish("ann", &deflated(1));
    for number in 2..=5 {
        let mut frame = edit(id, &text(number));
        if number % 2 == 0 {
            assert!(frame.deflate());
        }
        rig.publish("ann", &frame);
        rig.check_gauges();
    }
    rig.writable(tab, usize::MAX);
    assert_eq!(rig.texts(tab), [text(1), text(5)]);
}

#[test]
fn a_frame_is_compressed_for_whoever_is_here_to_read_it_and_once() {
    let mut rig = Rig::new(1);
    let wants =
        |rig: &Rig, channel: &str, frame: &Frame| rig.hub.wants_deflated(&ChannelId::parse(channel).unwrap(), frame);
    let (large, small, huge) = (message(&text(1)), message("hi"), message(&"again".repeat(210_000)));
    let timestamp = Timestamp::from_micros(1);
    let file = Event::File { id: MessageId::random(), filename: "f", mimetype: "m", data: &[7; 2_000], timestamp };
    let file = Frame::encode(&file);
    let plain = rig.tab(0, "bob");
    assert!(!wants(&rig, "bob", &large), "nobody has negotiated it");
    let tab = rig.deflated_tab(0, "ann");
    rig.receive(tab, &client_frame(TEXT, b"join r"));
    for (channel, frame, expected) in [
        ("ann", &large, true),
        ("room:r", &large, true),
        ("ann", &small, false),
        ("ann", &huge, false),
        ("ann", &file, false),
        ("ann", &Frame::ping(), false),
        ("carol", &large, false),
        ("room:empty", &large, false),
        ("sse:answer", &large, false),
    ] {
        assert_eq!(wants(&rig, channel, frame), expected, "{channel} {frame:?}");
    }
    let mut frame = message(&text(2));
    rig.hub.deflate(&mut frame);
    rig.hub.deflate(&mut frame);
    rig.publish("ann", &frame);
    let counts = &rig.hub.metrics().engine.deflates;
    let counted = [&counts.frames, &counts.json_bytes, &counts.form_bytes].map(|count| count.value());
    assert_eq!(counted, [1, frame.json().len() as u64, frame.deflated().unwrap().len() as u64]);
    rig.lose(tab);
    assert!(!wants(&rig, "bob", &large), "whoever negotiated it is gone");
    assert!(rig.is_open(plain));
}

#[test]
fn a_compressed_message_is_heard_as_its_text() {
    let mut rig = Rig::new(1);
    let tab = rig.deflated_tab(0, "ann");
    let said = "say “again” and again and again";
    let stream = deflated_client_frame(said.as_bytes());
    for piece in [1, 2, 7, stream.len()] {
        stream.chunks(piece).for_each(|piece| rig.receive(tab, piece));
    }
    // In two fragments with a ping between them, and without compression.
    let (first, second) = stream[6..].split_at(10);
    let unmasked = |from: usize, bytes: &[u8]| -> Vec<u8> {
        bytes.iter().enumerate().map(|(at, byte)| byte ^ stream[2 + (from + at) % 4]).collect()
    };
    let fragments = [
        client_frame(TEXT & 0x7f | RSV1, &unmasked(0, first)),
        client_frame(PING, b"between"),
        client_frame(0x80, &unmasked(10, second)),
        client_frame(TEXT, said.as_bytes()),
    ];
    rig.receive(tab, &fragments.concat());
    let heard: Vec<String> = rig.ear.answered.iter().map(|(_, said)| format!("say {said}")).collect();
    assert_eq!(heard, vec![said; 6]);
    assert_eq!(rig.hub.incomplete_bytes(), 0);
}

#[test]
fn an_unfinished_compressed_message_counts_as_any_other() {
    let mut rig = Rig::new(1);
    let tab = rig.deflated_tab(0, "ann");
    let noise: String = (0..100).map(|_| MessageId::random().to_string()).collect();
    let stream = deflated_client_frame(noise.as_bytes());
    assert!(stream.len() > 2_000);
    rig.receive(tab, &stream[..1_900]);
    assert!((1_800..6_000).contains(&rig.hub.incomplete_bytes()), "{}", rig.hub.incomplete_bytes());
    rig.lose(tab);
    assert_eq!(rig.hub.incomplete_bytes(), 0);
}

#[test]
fn what_breaks_the_extensions_rules_ends_the_session_with_its_code() {
    let limits = SessionLimits { message_bytes_max: 1_000, ..SessionLimits::default() };
    let check = |wire: Wire, bytes: &[u8], expected: Disconnect| {
        let mut rig = Rig::with(1, limits.clone(), usize::MAX);
        let tab = rig.try_open(0, "ann", wire).unwrap();
        rig.writable(tab, usize::MAX);
        rig.receive(tab, bytes);
        rig.turn();
        assert_eq!(rig.last(tab), close(expected), "{wire:?} {bytes:x?}");
        // What it says after that is not listened to.
        rig.receive(tab, &client_frame(TEXT, b"say never"));
        assert!(rig.ear.answered.is_empty());
    };
    let on = Wire::DeflatedWebSocket;
    check(Wire::WebSocket, &deflated_client_frame(b"say hi"), Disconnect::ProtocolError);
    check(on, &client_frame(PING | RSV1, b""), Disconnect::ProtocolError);
    check(on, &client_frame(CLOSE | RSV1, b""), Disconnect::ProtocolError);
    check(on, &client_frame(TEXT | 0x20, b"say hi"), Disconnect::ProtocolError);
    let continued = [client_frame(TEXT & 0x7f | RSV1, b"a"), client_frame(0x80 | RSV1, b"b")].concat();
    check(on, &continued, Disconnect::ProtocolError);
    check(on, &client_frame(0x82 | RSV1, b"\xff"), Disconnect::InvalidPayload);
    check(on, &client_frame(0x82 | RSV1, b"\0"), Disconnect::UnsupportedData);
    check(on, &client_frame(TEXT | RSV1, b"say hi"), Disconnect::InvalidPayload);
    check(on, &deflated_client_frame(b"say \xff"), Disconnect::InvalidPayload);
    let bomb = deflated_client_frame(&[b'a'; 1 << 20]);
    assert!(bomb.len() < 10_000 && deflated_client_frame(&[b'a'; 1_001]).len() < 100);
    check(on, &deflated_client_frame(&[b'a'; 1_001]), Disconnect::MessageTooBig);
    check(on, &bomb, Disconnect::MessageTooBig);
}

#[test]
fn what_inflates_to_a_hundred_times_its_bytes_is_heard_now_and_then() {
    let mut rig = Rig::with(1, SessionLimits { bad_frames_max: 3, ..SessionLimits::default() }, usize::MAX);
    let tab = rig.deflated_tab(0, "ann");
    let bloated = deflated_client_frame(&[b'a'; 60_000]);
    assert!(bloated.len() < 600);
    // Nor is what is small, or what a text may shrink to, or comes as it is.
    let fine = [
        deflated_client_frame(&[b'a'; INFLATED_BYTES_MIN]),
        deflated_client_frame(text(1).repeat(4).as_bytes()),
        client_frame(TEXT, &[b'a'; 60_000]),
    ];
    let heard = |rig: &Rig| rig.ear.heard.len();
    for round in 1..=3 {
        rig.receive(tab, &bloated);
        fine.iter().for_each(|frame| rig.receive(tab, frame));
        assert_eq!(heard(&rig), 4 * round);
    }
    rig.receive(tab, &bloated);
    assert_eq!((heard(&rig), rig.last(tab)), (12, close(Disconnect::PolicyViolation)));
}

#[test]
fn control_frames_and_what_is_small_go_out_as_they_are() {
    let mut rig = Rig::new(1);
    let tab = rig.deflated_tab(0, "ann");
    rig.receive(tab, &client_frame(PING, b"p"));
    rig.publish("ann", &message("hi"));
    assert!(rig.tabs[tab].received.windows(2).all(|two| two[0] != TEXT | RSV1));
    assert_eq!(rig.got(tab)[0], Got::Pong(b"p".to_vec()));
    assert_eq!(rig.texts(tab), ["hi"]);
}
