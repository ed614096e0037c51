//! With a file table for each shard a descriptor's number means another file in another thread. Under churn on all of
//! them, and with a worker that is called over sockets of a fourth table, no byte lands where it does not belong.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::collections::HashSet;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use support::{Client, Gateway, Seen, get, now, post};

const CHURNERS: usize = 5;
const WATCHERS: usize = 9;
const TIME: Duration = Duration::from_secs(4);

/// A worker behind a URL. It closes every other connection, so that descriptors come and go there as well.
fn worker(listener: TcpListener, delivered: Arc<Mutex<HashSet<String>>>) {
    for (number, stream) in listener.incoming().enumerate() {
        let (mut client, delivered) = (Client::new(stream.unwrap()), Arc::clone(&delivered));
        std::thread::spawn(move || {
            for _ in 0..1 + 3 * (number % 2) {
                if !matches!(client.stream.peek(&mut [0]), Ok(1)) {
                    return;
                }
                let head = client.head();
                assert!(head.starts_with("POST /hook HTTP/1.1\r\n"), "{head}");
                let is_length = |line: &str| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok();
                let length = head.lines().find_map(is_length);
                let body: Value = serde_json::from_slice(&client.take(length.unwrap())).unwrap();
                delivered.lock().unwrap().insert(body["content"].as_str().unwrap().to_owned());
                client.write(b"HTTP/1.1 204 No Content\r\n\r\n");
            }
        });
    }
}

/// A request on a connection of its own: the one answer and nothing behind it.
fn ask_alone(address: SocketAddr) {
    let mut client = Client::connect(address);
    client.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let response = client.response();
    assert_eq!((response.status, response.text().as_str()), (200, r#"{"status":"ok"}"#));
    assert_eq!(client.until_the_end(), b"");
}

/// Comes, speaks, is spoken to, and goes, again and again. Says what it has spoken.
fn churn(address: SocketAddr, own: usize, is_over: &AtomicBool) -> Vec<String> {
    let mut spoken = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        let round = spoken.len();
        // Another one each time: a tab that was dropped is noticed a little later.
        let user = format!("churner{own}-{round}");
        let text = format!("{user} says {round}");
        let mut tab = Client::tab(address, &format!("user={user}"));
        tab.send(&json!({"type": "message", "text": text, "client_id": text}));
        let ack = tab.json();
        assert_eq!((&ack["type"], &ack["client_id"]), (&json!("ack"), &json!(text)));
        let echo = tab.json();
        assert_eq!((&echo["text"], &echo["sender"], &echo["id"]), (&json!(text), &json!(user), &ack["id"]));
        let told = format!("{user} is told {round}");
        let mut worker = Client::connect(address);
        let body = json!({"channel_id": user, "text": told}).to_string();
        worker.write(&post("/api/send", "application/json", body.as_bytes()));
        let answer: Value = serde_json::from_slice(&worker.response().body).unwrap();
        assert_eq!(answer["tabs"], 1, "{answer}");
        assert_eq!(tab.json()["text"], told);
        match round % 3 {
            0 => drop(tab),
            1 => {
                tab.write(&support::masked(8, &1000u16.to_be_bytes()));
                assert_eq!(tab.closed().0, 1000);
                assert_eq!(tab.frame(), Seen::End);
            }
            _ => ask_alone(address),
        }
        spoken.push(text);
    }
    spoken
}

/// One of many tabs of one user, on all shards: numbers in order, and nothing else, until the shutdown.
fn watch(mut tab: Client) -> usize {
    let mut count = 0;
    loop {
        match tab.frame() {
            Seen::Text(text) => {
                let frame: Value = serde_json::from_slice(&text).unwrap();
                if frame["type"] == "draining" {
                    assert_eq!(tab.closed().0, 1012);
                    assert_eq!(tab.frame(), Seen::End);
                    return count;
                }
                assert_eq!(frame["text"], count.to_string());
                count += 1;
            }
            Seen::Ping(payload) => tab.write(&support::masked(10, &payload)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn under_churn() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let delivered = Arc::new(Mutex::new(HashSet::new()));
    let hook = Arc::clone(&delivered);
    std::thread::spawn(move || worker(listener, hook));
    let settings = [
        ("shards", "3"),
        ("file_tables", "per_shard"),
        ("worker", "webhook"),
        ("webhook_url", &url),
        ("drain_spread", "300ms"),
        ("close_timeout", "1s"),
    ];
    let mut gateway = Gateway::start(&settings);
    let address = gateway.address;
    let is_over = Arc::new(AtomicBool::new(false));
    let watchers: Vec<_> = (0..WATCHERS)
        .map(|_| {
            let tab = gateway.tab("user=watched");
            std::thread::spawn(move || watch(tab))
        })
        .collect();
    let mut count = 0;
    let churners: Vec<_> = (0..CHURNERS)
        .map(|own| {
            let is_over = Arc::clone(&is_over);
            std::thread::spawn(move || churn(address, own, &is_over))
        })
        .collect();
    let start = now();
    let mut speaker = gateway.connect();
    while start.elapsed() < TIME && !churners.iter().any(std::thread::JoinHandle::is_finished) {
        let body = json!({"channel_id": "watched", "text": count.to_string()}).to_string();
        count += 1;
        speaker.write(&post("/api/send", "application/json", body.as_bytes()));
        let answer: Value = serde_json::from_slice(&speaker.response().body).unwrap();
        assert_eq!(answer["tabs"], WATCHERS);
        speaker.write(&get("/metrics"));
        assert_eq!(speaker.response().status, 200);
    }
    is_over.store(true, Ordering::Relaxed);
    let spoken: Vec<_> = churners.into_iter().flat_map(|churner| churner.join().unwrap()).collect();
    assert!(spoken.len() > 20, "{} rounds", spoken.len());
    gateway.terminate();
    watchers.into_iter().for_each(|watcher| assert_eq!(watcher.join().unwrap(), count));
    assert_eq!(gateway.wait().code(), Some(0), "{}", gateway.log());
    // What was accepted reached the worker before the process left.
    let delivered = delivered.lock().unwrap();
    let lost: Vec<_> = spoken.iter().filter(|text| !delivered.contains(*text)).collect();
    assert!(lost.is_empty(), "{lost:?}");
}
