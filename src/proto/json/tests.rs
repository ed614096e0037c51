use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as REFERENCE;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::proto::event::{ButtonStyle, EndReason, ErrorCode, GapReason};

const ID: &str = "6c84fb90-12c4-11e1-840d-7b25c5ee775a";
const OTHER: &str = "110ec58a-a0f2-4ac4-8393-c866d813b8d1";
const AT: Timestamp = Timestamp::from_micros(1_763_836_800_123_456);

fn id(text: &str) -> MessageId {
    MessageId::parse(text).unwrap()
}

fn event_json(event: &Event<'_>) -> String {
    let mut out = Buffer::new();
    write_event(&mut out, event);
    String::from_utf8(out.written().to_vec()).unwrap()
}

fn notice_json(notice: &Notice<'_>) -> String {
    let mut out = Buffer::new();
    write_notice(&mut out, notice);
    String::from_utf8(out.written().to_vec()).unwrap()
}

fn check(event: &Event<'_>, expected: &str) {
    assert_eq!(event_json(event), expected);
}

fn check_notice(notice: &Notice<'_>, expected: &str) {
    assert_eq!(notice_json(notice), expected);
}

fn message(text: &str) -> Event<'_> {
    Event::Message { id: id(ID), text, sender: "star", reply_to: None, timestamp: AT }
}

#[test]
fn a_message_has_its_keys_in_order() {
    check(
        &message("hello"),
        r#"{"type":"message","id":"6c84fb90-12c4-11e1-840d-7b25c5ee775a","text":"hello","sender":"star","timestamp":1763836800.123456}"#,
    );
    check(
        &Event::Message { id: id(ID), text: "", sender: "ü\"", reply_to: Some(id(OTHER)), timestamp: AT },
        r#"{"type":"message","id":"6c84fb90-12c4-11e1-840d-7b25c5ee775a","text":"","sender":"ü\"","reply_to":"110ec58a-a0f2-4ac4-8393-c866d813b8d1","timestamp":1763836800.123456}"#,
    );
}

#[test]
fn a_message_with_buttons_always_has_the_list() {
    let event =
        |buttons| Event::Buttons { id: id(ID), text: "pick", sender: "star", reply_to: None, buttons, timestamp: AT };
    check(
        &event(&[]),
        r#"{"type":"message","id":"6c84fb90-12c4-11e1-840d-7b25c5ee775a","text":"pick","sender":"star","buttons":[],"timestamp":1763836800.123456}"#,
    );
    let plain = Button { label: "Yes".to_owned(), custom_id: "y".to_owned(), ..Button::default() };
    let full = Button {
        label: "\"No\"".to_owned(),
        custom_id: "n\n".to_owned(),
        emoji: Some("🚫".to_owned()),
        style: Some(ButtonStyle::Link),
        url: Some("https://example.org/?a=\\".to_owned()),
        disabled: Some(false),
    };
    check(
        &event(&[plain, full]),
        r#"{"type":"message","id":"6c84fb90-12c4-11e1-840d-7b25c5ee775a","text":"pick","sender":"star","buttons":[{"label":"Yes","custom_id":"y"},{"label":"\"No\"","custom_id":"n\n","emoji":"🚫","style":"link","url":"https://example.org/?a=\\","disabled":false}],"timestamp":1763836800.123456}"#,
    );
    let replying =
        Event::Buttons { id: id(ID), text: "", sender: "s", reply_to: Some(id(OTHER)), buttons: &[], timestamp: AT };
    check(
        &replying,
        r#"{"type":"message","id":"6c84fb90-12c4-11e1-840d-7b25c5ee775a","text":"","sender":"s","reply_to":"110ec58a-a0f2-4ac4-8393-c866d813b8d1","buttons":[],"timestamp":1763836800.123456}"#,
    );
}

#[test]
fn a_file_has_padded_base64_and_its_raw_size_and_no_sender() {
    let event = |data| Event::File { id: id(ID), filename: "a \"b\".txt", mimetype: "text/plain", data, timestamp: AT };
    check(
        &event(b"hi?>"),
        r#"{"type":"file","id":"6c84fb90-12c4-11e1-840d-7b25c5ee775a","filename":"a \"b\".txt","mimetype":"text/plain","data":"aGk/Pg==","size":4,"timestamp":1763836800.123456}"#,
    );
    check(
        &event(b""),
        r#"{"type":"file","id":"6c84fb90-12c4-11e1-840d-7b25c5ee775a","filename":"a \"b\".txt","mimetype":"text/plain","data":"","size":0,"timestamp":1763836800.123456}"#,
    );
}

#[test]
fn the_other_events_have_their_keys_in_order() {
    check(
        &Event::Edit { id: id(ID), text: "new\ttext", timestamp: AT },
        r#"{"type":"edit","id":"6c84fb90-12c4-11e1-840d-7b25c5ee775a","text":"new\ttext","timestamp":1763836800.123456}"#,
    );
    check(&Event::Typing { active: true }, r#"{"type":"typing","active":true}"#);
    check(&Event::Typing { active: false }, r#"{"type":"typing","active":false}"#);
    for (reason, name) in [
        (EndReason::Stop, "stop"),
        (EndReason::Error, "error"),
        (EndReason::Timeout, "timeout"),
        (EndReason::Cancelled, "cancelled"),
    ] {
        check(&Event::End { reason }, &format!(r#"{{"type":"end","reason":"{name}"}}"#));
    }
}

#[test]
fn notices_have_their_keys_in_order() {
    let hello = Notice::Hello {
        session: u64::MAX,
        server_time: AT,
        message_bytes_max: 65_536,
        attachment_bytes_max: 1_048_576,
    };
    check_notice(
        &hello,
        r#"{"type":"hello","session":"18446744073709551615","server_time":1763836800.123456,"limits":{"message_bytes_max":65536,"attachment_bytes_max":1048576}}"#,
    );
    check_notice(
        &Notice::Ack { client_id: "c\"1", id: Some(id(ID)) },
        r#"{"type":"ack","client_id":"c\"1","id":"6c84fb90-12c4-11e1-840d-7b25c5ee775a"}"#,
    );
    check_notice(&Notice::Ack { client_id: "", id: None }, r#"{"type":"ack","client_id":""}"#);
    let error = |client_id| Notice::Error { code: ErrorCode::TooLarge, message: "a \\ is long", client_id };
    check_notice(&error(None), r#"{"type":"error","code":"too_large","message":"a \\ is long"}"#);
    check_notice(&error(Some("c")), r#"{"type":"error","code":"too_large","message":"a \\ is long","client_id":"c"}"#);
    check_notice(&Notice::Pong { client_id: None }, r#"{"type":"pong"}"#);
    check_notice(&Notice::Pong { client_id: Some("p") }, r#"{"type":"pong","client_id":"p"}"#);
    let gap = |count| Notice::Gap { reason: GapReason::UnknownPosition, count };
    check_notice(&gap(None), r#"{"type":"gap","reason":"unknown_position"}"#);
    check_notice(&gap(Some(0)), r#"{"type":"gap","reason":"unknown_position","count":0}"#);
    check_notice(&Notice::Draining { retry_after_ms: 1500 }, r#"{"type":"draining","retry_after_ms":1500}"#);
}

#[test]
fn text_is_sent_as_it_is_but_for_what_json_forbids() {
    let text = |text: &str| {
        let json = event_json(&message(text));
        json.split_once(r#""text":""#).unwrap().1.split_once(r#"","sender""#).unwrap().0.to_owned()
    };
    let check = |raw: &str, expected: &str| assert_eq!(text(raw), expected, "{raw:?}");
    check(" <b>&amp;</b> / ' \u{7f}\u{2028}\u{85} ", " <b>&amp;</b> / ' \u{7f}\u{2028}\u{85} ");
    check("\"\\", "\\\"\\\\");
    check("\u{8}\t\n\u{c}\r", "\\b\\t\\n\\f\\r");
    check("\0\u{b}\u{1b}\u{1f}", "\\u0000\\u000b\\u001b\\u001f");
    check("日本 😀", "日本 😀");
}

#[test]
fn timestamps_have_one_to_six_decimals() {
    let check = |micros: u64, expected: &str| {
        let json = event_json(&Event::Edit { id: id(ID), text: "", timestamp: Timestamp::from_micros(micros) });
        assert_eq!(json.split_once(r#""timestamp":"#).unwrap().1, format!("{expected}}}"));
    };
    check(0, "0.0");
    check(1, "0.000001");
    check(1_000_000, "1.0");
    check(1_500_000, "1.5");
    check(1_000_100, "1.0001");
    check(1_763_836_800_000_000, "1763836800.0");
    check(1_763_836_800_123_450, "1763836800.12345");
    check(u64::MAX, "18446744073709.551615");
}

#[test]
fn a_text_of_many_pieces_is_escaped_whole() {
    // Every piece's border falls on a different byte of the sequence, and inside characters.
    let text = "é\"\n\u{2028}".repeat(5000);
    let mut out = Buffer::new();
    let growth = escape(&mut out, &text);
    let mut expected = Vec::new();
    escape_plain(&text, &mut expected);
    assert!(out.written() == expected);
    assert_eq!(growth, 5000 * 3);
}

#[test]
fn separators_are_counted_and_escaped_and_their_neighbours_are_not() {
    let check = |text: &str, expected: &str| {
        let mut out = Vec::new();
        escape_separators(text.as_bytes(), &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), expected, "{text:?}");
        assert_eq!(separator_growth(text.as_bytes()), expected.len() - text.len());
        assert_eq!(escape(&mut Buffer::new(), text), expected.len() - text.len());
    };
    check("", "");
    check("plain", "plain");
    check("\u{84}\u{86}\u{2027}\u{202a}\u{a0}“”…é", "\u{84}\u{86}\u{2027}\u{202a}\u{a0}“”…é");
    check("\u{85}", "\\u0085");
    check("a\u{2028}b\u{2029}\u{2029}c\u{85}", "a\\u2028b\\u2029\\u2029c\\u0085");
}

#[test]
fn a_buffer_grows_and_is_used_again() {
    let mut out = Buffer::with_room(4);
    assert!(out.is_empty());
    out.put(b"longer than four");
    assert_eq!((out.written(), out.len()), (b"longer than four".as_slice(), 16));
    assert!(out.room_bytes() >= 16);
    out.clear();
    out.put(b"x");
    assert_eq!(out.written(), b"x");
}

fn text() -> impl Strategy<Value = String> {
    r#"([ -~]|["\\\x00-\x1f]|[\u{85}\u{2028}\u{2029}“é]|\PC|[a-z]{30}){0,60}"#
}

fn button() -> impl Strategy<Value = Button> {
    let style = prop::option::of(prop_oneof![Just(ButtonStyle::Primary), Just(ButtonStyle::Danger)]);
    let fields = (text(), text(), prop::option::of(text()), style, prop::option::of(text()), any::<Option<bool>>());
    fields.prop_map(|(label, custom_id, emoji, style, url, disabled)| Button {
        label,
        custom_id,
        emoji,
        style,
        url,
        disabled,
    })
}

/// What is absent is absent.
fn without_nulls(mut value: Value) -> Value {
    if let Value::Object(map) = &mut value {
        map.retain(|_, value| !value.is_null());
    }
    value
}

proptest! {
    #[test]
    fn another_parser_reads_back_what_was_written(
        (text, sender) in (text(), text()),
        reply in any::<bool>(),
        buttons in prop::collection::vec(button(), 0..4),
        data in prop::collection::vec(any::<u8>(), 0..200),
        micros in 0..1_u64 << 52,
    ) {
        let reply_to = reply.then(|| id(OTHER));
        let timestamp = Timestamp::from_micros(micros);
        let at = json!(format!("{:.6}", timestamp.as_seconds()).parse::<f64>().unwrap());
        let reply = reply_to.map(|id| id.to_string());
        let read = |event: &Event<'_>| serde_json::from_str::<Value>(&event_json(event)).unwrap();
        prop_assert_eq!(
            read(&Event::Message { id: id(ID), text: &text, sender: &sender, reply_to, timestamp }),
            without_nulls(json!({
                "type": "message", "id": ID, "text": text, "sender": sender, "reply_to": reply, "timestamp": at
            }))
        );
        let list: Vec<Value> = buttons.iter().map(|button| without_nulls(json!({
            "label": button.label, "custom_id": button.custom_id, "emoji": button.emoji,
            "style": button.style.map(ButtonStyle::as_str), "url": button.url, "disabled": button.disabled
        }))).collect();
        prop_assert_eq!(
            read(&Event::Buttons { id: id(ID), text: &text, sender: &sender, reply_to, buttons: &buttons, timestamp }),
            without_nulls(json!({
                "type": "message", "id": ID, "text": text, "sender": sender, "reply_to": reply, "buttons": list,
                "timestamp": at
            }))
        );
        prop_assert_eq!(
            read(&Event::File { id: id(ID), filename: &text, mimetype: &sender, data: &data, timestamp }),
            json!({
                "type": "file", "id": ID, "filename": text, "mimetype": sender, "data": REFERENCE.encode(&data),
                "size": data.len(), "timestamp": at
            })
        );
        prop_assert_eq!(
            read(&Event::Edit { id: id(ID), text: &text, timestamp }),
            json!({ "type": "edit", "id": ID, "text": text, "timestamp": at })
        );
        prop_assert_eq!(
            serde_json::from_str::<Value>(&notice_json(&Notice::Error {
                code: ErrorCode::BadField, message: &text, client_id: Some(&sender)
            })).unwrap(),
            json!({ "type": "error", "code": "bad_field", "message": text, "client_id": sender })
        );
    }

    #[test]
    fn the_escape_of_separators_changes_no_value(text in text()) {
        let json = event_json(&message(&text));
        let mut escaped = Vec::new();
        escape_separators(json.as_bytes(), &mut escaped);
        let escaped = String::from_utf8(escaped).unwrap();
        let separators = ['\u{85}', '\u{2028}', '\u{2029}'];
        prop_assert!(!escaped.contains(separators), "a separator is left");
        prop_assert_eq!(serde_json::from_str::<Value>(&escaped).unwrap(), serde_json::from_str::<Value>(&json).unwrap());
    }
}

#[test]
fn a_text_in_ascii_says_the_same() {
    let texts = ["", "plain ~", "\u{7f}\u{80}", "日本", "\u{1f980}", "\u{2028}\u{ffff}"];
    for text in texts {
        let json = serde_json::to_string(text).unwrap();
        let mut ascii = Vec::new();
        escape_non_ascii(json.as_bytes(), &mut ascii);
        assert!(ascii.iter().all(|byte| matches!(byte, b' '..=b'~')), "{text:?}");
        assert_eq!(serde_json::from_slice::<String>(&ascii).unwrap(), text);
    }
    let mut ascii = Vec::new();
    escape_non_ascii("é\u{1f980}".as_bytes(), &mut ascii);
    assert_eq!(ascii, br"\u00e9\ud83e\udd80");
}
