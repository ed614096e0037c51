//! SIGTERM: paced closes, everything queued is written, and the process leaves within its deadline.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::shards::Shards;
use support::{Client, Gateway, Seen, get, handshake, now, post};

const TABS: usize = 24;
const MESSAGES: usize = 40;
const DEADLINE: Duration = Duration::from_secs(15);

/// All texts up to the close, whether the tab was told how to come back, and when it was closed.
fn read(mut tab: Client) -> (Vec<String>, u64, Instant) {
    let (mut texts, mut retry_after) = (Vec::new(), None);
    loop {
        match tab.frame() {
            Seen::Text(text) => {
                let frame: Value = serde_json::from_slice(&text).unwrap();
                match frame["type"].as_str().unwrap() {
                    "draining" => retry_after = frame["retry_after_ms"].as_u64(),
                    _ => texts.push(frame["text"].as_str().unwrap().to_owned()),
                }
            }
            Seen::Ping(_) => {}
            Seen::Close(code, reason) => {
                assert_eq!((code, retry_after.is_some()), (1012, true), "{reason}");
                let at = now();
                assert_eq!(tab.frame(), Seen::End);
                return (texts, retry_after.unwrap(), at);
            }
            Seen::End => panic!("no close; {} texts", texts.len()),
        }
    }
}

#[test]
fn of_a_gateway() {
    let settings = [
        ("shards", "2"),
        ("drain_spread", "2s"),
        ("close_timeout", "1s"),
        ("drain_deadline", "15s"),
        ("session_queue_bytes_max", "64MiB"),
    ];
    let mut gateway = Gateway::start(&settings);
    let tabs: Vec<_> = (0..TABS).map(|tab| gateway.tab(&format!("user=u{tab}"))).collect();
    let mut reader = gateway.connect();
    reader.write(&get("/events?user=events"));
    assert!(reader.head().starts_with("HTTP/1.1 200 "));
    // It never reads, and has far more queued than the kernel takes.
    let stalled = Client::connect_narrow(gateway.address, 4 << 10).upgraded("user=stalled");
    let mut idle = gateway.connect();
    let mut late = gateway.connect();
    let data = "A".repeat(8 << 20);
    gateway.post("/api/file", &json!({"channel_id": "stalled", "filename": "f", "data": data}));
    let users: Vec<_> = (0..TABS).map(|tab| format!("u{tab}")).chain(["events".to_owned()]).collect();
    let lines: String = (0..MESSAGES)
        .flat_map(|number| users.iter().map(move |user| (number, user)))
        .map(|(number, user)| json!({"op": "send", "channel_id": user, "text": number.to_string()}).to_string() + "\n")
        .collect();
    let mut batch = gateway.connect();
    batch.write(&post("/api/batch", "application/x-ndjson", lines.as_bytes()));
    assert_eq!(batch.response().text().matches("\"delivered\":true").count(), users.len() * MESSAGES);

    let start = now();
    gateway.terminate();
    let readers: Vec<_> = tabs.into_iter().map(|tab| std::thread::spawn(move || read(tab))).collect();
    // Readiness flips at once, and nobody gets in any more.
    let draining = loop {
        idle.write(&get("/readyz"));
        let response = idle.response();
        if response.status != 200 {
            break response;
        }
    };
    assert_eq!((draining.status, draining.code().as_str()), (503, "draining"));
    late.write(&handshake("user=late"));
    assert_eq!(late.response().status, 503);

    let seen: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    for (texts, ..) in &seen {
        assert!(texts.iter().map(|text| text.parse::<usize>().unwrap()).eq(0..MESSAGES), "{texts:?}");
    }
    let mut waits: Vec<_> = seen.iter().map(|(_, wait, _)| *wait).collect();
    waits.sort_unstable();
    waits.dedup();
    assert!(waits.len() > TABS / 2, "all are to come back at once: {waits:?}");
    let closed = || seen.iter().map(|(.., at)| *at);
    let spread = closed().max().unwrap() - closed().min().unwrap();
    assert!(spread > Duration::from_secs(1), "closed within {spread:?}");
    let stream = String::from_utf8(reader.until_the_end()).unwrap();
    assert_eq!(stream.matches("\"type\":\"message\"").count(), MESSAGES);
    assert!(stream.contains("retry: ") && stream.ends_with("0\r\n\r\n"), "{stream}");
    assert_eq!(gateway.wait().code(), Some(0));
    let took = start.elapsed();
    assert!(took < DEADLINE, "{took:?}");
    let log = gateway.log();
    assert!(log.contains("drained") && !log.contains("deadline has passed"), "{log}");
    drop(stalled);
}

#[test]
fn of_shards_without_a_gateway() {
    let shards = Shards::start(2);
    let tabs: Vec<_> = (0..8).map(|_| Client::tab(shards.address(), "user=u")).collect();
    let kept_alive = Client::connect(shards.address());
    let readers: Vec<_> = tabs.into_iter().map(|tab| std::thread::spawn(move || read(tab))).collect();
    assert_eq!(shards.drain(Duration::from_millis(100), Duration::from_secs(15)), 0);
    readers.into_iter().for_each(|reader| drop(reader.join().unwrap()));
    drop(kept_alive);
}
