//! What a stranger gives us stays a value wherever we write it: in headers, event streams, frames, logs, metrics and
//! JSON; and no secret is in a log, at any level.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use support::{Client, Gateway, PATIENCE, Response, masked, now};
use tabcast::gateway::worker::redis::envelope;

/// What breaks out of something somewhere: lines, headers, logs, markup, attributes, paths, formats, terminals.
const HOSTILE: [&str; 26] = [
    "a\r\nX-Injected: 1",
    "a\nX-Injected: 1",
    "a\rX-Injected: 1",
    "a\n\ndata: injected\n\n",
    "a\r\n\r\n<script>alert(1)</script>",
    "a\n2026-01-01T00:00:00.000000Z ERROR injected",
    "a\0b",
    "a\u{85}X-Injected: 1",
    "a\u{2028}data: injected\u{2029}",
    "\u{1b}[31mred\u{1b}]0;title\u{7}",
    "a\u{202e}gnp.exe",
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)",
    "&lt;b&gt;&#x27;",
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "../../etc/passwd",
    "..\\..\\x",
    "%2e%2e%2f%00%0d%0a",
    "a\"; filename=\"b.exe",
    "tabcast_x{injected=\"1\"} 1",
    "}*{sg:nodes}\r\nDEL",
    "{\"type\":\"end\"}",
    "\\\" \\u0000 ${jndi:x} {{7*7}} %s%n",
];

/// Every header that we ever send.
const HEADERS: [&str; 33] = [
    "accept-ranges",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
    "allow",
    "cache-control",
    "connection",
    "content-disposition",
    "content-length",
    "content-range",
    "content-security-policy",
    "content-type",
    "cross-origin-resource-policy",
    "date",
    "etag",
    "idempotency-kept",
    "idempotency-replayed",
    "referrer-policy",
    "retry-after",
    "sec-websocket-accept",
    "sec-websocket-extensions",
    "sec-websocket-protocol",
    "sec-websocket-version",
    "transfer-encoding",
    "upgrade",
    "vary",
    "www-authenticate",
    "x-accel-buffering",
    "x-content-type-options",
    "x-request-id",
    "x-should-retry",
];

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// As a header's value: what no header may have is what a client cannot send.
fn as_header(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\t' } else { c }).collect()
}

/// Asks on a connection of its own, and looks at every line of the head.
fn ask(gateway: &Gateway, line: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
    let mut request = format!("{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    if !body.is_empty() {
        request.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    let mut client = gateway.connect();
    client.write(&[request.as_bytes(), b"\r\n", body].concat());
    let method = line.split(' ').next().unwrap();
    let response = client.response_to(method);
    check_head(&response.head);
    if response.header("content-type") == Some("application/json") && method != "HEAD" {
        let read: Result<Value, _> = serde_json::from_slice(&response.body);
        assert!(read.is_ok(), "{line}: {}", response.text());
        assert_eq!(response.header("x-content-type-options"), Some("nosniff"), "{line}");
    }
    response
}

fn check_head(head: &str) {
    let mut lines = head.strip_suffix("\r\n\r\n").unwrap().split("\r\n");
    assert!(lines.next().unwrap().starts_with("HTTP/1.1 "), "{head}");
    for line in lines {
        let (name, value) = line.split_once(": ").unwrap_or_else(|| panic!("{line:?} in {head}"));
        assert!(HEADERS.contains(&name.to_ascii_lowercase().as_str()), "{line:?} in {head}");
        assert!(value.bytes().all(|byte| byte == b'\t' || (0x20..0x7f).contains(&byte)), "{line:?}");
    }
}

fn api(gateway: &Gateway, route: &str, body: &Value, more: &[(&str, &str)]) -> Response {
    let headers = [&[("Content-Type", "application/json")], more].concat();
    ask(gateway, &format!("POST /api/{route}"), &headers, body.to_string().as_bytes())
}

/// Whatever a worker can say, with `value` in every place.
fn say_as_a_worker(gateway: &Gateway, value: &str, more: &[(&str, &str)]) {
    let id = "00000000-0000-4000-8000-000000000001";
    let key = as_header(value);
    api(
        gateway,
        "send",
        &json!({ "channel_id": "ann", "text": value }),
        &[more, &[("Idempotency-Key", &key)]].concat(),
    );
    for channel in [value, &format!("room:{value}"), &format!("sse:{value}"), &format!("webchat:{value}")] {
        api(gateway, "send", &json!({ "channel_id": channel, "text": "x" }), more);
        api(gateway, "end", &json!({ "channel_id": channel, "reason": value }), more);
    }
    api(gateway, "send", &json!({ "channel_id": "ann", "text": "x", "reply_to": value }), more);
    api(gateway, "edit", &json!({ "channel_id": "ann", "message_id": value, "text": "x" }), more);
    api(gateway, "edit", &json!({ "channel_id": "ann", "message_id": id, "text": value }), more);
    let button = json!({ "label": value, "custom_id": value, "url": value, "emoji": value, "style": value });
    api(gateway, "buttons", &json!({ "channel_id": "ann", "text": value, "buttons": [button] }), more);
    let button = json!({ "label": value, "custom_id": value, "url": value, "emoji": value });
    api(gateway, "buttons", &json!({ "channel_id": "ann", "text": value, "buttons": [button] }), more);
    for (filename, mimetype) in [(value, "text/plain"), ("a.txt", value)] {
        let file = json!({ "channel_id": "ann", "filename": filename, "mimetype": mimetype, "data": "YQ==" });
        let sent = api(gateway, "file", &file, more);
        let Some(url) = serde_json::from_slice::<Value>(&sent.body).unwrap()["url"].as_str().map(str::to_owned) else {
            continue;
        };
        let file = ask(gateway, &format!("GET /files/{}", url.strip_prefix("webchat://file/").unwrap()), &[], b"");
        assert_eq!((file.status, file.text().as_str()), (200, "a"), "{value:?}");
        assert!(file.header("content-security-policy").unwrap().starts_with("sandbox;"));
    }
    let line = format!("POST /api/file?channel_id=ann&filename={}", encoded(value));
    ask(gateway, &line, &[more, &[("X-Tabcast-Raw", "1"), ("Content-Type", &as_header(value))]].concat(), b"raw");
    let op = json!({ "op": value, "channel_id": "ann", "text": value });
    ask(
        gateway,
        "POST /api/batch",
        &[more, &[("Content-Type", "application/x-ndjson")]].concat(),
        op.to_string().as_bytes(),
    );
    ask(gateway, &format!("GET /api/users/{}", encoded(value)), more, b"");
}

/// Whatever anybody can put into a request without a key.
fn ask_as_anybody(gateway: &Gateway, value: &str) {
    let (encoded, header) = (encoded(value), as_header(value));
    for path in ["", "files/", "files/00000000-0000-4000-8000-000000000001/", "v1/models/", "v1/chat/completions/"] {
        ask(gateway, &format!("GET /{path}{encoded}"), &[], b"");
    }
    ask(gateway, &format!("GET /v1/chat/completions/{encoded}/events"), &[], b"");
    for name in
        ["Origin", "Referer", "User-Agent", "Accept", "If-None-Match", "Range", "Upgrade", "Sec-WebSocket-Protocol"]
    {
        ask(gateway, "GET /healthz", &[(name, &header)], b"");
        ask(gateway, "GET /ws?user=eve", &[(name, &header)], b"");
    }
    let preflight = [
        ("Origin", header.as_str()),
        ("Access-Control-Request-Headers", &header),
        ("Access-Control-Request-Method", "GET"),
    ];
    ask(gateway, "OPTIONS /events", &preflight, b"");
    ask(gateway, "OPTIONS /v1/models", &preflight, b"");
    let ask_ai = json!({ "model": value, "messages": [{ "role": value, "content": value }], value: value });
    let json = [("Content-Type", "application/json"), ("Idempotency-Key", &header), ("x-tabcast-detach", &header)];
    ask(gateway, "POST /v1/chat/completions", &json, ask_ai.to_string().as_bytes());
}

/// Whatever a tab can say.
fn say_as_a_tab(tab: &mut Client, value: &str) {
    let id = "00000000-0000-4000-8000-000000000001";
    for frame in [
        json!({ "type": "message", "text": value }),
        json!({ "type": "message", "text": "x", "client_id": value }),
        json!({ "type": "message", "text": "x", "room": value }),
        json!({ "type": "message", "text": "x", "attachments": [{ "filename": value, "mimetype": value, "data": "" }] }),
        json!({ "type": "button", "message_id": id, "custom_id": value }),
        json!({ "type": "join", "room": value }),
        json!({ "type": value }),
    ] {
        tab.send(&frame);
        tab.send(&json!({ "type": "ping", "client_id": "next" }));
        while let answer = tab.json()
            && answer["type"] != "pong"
        {
            let known = ["message", "edit", "typing", "file", "ack", "error"];
            assert!(known.contains(&answer["type"].as_str().unwrap()), "{answer}");
        }
    }
}

/// The records of an event stream, read as any reader splits lines: at LF, CR and both.
fn records(chunks: &[u8]) -> Vec<Vec<String>> {
    let (mut content, mut rest) = (Vec::new(), chunks);
    while let Some(at) = rest.windows(2).position(|pair| pair == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..at]).unwrap(), 16).unwrap();
        content.extend_from_slice(&rest[at + 2..at + 2 + size]);
        rest = &rest[at + 2 + size + 2..];
    }
    let text = String::from_utf8(content).unwrap();
    let splits = ['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}', '\u{b}', '\u{c}'];
    assert!(!text.contains('\0'), "{text:?}");
    let lines = text.split(splits).collect::<Vec<_>>();
    lines
        .split(|line| line.is_empty())
        .filter(|record| !record.is_empty())
        .map(|record| record.iter().map(|line| (*line).to_owned()).collect())
        .collect()
}

#[test]
fn no_value_leaves_its_place_in_a_stream_a_frame_or_a_header() {
    let gateway = Gateway::start(&[("shards", "1"), ("bad_frames_max", "255"), ("worker", "none")]);
    let mut reader = gateway.connect();
    reader.write(b"GET /events?user=ann HTTP/1.1\r\nHost: localhost\r\n\r\n");
    check_head(&reader.head());
    let mut tab = gateway.tab("user=ann");
    for value in HOSTILE {
        say_as_a_worker(&gateway, value, &[]);
        ask_as_anybody(&gateway, value);
        let query = format!("user={0}&name={0}&avatar={0}&after={0}&hello=1", encoded(value));
        let events = ask_events(&gateway, &format!("/events?{query}"), &as_header(value));
        assert_eq!(events, if value.chars().any(char::is_control) { 400 } else { 200 }, "{value:?}");
    }
    // All of it reached the tab whole: the texts are the ones that were sent.
    let mut texts = BTreeSet::new();
    tab.send(&json!({ "type": "ping" }));
    while let frame = tab.json()
        && frame["type"] != "pong"
    {
        texts.extend(frame["text"].as_str().map(str::to_owned));
    }
    for value in HOSTILE {
        assert!(texts.contains(value), "{value:?}");
        say_as_a_tab(&mut tab, value);
    }
    gateway.terminate();
    let records = records(&reader.until_the_end());
    assert!(records.len() > 4 * HOSTILE.len(), "{}", records.len());
    for record in records {
        for line in &record {
            let (field, value) = line.split_once(": ").unwrap_or_else(|| panic!("{record:?}"));
            match field {
                "data" => assert!(serde_json::from_str::<Value>(value).is_ok(), "{record:?}"),
                "id" => assert!(
                    value.len() == 36 && value.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit()),
                    "{record:?}"
                ),
                "retry" => assert!(value.parse::<u32>().is_ok(), "{record:?}"),
                "" => assert_eq!(value, "keep-alive"),
                _ => panic!("{record:?}"),
            }
        }
    }
}

/// The status of a stream that is opened and left.
fn ask_events(gateway: &Gateway, path: &str, position: &str) -> u16 {
    let mut client = gateway.connect();
    client.write(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: {position}\r\n\r\n").as_bytes());
    let head = client.head();
    check_head(&head);
    head[9..12].parse().unwrap()
}

const TOKEN_SECRET: &str = "hush-0-the-secret-of-all-users-tokens";
const SECRETS: [(&str, &str); 4] = [
    ("api_keys", "hush-1-worker"),
    ("operator_keys", "hush-2-operator"),
    ("openai_keys", "olga:hush-3-openai"),
    ("webhook_secret", "hush-4-webhook"),
];

fn token(claims: &Value) -> String {
    signed(&serde_json::value::to_raw_value(claims).unwrap())
}

/// A token with claims as they are written.
fn signed(claims: &RawValue) -> String {
    let key = jsonwebtoken::EncodingKey::from_secret(TOKEN_SECRET.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
}

fn keyed(more: &[(&str, &str)]) -> Gateway {
    let token_keys = format!("kid=main,alg=HS256,secret={TOKEN_SECRET}");
    // Tabs talk as fast as they can.
    let unlimited = ("inbound_messages_per_second_max", "0");
    let mut settings = vec![("shards", "1"), ("token_keys", token_keys.as_str()), unlimited];
    settings.extend(SECRETS);
    settings.extend(more);
    Gateway::start(&settings)
}

fn upgrade(more: &str) -> Vec<u8> {
    format!(
        "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n\r\n"
    )
    .into_bytes()
}

#[test]
fn no_secret_and_no_forged_line_is_in_a_log_of_any_level() {
    // The webhook is not there: what cannot be handed on is logged. Redis is not there either.
    let gateway = keyed(&[
        ("log", "trace"),
        ("worker", "webhook"),
        ("webhook_url", "http://127.0.0.1:1/?key=hush-5-query"),
        ("webhook_attempts_max", "2"),
        ("webhook_backoff_min", "1ms"),
        ("redis", "redis://user:hush-6-redis@127.0.0.1:1"),
        ("bad_frames_max", "255"),
    ]);
    let good = token(&json!({ "sub": "ann", "exp": 4_000_000_000u64, "name": "Ann" }));
    let bad = format!("{good}x");
    let forged = token(&json!({ "sub": "ann\n2026-01-01T00:00:00.000000Z ERROR injected", "exp": 4_000_000_000u64 }));
    let mut tab = gateway.connect();
    tab.write(&upgrade(&format!("Authorization: Bearer {good}")));
    tab.expect_switch();
    for carried in [&good, &bad, &forged] {
        for header in [
            format!("Authorization: Bearer {carried}"),
            format!("Sec-WebSocket-Protocol: tabcast, tabcast.bearer.{carried}\r\nOrigin: http://localhost"),
            format!("Cookie: tabcast_token={carried}\r\nOrigin: http://localhost"),
            format!("Cookie: tabcast_token={carried}\r\nOrigin: http://evil.example"),
        ] {
            let mut client = gateway.connect();
            client.write(&upgrade(&header));
            check_head(&client.head());
        }
        ask(&gateway, &format!("GET /events?token={carried}"), &[], b"");
    }
    let bearers =
        ["hush-1-worker", "hush-2-operator", "hush-3-openai", "hush-7-unknown"].map(|key| format!("Bearer {key}"));
    for (value, bearer) in HOSTILE.iter().zip(bearers.iter().cycle()) {
        say_as_a_worker(&gateway, value, &[("Authorization", &bearers[0])]);
        ask(&gateway, "GET /metrics", &[("Authorization", bearer)], b"");
        ask(&gateway, "DELETE /api/users/nobody", &[("Authorization", bearer)], b"");
        ask_as_anybody(&gateway, value);
        say_as_a_tab(&mut tab, value);
    }
    let asked = json!({ "messages": [{ "role": "user", "content": HOSTILE[5] }] }).to_string();
    let detached =
        [("Authorization", bearers[2].as_str()), ("Content-Type", "application/json"), ("Connection", "close")];
    let mut client = gateway.connect();
    let head = detached.map(|(name, value)| format!("{name}: {value}\r\n")).concat();
    client.write(
        format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {}\r\n\r\n{asked}",
            asked.len()
        )
        .as_bytes(),
    );
    gateway.wait_for_log("the webhook did not take a message");
    drop(client);
    gateway.terminate();
    let (mut log, deadline) = (gateway.log(), now() + PATIENCE);
    while !log.contains("drained") {
        assert!(now() < deadline, "it does not end: {log}");
        std::thread::sleep(Duration::from_millis(10));
        let more = gateway.log();
        if !more.is_empty() {
            log = format!("{log}\n{more}");
        }
    }
    assert!(log.contains("TRACE"), "this build logs at every level");
    assert!(log.lines().count() > 100, "{log}");
    for line in log.lines() {
        assert!(!line.contains("hush-"), "a secret: {line}");
        assert!(!line.contains(good.rsplit('.').next().unwrap()), "a token: {line}");
        assert!(line.starts_with("20") && line.as_bytes().get(10) == Some(&b'T'), "this line has no time: {line:?}");
        assert!(!line.contains("Z ERROR injected") || line.contains("\\n20"), "a forged line: {line}");
        assert!(!line.contains('\u{1b}'), "a terminal's command: {line:?}");
    }
}

#[test]
fn no_metric_has_a_strangers_word() {
    let gateway = Gateway::start(&[("shards", "1"), ("bad_frames_max", "255")]);
    let mut tab = gateway.tab("user=ann");
    let names = |gateway: &Gateway| -> BTreeSet<String> {
        let text = ask(gateway, "GET /metrics", &[], b"").text();
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.rsplit_once(' ').unwrap().0.to_owned())
            .collect()
    };
    let before = names(&gateway);
    assert!(before.len() > 50, "{before:?}");
    for value in HOSTILE {
        say_as_a_worker(&gateway, value, &[]);
        ask_as_anybody(&gateway, value);
        say_as_a_tab(&mut tab, value);
    }
    let labels = |names: &BTreeSet<String>| {
        names.iter().filter(|name| !name.contains("le=\"")).cloned().collect::<BTreeSet<_>>()
    };
    assert_eq!(labels(&names(&gateway)), labels(&before), "no series comes into being by what strangers say");
}

/// A body of `/api`, a line of a batch, a body of `/v1`, a frame of a tab and a worker's envelope, each with the same
/// text behind its first keys: all refuse it, or none. And the claims of a token.
#[test]
fn depth_doubled_keys_and_broken_text_are_refused_by_every_reader() {
    let gateway = keyed(&[("worker", "none"), ("bad_frames_max", "255")]);
    let good = token(&json!({ "sub": "ann", "exp": 4_000_000_000u64 }));
    let mut tab = gateway.connect();
    tab.write(&upgrade(&format!("Authorization: Bearer {good}")));
    tab.expect_switch();
    // Whether each of them can be read.
    let mut read = |more: &str| -> [bool; 5] {
        let worker = [("Authorization", "Bearer hush-1-worker"), ("Content-Type", "application/json")];
        let openai = [("Authorization", "Bearer hush-3-openai"), ("Content-Type", "application/json")];
        let send = format!(r#"{{"channel_id":"ann","text":"x"{more}}}"#);
        let api = ask(&gateway, "POST /api/send", &worker, send.as_bytes()).status == 200;
        let line = format!(r#"{{"op":"send","channel_id":"ann","text":"x"{more}}}"#);
        let batch = ask(&gateway, "POST /api/batch", &worker, line.as_bytes()).text();
        // It asks for nothing: what can be read is refused for that.
        let v1 = ask(&gateway, "POST /v1/chat/completions", &openai, format!(r#"{{"text":"x"{more}}}"#).as_bytes());
        assert_eq!(v1.status, 400);
        let frame = format!(r#"{{"type":"message","text":"x"{more}}}"#);
        tab.write(&masked(1, frame.as_bytes()));
        tab.send(&json!({ "type": "ping" }));
        let mut inbound = true;
        while let answer = tab.json()
            && answer["type"] != "pong"
        {
            inbound &= answer["type"] != "error";
        }
        let envelope = format!(r#"{{"type":"message","channel_id":"ann","text":"x"{more}}}"#);
        let envelope = envelope::decode(envelope.as_bytes(), 1 << 24).is_ok();
        [api, !batch.contains("\"error\""), v1.code() != "invalid_json", inbound, envelope]
    };
    assert_eq!(read(r#","other":[{"a":[1.5]}]"#), [true; 5]);
    for (what, more) in [
        ("a key twice", r#","text":"y""#),
        ("a key twice, written in two ways", r#","te\u0078t":"y""#),
        ("half a pair of surrogates", r#","reply_to":"\ud800""#),
        ("a number that is none", r#","reply_to":1e999"#),
        ("a line break in a text", ",\"reply_to\":\"a\nb\""),
    ] {
        assert_eq!(read(more), [false; 5], "{what}");
    }
    for (open, close) in [("[", "]"), (r#"{"a":"#, "}")] {
        let deep = format!(",\"reply_to\":{}1{}", open.repeat(10_000), close.repeat(10_000));
        assert_eq!(read(&deep), [false; 5], "10,000 levels of {open}");
    }
    for claims in [
        format!(r#"{{"sub":"ann","exp":4000000000,"rooms":{}{}}}"#, "[".repeat(5_000), "]".repeat(5_000)),
        r#"{"sub":"ann","sub":"bob","exp":4000000000}"#.to_owned(),
        r#"{"sub":"ann","exp":1,"exp":4000000000}"#.to_owned(),
        r#"{"sub":"ann","exp":1e999}"#.to_owned(),
        r#"{"sub":"ann","exp":"4000000000"}"#.to_owned(),
        r#"{"sub":"\ud800","exp":4000000000}"#.to_owned(),
        r#"{"sub":"ann","exp":4000000000,"rooms":{"0":"*"}}"#.to_owned(),
        r#"["ann",4000000000]"#.to_owned(),
    ] {
        let bearer = format!("Bearer {}", signed(&RawValue::from_string(claims.clone()).unwrap()));
        let refused = ask(&gateway, "GET /ws", &[("Authorization", &bearer)], b"");
        assert_eq!((refused.status, refused.code().as_str()), (401, "invalid_token"), "{claims}");
    }
    let giant = format!("Bearer {good}{}", "x".repeat(64 << 10));
    assert_eq!(ask(&gateway, "GET /ws", &[("Authorization", &giant)], b"").status, 431);
    // The same key twice in MessagePack, and 10,000 levels of it.
    let packed = |more: &[u8]| [&b"\x84\xa4type\xa7message\xaachannel_id\xa1a\xa4text\xa1x"[..], more].concat();
    assert!(envelope::decode(&packed(b"\xa5other\xc0"), 1 << 20).is_ok());
    assert!(envelope::decode(&packed(b"\xa4text\xa1y"), 1 << 20).is_err());
    assert!(envelope::decode(&packed(&[&b"\xa5other"[..], &[0x91; 10_000], b"\xc0"].concat()), 1 << 20).is_err());
}
