//! What tabs have begun to send and not finished is bounded for the whole process: who needs more is told to come back.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::time::Duration;

use serde_json::json;
use support::{Client, Gateway, PATIENCE, Seen, masked, now};

/// For two messages as they are held while they are incomplete, not for four.
const BUDGET: usize = 4 << 20;

/// A message of a mebibyte, which fits the limit of one message.
fn message() -> Vec<u8> {
    let data = "A".repeat(1 << 20);
    let attachments = json!([{"filename": "a", "mimetype": "text/plain", "data": data}]);
    let text = json!({"type": "message", "text": "x", "client_id": "c", "attachments": attachments});
    masked(1, text.to_string().as_bytes())
}

#[test]
fn and_give_it_back() {
    let settings =
        [("inbound_bytes_max", BUDGET.to_string()), ("worker", "none".to_owned()), ("shards", "2".to_owned())];
    let settings = settings.each_ref().map(|(name, value)| (*name, value.as_str()));
    let gateway = Gateway::start(&settings);
    let message = message();
    let (most, last) = message.split_at(message.len() - 1);
    // Over and over: whatever is finished, ended or lost gives its share back.
    for round in 0..4 {
        let tab = |name: &str| gateway.tab(&format!("user={name}{round}"));
        let mut tabs: Vec<_> = ["a", "b", "c", "d"].map(tab).into();
        tabs.iter_mut().for_each(|tab| tab.write(most));
        let deadline = now() + PATIENCE;
        let is_ended = |tab: &Client| {
            tab.stream.set_nonblocking(true).unwrap();
            let is_ended = tab.stream.peek(&mut [0]).is_ok();
            tab.stream.set_nonblocking(false).unwrap();
            is_ended
        };
        while !tabs.iter().any(is_ended) {
            assert!(now() < deadline, "round {round}: nothing bounds what is unfinished");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(tabs.pop());
        let mut acked = 0;
        for tab in &mut tabs {
            tab.write(last);
            match tab.frame() {
                Seen::Close(code, _) => assert_eq!(code, 1013),
                Seen::Text(ack) => {
                    assert!(ack.starts_with(br#"{"type":"ack","client_id":"c","#), "{ack:?}");
                    acked += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(acked > 0, "round {round}: nobody had room");
    }
}
