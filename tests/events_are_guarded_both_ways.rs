//! `/events` has two directions, and each its guards: who may watch, what a body may be, how much a user may say, and which
//! rooms a token opens, as over `/ws`.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use serde_json::{Value, json};
use support::{Gateway, KEYS, Response, Seen, bearer, get, handshake, post, token, token_with_rooms, with_lines};

fn start(settings: &[(&str, &str)]) -> Gateway {
    Gateway::start(&[&KEYS[..], &[("worker", "none")], settings].concat())
}

/// What is answered to a ping that is posted with this type and these lines of the head.
fn say(gateway: &Gateway, content_type: &str, lines: &str) -> Response {
    let mut client = gateway.connect();
    client.write(&with_lines(&post("/events", content_type, br#"{"type":"ping","client_id":"1"}"#), lines));
    client.response()
}

#[test]
fn a_body_that_a_form_could_send_says_nothing() {
    let gateway = start(&[]);
    let ann = bearer(&token("ann"));
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""] {
        let response = say(&gateway, content_type, &ann);
        assert_eq!(response.status, 415, "{content_type}: {}", response.text());
    }
    let response = say(&gateway, "application/json", &ann);
    let pong: Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!((response.status, pong), (200, json!({"type": "pong", "client_id": "1"})));
}

#[test]
fn only_an_operator_watches() {
    let gateway = start(&[]);
    let watch = |watched: &str, lines: &str| {
        let mut client = gateway.connect();
        client.write(&with_lines(&get(&format!("/events?watch={watched}")), lines));
        client.head()
    };
    let strangers =
        [(String::new(), 401), (bearer("nobody"), 401), (bearer("worker"), 403), (bearer("openai-ann"), 403)];
    let ann = token("ann");
    let users = [(bearer(&ann), 401), (format!("Cookie: tabcast_token={ann}\r\n"), 401)];
    for watched in ["status", "webchat:ann", "room:r"] {
        for (lines, status) in strangers.iter().chain(&users) {
            let head = watch(watched, lines);
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{watched} {lines}: {head}");
        }
        let head = watch(watched, &bearer("operator"));
        assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("text/event-stream"), "{watched}: {head}");
    }
}

#[test]
fn a_user_says_no_more_than_a_session_may() {
    let gateway = start(&[("inbound_messages_per_second_max", "1")]);
    let ping = post("/events", "application/json", br#"{"type":"ping","client_id":"1"}"#);
    let mut client = gateway.connect();
    // Ten seconds' worth at once, and a few more on a busy machine.
    client.write(&with_lines(&ping, &bearer(&token("ann"))).repeat(60));
    let answers: Vec<Response> = (0..60).map(|_| client.response()).collect();
    assert!(answers[..10].iter().all(|answer| answer.status == 200), "{:?}", answers[0]);
    let refused: Vec<&Response> = answers.iter().filter(|answer| answer.status != 200).collect();
    assert!(refused.len() >= 30, "{} of 60 are refused", refused.len());
    for answer in refused {
        let error: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!((answer.status, &error["code"]), (429, &json!("rate_limited")));
        assert_eq!((&error["client_id"], answer.header("retry-after")), (&json!("1"), Some("1")));
    }
    assert_eq!(say(&gateway, "application/json", &bearer(&token("bob"))).status, 200);
}

#[test]
fn a_token_opens_the_rooms_that_it_names_and_no_others() {
    let gateway = start(&[]);
    let ann = bearer(&token_with_rooms("ann", &["team-*", "hall"]));
    let mut tab = gateway.connect();
    tab.write(&with_lines(&handshake(""), &ann));
    tab.expect_switch();
    for (kind, room, expected) in [
        ("join", "team-a", "ack"),
        ("join", "hall", "ack"),
        ("join", "lobby", "forbidden"),
        ("join", "hall-2", "forbidden"),
        ("join", "team", "forbidden"),
        ("leave", "lobby", "forbidden"),
        ("typing", "lobby", "forbidden"),
        ("message", "lobby", "forbidden"),
    ] {
        tab.send(&json!({ "type": kind, "room": room, "text": "x", "active": true, "client_id": room }));
        let Seen::Text(text) = tab.frame() else { panic!("{kind} {room}") };
        let answer: Value = serde_json::from_slice(&text).unwrap();
        let found = answer.get("code").unwrap_or(&answer["type"]);
        assert_eq!((found, &answer["client_id"]), (&json!(expected), &json!(room)), "{kind} {room}: {answer}");
    }
    let mut client = gateway.connect();
    let message = json!({ "type": "message", "room": "lobby", "text": "x" }).to_string();
    client.write(&with_lines(&post("/events", "application/json", message.as_bytes()), &ann));
    assert_eq!(client.response().status, 403);
    // Nobody but those who may hears what is sent there.
    gateway_says(&gateway, "room:lobby");
    gateway_says(&gateway, "room:hall");
    let Seen::Text(text) = tab.frame() else { panic!("nothing came from the hall") };
    let heard: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!((&heard["type"], &heard["text"]), (&json!("message"), &json!("room:hall")));
}

/// A worker's message there, which says where it was sent.
fn gateway_says(gateway: &Gateway, channel: &str) {
    let mut client = gateway.connect();
    let message = json!({ "channel_id": channel, "text": channel }).to_string();
    client.write(&with_lines(&post("/api/send", "application/json", message.as_bytes()), &bearer("worker")));
    let response = client.response();
    assert_eq!(response.status, 200, "{}", response.text());
}
