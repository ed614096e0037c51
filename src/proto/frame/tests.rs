use proptest::prelude::*;

use super::*;
use crate::id::{RoomName, UserId};
use crate::proto::event::{Button, EndReason, ErrorCode, GapReason, Timestamp};

const ID: &str = "6c84fb90-12c4-11e1-840d-7b25c5ee775a";
const AT: Timestamp = Timestamp::from_micros(1_000_000);

fn id() -> MessageId {
    MessageId::parse(ID).unwrap()
}

fn message(text: &str) -> Frame {
    Frame::encode(&Event::Message { id: id(), text, sender: "star", reply_to: None, timestamp: AT })
}

fn file(data: &[u8]) -> Frame {
    Frame::encode(&Event::File { id: id(), filename: "f", mimetype: "m", data, timestamp: AT })
}

/// One of each kind.
fn all() -> Vec<Frame> {
    let buttons = [Button::default()];
    vec![
        message("m"),
        Frame::encode(&Event::Buttons {
            id: id(),
            text: "b",
            sender: "star",
            reply_to: None,
            buttons: &buttons,
            timestamp: AT,
        }),
        file(b"data"),
        Frame::encode(&Event::Edit { id: id(), text: "e", timestamp: AT }),
        Frame::encode(&Event::Typing { active: true }),
        Frame::encode(&Event::End { reason: EndReason::Stop }),
        Frame::notice(&Notice::Hello { session: 7, server_time: AT, message_bytes_max: 1, attachment_bytes_max: 2 }),
        Frame::notice(&Notice::Ack { client_id: "c", id: None }),
        Frame::notice(&Notice::Error { code: ErrorCode::BadFrame, message: "m", client_id: None }),
        Frame::notice(&Notice::Pong { client_id: None }),
        Frame::notice(&Notice::Gap { reason: GapReason::RoomNotKept, count: None }),
        Frame::notice(&Notice::Draining { retry_after_ms: 1 }),
        Frame::relay(Kind::Status, None, None, r#"{"type":"status"}"#),
        Frame::text("an embedder's own"),
        Frame::binary(b"\0\xff"),
        Frame::ping(),
        Frame::pong(b"payload"),
        Frame::close(Disconnect::Normal),
    ]
}

/// Reads the WebSocket form back: first byte and payload. It must be unmasked and its length minimal.
fn read_websocket(mut bytes: &[u8]) -> (u8, &[u8]) {
    let mut take = |count: usize| {
        let (taken, rest) = bytes.split_at(count);
        bytes = rest;
        taken
    };
    let &[first, short] = take(2) else { unreachable!() };
    let length = match short {
        0..126 => u64::from(short),
        126 => u64::from(u16::from_be_bytes(take(2).try_into().unwrap())),
        127 => u64::from_be_bytes(take(8).try_into().unwrap()),
        _ => panic!("masked"),
    };
    assert_eq!(length > 0xffff, short == 127);
    assert_eq!((126..=0xffff).contains(&length), short == 126);
    assert_eq!(bytes.len() as u64, length);
    (first, bytes)
}

/// Reads an event stream's chunk back: the id and the data of its one record.
fn read_event_stream(stream: EventStream<'_>) -> (Option<String>, String) {
    let chunk = String::from_utf8([stream.prefix, stream.body].concat()).unwrap();
    let (size, rest) = chunk.split_once("\r\n").unwrap();
    let record = rest.strip_suffix("\r\n").unwrap();
    assert_eq!(usize::from_str_radix(size, 16).unwrap(), record.len());
    assert_eq!(size, format!("{:x}", record.len()));
    let mut lines = record.strip_suffix("\n\n").unwrap().split('\n');
    let mut line = lines.next().unwrap();
    let id = line.strip_prefix("id: ").map(str::to_owned);
    if id.is_some() {
        line = lines.next().unwrap();
    }
    assert_eq!(lines.next(), None);
    let data = line.strip_prefix("data: ").unwrap();
    assert!(!data.is_empty());
    assert!(!data.contains(['\r', '\u{85}', '\u{2028}', '\u{2029}']));
    (id, data.to_owned())
}

#[test]
fn a_frame_is_one_pointer_and_its_header_one_cache_line() {
    assert_eq!(size_of::<Frame>(), size_of::<usize>());
    assert_eq!(size_of::<Option<Frame>>(), size_of::<usize>());
    #[cfg(target_pointer_width = "64")]
    assert_eq!(size_of::<Header>(), 48);
    fn is_shared<T: Send + Sync + 'static>() {}
    is_shared::<Frame>();
}

#[test]
fn each_kind_has_its_class_and_its_name() {
    let frames = all();
    let kinds: Vec<Kind> = frames.iter().map(Frame::kind).collect();
    assert_eq!(kinds, Kind::ALL);
    let names: std::collections::HashSet<&str> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
    assert_eq!(names.len(), Kind::ALL.len());
    for frame in frames {
        let expected = match frame.kind() {
            Kind::Message | Kind::Buttons | Kind::File | Kind::End | Kind::Ack | Kind::Error => Class::Ordered,
            Kind::Text | Kind::Binary => Class::Ordered,
            Kind::Edit | Kind::Typing => Class::Latest,
            _ => Class::Control,
        };
        assert_eq!(frame.class(), expected, "{frame:?}");
        let has_id = matches!(frame.kind(), Kind::Message | Kind::Buttons | Kind::File | Kind::Edit);
        assert_eq!(frame.message_id(), has_id.then(id), "{frame:?}");
        assert_eq!(frame.key() != 0, frame.class() == Class::Latest, "{frame:?}");
    }
}

#[test]
fn every_form_carries_the_same_json() {
    for frame in all().into_iter().filter(|frame| frame.kind().has_json()) {
        let json = std::str::from_utf8(frame.json()).unwrap();
        assert!(serde_json::from_str::<serde_json::Value>(json).is_ok(), "{json}");
        assert_eq!(read_websocket(frame.websocket()), (0x81, frame.json()));
        let has_position = matches!(frame.kind(), Kind::Message | Kind::Buttons | Kind::File);
        let expected = (has_position.then(|| ID.to_owned()), json.to_owned());
        assert_eq!(read_event_stream(frame.event_stream().unwrap()), expected);
    }
}

#[test]
fn the_forms_are_byte_exact() {
    let typing = Frame::encode(&Event::Typing { active: true });
    assert_eq!(typing.websocket(), b"\x81\x1f{\"type\":\"typing\",\"active\":true}");
    let stream = typing.event_stream().unwrap();
    assert_eq!(stream.prefix, b"27\r\ndata: ");
    assert_eq!(stream.body, b"{\"type\":\"typing\",\"active\":true}\n\n\r\n");

    let message = message("hi");
    let json = br#"{"type":"message","id":"6c84fb90-12c4-11e1-840d-7b25c5ee775a","text":"hi","sender":"star","timestamp":1.0}"#;
    assert_eq!(message.json(), json);
    assert_eq!(message.websocket(), [b"\x81\x6a".as_slice(), json].concat());
    let stream = message.event_stream().unwrap();
    assert_eq!(stream.prefix, b"9b\r\nid: 6c84fb90-12c4-11e1-840d-7b25c5ee775a\ndata: ");
    assert_eq!(stream.body, [json.as_slice(), b"\n\n\r\n"].concat());
}

#[test]
fn the_length_of_a_frame_is_in_its_shortest_form() {
    let overhead = message("").json().len();
    for length in [125, 126, 127, 0xfffe, 0xffff, 0x1_0000, 0x1_0001, 200_000] {
        let text = "a".repeat(length - overhead);
        let frame = message(&text);
        assert_eq!(frame.json().len(), length);
        assert_eq!(read_websocket(frame.websocket()), (0x81, frame.json()));
        assert_eq!(read_event_stream(frame.event_stream().unwrap()).1.len(), length);
    }
}

#[test]
fn websocket_control_frames_have_no_other_form() {
    let check = |frame: Frame, expected: &[u8]| {
        assert_eq!(frame.websocket(), expected);
        assert_eq!(frame.json(), b"");
        assert_eq!(frame.event_stream(), None);
        assert_eq!(frame.class(), Class::Control);
    };
    check(Frame::ping(), b"\x89\0");
    check(Frame::pong(b"abc"), b"\x8a\x03abc");
    check(Frame::pong(b""), b"\x8a\0");
    check(Frame::pong(&[7; 200]), &[&[0x8a, 125], [7_u8; 125].as_slice()].concat());
    check(Frame::close(Disconnect::SlowConsumer), b"\x88\x0f\x0f\xa8slow consumer");
    check(Frame::close(Disconnect::ConnectionLost), b"\x88\0");
    for ending in Disconnect::ALL.into_iter().filter(|ending| ending.has_close_frame()) {
        let frame = Frame::close(ending);
        let (first, payload) = read_websocket(frame.websocket());
        assert_eq!((first, &payload[..2]), (0x88, ending.close_code().to_be_bytes().as_slice()));
        assert_eq!(&payload[2..], ending.reason().as_bytes());
    }
}

#[test]
fn separators_are_escaped_in_event_streams_only_and_once() {
    for text in ["a\u{2028}b".to_owned(), "\u{85}\u{2029}".repeat(40_000)] {
        let frame = message(&text);
        let raw = std::str::from_utf8(frame.json()).unwrap();
        assert!(raw.contains(&text));
        assert_eq!(read_websocket(frame.websocket()).1, frame.json());
        let bytes = frame.bytes();
        let stream = frame.event_stream().unwrap();
        let (position, data) = read_event_stream(stream);
        assert_eq!(position.as_deref(), Some(ID));
        let value = |json: &str| serde_json::from_str::<serde_json::Value>(json).unwrap();
        assert_eq!(value(&data), value(raw));
        let again = frame.clone().event_stream().unwrap().body.as_ptr();
        assert_eq!(again, stream.body.as_ptr());
        assert_eq!(frame.bytes(), bytes);
        assert!(bytes >= frame.whole().len() + stream.prefix.len() + stream.body.len());
    }
}

#[test]
fn large_frames_are_like_small_ones() {
    for length in [0, 1, 2, 48 << 10, (48 << 10) + 1, 100_000, 1 << 20] {
        let data: Vec<u8> = (0..length).map(|index: u32| index.to_le_bytes()[0] ^ index.to_le_bytes()[1]).collect();
        let frame = file(&data);
        let value: serde_json::Value = serde_json::from_slice(frame.json()).unwrap();
        use base64::Engine as _;
        assert_eq!(value["data"], base64::engine::general_purpose::STANDARD.encode(&data));
        assert_eq!(value["size"], data.len());
        assert_eq!(read_websocket(frame.websocket()), (0x81, frame.json()));
        assert_eq!(read_event_stream(frame.event_stream().unwrap()).1.as_bytes(), frame.json());
        assert!(frame.bytes() >= frame.websocket().len());
    }
    // A text that outgrows the room for an ordinary one.
    let text = "\u{1}".repeat(100_000);
    assert_eq!(message(&text).json().len(), message("").json().len() + 600_000);
}

#[test]
fn typing_replaces_typing_of_its_channel_only() {
    let typing = |active, channel: &ChannelId| Frame::encode_for(&Event::Typing { active }, channel).key();
    let user = ChannelId::User(UserId::parse("a").unwrap());
    let room = ChannelId::Room(RoomName::parse("a").unwrap());
    assert_eq!(typing(true, &user), typing(false, &user.clone()));
    assert_ne!(typing(true, &user), typing(true, &room));
    assert_ne!(typing(true, &user), 0);
    let edit = Event::Edit { id: id(), text: "", timestamp: AT };
    assert_eq!(Frame::encode_for(&edit, &user).key(), id().as_u128());
    assert_eq!(Frame::encode_for(&edit, &user).key(), Frame::encode(&edit).key());
    assert_eq!(
        Frame::encode(&Event::Typing { active: true }).key(),
        Frame::encode(&Event::Typing { active: false }).key()
    );
}

#[test]
fn a_relayed_frame_equals_the_original() {
    let channel = ChannelId::parse("room:r").unwrap();
    let typing = Frame::encode_for(&Event::Typing { active: true }, &channel);
    for original in all().into_iter().filter(|frame| frame.kind().has_json()).chain([typing, message("\u{2028}")]) {
        let is_elsewhere = original.kind() == Kind::Typing && original.key() == u128::MAX;
        let channel = (!is_elsewhere).then_some(&channel);
        let json = std::str::from_utf8(original.json()).unwrap();
        let relayed = Frame::relay(original.kind(), original.message_id(), channel, json);
        assert_eq!(relayed.websocket(), original.websocket());
        assert_eq!(relayed.event_stream(), original.event_stream());
        assert_eq!((relayed.key(), relayed.message_id()), (original.key(), original.message_id()));
    }
}

/// One test for all of the statistic: it is the process's, and other tests run beside this one.
#[test]
fn live_bytes_rise_once_a_frame_and_fall_with_its_last_clone() {
    let data = vec![7; 40 << 20];
    let frame = file(&data);
    assert!(frame.bytes() > 53 << 20);
    let floor = frame.bytes();
    assert!(live_bytes() >= floor);
    let clones = vec![frame.clone(); 100];
    assert!(live_bytes() < 2 * floor);
    drop(frame);
    assert!(live_bytes() >= floor);
    drop(clones);
    assert!(live_bytes() < floor);
}

#[test]
fn a_clone_is_the_same_memory() {
    let frame = message("shared");
    assert_eq!(frame.clone().websocket().as_ptr(), frame.websocket().as_ptr());
    assert!(format!("{frame:?}").starts_with("Frame { kind: Message, bytes: "));
}

/// Reads the compressed form back: what its payload inflates to.
fn read_deflated(form: &[u8]) -> Vec<u8> {
    let (first, payload) = read_websocket(form);
    assert_eq!(first, 0xc1);
    let limit = 64 << 20;
    crate::proto::deflate::Inflater::default().inflate(payload, limit, |text| text.to_vec()).unwrap()
}

#[test]
fn the_compressed_form_says_the_same_in_fewer_bytes() {
    for length in [60, 100, 125, 126, 1000, 0xffff, 0x1_0000, 300_000] {
        let text = "again and “again” 😀 ".repeat(length / 20 + 1);
        let (mut frame, plain) = (message(&text), message(&text));
        assert!(frame.deflate(), "{length}");
        let form = frame.deflated().unwrap();
        assert_eq!(read_deflated(form), frame.json());
        assert!(form.len() < frame.websocket().len());
        assert!(frame.bytes() >= plain.bytes() + form.len());
        // All else is as it was.
        assert_eq!((frame.websocket(), frame.event_stream()), (plain.websocket(), plain.event_stream()));
        assert_eq!((frame.kind(), frame.key(), frame.message_id()), (plain.kind(), plain.key(), plain.message_id()));
    }
    // Beside what else few frames have.
    let mut separators = message(&"\u{2028} and ".repeat(100));
    let record = read_event_stream(separators.event_stream().unwrap());
    assert!(separators.deflate());
    assert_eq!(read_event_stream(separators.event_stream().unwrap()), record);
    assert_eq!(read_deflated(separators.deflated().unwrap()), separators.json());
}

#[test]
fn the_forms_of_a_shared_frame_do_not_change() {
    let mut frame = message(&"again and ".repeat(100));
    let mut shared = frame.clone();
    let bytes = frame.bytes();
    assert!(!frame.deflate() && !shared.deflate());
    assert_eq!((frame.bytes(), frame.deflated()), (bytes, None));
    drop(shared);
    assert!(frame.deflate());
    let (bytes, place) = (frame.bytes(), frame.deflated().unwrap().as_ptr());
    let mut shared = frame.clone();
    assert!(shared.deflate() && frame.deflate(), "it is there");
    assert_eq!((shared.deflated().unwrap().as_ptr(), shared.bytes()), (place, bytes));
}

#[test]
fn what_would_be_no_smaller_or_is_no_message_gets_no_compressed_form() {
    for mut frame in all() {
        let bytes = frame.bytes();
        let has_form = frame.deflate();
        assert_eq!(frame.deflated().is_some(), has_form);
        assert!(!has_form || frame.deflated().unwrap().len() < frame.websocket().len(), "{frame:?}");
        assert!(has_form || frame.bytes() == bytes, "{frame:?}");
        assert!(!has_form || frame.kind().is_message(), "{frame:?}");
    }
}

proptest! {
    #[test]
    fn both_forms_of_any_frame_say_the_same(text in prop_oneof![r#"([ -~]|["\\\x00-\x1f]|[\u{85}\u{2028}“é]){0,600}"#, "(again|and|\\PC){0,200}"]) {
        let mut frame = message(&text);
        let (json, bytes) = (frame.json().to_vec(), frame.bytes());
        let has_form = frame.deflate();
        prop_assert_eq!(frame.json(), &json);
        prop_assert_eq!(read_websocket(frame.websocket()), (0x81, &json[..]));
        prop_assert_eq!(has_form, frame.bytes() > bytes);
        if let Some(form) = frame.deflated() {
            prop_assert_eq!(read_deflated(form), json);
        }
    }

    #[test]
    fn any_text_is_the_same_in_every_form(text in r#"([ -~]|["\\\x00-\x1f]|[\u{85}\u{2028}\u{2029}“é]|\PC){0,200}"#) {
        let frame = message(&text);
        let value: serde_json::Value = serde_json::from_slice(frame.json()).unwrap();
        prop_assert_eq!(value["text"].as_str(), Some(text.as_str()));
        prop_assert_eq!(read_websocket(frame.websocket()), (0x81, frame.json()));
        let (position, data) = read_event_stream(frame.event_stream().unwrap());
        prop_assert_eq!(position.as_deref(), Some(ID));
        prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&data).unwrap(), value);
    }
}
