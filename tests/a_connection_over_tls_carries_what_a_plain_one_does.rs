//! TLS under everything: tabs, requests, large frames, slow readers, and ends of every kind.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::Write;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use support::tls::{Authority, finish, over};
use support::{Client, Seen, get, handshake, masked};

fn ping(client_id: &str) -> Vec<u8> {
    masked(1, json!({"type": "ping", "client_id": client_id}).to_string().as_bytes())
}

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

#[test]
fn one_message_reaches_every_tab_whatever_its_version() {
    let authority = Authority::new();
    let gateway = authority.gateway(&[("shards", "2"), ("worker", "none")]);
    let versions = [&rustls::version::TLS12, &rustls::version::TLS13];
    let mut tabs: Vec<_> = (0..6)
        .map(|number| {
            let config = authority.client_of(&[versions[number % 2]]);
            over(&config, Client::connect(gateway.address)).upgraded("user=u")
        })
        .collect();
    for round in 0..50 {
        let answer = authority.post(&gateway, "/api/send", &json!({"channel_id": "u", "text": format!("{round}")}));
        assert_eq!(answer["tabs"], 6);
    }
    tabs[0].send(&json!({"type": "message", "text": "from a tab", "client_id": "c"}));
    for (number, tab) in tabs.iter_mut().enumerate() {
        assert_eq!(tab.stream.conn.protocol_version(), Some(versions[number % 2].version));
        assert_eq!(tab.stream.conn.alpn_protocol(), Some(&b"http/1.1"[..]));
        for round in 0..50 {
            assert_eq!(tab.json()["text"], format!("{round}"));
        }
    }
    for tab in &mut tabs[1..] {
        assert_eq!(tab.json()["text"], "from a tab");
    }
    assert_eq!(authority.metric(&gateway, "tabcast_tls_handshakes_total{outcome=\"failed\"}"), 0);
}

#[test]
fn what_was_opened_with_the_request_is_not_lost() {
    let authority = Authority::new();
    let gateway = authority.gateway(&[]);
    let frames = [ping("one"), ping("two"), ping("three")].concat();
    let request = [get("/healthz"), handshake("user=u")].concat();
    // All in one record, a record for each byte, and cut within the last frame.
    for piece in [usize::MAX, 1, request.len(), request.len() + frames.len() - 20] {
        let mut client = authority.connect(&gateway);
        for part in [&request[..], &frames].concat().chunks(piece.min(request.len() + frames.len())) {
            client.write(part);
        }
        assert_eq!(client.response().status, 200);
        client.expect_switch();
        for client_id in ["one", "two", "three"] {
            assert_eq!(client.json(), json!({"type": "pong", "client_id": client_id}));
        }
    }
}

#[test]
fn a_handshake_comes_while_earlier_responses_are_not_flushed() {
    let authority = Authority::new();
    let gateway = authority.gateway(&[]);
    let mut client = authority.connect(&gateway);
    client.write(&get("/app.js"));
    let script = client.response().body;
    let count = (4 << 20) / script.len();
    let mut client = over(&authority.client(), Client::connect_narrow(gateway.address, 16 << 10));
    // Everything is sent before anything is read: what waits on both sides is more than the kernel holds.
    client.write(&[get("/app.js").repeat(count), handshake("user=u"), ping("behind")].concat());
    for _ in 0..count {
        assert!(client.response().body == script);
    }
    client.expect_switch();
    assert_eq!(client.json(), json!({"type": "pong", "client_id": "behind"}));
}

#[test]
fn large_frames_come_whole_through_small_buffers() {
    let authority = Authority::new();
    let gateway = authority.gateway(&[("session_queue_bytes_max", "64MiB"), ("shards", "2")]);
    let narrow = || over(&authority.client(), Client::connect_narrow(gateway.address, 32 << 10)).upgraded("user=u");
    let mut tabs = [narrow(), narrow(), narrow()];
    let mut other = authority.tab(&gateway, "user=v");
    let files = [noise(16 << 20), noise(1 << 20), noise((1 << 20) + 1), noise(16 << 10), noise((16 << 10) - 300)];
    for (number, data) in files.iter().enumerate() {
        let mut client = authority.connect(&gateway);
        let head = format!(
            "POST /api/file?channel_id=u&filename={number} HTTP/1.1\r\nHost: localhost\r\nX-Tabcast-Raw: 1\r\n\
             Content-Length: {}\r\n\r\n",
            data.len()
        );
        client.write(&[head.as_bytes(), data].concat());
        let response = client.response();
        assert_eq!(response.status, 200, "{}", response.text());
        // Nobody reads the file yet, and somebody else's small frames go through all the same.
        authority.post(&gateway, "/api/send", &json!({"channel_id": "v", "text": "small"}));
        assert_eq!(other.json()["text"], "small");
    }
    let held = authority.metric(&gateway, "tabcast_tls_sealed_bytes");
    assert!((1..3 * (33 << 10)).contains(&held), "{held} bytes are kept for three tabs");
    for tab in &mut tabs {
        for (number, data) in files.iter().enumerate() {
            let file = tab.json();
            assert_eq!(file["filename"], number.to_string());
            assert!(STANDARD.decode(file["data"].as_str().unwrap()).unwrap() == *data, "file {number} differs");
        }
    }
    authority.wait_for_metric(&gateway, "tabcast_tls_sealed_bytes", 0);
}

#[test]
fn a_large_message_of_a_tab_comes_whole() {
    let authority = Authority::new();
    let gateway = authority.gateway(&[]);
    let mut tab = authority.tab(&gateway, "user=u");
    let text = "x".repeat(16_000);
    let data = STANDARD.encode(noise(1 << 20));
    let attachment = json!({"filename": "a.bin", "mime_type": "application/octet-stream", "data": data});
    tab.send(&json!({"type": "message", "text": text, "attachments": [attachment], "client_id": "c"}));
    loop {
        let frame = tab.json();
        match frame["type"].as_str().unwrap() {
            "ack" => break assert_eq!(frame["client_id"], "c"),
            "error" => panic!("{frame}"),
            _ => {}
        }
    }
}

#[test]
fn a_tab_that_stops_reading_costs_nothing_and_is_cut() {
    let authority = Authority::new();
    let settings = [
        ("session_queue_frames_max", "64"),
        ("recovery_frames_max", "16"),
        ("close_timeout", "10s"),
        ("worker", "none"),
        ("shards", "1"),
    ];
    let gateway = authority.gateway(&settings);
    let mut slow = over(&authority.client(), Client::connect_narrow(gateway.address, 8 << 10)).upgraded("user=u");
    let mut quick = authority.tab(&gateway, "user=u");
    let text = "x".repeat(16_000);
    let mut sent = 0;
    let partial = |gateway| authority.metric(gateway, "tabcast_partial_writes_total");
    while partial(&gateway) == 0 {
        authority.post(&gateway, "/api/send", &json!({"channel_id": "u", "text": text}));
        assert_eq!(quick.json()["text"], text);
        sent += 1;
        assert!(sent < 2_000, "the kernel takes everything");
    }
    // Whoever cannot be written to is not tried again, whatever comes for it.
    for _ in 0..32 {
        authority.post(&gateway, "/api/send", &json!({"channel_id": "u", "text": text}));
        assert_eq!(quick.json()["text"], text);
    }
    assert_eq!(partial(&gateway), 1);
    let cpu = gateway.cpu();
    std::thread::sleep(Duration::from_millis(500));
    assert!(gateway.cpu() - cpu < Duration::from_millis(50), "{:?}", gateway.cpu() - cpu);
    for _ in 0..64 {
        authority.post(&gateway, "/api/send", &json!({"channel_id": "u", "text": text}));
        assert_eq!(quick.json()["text"], text);
    }
    assert_eq!(authority.metric(&gateway, "tabcast_ended_sessions_total{reason=\"slow"), 1);
    // It reads again: what was begun comes whole, then why it ended.
    let mut seen = 0;
    let code = loop {
        match slow.frame() {
            Seen::Text(frame) => {
                assert_eq!(serde_json::from_slice::<Value>(&frame).unwrap()["text"], text);
                seen += 1;
            }
            Seen::Close(code, _) => break code,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(code, 4008);
    assert!((1..=sent).contains(&seen), "{seen} of {sent}");
    slow.write(&masked(8, &4008u16.to_be_bytes()));
    assert_eq!(slow.frame(), Seen::End);
    assert!(!slow.is_truncated, "the connection ended without a goodbye");
}

#[test]
fn ends_are_told_from_losses() {
    let authority = Authority::new();
    let gateway = authority.gateway(&[("worker", "none"), ("shards", "1")]);
    let sessions = "tabcast_sessions";
    // A close of the WebSocket is answered, and the goodbye of TLS is behind it.
    let mut tab = authority.tab(&gateway, "user=u");
    tab.write(&masked(8, &1000u16.to_be_bytes()));
    assert_eq!(tab.closed().0, 1000);
    assert_eq!(tab.frame(), Seen::End);
    assert!(!tab.is_truncated);
    authority.wait_for_metric(&gateway, sessions, 0);
    // A goodbye without a word of the WebSocket before it, and none at all.
    let mut tab = authority.tab(&gateway, "user=u");
    finish(&mut tab);
    authority.wait_for_metric(&gateway, sessions, 0);
    assert_eq!(tab.frame(), Seen::End);
    let tab = authority.tab(&gateway, "user=u");
    drop(tab);
    authority.wait_for_metric(&gateway, sessions, 0);
    // Behind the request, in the same flight: as over plain TCP, there is nobody to answer.
    let mut tab = authority.connect(&gateway);
    tab.stream.conn.complete_io(&mut tab.stream.sock).unwrap();
    tab.stream.conn.writer().write_all(&handshake("user=u")).unwrap();
    finish(&mut tab);
    tab.until_the_end();
    authority.wait_for_metric(&gateway, sessions, 0);
    // Not what the keys say.
    let mut tab = authority.tab(&gateway, "user=u");
    tab.stream.sock.write_all(&[23, 3, 3, 0, 32]).unwrap();
    tab.stream.sock.write_all(&[7; 32]).unwrap();
    authority.wait_for_metric(&gateway, sessions, 0);
    // The one that nobody answered may have been a session for a moment.
    assert!((3..=4).contains(&authority.metric(&gateway, "tabcast_ended_sessions_total{reason=\"connection")));
    assert_eq!(authority.metric(&gateway, "tabcast_ended_sessions_total{reason=\"normal"), 1);
}

#[test]
fn a_record_that_never_ends_counts_as_an_incomplete_message() {
    let authority = Authority::new();
    let settings = [
        ("inbound_bytes_max", "40KiB"),
        ("message_bytes_max", "16KiB"),
        ("attachment_bytes_max", "1KiB"),
        ("worker", "none"),
        ("shards", "1"),
    ];
    let gateway = authority.gateway(&settings);
    let mut tabs: Vec<_> = (0..4).map(|_| authority.tab(&gateway, "user=u")).collect();
    for tab in &mut tabs {
        // The head of a record of 16 KiB, and all of it but its last byte.
        tab.stream.sock.write_all(&[23, 3, 3, 64, 0]).unwrap();
        tab.stream.sock.write_all(&vec![0; (16 << 10) - 1]).unwrap();
    }
    // Two of them fit.
    let over_budget = "tabcast_ended_sessions_total{reason=\"over";
    authority.wait_for_metric(&gateway, over_budget, 2);
    let endings = tabs.iter_mut().map(|tab| {
        tab.stream.sock.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut byte = [0];
        std::io::Read::read(&mut tab.stream, &mut byte).ok().filter(|bytes| *bytes > 0).map(|_| byte[0])
    });
    assert_eq!(endings.flatten().collect::<Vec<_>>(), [0x88, 0x88]);
    drop(tabs);
    authority.wait_for_metric(&gateway, "tabcast_sessions", 0);
    // Their room is there again.
    let mut tab = authority.tab(&gateway, "user=u");
    for frame in masked(1, json!({"type": "ping", "client_id": "x".repeat(40)}).to_string().as_bytes()).chunks(7) {
        tab.write(frame);
    }
    assert_eq!(tab.json()["type"], "pong");
}
