//! Large frames through small socket buffers: written in parts, byte-identical at every tab, in nobody else's way.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use support::{Client, Gateway, Seen};

const TABS: usize = 4;
const FILES: usize = 4;

/// Bytes without a pattern that a shifted copy would repeat.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..bytes.div_ceil(8)).flat_map(|_| next()).take(bytes).collect()
}

fn send_file(gateway: &Gateway, name: &str, data: &[u8]) -> Value {
    let mut client = gateway.connect();
    let head = format!(
        "POST /api/file?channel_id=u&filename={name} HTTP/1.1\r\nHost: localhost\r\nX-Tabcast-Raw: 1\r\n\
         Content-Length: {}\r\n\r\n",
        data.len()
    );
    client.write(head.as_bytes());
    client.write(data);
    let response = client.response();
    assert_eq!(response.status, 200, "{}", response.text());
    serde_json::from_slice(&response.body).unwrap()
}

fn read_all(mut tab: Client, count: usize) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while frames.len() < count {
        match tab.frame() {
            Seen::Text(text) => frames.push(text),
            Seen::Ping(_) => {}
            other => panic!("{other:?} after {} frames", frames.len()),
        }
    }
    frames
}

#[test]
fn every_tab_gets_every_byte_and_small_frames_pass_the_large_ones() {
    let gateway = Gateway::start(&[("session_queue_bytes_max", "64MiB"), ("shards", "2")]);
    let tabs: Vec<_> =
        (0..TABS).map(|_| Client::connect_narrow(gateway.address, 32 << 10).upgraded("user=u")).collect();
    let mut other = gateway.tab("user=v");
    let files: [_; FILES] = [noise(16 << 20), noise(1 << 20), noise((1 << 20) + 1), noise((1 << 20) - 1)];
    for (number, data) in files.iter().enumerate() {
        assert_eq!(send_file(&gateway, &number.to_string(), data)["tabs"], TABS);
        gateway.post("/api/send", &json!({"channel_id": "u", "text": format!("after {number}")}));
        // Nobody reads the file yet, and somebody else's small frames go through all the same.
        for text in ["a", "b"] {
            gateway.post("/api/send", &json!({"channel_id": "v", "text": text}));
            assert_eq!(other.json()["text"], text);
        }
    }
    let readers: Vec<_> = tabs.into_iter().map(|tab| std::thread::spawn(move || read_all(tab, 2 * FILES))).collect();
    let seen: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    for tab in &seen[1..] {
        assert!(*tab == seen[0], "the tabs saw different bytes");
    }
    for (number, data) in files.iter().enumerate() {
        let file: Value = serde_json::from_slice(&seen[0][2 * number]).unwrap();
        assert_eq!((&file["filename"], &file["size"]), (&json!(number.to_string()), &json!(data.len())));
        assert!(STANDARD.decode(file["data"].as_str().unwrap()).unwrap() == *data);
        let message: Value = serde_json::from_slice(&seen[0][2 * number + 1]).unwrap();
        assert_eq!(message["text"], format!("after {number}"));
    }
}
