//! What is written is what `serde_json` would write of a text, and what it reads back of an event; and every wire form
//! carries it.

use base64::Engine;
use serde_json::Value;
use tabcast::id::MessageId;
use tabcast::proto::event::{Button, Event, Timestamp};
use tabcast::proto::frame::Frame;
use tabcast::proto::json::{Buffer, escape, escape_plain, escape_separators, separator_growth};

/// The first eight bytes are a time, and where the others are cut into two texts.
pub(crate) fn run(bytes: &[u8]) {
    let Some((seed, rest)) = bytes.split_first_chunk::<8>() else { return };
    let micros = u64::from_le_bytes(*seed) >> 8;
    let (left, right) = rest.split_at(usize::from(seed[0]).min(rest.len()));
    let (left_text, right_text) = (String::from_utf8_lossy(left), String::from_utf8_lossy(right));
    texts(&right_text);
    events(&left_text, &right_text, right, Timestamp::from_micros(micros));
}

fn texts(text: &str) {
    let mut out = Buffer::new();
    let growth = escape(&mut out, text);
    let mut plain = Vec::new();
    escape_plain(text, &mut plain);
    assert!(out.written() == plain);
    let reference = serde_json::to_string(text).expect("a text");
    assert!(reference.as_bytes()[1..reference.len() - 1] == plain);
    assert_eq!(growth, separator_growth(text.as_bytes()));
    let mut escaped = Vec::new();
    escape_separators(text.as_bytes(), &mut escaped);
    assert_eq!(escaped.len(), text.len() + growth);
    let escaped = String::from_utf8(escaped).expect("UTF-8");
    let expected = text.replace('\u{85}', "\\u0085").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029");
    assert_eq!(escaped, expected);
}

fn events(left: &str, right: &str, data: &[u8], timestamp: Timestamp) {
    let id = MessageId::parse("6c84fb90-12c4-11e1-840d-7b25c5ee775a").expect("an id");
    let button = Button {
        label: left.to_owned(),
        custom_id: right.to_owned(),
        emoji: Some(right.to_owned()),
        ..Button::default()
    };
    let buttons = [button];
    // What each says, key by key and in this order, as `serde_json` writes texts; the time is the last.
    let (l, r) = [left, right].map(|text| serde_json::to_string(text).expect("a text")).into();
    check(
        &Event::Message { id, text: right, sender: left, reply_to: Some(id), timestamp },
        &format!(r#"{{"type":"message","id":"{id}","text":{r},"sender":{l},"reply_to":"{id}","#),
        timestamp,
    );
    check(
        &Event::Buttons { id, text: left, sender: right, reply_to: None, buttons: &buttons, timestamp },
        &format!(
            r#"{{"type":"message","id":"{id}","text":{l},"sender":{r},"buttons":[{{"label":{l},"custom_id":{r},"emoji":{r}}}],"#
        ),
        timestamp,
    );
    let base64 = base64::engine::general_purpose::STANDARD.encode(data);
    let size = data.len();
    check(
        &Event::File { id, filename: left, mimetype: right, data, timestamp },
        &format!(r#"{{"type":"file","id":"{id}","filename":{l},"mimetype":{r},"data":"{base64}","size":{size},"#),
        timestamp,
    );
    let edit = Event::Edit { id, text: right, timestamp };
    check(&edit, &format!(r#"{{"type":"edit","id":"{id}","text":{r},"#), timestamp);
}

/// The event is written as `front`, and behind it the time.
fn check(event: &Event<'_>, front: &str, timestamp: Timestamp) {
    let json = read(event);
    let rest = json.strip_prefix(front).unwrap_or_else(|| panic!("{json} does not begin with {front}"));
    let seconds =
        rest.strip_prefix("\"timestamp\":").and_then(|rest| rest.strip_suffix('}')).expect("a time, and no more");
    let seconds: f64 = seconds.parse().expect("a float");
    assert!((seconds - timestamp.as_seconds()).abs() <= timestamp.as_seconds() * 1e-15);
}

/// The event's JSON, in which `serde_json` reads the same as in the WebSocket form and in the event stream.
fn read(event: &Event<'_>) -> String {
    let frame = Frame::encode(event);
    let json = String::from_utf8(frame.json().to_vec()).expect("UTF-8");
    let value: Value = serde_json::from_str(&json).expect("JSON");
    assert!(frame.websocket().ends_with(frame.json()));
    let stream = frame.event_stream().expect("an event has this form");
    let chunk = [stream.prefix, stream.body].concat();
    let chunk = std::str::from_utf8(&chunk).expect("UTF-8");
    let (size, rest) = chunk.split_once("\r\n").expect("a chunk's size");
    let record = rest.strip_suffix("\r\n").expect("a chunk's end");
    assert_eq!(usize::from_str_radix(size, 16), Ok(record.len()));
    assert!(!record.contains(['\r', '\u{85}', '\u{2028}', '\u{2029}']));
    let lines: Vec<&str> = record.strip_suffix("\n\n").expect("a record's end").split('\n').collect();
    let (data, position) = lines.split_last().expect("a line");
    assert!(position.len() <= 1 && position.iter().all(|line| line.starts_with("id: ")));
    let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
    assert_eq!(data, value);
    json
}
