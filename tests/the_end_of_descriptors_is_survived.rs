//! Without descriptors left a gateway serves the tabs it has, rests, and lets new ones in as others leave.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::ErrorKind;
use std::net::TcpStream;
use std::sync::mpsc::{TryRecvError, sync_channel};
use std::time::Duration;

use serde_json::json;
use support::{Client, Gateway, PATIENCE, handshake, now, post};

const OPEN_FILES: usize = 64;

fn expect_pong(tab: &mut Client) {
    tab.send(&json!({"type": "ping"}));
    assert_eq!(tab.json(), json!({"type": "pong"}));
}

/// A client that has asked to become a tab.
fn ask_in(gateway: &Gateway) -> Client {
    let mut client = gateway.connect();
    client.write(&handshake("user=u"));
    client
}

/// Whether something came, in a moment.
fn has_answer(client: &Client) -> bool {
    client.stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let answer = client.stream.peek(&mut [0]);
    client.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    match answer {
        Ok(_) => true,
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
            false
        }
    }
}

#[test]
fn by_one_table_for_all() {
    let settings = [
        ("shards", "1"),
        ("file_tables", "shared"),
        ("tabs_per_user_max", "1000"),
        ("tabs_max", "57"),
        ("header_timeout", "5m"),
    ];
    let gateway = Gateway::try_start(&settings, Some(OPEN_FILES)).unwrap();
    let mut worker = gateway.connect();
    let mut send = |text: &str| {
        let body = json!({"channel_id": "u", "text": text}).to_string();
        worker.write(&post("/api/send", "application/json", body.as_bytes()));
        assert_eq!(worker.response().status, 200);
    };
    send("nobody is there");
    let (mut tabs, mut log) = (Vec::new(), String::new());
    // The gateway says it when it fails to take the next one, who may not have come yet.
    let mut last = 'full: loop {
        assert!(tabs.len() < OPEN_FILES, "the limit of open files is not there");
        let mut client = ask_in(&gateway);
        let deadline = now() + PATIENCE;
        while !has_answer(&client) {
            log += &gateway.log();
            if log.contains("cannot accept") {
                break 'full client;
            }
            assert!(now() < deadline, "neither an answer nor a word in the log: {log}");
        }
        client.expect_switch();
        tabs.push(client);
    };
    assert!(tabs.len() > 10);
    // In the backlog, for want of a descriptor.
    let mut waiting = ask_in(&gateway);
    // Clients keep on trying all the while.
    let address = gateway.address;
    let (stop, stopped) = sync_channel::<()>(0);
    let trying = std::thread::spawn(move || {
        let mut tries = Vec::new();
        while stopped.try_recv() == Err(TryRecvError::Empty) {
            let mut client = Client::connect(address);
            client.write(&handshake("user=late"));
            tries.push(client);
            std::thread::sleep(Duration::from_millis(25));
        }
        tries.len()
    });
    let (before, start) = (gateway.cpu(), now());
    std::thread::sleep(Duration::from_millis(2_500));
    let (spent, passed) = (gateway.cpu() - before, start.elapsed());
    println!("{spent:?} of CPU in {passed:?}");
    assert!(spent < passed / 20, "{spent:?} of CPU in {passed:?}");
    // Those who are there are served: what they ask, and what a worker sends.
    tabs.iter_mut().for_each(expect_pong);
    send("all are there");
    for tab in &mut tabs {
        assert_eq!(tab.json()["text"], "all are there");
    }
    drop(stop);
    let tries = trying.join().unwrap();
    assert!(tries > 30, "{tries} tries");
    log += &gateway.log();
    assert_eq!(log.matches("cannot accept").count(), 1, "said once");
    assert!(!has_answer(&waiting), "there was a descriptor left");
    drop(tabs.drain(..10));
    last.expect_switch();
    waiting.expect_switch();
    expect_pong(&mut waiting);
    let mut late = gateway.tab("user=u");
    expect_pong(&mut late);
    tabs.iter_mut().for_each(expect_pong);
}

/// Each shard has a table of its own. One that is almost full leaves the port to the others and comes back: whoever
/// connects gets in, or is refused at once when all are full.
#[test]
fn by_tables_of_their_own() {
    let settings = [("shards", "4"), ("file_tables", "per_shard"), ("tabs_per_user_max", "1000"), ("tabs_max", "300")];
    let gateway = Gateway::try_start(&settings, Some(100)).unwrap();
    let connect = || -> Option<Client> {
        match TcpStream::connect(gateway.address) {
            Ok(stream) => Some(Client::new(stream).upgraded("user=u")),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                None
            }
        }
    };
    let mut tabs: Vec<_> = std::iter::from_fn(connect).collect();
    assert!((120..4 * 95).contains(&tabs.len()), "{} tabs", tabs.len());
    tabs.iter_mut().for_each(expect_pong);
    let full = tabs.len();
    drop(tabs.drain(..full / 2));
    let deadline = now() + PATIENCE;
    while tabs.len() < full - 20 {
        assert!(now() < deadline, "the shards do not come back");
        match connect() {
            Some(tab) => tabs.push(tab),
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    tabs.iter_mut().for_each(expect_pong);
}
