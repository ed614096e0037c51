mod model;

use serde_json::Value;

use super::*;
use crate::id::MessageId;
use crate::proto::event::{Button, ButtonStyle, ErrorCode, Event, GapReason, Notice, Timestamp};

const AT: Timestamp = Timestamp::from_micros(1_500_000);
const ANSWER: &str = "chatcmpl-0123456789abcdef0123456789abcdef";

fn id(number: usize) -> MessageId {
    MessageId::parse(&format!("00000000-0000-4000-8000-{number:012}")).unwrap()
}

fn message(number: usize, text: &str) -> Frame {
    Frame::encode(&Event::Message { id: id(number), text, sender: "star", reply_to: None, timestamp: AT })
}

fn edit(number: usize, text: &str) -> Frame {
    Frame::encode(&Event::Edit { id: id(number), text, timestamp: AT })
}

fn file(number: usize, filename: &str) -> Frame {
    let (data, mimetype) = (&b"secret"[..], "text/plain");
    Frame::encode(&Event::File { id: id(number), filename, mimetype, data, timestamp: AT })
}

fn buttons(number: usize, text: &str, buttons: &[Button]) -> Frame {
    let reply_to = Some(id(999));
    Frame::encode(&Event::Buttons { id: id(number), text, sender: "s\"", reply_to, buttons, timestamp: AT })
}

fn labels(labels: &[&str]) -> Vec<Button> {
    labels.iter().map(|label| Button { label: (*label).to_owned(), ..Button::default() }).collect()
}

fn typing(active: bool) -> Frame {
    Frame::encode(&Event::Typing { active })
}

fn end(reason: EndReason) -> Frame {
    Frame::encode(&Event::End { reason })
}

fn stop() -> Frame {
    end(EndReason::Stop)
}

/// As another node sends it: all that is not ASCII is escaped.
fn relayed(frame: &Frame) -> Frame {
    let mut ascii = String::new();
    for character in std::str::from_utf8(frame.json()).unwrap().chars() {
        if character.is_ascii() {
            ascii.push(character);
        } else {
            ascii.extend(character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    Frame::relay(frame.kind(), frame.message_id(), None, &ascii)
}

fn odd(kind: Kind, number: usize, json: &str) -> Frame {
    Frame::relay(kind, Some(id(number)), None, json)
}

fn head(wants_usage: bool) -> CompletionHead {
    CompletionHead {
        id: RequestId::parse(ANSWER).unwrap(),
        created: 1_700_000_000,
        model: "tabcast".into(),
        files_url: "https://chat.example".into(),
        wants_usage,
        prompt_tokens: 3,
    }
}

/// One record in short. It must have exactly our keys, in their order.
fn short(record: &str, wants_usage: bool) -> String {
    if record == ": keep-alive" {
        return "keep-alive".to_owned();
    }
    let json = record.strip_prefix("data: ").unwrap();
    if json == "[DONE]" {
        return "done".to_owned();
    }
    let value: Value = serde_json::from_str(json).expect(json);
    if let Some(error) = value.get("error") {
        let message = error["message"].as_str().unwrap();
        let code = error["code"].as_str().unwrap();
        let expected =
            format!(r#"{{"error":{{"message":"{message}","type":"server_error","param":null,"code":"{code}"}}}}"#);
        assert_eq!(json, expected);
        return format!("error {code}");
    }
    let front = format!(
        r#"{{"id":"{ANSWER}","object":"chat.completion.chunk","created":1700000000,"model":"tabcast","choices":["#
    );
    let (choice, back) = (&json.strip_prefix(&front).expect(json), if wants_usage { ",\"usage\":null}" } else { "}" });
    if let Some(usage) = choice.strip_prefix("],\"usage\":") {
        let number = |key: &str| value["usage"][key].as_u64().unwrap();
        let (prompt, content, total) = (number("prompt_tokens"), number("completion_tokens"), number("total_tokens"));
        let expected =
            format!(r#"{{"prompt_tokens":{prompt},"completion_tokens":{content},"total_tokens":{total}}}}}"#);
        assert_eq!(usage, expected);
        return format!("usage {prompt}+{content}={total}");
    }
    let choice = choice.strip_prefix("{\"index\":0,\"delta\":").unwrap().strip_suffix(back).expect(json);
    if choice == r#"{},"logprobs":null,"finish_reason":"stop"}]"# {
        return "stop".to_owned();
    }
    let delta = choice.strip_suffix(",\"logprobs\":null,\"finish_reason\":null}]").expect(json);
    if delta == r#"{"role":"assistant","content":""}"# {
        return "role".to_owned();
    }
    let content = delta.strip_prefix("{\"content\":").unwrap().strip_suffix('}').unwrap();
    let content: String = serde_json::from_str(content).expect("nothing but the content");
    assert!(!content.is_empty(), "an empty delta");
    format!("+{content}")
}

fn records(out: Vec<u8>, wants_usage: bool) -> Vec<String> {
    let out = String::from_utf8(out).unwrap();
    assert!(!out.contains(['\r', '\u{85}', '\u{2028}', '\u{2029}']), "{out}");
    let Some(records) = out.strip_suffix("\n\n") else {
        assert_eq!(out, "");
        return Vec::new();
    };
    let records = records.split("\n\n").map(|record| {
        assert!(!record.contains('\n'), "{record}");
        short(record, wants_usage)
    });
    records.collect()
}

fn run(frames: &[Frame], wants_usage: bool) -> Vec<String> {
    let (mut answer, mut out) = (Completion::new(head(wants_usage)), Vec::new());
    answer.start(&mut out);
    for frame in frames {
        answer.handle(frame, &mut out);
    }
    records(out, wants_usage)
}

/// The frames, as they are and as another node sends them.
fn check(frames: &[Frame], expected: &[&str]) {
    let expected = [&["role"], expected].concat();
    assert_eq!(run(frames, false), expected);
    assert_eq!(run(&frames.iter().map(relayed).collect::<Vec<_>>(), false), expected);
    for first in 0..frames.len().min(2) {
        let mixed =
            frames.iter().enumerate().map(|(at, frame)| if at % 2 == first { relayed(frame) } else { frame.clone() });
        assert_eq!(run(&mixed.collect::<Vec<_>>(), false), expected);
    }
}

fn whole(frames: &[Frame]) -> WholeCompletion {
    let mut answer = WholeCompletion::new(head(false).files_url);
    for frame in frames {
        answer.handle(frame);
    }
    answer
}

fn whole_content(frames: &[Frame]) -> String {
    let body: Value = serde_json::from_slice(&whole(frames).to_json(&head(false))).unwrap();
    body["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

fn check_whole(frames: &[Frame], expected: &str) {
    assert_eq!(whole_content(frames), expected);
    assert_eq!(whole_content(&frames.iter().map(relayed).collect::<Vec<_>>()), expected);
}

#[test]
fn an_answer_is_a_role_deltas_a_stop_and_done() {
    check(&[], &[]);
    check(&[stop()], &["stop", "done"]);
    check(&[message(1, "hi"), stop()], &["+hi", "stop", "done"]);
    let mut out = Vec::new();
    let mut answer = Completion::new(head(false));
    answer.start(&mut out);
    answer.handle(&message(1, "a\"\n😀"), &mut out);
    answer.handle(&stop(), &mut out);
    let chunk = |delta: &str, reason: &str| {
        format!(
            "data: {{\"id\":\"{ANSWER}\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"tabcast\",\
             \"choices\":[{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\"finish_reason\":{reason}}}]}}\n\n"
        )
    };
    let expected = [
        chunk(r#"{"role":"assistant","content":""}"#, "null"),
        chunk(r#"{"content":"a\"\n😀"}"#, "null"),
        chunk("{}", "\"stop\""),
        "data: [DONE]\n\n".to_owned(),
    ];
    assert_eq!(String::from_utf8(out).unwrap(), expected.concat());
}

#[test]
fn usage_comes_only_if_asked_for_and_is_null_before() {
    // "日本x\n\n" + "a\"" are seven characters, whatever their escapes are.
    let frames = [message(1, "日本x"), message(2, "a\""), typing(true), stop()];
    let expected = ["role", "+日本x", "+\n\na\"", "keep-alive", "stop", "usage 3+2=5", "done"];
    assert_eq!(run(&frames, true), expected);
    assert_eq!(run(&frames.each_ref().map(relayed), true), expected);
    assert!(!run(&frames, false).iter().any(|record| record.starts_with("usage")));
    assert_eq!(run(&[stop()], true), ["role", "stop", "usage 3+0=3", "done"]);
    let mut out = Vec::new();
    Completion::new(CompletionHead { prompt_tokens: u64::MAX, ..head(true) }).handle(&stop(), &mut out);
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains("\"finish_reason\":\"stop\"}],\"usage\":null}\n\n"), "{text}");
    assert!(text.contains("\"choices\":[],\"usage\":{\"prompt_tokens\":18446744073709551615,"), "{text}");
}

#[test]
fn growing_edits_of_the_newest_message_are_suffixes() {
    check(
        &[message(1, ""), edit(1, "H"), edit(1, "Hello"), edit(1, "Hello"), edit(1, "Hello!"), stop()],
        &["+H", "+ello", "+!", "stop", "done"],
    );
    check(&[message(1, "日"), edit(1, "日本"), edit(1, "日本😀"), edit(1, "日本😀é")], &["+日", "+本", "+😀", "+é"]);
    check(&[message(1, "a\\"), edit(1, "a\\n"), edit(1, "a\\n\n\"")], &["+a\\", "+n", "+\n\""]);
    check(&[message(1, "a\u{1}"), edit(1, "a\u{1}\u{2}")], &["+a\u{1}", "+\u{2}"]);
    check(&[message(1, "a"), edit(1, "a\u{2028}b\u{85}\u{2029}")], &["+a", "+\u{2028}b\u{85}\u{2029}"]);
    check(&[message(1, "a\u{2028}"), edit(1, "a\u{2028}b")], &["+a\u{2028}", "+b"]);
}

#[test]
fn what_would_split_a_line_is_escaped() {
    let mut out = Vec::new();
    let mut answer = Completion::new(CompletionHead { model: "m\u{2028}\"\n".into(), ..head(false) });
    answer.handle(&message(1, "a\u{85}\u{2028}\u{2029}"), &mut out);
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains(r#""model":"m\u2028\"\n","#), "{text}");
    assert!(text.contains(r#"{"content":"a\u0085\u2028\u2029"}"#), "{text}");
}

#[test]
fn an_edit_that_is_no_extension_is_held_until_the_end() {
    // A cursor that moves: what it stood for comes at the end.
    check(&[message(1, "▌"), edit(1, "Hel▌"), edit(1, "Hello"), stop()], &["+▌", "+Hello", "stop", "done"]);
    check(&[message(1, "abc"), edit(1, "abX"), stop()], &["+abc", "+X", "stop", "done"]);
    // It took something back, or everything: nothing to add.
    check(&[message(1, "abc"), edit(1, "ab"), stop()], &["+abc", "stop", "done"]);
    check(&[message(1, "abc"), edit(1, ""), stop()], &["+abc", "stop", "done"]);
    // At a character, never inside of one or of an escape.
    check(&[message(1, "aé"), edit(1, "aè"), stop()], &["+aé", "+è", "stop", "done"]);
    check(&[message(1, "a😀"), edit(1, "a😁b"), stop()], &["+a😀", "+😁b", "stop", "done"]);
    check(&[message(1, "a\n"), edit(1, "a\tb"), stop()], &["+a\n", "+\tb", "stop", "done"]);
    check(&[message(1, "\u{1}"), edit(1, "\u{2}"), stop()], &["+\u{1}", "+\u{2}", "stop", "done"]);
    check(&[message(1, "a\\n"), edit(1, "a\n"), stop()], &["+a\\n", "+\n", "stop", "done"]);
}

#[test]
fn a_held_text_that_is_extended_again_is_released() {
    check(&[message(1, "ab"), edit(1, "aX"), edit(1, "abc"), stop()], &["+ab", "+c", "stop", "done"]);
    check(&[message(1, "ab"), edit(1, "aX"), edit(1, "ab"), stop()], &["+ab", "stop", "done"]);
    check(
        &[message(1, "ab"), edit(1, "X"), edit(1, "abc"), edit(1, "abd"), edit(1, "abcd"), stop()],
        &["+ab", "+c", "+d", "stop", "done"],
    );
}

#[test]
fn later_messages_begin_behind_an_empty_line() {
    check(&[message(1, "a"), message(2, "b"), message(3, ""), message(4, "c")], &["+a", "+\n\nb", "+\n\nc"]);
    check(&[message(1, ""), message(2, "b")], &["+b"]);
    check(&[message(1, "a"), message(2, ""), edit(2, "b"), edit(2, "bc")], &["+a", "+\n\nb", "+c"]);
    let link = |number| format!("[f](https://chat.example/files/{}/f)", id(number));
    check(&[file(1, "f"), message(2, "b")], &[&format!("+{}", link(1)), "+\n\nb"]);
    check(&[file(1, "f"), file(2, "f")], &[&format!("+{}", link(1)), &format!("+\n\n{}", link(2))]);
    check(&[buttons(1, "", &labels(&["a"])), buttons(2, "", &labels(&["b"]))], &["+- a", "+\n\n- b"]);
}

#[test]
fn an_edit_of_an_older_message_is_held() {
    check(&[message(1, "a"), message(2, "b"), edit(1, "ac"), stop()], &["+a", "+\n\nb", "+\n\nc", "stop", "done"]);
    // The last one counts, and each message in its order.
    check(
        &[message(1, "a"), message(2, "b"), edit(1, "ax"), edit(2, "by"), edit(1, "az"), edit(2, "X"), stop()],
        &["+a", "+\n\nb", "+y", "+\n\nz", "+\n\nX", "stop", "done"],
    );
    // Nothing came in between.
    check(&[message(1, "a"), message(2, ""), edit(1, "ac"), stop()], &["+a", "+c", "stop", "done"]);
    // What was held when it was the newest.
    check(&[message(1, "a"), edit(1, "b"), message(2, "c"), stop()], &["+a", "+\n\nc", "+\n\nb", "stop", "done"]);
    // A file is newer than the message before it.
    let link = format!("+\n\n[f](https://chat.example/files/{}/f)", id(2));
    check(&[message(1, "a"), file(2, "f"), edit(1, "ab"), stop()], &["+a", &link, "+\n\nb", "stop", "done"]);
    check(&[message(1, "a"), file(2, "f"), edit(1, "ab")], &["+a", &link]);
    check(&[message(1, "a"), message(2, "b"), edit(1, "ac"), edit(1, "a"), stop()], &["+a", "+\n\nb", "stop", "done"]);
}

#[test]
fn an_edit_of_an_unknown_message_is_a_message() {
    check(&[edit(1, "a"), edit(1, "ab"), stop()], &["+a", "+b", "stop", "done"]);
    check(&[message(1, "a"), edit(2, "b"), edit(2, "bc"), edit(1, "ax")], &["+a", "+\n\nb", "+c"]);
}

#[test]
fn typing_keeps_alive_and_other_kinds_say_nothing() {
    check(&[typing(true), typing(false), typing(true)], &["keep-alive", "keep-alive"]);
    let notices = [
        Notice::Hello { session: 1, server_time: AT, message_bytes_max: 1, attachment_bytes_max: 1 },
        Notice::Ack { client_id: "c", id: Some(id(1)) },
        Notice::Error { code: ErrorCode::BadFrame, message: "m", client_id: None },
        Notice::Pong { client_id: None },
        Notice::Gap { reason: GapReason::RoomNotKept, count: None },
        Notice::Draining { retry_after_ms: 1 },
    ];
    check(&notices.map(|notice| Frame::notice(&notice)), &[]);
    assert_eq!(run(&[Frame::ping(), Frame::pong(b"x")], false), ["role"]);
}

#[test]
fn files_are_links_whatever_they_are_called() {
    let check_name = |filename: &str, label: &str, segment: &str| {
        let link = format!("[{label}](https://chat.example/files/{}/{segment})", id(1));
        check(&[file(1, filename), stop()], &[&format!("+{link}"), "stop", "done"]);
        check_whole(&[file(1, filename)], &link);
    };
    check_name("a.txt", "a.txt", "a.txt");
    check_name("", "", "");
    check_name("my file (1).png", "my file (1).png", "my%20file%20%281%29.png");
    check_name("[x](javascript:1)", "\\[x\\](javascript:1)", "%5Bx%5D%28javascript%3A1%29");
    check_name("a\\]b", "a\\\\\\]b", "a%5C%5Db");
    check_name("a\r\nb\u{85}c\u{2028}d\u{2029}", "a  b c d ", "a%0D%0Ab%C2%85c%E2%80%A8d%E2%80%A9");
    check_name("../../etc/passwd", "../../etc/passwd", "..%2F..%2Fetc%2Fpasswd");
    check_name("\"日\t😀", "\"日\t😀", "%22%E6%97%A5%09%F0%9F%98%80");
    check_name("100%?#", "100%?#", "100%25%3F%23");
    check_name(
        "<img src=x onerror=alert(1)>",
        "\\<img src=x onerror=alert(1)>",
        "%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E",
    );
    check_name("<javascript:alert(1)>", "\\<javascript:alert(1)>", "%3Cjavascript%3Aalert%281%29%3E");
    check_name("a`](b) `", "a\\`\\](b) \\`", "a%60%5D%28b%29%20%60");
}

#[test]
fn buttons_are_lines_behind_the_text() {
    check(&[buttons(1, "pick", &labels(&["Yes", "No"])), stop()], &["+pick\n- Yes\n- No", "stop", "done"]);
    check(&[message(1, "a"), buttons(2, "", &labels(&["b"]))], &["+a", "+\n\n- b"]);
    check(&[buttons(1, "", &[]), buttons(2, "a", &[]), edit(2, "ab")], &["+a", "+b"]);
    let button = Button {
        label: "Go\nthere".to_owned(),
        custom_id: "secret".to_owned(),
        emoji: Some("🔥".to_owned()),
        style: Some(ButtonStyle::Link),
        url: Some("https://x/?a=\"".to_owned()),
        disabled: Some(true),
    };
    check(&[buttons(1, "t\"", &[button])], &["+t\"\n- 🔥 Go there (https://x/?a=\")"]);
    let hostile = |label: &str, url: &str| Button {
        label: label.to_owned(),
        emoji: Some("<b>".to_owned()),
        url: Some(url.to_owned()),
        ..Button::default()
    };
    for (label, url, line) in [
        ("[x](javascript:1)", "[x](javascript:1)", "\\[x\\](javascript:1) ([x]%28javascript:1))"),
        ("<script>`", "<javascript:1>", "\\<script>\\` (%3Cjavascript:1%3E)"),
        ("a\u{2028}b", "https://x/\r\n- [y](z)`\\", "a b (https://x/%20%20-%20[y]%28z)%60%5C)"),
        ("v6", "http://[::1]:80/(a)", "v6 (http://[::1]:80/(a))"),
    ] {
        check(&[buttons(1, "", &[hostile(label, url)])], &[&format!("+- \\<b> {line}")]);
    }
    // The lines stand behind the text, so an edit of it is held; it is compared with the text alone.
    check(
        &[buttons(1, "a", &labels(&["b"])), edit(1, "ac"), message(2, "d"), stop()],
        &["+a\n- b", "+\n\nd", "+\n\nc", "stop", "done"],
    );
    check(&[buttons(1, "a", &labels(&["b"])), edit(1, "a"), stop()], &["+a\n- b", "stop", "done"]);
    check(&[buttons(1, "a", &labels(&["b"])), edit(1, "ac"), stop()], &["+a\n- b", "+\n\nc", "stop", "done"]);
}

#[test]
fn an_error_is_one_record_and_the_last() {
    for (reason, code) in
        [(EndReason::Error, "worker_error"), (EndReason::Timeout, "timeout"), (EndReason::Cancelled, "cancelled")]
    {
        let frames = [message(1, "a"), edit(1, "b"), end(reason), stop(), message(2, "c")];
        check(&frames, &["+a", &format!("error {code}")]);
        assert_eq!(run(&frames, true), ["role", "+a", &format!("error {code}")]);
    }
    for (failure, code) in [
        (Failure::SlowConsumer, "slow_consumer"),
        (Failure::Draining, "draining"),
        (Failure::Internal, "internal_error"),
        (Failure::Timeout, "timeout"),
    ] {
        let (mut answer, mut out) = (Completion::new(head(false)), Vec::new());
        assert!(!answer.is_over());
        answer.fail(failure, &mut out);
        assert!(answer.is_over());
        answer.fail(failure, &mut out);
        assert_eq!(records(out, false), [format!("error {code}")]);
    }
}

#[test]
fn after_the_end_nothing_is_appended() {
    let (mut answer, mut out) = (Completion::new(head(false)), Vec::new());
    answer.handle(&message(1, "a"), &mut out);
    answer.handle(&stop(), &mut out);
    assert!(answer.is_over());
    out.clear();
    for frame in [message(2, "b"), edit(1, "ab"), typing(true), file(3, "f"), stop(), end(EndReason::Error)] {
        answer.handle(&frame, &mut out);
    }
    answer.start(&mut out);
    answer.fail(Failure::Worker, &mut out);
    assert!(out.is_empty());
}

#[test]
fn a_frame_of_another_shape_has_no_text() {
    let uuid = id(1);
    let odd_texts = [
        String::new(),
        "{}".to_owned(),
        "nope".to_owned(),
        r#"{"type":"message"}"#.to_owned(),
        format!(r#"{{"id":"{uuid}","type":"message","text":"x"}}"#),
        format!(r#"{{"type":"message", "id":"{uuid}","text":"x"}}"#),
        format!(r#"{{"type":"message","id":"{uuid}","text":7}}"#),
        format!(r#"{{"type":"message","id":"{uuid}","text":"x"#),
        format!(r#"{{"type":"message","id":"{uuid}","text":"x\"#),
        format!(r#"{{"type":"message","id":"{uuid}","text":"\ud800","sender":"s"}}"#),
        format!(r#"{{"type":"message","id":"{uuid}","text":"\q","sender":"s"}}"#),
        format!("{{\"type\":\"message\",\"id\":\"{uuid}\",\"text\":\"a\nb\"}}"),
        format!(r#"{{"type":"message","id":"é{uuid}","text":"x"}}"#),
        format!(r#"{{"type":"edit","id":"{uuid}","text":"x"}}"#),
    ];
    for json in &odd_texts {
        for kind in [Kind::Message, Kind::Buttons] {
            assert_eq!(run(&[odd(kind, 1, json), stop()], false), ["role", "stop", "done"], "{json}");
        }
        let edit = json.replace("\"message\"", "\"edit\"");
        if !edit.contains(r#""text":"x"}"#) || edit.contains('é') || !edit.starts_with("{\"type\":\"edit\",\"id") {
            let frames = [message(1, "a"), odd(Kind::Edit, 1, &edit), stop()];
            assert_eq!(run(&frames, false), ["role", "+a", "stop", "done"], "{edit}");
        }
        assert_eq!(run(&[odd(Kind::File, 1, json), stop()], false), ["role", "stop", "done"], "{json}");
        assert_eq!(run(&[odd(Kind::Typing, 1, json)], false), ["role"]);
        // It is an end, whatever it says; not a good one.
        assert_eq!(run(&[odd(Kind::End, 1, json)], false), ["role", "error worker_error"]);
    }
    // Without an id there is nothing to remember it by.
    let json = message(1, "a").json().to_vec();
    let nameless = Frame::relay(Kind::Message, None, None, std::str::from_utf8(&json).unwrap());
    assert_eq!(run(&[nameless], false), ["role"]);
    // Text without its buttons, where they are none.
    for list in ["", r#","buttons":7"#, r#","buttons":[7]"#, r#","buttons":[{"label":7}]"#, r#","buttons":[{}]"#] {
        let json = format!(r#"{{"type":"message","id":"{uuid}","text":"a","sender":"s"{list}}}"#);
        assert_eq!(run(&[odd(Kind::Buttons, 1, &json)], false), ["role", "+a"], "{json}");
    }
}

#[test]
fn at_most_64_messages_are_remembered() {
    let mut frames: Vec<Frame> = (0..64).map(|number| message(number, "m")).collect();
    frames.extend([edit(0, "m0"), message(64, "new"), edit(0, "m00"), edit(77, "unknown"), edit(1, "m1"), stop()]);
    let records = run(&frames, false);
    // What was held of the forgotten one comes before the message that it made room for.
    assert_eq!(records[65..], ["+\n\n0", "+\n\nnew", "+\n\n1", "stop", "done"]);
    assert!(whole_content(&frames).starts_with("m0\n\nm1\n\nm\n\nm"));
    assert!(whole_content(&frames).ends_with("m\n\nnew"));

    let (mut answer, mut out) = (Completion::new(head(false)), Vec::new());
    for number in 0..1_000 {
        answer.handle(&message(number, ""), &mut out);
        assert!(answer.messages.len() <= 64);
    }
    assert!(out.is_empty());
}

#[test]
fn the_tail_moves_when_a_message_is_forgotten() {
    // The last content is that of message 1, which is at another place once message 0 is forgotten.
    let mut frames = vec![message(0, "a"), message(1, "b")];
    frames.extend((2..65).map(|number| message(number, "")));
    frames.extend([edit(1, "bc"), stop()]);
    check(&frames, &["+a", "+\n\nb", "+c", "stop", "done"]);
    let mut frames = vec![message(0, "a")];
    frames.extend((1..65).map(|number| message(number, "")));
    frames.extend([edit(64, "b"), stop()]);
    check(&frames, &["+a", "+\n\nb", "stop", "done"]);
}

#[test]
fn a_waiting_answer_is_small() {
    let answer = Completion::new(head(false));
    assert_eq!(size_of::<Completion>(), 96);
    assert!(answer.chunks.front.len() <= 160, "{}", answer.chunks.front.len());
    let mut answer = answer;
    let frame = message(1, "a");
    answer.handle(&frame, &mut Vec::new());
    answer.handle(&edit(1, "ab"), &mut Vec::new());
    assert!(!answer.messages.spilled(), "one message needs no allocation");
    // The frame of a file is not kept.
    let large = file(2, "f");
    let before = large.bytes();
    answer.handle(&large, &mut Vec::new());
    assert!(answer.messages.iter().all(|message| message.sent.kind() != Kind::File) && before > 0);
}

#[test]
fn a_whole_answer_is_the_final_texts() {
    check_whole(&[], "");
    check_whole(&[message(1, "a"), message(2, ""), message(3, "b")], "a\n\nb");
    check_whole(&[message(1, "a"), message(2, "b"), edit(1, "X\"\n"), edit(2, ""), edit(3, "c")], "X\"\n\n\nc");
    check_whole(&[buttons(1, "a", &labels(&["x", "y"])), edit(1, "z")], "z\n- x\n- y");
    check_whole(&[buttons(1, "a", &labels(&["x"])), edit(1, "")], "- x");
    let link = |number| format!("[f](https://chat.example/files/{}/f)", id(number));
    let frames = [file(1, "f"), message(2, "a"), file(3, "f"), file(4, "f"), message(5, "b"), edit(2, "c")];
    check_whole(&frames, &format!("{}\n\nc\n\n{}\n\n{}\n\nb", link(1), link(3), link(4)));
    let answer = whole(&[message(1, "hé\"llo"), end(EndReason::Stop), message(2, "late"), end(EndReason::Error)]);
    assert_eq!(answer.ending(), Some(EndReason::Stop));
    let expected = concat!(
        r#"{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion","created":1700000000,"#,
        r#""model":"tabcast","choices":[{"index":0,"message":{"role":"assistant","content":"hé\"llo"},"#,
        r#""logprobs":null,"finish_reason":"stop"}],"#,
        r#""usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}"#
    );
    assert_eq!(String::from_utf8(answer.to_json(&head(false))).unwrap(), expected);
    let answer = whole(&[message(1, "a"), file(2, "f"), buttons(3, "b", &labels(&["x", "y"])), message(4, "c")]);
    let body = answer.to_json(&head(false));
    assert!(body.capacity() <= body.len() + 256, "{} bytes in {}", body.len(), body.capacity());
    assert_eq!(whole(&[message(1, "a")]).ending(), None);
    assert_eq!(whole(&[end(EndReason::Timeout)]).ending(), Some(EndReason::Timeout));
    assert_eq!(whole(&[odd(Kind::End, 1, "{}")]).ending(), Some(EndReason::Error));
    let (short, long) = (whole(&[message(1, "a")]), whole(&[message(1, &"a".repeat(10_000))]));
    assert!(short.bytes() < 1_000 && long.bytes() > 10_000);
}

#[test]
fn errors_have_the_shape_that_clients_know() {
    let check = |kind: ErrorKind, name: &str| {
        let body = error_body("m\"\n\u{2028}", kind, Some("p\""), Some("c"));
        let expected = format!(r#"{{"error":{{"message":"m\"\n\u2028","type":"{name}","param":"p\"","code":"c"}}}}"#);
        assert_eq!(String::from_utf8(body).unwrap(), expected);
    };
    check(ErrorKind::InvalidRequest, "invalid_request_error");
    check(ErrorKind::Authentication, "authentication_error");
    check(ErrorKind::Permission, "permission_error");
    check(ErrorKind::RateLimit, "rate_limit_error");
    check(ErrorKind::Timeout, "timeout");
    check(ErrorKind::Server, "server_error");
}
