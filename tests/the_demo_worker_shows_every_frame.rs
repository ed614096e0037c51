//! End to end over one connection: what a person sees of the built-in worker.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use support::{Client, Gateway};

/// What a person sent is acked, then echoed with the acked id; the worker comes after both.
fn say(tab: &mut Client, message: &Value, text: &str) {
    tab.send(message);
    let ack = tab.json();
    assert_eq!((&ack["type"], &ack["client_id"]), (&json!("ack"), &message["client_id"]));
    if message["type"] == "message" {
        let echo = tab.json();
        assert_eq!((&echo["type"], &echo["text"]), (&json!("message"), &json!(text)));
        assert_eq!((&echo["id"], &echo["sender"]), (&ack["id"], &json!("ann")));
    }
}

fn keys(frame: &Value) -> Vec<&str> {
    frame.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn a_person_sees_typing_a_message_its_edits_buttons_and_a_file() {
    let gateway = Gateway::start(&[]);
    let mut tab = gateway.tab("user=ann&name=Ann&hello=1");
    assert_eq!(tab.json()["type"], "hello");

    say(&mut tab, &json!({"type": "message", "text": "hello there", "client_id": "1"}), "hello there");
    assert_eq!(tab.json(), json!({"type": "typing", "active": true}));
    let placeholder = tab.json();
    assert_eq!((&placeholder["text"], &placeholder["sender"]), (&json!("…"), &json!("star")));
    let mut text = String::new();
    let end = loop {
        let frame = tab.json();
        if frame["type"] != "edit" {
            break frame;
        }
        assert_eq!(frame["id"], placeholder["id"]);
        let longer = frame["text"].as_str().unwrap().to_owned();
        assert!(longer.starts_with(&text) && longer.len() > text.len(), "{text:?} then {longer:?}");
        text = longer;
    };
    assert_eq!((text.as_str(), end), ("You said: hello there", json!({"type": "typing", "active": false})));

    say(&mut tab, &json!({"type": "message", "text": "/buttons", "client_id": "2"}), "/buttons");
    let shown = tab.json();
    let styles = ["primary", "secondary", "success", "danger", "link", "premium", "secondary"];
    let buttons = shown["buttons"].as_array().unwrap();
    assert!(buttons.iter().map(|button| button["style"].as_str().unwrap()).eq(styles));

    let press = json!({"type": "button", "message_id": shown["id"], "custom_id": "demo:danger", "client_id": "3"});
    say(&mut tab, &press, "");
    assert_eq!(tab.json()["text"], "You pressed “demo:danger”.");

    say(&mut tab, &json!({"type": "message", "text": "/file", "client_id": "4"}), "/file");
    let file = tab.json();
    let mut expected = vec!["type", "id", "filename", "mimetype", "data", "size", "timestamp"];
    expected.sort_unstable();
    let mut found = keys(&file);
    found.sort_unstable();
    assert_eq!(found, expected);
    let bytes = STANDARD.decode(file["data"].as_str().unwrap()).unwrap();
    assert_eq!((&bytes[..8], &file["size"]), (&b"\x89PNG\r\n\x1a\n"[..], &json!(bytes.len())));

    // The same client id again: the same id, and the worker does not see it twice.
    tab.send(&json!({"type": "message", "text": "/file", "client_id": "4"}));
    assert_eq!(tab.json()["type"], "ack");
    tab.send(&json!({"type": "ping"}));
    assert_eq!(tab.json(), json!({"type": "pong"}));
}
